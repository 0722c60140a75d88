"""Judge the shapes pipeline: `python -m sdattn_fast.lab.evaluate`.

Captions are held out by construction: every object is a colour-shape pair that no training scene has. The detector says
what is in the picture; first it is itself judged on true scenes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from . import load_pipeline, quiet_loading
from .detector import Detection, detect, detect_background
from .world import Scene, sample_scene

__all__ = ["Judgement", "draw", "judge", "table"]

_FIRST_SEED = 50_000_000
GUIDANCE, STEPS = 4.0, 20


@dataclass(frozen=True)
class Judgement:
    """What the detector says of one picture.

    present: share of the caption's objects whose shape is there, each detection used once; bound: share whose colour
    and shape are there together; right: all bound, and nothing else in the picture; background: right, None where the
    caption names none.
    """

    objects: int
    present: float
    bound: float
    right: bool
    background: bool | None


def judge(scene: Scene, image: np.ndarray, found: Sequence[Detection] | None = None) -> Judgement:
    """Judge a picture (64, 64, 3) uint8 by the caption of a scene. found: of `detect`, where it is known."""
    found = detect(image) if found is None else found
    wanted = [(o.colour, o.shape) for o in scene.objects]
    bound = _matched(wanted, [(d.colour, d.shape) for d in found])
    present = _matched([w[1] for w in wanted], [d.shape for d in found])
    named = any(p.object is None for p in scene.phrases)
    return Judgement(
        len(wanted), present / len(wanted), bound / len(wanted), bound == len(wanted) == len(found),
        detect_background(image) == scene.background if named else None,
    )  # fmt: skip


def draw(pipe: Any, scenes: Sequence[Scene], *, batch: int = 32, tick: Any = None) -> np.ndarray:
    """Pictures (n, 64, 64, 3) uint8 for the scenes' captions; picture i's noise depends on i alone."""
    import torch

    pictures = []
    for start in range(0, len(scenes), batch):
        part = scenes[start : start + batch]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        images = pipe(
            [s.caption for s in part], guidance_scale=GUIDANCE, num_inference_steps=STEPS, generator=generators,
            output_type="np",
        ).images  # fmt: skip
        pictures.append(np.rint(images * 255).astype(np.uint8))
        if tick is not None:
            tick(len(part))
    return np.concatenate(pictures)


def table(judgements: Sequence[Judgement]) -> dict[str, dict[str, float]]:
    """By number of objects, and over all: the mean of each measure, and how many pictures it rests on."""
    groups = {f"{n} objects" if n > 1 else "1 object": [j for j in judgements if j.objects == n] for n in (1, 2, 3)}
    groups["all"] = list(judgements)
    rows = {}
    for name, group in groups.items():
        if group:
            named = [j.background for j in group if j.background is not None]
            rows[name] = {
                "pictures": len(group),
                "objects present": float(np.mean([j.present for j in group])),
                "colour and shape bound": float(np.mean([j.bound for j in group])),
                "all right": float(np.mean([j.right for j in group])),
                "background": float(np.mean(named)) if named else float("nan"),
            }
    return rows


def _matched(wanted: list[Any], found: list[Any]) -> int:
    return sum((Counter(wanted) & Counter(found)).values())


def _load_folder(model: Path) -> Any:
    import torch

    with quiet_loading():
        from diffusers import StableDiffusionPipeline

        pipe: Any = StableDiffusionPipeline.from_pretrained(model)
        return pipe.to(torch.float32)


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
    scenes = [sample_scene(_FIRST_SEED + i, held_out=not seen, objects=1 + i % 3) for i in range(pictures)]
    truth = [judge(s, s.image) for s in scenes]
    if model is None:
        pipe = load_pipeline()
    else:
        pipe = _load_folder(model)
    pipe.set_progress_bar_config(disable=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("Drawing", total=pictures)
        images = draw(pipe, scenes, tick=lambda n: progress.update(task, advance=n))
    rows = {"true scenes (the detector)": table(truth)["all"]}
    rows |= table([judge(s, image) for s, image in zip(scenes, images, strict=True)])

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
        _write_grid(images[:32], grid)


def _write_grid(images: np.ndarray, path: Path) -> None:
    from PIL import Image

    across = min(8, len(images))
    images = images[: len(images) // across * across]
    sheet = images.reshape(-1, across, *images.shape[1:]).transpose(0, 2, 1, 3, 4).reshape(-1, across * 64, 3)
    Image.fromarray(sheet).resize((sheet.shape[1] * 2, sheet.shape[0] * 2), 0).save(path)


if __name__ == "__main__":
    typer.run(_evaluate)
