"""The lab: a world of shapes where the truth is known, and a small Stable Diffusion trained on it, shipped with us."""

from __future__ import annotations

from .pipeline import load_clip, load_pipeline, shapes_path

__all__ = ["load_clip", "load_pipeline", "shapes_path"]
