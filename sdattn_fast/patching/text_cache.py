"""Text stands still: a layer's keys and values are computed once per prompt and kept while nothing that they hang on
moves.

That is the text, the weights they went through and torch's modes. Each is looked at before every use:
- text: on a CPU the values, once a forward. Elsewhere, where a look at values would wait for the device, the memory:
  the same, and not written to since (`Place`), whichever tensor or view comes with it. A write through `.data` leaves
  no trace there: that is what `Patch.refresh` is for. Text made in inference mode, whose writes torch does not count,
  is new at every forward.
- weights: the same parameters, versions, storages and strides; PEFT's active and merged adapters and their scaling;
  and, on a CPU, a strided sample of the numbers at every forward, for writes through `.data`. A single number changed
  that way can slip through, and, off the CPU, any number until the text changes: `Patch.refresh` again.
- modes: autocast and inference mode.
Where any of it cannot be known (a class that `known_modules` does not list, hooks on a module or on all, DataParallel's
replicas, inference tensors, gradients), nothing is kept.

Source: docs/design.md, "The text is constant across steps" and "When cached text is stale".
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..execute import Prepared
from ..folded_layer import FoldedText, folds_alike
from ..places import Known, looking_is_free, version_of
from ..streams import MadeOn, capturing
from .known_modules import any_global_hook, is_hooked, is_known, unknown_class

if TYPE_CHECKING:
    from .bound import BoundLayer

__all__ = ["KeyValue", "Served", "TextCache", "Weights", "why_unread"]

TEXTS = 2  # prompts remembered: an unbatched guidance alternates between two
_SAMPLES = 64


class TextCache:
    """The texts that a model saw last, numbered, and what its layers made of them. Safe from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._looks = 0
        self._texts: OrderedDict[int, Known] = OrderedDict()
        self._held: set[int] = set()
        self._copies: dict[int, Tensor] = {}  # on devices where looking is not free
        self._looked_at: _Looked | None = None
        self._entries: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], KeyValue]]
        self._entries = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return TextCache, ()  # a copy of a model starts with nothing

    def forget(self) -> None:
        with self._lock:
            self._texts.clear()
            self._held.clear()
            self._copies = {}
            self._looked_at = None
            self._entries = weakref.WeakKeyDictionary()

    def look(self, text: Tensor) -> _Looked | None:
        """Give a text its number, a new one for a text that was not seen lately; None where it may not be kept.

        Called before a forward: until the next call, the same tensor object is taken for the same text. While a CUDA
        graph is captured no text is new: what would be made of it belongs to the graph.
        """
        if text.requires_grad and torch.is_grad_enabled():
            return None
        with self._lock:
            number = self._number(text, capturing(text.device))
            if number is None:
                self._looked_at = None
                return None
            self._looks += 1
            self._looked_at = _Looked(weakref.ref(text), version_of(text), number, self._looks)
            return self._looked_at

    def find(
        self, attn: nn.Module, text: Tensor, modules: tuple[Any, ...]
    ) -> tuple[tuple[Any, ...], KeyValue | None] | None:
        """What a layer made of a text with these modules: (key, entry), entry None where it has to be made and handed
        to `keep`.

        None where nothing may be kept.
        """
        found = self._made_of(attn, text)
        if found is None:
            return None
        key, entry, look = found
        if entry is None or not entry.weights.still_of(*modules) or not entry.passes(look):
            return key, None
        entry.made.use(lambda: (entry.key, entry.value))
        return key, entry

    def bound(self, attn: nn.Module, text: Tensor) -> BoundLayer | None:
        """The call that a layer made with a text before, where weights and modes are what they were then."""
        found = self._made_of(attn, text)
        if found is None:
            return None
        _, entry, look = found
        if entry is None or entry.bound is None:
            return None
        return entry.bound if entry.bound.has_weights_of(attn) and entry.passes(look) else None

    def _made_of(self, attn: nn.Module, text: Tensor) -> tuple[tuple[Any, ...], KeyValue | None, int] | None:
        """(key, entry, look); entry None where there is none. The weights have not been looked at."""
        seen = self._looked_at  # read once: another thread may look at its own text meanwhile
        if seen is None or seen.text() is not text or seen.version != version_of(text):
            seen = self.look(text)
        if seen is None:
            return None
        key = (seen.number, getattr(attn, "heads", None), *_modes(text))
        of_layer = self._entries.get(attn)
        return key, None if of_layer is None else of_layer.get(key), seen.look

    def keep(self, attn: nn.Module, key: tuple[Any, ...], entry: KeyValue) -> None:
        with self._lock:
            if key[0] not in self._texts:  # forgotten meanwhile, by another thread
                return
            of_layer = self._entries.setdefault(attn, {})
            for old in [k for k in of_layer if k[0] not in self._texts]:
                del of_layer[old]
            entry.look = self._looks
            of_layer[key] = entry

    def latest(self, attn: nn.Module) -> KeyValue | None:
        """What is kept of a layer, the newest first."""
        return next(reversed(self._entries.get(attn, {}).values()), None)

    def bytes(self) -> int:
        """Of everything kept."""
        kept = [t for of_layer in list(self._entries.values()) for e in of_layer.values() for t in e.tensors()]
        copies = sum(known.bytes for known in self._texts.values()) + sum(x.nbytes for x in self._copies.values())
        return sum(t.nbytes for t in kept) + copies

    def hold(self, number: int) -> Tensor:
        """Keep a text and what was made of it for good; a copy of its numbers."""
        with self._lock:
            self._held.add(number)
            return self._copies[number]

    def renew(self, number: int, text: Tensor, entries: Sequence[KeyValue]) -> None:
        """A held text has other numbers now, and so have these entries; others that were made of it go."""
        with self._lock:
            self._texts[number] = Known(text)
            self._looked_at = None
            for of_layer in list(self._entries.values()):
                for key in [k for k, e in of_layer.items() if k[0] == number and not any(e is one for one in entries)]:
                    del of_layer[key]
                for key, entry in of_layer.items():
                    if key[0] == number:
                        entry.look = self._looks
                        entry.made.again()

    def is_same(self, number: int, text: Tensor) -> bool:
        """Whether a text is the one of that number."""
        known = self._texts.get(number)
        return known is not None and known.is_same(text)

    def _number(self, text: Tensor, old_only: bool) -> int | None:
        for number, known in reversed(self._texts.items()):
            if known.is_same(text):
                self._texts.move_to_end(number)
                return number
        if old_only:
            return None
        self._count += 1
        self._texts[self._count] = Known(text)
        if not looking_is_free(text.device):
            self._copies[self._count] = text.detach().clone()
        free = [number for number in self._texts if number not in self._held]
        if len(free) > TEXTS:
            del self._texts[free[0]]
            self._copies.pop(free[0], None)
        return self._count


@dataclass
class KeyValue:
    """Keys and values (B, H, N, D) of one layer and text, and what is derived from them for the latest call.

    look: at which look at the text the weights' numbers were last seen to be the same. bound: the latest call, kept for
    the steps to come.
    """

    key: Tensor
    value: Tensor
    weights: Weights
    look: int = 0
    served: Served | None = None
    bound: BoundLayer | None = None
    made: MadeOn = field(init=False)

    def __post_init__(self) -> None:
        self.made = MadeOn(self.key.device)

    def passes(self, look: int) -> bool:
        """Whether the weights' numbers are those of before, where looking is free; looked at once a look."""
        if self.look != look:
            if looking_is_free(self.key.device) and not self.weights.sampled_alike():
                return False
            self.look = look
        return True

    def serve(self, prepared: Prepared) -> Served:
        """What is derived for this call. What hangs on the content tokens alone outlives a change of the gate."""
        before = self.served
        in_capture = capturing(self.key.device)
        if not in_capture and (before is None or before.prepared is not prepared):
            self.bound = None
        if before is not None and before.prepared is prepared:
            before.made.use(lambda: (before.value_folded,))
            return before
        alike = before is not None and folds_alike(before.prepared, prepared)
        folds = before.folds if before is not None and alike else {}
        # A new object, not a change of the old one, which another thread may be reading.
        value_folded = prepared.fold_value(self.value)
        served = Served(prepared, value_folded, folds, MadeOn(self.key.device))
        gate = prepared.side.gate
        # Or its autograd graph would stay, and what is made in a CUDA graph's capture is the graph's.
        if not in_capture and (gate is None or not gate.requires_grad):
            self.served = served
        return served

    @property
    def prepared(self) -> Prepared | None:
        return None if self.served is None else self.served.prepared

    @property
    def folds(self) -> dict[str, FoldedText]:
        return {} if self.served is None else self.served.folds

    def tensors(self) -> list[Tensor]:
        inner = [x for fold in self.folds.values() for x in fold.tensors()]
        value_folded = [] if self.served is None else [self.served.value_folded]
        # Without linear steps the folded values are the values themselves.
        return list({id(x): x for x in (self.key, self.value, *value_folded, *inner)}.values())


@dataclass(frozen=True)
class Served:
    """value_folded: values with the program's linear steps in them. folds: kind -> `FoldedText`. made: where the values
    were."""

    prepared: Prepared
    value_folded: Tensor
    folds: dict[str, FoldedText]
    made: MadeOn


class Weights:
    """The parameters of some modules as they are now."""

    def __init__(self, modules: tuple[Any, ...], parameters: list[Tensor], state: tuple[Any, ...]) -> None:
        self.modules = modules
        self.parameters = parameters
        self.places = tuple(map(_place, parameters))
        self.state = state
        self.samples: list[Tensor] = []
        self.storages: list[StorageWeakRef] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "storages": []}  # a weak reference must not be copied

    @classmethod
    def of(cls, *modules: Any) -> Weights | None:
        """None where what the modules compute cannot be told from parameters that can be watched."""
        if any_global_hook():
            return None
        parameters: list[Tensor] = []
        state: list[Any] = []
        for module in modules:
            if module is None:
                continue
            if type(module) is nn.Linear:  # nearly all are, and this is asked by every layer at every step
                if is_hooked(module) or "weight" not in module._parameters:
                    return None
                parameters += [p for p in module._parameters.values() if p is not None]
                state.append(nn.Linear)
                continue
            for inner in module.modules():
                if not is_known(inner):
                    return None
                if hasattr(inner, "active_adapters") and hasattr(inner, "base_layer"):
                    if inner.training:  # its dropout is on
                        return None
                    state.append(_adapter_state(inner))
                state.append(type(inner))
            parameters += module.parameters()
        for p in parameters:
            if type(p) is not nn.Parameter or type(p.data) is not Tensor or p.is_inference() or p.is_meta:
                return None
        return cls(modules, parameters, tuple(state))

    def still_of(self, *modules: Any) -> bool:
        """Whether they are these modules' now: as `same_as`, in a hurry where all are plain layers."""
        if not _same_objects(self.modules, modules) or any_global_hook():
            return False
        for module in modules:
            if module is None:
                continue
            if type(module) is not nn.Linear:
                now = Weights.of(*modules)
                return now is not None and self.same_as(now)
            if is_hooked(module):
                return False
        owned = [p for module in modules if module is not None for p in module._parameters.values() if p is not None]
        return _same_objects(self.parameters, owned) and all(map(_is_at, owned, self.places))

    def same_as(self, other: Weights) -> bool:
        return (
            self.state == other.state
            and self.places == other.places
            and _same_objects(self.modules, other.modules)
            and _same_objects(self.parameters, other.parameters)
        )

    def sample(self) -> None:
        """Remember some of the numbers, where looking is free, and keep the storages' names from being given again."""
        if all(looking_is_free(p.device) for p in self.parameters):
            self.samples = [_sampled(p).clone() for p in self.parameters]
        self.storages = [StorageWeakRef(p.untyped_storage()) for p in self.parameters]

    def sampled_alike(self) -> bool:
        """Whether the numbers are those of `sample`, where it looked."""
        return not self.samples or all(
            torch.equal(kept, _sampled(p)) for kept, p in zip(self.samples, self.parameters, strict=True)
        )


def why_unread(module: Any) -> str | None:
    """Why a module's parameters must not stand for what it computes, as the end of a sentence; None: they may."""
    if type(module) is nn.Linear and not is_hooked(module) and type(module._parameters.get("weight")) is nn.Parameter:
        return None
    kind = unknown_class(module)
    if kind is not None:
        return f"is a {kind}, whose weights are never read"
    return "has hooks, or weights that are no plain parameters" if Weights.of(module) is None else None


@dataclass(frozen=True)
class _Looked:
    """The tensor looked at last, and which look it was."""

    text: weakref.ref[Tensor]
    version: int | None
    number: int
    look: int


def _place(p: Tensor) -> tuple[Any, ...]:
    """Where a parameter's numbers lie. Addresses recur as soon as memory is freed; a storage's name, while a weak
    reference to it lives, does not."""
    return p._version, p.untyped_storage()._cdata, p.data_ptr(), p.shape, p.stride(), p.dtype, p.device


def _is_at(p: Tensor, place: tuple[Any, ...]) -> bool:
    return _place(p) == place


def _same_objects(mine: Sequence[Any], theirs: Sequence[Any]) -> bool:
    return len(mine) == len(theirs) and all(a is b for a, b in zip(mine, theirs, strict=True))


def _sampled(p: Tensor) -> Tensor:
    flat = p.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLES)]


def _modes(text: Tensor) -> tuple[Any, ...]:
    kind = text.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return autocast, torch.is_inference_mode_enabled(), torch.is_grad_enabled() and text.requires_grad


def _adapter_state(module: Any) -> tuple[Any, ...]:
    scaling = getattr(module, "scaling", {})
    return (
        tuple(module.active_adapters),
        tuple(getattr(module, "merged_adapters", ())),
        bool(getattr(module, "disable_adapters", False)),
        tuple(sorted((name, float(x)) for name, x in scaling.items())),
    )
