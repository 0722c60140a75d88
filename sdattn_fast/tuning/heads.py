"""Which heads find the objects: every (layer, head) scored by how well its word maps fit what was drawn.

A word's map in a head is the mean over denoising steps and over the word's tokens of the cross-attention probabilities,
upsampled bicubically; its mask is where it passes the middle between its least and its greatest value. Where the true
masks are known, the score is the intersection over union of the two (`iou_score`). Elsewhere CLIP says how much better
the word fits what the mask shows than what it hides (`clip_score`).

Effective attention is the mean mask IoU of the chosen heads' mean map over that of all heads' mean map, less 1.

Source: PnP-OVSS (Luo et al. 2024, "Emergent Open-Vocabulary Semantic Segmentation from Off-the-shelf Vision-Language
Models") picks layer and head of a vision-language model by CLIP's score of masked pictures; that what is hidden counts
against a mask is ours, since a mask of everything fits any word. The maps are those of DAAM (Tang et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..files import load_heads, save_heads
from ..guidance.clip_score import ClipScorer
from ..guidance.pictures import pil_pictures
from ..patching.apply import apply
from ..patching.words import tokenizer_of, words_of
from ..program import Capture

__all__ = [
    "HeadRanking", "Observation", "clip_score", "effective_attention", "iou_score", "masks_of", "observe", "rank_heads",
]  # fmt: skip

Score = Callable[["Observation", Tensor], Tensor]
Head = tuple[str, int]


@dataclass(frozen=True, eq=False)
class Observation:
    """One prompt, drawn by stock attention.

    prompt: its index among those given. picture: a PIL picture. words: those of the objects. heads: every (layer,
    head), in the model's order. maps: (objects, heads, size, size) float16, probabilities times 1024.
    """

    prompt: int
    picture: Any
    words: tuple[str, ...]
    heads: tuple[Head, ...]
    maps: Tensor


@dataclass(frozen=True)
class HeadRanking:
    """What `rank_heads` found.

    scores: (layer, head) -> mean score over the objects, NaN where there was none. measure: what the scores are.
    objects: on how many they rest. curve: number of best heads -> mean score of their mean map; its best is `count`.
    notes: what else belongs to the file.
    """

    scores: Mapping[Head, float]
    measure: str
    objects: int
    curve: Mapping[int, float]
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def order(self) -> list[Head]:
        """The heads, best first; those of equal score in the model's order."""
        return sorted(self.scores, key=lambda head: -_or_least(self.scores[head]))

    @property
    def count(self) -> int:
        """How many of the best heads have the best mean map; of equal numbers the smallest."""
        return min(self.curve, key=lambda k: (-_or_least(self.curve[k]), k))

    def best(self, count: int | None = None) -> dict[str, list[int]]:
        """{layer: indices of its heads among the `count` best}, every layer named, for ``apply(heads=...)``.

        Raises: TypeError, ValueError: count is not an int in [1, number of heads].
        """
        count = self.count if count is None else count
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"count: expected an int, got {count!r}")
        if not 1 <= count <= len(self.scores):
            raise ValueError(f"count: expected 1 to {len(self.scores)}, the heads there are, got {count}")
        chosen: dict[str, list[int]] = {layer: [] for layer, _ in self.scores}
        for layer, head in self.order[:count]:
            chosen[layer].append(head)
        return {layer: sorted(heads) for layer, heads in chosen.items()}

    def save(self, path: str | Path, count: int | None = None) -> None:
        """A file for ``apply(heads=path)``: the `count` best heads, and in its notes every score. Raises: OSError."""
        layers: dict[str, list[float | None]] = {layer: [] for layer, _ in self.scores}
        for (layer, _), score in self.scores.items():
            layers[layer].append(score if math.isfinite(score) else None)
        notes = {
            "measure": self.measure, "objects": self.objects, "scores": layers,
            "curve": {str(k): v if math.isfinite(v) else None for k, v in self.curve.items()}, **self.notes,
        }  # fmt: skip
        save_heads(path, self.best(count), notes)

    @classmethod
    def load(cls, path: str | Path) -> HeadRanking:
        """Read such a file. Raises: ValueError, naming the file, where it holds no ranking; OSError."""
        _, notes = load_heads(path)
        try:
            scores = {
                (layer, head): math.nan if score is None else float(score)
                for layer, row in notes.pop("scores").items()
                for head, score in enumerate(row)
            }
            curve = {int(k): math.nan if v is None else float(v) for k, v in notes.pop("curve").items()}
            if not scores or not curve:
                raise ValueError("expected scores and a curve, got none")
            return cls(scores, str(notes.pop("measure")), int(notes.pop("objects")), curve, notes)
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: expected a ranking that `sdattn-fast heads` wrote: {error}") from None

    def draw(self, path: str | Path, count: int | None = None) -> None:
        """A picture of the grid, a row a layer and a column a head, the `count` best framed. Needs matplotlib."""
        from matplotlib.figure import Figure

        best = self.best(count)
        heads = max(head for _, head in self.scores) + 1
        grid = np.full((len(best), heads), np.nan)
        for row, layer in enumerate(best):
            for head in range(heads):
                grid[row, head] = self.scores.get((layer, head), math.nan)
        figure = Figure(figsize=(4.5 + 0.55 * heads, 1.6 + 0.42 * len(best)), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(grid, cmap="viridis", aspect="auto")
        figure.colorbar(image, label=self.measure)
        middle = (np.nanmin(grid) + np.nanmax(grid)) / 2 if np.isfinite(grid).any() else 0.0
        for row, layer in enumerate(best):
            for head in range(heads):
                if math.isfinite(grid[row, head]):
                    colour = "black" if grid[row, head] > middle else "white"
                    axes.text(head, row, f"{grid[row, head]:.2f}", ha="center", va="center", color=colour, fontsize=8)
                if head in best[layer]:
                    axes.add_patch(_frame(head, row))
        axes.set_xticks(range(heads))
        axes.set_yticks(range(len(best)), [layer.replace(".transformer_blocks", "…") for layer in best], fontsize=8)
        axes.set_xlabel("head")
        axes.set_title(f"{sum(map(len, best.values()))} of {len(self.scores)} heads chosen, {self.objects} objects")
        figure.savefig(Path(path), dpi=110)


def rank_heads(observations: Sequence[Observation], score: Score, measure: str) -> HeadRanking:
    """Score every head, then the mean maps of the k best for growing k.

    Args:
        observations: what `observe` gave, of one model.
        score: `iou_score` or `clip_score`.
        measure: what the scores are called in files and pictures.

    Raises: ValueError: no observation, or none with an object that the score can judge.
    """
    if not observations:
        raise ValueError("observations: expected at least one, got none")
    heads = observations[0].heads
    rows = torch.cat([score(one, one.maps.float()) for one in observations])
    judged = int((~rows.isnan()).any(1).sum())
    if not judged:
        raise ValueError("observations: no object was found in any picture, so no head can be scored")
    means = rows.nanmean(0)
    order = sorted(range(len(heads)), key=lambda i: -_or_least(float(means[i])))
    counts = _counts(len(heads))
    best = [torch.stack([one.maps[:, order[:k]].float().mean(1) for k in counts], 1) for one in observations]
    curve = torch.cat([score(one, maps) for one, maps in zip(observations, best, strict=True)]).nanmean(0)
    return HeadRanking(
        dict(zip(heads, means.tolist(), strict=True)), measure, judged, dict(zip(counts, curve.tolist(), strict=True))
    )


def effective_attention(
    observations: Sequence[Observation], chosen: Mapping[str, Sequence[int]], score: Score
) -> dict[str, Tensor]:
    """Each object's score by the mean map of the chosen heads ("chosen") and of all heads ("all"), (objects,), NaN
    where it is not known. Effective attention is ``chosen.nanmean() / all.nanmean() - 1``, with `iou_score`.

    Raises: ValueError: no observation, or no head chosen.
    """
    if not observations:
        raise ValueError("observations: expected at least one, got none")
    wanted = [i for i, (layer, head) in enumerate(observations[0].heads) if head in chosen.get(layer, ())]
    if not wanted:
        raise ValueError("chosen: expected at least one head of the model, got none")
    means = [torch.stack([one.maps[:, i].float().mean(1) for i in (wanted, slice(None))], 1) for one in observations]
    rows = torch.cat([score(one, maps) for one, maps in zip(observations, means, strict=True)])
    return {"chosen": rows[:, 0], "all": rows[:, 1]}


def iou_score(truth: Callable[[Observation], Sequence[np.ndarray | None]]) -> Score:
    """Intersection over union with the true masks.

    truth: of an observation, each object's mask, (height, width) bool, or None where it was not drawn.
    """

    def score(one: Observation, maps: Tensor) -> Tensor:
        rows = torch.full(maps.shape[:2], math.nan)
        for row, mask in enumerate(truth(one)):
            if mask is not None:
                true = torch.from_numpy(np.ascontiguousarray(mask))
                found = masks_of(_sized(maps[row], (int(true.shape[0]), int(true.shape[1]))))
                both, either = (found & true).sum((-1, -2)), (found | true).sum((-1, -2))
                rows[row] = both / either.clamp(min=1)
        return rows

    return score


def clip_score(clip: ClipScorer, texts: Callable[[Observation], Sequence[str]] | None = None) -> Score:
    """CLIP's cosine of the object's text with the picture where only the mask is shown, less that where only the rest
    is; what is not shown is the picture's mean colour.

    texts: of an observation, what CLIP is asked for each object; None: "a photo of a" and the word.
    """

    def score(one: Observation, maps: Tensor) -> Tensor:
        picture = np.asarray(one.picture.convert("RGB"))
        hidden = picture.mean((0, 1)).round().astype(np.uint8)
        names = [f"a photo of a {word.partition(' (')[0]}" for word in one.words] if texts is None else texts(one)
        asked = clip.texts(list(names))
        rows = torch.empty(maps.shape[:2])
        for row in range(maps.shape[0]):
            masks = masks_of(_sized(maps[row], picture.shape[:2])).numpy()[..., None]
            shown = clip.pictures([np.where(mask, picture, hidden) for mask in masks]) @ asked[row]
            rest = clip.pictures([np.where(mask, hidden, picture) for mask in masks]) @ asked[row]
            rows[row] = shown - rest
        return rows

    return score


def masks_of(maps: Tensor) -> Tensor:
    """(..., height, width) bool: where a map passes the middle between its least and its greatest value."""
    return maps > (maps.amin((-1, -2), keepdim=True) + maps.amax((-1, -2), keepdim=True)) / 2


def observe(
    pipe: Any,
    prompts: Sequence[str],
    words: Sequence[Sequence[str]],
    *,
    seed: int = 0,
    size: int = 64,
    batch: int = 8,
    layers: str | Sequence[str] = "*",
    **asked: Any,
) -> Iterator[Observation]:
    """Draw the prompts with stock attention and keep every head's maps of the objects' words.

    Args:
        pipe: a diffusers pipeline with a tokenizer, not patched.
        prompts: the texts. words: of each, the words that name its objects, as `Maps.per_word` calls them: the second
            "circle" is "circle (2)". Words that the tokenizer cut off are left out.
        seed: prompt i's noise is that of seed + i. size: of the maps kept, pixels a side. batch: prompts at once.
        layers: names or fnmatch patterns. asked: for the pipeline, such as num_inference_steps and guidance_scale.

    Raises: TypeError, ValueError: naming the argument; a word that its prompt does not have.
    """
    if len(words) != len(prompts):
        raise ValueError(f"words: expected one list for each of {len(prompts)} prompts, got {len(words)}")
    if size < 1 or batch < 1:
        raise ValueError(f"size, batch: expected at least 1, got {size}, {batch}")
    tokens = [_tokens_of(tokenizer_of(pipe), prompt, mine) for prompt, mine in zip(prompts, words, strict=True)]
    for start in range(0, len(prompts), batch):
        part = range(start, min(start + batch, len(prompts)))
        wanted = sorted({t for i in part for indices in tokens[i].values() for t in indices})
        if not wanted:
            continue
        capture = Capture(
            tuple(wanted), stage="softmax", reduce="none", layers=layers if isinstance(layers, str) else tuple(layers)
        )
        with apply(pipe, capture=capture) as patch:
            noise = [torch.Generator().manual_seed(seed + i) for i in part]
            images = pipe([prompts[i] for i in part], **{**asked, "output_type": "np"}, generator=noise).images
            pictures = pil_pictures(images)
            maps = patch.maps
        heads = tuple((layer, head) for layer, x in maps.items() for head in range(x.shape[1]))
        for row, i in enumerate(part):
            of_words = [
                torch.cat([_word_maps(x[row], [wanted.index(t) for t in ids], size) for x in maps.values()])
                for ids in tokens[i].values()
            ]
            if of_words:
                yield Observation(i, pictures[row], tuple(tokens[i]), heads, torch.stack(of_words))


def _tokens_of(tokenizer: Any, prompt: str, words: Sequence[str]) -> dict[str, list[int]]:
    """The tokens of each word; words past the tokenizer's length are left out."""
    kept = words_of(tokenizer, prompt)
    found: dict[str, list[int]] = {}
    for word in words:
        if word in kept:
            found[word] = kept[word]
        elif word.partition(" (")[0].lower() not in prompt.lower():
            raise ValueError(f"words: expected words of the prompt, {', '.join(map(repr, kept))}, got {word!r}")
    return found


def _word_maps(maps: Tensor, tokens: list[int], size: int) -> Tensor:
    """(H, T, h, w) -> (H, size, size) float16, the mean over the word's tokens."""
    # Small probabilities would lose bits in float16.
    return _sized(1024 * maps[:, tokens].float().mean(1), (size, size)).half().cpu()


def _sized(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(maps.shape[-2:]) == tuple(size[:2]):
        return maps
    return F.interpolate(maps[:, None], size=tuple(size[:2]), mode="bicubic", align_corners=False)[:, 0]


def _counts(heads: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, ..., and all."""
    powers = {int(2**e * m) for e in range(heads.bit_length() + 1) for m in (1, 1.5)}
    return sorted({k for k in powers if 1 <= k <= heads} | {heads})


def _or_least(score: float) -> float:
    return score if math.isfinite(score) else -math.inf


def _frame(column: int, row: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.47, row - 0.46), 0.94, 0.92, fill=False, edgecolor="red", linewidth=2)
