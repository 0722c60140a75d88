"""What the oldest torch that is supported cannot do."""

from __future__ import annotations

import pytest
import torch
from torch.torch_version import TorchVersion

__all__ = ["compiles_whole"]

compiles_whole = pytest.mark.skipif(
    TorchVersion(torch.__version__) < (2, 7), reason="torch 2.6 does not trace dataclasses.replace: docs/graphs.md"
)
