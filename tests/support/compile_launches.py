"""Compiles the launches that `recorded_launches.py` wrote, on all cores, and says which do not compile.

    python compile_launches.py launches.jsonl [--triton FOLDER] [--target sm_90] [--dtype bfloat16]
        [--stage ttir|binary] [--most N] [--limit SECONDS]

--triton: where `pip install --target` put another version. --dtype: in place of float16. --stage ttir: Triton's own
language and no further, where most that differs between versions shows. --most: so many launches, chosen to have
every argument's kinds and every option's values. --limit: gives up when no launch was compiled for so long.

Prints a line of JSON for each kernel and error, with the lines of the file that have it, then one with the counts.
Needs triton alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

KERNELS = Path(__file__).parents[2] / "kernels"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("launches", type=Path)
    parser.add_argument("--triton", default="")
    parser.add_argument("--target", default="sm_90")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--stage", choices=("ttir", "binary"), default="binary")
    parser.add_argument("--most", type=int, default=10**6)
    parser.add_argument("--limit", type=float, default=120)
    options = parser.parse_args()
    launches = read(options.launches, options.dtype)
    if options.most < len(launches):
        launches = cover(launches, options.most)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        errors = compile_all(launches, options)
    lines = defaultdict(list)
    for launch, error in errors:
        lines[launch["kernel"], error].append(launch["line"])
    for (kernel, error), which in lines.items():
        print(json.dumps({"kernel": kernel, "error": error, "lines": sorted(which)}))
    _start(options)
    print(json.dumps({"triton": _start.version, "target": options.target, "launches": len(launches),
                      "failed": len(errors)}))  # fmt: skip
    sys.exit(bool(errors))


def read(path: Path, dtype: str) -> list[dict[str, Any]]:
    text = path.read_text().replace('"float16"', json.dumps(dtype))
    return [{**json.loads(line), "line": i + 1} for i, line in enumerate(text.splitlines())]


def cover(launches: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most so many that have every argument's kinds and every option's values, of every kernel as many.

    Chosen greedily: each time the one with the most kinds and values that none before it has.
    """
    of_kernel = defaultdict(list)
    for launch in launches:
        arguments = {(i, str(argument_class(argument))) for i, argument in enumerate(launch["arguments"])}
        of_kernel[launch["kernel"]].append((launch, arguments | set(launch["options"].items())))
    chosen = []
    for name, group in of_kernel.items():
        left, turn = set.union(*(kinds for _, kinds in group)), 0
        while left:
            launch, kinds = max(group, key=lambda pair: len(pair[1] & left))
            chosen.append((turn, name, launch))
            left, turn = left - kinds, turn + 1
    return [launch for *_, launch in sorted(chosen, key=lambda three: three[:2])][:most]


def argument_class(x: Any) -> Any:
    """What Triton compiles anew for: of a number, its type, whether it is 1, and whether 16 divides it."""
    if isinstance(x, int):
        return "1" if x == 1 else f"{'i32' if x < 2**31 else 'i64'}{'/16' if x % 16 == 0 else ''}"
    return "fp32" if isinstance(x, float) else x


def compile_all(launches: list[dict[str, Any]], options: argparse.Namespace) -> list[tuple[dict[str, Any], str]]:
    errors = []
    waiting = {launch["line"]: launch for launch in launches}
    with multiprocessing.get_context("spawn").Pool(initializer=_start, initargs=(options,)) as pool:
        results = pool.imap_unordered(_compile, launches)
        try:
            while waiting:
                line, error = results.next(timeout=options.limit)
                launch = waiting.pop(line)
                if error is not None:
                    errors.append((launch, error))
        except multiprocessing.TimeoutError:  # some compilers never end; leaving the block kills them
            errors += [(launch, f"nothing was compiled for {options.limit} s") for launch in waiting.values()]
    return errors


class Stop(Exception):
    """The stage that was asked for is reached."""


def _start(options: argparse.Namespace) -> None:
    """Of a process: its Triton, its target, its kernels."""
    if options.triton:
        sys.path.insert(0, options.triton)
    import fake_gpu
    import triton
    from triton.compiler import compiler

    fake_gpu.use(options.target)
    _start.version = triton.__version__  # type: ignore[attr-defined]
    _start.kernels = _kernels()  # type: ignore[attr-defined]
    _start.precision = lambda kernel: precision(options.target, kernel)  # type: ignore[attr-defined]
    if options.stage == "ttir":
        backend = type(compiler.make_backend(fake_gpu.target(options.target)))
        add_stages = backend.add_stages

        def no_further(self: Any, stages: dict[str, Any], *rest: Any) -> None:
            add_stages(self, stages, *rest)
            stages["ttgir"] = _stop

        backend.add_stages = no_further


def precision(target: str, kernel: str) -> str | None:
    """What the launcher chooses for this target and this Triton, None for what was recorded."""
    old = tuple(map(int, _start.version.split(".")[:2])) < (3, 4)  # type: ignore[attr-defined]
    return "ieee" if not target.startswith("sm_") or (old and kernel == "gaussian_kernel") else None


def _stop(src: Any, metadata: Any) -> None:
    raise Stop


def _kernels() -> ModuleType:
    """The folder kernels/ as a package of its own: the installed one would bring torch."""
    init = KERNELS / "__init__.py"
    where = importlib.util.spec_from_file_location("kernels_alone", init, submodule_search_locations=[str(KERNELS)])
    assert where is not None and where.loader is not None
    module = importlib.util.module_from_spec(where)
    sys.modules["kernels_alone"] = module
    where.loader.exec_module(module)
    return module


def _compile(launch: dict[str, Any]) -> tuple[int, str | None]:
    """The launch's line, and what is wrong with it, or None."""
    kernel = getattr(_start.kernels, launch["kernel"])  # type: ignore[attr-defined]
    arguments = [_tensor(*x) if isinstance(x, list) else x for x in launch["arguments"]]
    options = launch["options"]
    if _start.precision(launch["kernel"]) is not None and "PRECISION" in options:  # type: ignore[attr-defined]
        options = {**options, "PRECISION": _start.precision(launch["kernel"])}  # type: ignore[attr-defined]
    try:
        kernel.warmup(*arguments, grid=(1,), enable_fp_fusion=True, **options)
    except Stop:
        pass
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        last = [line for line in str(cause).splitlines() if line.strip()][-1:]
        return launch["line"], " ".join([f"{type(cause).__name__}:", *last])
    return launch["line"], None


def _tensor(dtype: str, address: int) -> SimpleNamespace:
    return SimpleNamespace(dtype=f"torch.{dtype}", data_ptr=lambda: address, ptr_range=lambda: 0)


if __name__ == "__main__":
    main()
