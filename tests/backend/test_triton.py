"""The Triton backend's Python side, and its kernels under the interpreter, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sdattn_fast.backend import triton as backend
from sdattn_fast.plan import RowPlan, TokenSide, make_plan
from sdattn_fast.program import Program, SalienceDropout

KERNELS = Path(__file__).parents[1] / "kernels"
SIDE = TokenSide(2, 2, 77, torch.device("cpu"))


def test_the_kernels_under_the_interpreter():
    """Everything in tests/kernels/interpreted_*.py, whose failures show here."""
    pytest.importorskip("triton")
    files = [str(f) for f in sorted(KERNELS.glob("interpreted_*.py"))]
    assert len(files) == 5
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, cwd=KERNELS, capture_output=True, text=True)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"


def test_availability_says_how_to_mend(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: object())
    assert "TRITON_INTERPRET=1" in backend.availability()
    assert "for ROCm the kernels are compiled in the tests (gfx942) but not yet run" in backend.availability()
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in backend.availability()


def test_rocm_is_available_and_said_to_be_unproven(monkeypatch):
    from sdattn_fast import backend as package

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(package, "_unavailable", {})
    with pytest.warns(UserWarning, match="not yet run"):
        assert package.backends()["triton"] is True
    monkeypatch.setattr(torch.version, "hip", None)
    assert package.remark("triton") is None


def _reasons(query=None, key=None, value=None, bias=None, needs_grad=False):
    like = torch.empty(2, 2, 5, 16)
    query, key, value = (like if x is None else x for x in (query, key, value))
    return backend.not_supported_reasons(query, key, value, bias, make_plan(Program(), SIDE), needs_grad)


def test_what_is_not_supported_is_said(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert _reasons() == []
    assert _reasons(needs_grad=True) == []
    assert "257 tokens" in _reasons(key=torch.empty(2, 2, 257, 16))[0]
    assert "head dimension 257" in _reasons(value=torch.empty(2, 2, 5, 257))[0]
    assert "not contiguous" in _reasons(query=torch.empty(2, 2, 16, 5).transpose(-1, -2))[0]
    assert "float64" in _reasons(query=torch.empty(2, 2, 5, 16, dtype=torch.float64))[0]
    assert "float16 and query" in _reasons(key=torch.empty(2, 2, 5, 16, dtype=torch.float16))[0]
    assert "#11584" in _reasons(*[torch.empty(2, 2, 5, 16, dtype=torch.bfloat16)] * 3)[0]
    assert "bias is on meta" in _reasons(bias=torch.empty(5, device="meta"))[0]
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "query is on cpu" in _reasons()[0]


def test_content_first_keeps_the_order_within_each_class():
    content = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0]], dtype=torch.uint8)
    assert backend.content_first(content).tolist() == [[1, 3, 0, 2], [0, 1, 2, 3]]


def test_map_slots():
    assert backend.map_slots(torch.tensor([3, 0], dtype=torch.int32), 5).tolist() == [1, -1, -1, 0, -1]


def test_the_permutation_is_kept_with_its_plan_and_notices_writes():
    protected = torch.ones(2, 77, dtype=torch.bool)
    protected[:, 5] = False
    rows = make_plan(Program(SalienceDropout()), TokenSide(2, 2, 77, SIDE.device, protected=protected)).rows

    def order(rows: RowPlan):
        return backend._kept(rows, "order", rows.content, backend.content_first)

    first = order(rows)
    assert order(rows) is first and first[0, 0] == 5
    rows.content.copy_(rows.content.roll(1, 1))
    assert order(rows)[0, 0] == 6


@pytest.mark.parametrize("size", range(257))
def test_tiles_hold_everything(size):
    low, high = backend._split(size)
    assert low + high >= size and low >= 16 and (high == 0 or high >= 16)


@pytest.mark.parametrize("n", [1, 16, 17, 77, 154, 256])
@pytest.mark.parametrize("content", [None, 0, 1, 16, 33, 77])
def test_tile_a_holds_all_content(n, content):
    content = None if content is None else min(content, n)
    for d in (8, 40, 160, 256):
        t = backend.choose_tiles(n, d, d, 2, content, 4096, 16, 132, False)
        assert t.NA + t.NB >= n and t.NA >= (content or 0)
        assert t.STREAM or (t.DA + t.DB >= d and t.VA + t.VB >= d)


def test_known_tiles():
    """The splits that DESIGN.md counted: 77 = 64 + 16 or 16 + 64, 40 = 32 + 16, 80 = 64 + 16."""
    t = backend.choose_tiles(77, 40, 80, 2, None, 4096, 16, 132, False)
    assert (t.NA, t.NB, t.DA, t.DB, t.VA, t.VB) == (64, 16, 32, 16, 64, 16)
    t = backend.choose_tiles(77, 40, 40, 2, 12, 4096, 16, 132, False)
    assert (t.NA, t.NB) == (16, 64)
