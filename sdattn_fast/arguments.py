"""The checks: every argument's type, shape, dtype, device and range, each message naming the argument, what came and
what was expected. Values are looked at where that costs a glance (gate, phrases), not inside torch.compile.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .graphs import in_graph
from .plan import TokenSide
from .program import Capture, Program
from .streams import to_device

__all__ = [
    "check_products", "check_bias", "check_scale", "check_grid", "check_seed", "check_program", "checked_heads",
    "token_side", "indexed",
]  # fmt: skip


def indexed(device: torch.device | str) -> torch.device:
    """The device as tensors on it name it: "cuda" is the current one, "cuda:0" say; a CPU has no index.

    Raises: TypeError, RuntimeError (torch's own, for a name it does not know).
    """
    if not isinstance(device, (torch.device, str)):
        raise TypeError(f"device: expected a torch.device or its name, got {_type(device)}")
    device = torch.device(device)
    if device.type in ("cpu", "meta"):
        return torch.device(device.type)
    if device.index is not None:
        return device
    return torch.device(device.type, torch.get_device_module(device.type).current_device())


def check_products(query: Any, key: Any, value: Any) -> None:
    """query (B, H, M, D), key (B, H, N, D), value (B, H, N, Dv): one floating dtype, one device.

    Raises: TypeError (not a tensor, not floating), ValueError (rank, sizes, dtypes or devices that do not match).
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {_type(x)}")
        if x.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions (batch, heads, length, head_dim), got shape {_shape(x)}")
        if not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {x.dtype}")
        if x.dtype != query.dtype:
            raise ValueError(f"{name}: expected the query's dtype {query.dtype}, got {x.dtype}")
        if x.device != query.device:
            raise ValueError(f"{name}: expected the query's device {query.device}, got {x.device}")
    b, h, _, d = query.shape
    key_b, key_h, n, key_d = key.shape
    if key_b != b or key_h != h or key_d != d:
        raise ValueError(f"key: expected shape ({b}, {h}, N, {d}) to match query {_shape(query)}, got {_shape(key)}")
    value_b, value_h, value_n, _ = value.shape
    if value_b != b or value_h != h or value_n != n:
        raise ValueError(f"value: expected shape ({b}, {h}, {n}, Dv) to match key {_shape(key)}, got {_shape(value)}")


def check_bias(bias: Any, query: Tensor, tokens: int) -> None:
    """A floating tensor that broadcasts to (B, H, M, N). Raises: TypeError, ValueError."""
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias: expected a torch.Tensor or None, got {_type(bias)}")
    if not bias.is_floating_point():
        raise TypeError(f"bias: expected a floating dtype (added to the logits), got {bias.dtype}")
    if bias.device != query.device:
        raise ValueError(f"bias: expected the query's device {query.device}, got {bias.device}")
    full = (*query.shape[:3], tokens)
    fits = bias.dim() <= 4 and all(
        have == 1 or have == want for have, want in zip(reversed(bias.shape), reversed(full), strict=False)
    )
    if not fits:
        raise ValueError(f"bias: expected a shape that broadcasts to {tuple(full)}, got {_shape(bias)}")


def check_scale(scale: Any) -> None:
    """None or a finite number. Raises: TypeError, ValueError."""
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"scale: expected a number or None, got {_type(scale)}")
    # Not math.isfinite: under torch.compile the scale may be symbolic, which comparisons can be traced through.
    if not -sys.float_info.max <= scale <= sys.float_info.max:
        raise ValueError(f"scale: expected a finite number, got {scale!r:.40}")


def check_grid(grid: Any, pixels: int, needed: bool) -> None:
    """(height, width) with height * width == pixels; may be None where not needed. Raises: TypeError, ValueError."""
    if grid is None:
        if needed:
            raise ValueError("grid: expected (height, width), needed by smoothing (Refinement.sigma > 0), got None")
        return
    if not isinstance(grid, Sequence) or len(grid) != 2 or any(isinstance(g, bool) for g in grid):
        raise TypeError(f"grid: expected (height, width), got {grid!r}")
    if not all(isinstance(g, (int, torch.SymInt)) for g in grid):
        raise TypeError(f"grid: expected two ints (height, width), got {grid!r}")
    if grid[0] < 0 or grid[1] < 0 or grid[0] * grid[1] != pixels:
        raise ValueError(f"grid: expected height * width == {pixels} (the query's pixels), got {tuple(grid)}")


def check_seed(seed: Any, batch: int = 1) -> None:
    """None, an int in [0, 2**63), or an int64 tensor of one element or (B,). Raises: TypeError, ValueError."""
    if seed is None:
        return
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed: expected an int64 tensor, got {seed.dtype}")
        if seed.shape != (batch,) and seed.numel() != 1:
            raise ValueError(f"seed: expected one element or ({batch},), one for each entry, got {_shape(seed)}")
        return
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an int or None, got {_type(seed)}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected 0 <= seed < 2**63, got {seed}")


def check_program(program: Any, capture: Any, tokens: int) -> None:
    """A `Program`, and a `Capture` or None whose tokens exist. Raises: TypeError, ValueError."""
    if not isinstance(program, Program):
        raise TypeError(f"program: expected a sdattn_fast.Program, got {_type(program)}")
    if capture is None:
        return
    if not isinstance(capture, Capture):
        raise TypeError(f"capture: expected a sdattn_fast.Capture or None, got {_type(capture)}")
    for token in capture.tokens or ():
        if token >= tokens:
            raise ValueError(f"capture: expected token indices < {tokens} (the keys), got {token}")


def token_side(
    *,
    batch: int,
    heads_count: int,
    tokens: int,
    device: torch.device | str,
    gate: Any = None,
    phrases: Any = None,
    protected: Any = None,
    active: Any = None,
    heads: Any = None,
    inactive_heads: Any = "plain",
) -> TokenSide:
    """Check the token side of a call and bring it to one form.

    gate: (B, N) or (B, H, N), bool, or floating, finite and >= 0. phrases: (B, N) integer, ids >= 0, -1 for none.
    protected: (B, N) bool. active: (B,) bool. heads: indices of the active heads, or a bool (H,).

    Raises: TypeError, ValueError.
    """
    b, h, n = batch, heads_count, tokens
    device = indexed(device)
    if gate is not None:
        gate = _gate(gate, b, h, n, device)
    if phrases is not None:
        _tensor("phrases", phrases, ((b, n),), device)
        if phrases.is_floating_point() or phrases.is_complex() or phrases.dtype == torch.bool:
            raise TypeError(f"phrases: expected an integer dtype, got {phrases.dtype}")
        phrases = phrases.to(torch.int64)
        if not in_graph() and phrases.numel() and int(phrases.min()) < -1:
            raise ValueError(f"phrases: expected ids >= 0, or -1 for none, got {int(phrases.min())}")
    for name, x, shape in (("protected", protected, (b, n)), ("active", active, (b,))):
        if x is not None:
            _tensor(name, x, (shape,), device)
            if x.dtype != torch.bool:
                raise TypeError(f"{name}: expected dtype torch.bool, got {x.dtype}")
    if not isinstance(inactive_heads, str):
        raise TypeError(f"inactive_heads: expected 'plain' or 'zero', got {_type(inactive_heads)}")
    if inactive_heads not in ("plain", "zero"):
        raise ValueError(f"inactive_heads: expected 'plain' or 'zero', got {inactive_heads!r}")
    is_head = None if heads is None else _heads(heads, h, device)
    return TokenSide(b, h, n, device, gate, phrases, protected, active, is_head, inactive_heads)


def checked_heads(heads: Any, count: int, where: str = "") -> tuple[int, ...] | None:
    """Indices of the active heads, sorted, or None for all; `where` goes into the messages (", in layer ...").

    Raises: TypeError (not ints), ValueError (out of range, twice).
    """
    if heads is None:
        return None
    if isinstance(heads, Tensor) and heads.dtype == torch.bool:
        if tuple(heads.shape) != (count,):
            raise ValueError(f"heads: expected a bool tensor of shape ({count},){where}, got {tuple(heads.shape)}")
        heads = heads.nonzero().flatten()
    if isinstance(heads, Tensor):
        if heads.is_floating_point() or heads.is_complex() or heads.dim() != 1:
            raise TypeError(
                f"heads: expected a 1-D tensor of ints or bool{where}, got {heads.dtype} of shape {_shape(heads)}"
            )
        heads = heads.tolist()
    if isinstance(heads, (str, bytes)) or not isinstance(heads, Sequence):
        raise TypeError(f"heads: expected a sequence of ints, a tensor or None{where}, got {_type(heads)}")
    if any(isinstance(i, bool) or not isinstance(i, int) for i in heads):
        raise TypeError(f"heads: expected ints, got {list(heads)!r}")
    there = f"{where}, which has {count} heads" if where else ""
    for i in heads:
        if not 0 <= i < count:
            raise ValueError(f"heads: expected indices in [0, {count}){there}, got {i}")
    if len(set(heads)) != len(heads):
        raise ValueError(f"heads: expected each index once, got {list(heads)!r}")
    return tuple(sorted(heads))


def _gate(gate: Any, b: int, h: int, n: int, device: torch.device) -> Tensor:
    _tensor("gate", gate, ((b, n), (b, h, n)), device)
    if gate.dtype == torch.bool:
        gate = gate.to(torch.float32)
    elif not gate.is_floating_point():
        raise TypeError(f"gate: expected bool or a floating dtype, got {gate.dtype}")
    elif not in_graph():
        bad = ~(torch.isfinite(gate) & (gate >= 0))
        if bool(bad.any()):
            raise ValueError(f"gate: expected finite numbers >= 0, got {gate[bad][0].item()}")
    gate = gate.to(torch.promote_types(gate.dtype, torch.float32))
    return gate[:, None, :] if gate.dim() == 2 else gate


def _heads(heads: Any, count: int, device: torch.device) -> Tensor:
    if isinstance(heads, Tensor) and heads.dtype == torch.bool:
        _tensor("heads", heads, ((count,),), device)
        return heads
    chosen = set(checked_heads(heads, count) or ())
    return to_device(torch.tensor([i in chosen for i in range(count)], dtype=torch.bool), device)


def _tensor(name: str, x: Any, shapes: tuple[tuple[int, ...], ...], device: torch.device) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor or None, got {_type(x)}")
    if all(tuple(x.shape) != shape for shape in shapes):
        raise ValueError(f"{name}: expected shape {' or '.join(map(str, shapes))}, got {_shape(x)}")
    if x.device != device:
        raise ValueError(f"{name}: expected the query's device {device}, got {x.device}")


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def _type(x: Any) -> str:
    return f"{type(x).__name__} ({str(x)[:60]})"
