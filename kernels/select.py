"""The k-th largest entry of each row, exactly, with multiplicity.

k differs between batch entries and its bound is a constant. k = 1 is a maximum. Up to 8, sorting networks: in the
layout of a tensor-core product a row's columns sit in 4 lanes, column 8*j + 2*lane + e, so peeling j and e off moves
nothing; each lane sorts its own, and one reduction over the lanes merges sorted lists, keeping the largest. Beyond,
bisection on the bits, 31 rounds whatever k.

Source: docs/design.md, "Step 4: salience dropout".
"""

import triton
import triton.language as tl


@triton.jit
def kth_largest(x, k, MOST: tl.constexpr):
    """x (rows, columns): float32 >= 0, or negative for entries that do not count. 1 <= k, k <= MOST where MOST <= 8;
    what it gives for k = 0 means nothing."""
    if MOST == 1:
        kth = tl.max(x, 1)
    elif MOST <= 8:
        lanes: tl.constexpr = 4
        per_lane: tl.constexpr = x.shape[1] // lanes
        y = tl.permute(tl.reshape(x, (x.shape[0], per_lane // 2, lanes, 2)), (0, 2, 1, 3))
        y = tl.reshape(y, (x.shape[0], lanes, per_lane))
        if MOST == 2:
            a, b = tl.reduce(_top2(y, per_lane), 1, merge2)
            kth = tl.where(k <= 1, a, b)
        elif MOST == 4:
            a, b, c, d = tl.reduce(_top4(y, per_lane), 1, merge4)
            kth = tl.where(k <= 2, tl.where(k <= 1, a, b), tl.where(k <= 3, c, d))
        else:
            a, b, c, d, e, f, g, h = tl.reduce(_top8(y, per_lane), 1, merge8)
            low = tl.where(k <= 2, tl.where(k <= 1, a, b), tl.where(k <= 3, c, d))
            high = tl.where(k <= 6, tl.where(k <= 5, e, f), tl.where(k <= 7, g, h))
            kth = tl.where(k <= 4, low, high)
    else:
        kth = _bisect(x, k)
    return kth


@triton.jit
def _bisect(x, k):
    """Floats >= 0 order as their bits do: build the largest pattern that k entries reach, from the top bit down."""
    bits = x.to(tl.int32, bitcast=True)
    kth = tl.zeros((x.shape[0],), tl.int32)
    for i in range(31):
        higher = kth | (1 << (30 - i))
        count = tl.sum((bits >= higher[:, None]).to(tl.int32), 1)
        kth = tl.where(count >= k, higher, kth)
    return kth.to(tl.float32, bitcast=True)


# The largest 2, 4, 8 of the last dimension, each a tensor without it, in descending order. `size`: a power of two,
# 4 to 64. The dimension is halved until it is gone, with a sorted list for each place that is left. These are unrolled
# loops and not recursion because up to Triton 3.4 a jit function that calls itself does not compile.


@triton.jit
def _top2(x, size: tl.constexpr):
    a, b = _halves(x, size)
    t0, t1 = tl.maximum(a, b), tl.minimum(a, b)
    for i in tl.static_range(1, 6):
        if size >> i >= 2:
            a0, b0 = _halves(t0, size >> i)
            a1, b1 = _halves(t1, size >> i)
            t0, t1 = merge2(a0, a1, b0, b1)
    return t0, t1


@triton.jit
def _sorted4(x, size: tl.constexpr):
    """Four at a time, sorted: each a quarter of the last dimension."""
    a, b = _halves(x, size)
    a0, b0 = _halves(tl.maximum(a, b), size // 2)
    a1, b1 = _halves(tl.minimum(a, b), size // 2)
    return bitonic4(a0, a1, b1, b0)


@triton.jit
def _top4(x, size: tl.constexpr):
    t0, t1, t2, t3 = _sorted4(x, size)
    for i in tl.static_range(2, 6):
        if size >> i >= 2:
            a0, b0 = _halves(t0, size >> i)
            a1, b1 = _halves(t1, size >> i)
            a2, b2 = _halves(t2, size >> i)
            a3, b3 = _halves(t3, size >> i)
            t0, t1, t2, t3 = merge4(a0, a1, a2, a3, b0, b1, b2, b3)
    return t0, t1, t2, t3


@triton.jit
def _top8(x, size: tl.constexpr):
    t0, t1, t2, t3 = _sorted4(x, size)
    if size == 4:
        t4 = tl.full(t0.shape, -1.0, tl.float32)
        t5, t6, t7 = t4, t4, t4
    else:
        a0, b0 = _halves(t0, size // 4)
        a1, b1 = _halves(t1, size // 4)
        a2, b2 = _halves(t2, size // 4)
        a3, b3 = _halves(t3, size // 4)
        t0, t1, t2, t3, t4, t5, t6, t7 = bitonic8(a0, a1, a2, a3, b3, b2, b1, b0)
    for i in tl.static_range(3, 6):
        if size >> i >= 2:
            a0, b0 = _halves(t0, size >> i)
            a1, b1 = _halves(t1, size >> i)
            a2, b2 = _halves(t2, size >> i)
            a3, b3 = _halves(t3, size >> i)
            a4, b4 = _halves(t4, size >> i)
            a5, b5 = _halves(t5, size >> i)
            a6, b6 = _halves(t6, size >> i)
            a7, b7 = _halves(t7, size >> i)
            t0, t1, t2, t3, t4, t5, t6, t7 = merge8(a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7)
    return t0, t1, t2, t3, t4, t5, t6, t7


@triton.jit
def _halves(x, size: tl.constexpr):
    """Two halves of the last dimension, by parity; the dimension is gone where its size is 2."""
    if size == 2:
        a, b = tl.split(x)
    else:
        a, b = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], size // 2, 2)))
    return a, b


# The largest 2, 4, 8 of two descending lists, descending: the largest of pairs taken crosswise, a bitonic list, sorted.


@triton.jit
def merge2(a0, a1, b0, b1):
    x, y = tl.maximum(a0, b1), tl.maximum(a1, b0)
    return tl.maximum(x, y), tl.minimum(x, y)


@triton.jit
def merge4(a0, a1, a2, a3, b0, b1, b2, b3):
    return bitonic4(tl.maximum(a0, b3), tl.maximum(a1, b2), tl.maximum(a2, b1), tl.maximum(a3, b0))


@triton.jit
def merge8(a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7):
    x0, x1, x2, x3 = tl.maximum(a0, b7), tl.maximum(a1, b6), tl.maximum(a2, b5), tl.maximum(a3, b4)
    x4, x5, x6, x7 = tl.maximum(a4, b3), tl.maximum(a5, b2), tl.maximum(a6, b1), tl.maximum(a7, b0)
    return bitonic8(x0, x1, x2, x3, x4, x5, x6, x7)


@triton.jit
def bitonic4(x0, x1, x2, x3):
    y0, y2 = tl.maximum(x0, x2), tl.minimum(x0, x2)
    y1, y3 = tl.maximum(x1, x3), tl.minimum(x1, x3)
    return tl.maximum(y0, y1), tl.minimum(y0, y1), tl.maximum(y2, y3), tl.minimum(y2, y3)


@triton.jit
def bitonic8(x0, x1, x2, x3, x4, x5, x6, x7):
    a0, a1, a2, a3 = bitonic4(tl.maximum(x0, x4), tl.maximum(x1, x5), tl.maximum(x2, x6), tl.maximum(x3, x7))
    b0, b1, b2, b3 = bitonic4(tl.minimum(x0, x4), tl.minimum(x1, x5), tl.minimum(x2, x6), tl.minimum(x3, x7))
    return a0, a1, a2, a3, b0, b1, b2, b3
