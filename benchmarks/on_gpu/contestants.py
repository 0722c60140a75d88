"""What is timed at a cross-attention shape: ours, torch's attention, and attention that stores its map.

The last is what one has today for such work: diffusers' processor of Attend-and-Excite, and a hook that keeps the mean
over heads, each with the projections taken out, as they are for all the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdattn_fast import Capture, Program, Refinement, SalienceDropout
from sdattn_fast.cli.bench import FULL
from sdattn_fast.functional import prepare

from . import record
from .checks import CONTENT, failed_check
from .ground import DEVICE, SHAPES, TOKENS, text_side, why_no
from .timing import Call

__all__ = ["Contestant", "inputs", "ours", "others", "prepared", "programs", "README"]

# The README's own program: with smoothing.
README = Program(SalienceDropout(0.1), Refinement(threshold=0.1), renormalize="content")
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Contestant:
    """name; call: what is timed, which returns (B, H, M, D); exact: the same by the definition in float64; near_ties:
    the share of rows that rounding may decide otherwise."""

    name: str
    call: Call
    exact: Call
    near_ties: float = 1e-3


def programs() -> dict[str, tuple[Program, dict[str, Any], dict[str, Any]]]:
    """By name: the program, how `prepare` is asked beside, and what `text_side` is asked."""
    full = FULL()
    return {
        "plain": (Program(), {}, {"content": TOKENS - 1, "words": False}),
        "full": (full, {}, {}),
        "readme": (README, {}, {"words": False}),
        **{f"full-{n}": (full, {}, {"content": n}) for n in CONTENT[1:]},
        "full-maps": (full, {"capture": Capture((1, 2, 3))}, {}),
    }


def inputs(shape: str, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value (B, H, M or N, D) as a UNet's projections give them: the heads of a pixel side by side."""
    layer = SHAPES[shape]
    generator = torch.Generator(DEVICE).manual_seed(0)

    def randn(tokens: int) -> Tensor:
        x = torch.randn(batch, tokens, layer.heads, layer.head_dim, device=DEVICE, generator=generator)
        return x.to(dtype).transpose(1, 2)

    return randn(layer.pixels), randn(TOKENS), randn(TOKENS)


def ours(shape: str, tensors: tuple[Tensor, Tensor, Tensor], untimed: dict[str, str]) -> Iterator[Contestant]:
    """Each program on each backend that is here and whose kernels passed their check; the rest goes to `untimed`."""
    for backend in ("triton", "cuda"):
        why = why_no(backend)
        for name, (program, _, _) in programs().items():
            smooths = program.refine is not None and program.refine.sigma > 0
            needs = ("rows", "smooth") if smooths else ("rows",)
            unfit = why or failed_check(backend, needs, shape)
            if unfit:
                untimed[f"{backend}-{name}"] = record.without_paths(unfit)
                continue
            exact = _defined(name, shape, tensors)
            # A row that is decided otherwise is smoothed into its neighbours.
            near_ties = 0.03 if smooths else 1e-3
            yield Contestant(f"{backend}-{name}", prepared(name, shape, tensors, backend), exact, near_ties)


def prepared(program: str, shape: str, tensors: tuple[Tensor, Tensor, Tensor], backend: str) -> Call:
    layer, (query, key, value) = SHAPES[shape], tensors
    what, how, text = programs()[program]
    side = {"batch": len(query), "heads_count": layer.heads, "tokens": TOKENS, "device": DEVICE}
    ready = prepare(what, **side, **text_side(len(query), **text), **how, backend=backend)
    grid = (layer.height, layer.width)
    return lambda: ready(query, key, value, grid=grid)[0]


def _defined(program: str, shape: str, tensors: tuple[Tensor, Tensor, Tensor]) -> Call:
    # Doubles are made when they are needed, and not kept.
    return lambda: prepared(
        program, shape, (tensors[0].double(), tensors[1].double(), tensors[2].double()), "reference"
    )()


def others(shape: str, tensors: tuple[Tensor, Tensor, Tensor], untimed: dict[str, str]) -> Iterator[Contestant]:
    """torch's attention, by what it chooses and by each of its backends; and attention that stores its map."""
    query, key, value = tensors
    exact = lambda: F.scaled_dot_product_attention(query.double(), key.double(), value.double())  # noqa: E731
    yield Contestant("sdpa", lambda: F.scaled_dot_product_attention(query, key, value), exact)
    for name, which in SDPA.items():
        yield Contestant(f"sdpa-{name}", _with(which, tensors), exact)
    try:
        yield Contestant("attend-and-excite", _processed(shape, tensors, _attend_and_excite()), exact)
        yield Contestant("hooks", _processed(shape, tensors, None), exact)
    except ImportError as error:
        untimed["attend-and-excite"] = untimed["hooks"] = record.without_paths(str(error))


def _with(which: SDPBackend, tensors: tuple[Tensor, Tensor, Tensor]) -> Call:
    def call() -> Tensor:
        with sdpa_kernel(which):
            return F.scaled_dot_product_attention(*tensors)

    return call


class _Given(nn.Module):
    """In the place of a projection."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x

    def forward(self, _: Tensor) -> Tensor:
        return self.x


def _attend_and_excite() -> Any:
    from diffusers.pipelines.deprecated.stable_diffusion_attend_and_excite import (
        pipeline_stable_diffusion_attend_and_excite as pipeline,
    )

    return pipeline.AttendExciteAttnProcessor(pipeline.AttentionStore((16, 16)), "down")


def _processed(shape: str, tensors: tuple[Tensor, Tensor, Tensor], processor: Any) -> Call:
    """A diffusers attention whose projections give these tensors. processor None: hooked, so that the maps are kept."""
    from diffusers.models.attention_processor import Attention, AttnProcessor

    layer = SHAPES[shape]
    query, key, value = (x.transpose(1, 2).flatten(2) for x in tensors)
    with torch.device(DEVICE):
        attn = Attention(layer.heads * layer.head_dim, None, layer.heads, dim_head=layer.head_dim).to(query.dtype)
    attn.to_q, attn.to_k, attn.to_v = map(_Given, (query, key, value))
    attn.to_out = nn.ModuleList([nn.Identity(), nn.Identity()])
    if processor is None:
        processor, scores, kept = AttnProcessor(), attn.get_attention_scores, {}

        def keep(*args: Any) -> Tensor:
            found = scores(*args)
            kept["map"] = found.unflatten(0, (-1, layer.heads)).mean(1)
            return found

        attn.get_attention_scores = keep

    def call() -> Tensor:
        out = processor(attn, query, encoder_hidden_states=key)
        return out.unflatten(2, (layer.heads, -1)).transpose(1, 2)

    return call
