"""Whose picture it is: a `Call` is one call of a pipeline, or one run of a loop, in one thread.

It has the prompts that were encoded for it, the step it is at, and the maps of its steps. A call of a pipeline begins
and ends with it. A loop's begins where it encodes prompts, sets the scheduler's timesteps, or goes back to an earlier
timestep; `Patch.call` says so where none of this shows.

Source: docs/design.md, "The call".
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from .forwards import Forward
from .map_sums import MapSums
from .prompt_memory import Encoded
from .prompt_rows import Guidance
from .steps import Steps, Timesteps
from .text_state import TextState

__all__ = ["Call", "Calls", "draws_in_windows"]


class Call:
    """One picture being drawn, or a batch of them.

    pipe: whose call it is, None for a loop's. explicit: it ends where somebody says so, and not where timesteps turn.
    biases: whose -> {layer name: (B or 1, 1, M, N)}, added to the logits of the layer's forwards; each takes back its
    own. gate: as `apply` takes it, in place of the patch's. aside: its forwards are beside those of the picture.
    ends_with_maps: they are made for their maps alone (`early_end`). maps_of: which of the captured layers keep maps in
    them, names or patterns; None: all.
    """

    def __init__(self, pipe: Any = None, *, explicit: bool = False, aside: bool = False) -> None:
        self.pipe = pipe
        self.explicit = explicit or pipe is not None
        self.aside = aside
        self.over = self.ends_with_maps = False
        self.maps_of: str | Sequence[str] | None = None
        self.encoded: list[Encoded] = []  # the newest first
        self.steps = Steps()
        self.maps = MapSums()
        self.biases: dict[Any, dict[str, Tensor]] = {}
        self.gate: Tensor | None = None
        self.forwards: list[Forward] = []  # of the UNet in the latest step, where somebody wants them
        self.left_out: list[str] = []  # by a recipe, each with its reason
        self.time: float | None = None  # the latest timestep, where it was read
        self.schedule: Any = None  # the scheduler's timesteps at the first step
        self.encoder: weakref.ref[Any] | None = None  # the pipeline, or copy, that encoded a loop's prompts

    def keep_forward(self, inputs: Mapping[str, Any], output: Any, text: TextState) -> None:
        """The UNet ran for this call. inputs: by name."""
        prediction = output[0] if isinstance(output, tuple) else getattr(output, "sample", None)
        if isinstance(prediction, Tensor):
            said = {name: getattr(self.pipe, name, None) for name in _SAID_OF_GUIDANCE}
            rows = text.rows_told(len(prediction))
            self.forwards.append(Forward(inputs, prediction.detach(), rows, said))

    def end_of_picture(self) -> None:
        """What callbacks left for the next step goes: there is none."""
        self.forwards, self.gate = [], None
        self.biases.clear()

    @property
    def bias(self) -> dict[str, Tensor]:
        """Layer name -> the sum of all biases."""
        total: dict[str, Tensor] = {}
        for by_layer in self.biases.values():
            for name, bias in by_layer.items():
                total[name] = total[name] + bias if name in total else bias
        return total

    def guidance(self) -> Guidance:
        """What the pipeline says now of its UNet's text."""
        guided = getattr(self.pipe, "do_classifier_free_guidance", None)
        perturbed = getattr(self.pipe, "do_perturbed_attention_guidance", False)
        return Guidance(None if guided is None else bool(guided), bool(perturbed), draws_in_windows(self.pipe))


def draws_in_windows(pipe: Any) -> bool:
    """Whether a pipeline's UNet sees windows of a picture, as panoramas' do, and never the whole."""
    return callable(getattr(pipe, "get_views", None))


class Calls:
    """The calls of a patch: for every thread the one in progress, or its latest."""

    def __init__(self, scheduler: Callable[[], Any]) -> None:
        """scheduler: gives the patched pipeline's, or None."""
        self._scheduler = scheduler
        self._local = threading.local()
        self._latest: Call | None = None
        self._threads: set[int] = set()
        self._timesteps = Timesteps()

    @property
    def current(self) -> Call:
        """This thread's."""
        call: Call | None = getattr(self._local, "call", None)
        if call is None:
            call = self._local.call = Call()
        return call

    def to_read(self) -> Call:
        """The call whose maps are asked for: this thread's, or the only other thread's that drew.

        Raises: ValueError where several others drew.
        """
        call: Call | None = getattr(self._local, "call", None)
        if call is not None and (call.aside or call.steps.index >= 0):
            return call
        if len(self._threads) > 1:
            raise ValueError(
                f"maps: {len(self._threads)} threads drew with this patch, and this one did not; read them in the "
                "thread that drew"
            )
        return Call() if self._latest is None else self._latest

    @contextlib.contextmanager
    def within(self, call: Call) -> Iterator[Call]:
        """Inside, this thread's forwards are of a call; one that is in progress goes on after it."""
        before: Call | None = getattr(self._local, "call", None)
        self._local.call = call
        try:
            yield call
        finally:
            call.pipe, call.explicit, call.over = None, False, True
            call.end_of_picture()
            if before is not None and (before.explicit or call.aside):
                self._local.call = before

    def of_pipeline(self, pipe: Any) -> AbstractContextManager[Call]:
        """Around a call of a pipeline; part of the one that `Patch.call` began, where there is one."""
        call = self.current
        if call.explicit and call.pipe is None and not call.aside:
            return _joined(call, pipe)
        return self.within(Call(pipe))

    def aside(self) -> AbstractContextManager[Call]:
        """Inside, forwards are beside those of the picture: they count as no step of it, and their maps leave with
        them."""
        call, beside = self.current, Call(aside=True)
        beside.encoded, beside.steps = list(call.encoded), call.steps.copy()
        beside.biases, beside.gate, beside.encoder = dict(call.biases), call.gate, call.encoder
        return self.within(beside)

    def encoded(self, encoded: Encoded, pipe: Any) -> None:
        """This thread encoded prompts: for the call in progress, or for the run that begins."""
        call = self.current
        if not call.explicit and call.steps.index >= 0:
            call = self._local.call = Call()
        call.encoded, call.encoder = [encoded, *call.encoded[: _ENCODED - 1]], weakref.ref(pipe)

    def alone(self, index: int) -> Call:
        """A forward begins that is a run by itself, at a step."""
        call = self._local.call = Call()
        call.steps, call.over = Steps(index), True
        return self._drew(call)

    def step(self, timestep: Any) -> tuple[Call, bool]:
        """A forward at a timestep begins: the call it is of, and whether a step of it begins."""
        call = self.current
        scheduler = self._scheduler_of(call)
        if not call.explicit and not call.aside:
            # A loop: of a UNet alone, timesteps that rise begin a run, unless their whole schedule rises.
            schedule, time = getattr(scheduler, "timesteps", None), self._timesteps.of(timestep)
            others = call.schedule is not None and schedule is not None and call.schedule is not schedule
            if call.over or others or self._turns(call, timestep, time):
                encoded, encoder = call.encoded, call.encoder
                call = self._local.call = Call()
                call.encoded, call.encoder = encoded, encoder
            call.time, call.schedule = time, schedule
        begins = call.steps.begin(timestep, scheduler)
        if begins:
            call.forwards = []
        return self._drew(call), begins

    def _scheduler_of(self, call: Call) -> Any:
        pipe = call.pipe if call.encoder is None or call.pipe is not None else call.encoder()
        if pipe is not None:
            return getattr(pipe, "scheduler", None)
        # Of a loop that encoded nothing it is the patched pipeline's, unless other threads move that.
        return self._scheduler() if self._threads <= {threading.get_ident()} else None

    def _turns(self, call: Call, timestep: Any, time: float) -> bool:
        if call.time is None or time == call.time:
            return False
        return (time < call.time) if self._timesteps.rises(timestep) else (time > call.time)

    def _drew(self, call: Call) -> Call:
        if not call.aside:
            self._latest = call
            self._threads.add(threading.get_ident())
        return call


@contextlib.contextmanager
def _joined(call: Call, pipe: Any) -> Iterator[Call]:
    call.pipe = pipe
    try:
        yield call
    finally:
        call.pipe = None
        call.end_of_picture()


# A callback may change them before another one looks.
_SAID_OF_GUIDANCE = ("do_classifier_free_guidance", "guidance_scale", "image_guidance_scale", "guidance_rescale")
_ENCODED = 16  # of a loop that encodes and encodes: what is before these is looked up among all
