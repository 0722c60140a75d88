"""The padding of a text: it is never content, and a layer need not see all of it.

Tokens that a mask leaves out have logits that are 10,000 lower, so their probability is 0 in every dtype: each row is
what it is without them. PixArt and Sana pad prompts of 20 tokens to 300 so. Wan and its kin pad with rows of zeros and
use no mask: all these tokens have the same key and value, and one column stands for n of them whose logit is log(n)
greater.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..places import Known
from ..streams import to_device

__all__ = ["TextPadding", "padding_of_mask", "padding_of_zeros"]


class TextPadding:
    """Which tokens of a batch of text are padding; equal to one that says the same.

    padding: (B, N) bool on the CPU. attended: the padding of the end takes part, each of its tokens as all others of
    it; else none of it does. content: how many tokens there are up to the last that is no padding in all entries, at
    least one.
    """

    def __init__(self, padding: Tensor, attended: bool, source: Tensor) -> None:
        """source: what it was read from."""
        self.padding, self.attended = padding, attended
        self.tokens = padding.shape[1]
        content = (~padding).any(0).nonzero()
        self.content = int(content[-1]) + 1 if len(content) else 1
        self._known = Known(source)
        self._logits: dict[Any, Tensor] = {}
        self._key = (attended, *padding.shape, padding.numpy().tobytes())

    def is_of(self, source: Any) -> bool:
        """Whether it was read from a tensor that is still the same; a GPU is not waited for."""
        return isinstance(source, Tensor) and self._known.is_same(source)

    def columns(self, named: Sequence[int] = ()) -> int:
        """How many columns, from the first token on, a layer needs: with these tokens by themselves."""
        alone = max([self.content, *(token + 1 for token in named)])
        return min(alone + 1 if self.attended else alone, self.tokens)

    def bias(self, mask: Tensor | None, columns: int, device: torch.device) -> Tensor | None:
        """What is added to the logits of the columns that are left. mask: what was, (..., N)."""
        mask = None if mask is None or not self.padding[:, :columns].any() else mask[..., :columns]
        if not self.attended:
            return mask
        logits = self._logits.get((columns, device))
        if logits is None:
            # Not in the text's dtype: in bfloat16 the padding's probability would be off by some per mille.
            logits = torch.zeros(1, 1, 1, columns)
            logits[..., -1] = math.log(self.tokens - columns + 1)
            logits = self._logits[columns, device] = to_device(logits, device)
        return logits if mask is None else logits + mask

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TextPadding) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def padding_of_mask(mask: Any) -> TextPadding | None:
    """Of a mask (B, N) of 1 and, for tokens that are left out, 0, or a bias (B, 1, N) of 0 and -10000; else None."""
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 3) or not mask.numel():
        return None
    read = mask.detach().cpu()  # once, since a GPU is waited for
    inside, out = (1, 0) if mask.dim() == 2 else (0, _LEFT_OUT)
    read = read if mask.dim() == 2 else read[:, 0]
    if not ((read == inside) | (read == out)).all():
        return None
    left_out = read == out
    # An entry of which all are left out attends to all of them alike.
    return TextPadding(left_out & ~left_out.all(1, keepdim=True), False, mask)


def padding_of_zeros(text: Tensor) -> TextPadding:
    """Of a text (B, N, E) that ends in rows of zeros."""
    filled = (text != 0).any(-1).cpu()
    return TextPadding(filled.flip(1).cumsum(1).flip(1) == 0, True, text)


_LEFT_OUT = -10000.0
