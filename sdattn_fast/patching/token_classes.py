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


def protected_tokens(ids: Tensor, bos: int | None, eos: int | None) -> Tensor:
    """(P, N) bool: BOS, and everything from the first EOS on, for token ids (P, N)."""
    protected = torch.zeros_like(ids, dtype=torch.bool)
    if bos is not None:
        protected[:, 0] = ids[:, 0] == bos
    if eos is not None:
        ends = (ids == eos) & ~protected
        protected = protected | (ends.cumsum(-1) > 0)
    return protected


class EncoderListener:
    """Inside, what this thread gives the text encoders of a pipeline is listened to."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self._ids: dict[str, list[Tensor]] = {}
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
            one = protected_tokens(texts[turn], getattr(tokenizer, "bos_token_id", None), eos)
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
                self._ids.setdefault(name, []).append(ids)

        return hook
