"""Search recipes, and compare the best with peers: `python -m sdattn_fast.studies.recipes FOLDER`.

Recipes, Attend-and-Excite and SynGen draw captions to choose on, at several settings. The two best of each kind draw
more of them, and the better one draws captions to report on, beside stock, from the same noise. What is drawn is kept
in the folder: a run that was stopped goes on. With torchrun, processes share the work.

Attend-and-Excite, diffusers' own, is the positive control: its effect on Stable Diffusion is published and reproduced.
A world in which it does not help measures nothing. `--control-only` leaves out all but it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..evaluation.search import RESOLUTIONS, SCALES, STRENGTHS, peer_kinds, recipe_kinds
from ..measure.paired import summary
from .choosing import MEASURES, Choosing, check_counts, comparison_table, differences_table, keep_results, prices

_CONTROL = "Attend-and-Excite"
_PEERS = (_CONTROL, "SynGen")


def _recipes(
    folder: Annotated[Path, typer.Argument(help="Where pictures and figures are kept.")],
    world: Annotated[str, typer.Option(help="objects or shapes.")] = "objects",
    model: Annotated[Path | None, typer.Option(help="A pipeline's folder; default: the world's own.")] = None,
    choose: Annotated[int, typer.Option(help="How many captions settings are chosen on.")] = 128,
    finals: Annotated[
        int, typer.Option(help="How many others decide between the two best settings of each kind; 0: none.", min=0)
    ] = 256,
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
    check_counts(world, choose, report)
    kinds = peer_kinds(scale or SCALES, resolution or RESOLUTIONS)
    if control_only:
        kinds = [kind for kind in kinds if kind.name == _CONTROL]
    else:
        kinds = [*recipe_kinds(strength or STRENGTHS), *kinds]
    study = Choosing(folder, world, model)
    best, rounds = study.best(kinds, choose, finals)
    reported, report_figures = study.evaluated("report", list(best.values()), report)
    if not study.state.is_main_process:
        return
    _say_control(study.console, report_figures[best[_CONTROL].name]["present"])
    costs = prices(study, reported)
    peers = {best[name].name: summary(reported.results(), MEASURES, best[name].name) for name in _PEERS if name in best}
    tables = differences_table(report_figures, costs) + "".join(comparison_table(*peer) for peer in peers.items())
    figures = {**rounds, "report": report_figures, "compared with peers": peers, "costs": costs}
    keep_results(study, "recipes", tables, best, **figures)


def _say_control(console: Any, cell: dict[str, Any]) -> None:
    helps = cell["low"] > 0
    console.print(
        f"positive control: {_CONTROL} changes the share of objects present by {cell['difference']:+.3f} "
        f"[{cell['low']:+.3f}, {cell['high']:+.3f}]: it {'helps' if helps else 'does not help'}"
    )


if __name__ == "__main__":
    typer.run(_recipes)
