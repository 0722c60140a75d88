"""Do refinement and structure help? `python -m sdattn_fast.studies.structure`: the shapes pipeline, held-out captions.

Every condition draws the same captions from the same noise. Measured by picture, against stock attention with a paired
bootstrap: how sharp the boundaries of what was drawn are; how well the words' maps fit what was drawn, by IoU and by
boundary F-score; and whether the caption's objects are there. Each batch is kept as it is done, so a run can be broken
off and taken up again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ..guidance.pictures import uint8_pictures
from ..lab.pipeline import GUIDANCE, STEPS, load_pipeline
from ..lab.shapes.captions import held_out_scenes, words_of_objects
from ..lab.shapes.measures import MEASURES, measure
from ..lab.shapes.world import SIDE, ShapesScene
from ..measure.paired import summary, summary_table
from .sheet import save_sheet

_BATCH = 32
_REFINED_STEPS = (STEPS // 2, 3 * STEPS // 4)  # and before decoding


def refinement_conditions() -> dict[str, tuple[Any, bool]]:
    """Name -> the program, and whether latents are refined by structure."""
    from .. import Program, Refinement

    def refined(steps: int, axis: str) -> Any:
        return Program(refine=Refinement(steps, axis=axis), renormalize="content")

    conditions: dict[str, tuple[Any, bool]] = {"none": (Program(), False)}
    for axis in ("token", "space"):
        conditions |= {f"{axis}, R = {steps}": (refined(steps, axis), False) for steps in (1, 2, 3, 4)}
    conditions["structure"] = (Program(), True)
    conditions["token, R = 2, and structure"] = (refined(2, "token"), True)
    return conditions


def _draw(
    pipe: Any, scenes: Sequence[ShapesScene], first: int, program: Any, structured: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (n, 64, 64, 3) uint8 and maps (n, tokens, 64, 64); picture i's noise depends on i alone."""
    import contextlib

    import torch

    from .. import Capture, apply
    from ..guidance.structure import Structure

    captions = [s.caption for s in scenes]
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(apply(pipe, program, capture=Capture()))
        callback = None
        if structured:
            words = [words_of_objects(caption) for caption in captions]
            callback = stack.enter_context(Structure(patch, captions, words=words, steps=_REFINED_STEPS))
        images = pipe(
            captions, guidance_scale=GUIDANCE, num_inference_steps=STEPS, output_type="np",
            callback_on_step_end=callback,
            generator=[torch.Generator().manual_seed(first + i) for i in range(len(scenes))],
        ).images  # fmt: skip
        maps = patch.maps.upsample((SIDE, SIDE)).numpy()
    return uint8_pictures(images), maps


def _run(
    pictures: Annotated[int, typer.Option(help="How many held-out captions.")] = 256,
    folder: Annotated[Path, typer.Option(help="Where batches are kept, and the figures in the end.")] = Path(
        "runs/structure"
    ),
    model: Annotated[Path | None, typer.Option(help="A pipeline's folder; default: the one that ships.")] = None,
) -> None:
    """Draw held-out captions under every condition and compare."""
    from rich.console import Console

    from ..patching.words import words_of

    if pictures < 2:
        raise typer.BadParameter(f"expected at least 2, got {pictures}", param_hint="--pictures")
    console = Console()
    folder.mkdir(parents=True, exist_ok=True)
    scenes = held_out_scenes(pictures)
    pipe = load_pipeline(folder=model)
    pipe.set_progress_bar_config(disable=True)

    # Batches outside, conditions inside: what is broken off is complete for its captions.
    for start in range(0, pictures, _BATCH):
        part = scenes[start : start + _BATCH]
        for name, (program, structured) in refinement_conditions().items():
            path = folder / f"{start}-{len(part)} {name}.json"
            if path.exists():
                continue
            images, maps = _draw(pipe, part, start, program, structured)
            rows = []
            for i, scene in enumerate(part):
                words = words_of(pipe.tokenizer, scene.caption)
                of_objects = [maps[i, words[word]].mean(0) for word in words_of_objects(scene.caption)]
                rows.append(measure(scene, images[i], of_objects))
            if start == 0:
                np.save(folder / f"{name}.npy", images)
            path.write_text(json.dumps(rows))
            console.print(f"{start + len(part)} of {pictures}: {name}")

    results: dict[str, list[dict[str, float]]] = {}
    for name in refinement_conditions():
        results[name] = []
        for start in range(0, pictures, _BATCH):
            results[name] += json.loads((folder / f"{start}-{min(_BATCH, pictures - start)} {name}.json").read_text())
    figures = summary(results, MEASURES)
    (folder / "summary.json").write_text(json.dumps({"pictures": pictures, **figures}, indent=1) + "\n")
    title = f"{pictures} held-out captions; difference to none, 95 % bootstrap interval"
    console.print(summary_table(figures, title, "condition"))
    sheet = [np.load(folder / f"{name}.npy", allow_pickle=False)[:8] for name in refinement_conditions()]
    save_sheet(sheet, folder / "pictures.png")  # a row a condition


if __name__ == "__main__":
    typer.run(_run)
