"""Backends: "triton", "cuda", "cpu", "reference". Each is one module; none imports another.

A backend module has `availability()`, `not_supported_reasons(...)`, `attention(...)` and `smooth(...)`. This file
chooses among them: "auto" takes the fastest that serves the call, as measured.py knows it, and says once when it has to
fall back to the reference; a name takes that backend or raises with the reasons why it cannot serve.

Source: DESIGN.md section 3, "Backends".
"""

from __future__ import annotations

import operator
import os
import warnings
from types import ModuleType

from torch import Tensor

from ..plan import Plan
from . import cpu, cuda, measured, triton

__all__ = ["NAMES", "backends", "choose", "fused"]

_FUSED: dict[str, ModuleType] = {"triton": triton, "cuda": cuda, "cpu": cpu}
NAMES = (*_FUSED, "reference")

# Fastest first, per device type, where nothing was measured. The interpreter runs Triton on CPU tensors, for tests:
# only when asked for by name.
_AUTO = {"cuda": ("triton", "cuda"), "cpu": ("cpu",)}

_unavailable: dict[str, str | None] = {}
_said: set[str] = set()


def backends() -> dict[str, bool | str]:
    """Every backend's name -> True where it is available here, else the reason why not and how to mend it.

    Warns where one is available but has not been run on such a device.
    """
    for name in NAMES:
        said = remark(name)
        if said is not None:
            warnings.warn(f"sdattn_fast: {name}: {said}", UserWarning, stacklevel=2)
    reasons = {name: unavailable(name) for name in NAMES}
    return {name: True if reason is None else reason for name, reason in reasons.items()}


def choose(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    plan: Plan | None,
    needs_grad: bool,
) -> str:
    """The backend that serves this call.

    Raises:
        ValueError: a backend was named that cannot serve this call; the message lists why.
    """
    if name == "reference":
        return name
    if name != "auto":
        reasons = _reasons(name, query, key, value, bias, plan, needs_grad)
        if reasons:
            raise ValueError(f"backend: {name!r} cannot serve this call: {'; '.join(reasons)}")
        return name
    refused = []
    for candidate in _order(query, key):
        reasons = _reasons(candidate, query, key, value, bias, plan, needs_grad)
        if not reasons:
            return candidate
        refused.append(f"{candidate}: {'; '.join(reasons)}")
    _warn_once("; ".join(refused) or f"no fused backend for device type {query.device.type!r}")
    return "reference"


def _order(query: Tensor, key: Tensor) -> tuple[str, ...]:
    """What "auto" tries, the fastest first."""
    order = _AUTO.get(query.device.type, ())
    if len(order) < 2 or not measured.is_known(query.device):
        return order
    # index: torch.compile makes a graph a shape, for which the choice is a constant.
    sizes = [operator.index(size) for size in (*query.shape, key.shape[2])]
    first = measured.fastest(query.device, query.dtype, *sizes)
    return order if first not in order else (first, *(name for name in order if name != first))


def fused(name: str) -> ModuleType:
    """The module of a fused backend."""
    return _FUSED[name]


def unavailable(name: str) -> str | None:
    """Why a backend is not available on this machine, or None."""
    if name == "reference":
        return None
    if os.environ.get("TRITON_INTERPRET") or name not in _unavailable:
        _unavailable[name] = _FUSED[name].availability()
    return _unavailable[name]


# torch.compile must not trace the look at the machine. The public decorator imports all of torch._dynamo (a second).
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def remark(name: str) -> str | None:
    """What is to be known of a backend that is available here, or None."""
    return triton.remark() if name == "triton" and unavailable(name) is None else None


def _reasons(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    plan: Plan | None,
    needs_grad: bool,
) -> list[str]:
    reason = unavailable(name)
    if reason is not None:
        return [reason]
    assert plan is not None
    return _FUSED[name].not_supported_reasons(query, key, value, bias, plan, needs_grad)


def _say_once(reason: str) -> None:
    if reason in _said:
        return
    _said.add(reason)
    warnings.warn(
        f"sdattn_fast: the plain torch reference serves this call, slowly, because {reason}. "
        "backend='reference' silences this. Said once.",
        UserWarning,
        stacklevel=5,
    )


def _warn_once(reason: str) -> None:
    import torch

    if not torch.compiler.is_compiling():
        _say_once(reason)
