"""Which backend tests/kernels/interpreted_*.py are about, and where its kernels run.

SDATTN_TEST_BACKEND is "triton", which it is by default, "cuda", or "emulated-cuda" (see emulated_cuda.py). Triton's
kernels run on the CPU under TRITON_INTERPRET=1. Otherwise there is a GPU.
"""

from __future__ import annotations

import os

import torch

from sdattn_fast import backend as backends

__all__ = ["DEVICE", "EMULATED", "INTERPRETED", "NAME", "backend"]

_wanted = os.environ.get("SDATTN_TEST_BACKEND", "triton")
EMULATED = _wanted == "emulated-cuda"
NAME = "cuda" if EMULATED else _wanted
backend = backends.fused(NAME)
INTERPRETED = NAME == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if EMULATED or INTERPRETED else "cuda")

if EMULATED:
    import emulated_cuda

    emulated_cuda.use()
