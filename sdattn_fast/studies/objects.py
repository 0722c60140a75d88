"""Judge the objects pipeline, and its judge: `python -m sdattn_fast.studies.objects`.

First the detector is judged on true scenes that it was not trained on; with a pipeline, also on what its autoencoder
makes of them. Then the pipeline draws the captions of other scenes, and the detector says what is in the pictures.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from ..guidance.pictures import decode_latents, encode_pictures, signed_pictures, uint8_pictures
from ..lab.objects.captions import REPORT_SEED
from ..lab.objects.detector import PictogramDetection, PictogramDetector
from ..lab.objects.judge import judge_detections, mean_judgements
from ..lab.objects.world import ObjectsScene, sample_scene
from ..lab.pipeline import draw_scenes, load_pipeline
from .sheet import save_sheet

_JUDGED = 700_000_000


def _evaluate(
    pictures: Annotated[
        int, typer.Option(help="How many captions, of one to four objects by turns; 0: judge the detector alone.")
    ] = 256,
    true_scenes: Annotated[int, typer.Option(help="How many scenes the detector is judged on.")] = 1000,
    model: Annotated[Path | None, typer.Option(help="A pipeline's folder; default: the one that ships.")] = None,
    guidance: Annotated[float, typer.Option()] = 4.0,
    steps: Annotated[int, typer.Option(help="DDIM steps.")] = 20,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
    grid: Annotated[Path | None, typer.Option(help="Write the first 32 pictures as a PNG.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Write the first 32 true scenes as a PNG.")] = None,
) -> None:
    """Draw captions and count what is there."""
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    for name, value, least in (("pictures", pictures, 0), ("true-scenes", true_scenes, 1)):
        if value < least:
            raise typer.BadParameter(f"expected at least {least}, got {value}", param_hint=f"--{name}")
    console = Console()
    detector = PictogramDetector.load(model)
    pipe = load_pipeline(folder=model, world="objects") if pictures else None

    scenes = [sample_scene(_JUDGED + i) for i in range(true_scenes)]
    true = [s.image for s in scenes]
    errors = {f"{len(scenes)} true scenes": _errors(scenes, detector(true))}
    if pipe is not None:
        pipe.set_progress_bar_config(disable=True)
        errors["decoded from their latents"] = _errors(scenes, detector(_reconstructed(pipe.vae, true)))
    if sheet is not None:
        _save_grid(true, sheet)
    shown = Table("the detector, on", "objects found", "of these, colour right", "found that is not there")
    for source, row in errors.items():
        shown.add_row(source, *(f"{100 * x:.2f} %" for x in row.values()))
    console.print(shown)
    if pipe is None:
        return

    scenes = [sample_scene(REPORT_SEED + i, objects=1 + i % 4) for i in range(pictures)]
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("Drawing", total=pictures)
        images = draw_scenes(
            pipe, scenes, guidance=guidance, steps=steps, tick=lambda n: progress.update(task, advance=n)
        )
    rows = mean_judgements(
        [judge_detections(s, detections) for s, detections in zip(scenes, detector(list(images)), strict=True)]
    )
    shown = Table("captions of", *rows["all"], title=f"{pictures} captions; guidance {guidance:g}, {steps} DDIM steps")
    for name, row in rows.items():
        values = [f"{100 * x:.1f} %" if np.isfinite(x) else "" for x in list(row.values())[1:]]
        shown.add_row(name, str(int(row["pictures"])), *values)
    console.print(shown)
    if out is not None:
        figures: dict[str, Any] = {"guidance": guidance, "steps": steps, "detector": errors, "captions": rows}
        out.write_text(json.dumps(figures, indent=1) + "\n")
    if grid is not None:
        _save_grid(list(images), grid)


def _save_grid(pictures: Sequence[np.ndarray], path: Path) -> None:
    """The first 32, eight a row."""
    across = min(8, len(pictures))
    first = np.stack(pictures[: min(32, len(pictures)) // across * across])
    save_sheet([first[i : i + across] for i in range(0, len(first), across)], path)


def _errors(scenes: Sequence[ObjectsScene], detections: Sequence[Sequence[PictogramDetection]]) -> dict[str, float]:
    """Shares: of objects found; of found coloured objects in their true colour; found, but not there, per object."""
    there = hits = coloured = right = 0
    invented = 0
    for scene, things in zip(scenes, detections, strict=True):
        nouns, seen = Counter(o.noun for o in scene.objects), Counter(d.noun for d in things)
        there += nouns.total()
        hits += (nouns & seen).total()
        invented += (seen - nouns).total()
        with_colour = Counter((o.noun, o.colour) for o in scene.objects if o.colour)
        coloured += (Counter(n for n, _ in with_colour.elements()) & seen).total()
        right += (with_colour & Counter((d.noun, d.colour) for d in things if d.colour)).total()
    return {"found": hits / there, "colour": right / max(1, coloured), "invented": invented / there}


@torch.no_grad()
def _reconstructed(vae: Any, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
    made: list[np.ndarray] = []
    for start in range(0, len(pictures), 50):
        x = signed_pictures(torch.from_numpy(np.stack(pictures[start : start + 50])))
        y = decode_latents(vae, encode_pictures(vae, x))
        made += list(uint8_pictures((y / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()))
    return made


if __name__ == "__main__":
    typer.run(_evaluate)
