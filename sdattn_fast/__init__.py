"""sdattn_fast: Stable Diffusion cross-attention with a program for its rows, in one fused pass.

import sdattn_fast
sdattn_fast.apply(pipe, sdattn_fast.Program(dropout=sdattn_fast.SalienceDropout(0.2)))
"""

from __future__ import annotations

from ._version import __version__ as __version__
from .api import apply
from .backend import KernelRefused, backends
from .files import ProgramFile
from .functional import semantic_attention
from .patching import Maps, Patch, SemanticAttnProcessor
from .program import Capture, Program, Refinement, SalienceDropout
from .warmup import warm_up

__all__ = [
    "Program",
    "SalienceDropout",
    "Refinement",
    "Capture",
    "semantic_attention",
    "SemanticAttnProcessor",
    "apply",
    "warm_up",
    "Patch",
    "Maps",
    "ProgramFile",
    "backends",
    "KernelRefused",
]
