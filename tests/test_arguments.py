"""Bad input: a ValueError or TypeError that names the argument; never a crash, never a wrong picture."""

from __future__ import annotations

import math

import pytest
import torch

from sdattn_fast import Capture, Program, Refinement, SalienceDropout, semantic_attention
from sdattn_fast.arguments import indexed
from sdattn_fast.functional import prepare

Q, K, V = torch.randn(2, 3, 12, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 5)
SMOOTH = Program(refine=Refinement())


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (TypeError, "query: expected a torch.Tensor", {"query": [1.0]}),
        (ValueError, "query: expected 4 dimensions", {"query": Q[0]}),
        (TypeError, "query: expected a floating dtype", {"query": Q.long()}),
        (ValueError, "key: expected the query's dtype", {"key": K.double()}),
        (ValueError, "key: expected the query's device", {"key": K.to("meta")}),
        (ValueError, r"key: expected shape \(2, 3, N, 8\)", {"key": K[:1]}),
        (ValueError, r"key: expected shape \(2, 3, N, 8\)", {"key": K[:, :2]}),
        (ValueError, r"key: expected shape \(2, 3, N, 8\)", {"key": K[..., :4]}),
        (ValueError, r"value: expected shape \(2, 3, 7, Dv\)", {"value": V[:, :, :6]}),
        (TypeError, "program: expected", {"program": "plain"}),
        (TypeError, "bias: expected a torch.Tensor", {"bias": 0.0}),
        (TypeError, "bias: expected a floating dtype", {"bias": torch.ones(7, dtype=torch.bool)}),
        (ValueError, "bias: expected a shape that broadcasts", {"bias": torch.zeros(2, 3, 12, 6)}),
        (ValueError, "bias: expected a shape that broadcasts", {"bias": torch.zeros(1, 1, 1, 1, 7)}),
        (ValueError, "bias: expected the query's device", {"bias": torch.zeros(7, device="meta")}),
        (TypeError, "scale: expected a number", {"scale": "0.1"}),
        (ValueError, "scale: expected a finite number", {"scale": math.nan}),
        (ValueError, "scale: expected a finite number", {"scale": 10**400}),
        (TypeError, "gate: expected a torch.Tensor", {"gate": [1.0] * 7}),
        (ValueError, "gate: expected shape", {"gate": torch.ones(7)}),
        (TypeError, "gate: expected bool or a floating", {"gate": torch.ones(2, 7, dtype=torch.int32)}),
        (ValueError, "gate: expected finite numbers >= 0, got -1", {"gate": -torch.ones(2, 7)}),
        (ValueError, "gate: expected finite numbers >= 0, got nan", {"gate": torch.full((2, 7), math.nan)}),
        (ValueError, "gate: expected finite numbers >= 0, got inf", {"gate": torch.full((2, 3, 7), math.inf)}),
        (ValueError, "phrases: expected shape", {"phrases": torch.zeros(2, 6, dtype=torch.int64)}),
        (TypeError, "phrases: expected an integer", {"phrases": torch.zeros(2, 7)}),
        (TypeError, "phrases: expected an integer", {"phrases": torch.zeros(2, 7, dtype=torch.bool)}),
        (ValueError, "phrases: expected ids >= 0", {"phrases": torch.full((2, 7), -2)}),
        (TypeError, "protected: expected dtype torch.bool", {"protected": torch.zeros(2, 7)}),
        (ValueError, "protected: expected shape", {"protected": torch.zeros(7, dtype=torch.bool)}),
        (ValueError, "active: expected shape", {"active": torch.zeros(3, dtype=torch.bool)}),
        (TypeError, "active: expected dtype torch.bool", {"active": torch.zeros(2)}),
        (ValueError, r"heads: expected indices in \[0, 3\), got 3", {"heads": [0, 3]}),
        (ValueError, r"heads: expected indices in \[0, 3\), got -1", {"heads": [-1]}),
        (ValueError, "heads: expected each index once", {"heads": (1, 1)}),
        (TypeError, "heads: expected", {"heads": "0"}),
        (TypeError, "heads: expected", {"heads": [0.5]}),
        (TypeError, "heads: expected", {"heads": torch.tensor([0.0])}),
        (TypeError, "heads: expected a 1-D tensor of ints", {"heads": torch.tensor([])}),
        (TypeError, "heads: expected a sequence of ints", {"heads": {"mid_block": [0]}}),
        (ValueError, "heads: expected shape", {"heads": torch.ones(4, dtype=torch.bool)}),
        (ValueError, "inactive_heads: expected", {"inactive_heads": "off"}),
        (TypeError, "inactive_heads: expected", {"inactive_heads": None}),
        (ValueError, r"grid: expected \(height, width\), needed", {"program": SMOOTH}),
        (ValueError, "grid: expected height \\* width == 12", {"grid": (3, 3)}),
        (TypeError, "grid: expected", {"grid": 12}),
        (TypeError, "grid: expected", {"grid": (3.0, 4.0)}),
        (TypeError, "seed: expected an int", {"seed": 1.5}),
        (ValueError, "seed: expected 0 <= seed", {"seed": -1}),
        (TypeError, "seed: expected an int64 tensor", {"seed": torch.zeros(2)}),
        (TypeError, "capture: expected", {"capture": [1]}),
        (ValueError, "capture: expected token indices < 7", {"capture": Capture((7,))}),
        (ValueError, "backend: expected one of", {"backend": "tpu"}),
        (TypeError, "backend: expected a str", {"backend": None}),
        (ValueError, "backend: 'cuda' cannot serve", {"backend": "cuda"}),
    ],
)
def test_semantic_attention_names_what_is_wrong(error, match, change):
    with pytest.raises(error, match=match):
        semantic_attention(**{"query": Q, "key": K, "value": V, **change})


@pytest.mark.parametrize(
    ("error", "match", "make"),
    [
        (ValueError, r"SalienceDropout.ratio: expected a number in \[0, 1\]", lambda: SalienceDropout(1.1)),
        (ValueError, "SalienceDropout.ratio: expected a finite", lambda: SalienceDropout(math.nan)),
        (TypeError, "SalienceDropout.ratio", lambda: SalienceDropout("0.2")),
        (ValueError, "SalienceDropout.axis", lambda: SalienceDropout(axis="row")),
        (ValueError, "SalienceDropout.mode", lambda: SalienceDropout(mode="k")),
        (ValueError, "Refinement.threshold", lambda: Refinement(threshold=1.0)),
        (ValueError, "Refinement.threshold", lambda: Refinement(threshold=-0.1)),
        (ValueError, "Refinement.sigma", lambda: Refinement(sigma=-1)),
        (ValueError, "Refinement.sigma", lambda: Refinement(sigma=math.inf)),
        (ValueError, "Refinement.sigma", lambda: Refinement(sigma=1e9)),
        (ValueError, "Refinement.sigma", lambda: Refinement(sigma=10**400)),
        (ValueError, "Refinement.steps", lambda: Refinement(steps=10**9)),
        (ValueError, "Refinement.steps", lambda: Refinement(steps=0)),
        (TypeError, "Refinement.steps", lambda: Refinement(steps=1.0)),
        (ValueError, "Refinement.axis", lambda: Refinement(axis="depth")),
        (TypeError, "Program.dropout", lambda: Program(dropout=0.2)),
        (TypeError, "Program.refine", lambda: Program(refine=1)),
        (ValueError, "Program.renormalize", lambda: Program(renormalize="all")),
        (TypeError, "Program.renormalize", lambda: Program(renormalize=None)),
        (TypeError, "Capture.tokens", lambda: Capture(tokens=3)),
        (TypeError, "Capture.tokens", lambda: Capture(tokens=(1.0,))),
        (ValueError, "Capture.tokens", lambda: Capture(tokens=(-1,))),
        (ValueError, "Capture.tokens", lambda: Capture(tokens=(2, 2))),
        (ValueError, "Capture.stage", lambda: Capture(stage="end")),
        (ValueError, "Capture.reduce", lambda: Capture(reduce="sum")),
    ],
)
def test_program_fields_name_what_is_wrong(error, match, make):
    with pytest.raises(error, match=match):
        make()


def test_a_gpu_without_a_number_is_the_current_one(monkeypatch):
    """Tensors say "cuda:1" where a user says "cuda"; a CPU has no number."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert indexed("cuda") == indexed(torch.device("cuda")) == torch.device("cuda", 1)
    assert indexed("cuda:0") == torch.device("cuda", 0)
    assert indexed("cpu") == indexed("cpu:0") == Q.device
    assert indexed("meta") == Q.to("meta").device
    with pytest.raises(TypeError, match=r"device: expected a torch.device or its name, got int"):
        indexed(0)


def test_a_call_may_be_prepared_for_a_device_by_name():
    prepared = prepare(Program(), batch=2, heads_count=3, tokens=7, device="cpu:0")
    torch.testing.assert_close(prepared(Q, K, V)[0], semantic_attention(Q, K, V))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_scale_of_zero_is_a_scale(backend):
    """Every token weighs the same."""
    out = semantic_attention(Q, K, V, scale=0.0, backend=backend)
    torch.testing.assert_close(out, V.mean(2, keepdim=True).expand_as(out))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("grid", [(0, 0), (0, 5), (5, 0)])
@pytest.mark.parametrize("program", [SMOOTH, Program(refine=Refinement(3, 0.2, 1.0, "space"))])
def test_no_pixels_have_empty_maps(program, grid, backend):
    out, maps = semantic_attention(Q[:, :, :0], K, V, program, grid=grid, capture=Capture(), backend=backend)
    assert out.shape == (2, 3, 0, 5) and maps.shape == (2, 7, 0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "program", [Program(), SMOOTH, Program(SalienceDropout(0.3), Refinement(2, 0.2, 1.0, "space"))]
)
def test_a_head_that_gives_zeros_gives_them_for_nan(program, backend):
    query = Q.clone()
    query[:, 1, 3] = math.nan
    out = semantic_attention(query, K, V, program, heads=[0, 2], inactive_heads="zero", grid=(3, 4), backend=backend)
    assert (out[:, 1] == 0).all() and out.isfinite().all()
