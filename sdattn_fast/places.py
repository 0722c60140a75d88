"""Whether a tensor is one that came before: `Known` asks its numbers where looking is free, else its `Place`, where
they lie and which writing of them these are. A look at the numbers would make the host wait for a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["Known", "Place", "looking_is_free", "version_of"]


class Known:
    """A tensor that came before; nothing of it is kept but, where looking is free, a copy."""

    def __init__(self, x: Tensor) -> None:
        self._remembered = x.detach().clone() if looking_is_free(x.device) else Place(x)

    def is_same(self, x: Tensor) -> bool:
        """Whether x is the same: equal, or the same memory, not written to since, by any tensor or view."""
        remembered = self._remembered
        return _equal(remembered, x) if isinstance(remembered, Tensor) else remembered == Place(x)

    @property
    def bytes(self) -> int:
        """Of the copy."""
        return self._remembered.nbytes if isinstance(self._remembered, Tensor) else 0


class Place:
    """A tensor's memory, as it is now.

    Two places are equal where the memory is the same, alive since, and was not written to in between, as far as torch
    counts: writes through `.data`, and from outside torch, leave no trace. A tensor made in inference mode counts no
    writes, so its place equals no other, not even its own of later; nor do tensors inside torch.func's transforms.
    """

    __slots__ = ("_storage", "_version", "_view")

    def __init__(self, x: Tensor) -> None:
        self._version = version_of(x)
        try:
            # A storage's name recurs as soon as it is freed, but not while a weak reference to it lives.
            self._storage = StorageWeakRef(x.untyped_storage())
        except NotImplementedError:  # one of torch.func's wrappers
            self._version = None
        layout = x.storage_offset(), x.shape, x.stride()
        self._view = (*layout, x.dtype, x.device, x.is_conj(), x.is_neg())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Place):
            return NotImplemented
        return self.same_memory(other) and self._view == other._view

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return _nowhere, ()  # a copy of a model has other memory, and a weak reference must not be copied

    @property
    def lasts(self) -> bool:
        """Whether it can be told again."""
        return self._version is not None

    def same_view(self, other: Place) -> bool:
        """Whether both are the same memory, seen alike, whatever was written to it."""
        same = self._storage.cdata == other._storage.cdata and not self._storage.expired()
        return same and self._view == other._view

    def same_memory(self, other: Place) -> bool:
        """Whether both are views of the same memory, with the same numbers in it."""
        return (
            self.lasts
            and self._version == other._version
            and self._storage.cdata == other._storage.cdata
            and not self._storage.expired()
        )


def _nowhere() -> Place:
    place = Place.__new__(Place)
    place._version = None
    return place


def _equal(copy: Tensor, x: Tensor) -> bool:
    alike = copy.shape == x.shape and copy.dtype == x.dtype and copy.device == x.device
    return alike and torch.equal(copy, x)


def version_of(x: Tensor) -> int | None:
    """How often x was written to in place; None where torch does not count it, in inference mode."""
    return None if x.is_inference() else x._version


def looking_is_free(device: torch.device) -> bool:
    """Whether numbers can be read without waiting for a device to come to them."""
    return device.type == "cpu"
