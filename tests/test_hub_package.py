"""The package for the Hugging Face Hub: as the kernels library wants it, and loaded by it, apart from this checkout."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("kernels", reason="the kernels library is installed on Python 3.11 and later")

from kernels._rust import Digest, Metadata

ROOT = Path(__file__).resolve().parents[1]


def ran(*command: object, cwd: Path, **environment: str) -> str:
    everything = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=everything, cwd=cwd
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "sdattn-fast"
    ran(ROOT / "hub" / "make.py", folder, cwd=folder.parent)
    return folder


def imports(node: ast.Import | ast.ImportFrom, path: Path) -> list[str | Path]:
    """Names of modules; paths without suffix of what is imported from the package itself."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not node.level:
        return [str(node.module)]
    origin = path.parents[node.level - 1]
    return [origin / node.module.replace(".", "/")] if node.module else [origin / alias.name for alias in node.names]


def is_there(imported: str | Path, package: Path) -> bool:
    if isinstance(imported, str):
        return imported.split(".")[0] in {*sys.stdlib_module_names, "torch", "triton"}
    compiled = imported in (package / "_core", package / "_cuda")  # this package does without
    # The package's own __init__ is the Hub's, and has nothing for its modules.
    of_init = imported.parent != package and (imported.parent / "__init__.py").exists()
    return compiled or of_init or imported.is_dir() or imported.with_suffix(".py").exists()


def test_what_is_in_it(package: Path) -> None:
    """Digests are the library's, imports relative and complete, and the names of ops made as its builder wants them."""
    variants = sorted((package / "build").iterdir())
    assert [variant.name for variant in variants] == ["torch-cpu", "torch-cuda"]
    for variant in variants:
        metadata = Metadata.read_from_file(variant / "metadata.json")
        metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, variant))
        assert metadata.id.isidentifier() and metadata.license == "Apache-2.0"
        assert (variant / "backend" / "measured.json").exists() and (variant / "kernels" / "rows.py").exists()
    ops = 0
    for path in variants[0].rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert all(is_there(imported, variants[0]) for imported in imports(node, path)), ast.unparse(node)
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("custom_op"):
                assert ast.unparse(node.args[0]).startswith("add_op_namespace_prefix("), path
                ops += 1
    assert ops == 4


def test_its_own_tests(package: Path) -> None:
    """Triton's kernels, in its interpreter."""
    said = ran("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", cwd=package, TRITON_INTERPRET="1")
    assert "3 passed" in said


def test_two_versions_in_one_process(package: Path, tmp_path: Path) -> None:
    """Beside each other and beside the installed package: each registers ops of its own."""
    other = tmp_path / "other"
    shutil.copytree(package, other)
    for metadata in other.glob("build/*/metadata.json"):  # the library loads the one that torch was built for
        changed = {**json.loads(metadata.read_text()), "id": "_sdattn_fast_other"}
        metadata.write_text(json.dumps(changed))
    (tmp_path / "load.py").write_text(
        """
import sys
from pathlib import Path

import torch
from kernels import get_local_kernel

import sdattn_fast

query, key, value = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
expected = sdattn_fast.semantic_attention(query, key, value, backend="reference")
for folder in sys.argv[1:]:
    package = get_local_kernel(Path(folder))
    assert package is not sdattn_fast and package.semantic_attention is not sdattn_fast.semantic_attention
    torch.testing.assert_close(package.semantic_attention(query, key, value), expected)
    assert hasattr(getattr(torch.ops, package.__name__), "rows")
    print(package.__name__)
"""
    )
    said = ran("load.py", package, other, cwd=tmp_path).split()
    assert len(set(said)) == 2 and said[1] == "_sdattn_fast_other"


def test_the_folder_is_new(package: Path) -> None:
    again = subprocess.run([sys.executable, ROOT / "hub" / "make.py", package], capture_output=True, text=True)
    assert again.returncode == 1 and "expected a new folder, and this one exists" in again.stderr
