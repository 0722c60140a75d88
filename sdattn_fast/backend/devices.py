"""Which GPU a device is."""

from __future__ import annotations

import torch

__all__ = ["gpu_index"]


def gpu_index(device: torch.device | None) -> int:
    """The number of a GPU; of None, and of "cuda" without a number, that of torch's current one."""
    index = None if device is None else device.index
    return torch.cuda.current_device() if index is None else index
