"""A stock processor that keeps every map."""

from __future__ import annotations

from typing import Any

import torch


class StoreEveryMap:
    """What DAAM and Prompt-to-Prompt do to a stock processor: compute the probabilities, keep them, go on."""

    def __init__(self, kept: list[torch.Tensor]) -> None:
        self.kept = kept

    def __call__(self, attn: Any, x: Any, encoder_hidden_states: Any = None, attention_mask: Any = None) -> Any:
        batch, text = x.shape[0], encoder_hidden_states
        query = attn.head_to_batch_dim(attn.to_q(x))
        key, value = (attn.head_to_batch_dim(to(x if text is None else text)) for to in (attn.to_k, attn.to_v))
        p = attn.get_attention_scores(query, key, attention_mask)
        if text is not None:
            self.kept.append(p.unflatten(0, (batch, attn.heads)))
        out = attn.to_out[0](attn.batch_to_head_dim(p @ value))
        return attn.to_out[1](out)
