"""`apply`: put a program into the cross-attention of a pipeline or UNet."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..files import ProgramFile, load_heads
from ..program import Capture, Program
from .before_forward import PatchedModel
from .known_processors import why_foreign
from .layers import LAYER, Layer, cross_attention_layers, heads_of_layers, select_layers
from .patch import Patch
from .settings import DropoutWhen, Heads, Settings
from .text_state import TextState
from .token_inputs import Given, checked_token_input
from .watched_pipeline import encode_function

__all__ = ["apply"]


def apply(
    pipe_or_unet: Any,
    program: Program | ProgramFile | str | Path = Program(),
    *,
    layers: str | Sequence[str] | None = None,
    heads: Heads | str | Path = None,
    inactive_heads: str = "plain",
    gate: Tensor | None = None,
    phrases: Tensor | None = None,
    protected: Tensor | None = None,
    active: Tensor | None = None,
    seed: int | None = None,
    capture: Capture | None = None,
    fold: str = "auto",
    text_cache: bool = True,
    backend: str = "auto",
    dropout_when: DropoutWhen = "always",
) -> Patch:
    """Run a program in every cross-attention layer of a diffusers pipeline (its UNet and ControlNets) or of a UNet.

    After it, ``pipe("a red car")`` finds the prompt's tokens by itself: BOS, EOS and padding are protected, and the
    unconditional half of the batch keeps plain attention. With a UNet alone every token is content and every entry
    active, unless told.

    Args:
        pipe_or_unet: a pipeline with a ``unet``, or a UNet2DConditionModel or ControlNetModel; the wrappings of
            torch.compile and PEFT are seen through.
        program: what happens to the rows; ``Program()`` is plain attention. Also a `ProgramFile` or the path of
            one (.json), as `sdattn-fast tune` writes: its layers and heads hold where the keywords do not say others.
        layers: names or fnmatch patterns, such as ``"up_blocks.*"``; None: all. Names are module paths such as
            ``"down_blocks.0.attentions.0.transformer_blocks.0.attn2"``, with ``"controlnet."`` before a ControlNet's.
        heads: indices of the active heads, valid in every patched layer, or {name or pattern: indices}, where layers
            left out keep all of theirs, or the path of a file that `sdattn-fast heads` wrote. inactive_heads: "plain",
            or "zero": they give zeros, which on the shapes pipeline ruined the pictures (docs/evaluation.md).
        gate: bool, or finite and >= 0; phrases: integer ids >= 0, -1 for none; protected: bool. Each (N,) for all
            prompts, (P, N) for P prompts, (A, N) for the A active entries (prompts times images), or (B, N) for the
            UNet's whole batch; gate also (P or A or B, H, N). Unconditional entries have no use for them.
        active: (B,) bool for the UNet's whole batch. Tensors are copied; say so by `Patch.update` when they change.
        seed: of the random mode, an int in [0, 2**63); layer and timestep are mixed in. None: torch's generator draws.
        capture: which maps to keep in `Patch.maps`: by default those of the key layers, `Capture` says which.
        fold: "auto" folds `to_q` and `to_out` into the text of layers where that is cheaper (on CPUs so far), "never"
            does not, "always" folds every layer or raises where one cannot be.
        text_cache: keep what depends on the text alone (token side, keys, values, what is folded) between steps, while
            text and weights stay what they were.
        backend: "auto", "triton", "cuda", "cpu" or "reference".
        dropout_when: the program's salience dropout applies "always"; in "training", while the model is in train mode;
            or by a schedule {step: ratio}, linear between the steps named and constant beyond, in place of the
            dropout's own ratio. A step is one of denoising, counted from 0; in train mode it is `Patch.step`, which the
            training loop sets.

    Returns:
        A `Patch`, also a context manager. Layers whose processor is of a class that ours cannot stand in for (anybody's
        own, HunyuanDiT's, Sana's) are left alone, with a warning. A model without a layer to serve (added-KV models
        such as DeepFloyd) gives a warning and a patch of nothing.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected; ValueError also where the model is
            patched already; OSError: a file that cannot be read.

    Source: docs/design.md, "From pipe(...) to a kernel and back".
    """
    from_file = isinstance(heads, (str, Path))
    rows, layers, heads, inactive_heads = _from_files(program, layers, heads, inactive_heads)
    settings = Settings(rows, inactive_heads, seed, capture, fold, text_cache, backend, dropout_when)
    given = Given()
    for name, x in (("gate", gate), ("phrases", phrases), ("protected", protected), ("active", active)):
        setattr(given, name, checked_token_input(name, x))
    models, pipe = _models(pipe_or_unet)

    found = [(name, attn) for prefix, model, _ in models for name, attn in cross_attention_layers(model, prefix)]
    if not found:
        warnings.warn(
            f"sdattn_fast.apply: {type(pipe_or_unet).__name__} has no cross-attention layer to serve (added-KV layers "
            "are left alone); nothing is patched",
            UserWarning,
            stacklevel=2,
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
    if from_file and isinstance(heads, dict):
        # The file names all layers of its model; those that `layers` leaves out have no use for it.
        left_out = {name for name, _ in found} - wanted
        heads = {name: indices for name, indices in heads.items() if name not in left_out}
    heads_of = heads_of_layers(heads, chosen)
    patched = []
    for prefix, model, outer in models:
        text = TextState(settings, given)
        mine = [
            Layer(name, attn, text, heads_of[name])
            for name, attn in cross_attention_layers(model, prefix)
            if name in wanted
        ]
        patched.append(PatchedModel(model, outer, text, mine))
    if pipe is not None and encode_function(pipe) is None:
        _warn_of_unknown_prompts(pipe, patched[0].text)
        pipe = None
    layers_kept = None
    if capture is not None and capture.layers is not None:
        layers_kept = select_layers(capture.layers, [name for name, _ in chosen], "Capture.layers")
    patch = Patch(settings, given, patched, [layer for model in patched for layer in model.layers], pipe, layers_kept)
    patch._install()
    return patch


def _from_files(
    program: Any, layers: str | Sequence[str] | None, heads: Heads | str | Path, inactive_heads: str
) -> tuple[Any, str | Sequence[str] | None, Heads, str]:
    """Paths read, and what a program's file says filled in where the keywords are silent."""
    # A string that does not look like a file is a slip, which the check of programs names.
    if isinstance(program, Path) or (isinstance(program, str) and program.endswith(".json")):
        program = ProgramFile.load(program)
    if isinstance(program, ProgramFile):
        layers = program.layers if layers is None else layers
        if heads is None:
            heads = program.heads
            inactive_heads = program.inactive_heads if inactive_heads == "plain" else inactive_heads
        program = program.program
    return program, layers, load_heads(heads)[0] if isinstance(heads, (str, Path)) else heads, inactive_heads


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
        stacklevel=3,
    )


def _warn_of_unknown_prompts(pipe: Any, text: TextState) -> None:
    given = text.given
    told = given.active is not None and (given.protected is not None or not text.needs_protected())
    if text.needs_active() and not told:
        warnings.warn(
            f"sdattn_fast.apply: a {type(pipe).__name__} has no encode_prompt, so prompts cannot be found in its text: "
            "every entry of the batch counts as a prompt and every token as content. Pass active= and protected=",
            UserWarning,
            stacklevel=3,
        )


def _models(pipe_or_unet: Any) -> tuple[list[tuple[str, nn.Module, nn.Module]], Any]:
    """The models to patch, each with the prefix of its layers' names and as it is called (compiled, say), and the
    pipeline, None where a UNet was given."""
    if isinstance(pipe_or_unet, nn.Module):
        return [("", _unwrapped(pipe_or_unet), _as_called(pipe_or_unet))], None
    unet = getattr(pipe_or_unet, "unet", None)
    if not isinstance(unet, nn.Module):
        kind = type(pipe_or_unet).__name__
        raise TypeError(f"pipe_or_unet: expected a diffusers pipeline with a unet, or a UNet, got {kind}")
    found = [("", unet)]
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
