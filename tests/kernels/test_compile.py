"""Every kernel compiled for every target, with the very arguments it is launched with; no GPU needed.

Registers, stack, spills and shared memory come from cuobjdump in triton's wheel, for NVIDIA; from the assembly for AMD.
`pytest -s` prints them.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from sdattn_fast.kernels import (  # noqa: E402
    backward_kernel,
    folded_kernel,
    gaussian_kernel,
    picture_kernel,
    rows_kernel,
    shared_kernel,
    smooth_kernel,
    sum_kernel,
)
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from sdattn_fast import Capture, Program, Refinement, SalienceDropout  # noqa: E402
from sdattn_fast.backend import triton as backend  # noqa: E402
from sdattn_fast.backend import triton_backward  # noqa: E402
from sdattn_fast.plan import TokenSide, make_plan  # noqa: E402

CUDA = {cc: GPUTarget("cuda", cc, 32) for cc in (80, 86, 89, 90, 100, 120)}
HIP = GPUTarget("hip", "gfx942", 64)
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, "gfx942": 64}  # KiB a block may have
POINTER = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64",
    torch.uint8: "*u8",
}  # fmt: skip
FULL = Program(SalienceDropout(0.2), Refinement(1, 0.3, 0.0), "content")


@pytest.fixture(autouse=True)
def _of_this_test(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    # Tiles and precision as on an H200.
    monkeypatch.setattr(backend, "_processors", lambda device: 132)


def source_of(kernel, arguments, options):
    """What the launcher would compile: integers that are 1 are constants, multiples of 16 are known to be."""
    names = kernel.arg_names
    values = dict(zip(names, arguments, strict=False)) | {k: v for k, v in options.items() if k in names}
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(names):
        x = values[name]
        if isinstance(x, torch.Tensor):
            signature[name], attributes[(i,)] = POINTER[x.dtype], [["tt.divisibility", 16]]
        elif i >= len(arguments) or x is None or (isinstance(x, int) and x == 1):
            signature[name], constants[name] = "constexpr", x
        elif isinstance(x, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if x % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def rows_source(
    monkeypatch, target, dtype=torch.float16, m=4096, n=77, d=40, content=12, program=FULL, words=True, capture=None,
    random=False, bits=False, bias=False,
):  # fmt: skip
    """The rows kernel for 2 entries of 8 heads; content None: plain attention; words: with a gate and phrases."""
    monkeypatch.setattr(backend, "_precision", lambda device: "tf32x3" if target.backend == "cuda" else "ieee")
    q, k, v = (torch.empty(2, s, 8, d, dtype=dtype).transpose(1, 2) for s in (m, n, n))
    side = {}
    if content is not None:
        protected = torch.ones(2, n, dtype=torch.bool)
        protected[:, :content] = False
        side = {"protected": protected, "seed": torch.zeros(1, dtype=torch.int64)}
        if words:
            side |= {"gate": torch.ones(2, 1, n), "phrases": torch.zeros(2, n, dtype=torch.int64)}
    plan = make_plan(Program() if content is None else program, TokenSide(2, 8, n, q.device, **side), capture)
    maps = None
    if capture is not None:
        count = len(capture.tokens)
        maps = torch.empty((2, count, m) if capture.reduce == "mean" else (2, 8, count, m))
    words_of_bits = torch.empty(2, 8, m, (n + 31) // 32, dtype=torch.int32) if bits else None
    row = torch.zeros(2, 1, 1, n, dtype=dtype) if bias else None
    out = torch.empty(2, 8, m, d, dtype=dtype)
    _, arguments, options = backend.rows_call(q, k, v, row, d**-0.5, plan.rows, out, maps, words_of_bits)
    return source_of(rows_kernel, arguments, options), options


def compiled(source, target, options):
    launch = {"num_warps": options["num_warps"], "num_stages": options.get("num_stages", 1)}
    return triton.compile(source, target=target, options=launch)


def usage(kernel, target, tmp_path):
    """(registers, bytes of stack a thread, bytes of shared memory); spills are in the stack."""
    if target.backend == "hip":
        found = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size): *(\d+)", kernel.asm["amdgcn"]))
        return int(found["vgpr_count"]), int(found["private_segment_fixed_size"]), kernel.metadata.shared
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    printed = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", printed).groups())
    return registers, stack + local, kernel.metadata.shared


def check(source, options, target, tmp_path, label, most_stack=0):
    registers, stack, shared = usage(compiled(source, target, options), target, tmp_path)
    print(f"{target.arch}: {label}: {registers} registers, {stack} bytes of stack, {shared / 1024:.1f} KiB shared")
    assert stack <= most_stack, f"{stack} bytes of stack: the kernel spills"
    assert shared <= SHARED[target.arch] * 1024


# The whole matrix on sm_90, what differs between targets (dtypes, the widest shapes) on the others.

MATRIX = {
    "plain": dict(content=None),
    "plain, D=160": dict(content=None, d=160, m=256),
    "full": dict(),
    "full, D=64, bf16": dict(d=64, dtype=torch.bfloat16),
    "full, D=80": dict(d=80, m=1024),
    "full, D=160": dict(d=160, m=256, dtype=torch.bfloat16),
    "full, 30 content": dict(content=30),
    "full, all content": dict(content=77),
    "full, fp32": dict(dtype=torch.float32),
    "no words": dict(words=False),
    "row, random": dict(program=Program(SalienceDropout(0.2, mode="random"), renormalize="row")),
    "bias and bits": dict(bias=True, bits=True),
    "capture of the mean": dict(capture=Capture((3, 5))),
    "capture of each head": dict(capture=Capture((3, 5), "softmax", "none"), d=64),
}


@pytest.mark.parametrize("name", MATRIX)
def test_rows_for_sm90(name, monkeypatch, tmp_path):
    source, options = rows_source(monkeypatch, CUDA[90], **MATRIX[name])
    check(source, options, CUDA[90], tmp_path, name)


OTHERS = [(cc, name) for cc in (80, 100, 120) for name in ("full", "full, D=64, bf16", "full, D=160", "full, fp32")]
OTHERS += [(86, "full, D=64, bf16"), (89, "full, D=64, bf16")]  # sm_80's instructions, less shared memory


@pytest.mark.parametrize("cc,name", OTHERS)
def test_rows_for_nvidia(cc, name, monkeypatch, tmp_path):
    source, options = rows_source(monkeypatch, CUDA[cc], **MATRIX[name])
    check(source, options, CUDA[cc], tmp_path, name)


AMD = ["plain", "full", "full, D=64, bf16", "full, D=160", "full, fp32", "capture of the mean"]


@pytest.mark.parametrize("name", AMD)
def test_rows_for_amd(name, monkeypatch, tmp_path):
    source, options = rows_source(monkeypatch, HIP, **MATRIX[name])
    check(source, options, HIP, tmp_path, name)


@pytest.mark.parametrize("target", [CUDA[86], CUDA[90], HIP], ids=lambda t: str(t.arch))
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_rows_of_the_largest_shape_fit(target, dtype, monkeypatch, tmp_path):
    source, options = rows_source(monkeypatch, target, dtype=dtype, n=256, d=256, content=40)
    # Here some spilling is accepted; shared memory must fit.
    check(source, options, target, tmp_path, f"N = D = 256, {dtype}", most_stack=1024)


FOLDED = {
    "SD 1.5 at 32x32": dict(m=1024, c=640),
    "SD 1.5 at 16x16": dict(m=256, c=1280),
    "SDXL at 32x32, bf16": dict(m=1024, c=1280, h=20, dtype=torch.bfloat16),
    "to_out alone": dict(m=1024, c=640, d=80),
    "plain": dict(m=1024, c=640, content=None),
    "all content": dict(m=1024, c=640, content=77),
    "154 tokens": dict(m=256, c=1280, n=154),
}


def folded_source(m, c, h=8, n=77, d=None, content=12, dtype=torch.float16):
    """The folded layer's kernel for 2 entries of h heads; d: of keys that `to_q` is not folded into."""
    x = torch.empty(2, m, c, dtype=dtype) if d is None else torch.empty(2, m, h, d, dtype=dtype).transpose(1, 2)
    key, value = torch.empty(2, h, n, c if d is None else d, dtype=dtype), torch.empty(2, h, n, c, dtype=dtype)
    side = {}
    if content is not None:
        protected = torch.ones(2, n, dtype=torch.bool)
        protected[:, :content] = False
        side = {"protected": protected, "gate": torch.ones(2, 1, n), "phrases": torch.zeros(2, n, dtype=torch.int64)}
    plan = make_plan(Program() if content is None else FULL, TokenSide(2, h, n, x.device, **side))
    packed = backend.pack(key, value, plan.rows)
    p = torch.empty(backend._block_shape(packed, True, m), dtype=dtype)
    _, arguments, options = backend.folded_call(x, packed, None, 0.1, plan.rows, p, 0, m, True)
    return source_of(folded_kernel, arguments, options), options


@pytest.mark.parametrize("name", FOLDED)
def test_folded_for_sm90(name, tmp_path):
    source, options = folded_source(**FOLDED[name])
    check(source, options, CUDA[90], tmp_path, f"folded, {name}")


@pytest.mark.parametrize("target", [*(CUDA[cc] for cc in (80, 86, 89, 100, 120)), HIP], ids=lambda t: str(t.arch))
def test_folded(target, tmp_path):
    source, options = folded_source(**FOLDED["SDXL at 32x32, bf16"])
    check(source, options, target, tmp_path, "folded")


@pytest.mark.parametrize("target", [*CUDA.values(), HIP], ids=lambda t: str(t.arch))
def test_smooth(target, tmp_path):
    x, y = torch.empty(1, dtype=torch.bfloat16), torch.empty(1)
    arguments = (x, y, torch.empty(1, dtype=torch.uint8), 0.8, 64, 64, 64 * 64 * 320, 40, 320, 1, 8, 128)
    options = dict(C=40, RADIUS=3, DOWN=True, BP=16, BC=64, num_warps=4)
    check(source_of(smooth_kernel, arguments, options), options, target, tmp_path, "smooth")


STAGES = {
    "begin": (Program(SalienceDropout(0.2), Refinement(2, 0.3, 0.8), "content"), {}),
    "count": (Program(SalienceDropout(0.2, "space")), {"shift": 10, "bits": 10, "first": False}),
    "highest": (Program(None, Refinement(1, 0.3, 0.0, "space")), {}),
    "round": (Program(None, Refinement(2, 0.3, 0.8), "content"), {"first": False}),
    "last": (Program(SalienceDropout(0.2, "space"), Refinement(1, 0.3, 0.0, "space"), "row"), {}),
}
PICTURE_TARGETS = [(CUDA[90], s) for s in STAGES]
PICTURE_TARGETS += [
    (t, s) for t in (CUDA[80], CUDA[86], CUDA[89], CUDA[100], CUDA[120], HIP) for s in ("count", "last")
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("target, stage", PICTURE_TARGETS, ids=lambda x: getattr(x, "arch", x))
def test_picture(target, stage, dtype, monkeypatch, tmp_path):
    monkeypatch.setattr(backend, "_precision", lambda device: "tf32x3" if target.backend == "cuda" else "ieee")
    program, how = STAGES[stage]
    b, h, m, n, d = 2, 8, 4096, 77, 40
    q, k, v = (torch.empty(b, s, h, d, dtype=dtype).transpose(1, 2) for s in (m, n, n))
    protected = torch.ones(b, n, dtype=torch.bool)
    protected[:, :12] = False
    side = {"gate": torch.ones(b, 1, n), "phrases": torch.zeros(b, n, dtype=torch.int64), "protected": protected}
    plan = make_plan(program, TokenSide(b, h, n, q.device, **side, active=torch.tensor([True, False])))
    ints = torch.empty(b, h, n, dtype=torch.int32)
    p = mass = None
    if plan.picture.steps > 1:
        p, mass = torch.empty(b, h, m, n), torch.empty(b, h, m)
    more = {"count": {"histogram": ints, "found": ints}, "highest": {"highest": ints}}.get(stage, {})
    if plan.picture.nms:
        more["highest"] = ints
    if stage == "last":
        more["kth"] = torch.empty(b, h, n)
    out = torch.empty(b, h, m, d, dtype=dtype)
    _, arguments, options = backend.picture_call(
        q, k, v, None, d**-0.5, plan.rows, plan.picture, out, None, stage, p, mass, **how, **more
    )
    check(source_of(picture_kernel, arguments, options), options, target, tmp_path, stage)


@pytest.mark.parametrize("target", [CUDA[86], CUDA[90], HIP], ids=lambda t: str(t.arch))
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_picture_of_the_largest_shape_fits(target, dtype, monkeypatch, tmp_path):
    monkeypatch.setattr(backend, "_precision", lambda device: "tf32x3" if target.backend == "cuda" else "ieee")
    q, k = torch.empty(1, 1, 4096, 256, dtype=dtype), torch.empty(1, 1, 256, 256, dtype=dtype)
    plan = make_plan(STAGES["last"][0], TokenSide(1, 1, 256, q.device))
    ints, kth = torch.empty(1, 1, 256, dtype=torch.int32), torch.empty(1, 1, 256)
    _, arguments, options = backend.picture_call(
        q, k, k, None, 1 / 16, plan.rows, plan.picture, q, None, "last", None, None, highest=ints, kth=kth
    )
    check(source_of(picture_kernel, arguments, options), options, target, tmp_path, "N = D = 256", most_stack=1024)


@pytest.mark.parametrize("target", [*CUDA.values(), HIP], ids=lambda t: str(t.arch))
@pytest.mark.parametrize("labels", [5, 32])
def test_gaussian(target, labels, monkeypatch, tmp_path):
    monkeypatch.setattr(backend, "_precision", lambda device: "tf32x3" if target.backend == "cuda" else "ieee")
    values = torch.empty(76800, labels)
    _, arguments, options = backend.gaussian_call(torch.empty(76800, 5), values, values)
    check(source_of(gaussian_kernel, arguments, options), options, target, tmp_path, f"CRF, {labels} labels")


# The backward pass.


def backward_call(monkeypatch, target, dtype=torch.float16, m=4096, n=77, d=40, content=12, program=FULL, gates=False):
    """A call for 2 entries of 8 heads with a gate and phrases, and the gradients of query, key and value."""
    monkeypatch.setattr(backend, "_precision", lambda device: "tf32x3" if target.backend == "cuda" else "ieee")
    q, k, v = (torch.empty(2, s, 8, d, dtype=dtype).transpose(1, 2) for s in (m, n, n))
    side = {"seed": torch.zeros(1, dtype=torch.int64)}
    if content is not None:
        protected = torch.ones(2, n, dtype=torch.bool)
        protected[:, :content] = False
        side |= {"protected": protected, "phrases": torch.zeros(2, n, dtype=torch.int64)}
        side |= {"gate": torch.ones(2, 1, n)} if gates else {}
    plan = make_plan(Program() if content is None else program, TokenSide(2, 8, n, q.device, **side))
    bits = torch.empty(2, 8, m, (n + 31) // 32, dtype=torch.int32) if plan.rows.decides else None
    call = triton_backward._Call(q, k, v, None, d**-0.5, plan.rows, bits, torch.empty_like(q), None)
    return call, [torch.empty_like(x) for x in (q, k, v)]


BACKWARD = {
    "plain": dict(content=None),
    "full": dict(),
    "full and the gate's": dict(gates=True),
    "full, D=64, bf16": dict(d=64, dtype=torch.bfloat16),
    "full, D=80": dict(d=80, m=1024),
    "full, D=160": dict(d=160, m=256, dtype=torch.bfloat16),
    "full, all content": dict(content=77),
    "full, fp32": dict(dtype=torch.float32),
    "row": dict(program=Program(SalienceDropout(0.2, mode="random"), renormalize="row")),
}
BACKWARD_TARGETS = [(CUDA[90], name) for name in BACKWARD]
BACKWARD_TARGETS += [
    (t, name) for t in (CUDA[80], CUDA[100], CUDA[120], HIP) for name in ("full, D=64, bf16", "full, fp32")
]
BACKWARD_TARGETS += [(CUDA[86], "full"), (CUDA[89], "full")]


@pytest.mark.parametrize("target, name", BACKWARD_TARGETS, ids=lambda x: str(getattr(x, "arch", x)))
def test_backward(target, name, monkeypatch, tmp_path):
    call, (of_query, of_key, of_value) = backward_call(monkeypatch, target, **BACKWARD[name])
    tiles = triton_backward._tiles(call, True, True)
    b, h, _, n, d, dv = call.sizes
    sums = torch.empty(b, h, tiles.groups, n, d + dv)
    gates = torch.empty(b, h, tiles.groups, n) if BACKWARD[name].get("gates") else None
    _, arguments, options = triton_backward.backward_call(call, tiles, of_query, of_key, of_value, sums, gates, None)
    # Tiles are chosen for sm_90. Others spill a little: float32 where three TF32 products take more registers, and AMD.
    most = 320 if "fp32" in name and target.arch in (80, 120) else 512 if target is HIP else 0
    check(source_of(backward_kernel, arguments, options), options, target, tmp_path, f"backward, {name}", most)


@pytest.mark.parametrize("target", [CUDA[86], CUDA[90], HIP], ids=lambda t: str(t.arch))
@pytest.mark.parametrize("what", ["relevance", "bias"])
def test_what_rows_share(target, what, monkeypatch, tmp_path):
    call, _ = backward_call(monkeypatch, target)
    relevance, tokens = (
        (torch.empty(2, 3, 4096), torch.zeros(3, dtype=torch.int32)) if what == "relevance" else (None, None)
    )
    of_rows = torch.empty(1, 1, 4096, 77) if what == "bias" else None
    _, arguments, options = triton_backward.shared_call(call, of_rows, relevance, tokens, None)
    check(source_of(shared_kernel, arguments, options), options, target, tmp_path, what)


@pytest.mark.parametrize("target", [CUDA[80], CUDA[90], HIP], ids=lambda t: str(t.arch))
def test_sums(target, tmp_path):
    of_key = torch.empty(2, 77, 8, 40, dtype=torch.bfloat16).transpose(1, 2)
    _, arguments, options = triton_backward.sum_call(torch.empty(2, 8, 64, 77, 80), of_key, of_key)
    check(source_of(sum_kernel, arguments, options), options, target, tmp_path, "sums")
