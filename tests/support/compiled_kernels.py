"""Every Triton kernel, as its launcher would compile it, for every target; no GPU needed. Tiles are those of an H200.

`CASES` are calls of the launchers on empty tensors. tests/kernels/test_compile.py compiles them and holds them against
docs/kernels.json; benchmarks/kernel_table.py writes it.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import inspect
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import machine_code
import torch
import triton
from kernel_figures import Row, row
from machine_code import Code
from recorded_launches import on_an_h100
from sdattn_fast.kernels import (
    backward_kernel,
    folded_kernel,
    gaussian_kernel,
    picture_kernel,
    rows_kernel,
    shared_kernel,
    smooth_kernel,
    sum_kernel,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sdattn_fast import Capture, Program, Refinement, SalienceDropout
from sdattn_fast.backend.triton import folded_layers, gaussian, rows_backward, smoothing, spatial
from sdattn_fast.backend.triton import rows as rows_backend
from sdattn_fast.plan import TokenSide, make_plan

CUDA = {cc: GPUTarget("cuda", cc, 32) for cc in (80, 86, 89, 90, 100, 120)}
HIP = GPUTarget("hip", "gfx942", 64)
ALL = (*CUDA.values(), HIP)
POINTER = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64",
    torch.uint8: "*u8",
}  # fmt: skip
FULL = Program(SalienceDropout(0.2), Refinement(1, 0.3, 0.0), "content")


@dataclass(frozen=True)
class Call:
    """One launch. logits: that one program computes, 0 where only run time tells; turn: that one turn of its main loop
    does, 0 without; bytes: that must come and go a logit, queries and results alone."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    logits: int = 0
    turn: int = 0
    bytes: float = 0.0


@dataclass(frozen=True)
class Case:
    """most_stack: bytes of stack that are accepted; 0 is the rule."""

    kernel: str
    name: str
    target: GPUTarget
    make: Callable[[], Call]
    most_stack: int = 0

    @property
    def architecture(self) -> str:
        return f"sm_{self.target.arch}" if self.target.backend == "cuda" else str(self.target.arch)

    @property
    def title(self) -> str:
        return f"{self.kernel}: {self.name}" if self.name else self.kernel

    @property
    def label(self) -> str:
        return f"{self.architecture} {self.title}"

    def digest(self) -> str:
        """Of all that the machine code and its figures hang on: equal digests, equal rows of the table.

        The kernels' sources (without docstrings and comments), what they are compiled for, the compiler, and the code
        that reads the machine code.
        """
        call = self.call()
        source = _source(call)
        numbers = call.options, call.logits, call.turn, call.bytes
        parts = _code(), triton.__version__, self.target, self.kernel, source.signature, source.constants, source.attrs
        return hashlib.sha256("\n".join(map(str, (*parts, *numbers))).encode()).hexdigest()[:12]

    def call(self) -> Call:
        nvidia = self.target.backend == "cuda"
        with on_an_h100("tf32x3" if nvidia else "ieee", bounds_registers=nvidia and self.target.arch < 100):
            return self.make()


@contextlib.contextmanager
def compiling(cases: Iterable[Case]) -> Iterator[dict[str, Future[tuple[Code, Row]]]]:
    """Compiles the cases on all cores; {label: the kernel's machine code and its row of the table}.

    Triton's cache is empty, and nothing is left behind.
    """
    parse, lock = ast.parse, threading.Lock()

    def parse_alone(*args: Any, **kwargs: Any) -> Any:
        # CPython 3.11 counts its depth for all threads together: "AST constructor recursion depth mismatch".
        with lock:
            return parse(*args, **kwargs)

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict("os.environ", {"TRITON_CACHE_DIR": folder}),
        mock.patch.object(ast, "parse", parse_alone),
    ):
        calls = [(case, case.call()) for case in cases]
        pool = ThreadPoolExecutor(os.cpu_count())
        try:
            yield {case.label: pool.submit(_compiled, case, call) for case, call in calls}
        finally:
            pool.shutdown(cancel_futures=True)


def _compiled(case: Case, call: Call) -> tuple[Code, Row]:
    launch = {"num_warps": call.options["num_warps"], "num_stages": call.options.get("num_stages", 1)}
    launch["enable_fp_fusion"] = True
    if "maxnreg" in call.options:
        launch["maxnreg"] = call.options["maxnreg"]
    kernel = triton.compile(_source(call), target=case.target, options=launch)
    shared = kernel.metadata.shared
    if case.target.backend == "hip":
        code = machine_code.amdgcn(kernel.asm["amdgcn"], case.architecture, shared)
        return code, row(code)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        (code,) = machine_code.cubin(Path(file.name), shared)
    turns = machine_code.python_turns(call.options)
    lanes = 32 * kernel.metadata.num_warps
    loop = code.main_loop() if call.turn else None
    in_loop = code.slots(turns, loop) if loop else 0
    if not call.logits and loop:
        return code, row(code, in_loop, call.turn / lanes)
    of_loop = in_loop * lanes / call.turn if loop else 0.0
    return code, row(code, code.slots(turns), call.logits / lanes, of_loop, call.bytes)


_READERS = ("machine_code.py", "kernel_figures.py")


@functools.cache
def _code() -> str:
    """The kernels, and what makes figures of machine code, without docstrings and comments."""
    here = Path(__file__)
    files = [*sorted(here.parents[2].glob("kernels/*.py")), *(here.with_name(name) for name in _READERS)]
    modules = []
    for file in files:
        module = ast.parse(file.read_text())
        for node in ast.walk(module):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
                del node.body[0]
        modules.append(ast.unparse(module))
    return "\n".join([*modules, inspect.getsource(_compiled), inspect.getsource(_source)])


def _source(call: Call) -> ASTSource:
    """What the launcher would compile: integers that are 1 are constants, multiples of 16 are known to be."""
    names, arguments = call.kernel.arg_names, call.arguments
    values = dict(zip(names, arguments, strict=False)) | {k: v for k, v in call.options.items() if k in names}
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
    return ASTSource(call.kernel, signature, constants, attributes)


# The calls.


def rows_call(
    dtype=torch.float16, m=4096, n=77, d=40, content=12, program=FULL, words=True, capture=None, random=False,
    bits=False, bias=False,
) -> Call:  # fmt: skip
    """The rows kernel for 2 entries of 8 heads; content None: plain attention; words: with a gate and phrases."""
    q, k, v = (torch.empty(2, s, 8, d, dtype=dtype).transpose(1, 2) for s in (m, n, n))
    side = {}
    if content is not None:
        protected = torch.ones(2, n, dtype=torch.bool)
        protected[:, :content] = False
        side = {"protected": protected, "seed": torch.zeros(2, dtype=torch.int64)}
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
    _, arguments, options = rows_backend.rows_call(q, k, v, row, d**-0.5, plan.rows, out, maps, words_of_bits)
    heads = options["H"] if options["MEAN"] else 1
    logits = options["BM"] * n * options["TILES"] * heads
    return Call(rows_kernel, arguments, options, logits, options["BM"] * n, 2 * d * dtype.itemsize / n)


def folded_call(m, c, h=8, n=77, d=None, content=12, dtype=torch.float16) -> Call:
    """The folded layer's kernel for 2 entries of h heads; d: of keys that `to_q` is not folded into."""
    x = torch.empty(2, m, c, dtype=dtype) if d is None else torch.empty(2, m, h, d, dtype=dtype).transpose(1, 2)
    key, value = torch.empty(2, h, n, c if d is None else d, dtype=dtype), torch.empty(2, h, n, c, dtype=dtype)
    side = {}
    if content is not None:
        protected = torch.ones(2, n, dtype=torch.bool)
        protected[:, :content] = False
        side = {"protected": protected, "gate": torch.ones(2, 1, n), "phrases": torch.zeros(2, n, dtype=torch.int64)}
    plan = make_plan(Program() if content is None else FULL, TokenSide(2, h, n, x.device, **side))
    packed = folded_layers.pack(key, value, plan.rows)
    p = torch.empty(folded_layers.block_shape(packed, True, m), dtype=dtype)
    _, arguments, options = folded_layers.folded_call(x, packed, None, 0.1, plan.rows, p, 0, m, True)
    # Heads that share their rows find them in the L2 cache.
    moved = (options["NP"] + (c / h if d is None else d)) * dtype.itemsize
    return Call(folded_kernel, arguments, options, options["BM"] * n, bytes=moved / n)


def smooth_call() -> Call:
    x = torch.empty(2, 4096, 8, 40, dtype=torch.bfloat16).transpose(1, 2)
    where = torch.empty(2, 8, dtype=torch.uint8)
    _, arguments, options = smoothing.smooth_call(x, torch.empty(x.shape), where, (64, 64), 0.8, down=True)
    return Call(smooth_kernel, arguments, options)


STAGES = {
    "anew": (Program(SalienceDropout(0.2, "space"), Refinement(1, 0.3, 0.0, "space"), "row"), {}),
    "begin": (Program(SalienceDropout(0.2), Refinement(2, 0.3, 0.8), "content"), {}),
    "count": (Program(SalienceDropout(0.2, "space"), Refinement(2, 0.3, 0.8)), {"shift": 10, "bits": 10}),
    "highest": (Program(None, Refinement(2, 0.3, 0.8, "space")), {}),
    "round": (Program(None, Refinement(2, 0.3, 0.8), "content"), {"first": False}),
    "last": (Program(None, Refinement(2, 0.3, 0.8), "row"), {"first": False}),
}


def picture_call(stage, dtype) -> Call:
    program, how = STAGES[stage]
    b, h, m, n, d = 2, 8, 4096, 77, 40
    q, k, v = (torch.empty(b, s, h, d, dtype=dtype).transpose(1, 2) for s in (m, n, n))
    protected = torch.ones(b, n, dtype=torch.bool)
    protected[:, :12] = False
    side = {"gate": torch.ones(b, 1, n), "phrases": torch.zeros(b, n, dtype=torch.int64), "protected": protected}
    plan = make_plan(program, TokenSide(b, h, n, q.device, **side, active=torch.tensor([True, False])))
    ints = torch.empty(b, h, n, dtype=torch.int32)
    drops, anew = plan.picture.drop_ratio >= 0, stage == "anew"
    p, mass = (None, None) if anew else (torch.empty(b, h, m, n), torch.empty(b, h, m))
    out = torch.empty(b, h, m, d, dtype=dtype)
    _, arguments, options = spatial.picture_call(
        q, k, v, None, d**-0.5, plan.rows, plan.picture, out, None, ints if drops else None, ints if drops else None,
        ints if plan.picture.nms else None, "last" if anew else stage, p, mass, **how,
    )  # fmt: skip
    return Call(picture_kernel, arguments, options, options["BM"] * n)


def largest_picture_call(dtype) -> Call:
    q, k = torch.empty(1, 1, 4096, 256, dtype=dtype), torch.empty(1, 1, 256, 256, dtype=dtype)
    plan = make_plan(STAGES["anew"][0], TokenSide(1, 1, 256, q.device))
    ints = torch.empty(1, 1, 256, dtype=torch.int32)
    _, arguments, options = spatial.picture_call(
        q, k, k, None, 1 / 16, plan.rows, plan.picture, q, None, ints, ints, ints, "last", None, None
    )
    return Call(picture_kernel, arguments, options, options["BM"] * 256)


def gaussian_call(labels) -> Call:
    values = torch.empty(76800, labels)
    _, arguments, options = gaussian.gaussian_call(torch.empty(76800, 5), values, values)
    return Call(gaussian_kernel, arguments, options, turn=options["BM"] * options["BN"])


def gradients(dtype=torch.float16, m=4096, n=77, d=40, content=12, program=FULL, gates=False):
    """A call for 2 entries of 8 heads with a gate and phrases, and the gradients of query, key and value."""
    q, k, v = (torch.empty(2, s, 8, d, dtype=dtype).transpose(1, 2) for s in (m, n, n))
    side = {"seed": torch.zeros(2, dtype=torch.int64)}
    if content is not None:
        protected = torch.ones(2, n, dtype=torch.bool)
        protected[:, :content] = False
        side |= {"protected": protected, "phrases": torch.zeros(2, n, dtype=torch.int64)}
        side |= {"gate": torch.ones(2, 1, n)} if gates else {}
    plan = make_plan(Program() if content is None else program, TokenSide(2, 8, n, q.device, **side))
    bits = torch.empty(2, 8, m, (n + 31) // 32, dtype=torch.int32) if plan.rows.decides else None
    call = rows_backward._Call(q, k, v, None, d**-0.5, plan.rows, bits, torch.empty_like(q), None)
    return call, [torch.empty_like(x) for x in (q, k, v)]


def backward_call(**how) -> Call:
    call, (of_query, of_key, of_value) = gradients(**how)
    tiles = rows_backward._tiles(call, True, True)
    b, h, _, n, d, dv = call.sizes
    sums = torch.empty(b, h, tiles.groups, n, d + dv)
    gates = torch.empty(b, h, tiles.groups, n) if how.get("gates") else None
    _, arguments, options = rows_backward.backward_call(call, tiles, of_query, of_key, of_value, sums, gates, None)
    # Programs that share a row's channels compute its logits each.
    logits = options["BM"] * n * options["TILES"] // options["SLICES"]
    moved = (2 * d + dv) * of_query.dtype.itemsize + (0 if call.bits is None else 4 * call.bits.shape[3])
    return Call(backward_kernel, arguments, options, logits, options["BM"] * n // options["SLICES"], moved / n)


def shared_call(what) -> Call:
    call, _ = gradients()
    relevance, tokens = (
        (torch.empty(2, 3, 4096), torch.zeros(3, dtype=torch.int32)) if what == "relevance" else (None, None)
    )
    of_rows = torch.empty(1, 1, 4096, 77) if what == "bias" else None
    _, arguments, options = rows_backward.shared_call(call, of_rows, relevance, tokens, None)
    return Call(shared_kernel, arguments, options, options["BM"] * 77 * options["ENTRIES"] * options["HEADS"])


def sum_call() -> Call:
    of_key = torch.empty(2, 77, 8, 40, dtype=torch.bfloat16).transpose(1, 2)
    _, arguments, options = rows_backward.sum_call(torch.empty(2, 8, 64, 77, 80), of_key, of_key)
    return Call(sum_kernel, arguments, options)


# What is compiled for which target: the whole matrix for sm_90, what differs between targets for the others.

ROWS = {
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
WIDEST = ("full", "full, D=64, bf16", "full, D=160", "full, fp32")
ROWS_FOR = {
    90: tuple(ROWS), 80: WIDEST, 100: WIDEST, 120: WIDEST,
    86: ("full, D=64, bf16",), 89: ("full, D=64, bf16",),  # sm_80's instructions, less shared memory
    "gfx942": ("plain", *WIDEST, "capture of the mean"),
}  # fmt: skip
FOLDED = {
    "SD 1.5 at 32x32": dict(m=1024, c=640),
    "SD 1.5 at 16x16": dict(m=256, c=1280),
    "SDXL at 32x32, bf16": dict(m=1024, c=1280, h=20, dtype=torch.bfloat16),
    "to_out alone": dict(m=1024, c=640, d=80),
    "plain": dict(m=1024, c=640, content=None),
    "all content": dict(m=1024, c=640, content=77),
    "154 tokens": dict(m=256, c=1280, n=154),
}
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
BACKWARD_FOR = {90: tuple(BACKWARD), 86: ("full",), 89: ("full",)}
TYPES = {"fp16": torch.float16, "fp32": torch.float32}


def _cases() -> Iterator[Case]:
    for target in ALL:
        arch = target.arch
        for name in ROWS_FOR[arch]:
            # Where registers are bounded a few go to the stack, which is measured to be faster than a program less.
            yield Case("rows", name, target, lambda name=name: rows_call(**ROWS[name]), 8)
        for name in FOLDED if arch == 90 else ("SDXL at 32x32, bf16",):
            yield Case("folded", name, target, lambda name=name: folded_call(**FOLDED[name]))
        yield Case("smooth", "", target, smooth_call)
        for stage in STAGES if arch == 90 else ("anew", "last"):
            for name, dtype in TYPES.items():
                make = lambda stage=stage, dtype=dtype: picture_call(stage, dtype)  # noqa: E731
                yield Case("picture", f"{stage}, {name}", target, make)
        for labels in (5, 32):
            yield Case("CRF", f"{labels} labels", target, lambda labels=labels: gaussian_call(labels))
        for name in BACKWARD_FOR.get(arch, ("full, D=64, bf16", "full, fp32")):
            # Tiles are chosen for sm_90. Others spill a little: float32 where three TF32 products take more registers,
            # and AMD.
            most = 320 if "fp32" in name and arch in (80, 120) else 512 if target is HIP else 0
            yield Case("backward", name, target, lambda name=name: backward_call(**BACKWARD[name]), most)
        for what in ("relevance", "bias"):
            if what == "relevance" or arch in (86, 90, "gfx942"):
                yield Case("backward, shared", what, target, lambda what=what: shared_call(what))
        yield Case("backward, sums", "", target, sum_call)
        if arch in (86, 90, "gfx942"):
            # Here some spilling is accepted; shared memory must fit.
            for name, dtype in TYPES.items():
                largest = lambda dtype=dtype: rows_call(dtype=dtype, n=256, d=256, content=40)  # noqa: E731
                yield Case("rows", f"N = D = 256, {name}", target, largest, 1024)
                picture = lambda dtype=dtype: largest_picture_call(dtype)  # noqa: E731
                yield Case("picture", f"N = D = 256, {name}", target, picture, 1024)


CASES = {case.label: case for case in _cases()}
