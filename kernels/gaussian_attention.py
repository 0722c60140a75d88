"""The filter of a fully connected CRF: out_i = sum_j exp2(-|f_i - f_j|^2) v_j, without a P x P array.

Attention whose weights need no softmax, since the caller normalises. Distances are sums of squared differences, in
float32: as dot products they would lose digits to cancellation where features are large.
"""

import triton
import triton.language as tl


@triton.jit
def gaussian_kernel(
    Features, Values, Out, P, D: tl.constexpr, L: tl.constexpr, BL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BM rows of Out (P, L) over all P pixels, BN at a time; Features (P, D), Values (P, L), all contiguous float32."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    labels = tl.arange(0, BL)
    total = tl.zeros((BM, BL), tl.float32)
    first = tl.zeros((), tl.int32)
    while first < P:
        keys = first.to(tl.int64) + tl.arange(0, BN)
        apart = tl.zeros((BM, BN), tl.float32)
        for k in tl.static_range(D):
            a = tl.load(Features + rows * D + k, mask=rows < P, other=0.0)
            b = tl.load(Features + keys * D + k, mask=keys < P, other=0.0)
            difference = a[:, None] - b[None, :]
            apart += difference * difference
        inside = (keys < P)[:, None] & (labels < L)[None, :]
        values = tl.load(Values + keys[:, None] * L + labels[None, :], mask=inside, other=0.0)
        total = tl.dot(tl.exp2(-apart), values, total, input_precision=PRECISION)
        first += BN
    tl.store(Out + rows[:, None] * L + labels[None, :], total, mask=(rows < P)[:, None] & (labels < L)[None, :])
