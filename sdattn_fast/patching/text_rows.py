"""Which entry of a batch of text is which prompt's, and which tokens are content: what pipelines say of it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..streams import to_device

__all__ = ["Rows"]


@dataclass
class Rows:
    """What the pipeline knows of a batch of text.

    prompt: for every batch entry the index of its prompt, -1 for an unconditional entry. prompts: how many there are.
    protected: (B, N) bool on the CPU; None where the tokens of a prompt are unknown. repeated: which entries are of the
    same picture as an earlier one. places: for every entry the place of its picture among the `encoded` ones that were
    encoded with it; empty: not known.
    """

    prompt: list[int]
    prompts: int
    protected: Tensor | None
    repeated: Sequence[bool] = ()
    places: Sequence[int] = ()
    encoded: int = 0

    @functools.cached_property
    def key(self) -> tuple[Any, ...]:
        """Equal for rows that are alike."""
        protected = self.protected
        return (
            tuple(self.prompt),
            tuple(self.repeated),
            None if protected is None else (*protected.shape, protected.numpy().tobytes()),
        )

    @property
    def pictures(self) -> list[int | None]:
        """Of every entry the index of its picture, None for an unconditional one. Where nothing else is known, an entry
        is a picture of its own; windows and frames of one are not."""
        pictures: list[int | None] = [None] * len(self.prompt)
        for i, b in enumerate(self.active):
            pictures[b] = self.places[b] if self.places else i % self.count
        return pictures

    @property
    def active(self) -> list[int]:
        """The entries that are prompts."""
        return [b for b, prompt in enumerate(self.prompt) if prompt >= 0]

    @property
    def count(self) -> int:
        """How many entries are pictures: those that ask one again are as many, and follow them all."""
        return len(self.active) - sum(self.repeated)

    def spread(self, name: str, given: Tensor | None, tokens: int) -> Tensor | None:
        """A user's tensor of prompts, pictures or entries, for the whole batch; on its device.

        Raises: ValueError where it is of none of these, or of other tokens.
        """
        if given is None:
            return None
        x, batch, active = given[None] if given.dim() == 1 else given, len(self.prompt), self.active
        prompts = max([prompt + 1 for prompt in self.prompt], default=0)
        lead = x.shape[0]
        if x.shape[-1] != tokens or lead not in (1, prompts, self.count, len(active), batch):
            raise ValueError(
                f"{name}: expected ({tokens},), ({prompts}, {tokens}) for the prompts or ({batch}, {tokens}) for the "
                f"UNet's batch, got {tuple(given.shape)}"
            )
        if lead == batch:
            return x
        # Unconditional entries are plain attention, whatever stands in their place.
        whole = torch.full((batch, *x.shape[1:]), _NEUTRAL[name], dtype=x.dtype, device=x.device)
        if lead == 1:
            source = [0] * len(active)
        elif lead == prompts:
            source = [self.prompt[b] for b in active]
        else:
            source = [i % lead for i in range(len(active))]
        to, of = (to_device(torch.tensor(i, dtype=torch.long), x.device) for i in (active, source))
        return whole.index_copy(0, to, x[of])


_NEUTRAL = {"gate": 1, "phrases": -1, "protected": 1}  # no bool: torch.jit.trace cannot fill with one
