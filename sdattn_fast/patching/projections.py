"""A layer's projections, as diffusers makes them. They are called, never read: PEFT puts modules of its own there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["AddImage", "key_value", "project_out", "query_of", "rotated"]

AddImage = Callable[[Tensor, Tensor], Tensor] | None


def query_of(attn: Any, x: Tensor, across_heads: bool = False, rotary: Any = None) -> Tensor:
    """(B, H, M, D), of x (B, M, C). across_heads: as `Layer` has it. rotary: the embedding that it is turned by."""
    query = attn.to_q(x)
    dtype = query.dtype
    if across_heads and attn.norm_q is not None:
        query = attn.norm_q(query)
    query = query.view(x.shape[0], -1, attn.heads, query.shape[-1] // attn.heads).transpose(1, 2)
    if not across_heads and attn.norm_q is not None:
        query = attn.norm_q(query)
    query = query if rotary is None else rotated(query, rotary)
    # Under autocast norms are in float32, and torch's own attention takes them back.
    return query if query.dtype == dtype else query.to(dtype)


def rotated(x: Tensor, rotary: Any) -> Tensor:
    from diffusers.models.embeddings import apply_rotary_emb

    out: Tensor = apply_rotary_emb(x, rotary)
    return out


def project_out(attn: Any, out: Tensor, query: Tensor, add_image: AddImage) -> Tensor:
    """Up to and with `to_out[0]`: (B, M, C), of out (B, H, M, D). add_image(query, out) adds an IP-Adapter's part."""
    out = out.transpose(1, 2).reshape(out.shape[0], -1, out.shape[1] * out.shape[3])
    out = out if out.dtype == query.dtype else out.to(query.dtype)
    return attn.to_out[0](out if add_image is None else add_image(query, out))


def key_value(attn: Any, text: Tensor, cross: bool = True, across_heads: bool = False) -> tuple[Tensor, Tensor]:
    """(B, H, N, D) each, of text (B, N, E). cross: the text is no layer's own input. across_heads: as in `Layer`."""
    if cross and attn.norm_cross:
        text = attn.norm_encoder_hidden_states(text)
    key, value = attn.to_k(text), attn.to_v(text)
    if across_heads and attn.norm_k is not None:
        key = attn.norm_k(key)
    key = key.view(text.shape[0], -1, attn.heads, key.shape[-1] // attn.heads).transpose(1, 2)
    value = value.view(text.shape[0], -1, attn.heads, value.shape[-1] // attn.heads).transpose(1, 2)
    if not across_heads and attn.norm_k is not None:
        key = attn.norm_k(key)
    return key if key.dtype == value.dtype else key.to(value.dtype), value
