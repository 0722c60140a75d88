"""Prints what the suites found, `benchmark.extra_info` of each case, a table a suite; `--results FOLDER` also keeps it.

Ratios are medians over medians of calls that took turns. The last line of a column of ratios is its geometric mean. A
suite that has several lines a case puts them into `extra_info["rows"]`.
"""

from __future__ import annotations

import csv
import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdattn_fast.backend import cpu
from sdattn_fast.cli.doctor import processor_name

Suites = dict[str, dict[str, dict[str, Any]]]


@pytest.fixture
def peak_mib() -> Callable[[Callable[[], object]], float]:
    """MiB, the most that the tensors which a call makes take together, by torch's profiler."""
    from sdattn_fast.measure.memory import peak_mib

    return peak_mib


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    suites = _suites(config)
    if not suites:
        return
    from rich.console import Console
    from rich.table import Column, Table

    console = Console(width=max(140, Console().width))
    console.print(f"\n{', '.join(map(str, _ground().values()))}")
    for suite, cases in suites.items():
        columns = list(dict.fromkeys(name for figures in cases.values() for name in figures))
        table = Table(Column("case", no_wrap=True), title=suite.removeprefix("test_").replace("_", " "))
        for column in columns:
            table.add_column(column.replace("_", " "), justify="right", no_wrap=True)
        for case, figures in cases.items():
            table.add_row(case, *(str(figures.get(column, "")) for column in columns))
        if any(column.endswith("ratio") for column in columns):
            table.add_section()
            table.add_row("geometric mean", *(_mean(column, cases) for column in columns))
        console.print(table)
    folder = config.getoption("--results")
    if folder:
        console.print(f"kept in {_keep(Path(folder), suites)}")


def _suites(config: pytest.Config) -> Suites:
    suites: Suites = {}
    session = getattr(config, "_benchmarksession", None)
    for measured in session.benchmarks if session else ():
        suite, _, case = measured.name.partition("[")
        case = case.rstrip("]") or "all"
        rows = measured.extra_info.get("rows", {"": measured.extra_info} if measured.extra_info else {})
        for row, figures in rows.items():
            suites.setdefault(suite, {})[f"{case} {row}".strip()] = figures
    return suites


def _mean(column: str, cases: dict[str, dict[str, Any]]) -> str:
    values = [figures[column] for figures in cases.values() if column in figures]
    if not column.endswith("ratio") or not values or min(values) <= 0:
        return ""
    return f"{math.exp(sum(map(math.log, values)) / len(values)):.3f}"


def _ground() -> dict[str, str]:
    return {
        "device": processor_name(),
        "threads": f"{torch.get_num_threads()} threads",
        "torch": f"torch {torch.__version__}",
        "isa": f"core {cpu.info().get('isa', 'none')}",
    }


def _keep(folder: Path, suites: Suites) -> Path:
    """Append to <device>.csv, one figure a row."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{re.sub(r'[^a-z0-9]+', '-', processor_name().lower()).strip('-')}.csv"
    root = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True).stdout
    ground = (*_ground().values(), commit.strip() or "unknown")
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if fresh:
            writer.writerow((*_ground(), "commit", "suite", "case", "figure", "value"))
        for suite, cases in suites.items():
            for case, figures in cases.items():
                writer.writerows((*ground, suite, case, name, value) for name, value in figures.items())
    return path
