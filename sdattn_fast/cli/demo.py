"""`sdattn-fast demo`: the shapes pipeline stock, with an empty program, with semantics; pictures, maps, time, memory.

Writes one self-contained HTML page and its PNGs. Everything runs offline on a CPU in under a minute.
"""

from __future__ import annotations

import copy
import functools
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["demo"]

PROMPTS = (
    "a large red circle and a large blue square on a gray background",
    "a large green triangle and a large yellow circle on a black background",
    "a large cyan triangle and a large pink star on a brown background",
)
GUIDANCE, DENOISING_STEPS = 4.0, 20


def demo(
    out: Annotated[Path, typer.Option(help="Folder to write demo.html and the PNGs to.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Of the latents.")] = 0,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt of the shapes world; may be repeated.")] = None,
) -> None:
    """Make pictures with the pipeline that ships with the package, and a page that shows what the program does."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from .report import write_report

    started = time.perf_counter()
    console = Console()
    if not 0 <= seed < 2**63:
        raise typer.BadParameter(f"expected 0 <= seed < 2**63, got {seed}", param_hint="--seed")
    prompts = tuple(prompt or PROMPTS)
    if any(not p.strip() for p in prompts):
        raise typer.BadParameter("expected some words, got an empty prompt", param_hint="--prompt")
    out.mkdir(parents=True, exist_ok=True)

    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        loading = progress.add_task("Loading the shapes pipeline", total=1)
        pipe = _load()
        progress.update(loading, advance=1)
        drawing = progress.add_task("Drawing", total=3 * len(prompts) * DENOISING_STEPS)
        scenes = [_scene(pipe, p, seed, lambda: progress.update(drawing, advance=1)) for p in prompts]
        measuring = progress.add_task("Measuring", total=2)
        rows = _measure(pipe, prompts[0], lambda: progress.update(measuring, advance=1))
        writing = progress.add_task("Writing the page", total=1)
        page = write_report(out, scenes, rows, _ground(), str(semantics()))
        progress.update(writing, advance=1)

    _print_table(console, rows)
    for scene in scenes:
        console.print(f"[bold]{scene.prompt}[/bold]\n  empty program against stock: {scene.empty_difference}")
    console.print(f"\nOpen {page}   ({time.perf_counter() - started:.0f} s)")


def semantics() -> Any:
    """The program that the demo shows."""
    from ..program import Program, Refinement, SalienceDropout

    return Program(SalienceDropout(0.1), Refinement(1, 0.1, 0.5), "content")


@dataclass(frozen=True)
class Scene:
    """What the page shows of one prompt. Maps are {word: (height, width) float tensor}, in [0, 1]."""

    prompt: str
    stock: Any
    empty: Any
    semantic: Any
    empty_difference: str
    stock_maps: dict[str, Any]
    semantic_maps: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One line of the table: milliseconds of a UNet step and peak mebibytes of tensors in it."""

    name: str
    milliseconds: float
    share: float
    mebibytes: float


def _load() -> Any:
    try:
        from ..lab import load_pipeline
    except ImportError as error:
        raise ImportError("demo needs diffusers and its friends: pip install 'sdattn-fast[demo]'") from error
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _scene(pipe: Any, prompt: str, seed: int, tick: Any) -> Scene:
    from .. import Capture, Program, apply

    words = _words(pipe, prompt)
    capture = Capture(tuple(sorted({i for indices in words.values() for i in indices})))

    stock = _draw(pipe, prompt, seed, tick)
    with apply(pipe, Program(), capture=capture) as patch:
        maps = _Mean()
        empty = _draw(pipe, prompt, seed, tick, lambda: maps.add(patch.maps))
        stock_maps = maps.per_word(words, capture.tokens)
    with apply(pipe, semantics(), phrases=_phrases(pipe, prompt), capture=capture) as patch:
        maps = _Mean()
        semantic = _draw(pipe, prompt, seed, tick, lambda: maps.add(patch.maps))
        semantic_maps = maps.per_word(words, capture.tokens)
    return Scene(prompt, stock, empty, semantic, _difference(stock, empty), stock_maps, semantic_maps)


def _draw(pipe: Any, prompt: str, seed: int, tick: Any, after: Any = None) -> Any:
    import torch

    def callback(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        tick()
        if after is not None:
            after()
        return kwargs

    return pipe(
        prompt,
        num_inference_steps=DENOISING_STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(seed),
        callback_on_step_end=callback,
    ).images[0]


class _Mean:
    """The mean over steps and layers of captured maps, upsampled to the picture."""

    def __init__(self) -> None:
        self.total: Any = 0.0

    def add(self, layers: Mapping[str, Any]) -> None:
        import torch.nn.functional as F

        for maps in layers.values():
            self.total = self.total + F.interpolate(maps, size=(64, 64), mode="bicubic", align_corners=False)[0]

    def per_word(self, words: dict[str, list[int]], tokens: tuple[int, ...] | None) -> dict[str, Any]:
        assert tokens is not None
        place = {token: i for i, token in enumerate(tokens)}
        maps = {word: self.total[[place[i] for i in indices]].mean(0) for word, indices in words.items()}
        return {word: (m - m.min()) / (m.max() - m.min()).clamp(min=1e-12) for word, m in maps.items()}


def _words(pipe: Any, prompt: str) -> dict[str, list[int]]:
    """The prompt's content words -> their token indices; "a", "on" and the like left out."""
    tokens = _pieces(pipe, prompt)
    words: dict[str, list[int]] = {}
    start = 0
    while start < len(tokens):
        end = start
        while end < len(tokens) - 1 and not tokens[end].endswith("</w>"):
            end += 1
        word = "".join(tokens[start : end + 1]).replace("</w>", "")
        if word not in {"a", "an", "and", "on", "of", "the", "to", "background", ","}:
            name, again = word, 2
            while name in words:
                name, again = f"{word} ({again})", again + 1
            words[name] = list(range(start + 1, end + 2))
        start = end + 1
    return words


def _phrases(pipe: Any, prompt: str) -> Any:
    """Ids of the noun phrases of a caption of the shapes world: colour and noun of each object share one."""
    import torch

    ids = torch.full((1, pipe.tokenizer.model_max_length), -1, dtype=torch.int64)
    phrase = -1
    inside = False
    for index, token in enumerate(_pieces(pipe, prompt), start=1):
        word = token.replace("</w>", "")
        if word in {"a", "an"}:
            phrase, inside = phrase + 1, True
        elif word in {"and", "on", "left", "above", "of", "the", ","}:
            inside = False
        elif inside:
            ids[0, index] = phrase
    return ids


def _pieces(pipe: Any, prompt: str) -> list[str]:
    return pipe.tokenizer.tokenize(prompt)[: pipe.tokenizer.model_max_length - 2]


def _difference(a: Any, b: Any) -> str:
    import numpy as np

    error = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    if not error.any():
        return "identical, every byte"
    psnr = 10 * np.log10(255**2 / (error**2).mean())
    return f"PSNR {psnr:.1f} dB, at most {int(np.abs(error).max())} of 255 levels"


def _measure(pipe: Any, prompt: str, tick: Any) -> list[Row]:
    """A UNet step under guidance: stock, the plain torch reference and the fused kernels run the same program."""
    import torch

    from .. import apply
    from ..evaluation.memory import peak_mib
    from .timing import alternate

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
    return [Row(name, 1e3 * t, t / first, peak[name]) for name, t in took.items()]


def _protected(pipe: Any, prompt: str) -> Any:
    import torch

    count = len(_pieces(pipe, prompt))
    protected = torch.ones(2, pipe.tokenizer.model_max_length, dtype=torch.bool)
    protected[:, 1 : 1 + count] = False
    return protected


def _ground() -> str:
    import torch

    from .doctor import processor_name

    software = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{processor_name()}, {torch.get_num_threads()} threads, {software}"


def _print_table(console: Any, rows: list[Row]) -> None:
    from rich.table import Table

    table = Table(title="One UNet step of the shapes pipeline, both guidance halves")
    for column in ("attention", "ms", "share of stock", "peak MiB of tensors"):
        table.add_column(column, justify="left" if column == "attention" else "right")
    for row in rows:
        table.add_row(row.name, f"{row.milliseconds:.1f}", f"{row.share:.2f}", f"{row.mebibytes:.1f}")
    console.print(table)
