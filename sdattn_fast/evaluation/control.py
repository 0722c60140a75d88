"""A positive control: does a method that is known to help help here, on this model, judged by this judge?

Where it does not, an evaluation that finds no difference says nothing about what it evaluates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..guidance.phrases import NounPhrase
from ..measure.paired import interval
from .peers import AttendAndExcite, Peer
from .peers.pipelines import pictures, stand_in

__all__ = ["Control", "attend_and_excite_grid", "positive_control"]

ShareJudge = Callable[[Sequence[int], Sequence[np.ndarray]], np.ndarray]
_FIRST_NOISE = 2_000_000


@dataclass(frozen=True)
class Control:
    """What `positive_control` found.

    searched: name -> mean share present on the prompts to choose on, "stock" first. left_out: name -> why it was not
    drawn. chosen: the best of those searched, stock apart. stock, mean: of it on the prompts to report on; difference:
    the mean of chosen minus stock, low to high its paired 95 % bootstrap interval; prompts: how many were judged.
    """

    searched: dict[str, float]
    left_out: dict[str, str]
    chosen: Peer
    stock: float
    mean: float
    difference: float
    low: float
    high: float
    prompts: int


def attend_and_excite_grid(
    resolutions: Sequence[int] = (16, 8), scales: Sequence[float] = (0.5, 2.0, 8.0, 20.0)
) -> list[Peer]:
    """Attend-and-Excite at each resolution with each scale, named after them."""
    return [
        AttendAndExcite(scale, side, name=f"Attend-and-Excite, {side}x{side}, scale {scale:g}")
        for side in resolutions
        for scale in scales
    ]


def positive_control(
    pipe: Any,
    prompts_to_choose_on: Sequence[str],
    prompts_to_report_on: Sequence[str],
    phrases: Sequence[Sequence[NounPhrase]],
    judge: ShareJudge,
    *,
    guidance: float,
    steps: int,
    grid: Sequence[Peer] | None = None,
    batch: int = 8,
    first_noise: int = _FIRST_NOISE,
    tell: Callable[[str], None] | None = None,
) -> Control:
    """Choose the best of a grid on some prompts, and compare it with stock, from the same noise, on others.

    Args:
        pipe: a StableDiffusionPipeline. phrases: of each prompt, those to choose on first, the noun phrases of the
            things to be drawn. judge: (indices, pictures) -> (n,) shares of the objects present; an index is that of
            `phrases`, a picture is (height, width, 3) uint8, NaN is nothing to judge.
        guidance, steps: how all are drawn. grid: what to choose among, with names of their own;
            `attend_and_excite_grid` by default. batch: prompts drawn between two words of `tell`.
        first_noise: the seed of the first prompt's noise, then one more for each.

    Raises: ValueError where prompts and phrases differ in number, there are too few, names are alike, the pipeline
        can carry none of the grid, or nothing can be judged.
    """
    prompts = [*prompts_to_choose_on, *prompts_to_report_on]
    _check(prompts_to_choose_on, prompts_to_report_on, phrases)
    choosing, reporting = range(len(prompts_to_choose_on)), range(len(prompts_to_choose_on), len(prompts))
    peers = list(attend_and_excite_grid() if grid is None else grid)
    if len({peer.name for peer in peers} - {"stock"}) != len(peers):
        raise ValueError(f"grid: expected names that differ, and from 'stock', got {[peer.name for peer in peers]}")
    left_out = {peer.name: why for peer in peers if (why := peer.left_out(pipe, guidance)) is not None}
    peers = [peer for peer in peers if peer.name not in left_out]
    if not peers:
        raise ValueError(f"grid: expected something that the pipeline can carry, got {left_out or 'an empty list'}")

    def judged(peer: Peer | None, indices: range) -> np.ndarray:
        name = "stock" if peer is None else peer.name
        shares: list[float] = []
        for start in range(indices.start, indices.stop, batch):
            part = range(start, min(start + batch, indices.stop))
            texts, things = [prompts[i] for i in part], [phrases[i] for i in part]
            noise = [torch.Generator().manual_seed(first_noise + i) for i in part]
            if peer is None:
                drawn = pictures(stand_in(pipe), texts, noise, guidance, steps)
            else:
                drawn = peer.draw(pipe, texts, things, noise, guidance, steps)
            judged_shares = np.asarray(judge(part, list(drawn)), dtype=np.float64)
            if judged_shares.shape != (len(part),):
                raise ValueError(f"judge: expected {len(part)} shares, got an array of shape {judged_shares.shape}")
            shares.extend(judged_shares)
            if tell is not None:
                tell(f"{name}: {part.stop - indices.start} of {len(indices)}")
        return np.array(shares)

    searched = {"stock": _mean(judged(None, choosing))}
    searched |= {peer.name: _mean(judged(peer, choosing)) for peer in peers}
    chosen = max(peers, key=lambda peer: searched[peer.name])
    stock, best = judged(None, reporting), judged(chosen, reporting)
    both = np.isfinite(stock) & np.isfinite(best)
    difference = (best - stock)[both]
    low, high = interval(difference)
    return Control(
        searched, left_out, chosen, _mean(stock[both]), _mean(best[both]), _mean(difference), low, high, len(difference)
    )


def _check(choose: Sequence[str], report: Sequence[str], phrases: Sequence[Sequence[NounPhrase]]) -> None:
    if not choose:
        raise ValueError("prompts_to_choose_on: expected at least 1, got 0")
    if len(report) < 2:
        raise ValueError(f"prompts_to_report_on: expected at least 2, got {len(report)}")
    if len(phrases) != len(choose) + len(report):
        raise ValueError(f"phrases: expected those of {len(choose) + len(report)} prompts, got {len(phrases)}")


def _mean(shares: np.ndarray) -> float:
    known = shares[np.isfinite(shares)]
    if not len(known):
        raise ValueError("judge: expected a share of some picture, got NaN alone")
    return float(known.mean())
