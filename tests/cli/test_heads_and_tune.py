"""`sdattn-fast heads` and `tune` on the lab's pipelines, few steps; what they write goes into `generate`."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from sdattn_fast.cli import main
from sdattn_fast.evaluation.world_subjects import world_subject
from sdattn_fast.files import ProgramFile, load_heads
from sdattn_fast.prompts import Prompt, read_prompts, words_to_find

pytest.importorskip("optuna")
pytest.importorskip("diffusers")


@pytest.fixture
def run(capsys):
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return exit.value.code, " ".join(out.split()), err

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tuned")


@pytest.fixture(scope="module", autouse=True)
def _one_loading():
    """The pipeline is the same in every command."""
    import sdattn_fast.lab as lab

    loaded, patch = lab.load_pipeline(), pytest.MonkeyPatch()
    patch.setattr(lab, "load_pipeline", lambda dtype=None: loaded)
    yield
    patch.undo()


def test_heads_by_masks(run, folder):
    captions = folder / "captions.txt"
    captions.write_text("\n".join(world_subject("shapes", 16, choosing=True).prompts))
    code, out, err = run(
        "heads", "--prompts", captions, "--steps", "4", "--batch", "16", "--out", folder / "heads.json"
    )
    assert code == 0, err
    heads, notes = load_heads(folder / "heads.json")
    assert len(heads) == 7 and 1 <= sum(map(len, heads.values())) <= 28
    assert notes["measure"] == "mask IoU" and notes["prompts"] + notes["held back"]["prompts"] <= 16
    assert notes["effective attention"] == notes["held back"]["chosen"] / notes["held back"]["all"] - 1
    assert f"Effective attention: {100 * notes['effective attention']:+.1f} %" in out
    assert Image.open(folder / "heads.png").size[1] > 200
    assert "drawn: 16 of 16" in out and "\u2026" not in out, "progress where there is no terminal, and nothing cut off"


def test_heads_by_clip_on_prompts_of_ones_own(run, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('a large red circle\n\n{"prompt": "a blue star and a green square", "words": ["star"]}\n')
    arguments = ("heads", "--prompts", prompts, "--steps", "1", "--score", "clip", "--count", "3")
    code, out, err = run(*arguments, "--layers", "up_blocks.*", "--out", tmp_path / "heads.json")
    assert code == 0, err
    heads, notes = load_heads(tmp_path / "heads.json")
    assert sum(map(len, heads.values())) == 3 and all(layer.startswith("up_blocks") for layer in heads)
    assert notes["objects"] == 2 and "effective attention" not in notes
    assert "Effective attention is defined by true masks" in out


def test_clip_is_asked_about_the_word_that_is_named(monkeypatch, run, tmp_path):
    """Whether the prompt is a caption of the shapes world or not."""
    from sdattn_fast.guidance.clip_score import ClipScorer

    asked, texts = [], ClipScorer.texts
    monkeypatch.setattr(ClipScorer, "texts", lambda self, some: asked.extend(some) or texts(self, some))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        '{"prompt": "a blue star and a green square", "words": ["square"]}\na dog on a mat\n'
        '{"prompt": "a red circle and a dog", "words": ["dog", "circle"]}\n'
    )
    code, _, err = run("heads", "--prompts", prompts, "--steps", "1", "--score", "clip", "--out", tmp_path / "h.json")
    assert code == 0, err
    names = ["a green square", "a photo of a dog", "a photo of a mat", "a photo of a dog", "a red circle"]
    assert asked[: len(names)] == names


def test_tune_writes_a_program_that_generate_takes(run, folder):
    arguments = ("tune", "--steps", "2", "--pictures", "4", "--report-pictures", "4", "--shortlist", "2",
                 "--batch", "4", "--out", folder, "--heads", folder / "heads.json")  # fmt: skip
    code, out, err = run(*arguments, "--trials", "3")
    assert code == 0, err
    assert "3 of 3: trial 2" in out and "detector: objects bound" in out
    file = ProgramFile.load(folder / "program.json")
    report = json.loads((folder / "report.json").read_text())
    assert file.num_inference_steps == 2 and file.guidance_scale is not None
    assert file.notes["judged by"] == report["judged by"] == "detector: objects bound"
    assert set(report["report"]) == {"reward", "judge"} and report["report"]["judge"]["pictures"] == 4
    assert 1 <= len(report["shortlist"]) <= 2
    assert {"history.png", "slices.png", "study.db"} <= {p.name for p in folder.iterdir()}
    # The same command goes on where it was.
    code, out, err = run(*arguments, "--trials", "4")
    assert code == 0 and "4 of 4: trial 3" in out and "1 of 4" not in out, err
    code, _, err = run(*arguments, "--trials", "4", "--temperature", "0.1")
    assert code == 2 and "was made with another reward: temperature, 0.25 and not 0.1" in err
    code, out, err = run("generate", "--prompt", "a red star", "--program", folder / "program.json", "--steps", "1",
                         "--out", folder / "picture.png")  # fmt: skip
    assert code == 0 and Image.open(folder / "picture.png").size == (64, 64), err


def test_the_objects_world_has_captions_and_a_detector_too(run, tmp_path):
    ranking = tmp_path / "heads.json"
    code, _, err = run("heads", "--model", "objects", "--steps", "1", "--batch", "16", "--out", ranking)
    assert code == 0, err
    heads, notes = load_heads(ranking)
    assert len(heads) == 7 and notes["measure"] == "mask IoU"
    code, _, err = run(
        "tune", "--model", "objects", "--steps", "1", "--pictures", "2", "--report-pictures", "2", "--trials", "1",
        "--out", tmp_path, "--heads", ranking,
    )  # fmt: skip
    assert code == 0, err
    assert ProgramFile.load(tmp_path / "program.json").notes["judged by"] == "detector: objects bound"


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["heads", "--score", "luck"], "--score: expected auto, masks or clip"),
        (["heads", "--model", "somebody/something"], "--prompts: expected a file of prompts"),
        (["heads", "--prompts", "/nowhere.txt"], "/nowhere.txt"),
        (["heads", "--prompts", "{empty}"], "prompts: expected at least one prompt in"),
        (["heads", "--prompts", "{nouns}"], "--prompts: expected captions of the shapes world"),
        (["heads", "--prompts", "{nouns}", "--score", "clip"], "--prompts: expected words that name something"),
        (["heads", "--prompts", "{captions}", "--count", "29", "--steps", "1"], "count: expected 1 to 28"),
        (["heads", "--batch", "0"], "'--batch': expected 1 to"),
        (["heads", "--out", "/"], "--out: expected a file"),
        (["heads", "--out", "/proc/nowhere/heads.json"], "--out: cannot write"),
        (["heads", "--out", "heads.png"], "--out: expected a name such as heads.json"),
        (["heads", "--count", "0"], "--count"),
        (["heads", "--steps", "0"], "--steps"),
        (["heads", "--guidance-scale", "nan"], "--guidance-scale"),
        (["tune", "--device", "tpu", "--out", "{out}"], "device: expected cpu or cuda"),
        (["tune", "--pictures", "1000000000", "--out", "{out}"], "--pictures"),
        (["tune", "--out", "/proc/nowhere"], "--out: cannot write"),
        (["heads", "--prompts", "{captions}", "--score", "clip", "--clip", "/nowhere"], "clip: expected a folder"),
        (["heads", "--prompts", "{captions}", "--clip", "shapes"], "--clip: scores are of masks, which need no CLIP"),
        (["tune", "--trials", "0"], "'--trials': expected 1 to"),
        (["tune", "--model", "somebody/something"], "--prompts: expected a file of prompts"),
        (["tune", "--prompts", "{captions}", "--report-prompts", "{captions}"], "expected prompts that are not among"),
        (["tune", "--space", "{captions}"], "expected a JSON file of the format 'sdattn-fast space'"),
        (["tune", "--heads", "/nowhere.json"], "/nowhere.json"),
        (["tune", "--out", "{captions}"], "--out: expected a folder"),
        (["tune", "--temperature", "-1", "--out", "{out}"], "temperature: expected a finite number > 0"),
        (["tune", "--judge", "/nowhere", "--out", "{out}"], "clip: expected a folder"),
        (["tune", "--judge", "shapes", "--out", "{out}"], "--judge: expected another CLIP"),
        (["tune", "--storage", "postgresql+psycopg://127.0.0.1:1/x", "--out", "{out}"], "storage: cannot open"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_2(run, tmp_path, arguments, says):
    files = {"empty": " \n", "nouns": "of the and\n", "captions": "a red circle\na blue star\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    named = {name: tmp_path / name for name in (*files, "out")}
    code, _, err = run(*(a.format(**named) for a in arguments))
    assert code == 2 and says in err
    assert err.startswith("sdattn-fast: ") and err.count("\n") == 1


def test_files_of_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text('a cat on a mat\n{"prompt": " two dogs ", "words": ["dogs"]}\n')
    assert read_prompts(path) == [Prompt("a cat on a mat"), Prompt("two dogs", ("dogs",))]
    assert words_to_find(Prompt("x"), ["a", "cat", "on", "the", "mat", ",", "mat (2)"]) == ["cat", "mat", "mat (2)"]
    named = ["t-shirt", "café", "🚗", "<thing>"]
    assert words_to_find(Prompt("x"), ["A", *named, "12"]) == named
    assert words_to_find(Prompt("x", ("dogs",)), ["two", "dogs"]) == ["dogs"]
    for text, says in (
        ('{"prompt": ""}', 'line 1: expected "prompt" to be some words'),
        ('{"prompt": "x", "words": "x"}', 'line 1: expected "words" to be a list'),
        ("fine\n{oops", "line 2: expected a prompt, or"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=says):
            read_prompts(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="expected text in UTF-8"):
        read_prompts(path)
