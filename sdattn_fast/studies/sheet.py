"""Pictures of a study side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

__all__ = ["save_sheet"]


def save_sheet(rows: Sequence[np.ndarray], path: Path) -> None:
    """A PNG, twice as large: rows are of as many pictures each, (n, height, width, 3) uint8."""
    from PIL import Image

    sheet = np.concatenate([np.concatenate(list(row), 1) for row in rows], 0)
    Image.fromarray(sheet).resize((sheet.shape[1] * 2, sheet.shape[0] * 2), 0).save(path)
