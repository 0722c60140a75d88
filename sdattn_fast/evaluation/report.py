"""The evaluation's report: summary.json, a table in Markdown, two figures, and a page with all of it inside.

A difference to stock is called "helps" or "hurts" where its paired 95 % bootstrap interval leaves out zero.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from ..files import atomic_write
from ..measure.paired import cell_text, summary
from .conditions import STOCK
from .run import REPORT_PICTURES, Evaluation

__all__ = ["verdict", "write_report"]

_COST = (
    "Time and memory are of one picture a call for every condition, for some peers draw no more at once; stock is "
    "the pipeline alone, without the maps that others keep."
)

Table = dict[str, dict[str, dict[str, Any]]]


def write_report(evaluation: Evaluation, cost: Mapping[str, Mapping[str, float]], ground: str) -> dict[str, Any]:
    """Write `summary.json`, `evaluation.md`, `differences.png`, `pictures.png` and `evaluation.html` into the folder.

    Args:
        cost: of `costs`, may be empty. ground: what it was measured on.

    Returns: the content of summary.json. Raises: ValueError while batches are missing; OSError.
    """
    table = summary(evaluation.results(), evaluation.subject.measures, STOCK)
    techniques = {c.name: c.technique for c in evaluation.conditions}
    content = {
        "format": "sdattn-fast evaluation", "version": 1, "model": evaluation.model, "ground": ground,
        "prompts": len(evaluation.subject.prompts), "guidance": evaluation.subject.guidance,
        "steps": evaluation.subject.steps, "techniques": techniques, "left out": evaluation.left_out,
        "measures": table, "cost": {name: dict(x) for name, x in cost.items()},
        "cost note": _COST if cost else "",
    }  # fmt: skip
    _write(evaluation.folder / "summary.json", (json.dumps(content, indent=1) + "\n").encode())
    _write(evaluation.folder / "evaluation.md", _markdown(content, table).encode())
    differences, pictures = _differences(table, techniques), _pictures(evaluation)
    _write(evaluation.folder / "differences.png", differences)
    _write(evaluation.folder / "pictures.png", pictures)
    _write(evaluation.folder / "evaluation.html", _page(content, table, differences, pictures).encode())
    return content


def verdict(cell: Mapping[str, Any]) -> str:
    """Of a cell of `summary`: "helps", "hurts" or "no difference"; "" of stock, and where too little was measured."""
    if "difference" not in cell:
        return ""
    return "helps" if cell["low"] > 0 else "hurts" if cell["high"] < 0 else "no difference"


def _markdown(content: Mapping[str, Any], table: Table) -> str:
    measures = list(table[STOCK])
    lines = [
        f"| condition | technique | {' | '.join(measures)} | ms a step, of stock | peak MiB |",
        f"| --- | --- |{' --- |' * (len(measures) + 2)}",
    ]
    for name, cells in table.items():
        shown = []
        for cell in cells.values():
            text = cell_text(cell)
            shown.append(f"**{text}**" if "difference" in cell and verdict(cell) != "no difference" else text)
        price = content["cost"].get(name)
        ratio, peak = (f"{price['of stock']:.2f}", f"{price['peak MiB']:.0f}") if price else ("", "")
        lines.append(f"| {name} | {content['techniques'][name]} | {' | '.join(shown)} | {ratio} | {peak} |")
    if content["cost note"]:
        lines.append(f"\n{content['cost note']}")
    lines += [f"\n{name}: not drawn, {why}." for name, why in content["left out"].items()]
    return "\n".join(lines) + "\n"


def _differences(table: Table, techniques: Mapping[str, str]) -> bytes:
    """A panel a measure: each condition's difference to stock and its interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in table if name != STOCK]
    measures = list(table[STOCK])
    figure, axes = plt.subplots(
        1, len(measures), figsize=(2.6 + 1.6 * len(measures), 1 + 0.24 * len(names)), sharey=True, squeeze=False
    )
    colours = {"helps": "#1a7f37", "hurts": "#cf222e", "no difference": "#8c959f", "": "#8c959f"}
    for axis, measure in zip(axes[0], measures, strict=True):
        axis.axvline(0, color="#57606a", linewidth=0.8)
        for row, name in enumerate(names):
            cell = table[name][measure]
            if "difference" not in cell:
                continue
            colour = colours[verdict(cell)]
            axis.plot((cell["low"], cell["high"]), (row, row), color=colour, linewidth=2, solid_capstyle="butt")
            axis.plot(cell["difference"], row, "o", color=colour, markersize=4)
        axis.set_title(measure, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.margins(x=0.15)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        axis.grid(axis="y", color="#eaeef2", linewidth=0.6)
        axis.set_axisbelow(True)
    axes[0][0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0][0].invert_yaxis()
    figure.supxlabel("difference to stock, 95 % paired bootstrap interval", fontsize=9)
    figure.tight_layout()
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    plt.close(figure)
    return data.getvalue()


def _pictures(evaluation: Evaluation) -> bytes:
    """A row a condition, its name beside it, the first prompts' pictures."""
    from PIL import Image, ImageDraw, ImageFont

    side, margin = 96, 230
    rows = [(c.name, evaluation.pictures(c)[:REPORT_PICTURES]) for c in evaluation.conditions]
    columns = max((len(paths) for _, paths in rows), default=0)
    sheet = Image.new("RGB", (margin + columns * (side + 4), max(1, len(rows)) * (side + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for y, (name, paths) in enumerate(rows):
        draw.text((8, y * (side + 4) + side // 2 - 8), name, fill="black", font=font)
        for x, path in enumerate(paths):
            with Image.open(path) as picture:
                sheet.paste(picture.resize((side, side)), (margin + x * (side + 4), y * (side + 4)))
    data = io.BytesIO()
    sheet.save(data, "PNG")
    return data.getvalue()


def _page(content: Mapping[str, Any], table: Table, differences: bytes, pictures: bytes) -> str:
    import jinja2

    template = resources.files(__package__).joinpath("evaluation.html.jinja").read_text()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    rows = [
        {
            "name": name,
            "technique": content["techniques"][name],
            "cells": [{"text": cell_text(cell), "verdict": verdict(cell).replace(" ", "-")} for cell in cells.values()],
            "cost": content["cost"].get(name),
        }
        for name, cells in table.items()
    ]
    return environment.from_string(template).render(
        content=content, measures=list(table[STOCK]), rows=rows, differences=_uri(differences), pictures=_uri(pictures)
    )


def _uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _write(path: Path, data: bytes) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)
