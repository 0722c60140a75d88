"""The positive control chooses on some prompts and reports on others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("textblob")

from sdattn_fast.evaluation import control as module
from sdattn_fast.evaluation.control import attend_and_excite_grid, positive_control
from sdattn_fast.evaluation.peers import AttendAndExcite, GuidanceRescale
from sdattn_fast.guidance.phrases import find_phrases
from sdattn_fast.lab import load_pipeline
from sdattn_fast.measure.paired import interval

FIRST, SECOND = ["a red circle", "a blue square"], ["a green star", "a red square", "a yellow circle"]
HOW: dict[str, Any] = {"guidance": 4.0, "steps": 2}


@dataclass(frozen=True)
class Flat:
    """Pictures as bright as their prompt's noise says, and `more`."""

    brightness: int
    name: str
    unfit: str | None = None

    def left_out(self, pipe: Any, guidance: float) -> str | None:
        return self.unfit

    def draw(
        self, pipe: Any, prompts: Sequence[str], objects: Any, generators: Sequence[torch.Generator], *rest: Any
    ) -> np.ndarray:
        shades = [10 * (g.initial_seed() % 7) + self.brightness for g in generators]
        return np.stack([np.full((2, 2, 3), shade, np.uint8) for shade in shades])


def _bright(indices: Sequence[int], pictures: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([picture.mean() / 255 for picture in pictures])


@pytest.fixture
def flat_stock(monkeypatch: Any) -> None:
    def drawn(pipe: Any, prompts: Any, generators: Any, *rest: Any) -> np.ndarray:
        return Flat(50, "stock").draw(pipe, prompts, None, generators)

    monkeypatch.setattr(module, "pictures", drawn)
    monkeypatch.setattr(module, "stand_in", lambda pipe: pipe)


GRID = [Flat(20, "worse"), Flat(100, "best"), Flat(60, "good"), Flat(200, "none", "no reason")]


def _control(judge: Any = _bright, grid: Any = GRID, **options: Any) -> Any:
    return positive_control(None, FIRST, SECOND, [[]] * 5, judge, grid=grid, **{**HOW, **options})


def test_the_best_of_the_first_prompts_is_reported_on_the_second(flat_stock: None) -> None:
    progress: list[str] = []
    control = _control(first_noise=1, batch=2, tell=progress.append)
    assert control.chosen.name == "best" and control.left_out == {"none": "no reason"} and control.prompts == 3
    # Noises 1 and 2 are chosen on, 3 to 5 reported on.
    assert control.searched == {
        name: pytest.approx((15 + brightness) / 255)
        for name, brightness in (("stock", 50), ("worse", 20), ("best", 100), ("good", 60))
    }
    assert control.stock == pytest.approx(90 / 255) and control.mean == pytest.approx(140 / 255)
    assert control.difference == pytest.approx(50 / 255)
    assert progress[-1] == "best: 3 of 3" and len(progress) == 4 + 2 * 2


def test_the_interval_is_the_paired_bootstraps_of_what_was_judged(flat_stock: None) -> None:
    noise = np.random.default_rng(0).normal(size=(40, 2))

    def judge(indices: Sequence[int], pictures: Sequence[np.ndarray]) -> np.ndarray:
        better = [int(picture.mean() >= 115) for picture in pictures]
        return np.array([noise[i, j] if i != 7 else np.nan for i, j in zip(indices, better, strict=True)])

    control = positive_control(
        None, FIRST, ["a star"] * 38, [[]] * 40, judge, grid=[Flat(120, "bright")], first_noise=0, **HOW
    )  # fmt: skip
    difference = np.delete(noise[:, 1] - noise[:, 0], [0, 1, 7])
    assert (control.low, control.high) == interval(difference) and control.prompts == 37
    assert control.difference == pytest.approx(difference.mean()) and control.low < control.difference < control.high


def test_what_cannot_be_compared_is_refused(flat_stock: None) -> None:
    with pytest.raises(ValueError, match="grid: expected names that differ"):
        _control(grid=[Flat(1, "a"), Flat(2, "a")])
    with pytest.raises(ValueError, match="grid: expected names that differ, and from 'stock'"):
        _control(grid=[Flat(1, "stock")])
    with pytest.raises(ValueError, match=r"grid: expected something that the pipeline can carry, got .*no reason"):
        _control(grid=[Flat(1, "a", "no reason")])
    with pytest.raises(ValueError, match=r"judge: expected 2 shares, got an array of shape \(1,\)"):
        _control(judge=lambda indices, pictures: np.zeros(1))
    with pytest.raises(ValueError, match="judge: expected a share of some picture, got NaN alone"):
        _control(judge=lambda indices, pictures: np.full(len(indices), np.nan))
    for choose, report, phrases, message in (
        ([], SECOND, 3, "prompts_to_choose_on: expected at least 1, got 0"),
        (FIRST, SECOND[:1], 3, "prompts_to_report_on: expected at least 2, got 1"),
        (FIRST, SECOND, 4, "phrases: expected those of 5 prompts, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            positive_control(None, choose, report, [[]] * phrases, _bright, **HOW)


def test_the_grid_is_of_attend_and_excite() -> None:
    grid = attend_and_excite_grid()
    assert len({peer.name for peer in grid}) == 8
    assert {(peer.resolution, peer.scale) for peer in grid if isinstance(peer, AttendAndExcite)} == {
        (side, scale) for side in (16, 8) for scale in (0.5, 2.0, 8.0, 20.0)
    }


def test_a_pipeline_draws_it() -> None:
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    prompts = [*FIRST[:1], *SECOND[:2]]
    seen: list[tuple[int, ...]] = []

    def judge(indices: Sequence[int], pictures: Sequence[np.ndarray]) -> np.ndarray:
        assert all(p.shape == (64, 64, 3) and p.dtype == np.uint8 for p in pictures)
        seen.append(tuple(indices))
        return np.array([float(p.mean()) for p in pictures])

    phrases = [find_phrases(p, pipe.tokenizer) for p in prompts]
    grid = [AttendAndExcite(8.0, thresholds=()), AttendAndExcite(resolution=64, name="large"), GuidanceRescale(0.0)]
    control = positive_control(pipe, prompts[:1], prompts[1:], phrases, judge, grid=grid, **HOW)
    assert set(control.left_out) == {"large"} and seen == [(0,)] * 3 + [(1, 2)] * 2
    assert control.searched["stock"] == control.searched["guidance rescale"] != control.searched["Attend-and-Excite"]
