"""The segregation of objects, as a score: one minus the overlap of the maps that were captured."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from corrected_scores import corrected_scores

from sdattn_fast.guidance import Seen, Segregation, find_phrases
from sdattn_fast.patching.maps import Maps

TOKENS = (1, 2, 4, 5, 7)
PHRASES = [(1,), (4, 5), (7,)]


def seen_of(maps: torch.Tensor, tokens: tuple[int, ...] = TOKENS) -> Seen:
    return Seen(maps, maps, 0, Maps({"one": maps[:, list(tokens)]}, tokens, None))


def overlap(maps: np.ndarray, phrases: list[tuple[int, ...]]) -> float:
    """The papers' sum of the smaller over the sum of both, doubled, of maps (tokens, height, width)."""
    spread = [maps[list(phrase)].mean(0) / maps[list(phrase)].mean(0).sum() for phrase in phrases]
    return float(np.mean([2 * np.minimum(a, b).sum() / (a + b).sum() for a, b in combinations(spread, 2)]))


def test_it_is_one_minus_the_overlap_of_each_pictures_maps() -> None:
    """Of the tokens that were captured, which are not all, in pictures with phrases of their own."""
    maps = torch.rand(3, 9, 5, 4)
    phrases = [PHRASES, PHRASES[:2], PHRASES[2:]]
    score = Segregation(phrases)
    assert score.tokens == (1, 4, 5, 7)
    found = score.by_picture(seen_of(maps))
    expected = [1 - overlap(x.numpy().astype(np.float64), some) for x, some in zip(maps[:2], phrases, strict=False)]
    np.testing.assert_allclose(found, [*expected, 1.0], rtol=1e-5)
    assert score(seen_of(maps)) == found.mean()


def test_its_bounds() -> None:
    apart = torch.zeros(1, 9, 4, 4)
    apart[0, 1, 0, 0] = apart[0, 7, 3, 3] = 1
    assert Segregation([(1,), (7,)])(seen_of(apart)).item() == pytest.approx(1, abs=1e-4)
    assert Segregation([(1,), (7,)])(seen_of(torch.rand(1, 1, 4, 4).expand(1, 9, 4, 4))).item() == pytest.approx(
        0, abs=1e-5
    )


def test_its_gradient() -> None:
    maps = torch.rand(1, 9, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: Segregation(PHRASES).by_picture(seen_of(x)), (maps,))


def test_it_is_finite_in_half_precision_and_where_upsampling_undershoots() -> None:
    peak = torch.zeros(1, 8, 8, 8)
    peak[:, :, 4, 4] = 1
    coarse = peak.to(torch.bfloat16).requires_grad_()
    maps = Maps({"fine": torch.zeros(1, 8, 16, 16, dtype=torch.bfloat16), "coarse": coarse}, tuple(range(8)), None)
    value = Segregation([(2,), (3,)])(Seen(peak, peak, 0, maps))
    (gradient,) = torch.autograd.grad(value, coarse)
    assert value.isfinite() and value.dtype == torch.float32 and gradient.isfinite().all()


def test_a_correction_raises_it(pipe: Any) -> None:
    prompt = "a red circle and a blue square"
    apart = Segregation(find_phrases(prompt, pipe.tokenizer))
    scores = {strength: corrected_scores(pipe, prompt, apart, strength) for strength in (0.0, 0.05)}
    assert scores[0.0][0] == pytest.approx(scores[0.05][0], rel=1e-5) and scores[0.05][2] > scores[0.0][2]


@pytest.mark.parametrize(
    ("phrases", "error", "message"),
    [
        ([], ValueError, "phrases: expected token indices of at least one phrase"),
        ([[(1,), ()]], ValueError, "phrases: expected token indices of at least one phrase"),
        ("cat", TypeError, "phrases: expected token indices"),
        ([(-1,)], ValueError, "phrases: expected token indices >= 0, got -1"),
    ],
)
def test_bad_phrases(phrases: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Segregation(phrases)


def test_missing_maps_and_pictures_are_said() -> None:
    maps = torch.rand(2, 9, 4, 4)
    with pytest.raises(ValueError, match="phrases: expected maps of tokens"):
        Segregation(PHRASES)(seen_of(maps, (1, 4)))
    with pytest.raises(ValueError, match="phrases: expected a list for each of 2 entries, got 3"):
        Segregation([PHRASES] * 3)(seen_of(maps))
