"""Search recipes, and compare the best with peers: `python -m sdattn_fast.studies.recipes`.

A grid of recipes draws captions to choose on. The best of each kind draws other captions, beside stock,
Attend-and-Excite and SynGen, from the same noise, a picture a call. What is drawn is kept in the folder: a run that was
stopped goes on.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..evaluation.conditions import STOCK, Condition, ConditionInputs, recipe_condition
from ..evaluation.cost import costs
from ..evaluation.peers import AttendAndExcite, SynGen
from ..evaluation.recipe_search import chosen_recipes, recipe_grid
from ..evaluation.run import Evaluation
from ..evaluation.world_subjects import world_subject
from ..lab.pipeline import load_pipeline
from ..measure.paired import summary, summary_table


def _recipes(
    folder: Annotated[Path, typer.Argument(help="Where pictures and figures are kept.")],
    world: Annotated[str, typer.Option(help="objects or shapes.")] = "objects",
    model: Annotated[Path | None, typer.Option(help="A pipeline's folder; default: the world's own.")] = None,
    choose: Annotated[int, typer.Option(help="How many captions the grid is searched on.")] = 64,
    report: Annotated[int, typer.Option(help="How many other captions the best are compared on.")] = 512,
    strength: Annotated[
        list[float] | None, typer.Option(help="Of a change of the latents; several, default 0.02 to 0.2.")
    ] = None,
    resolution: Annotated[int, typer.Option(help="Side of the attention that the peers look at.")] = 16,
    scale: Annotated[float, typer.Option(help="Step size of the peers.")] = 20.0,
) -> None:
    """Search recipes on some captions, compare the best with stock and peers on others."""
    from rich.console import Console

    console = Console()
    for name, value, least in (("choose", choose, 1), ("report", report, 2)):
        if value < least:
            raise typer.BadParameter(f"expected at least {least}, got {value}", param_hint=f"--{name}")
    if world not in ("objects", "shapes"):
        raise typer.BadParameter(f"expected objects or shapes, got {world!r}", param_hint="--world")
    pipe = load_pipeline(folder=model, world=world)
    pipe.set_progress_bar_config(disable=True)
    tell = console.print if console.is_terminal else None
    inputs = ConditionInputs((), (), (), (), 0)
    name_of_model = world if model is None else str(model)
    measures = ("present", "bound", "all right")

    def evaluated(what: str, conditions: list[Condition], count: int) -> tuple[Evaluation, Any]:
        """And what it gave, as figures, which are also shown."""
        subject = world_subject(world, count, choosing=what == "choose", folder=model)
        evaluation = Evaluation(folder / what, pipe, subject, conditions, inputs, name_of_model, batch=1)
        evaluation.run(tell=tell)
        figures = summary(evaluation.results(), measures, STOCK)
        console.print(summary_table(figures, f"{count} captions to {what} on", "recipe"))
        for left_out, why in evaluation.left_out.items():
            console.print(f"left out {left_out}: {why}")
        return evaluation, figures

    grid = recipe_grid(strength) if strength else recipe_grid()
    searched, search_figures = evaluated(
        "choose", [Condition(STOCK, STOCK), *map(recipe_condition, grid, grid.values())], choose
    )
    best = chosen_recipes(searched.results(), grid)
    for kind, chosen in best.items():
        console.print(f"{kind}: {chosen}")
    conditions = [
        Condition(STOCK, STOCK),
        *(recipe_condition(f"recipe, {kind}", grid[chosen]) for kind, chosen in best.items() if chosen != STOCK),
        *(
            Condition(peer.name, "peer", peer=peer)
            for peer in (AttendAndExcite(scale, resolution), SynGen(scale, resolution))
        ),
    ]
    reported, report_figures = evaluated("report", conditions, report)
    prices = costs(pipe, reported.subject, reported.conditions, inputs)
    for name, price in prices.items():
        console.print(f"{name}: {price['of stock']:.2f} of stock's time, {price['peak MiB']:.1f} MiB")
    figures = {
        "chosen": {kind: {"name": n, **(asdict(grid[n]) if n in grid else {})} for kind, n in best.items()},
        "search": search_figures,
        "report": report_figures,
        "costs": prices,
    }
    (folder / "recipes.json").write_text(json.dumps(figures, indent=1, default=str) + "\n")


if __name__ == "__main__":
    typer.run(_recipes)
