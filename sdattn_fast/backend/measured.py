"""Which backend measured faster, per device and shape: what "auto" goes by where there is a choice.

measured.json, which benchmarks/prefer.py writes, holds by device name a list of shapes, each with the backend that was
the fastest there; "about" says what it is. Where nothing was measured, nothing is preferred.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import torch

__all__ = ["FILE", "is_known", "fastest"]

FILE = Path(__file__).with_name("measured.json")


def is_known(device: torch.device) -> bool:
    """Whether anything was measured on such a device."""
    return device.type == "cuda" and bool(_table()) and _name(device) in _table()


def fastest(
    device: torch.device, dtype: torch.dtype, batch: int, heads: int, pixels: int, head_dim: int, tokens: int
) -> str | None:
    """The backend that was the fastest at the nearest shape of the device, dtype and head dimension, or None.

    Near is small in the sum of the logarithms' differences: of pixels, of batch * heads and of tokens.
    """
    return _nearest(_name(device), str(dtype).removeprefix("torch."), head_dim, pixels, batch * heads, tokens)


# torch.compile must trace neither the reading of a file nor the look at the device.
is_known._dynamo_marked_constant = True  # type: ignore[attr-defined]
fastest._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=4096)
def _nearest(name: str, dtype: str, head_dim: int, *sizes: int) -> str | None:
    if min(sizes) < 1:
        return None
    found = [shape for shape in _table().get(name, ()) if (shape["dtype"], shape["head_dim"]) == (dtype, head_dim)]

    def distance(shape: dict[str, Any]) -> float:
        theirs = (shape["pixels"], shape["batch"] * shape["heads"], shape["tokens"])
        return sum(abs(math.log(mine / other)) for mine, other in zip(sizes, theirs, strict=True))

    return min(found, key=distance)["fastest"] if found else None


@functools.cache
def _table() -> dict[str, list[dict[str, Any]]]:
    devices: dict[str, list[dict[str, Any]]] = json.loads(FILE.read_text())["devices"]
    return devices


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)
