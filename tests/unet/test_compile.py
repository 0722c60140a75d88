"""torch.compile over patched layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import sdattn_fast
from sdattn_fast import Capture, Program, SalienceDropout, SemanticAttnProcessor

MID = "mid_block.attentions.0.transformer_blocks.0.attn2"


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_processor_by_hand_compiles_whole(backend: str, parts: dict[str, Any]) -> None:
    block = copy.deepcopy(parts["sd15"].mid_block.attentions[0].transformer_blocks[0])
    protected = torch.arange(77) > 8
    block.attn2.set_processor(
        SemanticAttnProcessor(Program(SalienceDropout(0.3)), protected=protected, heads=[1], backend=backend)
    )
    torch._dynamo.reset()
    x, text = torch.randn(2, 64, 32), torch.randn(2, 77, 32)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        first = compiled(x, encoder_hidden_states=text)
        assert torch.allclose(first, block(x, encoder_hidden_states=text), atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_transformer_block_compiles_whole(backend: str, parts: dict[str, Any]) -> None:
    unet = parts["sd15"]
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    program = Program(dropout=SalienceDropout(0.3), renormalize="content")
    torch._dynamo.reset()
    with sdattn_fast.apply(unet, program, gate=torch.ones(77), backend=backend) as patch, torch.no_grad():
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            unet(torch.randn(2, 4, 16, 16), 3, torch.randn(2, 77, 32))  # prepares the text, as a pipeline's step does
            x, text = torch.randn(2, 64, 32), torch.randn(2, 77, 32)
            expected = block(x, encoder_hidden_states=text)
            assert torch.allclose(compiled(x, encoder_hidden_states=text), expected, atol=1e-5)
            gate = torch.ones(77)
            gate[10:20] = 4.0
            patch.update(gate=gate)


@pytest.mark.parametrize("how", ["wrapped", "in place", "afterwards", "blocks"])
def test_a_compiled_unet_sees_a_new_prompt(how: str, build: Any, draw: Any, psnr: Any) -> None:
    """Compiled before the patch the whole UNet may be one graph; afterwards, the patch breaks it once, at its start."""
    pipe = build("sd15")
    pipe.register_modules(unet=copy.deepcopy(pipe.unet))
    program = Program(dropout=SalienceDropout(0.3, mode="random"))
    capture = Capture(tokens=[3], layers="*")
    prompts = ("a red car", "some other dog")
    torch._dynamo.reset()
    with sdattn_fast.apply(pipe, program, seed=5, capture=capture) as patch:
        expected = [(draw(pipe, prompt), patch.maps[MID]) for prompt in prompts]
    if how == "wrapped":
        pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    elif how == "in place":
        pipe.unet.compile(backend="eager", fullgraph=True)
    elif how == "blocks":
        pipe.unet.compile_repeated_blocks(backend="eager", fullgraph=True)
    with sdattn_fast.apply(pipe, program, seed=5, capture=capture) as patch:
        if how == "afterwards":
            pipe.unet = torch.compile(pipe.unet, backend="eager")
        for prompt, (picture, maps) in zip(prompts, expected, strict=True):
            assert psnr(draw(pipe, prompt), picture) > 80
            assert torch.allclose(patch.maps[MID], maps, atol=1e-4)
    torch._dynamo.reset()
