"""Wan, its kin and LTX: plain programs are stock's, full ones the reference's on all 512 tokens and in each frame,
zeros that pad a text cost one column, and pipelines' prompts are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from tiny_transformers import (
    chronoedit,
    latte,
    ltx,
    ltx_pipeline,
    run_model,
    skyreels,
    unet_3d,
    unet_motion,
    video_inputs_of,
    wan,
    wan_pipeline,
    wan_vace,
)  # fmt: skip
from torch import Tensor

import sdattn_fast
from sdattn_fast import Capture, Program, Refinement, SalienceDropout, semantic_attention

FULL = Program(dropout=SalienceDropout(0.3), refine=Refinement(sigma=0.8), renormalize="row")
FRAMES, GRID = 3, (4, 6)


def wan_of_images() -> Any:
    return wan(image=True)


MODELS = [wan, wan_of_images, wan_vace, skyreels, chronoedit, ltx]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _layers(model: Any) -> list[Any]:
    """Those that read the text, told by their names."""
    return [m for name, m in model.named_modules() if name.endswith("attn2")]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("lengths", [(3, 7), (0, 512)])
def test_plain_attention_is_stocks(make: Callable[[], Any], lengths: tuple[int, ...]) -> None:
    model = make()
    inputs = video_inputs_of(model, lengths=lengths)
    stock = run_model(model, inputs)
    processors = [layer.processor for layer in _layers(model)]
    with sdattn_fast.apply(model) as patch:
        assert len(patch.layers) == len(processors)
        torch.testing.assert_close(run_model(model, inputs), stock, rtol=1e-5, atol=1e-5)
    assert [layer.processor for layer in _layers(model)] == processors
    assert torch.equal(run_model(model, inputs), stock)


class _Oracle:
    """diffusers' arithmetic, and the reference on every token of the text in each frame."""

    def __init__(self, **options: Any) -> None:
        self.options, self.maps = options, list[Tensor]()

    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any, mask: Any = None, *_: Any) -> Any:
        heads, text = attn.heads, encoder_hidden_states[:, -512:]
        query, key, value = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(text)), attn.to_v(text)
        query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
        outs, maps = [], []
        for frame in query.chunk(FRAMES, 2):
            out, map_ = semantic_attention(
                frame, key, value, bias=None if mask is None else mask[:, None], grid=GRID, backend="reference",
                capture=Capture(), **self.options,
            )  # fmt: skip
            outs.append(out)
            maps.append(map_)
        self.maps.append(torch.stack(maps, 2))
        out = torch.cat(outs, 2).transpose(1, 2).flatten(2)
        if getattr(attn, "add_k_proj", None) is not None:
            image = encoder_hidden_states[:, :-512]
            key, value = attn.norm_added_k(attn.add_k_proj(image)), attn.add_v_proj(image)
            key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (key, value))
            out = out + ((query @ key.mT * query.shape[-1] ** -0.5).softmax(-1) @ value).transpose(1, 2).flatten(2)
        return attn.to_out[0](out)


@pytest.mark.parametrize("make", MODELS)
def test_the_full_program_is_the_references_on_all_tokens(make: Callable[[], Any]) -> None:
    model = make()
    inputs = video_inputs_of(model, lengths=(4, 6))
    phrases = torch.full((512,), -1)
    phrases[1:3] = 0
    own = {"phrases": phrases, "gate": torch.rand(512) + 0.5}
    active, protected = torch.tensor([False, True]), torch.zeros(2, 512, dtype=torch.bool)
    protected[:, 0] = True
    padded = protected.clone()
    padded[0, 4:] = padded[1, 6:] = True
    oracle = _Oracle(program=FULL, active=active, protected=padded, **{k: x.expand(2, -1) for k, x in own.items()})
    processors = [layer.processor for layer in _layers(model)]
    for layer in _layers(model):
        layer.processor = oracle
    expected = run_model(model, inputs)
    for layer, processor in zip(_layers(model), processors, strict=True):
        layer.processor = processor
    with sdattn_fast.apply(
        model, FULL, active=active, protected=protected, capture=Capture(), backend="cpu", **own
    ) as patch:
        torch.testing.assert_close(run_model(model, inputs), expected, rtol=1e-4, atol=1e-4)
        mine, theirs = list(patch.maps.values()), oracle.maps
        if make is wan_vace:  # its control's layers come first in the model, and run last
            mine, theirs = sorted(mine, key=float_sum), sorted(theirs, key=lambda m: float_sum(m[1:, :6]))
        for one, other in zip(mine, theirs, strict=True):
            assert one.shape == (1, 6, FRAMES, *GRID)
            torch.testing.assert_close(one.flatten(3), other[1:, :6], rtol=1e-4, atol=1e-6)
    assert (expected - run_model(model, inputs)).abs().max() > 1e-3


def float_sum(maps: Tensor) -> float:
    return float(maps.square().sum())


def test_padding_of_zeros_costs_one_column() -> None:
    model, columns = wan(), list[int]()
    _layers(model)[0].to_k.register_forward_pre_hook(lambda _module, args: columns.append(args[0].shape[1]))
    with sdattn_fast.apply(model, capture=Capture()) as patch:
        for lengths, needed in (((3, 7), 8), ((5, 5), 6), ((0, 0), 2), ((512, 1), 512), ((511, 1), 512)):
            run_model(model, video_inputs_of(model, lengths=lengths))
            assert columns.pop() == needed
            assert next(iter(patch.maps.values())).shape[1] == max(*lengths, 1)
            assert len(patch.maps.tokens) == max(*lengths, 1)
    with sdattn_fast.apply(model, capture=Capture(tokens=(0, 9))):
        run_model(model, video_inputs_of(model, lengths=(3, 7)))
        assert columns.pop() == 11


@pytest.mark.parametrize("make", [wan, ltx])
def test_gradients_are_stocks(make: Callable[[], Any]) -> None:
    """Of the latents, and of a projection's weights, as in training."""
    model = make().train()
    inputs = video_inputs_of(model)
    weight = _layers(model)[0].to_k.weight.requires_grad_()

    def gradients() -> tuple[Tensor, Tensor]:
        latents = inputs["hidden_states"].clone().requires_grad_()
        loss = model(**(inputs | {"hidden_states": latents}))[0].square().mean()
        of_latents, of_weight = torch.autograd.grad(loss, [latents, weight])
        return of_latents, of_weight

    stock = gradients()
    with sdattn_fast.apply(model, backend="cpu"):
        for mine, theirs in zip(gradients(), stock, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
            assert theirs.any()


def test_bfloat16_is_as_near_as_stock() -> None:
    """The one column's log of a count is not rounded to eight bits."""
    model = wan()
    inputs = video_inputs_of(model, lengths=(3, 7))
    exact = run_model(model.double(), {k: x.double() if isinstance(x, Tensor) else x for k, x in inputs.items()})
    model.to(torch.bfloat16)
    rough = {k: x.bfloat16() if isinstance(x, Tensor) and k != "timestep" else x for k, x in inputs.items()}
    stock = (run_model(model, rough) - exact).abs().mean()
    with sdattn_fast.apply(model):
        assert (run_model(model, rough) - exact).abs().mean() < 1.1 * stock


def _drawn(pipe: Any, prompt: Any, side: int = 16, frames: int = 9, **more: Any) -> Tensor:
    drawn: Tensor = pipe(
        prompt, negative_prompt="ugly", num_inference_steps=3, height=4 * side, width=6 * side, num_frames=frames,
        output_type="latent", generator=torch.Generator().manual_seed(0), guidance_scale=3.0, **more,
    ).frames  # fmt: skip
    return drawn


def test_a_pipeline_knows_its_prompts_and_asks_them_in_two_forwards() -> None:
    pipe = wan_pipeline()
    stock = _drawn(pipe, "a red car")
    with sdattn_fast.apply(pipe, backend="cpu"):
        torch.testing.assert_close(_drawn(pipe, "a red car"), stock, rtol=1e-4, atol=1e-4)
    program, steps = Program(dropout=SalienceDropout(0.5)), {0: 0.5, 2: 0.1}
    with sdattn_fast.apply(pipe, program, capture=Capture(), dropout_when=steps) as patch:
        drawn = _drawn(pipe, "a red car")
        maps = patch.maps
        words = maps.per_word("a red car", size=GRID)
        assert list(words) == ["a", "red", "car"]
        assert words["car"].shape == (1, FRAMES, *GRID)
        assert patch.current_call.steps.index == 2
        for name, one in maps.items():
            assert one.shape == (1, 4, FRAMES, *GRID), name  # three words and EOS
        assert maps.tokens == (0, 1, 2, 3)
    assert (drawn - stock).abs().max() > 1e-3
    # Told, on the bare model: the first of each step's two forwards is the prompt's.
    protected = torch.ones(512, dtype=torch.bool)
    protected[:3] = False
    with sdattn_fast.apply(pipe.transformer, program, dropout_when=steps) as patch, patch.call():
        turns = iter(range(6))

        def tell(_module: Any, args: Any, kwargs: Any) -> None:
            patch.update(active=torch.tensor([next(turns) % 2 == 0]), protected=protected)

        handle = pipe.transformer.register_forward_pre_hook(tell, with_kwargs=True, prepend=True)
        torch.testing.assert_close(_drawn(pipe, "a red car"), drawn, rtol=1e-4, atol=1e-4)
        handle.remove()
    assert torch.equal(_drawn(pipe, "a red car"), stock)


def test_ltx_and_its_pipeline() -> None:
    pipe = ltx_pipeline()
    size = {"side": 32, "frames": 17}  # latents of 3 x 4 x 6
    stock = _drawn(pipe, "a red car", **size)
    with sdattn_fast.apply(pipe, backend="cpu"):
        torch.testing.assert_close(_drawn(pipe, "a red car", **size), stock, rtol=1e-4, atol=1e-4)
    program = Program(dropout=SalienceDropout(0.5), refine=Refinement(sigma=0.8))
    with sdattn_fast.apply(pipe, program, capture=Capture(), backend="cpu") as patch:
        drawn = _drawn(pipe, "a red car", **size)
        assert patch.layers == [f"transformer_blocks.{i}.attn2" for i in range(2)]
        assert patch.maps.per_word("a red car", size=GRID)["car"].shape == (1, FRAMES, *GRID)
    protected = torch.ones(128, dtype=torch.bool)
    protected[:3] = False
    told = {"active": torch.tensor([False, True]), "protected": protected}
    # The same call as above, captured maps included, so that it is the same to the bit on every machine.
    with sdattn_fast.apply(pipe.transformer, program, capture=Capture(), backend="cpu", **told):
        assert torch.equal(_drawn(pipe, "a red car", **size), drawn)
    assert (drawn - stock).abs().max() > 1e-3
    model = ltx()
    inputs = {k: x for k, x in video_inputs_of(model).items() if k not in ("num_frames", "height", "width")}
    inputs["video_coords"] = torch.rand(2, 3, FRAMES * GRID[0] * GRID[1])
    with (
        sdattn_fast.apply(model, program),
        pytest.raises(ValueError, match=r"grid: layer 'transformer_blocks\.0\.attn2'"),
    ):
        run_model(model, inputs)


class _FramesOracle:
    """The reference, each frame an entry with a text of its own, as the models have it."""

    def __init__(self, **options: Any) -> None:
        self.options, self.maps = options, list[Tensor]()

    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, *_: Any, **__: Any) -> Any:
        if encoder_hidden_states is None:
            return AttnProcessor2_0()(attn, hidden_states)
        query, key, value = (
            to(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for to, x in zip(
                (attn.to_q, attn.to_k, attn.to_v), (hidden_states, *[encoder_hidden_states] * 2), strict=True
            )
        )
        height = int((query.shape[2] * 2 / 3) ** 0.5)
        out, maps = semantic_attention(
            query, key, value, grid=(height, query.shape[2] // height), backend="reference", capture=Capture(),
            **self.options,
        )  # fmt: skip
        self.maps.append(maps)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("make", [latte, unet_3d])
def test_models_that_repeat_a_text_for_its_frames(make: Callable[[], Any]) -> None:
    """The text side is that of the entries, and not of their frames."""
    model, tokens = make(), 9
    inputs = {
        "hidden_states" if make is latte else "sample": torch.randn(2, 4, FRAMES, 8, 12),
        "timestep": torch.tensor([5, 5]), "encoder_hidden_states": torch.randn(2, tokens, 16), "return_dict": False,
    }  # fmt: skip
    stock, gate = run_model(model, inputs), torch.rand(2, tokens) + 0.5
    with sdattn_fast.apply(model):
        torch.testing.assert_close(run_model(model, inputs), stock, rtol=1e-4, atol=1e-4)
    active, protected = torch.tensor([False, True]), torch.arange(tokens).expand(2, -1) > 5
    by_frame = {
        name: x.repeat_interleave(FRAMES, 0)
        for name, x in {"gate": gate, "active": active, "protected": protected}.items()
    }
    oracle = _FramesOracle(program=FULL, **by_frame)
    processors = dict(model.attn_processors) if make is unet_3d else {}
    layers = [m for m in model.modules() if getattr(m, "is_cross_attention", False)]
    before = [layer.processor for layer in layers]
    for layer in layers:
        layer.processor = oracle
    expected = run_model(model, inputs)
    for layer, processor in zip(layers, before, strict=True):
        layer.processor = processor
    rows: list[int] = []
    layers[0].to_k.register_forward_pre_hook(lambda _module, args: rows.append(len(args[0])))
    with sdattn_fast.apply(
        model, FULL, gate=gate, active=active, protected=protected, capture=Capture(layers="*"), backend="cpu"
    ) as patch:
        torch.testing.assert_close(run_model(model, inputs), expected, rtol=1e-4, atol=1e-4)
        assert rows == [2] and len(patch.layers) == len(layers)
        mine, theirs = sorted(patch.maps.values(), key=float_sum), [m[FRAMES:].transpose(0, 1) for m in oracle.maps]
        for one, other in zip(mine, sorted(theirs, key=float_sum), strict=True):
            torch.testing.assert_close(one[0].flatten(2), other, rtol=1e-4, atol=1e-6)
    assert (expected - stock).abs().max() > 1e-3 and (not processors or model.attn_processors == processors)


@pytest.mark.parametrize("make", [latte, unet_3d])
def test_a_video_of_one_frame_has_a_dimension_for_it(make: Callable[[], Any]) -> None:
    model = make()
    inputs = {
        "hidden_states" if make is latte else "sample": torch.randn(2, 4, 1, 8, 12),
        "timestep": torch.tensor([5, 5]), "encoder_hidden_states": torch.randn(2, 9, 16), "return_dict": False,
    }  # fmt: skip
    stock = run_model(model, inputs)
    with sdattn_fast.apply(model, capture=Capture()) as patch:
        torch.testing.assert_close(run_model(model, inputs), stock, rtol=1e-4, atol=1e-4)
        assert {tuple(x.shape[:3]) for x in patch.maps.values()} == {(2, 9, 1)}
        assert {x.dim() for x in patch.maps.values()} == {5}


def test_animatediff_draws_each_frame_with_its_own_text() -> None:
    """Its pipeline repeats the text, so that frames may have several; each is an entry."""
    model = unet_motion()
    inputs = {
        "sample": torch.randn(2, 4, FRAMES, 8, 12), "timestep": torch.tensor([5, 5]), "return_dict": False,
        "encoder_hidden_states": torch.randn(2, 9, 16).repeat_interleave(FRAMES, 0),
    }  # fmt: skip
    stock, active = run_model(model, inputs), torch.arange(2 * FRAMES) >= FRAMES
    with sdattn_fast.apply(model):
        torch.testing.assert_close(run_model(model, inputs), stock, rtol=1e-4, atol=1e-4)
    gate = torch.ones(9)
    gate[3] = 0
    with sdattn_fast.apply(model, gate=gate, active=active, capture=Capture()) as patch:
        assert (run_model(model, inputs) - stock).abs().max() > 1e-3
        assert all(m.shape[:2] == (FRAMES, 9) and not m[:, 3].any() for m in patch.maps.values())


def test_maps_of_videos_are_shown_by_frame(tmp_path: Any) -> None:
    from PIL import Image

    pipe = wan_pipeline()
    with sdattn_fast.apply(pipe, capture=Capture()) as patch:
        _drawn(pipe, "a red car")
        maps = patch.maps
    assert maps.upsample((8, 12)).shape == (1, 4, FRAMES, 8, 12)
    words = maps.per_word("a red car")
    one_by_one = torch.stack([words["car"][:, f] for f in range(FRAMES)], 1)
    larger = words.upsample((16, 24))["car"]
    assert larger.shape == (1, FRAMES, 16, 24)
    for f in range(FRAMES):
        of_frame = torch.nn.functional.interpolate(one_by_one[:, f : f + 1], size=(16, 24), mode="bicubic")[:, 0]
        torch.testing.assert_close(larger[:, f], of_frame)
    frames = [Image.new("RGB", (24, 16)) for _ in range(FRAMES)]
    assert len(words.overlay(frames)["car"]) == FRAMES
    with pytest.raises(ValueError, match="image: expected 3 images, one for each entry or frame, got 1"):
        words.overlay(frames[0])
    maps.save(tmp_path / "maps.safetensors")
    with sdattn_fast.apply(pipe, capture=Capture(reduce="none")) as patch:
        _drawn(pipe, "a red car")
        assert next(iter(patch.maps.values())).shape == (1, 2, 4, FRAMES, *GRID)
        with pytest.raises(ValueError, match="heads were kept apart"):
            patch.maps.upsample()


def test_compiled_models_and_attention_backends_of_diffusers() -> None:
    model = wan_of_images()
    program, active = Program(dropout=SalienceDropout(0.5)), torch.tensor([False, True])
    texts = [video_inputs_of(model, lengths=lengths) for lengths in ((3, 7), (9, 5))]
    with sdattn_fast.apply(model, program, active=active):
        eager = [run_model(model, one) for one in texts]
        model.set_attention_backend("native")
        assert torch.equal(run_model(model, texts[0]), eager[0])
    assert {layer.processor._attention_backend for layer in _layers(model)} == {"native"}
    compiled = torch.compile(model, backend="eager")
    with sdattn_fast.apply(compiled, program, active=active):
        for one, expected in zip(texts, eager, strict=True):
            torch.testing.assert_close(run_model(compiled, one), expected, rtol=1e-4, atol=1e-4)


def test_fused_projections_are_left_alone() -> None:
    model = wan()
    for layer in _layers(model):
        layer.fuse_projections()
    with pytest.warns(UserWarning, match=r"WanAttnProcessor, with fused projections\); nothing is patched"):
        assert sdattn_fast.apply(model).layers == []


def test_copies_of_a_patched_model_are_not_patched() -> None:
    import copy

    model = wan()
    inputs = video_inputs_of(model)
    stock = run_model(model, inputs)
    with sdattn_fast.apply(model, gate=torch.zeros(512), active=torch.ones(2, dtype=torch.bool)):
        with pytest.warns(UserWarning, match="copied or saved as a whole"):
            twin = copy.deepcopy(model)
        assert (run_model(model, inputs) - stock).abs().max() > 1e-3
        assert torch.equal(run_model(twin, inputs), stock)
