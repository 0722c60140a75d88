"""Conditions compared prompt by prompt: mean differences with paired bootstrap intervals.

Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13: the percentile interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["cell_text", "interval", "interval_of_means", "summary", "summary_table"]

_RESAMPLES = 5000


def interval(*samples: np.ndarray, statistic: Callable[..., Any] | None = None) -> tuple[float, float]:
    """The bounds of the 95 % percentile bootstrap interval of a statistic of paired samples, each (n,) float64.

    statistic: of the samples, a number; None: the mean, of one sample. Seeded: the same samples give the same bounds.
    Nothing is known of fewer than two: (-inf, inf). Where all are alike, both bounds are the statistic.

    Example: ``low, high = interval(tuned - stock)``
    """
    from scipy.stats import bootstrap

    if len(samples[0]) < 2:
        return -math.inf, math.inf
    if all(np.ptp(sample) == 0 for sample in samples):
        value = float(np.mean(samples[0]) if statistic is None else statistic(*samples))
        return value, value
    options: dict[str, Any] = {} if statistic is None else {"paired": True, "vectorized": False}
    bounds = bootstrap(
        samples, statistic or np.mean, n_resamples=_RESAMPLES, method="percentile", rng=np.random.default_rng(0),
        **options,
    ).confidence_interval  # fmt: skip
    return float(bounds.low), float(bounds.high)


def interval_of_means(differences: np.ndarray) -> tuple[float, float]:
    """As `interval`, of the mean of differences (seeds, captions) float64, both seeds and captions drawn anew."""
    rng = np.random.default_rng(0)
    seeds = rng.integers(0, differences.shape[0], (_RESAMPLES, differences.shape[0]))
    captions = rng.integers(0, differences.shape[1], (_RESAMPLES, differences.shape[1]))
    means = [differences[s][:, c].mean() for s, c in zip(seeds, captions, strict=True)]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def summary(
    results: dict[str, list[dict[str, float]]], measures: Sequence[str], base: str = "none"
) -> dict[str, dict[str, dict[str, float]]]:
    """Condition -> measure -> its mean, and the mean difference to the base condition over the captions that both have,
    with the bounds of its 95 % percentile bootstrap interval and the number of captions; no difference where fewer than
    two have a value, and none of the base, which comes first. "none": the base's mean over those captions."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for condition, rows in sorted(results.items(), key=lambda item: item[0] != base):
        table[condition] = {}
        for name in measures:
            values, base_values = (np.array([row[name] for row in r]) for r in (rows, results[base]))
            both = np.isfinite(values) & np.isfinite(base_values)
            difference = (values - base_values)[both]
            known = values[np.isfinite(values)]
            cell: dict[str, Any] = {"captions": int(both.sum())}
            cell["mean"] = float(known.mean()) if len(known) else None
            if condition != base:
                cell["none"] = float(base_values[both].mean()) if both.any() else None
            if condition != base and len(difference) > 1:
                low, high = interval(difference)
                cell |= {"difference": float(difference.mean()), "low": low, "high": high}
            table[condition][name] = cell
    return table


def summary_table(
    results: Mapping[str, Mapping[str, Any]],
    title: str,
    first: str,
    text: Callable[[dict[str, Any]], str] | None = None,
) -> Any:
    """`results`, of `summary`, as a rich table, a condition a row; text: of a cell, `cell_text` by default."""
    from rich.table import Column, Table

    measures = next(iter(results.values()))
    shown = Table(first, *(Column(name, justify="right") for name in measures), title=title)
    for name, cells in results.items():
        shown.add_row(name, *map(text or cell_text, cells.values()))
    return shown


def cell_text(cell: dict[str, Any]) -> str:
    """A cell of `summary`: the difference with its interval, nothing where too few captions have a value; of the base
    its mean."""
    if "difference" not in cell:
        return "" if cell["mean"] is None or "none" in cell else f"{cell['mean']:.3f}"
    return f"{cell['difference']:+.3f} [{cell['low']:+.3f}, {cell['high']:+.3f}]"
