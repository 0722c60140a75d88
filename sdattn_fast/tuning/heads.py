"""Head ranking: every (layer, head) is scored by how well its word maps fit the objects of drawn pictures.

A word's map in a head is the mean over denoising steps and over the word's tokens of the cross-attention probabilities,
upsampled bicubically. `iou_score` and `clip_score` say how a map is scored, and where that comes from.
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
    """A picture drawn with stock attention, with the maps of every head, as `observe` gives it.

    Attributes:
        prompt: Index of its prompt.
        picture: A PIL image.
        words: The words of its objects.
        heads: (layer, head) of every head, in the model's order.
        maps: (objects, heads, size, size) float16 tensor: probabilities times 1024.
    """

    prompt: int
    picture: Any
    words: tuple[str, ...]
    heads: tuple[Head, ...]
    maps: Tensor


@dataclass(frozen=True)
class HeadRanking:
    """Heads with their scores, as `rank_heads` gives them.

    Attributes:
        scores: For each (layer, head) the mean score over the objects, NaN without an object.
        measure: What the scores are.
        objects: The number of objects.
        curve: For some numbers k, the mean score of the mean map of the k best heads.
        notes: What else belongs into the file.

    Examples:
        >>> ranking = HeadRanking.load("heads.json")
        >>> ranking.draw("heads.png")
        >>> ranking.save("three.json", count=3)
        >>> with sdattn_fast.apply(pipe, program, heads=ranking.best(3)):
        ...     image = pipe(prompt).images[0]
    """

    scores: Mapping[Head, float]
    measure: str
    objects: int
    curve: Mapping[int, float]
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def order(self) -> list[Head]:
        """(layer, head) of every head, the best first."""
        return sorted(self.scores, key=lambda head: -_or_least(self.scores[head]))

    @property
    def count(self) -> int:
        """The number of best heads whose mean map has the best score."""
        return min(self.curve, key=lambda k: (-_or_least(self.curve[k]), k))

    def best(self, count: int | None = None) -> dict[str, list[int]]:
        """The best heads, for ``apply(pipe, heads=...)``.

        Args:
            count: How many. None: `HeadRanking.count`.

        Returns:
            {layer: indices of its heads}, with every layer, also those without a chosen head.

        Raises:
            TypeError: If `count` is not an int.
            ValueError: If there are not so many heads.
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
        """Write a file for ``apply(pipe, heads=path)`` that holds the best heads and all scores.

        Args:
            path: Path of the file.
            count: How many heads. None: `HeadRanking.count`.

        Raises:
            TypeError: If `notes` holds what JSON cannot.
            OSError: If the file cannot be written.
        """
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
        """Read a file that `save` wrote.

        Args:
            path: Its path.

        Returns:
            The ranking.

        Raises:
            TypeError: If a field has the wrong type.
            ValueError: If it holds no ranking.
            OSError: If it cannot be read.
        """
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
        """Draw the scores as a grid of layers and heads, with frames around the best. Needs matplotlib.

        Args:
            path: Path of the picture.
            count: How many heads to frame. None: `HeadRanking.count`.
        """
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
    """Score every head, and the mean map of the k best heads for growing k.

    Args:
        observations: What `observe` gave for one model.
        score: How well maps fit objects: `iou_score` or `clip_score`.
        measure: The name of the score, for files and pictures.

    Returns:
        The ranking.

    Raises:
        ValueError: If there is no observation, or none with an object that can be scored.

    Examples:
        >>> seen = list(observe(pipe, ["a black cat and a white dog"], [["cat", "dog"]]))
        >>> ranking = rank_heads(seen, clip_score(clip), "CLIP of masked pictures")
        >>> ranking.save("heads.json")

    Source: choosing by CLIP: PnP-OVSS, Luo et al. 2024, arXiv 2311.17095.
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
    """How well the mean map of chosen heads fits the objects, beside that of all heads.

    Effective attention is ``chosen.nanmean() / all.nanmean() - 1``, with `iou_score`.

    Args:
        observations: What `observe` gave for one model.
        chosen: {layer: indices of heads}, as `HeadRanking.best` gives.
        score: `iou_score` or `clip_score`.

    Returns:
        "chosen" and "all", each with an (objects,) tensor of scores, NaN for objects that cannot be scored.

    Raises:
        ValueError: If there is no observation, or no head is chosen.

    Examples:
        >>> found = effective_attention(seen, ranking.best(), clip_score(clip))
        >>> gain = found["chosen"].nanmean() / found["all"].nanmean() - 1
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
    """A score for `rank_heads`: intersection over union of maps with true masks.

    A map's mask is where it exceeds the middle between its smallest and largest value.

    Args:
        truth: Takes an `Observation` and returns each object's mask, a (height, width) bool array, or None if it was
            not drawn.

    Returns:
        The score.

    Examples:
        >>> ranking = rank_heads(seen, iou_score(segment), "mask IoU")  # segment: a segmentation model of yours
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
    """A score for `rank_heads` without true masks, by CLIP.

    It is the cosine of the object's text with the picture where only the mask is shown, less that where only the rest
    is shown. What is not shown has the picture's mean colour.

    Args:
        clip: The CLIP that judges.
        texts: Takes an `Observation` and returns a text for each object. None: "a photo of a" and the word.

    Returns:
        The score.

    Examples:
        >>> score = clip_score(ClipScorer.load("openai/clip-vit-large-patch14"))

    Source: PnP-OVSS, Luo et al. 2024, arXiv 2311.17095, scores masks by CLIP; that the hidden part counts against them
    is ours.
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
    """Draw prompts with stock attention and keep every head's maps of the objects' words.

    Args:
        pipe: A diffusers pipeline with a tokenizer, not patched.
        prompts: The texts.
        words: For each prompt the words that name its objects; the second "circle" is "circle (2)".
        seed: Prompt i is drawn from the noise of seed + i.
        size: Height and width of the maps.
        batch: Number of prompts drawn at once.
        layers: Names or fnmatch patterns of layers.
        **asked: Passed to the pipeline, such as ``num_inference_steps``.

    Yields:
        A picture with its maps, for each prompt with a word that was not cut off.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, or a prompt does not have a word.

    Examples:
        >>> for one in observe(pipe, ["a black cat and a white dog"], [["cat", "dog"]]):
        ...     one.picture.save(f"{one.prompt}.png")

    Source: the maps are those of DAAM, Tang et al. 2023, arXiv 2210.04885.
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
