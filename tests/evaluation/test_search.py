"""Techniques and recipes: which are searched, which is chosen, and the studies from search to figures."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from invoked import invoked

from sdattn_fast.evaluation.conditions import NOT_TECHNIQUES, conditions
from sdattn_fast.evaluation.peers import AttendAndExcite, SynGen
from sdattn_fast.evaluation.search import RESOLUTIONS, SCALES, peer_kinds, recipe_kinds, technique_kinds
from sdattn_fast.files import ProgramFile
from sdattn_fast.program import Program


def rows(present: float, bound: float) -> list[dict[str, float]]:
    return [{"present": present, "bound": bound}, {"present": present, "bound": float("nan")}]


def test_what_is_searched() -> None:
    kinds = {kind.name: kind.conditions for kind in (*recipe_kinds((0.1, 0.2)), *peer_kinds())}
    every = {c.name: c for conditions in kinds.values() for c in conditions}
    assert all(every[c.name] is c for conditions in kinds.values() for c in conditions)
    weights = {"objects": (True, True, False), "binding": (False, False, True), "both": (True, True, True)}
    for name, expected in weights.items():
        recipes = [c.patch["recipe"] for c in kinds[f"recipe, {name}"]]
        assert {(r.presence > 0, r.segregation > 0, r.binding > 0) for r in recipes} == {expected}
        assert {(r.strength, r.until, r.corrections) for r in recipes} == {
            (strength, *acting) for strength in (0.1, 0.2) for acting in ((0.25, 4), (0.15, 2))
        } | {(0.08, 0.35, 6), (0.16, 0.35, 6)}
    fast = [c.patch["recipe"] for c in kinds["recipe, fast"]]
    down = [c.patch["recipe"] for c in kinds["recipe, down blocks"]]
    assert {(r.presence, r.segregation, r.binding) for r in (*fast, *down)} == {(1, 1, 0)}
    assert {(r.until, r.corrections, r.layers) for r in fast} == {(0.1, 1, None)}
    assert {(r.until, r.corrections, r.layers) for r in down} == {(0.3, 5, "down_blocks.*")}
    for name, peer in (("Attend-and-Excite", AttendAndExcite), ("SynGen", SynGen)):
        assert {(type(c.peer), c.peer.scale, c.peer.resolution) for c in kinds[name]} == {
            (peer, scale, side) for scale in SCALES for side in RESOLUTIONS
        }


def test_the_best_of_each_kind_is_chosen() -> None:
    objects, binding, both, fast, _ = recipe_kinds((0.1, 0.2))
    peer = peer_kinds((1.0, 2.0), (16,))[0]
    conditions = [c for kind in (objects, fast, binding, both, peer) for c in kind.conditions]
    results = {name: rows(0.5, 0.4) for name in ("stock", *(c.name for c in conditions))}
    results["objects, strength 0.2, 4 corrections"] = rows(0.7, 0.1)
    results["objects, strength 0.1, 1 correction"] = rows(0.6, 0.9)
    results["binding, strength 0.1, 4 corrections"] = rows(0.9, 0.39)
    results["both, strength 0.1, 2 corrections"] = rows(0.45, 0.52)
    assert objects.ranked(results)[0].name == "objects, strength 0.2, 4 corrections"
    assert fast.ranked(results)[0].name == "objects, strength 0.1, 1 correction"
    assert binding.ranked(results)[0].name == "stock"
    assert both.ranked(results)[0].name == "both, strength 0.1, 2 corrections"
    # A peer is reported where it harms, too.
    harmful = results | {c.name: rows(0.2 + 0.1 * i, 0.0) for i, c in enumerate(peer.conditions)}
    assert peer.ranked(harmful)[0] is peer.conditions[1]
    # What a pipeline cannot carry was not drawn.
    assert peer.ranked({"stock": rows(0.9, 0.9), peer.conditions[0].name: rows(0.1, 0.1)})[0] is peer.conditions[0]
    with pytest.raises(ValueError, match="results: expected those of a condition of 'Attend-and-Excite', got none"):
        peer.ranked({"stock": rows(0.9, 0.9)})[0]


@pytest.fixture(scope="module")
def pipeline() -> Any:
    """`load_pipeline` of a pipeline that is loaded once."""
    from sdattn_fast.lab.pipeline import load_pipeline

    return functools.cache(load_pipeline)


@pytest.fixture
def few_steps(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study of the shapes world is short."""
    pytest.importorskip("sdattn_fast_lab")
    from sdattn_fast.evaluation import subjects
    from sdattn_fast.studies import choosing

    made = subjects.ShapesWorld.__init__

    def with_few_steps(self: Any, *args: Any) -> None:
        made(self, *args)
        self.steps = 3

    monkeypatch.setattr(subjects.ShapesWorld, "__init__", with_few_steps)
    monkeypatch.setattr(choosing, "load_pipeline", pipeline)

    def costs(
        pipe: Any, subject: Any, conditions: Any, inputs: Any, rounds: int
    ) -> Any:  # test_run.py has the true ones
        return {c.name: {"ms a step": 1.0, "of stock": 1.25, "peak MiB": 3.0} for c in conditions}

    monkeypatch.setattr(choosing, "costs", costs)
    monkeypatch.setenv("COLUMNS", "200")


def test_the_study(few_steps: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdattn_fast.studies import recipes

    options = "--world shapes --choose 1 --finals 2 --report 2 --strength 0.1 --scale 0.5 --resolution 16".split()
    ran = invoked(recipes._recipes, tmp_path, *options)
    assert ran.exit_code == 0
    figures = json.loads((tmp_path / "recipes.json").read_text())
    assert (
        set(figures) == {"chosen", "search", "finals", "report", "compared with peers", "costs"}
        and len(figures["chosen"]) == 7
    )
    assert len(figures["search"]) == 1 + 11 + 2
    assert set(figures["report"]) <= set(figures["finals"]) <= set(figures["search"])
    assert {cell["present"]["captions"] for cell in figures["finals"].values()} == {2}
    control = "Attend-and-Excite, 16x16, scale 0.5"
    assert {"stock", control, "SynGen, 16x16, scale 0.5"} <= set(figures["report"]) == set(figures["costs"])
    table = (tmp_path / "recipes.md").read_text().splitlines()
    assert table[0] == "| condition | present | bound | all right | time, of stock | peak MiB |"
    count = len(figures["report"])
    assert table[2].startswith("| stock | ") and len(table) == 2 + count + 2 * (3 + count - 2)
    assert table[2 + count + 1] == f"| compared with {control} | present | bound | all right |"
    against = figures["compared with peers"][control]
    assert against[control]["present"].keys() == {"captions", "mean"}
    difference = figures["report"][control]["present"]["mean"] - against["stock"]["present"]["mean"]
    assert against["stock"]["present"]["difference"] == pytest.approx(-difference)
    assert table[3].endswith(" | 1.25 | 3 |") and "positive control: Attend-and-Excite" in ran.output
    # A second run draws nothing anew.
    monkeypatch.setattr("sdattn_fast.evaluation.run.draw_batch", None)
    monkeypatch.setattr(recipes, "prices", lambda *args: figures["costs"])
    assert invoked(recipes._recipes, tmp_path, *options).exit_code == 0
    bad = invoked(recipes._recipes, tmp_path, "--report", "1")
    assert bad.exit_code == 2


def test_techniques_are_searched_alone() -> None:
    kinds = {kind.name: kind for kind in technique_kinds()}
    names = {c.technique for c in conditions()} - NOT_TECHNIQUES - {"selective maps"}
    assert set(kinds) == names
    every = [c for kind in kinds.values() for c in kind.conditions]
    assert len({c.name for c in every}) == len(every)
    for name, kind in kinds.items():
        assert {c.technique for c in kind.conditions} == {name}
        # A technique that harms is reported, too.
        assert kind.ranked({c.name: rows(0.1, 0.1) for c in kind.conditions})[0] is kind.conditions[0]


def test_the_study_of_techniques(few_steps: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdattn_fast.studies import techniques

    monkeypatch.setattr(techniques, "gate_threshold", lambda *args: 0.1)
    options = "--world shapes --choose 1 --report 2 --heads docs/shapes/chosen-heads.json".split()
    ran = invoked(techniques._techniques, tmp_path, *options)
    assert ran.exit_code == 0
    figures = json.loads((tmp_path / "techniques.json").read_text())
    assert set(figures["chosen"]) == {kind.name for kind in technique_kinds()} - {"CLIP-rewarded tuning"}
    assert (
        set(figures["report"]) == set(figures["costs"]) == {"stock"} | {c["name"] for c in figures["chosen"].values()}
    )
    assert figures["compared with controls"] == {}
    assert len((tmp_path / "techniques.md").read_text().splitlines()) == 2 + len(figures["report"])


def test_the_study_of_a_tuned_program(few_steps: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdattn_fast.studies import techniques

    # The kind that is tested, and another one.
    kinds = [kind for kind in technique_kinds() if kind.name in ("CLIP-rewarded tuning", "phrase fusion")]
    monkeypatch.setattr(techniques, "technique_kinds", lambda: kinds)
    monkeypatch.setattr(techniques, "gate_threshold", lambda *args: 0.1)
    tuned = tmp_path / "tuned.json"
    ProgramFile(Program(), guidance_scale=2.0, num_inference_steps=2).save(tuned)
    options = f"--world shapes --choose 1 --report 2 --tuned {tuned}".split()
    ran = invoked(techniques._techniques, tmp_path, *options)
    assert ran.exit_code == 0
    figures = json.loads((tmp_path / "techniques.json").read_text())
    assert set(figures["chosen"]) == {"CLIP-rewarded tuning", "phrase fusion"}
    control, reported = "stock, tuned guidance", {c["name"] for c in figures["chosen"].values()}
    assert set(figures["report"]) == set(figures["costs"]) == {"stock", control} | reported
    # The program is plain attention: what tuning changed is the guidance and the steps alone.
    assert set(figures["compared with controls"]) == {control}
    assert all(cell["difference"] == 0.0 for cell in figures["compared with controls"][control]["tuned"].values())
    table, comparison = (tmp_path / "techniques.md").read_text().split("\n\n")
    assert len(table.splitlines()) == 2 + len(figures["report"]) and len(comparison.splitlines()) == 3
