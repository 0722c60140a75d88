"""docs/tutorial.md: its Python blocks run, in order and in one namespace, with the shapes pipeline in place of Stable
Diffusion; its commands exist and have the options that it gives them. So do the blocks of the first pages."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import _one_thread  # noqa: F401

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "tutorial.md"
FIRST_PAGES = [ROOT / "README.md", ROOT / "docs" / "index.md"]
MODEL, CLIP = "stable-diffusion-v1-5/stable-diffusion-v1-5", "openai/clip-vit-large-patch14"
STEPS = 4  # of denoising, where the page leaves their number to the pipeline; the scheduler makes five of them
# What takes long, and what stands in its place.
SHORTER = {"trials=60": "trials=2", "LoraTraining(steps=1000)": "LoraTraining(steps=2, batch=1)"}

# Pictures, by the names that the page gives them: what it calls the stock picture up to rounding, and what it changes.
AS_STOCK = ("empty", "mapped", "evaluated")
CHANGED = (
    "more_bench", "no_bench", "fused", "in_chosen_heads", "dropped", "dropped_at_random", "suppressed",
    "suppressed_over_space", "corrected", "bound", "reweighted", "structured", "clip_gated", "by_recipe",
    "by_stronger_recipe", "both", "embedded", "mixed", "redrawn", "compiled",
)  # fmt: skip
FILES = (
    "stock.png", "heads.json", "heads.png", "car-relevance.png", "labels.png", "car.png", "words.safetensors",
    "maps.safetensors", "study.db", "program.json", "pictures/second.txt", "lora/pytorch_lora_weights.safetensors",
    "lora/checkpoint.safetensors",
)  # fmt: skip


def blocks(language: str, page: Path = PAGE) -> list[tuple[int, str]]:
    """(the number of the line before it, text) of every fenced block in that language."""
    found = []
    text = page.read_text(encoding="utf-8")
    for block in re.finditer(r"^```(\S*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if block[1] == language:
            found.append((text.count("\n", 0, block.start(2)), block[2]))
    return found


def difference(one: Any, other: Any) -> int:
    """The largest difference between two pictures, of 255."""
    a, b = (np.asarray(picture).astype(int) for picture in (one, other))
    assert a.shape == b.shape
    return int(abs(a - b).max())


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page's models are the shapes pipeline and its CLIP, on the CPU, and pictures take few steps."""
    for module in ("sdattn_fast_lab", "kornia", "matplotlib", "nltk", "optuna", "peft", "textblob"):
        pytest.importorskip(module)
    from diffusers import PNDMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

    from sdattn_fast.guidance import ClipScorer
    from sdattn_fast.lab.pipeline import shapes_path
    from sdattn_fast.loading import quiet_loading

    load_pipeline: Any = StableDiffusionPipeline.from_pretrained
    load_clip = ClipScorer.load

    def pipeline(name: str) -> Any:
        assert name == MODEL
        with quiet_loading():
            pipe = load_pipeline(shapes_path()).to(torch.float32, silence_dtype_warnings=True)
        pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)  # as Stable Diffusion's
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def clip(name: str, device: str) -> ClipScorer:
        assert name == CLIP
        return load_clip(shapes_path() / "clip", device)

    def in_few_steps(call: Any) -> Any:
        @functools.wraps(call)
        def called(pipe: Any, *args: Any, num_inference_steps: int = STEPS, **keywords: Any) -> Any:
            return call(pipe, *args, num_inference_steps=num_inference_steps, **keywords)

        return called

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", pipeline)
    monkeypatch.setattr(ClipScorer, "load", clip)
    for kind in (StableDiffusionPipeline, StableDiffusionImg2ImgPipeline):
        monkeypatch.setattr(kind, "__call__", in_few_steps(kind.__call__))
    # tests/patching/test_compile.py compiles.
    with torch.compiler.set_stance("force_eager"):
        yield


def test_every_block_runs_and_does_what_the_page_says(
    small_models: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = blocks("python")
    assert len(page) > 20
    for text in SHORTER:
        assert sum(code.count(text) for _, code in page) == 1, text
    names: dict[str, Any] = {}
    for line, code in page:
        for text, shorter in SHORTER.items():
            code = code.replace(text, shorter)
        exec(compile("\n" * line + code, str(PAGE), "exec"), names)  # errors name the page and its line
        assert "patch" not in names or not names["patch"].installed

    assert difference(names["restored"], names["stock"]) == 0
    assert difference(names["draw"](names["prompt"]), names["stock"]) == 0  # nothing has stayed behind
    for name in AS_STOCK:
        assert difference(names[name], names["stock"]) <= 1, name
    for name in CHANGED:
        assert difference(names[name], names["stock"]) > 1, name
    for name in FILES:
        assert (tmp_path / name).stat().st_size > 0, name
    assert [phrase.text for phrase in names["phrases"]] == ["a red car", "a blue bench"]
    assert names["car_map"].shape == (512, 512) and list(names["few"].tokens) == names["every_noun"]
    assert len(names["clip_gate"].scores) == 1  # of steps 0 to 4, after number 2
    assert set(names["labels"].unique().tolist()) <= {0, 1, 2}
    embeddings = {"prompt_embeds": names["mixture"], "negative_prompt_embeds": names["negative"]}
    with names["sdattn_fast"].apply(names["pipe"], names["largest"]):
        with pytest.raises(ValueError, match="pass protected="):
            names["draw"](None, **embeddings)
        with pytest.raises(ValueError, match="active="):
            names["pipe"].unet(torch.zeros(2, 4, 16, 16), 500, encoder_hidden_states=names["text"] * 2)


@pytest.mark.parametrize("page", FIRST_PAGES, ids=lambda page: page.name)
def test_the_first_pages(page: Path, small_models: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("python", page)
    names: dict[str, Any] = {}
    exec(compile("\n" * block[0] + block[1], str(page), "exec"), names)
    pictures = list(tmp_path.glob("*.png"))
    assert pictures and all(f'"{picture.name}"' in block[1] for picture in pictures)
    # Each of these words is one token of Stable Diffusion's, after BOS.
    assert "a red car and a blue bench".split().index("bench") + 1 == names["gate"].argmax() == 7


def test_the_page_has_no_other_blocks() -> None:
    opening = re.findall(r"^```(.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)[::2]
    assert set(opening) == {"python", "sh"}
    assert len(opening) == len(blocks("python")) + len(blocks("sh"))


def commands() -> list[list[str]]:
    """The page's calls of sdattn-fast, each as its words."""
    lines = "".join(code for _, code in blocks("sh")).replace("\\\n", " ").splitlines()
    said = [shlex.split(line, comments=True) for line in lines]
    named = re.findall(r"`sdattn-fast ([\w-]+)`", PAGE.read_text(encoding="utf-8"))
    return [words[1:] for words in said if words[:1] == ["sdattn-fast"]] + [[name] for name in sorted(set(named))]


@pytest.mark.parametrize("command", commands(), ids=lambda words: words[0])
def test_the_commands_have_the_options_that_the_page_gives_them(command: list[str]) -> None:
    pytest.importorskip("typer")
    from sdattn_fast.cli import main

    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])  # options that do not exist are an error before help is shown
    assert ended.value.code == 0
