"""`Prepared`: an attention call that lacks only the tensors that change from step to step. `BoundCall`: one that lacks
only the query."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .arguments import check_bias, check_grid, check_products, check_scale, check_seed
from .backend import choose, fused
from .backend.call import AttentionCall, LoweredProgram, Relevance
from .backend.dispatch import run, run_fused
from .backend.smoothing import smoothed
from .plan import plan_on, side_on
from .streams import to_device

__all__ = ["BoundCall", "Prepared"]


@dataclass(frozen=True)
class Prepared(LoweredProgram):
    """A lowered call: everything but the tensors that change from step to step. Made by `prepare`.

    at_home: the call that `to` was asked of, whose numbers can be looked at without waiting; None: this one.
    """

    backend: str
    seed: int | Tensor | None
    at_home: Prepared | None = None

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        bias: Tensor | None = None,
        scale: float | None = None,
        grid: tuple[int, int] | None = None,
        seed: int | Tensor | None = None,
        folded_value: Tensor | None = None,
        relevance: Relevance | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(out, maps), maps None without capture. seed overrides the prepared one. folded_value: `fold_value(value)` of
        before, where the caller kept it. relevance: what the backward pass is to add up (fused backends only). Raises
        as `semantic_attention`."""
        check_products(query, key, value)
        self._check_fit(query, key)
        return self.attend(query, key, value, bias, scale, grid, seed, folded_value, relevance)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        scale: float | None,
        grid: tuple[int, int] | None,
        seed: int | Tensor | None = None,
        folded_value: Tensor | None = None,
        relevance: Relevance | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """A call whose query, key and value were checked, and are what was prepared for."""
        check_bias(bias, query, self.side.tokens)
        check_scale(scale)
        refine = self.program.refine
        check_grid(grid, query.shape[2], needed=refine is not None and refine.sigma > 0)
        needs_grad = self.needs_grad(query, key, value, bias, None if relevance is None else relevance.sink)
        call = AttentionCall(
            self, query, key, value, bias, _scale(scale, query), grid, self.draw_seed(seed, query.device), needs_grad,
            folded_value, relevance,
        )  # fmt: skip
        return run(self.backend, call)

    def bind(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None,
        grid: tuple[int, int] | None,
        folded_value: Tensor,
    ) -> BoundCall | None:
        """A call without a bias and gradients that was made with these inputs, for queries that differ from this one in
        their numbers alone: as good, and checked no more. None where the reference serves it. Raises: KernelRefused."""
        scale = _scale(scale, query)
        name = choose(self.backend, AttentionCall(self, query, key, value, None, scale, grid, None, needs_grad=False))
        if name == "reference":
            return None
        assert self.plan is not None
        attention = None
        if self.plan.picture is None and hasattr(fused(name), "BoundAttention"):
            attention = fused(name).BoundAttention(key, folded_value, scale, self.plan.rows)
        return BoundCall(self, name, key, folded_value, scale, grid, attention)

    def draw_seed(self, seed: int | Tensor | None, device: torch.device) -> Tensor | None:
        """(B,) int64 on the device, drawn where neither the call nor `prepare` was passed one; None without random
        dropout. Raises: TypeError, ValueError."""
        check_seed(seed, self.side.batch)
        if self.program.dropout is None or self.program.dropout.mode != "random":
            return None
        seed = self.seed if seed is None else seed
        batch = self.side.batch
        if seed is None:
            return torch.randint(2**63 - 1, (batch,), dtype=torch.int64, device=device)
        if isinstance(seed, int):
            seed = torch.tensor([seed], dtype=torch.int64)
        seed = to_device(seed, device)
        if seed.shape == (batch,):
            return seed.contiguous()
        return seed.reshape(1) + torch.arange(batch, device=device)

    def to(self, device: torch.device) -> Prepared:
        """The same call for inputs on another device. From the CPU to a GPU nobody waits."""
        if device == self.side.device:
            return self
        plan = None if self.plan is None else plan_on(self.plan, device)
        side = side_on(self.side, device) if plan is None else plan.side
        seed = to_device(self.seed, device) if isinstance(self.seed, Tensor) else self.seed
        return replace(self, side=side, plan=plan, seed=seed, at_home=self.home)

    def with_gate(self, gate: Tensor) -> Prepared:
        """The same call with other numbers in its gate, which had the same shape, (B, N) or (B, H, N), and a floating
        dtype; they are not looked at."""
        gate = gate.to(torch.promote_types(gate.dtype, torch.float32))
        gate = gate[:, None, :] if gate.dim() == 2 else gate
        side, plan = replace(self.side, gate=gate), self.plan
        if plan is not None:
            rows = plan.rows
            rows = rows if rows.gate is None else replace(rows, gate=gate.to(torch.float32).contiguous())
            plan = replace(plan, rows=rows, side=side)
        return replace(self, side=side, plan=plan, at_home=self.home)

    @property
    def home(self) -> Prepared:
        """This call where its numbers can be looked at without waiting, if there is such a place; the gate may be
        another's."""
        return self if self.at_home is None else self.at_home

    def tensors(self) -> list[Tensor]:
        """What the call keeps on its device: the token side's tensors and the plan's."""
        parts = (self.side, *(() if self.plan is None else (self.plan.rows, self.plan.picture, self.plan)))
        return [x for part in parts if part is not None for x in vars(part).values() if isinstance(x, Tensor)]

    def _check_fit(self, query: Tensor, key: Tensor) -> None:
        side = self.side
        have = (query.size(0), query.size(1), key.size(2))
        if have != (side.batch, side.heads_count, side.tokens) or query.device != side.device:
            raise ValueError(
                f"query, key: prepared for batch {side.batch}, {side.heads_count} heads, {side.tokens} tokens on "
                f"{side.device}, got {have[0]}, {have[1]}, {have[2]} on {query.device}"
            )


@dataclass(frozen=True)
class BoundCall:
    """A call of which the query and the seed are missing. Made by `Prepared.bind`.

    attention: the backend's own, bound; None: it has none, or the program looks over the picture.
    """

    prepared: Prepared
    backend: str
    key: Tensor
    folded_value: Tensor
    scale: float
    grid: tuple[int, int] | None
    attention: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]] | None

    def __call__(self, query: Tensor, seed: int | Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(out, maps), as `Prepared` gives them. Raises: KernelRefused."""
        prepared, value = self.prepared, self.folded_value
        drawn = prepared.draw_seed(seed, query.device)
        if self.attention is None:
            call = AttentionCall(prepared, query, self.key, value, None, self.scale, self.grid, drawn, False, value)
            return run_fused(self.backend, call)
        assert prepared.plan is not None
        return smoothed(self.backend, *self.attention(query, drawn), prepared.plan, self.grid)


def _scale(scale: float | None, query: Tensor) -> float:
    # Not `scale or ...`: 0 is a scale, under which every token weighs the same.
    return (query.shape[3] ** -0.5 if query.shape[3] else 1.0) if scale is None else scale
