"""A forward that is made for its maps alone ends once they are there: no block after the last captured layer runs.

In SD 1.5 the 16x16 layers end after a bit more than half of the UNet's arithmetic, and a score of maps has no gradient
from what follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from torch import nn

from .compiled import is_compiled
from .known_modules import any_global_hook
from .layers import Layer
from .map_sums import LayerMaps
from .patched_model import PatchedModel

__all__ = ["MapsComplete", "keep_maps", "may_end_early"]


class MapsComplete(Exception):
    """All captured layers of a forward ran. No BaseException: for those torch calls no hook after the forward."""


def keep_maps(layer: Layer, maps: LayerMaps) -> None:
    """A captured layer has maps. Raises: MapsComplete, after the last ones of a forward that is made for them alone."""
    layer.captured = maps
    if layer.ends_forward:
        assert layer.states is not None
        if all(one.captured is not None for one in layer.states.current.layers if one.captures):
            raise MapsComplete


def may_end_early(model: PatchedModel, hooks: Set[int]) -> bool:
    """Whether a forward may be broken off: no graph is made of it, and nothing waits for its end, as offloading,
    gradient checkpointing and hooks do. diffusers scales LoRAs back even so. hooks: identifiers of the patch's own."""
    module = model.module
    if model.outer is not module or module._compiled_call_impl is not None:
        return False
    if any_global_hook() or any(one._forward_hooks.keys() - hooks or _is_wrapped(one) for one in model.around):
        return False
    if model.compiled_inside or is_compiled(model.around):
        return False
    return not any(_waits(vars(one)) for one in module.modules())


def _waits(attributes: Mapping[str, Any]) -> bool:
    """Of a module: whether it is offloaded or checkpointed. Asked of every one before a correction, so in a hurry."""
    return (
        "_hf_hook" in attributes or "_diffusers_hook" in attributes or attributes.get("gradient_checkpointing", False)
    )


def _is_wrapped(module: nn.Module) -> bool:
    """Whether its forward is another than its class's. accelerate leaves its class's own where it takes a hook off."""
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward
