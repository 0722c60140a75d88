"""The token side of a model's layers: what is known of the text, and the calls prepared from it.

Two sources meet here. The pipeline says which batch entries are prompts and which of their tokens are content (`Rows`,
found in token_classes.py); the user says gates, phrases, and token classes of their own (`Given`). `TextState` brings
both to the batch of the UNet and keeps the prepared call, which all steps of a prompt share.

Source: DESIGN.md section 1, fact 1 (text is stationary), and section 5 (where tokens come from).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..functional import Prepared, prepare
from ..program import Program
from ..streams import MadeOn
from .settings import Settings
from .text_cache import TextCache

__all__ = ["Given", "Rows", "TextState", "checked_token_input"]

TOKEN_INPUTS = ("gate", "phrases", "protected", "active")


@dataclass
class Rows:
    """What the pipeline knows of a batch of text.

    prompt: for every batch entry the index of its prompt, -1 for an unconditional entry. prompts: how many there are.
    protected: (B, N) bool on the text's device; None where the tokens of a prompt are unknown.
    """

    prompt: list[int]
    prompts: int
    protected: Tensor | None


@dataclass
class Given:
    """What the user said of the tokens; checked copies, or None."""

    gate: Tensor | None = None
    phrases: Tensor | None = None
    protected: Tensor | None = None
    active: Tensor | None = None


@dataclass
class TextState:
    """One model's text: the latest batch's rows, and the calls prepared for it. step: of a schedule of dropout."""

    settings: Settings
    given: Given
    rows: Rows | None = None
    step: int | None = None
    cache: dict[tuple[Any, ...], Prepared] = field(default_factory=dict)
    made_on: dict[tuple[Any, ...], MadeOn] = field(default_factory=dict)  # of what is in cache
    cached: TextCache = field(default_factory=TextCache)

    def forget(self) -> None:
        self.cache.clear()
        self.made_on.clear()
        self.cached.forget()

    def see(self, rows: Rows | None) -> None:
        """A new batch of text; what was prepared stays where its rows are of the same classes as before."""
        if not _same(rows, self.rows):
            self.cache.clear()
            self.made_on.clear()
        self.rows = rows

    def needs_protected(self) -> bool:
        """Whether it matters which tokens are content: plain attention has no use for it."""
        program = self.settings.program
        plain = program.dropout is None and program.refine is None and program.renormalize == "none"
        return not plain or self.given.gate is not None or self.given.phrases is not None

    def needs_active(self) -> bool:
        """Whether it matters which entries are prompts: the maps are theirs alone."""
        return self.needs_protected() or self.settings.capture is not None

    def prepared(
        self,
        batch: int,
        heads_count: int,
        tokens: int,
        device: torch.device,
        heads: tuple[int, ...] | None,
        captures: bool = False,
        training: bool = False,
    ) -> Prepared:
        """The call for keys (batch, heads_count, tokens, D), from the cache where nothing changed. captures: with the
        settings' capture. training: the layer is in train mode.

        Raises: ValueError where a token input does not fit the batch, or is missing.
        """
        program = self.settings.program_at(self.step, training)
        key = (batch, heads_count, tokens, device.type, device.index, heads, captures, program.dropout)
        found = self.cache.get(key) if self.settings.text_cache else None
        if found is not None:
            made_on = None if torch.compiler.is_compiling() else self.made_on.get(key)
            if made_on is not None:
                made_on.use(found.tensors)
            return found
        made = self._prepare(program, batch, heads_count, tokens, device, heads, captures)
        # A gate with a gradient belongs to one graph. Under torch.compile the cache is read and not written.
        gate = self.given.gate
        if not torch.compiler.is_compiling() and not (gate is not None and gate.requires_grad):
            self.made_on[key] = MadeOn(device)
            self.cache[key] = made
        return made

    def active(self, batch: int, device: torch.device) -> Tensor | None:
        """(B,) bool, None for all."""
        if self.given.active is not None:
            if tuple(self.given.active.shape) != (batch,):
                raise ValueError(
                    f"active: expected shape ({batch},), the UNet's batch with its unconditional entries, "
                    f"got {tuple(self.given.active.shape)}"
                )
            return self.given.active.to(device)
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
        return torch.tensor([p >= 0 for p in self.rows.prompt], dtype=torch.bool, device=device)

    def _prepare(
        self,
        program: Program,
        batch: int,
        heads_count: int,
        tokens: int,
        device: torch.device,
        heads: tuple[int, ...] | None,
        captures: bool,
    ) -> Prepared:
        s = self.settings
        active = self.active(batch, device)
        prompt = self._prompt_of_entries(batch)
        protected = self._expand("protected", prompt, batch, tokens, device)
        if protected is None and self.rows is not None and self.needs_protected():
            protected = self._found_protected(batch, tokens, device)
        return prepare(
            program,
            batch=batch,
            heads_count=heads_count,
            tokens=tokens,
            device=device,
            gate=self._expand("gate", prompt, batch, tokens, device),
            phrases=self._expand("phrases", prompt, batch, tokens, device),
            protected=protected,
            active=active,
            heads=heads,
            inactive_heads=s.inactive_heads,
            capture=s.capture if captures else None,
            backend=s.backend,
        )

    def _found_protected(self, batch: int, tokens: int, device: torch.device) -> Tensor:
        rows = self.rows
        assert rows is not None
        if rows.protected is None:
            raise ValueError(
                "protected: prompt_embeds came without their tokens. Make them with pipe.encode_prompt after "
                f"sdattn_fast.apply, or pass protected=, a bool tensor ({tokens},) or (prompts, {tokens}) that is True "
                "for BOS, EOS and padding, to apply or patch.update"
            )
        if tuple(rows.protected.shape) != (batch, tokens):
            raise ValueError(
                f"protected: the pipeline encoded {tuple(rows.protected.shape)} (batch, tokens), this layer sees "
                f"({batch}, {tokens}); pass protected= and active= to apply or patch.update"
            )
        return rows.protected.to(device)

    def _prompt_of_entries(self, batch: int) -> list[int]:
        """The prompt of every batch entry; the user's `active` wins over what the pipeline knows."""
        if self.given.active is not None:
            on = self.given.active.tolist()
            return [sum(on[:b]) if is_on else -1 for b, is_on in enumerate(on)]
        if self.rows is not None and len(self.rows.prompt) == batch:
            return self.rows.prompt
        return list(range(batch))

    def _expand(self, name: str, prompt: list[int], batch: int, tokens: int, device: torch.device) -> Tensor | None:
        """A user's tensor, brought from its prompts to the UNet's batch."""
        x: Tensor | None = getattr(self.given, name)
        if x is None:
            return None
        if x.dim() == 1:
            x = x[None]
        x = x.to(device)
        entries = [b for b, p in enumerate(prompt) if p >= 0]
        prompts = max([p + 1 for p in prompt], default=0)
        lead = x.shape[0]
        if x.shape[-1] != tokens or lead not in (1, prompts, len(entries), batch):
            raise ValueError(
                f"{name}: expected ({tokens},), ({prompts}, {tokens}) for the prompts or ({batch}, {tokens}) for the "
                f"UNet's batch, got {tuple(getattr(self.given, name).shape)}"
            )
        if lead == batch:
            return x
        # Unconditional entries are plain attention, whatever stands in their place.
        whole = _NEUTRAL[name].to(dtype=x.dtype, device=device).expand(batch, *x.shape[1:]).clone()
        if lead == 1:
            source = [0] * len(entries)
        elif lead == prompts:
            source = [prompt[b] for b in entries]
        else:
            source = list(range(lead))
        to, of = (torch.tensor(i, dtype=torch.long, device=device) for i in (entries, source))
        return whole.index_copy(0, to, x[of])


def _same(rows: Rows | None, other: Rows | None) -> bool:
    if rows is None or other is None:
        return rows is other
    if (rows.protected is None) != (other.protected is None) or rows.prompt != other.prompt:
        return False
    return rows.protected is None or (other.protected is not None and torch.equal(rows.protected, other.protected))


_NEUTRAL = {"gate": torch.tensor(1), "phrases": torch.tensor(-1), "protected": torch.tensor(True)}


def checked_token_input(name: str, x: Any) -> Tensor | None:
    """A copy of a user's gate, phrases, protected or active, checked as far as it can be before a batch is seen.

    gate: bool, or floating, finite and >= 0, (N,), (P or B, N) or (P or B, H, N). phrases: integer, >= -1, and
    protected: bool, (N,) or (P or B, N). active: bool (B,).

    Raises: TypeError, ValueError.
    """
    if x is None:
        return None
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor or None, got {type(x).__name__}")
    most = {"gate": 3, "phrases": 2, "protected": 2, "active": 1}[name]
    if not 1 <= x.dim() <= most:
        raise ValueError(f"{name}: expected 1 to {most} dimensions, got {tuple(x.shape)}")
    if name in ("protected", "active") and x.dtype != torch.bool:
        raise TypeError(f"{name}: expected dtype torch.bool, got {x.dtype}")
    if name == "phrases" and (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool):
        raise TypeError(f"phrases: expected an integer dtype, got {x.dtype}")
    if name == "phrases" and x.numel() and int(x.min()) < -1:
        raise ValueError(f"phrases: expected ids >= 0, or -1 for none, got {int(x.min())}")
    if name == "gate" and x.dtype != torch.bool:
        if not x.is_floating_point():
            raise TypeError(f"gate: expected bool or a floating dtype, got {x.dtype}")
        bad = ~(torch.isfinite(x) & (x >= 0))
        if bool(bad.any()):
            raise ValueError(f"gate: expected finite numbers >= 0, got {x[bad][0].item()}")
    return x.clone()
