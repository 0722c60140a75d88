"""Every kernel compiled for every target, with the very arguments it is launched with, and held against the table.

docs/kernels.json has what each takes; `python benchmarks/kernel_table.py --write` makes it anew. No GPU is needed.
"""

from __future__ import annotations

import itertools
import os

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
if triton.__version__.startswith("3.2."):
    pytest.skip("its sources are described in another way: compile_matrix.py compiles them", allow_module_level=True)

from chosen_cases import ALL  # noqa: E402
from compiled_kernels import CASES, compiling  # noqa: E402
from fake_gpu import SHARED_KIB  # noqa: E402
from kernel_figures import table, worse  # noqa: E402

MEND = "`python benchmarks/kernel_table.py` shows what changed, and with --write accepts it"


RECORDED = table()


def _recorded(case):
    return RECORDED["triton"].get(case.architecture, {}).get(case.title, {})


def _compiled():
    """What is compiled: whatever is not as it was when the table was made; and, unless all are asked for, of each
    kernel one more, the architectures taking turns, to see that the table can be trusted."""
    architectures = list(dict.fromkeys(case.architecture for case in CASES.values()))
    kernels = list(dict.fromkeys(case.kernel for case in CASES.values()))
    turns = dict(zip(kernels, itertools.cycle(architectures), strict=False))
    samples = {(case.architecture, case.kernel): label for label, case in reversed(CASES.items())}
    sample = {samples[architecture, kernel] for kernel, architecture in turns.items()}
    return [x for x, case in CASES.items() if ALL or x in sample or _recorded(case).get("digest") != case.digest()]


COMPILED = _compiled()


@pytest.fixture(scope="module")
def of(request):
    """of(label) -> row of the table: compiled, or as recorded where nothing has changed since."""
    items = [x for x in request.session.items if x.path == request.path and hasattr(x, "callspec")]
    labels = dict.fromkeys(x.callspec.params["label"] for x in items)
    with compiling(CASES[label] for label in labels if label in COMPILED) as found:
        yield lambda label: found[label].result()[1] if label in found else _recorded(CASES[label])


@pytest.mark.parametrize("label", CASES)
def test_fits_its_target(label, of):
    case, row = CASES[label], of(label)
    # Bounds are of the table's Triton. Every version allots registers a little differently.
    most = case.most_stack + (0 if RECORDED["compilers"]["triton"] == triton.__version__ else 24)
    assert row["stack"] <= most, f"{row['stack']} bytes of stack: the kernel spills"
    assert row["local"] == 0 or most, f"{row['local']} loads and stores of local memory: the kernel spills"
    assert row["shared"] <= SHARED_KIB[case.target.arch] * 1024


@pytest.mark.parametrize("label", COMPILED)
def test_takes_no_more_than_the_table_has(label, of):
    if RECORDED["compilers"]["triton"] != triton.__version__:
        pytest.skip(f"docs/kernels.json is of triton {RECORDED['compilers']['triton']}, not {triton.__version__}")
    there = _recorded(CASES[label])
    assert there, f"not in docs/kernels.json; {MEND}"
    assert worse(of(label), there) == [], MEND


def test_table_has_no_others():
    there = {f"{target} {title}" for target, rows in RECORDED["triton"].items() for title in rows}
    assert there <= set(CASES), f"no longer compiled; {MEND}"
