"""What is timed at a cross-attention shape: ours, torch's attention, and attention that stores its map.

The last is what one has today for such work: diffusers' processor of Attend-and-Excite, which makes the map and keeps
it only where gradients are wanted, and a hook that keeps the mean over heads; both with the projections taken out, as
they are for all the others. "sdpa-<name>" sets torch's backend at each call, host time that plain "sdpa" has not.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import record
from .checks import NEAR_TIES, failed_check, near_ties
from .ground import DEVICE, LAYERS, why_no
from .programs import Tensors, defined, prepared, programs, smooths
from .timing import Call

__all__ = ["Contestant", "attend_and_excite", "fused_contestants", "others"]

SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Contestant:
    """name; call: what is timed, which returns (B, H, M, D); exact: the same by the definition in float64; near_ties:
    see `near_ties`."""

    name: str
    call: Call
    exact: Call
    near_ties: float = NEAR_TIES


def fused_contestants(shape: str, tensors: Tensors, untimed: dict[str, str]) -> Iterator[Contestant]:
    """Each program on each backend that is here and whose kernels passed their check; the rest goes to `untimed`."""
    for backend in ("triton", "cuda"):
        why = why_no(backend)
        for name in programs():
            unfit = why or failed_check(backend, [name, "smooth"] if smooths(name) else [name], shape)
            if unfit:
                untimed[f"{backend}-{name}"] = unfit
                continue
            call = prepared(name, shape, tensors, backend)
            yield Contestant(f"{backend}-{name}", call, partial(defined, name, shape, tensors), near_ties(name))


def others(shape: str, tensors: Tensors, untimed: dict[str, str]) -> Iterator[Contestant]:
    """torch's attention, by what it chooses and by each of its backends; and attention that stores its map."""
    query, key, value = tensors
    exact = partial(_in_float64, tensors)
    yield Contestant("sdpa", lambda: F.scaled_dot_product_attention(query, key, value), exact)
    for name, which in SDPA.items():
        yield Contestant(f"sdpa-{name}", _with(which, tensors), exact)
    try:
        yield Contestant("attend-and-excite", _processed(shape, tensors, attend_and_excite()), exact)
        yield Contestant("hooks", _processed(shape, tensors, None), exact)
    except Exception as error:  # diffusers raises RuntimeError where an import of its own fails
        untimed["attend-and-excite"] = untimed["hooks"] = record.reason(error)


def _in_float64(tensors: Tensors) -> Tensor:
    query, key, value = (x.double() for x in tensors)
    return F.scaled_dot_product_attention(query, key, value)


def _with(which: SDPBackend, tensors: Tensors) -> Call:
    def call() -> Tensor:
        with sdpa_kernel(which):
            return F.scaled_dot_product_attention(*tensors)

    return call


class _FixedProjection(nn.Module):
    """In the place of a projection."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x

    def forward(self, _: Tensor) -> Tensor:
        return self.x


def attend_and_excite() -> Any:
    """diffusers' own processor, with its store."""
    from diffusers import StableDiffusionAttendAndExcitePipeline

    # The module has been moved: its name is asked of its class.
    pipeline = sys.modules[StableDiffusionAttendAndExcitePipeline.__module__]
    return pipeline.AttendExciteAttnProcessor(pipeline.AttentionStore((16, 16)), "down")


def _processed(shape: str, tensors: Tensors, processor: Any) -> Call:
    """A diffusers attention whose projections give these tensors. processor None: hooked, so that the maps are kept."""
    from diffusers.models.attention_processor import Attention, AttnProcessor

    layer = LAYERS[shape]
    query, key, value = (x.transpose(1, 2).flatten(2) for x in tensors)
    with torch.device(DEVICE):
        attn = Attention(layer.num_heads * layer.head_dim, None, layer.num_heads, dim_head=layer.head_dim).to(
            query.dtype
        )
    attn.to_q, attn.to_k, attn.to_v = map(_FixedProjection, (query, key, value))
    attn.to_out = nn.ModuleList([nn.Identity(), nn.Identity()])
    if processor is None:
        processor, scores, maps = AttnProcessor(), attn.get_attention_scores, {}

        def store(*args: Any) -> Tensor:
            probabilities = scores(*args)
            maps["map"] = probabilities.unflatten(0, (-1, layer.num_heads)).mean(1)
            return probabilities

        attn.get_attention_scores = store

    def call() -> Tensor:
        out = processor(attn, query, encoder_hidden_states=key)
        return out.unflatten(2, (layer.num_heads, -1)).transpose(1, 2)

    return call
