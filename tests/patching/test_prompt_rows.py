"""Which rows of a text are prompts: every order of blocks, with rows that equal each other in every way."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from sdattn_fast.patching.prompt_rows import EncodedRows, Guidance, place_rows

# What stands for rows: capital letters are prompts, small ones negative prompts.
ORDERS = {
    "guided": ("NP", Guidance()),
    "guided, said": ("NP", Guidance(True)),
    "unguided": ("P", Guidance(False)),
    "alone": ("P", Guidance(True)),
    "perturbed": ("NPP", Guidance(True, perturbed=True)),
    "perturbed, unguided": ("PP", Guidance(False, perturbed=True)),
    "windows": ("NPNP", Guidance(True, windows=True)),
}


def told(order: str, prompts: Sequence[int], negatives: Sequence[int], each: int = 1) -> tuple[list[int], list[int]]:
    """(rows, for each the index of its prompt or -1): what is right, by construction."""
    rows: list[int] = []
    right: list[int] = []
    for kind in order:
        for i, row in enumerate(prompts if kind == "P" else negatives):
            rows += [row] * each
            right += [i if kind == "P" else -1] * each
    return rows, right


@pytest.mark.parametrize("name, each", [*((name, 1) for name in ORDERS), ("guided, said", 3), ("unguided", 3)])
def test_all_ways_to_be_equal(name: str, each: int) -> None:
    """Prompts and negative prompts drawn from three rows, in all ways: what is right never depends on their values."""
    order, guidance = ORDERS[name]
    for count in (1, 2, 3):
        for values in itertools.product(range(3), repeat=2 * count):
            prompts, negatives = values[:count], values[count:]
            rows, right = told(order, prompts, negatives, each)
            places = place_rows(rows, EncodedRows(prompts, negatives), guidance)
            assert places is not None
            assert [place.index if place.is_prompt else -1 for place in places] == right, (prompts, negatives)
            if guidance.perturbed:
                first = len(rows) - count * each  # the last block
                assert [place.repeated for place in places] == [i >= first for i in range(len(rows))]


def test_one_text_that_says_its_order() -> None:
    """InstructPix2Pix's: prompts, and twice the negative prompts."""
    for values in itertools.product(range(3), repeat=4):
        rows, right = told("PNN", values[:2], values[2:])
        places = place_rows(rows, EncodedRows(values[:2], values[2:], (True, False, False)), Guidance(True))
        assert places is not None and [place.index if place.is_prompt else -1 for place in places] == right


def test_rows_of_a_list_drawn_one_by_one() -> None:
    prompts, negatives = (1, 2, 3, 9), (9, 9, 9, 9)
    for i in range(4):
        places = place_rows([negatives[i], prompts[i]], EncodedRows(prompts, negatives))
        assert places is not None and [(p.is_prompt, p.index) for p in places][1] == (True, i)
        assert not places[0].is_prompt
    assert place_rows([9, 4], EncodedRows(prompts, negatives)) is None, "a row that was never encoded"


def test_what_cannot_be_told_is_not_guessed() -> None:
    """Three equal blocks may be InstructPix2Pix's order or that of perturbed attention."""
    assert place_rows([5, 5, 5], EncodedRows((5,), (5,))) is None
    places = place_rows([5, 6, 6], EncodedRows((5,), (6,)))
    assert places is not None and [place.is_prompt for place in places] == [True, False, False]
