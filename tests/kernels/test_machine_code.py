"""The reader of machine code, on listings whose loops and counts are plain to see, and on what nvcc makes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import kernel_figures
import machine_code
import pytest
from old_triton import skip_unless_cuda_13_is_read

# As nvdisasm prints it: a loop in a loop, the outer left by a call that is a jump; a wait out of the way, which jumps
# back; a subroutine; what follows the end.
LISTING = """
	.target	sm_90a
	.section	.text.walk,"ax",@progbits
walk:
.text.walk:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_1:
        /*0010*/                   HMMA.16816.F32 R4, R8, R10, R4 ;
.L_x_2:
        /*0020*/                   FADD R4, R4, R5 ;
        /*0030*/               @P1 BRA `(.L_x_2) ;
        /*0040*/              @!P0 BRA `(.L_x_5) ;
.L_x_3:
        /*0050*/                   CALL.REL.NOINC `($walk$divide) ;
        /*0060*/                   HGMMA.64x16x16.F32 R8, gdesc[UR4], R8 ;
        /*0070*/              @!P2 CALL.REL.NOINC `(.L_x_4) ;
        /*0080*/                   STL [R1], R4 ;
        /*0090*/                   BRA `(.L_x_1) ;
.L_x_4:
        /*00a0*/                   EXIT ;
.L_x_5:
        /*00b0*/                   SYNCS P0, [UR4] ;
        /*00c0*/              @!P0 BRA `(.L_x_5) ;
        /*00d0*/                   BRA `(.L_x_3) ;
        .weak           $walk$divide
$walk$divide:
        /*00e0*/                   MUFU.RCP R2, R2 ;
        /*00f0*/                   RET.REL.NODEC R20 `(walk) ;
.L_x_6:
        /*0100*/                   BRA `(.L_x_6);
"""


def of(listing: str = LISTING) -> machine_code.Code:
    target, functions = machine_code.sass(listing)
    ((name, code),) = functions.items()
    return machine_code.of_sass(name, target, code, 32, 0, 0)


def test_what_a_listing_says():
    code = of()
    assert (code.name, code.target, code.local) == ("walk", "sm_90", 1)
    assert code.matrix == {"HGMMA.64x16x16.F32": 1, "HMMA.16816.F32": 1}
    assert len(code.instructions) == 17


def test_older_listings_name_their_target_elsewhere():
    assert (
        of(
            LISTING.replace("\t.target\tsm_90a", '\t.headerflags\t@"EF_CUDA_SM80 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"')
        ).target
        == "sm_80"
    )


def test_loops_are_natural_ones():
    code = of()
    assert [(loop.first, len(loop.inside)) for loop in code.loops] == [(1, 12), (2, 2), (11, 2)]
    assert code.main_loop() is code.loops[0]


def test_slots_are_counted_by_turns():
    code = of()
    assert code.slots() == 14  # neither the subroutine nor what follows the end
    turns = {1: 10, 2: 3, 11: 1}
    assert code.slots(lambda loop: turns[loop.first]) == 2 + 10 * (10 + 3 * 2)
    assert code.slots(lambda loop: turns[loop.first], code.main_loop()) == 10 + 3 * 2


def test_the_fewest_instructions_of_a_turn():
    code = of()
    loop = code.main_loop()
    shortest = ["HMMA", "FADD", "BRA", "BRA", "CALL", "HGMMA", "CALL", "STL", "BRA"]
    assert code.least(loop, {}) == len(shortest)
    assert code.least(loop, {"HMMA": 1, "FADD": 3}) == len(shortest) + 2 * 2
    assert code.least(loop, {"SYNCS": 1}) == len(shortest) + 3
    assert code.least(loop, {"HMMA": 2}) is None


def test_no_loop_has_the_matrix_instructions_of_both_places():
    assert of(LISTING.replace("S2R R0, SR_TID.X", "HMMA.16816.F32 R4, R8, R10, R4")).main_loop() is None


KERNEL = """def kernel(D, DA, N):
    for d in range(0, D + 1 - 1, 2 * DA):
        x = d
        y = x
    while N:
        N = y
"""


@pytest.mark.parametrize("line, branch, turns", [(3, 2, 5), (3, 4, 5), (6, 5, 1), (6, 6, 1)])
def test_turns_come_from_the_source(line, branch, turns, tmp_path):
    """The branch may be said to be the statement's, or anywhere in it."""
    (tmp_path / "kernel.py").write_text(KERNEL)

    def at(line):
        return f'\t//## File "{tmp_path}/kernel.py", line {line} inlined at "{tmp_path}/kernel.py", line 1\n'

    code = of(
        f"\t.target\tsm_80\n.text.k:\n{at(1)}        /*0000*/    S2R R0, SR_TID.X ;\n.L_x_0:\n{at(line)}"
        f"        /*0010*/    FADD R4, R4, R5 ;\n{at(branch)}        /*0020*/    @P0 BRA `(.L_x_0) ;\n"
        "        /*0030*/    EXIT ;\n"
    )
    assert code.instructions[1].frames == ((f"{tmp_path}/kernel.py", line),)
    assert code.slots(machine_code.python_turns({"D": 40, "DA": 4, "N": 7})) == 2 + 2 * turns


def test_amd_assembly():
    code = machine_code.amdgcn(
        "rows_kernel:\n\tv_mfma_f32_32x32x8_f16 v[0:15], v[2:3], v[4:5], v[0:15]\n\tv_add_f32_e32 v1, v2, v3\n"
        "\tscratch_store_dwordx2 off, v[4:5], off ; 8-byte Folded Spill\n\tscratch_load_dword v2, off, off offset:4\n"
        "amdhsa.kernels:\n  - .args:\n      - .name: Query\n    .name:           rows_kernel\n"
        "    .private_segment_fixed_size: 12\n    .vgpr_count:     182\n",
        "gfx942",
        1024,
    )
    assert code == machine_code.Code("rows_kernel", "gfx942", 182, 12, 1024, 1, {"v_mfma_f32_32x32x8_f16": 1})


def test_what_counts_as_worse():
    old = dict(registers=100, stack=0, local=0, shared=1024, matrix={"HMMA.16816.F32": 4}, slots=1000)
    assert kernel_figures.worse(old, old) == []
    assert kernel_figures.worse(old | dict(slots=1030, registers=90, matrix={"HGMMA.64x64x16.F32": 1}), old) == []
    for more in (
        dict(registers=101), dict(stack=8), dict(local=1), dict(shared=1040), dict(slots=1031),
        dict(matrix={"HMMA.16816.F32": 5}), dict(matrix={}),
    ):  # fmt: skip
        assert len(kernel_figures.worse(old | more, old)) == 1, more


def test_issue_against_memory():
    code = machine_code.Code("k", "sm_90", 1, 0, 0, 0, {})
    # docs/design.md, "Tile sizes on a GPU": at D = 40, 15 to 16 instructions a logit are within 13 % of the time
    # of Q and O.
    row = kernel_figures.row(code, 155, 10, bytes_=160 / 77)
    assert row["per logit"] == 15.5
    assert 1.0 < row["of memory time"] < 1.13


SOURCE = """
#include <mma.h>
using namespace nvcuda;
namespace some {
template <class T, int BLOCKS, int A, int TILES>
__global__ void rows_kernel(const half* q, const half* k, T* out, int tiles) {
  wmma::fragment<wmma::matrix_a, 16, 16, 16, half, wmma::row_major> a;
  wmma::fragment<wmma::matrix_b, 16, 16, 16, half, wmma::col_major> b;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> s;
  wmma::load_matrix_sync(b, k, 16);
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    wmma::load_matrix_sync(a, q + 256 * tile, 16);
    wmma::fill_fragment(s, 0.0f);
    wmma::mma_sync(s, a, b, s);
    wmma::store_matrix_sync(out + 256 * tile, s, 16, wmma::mem_row_major);
  }
}
template __global__ void rows_kernel<float, 5, 1, 1>(const half*, const half*, float*, int);
__global__ void spills(float* x, int n) {
  float kept[64];
#pragma unroll 1
  for (int i = 0; i < 64; ++i) kept[i] = x[i * n];
  x[threadIdx.x] = kept[n & 63];
}
}
"""


def test_kernels_that_nvcc_compiled(tmp_path):
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).is_file():
        pytest.skip("no nvcc")
    pytest.importorskip("triton")
    skip_unless_cuda_13_is_read()
    (tmp_path / "a.cu").write_text(SOURCE)
    targets = [x for cc in (80, 90) for x in ("-gencode", f"arch=compute_{cc},code=sm_{cc}")]
    subprocess.run([nvcc, "-std=c++17", *targets, "-c", "a.cu", "-o", "a.o"], cwd=tmp_path, check=True)
    version, rows = kernel_figures.cuda_rows(tmp_path / "a.o")
    assert version[0].isdigit()
    assert set(rows) == {"sm_80", "sm_90"}
    assert "plain" not in str(rows)  # too few products
    for kernels in rows.values():
        assert set(kernels) == {"rows_kernel<float, 5, 1, 1>", "spills"}
        walk, spills = kernels["rows_kernel<float, 5, 1, 1>"], kernels["spills"]
        assert walk["stack"] == walk["local"] == 0
        assert walk["matrix"] == {"HMMA.16816.F32": 2}
        assert 10 < walk["slots"] < 100
        assert spills["stack"] >= 256
        assert spills["local"] > 0
        assert spills["matrix"] == {}
