"""What happens before a patched model runs: whose picture it is and which step, its text looked up, its calls prepared,
seeds mixed; and after it.

All that needs Python and no layer is done here, once a forward, and outside the graph of a compiled model.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..graphs import in_graph
from ..places import looking_is_free, version_of
from ..streams import capturing, current_stream
from .call import Call
from .compiled import compiled_text, is_compiled
from .forwards import of_entries
from .graph_text import GraphText
from .layer_call import LayerCall
from .layers import no_hook
from .patched_model import PatchedModel
from .states import ModelState
from .text_rows import Rows
from .text_state import TextState

if TYPE_CHECKING:
    from .patch import Patch

__all__ = ["before_forward", "rows_of"]


def before_forward(model: PatchedModel, patch: Patch) -> list[Any]:
    """Have a patch look at every forward of a model before it begins, outside the graph where the model was compiled;
    the handles.

    torch.compile's wrapper and `module.compile()` both trace the hooks of the module inside, and with fullgraph=True
    they must not meet this one. So it goes around the compiled call, with one inside that is silent while traced.
    """
    hook, module, outer = _ModelHook(patch, model), model.module, model.outer

    def ended(module: nn.Module, args: tuple[Any, ...], *more: Any) -> None:
        # Without kwargs where another thread has just taken the hook off, and torch no longer knows that it wants them.
        hook.end(args, *(more if len(more) == 2 else ({}, *more)))

    after = _outside_graphs(ended)
    if outer is not module:
        return [
            outer.register_forward_pre_hook(_Hook(_compiled(hook)), with_kwargs=True),
            outer.register_forward_hook(_Hook(after), with_kwargs=True, always_call=True),
            module.register_forward_pre_hook(_Hook(_silent_in_graphs(hook)), with_kwargs=True),
        ]
    compiled_call = module._compiled_call_impl
    if compiled_call is None:
        return [
            module.register_forward_pre_hook(_Hook(_breaking_graphs(hook)), with_kwargs=True),
            module.register_forward_hook(_Hook(after), with_kwargs=True, always_call=True),
        ]

    def call(*args: Any, **kwargs: Any) -> Any:
        output = None
        try:
            hook.begin(args, kwargs)
            output = compiled_call(*args, **kwargs)
        finally:
            hook.end(args, kwargs, output)
        return output

    module._compiled_call_impl = call
    inside = module.register_forward_pre_hook(_Hook(_silent_in_graphs(hook)), with_kwargs=True)
    return [_CompiledCall(module, call, compiled_call), inside]


def rows_of(patch: Patch, model: PatchedModel, text: Tensor) -> Rows | None:
    """What is known of a batch of text. Raises: ValueError where it matters, and nothing is known."""
    call = patch._calls.current
    rows = None if patch._memory is None else patch._memory.find(text, call.encoded, call.guidance())
    told = patch._given.active is not None and (patch._given.protected is not None or not model.text.needs_protected())
    if patch._memory is not None and rows is None and not told and model.text.needs_active():
        raise ValueError(
            f"encoder_hidden_states: its rows {tuple(text.shape)} are not what this pipeline's encode_prompt "
            "returned, or equal both prompts and negative prompts in an unknown order, so prompts and unconditional "
            f"entries cannot be told apart. Pass active=, bool ({text.shape[0]},), True for prompts, and protected=, "
            f"bool ({text.shape[1]},), True for BOS, EOS and padding, to sdattn_fast.apply or patch.update; or, where "
            "another pipeline on the same UNet encodes the text, patch.watch(that_pipeline)"
        )
    return rows


def _warn_of_loop(patch: Patch) -> None:
    """A recipe acts through a pipeline's callbacks, which a loop of one's own does not have. Once a place."""
    warnings.warn(
        "sdattn_fast: the UNet runs outside a call of the patched pipeline, where a recipe does nothing; in a loop of "
        "your own, use sdattn_fast.guidance.Correction",
        UserWarning,
        stacklevel=3,
    )


class _Hook:
    """A forward hook, of which a copy of the model has none."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        warnings.warn(
            "sdattn_fast: a patched model is copied or saved as a whole, and the copy is not patched; apply to it",
            UserWarning,
            stacklevel=2,
        )
        return no_hook, ()


Hook = Callable[..., None]
_EMPTY: dict[str, Any] = {}


def _compiled(hook: _ModelHook) -> Hook:
    def outer(module: nn.Module, args: tuple[Any, ...], kwargs: Any = _EMPTY) -> None:
        hook.begin(args, kwargs)

    return outer


def _breaking_graphs(hook: _ModelHook) -> Hook:
    """For a model that may be compiled later, its hooks traced: the graph ends there and another begins."""
    outside = _outside_graphs(hook.__call__)

    def inner(module: nn.Module, args: tuple[Any, ...], kwargs: Any = _EMPTY) -> None:
        # Not inside, where it would always be False.
        outside(args, kwargs, compiled=torch.compiler.is_compiling())

    return inner


def _outside_graphs(call: Callable[..., None]) -> Callable[..., None]:
    says = "reason" in inspect.signature(torch.compiler.disable).parameters  # since torch 2.7
    return torch.compiler.disable(call, **({"reason": _NO_GRAPH} if says else {}))


_NO_GRAPH = (
    "sdattn_fast looks the text up outside of the graph. torch.compile: without fullgraph=True, or before "
    "sdattn_fast.apply. torch.export, torch.jit.trace and make_fx: before apply, or after remove()"
)


def _silent_in_graphs(hook: _ModelHook) -> Hook:
    def inner(module: nn.Module, args: tuple[Any, ...], kwargs: Any = _EMPTY) -> None:
        # Where torch.compile falls back to eager, the call around it has looked.
        if not torch.compiler.is_compiling() and not hook.begun:
            hook(args, kwargs)

    return inner


@dataclass
class _CompiledCall:
    """A handle, like a hook's."""

    module: nn.Module
    ours: Callable[..., Any]
    theirs: Callable[..., Any]

    def remove(self) -> None:
        if self.module._compiled_call_impl is self.ours:
            self.module._compiled_call_impl = self.theirs


class _ModelHook:
    """Before a UNet or ControlNet runs: look at its text, mix its seeds, see that our processors are in place."""

    def __init__(self, patch: Patch, model: PatchedModel) -> None:
        self.patch = patch
        self.model = model
        self.begun = False  # a compiled call is running, and this was called before it

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self(args, kwargs, compiled=True)
        self.begun = True

    def end(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After the forward. output: None where it was broken off, or ended with its maps."""
        self.begun = False
        patch, states = self.patch, self.model.states
        state, call = states.current, patch._calls.current
        if patch._keeper is not None and (output is not None or call.ends_with_maps):
            patch._keeper.end(call, state.text, state.layers)
        if patch._wants_forwards and not call.aside and self.model is patch._models[0]:
            call.keep_forward(self.model.inputs(args, kwargs), output, state.text)
        state.text.end_forward()
        states.end()

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any], compiled: bool = False) -> None:
        """compiled: the forward that begins is a graph's."""
        patch, model = self.patch, self.model
        if in_graph():  # not torch.compile's: this is never traced
            raise RuntimeError(
                f"{type(model.module).__name__}: a patched model cannot be exported or traced, since {_NO_GRAPH}"
            )
        patch._processors.keep(model.layers)
        compiled = compiled or model.compiled_inside or is_compiled(model.around)
        state = model.states.begin(base=compiled)
        inputs = model.inputs(args, kwargs)
        timestep, text = inputs.get("timestep", 0), inputs.get("encoder_hidden_states")
        call, begins = self._step(state.text, timestep)
        if patch.guide is not None and call.pipe is None and not call.aside:
            _warn_of_loop(patch)
        for layer in state.layers:
            layer.grid = layer.bias = layer.seed = None
        state.text.use_gate(call.gate)
        text = text if isinstance(text, Tensor) and text.dim() == 3 else None
        if text is not None:
            scales = _scales_adapters(args, kwargs)
            model.see_padding(state.text, inputs)
            state.text.in_forward = True
            state.text.entries = len(text) if model.kind.repeats_text else None
            if capturing(text.device):
                _check_capture(compiled, scales)
            self._look_at(text)
            bias = call.bias
            if bias:
                rows = state.text.rows_told(len(text))
                for layer in state.layers:
                    if layer.name in bias:
                        layer.bias = of_entries(bias[layer.name], rows)
        if patch._keeper is not None:
            prompts = None if text is None else state.text.prompts_asked(len(text))
            patch._keeper.begin(call, begins, model.module, state.layers, inputs.get(model.names[0]), prompts)
        ahead = patch._settings.text_cache and model.kind.reads_own_text
        if text is not None and (ahead or compiled):
            self._prepare(state, text, compiled, scales)
        if patch._given.seed is not None and patch._settings.draws and text is not None:
            seeds = model.seeds.at(state.text.entry_seeds(len(text)), timestep, text.device)
            for layer, of_layer in zip(state.layers, seeds.unbind(), strict=True):
                layer.seed = of_layer

    def _step(self, text: TextState, timestep: Any) -> tuple[Call, bool]:
        """The call that a forward is of, and whether a step of it begins. Steps are counted where that matters."""
        patch, training = self.patch, self.model.module.training
        scheduled = not isinstance(patch._settings.dropout_when, str)
        now = patch._calls.current
        if patch._keeper is None and not scheduled and not patch._wants_forwards:
            return now, False
        alone = training and (torch.is_grad_enabled() or patch.step is not None)
        if alone and not now.explicit and not now.aside:
            # A training loop draws its timesteps at random: they say nothing of a step, and `Patch.step` does.
            call, begins = patch._calls.alone(patch.step or 0), True
        else:
            call, begins = patch._calls.step(timestep)
        if scheduled:
            text.step = patch.step if training else call.steps.index
        return call, begins

    def _look_at(self, text: Tensor) -> None:
        state, settings = self.model.text, self.patch._settings
        rows, number, state.graph = rows_of(self.patch, self.model, text), None, None
        in_capture = capturing(text.device)
        if in_capture and not self.model.kind.reads_own_text:
            raise RuntimeError(
                f"{type(self.model.module).__name__}: a CUDA graph is captured of it, and its layers read text that it "
                "projects in every forward; expected an eager call"
            )
        if settings.text_cache and self.model.kind.reads_own_text:
            graph = state.graph_with(text)
            if graph is not None and not in_capture and not state.is_current(graph, text, rows):
                self._renew(graph, text, rows)
            seen = state.cached.look(text)
            # A call of its own for every text that a CUDA graph may come to read.
            shared = looking_is_free(text.device) or torch.is_grad_enabled()
            number = None if seen is None or shared else seen.number
        state.see(rows, number)
        if in_capture:
            self._begin_capture(text, rows, number)

    def _renew(self, graph: GraphText, text: Tensor, rows: Rows | None) -> None:
        """Bring what a graph reads up to date; where it has no room for that, this call can do without, and the graph
        gives NaN."""
        state = self.model.text
        if graph.no_room is not None and graph.no_room == version_of(text):
            return
        try:
            renewal = state.renewal_of(graph, rows)
        except ValueError:
            graph.no_room = version_of(text)
        else:
            state.rewrite_graph(graph, renewal, rows, text)

    def _begin_capture(self, text: Tensor, rows: Rows | None, number: int | None) -> None:
        state = self.model.text
        if number is None:
            raise RuntimeError(
                "encoder_hidden_states: a CUDA graph is captured with a text that the patch has not seen, or may not "
                "keep. Run the same call once before the capture, with the same tensor, text_cache=True, no gradients, "
                "and a text that was not made in inference mode"
            )
        gate = state.gate
        if gate is not None and gate.requires_grad:
            raise RuntimeError("gate: it wants a gradient, and a captured CUDA graph has none; pass gate.detach()")
        if not isinstance(self.patch._settings.dropout_when, str):
            raise RuntimeError(
                "dropout_when: a schedule changes with the step, and a captured CUDA graph does the same at every "
                "replay; expected 'always' or 'training'"
            )
        graph = next((one for one in state.graphs if one.number == number), None)
        if graph is None:
            graph = GraphText(number, text, state.cached.hold(number), rows)
            state.graphs.append(graph)
        state.graph, graph.is_guarded = graph, False

    def _prepare(self, of_model: ModelState, text: Tensor, compiled: bool, weights_change: bool) -> None:
        """Ahead of the layers, so that no graph has to prepare a call.

        Raises: RuntimeError where a graph's layers read a text of a shape that is not known here.
        """
        state, layers, device = of_model.text, of_model.layers, text.device
        if compiled and not self.model.kind.keeps_tokens:
            raise RuntimeError(
                f"{type(self.model.module).__name__}: expected an eager model, got a compiled one: its layers read "
                "more text than it is called with, which a graph would make constants of"
            )
        per_layer = [(one.attn.heads, one.heads, one.captures, one.attn.training) for one in layers]
        batch, tokens = text.shape[:2]
        padding = state.padding_of(tokens)
        ready_for = text.shape, device, current_stream(device), state.step, compiled, per_layer, padding
        if not compiled and state.ready_for is not None:
            if state.ready_for[0] is state.cache and state.ready_for[1] == ready_for:
                return
        for layer in layers:
            layer.compiled = None
        state.ready_for = None
        try:
            ready = [
                state.ready(LayerCall(batch, int(heads), tokens, device, active, captures, training, padding=padding))
                for heads, active, captures, training in per_layer
            ]
        except ValueError:
            # Video models multiply the batch inside: what does not fit here may fit there. If not, the layer says so.
            return
        state.ready_for = state.cache, ready_for
        if compiled:
            for layer, one in zip(layers, ready, strict=True):
                layer.compiled = compiled_text(layer, text, one, weights_change)


def _scales_adapters(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether diffusers changes the scale of LoRAs inside the forward that begins, and back: keys and values that are
    made outside it are of another scale."""
    given = [kwargs.get("cross_attention_kwargs"), *args]
    return any(isinstance(one, dict) and one.get("scale", 1.0) != 1.0 for one in given)


def _check_capture(compiled: bool, scales: bool) -> None:
    if compiled:
        raise RuntimeError(
            "a CUDA graph is captured of a compiled model. Capture the model as it was before torch.compile, or leave "
            "the capture to torch.compile(mode='reduce-overhead')"
        )
    if scales:
        raise RuntimeError(
            "cross_attention_kwargs: a LoRA's scale that holds for one call cannot be captured in a CUDA graph; set it "
            "with set_adapters(names, weights)"
        )
