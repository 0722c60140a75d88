"""What the controls say: programs, conditions, files there and back; bad input is named."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdattn_fast import Program, Refinement, SalienceDropout
from sdattn_fast.files import ProgramFile, save_heads
from sdattn_fast.guidance import Recipe
from sdattn_fast.ui.controls import Controls, DrawRequest, chosen_phrases, loaded_from

PROMPT = "a large red circle and a large blue square on a gray background"
FULL = Controls(
    heads='{"up_blocks.*": [0]}', inactive_heads="zero", layers=("up_blocks.*",), ratio=0.2, dropout_axis="space",
    dropout_mode="random", threshold=0.3, sigma=0.5, rounds=2, refine_axis="space", renormalize="row",
)  # fmt: skip


def test_what_is_off_is_not_in_the_program() -> None:
    assert Controls().program() == Program(renormalize="content")
    assert Controls(ratio=None, threshold=None, sigma=None).program() == Program(renormalize="content")  # type: ignore[arg-type]
    assert Controls(threshold=0.4).program().refine == Refinement(1, 0.4, 0.0)
    assert Controls(sigma=0.4).program().refine == Refinement(1, None, 0.4)
    condition = Controls().condition(DrawRequest(PROMPT))
    assert condition.gate is condition.correct is condition.fuse is None and not condition.structure
    assert not Controls().needs_phrases()


def test_everything_that_is_on_reaches_the_condition() -> None:
    request = DrawRequest(PROMPT, seed=7)
    assert FULL.program() == Program(SalienceDropout(0.2, "space", "random"), Refinement(2, 0.3, 0.5, "space"), "row")
    on = replace(FULL, gate="amplify", gate_every=2.0, fuse="all", correct="reweight", structure=True, backend="cpu")
    condition = on.condition(request)
    assert condition.program == FULL.program() and condition.fuse == "all" and condition.structure
    assert condition.patch == {
        "layers": ("up_blocks.*",), "heads": {"up_blocks.*": (0,)}, "inactive_heads": "zero", "backend": "cpu",
        "seed": 7,
    }  # fmt: skip
    assert condition.gate == {"how": "amplify", "threshold": 0.2, "every": 2, "strength": 2.0}
    assert condition.correct == {"how": "reweight", "strength": 1.0}
    assert replace(on, correct="gradient").condition(request).correct == {"how": "gradient", "strength": 0.05}
    assert "strength" not in replace(on, gate="hard").condition(request).gate
    with_recipe = replace(on, recipe="objects")
    assert "recipe" not in with_recipe.condition(request).patch  # no phrase was chosen
    recipe = with_recipe.condition(replace(request, phrases=("a red circle",))).patch["recipe"]
    assert recipe == replace(Recipe.named("objects"), objects=("a red circle",))
    for switched_on in (
        {"gate": "soft"}, {"fuse": "all"}, {"recipe": "both"}, {"correct": "gradient"}, {"structure": True},
    ):  # fmt: skip
        assert replace(FULL, **switched_on).needs_phrases()


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"prompt": " "}, "prompt: expected some words"),
        ({"prompt": None}, "prompt: expected some words, got None"),
        ({"seed": None}, "seed: expected a whole number"),
        ({"seed": -1}, "seed: expected a whole number"),
        ({"seed": 2**53}, r"seed: expected a whole number in \[0, 9007199254740991\]"),
        ({"seed": 0.5}, "seed: expected a whole number"),
        ({"seed": math.inf}, "seed: expected a whole number"),
        ({"steps": 0}, "steps: expected a whole number"),
        ({"steps": math.nan}, "steps: expected a whole number"),
        ({"guidance_scale": None}, "guidance scale: expected a number"),
        ({"guidance_scale": math.nan}, "guidance scale: expected a number"),
        ({"guidance_scale": True}, "guidance scale: expected a number"),
    ],
)
def test_bad_questions(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        DrawRequest(**{"prompt": PROMPT, **fields})


@pytest.mark.parametrize(
    "fields, kind, says",
    [
        ({"heads": "{"}, ValueError, "heads: expected JSON such as"),
        ({"heads": "[0, 1]"}, TypeError, "heads: expected a mapping of layers"),
        ({"heads": '{"up*": ["a"]}'}, TypeError, "heads: expected ints"),
        ({"ratio": 1.5}, ValueError, "ratio: expected"),
        ({"threshold": 1.0}, ValueError, "threshold: expected"),
        ({"threshold": 0.5, "rounds": 0}, ValueError, "rounds: expected a whole number"),
        ({"gate": "hard", "gate_every": None}, ValueError, "look every: expected a whole number"),
        ({"renormalize": "some"}, ValueError, "renormalize: expected"),
    ],
)
def test_bad_controls(fields: dict[str, Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        Controls(**fields).condition(DrawRequest(PROMPT))


def test_a_saved_program_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "program.json"
    FULL.file(DrawRequest(PROMPT, steps=9, guidance_scale=3)).save(path)
    other = Controls(gate="hard", ratio=0.9, sigma=2.0, layers=("x",), heads='{"x": [1]}')
    controls, sampling = loaded_from(path, other)
    assert controls == replace(FULL, gate="hard"), "what a file says nothing of stays"
    assert sampling == {"steps": 9, "guidance_scale": 3.0}
    ProgramFile(Program()).save(path)
    assert loaded_from(path, other) == (Controls(gate="hard", renormalize="none"), {})


def test_chosen_heads_come_in_too(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    save_heads(path, {"mid_block.*": (1, 0)}, {})
    assert loaded_from(path, FULL) == (replace(FULL, heads='{"mid_block.*": [1, 0]}'), {})


@pytest.mark.parametrize(
    "text, says",
    [
        ("{", "^a.json: expected a JSON file"),
        ('{"format": "theirs"}', "^a.json: expected the format 'sdattn-fast program', got 'theirs'"),
        (json.dumps({"format": "sdattn-fast heads", "version": 1, "heads": 3}), "^a.json: heads: expected a mapping"),
        (json.dumps({"format": "sdattn-fast program", "version": 1, "x": 3}), "^a.json: .* got also 'x'"),
    ],
)
def test_bad_files(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises((ValueError, TypeError), match=says):
        loaded_from(path, Controls())


def test_phrases_are_the_objects_or_those_that_were_chosen(shapes: Any) -> None:
    def texts(chosen: Any) -> list[str]:
        return [p.text for p in chosen_phrases(PROMPT, shapes.tokenizer, chosen)]

    assert texts(None) == ["a large red circle", "a large blue square"]
    assert texts(()) == []
    assert texts(("a gray background", "red circle")) == ["a gray background", "red circle"]
    with pytest.raises(ValueError, match="phrases: 'green circle' is not in the prompt; did you mean"):
        texts(("green circle",))
