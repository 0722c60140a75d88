"""Programs that look over the picture: a rank or maximum over a token's map (axis "space"), or rounds of refinement.

A rank needs all rows of a map before any row can go on, so a program is several launches of one kernel, each a stage:
with one round every stage computes the probabilities again from queries and keys, and no map exists in memory; between
rounds the map (B, H, M, N) is in memory, because its smoothing needs the neighbours (`smooth_kernel`). The k-th largest
is found exactly by histograms of the numbers' bits, which order as the numbers do: 11, 10 and 10 bits in three counts.

Stages that compute the probabilities again must get them to the bit, or the k-th largest would not be found among them.
Two compiled kernels may add up a row in two orders, so these stages are one, told at run time which of them it is.
"""

import triton
import triton.language as tl

from .program import LEAST_SUM, philox_uniform, phrase_means, softmax_parts
from .rows import _logits, _slice, _store_out
from .select import kth_largest

# The stages of STAGE "anew".
COUNT, HIGHEST, LAST = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit(do_not_specialize=["stage", "shift", "bits"])
def picture_kernel(
    Query, Key, Value, Bias, Out, P, Mass, Maps, Content, Gate, Phrases, Drop, Seed, HeadMode, Active, Slots,
    Histogram, Found, Highest, scale, ratio, threshold,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_m, bias_b, bias_h, bias_m, bias_n, gate_b, gate_h, M, T,
    groups, stage, shift, bits,
    H: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, NA: tl.constexpr, DA: tl.constexpr,
    VA: tl.constexpr, BM: tl.constexpr, STAGE: tl.constexpr, FIRST: tl.constexpr,
    DROP: tl.constexpr, RANDOM: tl.constexpr, NMS: tl.constexpr, RENORM: tl.constexpr,
    FINAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one head, all tokens. Arguments as `rows_kernel`'s; None switches a part off.

    STAGE: "begin" writes P (B, H, M, N) and Mass (B, H, M), what step 4 leaves but for its rank over the picture, and
    the content's mass before the gate; "count" adds to Histogram (B, H, N, 2048); "highest" to Highest (B, H, N), bits
    of float32; "round" does steps 5 and 6 on P in place; "last" does them and the second product. "anew", with P None:
    `stage` says which of COUNT, HIGHEST and LAST. Found: (B, H, N) int32, the bits of the k-th largest that are settled
    so far, those above `bits` bits at `shift`, and at last all. FIRST: this is the first round. NMS: 1 along the row, 2
    by Highest. Active: (B,) uint8. Maps: (B, H, T, M).
    """
    place = tl.program_id(0)
    bh = (place // groups).to(tl.int64)
    b, h = bh // H, bh % H
    rows = (place % groups).to(tl.int64) * BM + tl.arange(0, BM)
    in_m = rows < M
    cols = tl.arange(0, NA).to(tl.int64)
    in_n = cols < N
    inside = in_m[:, None] & in_n[None, :]
    mode = tl.zeros((), tl.int32)
    if HeadMode is not None:
        mode = tl.load(HeadMode + h).to(tl.int32)
    if Active is not None:
        # Entries that are off are plain, or zero where the head is.
        mode = tl.where(tl.load(Active + b) != 0, mode, tl.maximum(mode, 1))
    content = tl.load(Content + b * N + cols, mask=in_n, other=0).to(tl.int32)
    content = tl.where(mode == 0, content, 0) != 0
    c = content[None, :]
    here = P
    if P is not None:
        here = P + bh * M * N + rows[:, None] * N + cols[None, :]

    # The probabilities, from memory or from the products.
    ANEW: tl.constexpr = STAGE == "anew"
    if ANEW or STAGE == "begin":
        p = tl.zeros((BM, NA), tl.float32)
        for d in range(0, D, DA):
            q = _slice(Query + b * q_b + h * q_h, rows, in_m, q_m, d, DA, D)
            k = _slice(Key + b * k_b + h * k_h, cols, in_n, k_n, d, DA, D)
            p = tl.dot(q, tl.trans(k), p, input_precision=PRECISION)
        p = _logits(p, scale, Bias, bias_b, bias_h, bias_m, bias_n, b, h, rows, in_m, cols, in_n)
        p, _, total = softmax_parts(p, p, 0)
        p = p * tl.where(total == 0, 0.0, 1.0 / total)[:, None]
        mass = tl.sum(tl.where(c, p, 0.0), 1)
        if Slots is not None and not FINAL:
            stored = in_m
            if ANEW:
                stored = tl.where(stage == LAST, rows, M) < M
            _store_maps(Maps + bh * T * M, Slots, p, rows, stored, cols, in_n, mode, M)
        if Gate is not None:
            p *= tl.load(Gate + b * gate_b + h * gate_h + cols, mask=content, other=1.0)[None, :]
        if Phrases is not None:
            p = phrase_means(p, tl.load(Phrases + b * N + cols, mask=content, other=-1))
        if RANDOM:
            p = tl.where(c & (philox_uniform(Seed, cols, rows, h, b) < ratio), 0.0, p)
        if DROP > 0:
            most = tl.load(Drop + b)
            kth = tl.where(most > 0, kth_largest(tl.where(c, p, -1.0), most, DROP), float("inf"))
            p = tl.where(c & (p >= kth[:, None]), 0.0, p)
    else:
        p = tl.load(here, mask=inside, other=0.0)
        mass = tl.sum(tl.where(c, p, 0.0), 1)
        if FIRST and STAGE != "count":
            mass = tl.load(Mass + bh * M + rows, mask=in_m, other=0.0)

    if STAGE == "begin":
        tl.store(here, p, mask=inside)
        tl.store(Mass + bh * M + rows, mass, mask=in_m)
    if Histogram is not None and (ANEW or STAGE == "count"):
        if stage == COUNT:
            word = p.to(tl.int32, bitcast=True) & 0x7FFFFFFF
            found = tl.load(Found + bh * N + cols, mask=in_n, other=-1)
            counts = (c & inside) & ((word >> (shift + bits)) == found[None, :])
            bins = (word >> shift) & ((1 << bits) - 1)
            tl.atomic_add(Histogram + (bh * N + cols)[None, :] * 2048 + bins, 1, mask=counts, sem="relaxed")
    if (Found is not None and FIRST) and (STAGE != "count" and STAGE != "begin"):
        bound = tl.load(Found + bh * N + cols, mask=in_n, other=0).to(tl.float32, bitcast=True)
        p = tl.where(c & (p >= bound[None, :]), 0.0, p)
    if Highest is not None and (ANEW or STAGE == "highest"):
        if stage == HIGHEST:
            highest = tl.max(tl.where(c & inside, p, 0.0), 0)
            tl.atomic_max(Highest + bh * N + cols, highest.to(tl.int32, bitcast=True), mask=content, sem="relaxed")
    if ANEW or (STAGE == "round" or STAGE == "last"):
        if stage == LAST:
            if NMS == 1:
                low = threshold * tl.max(tl.where(c, p, 0.0), 1)
                p = tl.where(c & (p <= low[:, None]), 0.0, p)
            if NMS == 2:
                largest = tl.load(Highest + bh * N + cols, mask=in_n, other=0).to(tl.float32, bitcast=True)
                p = tl.where(c & (p <= (threshold * largest)[None, :]), 0.0, p)
            if RENORM == 1:
                left = tl.sum(tl.where(c, p, 0.0), 1)
                p = tl.where(c, p * (mass / tl.where(left < LEAST_SUM, 1.0, left))[:, None], p)
            if RENORM == 2:
                left = tl.sum(p, 1)
                p = tl.where(mode == 0, p * (1.0 / tl.where(left < LEAST_SUM, 1.0, left))[:, None], p)
            if STAGE == "round":
                tl.store(here, p, mask=inside)
            else:
                p = tl.where(mode == 2, 0.0, p)
                if Slots is not None and FINAL:
                    _store_maps(Maps + bh * T * M, Slots, p, rows, in_m, cols, in_n, mode, M)
                for d in range(0, DV, VA):
                    v = _slice(Value + b * v_b + h * v_h, cols, in_n, v_n, d, VA, DV)
                    o = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
                    o = tl.where(mode == 2, 0.0, o)
                    _store_out(Out + b * o_b + h * o_h, o, rows, in_m, o_m, d, VA, DV)


@triton.jit
def _store_maps(Maps, Slots, p, rows, in_m, cols, in_n, mode, M):
    """The captured columns of p to Maps (T, M)."""
    slot = tl.load(Slots + cols, mask=in_n, other=-1).to(tl.int64)
    p = tl.where(mode == 2, 0.0, p)
    tl.store(Maps + slot[None, :] * M + rows[:, None], p, mask=in_m[:, None] & (slot >= 0)[None, :])
