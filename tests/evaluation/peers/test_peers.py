"""Peers draw, are stock where they have no strength, leave no trace, and say where they cannot draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from sdattn_fast.evaluation.peers import (
    AttendAndExcite,
    GuidanceRescale,
    InitialNoise,
    PerturbedAttention,
    SelfAttentionGuidance,
    StructureDiffusion,
    SynGen,
    peers,
)
from sdattn_fast.evaluation.peers.pipelines import no_stable_diffusion
from sdattn_fast.guidance.phrases import find_phrases

PROMPTS = ["a red circle and a blue square", "a green triangle left of a yellow star"]
# A few of its sixty moves are enough to see that they are made, and the middle block has 4x4 pixels.
QUICK = AttendAndExcite(thresholds=())
WIDE = PerturbedAttention(layers=("mid", "up_blocks.1"))
EVERY: list[Any] = [{"Attend-and-Excite": QUICK, WIDE.name: WIDE}.get(peer.name, peer) for peer in peers()]
NAMES = [peer.name for peer in EVERY]


def _noise(count: int = 2) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


def _drawn(peer: Any, pipe: Any, objects: bool = True, prompts: Any = PROMPTS, steps: int = 2) -> np.ndarray:
    phrases = [find_phrases(p, pipe.tokenizer) if objects else [] for p in prompts]
    return peer.draw(pipe, prompts, phrases, _noise(len(prompts)), 4.0, steps)


def _stock(pipe: Any, prompts: Any = PROMPTS, steps: int = 2) -> np.ndarray:
    """One by one: a batch rounds otherwise."""
    images = [
        pipe([p], generator=[g], guidance_scale=4.0, num_inference_steps=steps, output_type="np").images
        for p, g in zip(prompts, _noise(len(prompts)), strict=True)
    ]
    return np.rint(np.concatenate(images) * 255).astype(np.uint8)


def _apart(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    return int(np.abs(a.astype(int) - b).max())


@pytest.fixture(scope="module")
def stock(shapes: Any) -> np.ndarray:
    return _stock(shapes)


@pytest.mark.parametrize("peer", EVERY, ids=NAMES)
def test_a_peer_draws_otherwise_than_stock_and_leaves_no_trace(peer: Any, shapes: Any, stock: np.ndarray) -> None:
    assert peer.left_out(shapes, 4.0) is None
    with _no_trace(shapes):
        pictures = _drawn(peer, shapes)
    assert pictures.shape == (2, 64, 64, 3) and pictures.dtype == np.uint8
    assert all(_apart(a, b) > 1 for a, b in zip(pictures, stock, strict=True))


@pytest.mark.parametrize(
    "peer",
    [
        replace(QUICK, scale=0.0), replace(QUICK, until=0.0), SynGen(scale=0.0), SynGen(until=0.0),
        InitialNoise(noises=1), SelfAttentionGuidance(scale=0.0), PerturbedAttention(scale=0.0),
        GuidanceRescale(scale=0.0),
    ],
    ids=lambda peer: f"{peer.name} {peer}"[:60],
)  # fmt: skip
def test_without_strength_it_is_stock(peer: Any, shapes: Any, stock: np.ndarray) -> None:
    assert _apart(_drawn(peer, shapes), stock) <= 1


@pytest.mark.parametrize("peer", [QUICK, SynGen(), InitialNoise(), StructureDiffusion()], ids=lambda peer: peer.name)
def test_without_objects_it_is_stock(peer: Any, shapes: Any, stock: np.ndarray) -> None:
    assert _apart(_drawn(peer, shapes, objects=False), stock) <= 1


def test_nouns_without_adjectives_are_stock_to_syngen(shapes: Any) -> None:
    prompts = ["a circle and a square"]
    assert _apart(_drawn(SynGen(), shapes, prompts=prompts), _stock(shapes, prompts)) <= 1


@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "EulerAncestralDiscreteScheduler"])
@pytest.mark.parametrize("peer", [SynGen(scale=0.0), InitialNoise(noises=1)], ids=lambda peer: peer.name)
def test_a_scheduler_that_draws_noise_draws_that_of_stock(
    peer: Any, scheduler: str, build: Callable[[str], Any]
) -> None:
    pipe = build("sd15")
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    prompts = ["a red car"]
    drawn, stock = _drawn(peer, pipe, prompts=prompts, steps=3), _stock(pipe, prompts, steps=3)
    assert _apart(drawn, stock) <= 1 and np.ptp(stock) > 10


def test_refinement_goes_on_until_its_threshold(shapes: Any) -> None:
    """Thresholds are of shares of the steps: at the last of two, 20 moves more, or none where it is reached."""
    calls: list[int] = []
    handle = shapes.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        for least in (0.0, 1.0):
            calls.append(0)
            _drawn(replace(QUICK, thresholds=((0.5, least),)), shapes, prompts=PROMPTS[:1])
    finally:
        handle.remove()
    reached, unreached = (sum(part) for part in _parts(calls))
    assert (reached, unreached) == (4, 4 + 21)


def test_the_noise_chosen_is_the_first_or_another_of_its_generator(shapes: Any, monkeypatch: Any) -> None:
    from sdattn_fast.evaluation.peers import init_no

    seen: list[torch.Tensor] = []
    at = iter([0.5, 0.2, 0.9])

    def fixed(cross: torch.Tensor, own: torch.Tensor, nouns: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(next(at)), torch.tensor(0.0)

    original = init_no.pictures

    def watched(*args: Any, latents: torch.Tensor) -> np.ndarray:
        seen.append(latents)
        return original(*args, latents=latents)

    monkeypatch.setattr(init_no, "scores", fixed)
    monkeypatch.setattr(init_no, "pictures", watched)
    _drawn(InitialNoise(noises=3), shapes, prompts=PROMPTS[:1])
    generator = _noise(1)[0]
    first, second = (torch.randn(1, 4, 16, 16, generator=generator) for _ in range(2))
    assert torch.equal(seen[0], second) and not torch.equal(first, second)
    with pytest.raises(ValueError, match="noises: expected at least 1, got 0"):
        InitialNoise(noises=0)


def test_parameters_make_a_grid(shapes: Any) -> None:
    at_16, at_8 = (_drawn(replace(QUICK, resolution=side, scale=8.0), shapes, prompts=PROMPTS[:1]) for side in (16, 8))
    assert _apart(at_16, at_8) > 1


@pytest.mark.parametrize("peer", [QUICK, SynGen(), InitialNoise(), PerturbedAttention()], ids=lambda peer: peer.name)
def test_an_error_leaves_no_trace(peer: Any, shapes: Any) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("broken")

    with _no_trace(shapes):
        handle = shapes.unet.conv_out.register_forward_hook(broken)
        try:
            with pytest.raises(RuntimeError, match="broken"):
                _drawn(peer, shapes)
        finally:
            handle.remove()


def test_sdxl_has_two_of_them(build: Callable[[str], Any]) -> None:
    pipe = build("sdxl")
    fit = [peer.name for peer in EVERY if peer.left_out(pipe, 4.0) is None]
    assert fit == [PerturbedAttention().name, GuidanceRescale().name]
    assert QUICK.left_out(pipe, 4.0) == "expected a StableDiffusionPipeline, got a StableDiffusionXLPipeline"
    with _no_trace(pipe):
        assert _drawn(PerturbedAttention(), pipe, prompts=["a red car"]).shape == (1, 32, 32, 3)


def test_what_a_pipeline_lacks_is_said(shapes: Any, build: Callable[[str], Any]) -> None:
    assert "no cross-attention at 32x32; there is 16x16, 8x8, 4x4" in str(SynGen(resolution=32).left_out(shapes, 4.0))
    assert replace(QUICK, resolution=(16, 8)).left_out(shapes, 4.0) is not None
    assert PerturbedAttention(layers=("mid", "down_blocks.7")).left_out(shapes, 4.0) == (
        "no self-attention in down_blocks.7"
    )
    assert GuidanceRescale().left_out(shapes, 1.0) == "there is no unconditional half at guidance 1.0"
    assert "ControlNet" in str(StructureDiffusion().left_out(build("controlnet"), 4.0))
    euler = build("sd15")
    euler.scheduler = diffusers.EulerDiscreteScheduler.from_config(euler.scheduler.config)
    assert SelfAttentionGuidance().left_out(euler, 4.0) == "its pipeline cannot do with a EulerDiscreteScheduler"
    assert "heads for 2" in str(SelfAttentionGuidance().left_out(_with_heads(build("sd15"), 4), 4.0))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("encoder_hid_dim_type", "IP-Adapter"), ("addition_embed_type", "more than"), ("time_cond_proj_dim", "guidance")],
)
def test_a_unet_with_more_inputs_is_said(name: str, reason: str, build: Callable[[str], Any]) -> None:
    pipe = build("sd15")
    config = pipe.unet.config
    pipe.unet = None
    object.__setattr__(pipe, "unet", SimpleNamespace(config=SimpleNamespace(**{**config, name: "something"})))
    assert reason in str(no_stable_diffusion(pipe))


class _no_trace:
    """Inside, a peer draws; afterwards the pipeline is what it was."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def _state(self) -> dict[str, Any]:
        pipe, unet = self.pipe, self.pipe.unet
        return {
            "attributes": {name: id(x) for name, x in vars(pipe).items()},
            "config": dict(pipe.config),
            "unet's config": (id(unet._internal_dict), dict(unet.config)),
            "scheduler": repr(sorted(vars(pipe.scheduler).items(), key=str)),
            "processors": {name: id(p) for name, p in unet.attn_processors.items()},
            "gradients": [(p.requires_grad, id(p.grad)) for m in self._modules() for p in m.parameters()],
            "training": [m.training for module in self._modules() for m in module.modules()],
            "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules()],
        }

    def _modules(self) -> list[torch.nn.Module]:
        return [self.pipe.unet, self.pipe.vae, self.pipe.text_encoder]

    def __enter__(self) -> None:
        weights = list(self.pipe.unet.parameters())
        for i, p in enumerate(weights):
            p.requires_grad_(i % 2 == 0)
        weights[0].grad = torch.ones_like(weights[0])
        self.before = self._state()

    def __exit__(self, *error: Any) -> None:
        assert error[0] is not None or self._state() == self.before
        for p in self.pipe.unet.parameters():
            p.requires_grad_(True)
            p.grad = None


def _parts(calls: list[int]) -> list[list[int]]:
    """Cut at the zeros."""
    parts: list[list[int]] = []
    for call in calls:
        parts.append([]) if call == 0 else parts[-1].append(call)
    return parts


def _with_heads(pipe: Any, heads: int) -> Any:
    """A pipeline whose middle block has other heads than its config says."""
    unet = SimpleNamespace(
        config=pipe.unet.config,
        mid_block=SimpleNamespace(
            attentions=[SimpleNamespace(transformer_blocks=[SimpleNamespace(attn1=SimpleNamespace(heads=heads))])]
        ),
    )
    pipe.unet = None
    object.__setattr__(pipe, "unet", unet)
    return pipe
