"""A layer with projections folded into its text: which calls can be, how the text is packed, and the call itself.

Source: docs/design.md, "Projections fold into keys and values".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .backend import cpu, fused, triton, unavailable
from .backend.limits import MAX_SIZE
from .backend.smoothing import smoothed
from .execute import Prepared
from .graphs import in_graph
from .streams import MadeOn

__all__ = ["FoldedText", "call_folded", "fold", "fold_refusal", "folds_alike", "heads_not_zero", "may_sum_heads"]


@dataclass(frozen=True)
class FoldedText:
    """A layer's text with projections folded into it, in a backend's form. Made by `fold`."""

    backend: str
    packed: cpu.PackedKeyValue | triton.PackedFoldedText
    shared_query: bool
    summed: bool
    scale: float
    token_bias: Tensor | None
    out_bias: Tensor | None
    made: MadeOn

    def tensors(self) -> list[Tensor]:
        return [x for x in (*self.packed.tensors(), self.token_bias, self.out_bias) if x is not None]


def fold(
    prepared: Prepared,
    key: Tensor,
    value: Tensor,
    shared_query: bool,
    summed: bool,
    scale: float,
    token_bias: Tensor | None = None,
    out_bias: Tensor | None = None,
) -> FoldedText:
    """Bring a folded layer's keys (B, H, N, D) and values (B, H, N, Dv) into the kernel's form, for `call_folded`.

    shared_query: one query for all heads. summed: one output for all heads. token_bias: (B, H, 1, N) float32, added to
    the logits. out_bias: (Dv,) float32, added to the sum. The values come from `Prepared.fold_value`.
    """
    assert prepared.plan is not None
    name = _backend(prepared, key.device)
    if name != "cpu" and out_bias is not None:
        out_bias = out_bias.to(key.dtype)  # what it was before it was widened
    packed = fused(name).pack(key, value, prepared.plan.rows, heads_not_zero(prepared))
    return FoldedText(name, packed, shared_query, summed, scale, token_bias, out_bias, MadeOn(key.device))


def call_folded(
    prepared: Prepared,
    x: Tensor,
    text: FoldedText,
    *,
    bias: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """A folded layer: x (B, M, D) for a shared query, else (B, H, M, D). Returns (y, maps): y (B, M, Dv) if the heads
    are summed, else (B, H, M, Dv)."""
    assert prepared.plan is not None
    text.made.use(text.tensors)
    rows = prepared.seeded_rows(prepared.draw_seed(seed, x.device))
    if text.token_bias is not None:
        bias = text.token_bias if bias is None else bias + text.token_bias
    y, maps = fused(text.backend).folded(x, text.packed, text.summed, bias, text.out_bias, text.scale, rows)
    return smoothed(text.backend, y, maps, prepared.plan, grid, recorded=in_graph())


def fold_refusal(prepared: Prepared, x: Tensor) -> str | None:
    """Why no kernel serves a folded layer with this program on rows like x (B, M, C), or None."""
    name = _backend(prepared, x.device)
    if name not in ("cpu", "triton"):
        return f"backend {name!r} has no folded kernel"
    if prepared.plan is None or prepared.plan.picture is not None:
        return "the program looks over the picture, and the folded kernel at rows alone"
    refusal = unavailable(name, x.device) or fused(name).folded_refusal(x, prepared.plan)
    if refusal is not None:
        return refusal
    if torch.is_autocast_enabled(x.device.type):
        return "autocast is on"
    if prepared.needs_grad(x):
        return "gradients are asked for"
    if prepared.side.tokens > MAX_SIZE or x.shape[-1] > 65536:
        return f"{prepared.side.tokens} tokens of {x.shape[-1]} channels are too many"
    return None


def folds_alike(one: Prepared, other: Prepared) -> bool:
    """Whether `fold` gives the same for both calls: same content tokens and heads, no linear steps."""
    first, second = one.home.plan, other.home.plan
    if first is None or second is None or first.folded or second.folded:
        return False
    return _equal(first.rows.content, second.rows.content) and _equal(first.rows.head_mode, second.rows.head_mode)


def may_sum_heads(prepared: Prepared) -> bool:
    """Whether what follows p @ value treats all heads of an entry alike, so that they may be summed before it."""
    plan, side = prepared.plan, prepared.side
    return plan is not None and (not plan.smoothings or side.heads is None or side.inactive_heads == "zero")


def heads_not_zero(prepared: Prepared) -> list[int] | None:
    """The heads that do not give zeros; None: all."""
    side = prepared.home.side
    if side.heads is None or side.inactive_heads != "zero" or bool(side.heads.all()):
        return None
    return side.heads.nonzero()[:, 0].tolist()


def _backend(prepared: Prepared, device: torch.device) -> str:
    return prepared.backend if prepared.backend != "auto" else "cpu" if device.type == "cpu" else "triton"


def _equal(x: Tensor | None, y: Tensor | None) -> bool:
    return x is y if x is None or y is None else torch.equal(x, y)
