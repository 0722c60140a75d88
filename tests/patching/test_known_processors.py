"""Only processors whose arithmetic ours reproduces are replaced; models of other kinds compute what they did."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models import attention_processor
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

import sdattn_fast
from sdattn_fast import Program, SalienceDropout, SemanticAttnProcessor
from sdattn_fast.patching.known_processors import is_ip_adapter, why_foreign

DROPOUT = Program(dropout=SalienceDropout(0.3))
DOWN = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
MID = "mid_block.attentions.0.transformer_blocks.0.attn2"


def _allegro() -> tuple[Any, dict[str, Any]]:
    from diffusers import AllegroTransformer3DModel

    model = AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, cross_attention_dim=24, sample_height=8,
        sample_width=8, sample_frames=2, caption_channels=8,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, 2, 8, 8), "timestep": torch.tensor([5.0, 5.0]),
        "encoder_hidden_states": torch.randn(2, 6, 8), "attention_mask": torch.ones(2, 2, 8, 8),
        "encoder_attention_mask": torch.ones(2, 6), "image_rotary_emb": None,
    }  # fmt: skip
    return model, inputs


def _sana_video() -> tuple[Any, dict[str, Any]]:
    """Its processor has the name of Sana's, and is another class."""
    from diffusers import SanaVideoTransformer3DModel

    model = SanaVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=12,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=8,
        sample_size=4,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, 2, 4, 4), "timestep": torch.tensor([5.0, 5.0]),
        "encoder_hidden_states": torch.randn(2, 6, 8),
    }  # fmt: skip
    return model, inputs


@pytest.mark.parametrize(
    ("make", "kind", "layers"),
    [(_allegro, "AllegroAttnProcessor2_0", 2), (_sana_video, "SanaAttnProcessor2_0", 1)],
    ids=["Allegro", "Sana Video"],
)
def test_models_of_another_kind_are_left_alone(make: Callable[[], Any], kind: str, layers: int) -> None:
    model, inputs = make()
    model.eval()
    before = {name: attn.processor for name, attn in model.named_modules() if isinstance(attn, Attention)}
    with torch.no_grad():
        stock = model(**inputs, return_dict=False)[0]
        with pytest.warns(UserWarning) as said:
            patch = sdattn_fast.apply(model, DROPOUT)
        (one,) = said
        assert f"{type(model).__name__} has no cross-attention layer to serve ({layers} layers run" in str(one.message)
        assert "attn2': diffusers.models." in str(one.message) and f".{kind}); nothing is patched" in str(one.message)
        assert one.filename == __file__
        assert patch.layers == [] and "nothing patched" in repr(patch)
        assert torch.equal(model(**inputs, return_dict=False)[0], stock)
    assert all(model.get_submodule(name).processor is processor for name, processor in before.items())


class _Mine(AttnProcessor2_0):
    """A name alone says nothing: it may turn keys, drop a rotary embedding, look at a clock."""

    def __call__(self, attn: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().__call__(attn, hidden_states, *args, **kwargs)


_Named = type("AttnProcessor2_0", (_Mine,), {})


@pytest.mark.parametrize("kind", [_Mine, _Named])
def test_a_subclass_and_a_namesake_are_left_alone(kind: type, parts: dict[str, Any]) -> None:
    unet = copy.deepcopy(parts["sd15"])
    mine = {name: kind() for name in (DOWN, MID)}
    for name, processor in mine.items():
        unet.get_submodule(name).set_processor(processor)
    inputs = torch.randn(2, 4, 8, 8), 5, torch.randn(2, 77, 32)
    with torch.no_grad():
        stock = unet(*inputs).sample
        with pytest.warns(UserWarning) as said:
            patch = sdattn_fast.apply(unet)
        (one,) = said
        name = f"{kind.__module__}.{kind.__name__}"
        assert str(one.message) == (
            "sdattn_fast.apply: 2 layers run processors that ours cannot stand in for, "
            f"{DOWN!r}: {name}; they are left alone"
        )
        assert not {DOWN, MID} & set(patch.layers) and len(patch.layers) >= 2
        torch.testing.assert_close(unet(*inputs).sample, stock, rtol=1e-4, atol=1e-4)
        patch.remove()
    assert all(unet.get_submodule(name).processor is processor for name, processor in mine.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with sdattn_fast.apply(unet, layers="up_blocks.*"):
            pass  # no layer that was asked for is another's


def _layer(processor: Any, **changes: Any) -> Any:
    attn = Attention(16, 12, heads=2, dim_head=8, bias=True, **changes).eval().requires_grad_(False)
    attn.set_processor(processor)
    return attn


class _Holder(torch.nn.Module):
    def __init__(self, attn: Any) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
        return self.attn(sample, encoder_hidden_states)


KNOWN = {
    "AttnProcessor": AttnProcessor,
    "AttnProcessor2_0": AttnProcessor2_0,
    "SlicedAttnProcessor": lambda: attention_processor.SlicedAttnProcessor(1),
    "FusedAttnProcessor2_0": attention_processor.FusedAttnProcessor2_0,
    "SemanticAttnProcessor": SemanticAttnProcessor,
}
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "unscaled": {"scale_qk": False},
    "norms of queries and keys": {"qk_norm": "layer_norm"},
    "norm of the text": {"cross_attention_norm": "layer_norm"},
    "residual": {"residual_connection": True, "rescale_output_factor": 1.5},
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", KNOWN)
def test_what_is_replaced_computes_the_same(name: str, layer: str) -> None:
    attn = _layer(KNOWN[name](), **LAYERS[layer])
    if name.startswith("Fused"):
        attn.fuse_projections()
    model = _Holder(attn)
    inputs = torch.randn(2, 20, 16), 5, torch.randn(2, 9, 12)
    stock = model(*inputs)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        patch = sdattn_fast.apply(model)
    torch.testing.assert_close(model(*inputs), stock, rtol=1e-5, atol=1e-6)
    left = (layer, name) in {
        ("unscaled", "AttnProcessor2_0"), ("unscaled", "FusedAttnProcessor2_0"),
        ("norms of queries and keys", "AttnProcessor"), ("norms of queries and keys", "SlicedAttnProcessor"),
    }  # fmt: skip
    assert patch.layers == ([] if left else ["attn"]) and len(said) == left
    patch.remove()


def test_a_scale_of_its_own_is_named() -> None:
    attn = _layer(AttnProcessor())
    assert why_foreign(attn) is None
    attn.scale *= 2
    assert "AttnProcessor, with a scale of 0.707107 where the layer's width says 0.353553" in str(why_foreign(attn))


def test_a_fused_projection_must_be_that_of_its_parts() -> None:
    attn = _layer(attention_processor.FusedAttnProcessor2_0())
    attn.fuse_projections()
    assert why_foreign(attn) is None
    attn.to_v.bias += 1
    assert "whose to_kv is not made of the layer's to_k and to_v" in str(why_foreign(attn))


def test_every_processor_of_diffusers_is_known_or_left_alone() -> None:
    """What ours stands in for was compared with its source; a class that diffusers adds is none of these."""
    attn = _layer(AttnProcessor2_0())
    attn.fuse_projections()
    names = ("norm_q", "norm_k", "scale_qk", "scale", "inner_dim", "heads", "to_k", "to_v", "to_kv", "norm_cross")
    names += ("spatial_norm", "group_norm", "residual_connection")
    layer = SimpleNamespace(**{name: getattr(attn, name) for name in names})
    taken = set()
    for name, kind in list(vars(attention_processor).items()):
        if isinstance(kind, type) and name.endswith(("AttnProcessor", "AttnProcessor2_0", "AttnProcessorNPU")):
            layer.processor = object.__new__(kind)
            if why_foreign(layer) is None:
                taken.add(name)
    assert taken == {
        "AttnProcessor", "AttnProcessor2_0", "FusedAttnProcessor2_0", "HunyuanAttnProcessor2_0",
        "IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0", "IPAdapterXFormersAttnProcessor", "SlicedAttnProcessor",
        "XFormersAttnProcessor",
    }  # fmt: skip


def test_ip_adapters_of_another_make_are_none_of_ours(parts: dict[str, Any]) -> None:
    """Tencent's own has the names of the projections, and one Linear each in the place of a list."""

    class IPAttnProcessor2_0(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_k_ip, self.to_v_ip, self.scale = torch.nn.Linear(32, 16), torch.nn.Linear(32, 16), 1.0

        def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None) -> Any:
            return AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states)

    assert not is_ip_adapter(IPAttnProcessor2_0())
    unet = copy.deepcopy(parts["small"])
    unet.get_submodule(DOWN).set_processor(IPAttnProcessor2_0())
    with pytest.warns(UserWarning, match=r"1 layers run.*IPAttnProcessor2_0; they are left alone"):
        patch = sdattn_fast.apply(unet)
    assert patch.layers == [MID]
