"""Gradients of attention with the row program, from selection bits: nothing of a map's size is read but the bits.

The row is computed again from the logits, with the forward pass's decisions, and run backward. The columns are the two
tiles of `rows.py`. dK and dV are sums over rows: a launch program adds up the rows of its tiles in registers and leaves
one partial sum; `sum_kernel` adds those in order, so the same launch gives the same numbers, without atomics. The
partial sums are as many as fill the device, whatever M. What heads or entries share and every row has (the relevance, a
bias by rows) is `shared_kernel`'s: one program takes what adds to the same rows in its turn.
"""

import triton
import triton.language as tl

from .program import LEAST_SUM, phrase_means, softmax_parts
from .rows import _columns, _logits, _slice, _store_out, _token_side


@triton.jit
def backward_kernel(
    Query, Key, Value, Bias, GradOut, GradMaps, Bits, Order, Content, Gate, Phrases, HeadMode, Slots,
    GradQuery, Sums, GateSums, BiasSums,
    scale, scale_of_grad,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_m, dq_b, dq_h, dq_m,
    bias_b, bias_h, bias_m, bias_n, gate_b, gate_h,
    M, T, groups,
    H: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    NA: tl.constexpr, NB: tl.constexpr, DA: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, TILES: tl.constexpr,
    UNIT: tl.constexpr, STREAM: tl.constexpr, SLICES: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, RENORM: tl.constexpr, FINAL: tl.constexpr, MEAN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of TILES tiles of rows of one head, and their sums over rows. Arguments as `rows_kernel`'s; GradOut (B, H, M,
    DV) and GradMaps, as the maps, are what comes in.

    Sums: (B, H, groups, N, D + DV) float32, the channels of dK, if KEYS, then those of dV, if VALUES; GateSums and
    BiasSums: (B, H, groups, N) float32, the first zero where no content is. A pointer that is None is not wanted.
    scale_of_grad: of the logits. SLICES: one program has C of the channels of dQ, dK and dV, and computes the row
    again. STREAM: keys and values do not stay; products pass over them DA channels at a time.
    """
    place = tl.program_id(0)
    group = place % groups
    part = place // groups % SLICES
    first = part * C
    bh = (place // groups // SLICES).to(tl.int64)
    b, h = bh // H, bh % H
    Query += b * (q_b * UNIT) + h * (q_h * UNIT)
    Key += b * (k_b * UNIT) + h * (k_h * UNIT)
    Value += b * (v_b * UNIT) + h * (v_h * UNIT)
    GradOut += b * (g_b * UNIT) + h * (g_h * UNIT)
    if GradQuery is not None:
        GradQuery += b * (dq_b * UNIT) + h * (dq_h * UNIT)
    mode = 0
    if HeadMode is not None:
        mode = tl.load(HeadMode + h).to(tl.int32)

    NB1: tl.constexpr = NB if NB > 0 else 16
    in_a = tl.arange(0, NA) < N
    in_b = NA + tl.arange(0, NB1) < N
    col_a = _columns(Order, b, N, 0, NA)
    col_b = _columns(Order, b, N, NA, NB1)
    content, gate, leader, _ = _token_side(
        Content, Gate, Phrases, None, b, h, mode, HeadMode is not None, gate_b, gate_h, col_a, in_a, N, NA, 0
    )
    weight = _weight_of_maps(HeadMode, mode, H, MEAN)
    here = GradMaps
    if GradMaps is not None:
        here = GradMaps + _maps_of_head(b, h, M, T, H, MEAN)

    if not STREAM:
        ka = _slice(Key, col_a, in_a, k_n * UNIT, 0, C, D)
        kb = _slice(Key, col_b, in_b, k_n * UNIT, 0, C, D)
        va = _slice(Value, col_a, in_a, v_n * UNIT, 0, C, DV)
        vb = _slice(Value, col_b, in_b, v_n * UNIT, 0, C, DV)

    # What nobody reads is never computed.
    ka_sum = tl.zeros((NA, C), tl.float32)
    kb_sum = tl.zeros((NB1, C), tl.float32)
    va_sum, vb_sum = ka_sum, kb_sum
    gate_sum = tl.zeros((NA,), tl.float32)
    bias_a = tl.zeros((NA,), tl.float32)
    bias_b_sum = tl.zeros((NB1,), tl.float32)

    for tile in range(TILES):
        rows = (group * TILES + tile).to(tl.int64) * BM + tl.arange(0, BM)
        in_m = rows < M
        if STREAM:
            sa, sb = _products(
                Query, rows, in_m, q_m * UNIT, Key, col_a, in_a, col_b, in_b, k_n * UNIT, D, DA, NB, PRECISION
            )
            ga, gb = _products(
                GradOut, rows, in_m, g_m * UNIT, Value, col_a, in_a, col_b, in_b, v_n * UNIT, DV, DA, NB, PRECISION
            )
        q = _slice(Query, rows, in_m, q_m * UNIT, first, C, D)
        g = _slice(GradOut, rows, in_m, g_m * UNIT, first, C, DV)
        if not STREAM:
            sa = tl.dot(q, tl.trans(ka), input_precision=PRECISION)
            sb = tl.zeros((BM, NB1), tl.float32)
            ga = tl.dot(g, tl.trans(va), input_precision=PRECISION)
            gb = sb
            if NB > 0:
                sb = tl.dot(q, tl.trans(kb), input_precision=PRECISION)
                gb = tl.dot(g, tl.trans(vb), input_precision=PRECISION)
        sa = _logits(sa, scale, Bias, bias_b, bias_h, bias_m, bias_n, b, h, rows, in_m, col_a, in_a)
        if NB > 0:
            sb = _logits(sb, scale, Bias, bias_b, bias_h, bias_m, bias_n, b, h, rows, in_m, col_b, in_b)
        aa, ab, sa, sb, _relevance_a, _relevance_b, of_gate = _reverse(
            sa, sb, ga, gb, content, gate, leader, Bits, here, Slots, weight, bh, rows, in_m, col_a, in_a, col_b, in_b,
            mode, M, N, NB, Gate is not None, Phrases is not None, HeadMode is not None, RENORM, FINAL,
        )  # fmt: skip

        if GateSums is not None:
            gate_sum += of_gate
        if BiasSums is not None:
            bias_a += tl.sum(sa, 0)
            if NB > 0:
                bias_b_sum += tl.sum(sb, 0)
        ELEMENT: tl.constexpr = Query.dtype.element_ty
        sa, sb, aa, ab = sa.to(ELEMENT), sb.to(ELEMENT), aa.to(ELEMENT), ab.to(ELEMENT)
        if VALUES:
            va_sum = tl.dot(tl.trans(aa), g, va_sum, input_precision=PRECISION)
            if NB > 0:
                vb_sum = tl.dot(tl.trans(ab), g, vb_sum, input_precision=PRECISION)
        if KEYS:
            ka_sum = tl.dot(tl.trans(sa), q, ka_sum, input_precision=PRECISION)
            if NB > 0:
                kb_sum = tl.dot(tl.trans(sb), q, kb_sum, input_precision=PRECISION)
        if GradQuery is not None:
            if STREAM:
                for d in range(0, C, DA):
                    kd = _slice(Key, col_a, in_a, k_n * UNIT, first + d, DA, D)
                    dq = tl.dot(sa, kd, input_precision=PRECISION)
                    if NB > 0:
                        kd = _slice(Key, col_b, in_b, k_n * UNIT, first + d, DA, D)
                        dq = tl.dot(sb, kd, dq, input_precision=PRECISION)
                    _store_out(GradQuery, dq * scale_of_grad, rows, in_m, dq_m * UNIT, first + d, DA, D)
            else:
                dq = tl.dot(sa, ka, input_precision=PRECISION)
                if NB > 0:
                    dq = tl.dot(sb, kb, dq, input_precision=PRECISION)
                _store_out(GradQuery, dq * scale_of_grad, rows, in_m, dq_m * UNIT, 0, C, D)

    tokens = (bh * groups + group) * N
    OF_KEYS: tl.constexpr = D if KEYS else 0
    CHANNELS: tl.constexpr = OF_KEYS + DV if VALUES else OF_KEYS
    if KEYS:
        to = Sums + tokens * CHANNELS
        _store_sums(to, ka_sum * scale_of_grad, col_a, in_a, first, C, D, CHANNELS)
        if NB > 0:
            _store_sums(to, kb_sum * scale_of_grad, col_b, in_b, first, C, D, CHANNELS)
    if VALUES:
        to = Sums + tokens * CHANNELS + OF_KEYS
        _store_sums(to, va_sum, col_a, in_a, first, C, DV, CHANNELS)
        if NB > 0:
            _store_sums(to, vb_sum, col_b, in_b, first, C, DV, CHANNELS)
    if part == 0:
        if GateSums is not None:
            tl.store(GateSums + tokens + col_a, gate_sum, mask=content)
        if BiasSums is not None:
            tl.store(BiasSums + tokens + col_a, bias_a, mask=in_a)
            if NB > 0:
                tl.store(BiasSums + tokens + col_b, bias_b_sum, mask=in_b)


@triton.jit
def shared_kernel(
    Query, Key, Value, Bias, GradOut, GradMaps, Bits, Order, Content, Gate, Phrases, HeadMode, Slots,
    GradBias, Relevance, RelevanceSlots, RelevanceHeads,
    scale,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_m,
    bias_b, bias_h, bias_m, bias_n, db_b, db_h, db_m, db_n, gate_b, gate_h,
    M, T, TOKENS, tiles, heads,
    H: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    NA: tl.constexpr, NB: tl.constexpr, DA: tl.constexpr, BM: tl.constexpr, UNIT: tl.constexpr,
    ENTRIES: tl.constexpr, HEADS: tl.constexpr, RENORM: tl.constexpr, FINAL: tl.constexpr, MEAN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to what several heads or entries share of one tile of rows, one after the other.

    GradBias: by its strides db_*, 0 where the bias is expanded, float32, zero before; of ENTRIES batch entries and
    HEADS heads a program. Its columns are summed first where db_n is 0. Relevance: (B, TOKENS, M) float32, zero before,
    of the heads that RelevanceHeads (H,) uint8 has, None for all; RelevanceSlots: (N,) int32. heads: H / HEADS.
    """
    place = tl.program_id(0)
    rows = (place % tiles).to(tl.int64) * BM + tl.arange(0, BM)
    in_m = rows < M
    first_h = place // tiles % heads * HEADS
    first_b = place // tiles // heads * ENTRIES
    NB1: tl.constexpr = NB if NB > 0 else 16
    in_a = tl.arange(0, NA) < N
    in_b = NA + tl.arange(0, NB1) < N
    for i in range(ENTRIES * HEADS):
        b = (first_b + i // HEADS).to(tl.int64)
        h = (first_h + i % HEADS).to(tl.int64)
        bh = b * H + h
        mode = 0
        if HeadMode is not None:
            mode = tl.load(HeadMode + h).to(tl.int32)
        col_a = _columns(Order, b, N, 0, NA)
        col_b = _columns(Order, b, N, NA, NB1)
        content, gate, leader, _ = _token_side(
            Content, Gate, Phrases, None, b, h, mode, HeadMode is not None, gate_b, gate_h, col_a, in_a, N, NA, 0
        )
        weight = _weight_of_maps(HeadMode, mode, H, MEAN)
        here = GradMaps
        if GradMaps is not None:
            here = GradMaps + _maps_of_head(b, h, M, T, H, MEAN)
        query = Query + b * (q_b * UNIT) + h * (q_h * UNIT)
        key = Key + b * (k_b * UNIT) + h * (k_h * UNIT)
        value = Value + b * (v_b * UNIT) + h * (v_h * UNIT)
        grad = GradOut + b * (g_b * UNIT) + h * (g_h * UNIT)
        sa, sb = _products(
            query, rows, in_m, q_m * UNIT, key, col_a, in_a, col_b, in_b, k_n * UNIT, D, DA, NB, PRECISION
        )
        ga, gb = _products(
            grad, rows, in_m, g_m * UNIT, value, col_a, in_a, col_b, in_b, v_n * UNIT, DV, DA, NB, PRECISION
        )
        sa = _logits(sa, scale, Bias, bias_b, bias_h, bias_m, bias_n, b, h, rows, in_m, col_a, in_a)
        if NB > 0:
            sb = _logits(sb, scale, Bias, bias_b, bias_h, bias_m, bias_n, b, h, rows, in_m, col_b, in_b)
        _, _, sa, sb, ra, rb, _ = _reverse(
            sa, sb, ga, gb, content, gate, leader, Bits, here, Slots, weight, bh, rows, in_m, col_a, in_a, col_b, in_b,
            mode, M, N, NB, Gate is not None, Phrases is not None, HeadMode is not None, RENORM, FINAL,
        )  # fmt: skip
        if Relevance is not None:
            counts = 1
            if RelevanceHeads is not None:
                counts = tl.load(RelevanceHeads + h).to(tl.int32)
            to = Relevance + b * TOKENS * M
            if counts != 0:
                _add_map(to, RelevanceSlots, ra, rows, in_m, col_a, in_a, M)
                if NB > 0:
                    _add_map(to, RelevanceSlots, rb, rows, in_m, col_b, in_b, M)
        if GradBias is not None:
            to = GradBias + b * db_b + h * db_h + rows * db_m
            if db_n == 0:
                total = tl.sum(sa, 1)
                if NB > 0:
                    total += tl.sum(sb, 1)
                tl.store(to, tl.load(to, mask=in_m, other=0.0) + total, mask=in_m)
            else:
                _add_columns(to, db_n, sa, in_m, col_a, in_a)
                if NB > 0:
                    _add_columns(to, db_n, sb, in_m, col_b, in_b)
        # The next head reads what this one wrote, perhaps by other threads.
        tl.debug_barrier()


@triton.jit
def sum_kernel(
    Sums, First, Second, groups, f_b, f_h, f_n, s_b, s_h, s_n, blocks,
    H: tl.constexpr, N: tl.constexpr, CF: tl.constexpr, CS: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Sums (B, H, groups, N, CF + CS) float32 over groups, in their order: channels before CF to First (B, H, N, CF),
    the others to Second (B, H, N, CS), by their strides. None: not wanted, and its count of channels is 0."""
    C: tl.constexpr = CF + CS
    CHANNELS: tl.constexpr = (C + BC - 1) // BC
    place = tl.program_id(0)
    bh = (place // (blocks * CHANNELS)).to(tl.int64)
    b, h = bh // H, bh % H
    c = (place // blocks % CHANNELS * BC + tl.arange(0, BC)).to(tl.int64)
    n = (place % blocks * BN + tl.arange(0, BN)).to(tl.int64)
    inside = (n < N)[:, None] & (c < C)[None, :]
    at = Sums + bh * groups * N * C + n[:, None] * C + c[None, :]
    total = tl.zeros((BN, BC), tl.float32)
    group = tl.zeros((), tl.int32)
    while group < groups:
        total += tl.load(at, mask=inside, other=0.0)
        at += N * C
        group += 1
    if First is not None:
        to = First + b * f_b + h * f_h + n[:, None] * f_n + c[None, :]
        tl.store(to, total.to(First.dtype.element_ty), mask=inside & (c < CF)[None, :])
    if Second is not None:
        to = Second + b * s_b + h * s_h + n[:, None] * s_n + c[None, :] - CF
        tl.store(to, total.to(Second.dtype.element_ty), mask=inside & (c >= CF)[None, :])


@triton.jit
def _reverse(
    sa, sb, ga, gb, content, gate, leader, Bits, Maps, Slots, weight, bh, rows, in_m, col_a, in_a, col_b, in_b, mode, M,
    N: tl.constexpr, NB: tl.constexpr, GATE: tl.constexpr, PHRASES: tl.constexpr, MODES: tl.constexpr,
    RENORM: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """From logits in units of ln 2 and the gradients of the program's probabilities, for both tiles: the program's
    probabilities, the gradients of the logits, probability times what of its gradient is positive, and, of tile A's
    columns, the gradients of the gate, summed over rows.

    With y what step 5 left and step 6 a factor on it, dy = (da - mean) * factor: the factor depends on all of y. With
    "content" the mean is the gradient of the mass to regain, too.
    """
    p, pb, total = softmax_parts(sa, sb, NB)
    share = tl.where(total == 0, 0.0, 1.0 / total)[:, None]
    p = p * share
    pb = pb * share
    if Maps is not None and FINAL:
        ga = _add_grad_of_maps(ga, Maps, Slots, weight, rows, in_m, col_a, in_a, M)
        if NB > 0:
            gb = _add_grad_of_maps(gb, Maps, Slots, weight, rows, in_m, col_b, in_b, M)

    # Steps 2 to 6 again.
    c = content[None, :]
    a = p
    b = pb
    if GATE:
        a = a * gate[None, :]
    if PHRASES:
        a = phrase_means(a, leader)
    if Bits is not None:
        a = tl.where(_kept(Bits, bh * M + rows, in_m, col_a, in_a, N), a, 0.0)
    if RENORM == 1:
        mass = tl.sum(tl.where(c, p, 0.0), 1)
        left = tl.sum(tl.where(c, a, 0.0), 1)
        by = 1.0 / tl.where(left < LEAST_SUM, 1.0, left)
        mean = tl.where(left < LEAST_SUM, 0.0, tl.sum(tl.where(c, ga * a, 0.0), 1) * by)[:, None]
        factor = (mass * by)[:, None]
        a = tl.where(c, a * factor, a)
    if RENORM == 2:
        left = tl.sum(a, 1)
        dot = tl.sum(ga * a, 1)
        if NB > 0:
            left += tl.sum(b, 1)
            dot += tl.sum(gb * b, 1)
        by = 1.0 / tl.where(left < LEAST_SUM, 1.0, left)
        mean = tl.where(left < LEAST_SUM, 0.0, dot * by)[:, None]
        factor = by[:, None]
        a = a * factor
        b = b * factor
    ra = a * tl.maximum(ga, 0.0)
    rb = b * tl.maximum(gb, 0.0)

    # And back.
    if RENORM == 1:
        ga = tl.where(c, (ga - mean) * factor, ga)
    if RENORM == 2:
        ga = (ga - mean) * factor
        gb = (gb - mean) * factor
    if Bits is not None:
        ga = tl.where(_kept(Bits, bh * M + rows, in_m, col_a, in_a, N), ga, 0.0)
    if PHRASES:
        ga = phrase_means(ga, leader)  # a mean is its own transpose
    of_gate = tl.sum(p * ga, 0)
    if GATE:
        ga = ga * gate[None, :]
    if RENORM == 1:
        ga = tl.where(c, ga + mean, ga)
    if Maps is not None and not FINAL:
        ga = _add_grad_of_maps(ga, Maps, Slots, weight, rows, in_m, col_a, in_a, M)
        if NB > 0:
            gb = _add_grad_of_maps(gb, Maps, Slots, weight, rows, in_m, col_b, in_b, M)
    dot = tl.sum(p * ga, 1)
    if NB > 0:
        dot += tl.sum(pb * gb, 1)
    ga = p * (ga - dot[:, None])
    gb = pb * (gb - dot[:, None])
    if MODES:
        zero = mode == 2
        a, b = tl.where(zero, 0.0, a), tl.where(zero, 0.0, b)
        ga, gb = tl.where(zero, 0.0, ga), tl.where(zero, 0.0, gb)
        ra, rb = tl.where(zero, 0.0, ra), tl.where(zero, 0.0, rb)
    return a, b, ga, gb, ra, rb, of_gate


@triton.jit
def _products(
    X, rows, in_m, x_m, Y, col_a, in_a, col_b, in_b, y_n, D: tl.constexpr, DA: tl.constexpr, NB: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of X times the columns of Y, D in slices of DA; the second tile is zero where there is none."""
    a = tl.zeros((rows.shape[0], col_a.shape[0]), tl.float32)
    b = tl.zeros((rows.shape[0], col_b.shape[0]), tl.float32)
    for d in range(0, D, DA):
        x = _slice(X, rows, in_m, x_m, d, DA, D)
        a = tl.dot(x, tl.trans(_slice(Y, col_a, in_a, y_n, d, DA, D)), a, input_precision=PRECISION)
        if NB > 0:
            b = tl.dot(x, tl.trans(_slice(Y, col_b, in_b, y_n, d, DA, D)), b, input_precision=PRECISION)
    return a, b


@triton.jit
def _kept(Bits, at_row, in_m, cols, inside, N: tl.constexpr):
    """Which entries the forward pass kept. Read twice rather than held across row reductions."""
    WORDS: tl.constexpr = (N + 31) // 32
    at = Bits + at_row[:, None] * WORDS + (cols // 32)[None, :]
    words = tl.load(at, mask=in_m[:, None] & inside[None, :], other=0)
    return ((words >> (cols % 32).to(tl.int32)[None, :]) & 1) != 0


@triton.jit
def _maps_of_head(b, h, M, T, H: tl.constexpr, MEAN: tl.constexpr):
    """How many elements into the gradients of the captured maps this head's begin; b and h are int64."""
    return b * T * M if MEAN else (b * H + h) * T * M


@triton.jit
def _weight_of_maps(HeadMode, mode, H: tl.constexpr, MEAN: tl.constexpr):
    """The share of a head in the captured maps: 1 where each head has its own, else its share of the mean."""
    weight = 1.0
    if MEAN:
        weight = 1.0 / H
        if HeadMode is not None:
            heads = 0
            for head in range(H):
                heads += (tl.load(HeadMode + head) == 0).to(tl.int32)
            weight = tl.where(mode == 0, 1.0 / tl.maximum(heads, 1).to(tl.float32), 0.0)
    return weight


@triton.jit
def _add_grad_of_maps(g, Maps, Slots, weight, rows, in_m, cols, inside, M):
    slot = tl.load(Slots + cols, mask=inside, other=-1).to(tl.int64)
    mask = in_m[:, None] & (slot >= 0)[None, :]
    return g + weight * tl.load(Maps + slot[None, :] * M + rows[:, None], mask=mask, other=0.0)


@triton.jit
def _add_map(Maps, Slots, x, rows, in_m, cols, inside, M):
    slot = tl.load(Slots + cols, mask=inside, other=-1).to(tl.int64)
    mask = in_m[:, None] & (slot >= 0)[None, :]
    at = Maps + slot[None, :] * M + rows[:, None]
    tl.store(at, tl.load(at, mask=mask, other=0.0) + x, mask=mask)


@triton.jit
def _add_columns(Rows, stride, x, in_m, cols, inside):
    at = Rows[:, None] + cols[None, :] * stride
    mask = in_m[:, None] & inside[None, :]
    tl.store(at, tl.load(at, mask=mask, other=0.0) + x, mask=mask)


@triton.jit
def _store_sums(Sums, x, cols, inside, first, size: tl.constexpr, D: tl.constexpr, C: tl.constexpr):
    """Columns of a partial sum to their tokens' rows of C channels."""
    d = first + tl.arange(0, size)
    tl.store(Sums + cols[:, None] * C + d[None, :], x, mask=inside[:, None] & (d < D)[None, :])
