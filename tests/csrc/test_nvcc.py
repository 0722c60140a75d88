"""Where setup.py finds nvcc, and what it compiles for: csrc/nvcc.py, against toolkits that only say where they are."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "nvcc.py"
_spec = importlib.util.spec_from_file_location("nvcc_of_setup", SOURCE)
nvcc = sys.modules["nvcc_of_setup"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(nvcc)

SAYS = """#!/bin/sh
if [ "$1" = --list-gpu-code ]; then echo sm_75; echo sm_80; echo sm_90; exit; fi
top=$(dirname "$0")/..
cat >&2 <<END
#$ TOP=$top
#$ CICC_PATH=$top/nvvm/bin
#$ INCLUDES="-I$top/include"
#$ LIBRARIES=  "-L$top/lib64/stubs" "-L$top/lib64"
#$ gcc -D__CUDACC_VER_MAJOR__=13 -D__CUDACC_VER_MINOR__=2 -x c++ "/dev/null"
END
"""
PARTS = {  # of a toolkit, and which of pip's packages has it
    "nvvm/bin/cicc": "nvvm",
    "include/crt/host_config.h": "cuda-crt",
    "include/cuda_runtime.h": "cuda-runtime",
    "lib/libcudart_static.a": "cuda-runtime",
}
ALL = {80, 86, 89, 90, 100, 120}


def toolkit(root: Path, without: str = "") -> Path:
    """A CUDA toolkit, laid out as pip's packages are; the path of its nvcc."""
    for part in PARTS:
        if part != without:
            (root / part).parent.mkdir(parents=True, exist_ok=True)
            (root / part).touch()
    return script(root / "bin" / "nvcc", SAYS)


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_cuda_home_comes_first_then_the_path_then_pips_packages(tmp_path):
    home, on_path, pips = (toolkit(tmp_path / name) for name in ("home", "on_path", "site/nvidia/cu13"))
    path = f"{tmp_path}/nothing:{on_path.parent}"
    folders = [str(tmp_path / "nothing"), str(tmp_path / "site")]
    for expected, environment in (
        (home, {"CUDA_HOME": str(tmp_path / "home"), "PATH": path}),
        (on_path, {"PATH": path}),
        (pips, {"PATH": f"{tmp_path}/nothing"}),
    ):
        found = nvcc.find(environment, folders)
        assert found.path == expected
        assert found.version == (13, 2)
        assert found.runtime.samefile(expected.parents[1] / "lib/libcudart_static.a")
        assert found.targets() == {75, 80, 90}


def test_a_wrapper_on_the_path_leads_to_its_toolkit(tmp_path):
    real = toolkit(tmp_path / "toolkit")
    wrapper = script(tmp_path / "bin" / "nvcc", f'#!/bin/sh\nexec "{real}" "$@"\n')
    found = nvcc.find({"PATH": str(wrapper.parent)}, [])
    assert found.path == wrapper
    assert found.runtime.samefile(real.parents[1] / "lib/libcudart_static.a")


def test_pips_packages_are_looked_for_where_pip_installs(tmp_path, monkeypatch):
    expected = toolkit(tmp_path / "nvidia/cu13")
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(nvcc.sysconfig, "get_path", lambda name: str(tmp_path))
    assert nvcc.find({}).path == expected


def test_a_wrong_cuda_home_is_not_passed_over(tmp_path):
    on_path = toolkit(tmp_path / "on_path")
    with pytest.raises(nvcc.NvccMissing, match=r"CUDA_HOME is .*/nowhere, which has no bin/nvcc: pip install"):
        nvcc.find({"CUDA_HOME": str(tmp_path / "nowhere"), "PATH": str(on_path.parent)}, [])


def test_no_nvcc_says_how_to_mend_it():
    with pytest.raises(nvcc.NvccMissing, match=r"no nvcc .* pip install 'nvidia-cuda-nvcc.*or set CUDA_HOME"):
        nvcc.find({"PATH": ""}, [])


@pytest.mark.parametrize("part", PARTS)
def test_an_nvcc_without_a_part_says_whose_it_is(tmp_path, part):
    toolkit(tmp_path, without=part)
    named = re.escape(part.split("/", 1)[1].removeprefix("bin/"))
    with pytest.raises(nvcc.NvccMissing, match=rf"has no {named}: pip install 'nvidia-{PARTS[part]}==13\.2\.\*'"):
        nvcc.find({"CUDA_HOME": str(tmp_path)}, [])


def test_an_nvcc_before_cuda_12_is_none(tmp_path):
    toolkit(tmp_path)
    script(tmp_path / "bin" / "nvcc", SAYS.replace("MAJOR__=13", "MAJOR__=11"))
    with pytest.raises(nvcc.NvccMissing, match=r"is of CUDA 11\.2, and 12\.0 is the oldest"):
        nvcc.find({"CUDA_HOME": str(tmp_path)}, [])


@pytest.mark.parametrize("text", ["#!/bin/sh\necho broken >&2\nexit 1\n", "#!/no/such/shell\n"])
def test_an_nvcc_that_does_not_run_is_none(tmp_path, text):
    script(tmp_path / "bin" / "nvcc", text)
    with pytest.raises(nvcc.NvccMissing, match=r"broken|does not run"):
        nvcc.find({"CUDA_HOME": str(tmp_path)}, [])


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        (None, "8.0 8.6 8.9 9.0 10.0 12.0+PTX"),
        ("", "8.0 8.6 8.9 9.0 10.0 12.0+PTX"),
        ("8.0;9.0+PTX", "8.0 9.0+PTX"),
        ("8.0 9.0a", "8.0 9.0a"),
        ("8.6; 8.0;8.6", "8.6 8.0"),
        ("7.0 7.5 8.0", "8.0"),
        ("Ampere;Hopper", "8.0 8.6+PTX 9.0+PTX"),
    ],
)
def test_architectures_as_torch_reads_them(wanted, names):
    assert nvcc.architectures(wanted, ALL).names == names


def test_flags_of_architectures():
    assert nvcc.architectures("8.0 9.0a+PTX 8.0", ALL).flags == (
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    )


def test_the_default_is_what_an_old_nvcc_can_do():
    assert nvcc.architectures(None, {75, 80, 86, 89, 90}).names == "8.0 8.6 8.9 9.0+PTX"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("8", r"expected a list like '8.0;9.0\+PTX', got '8', of which '8'"),
        ("8.0,9.0", "got '8.0,9.0', of which '8.0,9.0'"),
        ("8.0 9.0b", "got '8.0 9.0b', of which '9.0b'"),
        ("8.0+ptx", r"of which '8\.0\+ptx'"),
        ("native", "of which 'native'"),
        ("12.1", r"does not compile for 12\.1, only for 8\.0 8\.6 8\.9 9\.0 10\.0 12\.0"),
        ("7.0+PTX", r"expected an architecture from 8\.0 on, got '7\.0\+PTX'"),
    ],
)
def test_no_architecture(wanted, message):
    with pytest.raises(ValueError, match=f"^TORCH_CUDA_ARCH_LIST: .*{message}"):
        nvcc.architectures(wanted, ALL)


def test_the_switch(tmp_path):
    toolkit(tmp_path)
    there, nowhere = {"CUDA_HOME": str(tmp_path)}, {"CUDA_HOME": str(tmp_path / "nowhere")}
    for switch in ({}, {"SDATTN_FAST_CUDA": "auto"}, {"SDATTN_FAST_CUDA": "1"}):
        found, built_for = nvcc.choose(there | switch | {"TORCH_CUDA_ARCH_LIST": "9.0"}, [])
        assert found.path == tmp_path / "bin" / "nvcc"
        assert built_for.names == "9.0"
    assert nvcc.choose(there | {"SDATTN_FAST_CUDA": "0"}, []) == "SDATTN_FAST_CUDA is 0"
    assert "has no bin/nvcc" in nvcc.choose(nowhere, [])
    with pytest.raises(nvcc.NvccMissing, match=r"SDATTN_FAST_CUDA is 1, but CUDA_HOME is .*nowhere"):
        nvcc.choose(nowhere | {"SDATTN_FAST_CUDA": "1"}, [])
    with pytest.raises(ValueError, match="SDATTN_FAST_CUDA: expected 0, 1 or auto, got 'yes'"):
        nvcc.choose(there | {"SDATTN_FAST_CUDA": "yes"}, [])
