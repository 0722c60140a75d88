"""Times at one cross-attention shape: every contestant's call from Python and its CUDA graph, and what memory it takes.

Before anything is timed, each contestant is compared with the definition (torch's own with attention in float64); one
that is off, or raises, is "untimed" with the reason, the others are timed, and the item has failed.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from sdattn_fast.measure.memory import peak_mib

from . import record, timing
from .checks import off
from .contestants import Contestant, fused_contestants, others
from .ground import DEVICE, LAYERS, TOKENS, NotRun, describe
from .programs import inputs

__all__ = ["times"]


@torch.no_grad()
def times(item: str, shape: str, batch: int, dtype: str) -> None:
    """Figures of one shape. Raises AssertionError, once all is measured, where one of ours was off or raised."""
    kind = getattr(torch, dtype)
    of = describe(shape, batch, kind)
    tensors = inputs(shape, batch, kind)
    untimed: dict[str, str] = {}
    everyone = [*others(shape, tensors, untimed), *fused_contestants(shape, tensors, untimed)]
    calls, faults = _fit(everyone, untimed)
    for name, why in untimed.items():
        record.untimed(item, name, why, **of)

    layer = LAYERS[shape]
    moved = 2 * batch * layer.num_heads * (layer.pixels + TOKENS) * layer.head_dim * kind.itemsize
    # What fits the cache is not read from memory each time.
    in_cache = DEVICE.type == "cuda" and moved < torch.cuda.get_device_properties(DEVICE).L2_cache_size
    least = None if in_cache else moved / timing.bandwidth()
    figures = timing.figures(timing.in_turn(calls), least)
    for name, row in figures.items():
        row["peak_mib"] = round(peak_mib(calls[name], DEVICE), 2)
    timing.write(item, "call", figures, **of)

    def failed(name: str, error: Exception) -> None:
        why = record.untimed(item, name, error, "graph", **of)
        if not (isinstance(error, NotRun) or name.startswith("sdpa-")):
            faults.append(f"{name} in a CUDA graph: {why}")

    graphs = timing.graphs(calls, failed)
    if graphs:
        taken = {name: [t / timing.GRAPH_CALLS for t in ts] for name, ts in timing.in_turn(graphs).items()}
        timing.write(item, "graph", timing.figures(taken, least), **of)
    assert not faults, "; ".join(faults)


def _fit(everyone: Iterable[Contestant], untimed: dict[str, str]) -> tuple[dict[str, timing.Call], list[str]]:
    """The calls that give what they should; the reasons against the others go to `untimed`, and ours are returned."""
    calls, faults = {}, []
    for contestant in everyone:
        try:
            why = off(contestant.call(), contestant.exact(), contestant.near_ties)
        except Exception as error:
            why = record.reason(error)
        if why is None:
            calls[contestant.name] = contestant.call
            continue
        untimed[contestant.name] = why
        # That torch has no such kernel for a shape is no fault.
        if not contestant.name.startswith("sdpa-"):
            faults.append(f"{contestant.name}: {why}")
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return calls, faults
