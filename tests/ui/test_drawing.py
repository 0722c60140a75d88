"""Both pictures: stock first, the pipeline as before whenever the iterator stops; the script draws the same."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdattn_fast.cli.generate import pipeline_of
from sdattn_fast.lab.detected_text import detected_text
from sdattn_fast.ui.controls import Controls, DrawRequest
from sdattn_fast.ui.drawing import draw_both
from sdattn_fast.ui.script import script

PROMPT = "a large red circle and a large blue square on a gray background"
REQUEST = DrawRequest(PROMPT, ("a large red circle", "a large blue square"), seed=3, steps=4, guidance_scale=4.0)
WORDS = ["a", "large", "red", "circle", "and", "a (2)", "large (2)", "blue", "square", "on", "a (3)", "gray",
         "background"]  # fmt: skip
EVERYTHING = Controls(
    gate="amplify", gate_threshold=0.9, gate_every=1, fuse="adjective-noun", heads='{"up_blocks.*": [0]}', ratio=0.2,
    threshold=0.2, sigma=0.5, correct="gradient", structure=True,
)  # fmt: skip


def processors(pipe: Any) -> dict[str, int]:
    return {name: id(processor) for name, processor in pipe.unet.attn_processors.items()}


def test_stock_comes_first_and_what_was_asked_beside_comes_last(shapes: Any, scorer: Any) -> None:
    before, progress = processors(shapes), []
    drawing = draw_both(
        shapes, REQUEST, EVERYTHING, scorer=scorer, memory=True, detected=detected_text("shapes"),
        tell=lambda share, stage: progress.append((share, stage)),
    )  # fmt: skip
    first = next(drawing)
    assert processors(shapes) == before and first.patched is None
    plain = shapes(
        PROMPT, num_inference_steps=4, guidance_scale=4.0, generator=torch.Generator().manual_seed(3)
    ).images[0]
    assert_alike(first.stock.picture, plain)
    second, third, last = drawing
    assert processors(shapes) == before
    assert second.patched is not None and not np.array_equal(second.patched.picture, plain)
    assert not second.stock.maps and list(third.stock.maps) == list(second.patched.maps) == WORDS
    assert all(one.size == plain.size for one in third.stock.maps.values())
    assert not np.array_equal(third.stock.maps["red"], second.patched.maps["red"])
    assert third.stock.mib is None and last.patched is not None
    for side in (last.stock, last.patched):
        assert side.seconds > 0 and side.mib is not None and 0 < side.mib < 200
        assert side.seen and side.score is not None and -1 < side.score < 1
    assert last.looked and all("a large red circle 0." in line for line in last.looked)
    shares = [share for share, _ in progress]
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert list(dict.fromkeys(stage for _, stage in progress)) == [
        "Warming up", "Stock", "Patched", "Stock's maps", "Stock's memory", "Patched memory",
    ]  # fmt: skip


def test_with_everything_off_the_patched_picture_is_stocks(shapes: Any) -> None:
    *_, last = draw_both(shapes, REQUEST, Controls(), stock_maps=False)
    stock, patched = (np.asarray(side.picture).astype(int) for side in (last.stock, last.patched))
    assert np.abs(stock - patched).max() <= 1 and last.stock.mib is None and not last.looked


@pytest.mark.parametrize("ends", ["closed", "failed"])
def test_the_pipeline_is_as_before_when_a_drawing_ends_early(ends: str, shapes: Any) -> None:
    before, stops = processors(shapes), []

    def tell(share: float, stage: str) -> None:
        if stage == "Patched":
            stops.append(processors(shapes) != before)
            raise RuntimeError("the disk is full")

    drawing = draw_both(shapes, REQUEST, EVERYTHING.__class__(ratio=0.3), tell=tell)
    next(drawing)
    if ends == "closed":
        drawing.close()  # type: ignore[attr-defined]
    else:
        with pytest.raises(RuntimeError, match="the disk is full"):
            next(drawing)
        assert stops == [True], "it failed while the patch was in place"
    assert processors(shapes) == before


@pytest.mark.parametrize(
    "draw_request, controls, says",
    [
        (replace(REQUEST, phrases=()), Controls(fuse="all"), "phrases: expected at least one"),
        (replace(REQUEST, phrases=("a dog",)), Controls(), "phrases: 'a dog' is not in the prompt"),
        (REQUEST, Controls(gate="hard"), "semantic gate: expected a CLIP"),
        (REQUEST, Controls(correct="gradient", gradient_strength=None), "strength: expected"),  # type: ignore[arg-type]
        (REQUEST, Controls(layers=("nowhere.*",)), "layers: "),
        (REQUEST, Controls(heads='{"up_blocks.*": [99]}'), "heads: "),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_drawn(
    draw_request: DrawRequest, controls: Controls, says: str, shapes: Any
) -> None:
    before, progress = processors(shapes), []
    with pytest.raises((ValueError, TypeError), match=says):
        list(draw_both(shapes, draw_request, controls, tell=lambda share, stage: progress.append(stage)))
    assert not progress and processors(shapes) == before


@pytest.mark.parametrize(
    "draw_request, controls",
    [
        (replace(REQUEST, negative_prompt='a "gray" circle', phrases=("red circle",)), EVERYTHING),
        (REQUEST, replace(EVERYTHING, correct="reweight", gate="soft", structure=False, layers=("up_blocks.*",))),
        (REQUEST, Controls(ratio=0.4, dropout_mode="random", renormalize="none")),
        (REQUEST, Controls(recipe="both")),
    ],
    ids=["everything", "reweight", "random dropout", "recipe"],
)
def test_the_script_draws_the_same_picture(
    draw_request: DrawRequest, controls: Controls, shapes: Any, scorer: Any, clip: str, tmp_path: Path, monkeypatch: Any
) -> None:
    *_, last = draw_both(shapes, draw_request, controls, scorer=scorer, stock_maps=False)
    assert_same(last.patched, script(draw_request, controls, "shapes", clip), tmp_path, monkeypatch)


def test_a_script_that_forgets_a_control_is_noticed(shapes: Any) -> None:
    """The controls that change the picture least."""
    controls = replace(EVERYTHING, gate="off")
    pictures = []
    for variant in (controls, replace(controls, threshold=0.0), replace(controls, sigma=0.0)):
        *_, last = draw_both(shapes, REQUEST, variant, stock_maps=False)
        pictures.append(last.patched.picture)
    for other in pictures[1:]:
        with pytest.raises(AssertionError, match="of 255"):
            assert_alike(other, pictures[0])


def test_a_pipeline_of_ones_own(build: Any, tmp_path: Path, monkeypatch: Any) -> None:
    folder = tmp_path / "tiny"
    build("sd15").save_pretrained(folder)
    pipe = pipeline_of(str(folder), "cpu", "bfloat16")
    pipe.set_progress_bar_config(disable=True)
    draw_request = DrawRequest("a red car and a blue bench", ("a red car",), seed=1, steps=3)
    controls = Controls(fuse="all", ratio=0.3, sigma=0.5, correct="gradient", structure=True)
    *_, last = draw_both(pipe, draw_request, controls)
    assert last.patched is not None and last.patched.seen is None and last.patched.score is None
    assert list(last.stock.maps) == list(last.patched.maps) == ["a", "red", "car", "and", "a (2)", "blue", "bench"]
    assert_same(
        last.patched, script(draw_request, controls, str(folder), None, "cpu", "bfloat16"), tmp_path, monkeypatch
    )


def assert_same(patched: Any, text: str, folder: Path, monkeypatch: Any) -> None:
    """Same but for rounding: two drawings in one process get memory at other addresses, for which torch's own
    operators may take other code, and nothing promises the same bits."""
    (folder / "again.py").write_text(text)
    monkeypatch.chdir(folder)
    variables = runpy.run_path(str(folder / "again.py"))
    assert_alike(Image.open(folder / "picture.png"), patched.picture)
    assert variables["maps"].keys() >= patched.maps.keys()
    for word, overlay in patched.maps.items():
        assert_alike(variables["maps"][word], overlay)


def assert_alike(one: Any, other: Any) -> None:
    """A control that is forgotten moves more: test_a_script_that_forgets_a_control_is_noticed."""
    apart = np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int))
    assert apart.max() <= 8 and apart.mean() <= 0.05, f"up to {apart.max()} of 255, {apart.mean():.3f} in the mean"
