"""Judge the shapes pipeline: `python -m sdattn_fast.studies.shapes`.

Captions are held out by construction: every object is a colour-shape pair that no training scene has. The detector says
what is in the picture; first it is itself judged on true scenes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..lab.pipeline import GUIDANCE, STEPS, draw_scenes, load_pipeline
from ..lab.shapes.captions import held_out_scenes
from ..lab.shapes.judge import judge_picture, judgement_table
from .sheet import save_sheet


def _evaluate(
    pictures: Annotated[int, typer.Option(help="How many captions.")] = 258,
    model: Annotated[Path | None, typer.Option(help="A pipeline's folder; default: the one that ships.")] = None,
    seen: Annotated[bool, typer.Option("--seen", help="Pairs seen in training instead of held-out ones.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
    grid: Annotated[Path | None, typer.Option(help="Write the first 32 pictures as a PNG.")] = None,
) -> None:
    """Draw held-out captions and count what is there."""
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    if pictures < 1:
        raise typer.BadParameter(f"expected at least 1, got {pictures}", param_hint="--pictures")
    console = Console()
    scenes = held_out_scenes(pictures, held_out=not seen)
    truth = [judge_picture(s, s.image) for s in scenes]
    pipe = load_pipeline(folder=model)
    pipe.set_progress_bar_config(disable=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("Drawing", total=pictures)
        images = draw_scenes(pipe, scenes, tick=lambda n: progress.update(task, advance=n))
    rows = {"true scenes (the detector)": judgement_table(truth)["all"]}
    rows |= judgement_table([judge_picture(s, image) for s, image in zip(scenes, images, strict=True)])

    kind = "pairs seen in training" if seen else "pairs never seen in training"
    shown = Table(title=f"{pictures} captions, {kind}; guidance {GUIDANCE:g}, {STEPS} DDIM steps")
    shown.add_column("captions of")
    for column in rows["all"]:
        shown.add_column(column, justify="right")
    for name, row in rows.items():
        shown.add_row(name, f"{row['pictures']:.0f}", *(f"{100 * x:.1f} %" for x in list(row.values())[1:]))
    console.print(shown)
    if out is not None:
        out.write_text(json.dumps({"captions": kind, "guidance": GUIDANCE, "steps": STEPS, **rows}, indent=1) + "\n")
    if grid is not None:
        first = images[:32]
        across = min(8, len(first))
        save_sheet([first[i : i + across] for i in range(0, len(first) - across + 1, across)], grid)


if __name__ == "__main__":
    typer.run(_evaluate)
