"""Files of programs and heads: what is written is read back, what is not such a file is refused by name."""

from __future__ import annotations

import errno
import json
import os

import pytest

from sdattn_fast import Program, Refinement, SalienceDropout
from sdattn_fast.files import ProgramFile, load_heads, save_heads

FULL = ProgramFile(
    Program(SalienceDropout(0.3, "space", "random"), Refinement(3, None, 0.5), "content"),
    layers=("up_blocks.*",), heads={"up_blocks.1.attn2": (0, 3), "mid": ()}, inactive_heads="zero",
    guidance_scale=5.5, num_inference_steps=17, notes={"reward": 0.75, "trials": 3},
)  # fmt: skip


@pytest.mark.parametrize("file", [ProgramFile(), FULL, ProgramFile(Program(refine=Refinement(threshold=0.0)))])
def test_what_is_saved_is_loaded(tmp_path, file):
    file.save(tmp_path / "a" / "program.json")
    assert ProgramFile.load(tmp_path / "a" / "program.json") == file


def test_heads_are_saved_and_loaded(tmp_path):
    save_heads(tmp_path / "heads.json", {"mid": [2, 0], "up": []}, {"measure": "mask IoU"})
    assert load_heads(str(tmp_path / "heads.json")) == ({"mid": (2, 0), "up": ()}, {"measure": "mask IoU"})


CHANGES = {
    "format": ("sdattn-fast heads", ValueError, "expected the format 'sdattn-fast program', got 'sdattn-fast heads'"),
    "version": (2, ValueError, "expected version 1"),
    "extra": (1, ValueError, "got also 'extra'"),
    "program": ([], TypeError, "program: expected a mapping"),
    "layers": (3, TypeError, "layers: expected names"),
    "heads": ({"mid": [1, 1]}, ValueError, "heads: expected each index >= 0 once in layer 'mid'"),
    "inactive_heads": ("off", ValueError, "inactive_heads: expected 'plain' or 'zero'"),
    "guidance_scale": (-1, ValueError, "guidance_scale: expected a finite number >= 0"),
    "num_inference_steps": (2.5, TypeError, "num_inference_steps: expected an int"),
    "notes": ("no", TypeError, "notes: expected a mapping"),
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_bad_field_is_named_with_its_file(tmp_path, field):
    value, kind, says = CHANGES[field]
    path = tmp_path / "program.json"
    FULL.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(kind) as error:
        ProgramFile.load(path)
    assert says in str(error.value) and str(path) in str(error.value)


def test_bad_programs_inside(tmp_path):
    path = tmp_path / "program.json"
    for program, says in (
        ({"dropout": {"ratio": 2}}, r"SalienceDropout.ratio: expected a number in \[0, 1\]"),
        ({"dropout": {"share": 0.1}}, "program.dropout: expected the fields ratio, axis, mode, got also 'share'"),
        ({"refine": 3}, "program.refine: expected a mapping or null"),
        ({"renormalize": "all"}, "Program.renormalize"),
    ):
        path.write_text(json.dumps({"format": "sdattn-fast program", "version": 1, "program": program}))
        with pytest.raises((ValueError, TypeError), match=says):
            ProgramFile.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="expected a JSON file"):
        ProgramFile.load(path)
    with pytest.raises(FileNotFoundError):
        ProgramFile.load(tmp_path / "none.json")


def test_a_full_disk_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "program.json"
    FULL.save(path)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left.*program\.json"):
        ProgramFile().save(path)
    assert ProgramFile.load(path) == FULL
    assert os.listdir(tmp_path) == ["program.json"]
