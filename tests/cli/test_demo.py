"""The demo writes one page that holds its pictures, and the same pictures beside it."""

from __future__ import annotations

import base64
import re

import numpy as np
import pytest
from PIL import Image

from sdattn_fast.cli import demo, main


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "STEPS", 2)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        main(["demo", "--prompt", "an owl and a <small> rocket"])
    assert exit.value.code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["demo"], "into a folder of its own"
    return (tmp_path / "demo/demo.html").read_text()


def test_demo(page, tmp_path, capsys):
    folder = tmp_path / "demo"
    embedded = [base64.b64decode(x) for x in re.findall(r"data:image/png;base64,([^\"]+)", page)]
    assert Image.open(folder / "demo.png").width > 400
    files = [path.read_bytes() for path in folder.glob("demo-*.png")]
    assert len(files) == 4 and sorted(files) == sorted(embedded)
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "an owl and a &lt;small&gt; rocket" in page
    for text in ("Attend-and-Excite", "seconds a picture", "plain torch reference", "fused", "ms a UNet step"):
        assert text in page
    names = ("stock", "recipe-objects", "attend-and-excite")
    stock, recipe, peer = (np.asarray(Image.open(folder / f"demo-1-{name}.png")) for name in names)
    assert stock.shape == (192, 192, 3)
    assert (stock != recipe).any() and (stock != peer).any() and (recipe != peer).any()
    assert not list(folder.glob("*.part"))


@pytest.mark.filterwarnings("ignore:sdattn_fast. the recipe left out")
@pytest.mark.parametrize("prompt", ["a cat, $x^{$ [/bold] $", "of the and"])
def test_prompts_that_look_like_markup_or_name_nothing(prompt, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "STEPS", 1)
    with pytest.raises(SystemExit) as exit:
        main(["demo", "--prompt", prompt, "--out", str(tmp_path / "demo")])
    out, err = capsys.readouterr()
    assert exit.value.code == 0, err
    assert prompt in out
