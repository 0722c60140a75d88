"""The definition itself, against outside oracles: SDPA, scipy, numpy in float64, Random123's vectors, gradcheck."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F

from sdattn_fast import Capture, Program, Refinement, SalienceDropout
from sdattn_fast.reference import gaussian_kernel, philox_uniform, reference_attention, row_program


def _qkv(b=2, h=3, m=12, n=7, d=8, dv=5, dtype=torch.float64):
    return [torch.randn(b, h, s, c, dtype=dtype) for s, c in ((m, d), (n, d), (n, dv))]


def _maps(b=2, h=2, m=12, n=7):
    return torch.rand(b, h, m, n, dtype=torch.float64).softmax(-1)


def test_empty_program_is_plain_attention():
    q, k, v = _qkv()
    bias = torch.randn(2, 1, 12, 7, dtype=torch.float64)
    out, maps = reference_attention(q, k, v, bias=bias, scale=0.3)
    assert maps is None
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=0.3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_inputs_are_computed_in_float32(dtype):
    q, k, v = _qkv(dtype=dtype)
    out, _ = reference_attention(q, k, v)
    exact, _ = reference_attention(q.double(), k.double(), v.double())
    assert out.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, atol=4 * torch.finfo(torch.float32).eps, rtol=eps)


def test_rows_without_a_finite_logit_give_zeros_and_zero_gradients():
    q, k, v = _qkv()
    q.requires_grad_()
    bias = torch.zeros(2, 3, 12, 7, dtype=torch.float64)
    bias[0, 1, 4] = -math.inf
    program = Program(SalienceDropout(0.3), Refinement(1, 0.5, 0.0), "row")
    out, _ = reference_attention(q, k, v, program, bias=bias)
    assert (out[0, 1, 4] == 0).all() and out.isfinite().all()
    out.sum().backward()
    assert q.grad.isfinite().all()


def test_nan_logit_poisons_its_row_alone():
    q, k, v = _qkv()
    q[1, 2, 3, 0] = math.nan
    program = Program(SalienceDropout(0.3), Refinement(1, 0.5, 0.0), "content")
    out, _ = reference_attention(q, k, v, program)
    bad = out.isnan().all(-1)
    assert bad[1, 2, 3] and bad.sum() == 1 and out.isnan().any(-1).sum() == 1


def _row_by_hand(p, content, gate, phrase, ratio, threshold, renormalize):
    """One row in plain Python floats, written from section 2's words alone."""
    p = list(p)
    c = [i for i in range(len(p)) if content[i]]
    mass = sum(p[i] for i in c)
    for i in c:
        p[i] *= gate[i]
    for ident in {phrase[i] for i in c if phrase[i] >= 0}:
        members = [i for i in c if phrase[i] == ident]
        mean = sum(p[i] for i in members) / len(members)
        for i in members:
            p[i] = mean
    k = math.floor(ratio * len(c) + 1e-9)
    if k > 0:
        kth = sorted((p[i] for i in c), reverse=True)[k - 1]
        for i in c:
            if p[i] >= kth * (1 - 1e-12):
                p[i] = 0.0
    if threshold is not None:
        top = max((p[i] for i in c), default=0.0)
        for i in c:
            if not p[i] > threshold * top:
                p[i] = 0.0
    if renormalize == "content":
        left = sum(p[i] for i in c)
        for i in c:
            p[i] *= mass / left if left else 1.0
    elif renormalize == "row" and sum(p):
        p = [x / sum(p) for x in p]
    return p


@pytest.mark.parametrize("renormalize", ["none", "content", "row"])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.34, 1.0])
def test_rows_against_plain_python(renormalize, ratio):
    p = _maps()
    content = torch.tensor([[0, 1, 1, 1, 1, 1, 0], [0, 1, 0, 1, 1, 0, 0]], dtype=torch.bool)
    gate = torch.tensor([[1, 0.5, 0, 1, 2, 1, 1], [9, 1, 9, 1, 0.3, 9, 9]], dtype=torch.float64)
    phrases = torch.tensor([[4, 4, 4, -1, 7, 7, 7], [-1, 2, 2, 2, -1, -1, -1]])
    program = Program(SalienceDropout(ratio), Refinement(1, 0.6, 0.0), renormalize)
    got = row_program(p, program, content, gate, phrases)
    for b in range(2):
        for h in range(2):
            for m in range(12):
                want = _row_by_hand(
                    p[b, h, m].tolist(), content[b], gate[b].tolist(), phrases[b].tolist(), ratio, 0.6, renormalize
                )
                np.testing.assert_allclose(got[b, h, m].numpy(), want, rtol=1e-10, atol=1e-14)


def test_ties_at_the_kth_go_together():
    p = torch.tensor([0.1, 0.3, 0.3, 0.3], dtype=torch.float64).reshape(1, 1, 1, 4)
    content = torch.ones(1, 4, dtype=torch.bool)
    dropped = row_program(p, Program(SalienceDropout(0.25)), content)
    assert dropped.flatten().tolist() == [0.1, 0, 0, 0]


def test_ratio_counts_in_float64():
    """0.1 * 10 must drop one, and 0.29 * 100 twenty-nine, though neither product is exact."""
    for n, ratio, k in ((10, 0.1, 1), (100, 0.29, 29), (77, 0.2, 15)):
        p = torch.arange(1.0, n + 1, dtype=torch.float64).reshape(1, 1, 1, n)
        left = row_program(p, Program(SalienceDropout(ratio)), torch.ones(1, n, dtype=torch.bool))
        assert int((left == 0).sum()) == k


def test_spatial_axis_ranks_each_tokens_map():
    p = _maps(m=12)
    content = torch.tensor([[False] + [True] * 6] * 2)
    program = Program(SalienceDropout(0.25, axis="space"), Refinement(1, 0.5, 0.0, axis="space"))
    got = row_program(p, program, content).numpy()
    want = p.numpy().copy()
    for b, h, n in np.ndindex(2, 2, 7):
        if n == 0:
            continue
        column = want[b, h, :, n]
        column[column >= np.sort(column)[-3]] = 0
        column[column <= 0.5 * column.max()] = 0
    np.testing.assert_allclose(got, want)


@pytest.mark.parametrize("grid", [(3, 4), (1, 12), (12, 1), (2, 6)])
@pytest.mark.parametrize("sigma", [0.3, 0.8, 2.0, 5.0])
def test_smoothing_is_scipys_gaussian_filter(grid, sigma):
    p = _maps()
    program = Program(refine=Refinement(1, None, sigma))
    content = torch.zeros(2, 7, dtype=torch.bool)
    got = row_program(p, program, content, grid=grid).numpy()
    for b, h, n in np.ndindex(2, 2, 7):
        want = scipy.ndimage.gaussian_filter(p[b, h, :, n].numpy().reshape(grid), sigma)
        np.testing.assert_allclose(got[b, h, :, n].reshape(grid), want, rtol=1e-9, atol=1e-12)


def test_refinement_repeats_suppression_renormalisation_and_smoothing():
    p = _maps()
    content = torch.ones(2, 7, dtype=torch.bool)
    one = Program(refine=Refinement(1, 0.6, 0.7), renormalize="content")
    three = Program(refine=Refinement(3, 0.6, 0.7), renormalize="content")
    want = p
    for _ in range(3):
        want = row_program(want, one, content, grid=(3, 4))
    torch.testing.assert_close(row_program(p, three, content, grid=(3, 4)), want)


def test_inactive_entries_and_heads():
    q, k, v = _qkv()
    program = Program(SalienceDropout(0.5))
    plain, _ = reference_attention(q, k, v)
    changed, _ = reference_attention(q, k, v, program)
    active, heads = torch.tensor([False, True]), torch.tensor([True, False, True])
    got, _ = reference_attention(q, k, v, program, active=active, heads=heads)
    torch.testing.assert_close(got[0], plain[0])
    torch.testing.assert_close(got[1, [0, 2]], changed[1, [0, 2]])
    torch.testing.assert_close(got[1, 1], plain[1, 1])
    zero, _ = reference_attention(q, k, v, program, active=active, heads=heads, inactive_heads="zero")
    assert (zero[:, 1] == 0).all()
    poisoned = torch.where(torch.arange(3)[:, None, None] == 1, torch.nan, q)
    assert (reference_attention(poisoned, k, v, program, heads=heads, inactive_heads="zero")[0][:, 1] == 0).all()
    torch.testing.assert_close(zero[:, [0, 2]], got[:, [0, 2]])


def test_capture_stages_and_reductions():
    q, k, v = _qkv()
    program = Program(SalienceDropout(0.5))
    heads = torch.tensor([True, False, True])
    soft = (q @ k.transpose(-1, -2) / math.sqrt(8)).softmax(-1).float().transpose(-1, -2)
    _, maps = reference_attention(q, k, v, program, heads=heads, capture=Capture((5, 1), "softmax"))
    torch.testing.assert_close(maps, soft[:, [0, 2]].mean(1)[:, [5, 1]])
    _, maps = reference_attention(q, k, v, program, heads=heads, capture=Capture(None, "final", "none"))
    assert maps.shape == (2, 3, 7, 12) and maps.dtype == torch.float32
    torch.testing.assert_close(maps[:, 1], soft[:, 1])
    assert ((maps[:, 0] == 0).sum(1) == 3).all()


def test_philox_is_random123s():
    """The known-answer vector of Philox4x32-10 with counter and key zero: first word 0x6627e8d5."""
    u = philox_uniform(0, (1, 1, 1, 1), torch.device("cpu"))
    assert u.item() == (0x6627E8D5 >> 8) * 2.0**-24


def test_philox_counter_order_and_key_words():
    """Against a scalar Philox written with Python integers."""

    def first_word(counter, key):
        x, k = list(counter), list(key)
        for _ in range(10):
            a, b = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
            x = [(b >> 32) ^ x[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ x[3] ^ k[1], a & 0xFFFFFFFF]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        return x[0]

    seeds = [0x1234567_89ABCDEF, 5]
    u = philox_uniform(torch.tensor(seeds), (2, 3, 4, 5), torch.device("cpu"))
    for b, h, m, n in np.ndindex(2, 3, 4, 5):
        key = seeds[b] & 0xFFFFFFFF, seeds[b] >> 32
        assert u[b, h, m, n].item() == (first_word((n, m, h, 0), key) >> 8) * 2.0**-24


@pytest.mark.parametrize("seed", [7, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 8, 9])])
def test_one_seed_stands_for_those_that_follow_it(seed):
    u = philox_uniform(seed, (3, 2, 4, 5), torch.device("cpu"))
    for b in range(3):
        assert torch.equal(u[b], philox_uniform(7 + b, (1, 2, 4, 5), torch.device("cpu"))[0])


def test_random_dropout_drops_below_ratio_content_only():
    p = _maps(m=64)
    content = torch.tensor([[False] + [True] * 6] * 2)
    got = row_program(p, Program(SalienceDropout(0.4, mode="random")), content, seed=11)
    drop = (philox_uniform(11, p.shape, p.device) < 0.4) & content[:, None, None]
    torch.testing.assert_close(got, p.masked_fill(drop, 0))


@pytest.mark.parametrize("renormalize", ["none", "content", "row"])
@pytest.mark.parametrize("axis", ["token", "space"])
def test_gradients(renormalize, axis):
    q, k, v = (x.requires_grad_() for x in _qkv(b=1, h=2, m=6, n=5, d=3, dv=2))
    gate = (torch.rand(1, 5, dtype=torch.float64) + 0.5).requires_grad_()
    program = Program(SalienceDropout(0.3, axis=axis), Refinement(2, 0.3, 0.6, axis=axis), renormalize)

    def run(q, k, v, gate):
        return reference_attention(
            q, k, v, program, gate=gate, phrases=torch.tensor([[0, 0, -1, 1, 1]]), grid=(2, 3),
            protected=torch.tensor([[True, False, False, False, False]]),
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(run, (q, k, v, gate))


def test_gaussian_kernel_sums_to_one_and_has_scipys_radius():
    for sigma in (0.1, 0.5, 1.0, 3.3):
        kernel = gaussian_kernel(sigma)
        assert kernel.numel() == 2 * int(4 * sigma + 0.5) + 1
        assert kernel.sum().item() == pytest.approx(1.0)
