"""The binding of modifiers to nouns, as a score: the paper's formula, of the maps that were captured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from corrected_scores import corrected_scores

from sdattn_fast.guidance import Binding, BindingPair, Seen, binding_loss, find_phrases, syntactic_pairs
from sdattn_fast.patching.maps import Maps

PROMPT = "a red circle and a blue square"
PAIRS = [
    BindingPair((2,), (3, 4), [(1,), (5,), (6, 7)]), BindingPair((6, 7), (1,), [(2,)]), BindingPair((5,), (2,), [])
]  # fmt: skip


@pytest.fixture(scope="module")
def shapes() -> Any:
    from sdattn_fast.lab import load_pipeline

    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_binding_loss_is_the_papers() -> None:
    maps = _maps(4, 5, 9)
    # Where the sum over places is taken word by word, and both divergences one after the other.
    expected = 0.0
    for pair in PAIRS:
        modifier, noun = _spread(maps, pair.modifier), _spread(maps, pair.noun)
        expected += _symmetric(modifier, noun)
        apart = [(_symmetric(modifier, u) + _symmetric(u, noun)) / 2 for u in (_spread(maps, o) for o in pair.outside)]
        expected -= np.mean(apart) if apart else 0.0
    assert binding_loss(maps, PAIRS).item() == pytest.approx(expected, rel=1e-12)


def test_the_binding_loss_has_its_gradient() -> None:
    maps = _maps(3, 2, 9).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: binding_loss(x, PAIRS), (maps,))


def test_the_binding_loss_is_finite_where_half_precision_has_zeros() -> None:
    maps = _maps(4, 4, 9).float()
    maps[0, :, 2:4] = 0
    maps.requires_grad_()
    loss = binding_loss(maps, PAIRS)
    (gradient,) = torch.autograd.grad(loss, maps)
    assert loss.isfinite() and gradient.isfinite().all()


def test_pairs_are_of_one_phrase_and_all_other_words_are_outside(shapes: Any) -> None:
    phrases = find_phrases(PROMPT, shapes.tokenizer)
    first, second = syntactic_pairs(shapes.tokenizer, PROMPT, phrases)
    assert (first.modifier, first.noun) == ((2,), (3,)) and (second.modifier, second.noun) == ((6,), (7,))
    assert first.outside == [[1], [4], [5], [6], [7]] and second.outside == [[1], [2], [3], [4], [5]]


def test_the_score_is_minus_the_loss_of_each_pictures_maps() -> None:
    """Of the tokens that were captured, which are not all, in pictures with pairs of their own."""
    maps = _maps(2, 5, 4, 9).movedim(-1, 1).float()
    tokens = (1, 2, 3, 4, 5, 6, 7)
    some = Maps({"one": maps[:, list(tokens)]}, tokens, None)
    seen = Seen(maps, maps, 0, some)
    pairs = [PAIRS[:1], PAIRS[1:]]
    score = Binding(pairs)
    assert score.tokens == tokens
    expected = [-binding_loss(x.movedim(0, -1), mine) for x, mine in zip(maps, pairs, strict=True)]
    torch.testing.assert_close(score.by_picture(seen), torch.stack(expected))
    torch.testing.assert_close(score(seen), torch.stack(expected).mean())
    both = [-binding_loss(x.movedim(0, -1), PAIRS) for x in maps]
    torch.testing.assert_close(Binding(PAIRS).by_picture(seen), torch.stack(both))


def test_it_is_finite_where_upsampling_undershoots() -> None:
    peak = torch.zeros(1, 8, 8, 8)
    peak[:, :, 4, 4] = 1
    maps = {"fine": torch.full((1, 8, 16, 16), 1e-9), "coarse": peak.requires_grad_()}
    score = Binding([BindingPair((2,), (3,), [(6,)])])
    value = score(Seen(peak, peak, 0, Maps(maps, tuple(range(8)), None)))
    (gradient,) = torch.autograd.grad(value, peak)
    assert value.isfinite() and gradient.isfinite().all()


def test_a_correction_raises_it(shapes: Any) -> None:
    binding = Binding(syntactic_pairs(shapes.tokenizer, PROMPT, find_phrases(PROMPT, shapes.tokenizer)))
    scores = {strength: corrected_scores(shapes, PROMPT, binding, strength) for strength in (0.0, 0.02)}
    assert len(scores[0.0]) == 3 and scores[0.0][0] == pytest.approx(scores[0.02][0], rel=1e-5)
    assert scores[0.02][2] > scores[0.0][2]


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        ([], ValueError, "pairs: expected at least one, got"),
        ([[]], ValueError, "pairs: expected at least one, got"),
        ([(2, 3)], TypeError, "pairs: expected BindingPair, got 2"),
        (None, TypeError, "pairs: expected a sequence of BindingPair, got None"),
    ],
)
def test_bad_pairs(pairs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Binding(pairs)


def test_a_picture_without_pairs_has_the_score_zero() -> None:
    from sdattn_fast.guidance import Seen
    from sdattn_fast.patching import Maps

    maps = torch.rand(2, 5, 4, 4)
    seen = Seen(maps, maps, 0, Maps({"layer": maps}, (0, 1, 2, 3, 4), (4, 4)))
    pair = BindingPair((1,), (2,), ((3,),))
    some = Binding([[pair], []]).by_picture(seen)
    assert some[1] == 0 and some[0] != 0
    torch.testing.assert_close(some[0], Binding([[pair], [pair]]).by_picture(seen)[0])


def test_missing_maps_and_pictures_are_said() -> None:
    maps = _maps(2, 5, 4, 9).movedim(-1, 1).float()
    for tokens, pairs, message in (
        ((1, 2), PAIRS, "pairs: expected maps of tokens"),
        (tuple(range(9)), [PAIRS] * 3, "pairs: expected a list for each of 2 entries, got 3"),
    ):
        seen = Seen(maps, maps, 0, Maps({"one": maps[:, list(tokens)]}, tokens, None))
        with pytest.raises(ValueError, match=message):
            Binding(pairs)(seen)


def _maps(*shape: int) -> torch.Tensor:
    """Rows that sum to 1, float64."""
    return torch.softmax(torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64), -1)


def _spread(maps: torch.Tensor, tokens: Any) -> np.ndarray:
    shares = maps.numpy()[..., list(tokens)].mean(-1).ravel()
    return shares / shares.sum()


def _symmetric(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.sum(p * np.log(p / q)) + np.sum(q * np.log(q / p))) / 2
