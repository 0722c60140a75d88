"""What graphs of torch.compile read of the text: looked up before every forward, outside the graph.

Dynamo makes a constant of every number that a graph meets, and compiles anew when it differs. A compiled layer
therefore reads tensors alone, from `Layer.compiled`. The two numbers that kernels are launched by, bounds on the
content tokens and on those dropped, come as the sizes of an empty tensor, which may vary. So other prompts, of any
length, and `Patch.update` compile nothing anew.

Source: docs/design.md, "When cached text is stale".
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..execute import Prepared
from .keys_values import kept_key_value
from .layer_call import LayerCall, Ready
from .layers import Layer

__all__ = ["CompiledText", "compiled_text", "is_compiled", "modules_around"]


@dataclass(frozen=True)
class CompiledText:
    """What a compiled layer reads of one text.

    text: the very tensor. prepared: the call, its bounds free to vary. key, value: (B, H, N, D); folded_value: with the
    program's linear steps in it; None where they may not be kept and the graph makes its own.
    """

    text: Tensor
    prepared: Prepared
    key: Tensor | None = None
    value: Tensor | None = None
    folded_value: Tensor | None = None

    def serves(self, call: LayerCall) -> bool:
        """Whether it was prepared for keys of this shape."""
        side = self.prepared.side
        return (side.batch, side.heads_count, side.tokens) == (call.batch, call.num_heads, call.tokens)


def compiled_text(layer: Layer, text: Tensor, ready: Ready, weights_change: bool) -> CompiledText:
    """What a layer is to read in the forward that begins, its call being ready. weights_change: inside the forward."""
    prepared = with_free_bounds(ready)
    entry = None if weights_change else kept_key_value(layer.text, layer.attn, text)
    if entry is None:
        return CompiledText(text, prepared)
    gate = layer.text.gate
    if gate is not None and gate.requires_grad:  # its numbers are not in the call yet
        return CompiledText(text, prepared, entry.key, entry.value)
    return CompiledText(text, prepared, entry.key, entry.value, entry.serve(ready.prepared).value_folded)


def with_free_bounds(ready: Ready) -> Prepared:
    """The call, with its bounds as the sizes of an empty tensor."""
    if ready.compiled is not None:
        return ready.compiled
    prepared = ready.prepared
    plan = prepared.plan
    if plan is not None:
        rows, n = plan.rows, prepared.side.tokens
        # 0 and 1 are never free to vary.
        sizes = max(16, rows.max_content), max(2, rows.max_drop)
        bounds = torch.empty(*sizes, 0, device=prepared.side.device)
        for dim in (0, 1):
            torch._dynamo.maybe_mark_dynamic(bounds, dim)
        rows = replace(rows, max_content=n, max_drop=n, bounds=bounds)
        prepared = replace(prepared, plan=replace(plan, rows=rows), at_home=prepared.home)
    ready.compiled = prepared
    return prepared


def modules_around(model: nn.Module, layers: Sequence[Layer]) -> list[nn.Module]:
    """The modules of a model that are called and have a served layer inside."""
    served = {id(layer.attn) for layer in layers}
    called = [m for m in model.modules() if not isinstance(m, nn.ModuleList)]
    return [m for m in called if any(id(inner) in served for inner in m.modules())]


def is_compiled(modules: Sequence[Any]) -> bool:
    """Whether `module.compile()` was called on one of them. Asked before every forward, so in a hurry."""
    return any(map(_COMPILED, modules))


_COMPILED = operator.attrgetter("_compiled_call_impl")
