"""The peers' formulas against float64 NumPy, and their maps and gradients against what the UNet computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionAttendAndExcitePipeline

from sdattn_fast.evaluation.peers.attention import KeptMaps, cross_attention_grids
from sdattn_fast.evaluation.peers.init_no import scores
from sdattn_fast.evaluation.peers.structure_diffusion import _OtherValues, value_text
from sdattn_fast.evaluation.peers.syngen import _gradient
from sdattn_fast.guidance.binding import binding_loss, syntactic_pairs
from sdattn_fast.guidance.phrases import find_phrases
from sdattn_fast.lab import load_pipeline
from sdattn_fast.patching.layers import cross_attention_layers

PROMPT = "a red circle and a blue square"


def _maps(*shape: int, sharp: float = 1.0) -> torch.Tensor:
    """Rows that sum to 1, float64."""
    return torch.softmax(
        sharp * torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64), -1
    )


@pytest.mark.parametrize("sharp", [1.0, 6.0])
def test_attend_and_excites_loss_in_diffusers_is_the_papers(sharp: float) -> None:
    """1 - the strongest pixel of the weakest token, of maps sharpened over tokens and smoothed."""
    maps = _maps(6, 6, 12, sharp=sharp)
    kind: Any = StableDiffusionAttendAndExcitePipeline
    result = kind._compute_loss(kind._compute_max_attention_per_index(maps.float().clone(), [2, 5]))
    strongest = [_excited(maps.numpy(), token).max() for token in (2, 5)]
    assert float(result) == pytest.approx(1 - min(strongest), abs=1e-5)


def test_scores_of_noises_are_the_papers() -> None:
    cross, own, nouns = _maps(5, 4, 12, sharp=4.0), _maps(20, 20, sharp=3.0), [(2,), (5, 6), (9,)]
    response, conflict = scores(cross, own, nouns)
    seen = []
    strongest = []
    for noun in nouns:
        shares = np.mean([_sharpened(cross.numpy())[..., i - 1] for i in noun], 0)
        smooth = _smooth(shares)
        strongest.append(smooth.max())
        seen.append(_smooth(own.numpy()[smooth.argmax()].reshape(5, 4)))
    pairs = [(seen[i], seen[j]) for i in range(3) for j in range(i + 1, 3)]
    expected = np.mean([np.minimum(a, b).sum() / (a + b).sum() for a, b in pairs])
    assert response.item() == pytest.approx(1 - min(strongest), rel=1e-12)
    assert conflict.item() == pytest.approx(expected, rel=1e-12)
    assert scores(cross, own, nouns[:1])[1].item() == 0


def test_nouns_in_one_place_are_in_conflict() -> None:
    cross = torch.zeros(6, 6, 8, dtype=torch.float64)
    cross[1, 1, 2] = cross[1, 1, 4] = cross[4, 4, 5] = 0.2
    own = torch.eye(36, dtype=torch.float64)
    together, apart = (scores(cross, own, nouns)[1].item() for nouns in ([(2,), (4,)], [(2,), (5,)]))
    assert together == pytest.approx(0.5) and apart == 0


@pytest.mark.parametrize("grid", [(16, 16), (8, 8)])
def test_kept_maps_are_the_probabilities_of_their_layers(shapes: Any, grid: tuple[int, int]) -> None:
    unet = shapes.unet
    made: dict[str, dict[str, torch.Tensor]] = {}
    handles = []
    for name, attn in cross_attention_layers(unet):
        made[name] = {}
        for of in ("to_q", "to_k"):
            handles.append(
                getattr(attn, of).register_forward_hook(lambda _m, _i, y, to=made[name], of=of: to.update({of: y}))
            )
    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 77, unet.config.cross_attention_dim)
    try:
        with torch.no_grad():
            stock = unet(x, 500, encoder_hidden_states=text).sample
            with KeptMaps(unet, grid, own=True) as attention_maps:
                result = unet(x, 500, encoder_hidden_states=text).sample
    finally:
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(result, stock, rtol=1e-4, atol=1e-4)
    every = []
    for name, attn in cross_attention_layers(unet):
        q, k = (made[name][of][0].double().unflatten(-1, (attn.heads, -1)).transpose(0, 1) for of in ("to_q", "to_k"))
        if q.shape[1] == grid[0] * grid[1]:
            every.append(torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, -1))
    expected = torch.cat(every).mean(0).unflatten(0, grid)
    torch.testing.assert_close(attention_maps.cross().double(), expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(attention_maps.own().sum(1), torch.ones(grid[0] * grid[1]))


@pytest.mark.parametrize("name", ["shapes", "sd15", "small"])
def test_grids_are_those_of_a_forward(name: str, shapes: Any, build: Callable[[str], Any]) -> None:
    unet = shapes.unet if name == "shapes" else build(name).unet
    seen: set[int] = set()
    handles = [
        attn.register_forward_pre_hook(lambda _m, inputs: seen.add(inputs[0].shape[1]))
        for _, attn in cross_attention_layers(unet)
    ]
    side = unet.config.sample_size
    with torch.no_grad():
        unet(
            torch.zeros(1, 4, side, side), 1, encoder_hidden_states=torch.zeros(1, 77, unet.config.cross_attention_dim)
        )
    for handle in handles:
        handle.remove()
    assert {height * width for height, width in cross_attention_grids(unet)} == seen


def test_syngens_gradient_is_that_of_the_loss_by_the_latents() -> None:
    pipe = load_pipeline()
    with torch.no_grad():
        text = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0].double()
    pipe.to(torch.float64)
    pipe.unet.requires_grad_(False)
    pairs = syntactic_pairs(pipe.tokenizer, PROMPT, find_phrases(PROMPT, pipe.tokenizer))
    pipe.scheduler.set_timesteps(4)
    x, way = torch.randn(2, 1, 4, 16, 16, dtype=torch.float64).unbind()
    with torch.no_grad():

        def loss(latents: torch.Tensor) -> float:
            with KeptMaps(pipe.unet, (16, 16)) as attention_maps:
                pipe.unet(latents, pipe.scheduler.timesteps[1], encoder_hidden_states=text)
            return binding_loss(attention_maps.cross(), pairs).item()

        small = 1e-4 * way
        slope = (loss(x + small) - loss(x - small)) / 2e-4
        gradient = _gradient(pipe, x, 1, text, pairs, (16, 16))
    assert (gradient * way).sum().item() == pytest.approx(slope, rel=1e-5)


@torch.no_grad()
def test_values_are_the_mean_of_the_prompts_and_the_phrases(shapes: Any) -> None:
    """O = 1 / (k + 1) * sum_i M V_i, each V_i by itself."""
    phrases = find_phrases(PROMPT, shapes.tokenizer)
    read = value_text(shapes, PROMPT, phrases)

    def encoded(text: str) -> torch.Tensor:
        ids = shapes.tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids
        return shapes.text_encoder(ids)[0][0]

    whole = encoded(PROMPT)
    texts = [whole]
    for phrase, start in zip(("a red circle", "a blue square"), (1, 5), strict=True):
        texts.append(whole.clone())
        texts[-1][start : start + 3] = encoded(phrase)[1:4]
    torch.testing.assert_close(read, torch.stack(texts).mean(0), rtol=1e-4, atol=1e-5)

    _, attn = next(cross_attention_layers(shapes.unet))
    x, without = torch.randn(2, 256, attn.to_q.in_features), torch.randn_like(whole)
    both = torch.stack([without, whole])
    result = _OtherValues(read[None])(attn, x, both)

    def probabilities(entry: int) -> torch.Tensor:
        q, k = (
            y.unflatten(-1, (attn.heads, -1)).transpose(0, 1) for y in (attn.to_q(x[entry]), attn.to_k(both[entry]))
        )
        return torch.softmax(q @ k.transpose(1, 2) * attn.scale, -1)

    def out(entry: int, text: torch.Tensor) -> torch.Tensor:
        value = attn.to_v(text).unflatten(-1, (attn.heads, -1)).transpose(0, 1)
        return attn.to_out[0]((probabilities(entry) @ value).transpose(0, 1).flatten(1))

    torch.testing.assert_close(result[0], out(0, without), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result[1], torch.stack([out(1, text) for text in texts]).mean(0), rtol=1e-4, atol=1e-4)


def _sharpened(maps: np.ndarray) -> np.ndarray:
    logits = 100 * maps[:, :, 1:-1]
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def _excited(maps: np.ndarray, token: int) -> np.ndarray:
    return _smooth(_sharpened(maps)[:, :, token - 1])


def _smooth(shares: np.ndarray) -> np.ndarray:
    """diffusers' Gaussian over 3x3 pixels: exp(-(x / (2 * 0.5))^2) a side, which sums to 1."""
    padded = np.pad(shares, 1, mode="reflect")
    weights = {(y, x): np.exp(-((y / 1.0) ** 2) - (x / 1.0) ** 2) for y in (-1, 0, 1) for x in (-1, 0, 1)}
    total = sum(weights.values())
    height, width = shares.shape
    parts = [w / total * padded[1 + y : 1 + y + height, 1 + x : 1 + x + width] for (y, x), w in weights.items()]
    return np.sum(parts, 0)
