"""The pipelines that ship: small, safe, half precision, loaded by diffusers as any other; they draw what is asked."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sdattn_fast_lab
import torch
from safetensors import safe_open
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from sdattn_fast.lab import load_clip, load_pipeline
from sdattn_fast.lab.detected_text import detected_text
from sdattn_fast.lab.objects.world import sample_scene as sample_objects
from sdattn_fast.lab.pipeline import WORLDS, world_path
from sdattn_fast.lab.shapes.detector import detect_background
from sdattn_fast.lab.shapes.world import sample_scene as sample_shapes
from sdattn_fast.lab.tokenizer import write_vocabulary


@pytest.mark.parametrize("world, most", [("shapes", 16e6), ("objects", 24e6)])
def test_files(world, most):
    files = [p for p in world_path(world).rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= most
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".txt"}
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as f:
                kinds = {f.get_slice(key).get_dtype() for key in f.keys()}
            assert kinds <= {"F16", "I64"}, path
    index = json.loads((world_path(world) / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"


@pytest.mark.parametrize("world", WORLDS)
def test_weights_have_the_names_of_transformers_4_and_5(world):
    """Version 4 draws with random weights, and a warning, where it does not know a name."""
    with safe_open(world_path(world) / "text_encoder" / "model.safetensors", "pt") as f:
        names, tensors = set(f.keys()), {key: f.get_tensor(key) for key in f.keys()}
    assert all(name.startswith("text_model.") for name in names)
    text_encoder = CLIPTextModel.from_pretrained(world_path(world) / "text_encoder").half()
    loaded = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in text_encoder.state_dict().items()}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("part", ["tokenizer", "clip"])
@pytest.mark.parametrize("world", WORLDS)
def test_tokenizers_of_transformers_4_and_5_are_one(world, part, tmp_path):
    """Version 4 reads vocab.json and merges.txt, version 5 tokenizer.json."""
    shutil.copytree(world_path(world) / part, tmp_path, dirs_exist_ok=True)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink()
    write_vocabulary(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_text() == (world_path(world) / part / name).read_text()
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    tokenizer = CLIPTokenizer.from_pretrained(world_path(world) / part)
    for caption in ("a red star left of a blue circle", "two teddy bears, and a fire engine", "zebra's 12!"):
        pieces = tokenizer.convert_ids_to_tokens(tokenizer(caption).input_ids)
        assert [vocabulary[piece] for piece in pieces] == tokenizer(caption).input_ids


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("part", ["text_encoder", "clip"])
def test_every_part_is_loaded_in_float32_unless_one_says_another(world, part):
    """transformers 5 takes the dtype of the config, and half does not go with the UNet's float32."""
    kind = {"text_encoder": CLIPTextModel, "clip": CLIPModel}[part]
    for options in ({}, {"dtype": "auto"}):
        assert kind.from_pretrained(world_path(world) / part, **options).dtype == torch.float32


def test_a_world_that_is_not_there():
    with pytest.raises(ValueError, match=r"^name: expected .*'shapes'.*, got 'spheres'$"):
        sdattn_fast_lab.path("spheres")


def test_missing_weights_are_said_before_anything_slow():
    """In a new interpreter, which has imported nothing yet."""
    code = """
import sys
sys.modules["sdattn_fast_lab"] = None
from sdattn_fast.lab import load_clip, load_pipeline, shapes_path
for load in (shapes_path, load_pipeline, load_clip):
    try:
        load()
    except ImportError as error:
        print(error)
print({"diffusers", "transformers"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *messages, imported = done.stdout.splitlines()
    assert len(messages) == 3 and all("pip install 'sdattn-fast[demo]'" in line for line in messages)
    assert imported == "set()"


@pytest.fixture(scope="module", params=WORLDS)
def world(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(world):
    pipe = load_pipeline(world=world)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loads_in_a_dtype(world, dtype):
    assert {p.dtype for p in load_pipeline(dtype, world=world).unet.parameters()} == {dtype}


def test_draws_what_it_is_asked_for(world, pipe):
    """Not the evaluation, which is long: what it was trained on, and the best of a few."""
    asked, background = {"shapes": ("blue square", "white"), "objects": ("blue car", "black")}[world]
    caption = f"a {'large ' if world == 'shapes' else ''}{asked} on a {background} background"
    generators = [torch.Generator().manual_seed(seed) for seed in range(6)]
    images = pipe([caption] * 6, guidance_scale=4.0, num_inference_steps=20, generator=generators).images
    pictures = [np.asarray(image) for image in images]
    detected = detected_text(world)
    assert sum(asked in detected(picture) for picture in pictures) >= 2
    if world == "shapes":
        assert [detect_background(p) for p in pictures].count(background) >= 5


def test_phrases_of_several_pieces_occur(world, pipe):
    word, phrase, pieces = {
        "shapes": ("triangle", "a large red circle", 4), "objects": ("soccer", "a pink fire engine", 4)
    }[world]  # fmt: skip
    assert len(pipe.tokenizer.tokenize(word)) >= (2 if world == "shapes" else 1)
    assert len(pipe.tokenizer.tokenize(phrase)) >= pieces


def test_clip_shares_the_text_tower_and_knows_pictures(world, pipe):
    model, tokenizer = load_clip(world=world)
    clip_text, encoder_text = model.text_model.state_dict(), pipe.text_encoder.state_dict()
    for key, x in clip_text.items():
        assert torch.equal(x, encoder_text[key] if key in encoder_text else encoder_text[f"text_model.{key}"])
    if world == "shapes":
        scenes = [sample_shapes(20_000_000 + i, held_out=i % 2 == 0) for i in range(64)]
    else:
        scenes = [sample_objects(700_000_000 + i) for i in range(64)]
    pictures = torch.from_numpy(np.stack([s.image for s in scenes])).permute(0, 3, 1, 2).float() / 127.5 - 1
    ids = tokenizer([s.caption for s in scenes], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pictures).logits_per_image
    right = (logits.argmax(-1) == torch.arange(64)).float().mean()
    assert right >= 0.5, "one of 64 by chance"


def test_nothing_but_the_package_is_needed(world, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert load_pipeline(world=world).unet.config.sample_size == 16
