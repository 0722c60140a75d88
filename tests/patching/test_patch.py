"""The patch itself: what it serves, what it gives back, and what it says of bad input."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import sdattn_fast
from sdattn_fast import Capture, Program, Refinement, SalienceDropout, SemanticAttnProcessor
from sdattn_fast.files import ProgramFile, save_heads

DROPOUT = Program(dropout=SalienceDropout(0.3))
DOWN = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
MID = "mid_block.attentions.0.transformer_blocks.0.attn2"


def test_cross_attention_alone_is_served(parts: dict[str, Any]) -> None:
    unet = parts["sd15"]
    with sdattn_fast.apply(unet) as patch:
        assert sorted(patch.layers) == sorted(n for n, _ in unet.named_modules() if n.endswith("attn2"))
        ours = [n for n, p in unet.attn_processors.items() if isinstance(p, SemanticAttnProcessor)]
        assert sorted(ours) == sorted(f"{n}.processor" for n in patch.layers)


def test_the_module_says_what_is_cross_attention_and_not_its_name() -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2, only_cross_attention=(True, False),
    )  # fmt: skip
    with sdattn_fast.apply(unet) as patch:
        assert "down_blocks.0.attentions.0.transformer_blocks.0.attn1" in patch.layers
        assert "mid_block.attentions.0.transformer_blocks.0.attn1" not in patch.layers


def test_remove_restores_the_very_objects(build: Callable[[str], Any]) -> None:
    pipe = build("controlnet")
    before = {**pipe.unet.attn_processors}, {**pipe.controlnet.attn_processors}, dict(vars(pipe))
    hooks = [len(m._forward_pre_hooks) for m in (*pipe.unet.modules(), *pipe.controlnet.modules())]
    patch = sdattn_fast.apply(pipe)
    assert any(name.startswith("controlnet.down_blocks.0") for name in patch.layers)
    patch.remove()
    patch.remove()
    for old, new in zip(before[:2], (pipe.unet.attn_processors, pipe.controlnet.attn_processors), strict=True):
        assert all(new[name] is processor for name, processor in old.items())
    assert dict(vars(pipe)) == before[2]
    assert [len(m._forward_pre_hooks) for m in (*pipe.unet.modules(), *pipe.controlnet.modules())] == hooks
    assert not any(hasattr(m, "_sdattn_fast_layer") for m in pipe.unet.modules())
    assert "removed" in repr(patch)


def test_a_multi_controlnet(parts: dict[str, Any], build: Callable[[str], Any], draw: Any, psnr: Any) -> None:
    import copy

    pipe = build("controlnet")
    pipe = type(pipe)(**{**pipe.components, "controlnet": [parts["controlnet"], copy.deepcopy(parts["controlnet"])]})
    pipe.set_progress_bar_config(disable=True)
    from PIL import Image

    pictures = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    stock = draw(pipe, image=pictures)
    with sdattn_fast.apply(pipe) as patch:
        assert any(name.startswith("controlnet.nets.1.") for name in patch.layers)
        assert psnr(stock, draw(pipe, image=pictures)) > 90


def test_an_error_inside_with_takes_the_patch_off(parts: dict[str, Any]) -> None:
    before = dict(parts["sd15"].attn_processors)
    with pytest.raises(RuntimeError, match="mine"), sdattn_fast.apply(parts["sd15"]):
        raise RuntimeError("mine")
    assert dict(parts["sd15"].attn_processors) == before


def test_layers_by_name_and_pattern(parts: dict[str, Any]) -> None:
    unet = parts["sd15"]
    with sdattn_fast.apply(unet, layers=DOWN) as patch:
        assert patch.layers == [DOWN]
    with sdattn_fast.apply(unet, layers=["up_blocks.*", f"{MID}.processor"]) as patch:
        assert set(patch.layers) == {n for n, _ in unet.named_modules() if n.endswith("attn2")} - {DOWN}
    with pytest.raises(ValueError, match=rf"layers: 'down_blocks.0.attn2' matches none.*did you mean '{DOWN}'"):
        sdattn_fast.apply(unet, layers="down_blocks.0.attn2")
    with pytest.raises(TypeError, match="layers: expected names"):
        sdattn_fast.apply(unet, layers=[3])
    with pytest.raises(ValueError, match=r"layers: expected at least one name or pattern, or None for all, got \[\]"):
        sdattn_fast.apply(unet, layers=[])


def test_programs_and_heads_come_from_files(parts: dict[str, Any], tmp_path: Any) -> None:
    unet = parts["sd2"]
    save_heads(tmp_path / "heads.json", {DOWN: [1], MID: [0, 3]}, {})
    file = ProgramFile(DROPOUT, layers=(DOWN,), heads={DOWN: (0,)}, inactive_heads="zero")
    file.save(tmp_path / "program.json")
    for program in (file, tmp_path / "program.json", str(tmp_path / "program.json")):
        with sdattn_fast.apply(unet, program) as patch:
            assert [(one.name, one.heads) for one in patch._layers] == [(DOWN, (0,))]
            assert patch._settings.program == DROPOUT and patch._settings.inactive_heads == "zero"
    # Keywords that say something win; heads that are given go with the inactive_heads that are given.
    with sdattn_fast.apply(unet, file, layers="*", heads=tmp_path / "heads.json") as patch:
        heads = {one.name: one.heads for one in patch._layers}
        assert (
            len(heads) > 3
            and heads[DOWN] == (1,)
            and heads[MID] == (0, 3)
            and patch._settings.inactive_heads == "plain"
        )
    with sdattn_fast.apply(unet, layers=MID, heads=str(tmp_path / "heads.json")) as patch:
        assert [(one.name, one.heads) for one in patch._layers] == [(MID, (0, 3))]
    save_heads(tmp_path / "others.json", {"elsewhere": [0]}, {})
    with pytest.raises(ValueError, match="heads: 'elsewhere' matches none"):
        sdattn_fast.apply(unet, heads=tmp_path / "others.json")
    with pytest.raises(FileNotFoundError):
        sdattn_fast.apply(unet, str(tmp_path / "none.json"))


def test_heads_for_all_layers_or_by_layer(parts: dict[str, Any], build: Callable[[str], Any], draw: Any) -> None:
    pipe = build("sd15")
    with sdattn_fast.apply(
        pipe, heads={DOWN: []}, inactive_heads="zero", capture=Capture(reduce="none", layers="*")
    ) as patch:
        draw(pipe)
        assert patch.maps[DOWN].abs().sum() == 0
        assert patch.maps[MID].abs().sum() > 0
    with pytest.raises(
        ValueError, match=r"heads: expected indices in \[0, 2\) in layer 'down.*which has 2 heads, got 2"
    ):
        sdattn_fast.apply(parts["sd2"], heads=[0, 2])
    with sdattn_fast.apply(parts["sd2"], heads={"mid_block.*": [3]}):
        pass
    with pytest.raises(ValueError, match="heads: 'middle' matches none"):
        sdattn_fast.apply(parts["sd2"], heads={"middle": [0]})
    with pytest.raises(TypeError, match="heads: expected ints"):
        sdattn_fast.apply(parts["sd2"], heads=[0.5])
    with pytest.raises(ValueError, match="heads: expected each index once"):
        sdattn_fast.apply(parts["sd2"], heads=[1, 1])


def test_maps_are_pictures_of_the_active_entries(build: Callable[[str], Any], draw: Any) -> None:
    pipe = build("sd15")
    with sdattn_fast.apply(pipe, DROPOUT, capture=Capture(tokens=[2, 4, 6], layers="*")) as patch:
        assert patch.maps == {}
        draw(pipe, ["a red car", "dog"], height=32, width=48)
        shapes = {name: tuple(maps.shape) for name, maps in patch.maps.items()}
        assert shapes[DOWN] == (2, 3, 16, 24) and shapes[MID] == (2, 3, 8, 12)
        assert all(maps.dtype == torch.float32 for maps in patch.maps.values())
    with sdattn_fast.apply(pipe, capture=Capture(reduce="none", stage="softmax")) as patch:
        draw(pipe)
        assert patch.maps[DOWN].shape == (1, 2, 77, 16, 16)
        assert torch.allclose(patch.maps[DOWN].sum(2), torch.ones(1, 2, 16, 16), atol=1e-4)
    with sdattn_fast.apply(pipe) as patch, pytest.raises(ValueError, match="maps: expected apply"):
        _ = patch.maps


def test_update_from_a_callback(build: Callable[[str], Any], draw: Any, psnr: Any) -> None:
    pipe = build("sd15")
    gate = torch.ones(77)
    with sdattn_fast.apply(pipe, gate=gate) as patch:
        plain = draw(pipe)
        gate.zero_()  # a copy was taken
        assert psnr(plain, draw(pipe)) > 100

        def silence(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            patch.update(gate=torch.zeros(77))
            return tensors

        changed = draw(pipe, callback_on_step_end=silence)
        assert psnr(plain, changed) < 80
        patch.update(gate=None)
        assert psnr(plain, draw(pipe)) > 90
        for bad, error in (
            ({"gates": gate}, TypeError),
            ({"gate": -gate - 1}, ValueError),
            ({"active": gate}, TypeError),
        ):
            with pytest.raises(error):
                patch.update(**bad)
        patch.refresh()
        assert psnr(plain, draw(pipe)) > 90


def test_models_that_are_not_served(build: Callable[[str], Any]) -> None:
    with pytest.warns(UserWarning, match="no cross-attention layer to serve"):
        patch = sdattn_fast.apply(torch.nn.Linear(2, 2))
    patch.remove()
    assert "nothing patched" in repr(patch)
    with pytest.raises(
        TypeError, match=r"pipe_or_unet: expected a diffusers pipeline with a unet or a transformer, .* got str"
    ):
        sdattn_fast.apply("stable-diffusion")


def test_added_kv_layers_are_left_alone() -> None:
    """DeepFloyd's UNet in small: text through added projections, beside the picture's own keys."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), attention_head_dim=8,
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    ).eval()  # fmt: skip
    before = dict(unet.attn_processors)
    inputs = (torch.randn(2, 4, 8, 8), 5, torch.randn(2, 77, 32))
    with torch.no_grad():
        stock = unet(*inputs).sample
        with pytest.warns(UserWarning, match="nothing is patched"):
            sdattn_fast.apply(unet, DROPOUT)
        assert dict(unet.attn_processors) == before
        unet.set_attn_processor(SemanticAttnProcessor(DROPOUT))
        assert torch.allclose(unet(*inputs).sample, stock, atol=1e-6)


def test_trained_processors_are_left_alone(parts: dict[str, Any]) -> None:
    from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0

    attn = parts["sd15"].get_submodule(DOWN)
    original = attn.processor
    trained = CustomDiffusionAttnProcessor2_0(hidden_size=16, cross_attention_dim=32)
    attn.set_processor(trained)
    try:
        with pytest.warns(UserWarning, match=r"1 layers run .*\.CustomDiffusionAttnProcessor2_0; they are left alone"):
            patch = sdattn_fast.apply(parts["sd15"])
        assert DOWN not in patch.layers and attn.processor is trained
        patch.remove()
    finally:
        attn.set_processor(original)


def test_twice_is_an_error_that_names_remove(parts: dict[str, Any], build: Callable[[str], Any]) -> None:
    with sdattn_fast.apply(parts["sd15"]), pytest.raises(ValueError, match=r"patched already; call remove\(\)"):
        sdattn_fast.apply(build("sd15"))
    assert "encode_prompt" not in vars(build("sd15"))


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"program": "dropout"}, TypeError, "program: expected a sdattn_fast.Program"),
        ({"inactive_heads": "off"}, ValueError, "inactive_heads: expected 'plain' or 'zero'"),
        ({"gate": [1.0]}, TypeError, "gate: expected a torch.Tensor"),
        ({"gate": torch.tensor([1.0, float("nan")])}, ValueError, "gate: expected finite numbers"),
        ({"gate": torch.ones(77, dtype=torch.long)}, TypeError, "gate: expected bool or a floating"),
        ({"phrases": torch.ones(77)}, TypeError, "phrases: expected an integer dtype"),
        ({"phrases": torch.full((77,), -2)}, ValueError, "phrases: expected ids >= 0"),
        ({"protected": torch.ones(77)}, TypeError, "protected: expected dtype torch.bool"),
        ({"active": torch.ones(1, 2, dtype=torch.bool)}, ValueError, "active: expected 1"),
        ({"seed": 1.5}, TypeError, "seed: expected an int"),
        ({"seed": -1}, ValueError, "seed: expected 0 <= seed"),
        ({"capture": "maps"}, TypeError, "capture: expected a sdattn_fast.Capture"),
        ({"fold": "sometimes"}, ValueError, "fold: expected 'auto', 'never' or 'always'"),
        ({"fold": "always", "text_cache": False}, ValueError, "fold: .always. needs text_cache=True"),
        ({"fold": 1}, TypeError, "fold: expected"),
        ({"text_cache": 1}, TypeError, "text_cache: expected a bool"),
        ({"backend": "tpu"}, ValueError, "backend: expected one of"),
    ],
)
def test_bad_arguments(keywords: dict[str, Any], error: type[Exception], message: str, parts: dict[str, Any]) -> None:
    before = dict(parts["sd15"].attn_processors)
    with pytest.raises(error, match=message):
        sdattn_fast.apply(parts["sd15"], **keywords)
    assert dict(parts["sd15"].attn_processors) == before


def test_without_a_text_cache(build: Callable[[str], Any], draw: Any) -> None:
    pipe = build("sd15")
    with sdattn_fast.apply(pipe, DROPOUT, fold="never"):
        cached = draw(pipe)
    with sdattn_fast.apply(pipe, DROPOUT, text_cache=False):
        assert np.array_equal(cached, draw(pipe))


def test_a_processor_by_hand(parts: dict[str, Any]) -> None:
    unet = parts["sd15"]
    before = dict(unet.attn_processors)
    inputs = (torch.randn(2, 4, 8, 8), 5, torch.randn(2, 77, 32))
    with torch.no_grad():
        try:
            stock = unet(*inputs).sample
            unet.set_attn_processor(SemanticAttnProcessor())
            assert torch.allclose(unet(*inputs).sample, stock, atol=1e-5)
            active = torch.tensor([False, True])
            unet.set_attn_processor(SemanticAttnProcessor(DROPOUT, active=active, gate=torch.ones(77), heads=[1]))
            by_hand = unet(*inputs).sample
            unet.set_attn_processor(SemanticAttnProcessor(Program(refine=Refinement())))
            with pytest.raises(ValueError, match=r"grid: a processor set by hand.*sdattn_fast.apply"):
                unet(*inputs)
        finally:
            unet.set_attn_processor(dict(before))
        with sdattn_fast.apply(unet, DROPOUT, active=active, heads=[1]):
            assert torch.allclose(unet(*inputs).sample, by_hand, atol=1e-5)
        assert torch.allclose(by_hand[0], stock[0], atol=1e-5)
        assert not torch.allclose(by_hand[1], stock[1], atol=1e-3)
    for name, value in (("layers", "*"), ("heads", {"*": [0]}), ("capture", Capture())):
        with pytest.raises(ValueError, match=f"{name}:.*sdattn_fast.apply"):
            SemanticAttnProcessor(**{name: value})


def test_a_processor_set_over_ours_is_left_with_a_word(parts: dict[str, Any]) -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0

    unet = parts["sd15"]
    inputs = (torch.randn(1, 4, 8, 8), 5, torch.randn(1, 77, 32))
    mine = AttnProcessor2_0()
    original = unet.get_submodule(DOWN).processor
    with sdattn_fast.apply(unet, DROPOUT), torch.no_grad():
        unet.get_submodule(DOWN).set_processor(mine)
        with pytest.warns(UserWarning, match=rf"1 of 4 layers.*'{DOWN}': AttnProcessor2_0"):
            unet(*inputs)
    assert unet.get_submodule(DOWN).processor is mine
    unet.get_submodule(DOWN).set_processor(original)


def test_the_package_needs_neither_diffusers_nor_transformers() -> None:
    code = (
        "import sys; sys.modules.update(diffusers=None, transformers=None, peft=None); import sdattn_fast;"
        "sdattn_fast.SemanticAttnProcessor()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=sys.prefix)
