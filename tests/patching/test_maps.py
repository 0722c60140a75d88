"""Maps that a patch keeps: which layers, which steps, whose entries; and words as DAAM defines them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from every_map import StoreEveryMap
from PIL import Image

import sdattn_fast
from sdattn_fast import Capture, Program, Refinement, SalienceDropout
from sdattn_fast.patching import map_keeper
from sdattn_fast.patching.map_keeper import key_layers
from sdattn_fast.patching.map_sums import MapSums
from sdattn_fast.patching.maps import Maps
from sdattn_fast.patching.words import words_of

DOWN = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
MID = "mid_block.attentions.0.transformer_blocks.0.attn2"


def daam(kept: list[torch.Tensor], grids: list[tuple[int, int]], tokens: list[int], size: tuple[int, int]):
    """The paper's definition, head by head, step by step: kept are (B, H, M, N) of every layer and step."""
    maps = []
    for p, grid in zip(kept, grids, strict=True):
        for head in p[-1].unbind(0):  # the conditional entry
            picture = head.T.reshape(1, -1, *grid)
            maps.append(F.interpolate(picture, size=size, mode="bicubic", align_corners=False)[0])
    return torch.stack(maps).mean(0)[tokens].mean(0)


def test_maps_of_the_latest_step_alone() -> None:
    """Of a layer that was left out, none; until a step has maps of its own, those of the step before."""
    sums, of = MapSums(), lambda value: (torch.full((1, 2, 6), value), None, (2, 3))
    sums.add_latest(mean=False)
    sums.latest = {"a": of(1.0), "b": of(2.0)}
    sums.add_latest(mean=False)
    assert set(sums.read(["a", "b"], mean=False)) == {"a", "b"}
    sums.latest = {"a": of(3.0)}
    assert sums.read(["a", "b"], mean=False)["a"].unique().tolist() == [3.0]
    for _ in range(2):
        assert set(sums.read(["a", "b"], mean=False)) == {"a"}
        sums.add_latest(mean=False)
    mean = MapSums()
    for value in (1.0, 3.0):
        mean.latest = {"a": of(value)}
        mean.add_latest(mean=True)
    assert mean.read(["a"], mean=True)["a"].unique().tolist() == [2.0]


@pytest.mark.parametrize("architecture", ["sd15", "sd2", "sdxl"])
def test_words_are_daams(architecture: str, build: Callable[[str], Any], draw: Any) -> None:
    pipe, prompt = build(architecture), "a red car"
    names = [n for n, m in pipe.unet.named_modules() if n.endswith("attn2")]
    before, kept = dict(pipe.unet.attn_processors), []
    pipe.unet.set_attn_processor(StoreEveryMap(kept))
    draw(pipe, prompt, num_inference_steps=3, height=32, width=48)
    pipe.unet.set_attn_processor(before)
    grids = [(16, 24) if p.shape[2] == 384 else (8, 12) for p in kept]
    assert len(kept) == 3 * len(names)
    with sdattn_fast.apply(pipe, capture=Capture(layers="*")) as patch:
        draw(pipe, prompt, num_inference_steps=3, height=32, width=48)
        # DAAM takes all layers for equal: its mean over heads is ours where all layers have as many heads.
        layers = [name for name in patch.maps]
        words = patch.maps.per_word(prompt)
    assert sorted(layers) == sorted(names)
    heads = {p.shape[1] for p in kept}
    assert list(words) == ["a", "red", "car"]
    for word, tokens in {"a": [1], "red": [2, 3, 4], "car": [5, 6, 7]}.items():
        if len(heads) == 1:
            want = daam(kept, grids, tokens, (16, 24))
        else:
            want = torch.stack([daam([p], [g], tokens, (16, 24)) for p, g in zip(kept, grids, strict=True)]).mean(0)
        assert words[word].shape == (1, 16, 24)
        torch.testing.assert_close(words[word][0], want, atol=2e-6, rtol=2e-4)


def test_only_the_key_level_keeps_maps(build: Callable[[str], Any], draw: Any) -> None:
    pipe = build("sd15")
    with sdattn_fast.apply(pipe, capture=Capture()) as patch:
        draw(pipe)
        assert MID not in patch.maps and DOWN in patch.maps
        assert {maps.shape[-2:] for maps in patch.maps.values()} == {(16, 16)}
        assert all(layer.captured is None for layer in patch._layers if layer.name not in patch.maps)


LEVELS = {(64, 64): 4, (96, 96): 4, (128, 128): 4, (32, 32): 2, (16, 16): 1, (8, 8): 1, (64, 128): 4, None: 0}


@pytest.mark.parametrize("size", LEVELS, ids=str)
def test_the_key_level_is_chosen_by_resolution(size: Any) -> None:
    """A UNet of four levels, the last without a sampler, as SD 1.5's; and what a quarter means at its sizes."""
    attns = [torch.nn.Linear(1, 1) for _ in range(4)]
    blocks = [torch.nn.Module() for _ in attns]
    for i, (block, attn) in enumerate(zip(blocks, attns, strict=True)):
        block.attn2, block.downsamplers = attn, [1] if i < 3 else None
    model = torch.nn.Module()
    model.down_blocks = torch.nn.ModuleList(blocks)
    layers: Any = [SimpleNamespace(name=str(2**i), attn=attn) for i, attn in enumerate(attns)]
    found = key_layers(model, layers, size)
    assert found == ({str(LEVELS[size])} if LEVELS[size] else {"1", "2", "4", "8"})


def test_up_blocks_count_their_samplers(parts: dict[str, Any]) -> None:
    with sdattn_fast.apply(parts["sdxl"], capture=Capture()) as patch, torch.no_grad():
        text = torch.randn(1, 77, 64)
        added = {"text_embeds": torch.randn(1, 32), "time_ids": torch.randn(1, 6)}
        parts["sdxl"](torch.randn(1, 4, 32, 32), 3, text, added_cond_kwargs=added)
        assert {maps.shape[-1] for maps in patch.maps.values()} == {16}
        captured_below = [name for name in patch.layers if name not in patch.maps]
        assert captured_below


def test_the_mean_is_the_runs(build: Callable[[str], Any], draw: Any) -> None:
    pipe, seen = build("sd15"), []
    with sdattn_fast.apply(pipe, capture=Capture((2,), steps="latest")) as patch:

        def look(pipe: Any, step: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
            seen.append(patch.maps[DOWN])
            return inputs

        draw(pipe, num_inference_steps=3, callback_on_step_end=look)
        assert torch.equal(patch.maps[DOWN], seen[-1])
    mean = torch.stack(seen).mean(0)
    with sdattn_fast.apply(pipe, capture=Capture((2,))) as patch:
        draw(pipe, num_inference_steps=3)
        torch.testing.assert_close(patch.maps[DOWN], mean)
        draw(pipe, num_inference_steps=3)
        torch.testing.assert_close(patch.maps[DOWN], mean)
        draw(pipe, "dog", num_inference_steps=1)
        assert not torch.allclose(patch.maps[DOWN], mean, atol=1e-4)
    with sdattn_fast.apply(pipe, capture=Capture((2,), steps=(0, 2))) as patch:
        draw(pipe, num_inference_steps=3)
        torch.testing.assert_close(patch.maps[DOWN], (seen[0] + seen[2]) / 2)


def test_a_unet_alone_begins_a_run_where_timesteps_rise(parts: dict[str, Any]) -> None:
    unet, text = parts["sd15"], torch.randn(1, 77, 32)
    noise = [torch.randn(1, 4, 16, 16) for _ in range(3)]

    def mean_of(*steps: tuple[int, int]) -> torch.Tensor:
        with sdattn_fast.apply(unet, capture=Capture((2,))) as patch, torch.no_grad():
            for i, t in steps:
                unet(noise[i], t, text)
            return patch.maps[DOWN]

    one, two = mean_of((0, 900)), mean_of((1, 500))
    torch.testing.assert_close(mean_of((0, 900), (1, 500)), (one + two) / 2)
    torch.testing.assert_close(mean_of((2, 300), (0, 900), (1, 500)), (one + two) / 2)


def test_with_gradients_the_latest_step_is_in_the_graph(parts: dict[str, Any]) -> None:
    unet = parts["sd15"]
    x, text = torch.randn(1, 4, 16, 16, requires_grad=True), torch.randn(1, 77, 32)
    with sdattn_fast.apply(unet, capture=Capture((2,))) as patch:
        with torch.no_grad():
            unet(x, 900, text)
        unet(x, 500, text)
        maps = patch.maps[DOWN]
        (gradient,) = torch.autograd.grad(maps[..., 3, 5].sum(), x)
        assert gradient.abs().sum() > 0
        with torch.no_grad():
            unet(x, 400, text)
        assert not patch.maps[DOWN].requires_grad


@pytest.mark.parametrize("program", [Program(SalienceDropout(0.2, "space"), Refinement(2, 0.3, 0.8, "space"))])
def test_maps_of_programs_over_the_picture(program: Program, build: Callable[[str], Any], draw: Any) -> None:
    pipe = build("sd15")
    means = []
    for backend in ("auto", "reference"):
        with sdattn_fast.apply(pipe, program, capture=Capture(), backend=backend) as patch:
            draw(pipe, ["a red car", "dog"], num_inference_steps=1)
            means.append(patch.maps[DOWN])
    assert means[0].shape == (2, 77, 16, 16)
    close = torch.isclose(*means, atol=1e-4, rtol=1e-2).float().mean()
    assert close > 0.98, f"{close:.4f}"


def test_pictures_and_files(build: Callable[[str], Any], draw: Any, tmp_path: Any) -> None:
    from safetensors import safe_open

    pipe = build("sd15")
    with sdattn_fast.apply(pipe, capture=Capture()) as patch:
        (picture,) = draw(pipe, "a red car")
    maps = patch.maps
    image = Image.fromarray((picture * 255).astype("uint8"))
    shown = maps.overlay(image, "a red car")
    assert list(shown) == ["a", "red", "car"] and all(x.size == image.size for x in shown.values())
    assert shown["red"].tobytes() != shown["car"].tobytes()
    words = maps.per_word("a red car")
    assert words.overlay(image, alpha=0.0)["red"].tobytes() == image.tobytes()
    assert words.upsample((5, 9))["car"].shape == (1, 5, 9)
    assert maps.upsample((20, 30)).shape == (1, 77, 20, 30)
    torch.testing.assert_close(maps.upsample((20, 30), (9, 2)), maps.upsample((20, 30))[:, [9, 2]], rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match=r"tokens: expected some of \(0, 1, .*, got \(2, 77\)"):
        maps.upsample((20, 30), (2, 77))
    maps.save(tmp_path / "maps.safetensors")
    words.save(tmp_path / "words.safetensors")
    with safe_open(tmp_path / "maps.safetensors", "pt") as file:
        assert set(file.keys()) == set(maps) and torch.equal(file.get_tensor(DOWN), maps[DOWN])
        assert file.metadata()["tokens"].split(",") == [str(i) for i in range(77)]
    with safe_open(tmp_path / "words.safetensors", "pt") as file:
        assert set(file.keys()) == {"a", "red", "car"}


def test_words_and_tokens(tokenizer: Any) -> None:
    assert words_of(tokenizer, "a red a") == {"a": [1], "red": [2, 3, 4], "a (2)": [5]}
    long = words_of(tokenizer, "abc " * 40)
    assert max(i for indices in long.values() for i in indices) == 75
    maps = Maps({"x": torch.rand(1, 2, 4, 4)}, (2, 1), (8, 8), tokenizer)
    assert list(maps.per_word("a bc")) == ["a"], "bc's second token was not captured"
    torch.testing.assert_close(maps.per_word("a bc", (4, 4))["a"], maps["x"][:, 1])


def test_bad_input(build: Callable[[str], Any], draw: Any, parts: dict[str, Any], tokenizer: Any) -> None:
    maps = Maps({"x": torch.rand(2, 2, 4, 4)}, (2, 1), None, tokenizer)
    for wrong, error in (((0, 3), ValueError), ((3,), TypeError), ("ab", TypeError), ((2.0, 3), TypeError)):
        with pytest.raises(error, match="size: expected"):
            maps.upsample(wrong)
    with pytest.raises(TypeError, match="prompt: expected a str"):
        maps.per_word(["a"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prompt: no word of"):
        maps.per_word("xyz")
    with pytest.raises(ValueError, match="prompt: words need a tokenizer"):
        Maps({"x": torch.rand(1, 2, 4, 4)}, (2, 1), None).per_word("a")
    with pytest.raises(ValueError, match="maps: nothing is captured"):
        Maps({}, (), None).upsample()
    with pytest.raises(ValueError, match="maps: heads were kept apart"):
        Maps({"x": torch.rand(1, 2, 2, 4, 4)}, (2, 1), None, by_head=True).upsample()
    image = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="image: expected 2 images"):
        maps.overlay(image, "a")
    with pytest.raises(TypeError, match="image: expected a PIL image"):
        maps.overlay([image, 3], "a")
    with pytest.raises(ValueError, match=r"alpha: expected a number in \[0, 1\]"):
        maps.overlay([image, image], "a", alpha=math.nan)
    with pytest.raises(ValueError, match=rf"Capture.layers: 'down_blocks.0.attn2' matches none.*did you mean '{DOWN}'"):
        sdattn_fast.apply(parts["sd15"], capture=Capture(layers="down_blocks.0.attn2"))
    for fields, message in (
        ({"steps": (0, 0)}, "Capture.steps: expected each index once"), ({"steps": -1}, "Capture.steps: expected"),
        ({"steps": "all"}, "Capture.steps: expected 'latest'"), ({"layers": 3}, "Capture.layers: expected None"),
        ({"tokens": (-1,)}, "Capture.tokens: expected indices >= 0"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=message):
            Capture(**fields)
    pipe = build("sd15")
    with sdattn_fast.apply(pipe, capture=Capture((77,))), pytest.raises(ValueError, match=r"capture: .*77"):
        draw(pipe)


@torch.no_grad()
def test_a_picture_of_another_size_begins_its_own_mean(parts: dict[str, Any]) -> None:
    unet: Any = copy.deepcopy(parts["sd15"])
    with sdattn_fast.apply(unet, capture=Capture((1,))) as patch:
        for batch in (2, 2, 3):
            unet(torch.randn(batch, 4, 8, 8), 5, torch.randn(batch, 77, 32))
            assert all(len(maps) == batch for maps in patch.maps.values())


@pytest.mark.parametrize("steps", [None, (0,), "latest"])
@torch.no_grad()
def test_a_mean_over_steps_is_not_captured_in_a_cuda_graph(
    steps: Any, parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every replay the graph would read the sum of the steps before it, whose memory is freed by then."""
    unet: Any = copy.deepcopy(parts["sd15"])
    inputs = torch.randn(2, 4, 8, 8), 5, torch.randn(2, 77, 32)
    with sdattn_fast.apply(unet, capture=Capture((1,), steps=steps)) as patch:
        unet(*inputs)
        monkeypatch.setattr(map_keeper, "capturing", lambda device: True)
        if steps == "latest":
            unet(*inputs)
            kept = {name: layer.data_ptr() for name, layer in patch.maps.items()}
            assert kept == {name: maps.data_ptr() for name, (maps, _, _) in patch.current_call.maps.latest.items()}
        else:
            with pytest.raises(RuntimeError, match=r"capture: a CUDA graph .* expected Capture\(steps='latest'\)"):
                unet(*inputs)
