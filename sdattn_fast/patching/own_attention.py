"""Layers that are no `Attention` of diffusers but classes of a model's own: Wan's and its kin's, LTX's.

Each processor here does what the one that it stands in for does, with the program between the two products. In all of
them norm_q and norm_k act before the split into heads.

Source: docs/design.md, "Transformers".
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .cross_attention import cross_attention
from .processor import SemanticAttnProcessor, same
from .projections import AddImage

__all__ = ["OwnAttnProcessor", "SemanticLTXAttnProcessor", "SemanticWanAttnProcessor"]

_TEXT = 512  # tokens of Wan's text, which follow the image's: diffusers has the number in its processor


class OwnAttnProcessor:
    """What a patch puts in the place of such a layer's processor. processor: whose program it runs."""

    def __init__(self, processor: SemanticAttnProcessor, original: Any) -> None:
        self.processor = processor
        self.in_place_of = original

    def __reduce__(self) -> Any:
        return same, (self.in_place_of,)

    @property
    def _attention_backend(self) -> Any:
        """Diffusers sets and reads it: of the processor that comes back when the patch is taken off."""
        return getattr(self.in_place_of, "_attention_backend", None)

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.in_place_of._attention_backend = backend

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.processor.settings.program!r})"

    def attend(
        self, attn: Any, x: Tensor, text: Tensor, mask: Tensor | None, add_image: AddImage, rotary: Any
    ) -> Tensor:
        """(B, M, C). mask: (B, H or 1, M or 1, N), added to the logits. rotary: of cross-attention, which has none."""
        if rotary is not None:
            raise ValueError("rotary embedding: expected None in cross-attention, as diffusers has it")
        out = cross_attention(self.processor, _Layer(attn), x, text, mask, None, add_image, None)
        out = attn.to_out[1](out)
        return out


class SemanticWanAttnProcessor(OwnAttnProcessor):
    """`WanAttnProcessor`. Of image-to-video models the first tokens are an image's, with projections of their own."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        text, add_image = encoder_hidden_states, None
        if attn.add_k_proj is not None:
            image, text = text[:, : text.shape[1] - _TEXT], text[:, text.shape[1] - _TEXT :]

            def add_image(query: Tensor, out: Tensor) -> Tensor:
                return out + self._of_image(attn, query, image)

        return self.attend(attn, hidden_states, text, attention_mask, add_image, rotary_emb)

    def _of_image(self, attn: Any, query: Tensor, image: Tensor) -> Tensor:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        key, value = attn.norm_added_k(attn.add_k_proj(image)), attn.add_v_proj(image)
        key, value = (x.unflatten(2, (attn.heads, -1)) for x in (key, value))
        out: Tensor = dispatch_attention_fn(query.transpose(1, 2), key, value, backend=self._attention_backend)
        return out.flatten(2, 3).type_as(query)


class SemanticLTXAttnProcessor(OwnAttnProcessor):
    """`LTXVideoAttnProcessor`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        text, mask = encoder_hidden_states, attention_mask
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, text.shape[1], len(text))
            mask = mask.view(len(text), attn.heads, -1, mask.shape[-1])
        return self.attend(attn, hidden_states, text, mask, None, image_rotary_emb)


class _Layer:
    """A layer, with what else diffusers' `Attention` has."""

    scale_qk = True
    norm_cross = None

    def __init__(self, attn: Any) -> None:
        self.attn = attn

    def __getattr__(self, name: str) -> Any:
        return getattr(self.attn, name)
