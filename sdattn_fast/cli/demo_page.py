"""The demo's page: one HTML file with its pictures inside, and the same pictures as PNGs beside it."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ..files import atomic_write

__all__ = ["Cost", "Pictures", "write_demo_page"]

_ENLARGE = 3


@dataclass(frozen=True)
class Pictures:
    """What the page shows of one prompt. Maps are {word: (height, width) float tensor}, in [0, 1]."""

    prompt: str
    stock: Any
    empty: Any
    semantic: Any
    empty_difference: str
    stock_maps: dict[str, Any]
    semantic_maps: dict[str, Any]


@dataclass(frozen=True)
class Cost:
    """One line of the table: milliseconds of a UNet step and peak mebibytes of tensors in it."""

    name: str
    milliseconds: float
    share: float
    mebibytes: float


def write_demo_page(out: Path, prompts: list[Pictures], rows: list[Cost], ground: str, program: str) -> Path:
    """Write `demo.html` and the PNGs into out; returns the page's path.

    Raises: OSError where out cannot be written; what was there before is then untouched.
    """
    import jinja2

    shown = []
    for number, prompt_pictures in enumerate(prompts, start=1):
        pictures = []
        for kind, caption in (
            ("stock", "stock"),
            ("empty", f"empty program: {prompt_pictures.empty_difference}"),
            ("semantic", "with semantics"),
        ):
            pictures.append((caption, _png(out, f"{number}-{kind}", getattr(prompt_pictures, kind))))
        heat = _heat_maps(prompt_pictures)
        _write(out / f"demo-{number}-maps-{_slug(prompt_pictures.prompt)}.png", heat)
        shown.append({"prompt": prompt_pictures.prompt, "pictures": pictures, "maps": _uri(heat)})
    _write(out / "demo.png", _overview(prompts))
    template = resources.files(__package__).joinpath("demo.html.jinja").read_text()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(template).render(scenes=shown, rows=rows, ground=ground, program=program)
    _write(out / "demo.html", page.encode())
    return out / "demo.html"


def _png(out: Path, name: str, picture: Any) -> str:
    large = picture.resize((picture.width * _ENLARGE, picture.height * _ENLARGE), resample=0)
    data = io.BytesIO()
    large.save(data, "PNG")
    _write(out / f"demo-{name}.png", data.getvalue())
    return _uri(data.getvalue())


def _overview(prompts: list[Pictures]) -> bytes:
    """A row for each prompt: stock, with an empty program, with semantics."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    kinds = {"stock": "stock", "empty": "empty program", "semantic": "semantics"}
    figure, axes = plt.subplots(len(prompts), 3, figsize=(6.4, 2.35 * len(prompts)), squeeze=False)
    for axis, label in zip(axes[0], kinds.values(), strict=True):
        axis.set_title(label, fontsize=10)
    for line, prompt_pictures in zip(axes, prompts, strict=True):
        for axis, kind in zip(line, kinds, strict=True):
            axis.imshow(np.asarray(getattr(prompt_pictures, kind)))
            axis.set_axis_off()
        line[1].text(
            0.5,
            -0.06,
            prompt_pictures.prompt,
            transform=line[1].transAxes,
            ha="center",
            va="top",
            fontsize=9,
            parse_math=False,
        )
    edge = 0.3 / figure.get_figheight()
    figure.subplots_adjust(left=0.01, right=0.99, top=1 - edge, bottom=edge, wspace=0.03, hspace=0.14)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    plt.close(figure)
    return data.getvalue()


def _heat_maps(pictures: Pictures) -> bytes:
    """A row for the empty program, a row for the semantics; a column for each word, its map over the picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    words = list(pictures.stock_maps)
    figure, axes = plt.subplots(2, max(len(words), 1), figsize=(1.45 * max(len(words), 1) + 0.4, 3.2), squeeze=False)
    for axis, word in zip(axes[0], words, strict=False):
        axis.set_title(word, fontsize=10, parse_math=False)
    lines = (
        ("empty program", pictures.empty, pictures.stock_maps),
        ("semantics", pictures.semantic, pictures.semantic_maps),
    )
    for line, (label, picture, maps) in zip(axes, lines, strict=True):
        for axis, word in zip(line, words, strict=False):
            axis.imshow(np.asarray(picture.convert("L")), cmap="gray", vmin=0, vmax=255)
            axis.imshow(maps[word].numpy(), cmap="inferno", alpha=0.65, vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(label, fontsize=9)
    figure.tight_layout(pad=0.4)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130)
    plt.close(figure)
    return data.getvalue()


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40]


def _write(path: Path, data: bytes) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)
