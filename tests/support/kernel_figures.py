"""What a kernel may take: the rows of docs/kernels.json, the model behind them, and the kernels of the CUDA extension.

A slot is one instruction that a warp issues. `per logit` is slots over the logits of one lane; `of memory time` sets
them, at 4 slots a cycle on each of 132 multiprocessors at 1.755 GHz, against queries and results at 4.3 TB/s: an H200.
"""

from __future__ import annotations

import importlib.util
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import machine_code
from machine_code import Code

TABLE = Path(__file__).parents[2] / "docs/kernels.json"
SLACK = 1.03  # of issue slots
MULTIPROCESSORS, SCHEDULERS, HERTZ, BYTES_PER_SECOND = 132, 4, 1.755e9, 4.3e12

Row = dict[str, Any]


def row(code: Code, slots: int = 0, logits: float = 0.0, in_the_loop: float = 0.0, bytes_: float = 0.0) -> Row:
    """slots: that a warp issues for `logits` logits of each of its lanes; in_the_loop: a logit; bytes_: a logit."""
    found: Row = {
        "registers": code.registers,
        "stack": code.stack,
        "local": code.local,
        "shared": code.shared,
        "matrix": code.matrix,
    }
    if slots:
        found["slots"] = slots
    if slots and logits:
        found["per logit"] = round(slots / logits, 1)
    if in_the_loop:
        found["in the loop"] = round(in_the_loop, 1)
    if slots and logits and bytes_ and code.target == "sm_90":
        issue = slots / logits / 32 / (MULTIPROCESSORS * SCHEDULERS * HERTZ)
        found["of memory time"] = round(issue / (bytes_ / BYTES_PER_SECOND), 2)
    return found


def worse(new: Row, old: Row) -> list[str]:
    """What of a row is more than the table has, or no longer on the tensor cores."""
    found = [f"{x}: {new[x]}, was {old[x]}" for x in ("registers", "stack", "local", "shared") if new[x] > old[x]]
    now, then = sum(new["matrix"].values()), sum(old["matrix"].values())
    if now > then or (then and not now):
        found.append(f"matrix instructions: {new['matrix']}, was {old['matrix']}")
    if new.get("slots", 0) > SLACK * old.get("slots", 0):
        found.append(f"slots: {new['slots']}, was {old.get('slots')}")
    return found


def table() -> dict[str, Any]:
    """docs/kernels.json: "compilers", and "triton" and "cuda", each {target: {kernel: row}}."""
    return json.loads(TABLE.read_text())


def cuda_extension() -> Path | None:
    """The extension that holds the CUDA kernels, where nvcc built it."""
    found = importlib.util.find_spec("sdattn_fast._cuda")
    return Path(found.origin) if found and found.origin else None


def cuda_rows(binary: Path) -> tuple[str, dict[str, dict[str, Row]]]:
    """The version of the compiler, and every kernel in an extension or object file: {target: {kernel: row}}.

    Loops that the kernel goes round a number of times known only at run time count one turn, and so does every
    alternative: slots are those of the main loop, and more than any one call issues. shared: what is static.
    """
    with tempfile.TemporaryDirectory() as folder:
        codes = machine_code.extension(binary, Path(folder))
        versions = {v.decode() for file in Path(folder).iterdir() for v in _VERSION.findall(file.read_bytes())}
    rows: dict[str, dict[str, Row]] = {}
    for code, name in zip(codes, machine_code.demangled([code.name for code in codes]), strict=True):
        loop = code.main_loop()
        slots = code.slots(within=loop)
        found = row(code, slots, _logits_of_lane(name) if loop else 0.0)
        rows.setdefault(code.target, {})[_short(name)] = found
    return ", ".join(sorted(versions)), rows


_VERSION = re.compile(rb"Cuda compilation tools, release [\d.]+, V([\d.]+)")


def _short(name: str) -> str:
    """Without its result, namespaces and parameters."""
    return re.sub(r"^void |\(.*\)$|\w+::", "", name)


def _logits_of_lane(name: str) -> float:
    """Of rows_kernel<T, BLOCKS, A, TILES>: 16 * TILES rows of a warp; 77 tokens, or 16 * BLOCKS where that is more."""
    found = re.search(r"rows_kernel<.*?(\d+), (\d+), (\d+)>", name)
    if found is None:
        return 0.0
    blocks, _, tiles = map(int, found.groups())
    return 16 * tiles * (77 if blocks == 5 else 16 * blocks) / 32
