"""A layer's keys and values of the text, kept where they may be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..streams import capturing
from .known_modules import unknown_class
from .projections import key_value
from .text_cache import KeyValue, Weights, why_unread
from .text_state import TextState

__all__ = ["kept_key_value", "modules_of_text"]


def modules_of_text(attn: Any) -> tuple[Any, ...]:
    """What keys and values, and what may fold into them, are made with."""
    of_text = attn.to_k, attn.to_v, attn.norm_cross, attn.norm_k
    # What is not folded must not keep the keys and values from being kept.
    folds = why_unread(attn.to_q) is None and why_unread(attn.to_out[0]) is None
    return (*of_text, attn.to_q, attn.to_out[0]) if folds else of_text


def kept_key_value(text: TextState, attn: Any, states: Tensor, first_look: bool = False) -> KeyValue | None:
    """The layer's keys and values from the cache, made now if need be; None where nothing may be kept.

    first_look: no hook has looked at the text before this forward. Raises: ValueError where fold="always" cannot be
    served, because a projection's class is not known.
    """
    if not text.settings.text_cache or not text.reads_own_text or (first_look and capturing(states.device)):
        return None
    if first_look and text.cached.look(states) is None:
        return None
    modules = modules_of_text(attn)
    if torch.is_grad_enabled() and any(p.requires_grad for m in modules if m is not None for p in m.parameters()):
        return None
    found = text.cached.find(attn, states, modules)
    if found is None:
        return None
    place, entry = found
    if entry is not None:
        return entry
    weights = Weights.of(*modules)
    if weights is None and text.settings.fold == "always":
        _say_what_is_not_known(attn)
    if weights is None or capturing(states.device):  # what is made in a capture is the graph's own
        return None
    weights.sample()
    entry = KeyValue(*key_value(attn, states), weights)
    text.cached.keep(attn, place, entry)
    return entry


def _say_what_is_not_known(attn: Any) -> None:
    for name in ("to_k", "to_v", "norm_cross", "norm_k"):
        kind = unknown_class(getattr(attn, name))
        if kind is not None:
            raise ValueError(
                f"fold: 'always' cannot be served, because {name} is a {kind}, whose weights are never read and whose "
                "keys and values are not kept"
            )
