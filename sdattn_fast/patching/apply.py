"""`apply`: put a program into the cross-attention of a pipeline or UNet; `Patch`: what takes it off again."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..files import ProgramFile, load_heads
from ..program import Capture, Program
from .before_forward import PatchedModel, before_forward, rows_of
from .graph_text import GraphText
from .ip_adapter import ip_adapter_processor, is_ip_adapter
from .layers import LAYER, Layer, cross_attention_layers, heads_of_layers, select_layers, watch_grids
from .maps import MapKeeper, Maps
from .processor import SemanticAttnProcessor
from .settings import DropoutWhen, Heads, Settings
from .steps import StepCounter
from .text_state import TOKEN_INPUTS, Given, TextState, checked_token_input
from .token_classes import PromptMemory

__all__ = ["Patch", "apply"]


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
        A `Patch`, also a context manager. A model without a layer to serve (added-KV models such as DeepFloyd) gives a
        warning and a patch of nothing.

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
    models, memory = _models(pipe_or_unet)

    found = [(name, attn) for prefix, model, _ in models for name, attn in cross_attention_layers(model, prefix)]
    if not found:
        warnings.warn(
            f"sdattn_fast.apply: {type(pipe_or_unet).__name__} has no cross-attention layer to serve (added-KV layers "
            "are left alone); nothing is patched",
            UserWarning,
            stacklevel=2,
        )
        return Patch(settings, given, [], [], None)
    taken = next((name for name, attn in found if hasattr(attn, LAYER)), None)
    if taken is not None:
        raise ValueError(f"pipe_or_unet: layer {taken!r} is patched already; call remove() on that patch first")

    wanted = set(select_layers(layers, [name for name, _ in found])) - _with_weights_of_their_own(found)
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
    if memory is not None and not memory.watches:
        memory = None
    layers_kept = None
    if capture is not None and capture.layers is not None:
        layers_kept = select_layers(capture.layers, [name for name, _ in chosen], "Capture.layers")
    patch = Patch(settings, given, patched, [layer for model in patched for layer in model.layers], memory, layers_kept)
    patch._install()
    return patch


class Patch:
    """A program in place. Made by `apply`; ``with apply(pipe, program): ...`` takes it off at the end.

    step: the training step, for a schedule of dropout; the training loop sets it.
    """

    def __init__(
        self,
        settings: Settings,
        given: Given,
        models: list[PatchedModel],
        layers: list[Layer],
        memory: PromptMemory | None,
        layers_kept: Sequence[str] | None = None,
    ) -> None:
        self._settings = settings
        self._given = given
        self._models = models
        self._layers = layers
        self._memory = memory
        self._keeper = None if settings.capture is None else MapKeeper(settings.capture, layers_kept)
        self._steps = StepCounter()
        self.step: int | None = None
        self._handles: list[Any] = []
        self._installed = False
        self._warned: set[str] = set()
        # One instance for all layers: torch.compile guards on the processor.
        self._processor = SemanticAttnProcessor(
            settings.program, inactive_heads=settings.inactive_heads, seed=settings.seed, fold=settings.fold,
            text_cache=settings.text_cache, backend=settings.backend,
        )  # fmt: skip

    @property
    def _needs_grids(self) -> bool:
        """Whether every forward is to find its layers' height and width: a hook a block, which costs time."""
        refine = self._settings.program.refine
        return self._keeper is not None or (refine is not None and refine.sigma > 0)

    @contextlib.contextmanager
    def _grids(self) -> Iterator[None]:
        """Inside, forwards find their layers' height and width."""
        watching = [] if self._needs_grids else [h for m in self._models for h in watch_grids(m.module, m.layers)]
        try:
            yield
        finally:
            for handle in watching:
                handle.remove()

    @property
    def layers(self) -> list[str]:
        """The names of the patched layers."""
        return [layer.name for layer in self._layers]

    @property
    def maps(self) -> Maps:
        """The mean over the run's steps so far: layer name -> (B, T, height, width) float32, B the active entries, mean
        over the active heads; (B, H, T, height, width) for ``Capture(reduce="none")``. A run is a call of the pipeline;
        the steps and layers are those of `Capture`, by default all steps of the key layers.

        Also ``maps.upsample(size)``, ``maps.per_word(prompt)``, ``maps.overlay(image, prompt)``, ``maps.save(path)``.
        Where gradients are on, they are the latest step's and part of its graph; in train mode, a forward with them is
        a run by itself, at `Patch.step` (None: 0). Raises: ValueError if `apply` was not given `capture`.
        """
        if self._keeper is None:
            raise ValueError("maps: expected apply(..., capture=sdattn_fast.Capture(...)), got no capture")
        tokenizer = None if self._memory is None else getattr(self._memory.pipe, "tokenizer", None)
        return self._keeper.read(self._layers, tokenizer)

    def update(self, **inputs: Tensor | None) -> None:
        """Change gate, phrases, protected or active between steps; those not named stay, None takes one away.

        Raises: TypeError, ValueError, as `apply`.
        """
        for name in inputs:
            if name not in TOKEN_INPUTS:
                raise TypeError(f"update: expected {', '.join(TOKEN_INPUTS)}, got {name!r}")
        checked = {name: checked_token_input(name, x) for name, x in inputs.items()}
        gate = checked.get("gate")
        if gate is not None and gate.requires_grad and self._graphs():
            raise ValueError("gate: it wants a gradient, and a captured CUDA graph has none; pass gate.detach()")
        before = dict(vars(self._given))
        vars(self._given).update(checked)
        try:
            renewals = [(one.text, graph, one.text.renewal_of(graph, graph.rows)) for one, graph in self._graphs()]
        except ValueError:
            vars(self._given).update(before)
            raise
        for model in self._models:
            model.text.forget_prepared()
        for layer in self._layers:
            layer.compiled = None
        for text, graph, calls in renewals:
            text.rewrite_graph(graph, calls, graph.rows)

    def update_text(self, encoder_hidden_states: Tensor) -> None:
        """Bring captured CUDA graphs up to date with their text: after you wrote another prompt into the tensor that
        they were captured with, or changed the model's weights, and before the next replay.

        A graph runs no Python, so it cannot see for itself; replayed without this, it gives NaN. Not needed where the
        model is called from Python, by torch.compile or otherwise.

        Args:
            encoder_hidden_states: (B, N, E), the tensor itself, not a copy.

        Raises:
            TypeError: not such a tensor.
            ValueError: no graph was captured with it; or the new prompt has no room where the graphs read: it has more
                content tokens than the one they were captured with (rounded up to a power of two, from 16 on). Then
                `refresh`, and capture again.

        Example::

            unet(x, t, text)                                    # once, then: with torch.cuda.graph(graph): ...
            text.copy_(another_prompt)                          # (B, N, E), both halves of the batch
            patch.update_text(text)
            graph.replay()
        """
        x = encoder_hidden_states
        if not isinstance(x, Tensor) or x.dim() != 3:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"encoder_hidden_states: expected a torch.Tensor (B, N, E), got {got}")
        mine = [(model, graph) for model, graph in self._graphs() if graph.is_in(x)]
        if not mine:
            have = sorted({f"{tuple(graph.text.shape)} {graph.text.dtype}" for _, graph in self._graphs()})
            raise ValueError(
                f"encoder_hidden_states: expected a tensor that a CUDA graph was captured with "
                f"({', '.join(have) or 'there is none'}), got another, {tuple(x.shape)} {x.dtype}; write into that "
                "one, or capture again"
            )
        if self._memory is not None:
            self._memory.forget_found()
        found = [(one, graph, rows_of(self, one, x)) for one, graph in mine]
        renewals = [(one.text, graph, rows, one.text.renewal_of(graph, rows)) for one, graph, rows in found]
        for text, graph, rows, calls in renewals:
            text.rewrite_graph(graph, calls, rows, x)

    def refresh(self) -> None:
        """Forget everything derived from text; it is derived anew at the next step. CUDA graphs captured so far must be
        captured again: they give NaN."""
        for model in self._models:
            model.text.forget()
        for layer in self._layers:
            layer.compiled = None
        if self._memory is not None:
            self._memory.forget_found()

    def _graphs(self) -> list[tuple[PatchedModel, GraphText]]:
        """What captured CUDA graphs read, with the model that it is of."""
        return [(model, graph) for model in self._models for graph in model.text.graphs]

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, forwards that are not the run's: they count as no step, and their maps leave with them."""
        kept = contextlib.nullcontext() if self._keeper is None else self._keeper.aside(self._layers)
        with self._steps.aside(), kept:
            yield

    def remove(self) -> None:
        """Restore the very processors that were there, and the pipeline's `encode_prompt`. Twice is harmless."""
        if not self._installed:
            return
        self._installed = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for layer in self._layers:
            if layer.attn.processor is layer.placed:
                layer.attn.set_processor(layer.original)
            layer.placed = None
            if getattr(layer.attn, LAYER, None) is layer:
                delattr(layer.attn, LAYER)
        if self._memory is not None:
            self._memory.uninstall()
            self._memory.forget()
        self.refresh()

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = f"{len(self._layers)} layers" if self._installed else "removed" if self._layers else "nothing patched"
        return f"Patch({self._settings.program!r}, {state})"

    def _install(self) -> None:
        self._installed = True
        for model in self._models:
            for layer in model.layers:
                setattr(layer.attn, LAYER, layer)
                self._place(layer)
            if model.layers:
                self._handles += before_forward(model, self)
                if self._needs_grids:
                    self._handles += watch_grids(model.module, model.layers)
        if self._memory is not None:
            self._memory.install()

    def _place(self, layer: Layer) -> None:
        layer.original = layer.attn.processor
        if is_ip_adapter(layer.original):
            layer.placed = ip_adapter_processor(self._processor, layer.original)
        else:
            layer.placed = self._processor
        layer.attn.set_processor(layer.placed)

    def _keep_in_place(self, layers: Sequence[Layer]) -> None:
        """Loading an IP-Adapter replaces our processors, unloading it makes new ones: put ours back. Anything else that
        replaced one may be somebody's wish, and is left, with a word."""
        foreign = []
        for layer in layers:
            now = layer.attn.processor
            if now is layer.placed:
                continue
            unloaded = is_ip_adapter(layer.placed) and type(now).__name__ in ("AttnProcessor2_0", "AttnProcessor")
            if is_ip_adapter(now) or unloaded:
                self._place(layer)
            elif type(now) is SemanticAttnProcessor:
                layer.attn.set_processor(layer.placed)
            elif layer.name not in self._warned:
                foreign.append((layer.name, type(now).__name__))
        if foreign:
            self._warned.update(name for name, _ in foreign)
            warnings.warn(
                f"sdattn_fast: {len(foreign)} of {len(layers)} layers run another processor, set over the patch's "
                f"({foreign[0][0]!r}: {foreign[0][1]}); the program does not run there. To have it back, remove() and "
                "apply again",
                UserWarning,
                stacklevel=2,
            )


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


def _with_weights_of_their_own(found: Sequence[tuple[str, Any]]) -> set[str]:
    """Layers whose processor was trained (Custom Diffusion): ours in its place would compute something else."""
    theirs = {
        name: type(attn.processor).__name__
        for name, attn in found
        if isinstance(attn.processor, nn.Module) and not is_ip_adapter(attn.processor)
    }
    if theirs:
        name, kind = next(iter(theirs.items()))
        warnings.warn(
            f"sdattn_fast.apply: {len(theirs)} layers have processors with weights of their own ({name!r}: {kind}); "
            "they are left alone",
            UserWarning,
            stacklevel=3,
        )
    return set(theirs)


def _models(pipe_or_unet: Any) -> tuple[list[tuple[str, nn.Module, nn.Module]], PromptMemory | None]:
    """The models to patch, each with the prefix of its layers' names and as it is called (compiled, say), and the
    memory of a pipeline's prompts."""
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
    return [(prefix, _unwrapped(model), _as_called(model)) for prefix, model in found], PromptMemory(pipe_or_unet)


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
