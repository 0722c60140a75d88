"""What acts while a picture is drawn: callbacks that look at the picture and its maps, and what they are made of."""

from __future__ import annotations

from .binding import Binding, BindingPair, binding_loss, syntactic_pairs
from .clip_gate import ClipGate
from .clip_score import ClipScorer
from .correction import Correction
from .crf import PairwiseBilateral, PairwiseGaussian, dense_crf
from .objectives import ClipSimilarity, NoisePrediction, Presence
from .phrases import NounPhrase, find_phrases, phrase_ids
from .preview import LinearDecoder, Preview, predicted_clean
from .recipe import Recipe
from .relevance import Seen, gradcam
from .segregation import Segregation
from .structure import Structure, refine_latents

__all__ = [
    "Binding", "BindingPair", "ClipGate", "ClipScorer", "ClipSimilarity", "Correction", "LinearDecoder",
    "NoisePrediction", "NounPhrase", "PairwiseBilateral", "PairwiseGaussian", "Presence", "Preview", "Recipe",
    "Seen", "Segregation", "Structure", "binding_loss", "dense_crf", "find_phrases", "gradcam", "phrase_ids",
    "predicted_clean", "refine_latents", "syntactic_pairs",
]  # fmt: skip
