"""Attention processors whose arithmetic ours reproduces, told by their exact class.

Any other may do what ours does not: turn queries by their positions (HunyuanDiT), normalise across heads (Sana), have
weights of its own (Custom Diffusion). Such a layer is left alone; a subclass is another class, whatever it is called.

Source: docs/design.md, "Facts about diffusers".
"""

from __future__ import annotations

import math
from typing import Any

import torch

__all__ = ["is_ip_adapter", "why_foreign"]

# By name, since `import sdattn_fast` needs torch alone.
_DIFFUSERS = "diffusers.models.attention_processor"
_IP_ADAPTERS = frozenset(
    {
        (_DIFFUSERS, "IPAdapterAttnProcessor"),
        (_DIFFUSERS, "IPAdapterAttnProcessor2_0"),
        (_DIFFUSERS, "IPAdapterXFormersAttnProcessor"),
        ("sdattn_fast.patching.ip_adapter", "SemanticIPAdapterAttnProcessor"),
    }
)
_OURS = frozenset({("sdattn_fast.patching.processor", "SemanticAttnProcessor")})
_FUSED = (_DIFFUSERS, "FusedAttnProcessor2_0")
# These scale by the heads' width, and apply norm_q and norm_k.
_BY_WIDTH = frozenset({(_DIFFUSERS, "AttnProcessor2_0"), _FUSED})
# These scale by `attn.scale`, and pass norm_q and norm_k by.
_BY_SCALE = frozenset(
    {(_DIFFUSERS, "AttnProcessor"), (_DIFFUSERS, "SlicedAttnProcessor"), (_DIFFUSERS, "XFormersAttnProcessor")}
)


def is_ip_adapter(processor: Any) -> bool:
    """Whether a processor carries an IP-Adapter whose image part ours computes too."""
    return _kind(processor) in _IP_ADAPTERS


def why_foreign(attn: Any) -> str | None:
    """Why ours would not compute what a layer's processor does: its class, and what of the layer; None: it would."""
    kind = _kind(attn.processor)
    name = ".".join(kind)
    if kind in _OURS:
        return None
    if kind not in _BY_WIDTH | _BY_SCALE | _IP_ADAPTERS:
        return name
    if kind not in _BY_WIDTH and (attn.norm_q is not None or attn.norm_k is not None):
        return f"{name}, which leaves out the layer's norm_q and norm_k"
    if kind in _BY_WIDTH and not attn.scale_qk:
        return f"{name}, which scales though the layer's scale_qk is False"
    ours = (attn.inner_dim // attn.heads) ** -0.5 if attn.scale_qk else 1.0
    if kind not in _BY_WIDTH and not math.isclose(attn.scale, ours, rel_tol=1e-6):
        return f"{name}, with a scale of {attn.scale:g} where the layer's width says {ours:g}"
    if kind == _FUSED and not _is_fused_of_its_parts(attn):
        return f"{name}, whose to_kv is not made of the layer's to_k and to_v"
    return None


def _kind(processor: Any) -> tuple[str, str]:
    return type(processor).__module__, type(processor).__qualname__.rpartition(".")[2]


def _is_fused_of_its_parts(attn: Any) -> bool:
    """Adapters, say, may have changed to_k and to_v since, which a fused projection does not see."""
    if any(type(module) is not torch.nn.Linear for module in (attn.to_k, attn.to_v, attn.to_kv)):
        return False
    names = ["weight"] if attn.to_kv.bias is None else ["weight", "bias"]
    parts = ((getattr(attn.to_kv, name), getattr(attn.to_k, name), getattr(attn.to_v, name)) for name in names)
    return all(torch.equal(fused, torch.cat([key, value])) for fused, key, value in parts)
