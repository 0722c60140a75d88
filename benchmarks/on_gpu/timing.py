"""Times of contestants that take turns, so that a clock that changes changes for all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from . import record
from .ground import DEVICE, DRY, NotRun

__all__ = ["Call", "GRAPH_CALLS", "bandwidth", "captured", "figures", "graphs", "in_turn", "write"]

Call = Callable[[], object]
GRAPH_CALLS = 20  # in a graph, so that its launch does not count


def in_turn(calls: dict[str, Call], rounds: int = 15, sample: float = 2e-3) -> dict[str, list[float]]:
    """Seconds a call, `rounds` times each, by CUDA events around as many calls as fill `sample` seconds."""
    rounds = 2 if DRY else rounds
    inner = {}
    for name, call in calls.items():
        for _ in range(0 if DRY else 3):
            call()
        inner[name] = 1 if DRY else max(1, min(50, round(sample / max(_elapsed(call, 1), 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(_elapsed(call, inner[name]))
    return times


def captured(call: Call, calls: int = GRAPH_CALLS) -> Call:
    """The replay of a CUDA graph that holds `calls` calls."""
    if DEVICE.type != "cuda":
        raise NotRun("a CPU has no CUDA graphs")
    before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    before.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
    except Exception:
        # torch leaves the capture's stream current and its memory pool open, and the next capture would fail for that.
        torch.cuda.set_stream(before)
        with suppress(Exception):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), graph.pool())
        raise
    return graph.replay


def graphs(
    calls: dict[str, Call], failed: Callable[[str, Exception], object], held: int = GRAPH_CALLS
) -> dict[str, Call]:
    """The replays of graphs of `held` calls; (name, error) of the others goes to `failed`. Of torch's and stock last,
    since a capture that fails may cost those after it."""
    replays = {}
    for name in sorted(calls, key=lambda name: name.startswith(("sdpa", "stock"))):
        try:
            replays[name] = captured(calls[name], held)
        except Exception as error:
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            failed(name, error)
    return replays


def figures(taken: dict[str, list[float]], least: float | None = None, of: str = "sdpa") -> dict[str, dict[str, Any]]:
    """Microseconds, and shares of the medians.

    of_<of>: of the contestant of that name; of_best_sdpa: of the fastest whose name begins with "sdpa"; of_roofline:
    `least`, the seconds that memory would allow, as a share of the median.
    """
    medians = {name: statistics.median(times) for name, times in taken.items()}
    sdpa = [median for name, median in medians.items() if name.split("-")[0] == "sdpa"]
    rows = {}
    for name, times in taken.items():
        low, *_, high = statistics.quantiles(times, n=5)
        row = {f"{key}_us": round(1e6 * t, 2) for key, t in (("median", medians[name]), ("p20", low), ("p80", high))}
        if of in medians:
            row[f"of_{of}"] = round(medians[name] / medians[of], 4)
        if sdpa:
            row["of_best_sdpa"] = round(medians[name] / min(sdpa), 4)
        if least is not None:
            row["of_roofline"] = round(least / medians[name], 4)
        rows[name] = row
    return rows


def write(item: str, mode: str, figures: dict[str, dict[str, Any]], **of: Any) -> None:
    for name, row in figures.items():
        record.append("figure", item=item, contestant=name, how=mode, **of, **row)
        shares = " ".join(f"{key}={x}" for key, x in row.items() if key.startswith("of_"))
        print(f"{item} {mode} {name}: {row['median_us']} us {shares}")


def bandwidth() -> float:
    """Bytes a second, read and written, of a large copy: the roofline that times are held against."""
    x = torch.empty(2**14 if DRY else 2**28, device=DEVICE)
    y = torch.empty_like(x)
    seconds = in_turn({"copy": lambda: y.copy_(x)}, rounds=10)["copy"]
    return 2 * x.numel() * x.element_size() / statistics.median(seconds)


def _elapsed(call: Call, times: int) -> float:
    if DEVICE.type != "cuda":
        start = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - start) / times
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end) / times
