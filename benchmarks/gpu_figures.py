"""What GPUs measured: prints docs/gpu.md from benchmarks/results; --write keeps it.

Of an item that ran several times on a device the last run's figures are taken. Shares are of medians of calls that took
turns in one process.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prefer import read

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "gpu.md"
OURS = ("triton-plain", "triton-full", "triton-full-35", "triton-full-50", "triton-full-maps", "triton-readme")
OP = (*OURS, "cuda-full", "attend-and-excite")
STEP = ("triton", "triton-maps", "cuda", "cuda-maps")
HEAD = """# What a GPU measured

`python benchmarks/gpu_figures.py` prints this page from benchmarks/results, where `benchmarks/on_gpu.sh` left it; the
full figures (percentiles, memory, single calls, what did not pass and why) are there, and its README says what each run
was of.

- A step: a whole UNet's, random weights, fp16, share of the time with stock processors. eager: from Python; graph: its
  replay as one CUDA graph, which is the GPU's own time. -maps: with `Capture(tokens=(1, 2, 3))` at the key layers.
- The op: one layer's attention in CUDA graphs, share of what `F.scaled_dot_product_attention` takes by itself, which
  does none of it. Of 77 tokens 20 are content; full: gate, phrases, dropout, NMS and renormalisation; full-35, full-50:
  as many content tokens; full-maps: three tokens' maps too; plain: no program; readme: the README's program, which
  smooths. attend-and-excite: diffusers' own processor, which makes the map, without its projections.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"keep it in {PAGE.relative_to(ROOT)}")
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
    passed = sum(one == "passed" for one in status.values())
    others = [f"{item} ({one})" for item, one in sorted(status.items()) if one != "passed"]
    versions = ", ".join(f"{name} {ran[-1][name]}" for name in ("torch", "triton", "diffusers"))
    parts = [
        f"## {device}",
        f"Runs: {', '.join(line['file'] for line in ran)}; {versions}. A copy moves {ran[-1]['copy_tb_per_s']} TB/s. "
        f"At their last run {passed} items passed" + (f"; not: {', '.join(others)}." if others else "."),
        _steps(figures),
        *(_op(figures, dtype) for dtype in ("float16", "bfloat16")),
        _others(figures),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _steps(figures: dict[tuple[str, str, str], dict[str, Any]]) -> str:
    rows = []
    for item in dict.fromkeys(item for item, *_ in figures if item.startswith("step/")):
        for how in ("eager", "graph"):
            if (item, how, "stock") in figures:
                stock = figures[item, how, "stock"]["median_us"]
                run = figures[item, how, "stock"]["file"].rpartition("-")[2]
                rows.append([item.removeprefix("step/"), run, how, f"{stock / 1000:.1f} ms"])
                rows[-1] += [_share(figures.get((item, how, name)), "of_stock") for name in STEP]
    return _table(["a step, batch", "run", "", "stock", *STEP], rows)


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
        [item, one["file"].rpartition("-")[2], how, name, f"{one['median_us']:.1f} us", _share(one, of)]
        for (item, how, name), one in figures.items()
        for of in ("of_sdpa", "of_stock")
        if of in one and not item.startswith(("times/", "step/"))
    ]
    return _table(["others", "run", "", "", "", "of SDPA or stock"], rows) if rows else ""


def _share(figure: dict[str, Any] | None, of: str) -> str:
    return "" if figure is None else f"{figure[of]:.2f}" if figure[of] >= 2 else f"{figure[of]:.3f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
