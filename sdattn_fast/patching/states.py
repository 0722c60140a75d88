"""What a forward of a patched model works on: its layers and their text. Forwards of several threads at once each have
their own.

Source: docs/design.md, "The call".
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .layers import Layer
from .text_state import TextState

__all__ = ["ModelState", "States"]


@dataclass(eq=False)
class ModelState:
    """One forward's worth of a model: its served layers, in the model's order, and the text that they read."""

    text: TextState
    layers: list[Layer]


class States:
    """The states of one model, as many as forwards that ran at once.

    A forward that was broken off (Ctrl-C) leaves its state to the next one of its thread. base: the first, and the one
    that graphs of torch.compile read; their forwards take turns.
    """

    def __init__(self, text: TextState, layers: Sequence[Layer]) -> None:
        self.base = ModelState(text, list(layers))
        self.all = [self.base]
        self.latest = self.base  # for what runs outside a forward, such as gradient checkpointing in a backward
        self._free = [self.base]
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
        mine = self._mine
        if not mine.taken or (base and mine.state is not self.base):
            with self._changed:
                if mine.taken and mine.state is not None:
                    self._free.append(mine.state)
                    mine.taken = False
                while base and self.base not in self._free:
                    self._changed.wait()
                wanted = self.base if base else mine.state
                mine.state = wanted if wanted in self._free else self._free[-1] if self._free else self._another()
                if mine.state in self._free:
                    self._free.remove(mine.state)
            mine.taken = True
        assert mine.state is not None
        self.latest = mine.state
        return mine.state

    def end(self) -> None:
        """The forward in progress is over, or was broken off."""
        mine = self._mine
        if mine.taken and not mine.kept and mine.state is not None:
            mine.taken = False
            with self._changed:
                self._free.append(mine.state)
                self._changed.notify_all()

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, this thread's forwards have one state, and it is nobody else's in between."""
        self._mine.kept += 1
        self.begin()
        try:
            yield
        finally:
            self._mine.kept -= 1
            self.end()

    def _another(self) -> ModelState:
        text = self.base.text.beside()
        layers = [
            Layer(layer.name, layer.attn, text, layer.heads, states=self, index=layer.index)
            for layer in self.base.layers
        ]
        self.all.append(ModelState(text, layers))
        return self.all[-1]


class _OfThread(threading.local):
    """state: the latest one. taken: a forward is in progress with it. kept: how many `States.kept` are open."""

    def __init__(self) -> None:
        self.state: ModelState | None = None
        self.taken = False
        self.kept = 0
