"""What a kernel may take: the rows of docs/kernels.json, the model behind them, and the kernels of the CUDA extension.

A slot is one instruction that a warp issues. `per logit` is slots over the logits of one lane; `of memory time` sets
it, at 4 slots a cycle on each of 132 multiprocessors at 1.755 GHz, against queries and results at 4.3 TB/s: an H200.
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

# What plain attention of 16 rows over 80 columns takes at D = 40, in half precision: 40 is 16 + 16 + 8 of the first
# product, 5 times 8 of the second, whose sum is over 5 times 16; and a lane's 40 exponentials.
PLAIN = {"HMMA": 3 * 10 + 5 * 5, "HMMA.1688": 10, "MUFU.EX2": 40}

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
    if in_the_loop:
        found["in the loop"] = round(in_the_loop, 1)
    if slots and logits:
        found |= _a_logit(code, slots / logits, bytes_)
    return found


def _a_logit(code: Code, slots: float, bytes_: float) -> Row:
    found: Row = {"per logit": round(slots, 1)}
    if bytes_ and code.target == "sm_90":
        issue = slots / 32 / (MULTIPROCESSORS * SCHEDULERS * HERTZ)
        found["of memory time"] = round(issue / (bytes_ / BYTES_PER_SECOND), 2)
    return found


def worse(new: Row, old: Row) -> list[str]:
    """What of a row is more than the table has, or no longer on the tensor cores."""
    found = [f"{x}: {new[x]}, was {old[x]}" for x in ("registers", "stack", "local", "shared") if new[x] > old[x]]
    now, then = sum(new["matrix"].values()), sum(old["matrix"].values())
    if now > then or (then and not now):
        found.append(f"matrix instructions: {new['matrix']}, was {old['matrix']}")
    for x in ("slots", "plain"):
        if new.get(x, 0) > SLACK * old.get(x, 0):
            found.append(f"{x}: {new[x]}, was {old.get(x)}")
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

    slots: of one turn of the main loop, every alternative that a call might want counted once, so more than any call
    issues; plain: the fewest that plain attention at D = 40 can do with. shared: what is static.
    """
    with tempfile.TemporaryDirectory() as folder:
        codes = machine_code.extension(binary, Path(folder))
        versions = {v.decode() for file in Path(folder).iterdir() for v in _VERSION.findall(file.read_bytes())}
    rows: dict[str, dict[str, Row]] = {}
    for code, name in zip(codes, machine_code.demangled([code.name for code in codes]), strict=True):
        loop = code.main_loop()
        found = row(code, code.slots(within=loop))
        shape = _SHAPE.search(name)
        if loop is not None and shape is not None:
            tiles = int(shape[1])
            plain = code.least(loop, {opcode: tiles * count for opcode, count in PLAIN.items()})
            if plain is not None:
                found |= {"plain": plain} | _a_logit(code, plain / (16 * tiles * 77 / 32), 2 * 2 * 40 / 77)
        rows.setdefault(code.target, {})[_short(name)] = found
    return ", ".join(sorted(versions)), rows


# rows_kernel<T, BLOCKS, A, TILES, ...> of half precision and 77 tokens: a warp has 16 * TILES rows of 5 * 16 columns.
_SHAPE = re.compile(r"rows_kernel<[\w:]*(?:half|bfloat16)[\w:]*, 5, \d+, (\d+)[,>]")
_VERSION = re.compile(rb"Cuda compilation tools, release [\d.]+, V([\d.]+)")


def _short(name: str) -> str:
    """Without its result, namespaces and parameters."""
    return re.sub(r"^void |\(.*\)$|\w+::", "", name)
