"""Which heads find the objects, and does it help to run the program there alone? `python -m sdattn_fast.studies.heads`.

The heads of the shapes pipeline are ranked on captions of pairs seen in training, by the detector's masks and by CLIP
alone, and both choices are measured on held-out captions: effective attention (the gain in mean mask IoU of the chosen
heads' map over all heads' map) with a paired bootstrap over pictures, and, with the other heads plain or zero, whether
the caption's objects are there. Each batch of pictures is kept as it is done.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ..lab.pipeline import GUIDANCE, STEPS, draw_scenes, load_pipeline, shapes_path
from ..lab.shapes.captions import held_out_scenes, phrases_of, selection_captions, words_of_objects
from ..lab.shapes.judge import judge_picture, shapes_truth
from ..measure.paired import interval

_BATCH = 32


def _percent(gain: tuple[float, float, float]) -> str:
    return "{:+.1f} % [{:+.1f}, {:+.1f}]".format(*(100 * x for x in gain))


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
    from ..tuning import clip_score, effective_attention, iou_score, observe, rank_heads

    for name, value in (("--selection", selection), ("--pictures", pictures)):
        if value < 2:
            raise typer.BadParameter(f"expected at least 2, got {value}", param_hint=name)
    console = Console()
    folder.mkdir(parents=True, exist_ok=True)
    pipe, clip = load_pipeline(), ClipScorer.load(shapes_path() / "clip")
    pipe.set_progress_bar_config(disable=True)
    call_kwargs: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}

    captions = selection_captions(selection)
    seen = list(observe(pipe, captions, [words_of_objects(c) for c in captions], batch=_BATCH, **call_kwargs))
    truth = iou_score(shapes_truth(captions))
    by_clip = clip_score(clip, lambda observation: phrases_of(captions[observation.prompt])[: len(observation.words)])
    rankings = {
        "mask IoU": rank_heads(seen, truth, "mask IoU"),
        "CLIP of masked pictures": rank_heads(seen, by_clip, "CLIP of masked pictures"),
    }
    agreement = spearmanr(*(list(r.scores.values()) for r in rankings.values())).statistic
    console.print(f"Spearman's correlation of the two rankings: {agreement:.2f}")

    scenes = held_out_scenes(pictures)
    captions = [s.caption for s in scenes]
    held_out = list(observe(pipe, captions, [words_of_objects(c) for c in captions], batch=_BATCH, **call_kwargs))
    truth = iou_score(shapes_truth(captions))
    report: dict[str, Any] = {
        "selection": selection, "pictures": pictures, "steps": STEPS, "guidance": GUIDANCE, "spearman": agreement,
    }  # fmt: skip
    for name, ranking in rankings.items():
        stem = name.split()[0].lower()
        ranking.save(folder / f"{stem}.json")
        ranking.draw(folder / f"{stem}.png")
        for count in sorted({1, ranking.count}):
            scores = effective_attention(held_out, ranking.best(count), truth)
            known = ~scores["all"].isnan()
            chosen, whole = (scores[k][known].double().numpy() for k in ("chosen", "all"))
            # Objects of one picture share its fate: pictures are drawn anew, not objects.
            of = np.concatenate([np.full(len(observation.words), observation.prompt) for observation in held_out])[
                known.numpy()
            ]
            sums = [np.bincount(of, x)[np.unique(of)] for x in (chosen, whole)]
            gain = (_gain(*sums), *interval(*sums, statistic=_gain))
            report[f"{name}, best {count}"] = {
                "heads": ranking.best(count), "objects": int(known.sum()), "mean IoU of the chosen": chosen.mean(),
                "mean IoU of all": whole.mean(), "effective attention": gain,
            }  # fmt: skip
            figures = f"mean IoU {chosen.mean():.3f}, of all heads {whole.mean():.3f}: {_percent(gain)}"
            console.print(f"{name}, best {count} of {len(ranking.scores)}: {figures}, {known.sum()} objects")
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
    from .. import apply

    rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in _conditions(heads)}
    for start in range(0, len(scenes), _BATCH):
        part = scenes[start : start + _BATCH]
        for name, keywords in _conditions(heads).items():
            path = folder / f"{selection} {start}-{len(part)} {name}.json"
            if not path.exists():
                with apply(pipe, **keywords):
                    images = draw_scenes(pipe, part, first=start)
                judged = [judge_picture(s, x) for s, x in zip(part, images, strict=True)]
                path.write_text(json.dumps([(j.present, j.bound, float(j.right)) for j in judged]))
            rows[name] += [tuple(row) for row in json.loads(path.read_text())]
    return _compared(rows, console)


def _compared(rows: Mapping[str, Iterable[Any]], console: Any) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    stock = np.array(list(rows["stock"]))
    for name, drawn in rows.items():
        values = np.array(list(drawn))
        figures[name] = {"present": values[:, 0].mean(), "bound": values[:, 1].mean(), "all right": values[:, 2].mean()}
        line = ", ".join(f"{k} {v:.3f}" for k, v in figures[name].items())
        if np.ptp(values[:, 1] - stock[:, 1]) > 0:
            difference = values[:, 1] - stock[:, 1]
            change = (float(difference.mean()), *interval(difference))
            figures[name]["bound, change from stock"] = change
            line += f"; bound {change[0]:+.3f} [{change[1]:+.3f}, {change[2]:+.3f}] from stock"
        console.print(f"{name}: {line}")
    return figures


if __name__ == "__main__":
    typer.run(_run)
