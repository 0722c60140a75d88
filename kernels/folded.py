"""The first half of a folded layer: rows of x against folded keys, the row program as the product's epilogue.

The keys have `to_q` in them, so all heads read the same rows of x; the probabilities are left in half precision, each
pixel's heads side by side, for one plain product with the folded values. That product is a library's: nothing of the
program is in it. What lies between the two is at most a block of rows, in the L2.
"""

import triton
import triton.language as tl

from .program import row_program, softmax_parts
from .rows import _columns, _logits, _slice, _token_side


@triton.jit
def folded_kernel(
    X, Key, Bias, P, Order, Content, Gate, Phrases, Drop, Seed, HeadMode, Heads,
    scale, ratio, threshold,
    x_b, x_h, x_m, k_b, k_h, k_n, p_b, p_h, p_m, bias_b, bias_h, bias_m, bias_n, gate_b, gate_h,
    first, end, groups,
    HEADS: tl.constexpr, N: tl.constexpr, D: tl.constexpr, NA: tl.constexpr, NB: tl.constexpr, NP: tl.constexpr,
    DA: tl.constexpr, BM: tl.constexpr, UNIT: tl.constexpr,
    DROP: tl.constexpr, RANDOM: tl.constexpr, NMS: tl.constexpr, RENORM: tl.constexpr,
):  # fmt: skip
    """P (B, rows, HEADS, NP), by its strides, for the rows of x from `first` to before `end`.

    Key: (B, HEADS, NP, D), columns already in the order of Order, content first, zero beyond N; Order, Content, Gate,
    Phrases, Bias and the strides as for `rows_kernel`, in the caller's order of tokens. Heads: (HEADS,) int32, the
    caller's index of each head that is there; None: all are. NP: columns stored, N <= NP <= NA + NB. x_h is 0 where the
    heads share their rows. groups: tiles of BM rows.
    """
    place = tl.program_id(0)
    group = place % groups
    slot = (place // groups % HEADS).to(tl.int64)
    b = (place // groups // HEADS).to(tl.int64)
    h = slot
    if Heads is not None:
        h = tl.load(Heads + slot).to(tl.int64)
    mode = 0
    if HeadMode is not None:
        mode = tl.load(HeadMode + h).to(tl.int32)
    X += b * (x_b * UNIT) + h * (x_h * UNIT)
    Key += b * (k_b * UNIT) + slot * (k_h * UNIT)

    NB1: tl.constexpr = NB if NB > 0 else 16
    at_a = tl.arange(0, NA)
    at_b = NA + tl.arange(0, NB1)
    in_a = at_a < N
    in_b = at_b < N
    col_a = _columns(Order, b, N, 0, NA)
    col_b = _columns(Order, b, N, NA, NB1)
    content, gate, leader, k = _token_side(
        Content, Gate, Phrases, Drop, b, h, mode, HeadMode is not None, gate_b, gate_h, col_a, in_a, N, NA, DROP
    )

    rows = first + group.to(tl.int64) * BM + tl.arange(0, BM)
    in_m = rows < end
    sa = tl.zeros((BM, NA), tl.float32)
    sb = tl.zeros((BM, NB1), tl.float32)
    for d in range(0, D, DA):
        x = _slice(X, rows, in_m, x_m * UNIT, d, DA, D)
        sa = tl.dot(x, tl.trans(_slice(Key, at_a, in_a, k_n * UNIT, d, DA, D)), sa)
        if NB > 0:
            sb = tl.dot(x, tl.trans(_slice(Key, at_b, in_b, k_n * UNIT, d, DA, D)), sb)
    sa = _logits(sa, scale, Bias, bias_b, bias_h, bias_m, bias_n, b, h, rows, in_m, col_a, in_a)
    if NB > 0:
        sb = _logits(sb, scale, Bias, bias_b, bias_h, bias_m, bias_n, b, h, rows, in_m, col_b, in_b)

    pa, pb, total = softmax_parts(sa, sb, NB)
    after = tl.where(total == 0, 0.0, 1.0 / total)
    if Content is not None:
        pa, pb, after, _ = row_program(
            pa, pb, total, after, content, gate, leader, k, Seed, ratio, threshold, b, h, rows, col_a,
            NB, Gate is not None, Phrases is not None, DROP, RANDOM, NMS, RENORM,
        )  # fmt: skip
    # From here on they pass through half precision: as probabilities, which fit.
    to = P + b * p_b + slot * p_h + (rows - first)[:, None] * p_m
    tl.store(
        to + at_a[None, :], (pa * after[:, None]).to(P.dtype.element_ty), mask=in_m[:, None] & (at_a < NP)[None, :]
    )
    if NB > 0:
        pb = (pb * after[:, None]).to(P.dtype.element_ty)
        tl.store(to + at_b[None, :], pb, mask=in_m[:, None] & (at_b < NP)[None, :])
