"""The tensors of a fused backend's backward pass: those that come in, as kernels read them, and those that go out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..plan import RowPlan
from .layout import with_rows

__all__ = ["Gradients", "incoming"]


def incoming(
    grad_out: Tensor | None, grad_maps: Tensor | None, query: Tensor, value: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The gradients of out and maps as a kernel reads them: in the query's dtype and in float32; None are zeros."""
    if grad_out is None:
        grad_out = query.new_zeros(1).expand(*query.shape[:3], value.shape[3])
    return with_rows(grad_out.to(query.dtype)), None if grad_maps is None else grad_maps.to(torch.float32).contiguous()


@dataclass(frozen=True)
class Gradients:
    """What a backward kernel writes; None for what is not wanted.

    query, key, value: like these. gate: (B, H, N) float32. tokens: of a bias that is the same for all rows, (B, H, N)
    float32. bias: of another, its shape, float32; relevance: (B, T, M) float32. These two are zeros, to be added to.
    """

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    gate: Tensor | None
    tokens: Tensor | None
    bias: Tensor | None
    relevance: Tensor | None

    @classmethod
    def empty(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        gate: Tensor | None,
        wanted: Sequence[bool],
        relevance_tokens: Tensor | None,
    ) -> Gradients:
        """As they are to be written. wanted, relevance_tokens: see `backward` of the backends."""
        b, h, m, _ = query.shape
        by_token, device = (b, h, key.shape[2]), query.device
        of_query, of_key, of_value = (
            torch.empty_like(x) if want else None for x, want in zip((query, key, value), wanted[:3], strict=True)
        )
        of_gate = of_tokens = of_bias = relevance = None
        if wanted[4] and gate is not None:
            of_gate = torch.empty(by_token, dtype=torch.float32, device=device)
        if wanted[3] and bias is not None and bias.shape[2] == 1:
            of_tokens = torch.empty(by_token, dtype=torch.float32, device=device)
        elif wanted[3] and bias is not None:
            of_bias = torch.zeros(bias.shape, dtype=torch.float32, device=device)
        if wanted[5] and relevance_tokens is not None:
            relevance = torch.zeros((b, relevance_tokens.shape[0], m), dtype=torch.float32, device=device)
        return cls(of_query, of_key, of_value, of_gate, of_tokens, of_bias, relevance)

    @property
    def sums(self) -> tuple[Tensor | None, ...]:
        """What a kernel writes, rather than adds to."""
        return self.query, self.key, self.value, self.gate, self.tokens

    def zero(self) -> None:
        """Where there is no row or no token."""
        for x in self.sums:
            if x is not None:
                x.zero_()

    def results(self, bias: Tensor | None, rows: RowPlan) -> tuple[Tensor | None, ...]:
        """Of query, key, value, bias and gate, each like what it is of, and the relevance."""
        of_bias, of_gate = self.bias, self.gate
        if bias is not None and self.tokens is not None:
            of_bias = self.tokens[:, :, None].sum_to_size(bias.shape)
        if bias is not None and of_bias is not None:
            of_bias = of_bias.to(bias.dtype)
        if of_gate is not None and rows.gate is not None and rows.gate.shape[1] == 1:
            of_gate = of_gate.sum(1, keepdim=True)
        return self.query, self.key, self.value, of_bias, of_gate, self.relevance
