"""Tile sizes of the row kernels. Nothing is tuned at run time: `choose_tiles` is a table in the shape of a function."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

__all__ = ["ForwardTiles", "choose_tiles", "next_power_of_2", "split"]


@dataclass(frozen=True)
class ForwardTiles:
    """The constants of a launch. NA, NB: columns of the two tiles; DA, DB, VA, VB: slices of head dimension and value
    dimension; BM: rows; TILES: tiles of rows that one program walks over; STREAM: keys and values do not stay.
    registers: that a thread may have at most, on NVIDIA's; None: as the compiler likes."""

    NA: int
    NB: int
    DA: int
    DB: int
    VA: int
    VB: int
    BM: int
    TILES: int
    STREAM: bool
    num_warps: int
    num_stages: int
    registers: int | None

    def constants(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("NA", "NB", "DA", "DB", "VA", "VB", "BM", "TILES", "STREAM")}


@functools.cache
def choose_tiles(
    n: int,
    d: int,
    dv: int,
    size: int,
    most_content: int | None,
    pixels: int,
    heads: int,
    processors: int,
    mean: bool,
    lean: bool = False,
) -> ForwardTiles:
    """Tiles for n tokens, head dimensions d and dv of `size` bytes a number. most_content: None for plain attention;
    heads: B * H, processors: of the device; mean: one program walks over all heads; lean: no bias, maps and bits."""
    na, nb = split(n)
    if most_content is not None:
        na = min(next_power_of_2(most_content), next_power_of_2(n))
        nb = next_power_of_2(n - na) if n > na else 0
    da, db = split(d)
    va, vb = split(dv)
    wide = na + nb > 160  # columns that four warps cannot hold
    # Float32 is split in three for the tensor cores, which leaves no room in registers either.
    stream = size == 4 or na >= 128 or wide or da + db + va + vb > 192
    bm, stages = (32 if wide or size == 4 else 64), 1
    if stream:
        slice_ = 16 if wide and size == 4 else 32
        da, db, va, vb = min(slice_, next_power_of_2(d)), 0, min(slice_, next_power_of_2(dv)), 0
        bm, stages = (16, 1) if wide and size == 4 else (bm, 2 if wide or size == 4 else 3)
    if bm == 64 and -(-pixels // bm) * heads < processors:
        bm = 32
    # Without a bound the compiler takes some registers more, and a program less fits a multiprocessor. These spill
    # nothing, or 8 bytes; with a bias, maps or bits it would be hundreds.
    registers = None
    if lean and most_content is not None and bm == 64 and not (stream or wide):
        registers, resident = (128, 4) if na <= 32 else (168, 3)
    # A program walks as far as leaves every multiprocessor three programs.
    tiles, walks = -(-pixels // bm), [1]
    if not (mean or stream):
        walks += [w for w in (2, 4, 8) if w <= tiles and tiles // w * heads >= 3 * processors]
    if registers is not None and processors:
        # Nor further than lets the last round of programs, which takes as long as a full one, begin in time.
        rounds = {w: -(-(-(-tiles // w) * heads) // (resident * processors)) * w for w in walks}
        walks = [w for w in walks if rounds[w] == min(rounds.values())]
    walk = walks[-1]
    return ForwardTiles(
        na, nb, da, db, va, vb, bm, walk, stream, 8 if wide else 4, 2 if walk > 1 else stages, registers
    )


def next_power_of_2(size: int) -> int:
    """The tile that holds size: a power of two, at least 16, as tensor cores want."""
    return max(16, 1 << max(size - 1, 0).bit_length())


def split(size: int) -> tuple[int, int]:
    """Two powers of two that hold size with less waste than one would: 77 = 64 + 16, 40 = 32 + 16; (whole, 0) else."""
    whole = next_power_of_2(size)
    low = whole // 2
    if low < 16 or size <= low:
        return whole, 0
    rest = next_power_of_2(size - low)
    return (low, rest) if low + rest < whole else (whole, 0)
