"""The demo's page: one HTML file with its pictures inside, and the same pictures as PNGs beside it."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from textwrap import wrap
from typing import Any

from ..files import atomic_write

__all__ = ["Cost", "Drawn", "Scene", "write_demo_page"]

_ENLARGE = 3


@dataclass(frozen=True)
class Drawn:
    """A picture (PIL), by what, in how many seconds, and what the detector says is in it. maps: {word: (height, width)
    float tensor}, in [0, 1]; empty where none were kept."""

    name: str
    picture: Any
    seconds: float
    detected: str
    maps: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scene:
    """A prompt, drawn by all; empty_difference: between stock and an empty program, as text."""

    prompt: str
    drawn: list[Drawn]
    empty_difference: str


@dataclass(frozen=True)
class Cost:
    """One line of a table: the time, as a share of stock's too, and peak mebibytes of tensors."""

    name: str
    time: float
    share: float
    mebibytes: float


def write_demo_page(
    out: Path, scenes: list[Scene], pictures: list[Cost], steps: list[Cost], ground: str, program: str
) -> Path:
    """Write `demo.html` and the PNGs into out; returns the page's path. pictures: costs of a picture, in seconds;
    steps: of a UNet step with the program, in milliseconds. ground: what it was measured on.

    Raises: OSError where out cannot be written; what was there before is then untouched.
    """
    import jinja2

    shown = []
    for number, scene in enumerate(scenes, start=1):
        figures = [
            (drawn.name, f"{drawn.seconds:.2f} s: {drawn.detected}", _png(out, f"{number}-{_slug(drawn.name)}", drawn))
            for drawn in scene.drawn
        ]
        heat = _heat_maps([drawn for drawn in scene.drawn if drawn.maps])
        _write(out / f"demo-{number}-maps-{_slug(scene.prompt)}.png", heat)
        shown.append({"prompt": scene.prompt, "figures": figures, "maps": _uri(heat), "empty": scene.empty_difference})
    _write(out / "demo.png", _overview(scenes))
    template = resources.files(__package__).joinpath("demo.html.jinja").read_text()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(template).render(
        scenes=shown, pictures=pictures, steps=steps, ground=ground, program=program
    )
    _write(out / "demo.html", page.encode())
    return out / "demo.html"


def _png(out: Path, name: str, drawn: Drawn) -> str:
    picture = drawn.picture
    large = picture.resize((picture.width * _ENLARGE, picture.height * _ENLARGE), resample=0)
    data = io.BytesIO()
    large.save(data, "PNG")
    _write(out / f"demo-{name}.png", data.getvalue())
    return _uri(data.getvalue())


def _overview(scenes: list[Scene]) -> bytes:
    """Two prompts a row, each a picture of everyone's with the text below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    groups = min(2, len(scenes))
    rows = -(-len(scenes) // groups)
    figure = plt.figure(figsize=(5.2 * groups, 2.05 * rows + 0.15))
    parts = figure.subfigures(rows, groups, squeeze=False)
    for i, (scene, part) in enumerate(zip(scenes, parts.flat, strict=False)):
        axes = part.subplots(1, len(scene.drawn))
        for drawn, axis in zip(scene.drawn, axes, strict=True):
            axis.imshow(np.asarray(drawn.picture), interpolation="nearest")
            axis.set_axis_off()
            if i < groups:
                axis.set_title(drawn.name, fontsize=9, pad=3)
        text = "\n".join(wrap(scene.prompt, 70))
        part.text(0.5, 0.15, text, ha="center", va="top", fontsize=9, parse_math=False)
        part.subplots_adjust(left=0.01, right=0.99, top=0.92, bottom=0.16, wspace=0.04)
    return _drawn_png(figure, 100)


def _heat_maps(drawn: list[Drawn]) -> bytes:
    """A row for each of those that kept maps, a column for each word, its map over the picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    words = list(drawn[0].maps) if drawn else []
    across = max(len(words), 1)
    figure, axes = plt.subplots(
        max(len(drawn), 1), across, figsize=(1.1 * across + 0.3, 1.25 * max(len(drawn), 1)), squeeze=False
    )
    for axis, word in zip(axes[0], words, strict=False):
        axis.set_title(word, fontsize=8, parse_math=False)
    for line, one in zip(axes, drawn, strict=False):
        for axis, word in zip(line, words, strict=False):
            axis.imshow(np.asarray(one.picture.convert("L")), cmap="gray", vmin=0, vmax=255)
            axis.imshow(one.maps[word].numpy(), cmap="inferno", alpha=0.65, vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(one.name, fontsize=7)
    figure.tight_layout(pad=0.4)
    return _drawn_png(figure, 110)


def _drawn_png(figure: Any, dpi: int) -> bytes:
    import matplotlib.pyplot as plt

    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=dpi)
    plt.close(figure)
    return data.getvalue()


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40]


def _write(path: Path, data: bytes) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)
