"""GradCAM on cross-attention, without a map: where in the picture a token bears on a score.

The relevance of token n at pixel m is the sum over heads of A * relu(dL/dA), and the mean of that over layers. The
backward kernel has both factors of a row at hand (dL/dA = dO V^T) and adds the products up as it goes, so neither A nor
dL/dA is stored: what a layer keeps is the result, (B, T, M).

PnP-OVSS's salience dropout goes further: an object's most telling part outshines the rest, so its pixels are taken from
the tokens, the model is asked again, and what it then looks at is added.

Source: Selvaraju et al. 2017, "Grad-CAM"; Luo et al. 2024, "Emergent Open-Vocabulary Semantic Segmentation from
Off-the-shelf Vision-Language Models" (PnP-OVSS), sections 3.2 and 3.3.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..patching.early_end import MapsComplete
from ..patching.install import install
from ..patching.layers import Layer, heads_of_layers, select_layers
from ..patching.maps import Maps
from ..patching.patch import Patch
from ..patching.settings import Settings
from ..program import Capture, Program

__all__ = ["Seen", "gradcam", "asked", "check_gradients_may_be", "run"]


@dataclass(frozen=True)
class Seen:
    """What a score sees: the UNet's prediction, as part of the graph.

    Attributes:
        prediction: (B, C, height, width) tensor, the UNet's output. None for a score that says it does not need it, by
            an attribute ``needs_prediction = False``: the UNet may then stop after the last captured layer.
        latents: (B, C, height, width) tensor, its input.
        t: The timestep.
        maps: The maps of the captured layers, mean over heads; empty if the patch has no `capture`.

    Examples:
        >>> def score(seen):  # a scalar that is to grow: the 16x16 maps' attention to token 2
        ...     return seen.maps.upsample((16, 16))[:, 2].mean()
        >>> correction = Correction(patch, score)
    """

    prediction: Tensor
    latents: Tensor
    t: Any
    maps: Maps


Loss = Callable[[Seen], Tensor]


def gradcam(
    unet: nn.Module | Patch,
    latents: Tensor,
    t: Any,
    text: Tensor,
    loss: Loss,
    *,
    tokens: Sequence[int] | None = None,
    layers: str | Sequence[str] | None = None,
    heads: Any = None,
    rounds: int = 1,
    drop: float = 0.02,
    program: Program = Program(),
    **inputs: Any,
) -> Maps:
    """GradCAM on cross-attention: where in the picture each token matters for a score.

    The relevance of a token at a pixel is the sum over heads of the attention times the positive part of its gradient.
    The backward kernels add it up, so no attention map is stored.

    Args:
        unet: A `Patch`, whose program runs; or a UNet that is not patched, in which `program` runs and every token is
            content.
        latents: (B, C, height, width) tensor.
        t: The timestep, a number or a tensor.
        text: (B, N, E) tensor of B prompts, without unconditional entries.
        loss: Takes a `Seen` and returns a scalar tensor. A token is relevant where more attention would raise that
            number. So give a score, such as `Presence`; or an error, to see what raises it.
        tokens: Indices of the T tokens. None: all N.
        layers: Names or fnmatch patterns. None: the key layers, as in `Capture`.
        heads: The heads to sum over, as in `apply`. None: all.
        rounds: Rounds of salience dropout, at least 1: after each, the most relevant pixels lose these tokens'
            attention, and the relevance of all rounds is added.
        drop: The share of pixels that each round drops, in (0, 1).
        program: For a UNet that is not patched.
        **inputs: Further inputs of the UNet, such as SDXL's ``added_cond_kwargs``.

    Returns:
        The relevance by layer, (B, T, height, width) float32, >= 0, detached. `Maps.upsample` gives the mean over
        layers.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has the wrong shape or value, or the backward kernels cannot serve the call (float64,
            rounds of refinement, axis "space").
        RuntimeError: Inside torch.inference_mode, which forbids gradients.

    Examples:
        >>> with sdattn_fast.apply(pipe) as patch:
        ...     relevance = gradcam(patch, latents, t, text, NoisePrediction(noise))
        >>> of_token_2 = relevance.upsample()[0, 2]  # (height, width)

    Source: Selvaraju et al. 2017, arXiv 1610.02391; PnP-OVSS, Luo et al. 2024, sections 3.2 and 3.3, arXiv 2311.17095.
    """
    check_gradients_may_be("gradcam")
    _check(latents, text, loss, rounds, drop)
    with _patched(unet, program, loss) as patch, patch.aside():
        chosen = _chosen(patch, layers, latents)
        total: dict[str, Tensor] = {}
        wanted = tuple(range(text.shape[1])) if tokens is None else _indices(tokens, text.shape[1])
        dropped: Tensor | None = None
        for turn in range(rounds):
            with asked(patch, chosen, wanted, heads), _without(patch, chosen, dropped, wanted, text.shape[1]):
                seen = run(patch, latents, t, text, **inputs)
                with torch.enable_grad():  # pipelines call from inside no_grad
                    value = _scalar(loss(seen))
                found = _relevance(chosen, value)
            total = {name: total[name] + x if turn else x for name, x in found.items()}
            if turn + 1 < rounds:
                salient = _most_salient(found, drop)
                dropped = salient if dropped is None else dropped | salient
        size = (int(latents.shape[2]), int(latents.shape[3]))
        return Maps(total, wanted, size, getattr(patch.pipe, "tokenizer", None))


def check_gradients_may_be(what: str) -> None:
    """Raises: RuntimeError inside torch.inference_mode, where nothing can turn gradients on."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{what}: it needs gradients, which torch.inference_mode forbids for all that is inside; leave that off "
            "(torch.no_grad is fine)"
        )


def run(
    patch: Patch,
    latents: Tensor,
    t: Any,
    text: Tensor,
    *,
    maps_alone: bool = False,
    maps_of: str | Sequence[str] | None = None,
    **inputs: Any,
) -> Seen:
    """One forward with gradients on, beside those of a pipeline: its maps do not enter the run's mean. maps_alone: no
    prediction is needed. maps_of: as in `Call`.

    Raises: RuntimeError for a model whose weights were made in torch.inference_mode. ValueError where no captured layer
    is one of `maps_of`.
    """
    unet = patch.unet
    assert unet is not None
    latents, t, text, inputs = _outside_inference_mode((latents, t, text, inputs))
    out: Tensor | None = None
    with torch.enable_grad(), patch.aside() as call:
        call.ends_with_maps, call.maps_of = maps_alone and patch.may_end_early(), maps_of
        try:
            out = unet(latents, t, encoder_hidden_states=text, return_dict=False, **inputs)[0]
        except MapsComplete:
            pass
        except RuntimeError as error:
            if "Inference tensors" not in str(error):
                raise
            raise RuntimeError(
                "unet: its weights were made in torch.inference_mode, which gradients cannot pass; load it outside, or "
                "replace them by clones"
            ) from error
        maps = patch.maps if patch.captures else Maps({}, (), None)
    # Not typed as optional, or every score would have to ask; those that read it always have one.
    return Seen(None if maps_alone else out, latents, t, maps)  # type: ignore[arg-type]


def _outside_inference_mode(x: Any) -> Any:
    """Tensors made in inference mode as ones that a graph may keep, inside tuples, lists and dicts too."""
    if isinstance(x, Tensor):
        return x.clone() if x.is_inference() else x
    if isinstance(x, dict):
        return {key: _outside_inference_mode(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(_outside_inference_mode(value) for value in x)
    return x


@contextlib.contextmanager
def asked(patch: Patch, layers: Sequence[Layer], tokens: Sequence[int], heads: Any = None) -> Iterator[None]:
    """Inside, forwards of these layers ask their backward pass for the relevance of tokens, summed over heads."""
    by_layer = heads_of_layers(heads, [(layer.name, layer.attn) for layer in patch.all_layers])
    of_tokens = torch.tensor(tuple(tokens), dtype=torch.int32)
    for layer in layers:
        chosen = by_layer[layer.name]
        summed = None
        if chosen is not None:
            summed = torch.zeros(int(layer.attn.heads), dtype=torch.uint8)
            summed[list(chosen)] = 1
        layer.asks = (of_tokens, summed)
    try:
        with patch.watching_grids():
            yield
    finally:
        for layer in layers:
            layer.asks = layer.sink = None


def _relevance(layers: Sequence[Layer], value: Tensor) -> dict[str, Tensor]:
    sinks = [layer.sink for layer in layers]
    ran = [layer for layer in layers if layer.sink is not None]
    grads = torch.autograd.grad(value, [s for s in sinks if s is not None], allow_unused=True)
    found = {}
    for layer, grad in zip(ran, grads, strict=True):
        assert layer.sink is not None
        relevance = torch.zeros_like(layer.sink) if grad is None else grad
        if layer.grid is None:
            raise ValueError(f"unet: layer {layer.name!r} ran outside a block that knows its height and width")
        found[layer.name] = relevance.detach().unflatten(-1, layer.grid)
    return found


def _most_salient(relevance: dict[str, Tensor], drop: float) -> Tensor:
    """(B, height, width) bool, as the largest layer: the share `drop` of pixels where these tokens matter most."""
    size = max(((x.shape[2], x.shape[3]) for x in relevance.values()), key=math.prod)
    mean = sum(F.interpolate(x.mean(1, keepdim=True), size, mode="bilinear")[:, 0] for x in relevance.values())
    assert isinstance(mean, Tensor)
    flat = mean.flatten(1)
    k = max(1, round(drop * flat.shape[1]))
    salient = torch.zeros_like(flat, dtype=torch.bool).scatter(1, flat.topk(k, dim=1).indices, True)
    return salient.view(mean.shape)


@contextlib.contextmanager
def _without(
    patch: Patch, layers: Sequence[Layer], dropped: Tensor | None, tokens: Sequence[int], count: int
) -> Iterator[None]:
    """Inside, the dropped pixels (B, height, width) pay these tokens no attention."""
    if dropped is None:
        yield
        return
    biases = {}
    for layer in layers:
        assert layer.grid is not None
        there = F.adaptive_max_pool2d(dropped[:, None].float(), layer.grid).flatten(1) > 0
        biases[layer.name] = torch.zeros(len(dropped), 1, there.shape[1], count, device=dropped.device)
        biases[layer.name][..., list(tokens)] = torch.where(there, -math.inf, 0.0)[:, None, :, None]
    call, mine = patch.current_call, object()
    call.biases[mine] = biases
    try:
        yield
    finally:
        call.biases.pop(mine, None)


@contextlib.contextmanager
def _patched(unet: Any, program: Program, loss: Loss) -> Iterator[Patch]:
    if isinstance(unet, Patch):
        if not unet.installed or unet.unet is None:
            raise ValueError(f"unet: expected a patch in place, got {unet!r}")
        unet.check_guided()
        yield unet
        return
    if not isinstance(unet, nn.Module):
        raise TypeError(f"unet: expected a UNet or a Patch, got {type(unet).__name__}")
    needed = getattr(loss, "tokens", None)
    capture = None if needed is None else Capture(tuple(sorted(set(needed))))
    with install(unet, Settings(program, capture=capture)) as patch:
        patch.check_guided()
        if patch.unet is None:
            raise ValueError("unet: it has no cross-attention layer to serve")
        yield patch


def _chosen(patch: Patch, wanted: str | Sequence[str] | None, latents: Tensor) -> list[Layer]:
    # A ControlNet's layers do not run in the UNet's forward.
    mine = patch.unet_layers
    if wanted is None:
        names = patch.key_layers((int(latents.shape[2]), int(latents.shape[3])))
    else:
        names = set(select_layers(wanted, [layer.name for layer in mine]))
    return [layer for layer in mine if layer.name in names]


def _scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"loss: expected a scalar tensor from it, got {shape}")
    if not value.requires_grad:
        raise ValueError("loss: what it gave does not depend on the attention (no graph)")
    return value.reshape(())


def _indices(tokens: Any, count: int) -> tuple[int, ...]:
    found = Capture(tuple(tokens)).tokens  # checks that they are ints >= 0
    assert found is not None
    if not found or max(found) >= count:
        raise ValueError(f"tokens: expected indices < {count}, at least one, got {found}")
    return found


def _check(latents: Any, text: Any, loss: Any, rounds: Any, drop: Any) -> None:
    for name, x, dims in (("latents", latents, 4), ("text", text, 3)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
        if x.dim() != dims:
            shape = "(B, C, height, width)" if dims == 4 else "(B, N, E)"
            raise ValueError(f"{name}: expected {shape}, got shape {tuple(x.shape)}")
    if latents.shape[0] != text.shape[0]:
        raise ValueError(f"text: expected {latents.shape[0]} entries, as the latents, got {text.shape[0]}")
    if not callable(loss):
        raise TypeError(f"loss: expected a callable, got {type(loss).__name__}")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds: expected an int >= 1, got {rounds!r}")
    if isinstance(drop, bool) or not isinstance(drop, (int, float)) or not 0.0 < drop < 1.0:
        raise ValueError(f"drop: expected a share in (0, 1), got {drop!r}")
