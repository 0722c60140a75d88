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
        main(["demo", "--prompt", "a large red circle and a <small> star"])
    assert exit.value.code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["demo"], "into a folder of its own"
    return (tmp_path / "demo/demo.html").read_text()


def test_demo(page, tmp_path, capsys):
    folder = tmp_path / "demo"
    embedded = [base64.b64decode(x) for x in re.findall(r"data:image/png;base64,([^\"]+)", page)]
    assert Image.open(folder / "demo.png").width > 500
    files = [path.read_bytes() for path in folder.glob("demo-*.png")]
    assert len(files) == 4 and sorted(files) == sorted(embedded)
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "a &lt;small&gt; star" in page
    for text in ("stock", "plain torch reference", "fused", "ms a UNet step", "SalienceDropout"):
        assert text in page
    stock, semantic = (np.asarray(Image.open(folder / f"demo-1-{x}.png")) for x in ("stock", "semantic"))
    assert stock.shape == (192, 192, 3)
    assert (stock != semantic).any()
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("prompt", ["a red circle, $x^{$ [/bold] $", "of the and"])
def test_prompts_that_look_like_markup_or_name_nothing(prompt, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "STEPS", 1)
    with pytest.raises(SystemExit) as exit:
        main(["demo", "--prompt", prompt, "--out", str(tmp_path / "demo")])
    out, err = capsys.readouterr()
    assert exit.value.code == 0, err
    assert prompt in out
