"""Search recipes, and compare the best with peers: `python -m sdattn_fast.studies.recipes FOLDER`.

Recipes, Attend-and-Excite and SynGen draw captions to choose on, at several settings. The best of each kind draws other
captions, beside stock, from the same noise. What is drawn is kept in the folder: a run that was stopped goes on. With
torchrun, processes share the work.

Attend-and-Excite, diffusers' own, is the positive control: its effect on Stable Diffusion is published and reproduced.
A world in which it does not help measures nothing. `--control-only` leaves out all but it.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..evaluation.conditions import STOCK, Condition, ConditionInputs
from ..evaluation.cost import costs
from ..evaluation.processes import draw_missing, process_state
from ..evaluation.run import Evaluation
from ..evaluation.search import RESOLUTIONS, SCALES, STRENGTHS, peer_kinds, recipe_kinds
from ..evaluation.world_subjects import world_subject
from ..lab.pipeline import WORLDS, load_pipeline
from ..measure.paired import cell_text, summary, summary_table

_MEASURES = ("present", "bound", "all right")
_CONTROL = "Attend-and-Excite"
_PEERS = (_CONTROL, "SynGen")


def _recipes(
    folder: Annotated[Path, typer.Argument(help="Where pictures and figures are kept.")],
    world: Annotated[str, typer.Option(help="objects or shapes.")] = "objects",
    model: Annotated[Path | None, typer.Option(help="A pipeline's folder; default: the world's own.")] = None,
    choose: Annotated[int, typer.Option(help="How many captions settings are chosen on.")] = 64,
    report: Annotated[int, typer.Option(help="How many other captions the best are compared on.")] = 512,
    strength: Annotated[
        list[float] | None, typer.Option(help="Of a recipe's change of the latents; several, default 0.05 to 0.2.")
    ] = None,
    scale: Annotated[list[float] | None, typer.Option(help="Step size of the peers; several, default 2 to 20.")] = None,
    resolution: Annotated[
        list[int] | None, typer.Option(help="Side of the attention that the peers look at; several, default 16 and 8.")
    ] = None,
    control_only: Annotated[bool, typer.Option(help="Search and report Attend-and-Excite alone.")] = False,
) -> None:
    """Search recipes and peers on some captions, compare the best of each kind with stock on others."""
    from rich.console import Console

    for name, value, least in (("choose", choose, 1), ("report", report, 2)):
        if value < least:
            raise typer.BadParameter(f"expected at least {least}, got {value}", param_hint=f"--{name}")
    if world not in WORLDS:
        raise typer.BadParameter(f"expected {' or '.join(WORLDS)}, got {world!r}", param_hint="--world")
    state = process_state(cpu=True)
    console = Console(quiet=not state.is_main_process)
    pipe = load_pipeline(folder=model, world=world)
    pipe.set_progress_bar_config(disable=True)
    inputs = ConditionInputs((), (), (), (), 0)

    def evaluated(what: str, conditions: list[Condition], count: int) -> tuple[Evaluation, Any]:
        """Of stock and of these; and what it gave, as figures, which are also shown."""
        conditions = list({c.name: c for c in [Condition(STOCK, STOCK), *conditions]}.values())
        subject = world_subject(world, count, choosing=what == "choose", folder=model)
        with state.main_process_first():
            evaluation = Evaluation(
                folder / what, pipe, subject, conditions, inputs, world if model is None else str(model), batch=8
            )
        draw_missing(evaluation, state, console)
        figures = summary(evaluation.results(), _MEASURES, STOCK)
        console.print(summary_table(figures, f"{count} captions to {what} on", "condition"))
        for left_out, why in evaluation.left_out.items():
            console.print(f"left out {left_out}: {why}")
        return evaluation, figures

    kinds = peer_kinds(scale or SCALES, resolution or RESOLUTIONS)
    if control_only:
        kinds = [kind for kind in kinds if kind.name == _CONTROL]
    else:
        kinds = [*recipe_kinds(strength or STRENGTHS), *kinds]
    searched, search_figures = evaluated("choose", [c for kind in kinds for c in kind.conditions], choose)
    best = {kind.name: kind.best(searched.results()) for kind in kinds}
    for name, condition in best.items():
        console.print(f"{name}: {condition.name}")
    reported, report_figures = evaluated("report", list(best.values()), report)
    if not state.is_main_process:
        return
    _say_control(console, report_figures[best[_CONTROL].name]["present"])
    prices = costs(pipe, reported.subject, reported.conditions, inputs)
    peers = {
        best[name].name: summary(reported.results(), _MEASURES, best[name].name) for name in _PEERS if name in best
    }
    table = _markdown_table(report_figures, prices) + "".join(_compared_with(*peer) for peer in peers.items())
    console.print(table, soft_wrap=True)
    (folder / "recipes.md").write_text(table)
    figures = {
        "chosen": {name: asdict(condition) for name, condition in best.items()},
        "search": search_figures,
        "report": report_figures,
        "compared with peers": peers,
        "costs": prices,
    }
    (folder / "recipes.json").write_text(json.dumps(figures, indent=1, default=str) + "\n")


def _markdown_table(figures: dict[str, Any], prices: dict[str, Any]) -> str:
    lines = [
        f"| condition | {' | '.join(_MEASURES)} | time, of stock | peak MiB |",
        "| --- |" + " --- |" * (len(_MEASURES) + 2),
    ]
    for name, cells in figures.items():
        texts = [name, *map(cell_text, cells.values())]
        lines.append(f"| {' | '.join(texts)} | {prices[name]['of stock']:.2f} | {prices[name]['peak MiB']:.0f} |")
    return "\n".join(lines) + "\n"


def _compared_with(peer: str, figures: dict[str, Any]) -> str:
    """A table of every condition but stock and the peer: its differences to the peer's."""
    rows = [
        f"| {name} | {' | '.join(map(cell_text, cells.values()))} |\n"
        for name, cells in figures.items()
        if name not in (STOCK, peer)
    ]
    head = f"\n| compared with {peer} | {' | '.join(_MEASURES)} |\n|{' --- |' * (len(_MEASURES) + 1)}\n"
    return head + "".join(rows) if rows else ""


def _say_control(console: Any, cell: dict[str, Any]) -> None:
    helps = cell["low"] > 0
    console.print(
        f"positive control: {_CONTROL} changes the share of objects present by {cell['difference']:+.3f} "
        f"[{cell['low']:+.3f}, {cell['high']:+.3f}]: it {'helps' if helps else 'does not help'}"
    )


if __name__ == "__main__":
    typer.run(_recipes)
