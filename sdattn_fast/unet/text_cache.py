"""Text stands still: a layer's keys and values are computed once per prompt and kept while nothing that they hang on
moves.

That is the text, the weights they went through and torch's modes. Each is looked at before every use:
- text: the same tensor and version, or else the same values. On a CPU the values are compared even for the same
  tensor, once a forward, since a write through `.data` leaves no trace in the version.
- weights: the same parameters, versions and addresses; PEFT's active and merged adapters and their scaling; and, at
  each new prompt, a strided sample of the numbers themselves, for writes through `.data`. A single number changed that
  way can slip through: that is what `Patch.refresh` is for.
- modes: autocast and inference mode.
Where any of it cannot be known (a module of an unknown kind, hooks on it, inference tensors, gradients), nothing is
kept.

Source: DESIGN.md section 1, fact 1, and section 5, "Cached text state must notice".
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import FoldedText, Prepared

__all__ = ["KeyValue", "TextCache", "Weights"]

TEXTS = 2  # prompts remembered: an unbatched guidance alternates between two
_SAMPLES = 64


class TextCache:
    """The texts that a model saw last, numbered, and what its layers made of them. Safe from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._looks = 0
        self._texts: OrderedDict[int, Tensor] = OrderedDict()
        self._seen: _Seen | None = None
        self._entries: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], KeyValue]]
        self._entries = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return TextCache, ()  # a copy of a model starts with nothing

    def forget(self) -> None:
        with self._lock:
            self._texts.clear()
            self._seen = None
            self._entries = weakref.WeakKeyDictionary()

    def look(self, text: Tensor) -> int | None:
        """The number of a text, a new one for values that were not seen lately; None where it may not be kept.

        Called before a forward: until the next call, the same tensor object is taken for the same text.
        """
        if text.requires_grad and torch.is_grad_enabled():
            return None
        with self._lock:
            number = self._number(text)
            self._looks += self._seen is None or self._seen.number != number or self._seen.text() is not text
            version = None if text.is_inference() else text._version
            self._seen = _Seen(weakref.ref(text), version, number, self._looks)
            return number

    def find(self, attn: nn.Module, text: Tensor, weights: Weights) -> tuple[tuple[Any, ...], KeyValue | None] | None:
        """What a layer made of a text: (key, entry), entry None where it has to be made and handed to `keep`.

        None where nothing may be kept.
        """
        seen = self._seen
        if seen is None or seen.text() is not text or seen.version != (None if text.is_inference() else text._version):
            if self.look(text) is None:
                return None
            seen = self._seen
        if seen is None:
            return None
        key = (seen.number, *_modes(text))
        entry = self._entries.get(attn, {}).get(key)
        if entry is None or not entry.weights.same_as(weights):
            return key, None
        if entry.look != seen.look:
            if not entry.weights.sampled_alike():
                return key, None
            entry.look = seen.look
        return key, entry

    def keep(self, attn: nn.Module, key: tuple[Any, ...], entry: KeyValue) -> None:
        with self._lock:
            if key[0] not in self._texts:  # forgotten meanwhile, by another thread
                return
            of_layer = self._entries.setdefault(attn, {})
            for old in [k for k in of_layer if k[0] not in self._texts]:
                del of_layer[old]
            entry.look = self._looks
            entry.weights.sample()
            of_layer[key] = entry

    def latest(self, attn: nn.Module) -> KeyValue | None:
        """What is kept of a layer, the newest first."""
        return next(reversed(self._entries.get(attn, {}).values()), None)

    def bytes(self) -> int:
        """Of everything kept."""
        kept = [t for of_layer in list(self._entries.values()) for e in of_layer.values() for t in e.tensors()]
        return sum(t.numel() * t.element_size() for t in [*kept, *self._texts.values()])

    def _number(self, text: Tensor) -> int:
        seen = self._seen
        if seen is not None and seen.text() is text and seen.version is not None and text.device.type != "cpu":
            if seen.version == text._version and seen.number in self._texts:
                return seen.number
        for number, kept in reversed(self._texts.items()):
            alike = kept.shape == text.shape and kept.dtype == text.dtype and kept.device == text.device
            if alike and torch.equal(kept, text):
                self._texts.move_to_end(number)
                return number
        self._count += 1
        self._texts[self._count] = text.detach().clone()
        if len(self._texts) > TEXTS:
            self._texts.popitem(last=False)
        return self._count


@dataclass
class KeyValue:
    """Keys and values (B, H, N, D) of one layer and text, and what is derived from them for the latest prepared call.

    value_folded: the values with the program's linear steps in them. folds: kind -> `FoldedText`.
    """

    key: Tensor
    value: Tensor
    weights: Weights
    look: int = 0
    prepared: Prepared | None = None
    value_folded: Tensor | None = None
    folds: dict[str, FoldedText] = field(default_factory=dict)

    def serve(self, prepared: Prepared) -> None:
        """Derive for this call from now on. What hangs on the content tokens alone outlives a change of the gate."""
        before, self.prepared = self.prepared, prepared
        if before is prepared:
            return
        if before is None or not before.folds_alike(prepared):
            self.folds.clear()
        self.value_folded = prepared.fold_value(self.value)

    def tensors(self) -> list[Tensor]:
        inner = [x for fold in self.folds.values() for x in fold.tensors()]
        return [x for x in (self.key, self.value, self.value_folded, *inner) if x is not None]


class Weights:
    """The parameters of some modules as they are now."""

    def __init__(self, parameters: list[Tensor], state: tuple[Any, ...]) -> None:
        self.parameters = parameters
        self.state = (state, tuple((p._version, p.data_ptr(), p.dtype, p.device) for p in parameters))
        self.requires_grad = any(p.requires_grad for p in parameters)
        self.samples: list[Tensor] = []

    @classmethod
    def of(cls, *modules: Any) -> Weights | None:
        """None where what the modules compute cannot be told from parameters that can be watched."""
        parameters: list[Tensor] = []
        state: list[Any] = []
        for module in modules:
            if module is None:
                continue
            for inner in module.modules():
                if not _is_plain(inner):
                    return None
                if hasattr(inner, "active_adapters") and hasattr(inner, "base_layer"):
                    if inner.training:  # its dropout is on
                        return None
                    state.append(_adapter_state(inner))
            parameters += module.parameters()
        for p in parameters:
            if type(p) is not nn.Parameter or type(p.data) is not Tensor or p.is_inference() or p.is_meta:
                return None
        return cls(parameters, (tuple(map(id, modules)), tuple(state)))

    def same_as(self, other: Weights) -> bool:
        return (
            self.state == other.state
            and len(self.parameters) == len(other.parameters)
            and all(a is b for a, b in zip(self.parameters, other.parameters, strict=True))
        )

    def sample(self) -> None:
        self.samples = [_sampled(p).clone() for p in self.parameters]

    def sampled_alike(self) -> bool:
        return all(torch.equal(kept, _sampled(p)) for kept, p in zip(self.samples, self.parameters, strict=True))


@dataclass(frozen=True)
class _Seen:
    """The tensor looked at last: how many new tensors there were up to it is `look`."""

    text: weakref.ref[Tensor]
    version: int | None
    number: int
    look: int


def _sampled(p: Tensor) -> Tensor:
    flat = p.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLES)]


def _modes(text: Tensor) -> tuple[Any, ...]:
    kind = text.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return autocast, torch.is_inference_mode_enabled(), torch.is_grad_enabled() and text.requires_grad


def _is_plain(module: nn.Module) -> bool:
    """Whether a module's forward is its class's, of a library whose modules keep their state in parameters."""
    known = type(module).__module__.split(".")[0] in ("torch", "diffusers", "peft")
    parametrized = hasattr(module, "parametrizations")
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    # DataParallel's replicas have tensors where parameters were.
    others = module._buffers or any(isinstance(x, Tensor) for x in module.__dict__.values())
    return known and not parametrized and not hooked and not others


def _adapter_state(module: Any) -> tuple[Any, ...]:
    scaling = getattr(module, "scaling", {})
    return (
        tuple(module.active_adapters),
        tuple(getattr(module, "merged_adapters", ())),
        bool(getattr(module, "disable_adapters", False)),
        tuple(sorted((name, float(x)) for name, x in scaling.items())),
    )
