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
    """Run a program in the cross-attention of a diffusers pipeline (its UNet and ControlNets) or of a single model.

    With a pipeline, the prompts' tokens are found automatically: words are content; BOS, EOS and padding are protected;
    and the unconditional entries of the batch get plain attention. With a UNet alone every token is content and every
    entry active, unless `protected` and `active` say otherwise.

    Args:
        pipe_or_unet: A pipeline with a ``unet``, or a UNet2DConditionModel or ControlNetModel, also wrapped by
            torch.compile, PEFT or DistributedDataParallel.
        program: What happens to the rows of the map; ``Program()`` is plain attention. Or a `ProgramFile`, or the path
            of one (.json): its layers and heads are used unless the arguments name others.
        layers: Names or fnmatch patterns such as ``"up_blocks.*"``. None: all. Names are module paths such as
            ``"down_blocks.0.attentions.0.transformer_blocks.0.attn2"``, those of a ControlNet after ``"controlnet."``.
        heads: Indices of the active heads of every layer; or {name or pattern: indices}, where layers left out keep all
            heads; or the path of a file that `sdattn-fast heads` wrote. None: all heads.
        inactive_heads: "plain": inactive heads get plain attention. "zero": their output is zero, which ruined the
            pictures of our small test model (docs/evaluation.md).
        gate: Tensor, bool or floating, finite and >= 0, of factors for the content tokens: 0 mutes a token, more than 1
            boosts it. Shape (N,) for all prompts, (P, N) for P prompts, (A, N) for the A active entries (prompts times
            images per prompt) or (B, N) for the UNet's whole batch; a gate for each head is (P, H, N), (A, H, N) or (B,
            H, N).
        phrases: Integer tensor, (N,), (P, N), (A, N) or (B, N): content tokens with the same id >= 0 each get their
            mean; -1: no phrase. `guidance.phrase_ids` makes it.
        protected: Bool tensor, (N,), (P, N), (A, N) or (B, N): tokens that the program leaves as they are, in place of
            those found.
        active: (B,) bool tensor: entries of the UNet's batch to which the program applies, in place of those found.
        seed: Seed of random dropout, an int in [0, 2**63), which is mixed with layer and timestep. None: drawn from
            torch's generator.
        capture: Which maps to keep in `Patch.maps`. None: no maps.
        fold: Whether the weights of `to_q` and `to_out` are multiplied into the prompt's keys and values, once per
            prompt. "auto": in layers where a cost model predicts a gain (only on CPUs so far). "never": in no layer.
            "always": in every layer; an error where that is impossible.
        text_cache: Whether keys, values and everything else that depends only on the prompt are reused in later steps,
            while prompt and weights stay the same.
        backend: "auto", "triton", "cuda", "cpu" or "reference", as in `semantic_attention`.
        dropout_when: When salience dropout applies: "always"; "training": only in train mode; or a schedule {step:
            ratio} that replaces the dropout's ratio, linear between the given steps and constant outside. Steps are
            denoising steps, counted from 0; in train mode they are `Patch.step`, which the training loop sets.

    Returns:
        The patch, which is also a context manager that ends with `Patch.remove`.

    Warns:
        UserWarning: If layers are not patched because their processors cannot be replaced (those of your own classes,
            for example), if there is no layer to patch, or if the pipeline has no `encode_prompt`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has the wrong shape or value, or the model is patched already.
        OSError: If a file cannot be read.

    Examples:
        >>> gate = torch.ones(77)
        >>> gate[2] = 2.0  # boosts "red"
        >>> with sdattn_fast.apply(pipe, gate=gate):
        ...     image = pipe("a red car").images[0]

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
