"""Peers: methods of others, from diffusers or written here from their papers, that our techniques are compared with."""

from __future__ import annotations

from .attend_and_excite import AttendAndExcite
from .guidance_rescale import GuidanceRescale
from .init_no import InitialNoise
from .peer import Peer
from .perturbed_attention import PerturbedAttention
from .self_attention_guidance import SelfAttentionGuidance
from .structure_diffusion import StructureDiffusion
from .syngen import SynGen

__all__ = [
    "AttendAndExcite", "GuidanceRescale", "InitialNoise", "Peer", "PerturbedAttention", "SelfAttentionGuidance",
    "StructureDiffusion", "SynGen", "peers",
]  # fmt: skip


def peers() -> list[Peer]:
    """All of them, with the papers' parameters, or diffusers' where their docstrings say so."""
    return [
        AttendAndExcite(), SynGen(), InitialNoise(), StructureDiffusion(), SelfAttentionGuidance(),
        PerturbedAttention(), GuidanceRescale(),
    ]  # fmt: skip
