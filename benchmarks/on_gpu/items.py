"""What is run, in which order, and how long each may take: first what is most worth knowing, and something of all.

Times are for an H100 with 16 CPU cores; all of it together is nine minutes.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from . import record
from .ground import DRY, SMALL, NotRun

__all__ = ["Item", "Phase", "beside", "phases", "wanted"]

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests" / "kernels"


@dataclass(frozen=True)
class Item:
    """One thing to run in a process of its own.

    limit: seconds. call: what to call; or command: a function that gives the command line, and raises
    NotRun where there is none. environment: beside this process's own. needs: the checks without which it times less.
    """

    name: str
    limit: int
    call: Callable[[], object] | None = None
    command: Callable[[], list[str]] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    needs: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Phase:
    """Items that run in their order, so many side by side; when `seconds` are over no further one is started."""

    name: str
    seconds: int
    items: list[Item]
    side_by_side: int = 1


def phases(again: bool = False) -> list[Phase]:
    """All phases. again: also what only a second call runs."""
    cores = len(os.sched_getaffinity(0))
    every_phase = [
        Phase("facts", 60, [Item("facts", 60, _facts)]),
        Phase("check", 65, list(_checks()), cores),
        Phase("times", 100, list(_times("float16"))),
        Phase("step", 100, [*_steps((("sd15", 2), ("sdxl", 2), ("sd15", 16)))]),
        Phase("text", 60, list(_other_text()), 4),
        Phase("suite", 110, list(_suites(cores)), 2),
        Phase("sanitize", 50, list(_sanitized()), 8),
        Phase("more", 120, list(_further_items())),
    ]
    if again:
        every_phase.append(Phase("profile", 90, list(_profiled())))
    return [_patient(phase) for phase in every_phase] if DRY else every_phase


def _patient(phase: Phase) -> Phase:
    """A dry run says what works, not how fast: the interpreter is slow, and the machine may be busy."""
    items = [replace(item, limit=10 * item.limit) for item in phase.items]
    return replace(phase, seconds=10 * phase.seconds, items=items)


def _facts() -> None:
    from .facts import facts

    facts()


def _checks() -> Iterable[Item]:
    from .checks import check, checks

    for backend, kernel, shape in checks():
        yield Item(f"check/{backend}/{kernel}/{shape}", 60, partial(check, backend, kernel, shape))
    if DRY:
        # The way to a launch as it is on a GPU, compiler included, with a driver that launches nowhere.
        command = [sys.executable, str(ROOT / "tests" / "support" / "launch_path.py"), "sm_90"]
        yield Item("launch-path/triton", 60, command=lambda: command, environment={"TRITON_INTERPRET": "0"})


def _times(dtype: str, shapes: Iterable[str] | None = None, batches: Iterable[int] = (2, 16)) -> Iterator[Item]:
    from .attention import times
    from .ground import SHAPES
    from .programs import programs

    for batch in batches if not DRY else (2,):
        for shape in shapes or SHAPES:
            name = f"times/{dtype}/{shape}/{batch}"
            needs = _needed([*programs(), "smooth"], [shape])
            yield Item(name, 40, partial(times, name, shape, batch, dtype), needs=needs)


def _steps(models: Iterable[tuple[str, int]]) -> Iterator[Item]:
    from .ground import SHAPES
    from .unet_step import NEEDS as STEP_NEEDS
    from .unet_step import step

    for model, batch in [("sd15", 2)] if DRY else models:
        name, needs = f"step/{model}/{batch}", _needed(STEP_NEEDS, [x for x in SHAPES if x.startswith(model)])
        yield Item(name, 60, partial(step, name, model, batch), needs=needs)


def _other_text() -> Iterator[Item]:
    from .other_text import compiled_once, graph_of_other_text

    for backend in ("triton", "cuda"):
        yield Item(f"text/graph/{backend}", 60, partial(graph_of_other_text, backend, "sd15"))
    for backend in ("triton", "cuda"):
        yield Item(f"text/compiled/{backend}", 60, partial(compiled_once, backend))


_SUITES = ("rows", "smooth", "layouts", "refine", "folded", "backward")  # the first three are CUDA's too


def _suites(cores: int) -> Iterator[Item]:
    """The tests of the kernels, over many processes."""
    of_triton = [TESTS / f"interpreted_{name}.py" for name in _SUITES]
    for backend, files in (("triton", of_triton), ("cuda", of_triton[:3])):
        files = files[1:2] if DRY else files
        # CUDA's compile nothing.
        share = max(1, cores - 2 if backend == "triton" else 2)
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "on_gpu.suite"]
        command += ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), "-n", str(share), *map(str, files)]
        name = "emulated-cuda" if DRY and backend == "cuda" else backend
        yield Item(
            f"suite/{backend}",
            110,
            command=_of(backend, lambda command=command: command),
            environment={"SDATTN_TEST_BACKEND": name},
        )


TRITON_KERNELS = ("rows", "smooth", "backward", "shared", "sum", "gaussian")
SANITIZED = (
    ("memcheck", "triton", "full"), ("memcheck", "cuda", "full"), ("racecheck", "cuda", "full"),
    ("memcheck", "cuda", "smooth"), ("memcheck", "triton", "smooth"), ("memcheck", "triton", "backward"),
    ("memcheck", "triton", "relevance"), ("memcheck", "triton", "gaussian"),
)  # fmt: skip


def _sanitized() -> Iterator[Item]:
    """Eight small cases under compute-sanitizer, memory as the driver gives it: in torch's large blocks a step past a
    tensor's end would go unseen."""
    kernel_names = {"cuda": ("sdattn",), "triton": tuple(f"{name}_kernel" for name in TRITON_KERNELS)}
    for i, (tool, backend, kernel) in enumerate(SANITIZED):
        shape = "any" if kernel in ("relevance", "gaussian") else SMALL
        under = ["--tool", tool, "--error-exitcode", "9", "--target-processes", "application-only"]
        under += ["--port", str(49200 + 20 * i), "--launch-timeout", "60"]  # side by side
        # Of libraries neither the kernels nor the calls that fail on purpose.
        under += [word for name in kernel_names[backend] for word in ("--kernel-name", f"kns={name}")]
        under += ["--report-api-errors", "no"] if tool == "memcheck" else []
        under += [sys.executable, "-m", "on_gpu", "--check", f"{backend}/{kernel}/{shape}"]
        yield Item(
            f"sanitize/{tool}/{backend}/{kernel}", 50, command=_of(backend, _tool("compute-sanitizer", under)),
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )  # fmt: skip


def _further_items() -> Iterator[Item]:
    from .checks import check
    from .ground import SHAPES
    from .more import both_ways, compiled, from_python

    first, last = next(iter(SHAPES)), [*SHAPES][-1]
    for backend in ("triton", "cuda"):
        if not DRY:  # the interpreter's bfloat16 products are wrong (triton #11584)
            yield Item(f"check-bfloat16/{backend}/full/{first}", 30, partial(check, backend, "full", first, "bfloat16"))
    if not DRY:
        yield from _times("bfloat16", (first, last), (2,))
    needs = _needed(["full", "backward"], [first])
    yield Item(f"backward/{first}/2", 60, partial(both_ways, f"backward/{first}/2", first, 2), needs=needs)
    yield Item(f"compiled/{first}/2", 60, partial(compiled, f"compiled/{first}/2", first, 2), needs=needs)
    if not DRY:
        yield Item("python/layer", 60, partial(from_python, "python/layer"))
        yield from _steps([("sdxl", 16)])


def _profiled() -> Iterator[Item]:
    """ncu's report of the kernels that count, at SD 1.5's largest layer."""
    for backend, program in (("triton", "full"), ("cuda", "full"), ("triton", "readme")):
        name = f"profile/{backend}/{program}/sd15-64x64"
        report = Path(os.environ["SDATTN_GPU_RESULTS"]) / f"ncu-{backend}-{program}"
        under = ["--profile-from-start", "off", "--clock-control", "none", "--set", "full", "-f", "-o", str(report)]
        under += ["--page", "details", sys.executable, "-m", "on_gpu", "--launch", f"{backend}/{program}"]
        yield Item(name, 60, command=_of(backend, _tool("ncu", under)))


def _of(backend: str, command: Callable[[], list[str]]) -> Callable[[], list[str]]:
    """The command, where the backend is there: asked in the item's own process, since a first look starts CUDA."""
    return lambda: [sys.executable, "-m", "on_gpu", "--if", backend, *command()]


def _tool(name: str, arguments: list[str]) -> Callable[[], list[str]]:
    def find() -> list[str]:
        if DRY:
            raise NotRun(f"a dry run has nothing for {name} to look at")
        path = shutil.which(name) or shutil.which(name, path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")
        if path is None:
            raise NotRun(f"there is no {name}")
        return [path, *arguments]

    return find


def wanted(all_phases: list[Phase], names: list[str], again: Path | None) -> list[Phase]:
    """Only items whose names begin with one of `names`; of a second call, those that had not passed in the results
    `again`; and the checks that these need.

    Facts are always wanted. Raises: ValueError for a name with which no item begins.
    """
    every = [item for phase in all_phases for item in phase.items]
    for name in names:
        if not any(item.name.startswith(name) for item in every):
            raise ValueError(f"no item begins with {name!r}; there are: {', '.join(item.name for item in every)}")
    done = record.last_status(record.read(again)) if again else {}

    def is_wanted(item: Item) -> bool:
        if names:
            return any(item.name.startswith(name) for name in names)
        return item.name not in done or done[item.name]["status"] != record.PASSED

    chosen = {"facts"}.union(*({item.name} | item.needs for item in every if is_wanted(item)))
    chosen_phases = [
        replace(phase, items=[item for item in phase.items if item.name in chosen]) for phase in all_phases
    ]
    return [phase for phase in chosen_phases if phase.items]


def beside(all_phases: list[Phase], package: Path) -> list[Phase]:
    """The items that time, each in turn with another version of the package, twice: whose figures say "baseline"."""
    doubled = []
    for phase in all_phases:
        items = []
        for item in phase.items:
            if not item.needs:
                items.append(item)
                continue
            paths = os.environ["PYTHONPATH"].split(os.pathsep)
            other = {"PYTHONPATH": os.pathsep.join([str(package), *paths[1:]]), "SDATTN_GPU_LABEL": "baseline"}
            for turn in (1, 2):
                for label, environment in (("baseline", other), ("now", {"SDATTN_GPU_LABEL": "now"})):
                    command = [sys.executable, "-m", "on_gpu", "--item", item.name]
                    name = f"{item.name}@{label}-{turn}"
                    items.append(
                        Item(name, item.limit, command=lambda command=command: command, environment=environment)
                    )
        doubled.append(replace(phase, items=items, seconds=4 * phase.seconds))
    return doubled


def _needed(kernels: Iterable[str], shapes: Iterable[str]) -> frozenset[str]:
    from .checks import KERNELS

    shapes = list(shapes)
    return frozenset(f"check/{b}/{k}/{shape}" for k in kernels for b in KERNELS[k][0] for shape in shapes)
