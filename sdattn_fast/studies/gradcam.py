"""Does GradCAM help? `python -m sdattn_fast.studies.gradcam`: the shapes pipeline, held-out captions.

Maps: true scenes, whose masks are known, are encoded and noised, and each object's noun gets a map from one forward
pass (plain attention: the mean of heads, or the head that was best on other scenes) or one forward and backward pass
(GradCAM, by score). Judged by mask IoU and by the pointing game (Zhang et al. 2018): does the strongest pixel lie in
the object's mask?

Corrections: captions are drawn from the same noise under each, and the detector says what is there. Everything is
compared with plain attention, or with no correction, by a paired bootstrap over captions; each batch is kept as it is
done, so a run can be broken off and taken up again.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ..files import atomic_write
from ..guidance.pictures import uint8_pictures
from ..lab.pipeline import GUIDANCE, STEPS, load_clip, load_pipeline, shapes_path
from ..lab.shapes.captions import SELECTION_SEED, held_out_scenes, words_of_objects
from ..lab.shapes.judge import judge_picture
from ..lab.shapes.measures import iou
from ..lab.shapes.world import SIDE, ShapesScene, sample_scene
from ..loading import quiet_loading
from ..measure.paired import summary, summary_table
from .sheet import save_sheet

__all__ = ["corrections", "draw_corrected", "fits", "maps_of_scenes"]

_MAP_MEASURES = ("IoU", "pointing")
_PICTURE_MEASURES = ("present", "bound", "all right", "latents grow")
_PLAIN = "attention, mean of heads"
_BATCH = 32
_TIMES = (200, 500, 800)  # of 1000


def maps_of_scenes(
    pipe: Any, scenes: Sequence[ShapesScene], t: int, best_head: tuple[str, int]
) -> dict[str, list[Any]]:
    """Way -> of each scene, (objects, 64, 64) float32: the nouns' maps at timestep t, the mean over words' tokens.

    Scene i's noise depends on i and t alone. best_head: (layer, head).
    """
    from transformers import CLIPImageProcessor

    from .. import Capture, apply
    from ..guidance.objectives import ClipSimilarity, NoisePrediction, Presence
    from ..guidance.relevance import gradcam

    latents, target, text = _noised(pipe, scenes, t)
    nouns = [_noun_tokens(pipe, s.caption) for s in scenes]
    tokens = tuple(sorted({i for of_scene in nouns for noun in of_scene for i in noun}))

    def of_nouns(maps: Any) -> list[Any]:
        return [_of_nouns(x, of_scene, tokens) for x, of_scene in zip(maps, nouns, strict=True)]

    by_head = _maps_by_head(pipe, latents, t, text, tokens)
    maps_by_way = {"attention, best head": of_nouns(by_head[best_head[0]][:, best_head[1]])}
    clip, tokenizer = load_clip()
    with quiet_loading():
        processor = CLIPImageProcessor.from_pretrained(shapes_path() / "clip")
    scores: dict[str, Any] = {
        "noise": NoisePrediction(target),
        "presence": Presence(nouns),
        "CLIP": ClipSimilarity(pipe, clip, tokenizer, processor, [s.caption for s in scenes]),
    }
    with apply(pipe.unet, capture=Capture(tokens)) as patch:
        pipe.unet(latents, t, encoder_hidden_states=text)
        maps_by_way[_PLAIN] = of_nouns(patch.maps.upsample((SIDE, SIDE)).detach())
        for name, score in scores.items():
            for rounds in (1, 3):
                maps = gradcam(patch, latents, t, text, score, tokens=tokens, rounds=rounds, drop=0.1)
                way = f"GradCAM of {name}" + (f", {rounds} rounds" if rounds > 1 else "")
                maps_by_way[way] = of_nouns(maps.upsample((SIDE, SIDE)))
    return maps_by_way


def fits(scene: ShapesScene, maps: Any) -> dict[str, float]:
    """IoU of where a map passes the middle of its range, and the share of maps whose strongest pixel is in the mask."""
    ious, hits = [], []
    for thing, heat in zip(scene.objects, np.asarray(maps), strict=True):
        ious.append(iou(heat > (heat.min() + heat.max()) / 2, thing.mask))
        hits.append(thing.mask.flat[heat.argmax()])
    return {"IoU": float(np.mean(ious)), "pointing": float(np.mean(hits))}


def corrections() -> dict[str, dict[str, Any] | None]:
    """Name -> keywords of `Correction`, None for none. All raise the presence of the weakest noun."""
    half = (0, STEPS // 2)
    return {
        "none": None,
        "gradient, 0.05": {"how": "gradient", "strength": 0.05, "steps": half},
        "gradient, 0.2": {"how": "gradient", "strength": 0.2, "steps": half},
        "reweight, 0.5": {"how": "reweight", "strength": 0.5, "steps": half},
        "reweight, 1": {"how": "reweight", "strength": 1.0, "steps": half},
        "scale, one step": {"how": "scale", "steps": (STEPS // 2, STEPS // 2 + 1)},
        "scale, every step": {"how": "scale", "steps": half},
    }


def draw_corrected(
    pipe: Any, scenes: Sequence[ShapesScene], first: int, keywords: dict[str, Any] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (n, 64, 64, 3) uint8, picture i's noise depending on first + i alone; and (n,), by how much latents grew
    (ratio of root mean squares) at a correction, NaN where there is none."""
    import torch

    from .. import Capture, apply
    from ..guidance.correction import Correction
    from ..guidance.objectives import Presence

    captions = [s.caption for s in scenes]
    grew = []
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(apply(pipe, capture=Capture()))
        callback: Callable[..., Any] | None = None
        if keywords is not None:
            nouns = [_noun_tokens(pipe, caption) for caption in captions]
            if keywords["how"] == "reweight":
                keywords = {**keywords, "tokens": [[i for noun in of_caption for i in noun] for of_caption in nouns]}
            correct = stack.enter_context(Correction(patch, Presence(nouns), **keywords))

            def callback(pipe: Any, step: int, t: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
                before = callback_kwargs["latents"]
                after = correct(pipe, step, t, callback_kwargs)
                if after["latents"] is not before:
                    sizes = [x["latents"].square().mean((1, 2, 3)).sqrt() for x in ({"latents": before}, after)]
                    grew.append((sizes[1] / sizes[0]).numpy())
                return after

        images = pipe(
            captions, guidance_scale=GUIDANCE, num_inference_steps=STEPS, output_type="np",
            callback_on_step_end=callback,
            generator=[torch.Generator().manual_seed(first + i) for i in range(len(scenes))],
        ).images  # fmt: skip
    growth = np.mean(grew, 0) if grew else np.full(len(scenes), np.nan)
    return uint8_pictures(images), growth


def _noised(pipe: Any, scenes: Sequence[ShapesScene], t: int) -> tuple[Any, Any, Any]:
    """Noised latents, what the UNet is to predict there, and text, of each scene."""
    import torch

    from ..guidance.pictures import encode_pictures, signed_pictures

    with torch.no_grad():
        clean = encode_pictures(pipe.vae, signed_pictures(torch.from_numpy(np.stack([s.image for s in scenes]))))
        ids = pipe.tokenizer([s.caption for s in scenes], padding="max_length", return_tensors="pt").input_ids
        text = pipe.text_encoder(ids)[0]
    noise = torch.cat(
        [torch.randn(1, *clean.shape[1:], generator=torch.Generator().manual_seed(t + i)) for i in range(len(clean))]
    )
    at = torch.full((len(clean),), t)
    return pipe.scheduler.add_noise(clean, noise, at), pipe.scheduler.get_velocity(clean, noise, at), text


def _maps_by_head(pipe: Any, latents: Any, t: int, text: Any, tokens: Sequence[int]) -> dict[str, Any]:
    """Layer -> (B, heads, T, height, width)."""
    import torch

    from .. import Capture, apply

    capture = Capture(tuple(tokens), stage="softmax", reduce="none", layers="*")
    with torch.no_grad(), apply(pipe.unet, capture=capture) as patch:
        pipe.unet(latents, t, encoder_hidden_states=text)
        return dict(patch.maps)


def _best_head(pipe: Any, scenes: Sequence[ShapesScene]) -> tuple[str, int]:
    """The (layer, head) with the best mean IoU on scenes that are not reported on."""
    scores: dict[tuple[str, int], list[float]] = {}
    for t in _TIMES:
        latents, _, text = _noised(pipe, scenes, t)
        nouns = [_noun_tokens(pipe, s.caption) for s in scenes]
        tokens = tuple(sorted({i for of_scene in nouns for noun in of_scene for i in noun}))
        for layer, maps in _maps_by_head(pipe, latents, t, text, tokens).items():
            for head in range(maps.shape[1]):
                for scene, x, of_scene in zip(scenes, maps[:, head], nouns, strict=True):
                    scores.setdefault((layer, head), []).append(fits(scene, _of_nouns(x, of_scene, tokens))["IoU"])
    return max(scores, key=lambda layer_and_head: np.mean(scores[layer_and_head]))


def _of_nouns(maps: Any, nouns: Sequence[Sequence[int]], tokens: Sequence[int]) -> Any:
    """(nouns, 64, 64) of (T, height, width): the mean over each noun's tokens, upsampled bicubically."""
    import torch

    of = torch.stack([maps[[tokens.index(i) for i in noun]].mean(0) for noun in nouns])
    return torch.nn.functional.interpolate(of[None].float(), (SIDE, SIDE), mode="bicubic")[0]


def _noun_tokens(pipe: Any, caption: str) -> list[list[int]]:
    """Of each object in the caption, its noun's tokens."""
    from ..patching.words import words_of

    words = words_of(pipe.tokenizer, caption)
    return [words[word] for word in words_of_objects(caption)]


def _run(
    pictures: Annotated[int, typer.Option(help="How many held-out captions.")] = 256,
    folder: Annotated[Path, typer.Option(help="Where batches are kept, and the figures in the end.")] = Path(
        "runs/gradcam"
    ),
) -> None:
    """Compare maps and corrections on held-out captions."""
    from rich.console import Console

    if pictures < 2:
        raise typer.BadParameter(f"expected at least 2, got {pictures}", param_hint="--pictures")
    console = Console()
    folder.mkdir(parents=True, exist_ok=True)
    scenes = held_out_scenes(pictures)
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.requires_grad_(False)
    pipe.vae.requires_grad_(False)

    def cached(name: str, make: Callable[[], Any]) -> Any:
        path = folder / f"{name}.json"
        if not path.exists():
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps(make()))
            console.print(name)
        return json.loads(path.read_text())

    best: Any = cached("best head", lambda: _best_head(pipe, [sample_scene(SELECTION_SEED + i) for i in range(64)]))
    maps: dict[str, list[dict[str, float]]] = {}
    drawn: dict[str, list[dict[str, float]]] = {}
    for start in range(0, pictures, _BATCH):
        part = scenes[start : start + _BATCH]

        def at_times(part: list[ShapesScene] = part) -> dict[str, list[dict[str, float]]]:
            """The mean over timesteps, of each way and scene."""
            by_time = [maps_of_scenes(pipe, part, t, tuple(best)) for t in _TIMES]
            return {
                way: [
                    {name: float(np.mean([fits(scene, x[way][i])[name] for x in by_time])) for name in _MAP_MEASURES}
                    for i, scene in enumerate(part)
                ]
                for way in by_time[0]
            }

        for way, rows in cached(f"maps {start}-{len(part)}", at_times).items():
            maps.setdefault(way, []).extend(rows)
        for name, keywords in corrections().items():

            def judged(
                name: str = name, keywords: Any = keywords, part: list[ShapesScene] = part, start: int = start
            ) -> list[dict[str, float]]:
                images, growth = draw_corrected(pipe, part, start, keywords)
                if start == 0:
                    np.save(folder / f"{name}.npy", images[:8])
                judgements = [judge_picture(s, x) for s, x in zip(part, images, strict=True)]
                return [
                    dict(zip(_PICTURE_MEASURES, (j.present, j.bound, float(j.right), float(g)), strict=True))
                    for j, g in zip(judgements, growth, strict=True)
                ]

            drawn.setdefault(name, []).extend(cached(f"{name} {start}-{len(part)}", judged))

    tables = {
        "maps": summary(maps, _MAP_MEASURES, _PLAIN),
        "corrections": summary(drawn, _PICTURE_MEASURES, "none"),
    }
    (folder / "summary.json").write_text(json.dumps({"pictures": pictures, "head": best, **tables}, indent=1) + "\n")
    for name, figures in tables.items():
        title = f"{name}, {pictures} held-out captions; difference to the first, 95 % bootstrap interval"
        console.print(summary_table(figures, title, "way"))
    sheet = [np.load(folder / f"{name}.npy", allow_pickle=False) for name in corrections()]
    save_sheet(sheet, folder / "pictures.png")  # a row a correction


if __name__ == "__main__":
    typer.run(_run)
