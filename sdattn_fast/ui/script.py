"""What the page drew, as a Python script that draws it again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..evaluation.conditions import acting_steps
from .controls import Controls, DrawRequest

__all__ = ["script"]


def script(
    request: DrawRequest, controls: Controls, model: str, clip: str | None, device: str = "cpu", dtype: str = "float32"
) -> str:
    """The text of a script. model: a folder or hub id, or "shapes"; clip: of the CLIP, None where there is none.
    device, dtype: of the pipeline.

    Raises: ValueError, TypeError, naming the control.
    """
    import jinja2

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=False, keep_trailing_newline=True)
    environment.filters["py"] = repr
    environment.filters["keywords"] = _keywords
    condition, file = controls.condition(request), controls.file(request)
    return environment.from_string(Path(__file__).with_suffix(".py.jinja").read_text(encoding="utf-8")).render(
        request=request, file=file, model=model, clip=clip, backend=controls.backend,
        elsewhere=(device, dtype) != ("cpu", "float32"), device=device, dtype=dtype,
        heads=None if file.heads is None else {layer: list(indices) for layer, indices in file.heads.items()},
        phrases=any((condition.gate, condition.fuse, condition.correct, condition.structure)),
        recipe=controls.recipe if "recipe" in condition.patch else None, fuse=condition.fuse, gate=condition.gate,
        correct=condition.correct, structure=condition.structure, **acting_steps(request.steps),
    )  # fmt: skip


def _keywords(keywords: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in keywords.items())
