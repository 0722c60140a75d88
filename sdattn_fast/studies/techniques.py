"""Each technique alone, at its best setting: `python -m sdattn_fast.studies.techniques FOLDER`.

Every technique draws captions to choose on, at several settings; the best of each draws other captions, beside stock,
from the same noise. Selective maps change no picture, and are left out; a tuned program has stock at its guidance scale
beside it. What is drawn is kept in the folder: a run that was stopped goes on. With torchrun, processes share the work.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..evaluation.conditions import CONTROL, conditions
from ..evaluation.search import technique_kinds
from ..evaluation.threshold import gate_threshold
from ..evaluation.world_subjects import world_subject
from ..files import ProgramFile, load_heads
from ..guidance.clip_score import ClipScorer
from ..lab.pipeline import world_path
from ..measure.paired import summary
from .choosing import MEASURES, Choosing, check_counts, comparison_table, differences_table, keep_results, prices

_TUNING = "CLIP-rewarded tuning"


def _techniques(
    folder: Annotated[Path, typer.Argument(help="Where pictures and figures are kept.")],
    world: Annotated[str, typer.Option(help="objects or shapes.")] = "objects",
    choose: Annotated[int, typer.Option(help="How many captions settings are chosen on.")] = 64,
    report: Annotated[int, typer.Option(help="How many other captions the best are compared on.")] = 512,
    heads: Annotated[
        Path | None,
        typer.Option(
            help="File of `sdattn-fast heads`; without it, head selection is left out.", exists=True, dir_okay=False
        ),
    ] = None,
    tuned: Annotated[
        Path | None,
        typer.Option(
            help="Program of `sdattn-fast tune`; without it, tuning is left out.", exists=True, dir_okay=False
        ),
    ] = None,
) -> None:
    """Choose settings of the techniques on some captions, compare each technique with stock on others."""
    check_counts(world, choose, report)
    chosen_heads = None if heads is None else load_heads(heads)[0]
    program = None if tuned is None else ProgramFile.load(tuned)
    study = Choosing(folder, world, None)
    scorer = ClipScorer.load(str(world_path(world) / "clip"))
    subject = world_subject(world, choose, scorer, choosing=True)
    folder.mkdir(parents=True, exist_ok=True)
    study.inputs = replace(
        study.inputs,
        scorer=scorer,
        threshold=gate_threshold(folder, study.state, study.pipe, subject, scorer, world),
        heads=chosen_heads,
        tuned=program,
    )
    kinds = [kind for kind in technique_kinds() if all(_known(study, c.needs) for c in kind.conditions)]
    best, rounds = study.best(kinds, choose)
    controls = [c for c in conditions() if c.technique == CONTROL and _known(study, c.needs)]
    reported, report_figures = study.evaluated("report", [*best.values(), *controls], report)
    if not study.state.is_main_process:
        return
    costs = prices(study, reported)
    results = reported.results()
    against = {
        c.name: summary({name: results[name] for name in (c.name, best[_TUNING].name)}, MEASURES, c.name)
        for c in controls
    }
    tables = differences_table(report_figures, costs) + "".join(comparison_table(*one) for one in against.items())
    figures = {**rounds, "report": report_figures, "compared with controls": against, "costs": costs}
    keep_results(study, "techniques", tables, best, **figures)


def _known(study: Choosing, needs: tuple[str, ...]) -> bool:
    return all(getattr(study.inputs, name) is not None for name in needs)


if __name__ == "__main__":
    typer.run(_techniques)
