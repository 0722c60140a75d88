"""The Triton backend's Python side. Its kernels: tests/kernels/test_interpreted_*.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sdattn_fast import backend as package
from sdattn_fast.backend import KernelRefused
from sdattn_fast.backend import triton as backend
from sdattn_fast.backend.triton import arguments, gpu, tiles
from sdattn_fast.backend.triton.launch import launch, version
from sdattn_fast.plan import RowPlan, TokenSide, make_plan
from sdattn_fast.program import Program, SalienceDropout

SIDE = TokenSide(2, 2, 77, torch.device("cpu"))


@pytest.fixture
def cards(monkeypatch):
    """A machine with an A100, a T4 and a card of RDNA 3; the last is there as if torch were built for ROCm."""
    names = ["A100", "T4", "W7900"]
    capabilities = [(8, 0), (7, 5), (11, 0)]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: names[index])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])

    def properties(index):
        major, minor = capabilities[index]
        return SimpleNamespace(
            major=major, minor=minor, gcnArchName="gfx1100:sramecc-", multi_processor_count=index + 1
        )

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.version, "hip", None)
    for kept in (gpu._refusal_of_device, gpu._count_sms):
        kept.cache_clear()
    monkeypatch.setattr(package, "_unavailable", {})
    yield
    for kept in (gpu._refusal_of_device, gpu._count_sms):
        kept.cache_clear()


def test_availability_says_how_to_mend(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "TRITON_INTERPRET=1" in backend.availability()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.launch, "version", lambda: (3, 1))
    assert "triton 3.1 is older than 3.2" in backend.availability()
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in backend.availability()


def test_triton_may_be_installed_under_another_name(monkeypatch):
    """ROCm's wheels call it triton-rocm or pytorch-triton-rocm, nightly builds pytorch-triton."""
    monkeypatch.setattr("triton.__version__", "3.5.1+rocm7")
    version.cache_clear()
    assert version() == (3, 5)
    version.cache_clear()


def test_availability_is_a_devices(cards):
    """And what was found of one is not believed of another."""
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert package.unavailable("triton", first) is None
    assert "T4 is older than compute capability 8.0" in package.unavailable("triton", second)
    assert package.unavailable("triton") is None, "of the current device"
    assert [gpu.num_sms(torch.device("cuda", index)) for index in (0, 1)] == [1, 2]
    assert gpu.num_sms(torch.device("cuda")) == 1


def test_what_no_gpu_has_run_says_so(cards, monkeypatch):
    with pytest.warns(UserWarning, match="for sm_80 the kernels are compiled in the tests but not yet run"):
        assert package.backends()["triton"] is True
    monkeypatch.setattr(torch.version, "hip", "6.4")
    remark = package.remark("triton", torch.device("cuda", 2))
    assert "for gfx1100 the kernels are compiled in the tests but not yet run" in remark
    monkeypatch.setattr(gpu, "COMPILED_FOR", ())
    assert "not even compiled" in package.remark("triton", torch.device("cuda", 2))
    monkeypatch.setattr(gpu, "RUN_ON", ("gfx1100",))
    assert package.remark("triton", torch.device("cuda", 2)) is None


def test_a_launch_that_fails_is_a_refusal():
    class Kernel:
        __name__ = "rows_kernel"

        def __getitem__(self, grid):
            def launch(*arguments, **options):
                raise RuntimeError("Triton Error [CUDA]: too many resources requested for launch")

            return launch

    with pytest.raises(KernelRefused, match="'triton' could not launch rows_kernel: RuntimeError: Triton Error"):
        launch(Kernel(), 1, (), {})


def test_strides_of_dimensions_of_one_say_nothing():
    """An odd stride of a batch of one must not keep the compiler from wide loads."""
    x = torch.empty(1000).as_strided((1, 2, 5, 16), (777, 80, 16, 1))
    assert arguments.strides_of(x) == (0, 80, 16)
    assert arguments.in_units(*arguments.strides_of(x)) == (8, (0, 10, 2))
    assert arguments.in_units(3, 16) == (1, (3, 16))


def test_strides_beyond_32_bits_are_not_multiplied_in_32_bits():
    """In units of 8 such a stride would fit an int32, and the kernel's product with 8 would not."""
    assert arguments.in_units(2**31, 64) == (1, (2**31, 64))
    unit, strides = arguments.in_units(2**31 - 8, 64)
    assert (unit, strides) == (8, (2**28 - 1, 8))


def _reasons(query=None, key=None, value=None, bias=None, needs_grad=False):
    like = torch.empty(2, 2, 5, 16)
    query, key, value = (like if x is None else x for x in (query, key, value))
    return backend.not_supported_reasons(query, key, value, bias, make_plan(Program(), SIDE), needs_grad)


def test_an_interpreter_that_is_not_right_is_not_available(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for have, right in (((3, 2), False), ((3, 3), False), ((3, 4), True), ((4, 0), True)):
        monkeypatch.setattr(gpu.launch, "version", lambda have=have: have)
        reason = backend.availability()
        assert reason is None if right else f"the interpreter of triton {have[0]}.{have[1]} writes" in reason


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
    assert arguments.content_first(content).tolist() == [[1, 3, 0, 2], [0, 1, 2, 3]]


def test_map_slots():
    assert arguments.map_slots(torch.tensor([3, 0], dtype=torch.int32), 5).tolist() == [1, -1, -1, 0, -1]


def test_the_permutation_is_kept_with_its_plan_and_notices_writes():
    protected = torch.ones(2, 77, dtype=torch.bool)
    protected[:, 5] = False
    rows = make_plan(Program(SalienceDropout()), TokenSide(2, 2, 77, SIDE.device, protected=protected)).rows

    def order(rows: RowPlan):
        return rows.derive("order", rows.content, arguments.content_first)

    first = order(rows)
    assert order(rows) is first and first[0, 0] == 5
    rows.content.copy_(rows.content.roll(1, 1))
    assert order(rows)[0, 0] == 6


@pytest.mark.parametrize("size", range(257))
def test_tiles_hold_everything(size):
    low, high = tiles.split(size)
    assert low + high >= size and low >= 16 and (high == 0 or high >= 16)


@pytest.mark.parametrize("n", [1, 16, 17, 77, 154, 256])
@pytest.mark.parametrize("content", [None, 0, 1, 16, 33, 77])
def test_tile_a_holds_all_content(n, content):
    content = None if content is None else min(content, n)
    for d in (8, 40, 160, 256):
        t = tiles.choose_tiles(n, d, d, 2, content, 4096, 16, 132, False)
        assert t.NA + t.NB >= n and t.NA >= (content or 0)
        assert t.STREAM or (t.DA + t.DB >= d and t.VA + t.VB >= d)


def test_known_tiles():
    """docs/design.md, "Tile sizes on a GPU": 77 = 64 + 16 or 16 + 64, 40 = 32 + 16, 80 = 64 + 16."""
    t = tiles.choose_tiles(77, 40, 80, 2, None, 4096, 16, 132, False)
    assert (t.NA, t.NB, t.DA, t.DB, t.VA, t.VB) == (64, 16, 32, 16, 64, 16)
    t = tiles.choose_tiles(77, 40, 40, 2, 12, 4096, 16, 132, False)
    assert (t.NA, t.NB) == (16, 64)


@pytest.mark.parametrize(
    ("content", "pixels", "heads", "walk", "registers"),
    [
        (20, 4096, 16, 2, 128), (20, 4096, 20, 1, 128), (20, 1024, 40, 1, 128), (20, 4096, 128, 8, 128),
        (50, 4096, 16, 1, 168), (None, 4096, 16, 2, None), (None, 4096, 20, 2, None), (None, 4096, 128, 8, None),
    ],
)  # fmt: skip
def test_programs_fill_whole_rounds(content, pixels, heads, walk, registers):
    """On 132 multiprocessors of 65536 registers: four programs of 128 threads at 128 registers each, three at 168."""
    t = tiles.choose_tiles(77, 40, 40, 2, content, pixels, heads, 132, False, lean=True)
    assert (t.TILES, t.registers) == (walk, registers)
    assert tiles.choose_tiles(77, 40, 40, 2, content, pixels, heads, 132, False).registers is None
