"""What is folded in a model, layer by layer: the choice, expected and measured times, and the memory that it takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..measure.timing import alternate

__all__ = ["FoldRow", "fold_table"]


@dataclass(frozen=True)
class FoldRow:
    """Layers of one shape. kind: what was folded, one of fold.KINDS. expected: seconds of a call, by kind. measured:
    seconds of a call as chosen, unfolded: with fold="never". cached_bytes: what a prompt keeps in each layer."""

    names: list[str]
    pixels: int
    channels: int
    num_heads: int
    kind: str
    expected: dict[str, float]
    measured: float
    unfolded: float
    cached_bytes: int


def fold_table(unet: Any, inputs: dict[str, Any], **keywords: Any) -> list[FoldRow]:
    """Run a UNet once and then one cross-attention layer of each shape some times, folded by cost and not folded.

    unet: a diffusers UNet, not patched; inputs: keyword arguments of its forward; keywords: as for `sdattn_fast.apply`.

    Raises: ValueError, TypeError, as `apply`.
    """
    unfolded = _rows(unet, inputs, {**keywords, "fold": "never"})
    rows = _rows(unet, inputs, {**keywords, "fold": "auto"})
    return [replace(row, unfolded=other.measured) for row, other in zip(rows, unfolded, strict=True)]


def _rows(unet: Any, inputs: dict[str, Any], keywords: dict[str, Any]) -> list[FoldRow]:
    import torch

    from .. import apply

    with torch.no_grad(), apply(unet, **keywords) as patch:
        seen: dict[tuple[Any, ...], tuple[Any, Any, Any, list[str]]] = {}
        handles = [
            layer.attn.register_forward_pre_hook(_look(layer, seen), with_kwargs=True) for layer in patch.unet_layers
        ]
        unet(**inputs)
        for handle in handles:
            handle.remove()
        return [_row(*entry) for entry in seen.values()]


def _look(layer: Any, seen: dict[tuple[Any, ...], tuple[Any, Any, Any, list[str]]]) -> Any:
    def hook(attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        text = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
        shape = (tuple(x.shape), attn.heads, attn.inner_dim, layer.heads)
        seen.setdefault(shape, (layer, x, text, []))[3].append(layer.name)

    return hook


def _row(layer: Any, x: Any, text: Any, names: list[str]) -> FoldRow:
    from ..patching.fold import KINDS, seconds_of, shape_of

    attn = layer.attn
    took = alternate({"ours": lambda: attn(x, text)}, seconds=0.3)["ours"]
    kind, expected, cached_bytes = "none", {}, 0
    entry = layer.text.cached.latest(attn)
    if entry is not None:
        kind = next(iter(entry.folds), "none")
        shape = shape_of(attn, entry.key, x, entry.prepared)
        expected = {k: seconds_of(shape, k) for k in KINDS}
        cached_bytes = sum(t.numel() * t.element_size() for t in entry.tensors())
    pixels = x.shape[1] if x.dim() == 3 else x.shape[2] * x.shape[3]
    return FoldRow(names, pixels, int(attn.inner_dim), int(attn.heads), kind, expected, took, took, cached_bytes)
