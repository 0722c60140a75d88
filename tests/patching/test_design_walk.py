"""docs/design.md, "From pipe(...) to a kernel and back": its picture against what a pipeline calls."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import sdattn_fast
from sdattn_fast import Program, SalienceDropout

PACKAGE = Path(sdattn_fast.__file__).parent
DESIGN = Path(__file__).parents[2] / "docs" / "design.md"


def boxes(part: str) -> list[tuple[str, str]]:
    """(file, function) of every box in one part of the picture, in order."""
    found = re.search(rf"subgraph {part}\[.*?\n  end\n", DESIGN.read_text(), re.DOTALL)
    assert found is not None
    return re.findall(r'"([\w/]+\.py)<br/>([\w.]+)', found[0])


class Watch:
    """The package's functions in the order in which they are first called, by part."""

    def __init__(self) -> None:
        self.called: list[tuple[str, str]] = []

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            owner = frame.f_locals.get("self")
            cls = "" if owner is None else f"{type(owner).__name__}."
            call = path.relative_to(PACKAGE).as_posix(), cls + frame.f_code.co_name
            # A processor's body is a function whose first argument is called self.
            bare = call[0], frame.f_code.co_name
            for one in dict.fromkeys((call, bare)):
                if one not in self.called:
                    self.called.append(one)

    def take(self) -> list[tuple[str, str]]:
        called, self.called = self.called, []
        return called


def parts_called(build: Any) -> dict[str, list[tuple[str, str]]]:
    """The calls of each part of the picture, from a pipeline that draws one prompt in two steps."""
    pipe = build("sd15")
    watch, found = Watch(), {}

    def step_ends(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        found["first" if step == 0 else "later"] = watch.take()
        return kwargs

    with sdattn_fast.apply(pipe, Program(SalienceDropout(0.3)), fold="never"):
        before = sys.getprofile()
        sys.setprofile(watch)
        try:
            pipe("a red car", num_inference_steps=2, output_type="latent", callback_on_step_end=step_ends)
        finally:
            sys.setprofile(before)
    found["encode"] = found["layer"] = found["first"]
    return found


def test_boxes_are_reached_in_the_order_of_the_picture(build: Any):
    for part, called in parts_called(build).items():
        drawn = boxes(part)
        assert drawn
        assert [box for box in drawn if box not in called] == []
        assert sorted(drawn, key=called.index) == drawn
