"""Runs items, each in a process of its own with its own limit, and writes down at once what became of each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import record
from .ground import NotRun
from .items import Item, Phase

__all__ = ["NOT_HERE", "as_process", "run_phase"]

NOT_HERE = 77  # the status of an item that cannot run here; pytest has 0 to 5
GRACE = 5.0  # seconds between asking a process to end, when pytest sums up, and killing it


@dataclass
class _Running:
    item: Item
    pid: int
    process: subprocess.Popen[bytes] | None  # None: a fork
    log: Path
    began: float
    limit: float
    interrupted_at: float | None = None  # when it was asked to end


def run_phase(phase: Phase, until: float, fork: bool = True) -> None:
    """Run all items of a phase. until: time.monotonic() when everything is to be over. fork: start items that are
    functions as forks of this process, which must not have touched CUDA; otherwise as new interpreters."""
    over = min(until, time.monotonic() + phase.seconds)
    waiting = list(phase.items)
    running: list[_Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < phase.side_by_side:
                item = waiting.pop(0)
                left = over - time.monotonic()
                if left < 1:
                    _write(item, record.NOT_RUN, 0.0, ["no time was left for it"])
                    continue
                started = _start(item, min(item.limit, left), fork)
                if started is not None:
                    running.append(started)
            running = [item_running for item_running in running if not _ended(item_running)]
            time.sleep(0.02)
    finally:
        for item_running in running:
            _kill(item_running.pid, signal.SIGKILL)


def as_process(item: Item) -> int:
    """Run an item's function here; the exit status. What it raised is printed, its last line first to be read."""
    try:
        assert item.call is not None, "a command is run by run_phase"
        item.call()
        return 0
    except NotRun as why:
        print(f"not run: {why}")
        return NOT_HERE
    except BaseException:
        traceback.print_exc(file=sys.stdout)
        return 1


def _start(item: Item, limit: float, fork: bool) -> _Running | None:
    log = Path(os.environ["SDATTN_GPU_STATE"]) / "logs" / f"{item.name.replace('/', '-')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    if item.command is None and fork:
        return _Running(item, _fork(item, log), None, log, began, limit)
    try:
        command = item.command() if item.command else [sys.executable, "-m", "on_gpu", "--item", item.name]
    except NotRun as why:
        _write(item, record.NOT_RUN, 0.0, [str(why)])
        return None
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, cwd=os.environ["SDATTN_GPU_STATE"],
            env={**os.environ, **item.environment},
        )  # fmt: skip
    return _Running(item, process.pid, process, log, began, limit)


def _fork(item: Item, log: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.environ.update(item.environment)
        status = as_process(item)
        sys.stdout.flush()
    finally:
        # No clean-up of the parent's.
        os._exit(status)


def _ended(running: _Running) -> bool:
    code = _exit_status(running)
    took = time.monotonic() - running.began
    if code is None:
        if running.interrupted_at is None and took > running.limit:
            running.interrupted_at = time.monotonic()
            _kill(running.pid, signal.SIGINT)
        elif running.interrupted_at is not None and time.monotonic() - running.interrupted_at > GRACE:
            _kill(running.pid, signal.SIGKILL)
        return False
    _kill(running.pid, signal.SIGKILL)  # what it left behind
    lines = record.last_lines(running.log) if running.log.exists() else []
    if running.interrupted_at is not None:
        _write(running.item, record.TIMED_OUT, took, [f"not through after {running.limit:.0f} s", *lines])
    elif code == 0:
        _write(running.item, record.PASSED, took, lines[-1:] if running.item.command else [])
    elif code == NOT_HERE:
        _write(running.item, record.NOT_RUN, took, [line.removeprefix("not run: ") for line in lines[-1:]])
    else:
        ended = [f"ended by signal {-code}"] if code < 0 else []
        _write(running.item, record.FAILED, took, [*lines, *ended])
    return True


def _exit_status(running: _Running) -> int | None:
    """None while it runs; the negative of a signal that ended it."""
    if running.process is not None:
        return running.process.poll()
    pid, status = os.waitpid(running.pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def _kill(pid: int, signal_number: signal.Signals) -> None:
    try:
        os.killpg(pid, signal_number)
    except ProcessLookupError:
        pass
    except PermissionError:  # the group's leader is a zombie
        pass


def _write(item: Item, status: str, seconds: float, lines: list[str]) -> None:
    log_lines: dict[str, Any] = {"lines": lines} if lines else {}
    record.append("item", item=item.name, status=status, seconds=round(seconds, 1), **log_lines)
    last = f": {lines[-1]}" if lines and status != record.PASSED else ""
    print(f"{time.strftime('%H:%M:%S')} {status:9} {seconds:6.1f} s  {item.name}{last[:160]}", flush=True)
