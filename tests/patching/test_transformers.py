"""Transformers with cross-attention: plain programs are stock's, full ones the reference's on all tokens, padded text
costs nothing and changes nothing, pipelines' prompts are known, and what is not served says so."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_transformers import (
    hunyuan,
    hunyuan_controlnet,
    inputs_of,
    pixart,
    pixart_pipeline,
    run_model,
    sana,
    sana_pipeline,
)
from torch import Tensor

import sdattn_fast
from sdattn_fast import Capture, Program, Refinement, SalienceDropout, semantic_attention
from sdattn_fast.patching import model_kinds
from sdattn_fast.patching.text_padding import padding_of_mask, padding_of_zeros
from sdattn_fast.patching.text_tokens import text_tokens

FULL = Program(dropout=SalienceDropout(0.3), refine=Refinement(sigma=0.8), renormalize="row")
MASKED = [pixart, sana]
ALL = [*MASKED, hunyuan]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("lengths", [(3, 7), (7, 7), (1, 300)])
def test_plain_attention_is_stocks(make: Callable[[], Any], lengths: tuple[int, ...]) -> None:
    model = make()
    inputs = inputs_of(model, tokens=300, lengths=lengths)
    stock = run_model(model, inputs)
    with sdattn_fast.apply(model) as patch:
        assert len(patch.layers) == 2
        torch.testing.assert_close(run_model(model, inputs), stock, rtol=1e-5, atol=1e-5)
    assert torch.equal(run_model(model, inputs), stock)


class _Oracle:
    """diffusers' arithmetic with the reference between the two products, on every token, masked or not."""

    def __init__(self, grid: tuple[int, int], **options: Any) -> None:
        self.grid, self.options, self.maps = grid, options, list[Tensor]()

    def __call__(
        self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, attention_mask: Any = None,
        image_rotary_emb: Any = None,
    ) -> Any:  # fmt: skip
        from diffusers.models.embeddings import apply_rotary_emb

        text, across = encoder_hidden_states, attn.norm_q is not None and attn.norm_q.weight.shape[0] == attn.inner_dim
        query, key, value = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
        if across:
            query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value))
        if attn.norm_q is not None and not across:
            query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb)
        bias = None if attention_mask is None else attention_mask[:, None]
        out, maps = semantic_attention(
            query, key, value, bias=bias, grid=self.grid, backend="reference", capture=Capture(), **self.options
        )
        self.maps.append(maps)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def _with_oracle(model: Any, inputs: dict[str, Any], program: Program, **options: Any) -> tuple[Tensor, list[Tensor]]:
    height, width = inputs["hidden_states"].shape[2:]
    side = model.config.patch_size
    oracle = _Oracle((height // side, width // side), program=program, **options)
    layers = [m for m in model.modules() if getattr(m, "is_cross_attention", False)]
    processors = [layer.processor for layer in layers]
    for layer in layers:
        layer.processor = oracle
    out = run_model(model, inputs)
    for layer, processor in zip(layers, processors, strict=True):
        layer.processor = processor
    return out, oracle.maps


def _tokens_of(tokens: int) -> dict[str, Tensor]:
    phrases = torch.full((tokens,), -1)
    phrases[1:3] = 0
    gate = torch.ones(tokens)
    gate[2] = 1.5
    return {"phrases": phrases, "gate": gate}


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("lengths", [(3, 6), (6, 6)])
def test_the_full_program_is_the_references_on_all_tokens(make: Callable[[], Any], lengths: tuple[int, ...]) -> None:
    model = make()
    inputs = inputs_of(model, tokens=300, lengths=lengths)
    tokens = 10 if make is hunyuan else 300
    own, active = _tokens_of(tokens), torch.tensor([False, True])
    protected = torch.zeros(2, tokens, dtype=torch.bool)
    protected[:, 0] = True
    masked = protected.clone()
    if make is not hunyuan:
        masked |= inputs["encoder_attention_mask"] == 0
    of_batch = {name: x.expand(2, -1) for name, x in own.items()}
    expected, maps = _with_oracle(model, inputs, FULL, active=active, protected=masked, **of_batch)
    with sdattn_fast.apply(
        model, FULL, active=active, protected=protected, capture=Capture(), backend="cpu", **own
    ) as patch:
        torch.testing.assert_close(run_model(model, inputs), expected, rtol=1e-4, atol=1e-5)
        assert len(patch.maps) == len(maps) == 2
        for mine, theirs in zip(patch.maps.values(), maps, strict=True):
            content = tokens if make is hunyuan else 6
            assert mine.shape[:2] == (1, content)
            torch.testing.assert_close(mine.flatten(2), theirs[1:, :content], rtol=1e-4, atol=1e-6)
    assert (expected - run_model(model, inputs)).abs().max() > 1e-2


@pytest.mark.parametrize("make", MASKED)
def test_masked_tokens_need_no_columns(make: Callable[[], Any]) -> None:
    """The layers see so many tokens as the longest text of the batch has; a mask only where one is shorter."""
    model, seen = make(), list[Any]()
    layer = next(m for m in model.modules() if getattr(m, "is_cross_attention", False))
    layer.to_k.register_forward_pre_hook(lambda _module, args: seen.append(args[0].shape[1]))
    with sdattn_fast.apply(model, capture=Capture()) as patch:
        for lengths, columns in (((3, 7), 7), ((5, 5), 5), ((1, 120), 120), ((2, 2), 2)):
            run_model(model, inputs_of(model, lengths=lengths))
            assert seen.pop() == columns
            of_longest = next(iter(patch.maps.values()))[lengths.index(max(lengths))]
            torch.testing.assert_close(of_longest.sum(0), torch.ones_like(of_longest[0]))
            assert len(of_longest) == columns and patch.maps.tokens == tuple(range(columns))
    with sdattn_fast.apply(model, capture=Capture(tokens=(0, 9))) as patch:
        run_model(model, inputs_of(model, lengths=(3, 7)))
        assert seen.pop() == 10
        first, ninth = next(iter(patch.maps.values())).unbind(1)
        assert first.any() and not ninth.any()


@pytest.mark.parametrize("make", MASKED)
def test_masks_of_other_forms(make: Callable[[], Any]) -> None:
    """Holes, biases, a text of which all is left out, none at all: each is as stock has it."""
    model = make()
    inputs = inputs_of(model, lengths=(4, 9))
    holes = inputs["encoder_attention_mask"].clone()
    holes[1, 2:4] = 0
    nothing = holes.clone()
    nothing[0] = 0
    as_bias = (1 - holes[:, None]) * -10000.0
    for mask in (holes, nothing, as_bias, holes.bool().int(), None, torch.ones_like(holes)):
        theirs = inputs | {"encoder_attention_mask": mask}
        stock = run_model(model, theirs)
        with sdattn_fast.apply(model, Program(refine=Refinement()), active=torch.tensor([False, False])):
            torch.testing.assert_close(run_model(model, theirs), stock, rtol=1e-4, atol=1e-4)


def test_what_of_a_text_is_padding() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    first = padding_of_mask(mask)
    assert first is not None and first.is_of(mask) and first.is_of(mask.clone()) and not first.is_of(mask.float())
    again = padding_of_mask(mask.clone().float())
    assert again == first and hash(again) == hash(first) and again is not first
    assert (first.columns(), first.columns((0,)), first.columns((3,)), first.tokens) == (3, 3, 4, 4)
    mask[1, 2] = 0
    assert not first.is_of(mask)
    changed = padding_of_mask(mask)
    assert changed is not None and changed != first and changed.columns() == 2
    assert changed.bias(torch.ones(2, 1, 1, 4), 2, mask.device) is None
    nothing = padding_of_mask(torch.tensor([[0, 0], [1, 0]]))
    assert nothing is not None and nothing.padding.tolist() == [[False, False], [False, True]]
    for no_mask in (None, torch.ones(4), torch.ones(0, 4), "mask", torch.full((2, 4), 0.5)):
        assert padding_of_mask(no_mask) is None
    text = torch.ones(2, 5, 3)
    text[0, 1], text[0, 3:], text[1, 2:] = 0, 0, 0
    zeros = padding_of_zeros(text)
    assert zeros.padding.tolist() == [[False] * 3 + [True] * 2, [False] * 2 + [True] * 3] and zeros != first
    assert (zeros.columns(), zeros.columns((3,)), zeros.columns((4,))) == (4, 5, 5)
    assert padding_of_zeros(torch.zeros(1, 4, 3)).columns() == 2
    bias = zeros.bias(None, 4, text.device)
    assert bias is not None and bias.shape == (1, 1, 1, 4)
    torch.testing.assert_close(bias.exp().flatten(), torch.tensor([1.0, 1, 1, 2]))


def _drawn(pipe: Any, prompt: Any, **more: Any) -> Tensor:
    scale = 8 if "PixArt" in type(pipe).__name__ else 32
    own = {"complex_human_instruction": None} if scale == 32 else {}
    count = 1 if isinstance(prompt, str) else len(prompt)
    images: Tensor = pipe(
        prompt, negative_prompt="ugly" if count == 1 else ["ugly"] * count, num_inference_steps=3, height=8 * scale,
        width=12 * scale, output_type="latent", generator=[torch.Generator().manual_seed(i) for i in range(count)],
        guidance_scale=3.0, clean_caption=False, use_resolution_binning=False, **own, **more,
    ).images  # fmt: skip
    return images


PIPELINES = [pixart_pipeline, sana_pipeline]
FIRST = {"pixart_pipeline": 0, "sana_pipeline": 1}  # the first token of a prompt's text


@pytest.mark.parametrize("make", PIPELINES)
def test_pipelines_know_their_prompts(make: Callable[[], Any]) -> None:
    """As though the classes of every token had been told: conditional rows alone, content tokens alone."""
    pipe = make()
    first = FIRST[make.__name__]
    tokens = 120 if first == 0 else 300
    stock = _drawn(pipe, "a red car")
    with sdattn_fast.apply(pipe):
        torch.testing.assert_close(_drawn(pipe, "a red car"), stock, rtol=1e-4, atol=1e-4)
    program = Program(dropout=SalienceDropout(0.5))
    with sdattn_fast.apply(pipe, program, capture=Capture()) as patch:
        found = _drawn(pipe, "a red car")
        maps = dict(patch.maps)
        assert list(patch.maps.per_word("a red car")) == ["a", "red", "car"]
    protected = torch.ones(tokens, dtype=torch.bool)
    protected[first : first + 3] = False
    with sdattn_fast.apply(
        pipe.transformer, program, active=torch.tensor([False, True]), protected=protected, capture=Capture()
    ) as patch:
        told = _drawn(pipe, "a red car")
        assert torch.equal(told, found)
        for name, map_ in patch.maps.items():
            assert map_.shape[1] <= 5 and torch.equal(map_, maps[name])
    assert (found - stock).abs().max() > 1e-3
    assert torch.equal(_drawn(pipe, "a red car"), stock)


def test_words_are_not_looked_for_behind_padding() -> None:
    """Gemma's tokenizer pads on the left until Sana's pipeline has encoded."""
    pipe = sana_pipeline()
    pipe.tokenizer.padding_side = "left"
    with pytest.raises(ValueError, match="tokenizer: expected one that pads on the right"):
        text_tokens(pipe.tokenizer, "a red car", 300)
    with sdattn_fast.apply(pipe, capture=Capture()) as patch:
        _drawn(pipe, "a red car")
        assert list(patch.maps.per_word("a red car")) == ["a", "red", "car"]


@pytest.mark.parametrize("make", PIPELINES)
def test_a_picture_does_not_depend_on_its_neighbour(make: Callable[[], Any]) -> None:
    """Texts of several lengths in one batch: each is what it is alone."""
    pipe = make()
    with sdattn_fast.apply(pipe, Program(dropout=SalienceDropout(0.5))):
        both = _drawn(pipe, ["a red car and a blue fish", "a car"])
        alone = _drawn(pipe, "a red car and a blue fish")
    torch.testing.assert_close(both[:1], alone, rtol=1e-3, atol=1e-3)


def test_gates_and_updates_reach_a_transformer() -> None:
    pipe = pixart_pipeline()
    gate = torch.ones(120)
    gate[2] = 0.0
    stock = _drawn(pipe, "a red car")
    with sdattn_fast.apply(pipe, gate=gate) as patch:
        gated = _drawn(pipe, "a red car")
        assert (gated - stock).abs().max() > 1e-3
        patch.update(gate=torch.ones(120))
        torch.testing.assert_close(_drawn(pipe, "a red car"), stock, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match=r"gate: expected \(120,\).*got \(77,\)"):
            patch.update(gate=torch.ones(77))
            _drawn(pipe, "a red car")


def test_compiled_transformers_read_other_prompts() -> None:
    """The mask, too: which tokens are content must not be a constant of the graph."""
    model = pixart()
    program = Program(dropout=SalienceDropout(0.5))
    texts = [inputs_of(model, lengths=lengths) for lengths in ((3, 7), (9, 5))]
    active = torch.tensor([False, True])
    with sdattn_fast.apply(model, program, active=active):
        eager = [run_model(model, one) for one in texts]
    compiled = torch.compile(model, backend="eager")
    with sdattn_fast.apply(compiled, program, active=active):
        for one, expected in zip(texts, eager, strict=True):
            torch.testing.assert_close(run_model(compiled, one), expected, rtol=1e-4, atol=1e-4)
    with sdattn_fast.apply(torch.compile(hunyuan(), backend="eager")) as patch:
        with pytest.raises(RuntimeError, match="HunyuanDiT2DModel: expected an eager model, got a compiled one"):
            run_model(patch.unet, inputs_of(hunyuan()))


def test_hunyuan_wants_to_be_told_its_tokens() -> None:
    """Its two texts are encoded in two calls and joined in the model: what is content must be told."""
    model = hunyuan()
    inputs = inputs_of(model)
    with sdattn_fast.apply(model, Program(dropout=SalienceDropout(0.5)), protected=torch.zeros(10, dtype=torch.bool)):
        run_model(model, inputs)
    with sdattn_fast.apply(model, Program(dropout=SalienceDropout(0.5)), protected=torch.zeros(4, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"protected: expected \(10,\).*got \(4,\)"):
            run_model(model, inputs)


def test_hunyuans_controlnet_knows_its_grid() -> None:
    model = hunyuan_controlnet()
    inputs = inputs_of(model)
    stock = run_model(model, inputs)[0]
    program = Program(refine=Refinement(sigma=0.8))
    with sdattn_fast.apply(model):
        torch.testing.assert_close(run_model(model, inputs)[0], stock, rtol=1e-4, atol=1e-4)
    with sdattn_fast.apply(model, program, protected=torch.zeros(10, dtype=torch.bool), capture=Capture()) as patch:
        assert (run_model(model, inputs)[0] - stock).abs().max() > 1e-4
        assert [tuple(x.shape) for x in patch.maps.values()] == [(2, 10, 4, 6)]
    with sdattn_fast.apply(torch.compile(model, backend="eager")) as patch:
        with pytest.raises(RuntimeError, match="HunyuanDiT2DControlNetModel: expected an eager model"):
            run_model(patch.unet, inputs)


def test_an_instruction_before_the_prompt_is_named() -> None:
    pipe = sana_pipeline()
    size = {"height": 256, "width": 256, "output_type": "latent", "use_resolution_binning": False}
    with sdattn_fast.apply(pipe, Program(dropout=SalienceDropout(0.5))):
        with pytest.raises(ValueError, match=r"protected: prompt_embeds .*complex_human_instruction"):
            pipe("a red car", num_inference_steps=1, clean_caption=False, **size)


def test_guidance_that_calls_the_model_is_refused() -> None:
    from sdattn_fast.guidance import Correction, Presence, gradcam

    pipe = sana_pipeline()
    with sdattn_fast.apply(pipe, capture=Capture()) as patch:
        with pytest.raises(ValueError, match="patch: expected one of a UNet, got SanaTransformer2DModel's"):
            Correction(patch, Presence([[2]]))
        with pytest.raises(ValueError, match="patch: expected one of a UNet, got SanaTransformer2DModel's"):
            gradcam(patch, torch.randn(1, 4, 8, 12), 5, torch.randn(1, 300, 12), loss=lambda seen: seen.sum())
    with pytest.raises(ValueError, match=r"recipe.*SanaPipeline"):
        sdattn_fast.apply(pipe, recipe="objects")


def test_two_transformers_of_a_pipeline() -> None:
    """As Wan 2.2 has; the second one's layers have its name before theirs."""
    pipe = SimpleNamespace(transformer=pixart(), transformer_2=pixart(), encode_prompt=lambda prompt: (None, None))
    with sdattn_fast.apply(pipe) as patch:
        assert patch.layers == [
            f"{prefix}transformer_blocks.{i}.attn2" for prefix in ("", "transformer_2.") for i in range(2)
        ]


def _flux() -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


def _sd3() -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip


def _hunyuan_video() -> Any:
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, text_embed_dim=8, pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )  # fmt: skip


def _stable_audio() -> Any:
    from diffusers import StableAudioDiTModel

    return StableAudioDiTModel(
        sample_size=4, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=4, out_channels=4,
        num_key_value_attention_heads=2, cross_attention_dim=16, time_proj_dim=8, global_states_input_dim=8,
        cross_attention_input_dim=8,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (_flux, "FluxAttention: an attention class of its own"),
        (_sd3, "1 of Attention: text and picture are attended to together"),
        (_hunyuan_video, "1 of Attention: text and picture are attended to together"),
        (_stable_audio, "Attention: its keys have fewer heads than its queries"),
    ],
)
def test_what_is_not_served_is_named(make: Callable[[], Any], why: str) -> None:
    model = make()
    with pytest.warns(UserWarning) as said:
        patch = sdattn_fast.apply(SimpleNamespace(transformer=model))
    assert patch.layers == [] and len(said) == 1 and said[0].filename == __file__
    start = f"sdattn_fast.apply: {type(model).__name__} has no cross-attention layer to serve ("
    message = str(said[0].message)
    assert message.startswith(start) and why in message and message.endswith("; nothing is patched")


def test_the_models_that_the_documentation_lists() -> None:
    """They are those whose kinds are known, and diffusers has them."""
    import diffusers

    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    served = page.partition("## Served")[2].partition("## Padding")[0]
    listed = {name for row in served.splitlines() if row.startswith("| ") for name in re.findall(r"`(\w+Model)`", row)}
    as_unet = {"UNet2DConditionModel", "ControlNetModel", "UNetMotionModel"}
    assert listed == {name for _, name in model_kinds._KINDS} | as_unet
    for module, name in model_kinds._KINDS:
        assert getattr(diffusers, name).__module__ == module
