"""What a forward of a patched model works on: its layers and their text. Forwards of several threads at once each have
their own.

Source: docs/design.md, "The call".
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

from torch import nn

from .layers import Layer
from .text_state import TextState

__all__ = ["ModelState", "States"]

_LOOK = 0.1  # seconds between looks at a thread that has the base


@dataclass(eq=False)
class ModelState:
    """One forward's worth of a model: its served layers, in the model's order, and the text that they read.

    owner: the thread whose forward works on it, None: it is free. kept: so many `States.kept` of the owner are open.
    """

    text: TextState
    layers: list[Layer]
    owner: int | None = None
    kept: int = 0


class States:
    """The states of one model, as many as forwards that ran at once.

    base: the first, and the one that graphs of torch.compile read; their forwards take turns. A forward that was broken
    off where torch calls no hook (Ctrl-C, a thread that ended) leaves its state to its thread's next one; that of a
    thread that has ended, or that a graph waits for, to anybody's.
    """

    def __init__(self, text: TextState, layers: Sequence[Layer], module: nn.Module) -> None:
        """module: the model as it is called."""
        self.base = ModelState(text, list(layers))
        self.all = [self.base]
        self.latest = self.base  # for what runs outside a forward, such as gradient checkpointing in a backward
        self._module = module
        self._closed = False
        self._changed = threading.Condition()
        self._mine = _OfThread()
        for i, layer in enumerate(self.base.layers):
            layer.states, layer.index = self, i

    @property
    def current(self) -> ModelState:
        """This thread's: of its forward in progress, else of its latest one."""
        return self._mine.state or self.latest

    def begin(self, base: bool = False) -> ModelState:
        """A forward begins in this thread. base: it is a graph's."""
        me, state = threading.get_ident(), self._mine.state
        if state is None or state.owner != me or (base and state is not self.base):
            with self._changed:
                if state is not None and state.owner == me:
                    state.owner = None
                while base and not self._is_free(self.base, base) and not self._closed:
                    self._changed.wait(_LOOK)
                if base:
                    state = self.base
                elif state is None or state.owner is not None:
                    state = next((one for one in reversed(self.all) if self._is_free(one)), None) or self._another()
                state.owner, state.kept = me, 0
            self._mine.state = state
        self.latest = state
        return state

    def end(self) -> None:
        """The forward in progress is over, or was broken off."""
        state = self._mine.state
        if state is not None and state.owner == threading.get_ident() and not state.kept:
            with self._changed:
                state.owner = None
                self._changed.notify_all()

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, this thread's forwards have one state, and it is nobody else's in between."""
        state = self.begin()
        state.kept += 1
        try:
            yield
        finally:
            state.kept -= 1
            self.end()

    def close(self) -> None:
        """The patch is taken off: nobody waits any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _is_free(self, state: ModelState, base: bool = False) -> bool:
        """base: a graph waits for it, which can have no other."""
        if state.owner is None or state.owner == threading.get_ident():
            return not state.kept
        frames = sys._current_frames()
        if state.owner not in frames:  # the thread has ended
            return True
        # Frames of a thread that runs may not be followed safely, so it is done only where there is but one state.
        return base and not state.kept and not _is_in_forward(frames[state.owner], self._module)

    def _another(self) -> ModelState:
        text = self.base.text.beside()
        layers = [
            Layer(layer.name, layer.attn, text, layer.heads, layer.across_heads, states=self, index=layer.index)
            for layer in self.base.layers
        ]
        self.all.append(ModelState(text, layers))
        return self.all[-1]


def _is_in_forward(frame: FrameType | None, module: nn.Module) -> bool:
    """Whether a thread that is at a frame is somewhere inside a call of a module."""
    while frame is not None:
        if frame.f_code is _CALL:
            called = frame.f_locals.get("self")
            if called is module or getattr(called, "_is_replica", False):  # DataParallel's
                return True
        frame = frame.f_back
        if frame is not None and not isinstance(frame, FrameType):  # CPython 3.11, of a call that ends meanwhile
            return True
    return False


_CALL = nn.Module._wrapped_call_impl.__code__


class _OfThread(threading.local):
    """state: the latest one."""

    def __init__(self) -> None:
        self.state: ModelState | None = None
