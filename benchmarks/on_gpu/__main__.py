"""Runs the phases, keeps the logs, says at the end what became of each item. `benchmarks/on_gpu.sh` starts it."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import tarfile
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from . import contestants, record
from .checks import check
from .ground import DRY, NotRun, why_no
from .items import Item, beside, phases, wanted
from .runner import NOT_HERE, as_process, run_phase

NO_DEVICE, RED, NOT_ALL = 3, 1, 4  # the status; 0: every item passed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m on_gpu")
    parser.add_argument("--item", help="run one item's function in this process")
    parser.add_argument("--check", help="BACKEND/KERNEL/SHAPE: one check in this process, for a sanitizer")
    parser.add_argument("--launch", help="BACKEND/PROGRAM: one call of it, for a profiler")
    parser.add_argument("--if", dest="where", nargs=argparse.REMAINDER, help="BACKEND COMMAND: where BACKEND is here")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--again", type=Path)
    parser.add_argument("--baseline", type=Path)
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()

    if options.where:
        backend, *command = options.where
        why = why_no(backend)
        if why is not None:
            print(f"not run: {record.reason(why)}")
            return NOT_HERE
        os.execv(command[0], command)
    if options.check:
        return as_process(Item("check", 0, partial(check, *options.check.split("/"))))
    if options.launch:
        return _launch(*options.launch.split("/"))
    everything = phases(again=options.again is not None or bool(options.only) or options.item is not None)
    if options.item:
        (item,) = [item for phase in everything for item in phase.items if item.name == options.item]
        return as_process(item)
    try:
        chosen = wanted(everything, options.only, options.again)
    except ValueError as error:
        parser.error(f"--only: {error}")
    if options.list:
        print("\n".join(f"{item.name:44} {item.limit:4} s" for phase in chosen for item in phase.items))
        return 0
    if options.baseline:
        chosen = beside(chosen, options.baseline)
    return _run(chosen, float(os.environ["SDATTN_GPU_BEGAN"]) + 60 * options.minutes)


def _run(chosen: list[Any], until: float) -> int:
    # Told to end, it still sums up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    began = len(record.read())
    if len(chosen) > 1:
        _preload()
    try:
        facts, *others = chosen
        run_phase(facts, until)
        fork = _facts() != record.FAILED
        if not fork:
            # Something may have started CUDA before the fork.
            run_phase(facts, until, fork)
            if _facts() == record.PASSED:
                print("a fork has no CUDA here: every item starts an interpreter", flush=True)
        if _facts() == record.FAILED:
            print("no CUDA device: not measured", file=sys.stderr)
            return NO_DEVICE
        for phase in others:
            print(f"== {phase.name}", flush=True)
            run_phase(phase, until, fork)
            _keep_logs()
    finally:
        _keep_logs()
        counts = _summary(record.read()[began:])
    if counts[record.FAILED] or counts[record.TIMED_OUT]:
        return RED
    return NOT_ALL if counts[record.NOT_RUN] else 0


def _preload() -> None:
    """Imports once what every fork would import for itself; none of it may start CUDA."""
    for name in ("pytest", "scipy.ndimage", "triton", "diffusers.models.unets.unet_2d_condition"):
        try:
            importlib.import_module(name)
        except Exception as error:  # those that need it say so; diffusers raises RuntimeError for an import
            print(f"{name}: {error}", file=sys.stderr)
    with suppress(Exception):
        contestants.attend_and_excite()


def _facts() -> str:
    return str(record.last_status(record.read())["facts"]["status"])


def _launch(backend: str, program: str) -> int:
    from .more import launched

    return as_process(Item("launch", 0, partial(launched, backend, program, "sd15-64x64", 2)))


def _keep_logs() -> None:
    logs = Path(os.environ["SDATTN_GPU_STATE"]) / "logs"
    if logs.is_dir():
        with tarfile.open(record.path().parent / "logs.tar.gz", "w:gz") as archive:
            archive.add(logs, "logs")


def _summary(records: list[dict[str, Any]]) -> Counter[str]:
    """Prints the medians that count, then what did not pass; how many items there are of each status."""
    print("\n== times (median microseconds; share of the best of torch's backends, of stock for a step)")
    for r in records:
        if r["kind"] == "figure":
            share = r.get("of_best_sdpa", r.get("of_stock", ""))
            version = f" {r['version']}" if "version" in r else ""
            print(f"{r['item']:30} {r['how']:9} {r['contestant']:22}{version} {r['median_us']:12} {share}")
        elif r["kind"] == "untimed" and not DRY:
            print(f"{r['item']:30} {r.get('how', ''):9} {r['contestant']:22} not timed: {r['why']}")
    done = record.last_status(records)
    counts = Counter(r["status"] for r in done.values())
    print(f"\n== {', '.join(f'{n} {status}' for status, n in counts.items())}; {record.path()}")
    for name, r in done.items():
        if r["status"] != record.PASSED:
            print(f"{r['status']}: {name}: {(r.get('lines') or [''])[0 if r['status'] == record.TIMED_OUT else -1]}")
    return counts


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NotRun as why:
        print(f"not run: {why}")
        sys.exit(NOT_HERE)
