"""A tensor's place: what is the same memory, unchanged, and what is not."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Iterator

import pytest
import torch

from sdattn_fast.places import Place, version_of


@pytest.fixture
def _few_to_collect() -> Iterator[None]:
    """A collection goes through what the test made, and not through all that was imported, which takes a second."""
    gc.freeze()
    yield
    gc.unfreeze()


def test_views_of_the_same_are_the_same() -> None:
    whole = torch.randn(4, 3, 5)
    assert Place(whole) == Place(whole) == Place(whole.view(4, 3, 5)) == Place(whole[:4])
    assert Place(whole[2:]) == Place(whole.chunk(2)[1])
    assert Place(whole.detach()) == Place(whole)
    assert Place(whole[:2]) != Place(whole[2:])
    assert Place(whole) != Place(whole.transpose(1, 2)) and Place(whole[:1]) != Place(whole[0])
    assert Place(whole) != Place(whole.view(torch.int32))
    assert Place(whole[:2]).same_memory(Place(whole[2:]))


def test_what_is_written_to_is_another() -> None:
    whole = torch.zeros(4, 3)
    before, part = Place(whole), Place(whole[0])
    whole[3, 1] = 1.0
    assert before != Place(whole) and part != Place(whole[0])
    assert not before.same_memory(Place(whole))


@pytest.mark.usefixtures("_few_to_collect")
def test_memory_that_was_freed_is_another() -> None:
    """Its address, size and name come again as soon as it is free."""
    addresses = set()
    places = []
    for _ in range(20):
        x = torch.zeros(1000)
        addresses.add(x.data_ptr())
        places.append(Place(x))
        del x
        gc.collect()
    assert len(addresses) < 20, "none came again: nothing is tested"
    assert not any(a == b for i, a in enumerate(places) for b in places[:i])
    assert not any(place == place for place in places), "nothing lies there any more"


def test_inference_mode_counts_nothing() -> None:
    with torch.inference_mode():
        x = torch.zeros(3)
    assert version_of(x) is None
    assert Place(x) != Place(x)


@pytest.mark.usefixtures("_few_to_collect")
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda place: pickle.loads(pickle.dumps(place))])
def test_a_copy_is_nowhere(copied) -> None:
    x = torch.zeros(3)
    place = Place(x)
    for _ in range(5):
        other = copied(place)
        assert other != place and place != other and other != other
        del other
        gc.collect()
    assert place == Place(x)


def test_inside_transforms_there_are_no_places() -> None:
    def twice(x: torch.Tensor) -> torch.Tensor:
        assert Place(x) != Place(x)
        return 2 * x

    x = torch.randn(2, 3)
    torch.testing.assert_close(torch.func.vmap(twice)(x), 2 * x)
    torch.testing.assert_close(torch.func.grad(lambda x: twice(x).sum())(x), torch.full_like(x, 2.0))
