"""Which heads find the objects, and does it help to run the program there alone? `python -m sdattn_fast.lab.heads`.

The heads of the shapes pipeline are ranked on captions of pairs seen in training, by the detector's masks and by CLIP
alone, and both choices are measured on held-out captions: effective attention (the gain in mean mask IoU of the chosen
heads' map over all heads' map) with a paired bootstrap over pictures, and, with the other heads plain or zero, whether
the caption's objects are there. Each batch of pictures is kept as it is done.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from . import load_pipeline, shapes_path
from .detector import detect
from .evaluate import _FIRST_SEED, GUIDANCE, STEPS, judge
from .world import COLOURS, SHAPES, sample_scene

__all__ = [
    "bound_objects", "held_out_captions", "objects_of", "phrases_of", "selection_captions", "shapes_truth",
    "words_of_objects",
]  # fmt: skip

_SELECTION_SEED = 60_000_000
_BATCH = 32


def objects_of(caption: str) -> list[tuple[str, str]]:
    """(colour, shape) of the objects that a caption of the world names, in its order."""
    return re.findall(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b", caption.lower())


def words_of_objects(caption: str) -> list[str]:
    """The shape of each object, as `Maps.per_word` calls it: the second circle is "circle (2)"."""
    shapes = [shape for _, shape in objects_of(caption)]
    before = [shapes[:i].count(shape) for i, shape in enumerate(shapes)]
    return [shape if not n else f"{shape} ({n + 1})" for shape, n in zip(shapes, before, strict=True)]


def phrases_of(caption: str) -> list[str]:
    """ "a red circle" for each object."""
    return [f"a {colour} {shape}" for colour, shape in objects_of(caption)]


def shapes_truth(captions: Sequence[str]) -> Callable[[Any], list[np.ndarray | None]]:
    """For `iou_score`: the detector's masks of a drawn picture, None for an object that it does not find."""

    def truth(one: Any) -> list[np.ndarray | None]:
        found = detect(np.asarray(one.picture))
        masks: list[np.ndarray | None] = []
        for colour, shape in objects_of(captions[one.prompt])[: len(one.words)]:
            masks.append(next((d.mask for d in found if (d.colour, d.shape) == (colour, shape)), None))
        return masks

    return truth


def bound_objects(captions: Sequence[str], pictures: Sequence[Any]) -> np.ndarray:
    """(n,) float64: of each caption, the share of its objects that the detector finds in its picture, colour and shape
    together, each detection used once. The judge of tuned programs."""
    shares = []
    for caption, picture in zip(captions, pictures, strict=True):
        wanted = Counter(objects_of(caption))
        found = Counter((d.colour, d.shape) for d in detect(np.asarray(picture)))
        shares.append((wanted & found).total() / max(1, wanted.total()))
    return np.array(shares)


def selection_captions(count: int) -> list[str]:
    """Captions of pairs seen in training, to choose on; what is reported is measured on held-out ones."""
    return [sample_scene(_SELECTION_SEED + i, objects=1 + i % 3).caption for i in range(count)]


def held_out_captions(count: int) -> list[str]:
    """Captions of pairs that no training scene has, to report on; those of `lab.evaluate`."""
    return [sample_scene(_FIRST_SEED + i, held_out=True, objects=1 + i % 3).caption for i in range(count)]


def _interval(values: Sequence[np.ndarray], statistic: Callable[..., Any]) -> tuple[float, float, float]:
    """A statistic of paired samples, and the bounds of its 95 % percentile bootstrap interval."""
    from scipy.stats import bootstrap

    found = bootstrap(
        values, statistic, paired=True, n_resamples=5000, method="percentile", vectorized=False,
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return float(statistic(*values)), float(found.low), float(found.high)


def _percent(interval: tuple[float, float, float]) -> str:
    return "{:+.1f} % [{:+.1f}, {:+.1f}]".format(*(100 * x for x in interval))


def _gain(chosen: np.ndarray, whole: np.ndarray) -> float:
    return float(chosen.sum() / whole.sum() - 1)


def _run(
    selection: Annotated[int, typer.Option(help="Captions to rank on.")] = 96,
    pictures: Annotated[int, typer.Option(help="Held-out captions to report on.")] = 256,
    folder: Annotated[Path, typer.Option(help="Where everything is kept.")] = Path("runs/heads"),
) -> None:
    """Rank heads on one set of captions, report on another."""
    from rich.console import Console
    from scipy.stats import spearmanr

    from ..guidance.clip_score import ClipScorer
    from ..guidance.heads import clip_score, effective_attention, iou_score, observe, rank_heads

    for name, value in (("--selection", selection), ("--pictures", pictures)):
        if value < 2:
            raise typer.BadParameter(f"expected at least 2, got {value}", param_hint=name)
    console = Console()
    folder.mkdir(parents=True, exist_ok=True)
    pipe, clip = load_pipeline(), ClipScorer.load(shapes_path() / "clip")
    pipe.set_progress_bar_config(disable=True)
    asked: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}

    captions = selection_captions(selection)
    seen = list(observe(pipe, captions, [words_of_objects(c) for c in captions], batch=_BATCH, **asked))
    truth = iou_score(shapes_truth(captions))
    by_clip = clip_score(clip, lambda one: phrases_of(captions[one.prompt])[: len(one.words)])
    rankings = {
        "mask IoU": rank_heads(seen, truth, "mask IoU"),
        "CLIP of masked pictures": rank_heads(seen, by_clip, "CLIP of masked pictures"),
    }
    agreement = spearmanr(*(list(r.scores.values()) for r in rankings.values())).statistic
    console.print(f"Spearman's correlation of the two rankings: {agreement:.2f}")

    scenes = [sample_scene(_FIRST_SEED + i, held_out=True, objects=1 + i % 3) for i in range(pictures)]
    captions = [s.caption for s in scenes]
    held_out = list(observe(pipe, captions, [words_of_objects(c) for c in captions], batch=_BATCH, **asked))
    truth = iou_score(shapes_truth(captions))
    report: dict[str, Any] = {
        "selection": selection, "pictures": pictures, "steps": STEPS, "guidance": GUIDANCE, "spearman": agreement,
    }  # fmt: skip
    for name, ranking in rankings.items():
        stem = name.split()[0].lower()
        ranking.save(folder / f"{stem}.json")
        ranking.draw(folder / f"{stem}.png")
        for count in sorted({1, ranking.count}):
            found = effective_attention(held_out, ranking.best(count), truth)
            known = ~found["all"].isnan()
            chosen, whole = (found[k][known].double().numpy() for k in ("chosen", "all"))
            # Objects of one picture share its fate: pictures are drawn anew, not objects.
            of = np.concatenate([np.full(len(one.words), one.prompt) for one in held_out])[known.numpy()]
            sums = [np.bincount(of, x)[np.unique(of)] for x in (chosen, whole)]
            gain = _interval(sums, _gain)
            report[f"{name}, best {count}"] = {
                "heads": ranking.best(count), "objects": int(known.sum()), "mean IoU of the chosen": chosen.mean(),
                "mean IoU of all": whole.mean(), "effective attention": gain,
            }  # fmt: skip
            said = f"mean IoU {chosen.mean():.3f}, of all heads {whole.mean():.3f}: {_percent(gain)}"
            console.print(f"{name}, best {count} of {len(ranking.scores)}: {said}, {known.sum()} objects")
    report["pictures drawn"] = _effect(pipe, scenes, rankings["mask IoU"].best(), folder, selection, console)
    (folder / "summary.json").write_text(json.dumps(report, indent=1) + "\n")


def _conditions(heads: Mapping[str, Sequence[int]]) -> dict[str, dict[str, Any]]:
    """Name -> keywords of `apply`."""
    from .. import Program, Refinement, SalienceDropout

    program = Program(SalienceDropout(0.2), Refinement(1, 0.3, 0.5), "content")
    return {
        "stock": {},
        "stock, other heads zero": {"heads": heads, "inactive_heads": "zero"},
        "program, all heads": {"program": program},
        "program, chosen heads, others plain": {"program": program, "heads": heads},
        "program, chosen heads, others zero": {"program": program, "heads": heads, "inactive_heads": "zero"},
    }


def _effect(
    pipe: Any, scenes: Sequence[Any], heads: Mapping[str, Any], folder: Path, selection: int, console: Any
) -> dict[str, Any]:
    """What the detector says of the pictures under each condition, against stock."""
    import torch

    from .. import apply

    rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in _conditions(heads)}
    for start in range(0, len(scenes), _BATCH):
        part = scenes[start : start + _BATCH]
        for name, keywords in _conditions(heads).items():
            kept = folder / f"{selection} {start}-{len(part)} {name}.json"
            if not kept.exists():
                with apply(pipe, **keywords):
                    images = pipe(
                        [s.caption for s in part], guidance_scale=GUIDANCE, num_inference_steps=STEPS, output_type="np",
                        generator=[torch.Generator().manual_seed(start + i) for i in range(len(part))],
                    ).images  # fmt: skip
                judged = [judge(s, np.rint(x * 255).astype(np.uint8)) for s, x in zip(part, images, strict=True)]
                kept.write_text(json.dumps([(j.present, j.bound, float(j.right)) for j in judged]))
            rows[name] += [tuple(row) for row in json.loads(kept.read_text())]
    return _compared(rows, console)


def _compared(rows: Mapping[str, Iterable[Any]], console: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    stock = np.array(list(rows["stock"]))
    for name, mine in rows.items():
        values = np.array(list(mine))
        found[name] = {"present": values[:, 0].mean(), "bound": values[:, 1].mean(), "all right": values[:, 2].mean()}
        line = ", ".join(f"{k} {v:.3f}" for k, v in found[name].items())
        if np.ptp(values[:, 1] - stock[:, 1]) > 0:
            change = _interval((values[:, 1] - stock[:, 1],), lambda x: float(x.mean()))
            found[name]["bound, change from stock"] = change
            line += f"; bound {change[0]:+.3f} [{change[1]:+.3f}, {change[2]:+.3f}] from stock"
        console.print(f"{name}: {line}")
    return found


if __name__ == "__main__":
    typer.run(_run)
