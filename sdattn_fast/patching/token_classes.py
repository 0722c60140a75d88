"""Which batch entries are prompts, and which of their tokens are content: found by watching a pipeline encode its text.

`PromptMemory` wraps the pipeline's `encode_prompt`, listens to its text encoders meanwhile, and remembers for every row
that comes out whether it is a prompt or a negative one and which of its tokens are BOS, EOS or padding. Before a UNet
or ControlNet runs, the rows of its encoder_hidden_states are looked up by value. So the batch's order does not matter
(InstructPix2Pix: positive, negative, negative; ControlNet's guess mode: positives alone; no guidance: positives alone).

Source: docs/design.md, "Where token classes come from".
"""

from __future__ import annotations

import functools
import inspect
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..places import Known, looking_is_free
from ..streams import to_device
from .text_cache import TEXTS
from .text_state import Rows

__all__ = ["PromptMemory", "protected_tokens"]

# Prompts encoded ahead of time by the patched pipe are known when they come back as prompt_embeds, for so many calls.
_REMEMBERED_CALLS = 16


class PromptMemory:
    """What one pipeline encoded lately."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.calls: deque[_Encoded] = deque(maxlen=_REMEMBERED_CALLS)
        self.encoded = 0
        # Replaced as a whole, never changed: other threads may be reading it.
        self._found: tuple[tuple[Known, int, Rows | None], ...] = ()
        self._name = next((n for n in ("encode_prompt", "_encode_prompt") if callable(getattr(pipe, n, None))), None)
        self._replaced: Any = None
        self._wrapper: Any = None

    @property
    def watches(self) -> bool:
        """Whether the pipeline has anything to wrap."""
        return self._name is not None

    def install(self) -> None:
        """Wrap `encode_prompt` (InstructPix2Pix: `_encode_prompt`) on the instance."""
        assert self._name is not None
        self._replaced = vars(self.pipe).get(self._name)
        original = getattr(self.pipe, self._name)

        @functools.wraps(original)
        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            with _Listener(self.pipe) as heard:
                result = original(*args, **kwargs)
            self._remember(result, heard, _argument(original, "prompt_embeds", args, kwargs))
            return result

        self._wrapper = encode_prompt
        setattr(self.pipe, self._name, encode_prompt)

    def uninstall(self) -> None:
        """Put back what was there, unless somebody wrapped it again meanwhile."""
        if self._name is None or vars(self.pipe).get(self._name) is not self._wrapper:
            return
        delattr(self.pipe, self._name)
        if self._replaced is not None:
            setattr(self.pipe, self._name, self._replaced)

    def forget(self) -> None:
        self.calls.clear()
        self.forget_found()
        self.encoded += 1

    def forget_found(self) -> None:
        """Look texts up anew."""
        self._found = ()

    def find(self, text: Tensor) -> Rows | None:
        """The rows of encoder_hidden_states (B, N, E), looked up by value; None where one of them matches nothing.

        A GPU is waited for once a text, or, where it is not of the latest call, twice; not again while the text and
        what was encoded stay what they are.
        """
        encoded = self.encoded
        for known, then, rows in self._found:
            if then == encoded and known.is_same(text):
                return rows
        rows = self._find(text)
        # A UNet and a ControlNet may take turns with two texts each.
        self._found = (*self._found, (Known(text), encoded, rows))[-2 * TEXTS :]
        return rows

    def _find(self, text: Tensor) -> Rows | None:
        calls = [call for call in self.calls if text.dim() == 3 and call.embeds.shape[1:] == text.shape[1:]]
        latest = calls[:1] if calls and calls[0].protected is not None else []
        for candidates in (latest, calls):
            rows = _look_up(text, candidates) if candidates else None
            if rows is not None:
                return rows
        return None

    def _remember(self, result: Any, heard: _Listener, given: Tensor | None) -> None:
        positive, negative = _split(result, heard, given is not None)
        if positive is None or positive.dim() != 3:
            return
        count = positive.shape[0]
        protected = heard.protected_of_prompts() if given is None else None
        known = protected if given is None else given
        prompts = count if known is None else known.shape[0]
        if not prompts or count % prompts:
            prompts = count
        if protected is not None and protected.shape != (prompts, positive.shape[1]):
            protected = None
        prompt = [row // (count // prompts) for row in range(count)]
        embeds = positive.detach()
        if negative is not None and negative.dim() == 3 and negative.shape[1:] == positive.shape[1:]:
            embeds = torch.cat([embeds, negative.detach().to(embeds)])
            prompt += [-1] * negative.shape[0]
        self.encoded += 1
        self.calls.appendleft(_Encoded(embeds, prompt, prompts, protected))


def protected_tokens(ids: Tensor, bos: int | None, eos: int | None) -> Tensor:
    """(P, N) bool: BOS, and everything from the first EOS on, for token ids (P, N)."""
    protected = torch.zeros_like(ids, dtype=torch.bool)
    if bos is not None:
        protected[:, 0] = ids[:, 0] == bos
    if eos is not None:
        ends = (ids == eos) & ~protected
        protected = protected | (ends.cumsum(-1) > 0)
    return protected


@dataclass(eq=False)
class _Encoded:
    """One call of encode_prompt.

    embeds: its rows (R, N, E), positives first. prompt: of each row the prompt's index, -1 for a negative one.
    protected: (prompts, N) bool, of prompts that were given as words, on the encoder's device until they are read.
    learnt: of prompts that were given as embeds, row -> (N,) bool, from the call that made them.
    """

    embeds: Tensor
    prompt: list[int]
    prompts: int
    protected: Tensor | None
    learnt: dict[int, Tensor] = field(default_factory=dict)

    def protected_in(self, row: int) -> Tensor | None:
        """(N,) bool of a prompt's row; None where its tokens are unknown."""
        if self.prompt[row] < 0:
            return None
        return self.learnt.get(row) if self.protected is None else self.protected[self.prompt[row]]

    def places(self, equal: list[list[bool]]) -> list[int | None]:
        """For every row of a text the row here that equals it, prompts before negatives. Of several equal ones the
        entries take turns, so that a list of equal prompts still has each its own gate. equal: by text row and row."""
        turns: dict[tuple[int, ...], int] = {}
        found: list[int | None] = []
        for of_row in equal:
            alike = tuple(i for i, yes in enumerate(of_row) if yes and self.prompt[i] >= 0)
            alike = alike or tuple(i for i, yes in enumerate(of_row) if yes)
            if not alike:
                found.append(None)
                continue
            turn = turns.get(alike, 0)
            turns[alike] = turn + 1
            found.append(alike[turn % len(alike)])
        return found


def _look_up(text: Tensor, calls: list[_Encoded]) -> Rows | None:
    """The rows of a text (B, N, E) among those of calls, the newest first, as `PromptMemory.find`."""
    equal = _read(text, calls)
    rows: list[tuple[_Encoded, int] | None] = [None] * text.shape[0]
    for call, of_call in zip(calls, equal, strict=True):
        for entry, place in enumerate(call.places(of_call)):
            if rows[entry] is None and place is not None:
                rows[entry] = (call, place)
    found = [row for row in rows if row is not None]
    if len(found) < len(rows):
        return None
    for entry, (call, place) in enumerate(found):
        if call.prompt[place] >= 0 and call.protected_in(place) is None:
            others = (
                other.protected_in(i)
                for other, of_other in zip(calls, equal, strict=True)
                for i, yes in enumerate(of_other[entry])
                if yes
            )
            known = next((one for one in others if one is not None), None)
            if known is not None:
                call.learnt[place] = known
    # Prompts are counted over all calls that the batch is made of; usually there is one.
    offset: dict[int, int] = {}
    prompts = 0
    for call, place in found:
        if id(call) not in offset and call.prompt[place] >= 0:
            offset[id(call)] = prompts
            prompts += call.prompts
    prompt = [offset[id(c)] + c.prompt[i] if c.prompt[i] >= 0 else -1 for c, i in found]
    return Rows(prompt, prompts, _stacked([c.protected_in(i) for c, i in found], prompt, text.shape[1]))


def _read(text: Tensor, calls: list[_Encoded]) -> list[list[list[bool]]]:
    """Which rows equal which: by call, row of the text (B, N, E) and row of the call. The calls' protected tokens are
    brought to the CPU with it, so that a GPU is waited for once."""
    here = torch.cat([to_device(call.embeds, text.device).to(text.dtype) for call in calls])
    nan = here != here
    # NaN equals NaN here: a text encoder that overflowed is no reason for a message about prompts.
    equal = [((here == row) | (nan & (row != row))).flatten(1).all(-1) for row in text.detach()]
    away = [call for call in calls if call.protected is not None and not looking_is_free(call.protected.device)]
    tokens = [call.protected.to(text.device) for call in away if call.protected is not None]
    bits = torch.cat([x.flatten() for x in (*equal, *tokens)]).cpu()
    sizes = [len(here)] * len(equal) + [x.numel() for x in tokens]
    parts = bits.split(sizes)
    for call, shape, part in zip(away, [x.shape for x in tokens], parts[len(equal) :], strict=True):
        call.protected = part.view(shape)
    of_rows = [part.tolist() for part in parts[: len(equal)]]
    found, start = [], 0
    for call in calls:
        end = start + len(call.embeds)
        found.append([of_row[start:end] for of_row in of_rows])
        start = end
    return found


class _Listener:
    """What the text encoders were given, and gave, while a pipeline encoded its prompt."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.ids: dict[str, list[Tensor]] = {}
        self.outputs: list[list[Tensor]] = []
        self._handles: list[Any] = []

    def __enter__(self) -> _Listener:
        for name in ("text_encoder", "text_encoder_2"):
            encoder = getattr(self.pipe, name, None)
            if isinstance(encoder, nn.Module):
                hook = self._hook(name)
                self._handles.append(encoder.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def protected_of_prompts(self) -> Tensor | None:
        """(P, N) bool of the first text each encoder was given, where its ids lie; with two encoders, where both
        tokenisations say so."""
        protected: Tensor | None = None
        for name, calls in self.ids.items():
            tokenizer = getattr(self.pipe, name.replace("text_encoder", "tokenizer"), None)
            eos = getattr(tokenizer, "eos_token_id", None)
            if eos is None:
                return None
            one = protected_tokens(calls[0], getattr(tokenizer, "bos_token_id", None), eos)
            if protected is not None and protected.shape != one.shape:
                return None
            protected = one if protected is None else protected & to_device(one, protected.device)
        return protected

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            if isinstance(ids, Tensor) and ids.dim() == 2:
                self.ids.setdefault(name, []).append(ids)
                first = output[0] if isinstance(output, (tuple, list)) else getattr(output, "last_hidden_state", None)
                if isinstance(first, Tensor) and first.dim() == 3:
                    self.outputs.append([first])

        return hook


def _split(result: Any, heard: _Listener, embeds_given: bool) -> tuple[Tensor | None, Tensor | None]:
    """(positive, negative) of what encode_prompt returned."""
    if isinstance(result, (tuple, list)):
        parts = [x if isinstance(x, Tensor) else None for x in result[:2]]
        return parts[0], parts[1] if len(parts) > 1 else None
    if not isinstance(result, Tensor) or result.dim() != 3:
        return None, None
    # InstructPix2Pix returns one tensor. Which rows are negative shows by what the text encoder gave for them.
    outputs = [out for (out,) in heard.outputs]
    prompts, negatives = ([], outputs) if embeds_given else (outputs[:1], outputs[1:])
    flags = torch.stack([_among(result, negatives), _among(result, prompts)], dim=1).tolist()
    is_negative = [of_negatives and not of_prompts for of_negatives, of_prompts in flags]
    # By slices: an index would be sent to the device.
    positive = [row for row, negative in zip(result, is_negative, strict=True) if not negative]
    negative = [row for row, negative in zip(result, is_negative, strict=True) if negative]
    return torch.stack(positive) if positive else result[:0], torch.stack(negative) if negative else None


def _among(rows: Tensor, outputs: list[Tensor]) -> Tensor:
    """(R,) bool: which of the rows (R, N, E) are rows of the outputs."""
    found = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    for out in outputs:
        if out.shape[1:] == rows.shape[1:]:
            equal = [(out.to(row) == row).flatten(1).all(-1).any() for row in rows]
            found = found | torch.stack(equal)
    return found


def _stacked(protected: list[Tensor | None], prompt: list[int], tokens: int) -> Tensor | None:
    """(B, N), all True for unconditional entries; None where a prompt's tokens are unknown."""
    rows = []
    for one, p in zip(protected, prompt, strict=True):
        if p >= 0 and one is None:
            return None
        rows.append(torch.ones(tokens, dtype=torch.bool) if one is None or p < 0 else one)
    return torch.stack(rows) if rows else None


def _argument(function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return inspect.signature(function).bind_partial(*args, **kwargs).arguments.get(name)
    except (TypeError, ValueError):
        return kwargs.get(name)
