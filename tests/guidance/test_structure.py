"""Structure: edges where objects end, smoothing that stays inside, moments kept; and in a pipeline."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdattn_fast.guidance.preview import predicted_clean
from sdattn_fast.guidance.structure import Structure, canny_edges, object_marginals, refine_latents

SIZE = 24


def disc(noise: float = 0.2):
    """Noisy latents of a disc, the disc, and a word's map of it: blurred, as attention is, and coarse."""
    at = torch.arange(SIZE) - SIZE / 2 + 0.5
    inside = (at[:, None] ** 2 + at**2) < (SIZE / 3) ** 2
    clean = torch.where(inside, 1.0, -1.0).expand(2, 4, SIZE, SIZE) * torch.tensor([1.0, -1.0, 0.5, 2.0])[:, None, None]
    word = torch.nn.functional.avg_pool2d(inside.float()[None, None], 5, 1, 2).expand(2, 1, SIZE, SIZE)
    return clean + noise * torch.randn(clean.shape), inside, clean, word


def test_edges_are_where_the_disc_ends():
    _, inside, clean, _ = disc()
    edges = canny_edges(clean)
    assert edges.shape == (2, 1, SIZE, SIZE) and set(edges.unique().tolist()) == {0.0, 1.0}
    border = torch.nn.functional.max_pool2d(inside.float()[None], 3, 1, 1) != inside
    border |= -torch.nn.functional.max_pool2d(-inside.float()[None], 3, 1, 1) != inside
    assert border[0][edges[0, 0].bool()].float().mean() > 0.95
    assert edges[0].sum() > 0.3 * 2 * math.pi * SIZE / 3
    assert canny_edges(torch.zeros(1, 3, 8, 9)).sum() == 0
    assert canny_edges(torch.randn(1, 2, 2, 2)).shape == (1, 1, 2, 2)


def test_marginals_find_the_disc_better_than_the_map():
    noisy, inside, _, word = disc(0.3)
    marginals = object_marginals(word, noisy)
    torch.testing.assert_close(marginals.sum(1), torch.ones(2, SIZE, SIZE))
    found = (marginals.argmax(1) == 1) == inside
    alone = (object_marginals(word, noisy, iterations=0).argmax(1) == 1) == inside
    assert found.float().mean() > 0.99 and found.float().mean() >= alone.float().mean()


def test_smooths_inside_and_not_across():
    noisy, inside, clean, word = disc()
    refined = refine_latents(noisy, word, picture=clean, strength=1.0)
    deep = -torch.nn.functional.max_pool2d(-inside.float()[None], 5, 1, 2)[0] == 1
    assert (refined - clean)[..., deep].std() < 0.6 * (noisy - clean)[..., deep].std()
    # What lies on one side has no part in the other: change the outside and the inside stays, but for the moments.
    changed = torch.where(inside, noisy, noisy + 5 * torch.randn_like(noisy))
    other = refine_latents(changed, word, picture=clean)
    a, b = ((x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True) for x in (refined, other))
    for one, two in zip(a[..., inside].flatten(0, 1), b[..., inside].flatten(0, 1), strict=True):
        assert torch.corrcoef(torch.stack([one, two]))[0, 1] > 0.9999


def test_moments_are_kept_and_strength_mixes():
    noisy, _, _, word = disc(1.0)
    for strength in (0.0, 0.5, 1.0):
        refined = refine_latents(noisy, {"disc": word[:, 0]}, strength=strength)
        torch.testing.assert_close(refined.mean((2, 3)), noisy.mean((2, 3)), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(refined.var((2, 3)), noisy.var((2, 3)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(refine_latents(noisy, word, strength=0.0), noisy)
    flat = torch.ones(2, 4, SIZE, SIZE)
    torch.testing.assert_close(refine_latents(flat, word), flat)


def test_gradients():
    noisy, _, clean, word = disc()
    x = noisy[:1, :2, 4:12, 4:13].double().requires_grad_()
    picture, maps = clean[:1, :, 4:12, 4:13].double(), word[:1, :, 4:12, 4:13].double()
    assert torch.autograd.gradcheck(lambda y: refine_latents(y, maps, picture=picture), (x,))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_clean_latent_is_found_again(kind):
    clean, noise, alpha = torch.randn(1, 4, 5, 5), torch.randn(1, 4, 5, 5), 0.3
    scheduler = SimpleNamespace(config=SimpleNamespace(prediction_type=kind), alphas_cumprod=torch.tensor([0.9, alpha]))
    sample = alpha**0.5 * clean + (1 - alpha) ** 0.5 * noise
    v = alpha**0.5 * noise - (1 - alpha) ** 0.5 * clean
    prediction = {"epsilon": noise, "v_prediction": v, "sample": clean}[kind]
    torch.testing.assert_close(
        predicted_clean(scheduler, sample, torch.tensor(1), prediction), clean, atol=1e-5, rtol=1e-5
    )
    scheduler.config.prediction_type = "flow_prediction"
    with pytest.raises(ValueError, match="scheduler: expected"):
        predicted_clean(scheduler, sample, 1, prediction)


def test_bad_input():
    noisy, _, _, word = disc()
    spoilt = noisy.clone()
    spoilt[0, 0, 0, 0] = math.nan
    patch: Any = SimpleNamespace(_memory=None, _keeper=None)
    for error, message, call in (
        (ValueError, "latents: expected finite", lambda: refine_latents(spoilt, word)),
        (ValueError, "latents: expected at least one pixel", lambda: refine_latents(noisy[..., :0], word)),
        (ValueError, "maps: expected 2 entries of 24 x 24", lambda: refine_latents(noisy, word[..., 1:])),
        (ValueError, "maps: expected at least one word", lambda: refine_latents(noisy, {})),
        (TypeError, "maps: expected a torch.Tensor", lambda: refine_latents(noisy, 3)),
        (ValueError, "picture: expected 2 entries", lambda: refine_latents(noisy, word, picture=noisy[:1])),
        (ValueError, "strength: expected", lambda: refine_latents(noisy, word, strength=1.5)),
        (ValueError, "sigma: expected", lambda: refine_latents(noisy, word, sigma=0)),
        (ValueError, "sigma: expected", lambda: refine_latents(noisy, word, sigma=1e9)),
        (ValueError, "sigma: expected", lambda: refine_latents(noisy, word, sigma=10**400)),
        (ValueError, "background: expected", lambda: refine_latents(noisy, word, background=math.nan)),
        (ValueError, "iterations: expected", lambda: refine_latents(noisy, word, iterations=-1)),
        (ValueError, "low, high: expected", lambda: canny_edges(noisy, 0.5, 0.2)),
        (TypeError, "picture: expected a floating", lambda: canny_edges(noisy.int())),
        (ValueError, "patch: expected", lambda: Structure(patch, "a")),
    ):
        with pytest.raises(error, match=message):
            call()
