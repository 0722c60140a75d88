"""What reaches a GPU's driver, without one: every kernel through the backend, Triton, its compiler and its launcher."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from old_triton import skip_without_interpreter

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests/support"
B, H, M, N, D = 2, 3, 33, 77, 40
LOG2E = math.log2(math.e)


def printed(script, triton, argument="sm_90", **variables):
    """The lines that a script of tests/support prints, under the Triton in this folder, None for the installed one."""
    paths = [str(SUPPORT)] if triton is None else [str(triton), str(SUPPORT)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": ":".join(paths)}
    environment |= variables
    command = [sys.executable, str(SUPPORT / script), argument]
    run = subprocess.run(command, env=environment, cwd=SUPPORT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def launches(triton):
    """Of launch_path.py: [(kernel, grid, arguments)]."""
    return [(one["kernel"], one["grid"], one["arguments"]) for one in printed("launch_path.py", triton)]


@pytest.fixture(scope="module")
def made():
    return launches(None)


def of(made, kernel):
    return next((grid, arguments) for name, grid, arguments in made if name == kernel)


def test_every_kernel_is_launched(made):
    import sdattn_fast.kernels

    assert {kernel for kernel, *_ in made} == set(sdattn_fast.kernels.__all__)


def test_an_older_triton_launches_the_same(made, triton_of_torch_2_11):
    assert launches(triton_of_torch_2_11) == made


def strides(arguments, letter, names):
    return [arguments[f"{letter}_{name}"] * arguments["UNIT"] for name in names]


def test_rows(made):
    """Heads of a pixel side by side, a bias that all entries and pixels share, and everything that a program has."""
    grid, a = of(made, "rows_kernel")
    pointers = "Query Key Value Bias Out Maps Bits Content Gate Phrases Drop".split()
    assert [a[name] for name in pointers] == [name.lower() for name in pointers]
    assert a["Seed"] is None and a["HeadMode"] is None and a["Order"] == a["Slots"] == "?"
    assert a["scale"] == pytest.approx(0.1 * LOG2E)
    assert strides(a, "q", "bhm") == strides(a, "o", "bhm") == [M * H * D, D, H * D]
    assert strides(a, "k", "bhn") == strides(a, "v", "bhn") == [N * H * D, D, H * D]
    assert strides(a, "bias", "bhmn") == [0, 8 * N, 0, 8] and a["UNIT"] == 8
    assert (a["H"], a["N"], a["D"], a["DV"], a["M"], a["T"]) == (H, N, D, D, M, 2)
    assert not a["MEAN"] and a["PRECISION"] == "tf32x3"
    assert grid == [B * H * -(-M // a["BM"]), 1, 1]


def test_backward(made):
    grid, a = of(made, "backward_kernel")
    assert (a["GradOut"], a["Bits"], a["GradQuery"]) == ("grad_out", "bits", "of_query")
    assert a["scale"] == pytest.approx(0.1 * LOG2E) and a["scale_of_grad"] == pytest.approx(0.1)
    assert strides(a, "g", "bhm") == strides(a, "dq", "bhm") == [M * H * D, D, H * D]
    assert a["KEYS"] and a["VALUES"]
    assert grid == [B * H * a["groups"] * a["SLICES"], 1, 1]
    _, sums = of(made, "sum_kernel")
    assert (sums["First"], sums["Second"], sums["CF"], sums["CS"]) == ("of_key", "of_value", D, D)
    _, shared = of(made, "shared_kernel")
    assert (shared["GradBias"], shared["Relevance"], shared["TOKENS"]) == ("of_bias", "relevance", 2)


def test_folded(made):
    grid, a = of(made, "folded_kernel")
    assert (a["X"], a["Key"], a["Content"], a["Gate"]) == ("x", "packed_key", "content", "gate")
    assert [a[name] * a["UNIT"] for name in ("x_b", "x_h", "x_m")] == [M * 64, 0, 64]
    assert [a[name] * a["UNIT"] for name in ("k_b", "k_h", "k_n")] == [H * 80 * 64, 80 * 64, 64]
    assert (a["p_b"], a["p_h"], a["p_m"]) == (M * H * 80, 80, H * 80)
    assert grid == [B * H * -(-M // a["BM"]), 1, 1]


def test_smoothing_goes_down_then_across(made):
    down, across = [a for kernel, _, a in made if kernel == "smooth_kernel"][:2]
    assert down["X"] == "smoothed" and down["DOWN"] and not across["DOWN"]
    assert (down["height"], down["width"], down["sigma"], down["RADIUS"]) == (1, M, 0.8, 3)
    unit = down["UNIT"]
    assert unit == 8 and down["NEAR"] is False and across["NEAR"] is True
    assert [down[name] for name in ("x_b", "x_h", "x_m")] == [H * M * D // unit, M * D // unit, D // unit]
    assert down["x_c"] == 1


def test_the_stages_of_rounds_over_a_picture(made):
    made = [a for kernel, _, a in made if kernel == "picture_kernel" and a["STAGE"] != "anew"]
    assert [(a["STAGE"], a["FIRST"], a["stage"], a["shift"]) for a in made] == [
        ("begin", True, -1, 0), ("count", True, 0, 20), ("count", True, 0, 10), ("count", True, 0, 0),
        ("highest", True, 1, 0), ("round", True, 2, 0), ("highest", False, 1, 0), ("last", False, 2, 0),
    ]  # fmt: skip


def test_the_stages_of_one_round_are_one_compiled_kernel(made):
    """Or they would not get the same probabilities to the bit, and the k-th largest would not be among them."""
    from sdattn_fast.kernels import picture_kernel

    made = [a for kernel, _, a in made if kernel == "picture_kernel" and a["STAGE"] == "anew"]
    assert [(a["stage"], a["shift"], a["bits"]) for a in made] == [
        (0, 20, 11),
        (0, 10, 10),
        (0, 0, 10),
        (1, 0, 0),
        (2, 0, 0),
    ]
    kinds = [{name: x for name, x in a.items() if name not in ("stage", "shift", "bits")} for a in made]
    assert all(kind == kinds[0] for kind in kinds)
    assert {"stage", "shift", "bits"} == {p.name for p in picture_kernel.params if p.do_not_specialize}


@pytest.mark.parametrize("older", [False, True])
def test_bound_launches(older, request):
    """A launch that comes again is what it would be by itself, whatever ran in between."""
    triton = request.getfixturevalue("triton_of_torch_2_11") if older else None
    (counts,) = printed("bound_launches.py", triton)
    assert counts["plain"] >= 20 and counts["bound"] >= 60 and counts["straight"] >= 5


@pytest.mark.parametrize("older", [False, True])
def test_what_is_warmed_up_is_not_compiled_later(older, request, tmp_path):
    triton = request.getfixturevalue("triton_of_torch_2_11") if older else None
    (said,) = printed("warmed_up.py", triton, TRITON_CACHE_DIR=str(tmp_path))
    assert said["first"] == said["bar"] > 6 and said["later"] == 0
    assert {"rows_kernel", "backward_kernel", "sum_kernel"} <= set(said["launched"])
    assert said["finite"] == [True, True]
    assert said["again"] == 0 and 0 < said["longer"] < said["first"]


def test_what_is_not_launched_leaves_zeros_where_kernels_write():
    skip_without_interpreter()
    from sdattn_fast.backend.triton.compile_ahead import RESULTS

    written = {}
    for one in printed("launch_path.py", None, "writes", TRITON_INTERPRET="1"):
        written.setdefault(one["kernel"], set()).update(one["writes"])
    assert written == {kernel: set(names) for kernel, names in RESULTS.items()}


def test_a_picture_after_a_listing_call_is_what_it_would_be():
    skip_without_interpreter()
    assert printed("warmed_up.py", None, "pictures", TRITON_INTERPRET="1") == [{"same": True}]
