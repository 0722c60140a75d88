"""`import sdattn_fast` needs torch alone; whatever else is loaded where it is used."""

from __future__ import annotations

import subprocess
import sys


def test_import_needs_torch_alone():
    code = """
import sys, torch
before = set(sys.modules)
import sdattn_fast
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} - {"sdattn_fast"}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) - set(sys.stdlib_module_names)


def test_public_names():
    import sdattn_fast

    wanted = {
        "Program",
        "SalienceDropout",
        "Refinement",
        "Capture",
        "semantic_attention",
        "SemanticAttnProcessor",
        "apply",
    }
    assert wanted <= set(sdattn_fast.__all__)
    for name in sdattn_fast.__all__:
        assert getattr(sdattn_fast, name).__doc__
