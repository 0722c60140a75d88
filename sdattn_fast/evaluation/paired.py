"""Conditions compared prompt by prompt: mean differences with paired bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["said", "summary", "table"]


def summary(
    results: dict[str, list[dict[str, float]]], measures: Sequence[str], base: str = "none"
) -> dict[str, dict[str, dict[str, float]]]:
    """Condition -> measure -> its mean, and the mean difference to the base condition over the captions that both have,
    with the bounds of its 95 % percentile bootstrap interval and the number of captions. The base comes first."""
    from scipy.stats import bootstrap

    table: dict[str, dict[str, dict[str, float]]] = {}
    for condition, rows in sorted(results.items(), key=lambda item: item[0] != base):
        table[condition] = {}
        for name in measures:
            mine, none = (np.array([row[name] for row in r]) for r in (rows, results[base]))
            both = np.isfinite(mine) & np.isfinite(none)
            difference = (mine - none)[both]
            known = mine[np.isfinite(mine)]
            cell: dict[str, Any] = {"captions": int(both.sum())}
            cell["mean"] = float(known.mean()) if len(known) else None
            cell["none"] = float(none[both].mean()) if both.any() else None
            if condition != base and len(difference) > 1 and np.ptp(difference) > 0:
                interval = bootstrap(
                    (difference,), np.mean, n_resamples=5000, method="percentile", rng=np.random.default_rng(0)
                ).confidence_interval
                cell |= {"difference": float(difference.mean()), "low": interval.low, "high": interval.high}
            table[condition][name] = cell
    return table


def table(
    found: Mapping[str, Mapping[str, Any]], title: str, first: str, text: Callable[[dict[str, Any]], str] | None = None
) -> Any:
    """`found`, of `summary`, as a rich table, a condition a row; text: of a cell, `said` by default."""
    from rich.table import Column, Table

    measures = next(iter(found.values()))
    shown = Table(first, *(Column(name, justify="right") for name in measures), title=title)
    for name, cells in found.items():
        shown.add_row(name, *map(text or said, cells.values()))
    return shown


def said(cell: dict[str, Any]) -> str:
    """A cell of `summary`: the difference with its interval, or the mean where there is none."""
    if "difference" not in cell:
        return "" if cell["mean"] is None else f"{cell['mean']:.3f}"
    return f"{cell['difference']:+.3f} [{cell['low']:+.3f}, {cell['high']:+.3f}]"
