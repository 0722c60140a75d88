"""The planner: which steps fold into V, which need the row, which filter the output.

A `Program` and the token side of a call (gate, phrases, token classes, heads) are lowered to a `RowPlan`, the small
tensors and numbers that a kernel reads. Nothing here touches pixels, so a plan serves every denoising step of a prompt.

Source: docs/design.md, "The planner" and "Linear steps fold into the values".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .graphs import in_graph
from .places import version_of
from .program import Capture, Program
from .streams import Kept, capturing, to_device

__all__ = [
    "TokenSide", "RowPlan", "PicturePlan", "Plan", "make_plan", "plan_on", "side_on", "fold_into_value",
    "gaussian_radius",
]  # fmt: skip

RENORMALIZE = {"none": 0, "content": 1, "row": 2}
HEAD_PROGRAM, HEAD_PLAIN, HEAD_ZERO = 0, 1, 2


@dataclass(frozen=True)
class TokenSide:
    """What a call says of tokens and heads, checked and on the inputs' device.

    gate: (B, 1 or H, N) float32 or float64, >= 0; phrases: (B, N) int64, -1 for none; protected: (B, N) bool; active:
    (B,) bool; heads: (H,) bool, the active ones; seed: (B,) int64, of the random mode. None: as if not given.
    """

    batch: int
    heads_count: int
    tokens: int
    device: torch.device
    gate: Tensor | None = None
    phrases: Tensor | None = None
    protected: Tensor | None = None
    active: Tensor | None = None
    heads: Tensor | None = None
    inactive_heads: str = "plain"
    seed: Tensor | None = None

    def __post_init__(self) -> None:
        if self.seed is not None:
            _check_seeds(self.seed, self.batch)


@dataclass(frozen=True)
class RowPlan:
    """What a fused kernel does to a row between the two products. All tensors are contiguous.

    content: (B, N) uint8, 1 for a content token of an active entry; None: the rows are plain attention.
    gate: (B, 1 or H, N) float32, read at content tokens only; None: no gate.
    phrases: (B, N) int32, the index of the first member of the token's phrase, -1 outside phrases. Only content tokens
        of phrases with two members or more have one. None: no phrases.
    drop: (B,) int32, how many of the largest content entries go (k of step 4, "topk"; 0: none); None: no such step.
    random_ratio: ratio of step 4, mode "random"; -1: no such step. seed: (B,) int64 beside it.
    threshold: of step 5; -1: no suppression.
    renormalize: 0 "none", 1 "content", 2 "row".
    head_mode: (H,) uint8: 0 runs the program, 1 is plain attention, 2 gives zeros; None: all run it.
    capture_tokens: (T,) int32 or None. capture_final: map after step 6, else after step 1. capture_mean: mean over the
        heads of mode 0, (B, T, M); else every head, (B, H, T, M).
    max_content, max_drop: bounds, known to the host, on content tokens per entry and on `drop`. bounds: an empty tensor
        (max_content, max_drop, 0), whose sizes count instead where a graph of torch.compile reads the plan.
    derived: what backends make of these tensors and keep, by name; plans that differ in the seed alone share it.
    """

    content: Tensor | None = None
    gate: Tensor | None = None
    phrases: Tensor | None = None
    drop: Tensor | None = None
    random_ratio: float = -1.0
    seed: Tensor | None = None
    threshold: float = -1.0
    renormalize: int = 0
    head_mode: Tensor | None = None
    capture_tokens: Tensor | None = None
    capture_final: bool = True
    capture_mean: bool = True
    max_content: int = 0
    max_drop: int = 0
    bounds: Tensor | None = None
    derived: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def replaced(self, **changes: Any) -> RowPlan:
        """As `dataclasses.replace`, which takes ten times as long: layers do this at every step."""
        if torch.compiler.is_compiling():
            return replace(self, **changes)
        other = object.__new__(RowPlan)
        other.__dict__.update(self.__dict__, **changes)
        return other

    def by_head(self) -> RowPlan:
        """The same plan, its captured maps of every head by itself."""
        return self.replaced(capture_mean=False)

    def with_seed(self, seed: Tensor) -> RowPlan:
        """The same plan with other seeds, (B,) int64. Raises: ValueError."""
        if self.content is not None:
            _check_seeds(seed, self.content.shape[0])
        return self.replaced(seed=seed)

    def derive(self, name: str, source: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """A small tensor that a backend makes of one of these, kept with the plan: eager calls share one plan.

        Made anew where the source is another or was written to since, and never kept from a CUDA graph's capture, whose
        memory is the graph's own. Custom ops make a new RowPlan each call, so nothing is kept under torch.compile.
        """
        have = self.derived.get(name)
        if have is not None and have.source is source and have.version == version_of(source):
            return have.kept.get()
        made = make(source)
        if not capturing(source.device):
            self.derived[name] = _Derived(source, version_of(source), make, Kept(made))
        return made

    def derive_again(self) -> None:
        """Write what was derived where it is, after its sources were written to."""
        for name, old in list(self.derived.items()):
            with torch.inference_mode():
                made = old.kept.get().copy_(old.make(old.source))
            self.derived[name] = _Derived(old.source, version_of(old.source), old.make, Kept(made))

    @property
    def decides(self) -> bool:
        """Whether steps 4 and 5 may drop an entry, so that there are bits to save for a backward pass."""
        return self.threshold >= 0 or self.random_ratio >= 0 or (self.drop is not None and self.max_drop > 0)


@dataclass(frozen=True)
class _Derived:
    source: Tensor
    version: int | None
    make: Callable[[Tensor], Tensor]
    kept: Kept


@dataclass(frozen=True)
class PicturePlan:
    """What a program does over the whole of a head's map, beside what the `RowPlan` does to its rows.

    steps: rounds of steps 5 to 7. The smoothing after the last one is not among them: it filters the output. sigma: of
    the smoothing between rounds, 0: none. drop_ratio: of step 4 on axis "space", mode "topk"; -1: no such step. nms:
    step 5 compares with the maximum of the token's map. active: (B,) uint8, the others are plain; None: all are.
    """

    steps: int = 1
    sigma: float = 0.0
    drop_ratio: float = -1.0
    nms: bool = False
    active: Tensor | None = None

    def dropped(self, pixels: int) -> int:
        """How many pixels of each token step 4 drops."""
        return _number_dropped(self.drop_ratio, pixels) if self.drop_ratio >= 0 else 0


@dataclass(frozen=True)
class Plan:
    """A whole call, lowered.

    folded: V is to be replaced by `fold_into_value` before the rows run (gate and phrases are in it then).
    rows: what the kernel does to rows. picture: what it does over the picture, None where every row is by itself.
    sigma, smoothings: the Gaussian that filters the output (and the final maps), so many times; 0: none. smoothed:
    (B, H) bool, the maps that it applies to, None for all.
    """

    folded: bool
    rows: RowPlan
    picture: PicturePlan | None
    side: TokenSide
    sigma: float
    smoothings: int
    smoothed: Tensor | None


def make_plan(program: Program, side: TokenSide, capture: Capture | None = None) -> Plan:
    """Lower a program for one text."""
    compiling = in_graph()
    final_capture = capture is not None and capture.stage == "final"

    rows = _capture_plan(RowPlan(), side, capture)
    rows = replace(rows, head_mode=_head_mode(side))
    picture = _picture_plan(program, side)
    folded = False
    if picture is not None or _needs_row(program, side):
        rows = _row_steps(rows, program, side, compiling)
    elif side.gate is not None or side.phrases is not None:
        if final_capture:
            rows = _row_steps(rows, Program(), side, compiling)
        else:
            folded = True

    smoothings = 0
    if program.refine is not None and _smooths(program):
        again = picture is not None and picture.steps > 1
        alone = program.refine.threshold is None  # nothing is decided between the smoothings, so all are the output's
        smoothings = program.refine.steps if alone and not again else 1
    sigma = program.refine.sigma if program.refine is not None and smoothings else 0.0
    return Plan(folded, rows, picture, side, sigma, smoothings, _where_program(side) if smoothings else None)


def plan_on(plan: Plan, device: torch.device) -> Plan:
    """The plan for inputs on another device."""
    return replace(
        plan,
        rows=replace(_tensors_on(plan.rows, device), derived={}),
        picture=None if plan.picture is None else _tensors_on(plan.picture, device),
        side=side_on(plan.side, device),
        smoothed=None if plan.smoothed is None else to_device(plan.smoothed, device),
    )


def side_on(side: TokenSide, device: torch.device) -> TokenSide:
    """The token side of inputs on another device."""
    return replace(_tensors_on(side, device), device=device)


def _tensors_on(part: Any, device: torch.device) -> Any:
    tensors = {name: x for name, x in vars(part).items() if isinstance(x, Tensor)}
    return replace(part, **{name: to_device(x, device) for name, x in tensors.items()})


def _picture_plan(program: Program, side: TokenSide) -> PicturePlan | None:
    """None where no entry of the map depends on another row's."""
    dropout, refine = program.dropout, program.refine
    ratio = dropout.ratio if dropout is not None and dropout.axis == "space" and dropout.mode == "topk" else -1.0
    steps, sigma, nms = 1, 0.0, False
    if refine is not None:
        sigma = refine.sigma if _smooths(program) else 0.0
        nms = refine.axis == "space" and refine.threshold is not None
        # Without a smoothing in between, suppressing a row again changes nothing, nor does regaining its mass.
        again = refine.threshold is not None and (sigma > 0 or nms)
        again = again or (program.renormalize == "row" and sigma > 0)
        steps = refine.steps if again else 1
    if steps == 1 and ratio < 0 and not nms:
        return None
    active = None if side.active is None else side.active.to(torch.uint8).contiguous()
    return PicturePlan(steps, sigma if steps > 1 else 0.0, ratio, nms, active)


def _smooths(program: Program) -> bool:
    return program.refine is not None and program.refine.sigma > 0 and gaussian_radius(program.refine.sigma) > 0


def fold_into_value(value: Tensor, side: TokenSide) -> Tensor:
    """diag(g) P V: gate and phrase mean, both the identity on protected tokens, inactive entries and inactive heads.

    value: (B, H, N, Dv) of any floating dtype; the result has the same shape and dtype. Source: docs/design.md,
    "Linear steps fold into the values".
    """
    v = value.to(torch.promote_types(value.dtype, torch.float32))
    content = _content(side)
    folded = v
    if side.phrases is not None:
        folded = _phrase_matrix(content, side.phrases).to(v.dtype)[:, None] @ folded
    if side.gate is not None:
        folded = folded * torch.where(content[:, None, :], side.gate, 1.0)[..., None].to(v.dtype)
    if side.heads is not None:
        folded = torch.where(side.heads[:, None, None], folded, v)
    return folded.to(value.dtype)


def _check_seeds(seed: Tensor, batch: int) -> None:
    """Kernels read an entry's seed by its address."""
    if tuple(seed.shape) != (batch,) or seed.dtype != torch.int64:
        raise ValueError(f"seed: expected ({batch},) int64, got {tuple(seed.shape)} {seed.dtype}")


def _needs_row(program: Program, side: TokenSide) -> bool:
    """A decision, or a renormalisation of a mass that something changed."""
    if program.dropout is not None or (program.refine is not None and program.refine.threshold is not None):
        return True
    return program.renormalize != "none" and side.gate is not None


def _row_steps(rows: RowPlan, program: Program, side: TokenSide, compiling: bool) -> RowPlan:
    content = _content(side)
    count = content.sum(-1)
    exact = side.tokens if compiling else (int(count.max()) if count.numel() else 0)
    most = exact if compiling else _bound(exact, 16, side.tokens)
    drop, max_drop, ratio = None, 0, -1.0
    if program.dropout is not None and program.dropout.mode == "topk" and program.dropout.axis == "token":
        drop = torch.floor(program.dropout.ratio * count.to(torch.float64) + 1e-9).to(torch.int32)
        max_drop = _number_dropped(program.dropout.ratio, exact)
        max_drop = max_drop if compiling else _bound(max_drop, 1, most)
    elif program.dropout is not None and program.dropout.mode == "random":
        ratio = program.dropout.ratio
    threshold = -1.0 if program.refine is None or program.refine.threshold is None else program.refine.threshold
    return replace(
        rows,
        content=content.to(torch.uint8).contiguous(),
        gate=None if side.gate is None else side.gate.to(torch.float32).contiguous(),
        phrases=None if side.phrases is None else _phrase_leaders(content, side.phrases),
        drop=drop,
        random_ratio=ratio,
        seed=side.seed if ratio >= 0 else None,
        threshold=threshold,
        renormalize=RENORMALIZE[program.renormalize],
        max_content=most,
        max_drop=max_drop,
    )


def _bound(count: int, least: int, most: int) -> int:
    """Rounded up to a power of two, as kernels have it: one launch serves more texts, and CUDA graphs of torch.compile,
    recorded for every bound, are few. 0 stays."""
    return min(max(least, 1 << (count - 1).bit_length()), most) if count > 0 else 0


def _content(side: TokenSide) -> Tensor:
    content = torch.ones(side.batch, side.tokens, dtype=torch.bool, device=side.device)
    if side.protected is not None:
        content = content & ~side.protected
    if side.active is not None:
        content = content & side.active[:, None]
    return content


def _together(content: Tensor, phrases: Tensor) -> Tensor:
    member = content & (phrases >= 0)
    return (phrases[:, :, None] == phrases[:, None, :]) & member[:, :, None] & member[:, None, :]


def _phrase_leaders(content: Tensor, phrases: Tensor) -> Tensor:
    together = _together(content, phrases)
    if together.shape[-1] == 0:
        return phrases.to(torch.int32).contiguous()
    # Not argmax, which Inductor 2.13 compiles wrongly for uint8 rows as long as a vector.
    tokens = torch.arange(together.shape[-1], device=phrases.device)
    leader = torch.where(together, tokens, together.shape[-1]).amin(-1)
    return torch.where(together.sum(-1) > 1, leader, -1).to(torch.int32).contiguous()


def _phrase_matrix(content: Tensor, phrases: Tensor) -> Tensor:
    together = _together(content, phrases)
    size = together.sum(-1, keepdim=True)
    eye = torch.eye(phrases.shape[-1], dtype=torch.float32, device=phrases.device)
    return torch.where(size > 0, together.to(torch.float32) / size.clamp(min=1), eye)


def _head_mode(side: TokenSide) -> Tensor | None:
    if side.heads is None:
        return None
    off = HEAD_PLAIN if side.inactive_heads == "plain" else HEAD_ZERO
    return torch.where(side.heads, HEAD_PROGRAM, off).to(torch.uint8)


def _where_program(side: TokenSide) -> Tensor | None:
    if side.active is None and side.heads is None:
        return None
    where = torch.ones(side.batch, side.heads_count, dtype=torch.bool, device=side.device)
    if side.active is not None:
        where = where & side.active[:, None]
    if side.heads is not None:
        where = where & side.heads
    return where


def _capture_plan(rows: RowPlan, side: TokenSide, capture: Capture | None) -> RowPlan:
    if capture is None:
        return rows
    tokens = range(side.tokens) if capture.tokens is None else capture.tokens
    return replace(
        rows,
        capture_tokens=to_device(torch.tensor(list(tokens), dtype=torch.int32), side.device),
        capture_final=capture.stage == "final",
        capture_mean=capture.reduce == "mean",
    )


def gaussian_radius(sigma: float) -> int:
    """Pixels on either side that the Gaussian reaches, as `scipy.ndimage.gaussian_filter` truncates it."""
    return int(4.0 * sigma + 0.5)


def _number_dropped(ratio: float, count: int) -> int:
    """How many of `count` entries the salience dropout takes away."""
    return math.floor(ratio * count + 1e-9)
