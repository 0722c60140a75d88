"""release/check.py, but for the installations: which version, and which files."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

from sdattn_fast import __version__

SCRIPT = Path(__file__).parents[1] / "release" / "check.py"


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_files_have_the_packages_version(check: ModuleType) -> None:
    assert check.version_of_release(None) == __version__


def test_a_tag_that_is_another_version_is_refused(check: ModuleType) -> None:
    with pytest.raises(SystemExit, match=rf"_version.py has {__version__}, .*, --tag has 9.9.9"):
        check.version_of_release("v9.9.9")


def test_the_file_for_this_machine(check: ModuleType, tmp_path: Path) -> None:
    mine, other = (f"sdattn_fast-1-cp310-abi3-manylinux_2_28_{name}.whl" for name in (os.uname().machine, "mips"))
    with pytest.raises(SystemExit, match=r"expected one sdattn_fast-1-\*.whl for this machine, found \[\]"):
        check.file_for_here(tmp_path, "sdattn_fast-1-*.whl")
    for name in (mine, other, "sdattn_fast-1+cu12-cp310-abi3-linux_x86_64.whl"):
        (tmp_path / name).touch()
    assert check.file_for_here(tmp_path, "sdattn_fast-1-*.whl") == (tmp_path / mine).resolve()
    (tmp_path / "sdattn_fast-1-py3-none-any.whl").touch()
    with pytest.raises(SystemExit, match=r"found \['sdattn_fast-1-"):
        check.file_for_here(tmp_path, "sdattn_fast-1-*.whl")
