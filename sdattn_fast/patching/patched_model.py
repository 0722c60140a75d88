"""A model of a patch: its served layers, the states that its forwards work on, and what is known of its class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .compiled import modules_around
from .layers import Layer
from .model_kinds import argument_names, denoisers, kind_of
from .seeds import LayerSeeds
from .states import States
from .text_padding import padding_of_mask, padding_of_zeros
from .text_state import TextState

__all__ = ["PatchedModel"]


class PatchedModel:
    """A UNet or ControlNet of a patch. layers: by which it is known outside its forwards. states: what those work on.
    around: its modules with served layers inside, of which `torch.compile` wraps one: compiled_inside."""

    def __init__(self, module: nn.Module, outer: nn.Module, text: TextState, layers: list[Layer]) -> None:
        self.module = module
        self.outer = outer
        self.layers = layers
        self.states = States(text, layers, outer)
        self.names = argument_names(module)
        self.kind = kind_of(module)
        self.seeds = LayerSeeds([layer.name for layer in layers])
        self.around = modules_around(module, layers)
        self.compiled_inside = any(hasattr(one, "_orig_mod") for one in self.around)

    def inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """A forward's arguments by name."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs}

    def draws_for(self, pipe: Any) -> bool:
        """Whether it is a pipeline's UNet or first transformer."""
        model = next(iter(denoisers(pipe).values()), None)
        return model is not None and (model is self.outer or any(m is self.module for m in model.modules()))

    def see_padding(self, text: TextState, inputs: Mapping[str, Any]) -> None:
        """A forward begins: what of its text is padding."""
        if self.kind.padding == "masked":
            text.see_padding(inputs.get("encoder_attention_mask"), padding_of_mask)
        elif self.kind.padding == "zeros":
            text.see_padding(inputs.get("encoder_hidden_states"), padding_of_zeros)
        else:
            text.see_padding(None, None)

    def check_guided(self) -> None:
        """Raises: ValueError of a model that guidance does not know how to call."""
        if not self.kind.guided:
            raise ValueError(
                f"patch: expected one of a UNet, got {type(self.module).__name__}'s: programs and maps serve "
                "transformers, previews and gradients of scores do not"
            )

    @property
    def text(self) -> TextState:
        """As this thread's forwards see it."""
        return self.states.current.text

    @property
    def texts(self) -> list[TextState]:
        """As any thread's forwards do."""
        return [state.text for state in self.states.all]

    @property
    def all_layers(self) -> list[Layer]:
        """The layers of all states."""
        return [layer for state in self.states.all for layer in state.layers]
