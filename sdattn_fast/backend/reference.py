"""The backend "reference": plain torch, which serves every call, and the gradients of a call whose backward kernel does
not compile or launch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..program import Refinement
from ..reference import reference_attention
from . import KernelRefused, pass_over
from .call import AttentionCall, LoweredProgram

__all__ = ["Fallback", "attention"]


def attention(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """(out, maps), maps None without capture. Raises: ValueError where relevance is asked for."""
    if call.relevance is not None:
        raise ValueError("backend: relevance comes from a fused backward kernel, and the reference serves this call")
    lowered, side = call.lowered, call.lowered.side
    # Autocast would round the logits, on which decisions hang, to half precision.
    with torch.autocast(call.query.device.type, enabled=False):
        return reference_attention(
            call.query, call.key, call.value, lowered.program, bias=call.bias, scale=call.scale, gate=side.gate,
            phrases=side.phrases, protected=side.protected, active=side.active, heads=side.heads,
            inactive_heads=side.inactive_heads, grid=call.grid, seed=0 if call.seed is None else call.seed,
            capture=lowered.capture,
        )  # fmt: skip


@dataclass(frozen=True)
class Fallback:
    """What "auto" does where a backward kernel does not compile or launch: gradients of plain torch operations.

    Holds neither query, key nor value: the graph frees them as its backward pass goes.
    """

    lowered: LoweredProgram
    scale: float
    seed: Tensor | None

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, gate: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What the fused backend's `attention` computed, from the same inputs. It decides anew what is dropped, so an
        entry within rounding of a threshold may fall on the other side."""
        program, side, plan = self.lowered.program, self.lowered.side, self.lowered.plan
        assert plan is not None
        # The smoothing of the output is not the rows', and where linear steps fold, the value has them in it.
        threshold = None if program.refine is None else program.refine.threshold
        program = replace(program, refine=None if threshold is None else Refinement(1, threshold, 0.0))
        side = replace(side, gate=gate, phrases=None if plan.folded else side.phrases)
        lowered = replace(self.lowered, program=program, side=side)
        return attention(AttentionCall(lowered, query, key, value, bias, self.scale, None, self.seed, True))

    def pass_over(self, error: KernelRefused, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Calls like this one are not tried again on that backend."""
        pass_over(error, AttentionCall(self.lowered, query, key, value, None, self.scale, None, self.seed, True))
