"""Files of programs and heads: what is written is read back, what is not such a file is refused by name."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys

import pytest

from sdattn_fast import Program, Refinement, SalienceDropout
from sdattn_fast.files import ProgramFile, atomic_write, load_heads, save_heads

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
    "guidance_scale": (-1, ValueError, "guidance_scale: expected a number in [0, 1000]"),
    "num_inference_steps": (2.5, TypeError, "num_inference_steps: expected an int"),
    "notes": ("no", TypeError, "notes: expected a mapping"),
}
HUGE = 10**400


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


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"guidance_scale": HUGE}, "guidance_scale: expected a finite number"),
        ({"num_inference_steps": HUGE}, "num_inference_steps: expected 1 to 10000"),
        ({"program": {"dropout": {"ratio": HUGE}}}, "SalienceDropout.ratio: expected a finite number"),
        ({"program": {"refine": {"sigma": 1e9}}}, r"Refinement.sigma: expected a number in \[0, 1000\]"),
        ({"program": {"refine": {"steps": 10**9}}}, "Refinement.steps: expected 1 to 1000"),
    ],
)
def test_numbers_beyond_all_use(tmp_path, fields, says):
    """They would overflow, or ask for 64 GB of Gaussian, or for hours of rounds."""
    path = tmp_path / "program.json"
    path.write_text(json.dumps({"format": "sdattn-fast program", "version": 1, "program": {}, **fields}))
    with pytest.raises(ValueError, match=f"program.json: {says}") as error:
        ProgramFile.load(path)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": 1' + "0" * 5000 + "}", "\0", "", "\udcff"])
def test_texts_that_are_no_json(tmp_path, text):
    path = tmp_path / "program.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"program\.json: expected a JSON file"):
        ProgramFile.load(path)


def test_a_byte_order_mark_is_no_fault(tmp_path):
    path = tmp_path / "program.json"
    FULL.save(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert ProgramFile.load(path) == FULL


def test_what_a_killed_process_left_is_removed(tmp_path):
    """That of processes that run, of other machines and of other files stays."""
    path, host = tmp_path / "program.json", socket.gethostname()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = [f".program.json.{host}-{pid}-x.part" for pid in (dead.pid, os.getpid())]
    names += [f".program.json.elsewhere-{dead.pid}-x.part", f".other.json.{host}-{dead.pid}-x.part"]
    for name in names:
        (tmp_path / name).touch()
    FULL.save(path)
    assert set(os.listdir(tmp_path)) == {"program.json", *names[1:]}


def test_links_and_devices_stay_what_they_are(tmp_path):
    (tmp_path / "folder").mkdir()
    target, link, pipe = tmp_path / "folder/program.json", tmp_path / "link.json", tmp_path / "pipe"
    target.touch()
    link.symlink_to(target)
    FULL.save(link)
    assert link.is_symlink() and ProgramFile.load(target) == FULL
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with atomic_write(pipe) as path:
        path.write_text("x")
    assert os.read(reader, 9) == b"x" and pipe.is_fifo()
    os.close(reader)


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
