"""LoRA through PEFT, and IP-Adapters, under a patch and before one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import sdattn_fast
from sdattn_fast import Program, SalienceDropout, SemanticAttnProcessor

DROPOUT = Program(dropout=SalienceDropout(0.3))
DOWN = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"


@pytest.fixture
def own_unet(build: Callable[[str], Any]) -> Any:
    """A pipeline with a UNet of its own, to be changed at will."""
    pipe = build("sd15")
    pipe.register_modules(unet=copy.deepcopy(pipe.unet))
    return pipe


def test_lora_added_scaled_disabled_and_fused(own_unet: Any, draw: Any, psnr: Any) -> None:
    peft = pytest.importorskip("peft")
    pipe = own_unet
    without = draw(pipe)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)

    with sdattn_fast.apply(pipe):
        assert psnr(without, draw(pipe)) > 90
        pipe.unet.add_adapter(config, "one")
        with_lora = draw(pipe)
        scaled = draw(pipe, cross_attention_kwargs={"scale": 0.5})
        pipe.unet.disable_adapters()
        disabled = draw(pipe)
        pipe.unet.enable_adapters()
        enabled = draw(pipe)
    assert psnr(without, with_lora) < 60
    assert psnr(without, disabled) > 90
    assert np.array_equal(with_lora, enabled)
    # The same, stock.
    assert psnr(draw(pipe), with_lora) > 90
    assert psnr(draw(pipe, cross_attention_kwargs={"scale": 0.5}), scaled) > 90
    assert psnr(with_lora, scaled) < 60

    with sdattn_fast.apply(pipe):
        pipe.unet.fuse_lora()
        fused = draw(pipe)
        pipe.unet.unfuse_lora()
        unfused = draw(pipe)
        pipe.unet.delete_adapters("one")
        deleted = draw(pipe)
    assert psnr(with_lora, fused) > 80
    assert psnr(with_lora, unfused) > 80
    assert psnr(without, deleted) > 80


def test_wrapped_by_peft(own_unet: Any) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(own_unet.unet, peft.LoraConfig(r=2, target_modules=["to_k"]))
    with sdattn_fast.apply(model) as patch:
        assert DOWN in patch.layers


def test_an_ip_adapter_under_a_patch(own_unet: Any, draw: Any, psnr: Any, ip_adapter: Any) -> None:
    pipe = own_unet
    image = {"ip_adapter_image_embeds": [torch.randn(2, 1, 16)]}
    without = draw(pipe)
    originals = dict(pipe.unet.attn_processors)
    weights = ip_adapter(pipe.unet)

    pipe.load_ip_adapter(weights, subfolder=None, weight_name=None, image_encoder_folder=None)
    loaded = dict(pipe.unet.attn_processors)
    stock = draw(pipe, **image)
    pipe.set_ip_adapter_scale(0.4)
    stock_scaled = draw(pipe, **image)
    pipe.set_ip_adapter_scale(1.0)
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    masked = draw(pipe, **image, cross_attention_kwargs={"ip_adapter_masks": [mask]})
    assert psnr(without, stock) < 60 and psnr(stock, masked) < 60

    # Loaded before the patch.
    with sdattn_fast.apply(pipe):
        assert psnr(stock, draw(pipe, **image)) > 90
        assert psnr(masked, draw(pipe, **image, cross_attention_kwargs={"ip_adapter_masks": [mask]})) > 90
        pipe.set_ip_adapter_scale(0.4)
        assert psnr(stock_scaled, draw(pipe, **image)) > 90
        pipe.set_ip_adapter_scale(1.0)
    assert all(pipe.unet.attn_processors[name] is processor for name, processor in loaded.items())
    with sdattn_fast.apply(pipe, DROPOUT):
        changed = draw(pipe, **image)
        assert psnr(stock, changed) < 60

    # Unloaded and loaded again under the patch: it stays.
    pipe.unload_ip_adapter()
    with sdattn_fast.apply(pipe, DROPOUT):
        dropout_alone = draw(pipe)
        pipe.load_ip_adapter(weights, subfolder=None, weight_name=None, image_encoder_folder=None)
        assert psnr(changed, draw(pipe, **image)) > 90
        pipe.unload_ip_adapter()
        assert psnr(dropout_alone, draw(pipe)) > 100
        attn = pipe.unet.get_submodule(DOWN)
        assert isinstance(attn.processor, SemanticAttnProcessor)
        # No picture in between, so what stands there now may be anybody's wish.
        pipe.load_ip_adapter(weights, subfolder=None, weight_name=None, image_encoder_folder=None)
        pipe.unload_ip_adapter()
        with pytest.warns(UserWarning, match=r"4 of 4 layers.*another processor.*remove\(\) and apply again"):
            draw(pipe)
    assert psnr(without, draw(pipe)) > 100
    assert {type(p) for p in pipe.unet.attn_processors.values()} == {type(p) for p in originals.values()}


def test_a_processor_by_hand_refuses_an_image(own_unet: Any, draw: Any, ip_adapter: Any) -> None:
    pipe = own_unet
    weights = ip_adapter(pipe.unet)
    pipe.load_ip_adapter(weights, subfolder=None, weight_name=None, image_encoder_folder=None)
    pipe.unet.get_submodule(DOWN).set_processor(SemanticAttnProcessor())
    with pytest.raises(ValueError, match="encoder_hidden_states: an IP-Adapter passes a tuple"):
        draw(pipe, ip_adapter_image_embeds=[torch.randn(2, 1, 16)])
