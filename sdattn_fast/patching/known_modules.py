"""Modules whose output follows from parameters that can be watched, told by their exact class.

Any other module is called, never read, and what it gave is not kept: a quantised layer's weights are no parameters, a
subclass of Linear computes what it likes, and a parametrized module has a class of its own.

Source: docs/design.md, "When cached text is stale".
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

__all__ = ["any_global_hook", "is_hooked", "is_known", "unknown_class"]

_TORCH = (
    nn.Linear, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.Identity, nn.Dropout, nn.ModuleList, nn.ModuleDict,
    nn.ParameterDict,
)  # fmt: skip
# By name, since `import sdattn_fast` needs torch alone.
_ELSEWHERE = frozenset(
    {
        ("diffusers.models.normalization", "RMSNorm"),
        ("diffusers.models.normalization", "FP32LayerNorm"),
        ("diffusers.models.normalization", "LpNorm"),
        ("peft.tuners.lora.layer", "Linear"),
        ("peft.tuners.lora.dora", "DoraLinearLayer"),
    }
)


def unknown_class(*modules: Any) -> str | None:
    """The full name of the first class among these modules, and the modules inside them, that is not known."""
    for module in modules:
        if module is None or type(module) is nn.Linear:
            continue
        inside = module.modules() if isinstance(module, nn.Module) else (module,)
        for inner in inside:
            kind = type(inner)
            if not _is_listed(kind):
                return f"{kind.__module__}.{kind.__qualname__}"
    return None


def is_known(module: nn.Module) -> bool:
    """Whether a module, apart from those inside it, computes what its class says, of parameters alone."""
    if not _is_listed(type(module)):
        return False
    # DataParallel's replicas have tensors where parameters were.
    others = module._buffers or any(isinstance(x, Tensor) for x in module.__dict__.values())
    return not is_hooked(module) and not others


def any_global_hook() -> bool:
    """Whether calling any module at all does more than its class's forward."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether calling a module does more than its class's forward, as it was written."""
    kind: Any = type(module)
    over_it = "forward" in module.__dict__ or _FORWARDS.get(kind, kind.forward) is not kind.forward
    return bool(module._forward_hooks or module._forward_pre_hooks or over_it)


def _is_own(kind: Any) -> bool:
    """Whether a class has the forward that it was written with, and not one that was put over it."""
    forward = kind.forward
    return forward.__module__.partition(".")[0] == kind.__module__.partition(".")[0] and not hasattr(
        forward, "__wrapped__"
    )


_FORWARDS = {kind: kind.forward if _is_own(kind) else None for kind in _TORCH}


def _is_listed(kind: Any) -> bool:
    if kind in _FORWARDS:
        return bool(kind.forward is _FORWARDS[kind])
    return (kind.__module__, kind.__qualname__) in _ELSEWHERE and _is_own(kind)
