"""Which GPU a device is, and that launches go to it."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

__all__ = ["gpu_index", "on_device"]


def gpu_index(device: torch.device | None) -> int:
    """The number of a GPU; of None, and of "cuda" without a number, that of torch's current one."""
    index = None if device is None else device.index
    return torch.cuda.current_device() if index is None else index


def on_device(device: torch.device) -> Any:
    """A context in which the device is current, as launches want it: the tensors' device need not be."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)


_NOTHING = contextlib.nullcontext()
