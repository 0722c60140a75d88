"""Every launch that a test run makes in Triton's interpreter, as it would be made on an H100: a plugin for pytest.

`pytest -p recorded_launches` with SDATTN_RECORD_LAUNCHES=file appends each new kind of launch to that file, a line of
JSON each; `compile_launches.py` compiles them. The interpreter hides what a compiler refuses, and tiles and precision
are others on a GPU, so the arguments are made a second time for one.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from compile_launches import argument_class
from kernel_figures import MULTIPROCESSORS

from sdattn_fast.backend.triton import folded_layers, gaussian, gpu, rows, rows_backward, smoothing, spatial

__all__ = ["on_an_h100", "spec"]

_CALLS = {
    rows: ("rows_call",),
    folded_layers: ("folded_call",),
    spatial: ("picture_call",),
    gaussian: ("gaussian_call",),
    smoothing: ("smooth_call",),
    rows_backward: ("backward_call", "shared_call", "sum_call"),
}
_seen: set[str] = set()


def pytest_configure(config: Any) -> None:
    path = os.environ["SDATTN_RECORD_LAUNCHES"]
    for module, names in _CALLS.items():
        for name in names:
            setattr(module, name, _recording(getattr(module, name), name.replace("_call", "_kernel"), path))


@contextlib.contextmanager
def on_an_h100(precision: str = "tf32x3", bounds_registers: bool = True) -> Iterator[None]:
    """Launchers choose tiles, precision and registers as there."""
    with (
        mock.patch.object(gpu, "num_sms", lambda device: MULTIPROCESSORS),
        mock.patch.object(gpu, "precision", lambda device: precision),
        mock.patch.object(gpu, "bounds_registers", lambda device: bounds_registers),
    ):
        yield


def spec(kernel: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """A launch in JSON: tensors are [dtype, address modulo 16], the rest is itself."""
    tensors = [
        [str(x.dtype).removeprefix("torch."), x.data_ptr() % 16] if isinstance(x, torch.Tensor) else x
        for x in arguments
    ]
    return {"kernel": kernel, "arguments": tensors, "options": options}


def _recording(make: Callable[..., Any], kernel: str, path: str) -> Callable[..., Any]:
    @functools.wraps(make)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        made = make(*args, **kwargs)
        with on_an_h100():
            again = list(args)
            if make.__name__ == "backward_call":  # it is handed the tiles that were chosen for the interpreter
                call, _, _, of_key, of_value, _, of_gate, of_tokens = args
                walks = of_gate is not None or of_tokens is not None
                again[1] = rows_backward._tiles(call, of_key is not None or of_value is not None, walks)
            _, arguments, options = make(*again, **kwargs)
        launch = spec(kernel, arguments, options)
        kind = json.dumps({**launch, "arguments": [argument_class(x) for x in launch["arguments"]]})
        if kind not in _seen:
            _seen.add(kind)
            with open(path, "a") as file:
                file.write(json.dumps(launch) + "\n")
        return made

    return wrapped
