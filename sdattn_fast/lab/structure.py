"""Do refinement and structure help? `python -m sdattn_fast.lab.structure`: the shapes pipeline, held-out captions.

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

from ..evaluation.paired import summary, table
from . import load_pipeline, quiet_loading
from .detector import Detection, detect
from .evaluate import _FIRST_SEED, GUIDANCE, STEPS, judge
from .heads import words_of_objects
from .world import SIDE, Scene, sample_scene

__all__ = ["conditions", "measure"]

MEASURES = ("sharpness", "map IoU", "map boundary F", "bound", "present", "all right")
_BATCH = 32
_REFINED_STEPS = (STEPS // 2, 3 * STEPS // 4)  # and before decoding


def conditions() -> dict[str, tuple[Any, bool]]:
    """Name -> the program, and whether latents are refined by structure."""
    from .. import Program, Refinement

    def refined(steps: int, axis: str) -> Any:
        return Program(refine=Refinement(steps, axis=axis), renormalize="content")

    found: dict[str, tuple[Any, bool]] = {"none": (Program(), False)}
    for axis in ("token", "space"):
        found |= {f"{axis}, R = {steps}": (refined(steps, axis), False) for steps in (1, 2, 3, 4)}
    found["structure"] = (Program(), True)
    found["token, R = 2, and structure"] = (refined(2, "token"), True)
    return found


def measure(
    scene: Scene, image: np.ndarray, maps: Sequence[np.ndarray], found: Sequence[Detection] | None = None
) -> dict[str, float]:
    """`MEASURES` of one picture (64, 64, 3) uint8; maps: of each object's noun, (64, 64). NaN: nothing was found.
    found: of `detect`, where it is known."""
    found = detect(image) if found is None else found
    judged = judge(scene, image, found)
    fits = []
    for thing, heat in zip(scene.objects, maps, strict=True):
        drawn = next((d for d in found if (d.colour, d.shape) == (thing.colour, thing.shape)), None)
        if drawn is not None:
            mask = heat > (heat.min() + heat.max()) / 2
            fits.append((_iou(mask, drawn.mask), _boundary_f(mask, drawn.mask)))
    sharp = [s for s in (_sharpness(image, d) for d in found) if np.isfinite(s)]
    iou, boundary = np.mean(fits, 0) if fits else (np.nan, np.nan)
    values = (np.mean(sharp) if sharp else np.nan, iou, boundary, judged.bound, judged.present, judged.right)
    return {name: float(value) for name, value in zip(MEASURES, values, strict=True)}


def _draw(
    pipe: Any, scenes: Sequence[Scene], first: int, program: Any, structured: bool
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
    return np.rint(images * 255).astype(np.uint8), maps


def _sharpness(image: np.ndarray, thing: Detection) -> float:
    """Mean gradient along the boundary over the contrast across it, per pixel: 1/2 for a step between two pixels, as
    central differences see it."""
    from scipy import ndimage

    colours = image.astype(np.float64)
    inside = ndimage.binary_erosion(thing.mask, iterations=2)
    around = ndimage.binary_dilation(thing.mask, iterations=5) & ~ndimage.binary_dilation(thing.mask, iterations=3)
    if not inside.any() or not around.any():
        return float("nan")
    contrast = np.linalg.norm(np.median(colours[inside], 0) - np.median(colours[around], 0))
    slope = np.sqrt(sum((g**2).sum(-1) for g in np.gradient(colours, axis=(0, 1))))
    return float(slope[_boundary(thing.mask)].mean() / max(contrast, 1.0))


def _boundary(mask: np.ndarray) -> np.ndarray:
    from scipy import ndimage

    return mask & ~ndimage.binary_erosion(mask)


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max(1, (a | b).sum()))


def _boundary_f(a: np.ndarray, b: np.ndarray, tolerance: float = 2.0) -> float:
    """Harmonic mean of the shares of either boundary within `tolerance` pixels of the other (Martin et al. 2004)."""
    from scipy import ndimage

    a, b = _boundary(a), _boundary(b)
    if not a.any() or not b.any():
        return 0.0
    precision = (ndimage.distance_transform_edt(~b)[a] <= tolerance).mean()
    recall = (ndimage.distance_transform_edt(~a)[b] <= tolerance).mean()
    return float(2 * precision * recall / max(1e-12, precision + recall))


def _run(
    pictures: Annotated[int, typer.Option(help="How many held-out captions.")] = 256,
    folder: Annotated[Path, typer.Option(help="Where batches are kept, and the figures in the end.")] = Path(
        "runs/structure"
    ),
    model: Annotated[Path | None, typer.Option(help="A pipeline's folder; default: the one that ships.")] = None,
) -> None:
    """Draw held-out captions under every condition and compare."""
    import torch
    from rich.console import Console

    from ..unet.maps import words_of

    if pictures < 2:
        raise typer.BadParameter(f"expected at least 2, got {pictures}", param_hint="--pictures")
    console = Console()
    folder.mkdir(parents=True, exist_ok=True)
    scenes = [sample_scene(_FIRST_SEED + i, held_out=True, objects=1 + i % 3) for i in range(pictures)]
    if model is None:
        pipe = load_pipeline()
    else:
        with quiet_loading():
            from diffusers import StableDiffusionPipeline

            pipe = StableDiffusionPipeline.from_pretrained(model).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)

    # Batches outside, conditions inside: what is broken off is complete for its captions.
    for start in range(0, pictures, _BATCH):
        part = scenes[start : start + _BATCH]
        for name, (program, structured) in conditions().items():
            kept = folder / f"{start}-{len(part)} {name}.json"
            if kept.exists():
                continue
            images, maps = _draw(pipe, part, start, program, structured)
            rows = []
            for i, scene in enumerate(part):
                words = words_of(pipe.tokenizer, scene.caption)
                of_objects = [maps[i, words[word]].mean(0) for word in words_of_objects(scene.caption)]
                rows.append(measure(scene, images[i], of_objects))
            if start == 0:
                np.save(folder / f"{name}.npy", images)
            kept.write_text(json.dumps(rows))
            console.print(f"{start + len(part)} of {pictures}: {name}")

    results: dict[str, list[dict[str, float]]] = {}
    for name in conditions():
        results[name] = []
        for start in range(0, pictures, _BATCH):
            results[name] += json.loads((folder / f"{start}-{min(_BATCH, pictures - start)} {name}.json").read_text())
    found = summary(results, MEASURES)
    (folder / "summary.json").write_text(json.dumps({"pictures": pictures, **found}, indent=1) + "\n")
    title = f"{pictures} held-out captions; difference to none, 95 % bootstrap interval"
    console.print(table(found, title, "condition"))
    _write_pictures(folder, list(conditions()))


def _write_pictures(folder: Path, names: Sequence[str]) -> None:
    """One row a condition, the first eight captions."""
    from PIL import Image

    rows = [np.concatenate(list(np.load(folder / f"{name}.npy", allow_pickle=False)[:8]), 1) for name in names]
    sheet = np.concatenate(rows, 0)
    Image.fromarray(sheet).resize((sheet.shape[1] * 2, sheet.shape[0] * 2), 0).save(folder / "pictures.png")


if __name__ == "__main__":
    typer.run(_run)
