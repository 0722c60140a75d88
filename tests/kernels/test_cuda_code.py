"""The CUDA kernels as nvcc left them in the extension, held against docs/kernels.json; nothing is compiled here."""

from __future__ import annotations

import os
import shutil

import machine_code
import pytest
from kernel_figures import cuda_extension, cuda_rows, table, worse
from old_triton import skip_unless_cuda_13_is_read

MEND = "`python benchmarks/kernel_table.py` shows what changed, and with --write accepts it"
WIDE = {"half_t": 16, "bfloat16_t": 16, "float": 136}  # bytes of stack, of the kernels for more than 80 tokens


@pytest.fixture(scope="module")
def built():
    """(version of the compiler, {target: {kernel: row}})."""
    binary = cuda_extension()
    if binary is None:
        if os.environ.get("CI") == "true" and shutil.which("nvcc"):
            pytest.fail("nvcc is here, and sdattn_fast._cuda was not built")
        pytest.skip("sdattn_fast._cuda is not built: no nvcc where this was installed")
    for name in ("cuobjdump", "nvdisasm"):
        if machine_code.tool(name) is None:
            pytest.skip(f"no {name}: neither triton nor a CUDA toolkit is here")
    skip_unless_cuda_13_is_read()
    return cuda_rows(binary)


def test_no_kernel_spills(built):
    """But those for more than 80 tokens, which hold two rows of 256 columns in 128 registers."""

    def most(name):
        return WIDE[name.partition("<")[2].partition(",")[0]] if ", 16, 16, " in name else 0

    spilling = {
        f"{target} {name}": row
        for target, rows in built[1].items()
        for name, row in rows.items()
        if row["stack"] > most(name) or (row["local"] and not most(name))
    }
    assert spilling == {}


def test_kernels_take_no_more_than_the_table_has(built):
    recorded = table()
    version, found = built
    if recorded["compilers"].get("cuda") not in (None, version):
        pytest.skip(f"docs/kernels.json is of nvcc {recorded['compilers']['cuda']}, not {version}")
    wrong = {}
    for target, rows in found.items():
        there = recorded["cuda"].get(target, {})
        for name, row in rows.items():
            reasons = worse(row, there[name]) if name in there else ["not in docs/kernels.json"]
            wrong |= {f"{target} {name}": reasons} if reasons else {}
        wrong |= {f"{target} {name}": ["no longer compiled"] for name in there.keys() - rows.keys()}
    assert wrong == {}, MEND
