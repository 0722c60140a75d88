"""Choosing heads, and tuning programs, for a model and a set of prompts."""

from __future__ import annotations

from .head_ranking import HeadRanking, effective_attention, rank_heads
from .head_scores import clip_score, iou_score
from .observation import Observation, observe
from .reward import Reward, compare
from .search_space import SearchSpace
from .study import best_program, draw_plots, open_study, shortlisted, tune

__all__ = [
    "HeadRanking", "Observation", "Reward", "SearchSpace", "best_program", "clip_score", "compare", "draw_plots",
    "effective_attention", "iou_score", "observe", "open_study", "rank_heads", "shortlisted", "tune",
]  # fmt: skip
