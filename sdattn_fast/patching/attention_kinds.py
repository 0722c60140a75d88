"""What attention a model has: which layers are served, which not, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .known_processors import own_class, why_foreign
from .layers import cross_attention_layers

__all__ = ["AttentionKind", "attention_kinds"]


@dataclass(frozen=True)
class AttentionKind:
    """Layers of one class with one processor. layers: their names. attention, processor: names of classes. why: they
    are not served, None where they are."""

    layers: tuple[str, ...]
    attention: str
    processor: str
    why: str | None

    def __str__(self) -> str:
        return f"{len(self.layers)} of {self.attention}: {self.why or 'served'}"


def attention_kinds(model: nn.Module) -> list[AttentionKind]:
    """Of all attention modules of a diffusers model but self-attention, in the model's order."""
    alike: dict[tuple[str, str, str | None], list[str]] = {}
    of_text = {id(module) for _, module in cross_attention_layers(model)}
    for name, module in model.named_modules():
        is_text = id(module) in of_text
        if not hasattr(module, "set_processor") or (not is_text and (_is_self_attention(module) or own_class(module))):
            continue
        why = why_foreign(module) if is_text else _why_not_served(module)
        key = type(module).__name__, type(getattr(module, "processor", None)).__name__, why
        alike.setdefault(key, []).append(name)
    return [AttentionKind(tuple(names), *key) for key, names in alike.items()]


def _is_self_attention(module: Any) -> bool:
    return getattr(module, "is_cross_attention", None) is False and getattr(module, "added_kv_proj_dim", None) is None


def _why_not_served(module: Any) -> str:
    if not any((c.__module__, c.__name__) == _ATTENTION for c in type(module).__mro__):
        return "an attention class of its own"
    if module.added_kv_proj_dim is not None:
        return "text and picture are attended to together (added_kv_proj_dim)"
    return "its keys have fewer heads than its queries"


# By name, since `import sdattn_fast` needs torch alone.
_ATTENTION = ("diffusers.models.attention_processor", "Attention")
