"""What the studies of recipes and of techniques share: settings are chosen on some captions of a world, and the best of
each kind is reported on others, from the same noise. What is drawn is kept: a run that was stopped goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from ..evaluation.conditions import STOCK, Condition, ConditionInputs
from ..evaluation.cost import costs
from ..evaluation.processes import draw_missing, process_state
from ..evaluation.run import Evaluation
from ..evaluation.search import Kind
from ..evaluation.world_subjects import world_subject
from ..lab.pipeline import WORLDS, load_pipeline
from ..measure.paired import cell_text, summary, summary_table

__all__ = ["MEASURES", "Choosing", "check_counts", "comparison_table", "differences_table", "keep_results", "prices"]

MEASURES = ("present", "bound", "all right")


class Choosing:
    """One study, in a folder. model: a pipeline's folder; None: the world's own. inputs: of its conditions."""

    def __init__(self, folder: Path, world: str, model: Path | None) -> None:
        from rich.console import Console

        self.folder, self.world, self.model = folder, world, model
        self.state = process_state(cpu=True)
        self.console = Console(quiet=not self.state.is_main_process)
        self.pipe = load_pipeline(folder=model, world=world)
        self.pipe.set_progress_bar_config(disable=True)
        self.inputs = ConditionInputs((), (), (), (), 0)

    def best(
        self, kinds: Sequence[Kind], count: int, finals: int = 0
    ) -> tuple[dict[str, Condition], dict[str, dict[str, Any]]]:
        """The best condition of each kind, by its name, on captions to choose on; and the figures of all.

        finals: on so many other captions the two that were best of each kind are compared once more. 0: they are not.
        """
        searched, figures = self.evaluated("choose", [c for kind in kinds for c in kind.conditions], count)
        results, rounds = searched.results(), {"search": figures}
        if finals:
            best_two = [c for kind in kinds for c in kind.ranked(results)[:2]]
            decided, rounds["finals"] = self.evaluated("finals", best_two, finals, first=count)
            results = decided.results()
        best = {kind.name: kind.ranked(results)[0] for kind in kinds}
        for name, condition in best.items():
            self.console.print(f"{name}: {condition.name}")
        return best, rounds

    def evaluated(
        self, what: str, conditions: Sequence[Condition], count: int, first: int = 0
    ) -> tuple[Evaluation, dict[str, Any]]:
        """Of stock and of these, on so many captions; and what it gave, as figures, which are also shown.

        what: "choose", "finals" or "report": the first two are captions to choose on, from the one of index `first` on.
        """
        conditions = list({c.name: c for c in [Condition(STOCK, STOCK), *conditions]}.values())
        subject = world_subject(self.world, count, choosing=what != "report", first=first, folder=self.model)
        model = self.world if self.model is None else str(self.model)
        with self.state.main_process_first():
            evaluation = Evaluation(self.folder / what, self.pipe, subject, conditions, self.inputs, model, batch=8)
        draw_missing(evaluation, self.state, self.console)
        figures = summary(evaluation.results(), MEASURES, STOCK)
        self.console.print(
            summary_table(figures, f"{count} captions to {'report' if what == 'report' else 'choose'} on", "condition")
        )
        for left_out, why in evaluation.left_out.items():
            self.console.print(f"left out {left_out}: {why}")
        return evaluation, figures


def keep_results(
    study: Choosing,
    name: str,
    tables: str,
    best: Mapping[str, Condition],
    **figures: dict[str, Any],
) -> None:
    """Show the tables, and write them and all figures into the study's folder, as files of this name."""
    study.console.print(tables, soft_wrap=True)
    (study.folder / f"{name}.md").write_text(tables)
    chosen = {kind: asdict(condition) for kind, condition in best.items()}
    (study.folder / f"{name}.json").write_text(json.dumps({"chosen": chosen, **figures}, indent=1, default=str) + "\n")


def check_counts(world: str, choose: int, report: int) -> None:
    """Raises: typer.BadParameter for a world that is none, or too few captions to choose or report on."""
    for name, value, least in (("choose", choose, 1), ("report", report, 2)):
        if value < least:
            raise typer.BadParameter(f"expected at least {least}, got {value}", param_hint=f"--{name}")
    if world not in WORLDS:
        raise typer.BadParameter(f"expected {' or '.join(WORLDS)}, got {world!r}", param_hint="--world")


def prices(study: Choosing, reported: Evaluation) -> dict[str, dict[str, float]]:
    """What each condition that was reported costs, by more rounds than an evaluation takes: there are few of them."""
    return costs(study.pipe, reported.subject, reported.conditions, study.inputs, rounds=7)


def differences_table(figures: dict[str, Any], costs: dict[str, Any]) -> str:
    """Of `summary`, with what `costs` gave, as Markdown."""
    lines = [
        f"| condition | {' | '.join(MEASURES)} | time, of stock | peak MiB |",
        "| --- |" + " --- |" * (len(MEASURES) + 2),
    ]
    for name, cells in figures.items():
        texts = [name, *map(cell_text, cells.values())]
        lines.append(f"| {' | '.join(texts)} | {costs[name]['of stock']:.2f} | {costs[name]['peak MiB']:.0f} |")
    return "\n".join(lines) + "\n"


def comparison_table(base: str, figures: dict[str, Any]) -> str:
    """Of `summary`, as Markdown: every condition but stock and the base, its differences to the base."""
    rows = [
        f"| {name} | {' | '.join(map(cell_text, cells.values()))} |\n"
        for name, cells in figures.items()
        if name not in (STOCK, base)
    ]
    head = f"\n| compared with {base} | {' | '.join(MEASURES)} |\n|{' --- |' * (len(MEASURES) + 1)}\n"
    return head + "".join(rows) if rows else ""
