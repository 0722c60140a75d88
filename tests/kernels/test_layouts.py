"""Whether the choice of the k largest stays in registers: kernels/select.py takes a row's columns as a matrix product's
layout has them on NVIDIA and on AMD's gfx9. Elsewhere it is as right, but moves the columns through shared memory.
"""

from __future__ import annotations

import os

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
if triton.__version__.startswith("3.2."):
    pytest.skip("its sources are described in another way: compile_matrix.py compiles them", allow_module_level=True)

import fake_gpu  # noqa: E402
from compiled_kernels import Case, _source, rows_call  # noqa: E402

from sdattn_fast import Program, SalienceDropout  # noqa: E402

IN_REGISTERS = ("sm_80", "sm_90", "gfx942")


class _Enough(Exception):
    """The layouts are known; what the machine makes of them is not looked at."""


def conversions(target, dropped, monkeypatch):
    """Changes of layout in the rows kernel, dropping so many of 12 content tokens."""
    program = Program(SalienceDropout((dropped + 0.5) / 12))
    case = Case("rows", "", fake_gpu.target(target), lambda: rows_call(program=program, words=False))
    call = case.call()
    assert call.options["DROP"] == {1: 1, 7: 8}[dropped]
    backend = type(triton.compiler.compiler.make_backend(case.target))
    add_stages, found = backend.add_stages, []

    def no_further(self, stages, *rest):
        def llir(source, metadata):
            found.append(str(source))
            raise _Enough

        add_stages(self, stages, *rest)
        stages["llir"] = llir

    launch = {"num_warps": call.options["num_warps"], "num_stages": call.options["num_stages"]}
    with monkeypatch.context() as patch, pytest.raises(_Enough):
        patch.setattr(backend, "add_stages", no_further)
        triton.compile(_source(call), target=case.target, options={**launch, "enable_fp_fusion": True})
    return found[0].count("ttg.convert_layout")


@pytest.mark.parametrize("target", [*IN_REGISTERS, "gfx1100"])
def test_eight_largest_move_no_more_than_the_largest(target, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    more = conversions(target, 7, monkeypatch) - conversions(target, 1, monkeypatch)
    # Triton 3.8 makes one or two of what they have in common; through shared memory there are 18 more.
    most = 2 if triton.__version__.startswith("3.8.") else 0
    assert more <= most if target in IN_REGISTERS else more > 8
