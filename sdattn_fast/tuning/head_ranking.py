"""Head ranking: every (layer, head) is scored by how well its word maps fit the objects of drawn pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files import load_heads, save_heads
from .head_scores import Score
from .observation import Head, Observation

__all__ = ["HeadRanking", "effective_attention", "rank_heads"]


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
    rows = torch.cat([score(o, o.maps.float()) for o in observations])
    judged = int((~rows.isnan()).any(1).sum())
    if not judged:
        raise ValueError("observations: no object was found in any picture, so no head can be scored")
    means = rows.nanmean(0)
    order = sorted(range(len(heads)), key=lambda i: -_or_least(float(means[i])))
    counts = _counts(len(heads))
    best = [torch.stack([o.maps[:, order[:k]].float().mean(1) for k in counts], 1) for o in observations]
    curve = torch.cat([score(o, maps) for o, maps in zip(observations, best, strict=True)]).nanmean(0)
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
        >>> scores = effective_attention(seen, ranking.best(), clip_score(clip))
        >>> gain = scores["chosen"].nanmean() / scores["all"].nanmean() - 1
    """
    if not observations:
        raise ValueError("observations: expected at least one, got none")
    wanted = [i for i, (layer, head) in enumerate(observations[0].heads) if head in chosen.get(layer, ())]
    if not wanted:
        raise ValueError("chosen: expected at least one head of the model, got none")
    means = [torch.stack([o.maps[:, i].float().mean(1) for i in (wanted, slice(None))], 1) for o in observations]
    rows = torch.cat([score(o, maps) for o, maps in zip(observations, means, strict=True)])
    return {"chosen": rows[:, 0], "all": rows[:, 1]}


def _counts(heads: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, ..., and all."""
    powers = {int(2**e * m) for e in range(heads.bit_length() + 1) for m in (1, 1.5)}
    return sorted({k for k in powers if 1 <= k <= heads} | {heads})


def _or_least(score: float) -> float:
    return score if math.isfinite(score) else -math.inf


def _frame(column: int, row: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.47, row - 0.46), 0.94, 0.92, fill=False, edgecolor="red", linewidth=2)
