"""The positive control of the objects world: `python -m sdattn_fast.studies.control`.

Attend-and-Excite, diffusers' own, whose effect on Stable Diffusion is published and reproduced, must help here too, or
the world measures nothing. The best of a small grid, chosen on some captions, is compared with stock on others.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from ..evaluation.control import attend_and_excite_grid, positive_control
from ..evaluation.objects_world import ObjectsWorld
from ..lab.objects.captions import report_scenes, selection_scenes
from ..lab.objects.detector import PictogramDetector
from ..lab.pipeline import load_pipeline


def _control(
    choose: Annotated[int, typer.Option(help="How many captions the grid is searched on.")] = 64,
    report: Annotated[int, typer.Option(help="How many other captions the best is compared with stock on.")] = 512,
    model: Annotated[Path | None, typer.Option(help="A pipeline's folder; default: the one that ships.")] = None,
    guidance: Annotated[float, typer.Option()] = 4.0,
    steps: Annotated[int, typer.Option(help="DDIM steps.")] = 20,
    resolution: Annotated[
        list[int] | None, typer.Option(help="Side of the attention that is looked at; several, default 16 and 8.")
    ] = None,
    scale: Annotated[
        list[float] | None, typer.Option(help="Of the gradient step; several, default 0.5, 2, 8 and 20.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Search Attend-and-Excite on some captions, compare it with stock on others."""
    from rich.console import Console

    console = Console()
    pipe = load_pipeline(folder=model, world="objects")
    pipe.set_progress_bar_config(disable=True)
    world = ObjectsWorld([*selection_scenes(choose), *report_scenes(report)], PictogramDetector.load(model))
    phrases = [world.phrases(i, pipe.tokenizer)[1] for i in range(len(world.prompts))]

    def present(indices: Sequence[int], pictures: Sequence[np.ndarray]) -> np.ndarray:
        return np.array([row["present"] for row in world.measure(indices, pictures, [None] * len(pictures))])

    grid = attend_and_excite_grid(resolution or (16, 8), scale or (0.5, 2.0, 8.0, 20.0))
    result = positive_control(
        pipe, world.prompts[:choose], world.prompts[choose:], phrases, present, guidance=guidance, steps=steps,
        grid=grid, tell=console.print if console.is_terminal else None,
    )  # fmt: skip
    for name, share in result.searched.items():
        console.print(f"{name}: {share:.3f} of the objects present, {choose} captions to choose on")
    console.print(
        f"{result.chosen.name}, {result.prompts} captions to report on: {result.mean:.3f}, stock {result.stock:.3f}, "
        f"{result.difference:+.3f} [{result.low:+.3f}, {result.high:+.3f}]"
    )
    console.print("It helps." if result.low > 0 else "It does not help: the interval holds zero, or harm.")
    if out is not None:
        figures = {**asdict(result), "chosen": result.chosen.name, "guidance": guidance, "steps": steps}
        out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(_control)
