"""Writes sdattn_fast/backend/measured.json, by which "auto" chooses: the fastest backend at each shape measured.

    python benchmarks/prefer.py [benchmarks/results/<device>.jsonl ...]

By default of every file of results in benchmarks/results that on_gpu.sh wrote. What counts is the GPU's own time
("graph") of the full program. Of a shape that was measured several times the last is taken; one at which fewer than two
backends were timed says nothing. Devices of which no results are given are left as they are. Results of a dry run, and
lines that are no figures of ours, are refused by name.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "sdattn_fast" / "backend" / "measured.json"
CONTESTANTS = {"triton-full": "triton", "cuda-full": "cuda"}
SHAPE = ("dtype", "head_dim", "tokens", "batch", "heads", "pixels")
ABOUT = "The fastest backend by device and shape: the full program, in a CUDA graph. benchmarks/prefer.py writes it."


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, metavar="JSONL")
    parser.add_argument("--to", type=Path, default=FILE)
    options = parser.parse_args(arguments)
    records: list[dict[str, Any]] = []
    for path in options.results or sorted((ROOT / "benchmarks" / "results").glob("*.jsonl")):
        try:
            of_file = read(path)
            preferences(of_file)  # refuses what is wrong with this file
        except ValueError as error:
            sys.exit(f"{path}: {error}")
        records += of_file
    preferred = preferences(records)
    if not preferred:
        sys.exit("no shape at which two backends were timed: nothing is written")
    devices = {**json.loads(options.to.read_text())["devices"], **preferred}
    # Aside, then renamed: a process that reads it finds the old or the new one, never half of one.
    aside = options.to.with_name(f"{options.to.name}.{os.getpid()}")
    aside.write_text(as_json(devices))
    os.replace(aside, options.to)
    for device, shapes in preferred.items():
        counts = {name: sum(shape["fastest"] == name for shape in shapes) for name in CONTESTANTS.values()}
        print(f"{device}: {len(shapes)} shapes, {', '.join(f'{name} at {n}' for name, n in counts.items())}")


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of results. Raises: ValueError, where one but the last is not JSON: that may be cut off."""
    lines = path.read_text().splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise ValueError(f"line {number} is not JSON") from None
    return records


def preferences(records: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """By device, the shapes at which more than one backend was timed, and the fastest there.

    Raises: ValueError, for a dry run, for figures with no device before them, and for one that lacks a part.
    """
    device = None
    taken: dict[str, dict[tuple[Any, ...], dict[str, float]]] = {}
    for record in records:
        if record["kind"] == "run":
            if record["dry_run"]:
                raise ValueError("a dry run, in which nothing was measured")
            device = record["device"]
        if record["kind"] != "figure" or record.get("version", "now") != "now":
            continue
        backend = CONTESTANTS.get(record["contestant"])
        if backend is None or record["how"] != "graph":
            continue
        if device is None:
            raise ValueError('a figure before any "run" line, which says the device')
        missing = [name for name in (*SHAPE, "median_us") if name not in record]
        if missing:
            raise ValueError(f"a figure of {record['contestant']} without {', '.join(missing)}")
        shape = tuple(record[name] for name in SHAPE)
        taken.setdefault(device, {}).setdefault(shape, {})[backend] = float(record["median_us"])
    by_device = {
        device: [
            dict(zip(SHAPE, shape, strict=True)) | {"fastest": min(times, key=times.__getitem__)}
            for shape, times in sorted(shapes.items())
            if len(times) > 1
        ]
        for device, shapes in taken.items()
    }
    return {device: shapes for device, shapes in by_device.items() if shapes}


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
