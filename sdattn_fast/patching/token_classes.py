"""Which tokens are content, found by listening to a pipeline's text encoders while it encodes its prompts.

Source: docs/design.md, "Where token classes come from".
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..streams import to_device

__all__ = ["EncoderListener", "protected_tokens"]


def protected_tokens(ids: Tensor, bos: int | None, eos: int | None, mask: Tensor | None = None) -> Tensor:
    """(P, N) bool: BOS, everything from the first EOS on, and what a mask (P, N) leaves out, for token ids (P, N)."""
    protected = torch.zeros_like(ids, dtype=torch.bool)
    if bos is not None:
        protected[:, 0] = ids[:, 0] == bos
    if eos is not None:
        ends = (ids == eos) & ~protected
        protected = protected | (ends.cumsum(-1) > 0)
    # Gemma's tokenizer ends a prompt with padding alone.
    return protected if mask is None else protected | (mask.to(ids.device) == 0)


class EncoderListener:
    """Inside, what this thread gives the text encoders of a pipeline is listened to."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self._ids: dict[str, list[tuple[Tensor, Tensor | None]]] = {}
        self._handles: list[Any] = []
        self._thread = threading.get_ident()

    def __enter__(self) -> EncoderListener:
        for name in ("text_encoder", "text_encoder_2"):
            encoder = getattr(self.pipe, name, None)
            if isinstance(encoder, nn.Module):
                self._handles.append(encoder.register_forward_pre_hook(self._hook(name), with_kwargs=True))
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def protected(self, turn: int) -> Tensor | None:
        """(P, N) bool of the text that each encoder was given first (turn 0), second, ..., on its ids' device; with two
        encoders, where both tokenisations say so. None where there was none, or their tokenizers do not say."""
        protected: Tensor | None = None
        for name, texts in self._ids.items():
            tokenizer = getattr(self.pipe, name.replace("text_encoder", "tokenizer"), None)
            eos = getattr(tokenizer, "eos_token_id", None)
            if eos is None or turn >= len(texts):
                return None
            ids, mask = texts[turn]
            one = protected_tokens(ids, getattr(tokenizer, "bos_token_id", None), eos, mask)
            if protected is not None and protected.shape != one.shape:
                return None
            protected = one if protected is None else protected & to_device(one, protected.device)
        return protected

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Any = None) -> None:
            # Pipelines of other threads may share the encoder, and come here without kwargs as the hook is taken off.
            if threading.get_ident() != self._thread or kwargs is None:
                return
            ids = kwargs.get("input_ids", args[0] if args else None)
            if isinstance(ids, Tensor) and ids.dim() == 2:
                mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
                fits = isinstance(mask, Tensor) and mask.shape == ids.shape
                self._ids.setdefault(name, []).append((ids, mask if fits else None))

        return hook
