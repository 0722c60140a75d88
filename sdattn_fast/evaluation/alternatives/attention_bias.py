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
        changes = [
            self._changes(torch.stack([x[list(tokens)].mean(0) for tokens in some]).clamp(min=1e-6))
            for x, some in zip(maps, self.phrases, strict=True)
        ]
        grids = {layer.name: layer.grid for layer in self.patch.unet_layers if layer.grid is not None}
        by_grid = {grid: self._bias(changes, grid, maps.shape[1]) for grid in set(grids.values())}
        return {name: by_grid[grid] for name, grid in grids.items()}

    def _bias(self, changes: Sequence[Tensor], grid: tuple[int, ...], tokens: int) -> Tensor:
        """(B, 1, M, N) of layers with this grid. changes: of each picture, (objects, height, width)."""
        bias = changes[0].new_zeros(len(changes), 1, grid[0] * grid[1], tokens)
        for of_picture, change, some in zip(bias, changes, self.phrases, strict=True):
            pooled = F.adaptive_avg_pool2d(change, (grid[0], grid[1])).flatten(1)
            for object_tokens, of_object in zip(some, pooled, strict=True):
                of_picture[0][:, list(object_tokens)] = of_object[:, None]
        return bias

    def _changes(self, maps: Tensor) -> Tensor:
        """Of each object's logits, at each pixel. maps: the objects', (objects, height, width)."""
        greatest = maps.amax((1, 2), keepdim=True)
        if self.how == "weak":
            return (self.strength * (greatest.amax() / greatest).log()).expand_as(maps)
        shares = (maps / greatest).clamp(min=_LEAST_SHARE)
        return self.strength * (shares / shares.amax(0)).log()
