"""A CUDA graph in imitation, on a CPU: every operator that runs in the capture is written down with its tensors, and a
replay runs them again on the same memory, without Python. What Python decided in the capture stays decided.

Our kernels go through their custom ops meanwhile, which the recorder sees. As on a GPU, numbers are not looked at, and
nothing can be sent there during a capture.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdattn_fast import folded_layer
from sdattn_fast.backend import dispatch
from sdattn_fast.execute import Prepared

__all__ = ["EmulatedGraph", "emulated_gpu"]

_state = {"capturing": False}


class EmulatedGraph:
    """As `torch.cuda.CUDAGraph`, with ``with graph.capture(): ...`` for ``with torch.cuda.graph(graph): ...``."""

    def __init__(self) -> None:
        self._calls: list[Any] = []

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        _state["capturing"] = True
        try:
            with _Recorder(self._calls):
                yield
        finally:
            _state["capturing"] = False

    def replay(self) -> None:
        with torch.no_grad():
            for call, args, kwargs, results in self._calls:
                again = call(*args, **kwargs)
                for old, new in zip(_tensors(results), _tensors(again), strict=True):
                    if old.data_ptr() != new.data_ptr():  # else a view, or written in place
                        old.copy_(new)


class _Recorder(TorchDispatchMode):
    def __init__(self, calls: list[Any]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, results))
        return results


@contextlib.contextmanager
def emulated_gpu() -> Iterator[None]:
    """Inside, CPU tensors are treated as a GPU's: not looked at, and a prepared call's sent there as copies."""

    def to(self: Prepared, device: torch.device) -> Prepared:
        if _state["capturing"]:
            raise RuntimeError("something is still to be sent to the GPU")
        if self.at_home is not None:
            return self
        copied = _copied(self)
        plan = None if copied.plan is None else replace(copied.plan, side=copied.side)
        return replace(copied, plan=plan, at_home=self)

    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("sdattn_fast."):
                if hasattr(module, "capturing"):
                    patch.setattr(module, "capturing", lambda device: _state["capturing"])
                if hasattr(module, "looking_is_free"):
                    patch.setattr(module, "looking_is_free", lambda device: False)
        for module in (dispatch, folded_layer):
            patch.setattr(module, "in_graph", lambda: _state["capturing"])
        patch.setattr(Prepared, "to", to)
        yield


def _copied(part: Any) -> Any:
    changes = {}
    for field in fields(part):
        x = getattr(part, field.name)
        if isinstance(x, Tensor):
            changes[field.name] = x.clone()
        elif field.name in ("plan", "side", "rows", "picture") and is_dataclass(x):
            changes[field.name] = _copied(x)
    return replace(part, **changes)


def _tensors(x: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor)]
