"""Which layers a patch serves, and the grid each of them sees.

A layer is served where its keys are the text: a diffusers `Attention` built with a cross_attention_dim, without added
key and value projections (DeepFloyd, Kandinsky). The module says so; its name does not (with only_cross_attention,
attn1 reads the text too).

Height and width are not passed to a processor, so they are those of the input of the enclosing Transformer2DModel, or
of a transformer in its patches, and never a square root.

Source: docs/design.md, "Facts about diffusers".
"""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..arguments import checked_heads
from ..backend.call import Relevance
from ..graphs import in_graph
from ..streams import to_device
from .known_processors import own_class
from .map_sums import Grid, LayerMaps
from .model_kinds import argument_names, kind_of
from .text_state import TextState

if TYPE_CHECKING:
    from .compiled import CompiledText
    from .states import States

__all__ = ["Layer", "cross_attention_layers", "is_served", "no_hook", "select_layers", "heads_of_layers", "watch_grids"]

# Where a processor finds its layer: an attribute of the Attention module, there while a patch lives.
LAYER = "_sdattn_fast_layer"

# Blocks whose first input is (B, C, height, width) and whose attention layers see height * width rows.
_SPATIAL_BLOCKS = ("Transformer2DModel", "KAttentionBlock")


@dataclass(eq=False)
class Layer:
    """One served layer of a patch.

    heads: the active ones, None for all. grid: (height, width) of the forward in progress, of videos (frames, height,
    width). seed: (B,) int64, layer and timestep mixed in. captures: whether it keeps maps in this step. ends_forward:
    the forward ends with the last of them. captured: maps (B, T, M) or (B, H, T, M), which entries are active ((B,)
    bool on the CPU, None for all), the grid. bias: (B or 1, 1, M, N), added to the logits. asks: tokens (T,) int32 and
    heads (H,) uint8 or None, whose relevance the backward pass is to add up; sink: (B, T, M), whose gradient it will
    be. compiled: what a graph of torch.compile reads of the text; None outside one. across_heads: norm_q and norm_k act
    before the split into heads.

    A forward has a Layer of its own where threads run at once: `of_thread`, of one of the `states`, at the same index.
    """

    name: str
    attn: Any
    text: TextState
    heads: tuple[int, ...] | None = None
    across_heads: bool = False
    grid: Grid | None = None
    seed: Tensor | None = None
    captures: bool = False
    ends_forward: bool = False
    captured: LayerMaps | None = None
    bias: Tensor | None = None
    asks: tuple[Tensor, Tensor | None] | None = None
    sink: Tensor | None = None
    compiled: CompiledText | None = None
    original: Any = None
    placed: Any = None
    states: States | None = None
    index: int = 0
    # Of texts that were read where gradients are on: the seed of the forward.
    seed_of_text: Any = field(default_factory=WeakTensorKeyDictionary)

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()  # copies of a model are not patched

    def of_thread(self) -> Layer:
        """The layer as this thread's forward sees it."""
        return self if self.states is None else self.states.current.layers[self.index]

    def grid_of(self, pixels: int) -> Grid | None:
        """The grid, if it has so many pixels: blocks without a grid of their own say nothing, and one left from
        elsewhere must not be taken for theirs."""
        grid = self.grid
        return grid if grid is not None and math.prod(grid) == pixels else None

    def seeds(self, text: Tensor, batch: int) -> Tensor | None:
        """`seed` for the entries of a layer, of which a model may make several of one of its own. When gradient
        checkpointing runs the layer again, after other forwards perhaps, it is told by its text."""
        seed = self.seed
        if torch.is_grad_enabled() and not in_graph():
            if not self.text.in_forward:
                seed = self.seed_of_text.get(text, seed)
            elif seed is not None:
                self.seed_of_text[text] = seed
        entries = batch if seed is None else seed.shape[0]
        if seed is None or entries == batch or batch % entries:
            return seed
        return seed.repeat_interleave(batch // entries)

    def relevance(self, batch: int, pixels: int, device: torch.device) -> Relevance | None:
        """What a forward is to hand on to the backward pass; its sink takes no memory before that."""
        if self.asks is None:
            return None
        tokens, heads = self.asks
        self.sink = torch.zeros((), device=device, requires_grad=True).expand(batch, tokens.shape[0], pixels)
        return Relevance(self.sink, to_device(tokens, device), None if heads is None else to_device(heads, device))


def is_served(attn: Any) -> bool:
    """Whether a module's keys and values are the text's and nothing else's, or are told from an image's; as far as it
    says so itself."""
    of_diffusers = (
        getattr(attn, "is_cross_attention", False) is True
        and hasattr(attn, "set_processor")
        and getattr(attn, "added_kv_proj_dim", None) is None
        and getattr(attn, "to_k", None) is not None
        and getattr(attn, "inner_kv_dim", None) == getattr(attn, "inner_dim", 0)
    )
    return of_diffusers or (getattr(attn, "is_cross_attention", False) is True and own_class(attn) is not None)


def cross_attention_layers(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, Attention) of every served layer, names as in `model.named_modules()`."""
    says = kind_of(model).text_layers
    for name, module in model.named_modules():
        if is_served(module) or (says and name.endswith(says) and own_class(module) is not None):
            yield prefix + name, module


def select_layers(wanted: str | Sequence[str] | None, names: Sequence[str], argument: str = "layers") -> list[str]:
    """The names that `layers` asks for, in the model's order.

    Raises: TypeError (not names), ValueError (a name or pattern that finds nothing; the nearest name is suggested).
    """
    if wanted is None:
        return list(names)
    patterns = [wanted] if isinstance(wanted, str) else wanted
    if not isinstance(patterns, Sequence) or any(not isinstance(p, str) for p in patterns):
        raise TypeError(f"{argument}: expected names or fnmatch patterns, got {wanted!r}")
    if not patterns:
        raise ValueError(f"{argument}: expected at least one name or pattern, or None for all, got {wanted!r}")
    chosen: set[str] = set()
    for pattern in patterns:
        found = _matching(argument, pattern, names)
        chosen.update(found)
    return [name for name in names if name in chosen]


def heads_of_layers(heads: Any, layers: Sequence[tuple[str, Any]]) -> dict[str, tuple[int, ...] | None]:
    """The active heads of every layer; layers that a mapping leaves out keep all of theirs active.

    Raises: TypeError, ValueError (naming the layer and how many heads it has).
    """
    count = {name: int(attn.heads) for name, attn in layers}
    if not isinstance(heads, Mapping):
        return {name: checked_heads(heads, count[name], f" in layer {name!r}") for name in count}
    chosen: dict[str, tuple[int, ...] | None] = dict.fromkeys(count)
    for pattern, indices in heads.items():
        if not isinstance(pattern, str):
            raise TypeError(f"heads: expected layer names as keys, got {pattern!r}")
        for name in _matching("heads", pattern, list(count)):
            chosen[name] = checked_heads(indices, count[name], f" in layer {name!r}")
    return chosen


def watch_grids(model: nn.Module, layers: Sequence[Layer]) -> list[Any]:
    """Pre-hooks that write every layer's grid before its block runs; their handles."""
    handles = []
    mine = {id(layer.attn): layer for layer in layers}
    for block in model.modules():
        grid_from = kind_of(block).grid
        if type(block).__name__ not in _SPATIAL_BLOCKS and not grid_from:
            continue
        inside = [mine[id(m)] for m in block.modules() if id(m) in mine]
        if inside:
            handles.append(
                block.register_forward_pre_hook(_GridHook(inside, argument_names(block), grid_from), with_kwargs=True)
            )
    return handles


def no_hook() -> Any:
    """What stands for a patch's hook in a copy of the model."""
    return _do_nothing


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _nothing() -> None:
    return None


class _GridHook:
    """names: of the block's arguments. grid_from: as `ModelKind.grid`."""

    def __init__(self, layers: list[Layer], names: Sequence[str], grid_from: str) -> None:
        self.layers, self.names, self.grid_from = layers, names, grid_from

    def __reduce__(self) -> tuple[Any, ...]:
        return no_hook, ()

    def __call__(self, block: Any, args: tuple[Any, ...], kwargs: Any = None) -> None:
        # Without kwargs where another thread has just taken the hook off.
        inputs = {**dict(zip(self.names, args, strict=False)), **(kwargs or {})}
        grid = _grid_of(block, inputs, self.grid_from)
        if grid is not None:
            for layer in self.layers:
                layer.of_thread().grid = grid


def _grid_of(block: Any, inputs: Mapping[str, Any], grid_from: str) -> Any:
    """Of a block that is called with these. None: it is not said there."""
    x = inputs.get("hidden_states")
    if grid_from == "arguments":
        grid = tuple(inputs.get(name) for name in ("num_frames", "height", "width"))
        return None if None in grid else grid
    if x is None or x.dim() not in (4, 5):
        return None
    grid = tuple(x.shape[2:])
    if getattr(block, "is_input_patches", False) or grid_from == "patches":
        sides = block.config.patch_size
        sides = (1,) * (len(grid) - 2) + (sides,) * 2 if isinstance(sides, int) else sides
        grid = tuple(length // side for length, side in zip(grid, sides, strict=True))
    return grid


def _matching(argument: str, pattern: str, names: Sequence[str]) -> list[str]:
    # The keys of unet.attn_processors end in ".processor"; people copy them.
    pattern = pattern.removesuffix(".processor")
    found = [name for name in names if name == pattern or fnmatch.fnmatchcase(name, pattern)]
    if not found:
        nearest = max(names, key=lambda name: _likeness(pattern, name), default=None)
        hint = f"; did you mean {nearest!r}?" if nearest else ""
        raise ValueError(f"{argument}: {pattern!r} matches none of the {len(names)} cross-attention layers{hint}")
    return found


def _likeness(pattern: str, name: str) -> tuple[int, float]:
    """Shared characters first: names are long, and one that leaves parts out should not suit a shorter name better."""
    matcher = difflib.SequenceMatcher(None, pattern, name, autojunk=False)
    return sum(block.size for block in matcher.get_matching_blocks()), matcher.ratio()
