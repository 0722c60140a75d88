"""`SemanticAttnProcessor`: diffusers' `AttnProcessor2_0`, point by point, with the program between the two products.

It holds nothing of a layer, so one instance serves every layer of a patch, and torch.compile sees one object. What a
layer needs (its text, grid, heads, seed) is the `Layer` that `apply` hangs on the Attention module.

Source: docs/design.md, "Facts about diffusers".
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import checked_heads
from ..backend import KernelRefused
from ..folded_layer import FoldedText, call_folded, may_sum_heads
from ..graphs import in_graph
from ..program import Capture, Program
from ..streams import capturing
from .bound import Moment, bind
from .fold import choose_fold, fold_refusal, fold_text, shape_of
from .keys_values import kept_key_value, key_value
from .layers import LAYER, Layer, is_served
from .settings import DropoutWhen, Heads, Settings
from .text_cache import KeyValue, Served
from .text_state import LayerCall, TextState
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
        seed: Seed of random dropout, an int in [0, 2**63), the same in every layer and step. None: drawn from torch's
            generator.
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
        seed: int | None = None,
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
        self.settings = Settings(program, inactive_heads, seed, None, fold, text_cache, backend, dropout_when)
        self.heads = heads
        given = TokenInputs.checked(gate=gate, phrases=phrases, protected=protected, active=active)
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
        return attention_layer(self, attn, hidden_states, encoder_hidden_states, attention_mask, temb)


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

    if encoder_hidden_states is not None and (getattr(attn, LAYER, None) is not None or is_served(attn)):
        hidden_states = _cross_attention(
            self, attn, hidden_states, encoder_hidden_states, attention_mask, grid, add_image
        )
    else:
        hidden_states = _plain_attention(attn, hidden_states, encoder_hidden_states, attention_mask, add_image)
    hidden_states = attn.to_out[1](hidden_states)

    if input_ndim == 4:
        hidden_states = hidden_states.transpose(-1, -2).reshape(batch_size, channel, height, width)
    if attn.residual_connection:
        hidden_states = hidden_states + residual
    # Nearly all factors are 1, and to divide by that would be a pass over memory for nothing.
    factor = attn.rescale_output_factor
    return hidden_states if factor == 1.0 else hidden_states / factor


AddImage = Callable[[Tensor, Tensor], Tensor] | None


def _plain_attention(attn: Any, x: Tensor, text: Tensor | None, mask: Tensor | None, add_image: AddImage) -> Tensor:
    """Up to and with `to_out[0]`, as diffusers does it: self-attention, and layers that are not served."""
    query = _query(attn, x)
    key, value = key_value(attn, x if text is None else text, cross=text is not None)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=attn.scale)
    return _project_out(attn, out, query, add_image)


def _query(attn: Any, x: Tensor) -> Tensor:
    query = attn.to_q(x)
    query = query.view(x.shape[0], -1, attn.heads, query.shape[-1] // attn.heads).transpose(1, 2)
    return query if attn.norm_q is None else attn.norm_q(query)


def _project_out(attn: Any, out: Tensor, query: Tensor, add_image: AddImage) -> Tensor:
    out = out.transpose(1, 2).reshape(out.shape[0], -1, out.shape[1] * out.shape[3])
    out = out if out.dtype == query.dtype else out.to(query.dtype)
    return attn.to_out[0](out if add_image is None else add_image(query, out))


def _cross_attention(
    self: Any,
    attn: Any,
    x: Tensor,
    states: Tensor,
    mask: Tensor | None,
    grid: tuple[int, int] | None,
    add_image: AddImage,
) -> Tensor:
    """Up to and with `to_out[0]`: x (B, M, C) attends to the text, states (B, N, E), through the program."""
    layer: Layer | None = getattr(attn, LAYER, None)
    if layer is not None and not in_graph():
        layer = layer.of_thread()
    query = moment = None
    if layer is not None and mask is None and not in_graph():
        moment = Moment.of(layer, attn, x, grid)
    if layer is not None and moment is not None:
        again, query = _as_before(attn, layer, moment, x, states, add_image)
        if again is not None:
            return again
    seed: int | Tensor | None
    heads_count = int(attn.heads)
    batch, pixels = states.shape[0], x.shape[1]
    settings: Settings = self.settings
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, float("-inf"))
    if layer is None:
        text, heads, seed = self.text, checked_heads(self.heads, heads_count, " in this layer"), settings.seed
    else:
        text, heads, seed = layer.text, layer.heads, layer.seed
        grid = layer.grid_of(pixels) if grid is None else grid
    relevance = None
    if layer is not None:
        relevance = layer.relevance(batch, pixels, x.device)
        if layer.bias is not None:
            of_layer = layer.bias.to(x.device, x.dtype)
            mask = of_layer if mask is None else mask + of_layer
    recorded = in_graph()
    graph = None if layer is None or recorded else layer.text.graph_of_capture(x.device)
    refine = settings.program.refine
    if grid is None and refine is not None and refine.sigma > 0:
        where = "a processor set by hand" if layer is None else f"layer {layer.name!r}"
        raise ValueError(
            f"grid: {where} does not know the height and width of its {pixels} pixels, which smoothing "
            "(Refinement.sigma > 0) needs; sdattn_fast.apply takes them from the enclosing Transformer2DModel"
        )
    captures = layer is not None and layer.captures
    tokens = states.shape[1]
    if torch.jit.is_tracing():  # sizes are tensors there
        batch, tokens = int(batch), int(tokens)
    call = LayerCall(batch, heads_count, tokens, states.device, heads, captures, attn.training)
    key = entry = folded_value = folded = None
    if recorded and layer is not None and layer.compiled is not None and layer.compiled.serves(call):
        compiled = layer.compiled
        prepared = text.with_gate(compiled.prepared, call)
        if compiled.text is states:
            key, value, folded_value = compiled.key, compiled.value, compiled.folded_value
    else:
        prepared = text.prepared(call)
        entry = None if recorded else kept_key_value(text, attn, states, first_look=layer is None)
    if entry is not None:
        served = entry.serve(prepared)
        key, value, folded_value = entry.key, entry.value, served.value_folded
        folded = None if relevance is not None else _folded(settings, attn, entry, served, x, add_image)
    elif settings.fold == "always":
        raise ValueError("fold: 'always' needs text that stands still, and this call's may not be kept")
    if key is None:
        key, value = key_value(attn, states)
    if folded is not None and folded.shared_query:
        query = None
    elif query is None:
        query = _query(attn, x)
    if folded is not None:
        out, maps = call_folded(prepared, x if query is None else query, folded, bias=mask, grid=grid, seed=seed)
    else:
        assert query is not None
        # Not attn.scale: a block compiled for layers of several widths would make a symbol of it.
        scale = None if attn.scale_qk else 1.0
        out, maps = prepared(
            query, key, value, bias=mask, scale=scale, grid=grid, seed=seed, folded_value=folded_value,
            relevance=relevance,
        )  # fmt: skip
    if entry is not None and layer is not None and graph is None:
        entry.bound = None if moment is None else bind(moment, attn, layer, entry, served, query, folded)
    if maps is not None and layer is not None:
        layer.captured = (maps, prepared.home.side.active, grid)
    if folded is None or not folded.summed:
        out = _project_out(attn, out, x if query is None else query, add_image)
    if graph is not None and layer is not None:
        graph.keep(layer, call, entry, maps)
        return graph.guarded(out, maps)
    return out


def _as_before(
    attn: Any, layer: Layer, moment: Moment, x: Tensor, states: Tensor, add_image: AddImage
) -> tuple[Tensor | None, Tensor | None]:
    """As `_cross_attention`, by the call that an earlier step bound, None where something has moved since; and the
    query, None if it was not needed so far."""
    bound = layer.text.cached.bound(attn, states)
    if bound is None or bound.moment != moment:
        return None, None
    folded = bound.folded
    if folded is not None and add_image is not None:
        return None, None
    query = None
    if folded is None or not folded.shared_query:
        query = _query(attn, x)
        if not bound.takes(query):
            return None, query
    try:
        out, maps = bound.call(x if query is None else query, layer.seed)
    except KernelRefused:
        return None, query
    if maps is not None:
        layer.captured = (maps, bound.call.prepared.home.side.active, moment.grid)
    if folded is None or not folded.summed:
        out = _project_out(attn, out, x if query is None else query, add_image)
    return out, query


def _folded(
    settings: Settings, attn: Any, entry: KeyValue, served: Served, x: Tensor, add_image: AddImage
) -> FoldedText | None:
    prepared = served.prepared
    if settings.fold == "never":
        return None
    refusal = "an IP-Adapter adds its part to the heads" if add_image is not None else None
    if refusal is None and x.dtype != entry.key.dtype:
        refusal = f"x is {x.dtype} and the keys {entry.key.dtype}"
    refusal = refusal or fold_refusal(attn, prepared, x)
    may_out = refusal is None and may_sum_heads(prepared)
    if settings.fold == "always":
        if refusal is not None:
            raise ValueError(f"fold: 'always' cannot be served, because {refusal}")
        kind = "both" if may_out else "query"
    elif refusal is None and x.device.type == "cpu":  # nothing was measured on a GPU yet, and nothing is guessed
        kind = choose_fold(shape_of(attn, entry.key, x, prepared), may_out=may_out)
    else:
        return None
    if kind == "none":
        return None
    name = kind if attn.scale_qk else f"{kind}, unscaled"
    folded = served.folds.get(name)
    if folded is None:
        folded = fold_text(attn, kind, entry.key, entry.value, prepared)
        if not capturing(x.device):  # what is made in a capture is the graph's
            served.folds[name] = folded
    return folded


def _say_scale_is_deprecated() -> None:
    from diffusers.utils import deprecate

    deprecate(
        "scale",
        "1.0.0",
        "The `scale` argument is deprecated and will be ignored. Please remove it, as passing it will raise an error "
        "in the future. `scale` should directly be passed while calling the underlying pipeline component i.e., via "
        "`cross_attention_kwargs`.",
    )
