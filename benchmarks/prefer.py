"""Writes sdattn_fast/backend/measured.json, by which "auto" chooses: the fastest backend at each shape measured.

    python benchmarks/prefer.py [benchmarks/results/<device>.csv ...]

By default of every table in benchmarks/results that gpu_measure.py wrote. What counts is the GPU's own time ("graph")
of the full program. Of a shape that was measured several times the last is taken; one at which fewer than two backends
were timed says nothing. Devices of which no table is given are left as they are.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "sdattn_fast" / "backend" / "measured.json"
CONTESTANTS = {"triton-full": "triton", "cuda-full": "cuda"}
ABOUT = "The fastest backend by device and shape: the full program, in a CUDA graph. benchmarks/prefer.py writes it."


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", type=Path, metavar="CSV")
    parser.add_argument("--to", type=Path, default=FILE)
    options = parser.parse_args(arguments)
    found: dict[str, list[dict[str, Any]]] = {}
    for path in options.tables or sorted((ROOT / "benchmarks" / "results").glob("*.csv")):
        with path.open(newline="") as file:
            rows = csv.DictReader(file)
            if "contestant" in (rows.fieldnames or ()):
                found |= preferences(rows)
    if not found:
        sys.exit("no shape at which two backends were timed: nothing is written")
    devices = {**json.loads(options.to.read_text())["devices"], **found}
    options.to.write_text(as_json(devices))
    for device, shapes in found.items():
        counts = {name: sum(shape["fastest"] == name for shape in shapes) for name in CONTESTANTS.values()}
        print(f"{device}: {len(shapes)} shapes, {', '.join(f'{name} at {n}' for name, n in counts.items())}")


def preferences(rows: Iterable[dict[str, str]]) -> dict[str, list[dict[str, Any]]]:
    """By device, the shapes at which more than one backend was timed, and the fastest there."""
    taken: dict[str, dict[tuple[Any, ...], dict[str, float]]] = {}
    for row in rows:
        backend = CONTESTANTS.get(row["contestant"])
        if backend is None or row["how"] != "graph":
            continue
        height, width = map(int, row["pixels"].split("x"))
        others = (int(row[name]) for name in ("head_dim", "tokens", "batch", "heads"))
        shape = (row["dtype"], *others, height * width)
        taken.setdefault(row["device"], {}).setdefault(shape, {})[backend] = float(row["median_us"])
    found = {}
    for device, shapes in taken.items():
        found[device] = [
            dict(zip(("dtype", "head_dim", "tokens", "batch", "heads", "pixels"), shape, strict=True))
            | {"fastest": min(times, key=times.__getitem__)}
            for shape, times in sorted(shapes.items())
            if len(times) > 1
        ]
    return {device: shapes for device, shapes in found.items() if shapes}


def as_json(devices: dict[str, list[dict[str, Any]]]) -> str:
    """A line a shape."""
    blocks = []
    for device, shapes in sorted(devices.items()):
        lines = ",\n".join(f"   {json.dumps(shape)}" for shape in shapes)
        blocks.append(f"  {json.dumps(device)}: [\n{lines}\n  ]")
    body = "{\n" + ",\n".join(blocks) + "\n }"
    return f'{{\n "about": {json.dumps(ABOUT)},\n "devices": {body}\n}}\n'


if __name__ == "__main__":
    main()
