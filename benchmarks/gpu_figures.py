"""GPU measurements: prints docs/gpu.md from benchmarks/results; --write saves it.

If an item ran several times on a device, the last run's figures are used. Shares are ratios of medians of calls that
alternated in one process.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prefer import read

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "gpu.md"
OURS = ("triton-plain", "triton-full", "triton-full-35", "triton-full-50", "triton-full-maps", "triton-readme")
OP = (*OURS, "cuda-full", "attend-and-excite")
STEP = ("triton", "triton-maps", "cuda", "cuda-maps")
HEAD = """# GPU measurements

This page lists the times that `benchmarks/on_gpu.sh` measured on GPUs, compared with PyTorch and stock diffusers, for
users who want to know the cost on a GPU.

`python benchmarks/gpu_figures.py` prints this page from `benchmarks/results`. That folder has the full figures
(percentiles, memory, single calls, and which items did not pass and why), and its README says what each run covered.
If an item ran several times on a device, the table shows its last run, whose number is in the column `run`. Shares
are ratios of medians of calls that alternated in one process.

## Configurations

A step is one forward pass of a whole UNet with random weights in fp16. Its table shows the share of the time with
stock processors:

- `eager`: called from Python. `graph`: the replay of the step as one CUDA graph, that is, the GPU's own time.
- `triton`, `cuda`: the backend. `-maps`: with `Capture(tokens=(1, 2, 3), steps="latest")` at the key layers.

The operation is the attention of one layer, in CUDA graphs. Its tables show the share of the time that
`F.scaled_dot_product_attention` (SDPA) takes on its own, without any program. Of 77 tokens, 20 are content:

- `plain`: no program. `full`: gate, phrases, dropout, NMS and renormalization. `full-35`, `full-50`: the same with 35
  or 50 content tokens. `full-maps`: also captures the maps of three tokens. `readme`:
  `Program(SalienceDropout(0.1), Refinement(threshold=0.1), renormalize="content")`, which smooths, without gate and
  phrases. All of them use the Triton kernels; `cuda-full` uses the CUDA kernels.
- `attend-and-excite`: diffusers' own processor, which stores the map, without its projections.
- `both ways`, under "other items": a forward and a backward pass of SDPA, of the full program (`triton-full`), and of
  the plain PyTorch reference with the full program (`reference`).
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"save it in {PAGE.relative_to(ROOT)}")
    page = of_results(sorted((ROOT / "benchmarks" / "results").glob("*.jsonl")))
    if parser.parse_args().write:
        PAGE.write_text(page)
    sys.stdout.write(page)


def of_results(paths: Iterable[Path]) -> str:
    """The page, of files of results, the oldest first."""
    runs: dict[str, list[dict[str, Any]]] = {}  # device -> lines
    for path in paths:
        lines = read(path)
        run = next(line for line in lines if line["kind"] == "run")
        runs.setdefault(run["device"], []).extend(line | {"file": path.stem} for line in lines)
    return "\n".join([HEAD, *(_of_device(device, lines) for device, lines in runs.items())])


def _of_device(device: str, lines: list[dict[str, Any]]) -> str:
    ran = [line for line in lines if line["kind"] == "run"]
    figures = {(x["item"], x["how"], x["contestant"]): x for x in lines if x["kind"] == "figure"}
    status = {x["item"]: x["status"] for x in lines if x["kind"] == "item" and x["status"] != "not run"}
    passed = sum(value == "passed" for value in status.values())
    others = [f"{item} ({value})" for item, value in sorted(status.items()) if value != "passed"]
    versions = ", ".join(f"{name} {ran[-1][name]}" for name in ("torch", "triton", "diffusers"))
    parts = [
        f"## {device}",
        f"Runs: {', '.join(line['file'] for line in ran)}; {versions}. Memory bandwidth of a large copy: "
        f"{ran[-1]['copy_tb_per_s']} TB/s.",
        f"In the last run of each item, {passed} items passed"
        + (f"; these did not: {', '.join(others)}." if others else "."),
        _steps(figures),
        *(_op(figures, dtype) for dtype in ("float16", "bfloat16")),
        _others(figures),
    ]
    return "\n\n".join(part if part.startswith("|") else _wrapped(part) for part in parts if part) + "\n"


def _steps(figures: dict[tuple[str, str, str], dict[str, Any]]) -> str:
    rows = []
    for item in dict.fromkeys(item for item, *_ in figures if item.startswith("step/")):
        for mode in ("eager", "graph"):
            if (item, mode, "stock") in figures:
                stock = figures[item, mode, "stock"]["median_us"]
                run = figures[item, mode, "stock"]["file"].rpartition("-")[2]
                rows.append([item.removeprefix("step/"), run, mode, f"{stock / 1000:.1f} ms"])
                rows[-1] += [_share(figures.get((item, mode, name)), "of_stock") for name in STEP]
    return _table(["step, batch", "run", "mode", "stock", *STEP], rows)


def _op(figures: dict[tuple[str, str, str], dict[str, Any]], dtype: str) -> str:
    rows = []
    for item in dict.fromkeys(item for item, *_ in figures if item.startswith(f"times/{dtype}/")):
        sdpa = figures.get((item, "graph", "sdpa"))
        if sdpa is not None:
            run = sdpa["file"].rpartition("-")[2]
            rows.append([item.removeprefix(f"times/{dtype}/"), run, f"{sdpa['median_us']:.1f} us"])
            rows[-1] += [_share(figures.get((item, "graph", name)), "of_sdpa") for name in OP]
    return (
        _table([f"{dtype}, batch", "run", "SDPA", *(name.removeprefix("triton-") for name in OP)], rows) if rows else ""
    )


def _others(figures: dict[tuple[str, str, str], dict[str, Any]]) -> str:
    rows = [
        [item, value["file"].rpartition("-")[2], mode, name, f"{value['median_us']:.1f} us", _share(value, of)]
        for (item, mode, name), value in figures.items()
        for of in ("of_sdpa", "of_stock")
        if of in value and not item.startswith(("times/", "step/"))
    ]
    head = ["other items", "run", "call", "implementation", "time", "share of SDPA or stock"]
    return _table(head, rows) if rows else ""


def _share(figure: dict[str, Any] | None, of: str) -> str:
    return "" if figure is None else f"{figure[of]:.2f}" if figure[of] >= 2 else f"{figure[of]:.3f}"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
