"""Put a program into the cross-attention layers of a pipeline or UNet: which layers, which are left alone, and why."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from .attention_kinds import attention_kinds
from .known_processors import norms_across_heads, why_foreign
from .layers import LAYER, Layer, cross_attention_layers, heads_of_layers, select_layers
from .model_kinds import denoisers, kind_of
from .patch import Patch
from .patched_model import PatchedModel
from .settings import Heads, Settings
from .text_state import TextState
from .token_inputs import TokenInputs
from .watched_pipeline import encode_function

__all__ = ["install"]


def install(
    pipe_or_unet: Any,
    settings: Settings,
    given: TokenInputs | None = None,
    *,
    layers: str | Sequence[str] | None = None,
    heads: Heads = None,
    heads_of_all: bool = False,
) -> Patch:
    """What `sdattn_fast.apply` does once its arguments are checked; its own checks are of layers and heads.

    heads_of_all: `heads` names every layer of the model, also those that `layers` leaves out.
    """
    given = TokenInputs() if given is None else given
    models, pipe = _models(pipe_or_unet)
    found = [(name, attn) for prefix, model, _ in models for name, attn in cross_attention_layers(model, prefix)]
    if not found:
        warnings.warn(
            f"sdattn_fast.apply: {_names_of(models)} has no cross-attention layer to serve{_what_else(models)}; "
            "nothing is patched",
            UserWarning,
            stacklevel=3,
        )
        return Patch(settings, given, [], [], None)
    taken = next((name for name, attn in found if getattr(attn, LAYER, None) is not None), None)
    if taken is not None:
        raise ValueError(f"pipe_or_unet: layer {taken!r} is patched already; call remove() on that patch first")

    wanted = set(select_layers(layers, [name for name, _ in found]))
    whys = {name: why_foreign(attn) for name, attn in found if name in wanted}
    foreign = {name: why for name, why in whys.items() if why is not None}
    wanted -= set(foreign)
    if foreign:
        _say_what_is_foreign(type(pipe_or_unet).__name__, foreign, nothing_left=not wanted)
        if not wanted:
            return Patch(settings, given, [], [], None)
    chosen = [(name, attn) for name, attn in found if name in wanted]
    if heads_of_all and isinstance(heads, dict):
        left_out = {name for name, _ in found} - wanted
        heads = {name: indices for name, indices in heads.items() if name not in left_out}
    heads_of = heads_of_layers(heads, chosen)
    patched = []
    for prefix, model, outer in models:
        text = TextState(settings, given, kind_of(model).reads_own_text)
        mine = [
            Layer(name, attn, text, heads_of[name], norms_across_heads(attn))
            for name, attn in cross_attention_layers(model, prefix)
            if name in wanted
        ]
        patched.append(PatchedModel(model, outer, text, mine))
    if pipe is not None and encode_function(pipe) is None:
        _warn_of_unknown_prompts(pipe, patched[0].text)
        pipe = None
    layers_kept = None
    capture = settings.capture
    if capture is not None and capture.layers is not None:
        layers_kept = select_layers(capture.layers, [name for name, _ in chosen], "Capture.layers")
    patch = Patch(settings, given, patched, [layer for model in patched for layer in model.layers], pipe, layers_kept)
    patch._install()
    return patch


def _names_of(models: Sequence[tuple[str, nn.Module, nn.Module]]) -> str:
    return " and ".join(dict.fromkeys(type(model).__name__ for _, model, _ in models))


def _what_else(models: Sequence[tuple[str, nn.Module, nn.Module]]) -> str:
    kinds = [str(kind) for _, model, _ in models for kind in attention_kinds(model)]
    return f" ({'; '.join(kinds)})" if kinds else ""


def _say_what_is_foreign(model: str, foreign: dict[str, str], nothing_left: bool) -> None:
    """One warning of all layers whose processors ours cannot stand in for (name -> why)."""
    name, why = next(iter(foreign.items()))
    others = len(set(foreign.values()) - {why})
    more = f", and {others} other kinds" if others else ""
    theirs = f"{len(foreign)} layers run processors that ours cannot stand in for, {name!r}: {why}{more}"
    warnings.warn(
        f"sdattn_fast.apply: {model} has no cross-attention layer to serve ({theirs}); nothing is patched"
        if nothing_left
        else f"sdattn_fast.apply: {theirs}; they are left alone",
        UserWarning,
        stacklevel=4,
    )


def _warn_of_unknown_prompts(pipe: Any, text: TextState) -> None:
    given = text.given
    told = given.active is not None and (given.protected is not None or not text.needs_protected())
    if text.needs_active() and not told:
        warnings.warn(
            f"sdattn_fast.apply: a {type(pipe).__name__} has no encode_prompt, so prompts cannot be found in its text: "
            "every entry of the batch counts as a prompt and every token as content. Pass active= and protected=",
            UserWarning,
            stacklevel=4,
        )


def _models(pipe_or_unet: Any) -> tuple[list[tuple[str, nn.Module, nn.Module]], Any]:
    """The models to patch, each with the prefix of its layers' names and as it is called (compiled, say), and the
    pipeline, None where a UNet was given."""
    if isinstance(pipe_or_unet, nn.Module):
        return [("", _unwrapped(pipe_or_unet), _as_called(pipe_or_unet))], None
    named = denoisers(pipe_or_unet)
    if not named:
        kind = type(pipe_or_unet).__name__
        raise TypeError(
            f"pipe_or_unet: expected a diffusers pipeline with a unet or a transformer, or one of these, got {kind}"
        )
    found = [(f"{name}." if i else "", model) for i, (name, model) in enumerate(named.items())]
    controlnet = getattr(pipe_or_unet, "controlnet", None)
    if isinstance(controlnet, nn.Module):
        nets = getattr(_unwrapped(controlnet), "nets", None)
        if isinstance(nets, nn.ModuleList):
            found += [(f"controlnet.nets.{i}.", net) for i, net in enumerate(nets)]
        else:
            found.append(("controlnet.", controlnet))
    return [(prefix, _unwrapped(model), _as_called(model)) for prefix, model in found], pipe_or_unet


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's, PEFT's and DistributedDataParallel's wrappings."""
    return _wrappings(model)[-1]


def _as_called(model: nn.Module) -> nn.Module:
    """The whole of it where torch.compile is among its wrappings, else the model inside, which the others call."""
    found = _wrappings(model)
    return found[0] if any(hasattr(one, "_orig_mod") for one in found) else found[-1]


def _wrappings(model: nn.Module) -> list[nn.Module]:
    found = [model]
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()  # type: ignore[operator]
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return found
        found.append(model)
