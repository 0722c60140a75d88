"""Smoothing of an output: one pass of a normalised Gaussian along one side of the picture.

Two launches make `scipy.ndimage.gaussian_filter`: radius floor(4*sigma + 0.5), edges by reflection, over and over where
the radius is larger than the picture. What lies between them is float32. The weights are made here, from sigma.

Source: docs/design.md, "Step 7: smoothing".
"""

import triton
import triton.language as tl


@triton.jit
def smooth_kernel(
    X, Y, Where, sigma, height, width, x_b, x_h, x_m, x_c, H, blocks,
    C: tl.constexpr, RADIUS: tl.constexpr, DOWN: tl.constexpr, NEAR: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Y (B, H, height*width, C), contiguous, from X of that shape; DOWN: along the height, else the width.

    x_b, x_h, x_m are X's strides over UNIT, x_c its last one. NEAR: the radius is within the picture, so that an edge
    reflects once. Where: (B, H) uint8, copied where 0; None: smoothed everywhere. blocks: of BP pixels, per channel
    block and (b, h).
    """
    CHANNELS: tl.constexpr = (C + BC - 1) // BC
    place = tl.program_id(0)
    bh = (place // (blocks * CHANNELS)).to(tl.int64)
    c = (place // blocks) % CHANNELS * BC + tl.arange(0, BC)
    # A picture's pixels are counted in 32 bits: a GPU divides by 64 bits slowly.
    m = place % blocks * BP + tl.arange(0, BP)
    pixels = height * width
    inside = (m < pixels)[:, None] & (c < C)[None, :]
    X += (bh // H * x_b + bh % H * x_h) * UNIT
    source = X + c[None, :].to(tl.int64) * x_c
    target = Y + (bh * pixels + m)[:, None] * C + c[None, :]

    smooths = 1
    if Where is not None:
        smooths = tl.load(Where + bh).to(tl.int32)
    if smooths != 0:
        row, column = m // width, m % width
        total = tl.zeros((BP, BC), tl.float32)
        weights = 0.0
        if RADIUS <= 8:  # unrolled, the loads do not wait for each other
            for i in tl.static_range(2 * RADIUS + 1):
                weight, x = _tap(source, inside, i - RADIUS, sigma, row, column, height, width, x_m, DOWN, NEAR, UNIT)
                weights += weight
                total += weight * x
        else:
            for i in range(2 * RADIUS + 1):
                weight, x = _tap(source, inside, i - RADIUS, sigma, row, column, height, width, x_m, DOWN, NEAR, UNIT)
                weights += weight
                total += weight * x
        tl.store(target, (total / weights).to(Y.dtype.element_ty), mask=inside)
    else:
        same = tl.load(source + (m.to(tl.int64) * x_m)[:, None] * UNIT, mask=inside, other=0.0)
        tl.store(target, same.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _tap(
    source, inside, t, sigma, row, column, height, width, x_m, DOWN: tl.constexpr, NEAR: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """The weight of the pixels t away, and what they are."""
    x = t / sigma
    near = (row if DOWN else column) + t
    length = height if DOWN else width
    if NEAR:
        near = tl.where(near < 0, -1 - near, near)
    else:
        # A floor modulo of what may be negative, with the truncating one that the hardware has.
        near = (near % (2 * length) + 2 * length) % (2 * length)
    near = tl.where(near < length, near, 2 * length - 1 - near)
    pixel = near * width + column if DOWN else row * width + near
    there = tl.load(source + (pixel.to(tl.int64) * x_m)[:, None] * UNIT, mask=inside, other=0.0)
    return tl.exp(-0.5 * x * x), there.to(tl.float32)
