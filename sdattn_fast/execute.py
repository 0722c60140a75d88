"""`Prepared`: an attention call that lacks only the tensors that change from step to step.

It chooses a backend and runs it; the call can be bound, and projections folded into its text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .arguments import check_bias, check_grid, check_products, check_scale, check_seed
from .backend import KernelRefused, autograd, choose, cpu, fused, op, pass_over, triton, unavailable
from .backend.limits import MAX_SIZE
from .backend.smoothing import smooth, smooth_maps
from .graphs import in_graph
from .plan import Plan, TokenSide, fold_into_value, plan_on, side_on
from .program import Capture, Program, Refinement
from .reference import reference_attention
from .streams import MadeOn, to_device

__all__ = ["Bound", "FoldedText", "Prepared"]


@dataclass(frozen=True)
class Prepared:
    """A lowered call: everything but the tensors that change from step to step. Made by `prepare`.

    at_home: the call that `to` was asked of, whose numbers can be looked at without waiting; None: this one.
    """

    program: Program
    side: TokenSide
    plan: Plan | None
    capture: Capture | None
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
        relevance: autograd.Relevance | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(out, maps), maps None without capture. seed overrides the prepared one. folded_value: `fold_value(value)` of
        before, where the caller kept it. relevance: what the backward pass is to add up (fused backends only). Raises
        as `semantic_attention`."""
        self._check(query, key, value, bias, scale, grid, seed)
        needs_grad = self._needs_grad(query, key, value, bias, None if relevance is None else relevance.sink)
        scale = _scale(scale, query)
        key_of_random = self._seed(seed, query.device)
        while True:
            name = choose(self.backend, query, key, value, bias, self.plan, needs_grad)
            if name == "reference":
                if relevance is not None:
                    raise ValueError(
                        "backend: relevance comes from a fused backward kernel, and the reference serves this call"
                    )
                return self._on_reference(query, key, value, bias, scale, grid, key_of_random)
            folded = self.fold_value(value) if folded_value is None else folded_value
            differentiable = needs_grad or autograd.transforming()
            try:
                return self._on_fused(
                    name, query, key, folded, bias, scale, grid, key_of_random, differentiable, relevance
                )
            except KernelRefused as error:
                # Under torch.compile the choice is a constant of the graph.
                if self.backend != "auto" or in_graph():
                    raise
                assert self.plan is not None
                pass_over(error, query, key, value, self.plan, needs_grad)

    def bind(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None,
        grid: tuple[int, int] | None,
        folded_value: Tensor,
    ) -> Bound | None:
        """A call without a bias and gradients that was made with these inputs, for queries that differ from this one in
        their numbers alone: as good, and checked no more. None where the reference serves it. Raises: KernelRefused."""
        name = choose(self.backend, query, key, value, None, self.plan, needs_grad=False)
        if name == "reference":
            return None
        assert self.plan is not None
        scale = _scale(scale, query)
        attention = None
        if self.plan.picture is None and hasattr(fused(name), "BoundAttention"):
            attention = fused(name).BoundAttention(key, folded_value, scale, self.plan.rows)
        return Bound(self, name, key, folded_value, scale, grid, attention)

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

    def fold_refusal(self, x: Tensor) -> str | None:
        """Why no kernel serves a folded layer with this program on rows like x, or None."""
        name = self._folding_backend(x.device)
        if name not in ("cpu", "triton"):
            return f"backend {name!r} has no folded kernel"
        if self.plan is None or self.plan.picture is not None:
            return "the program looks over the picture, and the folded kernel at rows alone"
        refusal = unavailable(name, x.device) or fused(name).folded_refusal(x, self.plan)
        if refusal is not None:
            return refusal
        if torch.is_autocast_enabled(x.device.type):
            return "autocast is on"
        if self._needs_grad(x, x, x, None):
            return "gradients are asked for"
        if self.side.tokens > MAX_SIZE or x.shape[-1] > 65536:
            return f"{self.side.tokens} tokens of {x.shape[-1]} channels are too many"
        return None

    def folds_alike(self, other: Prepared) -> bool:
        """Whether `fold` gives for the other call what it gives for this one: same content tokens and heads, no linear
        steps."""
        mine, theirs = self.home.plan, other.home.plan
        if mine is None or theirs is None or mine.folded or theirs.folded:
            return False
        return _equal(mine.rows.content, theirs.rows.content) and _equal(mine.rows.head_mode, theirs.rows.head_mode)

    def may_sum_heads(self) -> bool:
        """Whether what follows p @ value treats all heads of an entry alike, so that they may be summed before it."""
        plan = self.plan
        return plan is not None and (
            not plan.smoothings or self.side.heads is None or self.side.inactive_heads == "zero"
        )

    def fold_value(self, value: Tensor) -> Tensor:
        """The values with the program's linear steps in them, where it has no others."""
        return fold_into_value(value, self.plan.side) if self.plan is not None and self.plan.folded else value

    def fold(
        self,
        key: Tensor,
        value: Tensor,
        shared_query: bool,
        summed: bool,
        scale: float,
        token_bias: Tensor | None = None,
        out_bias: Tensor | None = None,
    ) -> FoldedText:
        """Bring a folded layer's keys (B, H, N, D) and values (B, H, N, Dv) into the kernel's form, for `call_folded`.

        shared_query: one query for all heads. summed: one output for all heads. token_bias: (B, H, 1, N) float32, added
        to the logits. out_bias: (Dv,) float32, added to the sum. The values come from `fold_value`.
        """
        assert self.plan is not None
        name = self._folding_backend(key.device)
        if name != "cpu" and out_bias is not None:
            out_bias = out_bias.to(key.dtype)  # what it was before it was widened
        packed = fused(name).pack(key, value, self.plan.rows, self.heads_there())
        return FoldedText(name, packed, shared_query, summed, scale, token_bias, out_bias, MadeOn(key.device))

    def call_folded(
        self,
        x: Tensor,
        text: FoldedText,
        *,
        bias: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        seed: int | Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """A folded layer: x (B, M, D) for a shared query, else (B, H, M, D). Returns (y, maps): y (B, M, Dv) if the
        heads are summed, else (B, H, M, Dv)."""
        plan = self.plan
        assert plan is not None
        text.made.use(text.tensors)
        seed = self._seed(seed, x.device)
        rows = plan.rows if seed is None else plan.rows.with_seed(seed)
        if text.token_bias is not None:
            bias = text.token_bias if bias is None else bias + text.token_bias
        name = text.backend
        out, maps = fused(name).folded(x, text.packed, text.summed, bias, text.out_bias, text.scale, rows)
        if plan.smoothings:
            assert grid is not None
            if text.summed:
                where = None if plan.smoothed is None or plan.side.active is None else plan.side.active[:, None]
                out = smooth(name, out[:, None], grid, plan, where)[:, 0]
            else:
                out = smooth(name, out, grid, plan, plan.smoothed)
            if maps is not None and rows.capture_final:
                maps = smooth_maps(name, maps, grid, plan)
        return out, maps

    def heads_there(self) -> list[int] | None:
        """The heads that do not give zeros; None: all."""
        side = self.home.side
        if side.heads is None or side.inactive_heads != "zero" or bool(side.heads.all()):
            return None
        return side.heads.nonzero()[:, 0].tolist()

    def _folding_backend(self, device: torch.device) -> str:
        return self.backend if self.backend != "auto" else "cpu" if device.type == "cpu" else "triton"

    def _on_reference(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        scale: float,
        grid: tuple[int, int] | None,
        seed: Tensor | None,
        **changes: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """changes: arguments of `reference_attention` that are not as prepared."""
        side = self.side
        prepared: dict[str, Any] = dict(
            program=self.program, gate=side.gate, phrases=side.phrases, protected=side.protected, active=side.active,
            heads=side.heads, inactive_heads=side.inactive_heads, capture=self.capture,
        )  # fmt: skip
        # Autocast would round the logits, on which decisions hang, to half precision.
        with torch.autocast(query.device.type, enabled=False):
            return reference_attention(
                query, key, value, bias=bias, scale=scale, grid=grid, seed=0 if seed is None else seed,
                **{**prepared, **changes},
            )  # fmt: skip

    def _on_fused(
        self,
        name: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        scale: float,
        grid: tuple[int, int] | None,
        seed: Tensor | None,
        needs_grad: bool,
        relevance: autograd.Relevance | None,
    ) -> tuple[Tensor, Tensor | None]:
        plan = self.plan
        assert plan is not None
        rows = plan.rows if seed is None else plan.rows.with_seed(seed)
        if plan.picture is not None:
            compiling = in_graph()
            attention = op.picture_attention if compiling else fused(name).picture_attention
            how = {"backend": name} if compiling else {"keep_layout": True}
            out, maps = attention(query, key, value, bias, scale, rows, plan.picture, grid, **how)
        elif needs_grad:
            compiling = in_graph()
            fallback = self._fallback(scale, seed) if self.backend == "auto" and not compiling else None
            out, maps = autograd.attention(query, key, value, bias, scale, rows, name, relevance, fallback)
        elif in_graph():
            out, maps, _ = op.attention(query, key, value, bias, scale, rows, name)
        else:
            # The op's out is contiguous; eager out lies as the query does, so that merging the heads is a view.
            out, maps, _ = fused(name).attention(query, key, value, bias, scale, rows, keep_layout=True)
        return self._smoothed(name, out, maps, grid, needs_grad)

    def _smoothed(
        self, name: str, out: Tensor, maps: Tensor | None, grid: tuple[int, int] | None, needs_grad: bool
    ) -> tuple[Tensor, Tensor | None]:
        plan = self.plan
        assert plan is not None
        if plan.smoothings:
            assert grid is not None
            out = smooth(name, out, grid, plan, plan.smoothed, needs_grad)
            if maps is not None and plan.rows.capture_final:
                maps = smooth_maps(name, maps, grid, plan, needs_grad)
        return out, maps

    def _fallback(self, scale: float, seed: Tensor | None) -> autograd.Fallback:
        """For a backward kernel that does not launch: the rows of this call again, on the reference.

        The value has the linear steps in it where they fold; the smoothing of the output is not the rows'.
        """
        plan = self.plan
        assert plan is not None
        refine = self.program.refine
        threshold = None if refine is None else refine.threshold
        program = replace(self.program, refine=None if threshold is None else Refinement(1, threshold, 0.0))
        changes = {"program": program, **({"phrases": None} if plan.folded else {})}
        return autograd.Fallback(
            lambda q, k, v, bias, gate: self._on_reference(q, k, v, bias, scale, None, seed, gate=gate, **changes),
            lambda error, q, k, v: pass_over(error, q, k, v, plan, True),
        )

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        scale: float | None,
        grid: tuple[int, int] | None,
        seed: int | Tensor | None,
    ) -> None:
        check_products(query, key, value)
        side = self.side
        have = (query.shape[0], query.shape[1], key.shape[2])
        if have != (side.batch, side.heads_count, side.tokens) or query.device != side.device:
            raise ValueError(
                f"query, key: prepared for batch {side.batch}, {side.heads_count} heads, {side.tokens} tokens on "
                f"{side.device}, got {have[0]}, {have[1]}, {have[2]} on {query.device}"
            )
        check_bias(bias, query, side.tokens)
        check_scale(scale)
        refine = self.program.refine
        check_grid(grid, query.shape[2], needed=refine is not None and refine.sigma > 0)
        check_seed(seed)

    def _needs_grad(self, *tensors: Tensor | None) -> bool:
        if not torch.is_grad_enabled():
            return False
        return any(x is not None and x.requires_grad for x in (*tensors, self.side.gate))

    def _seed(self, seed: int | Tensor | None, device: torch.device) -> Tensor | None:
        if self.program.dropout is None or self.program.dropout.mode != "random":
            return None
        seed = self.seed if seed is None else seed
        if seed is None:
            return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
        if isinstance(seed, int):
            seed = torch.tensor([seed], dtype=torch.int64)
        return to_device(seed, device).reshape(1)


@dataclass(frozen=True)
class Bound:
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
        prepared = self.prepared
        drawn = prepared._seed(seed, query.device)
        if self.attention is None:
            return prepared._on_fused(
                self.backend, query, self.key, self.folded_value, None, self.scale, self.grid, drawn, False, None
            )
        out, maps = self.attention(query, drawn)
        return prepared._smoothed(self.backend, out, maps, self.grid, False)


@dataclass(frozen=True)
class FoldedText:
    """A layer's text with projections folded into it, in a backend's form. Made by `Prepared.fold`."""

    backend: str
    packed: cpu.Packed | triton.Packed
    shared_query: bool
    summed: bool
    scale: float
    token_bias: Tensor | None
    out_bias: Tensor | None
    made: MadeOn

    def tensors(self) -> list[Tensor]:
        return [x for x in (*self.packed.tensors(), self.token_bias, self.out_bias) if x is not None]


def _scale(scale: float | None, query: Tensor) -> float:
    # Not `scale or ...`: 0 is a scale, under which every token weighs the same.
    return (query.shape[3] ** -0.5 if query.shape[3] else 1.0) if scale is None else scale


def _equal(x: Tensor | None, y: Tensor | None) -> bool:
    return x is y if x is None or y is None else torch.equal(x, y)
