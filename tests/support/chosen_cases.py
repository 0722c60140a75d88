"""Which of many cases the tests of slow kernels take: `make test` some that cover every pair, `make test-all` all."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["ALL", "pairwise"]

ALL = os.environ.get("SDATTN_TEST_ALL") == "1"


def pairwise(*options: Iterable[Any], whole: bool = ALL) -> list[tuple[Any, ...]]:
    """Cases that hold every value of each option beside every value of every other one; or the whole product.

    Greedy: each next case is the first of those that hold the most pairs not yet held.
    """
    values: list[Sequence[Any]] = [list(one) for one in options]
    product = list(itertools.product(*(range(len(one)) for one in values)))

    def pairs(case: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(itertools.combinations(enumerate(case), 2))

    left = set().union(*(pairs(case) for case in product))
    chosen = [] if not whole else product
    while left and not whole:
        best = max(product, key=lambda case: len(pairs(case) & left))
        left -= pairs(best)
        chosen.append(best)
    return [tuple(one[i] for one, i in zip(values, case, strict=True)) for case in chosen]
