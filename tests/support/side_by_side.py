"""Several threads that get in each other's way."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

__all__ = ["side_by_side"]


def side_by_side(work: Callable[[Any], None], arguments: Sequence[Any]) -> None:
    """work(argument) in a thread for each; they take turns as often as Python can. Raises what one of them raised."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(len(arguments)) as pool:
            list(pool.map(work, arguments))
    finally:
        sys.setswitchinterval(interval)
