"""`sdattn-fast demo`: the shapes pipeline stock, with an empty program, with semantics; pictures, maps, time, memory.

Writes one self-contained HTML page and its PNGs. Everything runs offline on a CPU in under a minute.
"""

from __future__ import annotations

import copy
import functools
import platform
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ..lab.pipeline import GUIDANCE, STEPS
from ..prompts import Prompt, words_to_find
from .demo_page import Cost, Pictures, write_demo_page
from .options import check_out_folder, plain_console, within

__all__ = ["demo"]

PROMPTS = (
    "a large red circle and a large blue square on a gray background",
    "a large green triangle and a large yellow circle on a black background",
    "a large cyan triangle and a large pink star on a brown background",
)


def demo(
    out: Annotated[Path, typer.Option(help="Output folder for demo.html and the PNGs.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Seed of the latents.", callback=within(0, 2**63 - 1))] = 0,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt of the shapes world; may be repeated.")] = None,
) -> None:
    """Draw pictures with the shapes pipeline, and write a page that shows what the program does."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    started = time.perf_counter()
    console = plain_console()
    prompts = tuple(prompt or PROMPTS)
    if any(not p.strip() for p in prompts):
        raise typer.BadParameter("expected some words, got an empty prompt", param_hint="--prompt")
    check_out_folder(out)

    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        loading = progress.add_task("Loading the shapes pipeline", total=1)
        pipe = _load()
        progress.update(loading, advance=1)
        drawing = progress.add_task("Drawing", total=3 * len(prompts) * STEPS)
        drawn = [_pictures(pipe, p, seed, lambda: progress.update(drawing, advance=1)) for p in prompts]
        measuring = progress.add_task("Measuring", total=2)
        rows = _measure(pipe, prompts[0], lambda: progress.update(measuring, advance=1))
        writing = progress.add_task("Writing the page", total=1)
        page = write_demo_page(out, drawn, rows, _ground(), str(semantics()))
        progress.update(writing, advance=1)

    _print_table(console, rows)
    for pictures in drawn:
        console.print(pictures.prompt, style="bold")
        console.print(f"  empty program against stock: {pictures.empty_difference}")
    console.print(f"\nOpen {page}   ({time.perf_counter() - started:.0f} s)")


def semantics() -> Any:
    """The program that the demo shows."""
    from ..program import Program, Refinement, SalienceDropout

    return Program(SalienceDropout(0.1), Refinement(1, 0.1, 0.5), "content")


def _load() -> Any:
    try:
        from ..lab import load_pipeline
    except ImportError as error:
        raise ImportError("demo needs diffusers and its friends: pip install 'sdattn-fast[demo]'") from error
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _pictures(pipe: Any, prompt: str, seed: int, tick: Any) -> Pictures:
    from .. import Capture, Program, apply
    from ..guidance.phrases import find_phrases, phrase_ids
    from ..lab.shapes.captions import objects_of

    objects = [" ".join(pair) for pair in objects_of(prompt)]
    phrases = phrase_ids(find_phrases(prompt, pipe.tokenizer, phrases=objects), fuse="all")
    stock = _draw(pipe, prompt, seed, tick)
    with apply(pipe, Program(), capture=Capture()) as patch:
        empty = _draw(pipe, prompt, seed, tick)
        stock_maps = _word_maps(patch, prompt)
    with apply(pipe, semantics(), phrases=phrases, capture=Capture()) as patch:
        semantic = _draw(pipe, prompt, seed, tick)
        semantic_maps = _word_maps(patch, prompt)
    return Pictures(prompt, stock, empty, semantic, _difference(stock, empty), stock_maps, semantic_maps)


def _word_maps(patch: Any, prompt: str) -> dict[str, Any]:
    """Of the words that name something, the map's range drawn out to [0, 1]."""
    maps = patch.maps.per_word(prompt, size=(64, 64))
    words = words_to_find(Prompt(prompt), list(maps))
    plain = {word: maps[word][0] for word in words}
    return {word: (x - x.min()) / (x.max() - x.min()).clamp(min=1e-12) for word, x in plain.items()}


def _draw(pipe: Any, prompt: str, seed: int, tick: Any) -> Any:
    import torch

    def callback(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        tick()
        return kwargs

    return pipe(
        prompt,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(seed),
        callback_on_step_end=callback,
    ).images[0]


def _difference(a: Any, b: Any) -> str:
    import numpy as np

    error = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    if not error.any():
        return "identical, every byte"
    psnr = 10 * np.log10(255**2 / (error**2).mean())
    return f"PSNR {psnr:.1f} dB, at most {int(np.abs(error).max())} of 255 levels"


def _measure(pipe: Any, prompt: str, tick: Any) -> list[Cost]:
    """A UNet step under guidance: stock, the plain torch reference and the fused kernels run the same program."""
    import torch

    from .. import apply
    from ..measure.memory import peak_mib
    from ..measure.timing import alternate

    unet = pipe.unet
    conditional, unconditional = pipe.encode_prompt(prompt, "cpu", 1, True)
    size = unet.config.sample_size
    inputs = (torch.randn(2, 4, size, size), torch.tensor(500), torch.cat([unconditional, conditional]))
    active, protected = torch.tensor([False, True]), _protected(pipe, prompt)
    contestants = {}
    for name, backend in (("stock (no program)", None), ("plain torch reference", "reference"), ("fused", "auto")):
        own = copy.deepcopy(unet)
        if backend is not None:
            apply(own, semantics(), active=active, protected=protected, backend=backend)
        contestants[name] = functools.partial(own, inputs[0], inputs[1], encoder_hidden_states=inputs[2])
    with torch.no_grad():
        took = alternate(contestants, seconds=1.5)
        tick()
        peak = {name: peak_mib(run) for name, run in contestants.items()}
        tick()
    first = took["stock (no program)"]
    return [Cost(name, 1e3 * t, t / first, peak[name]) for name, t in took.items()]


def _protected(pipe: Any, prompt: str) -> Any:
    """(2, tokens) bool: all but the prompt's words."""
    import torch

    from ..patching.words import words_of

    protected = torch.ones(2, pipe.tokenizer.model_max_length, dtype=torch.bool)
    for tokens in words_of(pipe.tokenizer, prompt).values():
        protected[:, tokens] = False
    return protected


def _ground() -> str:
    import torch

    from .doctor import processor_name

    software = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{processor_name()}, {torch.get_num_threads()} threads, {software}"


def _print_table(console: Any, rows: list[Cost]) -> None:
    from rich.table import Table

    table = Table(title="One UNet step of the shapes pipeline, both guidance halves")
    for column in ("attention", "ms", "share of stock", "peak MiB of tensors"):
        table.add_column(column, justify="left" if column == "attention" else "right")
    for row in rows:
        table.add_row(row.name, f"{row.milliseconds:.1f}", f"{row.share:.2f}", f"{row.mebibytes:.1f}")
    console.print(table)
