"""Cross-attention of Stable Diffusion with a program for the rows of its map, in one fused pass of Triton kernels.

The attention alone: `pip install sdattn-fast` also swaps it into the pipelines of diffusers.
"""

from .backend import KernelRefused, backends
from .functional import semantic_attention
from .program import Capture, Program, Refinement, SalienceDropout

__all__ = [
    "Capture",
    "KernelRefused",
    "Program",
    "Refinement",
    "SalienceDropout",
    "backends",
    "semantic_attention",
]
