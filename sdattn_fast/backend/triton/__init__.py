"""The Triton backend: NVIDIA GPUs from Ampere on, AMD's; CPU tensors under TRITON_INTERPRET=1, for tests.

The kernels (sdattn_fast.kernels) see pointers, sizes and strides. What is here checks what they serve, allocates,
chooses tiles and launches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...plan import Plan
from ..limits import DTYPES, beyond_limits, no_picture_gradients
from . import gpu
from .folded_layers import PackedFoldedText, folded, folded_refusal, pack
from .gaussian import gaussian_attention
from .gpu import availability, interprets, remark
from .rows import BoundAttention, attention
from .rows_backward import backward
from .smoothing import smooth
from .spatial import picture_attention

__all__ = [
    "BoundAttention", "PackedFoldedText", "attention", "availability", "backward", "folded", "folded_refusal",
    "gaussian_attention", "interprets", "not_supported_reasons", "pack", "picture_attention", "remark", "smooth",
]  # fmt: skip


def not_supported_reasons(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, plan: Plan, needs_grad: bool
) -> list[str]:
    """What of this call the kernels do not serve; looks at shapes, strides, dtypes and devices alone."""
    on_cpu = gpu.interprets()
    reasons = beyond_limits(query, key, value, bias, "cpu" if on_cpu else "cuda", DTYPES)
    if on_cpu and query.dtype == torch.bfloat16:
        reasons.append("query is bfloat16, whose products Triton's interpreter computes wrongly (triton #11584)")
    return reasons + no_picture_gradients(plan, needs_grad)
