"""Which rows of a call rounding may decide otherwise."""

from __future__ import annotations

import math

import torch

from sdattn_fast import reference as definition

__all__ = ["unsure_rows"]


def unsure_rows(
    query, key, program, near=5e-5, *, bias=None, gate=None, phrases=None, protected=None, active=None, heads=None,
    grid=None, seed=0, **_,
):  # fmt: skip
    """(B, H, M) bool: rows of a float64 call whose entries hang on a comparison closer than `near`, relative, directly
    or by a later smoothing or maximum. Takes the definition's arguments."""
    b, h, m, d = query.shape
    n = key.shape[2]
    logits = query @ key.transpose(-1, -2) * d**-0.5
    p = definition._softmax(logits if bias is None else logits + bias)
    content = torch.ones(b, n, dtype=torch.bool) if protected is None else ~protected
    c = content[:, None, None].expand_as(p)
    mass = definition._content_mass(p, c)
    p = p if gate is None else definition._gate(p, c, gate)
    p = p if phrases is None else definition._phrase_mean(p, content, phrases)
    unsure = torch.zeros_like(c)
    dropout, refine, whole = program.dropout, program.refine, p
    if dropout is not None:
        drop = definition._salient(p, c, dropout.ratio, dropout.axis, dropout.mode, seed)
        if dropout.mode == "topk" and drop.any():
            dim = -1 if dropout.axis == "token" else -2
            kth = torch.where(drop, p, math.inf).amin(dim, keepdim=True)
            highest_kept = torch.where(c & ~drop, p, -math.inf).amax(dim, keepdim=True)
            close = drop.any(dim, keepdim=True) & (kth - highest_kept <= near * kth)
            unsure |= close & c & ((p - kth).abs() <= 2 * near * kth)
        whole, p = p, p.masked_fill(drop, 0.0)
    rows = torch.zeros(b, h, m, dtype=torch.bool)
    for step in range(1 if refine is None else refine.steps):
        mass = definition._content_mass(p, c) if step else mass
        unsure |= rows[..., None]
        if refine is not None and refine.threshold is not None:
            dim = -1 if refine.axis == "token" else -2
            highest = torch.where(c, p, 0.0).amax(dim, keepdim=True)
            bound = refine.threshold * highest
            # What a dropped entry would be is known, and on the same axis it is as good as the maximum; what a smoothed
            # one would be is not.
            unknown = step > 0 or (dropout is not None and dropout.axis != refine.axis)
            may_move_the_maximum = (unsure & c & (whole >= highest)).any(dim, keepdim=True)
            may_move_the_maximum = may_move_the_maximum if step == 0 else (unsure & c).any(dim, keepdim=True)
            unsure |= c & (p > 0) & (((p - bound).abs() <= 4 * near * bound) | (may_move_the_maximum & unknown))
            p = p.masked_fill(definition._suppressed(p, c, refine.threshold, refine.axis), 0.0)
        p = definition._renormalise(p, c, mass, program.renormalize)
        rows = unsure.any(-1)
        if refine is not None and refine.sigma > 0:
            p = definition._smooth(p, grid, refine.sigma)
            if rows.any():
                rows = definition._smooth(rows.double()[..., None], grid, refine.sigma)[..., 0] > 0
    if active is not None:
        rows = rows & active[:, None, None]
    return rows if heads is None else rows & heads[:, None]
