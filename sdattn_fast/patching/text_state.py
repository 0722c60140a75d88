"""The token side of a model's layers: what is known of the text, and the calls prepared from it.

Two sources meet here. The pipeline says which batch entries are prompts and which of their tokens are content (`Rows`,
found in token_classes.py); the user says gates, phrases, and token classes of their own (`TokenInputs`). `TextState`
brings both to the batch of the UNet and keeps the prepared call, which all steps of a prompt share.

Source: docs/design.md, "The text is constant across steps" and "Where token classes come from".
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..execute import Prepared
from ..functional import prepare
from ..graphs import in_graph
from ..program import Program
from ..streams import MadeOn, capturing, to_device
from .layer_call import LayerCall, Ready
from .seeds import entry_seeds
from .settings import Settings
from .text_cache import TEXTS, TextCache
from .text_padding import TextPadding
from .text_rows import Rows
from .token_inputs import TokenInputs

if TYPE_CHECKING:
    from .graph_text import GraphText

__all__ = ["TextState"]


@dataclass
class TextState:
    """One model's text: the latest batch's rows, and the calls prepared for it. step: of a schedule of dropout.
    reads_own_text: as `ModelKind` has it.

    Everything is worked out on the CPU, where numbers may be looked at, and then sent to the device of the text.
    """

    settings: Settings
    given: TokenInputs
    reads_own_text: bool = True
    rows: Rows | None = None
    step: int | None = None
    call_gate: Tensor | None = None  # of the call that the forward is of, in place of the user's
    cache: dict[tuple[Any, ...], Ready] = field(default_factory=dict)  # for `rows`
    # Of the rows seen lately, the latest last. Replaced as a whole, never changed: other threads may be reading it.
    caches: tuple[tuple[Any, dict[tuple[Any, ...], Ready]], ...] = ()
    cached: TextCache = field(default_factory=TextCache)
    home: dict[tuple[Any, ...], Prepared] = field(default_factory=dict)  # the same on the CPU, for all texts of `rows`
    homes: tuple[tuple[Any, dict[tuple[Any, ...], Prepared]], ...] = ()
    graphs: list[GraphText] = field(default_factory=list)  # texts that CUDA graphs were captured with
    given_up: list[GraphText] = field(default_factory=list)  # graphs may still be replayed, so their memory stays
    graph: GraphText | None = None  # of the capture in progress
    ready_for: tuple[dict[tuple[Any, ...], Ready], Any] | None = None  # a cache, and of what its calls are all there
    in_forward: bool = False
    entries: int | None = None  # of a model that repeats each entry's text for its frames, of the forward in progress
    padding: TextPadding | None = None  # of the forward in progress
    paddings: tuple[TextPadding, ...] = ()  # the latest ones: with guidance in two forwards they take turns
    # Of texts that layers read where gradients are on: the padding and entries of the forward.
    read: Any = field(default_factory=WeakTensorKeyDictionary)

    def __getstate__(self) -> dict[str, Any]:
        """Without what CUDA graphs read: they read the original's."""
        return {**self.__dict__, "graphs": [], "given_up": [], "graph": None, "read": WeakTensorKeyDictionary()}

    def beside(self) -> TextState:
        """For forwards of another thread: rows and calls are its own, keys, values and graphs are shared."""
        return TextState(
            self.settings, self.given, self.reads_own_text,
            cached=self.cached, graphs=self.graphs, given_up=self.given_up,
        )  # fmt: skip

    def forget(self) -> None:
        """Everything derived from text. CUDA graphs captured so far give NaN from now on."""
        self.forget_prepared()
        self.cached.forget()
        self.paddings = ()
        for graph in self.graphs:
            graph.give_up()
        self.given_up += self.graphs
        self.graphs.clear()
        self.graph = None

    def forget_prepared(self) -> None:
        """What hangs on the user's inputs, but not the keys and values."""
        self.cache, self.home = {}, {}
        self.caches = self.homes = ()
        self.ready_for = None

    @property
    def gate(self) -> Tensor | None:
        return self.given.gate if self.call_gate is None else self.call_gate

    def use_gate(self, call_gate: Tensor | None) -> None:
        """A forward begins, of a call with a gate of its own or without."""
        if call_gate is not self.call_gate:
            self.call_gate = call_gate
            self.forget_prepared()

    def end_forward(self) -> None:
        """What was known of its text is not of what layers read outside a forward."""
        self.in_forward, self.padding, self.entries = False, None, None

    def of_layer(self, text: Tensor) -> tuple[TextPadding | None, int | None]:
        """Of the text that a layer reads: its padding, and how many of its entries are frames of one of the model's,
        None where none are.

        Gradient checkpointing runs a layer again, after the forward and others perhaps: that is told by its text.
        """
        padding, entries = self.padding, self.entries
        if not in_graph():
            if not self.in_forward:
                padding, entries = self.read.get(text, (None, None))
            elif (padding, entries) != (None, None) and torch.is_grad_enabled():
                self.read[text] = padding, entries
            if padding is not None and padding.tokens != text.shape[1]:
                padding = None
        return padding, None if entries is None else max(1, len(text) // entries)

    def see_padding(self, source: Any, read: Callable[[Any], TextPadding | None] | None) -> None:
        """A forward begins, whose text's padding is read from this; read: None where it has none."""
        self.padding = next((one for one in self.paddings if one.is_of(source)), None) if read is not None else None
        if read is None or self.padding is not None:
            return
        with torch.inference_mode(False):
            self.padding = read(source)
        if self.padding is not None:
            self.paddings = (*self.paddings, self.padding)[-TEXTS:]

    def padding_of(self, tokens: int) -> TextPadding | None:
        """The padding of a layer's text of so many tokens."""
        return self.padding if self.padding is not None and self.padding.tokens == tokens else None

    def columns(self, padding: TextPadding) -> int:
        """How many columns of a padded text its layers need."""
        capture = self.settings.capture
        return padding.columns(() if capture is None or capture.tokens is None else capture.tokens)

    def see(self, rows: Rows | None, number: int | None = None) -> None:
        """A new batch of text; what was prepared stays where its rows are of the same classes as before.

        number: of the text in `cached`, where calls are to be its own: a CUDA graph may come to read them.
        """
        self.rows = rows
        key = _key(rows)
        self.home, self.homes = _latest(self.homes, key)
        self.cache, self.caches = _latest(self.caches, (key, number))
        for graph in self.graphs:
            if graph.number == number and not self.cache and _key(graph.rows) == key:
                self._put_back(graph)

    def graph_with(self, text: Tensor) -> GraphText | None:
        """What CUDA graphs that read a tensor read beside it, whatever is in the tensor now."""
        return next((graph for graph in self.graphs if graph.is_in(text)), None)

    def graph_of_capture(self, device: torch.device) -> GraphText | None:
        """What the CUDA graph that is captured is to read; None outside a capture."""
        if not capturing(device):
            return None
        if self.graph is None:
            raise RuntimeError(
                "sdattn_fast: a CUDA graph is captured of a patched layer, and the model's own call was not seen. "
                "Capture unet(...) as a whole: its hooks find the text, and unet.forward or a block leave them out"
            )
        return self.graph

    def rewrite_graph(
        self, graph: GraphText, pairs: list[tuple[Prepared, Prepared]], rows: Rows | None, text: Tensor | None = None
    ) -> None:
        """Write a renewal of `renewal_of` where a graph reads it; text: with other keys and values."""
        graph.rewrite(pairs, rows, text, self.cached)
        self.caches = tuple(one for one in self.caches if one[0][1] != graph.number)
        self.see(rows, graph.number)
        self._put_back(graph)
        self.ready_for = None

    def _put_back(self, graph: GraphText) -> None:
        """What graphs read serves Python as well, so that the next graph of the same text reads it too."""
        for key, held in graph.calls:
            self.cache.setdefault(key, Ready(held, MadeOn(held.side.device)))

    def is_current(self, graph: GraphText, text: Tensor, rows: Rows | None) -> bool:
        """Whether what a graph reads is of this text and the weights, as they are now, and of these rows."""
        same_text = self.cached.is_same(graph.number, text) and _key(graph.rows) == _key(rows)
        return same_text and graph.has_weights_of_now()

    def renewal_of(self, graph: GraphText, rows: Rows | None) -> list[tuple[Prepared, Prepared]]:
        """The calls that a graph reads, each with what it is to become for these rows.

        Raises: ValueError where that has no room in their memory.
        """
        self.see(rows, graph.number)
        with torch.inference_mode(False):
            return graph.renewal(
                lambda key: self._prepare(self.settings.program_at(self.step, key[0].training), key[0])
            )

    def needs_protected(self) -> bool:
        """Whether it matters which tokens are content: plain attention has no use for it."""
        program = self.settings.program
        plain = program.dropout is None and program.refine is None and program.renormalize == "none"
        return not plain or self.gate is not None or self.given.phrases is not None

    def needs_active(self) -> bool:
        """Whether it matters which entries are prompts: the maps are theirs alone. Maps of no step are a correction's,
        whose batch is prompts."""
        capture = self.settings.capture
        return self.needs_protected() or (capture is not None and capture.steps != ())

    def prepared(self, call: LayerCall) -> Prepared:
        """A layer's call, from the cache where nothing changed.

        Raises: ValueError where a token input does not fit the batch, or is missing.
        """
        return self.with_gate(self.ready(call).prepared, call)

    def with_gate(self, prepared: Prepared, call: LayerCall) -> Prepared:
        """A call of `ready`, with the numbers of a gate that wants a gradient: it belongs to one graph."""
        gate = self.gate
        if gate is None or not gate.requires_grad:
            return prepared
        whole = self.rows_of(call.batch).spread("gate", to_device(gate, call.device), call.tokens)
        assert whole is not None
        whole = whole[..., : call.columns]
        return prepared.with_gate(whole if torch.is_grad_enabled() else whole.detach())

    def ready(self, call: LayerCall) -> Ready:
        """As `prepared`, all but the numbers of a gate that wants a gradient."""
        program = self.settings.program_at(self.step, call.training)
        if in_graph():  # it must not look into the cache: it would be good for one text
            return Ready(self._prepare(program, call).to(call.device), None)
        key = (call, program.dropout)
        ready = self.cache.get(key) if self.settings.text_cache else None
        if ready is None:
            # What a schedule had for the steps before is not asked for again, nor is a padding of texts before.
            paddings = None, call.padding, *self.paddings
            for kept in (self.cache, self.home):
                for old in list(kept):
                    if old[-1] != program.dropout or old[0].padding not in paddings:
                        kept.pop(old, None)
            at_home = self.home.get(key) if self.settings.text_cache else None
            with torch.inference_mode(False):  # what is made in inference mode cannot be part of a graph later
                at_home = self._prepare(program, call) if at_home is None else at_home
                ready = Ready(at_home.to(call.device), MadeOn(call.device))
            self.home[key] = at_home
            self.cache[key] = ready
        elif ready.made is not None:
            ready.made.use(ready.prepared.tensors)
        return ready

    def active(self, batch: int) -> Tensor | None:
        """(B,) bool on the CPU, None for all."""
        if self.given.active is not None:
            if tuple(self.given.active.shape) != (batch,):
                raise ValueError(
                    f"active: expected shape ({batch},), the UNet's batch with its unconditional entries, "
                    f"got {tuple(self.given.active.shape)}"
                )
            return self.given.active
        if self.rows is None:
            return None
        if len(self.rows.prompt) != batch:
            # A model that multiplies its batch inside (video) and a patch that does not know how.
            if self.needs_active():
                raise ValueError(
                    f"active: the pipeline encoded {len(self.rows.prompt)} rows, this layer sees a batch of {batch}; "
                    "pass active= and protected= for that batch to sdattn_fast.apply or patch.update"
                )
            return None
        return torch.tensor([p >= 0 for p in self.rows.prompt], dtype=torch.bool)

    def pictures(self, active: Tensor | None) -> Tensor | None:
        """Of the active entries those that are the first of their picture, (B,) bool on the CPU; None for all."""
        rows = self.rows
        if rows is None or self.given.active is not None or not any(rows.repeated):
            return active
        first = torch.tensor([not again for again in rows.repeated])
        return first if active is None else first & active

    def rows_told(self, batch: int) -> Rows | None:
        """Of the latest text, as the user or the pipeline says."""
        return self.rows if self.given.active is None else self.rows_of(batch)

    def rows_of(self, batch: int) -> Rows:
        """As `rows_told`, each entry a prompt where nothing is known; the user's `active` wins."""
        known = self.rows
        if self.given.active is None:
            return known if known is not None and len(known.prompt) == batch else Rows(list(range(batch)), batch, None)
        on = self.given.active.tolist()
        prompt = [sum(on[:b]) if is_on else -1 for b, is_on in enumerate(on)]
        if known is None or len(known.places) != len(on) or any(i < 0 for i in itertools.compress(known.places, on)):
            return Rows(prompt, sum(on), None)
        return Rows(prompt, sum(on), None, places=known.places, encoded=known.encoded)

    def prompts_asked(self, batch: int) -> tuple[int, ...] | None:
        """Of every active entry the prompt; None where prompts are not known."""
        if self.given.active is None and self.rows is None:
            return None
        return tuple(prompt for prompt in self.rows_of(batch).prompt if prompt >= 0)

    def entry_seeds(self, batch: int) -> list[int]:
        """Of every entry the seed of random dropout. Raises: ValueError where there is not one for each picture."""
        assert self.given.seed is not None
        rows = self.rows_of(batch)
        return entry_seeds(self.given.seed, rows.pictures, rows.encoded)

    def _prepare(self, program: Program, call: LayerCall) -> Prepared:
        """On the CPU; a gate that wants a gradient is left for later, and of its shape here."""
        s, gate = self.settings, self.gate
        batch, tokens = call.batch, call.tokens
        active = self.active(batch)
        rows = self.rows_of(batch)
        if gate is not None and gate.requires_grad:
            gate = torch.ones(gate.shape)
        protected = rows.spread("protected", self.given.protected, tokens)
        if protected is None and self.rows is not None and self.needs_protected():
            protected = self._found_protected(batch, tokens)
        if call.padding is not None:
            protected = call.padding.padding if protected is None else protected | call.padding.padding
        gate = rows.spread("gate", gate, tokens)
        phrases = rows.spread("phrases", self.given.phrases, tokens)
        if call.columns is not None:
            gate, phrases, protected = (
                None if x is None else x[..., : call.columns] for x in (gate, phrases, protected)
            )
        return prepare(
            program,
            batch=batch,
            heads_count=call.num_heads,
            tokens=tokens if call.columns is None else call.columns,
            device=_CPU,
            gate=gate,
            phrases=phrases,
            protected=protected,
            active=active,
            heads=call.heads,
            inactive_heads=s.inactive_heads,
            capture=s.capture if call.captures else None,
            backend=s.backend,
        )

    def _found_protected(self, batch: int, tokens: int) -> Tensor:
        rows = self.rows
        assert rows is not None
        if rows.protected is None:
            raise ValueError(
                "protected: prompt_embeds came without their tokens, or the pipeline cut them out of more tokens, as "
                "Sana's does for complex_human_instruction and Latte's for mask_feature. Make them with "
                "pipe.encode_prompt after sdattn_fast.apply and without these, or pass protected=, a bool tensor "
                f"({tokens},) or (prompts, {tokens}) that is True for BOS, EOS and padding, to apply or patch.update"
            )
        if tuple(rows.protected.shape) != (batch, tokens):
            raise ValueError(
                f"protected: the pipeline encoded {tuple(rows.protected.shape)} (batch, tokens), this layer sees "
                f"({batch}, {tokens}); pass protected= and active= to apply or patch.update"
            )
        copied = in_graph() or rows.protected.is_inference()
        return rows.protected.clone() if copied else rows.protected


def _key(rows: Rows | None) -> Any:
    return None if rows is None else rows.key


def _latest(kept: tuple[tuple[Any, dict[Any, Any]], ...], key: Any) -> tuple[dict[Any, Any], tuple[Any, ...]]:
    """What is kept for a key, made if need be, and all that is kept with it, the latest last and no more than TEXTS."""
    if kept and kept[-1][0] == key:
        return kept[-1][1], kept
    mine: dict[Any, Any] | None = next((one for of, one in kept if of == key), None)
    mine = {} if mine is None else mine
    others = [one for one in kept if one[0] != key]
    return mine, (*others[1 - TEXTS :], (key, mine))


_CPU = torch.device("cpu")
