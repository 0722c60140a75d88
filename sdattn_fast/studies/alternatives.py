"""What the recipes do not use, compared with them: `python -m sdattn_fast.studies.alternatives FOLDER`.

Other scores for corrections (the entropy of maps, a network that was trained to tell what is there), relevance that is
reused for three steps, and biases of the logits that need no backward pass. Each draws captions to choose on, at
several settings; the best of each kind draws other captions, beside stock and the recipes "objects" and "fast", from
the same noise. The network is trained first. What is drawn is kept: a run that was stopped goes on. With torchrun,
processes share the work.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..evaluation.alternatives import PresenceNetwork
from ..evaluation.conditions import recipe_condition
from ..evaluation.search import RECIPES_SCORE, alternative_kinds
from ..files import read_json, write_json
from ..measure.paired import summary
from .choosing import MEASURES, Choosing, check_counts, comparison_table, differences_table, keep_results, prices
from .presence_network import train_presence_network

_RECIPES = [recipe_condition(f"recipe, {name}", name) for name in ("objects", "fast")]


def _alternatives(
    folder: Annotated[Path, typer.Argument(help="Where pictures and figures are kept.")],
    choose: Annotated[int, typer.Option(help="How many captions settings are chosen on.")] = 128,
    report: Annotated[int, typer.Option(help="How many other captions the best are compared on.")] = 512,
    scenes: Annotated[int, typer.Option(help="How many true scenes the network is trained on.")] = 16_000,
) -> None:
    """Search what the recipes do not use on some captions, compare the best of each kind with the recipe on others."""
    check_counts("objects", choose, report)
    study = Choosing(folder, "objects", None)
    folder.mkdir(parents=True, exist_ok=True)
    trained = folder / "network.json"
    with study.state.main_process_first():
        if not trained.exists():
            study.console.print(f"training a network on {scenes} scenes")
            result = train_presence_network(study.pipe, scenes, folder / "network.safetensors")
            accuracy = {"objects": result.objects, "in order": result.accuracy, "in order by maximum": result.strongest}
            write_json(trained, "sdattn-fast presence network", accuracy)
    study.inputs = replace(study.inputs, network=PresenceNetwork.load(folder / "network.safetensors"))
    best, rounds = study.best(alternative_kinds(), choose)
    reported, report_figures = study.evaluated("report", [*_RECIPES, *best.values()], report)
    if not study.state.is_main_process:
        return
    costs = prices(study, reported)
    bases = [*(recipe.name for recipe in _RECIPES), best[RECIPES_SCORE].name]
    compared = {base: summary(reported.results(), MEASURES, base) for base in bases}
    tables = differences_table(report_figures, costs) + "".join(comparison_table(*one) for one in compared.items())
    figures = {
        "network": read_json(trained, "sdattn-fast presence network"), **rounds,
        "report": report_figures, "compared": compared, "costs": costs,
    }  # fmt: skip
    keep_results(study, "alternatives", tables, best, **figures)


if __name__ == "__main__":
    typer.run(_alternatives)
