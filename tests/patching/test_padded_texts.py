"""Texts whose padding differs from forward to forward: nothing of one is taken for another's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_transformers import (
    hunyuan,
    inputs_of,
    latte,
    ltx,
    pixart,
    run_model,
    sana,
    skyreels,
    video_inputs_of,
    wan,
)
from torch import Tensor

import sdattn_fast
from sdattn_fast import Capture, Program, SalienceDropout

DROPOUT = Program(dropout=SalienceDropout(0.5))
PADDED = [(pixart, inputs_of), (sana, inputs_of), (wan, video_inputs_of)]
Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("make", "inputs"), PADDED)
def test_calls_of_earlier_paddings_are_not_kept(make: Make, inputs: Make) -> None:
    """A training set's texts have ever other lengths."""
    model = make()
    with sdattn_fast.apply(model, DROPOUT, active=torch.tensor([True, True])) as patch:
        for length in range(1, 9):
            run_model(model, inputs(model, lengths=(length, 9)))
        text = patch._models[0].text
        assert len(text.cache) <= 2 and len(text.home) <= 2


@pytest.mark.parametrize(("make", "inputs"), PADDED)
def test_a_forward_that_no_hook_sees_has_no_other_texts_padding(make: Make, inputs: Make) -> None:
    model = make()
    short, long = inputs(model, lengths=(3, 7)), inputs(model, lengths=(30, 50))
    stock = run_model(model, long)
    with sdattn_fast.apply(model), torch.no_grad():
        model(**short)
        torch.testing.assert_close(model.forward(**long)[0], stock, rtol=1e-4, atol=1e-4)


def _latte_inputs(model: Any, lengths: tuple[int, ...]) -> dict[str, Any]:
    batch = len(lengths)
    return {
        "hidden_states": torch.randn(batch, 4, 3, 8, 12), "timestep": torch.full((batch,), 5),
        "encoder_hidden_states": torch.randn(batch, 9, 16), "return_dict": False,
    }  # fmt: skip


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("make", "inputs"), [*PADDED, (latte, _latte_inputs)])
@pytest.mark.parametrize("lengths", [((3, 7), (7, 7)), ((3, 7), (9, 5, 6))])
def test_gradient_checkpointing_of_several_forwards(
    make: Make, inputs: Make, lengths: tuple[tuple[int, ...], ...], reentrant: bool
) -> None:
    """Layers run again after the last forward, those of the first one too."""
    from torch.utils.checkpoint import checkpoint

    model = make().train()
    model.enable_gradient_checkpointing(lambda block, *args: checkpoint(block, *args, use_reentrant=reentrant))
    texts = [inputs(model, lengths=one) for one in lengths]
    latents = [one["hidden_states"].requires_grad_() for one in texts]
    layers = [module for name, module in model.named_modules() if name.endswith("attn2")]
    weight = layers[0].to_k.weight.requires_grad_()

    def gradients() -> tuple[Tensor, ...]:
        for x in (weight, *latents):
            x.grad = None
        sum(model(**one)[0].square().mean() for one in texts).backward()
        return tuple(x.grad for x in (weight, *latents))

    stock = gradients()
    with sdattn_fast.apply(model, backend="reference"):
        for mine, theirs in zip(gradients(), stock, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [sana, hunyuan, wan, ltx])
def test_autocast_of_models_that_normalise_queries_and_keys(make: Make) -> None:
    """Norms are in float32 there, values in bfloat16."""
    model = make()
    inputs = (video_inputs_of if make in (wan, ltx) else inputs_of)(model)
    exact = run_model(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        stock = (run_model(model, inputs) - exact).abs().mean()
        with sdattn_fast.apply(model):
            assert (run_model(model, inputs) - exact).abs().mean() < 1.5 * stock


def test_maps_of_a_prompt_that_is_exchanged_between_steps() -> None:
    """The mean is over all steps, though the texts have maps of 7 and of 5 tokens."""
    model, active = pixart(), torch.tensor([False, True])
    texts = [inputs_of(model, lengths=lengths) | {"timestep": torch.full((2,), t)} for lengths, t in _EXCHANGED]
    with sdattn_fast.apply(model, active=active, capture=Capture()) as patch:
        alone = []
        for one in texts:
            with patch.call():
                run_model(model, one)
                alone.append(dict(patch.maps))
        with patch.call():
            for step, one in enumerate(texts):
                run_model(model, one)
                for name, mean in patch.maps.items():
                    expected = torch.zeros_like(mean)
                    for earlier in alone[: step + 1]:
                        expected[:, : earlier[name].shape[1]] += earlier[name] / (step + 1)
                    torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-6)
            assert patch.maps.upsample().shape == (1, 7, 8, 12)


_EXCHANGED = [((3, 7), 9.0), ((3, 5), 5.0), ((3, 6), 1.0)]


def test_a_refreshed_patch_reads_padding_again() -> None:
    """After writes that leave no trace."""
    model = pixart()
    with sdattn_fast.apply(model) as patch:
        run_model(model, inputs_of(model))
        assert patch._models[0].text.paddings
        patch.refresh()
        assert not patch._models[0].text.paddings


def test_steps_whose_frames_have_timesteps_of_their_own() -> None:
    """As in SkyReels' diffusion forcing: the first frames of a video are drawn already."""
    model, falling = skyreels(), (9.0, 6.0, 3.0)
    inputs = video_inputs_of(model) | {"enable_diffusion_forcing": True}
    active = torch.ones(2, dtype=torch.bool)
    with sdattn_fast.apply(model, DROPOUT, active=active, capture=Capture(), dropout_when={0: 0.5, 2: 0.1}) as patch:
        for _ in range(2):
            for step, t in enumerate(falling):
                run_model(model, inputs | {"timestep": torch.tensor([[0.0, t, t]] * 2)})
                assert patch.current_call.steps.index == step
    random = Program(dropout=SalienceDropout(0.5, mode="random"))
    with sdattn_fast.apply(model, random, active=active, seed=3):
        early, late = (inputs | {"timestep": torch.tensor([[0.0, t, t]] * 2)} for t in falling[:2])
        layer = next(one for name, one in model.named_modules() if name.endswith("attn2"))
        seeds = []
        for one in (early, late, early):
            run_model(model, one)
            seeds.append(layer._sdattn_fast_layer.seed.tolist())
        assert seeds[0] == seeds[2] != seeds[1]
