"""Attention processors whose arithmetic ours reproduces, told by their exact class.

Any other may do what ours does not: repeat its keys for several heads (Stable Audio), have weights of its own (Custom
Diffusion). Such a layer is left alone; a subclass is another class, whatever it is called.

Source: docs/design.md, "Facts about diffusers".
"""

from __future__ import annotations

import math
from typing import Any

import torch

__all__ = ["is_ip_adapter", "norms_across_heads", "own_class", "why_foreign"]

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
# Applies norm_q and norm_k before the split into heads, and nothing of what Attention may have around the products.
_SANA = ("diffusers.models.transformers.sana_transformer", "SanaAttnProcessor2_0")
# Of layers that are no Attention.
_TRANSFORMERS = "diffusers.models.transformers.transformer_"
_OWN = {
    (f"{_TRANSFORMERS}wan", "WanAttnProcessor"): "wan",
    (f"{_TRANSFORMERS}chronoedit", "WanAttnProcessor"): "wan",
    (f"{_TRANSFORMERS}skyreels_v2", "SkyReelsV2AttnProcessor"): "wan",
    ("sdattn_fast.patching.own_attention", "SemanticWanAttnProcessor"): "wan",
    (f"{_TRANSFORMERS}ltx", "LTXVideoAttnProcessor"): "ltx",
    ("sdattn_fast.patching.own_attention", "SemanticLTXAttnProcessor"): "ltx",
}
# These scale by the heads' width, and apply norm_q and norm_k. HunyuanDiT's turns queries by the rotary embedding that
# it is called with, as ours does.
_BY_WIDTH = frozenset({(_DIFFUSERS, "AttnProcessor2_0"), (_DIFFUSERS, "HunyuanAttnProcessor2_0"), _FUSED, _SANA})
# These scale by `attn.scale`, and pass norm_q and norm_k by.
_BY_SCALE = frozenset(
    {(_DIFFUSERS, "AttnProcessor"), (_DIFFUSERS, "SlicedAttnProcessor"), (_DIFFUSERS, "XFormersAttnProcessor")}
)


def is_ip_adapter(processor: Any) -> bool:
    """Whether a processor carries an IP-Adapter whose image part ours computes too."""
    return _kind(processor) in _IP_ADAPTERS


def own_class(attn: Any) -> str | None:
    """Whose arithmetic a layer has that is no `Attention` but of a model's own class: "wan" or "ltx"; else None."""
    return _OWN.get(_kind(attn.processor))


def norms_across_heads(attn: Any) -> bool:
    """Whether a layer's processor applies norm_q and norm_k before the split into heads."""
    return _kind(attn.processor) == _SANA or own_class(attn) is not None


def why_foreign(attn: Any) -> str | None:
    """Why ours would not compute what a layer's processor does: its class, and what of the layer; None: it would."""
    kind = _kind(attn.processor)
    name = ".".join(kind)
    if kind in _OURS:
        return None
    if kind in _OWN:
        return f"{name}, with fused projections" if getattr(attn, "fused_projections", False) else None
    if kind not in _BY_WIDTH | _BY_SCALE | _IP_ADAPTERS:
        return name
    if kind not in _BY_WIDTH and (attn.norm_q is not None or attn.norm_k is not None):
        return f"{name}, which leaves out the layer's norm_q and norm_k"
    if kind in _BY_WIDTH and not attn.scale_qk:
        return f"{name}, which scales though the layer's scale_qk is False"
    ours = (attn.inner_dim // attn.heads) ** -0.5 if attn.scale_qk else 1.0
    if kind not in _BY_WIDTH and not math.isclose(attn.scale, ours, rel_tol=1e-6):
        return f"{name}, with a scale of {attn.scale:g} where the layer's width says {ours:g}"
    around = attn.spatial_norm, attn.group_norm, attn.norm_cross or None
    if kind == _SANA and (attn.residual_connection or any(one is not None for one in around)):
        return f"{name}, which leaves out the layer's residual connection or its norms"
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
