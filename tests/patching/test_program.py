"""A real program in a pipeline, against an obvious processor that calls the definition."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import sdattn_fast
from sdattn_fast import Program, Refinement, SalienceDropout
from sdattn_fast.reference import reference_attention

PROGRAMS = {
    "dropout": Program(dropout=SalienceDropout(0.3)),
    "dropout over the picture": Program(dropout=SalienceDropout(0.3, axis="space")),
    "refinement": Program(refine=Refinement(1, 0.5, 0.8), renormalize="content"),
    "everything": Program(SalienceDropout(0.2), Refinement(2, 0.3, 0.6), "content"),
}


@pytest.mark.parametrize("architecture", ["sd15", "sdxl", "controlnet"])
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.filterwarnings("ignore:.*plain torch reference.*")
def test_a_program_draws_what_the_definition_draws(
    name: str, architecture: str, build: Callable[[str], Any], draw: Any, psnr: Any
) -> None:
    pipe = build(architecture)
    stock = draw(pipe)
    protected = _protected(letters=7)
    with _oracle(pipe, PROGRAMS[name], protected=protected, active=torch.tensor([False, True])):
        expected = draw(pipe)
    with sdattn_fast.apply(pipe, PROGRAMS[name]):
        got = draw(pipe)
    assert psnr(expected, got) > 80
    assert psnr(stock, got) < 60


def test_gate_phrases_and_heads_reach_the_layers(build: Callable[[str], Any], draw: Any, psnr: Any) -> None:
    pipe = build("sd15")
    gate = torch.ones(77)
    gate[5:8] = 3.0
    phrases = torch.full((77,), -1)
    phrases[2:5] = 0
    program = Program(renormalize="content")
    with _oracle(
        pipe, program, protected=_protected(letters=7), active=torch.tensor([False, True]), gate=gate.expand(2, 77),
        phrases=phrases.expand(2, 77), heads=torch.tensor([False, True]), inactive_heads="zero",
    ):  # fmt: skip
        expected = draw(pipe)
    with sdattn_fast.apply(pipe, program, gate=gate, phrases=phrases, heads=[1], inactive_heads="zero"):
        assert psnr(expected, draw(pipe)) > 80


@pytest.mark.parametrize("size", [(32, 48), (40, 24), (36, 44)])
def test_pictures_need_not_be_square(size: tuple[int, int], build: Callable[[str], Any], draw: Any, psnr: Any) -> None:
    pipe = build("sd15")
    program = PROGRAMS["refinement"]
    height, width = (side - side % 8 for side in size)
    with _oracle(pipe, program, protected=_protected(letters=7), active=torch.tensor([False, True])):
        expected = draw(pipe, height=height, width=width)
    with sdattn_fast.apply(pipe, program):
        assert psnr(expected, draw(pipe, height=height, width=width)) > 80


def test_latents_that_halve_to_odd_sides(parts: dict[str, Any]) -> None:
    """15 x 9 halves to 8 x 5: nothing here is a multiple of anything, and no square root would find it."""
    unet = parts["sd15"]
    inputs = _unet_inputs(batch=1, height=15, width=9)
    with sdattn_fast.apply(unet, capture=sdattn_fast.Capture(layers="*")) as patch, torch.no_grad():
        unet(**inputs)
        grids = {tuple(maps.shape[-2:]) for maps in patch.maps.values()}
    assert grids == {(15, 9), (8, 5)}


def test_blocks_that_are_no_transformers() -> None:
    """The K-upscalers' attention stands in blocks of its own, and works with a mask and a norm over the text."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        act_fn="gelu", attention_head_dim=8, norm_num_groups=None, block_out_channels=(32, 32, 64, 64),
        cross_attention_dim=32, conv_in_kernel=1, conv_out_kernel=1, mid_block_type=None,
        down_block_types=("KDownBlock2D", *["KCrossAttnDownBlock2D"] * 3), resnet_time_scale_shift="scale_shift",
        up_block_types=(*["KCrossAttnUpBlock2D"] * 3, "KUpBlock2D"), time_embedding_type="fourier",
        timestep_post_act="gelu",
    ).eval()  # fmt: skip
    inputs = _unet_inputs(batch=2, height=16, width=24)
    inputs["encoder_attention_mask"] = torch.arange(77).expand(2, 77) < torch.tensor([[20], [77]])
    with torch.no_grad():
        stock = unet(**inputs).sample
        with sdattn_fast.apply(unet):
            assert torch.allclose(unet(**inputs).sample, stock, atol=1e-5)
        with sdattn_fast.apply(unet, PROGRAMS["refinement"], capture=sdattn_fast.Capture(layers="*")) as patch:
            unet(**inputs)
            assert {tuple(maps.shape[2:]) for maps in patch.maps.values()} == {(8, 12), (4, 6), (2, 3)}


def test_video_multiplies_the_batch_inside() -> None:
    """What is told is of the model's entries, and not of their frames."""
    from diffusers import UNet3DConditionModel

    unet = UNet3DConditionModel(
        block_out_channels=(4, 8), norm_num_groups=4, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), cross_attention_dim=32, attention_head_dim=4,
        layers_per_block=1, sample_size=16,
    ).eval()  # fmt: skip
    inputs = (torch.randn(2, 4, 3, 16, 8), 3, torch.randn(2, 77, 32))
    active = torch.tensor([False, True])
    with torch.no_grad():
        stock = unet(*inputs).sample
        with sdattn_fast.apply(
            unet, PROGRAMS["dropout"], active=active, capture=sdattn_fast.Capture(layers="*")
        ) as patch:
            changed = unet(*inputs).sample
            assert {(len(maps), maps.shape[2]) for maps in patch.maps.values()} == {(1, 3)}
    assert torch.allclose(changed[0], stock[0], atol=1e-5) and not torch.allclose(changed[1], stock[1], atol=1e-3)


def test_a_mask_over_the_text(parts: dict[str, Any]) -> None:
    unet = parts["sd15"]
    inputs = _unet_inputs(batch=2, height=16, width=8)
    inputs["encoder_attention_mask"] = torch.arange(77).expand(2, 77) < torch.tensor([[20], [77]])
    with torch.no_grad():
        stock = unet(**inputs).sample
        with sdattn_fast.apply(unet):
            assert torch.allclose(unet(**inputs).sample, stock, atol=1e-5)
        with _oracle(_Pipe(unet), PROGRAMS["refinement"]):
            expected = unet(**inputs).sample
        with sdattn_fast.apply(unet, PROGRAMS["refinement"]):
            assert torch.allclose(unet(**inputs).sample, expected, atol=1e-4)


def test_154_tokens(parts: dict[str, Any]) -> None:
    unet = parts["sd15"]
    inputs = _unet_inputs(batch=2, height=16, width=16, tokens=154)
    protected = torch.rand(154) < 0.5
    with torch.no_grad():
        with _oracle(_Pipe(unet), PROGRAMS["dropout"], protected=protected.expand(2, 154)):
            expected = unet(**inputs).sample
        with sdattn_fast.apply(unet, PROGRAMS["dropout"], protected=protected):
            assert torch.allclose(unet(**inputs).sample, expected, atol=1e-4)


def test_gradients_pass_through(parts: dict[str, Any]) -> None:
    unet = parts["sd15"]
    gradients = []
    for backend in ("auto", "reference"):
        inputs = _unet_inputs(batch=1, height=8, width=8)
        inputs["encoder_hidden_states"].requires_grad_()
        gate = torch.ones(1, 77, requires_grad=True)
        with sdattn_fast.apply(unet, PROGRAMS["dropout"], gate=gate, backend=backend):
            for _ in range(2):  # the gate's graph is not kept from one step to the next
                unet(**inputs).sample.square().sum().backward()
        assert gate.grad is not None and inputs["encoder_hidden_states"].grad is not None
        gradients.append((gate.grad, inputs["encoder_hidden_states"].grad))
    assert gradients[0][0].abs().sum() > 0
    for got, expected in zip(*gradients, strict=True):
        assert torch.allclose(got, expected, rtol=1e-3, atol=1e-3)


def test_gradient_checkpointing(parts: dict[str, Any]) -> None:
    unet = copy.deepcopy(parts["sd15"]).train()
    program = Program(SalienceDropout(0.3, mode="random"), Refinement(1, None, 0.8))
    gradients = []
    with sdattn_fast.apply(unet, program, seed=1):
        for checkpointing in (False, True):
            if checkpointing:
                unet.enable_gradient_checkpointing()
            unet.zero_grad()
            unet(**_unet_inputs(batch=1, height=8, width=8)).sample.square().sum().backward()
            gradients.append(unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.grad.clone())
    assert gradients[0].abs().sum() > 0
    assert torch.allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, parts: dict[str, Any]) -> None:
    unet = copy.deepcopy(parts["sd15"]).to(dtype)
    inputs = {k: x.to(dtype) if x.is_floating_point() else x for k, x in _unet_inputs(2, 16, 16).items()}
    exact = {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}
    with torch.no_grad():
        stock = unet(**inputs).sample
        with sdattn_fast.apply(unet):
            ours = unet(**inputs).sample
        expected = unet.double()(**exact).sample
    assert ours.dtype == dtype
    assert (ours - expected).abs().max() <= 2 * (stock - expected).abs().max()


class _OracleProcessor:
    def __init__(self, program: Program, grid: dict[str, tuple[int, int]], keywords: dict[str, Any]) -> None:
        self.program, self.grid, self.keywords = program, grid, keywords

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None
    ) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        bias = None if attention_mask is None else attention_mask[:, None]
        out, _ = reference_attention(
            heads(attn.to_q(hidden_states)), heads(attn.to_k(encoder_hidden_states)),
            heads(attn.to_v(encoder_hidden_states)), self.program, bias=bias, grid=self.grid["now"], **self.keywords,
        )  # fmt: skip
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


class _Pipe:
    def __init__(self, unet: Any) -> None:
        self.unet = unet


@contextmanager
def _oracle(pipe: Any, program: Program, **keywords: Any) -> Iterator[None]:
    """The definition in every attn2 of a pipeline; token classes are told, nothing is found."""
    models = [pipe.unet, *([pipe.controlnet] if getattr(pipe, "controlnet", None) is not None else [])]
    before, handles = [], []
    grid: dict[str, tuple[int, int]] = {}

    def see(module: Any, args: Any) -> None:
        grid["now"] = tuple(args[0].shape[2:])

    for model in models:
        for name, module in model.named_modules():
            if name.endswith("attn2"):
                before.append((module, module.processor))
                module.set_processor(_OracleProcessor(program, grid, keywords))
            if type(module).__name__ == "Transformer2DModel":
                handles.append(module.register_forward_pre_hook(see))
    yield
    for module, processor in before:
        module.set_processor(processor)
    for handle in handles:
        handle.remove()


def _protected(letters: int, batch: int = 2) -> Tensor:
    """BOS, then so many letters, then EOS and padding."""
    protected = torch.ones(batch, 77, dtype=torch.bool)
    protected[:, 1 : 1 + letters] = False
    return protected


def _unet_inputs(batch: int, height: int, width: int, tokens: int = 77) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {
        "sample": torch.randn(batch, 4, height, width, generator=generator),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(batch, tokens, 32, generator=generator),
    }
