"""`sdattn-fast demo`: captions drawn by stock, with a recipe, and by Attend-and-Excite; maps, time and memory.

Writes one self-contained HTML page and its PNGs. Everything runs offline on a CPU, in one to two minutes.
"""

from __future__ import annotations

import copy
import functools
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..lab.pipeline import GUIDANCE, STEPS
from ..prompts import Prompt, words_to_find
from .demo_page import Cost, Drawn, Scene, write_demo_page
from .options import check_out_folder, plain_console, within

__all__ = ["demo"]

RECIPE = "objects"
_PICTURES = 8


def demo(
    out: Annotated[Path, typer.Option(help="Output folder for demo.html and the PNGs.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Seed of the latents.", callback=within(0, 2**63 - 1))] = 0,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt of the objects world; may be repeated. Default: eight captions.")
    ] = None,
) -> None:
    """Draw pictures with the objects pipeline, and write a page that shows what a recipe does and what it costs."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    started = time.perf_counter()
    console = plain_console()
    prompts = tuple(prompt or _captions())
    if any(not p.strip() for p in prompts):
        raise typer.BadParameter("expected some words, got an empty prompt", param_hint="--prompt")
    check_out_folder(out)

    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        loading = progress.add_task("Loading the objects pipeline", total=1)
        contestants = _Contestants(*_load())
        progress.update(loading, advance=1)
        drawing = progress.add_task("Drawing", total=5 * len(prompts))
        scenes = [contestants.scene(p, seed, lambda: progress.update(drawing, advance=1)) for p in prompts]
        measuring = progress.add_task("Measuring", total=2)
        pictures = contestants.costs(scenes, seed)
        progress.update(measuring, advance=1)
        steps = _step_costs(contestants.pipe, prompts[0])
        progress.update(measuring, advance=1)
        page = write_demo_page(out, scenes, pictures, steps, _ground(), str(semantics()))

    _print_table(console, "One picture, the text encoded and the picture decoded", "s", pictures)
    _print_table(console, "One UNet step with a program, both guidance halves", "ms", steps)
    for scene in scenes:
        console.print(scene.prompt, style="bold")
        for drawn in scene.drawn:
            console.print(f"  {drawn.name}: {drawn.detected}")
        console.print(f"  an empty program against stock: {scene.empty_difference}")
    console.print(f"\nOpen {page}   ({time.perf_counter() - started:.0f} s)")


def semantics() -> Any:
    """The program whose cost the demo shows."""
    from ..program import Program, Refinement, SalienceDropout

    return Program(SalienceDropout(0.1), Refinement(1, 0.1, 0.5), "content")


def _captions() -> list[str]:
    """Of the captions that results are reported on, the first ones."""
    from ..lab.objects.captions import report_scenes

    return [scene.caption for scene in report_scenes(_PICTURES)]


def _load() -> tuple[Any, Callable[[Any], str]]:
    """The pipeline, and what its detector says of a picture."""
    try:
        from ..lab import load_pipeline
        from ..lab.detected_text import detected_text
    except ImportError as error:
        raise ImportError("demo needs diffusers and its friends: pip install 'sdattn-fast[demo]'") from error
    pipe = load_pipeline(world="objects")
    pipe.set_progress_bar_config(disable=True)
    return pipe, detected_text("objects")


class _Contestants:
    """Stock, a recipe and Attend-and-Excite draw each prompt in turn, from the same noise."""

    def __init__(self, pipe: Any, detected: Callable[[Any], str]) -> None:
        from ..evaluation.peers import AttendAndExcite

        self.pipe, self._detected, self._peer = pipe, detected, AttendAndExcite()
        self._draw: dict[str, Callable[[str, int, int], Any]] = {
            "stock": self._by_stock, f"recipe {RECIPE!r}": self._by_recipe, self._peer.name: self._by_peer,
        }  # fmt: skip
        for draw in self._draw.values():  # what is compiled or loaded at first is nobody's time
            draw("an owl and a cat", 0, 2)

    def scene(self, prompt: str, seed: int, tick: Callable[[], None]) -> Scene:
        import numpy as np

        from .. import Capture, Program, apply

        drawn = []
        for name, draw in self._draw.items():
            start = time.perf_counter()
            picture = draw(prompt, seed, STEPS)
            took = time.perf_counter() - start
            drawn.append(Drawn(name, picture, took, self._detected(np.asarray(picture))))
            tick()
        with apply(self.pipe, Program(), capture=Capture()) as patch:
            empty = self._by_stock(prompt, seed, STEPS)
            drawn[0] = replace(drawn[0], maps=_word_maps(patch, prompt))
        tick()
        with apply(self.pipe, recipe=RECIPE, capture=Capture()) as patch:
            self._by_stock(prompt, seed, STEPS)
            drawn[1] = replace(drawn[1], maps=_word_maps(patch, prompt))
        tick()
        return Scene(prompt, drawn, _difference(drawn[0].picture, empty))

    def costs(self, scenes: list[Scene], seed: int) -> list[Cost]:
        """Of one picture: the medians over the scenes, and what the tensors of the first take at the most."""
        from ..measure.memory import peak_mib

        rows = []
        for i, (name, draw) in enumerate(self._draw.items()):
            seconds = [scene.drawn[i].seconds for scene in scenes]
            share = statistics.median(scene.drawn[i].seconds / scene.drawn[0].seconds for scene in scenes)
            # Two steps: one with a correction, and one without, take as much as all of them.
            peak = peak_mib(functools.partial(draw, scenes[0].prompt, seed, 2))
            rows.append(Cost(name, statistics.median(seconds), share, peak))
        return rows

    def _by_stock(self, prompt: str, seed: int, steps: int) -> Any:
        call = self.pipe(prompt, num_inference_steps=steps, guidance_scale=GUIDANCE, generator=_generator(seed))
        return call.images[0]

    def _by_recipe(self, prompt: str, seed: int, steps: int) -> Any:
        from .. import apply

        with apply(self.pipe, recipe=RECIPE):
            return self._by_stock(prompt, seed, steps)

    def _by_peer(self, prompt: str, seed: int, steps: int) -> Any:
        from PIL import Image

        from ..guidance.phrases import find_phrases
        from ..guidance.recipe_guide import objects_of

        objects = objects_of(find_phrases(prompt, self.pipe.tokenizer))
        return Image.fromarray(self._peer.draw(self.pipe, [prompt], [objects], [_generator(seed)], GUIDANCE, steps)[0])


def _generator(seed: int) -> Any:
    import torch

    return torch.Generator().manual_seed(seed)


def _word_maps(patch: Any, prompt: str) -> dict[str, Any]:
    """Of the words that name something, the map's range drawn out to [0, 1]."""
    maps = patch.maps.per_word(prompt, size=(64, 64))
    words = words_to_find(Prompt(prompt), list(maps))
    plain = {word: maps[word][0] for word in words}
    return {word: (x - x.min()) / (x.max() - x.min()).clamp(min=1e-12) for word, x in plain.items()}


def _difference(a: Any, b: Any) -> str:
    import numpy as np

    error = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    if not error.any():
        return "identical, every byte"
    psnr = 10 * np.log10(255**2 / (error**2).mean())
    return f"PSNR {psnr:.1f} dB, at most {int(np.abs(error).max())} of 255 levels"


def _step_costs(pipe: Any, prompt: str) -> list[Cost]:
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
        peak = {name: peak_mib(run) for name, run in contestants.items()}
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


def _print_table(console: Any, title: str, unit: str, rows: list[Cost]) -> None:
    from rich.table import Table

    table = Table(title=title)
    for column in ("", unit, "share of stock", "peak MiB of tensors"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(row.name, f"{row.time:.{1 if unit == 'ms' else 2}f}", f"{row.share:.2f}", f"{row.mebibytes:.1f}")
    console.print(table)
