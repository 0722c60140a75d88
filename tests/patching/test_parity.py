"""`Program()` draws stock pictures, in every architecture; and the patch is gone when it is gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import sdattn_fast

ARCHITECTURES = ("sd15", "sd2", "sdxl", "controlnet", "sdxl_controlnet", "inpaint", "img2img", "pix2pix")

# Stock attention and ours differ in rounding alone; 130 dB and more were seen.
DECIBELS = 110.0


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_plain_program_draws_the_stock_picture(
    architecture: str, backend: str, build: Callable[[str], Any], draw: Any, psnr: Any, record_property: Any
) -> None:
    pipe = build(architecture)
    stock = draw(pipe)
    with sdattn_fast.apply(pipe, backend=backend) as patch:
        assert patch.layers
        decibels = psnr(stock, draw(pipe))
    record_property("psnr", decibels)
    print(f"{architecture} {backend}: {decibels:.1f} dB")
    assert decibels > DECIBELS
    assert np.array_equal(stock, draw(pipe))
