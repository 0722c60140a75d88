"""`sdattn-fast evaluate`: all nine techniques against stock, on the shapes world or a user's model and prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Guidance, Model, NumSteps, check_out_folder, plain_console, within

__all__ = ["evaluate"]

_LONGEST_FIGURE = len("+0.123*")


def evaluate(
    model: Model = "shapes",
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='File with one prompt per line, or {"prompt": ..., "words": [...]}, or GenEval\'s metadata; default: '
            "captions of the lab's world that settings are not chosen on."
        ),
    ] = None,
    pictures: Annotated[
        int, typer.Option(help="Number of captions of the lab's world.", callback=within(2, 10**5))
    ] = 512,
    folder: Annotated[Path, typer.Option(help="Output folder; run the same command again to resume.")] = Path(
        "evaluation"
    ),
    only: Annotated[
        list[str] | None,
        typer.Option(help="Name of a condition, may be repeated; default: all. Stock is always drawn."),
    ] = None,
    heads: Annotated[
        Path | None,
        typer.Option(help="File of `sdattn-fast heads`; without it, conditions with chosen heads are left out."),
    ] = None,
    tuned: Annotated[
        Path | None, typer.Option(help="Program of `sdattn-fast tune`; without it, tuned conditions are left out.")
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="Folder or hub ID of a CLIP model; default: the pipeline's own.")
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Threshold of the CLIP gate, a cosine; default: calibrated on stock pictures.", callback=within(-1, 1)
        ),
    ] = None,
    blip: Annotated[
        str | None, typer.Option(help="Folder or hub ID of a BLIP model for T2I-CompBench's questions.")
    ] = None,
    detector: Annotated[
        str | None,
        typer.Option(help="Folder or hub ID of an object detector for GenEval and T2I-CompBench's spatial relations."),
    ] = None,
    num_inference_steps: NumSteps = None,
    guidance_scale: Guidance = None,
    batch: Annotated[int, typer.Option(help="Number of prompts drawn at once.", callback=within(1, 4096))] = 16,
    cost: Annotated[bool, typer.Option(help="Also measure time and memory.")] = True,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if available.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; default: float16 on cuda.")] = None,
) -> None:
    """Compare all techniques with stock, with paired confidence intervals; several processes share the work under
    `accelerate launch -m sdattn_fast.cli.evaluate`."""

    from ..evaluation.conditions import STOCK, ConditionInputs, conditions
    from ..evaluation.cost import costs
    from ..evaluation.processes import draw_missing, process_state
    from ..evaluation.report import write_report
    from ..evaluation.run import Evaluation
    from ..evaluation.threshold import gate_threshold
    from ..files import ProgramFile, load_heads
    from ..lab.pipeline import WORLDS
    from ..loading import checked_device
    from ..patching.words import tokenizer_of
    from ..prompts import read_prompts, report_truncation
    from .doctor import processor_name
    from .generate import pipeline_of
    from .heads import clip_of

    check_out_folder(folder, "--folder")
    device = None if device is None else checked_device(device)
    if prompts is None and model not in WORLDS:
        raise typer.BadParameter("expected a file of prompts for a model of your own", param_hint="--prompts")
    if prompts is None and (blip is not None or detector is not None):
        raise typer.BadParameter(f"the world {model} has a detector of its own", param_hint="--blip, --detector")
    every = conditions()
    if only:
        unknown = set(only) - {c.name for c in every}
        if unknown:
            raise typer.BadParameter(
                f"expected names among {'; '.join(c.name for c in every)}, got {min(unknown)!r}", param_hint="--only"
            )
        every = [c for c in every if c.name in {STOCK, *only}]
    read = None if prompts is None else read_prompts(prompts)
    chosen = None if heads is None else load_heads(heads)[0]
    program = None if tuned is None else ProgramFile.load(tuned)
    state = process_state(cpu=device == "cpu")
    console = plain_console(quiet=not state.is_main_process)
    pipe = pipeline_of(model, _device(device, state), dtype)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae):
        part.requires_grad_(False)
    _check_fits(pipe, chosen, program)
    scorer = clip_of(model, clip, pipe.device)
    subject = _subject(
        model, read, pictures, scorer, blip, detector, num_inference_steps, guidance_scale, str(pipe.device)
    )
    with report_truncation(tokenizer_of(pipe), subject.prompts, console):
        if threshold is None and any("threshold" in c.needs for c in every):
            threshold = gate_threshold(folder, state, pipe, subject, scorer, model if read is None else None)
            console.print(f"the CLIP gate's threshold, calibrated: {threshold:.4f}")
        inputs = ConditionInputs(
            (), (), (), (), subject.steps, scorer=scorer, threshold=threshold, heads=chosen, tuned=program
        )
        with state.main_process_first():
            evaluation = Evaluation(folder, pipe, subject, every, inputs, model, batch)
        state.wait_for_everyone()
        for name, why in evaluation.left_out.items():
            console.print(f"{name}: not drawn, {why}")
        draw_missing(evaluation, state, console)
        if not state.is_main_process:
            return
        prices: dict[str, Any] = {}
        if cost:
            console.print("time and memory")
            prices = costs(pipe, subject, evaluation.conditions, inputs, tell=lambda text: print(text, flush=True))
    import torch

    ground = f"{processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    if pipe.device.type == "cuda":
        ground = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    _show(console, write_report(evaluation, prices, ground))
    print(f"wrote {folder / 'evaluation.html'}, {folder / 'evaluation.md'} and {folder / 'summary.json'}")


def _device(requested: str | None, state: Any) -> str:
    """Of several processes each has a GPU of its own, also where "cuda" was asked for."""
    one_device = requested != "cuda" or state.num_processes == 1
    return requested if requested is not None and one_device else str(state.device)


def _check_fits(pipe: Any, heads: Any, program: Any) -> None:
    """Whether the model has those heads and layers, before hours are spent. Raises: ValueError."""
    from .. import apply

    for name, keywords in (("heads", {"heads": heads}), ("tuned", {"program": program})):
        if next(iter(keywords.values())) is not None:
            try:
                apply(pipe, **keywords).remove()
            except ValueError as error:
                raise ValueError(f"{name}: the file does not fit the model: {error}") from None


def _subject(
    model: str, read: Any, pictures: int, scorer: Any, blip: str | None, detector: str | None, steps: int | None,
    guidance: float | None, device: str,
) -> Any:  # fmt: skip
    from ..evaluation.judges import BlipVqa, BoxDetector, GenEval, Judge, Spatial
    from ..evaluation.subjects import Prompts
    from ..evaluation.world_subjects import world_subject

    if read is None:
        world = world_subject(model, pictures, scorer)
        world.steps, world.guidance = (
            world.steps if steps is None else steps,
            world.guidance if guidance is None else guidance,
        )
        return world
    texts = [p.text for p in read]
    phrases = {i: p.words for i, p in enumerate(read) if p.words is not None}
    judges: list[Judge] = []
    subject = Prompts(
        texts, scorer, judges, 7.5 if guidance is None else guidance, 50 if steps is None else steps, phrases
    )
    if blip is not None:
        judges.append(BlipVqa(blip, device))
    if detector is not None:
        wanted = [p.geneval for p in read]
        spatial = any(map(Spatial.relation, texts))
        if not any(metadata.get("include") for metadata in wanted) and not spatial:
            raise typer.BadParameter(
                'a detector needs lines of GenEval\'s, {"prompt": ..., "include": [{"class": "car", "count": 1}]}, or '
                f"T2I-CompBench's prompts, with one of: {', '.join(Spatial.RELATIONS)}",
                param_hint="--prompts",
            )
        finds = BoxDetector(detector, device)
        if any(metadata.get("include") for metadata in wanted):
            judges.append(GenEval(finds, scorer, wanted))
        if spatial:
            judges.append(Spatial(finds, texts))
    return subject


def _show(console: Any, content: dict[str, Any]) -> None:
    """Differences without their intervals, which a terminal has no room for; in several tables where it has no room
    for all measures beside each other."""
    from rich.table import Column, Table
    from rich.text import Text

    from ..evaluation.conditions import STOCK
    from ..evaluation.report import verdict

    rows = content["measures"]
    names = max(len(name) for name in rows)
    parts: list[list[str]] = [[]]
    room = console.width - names - 4
    for measure in rows[STOCK]:
        width = max(len(measure), _LONGEST_FIGURE) + 3
        if parts[-1] and width > room:
            parts.append([])
            room = console.width - names - 4
        parts[-1].append(measure)
        room -= width
    for part in parts:
        table = Table(Column("condition", no_wrap=True), *(Column(m, justify="right", no_wrap=True) for m in part))
        for name, cells in rows.items():
            shown = []
            for measure in part:
                cell = cells[measure]
                text = f"{cell['difference']:+.3f}" if "difference" in cell else ""
                if name == STOCK and cell["mean"] is not None:
                    text = f"{cell['mean']:.3f}"
                colour = {"helps": "green", "hurts": "red"}.get(verdict(cell))
                shown.append(Text(f"{text}*" if colour else text, style=colour or ""))
            table.add_row(name, *shown)
        console.print(table)
    console.print(
        f"{content['prompts']} prompts: means of stock, and differences to it (* the interval leaves out zero)"
    )


if __name__ == "__main__":
    import sys

    from . import main

    main(["evaluate", *sys.argv[1:]])
