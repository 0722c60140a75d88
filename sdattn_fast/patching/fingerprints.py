"""A number for each row of encoded text, by which the row is known again. The rows themselves need not be kept."""

from __future__ import annotations

import torch
from torch import Tensor

from ..streams import Kept, to_device

__all__ = ["DTYPES", "fingerprints", "read_dtype"]

# Pipelines cast encoded text to the UNet's dtype, so it is known in each of these.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_factors_of: dict[tuple[int, torch.device], Kept] = {}
_MOST = 8  # text shapes times devices


def fingerprints(rows: Tensor) -> Tensor:
    """(R,) int64, on the rows' device, of rows (R, N, E) of one of `DTYPES`.

    Rows of the same bits have the same number. It is their sum times random odd factors, modulo 2**64, so other rows
    have it with a probability of about 2**-63.
    """
    bits = rows.detach().contiguous().flatten(1).view(torch.int32 if rows.dtype == torch.float32 else torch.int16)
    return (bits.to(torch.int64) * _factors(bits.shape[1], bits.device)).sum(1)


def read_dtype(text: torch.dtype) -> torch.dtype:
    """The one of `DTYPES` to compare a text in."""
    return text if text in DTYPES else torch.float32


def _factors(count: int, device: torch.device) -> Tensor:
    kept = _factors_of.get((count, device))
    if kept is None:
        with torch.inference_mode(False):
            generator = torch.Generator().manual_seed(count)
            factors = torch.randint(-(2**62), 2**62, (count,), generator=generator, dtype=torch.int64) * 2 + 1
            kept = Kept(to_device(factors, device))
        for old in list(_factors_of)[: len(_factors_of) + 1 - _MOST]:
            _factors_of.pop(old, None)
        _factors_of[count, device] = kept
    return kept.get()
