"""Every kernel compiled for every target, with the very arguments it is launched with, and held against the table.

docs/kernels.json has what each takes; `python benchmarks/kernel_table.py --write` makes it anew. No GPU is needed.
"""

from __future__ import annotations

import os

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from chosen_cases import ALL  # noqa: E402
from compiled_kernels import CASES, compiling  # noqa: E402
from fake_gpu import SHARED_KIB  # noqa: E402
from kernel_figures import table, worse  # noqa: E402

MEND = "`python benchmarks/kernel_table.py` shows what changed, and with --write accepts it"


def _chosen():
    """For sm_90 all. Of the others, unless all are asked for, one case of each kernel on AMD and one on NVIDIA, whose
    architectures take turns."""
    first = {}
    for label, case in CASES.items():
        first.setdefault((case.architecture, case.title.partition(":")[0]), label)
    architectures = dict.fromkeys(architecture for architecture, _ in first)
    others = [name for name in architectures if name.startswith("sm_") and name != "sm_90"]
    kernels = dict.fromkeys(kernel for _, kernel in first)
    turns = {first[others[i % len(others)], kernel] for i, kernel in enumerate(kernels)}
    amd = {first["gfx942", kernel] for kernel in kernels}
    return [x for x, case in CASES.items() if ALL or case.architecture == "sm_90" or x in turns | amd]


CHOSEN = _chosen()


@pytest.fixture(scope="module")
def of(request):
    """of(label) -> (machine code, row of the table). What the chosen tests need is compiled once, on all cores."""
    items = [x for x in request.session.items if x.path == request.path and hasattr(x, "callspec")]
    labels = dict.fromkeys(x.callspec.params["label"] for x in items)
    with compiling(CASES[label] for label in labels) as found:
        yield lambda label: found[label].result()


@pytest.fixture(scope="module")
def recorded():
    return table()


@pytest.mark.parametrize("label", CHOSEN)
def test_fits_its_target(label, of):
    case, (code, _) = CASES[label], of(label)
    assert code.target == case.architecture
    assert code.stack <= case.most_stack, f"{code.stack} bytes of stack: the kernel spills"
    assert code.local == 0 or case.most_stack, f"{code.local} loads and stores of local memory: the kernel spills"
    assert code.shared <= SHARED_KIB[case.target.arch] * 1024


@pytest.mark.parametrize("label", CHOSEN)
def test_takes_no_more_than_the_table_has(label, of, recorded):
    if recorded["compilers"]["triton"] != triton.__version__:
        pytest.skip(f"docs/kernels.json is of triton {recorded['compilers']['triton']}, not {triton.__version__}")
    case = CASES[label]
    rows = recorded["triton"].get(case.architecture, {})
    assert case.title in rows, f"not in docs/kernels.json; {MEND}"
    assert worse(of(label)[1], rows[case.title]) == [], MEND


def test_table_has_no_others(recorded):
    there = {f"{target} {title}" for target, rows in recorded["triton"].items() for title in rows}
    assert there <= set(CASES), f"no longer compiled; {MEND}"
