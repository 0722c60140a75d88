"""What a kernel forgets to write does not look like a result."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

__all__ = ["poison"]


def poison(patch: pytest.MonkeyPatch) -> None:
    """torch.empty and torch.empty_like fill what they make with NaN, or integers with all bits set."""

    def poisoned(make: Any) -> Any:
        def made(*size: Any, **how: Any) -> torch.Tensor:
            x = make(*size, **how)
            return x.fill_(math.nan if x.is_floating_point() else -1)

        return made

    for name in ("empty", "empty_like"):
        patch.setattr(torch, name, poisoned(getattr(torch, name)))
