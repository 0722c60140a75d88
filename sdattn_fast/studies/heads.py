"""Which heads find the objects, and does it help to run the program there alone? `python -m sdattn_fast.studies.heads`.

The heads of a world's pipeline are ranked on captions to choose on, by the detector's masks and by CLIP alone, and both
choices are measured on captions to report on: effective attention (the gain in mean mask IoU of the chosen heads' map
over all heads' map) with a paired bootstrap over pictures, for the best head, the number that gives the best map, and a
quarter of them; and, with the other heads plain or zero, whether the caption's objects are there. Each batch of
pictures is kept as it is done.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ..evaluation.world_subjects import masks_of, words_of_objects, world_subject
from ..lab.pipeline import WORLDS, draw_scenes, load_pipeline, world_path
from ..measure.paired import interval
from ..patching.words import tokenizer_of

_BATCH = 32


def _percent(gain: tuple[float, float, float]) -> str:
    return "{:+.1f} % [{:+.1f}, {:+.1f}]".format(*(100 * x for x in gain))


def _gain(chosen: np.ndarray, whole: np.ndarray) -> float:
    return float(chosen.sum() / whole.sum() - 1)


def _run(
    world: Annotated[str, typer.Option(help="objects or shapes.")] = "shapes",
    selection: Annotated[int, typer.Option(help="Captions to rank on.")] = 96,
    pictures: Annotated[int, typer.Option(help="Other captions, to report on.")] = 256,
    folder: Annotated[Path, typer.Option(help="Where everything is kept.")] = Path("runs/heads"),
) -> None:
    """Rank heads on one set of captions, report on another."""
    from rich.console import Console
    from scipy.stats import spearmanr

    from ..guidance.clip_score import ClipScorer
    from ..tuning import clip_score, effective_attention, iou_score, rank_heads

    if world not in WORLDS:
        raise typer.BadParameter(f"expected {' or '.join(WORLDS)}, got {world!r}", param_hint="--world")
    for name, value in (("--selection", selection), ("--pictures", pictures)):
        if value < 2:
            raise typer.BadParameter(f"expected at least 2, got {value}", param_hint=name)
    console = Console()
    folder.mkdir(parents=True, exist_ok=True)
    pipe, clip = load_pipeline(world=world), ClipScorer.load(str(world_path(world) / "clip"))
    pipe.set_progress_bar_config(disable=True)

    chosen_on = world_subject(world, selection, clip, choosing=True)
    seen = _observed(pipe, chosen_on)
    by_clip = clip_score(clip, lambda x: chosen_on.texts(x.prompt)[: len(x.words)])
    rankings = {
        "mask IoU": rank_heads(seen, iou_score(masks_of(chosen_on)), "mask IoU"),
        "CLIP of masked pictures": rank_heads(seen, by_clip, "CLIP of masked pictures"),
    }
    agreement = spearmanr(*(list(r.scores.values()) for r in rankings.values())).statistic
    console.print(f"Spearman's correlation of the two rankings: {agreement:.2f}")

    reported = world_subject(world, pictures, clip)
    held_out, truth = _observed(pipe, reported), iou_score(masks_of(reported))
    report: dict[str, Any] = {
        "world": world, "selection": selection, "pictures": pictures, "steps": reported.steps,
        "guidance": reported.guidance, "spearman": agreement,
    }  # fmt: skip
    for name, ranking in rankings.items():
        stem = name.split()[0].lower()
        ranking.save(folder / f"{stem}.json")
        ranking.draw(folder / f"{stem}.png")
        for count in sorted({1, ranking.count, round(len(ranking.scores) / 4)}):
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
    report["pictures drawn"] = _effect(pipe, world, reported, rankings["mask IoU"].best(), folder, selection, console)
    (folder / "summary.json").write_text(json.dumps(report, indent=1) + "\n")


def _observed(pipe: Any, subject: Any) -> list[Any]:
    """The subject's prompts drawn with stock attention, with the maps of its objects' words."""
    from ..tuning import observe

    words = words_of_objects(subject, tokenizer_of(pipe))
    options = {"num_inference_steps": subject.steps, "guidance_scale": subject.guidance}
    return list(observe(pipe, subject.prompts, words, batch=_BATCH, **options))


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
    pipe: Any, world: str, subject: Any, heads: Mapping[str, Any], folder: Path, selection: int, console: Any
) -> dict[str, Any]:
    """What the detector says of the pictures under each condition, against stock."""
    from .. import apply

    rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in _conditions(heads)}
    for start in range(0, len(subject.scenes), _BATCH):
        part = range(start, min(start + _BATCH, len(subject.scenes)))
        for name, keywords in _conditions(heads).items():
            path = folder / f"{world} {selection} {start}-{len(part)} {name}.json"
            if not path.exists():
                with apply(pipe, **keywords):
                    images = draw_scenes(
                        pipe, [subject.scenes[i] for i in part], first=start, guidance=subject.guidance,
                        steps=subject.steps,
                    )  # fmt: skip
                judged = subject.measure(part, list(images), [None] * len(part))
                path.write_text(json.dumps([(j["present"], j["bound"], j["all right"]) for j in judged]))
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
