"""Backends: "triton", "cuda", "cpu", "reference". Each is one module; none imports another.

A fused backend's module has `availability(device)`, `not_supported_reasons(...)`, `attention(...)` and `smooth(...)`.
This file chooses among them: "auto" takes the fastest that serves the call, as measured.py knows it, and says once when
it has to fall back to the reference; a name takes that backend or raises with the reasons why it cannot serve. A kernel
that does not compile or launch after all (refusal.py) is a reason from then on for calls like that one. dispatch.py
runs an `AttentionCall` on what was chosen.

Source: docs/design.md, "Backends".
"""

from __future__ import annotations

import operator
import os
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import cpu, cuda, measured, triton
from .call import AttentionCall
from .devices import gpu_index
from .refusal import KernelRefused

__all__ = [
    "NAMES", "KernelRefused", "backends", "choose", "failure", "fused", "pass_over", "remark", "remember_failure",
    "unavailable", "warn_once",
]  # fmt: skip

_FUSED: dict[str, ModuleType] = {"triton": triton, "cuda": cuda, "cpu": cpu}
NAMES = (*_FUSED, "reference")

# Fastest first, per device type, where nothing was measured. The interpreter runs Triton on CPU tensors, for tests:
# only when asked for by name.
_AUTO = {"cuda": ("triton", "cuda"), "cpu": ("cpu",)}

_unavailable: dict[tuple[str, torch.device | None], str | None] = {}
_failures: dict[tuple[Any, ...], str] = {}  # kind of call -> which kernel did not compile or launch, and why
_said: set[str] = set()


def backends() -> dict[str, bool | str]:
    """Every backend's name -> True where it is available, else the reason why not and how to fix it.

    On a machine with several GPUs this is about torch's current one; a call is served by what its own device allows.
    Warns where a backend is available but has not been run on such a device.
    """
    for name in NAMES:
        said = remark(name)
        if said is not None:
            warnings.warn(f"sdattn_fast: {name}: {said}", UserWarning, stacklevel=2)
    reasons = {name: unavailable(name) for name in NAMES}
    return {name: True if reason is None else reason for name, reason in reasons.items()}


def choose(name: str, call: AttentionCall) -> str:
    """The backend that serves this call.

    Raises:
        ValueError: a backend was named that cannot serve this call; the message lists why.
    """
    if name == "reference":
        return name
    if name != "auto":
        reasons = _reasons(name, call)
        if reasons:
            raise ValueError(f"backend: {name!r} cannot serve this call: {'; '.join(reasons)}")
        return name
    passed_over = []
    failed = ""
    for candidate in _order(call.query, call.key):
        # _failures is nearly always empty.
        broken = failure(*_kind(candidate, call)) if _failures else None
        reasons = [broken] if broken else _reasons(candidate, call)
        if not reasons:
            if failed:
                warn_once(f"backend {candidate!r} serves calls like this one, because {failed}.")
            return candidate
        passed_over.append(f"{candidate}: {'; '.join(reasons)}")
        failed = passed_over[-1] if broken else failed
    because = "; ".join(passed_over) or f"no fused backend for device type {call.query.device.type!r}"
    warn_once(
        f"the plain torch reference serves this call, slowly, because {because}. backend='reference' silences this."
    )
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


def unavailable(name: str, device: torch.device | None = None) -> str | None:
    """Why a backend is not available on a device (None: on torch's current GPU, if it is about GPUs), or None."""
    if name == "reference":
        return None
    if device is None and name != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", gpu_index(device))
    if (name, device) not in _unavailable or (name == "triton" and os.environ.get("TRITON_INTERPRET")):
        _unavailable[name, device] = _FUSED[name].availability(device)
    return _unavailable[name, device]


# torch.compile must not trace the look at the machine. The public decorator imports all of torch._dynamo (a second).
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def remark(name: str, device: torch.device | None = None) -> str | None:
    """What is to be known of a backend that is available on a device, or None."""
    return triton.remark(device) if name == "triton" and unavailable(name, device) is None else None


def pass_over(error: KernelRefused, call: AttentionCall) -> None:
    """From here on "auto" passes over the backend that raised the error, for calls like this one."""
    remember_failure(error, *_kind(error.backend, call))


def remember_failure(error: KernelRefused, *kind: Any) -> None:
    """Calls of this kind are not tried again: a compiler that failed once would fail, for seconds, at every step."""
    _failures[kind] = f"it could not launch {error.reason}"


def failure(*kind: Any) -> str | None:
    """Why calls of this kind are not tried again, or None."""
    return _failures.get(kind)


failure._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _kind(name: str, call: AttentionCall) -> tuple[Any, ...]:
    """What a kernel's compilation depends on, roughly: calls of a kind are passed over together."""
    query, plan = call.query, call.lowered.plan
    assert plan is not None
    sizes = (operator.index(size) for size in (call.key.shape[2], query.shape[3], call.value.shape[3]))
    return name, query.device, query.dtype, *sizes, plan.picture is not None, plan.smoothings > 0, call.needs_grad


def _reasons(name: str, call: AttentionCall) -> list[str]:
    reason = unavailable(name, call.query.device)
    if reason is not None:
        return [reason]
    plan = call.lowered.plan
    assert plan is not None
    return _FUSED[name].not_supported_reasons(call.query, call.key, call.value, call.bias, plan, call.needs_grad)


def warn_once(message: str) -> None:
    """A UserWarning, the first time that it is said; not while torch.compile traces."""
    if torch.compiler.is_compiling() or message in _said:
        return
    _said.add(message)
    warnings.warn(f"sdattn_fast: {message} Said once.", UserWarning, stacklevel=4)
