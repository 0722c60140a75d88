"""Attention of rows over few keys, with the row program between the two products.

A row of logits is whole in registers, so there is no online softmax and the map never exists in memory. The columns
are two tiles: A holds every content token (the caller's tokens permuted, content first), B protected ones alone; all
that the program decides happens in A. One launch program serves one head of one batch entry and walks over TILES tiles
of rows, keys and values staying where they are; with MEAN it serves one tile of rows and walks over the heads instead.

Source: docs/design.md, "The row program", steps 1 to 6 and 8.
"""

import triton
import triton.language as tl

from .program import pack_bits, row_program, softmax_parts


@triton.jit
def rows_kernel(
    Query, Key, Value, Bias, Out, Maps, Bits,
    Order, Content, Gate, Phrases, Drop, Seed, HeadMode, Slots,
    scale, ratio, threshold,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_m, bias_b, bias_h, bias_m, bias_n, gate_b, gate_h,
    M, T, groups,
    H: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    NA: tl.constexpr, NB: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, VA: tl.constexpr, VB: tl.constexpr,
    BM: tl.constexpr, TILES: tl.constexpr, UNIT: tl.constexpr, STREAM: tl.constexpr,
    DROP: tl.constexpr, RANDOM: tl.constexpr, NMS: tl.constexpr, RENORM: tl.constexpr,
    FINAL: tl.constexpr, MEAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of columns, A, if NB is 0. Pointers that are None switch their part off.

    scale: of the logits, times log2(e). q_*, k_*, v_*, o_*: strides in units of UNIT elements, so that the compiler
    knows their alignment (it tells 16 from 1 by itself; head dimension 40 is neither); last dimensions are contiguous.
    Order: (B, N) int32, the caller's index of each column; None: columns are not permuted. Content: (B, N) uint8; None:
    plain attention. Slots: (N,) int32, where a token's map goes in Maps, -1 nowhere. groups: launch programs per head
    (per batch entry with MEAN). DROP: 0 no step; 1, 2, 4, 8 a bound on Drop; beyond, any. RENORM: 1 "content", 2 "row".
    STREAM: keys and values are too large to stay, so they pass in slices of DA and VA.
    """
    place = tl.program_id(0)
    group = place % groups
    if MEAN:
        b = (place // groups).to(tl.int64)
        sum_a = tl.zeros((BM, NA), tl.float32)
        sum_b = sum_a
        if NB > 0:
            sum_b = tl.zeros((BM, NB), tl.float32)
        heads = 0
        for head in range(H):
            runs = 1
            if HeadMode is not None:
                runs = (tl.load(HeadMode + head) == 0).to(tl.int32)
            map_a, map_b = _head(
                Query, Key, Value, Bias, Out, Maps, Bits, Order, Content, Gate, Phrases, Drop, Seed, HeadMode, Slots,
                scale, ratio, threshold,
                q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_m,
                bias_b, bias_h, bias_m, bias_n, gate_b, gate_h, M, T,
                b, tl.zeros((), tl.int64) + head, group,
                H, N, D, DV, NA, NB, DA, DB, VA, VB, BM, 1, UNIT, STREAM,
                DROP, RANDOM, NMS, RENORM, FINAL, True, PRECISION,
            )  # fmt: skip
            sum_a += tl.where(runs != 0, map_a, 0.0)
            if NB > 0:
                sum_b += tl.where(runs != 0, map_b, 0.0)
            heads += runs
        share = 1.0 / tl.maximum(heads, 1).to(tl.float32)
        rows = group.to(tl.int64) * BM + tl.arange(0, BM)
        _store_map(Maps + b * T * M, Slots, Order, sum_a * share, rows, b, M, N, 0, NA)
        if NB > 0:
            _store_map(Maps + b * T * M, Slots, Order, sum_b * share, rows, b, M, N, NA, NB)
    else:
        bh = place // groups
        _head(
            Query, Key, Value, Bias, Out, Maps, Bits, Order, Content, Gate, Phrases, Drop, Seed, HeadMode, Slots,
            scale, ratio, threshold,
            q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_m,
            bias_b, bias_h, bias_m, bias_n, gate_b, gate_h, M, T,
            (bh // H).to(tl.int64), (bh % H).to(tl.int64), group,
            H, N, D, DV, NA, NB, DA, DB, VA, VB, BM, TILES, UNIT, STREAM,
            DROP, RANDOM, NMS, RENORM, FINAL, False, PRECISION,
        )  # fmt: skip


@triton.jit
def _head(
    Query, Key, Value, Bias, Out, Maps, Bits, Order, Content, Gate, Phrases, Drop, Seed, HeadMode, Slots,
    scale, ratio, threshold,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_m, bias_b, bias_h, bias_m, bias_n, gate_b, gate_h, M, T,
    b, h, group,
    H: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    NA: tl.constexpr, NB: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, VA: tl.constexpr, VB: tl.constexpr,
    BM: tl.constexpr, TILES: tl.constexpr, UNIT: tl.constexpr, STREAM: tl.constexpr,
    DROP: tl.constexpr, RANDOM: tl.constexpr, NMS: tl.constexpr, RENORM: tl.constexpr,
    FINAL: tl.constexpr, MEAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A head of one entry: the columns' side once, then TILES tiles of rows. Returns the last tile's map, for MEAN."""
    Query += b * (q_b * UNIT) + h * (q_h * UNIT)
    Key += b * (k_b * UNIT) + h * (k_h * UNIT)
    Value += b * (v_b * UNIT) + h * (v_h * UNIT)
    Out += b * (o_b * UNIT) + h * (o_h * UNIT)
    mode = 0
    if HeadMode is not None:
        mode = tl.load(HeadMode + h).to(tl.int32)

    # The columns. Both tiles are made even where NB is 0; what nobody reads is never computed.
    NB1: tl.constexpr = NB if NB > 0 else 16
    in_a = tl.arange(0, NA) < N
    in_b = NA + tl.arange(0, NB1) < N
    col_a = _columns(Order, b, N, 0, NA)
    col_b = _columns(Order, b, N, NA, NB1)
    content, gate, leader, k = _token_side(
        Content, Gate, Phrases, Drop, b, h, mode, HeadMode is not None, gate_b, gate_h, col_a, in_a, N, NA, DROP
    )

    # The keys and values, where they can stay. Products along D come in two slices, 32 + 16 for 40.
    if not STREAM:
        ka0 = _slice(Key, col_a, in_a, k_n * UNIT, 0, DA, D)
        kb0 = _slice(Key, col_b, in_b, k_n * UNIT, 0, DA, D)
        va0 = _slice(Value, col_a, in_a, v_n * UNIT, 0, VA, DV)
        vb0 = _slice(Value, col_b, in_b, v_n * UNIT, 0, VA, DV)
        ka1, kb1, va1, vb1 = ka0, kb0, va0, vb0
        if DB > 0:
            ka1 = _slice(Key, col_a, in_a, k_n * UNIT, DA, DB, D)
            kb1 = _slice(Key, col_b, in_b, k_n * UNIT, DA, DB, D)
        if VB > 0:
            va1 = _slice(Value, col_a, in_a, v_n * UNIT, VA, VB, DV)
            vb1 = _slice(Value, col_b, in_b, v_n * UNIT, VA, VB, DV)

    map_a = tl.zeros((BM, NA), tl.float32)
    map_b = tl.zeros((BM, NB1), tl.float32)
    for tile in range(TILES):
        rows = (group * TILES + tile).to(tl.int64) * BM + tl.arange(0, BM)
        in_m = rows < M

        # The first product.
        sa = tl.zeros((BM, NA), tl.float32)
        sb = tl.zeros((BM, NB1), tl.float32)
        if STREAM:
            for d in range(0, D, DA):
                q = _slice(Query, rows, in_m, q_m * UNIT, d, DA, D)
                kd = _slice(Key, col_a, in_a, k_n * UNIT, d, DA, D)
                sa = tl.dot(q, tl.trans(kd), sa, input_precision=PRECISION)
                if NB > 0:
                    kd = _slice(Key, col_b, in_b, k_n * UNIT, d, DA, D)
                    sb = tl.dot(q, tl.trans(kd), sb, input_precision=PRECISION)
        else:
            q = _slice(Query, rows, in_m, q_m * UNIT, 0, DA, D)
            sa = tl.dot(q, tl.trans(ka0), sa, input_precision=PRECISION)
            if NB > 0:
                sb = tl.dot(q, tl.trans(kb0), sb, input_precision=PRECISION)
            if DB > 0:
                q = _slice(Query, rows, in_m, q_m * UNIT, DA, DB, D)
                sa = tl.dot(q, tl.trans(ka1), sa, input_precision=PRECISION)
                if NB > 0:
                    sb = tl.dot(q, tl.trans(kb1), sb, input_precision=PRECISION)
        sa = _logits(sa, scale, Bias, bias_b, bias_h, bias_m, bias_n, b, h, rows, in_m, col_a, in_a)
        if NB > 0:
            sb = _logits(sb, scale, Bias, bias_b, bias_h, bias_m, bias_n, b, h, rows, in_m, col_b, in_b)

        # The rows. pa and pb times `after` are probabilities.
        pa, pb, total = softmax_parts(sa, sb, NB)
        after = tl.where(total == 0, 0.0, 1.0 / total)
        if Slots is not None and not FINAL:
            map_a = pa * after[:, None]
            map_b = pb * after[:, None]
        kept = tl.full((BM, NA), 1, tl.int1)
        if Content is not None:
            pa, pb, after, kept = row_program(
                pa, pb, total, after, content, gate, leader, k, Seed, ratio, threshold, b, h, rows, col_a,
                NB, Gate is not None, Phrases is not None, DROP, RANDOM, NMS, RENORM,
            )  # fmt: skip
        if Slots is not None and FINAL:
            map_a = pa * after[:, None]
            map_b = pb * after[:, None]
        if Slots is not None and HeadMode is not None:
            map_a = tl.where(mode == 2, 0.0, map_a)
            map_b = tl.where(mode == 2, 0.0, map_b)
        if Slots is not None and not MEAN:
            here = Maps + (b * H + h) * T * M
            _store_map(here, Slots, Order, map_a, rows, b, M, N, 0, NA)
            if NB > 0:
                _store_map(here, Slots, Order, map_b, rows, b, M, N, NA, NB)
        if Bits is not None:
            _store_bits(Bits, kept, mode, (b * H + h) * M + rows, in_m, col_a, in_a, col_b, in_b, N, NB)

        # The second product.
        if HeadMode is not None:
            after = tl.where(mode == 2, 0.0, after)
            pa = tl.where(mode == 2, 0.0, pa)
            pb = tl.where(mode == 2, 0.0, pb)
        pa = pa.to(Value.dtype.element_ty)
        pb = pb.to(Value.dtype.element_ty)
        if STREAM:
            for d in range(0, DV, VA):
                vd = _slice(Value, col_a, in_a, v_n * UNIT, d, VA, DV)
                o = tl.dot(pa, vd, input_precision=PRECISION)
                if NB > 0:
                    vd = _slice(Value, col_b, in_b, v_n * UNIT, d, VA, DV)
                    o = tl.dot(pb, vd, o, input_precision=PRECISION)
                _store_out(Out, o * after[:, None], rows, in_m, o_m * UNIT, d, VA, DV)
        else:
            o = tl.dot(pa, va0, input_precision=PRECISION)
            if NB > 0:
                o = tl.dot(pb, vb0, o, input_precision=PRECISION)
            _store_out(Out, o * after[:, None], rows, in_m, o_m * UNIT, 0, VA, DV)
            if VB > 0:
                o = tl.dot(pa, va1, input_precision=PRECISION)
                if NB > 0:
                    o = tl.dot(pb, vb1, o, input_precision=PRECISION)
                _store_out(Out, o * after[:, None], rows, in_m, o_m * UNIT, VA, VB, DV)
    return map_a, map_b


@triton.jit
def _token_side(
    Content, Gate, Phrases, Drop, b, h, mode, MODES: tl.constexpr, gate_b, gate_h, cols, inside,
    N: tl.constexpr, NA: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Of tile A's columns: which are content, their gates and phrase leaders; and k of step 4."""
    content = inside
    gate = tl.full((NA,), 1.0, tl.float32)
    leader = tl.full((NA,), -1, tl.int32)
    k = 0
    if Content is not None:
        content = tl.load(Content + b * N + cols, mask=inside, other=0) != 0
        if MODES:
            content = tl.where(mode == 0, content, False)
        if Gate is not None:
            gate = tl.load(Gate + b * gate_b + h * gate_h + cols, mask=content, other=1.0)
        if Phrases is not None:
            leader = tl.load(Phrases + b * N + cols, mask=content, other=-1)
        if DROP > 0:
            k = tl.load(Drop + b)
    return content, gate, leader, k


@triton.jit
def _columns(Order, b, N: tl.constexpr, first: tl.constexpr, count: tl.constexpr):
    """The caller's token index of the columns first .. first + count - 1, int64; those beyond N are 0."""
    column = first + tl.arange(0, count)
    if Order is not None:
        column = tl.load(Order + b * N + column, mask=column < N, other=0)
    return column.to(tl.int64)


@triton.jit
def _slice(X, rows, mask, stride, first, size: tl.constexpr, D: tl.constexpr):
    """X[rows, first : first + size], zero outside."""
    d = first + tl.arange(0, size)
    return tl.load(X + rows[:, None] * stride + d[None, :], mask=mask[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _logits(s, scale, Bias, bias_b, bias_h, bias_m, bias_n, b, h, rows, in_m, cols, in_n):
    """Logits in units of ln 2, for exp2; -inf outside."""
    s = s * scale
    if Bias is not None:
        at = Bias + b * bias_b + h * bias_h + rows[:, None] * bias_m + cols[None, :] * bias_n
        s += tl.load(at, mask=in_m[:, None] & in_n[None, :], other=0.0).to(tl.float32) * 1.4426950408889634
    return tl.where(in_n[None, :], s, -float("inf"))


@triton.jit
def _store_out(Out, o, rows, in_m, stride, first, size: tl.constexpr, DV: tl.constexpr):
    d = first + tl.arange(0, size)
    at = Out + rows[:, None] * stride + d[None, :]
    tl.store(at, o.to(Out.dtype.element_ty), mask=in_m[:, None] & (d < DV)[None, :])


@triton.jit
def _store_map(Maps, Slots, Order, p, rows, b, M, N: tl.constexpr, first: tl.constexpr, count: tl.constexpr):
    """Columns of p to the maps that were asked for, Maps (T, M)."""
    inside = first + tl.arange(0, count) < N
    slot = tl.load(Slots + _columns(Order, b, N, first, count), mask=inside, other=-1).to(tl.int64)
    tl.store(Maps + slot[None, :] * M + rows[:, None], p, mask=(rows < M)[:, None] & (slot >= 0)[None, :])


@triton.jit
def _store_bits(Bits, kept, mode, rows, in_m, col_a, in_a, col_b, in_b, N: tl.constexpr, NB: tl.constexpr):
    """Which entries survived, 32 tokens a word, in the caller's order of tokens; protected ones always."""
    WORDS: tl.constexpr = (N + 31) // 32
    for word in tl.static_range(WORDS):
        bits = pack_bits(kept & in_a[None, :], col_a, word)
        if NB > 0:
            bits += tl.sum(tl.where(in_b & (col_b // 32 == word), 1 << (col_b % 32).to(tl.int32), 0), 0)
        tl.store(Bits + rows * WORDS + word, tl.where(mode == 2, 0, bits), mask=in_m)
