"""The results: one file of JSON lines, written to at once, so that a run that is cut off has lost nothing.

Each line has a "kind": "run" (what was measured on), "item" (passed, failed, timed out or not run), "figure" (one
contestant's time), "untimed" (a contestant and why it was not timed).
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .ground import NotRun

__all__ = ["PASSED", "append", "last_lines", "last_status", "path", "read", "reason", "untimed", "without_paths"]

PASSED, FAILED, TIMED_OUT, NOT_RUN = "passed", "failed", "timed out", "not run"


def path() -> Path:
    return Path(os.environ["SDATTN_GPU_RESULTS"]) / "results.jsonl"


def append(kind: str, **values: Any) -> None:
    """One line; several processes may write."""
    label = os.environ.get("SDATTN_GPU_LABEL")  # of two versions that are timed in turn
    values = values | {"version": label} if label and kind != "item" else values
    with path().open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps({"kind": kind, **values}) + "\n")


def read(file: Path | None = None) -> list[dict[str, Any]]:
    """Every whole line: the last one may be cut off."""
    file = file or path()
    records = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def last_status(records: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The last record of each item, by its name."""
    return {record["item"]: record for record in records if record["kind"] == "item"}


def last_lines(log: Path, most: int = 15) -> list[str]:
    """The end of a log, for the results."""
    lines = [line.rstrip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return [without_paths(line)[:300] for line in lines[-most:]]


def untimed(item: str, contestant: str, why: object, mode: str = "", **of: Any) -> str:
    """Write down and print why a contestant was not timed, or not in this way; the reason in one line."""
    line = reason(why)
    append("untimed", item=item, contestant=contestant, how=mode, why=line, **of)
    print(f"{item} {mode} {contestant}: not timed: {line}")
    return line


def reason(why: object, most: int = 300) -> str:
    """An error, or words, in one line."""
    words = " ".join(str(why).split())
    if isinstance(why, Exception) and not isinstance(why, NotRun):
        words = f"{type(why).__name__}: {words}"
    return without_paths(words)[:most]


def without_paths(text: str) -> str:
    """The results are kept: they do not say where things lie on the machine, but for a file's name. pytest names files
    from the folder that it runs in, "../../..."."""
    return re.sub(r"(?<![\w.:/])(?:/(?=[\w.+-]+/)|(?:\.\./)+)(?:[\w.+-]+/)*([\w.+-]+)", r"\1", text)
