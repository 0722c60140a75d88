"""What pipelines encoded lately: the rows of a UNet's text are looked up here.

Of every row a fingerprint is kept, and which of its tokens are content; so prompts that were encoded long ago are known
when they come back as `prompt_embeds`, and nothing of the text itself stays in memory.

Source: docs/design.md, "Where token classes come from".
"""

from __future__ import annotations

import inspect
import itertools
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..places import Known, looking_is_free
from .fingerprints import DTYPES, fingerprints, read_dtype
from .prompt_rows import EncodedRows, Guidance, RowPlace, place_rows
from .text_rows import Rows
from .token_classes import EncoderListener

__all__ = ["Encoded", "PromptMemory"]

_ROWS = 10_000  # whose classes are remembered: a few megabytes
_TEXTS = 8  # whose rows were found: two for each of some threads


class PromptMemory:
    """The rows that pipelines encoded. Threads may share it."""

    def __init__(self) -> None:
        self.encoded = 0
        self._lock = threading.Lock()
        self._calls: deque[Encoded] = deque()  # the newest last
        self._rows_kept = 0
        self._unread: list[Encoded] = []
        self._with: dict[int, dict[Encoded, None]] = {}  # fingerprint -> the calls that gave it, the newest last
        self._tokens: OrderedDict[int, Tensor] = OrderedDict()  # fingerprint -> (N,) bool, the protected tokens
        # Replaced as a whole, never changed: other threads may be reading it.
        self._found: tuple[tuple[Known, tuple[Any, ...], Rows | None], ...] = ()

    def forget(self) -> None:
        with self._lock:
            self._calls.clear()
            self._unread.clear()
            self._with.clear()
            self._tokens.clear()
            self._rows_kept = 0
            self.encoded += 1
        self.forget_found()

    def forget_found(self) -> None:
        """Look texts up anew."""
        self._found = ()

    def remember(
        self,
        result: Any,
        heard: EncoderListener,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> Encoded | None:
        """Take in what `encode_prompt`, called with these arguments, gave; None where it was no text of a UNet."""
        encoded = _encoded(result, heard, _arguments(function, args, kwargs))
        if encoded is not None:
            with self._lock:
                self.encoded += 1
                encoded.number = self.encoded
                self._calls.append(encoded)
                self._unread.append(encoded)
                self._rows_kept += encoded.count
                while self._rows_kept > _ROWS and len(self._calls) > 1:
                    self._drop(self._calls.popleft())
        return encoded

    def clean_caption(self, first: Sequence[Encoded]) -> bool | None:
        """What the latest call of `encode_prompt` that read a prompt was asked to do, of `first` or else of all."""
        with self._lock:
            calls = itertools.chain(first, reversed(self._calls))
            return next((one.clean_caption for one in calls if one.clean_caption is not None), None)

    def find(self, text: Tensor, first: Sequence[Encoded] = (), guidance: Guidance = Guidance()) -> Rows | None:
        """The rows of encoder_hidden_states (B, N, E); None where one of them is not known, or what it is.

        first: encoded for the call that asks, which goes before all others. A GPU is waited for once a text, and not
        again while the text and what was encoded stay what they are.
        """
        stamp = self.encoded, guidance, *(one.number for one in first)
        for known, then, rows in self._found:
            if then == stamp and known.is_same(text):
                return rows
        rows = self._find(text, first, guidance)
        self._found = (*self._found, (Known(text), stamp, rows))[-_TEXTS:]
        return rows

    def _find(self, text: Tensor, first: Sequence[Encoded], guidance: Guidance) -> Rows | None:
        if text.dim() != 3 or not len(text):
            return None
        with self._lock:
            if not self._calls:
                return None
            prints = self._read(text)
            if any(row not in self._with for row in prints):
                return None
            dtype, shape = read_dtype(text.dtype), tuple(text.shape[1:])
            rarest = min(prints, key=lambda row: len(self._with[row]))
            calls = [one for one in _newest_first(self._with[rarest], first) if one.shape == shape]
            for known_only in (True, False):
                for call in calls:
                    places = place_rows(prints, call.rows[dtype], guidance, known_only)
                    if places is not None:
                        return self._rows(prints, text.shape[1], [(call, place) for place in places])
            newest = [next(iter(_newest_first(self._with[row], first))) for row in prints]
            found = _of_several(prints, newest, dtype)
            return None if found is None else self._rows(prints, text.shape[1], found)

    def _drop(self, call: Encoded) -> None:
        self._rows_kept -= call.count
        if call.unread is not None:
            self._unread.remove(call)
        for of_dtype in call.rows.values():
            for row in (*of_dtype.prompts, *of_dtype.negatives):
                calls = self._with.get(row)
                if calls is not None:
                    calls.pop(call, None)
                    if not calls:
                        del self._with[row]

    def _rows(self, prints: Sequence[int], tokens: int, found: list[tuple[Encoded, RowPlace]]) -> Rows:
        # Prompts and pictures are counted over all calls that the batch is made of; usually there is one.
        offset: dict[int, tuple[int, int]] = {}
        prompts = pictures = 0
        for call, place in found:
            if place.is_prompt and id(call) not in offset:
                offset[id(call)] = prompts, pictures
                prompts, pictures = prompts + call.prompts, pictures + call.positives
        prompt = [offset[id(c)][0] + c.prompt_of(p.index) if p.is_prompt else -1 for c, p in found]
        places = [offset[id(c)][1] + p.index if p.is_prompt else -1 for c, p in found]
        repeated = [p.repeated for _, p in found]
        protected: list[Tensor] = []
        for row, (_, place) in zip(prints, found, strict=True):
            of_row = self._tokens.get(row) if place.is_prompt else torch.ones(tokens, dtype=torch.bool)
            if of_row is None:
                return Rows(prompt, prompts, None, repeated, places, pictures)
            protected.append(of_row)
        return Rows(prompt, prompts, torch.stack(protected), repeated, places, pictures)

    def _read(self, text: Tensor) -> list[int]:
        """The fingerprints of a text's rows. What was encoded meanwhile is read with them: a GPU is waited for once."""
        unread = list(self._unread)
        wanted = [fingerprints(text.detach().to(read_dtype(text.dtype)))]
        for call in unread:
            assert call.unread is not None
            wanted += [call.unread.prints, *(x for x in call.unread.protected if x is not None)]
        far = [x for x in wanted if not looking_is_free(x.device)]
        if far:
            flat = torch.cat([x.flatten().to(text.device, torch.int64) for x in far]).cpu()
            near = iter(flat.split([x.numel() for x in far]))
            wanted = [x if looking_is_free(x.device) else next(near).view(x.shape) for x in wanted]
        read = iter(wanted)
        own: list[int] = next(read).tolist()
        for call in unread:
            assert call.unread is not None
            prints = next(read)
            protected = [None if x is None else next(read).bool() for x in call.unread.protected]
            self._take_in(call, prints, protected)
        self._unread.clear()
        return own

    def _take_in(self, call: Encoded, prints: Tensor, protected: Sequence[Tensor | None]) -> None:
        positives = call.positives
        for dtype, of_dtype in zip(DTYPES, prints.tolist(), strict=True):
            call.rows[dtype] = EncodedRows(tuple(of_dtype[:positives]), tuple(of_dtype[positives:]), call.blocks)
            for row in of_dtype:
                self._with.setdefault(row, {})[call] = None
            for of_kind, rows in zip(protected, (of_dtype[:positives], of_dtype[positives:]), strict=True):
                if of_kind is None or not len(of_kind) or len(rows) % len(of_kind):
                    continue
                each = len(rows) // len(of_kind)
                for i, row in enumerate(rows):
                    self._tokens[row] = of_kind[i // each]
                    self._tokens.move_to_end(row)
        while len(self._tokens) > len(DTYPES) * _ROWS:
            self._tokens.popitem(last=False)
        call.unread = None


@dataclass
class _Unread:
    """prints: (len(DTYPES), rows) int64. protected: (P, N) bool, of the prompts and of the negative prompts."""

    prints: Tensor
    protected: tuple[Tensor | None, Tensor | None]


@dataclass(eq=False)
class Encoded:
    """One call of `encode_prompt`. shape: (N, E) of its rows. positives: how many rows are of its `prompts` prompts.
    unread: on the text's device, until the first text is looked up. clean_caption: what it was asked to
    do; None: it was given embeddings."""

    shape: tuple[int, int]
    prompts: int
    positives: int
    count: int
    blocks: tuple[bool, ...] | None
    unread: _Unread | None
    rows: dict[torch.dtype, EncodedRows] = field(default_factory=dict)
    clean_caption: bool | None = None
    number: int = 0  # the greater, the newer

    def prompt_of(self, row: int) -> int:
        return row * self.prompts // self.positives


def _encoded(result: Any, heard: EncoderListener, asked: dict[str, Any]) -> Encoded | None:
    given, negative_given = asked.get("prompt_embeds"), asked.get("negative_prompt_embeds")
    prompts, images = _prompts(asked), _images(asked)
    blocks = None
    if isinstance(result, (tuple, list)):
        # Masks (P, N) and pooled embeddings (P, E) may stand among them.
        texts = [x for x in result if isinstance(x, Tensor) and x.dim() == 3]
        positive, negative = (*texts, None, None)[:2]
    else:
        # InstructPix2Pix: the prompts, and twice the negative ones.
        positive, negative = (result if isinstance(result, Tensor) else None), None
        if positive is not None and prompts is not None:
            blocks = {1: (True,), 2: (False, True), 3: (True, False, False)}.get(len(positive) // (prompts * images))
            if blocks is None or len(positive) != len(blocks) * prompts * images:
                return None
            parts = positive.split(prompts * images) if positive.dim() == 3 else ()
            positive = next((x for x, is_prompt in zip(parts, blocks, strict=True) if is_prompt), None)
            negative = next((x for x, is_prompt in zip(parts, blocks, strict=False) if not is_prompt), None)
    if positive is None or positive.dim() != 3 or not len(positive):
        return None
    if negative is not None and (negative.dim() != 3 or negative.shape[1:] != positive.shape[1:]):
        negative = None
    if prompts is None or len(positive) % prompts:
        prompts = len(positive)
    protected = None if given is not None else heard.protected(0)
    of_negative = None if negative_given is not None else heard.protected(0 if given is not None else 1)
    tokens = positive.shape[1]
    rows = positive if negative is None else torch.cat([positive, negative.to(positive)])
    prints = torch.stack([fingerprints(rows.to(dtype)) for dtype in DTYPES])
    return Encoded(
        (tokens, positive.shape[2]), prompts, len(positive), len(rows), blocks,
        _Unread(prints, (_fitting(protected, prompts, tokens), _fitting(of_negative, None, tokens))),
        clean_caption=None if given is not None else bool(asked.get("clean_caption", False)),
    )  # fmt: skip


def _fitting(protected: Tensor | None, prompts: int | None, tokens: int) -> Tensor | None:
    if protected is None or protected.shape[1] != tokens or prompts not in (None, len(protected)):
        return None
    return protected


def _newest_first(calls: Iterable[Encoded], first: Sequence[Encoded]) -> list[Encoded]:
    """Those of the call that asks before all others."""
    mine = {id(one) for one in first}
    return sorted(calls, key=lambda one: (id(one) in mine, one.number), reverse=True)


def _of_several(
    prints: Sequence[int], calls: Sequence[Encoded], dtype: torch.dtype
) -> list[tuple[Encoded, RowPlace]] | None:
    """Rows of several calls of `encode_prompt`, each row's given."""
    found: list[tuple[Encoded, RowPlace] | None] = [None] * len(prints)
    for call in dict.fromkeys(calls):
        mine = [i for i, one in enumerate(calls) if one is call]
        places = place_rows([prints[i] for i in mine], call.rows[dtype])
        if places is None:
            return None
        for i, place in zip(mine, places, strict=True):
            found[i] = call, place
    return [one for one in found if one is not None]


def _prompts(asked: dict[str, Any]) -> int | None:
    """How many prompts were asked for."""
    given, prompt = asked.get("prompt_embeds"), asked.get("prompt")
    if isinstance(given, Tensor):
        return len(given)
    return 1 if isinstance(prompt, str) else len(prompt) if isinstance(prompt, (list, tuple)) else None


def _images(asked: dict[str, Any]) -> int:
    images = asked.get("num_images_per_prompt", asked.get("num_videos_per_prompt"))
    return images if isinstance(images, int) and images > 0 else 1


def _arguments(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    try:
        bound = inspect.signature(function).bind_partial(*args, **kwargs)
    except (TypeError, ValueError):
        return dict(kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)
