"""What the user says of tokens and entries: gate, phrases, protected, active and seed, checked and copied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .seeds import Seed, checked_seed

__all__ = ["INPUTS", "TokenInputs", "checked_input"]

INPUTS = ("gate", "phrases", "protected", "active", "seed")


@dataclass
class TokenInputs:
    """What the user said of tokens and entries: checked copies on the CPU, but for a gate that wants a gradient; or
    None."""

    gate: Tensor | None = None
    phrases: Tensor | None = None
    protected: Tensor | None = None
    active: Tensor | None = None
    seed: Seed = None

    @classmethod
    def checked(cls, **inputs: Any) -> TokenInputs:
        """What the user passed, by name. Raises: as `checked_input`."""
        return cls(**{name: checked_input(name, x) for name, x in inputs.items()})


def checked_input(name: str, x: Any) -> Any:
    """A copy of a user's gate, phrases, protected, active or seed, checked as far as it can be before a batch is seen;
    on the CPU, but for a gate that wants a gradient, which stays where it is and in its graph.

    gate: bool, or floating, finite and >= 0, (N,), (P or B, N) or (P or B, H, N). phrases: integer, >= -1, and
    protected: bool, (N,) or (P or B, N). active: bool (B,). seed: as `checked_seed`.

    Raises: TypeError, ValueError.
    """
    if name == "seed":
        return checked_seed(x)
    if x is None:
        return None
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor or None, got {type(x).__name__}")
    most = {"gate": 3, "phrases": 2, "protected": 2, "active": 1}[name]
    if not 1 <= x.dim() <= most:
        raise ValueError(f"{name}: expected 1 to {most} dimensions, got {tuple(x.shape)}")
    if name in ("protected", "active") and x.dtype != torch.bool:
        raise TypeError(f"{name}: expected dtype torch.bool, got {x.dtype}")
    if name == "phrases" and (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool):
        raise TypeError(f"phrases: expected an integer dtype, got {x.dtype}")
    with torch.inference_mode(False):  # what is made in inference mode cannot be part of a graph later
        values = x.detach().to("cpu", copy=True)
    if name == "phrases" and x.numel() and int(values.min()) < -1:
        raise ValueError(f"phrases: expected ids >= 0, or -1 for none, got {int(values.min())}")
    if name == "gate" and x.dtype != torch.bool:
        if not x.is_floating_point():
            raise TypeError(f"gate: expected bool or a floating dtype, got {x.dtype}")
        bad = ~(torch.isfinite(values) & (values >= 0))
        if bool(bad.any()):
            raise ValueError(f"gate: expected finite numbers >= 0, got {values[bad][0].item()}")
    copy = x.clone()
    return copy if copy.requires_grad else values
