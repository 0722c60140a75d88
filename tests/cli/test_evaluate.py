"""`sdattn-fast evaluate`, on the shapes world and on prompts of one's own, and called again; bad input is a line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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


def test_the_shapes_world(run, tmp_path: Path) -> None:
    asked = ("--pictures", "3", "--batch", "2", "--steps", "2", "--folder", str(tmp_path), "--no-cost")
    code, out, _ = run(*asked, "--only", "gate, amplify", "--only", "tuned")
    assert code == 0
    assert "tuned: not drawn, no tuned" in out and "calibrated" in out and "gate, amplify" in out
    threshold = json.loads((tmp_path / "threshold.json").read_text())["threshold"]
    assert -1 < threshold < 1 and (tmp_path / "evaluation.html").exists()
    # What is drawn stays, what is new is added.
    batches = {p: p.stat().st_mtime_ns for p in (tmp_path / "batches").rglob("*.json")}
    code, out, _ = run(*asked, "--only", "dropout", "--threshold", str(threshold))
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
