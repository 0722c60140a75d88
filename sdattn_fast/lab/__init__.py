"""The lab: a world of shapes where the truth is known, and a small Stable Diffusion that was trained on it."""

from __future__ import annotations

from .pipeline import load_clip, load_pipeline, shapes_path

__all__ = ["load_clip", "load_pipeline", "shapes_path"]
