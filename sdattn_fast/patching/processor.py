"""`SemanticAttnProcessor`: diffusers' `AttnProcessor2_0`, point by point, with the program between the two products.

It holds nothing of a layer, so one instance serves every layer of a patch, and torch.compile sees one object. What a
layer needs (its text, grid, heads, seed) is the `Layer` that `apply` hangs on the Attention module.

Source: docs/design.md, "Facts about diffusers".
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..program import Capture, Program
from .cross_attention import cross_attention
from .layers import LAYER, is_served
from .projections import AddImage, key_value, project_out, query_of, rotated
from .settings import DropoutWhen, Heads, Settings
from .text_state import TextState
from .token_inputs import TokenInputs

__all__ = ["SemanticAttnProcessor", "attention_layer", "same"]


class SemanticAttnProcessor:
    """A diffusers attention processor that runs a program in cross-attention. `apply` is the usual way to install it.

    Set by hand, it knows neither a pipeline nor the name of a layer: every token is content and every entry active
    unless told, and `layers`, `capture` and a mapping of `heads` are refused. Smoothing works on 4-D inputs alone.
    Self-attention is computed as diffusers does.

    Args:
        program: What happens to the rows of the map; ``Program()`` is plain attention.
        layers: Must be None.
        heads: Indices of the active heads, or an (H,) bool tensor. None: all.
        inactive_heads: "plain" or "zero", as in `apply`.
        gate: Tensor, (N,), (B, N) or (B, H, N), bool or floating, finite and >= 0. B is the UNet's batch, or its active
            entries.
        phrases: Integer tensor, (N,) or (B, N), -1: no phrase.
        protected: Bool tensor, (N,) or (B, N). None: all tokens are content.
        active: (B,) bool tensor. None: all entries.
        seed: Seed of random dropout, as in `apply`, but the same in every layer and step.
        capture: Must be None.
        fold: As in `apply`.
        text_cache: As in `apply`.
        backend: As in `apply`.
        dropout_when: "always" or "training".

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has the wrong value, or needs the name of a layer or a step.

    Examples:
        >>> unet.set_attn_processor(SemanticAttnProcessor(Program(SalienceDropout(0.1))))

    Source: docs/design.md, "Facts about diffusers".
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
        seed: int | Sequence[int] | None = None,
        capture: Capture | None = None,
        fold: str = "auto",
        text_cache: bool = True,
        backend: str = "auto",
        dropout_when: DropoutWhen = "always",
    ) -> None:
        if not isinstance(dropout_when, str):
            raise ValueError("dropout_when: a processor does not know the step; use sdattn_fast.apply")
        if layers is not None:
            raise ValueError("layers: a processor does not know its layer's name; use sdattn_fast.apply")
        if isinstance(heads, Mapping):
            raise ValueError("heads: a processor does not know its layer's name; use sdattn_fast.apply")
        if capture is not None:
            raise ValueError("capture: maps are kept by layer name; use sdattn_fast.apply")
        self.settings = Settings(program, inactive_heads, None, fold, text_cache, backend, dropout_when)
        self.heads = heads
        given = TokenInputs.checked(gate=gate, phrases=phrases, protected=protected, active=active, seed=seed)
        self.text = TextState(self.settings, given)
        self.in_place_of: Any = None  # the processor that a patch put this one over

    def __reduce__(self) -> Any:
        # Copies of a patched model are not patched.
        return super().__reduce__() if self.in_place_of is None else (same, (self.in_place_of,))

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
        image_rotary_emb: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attention, as diffusers' `AttnProcessor2_0`, with the program between the two products. Called by
        `Attention`.

        Args:
            attn: The `Attention` module.
            hidden_states: (B, M, C) or (B, C, height, width) tensor.
            encoder_hidden_states: (B, N, E) tensor. None: self-attention, without a program.
            attention_mask: Added to the logits, as in diffusers.
            temb: For layers with a spatial norm, as in diffusers.
            *args: Ignored, with diffusers' warning.
            image_rotary_emb: The rotary embedding of the queries, and of self-attention's keys, as in diffusers'
                `HunyuanAttnProcessor2_0`.
            **kwargs: Ignored.

        Returns:
            A tensor of the shape of `hidden_states`.
        """
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
        return attention_layer(
            self, attn, hidden_states, encoder_hidden_states, attention_mask, temb, rotary=image_rotary_emb
        )


def same(x: Any) -> Any:
    """What pickles and copies of a patch's processors call."""
    return x


# Attention.forward asks for the signature at every call, which takes as long as all the rest of Python in a layer.
SemanticAttnProcessor.__call__.__signature__ = inspect.signature(SemanticAttnProcessor.__call__)  # type: ignore[attr-defined]


def attention_layer(
    self: Any,
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    attention_mask: Tensor | None,
    temb: Tensor | None,
    add_image: Callable[[Tensor, Tensor], Tensor] | None = None,
    rotary: Any = None,
) -> Tensor:
    """The body of a processor. add_image(query, hidden_states), where there is one, adds an IP-Adapter's part. rotary:
    the embedding that queries are turned by."""
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

    if encoder_hidden_states is not None and (getattr(attn, LAYER, None) is not None or is_served(attn)):
        hidden_states = cross_attention(
            self, attn, hidden_states, encoder_hidden_states, attention_mask, grid, add_image, rotary
        )
    else:
        hidden_states = _plain_attention(attn, hidden_states, encoder_hidden_states, attention_mask, add_image, rotary)
    hidden_states = attn.to_out[1](hidden_states)

    if input_ndim == 4:
        hidden_states = hidden_states.transpose(-1, -2).reshape(batch_size, channel, height, width)
    if attn.residual_connection:
        hidden_states = hidden_states + residual
    # Nearly all factors are 1, and to divide by that would be a pass over memory for nothing.
    factor = attn.rescale_output_factor
    return hidden_states if factor == 1.0 else hidden_states / factor


def _plain_attention(
    attn: Any, x: Tensor, text: Tensor | None, mask: Tensor | None, add_image: AddImage, rotary: Any
) -> Tensor:
    """Up to and with `to_out[0]`, as diffusers does it: self-attention, and layers that are not served."""
    query = query_of(attn, x, rotary=rotary)
    key, value = key_value(attn, x if text is None else text, cross=text is not None)
    if rotary is not None and not attn.is_cross_attention:
        key = rotated(key, rotary)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=attn.scale)
    return project_out(attn, out, query, add_image)


def _say_scale_is_deprecated() -> None:
    from diffusers.utils import deprecate

    deprecate(
        "scale",
        "1.0.0",
        "The `scale` argument is deprecated and will be ignored. Please remove it, as passing it will raise an error "
        "in the future. `scale` should directly be passed while calling the underlying pipeline component i.e., via "
        "`cross_attention_kwargs`.",
    )
