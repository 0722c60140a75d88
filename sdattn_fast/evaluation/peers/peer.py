"""What a peer is: a method of others that draws, compared with stock in the same table as our techniques."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from ...guidance.phrases import NounPhrase

__all__ = ["Peer"]


class Peer(Protocol):
    """Peers are frozen dataclasses: `dataclasses.replace(peer, scale=8)` is the same one with another parameter.

    A peer leaves the pipeline as it found it: attention processors, configs, the scheduler's state, requires_grad.
    """

    @property
    def name(self) -> str:
        """As a report calls it."""

    def left_out(self, pipe: Any, guidance: float) -> str | None:
        """Why the peer cannot draw with this pipeline and guidance; None where it can."""

    def draw(
        self,
        pipe: Any,
        prompts: Sequence[str],
        objects: Sequence[Sequence[NounPhrase]],
        generators: Sequence[torch.Generator],
        guidance: float,
        steps: int,
    ) -> np.ndarray:
        """Pictures (prompts, height, width, 3) uint8, from the noise that stock would draw from these generators.

        objects: of each prompt, the noun phrases of the things to be drawn; a prompt without any is drawn as stock
        draws it, where the peer needs some. Raises: ValueError for pictures that are not finite.
        """
