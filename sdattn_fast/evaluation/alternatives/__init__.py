"""Alternatives to the recipes, from papers and our own, that a study compares with them. They are here to be measured;
`studies.alternatives` says what they gave."""

from __future__ import annotations

from .attention_bias import AttentionBias
from .concentration import Concentration
from .learned_presence import LearnedPresence, PresenceNetwork

__all__ = ["AttentionBias", "Concentration", "LearnedPresence", "PresenceNetwork"]
