"""Which rows of a UNet's text are prompts and which are unconditional: by what they are equal to, and by their order.

A row may equal a prompt and a negative one at once: `pipe("")`, a prompt that is its own negative one, a list with an
empty prompt. Then the order decides. Text is made of whole blocks, each the prompts or the negative ones in their
order, and which orders of blocks there are is known of diffusers' pipelines.

Source: docs/design.md, "Where token classes come from".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

__all__ = ["EncodedRows", "Guidance", "RowPlace", "place_rows"]

PROMPTS, NEGATIVES = True, False
Blocks = tuple[bool, ...]


@dataclass(frozen=True)
class RowPlace:
    """What a row of text is. is_prompt: else it is unconditional. index: among the rows encoded of its kind. repeated:
    an earlier row of the batch is of the same picture."""

    is_prompt: bool
    index: int
    repeated: bool = False


@dataclass(frozen=True)
class EncodedRows:
    """The fingerprints of one call of `encode_prompt`: of its prompts' rows and its negative prompts' rows, in order.

    blocks: how the pipeline put them together, where it returned them as one text.
    """

    prompts: tuple[int, ...]
    negatives: tuple[int, ...] = ()
    blocks: Blocks | None = None


@dataclass(frozen=True)
class Guidance:
    """What a pipeline says of the text that it gives its UNet.

    guided: with unconditional rows; None: it is not known. perturbed: with each prompt twice, the second time for
    perturbed attention (PAG). windows: a text for each of several windows (panorama).
    """

    guided: bool | None = None
    perturbed: bool = False
    windows: bool = False


def place_rows(
    text: Sequence[int], encoded: EncodedRows, guidance: Guidance = Guidance(), known_only: bool = False
) -> list[RowPlace] | None:
    """What each row of a text is, given the rows' fingerprints; None where it cannot be told. known_only: nor where the
    order is none that pipelines have."""
    may_be = [(row in encoded.prompts, row in encoded.negatives) for row in text]
    if not may_be or not all(prompt or negative for prompt, negative in may_be):
        return None
    orders = [blocks for blocks in _orders(len(text), encoded, guidance) if _agrees(blocks, may_be)]
    known = _known_orders(len(text), encoded, guidance)
    if orders and (orders[0] in known or (not known_only and _alike(orders, len(text)))):
        places = _places_by_order(text, orders[0], encoded)
        return _with_repeats(places) if guidance.perturbed else places
    if known_only or any(prompt and negative for prompt, negative in may_be):
        return None
    return _places_by_value(text, [prompt for prompt, _ in may_be], encoded)


def _known_orders(batch: int, encoded: EncodedRows, guidance: Guidance) -> list[Blocks]:
    """The orders that pipelines are known to use for a text of so many rows, the likeliest first."""
    whole, rest = divmod(batch, len(encoded.prompts))
    whole = 0 if rest else whole
    if encoded.blocks is not None and whole == len(encoded.blocks):
        return [encoded.blocks]
    if guidance.guided is False:
        return [(PROMPTS, PROMPTS)] if guidance.perturbed else [(PROMPTS,)]
    if guidance.perturbed:
        return [(NEGATIVES, PROMPTS, PROMPTS), (PROMPTS,), (NEGATIVES,)]
    if guidance.windows and whole % 2 == 0 and whole:
        return [(NEGATIVES, PROMPTS) * (whole // 2)]
    if whole == 1:
        # Guidance in two forwards; a ControlNet in guess mode; guidance that was cut off.
        return [(PROMPTS,), (NEGATIVES,)]
    # More than two: the frames of a video. None: some of the rows, drawn one by one.
    if whole == 2 or guidance.guided or not whole:
        return [(NEGATIVES, PROMPTS)]
    return []


def _orders(batch: int, encoded: EncodedRows, guidance: Guidance) -> list[Blocks]:
    """All orders that a text of so many rows may have, the known ones first."""
    loops: list[Blocks] = [(NEGATIVES, PROMPTS), (PROMPTS, NEGATIVES), (PROMPTS,), (NEGATIVES,)]
    orders = [*_known_orders(batch, encoded, guidance), *loops]
    return [blocks for blocks in dict.fromkeys(orders) if batch % len(blocks) == 0]


def _agrees(blocks: Blocks, may_be: Sequence[tuple[bool, bool]]) -> bool:
    """Whether rows may be of the kinds that an order of blocks gives them."""
    kinds = _kinds(blocks, len(may_be))
    return all(prompt if kind else negative for kind, (prompt, negative) in zip(kinds, may_be, strict=True))


def _alike(orders: Sequence[Blocks], batch: int) -> bool:
    return all(_kinds(blocks, batch) == _kinds(orders[0], batch) for blocks in orders)


def _kinds(blocks: Blocks, batch: int) -> list[bool]:
    return [kind for kind in blocks for _ in range(batch // len(blocks))]


def _places_by_order(text: Sequence[int], blocks: Blocks, encoded: EncodedRows) -> list[RowPlace]:
    """Where every block is the rows encoded, in their order, each as often as all others (frames); else by value."""
    size, places = len(text) // len(blocks), []
    for i, kind in enumerate(blocks):
        of_kind = encoded.prompts if kind else encoded.negatives
        times = size // len(of_kind)
        if tuple(text[i * size : (i + 1) * size]) != tuple(row for row in of_kind for _ in range(times)):
            return _places_by_value(text, _kinds(blocks, len(text)), encoded)
        places += [RowPlace(kind, place // times) for place in range(size)]
    return places


def _places_by_value(text: Sequence[int], kinds: Sequence[bool], encoded: EncodedRows) -> list[RowPlace]:
    """Equal rows take turns, so that in a list of equal prompts each still has its own gate."""
    turns: dict[tuple[int, bool], int] = {}
    places = []
    for row, kind in zip(text, kinds, strict=True):
        equal = [i for i, one in enumerate(encoded.prompts if kind else encoded.negatives) if one == row]
        turn = turns.get((row, kind), 0)
        turns[row, kind] = turn + 1
        places.append(RowPlace(kind, equal[turn % len(equal)]))
    return places


def _with_repeats(places: Sequence[RowPlace]) -> list[RowPlace]:
    """Of perturbed attention: the second half of the prompts' rows is of the same pictures as the first."""
    prompts = sum(place.is_prompt for place in places)
    found, seen = [], 0
    for place in places:
        seen += place.is_prompt
        found.append(replace(place, repeated=place.is_prompt and 2 * seen > prompts))
    return found
