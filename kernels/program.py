"""Steps 1 to 6 of docs/design.md, "The row program", on a tile of rows in registers.

Every step is the same for p and for a multiple of p, so the rows stay unnormalised, relative to their largest entry,
and the division by the softmax's sum is left to the output. Masks are recomputed rather than held across row
reductions, where they would spill predicates.
"""

import triton
import triton.language as tl

from .select import kth_largest

# Step 6 takes a smaller sum for an empty one: its inverse may not be a float.
LEAST_SUM = tl.constexpr(1e-30)


@triton.jit
def softmax_parts(sa, sb, NB: tl.constexpr):
    """Step 1, logits in units of ln 2: exp2(s - max) of both tiles and its sum, 0 for a row without a finite logit."""
    most = tl.max(sa, 1)
    if NB > 0:
        most = tl.maximum(most, tl.max(sb, 1))
    most = tl.where(most == -float("inf"), 0.0, most)
    ea = tl.exp2(sa - most[:, None])
    eb = sb
    total = tl.sum(ea, 1)
    if NB > 0:
        eb = tl.exp2(sb - most[:, None])
        total += tl.sum(eb, 1)
    return ea, eb, total


@triton.jit
def row_program(
    p, pb, total, after, content, gate, leader, k, Seed, ratio, threshold, b, h, rows, cols,
    NB: tl.constexpr, GATE: tl.constexpr, PHRASES: tl.constexpr, DROP: tl.constexpr, RANDOM: tl.constexpr,
    NMS: tl.constexpr, RENORM: tl.constexpr,
):  # fmt: skip
    """Steps 2 to 6 on tile A (p) of unnormalised rows; tile B (pb), protected, is only read.

    Returns p, pb, the factor `after` that makes probabilities of both, and which entries of A survived steps 4 and 5.
    """
    c = content[None, :]
    mass = total
    if RENORM == 1:
        mass = tl.sum(tl.where(c, p, 0.0), 1)

    # 2 and 3. The gate is 1 off content.
    if GATE:
        p = p * gate[None, :]
    if PHRASES:
        p = phrase_means(p, leader)

    # 4 and 5. An entry goes if rank >= kth or rank <= low. Whatever takes no part ranks -1, under any probability.
    rank = tl.where(c, p, -1.0)
    kth = tl.full(total.shape, float("inf"), tl.float32)
    low = tl.full(total.shape, -0.5, tl.float32)
    if RANDOM:
        rank = tl.where(philox_uniform(Seed, cols, rows, h, b) < ratio, -1.0, rank)
    if DROP > 0:
        kth = tl.where(k > 0, kth_largest(rank, k, DROP), float("inf"))
    if NMS:
        low = threshold * tl.max(tl.where((rank < kth[:, None]) & (rank > 0.0), rank, 0.0), 1)
    kept = tl.full(p.shape, 1, tl.int1)
    if (RANDOM or DROP > 0) or NMS:  # in pairs: Triton before 3.4 takes no chain of three
        kept = (((rank >= kth[:, None]) | (rank <= low[:, None])) & c) == 0
        p = tl.where(kept, p, 0.0)

    # 6.
    if RENORM == 1:
        left = tl.sum(tl.where(c, p, 0.0), 1)
        p = tl.where(c, p * (mass / tl.where(left < LEAST_SUM, 1.0, left))[:, None], p)
    if RENORM == 2:
        left = tl.sum(p, 1)
        if NB > 0:
            left += tl.sum(pb, 1)
        # Here, and not after the second product: what is left of a row may be too small for half precision.
        factor = tl.where(left < LEAST_SUM, 0.0, 1.0 / left)[:, None]
        p = p * factor
        if NB > 0:
            pb = pb * factor
        after = tl.where(total == total, 1.0, total)
    if RENORM == 0 and GATE:
        # Here too: relative to the row's largest entry, what a gate amplifies may be too large for half precision.
        p = p * after[:, None]
        if NB > 0:
            pb = pb * after[:, None]
        after = tl.full(total.shape, 1.0, tl.float32)
    return p, pb, after, kept


@triton.jit
def philox_uniform(Seed, cols, rows, h, b):
    """u in [0, 1) of step 4, mode "random", (rows, columns)."""
    seed = tl.load(Seed + b)
    n, m = tl.broadcast(cols.to(tl.int32)[None, :], rows.to(tl.int32)[:, None])
    word, _, _, _ = tl.philox(seed, n, m, n * 0 + h.to(tl.int32), n * 0)
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def phrase_means(p, leader):
    """Step 3: the columns that share a leader, an index >= 0, each get their mean, the very same number, so they tie.

    One phrase after the other, in order of their leaders. A prompt has a few; as a product with a matrix of means this
    costs more, in registers above all.
    """
    BEYOND: tl.constexpr = 1 << 30
    this = tl.min(tl.where(leader >= 0, leader, BEYOND), 0)
    while this < BEYOND:
        inside = leader == this
        size = tl.sum(inside.to(tl.float32), 0)
        mean = tl.sum(tl.where(inside[None, :], p, 0.0), 1) / size
        p = tl.where(inside[None, :], mean[:, None], p)
        this = tl.min(tl.where(leader > this, leader, BEYOND), 0)
    return p


@triton.jit
def pack_bits(kept, cols, word: tl.constexpr):
    """The int32 that has bit n % 32 set where token n of that word is kept; the tokens of the columns are `cols`."""
    bit = tl.where(cols // 32 == word, 1 << (cols % 32).to(tl.int32), 0)
    return tl.sum(tl.where(kept, bit[None, :], 0), 1)
