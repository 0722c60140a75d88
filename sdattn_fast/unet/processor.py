"""`SemanticAttnProcessor`: diffusers' `AttnProcessor2_0`, point by point, with the program between the two products.

It holds nothing of a layer, so one instance serves every layer of a patch, and torch.compile sees one object. What a
layer needs (its text, grid, heads, seed) is the `Layer` that `apply` hangs on the Attention module.

Source: DESIGN.md section 5, the diffusers bullet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..program import Capture, Program
from .layers import LAYER, Layer, is_served
from .settings import Heads, Settings, checked_heads
from .text_state import Given, TextState, checked_token_input

__all__ = ["SemanticAttnProcessor"]


class SemanticAttnProcessor:
    """An attention processor for diffusers' UNets that runs a `Program` on cross-attention.

    Made by `sdattn_fast.apply`, or by hand: ``unet.set_attn_processor(SemanticAttnProcessor(program))``. By hand it
    knows neither a pipeline nor a layer's name: every token is content and every entry active unless told,
    self-attention and added-KV layers are computed as diffusers does, smoothing works on 4-D inputs alone (`apply`
    finds the grid), and `layers`, `capture` and a mapping of `heads`, which speak of layers by name, are refused.

    Args:
        program: what happens to the rows; ``Program()`` is plain attention.
        heads: indices of the active heads, or a bool (H,); None: all. inactive_heads: "plain" or "zero".
        gate: bool, or finite and >= 0, (N,), (B, N) or (B, H, N). phrases: integer, (N,) or (B, N). protected: bool,
            (N,) or (B, N). active: bool, (B,). B is the UNet's batch; (A, N) for the A active entries is taken as well.
        seed: of the random mode, an int in [0, 2**63). By hand, every layer and step uses it as it is.
        fold, text_cache, backend: as in `apply`.

    Raises: TypeError, ValueError, naming the argument, what came and what was expected.
    """

    def __init__(
        self,
        program: Program = Program(),
        *,
        layers: str | Sequence[str] | None = None,
        heads: Heads = None,
        inactive_heads: str = "plain",
        gate: Tensor | None = None,
        phrases: Tensor | None = None,
        protected: Tensor | None = None,
        active: Tensor | None = None,
        seed: int | None = None,
        capture: Capture | None = None,
        fold: str = "auto",
        text_cache: bool = True,
        backend: str = "auto",
    ) -> None:
        if layers is not None:
            raise ValueError("layers: a processor does not know its layer's name; use sdattn_fast.apply")
        if isinstance(heads, Mapping):
            raise ValueError("heads: a processor does not know its layer's name; use sdattn_fast.apply")
        if capture is not None:
            raise ValueError("capture: maps are kept by layer name; use sdattn_fast.apply")
        self.settings = Settings(program, inactive_heads, seed, None, fold, text_cache, backend)
        self.heads = heads
        given = Given(
            gate=checked_token_input("gate", gate),
            phrases=checked_token_input("phrases", phrases),
            protected=checked_token_input("protected", protected),
            active=checked_token_input("active", active),
        )
        self.text = TextState(self.settings, given)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.settings.program!r})"

    # The signature is read by Attention.forward, which drops every keyword that it does not name.
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """As `AttnProcessor2_0`: hidden_states (B, M, C) or (B, C, h, w), encoder_hidden_states (B, N, E)."""
        if args or kwargs.get("scale") is not None:
            _say_scale_is_deprecated()
        if getattr(attn, "added_kv_proj_dim", None) is not None:
            from diffusers.models.attention_processor import AttnAddedKVProcessor2_0

            return AttnAddedKVProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask)
        if isinstance(encoder_hidden_states, tuple):
            raise ValueError(
                "encoder_hidden_states: an IP-Adapter passes a tuple, which its own processor must take; "
                "use sdattn_fast.apply(pipe, ...), which puts one there"
            )
        return attention_layer(self, attn, hidden_states, encoder_hidden_states, attention_mask, temb)


def attention_layer(
    self: Any,
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    attention_mask: Tensor | None,
    temb: Tensor | None,
    add_image: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """The body of a processor. add_image(query, hidden_states), where given, adds an IP-Adapter's part."""
    residual = hidden_states
    if attn.spatial_norm is not None:
        hidden_states = attn.spatial_norm(hidden_states, temb)

    input_ndim = hidden_states.ndim
    grid = None
    if input_ndim == 4:
        batch_size, channel, height, width = hidden_states.shape
        hidden_states = hidden_states.view(batch_size, channel, height * width).transpose(1, 2)
        grid = (height, width)

    batch_size, sequence_length, _ = (
        hidden_states.shape if encoder_hidden_states is None else encoder_hidden_states.shape
    )

    if attention_mask is not None:
        attention_mask = attn.prepare_attention_mask(attention_mask, sequence_length, batch_size)
        attention_mask = attention_mask.view(batch_size, attn.heads, -1, attention_mask.shape[-1])

    if attn.group_norm is not None:
        hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

    # The projections are called, never read: PEFT puts modules of its own in their places.
    query = attn.to_q(hidden_states)

    is_cross = encoder_hidden_states is not None and is_served(attn)
    if encoder_hidden_states is None:
        encoder_hidden_states = hidden_states
    elif attn.norm_cross:
        encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)

    key = attn.to_k(encoder_hidden_states)
    value = attn.to_v(encoder_hidden_states)

    head_dim = key.shape[-1] // attn.heads
    query = query.view(batch_size, -1, attn.heads, head_dim).transpose(1, 2)
    key = key.view(batch_size, -1, attn.heads, head_dim).transpose(1, 2)
    value = value.view(batch_size, -1, attn.heads, head_dim).transpose(1, 2)

    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)

    if is_cross:
        hidden_states = _cross_attention(self, attn, query, key, value, attention_mask, grid)
    else:
        hidden_states = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=attn.scale)

    hidden_states = hidden_states.transpose(1, 2).reshape(batch_size, -1, attn.heads * head_dim)
    hidden_states = hidden_states.to(query.dtype)
    if add_image is not None:
        hidden_states = add_image(query, hidden_states)

    hidden_states = attn.to_out[0](hidden_states)
    hidden_states = attn.to_out[1](hidden_states)

    if input_ndim == 4:
        hidden_states = hidden_states.transpose(-1, -2).reshape(batch_size, channel, height, width)
    if attn.residual_connection:
        hidden_states = hidden_states + residual
    return hidden_states / attn.rescale_output_factor


def _cross_attention(
    self: Any, attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, grid: tuple[int, int] | None
) -> Tensor:
    layer: Layer | None = getattr(attn, LAYER, None)
    seed: int | Tensor | None
    batch, heads_count, pixels, _ = query.shape
    settings: Settings = self.settings
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
    if layer is None:
        text, heads, seed = self.text, checked_heads(self.heads, heads_count, " in this layer"), settings.seed
    else:
        text, heads, seed = layer.text, layer.heads, layer.seed
        # Blocks without a grid of their own say nothing, and a grid left from elsewhere must not be taken for it.
        if grid is None and layer.grid is not None and layer.grid[0] * layer.grid[1] == pixels:
            grid = layer.grid
    refine = settings.program.refine
    if grid is None and refine is not None and refine.sigma > 0:
        where = "a processor set by hand" if layer is None else f"layer {layer.name!r}"
        raise ValueError(
            f"grid: {where} does not know the height and width of its {pixels} pixels, which smoothing "
            "(Refinement.sigma > 0) needs; sdattn_fast.apply takes them from the enclosing Transformer2DModel"
        )
    prepared = text.prepared(batch, heads_count, key.shape[2], key.device, heads)
    # Not attn.scale: a block compiled for layers of several widths would make a symbol of it.
    out, maps = prepared(query, key, value, bias=mask, scale=None if attn.scale_qk else 1.0, grid=grid, seed=seed)
    if maps is not None and layer is not None:
        layer.captured = (maps, prepared.side.active, grid)
    return out


def _say_scale_is_deprecated() -> None:
    from diffusers.utils import deprecate

    deprecate(
        "scale",
        "1.0.0",
        "The `scale` argument is deprecated and will be ignored. Please remove it, as passing it will raise an error "
        "in the future. `scale` should directly be passed while calling the underlying pipeline component i.e., via "
        "`cross_attention_kwargs`.",
    )
