"""Objects' attention raised or parted by a bias of the next step's logits, made of this step's maps: forwards alone, no
backward pass and no further forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...patching.patch import Patch

__all__ = ["AttentionBias"]

_LEAST_SHARE = 0.05  # of an object's greatest attention: what is less counts as this much


class AttentionBias:
    """A ``callback_on_step_end``; as a context manager it ends with `remove`.

    Args:
        patch: With ``Capture(steps="latest")``, of all tokens.
        phrases: Of each picture, the token indices of its objects' nouns.
        how: "weak" raises the tokens of an object by ``strength * log(strongest / own)``, of the greatest attention
            that any object and that this one has in some pixel: 1.0 would make them equal if nothing else changed.
            "parted" lowers an object's tokens at each pixel by ``strength * log(largest / own)``, of the attention
            there as a share of the greatest that each object has: every pixel is left to the object that is strongest
            there.
        strength: >= 0.
        steps: (first, end): after these steps the next one's bias is made, end excluded.
    """

    tensor_inputs = ()

    def __init__(
        self, patch: Patch, phrases: Sequence[Sequence[Sequence[int]]], *, how: str, strength: float,
        steps: tuple[int, int],
    ) -> None:  # fmt: skip
        if how not in ("weak", "parted"):
            raise ValueError(f"how: expected 'weak' or 'parted', got {how!r}")
        self.patch, self.phrases, self.how, self.strength, self.steps = patch, phrases, how, strength, steps

    def __call__(self, pipe: Any, step: int, timestep: Any, kept: dict[str, Any]) -> dict[str, Any]:
        self.remove()
        if self.steps[0] <= step < self.steps[1]:
            self.patch.current_call.biases[self] = self._biases()
        return kept

    def remove(self) -> None:
        """Take the bias back."""
        self.patch.current_call.biases.pop(self, None)

    def __enter__(self) -> AttentionBias:
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()

    def _biases(self) -> dict[str, Tensor]:
        maps = self.patch.maps.upsample()
        if len(maps) != len(self.phrases):
            raise ValueError(f"phrases: expected those of each of {len(maps)} pictures, got {len(self.phrases)}")
        own = [
            torch.stack([x[list(tokens)].mean(0) for tokens in some]).clamp(min=1e-6)
            for x, some in zip(maps, self.phrases, strict=True)
        ]
        return {
            layer.name: self._bias(own, layer.grid, maps.shape[1])
            for layer in self.patch.unet_layers
            if layer.grid is not None
        }

    def _bias(self, own: Sequence[Tensor], grid: tuple[int, ...], tokens: int) -> Tensor:
        """(B, 1, M, N) of a layer. own: of each picture, its objects' maps, (objects, height, width)."""
        bias = own[0].new_zeros(len(own), 1, grid[0] * grid[1], tokens)
        for of_picture, maps, some in zip(bias, own, self.phrases, strict=True):
            changes = F.adaptive_avg_pool2d(self._changes(maps), (grid[0], grid[1])).flatten(1)
            for object_tokens, change in zip(some, changes, strict=True):
                of_picture[0][:, list(object_tokens)] = change[:, None]
        return bias

    def _changes(self, maps: Tensor) -> Tensor:
        """Of each object's logits, at each pixel."""
        greatest = maps.amax((1, 2), keepdim=True)
        if self.how == "weak":
            return (self.strength * (greatest.amax() / greatest).log()).expand_as(maps)
        shares = (maps / greatest).clamp(min=_LEAST_SHARE)
        return self.strength * (shares / shares.amax(0)).log()
