"""`Patch`: a program in place in the UNet and ControlNets of a pipeline."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from .before_forward import before_forward, rows_of
from .call import Call, Calls
from .early_end import may_end_early
from .graph_text import GraphText
from .layers import Layer, watch_grids
from .map_keeper import MapKeeper, key_layers
from .maps import Maps
from .patched_model import PatchedModel
from .placed_processors import PlacedProcessors
from .prompt_memory import PromptMemory
from .settings import Settings
from .step_callback import Guide, call_arguments, with_step_callback
from .token_classes import EncoderListener
from .token_inputs import INPUTS, TokenInputs, checked_input
from .watched_pipeline import WatchedPipeline, encode_function
from .words import tokenizer_of

__all__ = ["Patch"]


class Patch:
    """A program in place in a model: what `apply` returns. As a context manager it ends with `remove`.

    Attributes:
        step: The training step, for a dropout schedule in train mode. The training loop sets it.

    Examples:
        >>> patch = sdattn_fast.apply(pipe, capture=Capture())
        >>> patch.watch(StableDiffusionImg2ImgPipeline(**pipe.components))
        >>> image = pipe("a red car").images[0]
        >>> patch.maps.overlay(image, "a red car")["car"].save("car.png")
        >>> patch.remove()
    """

    def __init__(
        self,
        settings: Settings,
        given: TokenInputs,
        models: list[PatchedModel],
        layers: list[Layer],
        pipe: Any,
        layers_kept: Sequence[str] | None = None,
    ) -> None:
        self._settings = settings
        self._given = given
        self._models = models
        self._layers = layers
        self._pipe = pipe
        self._memory = None if pipe is None else PromptMemory()
        self._watched: list[WatchedPipeline] = []
        self._calls = Calls(self._scheduler)
        self._wants_forwards = 0  # so many look at them between steps
        self._keeper = None if settings.capture is None else MapKeeper(settings.capture, layers_kept)
        self.step: int | None = None
        self._handles: list[Any] = []
        self._installed = False
        self._warned = False  # of calls with another UNet
        self._processors = PlacedProcessors(settings)
        self.guide: Guide | None = None  # of every picture that the pipeline draws, until `remove`

    @property
    def _needs_grids(self) -> bool:
        """Whether every forward is to find its layers' height and width: a hook a block, which costs time."""
        refine = self._settings.program.refine
        return self._keeper is not None or (refine is not None and refine.sigma > 0)

    @contextlib.contextmanager
    def watching_grids(self) -> Iterator[None]:
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
    def all_layers(self) -> list[Layer]:
        """The patched layers, the UNet's and ControlNets', as this thread's forwards see them."""
        return [layer.of_thread() for layer in self._layers]

    @property
    def unet_layers(self) -> list[Layer]:
        """The UNet's patched layers, as this thread's forwards see them: a ControlNet's do not run in its forward."""
        return list(self._models[0].states.current.layers) if self._models else []

    @property
    def unet(self) -> nn.Module | None:
        """The patched UNet or transformer as it is called, such as a compiled one. None: nothing is patched."""
        return self._models[0].outer if self._models else None

    def check_guided(self) -> None:
        """Raises: ValueError of a model that guidance does not know how to call."""
        for model in self._models[:1]:
            model.check_guided()

    def may_end_early(self) -> bool:
        """As `early_end.may_end_early`, of the UNet."""
        mine = {handle.id for handle in self._handles if hasattr(handle, "id")}
        return bool(self._models) and may_end_early(self._models[0], mine)

    @property
    def pipe(self) -> Any:
        """The pipeline whose prompts are known. None: a UNet was patched, or a pipeline without `encode_prompt`."""
        return self._pipe

    @property
    def gate(self) -> Tensor | None:
        """The gate that `apply` or `update` was given. None: there is none."""
        return self._given.gate

    @property
    def captures(self) -> bool:
        """Whether `apply` was given `capture`, so that there are `maps`."""
        return self._keeper is not None

    @property
    def installed(self) -> bool:
        """Whether the program is in place: False after `remove`."""
        return self._installed

    def key_layers(self, size: tuple[int, int]) -> set[str]:
        """The names of the UNet's layers that are captured by default for a latent of (height, width)."""
        return key_layers(self._models[0].module, self.unet_layers, size) if self._models else set()

    @property
    def maps(self) -> Maps:
        """The maps of this thread's latest run, a mapping of layer names to tensors: the mean over its steps so far.

        (B, T, height, width) float32, the mean over active heads; (B, H, T, height, width) for
        ``Capture(reduce="none")``. B counts the active entries. A run is a call of the pipeline or a block of `call`;
        `Capture` chooses layers and steps. With gradients enabled the maps are the latest step's and part of its graph;
        in train mode every forward with gradients is a run, at `Patch.step`.

        Raises:
            ValueError: If `apply` was not given `capture`, or several threads drew and this one did not.
        """
        call = self._calls.to_read()
        if self._keeper is None or (self._keeper.capture.steps == () and not call.aside):
            raise ValueError("maps: expected apply(..., capture=sdattn_fast.Capture(...)), got no capture")
        clean_caption = None if self._memory is None else self._memory.clean_caption(call.encoded)
        return self._keeper.read(call, self.layers, tokenizer_of(self.pipe, clean_caption))

    def update(self, **inputs: Tensor | int | Sequence[int] | None) -> None:
        """Change the inputs of the program, also between two steps. Inputs that are not named stay.

        Args:
            **inputs: `gate`, `phrases`, `protected`, `active` or `seed`, as in `apply`; None removes one.

        Raises:
            TypeError: If an input is unknown or has the wrong type.
            ValueError: If an input has the wrong shape or value.

        Examples:
            >>> patch = sdattn_fast.apply(pipe)
            >>> patch.update(gate=torch.full((77,), 1.5))
        """
        for name in inputs:
            if name not in INPUTS:
                raise TypeError(f"update: expected {', '.join(INPUTS)}, got {name!r}")
        checked = {name: checked_input(name, x) for name, x in inputs.items()}
        gate = checked.get("gate")
        if gate is not None and gate.requires_grad and self._graphs():
            raise ValueError("gate: it wants a gradient, and a captured CUDA graph has none; pass gate.detach()")
        if "seed" in checked and self._settings.draws and self._graphs():
            raise ValueError("seed: a captured CUDA graph draws by the seed that it was captured with; capture it anew")
        before = dict(vars(self._given))
        vars(self._given).update(checked)
        if inputs.keys() == {"seed"}:  # what is prepared of a text has no seed
            return
        try:
            renewals = [(one.text, graph, one.text.renewal_of(graph, graph.rows)) for one, graph in self._graphs()]
        except ValueError:
            vars(self._given).update(before)
            raise
        for model in self._models:
            for one in model.texts:
                one.forget_prepared()
            for layer in model.all_layers:
                layer.compiled = None
        for text, graph, calls in renewals:
            text.rewrite_graph(graph, calls, graph.rows)

    def update_text(self, encoder_hidden_states: Tensor) -> None:
        """Update captured CUDA graphs after their text tensor was overwritten with another prompt, or weights were
        changed.

        A replayed graph runs no Python, so it cannot notice either; replayed without this, it gives NaN. A model that
        is called from Python, compiled or not, does not need this.

        Args:
            encoder_hidden_states: The (B, N, E) tensor itself that the graphs were captured with, not a copy.

        Raises:
            TypeError: If it is not such a tensor.
            ValueError: If no graph was captured with it, or the new prompt has more content tokens than the captured
                one (rounded up to a power of two, from 16 on). Then call `refresh` and capture again.

        Examples:
            >>> text.copy_(another_prompt)  # after: with torch.cuda.graph(graph): unet(x, t, text)
            >>> patch.update_text(text)
            >>> graph.replay()
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
        """Forget what was computed from prompts and weights; the next step computes it again.

        Call it after writes that leave no trace, such as those through `.data` on a GPU (docs/waiting.md). CUDA graphs
        captured so far give NaN from then on; capture them again.
        """
        for model in self._models:
            for text in model.texts:
                text.forget()
            for layer in model.all_layers:
                layer.compiled = None
        if self._memory is not None:
            self._memory.forget_found()

    def _graphs(self) -> list[tuple[PatchedModel, GraphText]]:
        """What captured CUDA graphs read, with the model that it is of."""
        return [(model, graph) for model in self._models for graph in model.text.graphs]

    def call(self) -> AbstractContextManager[Call]:
        """Marks a denoising loop of your own as one run: one mean of maps and one count of steps, in this thread.

        The pipeline's own calls do not need this. Without it, a run of a loop begins where the pipeline encodes
        prompts, where its scheduler's timesteps are set, or where timesteps rise.

        Returns:
            A context manager.

        Examples:
            >>> with patch.call():
            ...     for t in pipe.scheduler.timesteps:
            ...         noise = pipe.unet(latents, t, encoder_hidden_states=text).sample
            ...         latents = pipe.scheduler.step(noise, t, latents).prev_sample
        """
        return self._calls.within(Call(explicit=True))

    @contextlib.contextmanager
    def aside(self) -> Iterator[Call]:
        """Inside, this thread's forwards are not the run's: they count as no step, and their maps leave with them; and
        its `unet_layers` are theirs alone."""
        with contextlib.ExitStack() as kept:
            for model in self._models:
                kept.enter_context(model.states.kept())
            yield kept.enter_context(self._calls.aside())

    def keep_forwards(self) -> Callable[[], None]:
        """Keep the UNet's forwards of each step, in `Call.forwards`, until the function that this gives is called.

        Raises: ValueError of a model that guidance does not know how to call.
        """
        self.check_guided()
        self._wants_forwards += 1
        stopped: list[bool] = []

        def stop() -> None:
            if not stopped:
                stopped.append(True)
                self._wants_forwards -= 1

        return stop

    @property
    def current_call(self) -> Call:
        """This thread's call in progress, or its latest one."""
        return self._calls.current

    @property
    def left_out(self) -> tuple[str, ...]:
        """What the recipe could not do for this thread's latest picture, and why. Empty: it did all, or there is none.

        Raises:
            ValueError: If several threads drew and this one did not.
        """
        return tuple(self._calls.to_read().left_out)

    def watch(self, pipe: Any) -> None:
        """Know the prompts of another pipeline on the same UNet too, such as one made by `from_pipe`.

        Copies made by `copy.copy` after `apply` are known anyway.

        Args:
            pipe: The other pipeline.

        Raises:
            TypeError: If it is not a pipeline with `encode_prompt`.
            ValueError: If its UNet is another one, another patch watches it, or this patch was removed or has no
                pipeline.
        """
        if encode_function(pipe) is None:
            raise TypeError(f"pipe: expected a pipeline with encode_prompt, got {type(pipe).__name__}")
        if self._memory is None or not self._installed:
            raise ValueError("pipe: expected a patch in place, of a pipeline with encode_prompt, to watch another")
        if not self._serves(pipe):
            raise ValueError(f"pipe: expected a pipeline on the patched UNet, got a {type(pipe).__name__} on another")
        if self.guide is not None:
            self.guide.check(pipe)
        if not any(one.watches(pipe) for one in self._watched):
            self._watched.append(WatchedPipeline(pipe, self))

    def calling(self, pipe: Any) -> AbstractContextManager[Call]:
        """As `PipelineWatcher` has it."""
        if not self._serves(pipe) and not self._warned:
            self._warned = True
            warnings.warn(
                f"sdattn_fast: the unet of this {type(pipe).__name__} was exchanged after apply, and the program does "
                "not run in the new one; remove() and apply again",
                UserWarning,
                stacklevel=4,
            )
        return self._calls.of_pipeline(pipe)

    def arguments(
        self, pipe: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """As `PipelineWatcher` has it: with the guide's callback, where there is a guide."""
        if self.guide is None or not self._serves(pipe):
            return args, kwargs
        by_name = call_arguments(function, args, kwargs)
        callback = self.guide.begin(pipe, by_name)
        return (args, kwargs) if callback is None else ((), with_step_callback(by_name, callback))

    def encoded(
        self, pipe: Any, result: Any, heard: EncoderListener, function: Any, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> None:
        """As `PipelineWatcher` has it."""
        if self._memory is not None:
            encoded = self._memory.remember(result, heard, function, args, kwargs)
            if encoded is not None:
                self._calls.encoded(encoded, pipe)

    def _serves(self, pipe: Any) -> bool:
        """Whether the pipeline's UNet or transformer is the patched one."""
        return bool(self._models) and self._models[0].draws_for(pipe)

    def _scheduler(self) -> Any:
        return getattr(self._pipe, "scheduler", None)

    def remove(self) -> None:
        """Restore the original processors and the pipeline's `encode_prompt`. A second call does nothing."""
        if not self._installed:
            return
        self._installed = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for model in self._models:
            model.states.close()
        for layer in self._layers:
            self._processors.remove(layer)
        for one in self._watched:
            one.remove()
        self._watched.clear()
        if self.guide is not None:
            self.guide.remove()
            self.guide = None
        if self._memory is not None:
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
        if self._pipe is not None:  # first, since it may refuse
            self._watched.append(WatchedPipeline(self._pipe, self))
        self._installed = True
        for model in self._models:
            for layer in model.layers:
                self._processors.place(layer)
            if model.layers:
                self._handles += before_forward(model, self)
                if self._needs_grids:
                    self._handles += watch_grids(model.module, model.layers)
