"""Recipes: which are searched, which is chosen, and the study from its search to its figures."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sdattn_fast.evaluation.recipe_search import KINDS, chosen_recipes, recipe_grid


def rows(present: float, bound: float) -> list[dict[str, float]]:
    return [{"present": present, "bound": bound}, {"present": present, "bound": float("nan")}]


def test_the_grid() -> None:
    grid = recipe_grid((0.1, 0.2), every=(1, 4), until=0.6)
    assert len(grid) == len(set(grid.values())) == 12
    assert {(r.presence > 0, r.binding > 0) for r in grid.values()} == {(True, False), (False, True), (True, True)}
    assert {(r.strength, r.every, r.until, r.normalize) for r in grid.values()} == {
        (strength, every, 0.6, True) for strength in (0.1, 0.2) for every in (1, 4)
    }


def test_the_best_of_each_kind_is_chosen() -> None:
    grid = recipe_grid((0.1, 0.2))
    results = {name: rows(0.5, 0.4) for name in ("stock", *grid)}
    results["objects, strength 0.2, every 1"] = rows(0.7, 0.1)
    results["objects, strength 0.1, every 1"] = rows(0.6, 0.9)
    results["binding, strength 0.1, every 3"] = rows(0.0, 0.5)
    results["both, strength 0.1, every 3"] = rows(0.55, 0.45)
    assert chosen_recipes(results, grid) == {
        "objects": "objects, strength 0.2, every 1",
        "binding": "binding, strength 0.1, every 3",
        "both": "both, strength 0.1, every 3",
        "fast": "both, strength 0.1, every 3",
    }
    worse = {name: rows(0.3, 0.3) for name in grid}
    assert chosen_recipes({"stock": rows(0.5, 0.4), **worse}, grid) == dict.fromkeys(KINDS, "stock")
    with pytest.raises(ValueError, match="there is no 'stock'"):
        chosen_recipes(worse, grid)


def test_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sdattn_fast_lab")
    import typer

    from sdattn_fast.evaluation import subjects
    from sdattn_fast.studies import recipes

    made = subjects.ShapesWorld.__init__

    def with_few_steps(self: Any, *args: Any) -> None:
        made(self, *args)
        self.steps = 3

    monkeypatch.setattr(subjects.ShapesWorld, "__init__", with_few_steps)
    monkeypatch.setattr(recipes, "costs", functools.partial(recipes.costs, count=1, rounds=1))
    monkeypatch.setenv("COLUMNS", "200")
    app = typer.Typer()
    app.command()(recipes._recipes)
    options = "--world shapes --choose 1 --report 2 --strength 0.1 --scale 0.5".split()
    ran = CliRunner().invoke(app, [str(tmp_path), *options], catch_exceptions=False)
    assert ran.exit_code == 0
    figures = json.loads((tmp_path / "recipes.json").read_text())
    assert set(figures) == {"chosen", "search", "report", "costs"} and set(figures["chosen"]) == set(KINDS)
    assert len(figures["search"]) == 7 and {"stock", "Attend-and-Excite", "SynGen"} <= set(figures["report"])
    assert figures["costs"]["SynGen"]["of stock"] > 0 and "SynGen" in ran.output
    # A second run draws nothing anew.
    monkeypatch.setattr("sdattn_fast.evaluation.run.draw_batch", None)
    monkeypatch.setattr(recipes, "costs", lambda *args: {})
    assert CliRunner().invoke(app, [str(tmp_path), *options], catch_exceptions=False).exit_code == 0
    bad = CliRunner().invoke(app, [str(tmp_path), "--report", "1"])
    assert bad.exit_code == 2
