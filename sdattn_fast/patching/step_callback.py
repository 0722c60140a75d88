"""What acts at the end of each denoising step of a pipeline, beside the callback that it is called with.

Source: diffusers, "Pipeline callbacks": `callback_on_step_end` and `callback_on_step_end_tensor_inputs`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

__all__ = ["Guide", "StepCallback", "call_arguments", "with_step_callback"]

# (pipe, step, timestep, tensors by name) -> the tensors, those that it changed replaced
StepCallback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]

_CALLBACK, _TENSORS = "callback_on_step_end", "callback_on_step_end_tensor_inputs"


class Guide(Protocol):
    """What acts on every picture that a patched pipeline draws."""

    def begin(self, pipe: Any, arguments: Mapping[str, Any]) -> StepCallback | None:
        """Before a call of the pipeline: what to do after each of its steps; None: nothing. arguments: the call's."""

    def check(self, pipe: Any) -> None:
        """Before another pipeline is watched. Raises: ValueError where it cannot act on it."""

    def remove(self) -> None:
        """The patch was removed."""


def call_arguments(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a pipeline's call by name, without its defaults.

    Raises: TypeError where they do not fit the pipeline, as its call would.
    """
    bound = inspect.signature(function).bind(*args, **kwargs)
    arguments = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    return arguments


def with_step_callback(arguments: Mapping[str, Any], ours: StepCallback) -> dict[str, Any]:
    """The arguments of a pipeline's call with our callback after the user's, which is given the tensors that it asked
    for and no others. Ours is given "latents" as well; a picture that was interrupted is left alone."""
    theirs = arguments.get(_CALLBACK)
    # diffusers reads these from its own callbacks in place of the argument.
    tensors = list(getattr(theirs, "tensor_inputs", None) or arguments.get(_TENSORS, ["latents"]) or [])

    def both(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if theirs is not None:
            result = theirs(pipe, step, timestep, {name: values[name] for name in tensors})
            if not isinstance(result, Mapping):
                raise TypeError(f"callback_on_step_end: expected a dict from it, got {type(result).__name__}")
            values = {**values, **result}
        return values if getattr(pipe, "interrupt", False) else ours(pipe, step, timestep, values)

    return {**arguments, _CALLBACK: both, _TENSORS: list(dict.fromkeys([*tensors, "latents"]))}
