"""The definition: docs/design.md, "The row program", in plain torch, step by step, on the whole map.

Obvious code, any floating dtype, differentiable. Every fast path is held against this file. It stores maps of
B*H*M*N numbers and is slow; nobody should run it for speed.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .program import Capture, Program
from .streams import to_device

__all__ = ["reference_attention", "row_program", "philox_uniform", "gaussian_kernel"]


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    program: Program = Program(),
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    gate: Tensor | None = None,
    phrases: Tensor | None = None,
    protected: Tensor | None = None,
    active: Tensor | None = None,
    heads: Tensor | None = None,
    inactive_heads: str = "plain",
    grid: tuple[int, int] | None = None,
    seed: int | Tensor = 0,
    capture: Capture | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention with a program, in plain PyTorch: the definition that every backend is tested against.

    It stores whole maps of B * H * M * N numbers, so it is slow. Arguments are not checked; `semantic_attention` with
    ``backend="reference"`` checks them.

    Args:
        query: (B, H, M, D) tensor of any floating dtype; computed in float32 at least.
        key: (B, H, N, D) tensor.
        value: (B, H, N, Dv) tensor.
        program: What happens to the rows of the map.
        bias: Tensor that broadcasts to (B, H, M, N), added to the logits.
        scale: Factor of the logits. None: 1 / sqrt(D).
        gate: (B, N) or (B, H, N) tensor, bool or floating and >= 0.
        phrases: (B, N) integer tensor, -1: no phrase.
        protected: (B, N) bool tensor. None: all tokens are content.
        active: (B,) bool tensor. None: all entries.
        heads: (H,) bool tensor of the active heads. None: all.
        inactive_heads: "plain" or "zero".
        grid: (height, width) with height * width == M, needed where ``program.refine.sigma > 0``.
        seed: Seeds of random dropout, as `philox_uniform` takes them.
        capture: Which maps to return. None: no maps.

    Returns:
        The output (B, H, M, Dv) in the value's dtype, and the maps: float32, (B, T, M) or (B, H, T, M); None without
        `capture`.

    Examples:
        >>> query, key, value = (torch.randn(1, 8, n, 40, dtype=torch.float64) for n in (256, 77, 77))
        >>> out, _ = reference_attention(query, key, value, Program(SalienceDropout(0.1)))

    Source: docs/design.md, "The row program".
    """
    high = torch.promote_types(query.dtype, torch.float32)
    b, h, _, d = query.shape
    n = key.shape[2]

    # Step 1: softmax.
    logits = query.to(high) @ key.to(high).transpose(-1, -2) * (d**-0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + bias.to(high)
    p = _softmax(logits)
    softmaxed = p

    # Steps 2 to 7, where the entry and the head are active.
    is_on = torch.ones(b, dtype=torch.bool, device=p.device) if active is None else active
    is_content = torch.ones(b, n, dtype=torch.bool, device=p.device) if protected is None else ~protected
    is_head = torch.ones(h, dtype=torch.bool, device=p.device) if heads is None else heads

    changed = row_program(p, program, is_content, gate, phrases, grid, seed)
    p = torch.where((is_on[:, None] & is_head)[:, :, None, None], changed, p)
    if inactive_heads == "zero":
        p = torch.where(is_head[:, None, None], p, 0.0)
        softmaxed = torch.where(is_head[:, None, None], softmaxed, 0.0)

    # Step 8: output.
    out = (p @ value.to(high)).to(value.dtype)
    if capture is None:
        return out, None
    return out, _captured(softmaxed if capture.stage == "softmax" else p, capture, is_head)


def row_program(
    p: Tensor,
    program: Program,
    content: Tensor,
    gate: Tensor | None = None,
    phrases: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    seed: int | Tensor = 0,
) -> Tensor:
    """Steps 2 to 7 of the definition: the program on a map of probabilities.

    Args:
        p: (B, H, M, N) floating tensor, the map after softmax.
        program: What happens to its rows.
        content: (B, N) bool tensor: the tokens that the program changes.
        gate: (B, N) or (B, H, N) tensor of factors. None: no gate.
        phrases: (B, N) integer tensor, -1: no phrase. None: no phrases.
        grid: (height, width) with height * width == M, needed where ``program.refine.sigma > 0``.
        seed: Seeds of random dropout, as `philox_uniform` takes them.

    Returns:
        The changed map, (B, H, M, N).

    Examples:
        >>> p = torch.tensor([[[[0.5, 0.1, 0.2, 0.2]]]])  # one pixel, four tokens
        >>> content = torch.tensor([[False, True, True, False]])
        >>> row_program(p, Program(), content, gate=torch.tensor([[1.0, 2.0, 1.0, 1.0]]))
        tensor([[[[0.5000, 0.2000, 0.2000, 0.2000]]]])

    Source: docs/design.md, "The row program".
    """
    c = content[:, None, None, :]
    mass = _content_mass(p, c)
    if gate is not None:  # step 2
        p = _gate(p, c, gate)
    if phrases is not None:  # step 3
        p = _phrase_mean(p, content, phrases)
    if program.dropout is not None:  # step 4
        drop = _salient(p, c, program.dropout.ratio, program.dropout.axis, program.dropout.mode, seed)
        p = p.masked_fill(drop, 0.0)

    refine = program.refine
    for step in range(1 if refine is None else refine.steps):
        if step > 0:
            mass = _content_mass(p, c)
        if refine is not None and refine.threshold is not None:  # step 5
            p = p.masked_fill(_suppressed(p, c, refine.threshold, refine.axis), 0.0)
        p = _renormalise(p, c, mass, program.renormalize)  # step 6
        if refine is not None and refine.sigma > 0:  # step 7
            assert grid is not None
            p = _smooth(p, grid, refine.sigma)
    return p


# Step 1: softmax.


def _softmax(logits: Tensor) -> Tensor:
    nothing = (logits == -math.inf).all(-1, keepdim=True)
    return torch.softmax(logits.masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0)


def _content_mass(p: Tensor, c: Tensor) -> Tensor:
    return torch.where(c, p, 0.0).sum(-1, keepdim=True)


# Step 2: gate.


def _gate(p: Tensor, c: Tensor, gate: Tensor) -> Tensor:
    g = gate.to(p.dtype)
    g = g[:, None, None, :] if g.dim() == 2 else g[:, :, None, :]
    return torch.where(c, p * g, p)


# Step 3: phrases.


def _phrase_mean(p: Tensor, content: Tensor, phrases: Tensor) -> Tensor:
    member = content & (phrases >= 0)
    together = (phrases[:, :, None] == phrases[:, None, :]) & member[:, :, None] & member[:, None, :]
    size = together.sum(-1, keepdim=True).clamp(min=1)
    mean = p @ (together.to(p.dtype) / size).transpose(-1, -2)[:, None]
    # Every member takes its phrase's first member's sum, so that members tie exactly whatever the product's rounding.
    tokens = torch.arange(p.shape[-1], device=p.device)
    first = torch.where(together, tokens, p.shape[-1]).amin(-1) if p.shape[-1] else phrases
    first = torch.where(member, first, tokens)[:, None, None, :].expand(p.shape)
    return torch.where(member[:, None, None, :], mean.gather(-1, first), p)


# Step 4: salience dropout.


def _salient(p: Tensor, c: Tensor, ratio: float, axis: str, mode: str, seed: int | Tensor) -> Tensor:
    c = c.expand_as(p)
    if mode == "random":
        return c & (philox_uniform(seed, p.shape, p.device) < ratio)
    dim = -1 if axis == "token" else -2
    count = (
        c.sum(dim, keepdim=True) if axis == "token" else torch.full_like(c[..., :1, :], p.shape[-2], dtype=torch.long)
    )
    k = torch.floor(ratio * count.to(torch.float64) + 1e-9).long()
    if p.shape[dim] == 0:
        return torch.zeros_like(c)
    ranked = p.detach().masked_fill(~c, -math.inf).sort(dim, descending=True).values
    kth = ranked.gather(dim, (k - 1).clamp(min=0))
    return c & (k > 0) & (p.detach() >= kth)


def philox_uniform(seed: int | Tensor, shape: tuple[int, ...] | torch.Size, device: torch.device) -> Tensor:
    """Uniform random numbers of random dropout: the upper 24 bits of Philox4x32-10's first word, divided by 2**24.

    The key is the entry's seed, as its low and high 32 bits, and the counter of each number is (n, m, h, 0): what is
    drawn for an entry does not depend on the batch around it.

    Args:
        seed: An int64 tensor (B,), a seed for each entry. An int s in [0, 2**63), or a tensor with one element, stands
            for s, s + 1, ..., s + B - 1.
        shape: (B, H, M, N).
        device: Device of the result.

    Returns:
        A float32 tensor of that shape, in [0, 1).

    Examples:
        >>> u = philox_uniform(0, (1, 8, 256, 77), torch.device("cpu"))

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; docs/design.md, "Step 4: salience
    dropout".
    """
    low32 = 0xFFFFFFFF
    seeds = torch.as_tensor(seed, dtype=torch.int64, device=device).reshape(-1)
    if len(seeds) == 1:
        seeds = seeds + torch.arange(shape[0], device=device)
    k0, k1 = ((word & low32)[:, None, None, None] for word in (seeds, seeds >> 32))
    index = [torch.arange(s, dtype=torch.int64, device=device) for s in shape[1:]]
    x2, x1, x0 = torch.meshgrid(*index, indexing="ij")
    x3 = torch.zeros_like(x0)
    for _ in range(10):
        hi0, lo0 = _mul32(0xD2511F53, x0)
        hi1, lo1 = _mul32(0xCD9E8D57, x2)
        x0, x1, x2, x3 = hi1 ^ x1 ^ k0, lo1, hi0 ^ x3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & low32, (k1 + 0xBB67AE85) & low32
    return (x0 >> 8).to(torch.float32) * 2.0**-24


def _mul32(a: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of the 64-bit product of two unsigned 32-bit numbers, in int64 without overflow."""
    low = (x & 0xFFFF) * a
    high = (x >> 16) * a + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


# Step 5: suppression.


def _suppressed(p: Tensor, c: Tensor, threshold: float, axis: str) -> Tensor:
    if p.numel() == 0:
        return torch.zeros_like(p, dtype=torch.bool)
    q = p.detach().masked_fill(~c, 0.0)
    highest = q.amax(-1 if axis == "token" else -2, keepdim=True)
    return c & (q <= threshold * highest)


# Step 6: renormalization. A smaller sum counts as an empty one: in float32 its inverse may be infinite.

LEAST_SUM = 1e-30


def _renormalise(p: Tensor, c: Tensor, mass: Tensor, how: str) -> Tensor:
    if how == "none":
        return p
    if how == "row":
        total = p.sum(-1, keepdim=True)
        return p / torch.where(total < LEAST_SUM, 1.0, total)
    left = _content_mass(p, c)
    return torch.where(c, p * (mass / torch.where(left < LEAST_SUM, 1.0, left)), p)


# Step 7: smoothing.


def _smooth(p: Tensor, grid: tuple[int, int], sigma: float) -> Tensor:
    b, h, m, n = p.shape
    maps = p.transpose(-1, -2).reshape(b * h * n, 1, *grid)
    kernel = gaussian_kernel(sigma, dtype=p.dtype, device=p.device)
    maps = _convolve_reflected(maps, kernel, 2)
    maps = _convolve_reflected(maps, kernel, 3)
    return maps.reshape(b, h, n, m).transpose(-1, -2)


def gaussian_kernel(sigma: float, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
    """The one-dimensional Gaussian of `scipy.ndimage.gaussian_filter`.

    Args:
        sigma: Standard deviation in pixels, > 0.
        dtype: Dtype of the result, which is computed in float64.
        device: Device of the result.

    Returns:
        (2 * radius + 1,) weights with the sum 1; the radius is ``floor(4 * sigma + 0.5)``.

    Examples:
        >>> gaussian_kernel(0.5).shape
        torch.Size([5])

    Source: docs/design.md, "Step 7: smoothing".
    """
    radius = int(4.0 * sigma + 0.5)
    x = torch.arange(-radius, radius + 1, dtype=torch.float64, device=device)
    weight = torch.exp(-0.5 * (x / sigma) ** 2)
    return (weight / weight.sum()).to(dtype)


def _convolve_reflected(maps: Tensor, kernel: Tensor, dim: int) -> Tensor:
    """Convolve along one spatial dimension, edges reflected (d c b a | a b c d | d c b a), over and over if need be."""
    radius, length = kernel.numel() // 2, maps.shape[dim]
    if maps.numel() == 0:
        return maps
    place = torch.arange(-radius, length + radius, device=maps.device) % (2 * length)
    place = torch.where(place < length, place, 2 * length - 1 - place)
    shape = (1, 1, -1, 1) if dim == 2 else (1, 1, 1, -1)
    return F.conv2d(maps.index_select(dim, place), kernel.reshape(shape))


def _captured(p: Tensor, capture: Capture, is_head: Tensor) -> Tensor:
    tokens = list(range(p.shape[-1])) if capture.tokens is None else list(capture.tokens)
    maps = p[..., to_device(torch.tensor(tokens, dtype=torch.int64), p.device)].to(torch.float32).transpose(-1, -2)
    if capture.reduce == "none":
        return maps
    weight = is_head.to(torch.float32)
    return torch.einsum("bhtm,h->btm", maps, weight / weight.sum().clamp(min=1.0))
