"""`sdattn-fast heads`: which heads of a model find the objects, as a file for `apply(heads=...)` and a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Guidance, Model, NumSteps, check_out_file, plain_console, sampling_options, within

__all__ = ["heads", "clip_of", "clip_source"]

# One prompt in so many is kept from the choice, and effective attention is measured there.
_HELD_BACK = 4


def heads(
    model: Model = "shapes",
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='File with one prompt per line, or {"prompt": ..., "words": [...]}; default: captions of the lab\'s '
            "world."
        ),
    ] = None,
    score: Annotated[
        str,
        typer.Option(help="masks: by masks of the lab's detector; clip: by CLIP on masked pictures; auto."),
    ] = "auto",
    clip: Annotated[
        str | None, typer.Option(help="Folder or hub ID of a CLIP model; default: the pipeline's own.")
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            help="Number of heads to choose; default: as many as give the best map.", callback=within(1, 10**6)
        ),
    ] = None,
    layers: Annotated[str, typer.Option(help="Name or pattern of layers.")] = "*",
    num_inference_steps: NumSteps = None,
    guidance_scale: Guidance = None,
    seed: Annotated[
        int, typer.Option(help="Seed; prompt i is drawn with seed + i.", callback=within(0, 2**62 - 1))
    ] = 0,
    batch: Annotated[int, typer.Option(help="Number of prompts drawn at once.", callback=within(1, 4096))] = 8,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if available.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; default: float16 on cuda.")] = None,
    out: Annotated[Path, typer.Option(help="Output file; a plot is written beside it as PNG.")] = Path("heads.json"),
) -> None:
    """Rank every head by how well its word maps find the objects in the pictures."""
    from rich.progress import Progress

    from ..evaluation.world_subjects import masks_of, words_of_objects, world_subject
    from ..lab.pipeline import WORLDS
    from ..lab.shapes.captions import objects_of
    from ..lab.shapes.captions import words_of_objects as words_of_shapes
    from ..lab.shapes.judge import shapes_truth
    from ..patching.words import tokenizer_of, words_of
    from ..prompts import Prompt, read_prompts, report_truncation, words_to_find
    from ..tuning import clip_score, iou_score, observe, rank_heads
    from .generate import pipeline_of

    if score not in ("auto", "masks", "clip"):
        raise typer.BadParameter(f"expected auto, masks or clip, got {score!r}", param_hint="--score")
    if out.suffix.lower() == ".png":
        raise typer.BadParameter(f"expected a name such as heads.json, got {out}, the plot's", param_hint="--out")
    check_out_file(out)
    if prompts is None and model not in WORLDS:
        raise typer.BadParameter("expected a file of prompts for a model of your own", param_hint="--prompts")
    subject, chosen_prompts = None, [] if prompts is None else read_prompts(prompts)
    if prompts is None:
        subject = world_subject(model, 32, choosing=True)
        chosen_prompts = [Prompt(caption) for caption in subject.prompts]
    shapes = model == "shapes"
    by_masks = score == "masks" or (score == "auto" and (shapes or subject is not None))
    if by_masks and clip is not None:
        raise typer.BadParameter("scores are of masks, which need no CLIP; say --score clip", param_hint="--clip")
    if by_masks and subject is None and not any(objects_of(p.text) for p in chosen_prompts):
        raise typer.BadParameter("expected captions of the shapes world, such as 'a red circle', for masks",
                                 param_hint="--prompts")  # fmt: skip
    console = plain_console()
    pipe = pipeline_of(model, device, dtype)
    pipe.set_progress_bar_config(disable=True)
    texts = [p.text for p in chosen_prompts]
    if subject is not None:
        words = words_of_objects(subject, tokenizer_of(pipe))
    else:
        words = [
            words_of_shapes(p.text)
            if by_masks or (shapes and p.words is None and objects_of(p.text))
            else words_to_find(p, list(words_of(tokenizer_of(pipe), p.text)))
            for p in chosen_prompts
        ]
    if not any(words):
        raise typer.BadParameter("expected words that name something in at least one prompt", param_hint="--prompts")
    options = sampling_options(model, num_inference_steps, guidance_scale)
    if by_masks:
        judge, measure = iou_score(shapes_truth(texts) if subject is None else masks_of(subject)), "mask IoU"
    else:
        asked = _texts_of(texts) if subject is None else lambda x: subject.texts(x.prompt)[: len(x.words)]
        judge, measure = clip_score(clip_of(model, clip, pipe.device), asked), "CLIP of masked pictures"

    seen = []
    with (
        report_truncation(tokenizer_of(pipe), texts, console),
        Progress(console=console, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("Drawing", total=len(texts))
        for observation in observe(pipe, texts, words, seed=seed, batch=batch, layers=layers, **options):
            seen.append(observation)
            progress.update(task, completed=observation.prompt + 1)
            if not console.is_terminal and (
                (observation.prompt + 1) % batch == 0 or observation.prompt + 1 == len(texts)
            ):
                print(f"drawn: {observation.prompt + 1} of {len(texts)}", flush=True)
    held_back = [x for x in seen if len(texts) >= 2 * _HELD_BACK and x.prompt % _HELD_BACK == _HELD_BACK - 1]
    chosen_on = [x for x in seen if x not in held_back]  # by identity
    ranking = rank_heads(chosen_on, judge, measure)
    best = ranking.best(count)
    notes = {"model": model, "prompts": len(chosen_on), "seed": seed, **options}
    ranking = replace(ranking, notes=notes | _effective(held_back, best, judge, measure))
    ranking.save(out, count)
    picture = out.with_suffix(".png")
    ranking.draw(picture, count)
    _show(console, ranking, best, measure, len(held_back))
    print(f"wrote {out} and {picture}")


def _texts_of(prompts: Sequence[str]) -> Callable[[Any], list[str]]:
    """What CLIP is asked about each word: the phrase of an object of the shapes world, else the word alone."""
    from ..lab.shapes.captions import phrases_of, words_of_objects
    from ..tuning.head_scores import text_of_word

    def texts(seen: Any) -> list[str]:
        prompt = prompts[seen.prompt]
        phrases = dict(zip(words_of_objects(prompt), phrases_of(prompt), strict=True))
        return [phrases.get(word, text_of_word(word)) for word in seen.words]

    return texts


def clip_of(model: str, clip: str | None, device: Any) -> Any:
    """The CLIP that is asked for, or the one in the pipeline's folder.

    Raises: ValueError where there is none; OSError, from transformers, where it cannot be loaded.
    """
    from ..guidance.clip_score import ClipScorer

    return ClipScorer.load(clip_source(model, clip), device)


def clip_source(model: str, clip: str | None) -> str:
    """The folder or hub id that `clip_of` loads. Raises: ValueError where there is none."""
    from ..lab.pipeline import WORLDS, world_path

    name = model if clip is None else clip
    folder = world_path(name) if name in WORLDS else Path(name)
    if (folder / "clip").is_dir():
        return str((folder / "clip").resolve())
    if clip is None:
        raise ValueError(f"clip: {model!r} has no subfolder 'clip'; say one, such as openai/clip-vit-base-patch32")
    if folder.is_absolute() and not folder.is_dir():
        raise ValueError(f"clip: expected a folder or hub id, and there is no folder {clip}")
    return str(folder.resolve()) if folder.is_dir() else clip


def _effective(held_back: Sequence[Any], best: Any, judge: Any, measure: str) -> dict[str, Any]:
    """Mean scores of the chosen heads' map and of all heads', on prompts kept from the choice."""
    from ..tuning import effective_attention

    if not held_back:
        return {}
    rows = effective_attention(held_back, best, judge)
    chosen, whole = (float(rows[name].nanmean()) for name in ("chosen", "all"))
    if chosen != chosen or whole != whole:
        return {}
    notes = {"held back": {"prompts": len(held_back), "chosen": chosen, "all": whole}}
    return {**notes, "effective attention": chosen / whole - 1} if measure == "mask IoU" and whole > 0 else notes


def _show(console: Any, ranking: Any, best: dict[str, list[int]], measure: str, held_back: int) -> None:
    from rich.table import Column, Table

    columns = (
        Column("layer", overflow="fold"),
        "heads chosen",
        Column("mean", no_wrap=True),
        Column("best", no_wrap=True),
    )
    table = Table(*columns, title=f"{measure}, {ranking.objects} objects")
    for layer, heads in best.items():
        scores = [x for (name, _), x in ranking.scores.items() if name == layer and x == x]
        if scores:
            mean, most = f"{sum(scores) / len(scores):.3f}", f"{max(scores):.3f}"
            table.add_row(layer, ", ".join(map(str, heads)) or "none", mean, most)
    console.print(table)
    notes = ranking.notes
    if "held back" in notes:
        scores = notes["held back"]
        console.print(
            f"On {held_back} prompts kept from the choice: {measure} {scores['chosen']:.3f} of the chosen heads' map, "
            f"{scores['all']:.3f} of all heads'"
        )
    if "effective attention" in notes:
        console.print(f"Effective attention: {100 * notes['effective attention']:+.1f} %")
    elif measure != "mask IoU":
        console.print("Effective attention is defined by true masks, which CLIP does not give.")
