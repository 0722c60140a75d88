"""The demo's page: one HTML file with its pictures inside, and the same pictures as PNGs beside it."""

from __future__ import annotations

import base64
import io
import os
import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .demo import Row, Scene

__all__ = ["write_report"]

_ENLARGE = 3


def write_report(out: Path, scenes: list[Scene], rows: list[Row], ground: str, program: str) -> Path:
    """Write `demo.html` and the PNGs into out; returns the page's path.

    Raises: OSError where out cannot be written; what was there before is then untouched.
    """
    import jinja2

    shown = []
    for number, scene in enumerate(scenes, start=1):
        pictures = []
        for kind, caption in (
            ("stock", "stock"),
            ("empty", f"empty program: {scene.empty_difference}"),
            ("semantic", "with semantics"),
        ):
            pictures.append((caption, _png(out, f"{number}-{kind}", getattr(scene, kind))))
        heat = _heat_maps(scene)
        _write(out / f"demo-{number}-maps-{_slug(scene.prompt)}.png", heat)
        shown.append({"prompt": scene.prompt, "pictures": pictures, "maps": _uri(heat)})
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


def _heat_maps(scene: Scene) -> bytes:
    """A row for the empty program, a row for the semantics; a column for each word, its map over the picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    words = list(scene.stock_maps)
    figure, axes = plt.subplots(2, max(len(words), 1), figsize=(1.45 * max(len(words), 1) + 0.4, 3.2), squeeze=False)
    lines = (("empty program", scene.empty, scene.stock_maps), ("semantics", scene.semantic, scene.semantic_maps))
    for line, (label, picture, maps) in zip(axes, lines, strict=True):
        for axis, word in zip(line, words, strict=False):
            axis.imshow(np.asarray(picture.convert("L")), cmap="gray", vmin=0, vmax=255)
            axis.imshow(maps[word].numpy(), cmap="inferno", alpha=0.65, vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            if line is axes[0]:
                axis.set_title(word, fontsize=10)
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
    """Aside first, then renamed: a full disk loses nothing that was there."""
    aside = path.with_name(path.name + ".part")
    aside.write_bytes(data)
    os.replace(aside, path)
