"""`sdattn-fast evaluate`, on the shapes world and on prompts of one's own, and called again; bad input is a line."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build, parts, tokenizer, tokenizer_2  # noqa: F401

pytest.importorskip("textblob")

from sdattn_fast.cli import main


@pytest.fixture
def run(capsys):
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            main(["evaluate", *arguments])
        out, err = capsys.readouterr()
        return exit.value.code, out, err

    return run


@pytest.fixture
def one_thread():
    """Sums in one order: to the bit what a process of one thread gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_shapes_world(run, tmp_path: Path) -> None:
    arguments = ("--pictures", "3", "--batch", "2", "--steps", "2", "--folder", str(tmp_path), "--no-cost")
    code, out, _ = run(*arguments, "--only", "gate, amplify", "--only", "tuned")
    assert code == 0
    assert "\u2026" not in out and "map boundary F" in out, "nothing is cut off at 80 columns"
    assert "tuned: not drawn, no tuned" in out and "calibrated" in out and "gate, amplify" in out
    threshold = json.loads((tmp_path / "threshold.json").read_text())["threshold"]
    assert -1 < threshold < 1 and (tmp_path / "evaluation.html").exists()
    # What is drawn stays, what is new is added.
    batches = {p: p.stat().st_mtime_ns for p in (tmp_path / "batches").rglob("*.json")}
    code, out, _ = run(*arguments, "--only", "dropout", "--threshold", str(threshold))
    assert code == 0 and len(batches) == 4
    assert all(p.stat().st_mtime_ns == at for p, at in batches.items())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["measures"]) == {"stock", "dropout"} and summary["prompts"] == 3
    code, _, err = run("--pictures", "4", "--folder", str(tmp_path), "--only", "dropout")
    assert code == 2 and "has another evaluation" in err and err.count("\n") == 1


def test_prompts_of_ones_own(run, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle and a blue square\nrun quickly\n" + "very " * 90 + "long\nein gr\u00fcner Kreis\n")
    code, _, _ = run(
        "--prompts", str(prompts), "--folder", str(tmp_path / "out"), "--steps", "2", "--guidance-scale", "4",
        "--no-cost", "--batch", "3", "--only", "GradCAM, gradient", "--only", "phrases, all words",
        "--only", "structure", "--only", "gate, soft",
    )  # fmt: skip
    assert code == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(summary["measures"]["stock"]) == ["CLIP", "CLIP of the weakest phrase"]
    assert summary["measures"]["gate, soft"]["CLIP"]["captions"] == 4


def test_a_model_and_prompts_of_ones_own(run, tmp_path: Path, build: Callable[[str], Any]) -> None:  # noqa: F811
    """Its tokenizer knows letters alone: one prompt has no word it knows, one is too long, and looks like markup."""
    build("sd15").save_pretrained(tmp_path / "model")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        f"run quickly\n\u7eff\u8272\u7684\u5706\u5708\n{'a [big] car [/big] ' * 25}\n", encoding="utf-8-sig"
    )
    arguments = ("--model", str(tmp_path / "model"), "--clip", "shapes", "--steps", "2", "--batch", "2", "--no-cost",
             "--folder", str(tmp_path / "out"), "--only", "structure", "--only", "gate, soft",
             "--only", "phrases, all words", "--only", "GradCAM, gradient")  # fmt: skip
    code, out, err = run(*arguments, "--prompts", str(prompts))
    assert code == 0, err
    assert "and 'a [big] car [/big] a" in out and "what is beyond is not drawn" in " ".join(out.split())
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert len(summary["measures"]) == 5 and summary["measures"]["structure"]["CLIP"]["captions"] == 3
    prompts.write_text(" \n\n")
    code, _, err = run(*arguments, "--prompts", str(prompts))
    assert code == 2 and "expected at least one prompt" in err and err.count("\n") == 1


def test_two_processes_give_what_one_gives(run, tmp_path: Path, one_thread: None) -> None:
    arguments = (
        "--pictures",
        "3",
        "--batch",
        "1",
        "--steps",
        "1",
        "--no-cost",
        "--device",
        "cpu",
        "--only",
        "gate, hard",
    )
    assert run(*arguments, "--folder", str(tmp_path / "one"))[0] == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = (sys.executable, "-m", "sdattn_fast.cli.evaluate", *arguments, "--folder", str(tmp_path / "two"))
    both = [
        subprocess.Popen(command, env={**shared, "OMP_NUM_THREADS": "1", "RANK": rank, "LOCAL_RANK": rank},
                         stdout=subprocess.PIPE, text=True)
        for rank in "01"
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=300)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0]
    drawn = [line for line in outputs[0].splitlines() if " of 3" in line]
    assert len(drawn) == 3 and not outputs[1], "half each, and the first alone speaks"

    def files(folder: str) -> dict[str, bytes]:
        batches = (tmp_path / folder / "batches").rglob("*.json")
        files = [*batches, tmp_path / folder / "threshold.json", tmp_path / folder / "summary.json"]
        return {str(path.relative_to(tmp_path / folder)): path.read_bytes() for path in files}

    assert files("two") == files("one") and len(files("one")) == 8


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--model", "nowhere/else"), "--prompts"),
        (("--pictures", "1"), "--pictures"),
        (("--only", "magic"), "'magic'"),
        (("--heads", "/nowhere/heads.json"), "heads.json"),
        (("--tuned", "/nowhere/program.json"), "program.json"),
        (("--blip", "x"), "--blip"),
    ],
)
def test_bad_input(run, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    code, _, err = run("--folder", str(tmp_path), *arguments)
    assert code == 2 and words in err and err.count("\n") == 1
