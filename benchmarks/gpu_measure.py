"""Times at the cross-attention shapes of one model, on the current GPU; rows are appended to <results>/<device>.csv.

Our backends, "triton-full" and "cuda-full" and so on; every backend of scaled_dot_product_attention; FlexAttention (the
gate alone: it can do no more); the definition under torch.compile. Contestants take turns, so that a clock that changes
changes for all. Two times each: "call", from Python, launch overhead included, and "graph", a CUDA graph's replay, the
GPU's own time; and "both ways", a call and its backward pass from Python, of SDPA, of our full program (in Triton: CUDA
has no backward kernels) and of the compiled definition. of_sdpa: of what torch chooses by itself; of_best_sdpa: of the
fastest of its backends in the same run. Before a shape is timed, what we compute there is compared with the definition;
a shape that disagrees is not timed and ends the run. What is not there is a row "not timed", with the reason.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdattn_fast import Program, Refinement, SalienceDropout, backends
from sdattn_fast.cli.registry import UNET_LAYERS, Layer
from sdattn_fast.functional import prepare

OURS = ("triton", "cuda")
TOKENS, CONTENT = 77, 20
FULL = Program(SalienceDropout(0.2), Refinement(1, 0.3, 0.0), "content")
SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
COLUMNS = (
    "date", "device", "torch", "triton", "cuda", "python", "commit", "model", "batch", "heads", "pixels", "head_dim",
    "tokens", "content", "dtype", "contestant", "how", "median_us", "p20_us", "p80_us", "of_sdpa", "of_best_sdpa",
    "of_roofline", "note",
)  # fmt: skip

Call = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(UNET_LAYERS), required=True)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--commit", default="unknown")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: not measured")
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copies {bandwidth / 1e12:.2f} TB/s (read and written)")
    with torch.no_grad():
        for layer in UNET_LAYERS[options.model]:
            write(options, layer, measure(layer, options.batch, getattr(torch, options.dtype), bandwidth))


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy on the device: the roofline that times are held against."""
    x = torch.empty(2**28, device="cuda")
    y = torch.empty_like(x)
    seconds = in_turn({"copy": lambda: y.copy_(x)}, rounds=20, inner=1)["copy"]
    return 2 * x.numel() * x.element_size() / statistics.median(seconds)


def measure(layer: Layer, batch: int, dtype: torch.dtype, bandwidth: float) -> list[dict[str, object]]:
    """One row per contestant and way of timing at one shape."""
    calls, notes = contestants(layer, batch, dtype)
    graphs = {}
    for name, call in calls.items():
        try:
            graphs[name] = graph_of(call)
        except Exception as error:
            torch.cuda.synchronize()
            notes[f"{name}/graph"] = said(error)
    rows = []
    least = bytes_moved(layer, batch, dtype) / bandwidth
    for how, timed in (("call", calls), ("graph", graphs)):
        inner = 20 if how == "call" else 1
        taken = in_turn(timed, rounds=25, inner=inner)
        if how == "graph":
            taken = {name: [t / GRAPH for t in times] for name, times in taken.items()}
        rows += figures(taken, how, least)
    rows += figures(in_turn(both_ways(layer, batch, dtype), rounds=15, inner=5), "both ways")
    for name, note in notes.items():
        rows.append({"contestant": name, "how": "not timed", "note": note})
    return rows


def figures(taken: dict[str, list[float]], how: str, least: float | None = None) -> list[dict[str, object]]:
    """Seconds a call, by contestant, as rows. least: seconds, what memory would allow, of which each is a share."""
    medians = {name: statistics.median(times) for name, times in taken.items()}
    of_sdpa = [median for name, median in medians.items() if name.split("-")[0] == "sdpa"]
    rows: list[dict[str, object]] = []
    for name, times in taken.items():
        low, *_, high = statistics.quantiles(times, n=5)
        row = {"median_us": 1e6 * medians[name], "p20_us": 1e6 * low, "p80_us": 1e6 * high}
        shares = {}
        if "sdpa" in medians:
            shares["of_sdpa"] = medians[name] / medians["sdpa"]
        if of_sdpa:
            shares["of_best_sdpa"] = medians[name] / min(of_sdpa)
        if least is not None:
            shares["of_roofline"] = least / medians[name]
        printed = {c: f"{x:.2f}" for c, x in row.items()} | {c: f"{x:.3f}" for c, x in shares.items()}
        rows.append({"contestant": name, "how": how, **printed})
    return rows


@torch.enable_grad()
def both_ways(layer: Layer, batch: int, dtype: torch.dtype) -> dict[str, Call]:
    """Forward and backward, the gradients of query, key and value."""
    h, d = layer.heads, layer.head_dim
    inputs = [
        torch.randn(batch, s, h, d, device="cuda", dtype=dtype).transpose(1, 2).requires_grad_()
        for s in (layer.pixels, TOKENS, TOKENS)
    ]
    grad = torch.randn(batch, layer.pixels, h, d, device="cuda", dtype=dtype).transpose(1, 2)
    protected = torch.ones(batch, TOKENS, dtype=torch.bool, device="cuda")
    protected[:, 1 : 1 + CONTENT] = False
    side = {"batch": batch, "heads_count": h, "tokens": TOKENS, "device": grad.device, "protected": protected}

    def differentiated(function: Callable[..., torch.Tensor]) -> Call:
        @torch.enable_grad()
        def call() -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(function(*inputs), inputs, grad)

        return call

    ours = prepare(FULL, **side, backend="triton")
    definition = prepare(FULL, **side, backend="reference")
    calls = {
        "sdpa": differentiated(F.scaled_dot_product_attention),
        "triton-full": differentiated(lambda *x: ours(*x)[0]),
        "reference-compiled": differentiated(torch.compile(lambda *x: definition(*x)[0], dynamic=False)),
    }
    exact = differentiated(lambda *x: definition(*x)[0])()
    for name, mine, true in zip(("query", "key", "value"), calls["triton-full"](), exact, strict=True):
        off = (mine.float() - true.float()).norm() / true.float().norm()
        # Rounding flips near-ties, whose rows then differ.
        if not mine.isfinite().all() or off > 0.05:
            sys.exit(f"the gradient of {name} is off by {float(off):.3f} of its norm: not measured")
    return calls


def contestants(layer: Layer, batch: int, dtype: torch.dtype) -> tuple[dict[str, Call], dict[str, str]]:
    """Those that run here, each called once; and why the others do not."""
    # As a UNet's projections give them: the heads of a pixel side by side.
    h, d = layer.heads, layer.head_dim
    q, k, v = (
        torch.randn(batch, s, h, d, device="cuda", dtype=dtype).transpose(1, 2) for s in (layer.pixels, TOKENS, TOKENS)
    )
    side = {"batch": batch, "heads_count": h, "tokens": TOKENS, "device": q.device}
    protected = torch.ones(batch, TOKENS, dtype=torch.bool, device="cuda")
    protected[:, 1 : 1 + CONTENT] = False
    phrases = torch.full((batch, TOKENS), -1, device="cuda")
    phrases[:, 2:5], phrases[:, 6:9] = 0, 1
    gate = torch.rand(batch, TOKENS, device="cuda") + 0.5

    def program(backend: str, what: Program, **text: torch.Tensor) -> Call:
        prepared = prepare(what, **side, **text, backend=backend)
        return lambda: prepared(q, k, v)[0]

    words = {"gate": gate, "phrases": phrases, "protected": protected}
    programs = {
        "plain": (Program(), {}),
        "gate": (Program(renormalize="row"), {"gate": gate}),
        "no-words": (FULL, {"protected": protected}),
        "full": (FULL, words),
        "full-all-content": (FULL, {"gate": gate, "phrases": phrases}),
    }
    calls: dict[str, Call] = {"sdpa": lambda: F.scaled_dot_product_attention(q, k, v)}
    here, notes = served()
    for name, (what, text) in programs.items():
        exact = program("reference", what, **text)()
        for backend in here:
            call = program(backend, what, **text)
            compare(f"{backend}-{name}", call(), exact, dtype)
            calls[f"{backend}-{name}"] = call
    for name, backend in SDPA.items():
        calls[name] = sdpa_with(backend, q, k, v)
    calls["flex-gate"] = flex_gate(q, k, v, gate)
    definition = program("reference", FULL, **words)
    calls["reference"] = definition
    calls["reference-compiled"] = torch.compile(definition, dynamic=False)
    for name in list(calls):
        try:
            calls[name]()
            torch.cuda.synchronize()
        except Exception as error:
            notes[name] = said(error)
            del calls[name]
    return calls, notes


def served() -> tuple[list[str], dict[str, str]]:
    """Which of our backends run here; and why the others do not."""
    known = backends()
    here = [name for name in OURS if known[name] is True]
    return here, {name: said(known[name]) for name in OURS if name not in here}


def sdpa_with(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
    def call() -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return call


def flex_gate(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor) -> Call:
    """The gate with the row renormalised, which is what adding its logarithm to the logits does."""
    from torch.nn.attention.flex_attention import flex_attention

    log_gate = gate.log()
    compiled = torch.compile(flex_attention, dynamic=False)

    def add(score, b, h, m, n):
        return score + log_gate[b, n]

    return lambda: compiled(q, k, v, score_mod=add)


def compare(name: str, got: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """Rounding flips near-ties (the tests look at those one by one): one row in a thousand may disagree, no more."""
    tolerance = 16 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-4
    off = ((got.float() - exact.float()).abs() > tolerance * (1 + exact.float().abs())).any(-1)
    if not got.isfinite().all() or off.float().mean() > 1e-3:
        sys.exit(f"{name} disagrees with the definition on {int(off.sum())} of {off.numel()} rows: not measured")


GRAPH = 20  # calls in a graph, so that its launch does not count


def graph_of(call: Call) -> Call:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH):
            call()
    return graph.replay


def in_turn(calls: dict[str, Call], rounds: int, inner: int) -> dict[str, list[float]]:
    """Seconds a call, `rounds` times each, by CUDA events around `inner` calls."""
    for call in calls.values():
        for _ in range(3):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(inner):
                call()
            end.record()
            end.synchronize()
            times[name].append(1e-3 * start.elapsed_time(end) / inner)
    return times


def bytes_moved(layer: Layer, batch: int, dtype: torch.dtype) -> int:
    """Queries and output once, keys and values once."""
    return 2 * batch * layer.heads * (layer.pixels + TOKENS) * layer.head_dim * dtype.itemsize


def said(error: object) -> str:
    """On one line, and without this machine's paths: the figures are kept."""
    words = re.sub(r"(?<![\w.])/[\w./+-]+", "...", " ".join(str(error).split()))
    return words[:160] or type(error).__name__


def write(options: argparse.Namespace, layer: Layer, rows: list[dict[str, object]]) -> None:
    device = torch.cuda.get_device_name()
    path = options.results / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.csv"
    ground = {
        "date": datetime.date.today().isoformat(), "device": device, "torch": torch.__version__,
        "triton": triton.__version__, "cuda": torch.version.cuda or torch.version.hip,
        "python": platform.python_version(), "commit": options.commit,
        "model": options.model, "batch": options.batch, "heads": layer.heads,
        "pixels": f"{layer.height}x{layer.width}", "head_dim": layer.head_dim, "tokens": TOKENS, "content": CONTENT,
        "dtype": options.dtype,
    }  # fmt: skip
    append(path, [{**ground, **row} for row in rows])
    for row in rows:
        print(options.model, ground["pixels"], *(f"{row.get(c, '')}" for c in COLUMNS[COLUMNS.index("contestant") :]))


def append(path: Path, rows: list[dict[str, object]]) -> None:
    """Ends the run where the file has other columns than these."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    if not new:
        with path.open(newline="") as file:
            if tuple(next(csv.reader(file), ())) != COLUMNS:
                sys.exit(f"{path} has other columns than are measured now: move it away")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
