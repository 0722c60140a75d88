"""IP-Adapter: the text part goes through the program, the image part stays as it was.

diffusers asks `isinstance(processor, IPAdapterAttnProcessor2_0)` in a dozen places, so ours is one. It is made around
the processor that was loaded and shares its projections and its list of scales: `set_ip_adapter_scale` reaches both,
and taking the patch off puts the loaded object back.

Source: docs/design.md, "Facts about diffusers".
"""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .known_processors import is_ip_adapter
from .processor import attention_layer, same

__all__ = ["ip_adapter_processor", "is_ip_adapter"]


def ip_adapter_processor(base: Any, loaded: Any) -> Any:
    """A processor with `loaded`'s image part and the text part of `base`, a `SemanticAttnProcessor`."""
    processor = _processor_class().__new__(_processor_class())
    nn.Module.__init__(processor)
    for name in ("hidden_size", "cross_attention_dim", "num_tokens", "scale", "to_k_ip", "to_v_ip"):
        setattr(processor, name, getattr(loaded, name))
    processor.in_place_of = (loaded,)  # not a module's own
    processor.settings, processor.text, processor.heads = base.settings, base.text, base.heads
    return processor


@functools.cache
def _processor_class() -> Any:
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    class SemanticIPAdapterAttnProcessor(IPAdapterAttnProcessor2_0):
        def __reduce__(self) -> Any:
            return same, self.in_place_of  # copies of a patched model are not patched

        def __call__(
            self,
            attn: Any,
            hidden_states: Tensor,
            encoder_hidden_states: Any = None,
            attention_mask: Tensor | None = None,
            temb: Tensor | None = None,
            scale: float = 1.0,
            ip_adapter_masks: Any = None,
        ) -> Tensor:
            text, images = _split(encoder_hidden_states, self.num_tokens)

            def add_image(query: Tensor, hidden: Tensor) -> Tensor:
                return _add_images(self, attn, query, hidden, images, ip_adapter_masks)

            return attention_layer(self, attn, hidden_states, text, attention_mask, temb, add_image)

    return SemanticIPAdapterAttnProcessor


def _split(encoder_hidden_states: Any, num_tokens: Any) -> tuple[Tensor, list[Tensor]]:
    if isinstance(encoder_hidden_states, tuple):
        return encoder_hidden_states
    # The older form: the image's tokens stand after the text's.
    end = encoder_hidden_states.shape[1] - num_tokens[0]
    return encoder_hidden_states[:, :end], [encoder_hidden_states[:, end:]]


def _add_images(self: Any, attn: Any, query: Tensor, hidden: Tensor, images: list[Tensor], masks: Any) -> Tensor:
    """The image part, as IPAdapterAttnProcessor2_0 has it."""
    for image, scale, to_k, to_v, mask in zip(
        images, self.scale, self.to_k_ip, self.to_v_ip, _checked_masks(self, images, masks), strict=False
    ):
        if all(s == 0 for s in scale) if isinstance(scale, list) else scale == 0:
            continue
        if mask is None:
            hidden = hidden + scale * _image_attention(attn, query, to_k(image), to_v(image))
            continue
        from diffusers.image_processor import IPAdapterMaskProcessor

        scales = scale if isinstance(scale, list) else [scale] * mask.shape[1]
        for i in range(mask.shape[1]):
            one = _image_attention(attn, query, to_k(image[:, i]), to_v(image[:, i]))
            area = IPAdapterMaskProcessor.downsample(mask[:, i], query.shape[0], one.shape[1], one.shape[2])
            hidden = hidden + scales[i] * (one * area.to(dtype=query.dtype, device=query.device))
    return hidden


def _image_attention(attn: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    batch, heads, _, head_dim = query.shape
    key = key.view(batch, -1, heads, head_dim).transpose(1, 2)
    value = value.view(batch, -1, heads, head_dim).transpose(1, 2)
    out = F.scaled_dot_product_attention(query, key, value)
    return out.transpose(1, 2).reshape(batch, -1, heads * head_dim).to(query.dtype)


def _checked_masks(self: Any, images: list[Tensor], masks: Any) -> list[Any]:
    if masks is None:
        return [None] * len(self.scale)
    if not isinstance(masks, list):
        masks = list(masks.unsqueeze(1))
    if not len(masks) == len(self.scale) == len(images):
        raise ValueError(
            f"ip_adapter_masks: expected one for each of the {len(self.scale)} scales and {len(images)} image inputs, "
            f"got {len(masks)}"
        )
    for index, (mask, scale, image) in enumerate(zip(masks, self.scale, images, strict=True)):
        if mask is None:
            continue
        if not isinstance(mask, Tensor) or mask.ndim != 4:
            raise ValueError(
                f"ip_adapter_masks: expected tensors (1, images, height, width), as IPAdapterMaskProcessor makes them, "
                f"got {type(mask).__name__} at index {index}"
            )
        if mask.shape[1] != image.shape[1]:
            raise ValueError(
                f"ip_adapter_masks: expected {image.shape[1]} masks, one an image, at index {index}, "
                f"got {mask.shape[1]}"
            )
        if isinstance(scale, list) and len(scale) != mask.shape[1]:
            raise ValueError(
                f"ip_adapter_masks: expected {len(scale)} masks, one a scale, at index {index}, got {mask.shape[1]}"
            )
    return masks
