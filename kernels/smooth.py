"""Step 7 of DESIGN.md on an output: one pass of a normalised Gaussian along one side of the picture.

Two launches make `scipy.ndimage.gaussian_filter`: radius floor(4*sigma + 0.5), edges by reflection, over and over where
the radius is larger than the picture. What lies between them is float32. The weights are made here, from sigma.
"""

import triton
import triton.language as tl


@triton.jit
def smooth_kernel(
    X, Y, Where, sigma, height, width, x_b, x_h, x_m, x_c, H, blocks,
    C: tl.constexpr, RADIUS: tl.constexpr, DOWN: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Y (B, H, height*width, C), contiguous, from X of that shape, any strides; DOWN: along the height, else the width.

    Where: (B, H) uint8, copied where 0; None: smoothed everywhere. blocks: of BP pixels, per channel block and (b, h).
    """
    CHANNELS: tl.constexpr = (C + BC - 1) // BC
    place = tl.program_id(0)
    bh = (place // (blocks * CHANNELS)).to(tl.int64)
    c = (place // blocks) % CHANNELS * BC + tl.arange(0, BC)
    m = (place % blocks).to(tl.int64) * BP + tl.arange(0, BP)
    # Not height.to: an argument that is 1 is a constant of Python's, which has no such method.
    pixels = (tl.zeros((), tl.int64) + height) * width
    inside = (m < pixels)[:, None] & (c < C)[None, :]
    X += bh // H * x_b + bh % H * x_h
    source = X + c[None, :].to(tl.int64) * x_c
    target = Y + bh * pixels * C + m[:, None] * C + c[None, :]

    smooths = 1
    if Where is not None:
        smooths = tl.load(Where + bh).to(tl.int32)
    if smooths != 0:
        row, column = m // width, m % width
        at = row if DOWN else column
        length = height if DOWN else width
        total = tl.zeros((BP, BC), tl.float32)
        weights = 0.0
        for i in range(2 * RADIUS + 1):
            t = i - RADIUS
            x = t / sigma
            weight = tl.exp(-0.5 * x * x)
            weights += weight
            # A floor modulo of what may be negative, with the truncating one that the hardware has.
            near = ((at + t) % (2 * length) + 2 * length) % (2 * length)
            near = tl.where(near < length, near, 2 * length - 1 - near)
            pixel = near * width + column if DOWN else row * width + near
            total += weight * tl.load(source + pixel[:, None] * x_m, mask=inside, other=0.0).to(tl.float32)
        tl.store(target, (total / weights).to(Y.dtype.element_ty), mask=inside)
    else:
        x = tl.load(source + m[:, None] * x_m, mask=inside, other=0.0)
        tl.store(target, x.to(Y.dtype.element_ty), mask=inside)
