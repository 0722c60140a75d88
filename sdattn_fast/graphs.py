"""Whether what runs is recorded, so that kernels must be seen as ops and numbers must not be looked at."""

from __future__ import annotations

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = ["in_graph", "traced"]


def in_graph() -> bool:
    """Under torch.compile, torch.export, torch.jit.trace or make_fx."""
    return torch.compiler.is_compiling() or traced()


def traced() -> bool:
    """Under torch.jit.trace or make_fx, where Python runs as it always does."""
    # The first question is ten times faster than the second, and every layer asks.
    return torch.jit.is_tracing() or (is_in_torch_dispatch_mode() and get_proxy_mode() is not None)
