"""Bootstrap intervals of paired comparisons."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from sdattn_fast.measure.paired import cell_text, interval, interval_of_means, summary


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    sample = np.random.default_rng(1).normal(0.3, 2.0, 2000)
    low, high = interval(sample)
    half = stats.norm.ppf(0.975) * sample.std() / math.sqrt(len(sample))
    assert low == pytest.approx(sample.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(sample.mean() + half, abs=0.1 * half)
    assert interval(sample) == (low, high)


def test_a_statistic_of_two_samples_draws_pairs():
    whole = np.random.default_rng(2).uniform(1.0, 9.0, 50)
    # Of pairs in one ratio, every sample of pairs has that ratio.
    low, high = interval(1.5 * whole, whole, statistic=lambda a, b: float(a.sum() / b.sum()))
    assert low == pytest.approx(1.5) and high == pytest.approx(1.5)


def test_what_cannot_be_known_has_no_bounds():
    assert interval(np.array([0.7])) == (-math.inf, math.inf)
    assert interval(np.full(5, 0.25)) == (0.25, 0.25)


def test_seeds_are_drawn_as_captions_are():
    """Differences that hang on the seed alone: more captions know nothing more."""
    by_seed = np.repeat(np.array([[-1.0], [0.0], [1.0]]), 400, 1)
    low, high = interval_of_means(by_seed)
    assert low < -0.6 and high > 0.6
    by_caption = np.repeat(np.random.default_rng(3).normal(0.0, 1.0, (1, 400)), 3, 0)
    low, high = interval_of_means(by_caption)
    assert high - low < 0.25


def test_summary_compares_what_both_have():
    rows = {"none": [{"x": 1.0}, {"x": 2.0}, {"x": math.nan}], "ours": [{"x": 1.5}, {"x": 2.75}, {"x": 9.0}]}
    table = summary(rows, ["x"])
    assert list(table) == ["none", "ours"] and "difference" not in table["none"]["x"]
    cell = table["ours"]["x"]
    assert cell["captions"] == 2 and cell["difference"] == pytest.approx(0.625)
    assert cell["low"] == 0.5 and cell["high"] == 0.75


def test_what_too_few_captions_have_is_no_difference_and_no_mean_in_its_place():
    nan = math.nan
    rows = {
        "none": [{"x": 0.25, "y": 1.0, "z": nan}, {"x": 0.5, "y": 2.0, "z": 3.0}],
        "ours": [{"x": nan, "y": 1.0, "z": nan}, {"x": 0.75, "y": 2.0, "z": nan}],
    }
    table = summary(rows, ["x", "y", "z"])
    assert [cell_text(cell) for cell in table["none"].values()] == ["0.375", "1.500", "3.000"]
    assert [cell_text(cell) for cell in table["ours"].values()] == ["", "+0.000 [+0.000, +0.000]", ""]
