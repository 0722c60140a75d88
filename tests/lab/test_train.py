"""Training survives kill -9, and what it then makes is what an uninterrupted run makes, to the bit."""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPModel

from sdattn_fast.lab.loop import Schedule, fit
from sdattn_fast.lab.objects.detector import PictogramDetector
from sdattn_fast.lab.objects.world import sample_scene
from sdattn_fast.lab.stages import noun_shares
from sdattn_fast.lab.train import train

STEPS = {
    "vae-steps": 1, "decoder-steps": 1, "unet-steps": 2, "clip-steps": 1, "vae-batch": 2, "decoder-batch": 2,
    "unet-batch": 4, "clip-batch": 4, "scenes": 8, "save-every": 1,
}  # fmt: skip
OBJECTS = {
    "world": "objects", "detector-steps": 1, "detector-batch": 2, "phantom": 0.5, "noun-loss": 0.1, **STEPS,
}  # fmt: skip


@pytest.fixture
def one_thread():
    """As the other process has: sums in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_killed_run_resumes(tmp_path, one_thread, capfd):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    _train_here(whole, OBJECTS)

    # A new interpreter, not a fork: what depends on the process, as the order of a hash table, is then another.
    options = [x for name, value in OBJECTS.items() for x in (f"--{name}", str(value))]
    process = subprocess.Popen(
        [sys.executable, "-m", "sdattn_fast.lab.train", "--out", str(killed), *options], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("unet: step 1/2"):
            break
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "model_index.json").exists()

    capfd.readouterr()
    _train_here(killed, OBJECTS)
    assert "unet: resumed at step" in capfd.readouterr().out

    files = sorted(p.relative_to(whole) for p in whole.rglob("*.safetensors") if "checkpoints" not in p.parts)
    assert [str(f.parent) for f in files] == ["clip", ".", "text_encoder", "unet", "vae"]
    for file in files:
        want, have = load_file(whole / file), load_file(killed / file)
        assert want.keys() == have.keys()
        for key, x in want.items():
            assert x.equal(have[key]), (file, key)

    _can_be_loaded(whole)
    assert PictogramDetector.load(whole)([sample_scene(0).image]) == [[]]


def test_the_world_of_shapes(tmp_path, capfd):
    _train_here(tmp_path, STEPS)
    _can_be_loaded(tmp_path)
    assert not (tmp_path / "detector.safetensors").exists()


def test_the_unet_may_be_compiled(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(type(model).__name__) or model)
    for stage in ("vae", "unet"):
        _train_here(tmp_path, {**STEPS, "stage": stage, "compiled": True})
    assert compiled == ["function", "CLIPTextModel"]


def test_the_shares_of_nouns_in_latent_pixels():
    labels = torch.randint(0, 5, (2, 8, 12), dtype=torch.uint8)
    shares = noun_shares(labels, torch.Size((2, 5, 2, 3)))
    one_hot = torch.nn.functional.one_hot(labels.long(), 5).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(shares, torch.nn.functional.avg_pool2d(one_hot, 4))


def test_telling_nouns_begins_in_a_run_that_did_without(tmp_path, capfd):
    """Its layer starts as it is made, the rest goes on, and the pipeline that is saved has none of it."""
    before = {**OBJECTS, "noun-loss": 0.0}
    for stage in ("vae", "unet"):
        _train_here(tmp_path / "with", {**before, "stage": stage})
    shutil.copytree(tmp_path / "with", tmp_path / "without")
    for name, weight in (("with", 0.5), ("without", 0.0)):
        _train_here(tmp_path / name, {**before, "stage": "unet", "unet-steps": 4, "noun-loss": weight})
    assert capfd.readouterr().out.count("unet: resumed at step 2") == 2
    checkpoints = [load_file(tmp_path / name / "checkpoints" / "unet.safetensors") for name in ("with", "without")]
    assert {key for key in checkpoints[0] if key.startswith("ema/nouns")} == {"ema/nouns.weight", "ema/nouns.bias"}
    assert not any("nouns" in key for key in checkpoints[1])
    assert not checkpoints[0]["ema/unet.conv_in.weight"].equal(checkpoints[1]["ema/unet.conv_in.weight"])
    _can_be_loaded(tmp_path / "with")


def test_it_starts_from_a_pipeline(tmp_path, capfd):
    first, second = tmp_path / "first", tmp_path / "second"
    _train_here(first, {**OBJECTS, "stage": "detector"})
    assert "no pipeline saved" in capfd.readouterr().out and (first / "detector.safetensors").exists()
    _train_here(first, OBJECTS)
    _train_here(second, {"world": "objects", "start-from": first, "stage": "clip", **STEPS})
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "detector"):
        want, have = load_file(first / f"{name}.safetensors"), load_file(second / f"{name}.safetensors")
        assert all(x.equal(have[key]) for key, x in want.items()), name
    with pytest.raises(typer.BadParameter, match="has another vocabulary than this world"):
        train(world="shapes", out=tmp_path / "third", start_from=first)
    with pytest.raises(typer.BadParameter, match="there is no autoencoder yet"):
        train(world="objects", out=tmp_path / "fourth", stage="unet", scenes=8)


def test_more_steps_go_on(tmp_path, capfd):
    """And the plateau does not depend on how many there are to be: 10 of 12 steps are those of 10 of 24."""
    short, long = Schedule(1e-3, 240), Schedule(1e-3, 480)
    assert [short(i) for i in range(192)] == [long(i) for i in range(192)]
    assert short(0) == pytest.approx(1e-5) and short(99) == short(191) == 1e-3
    assert short(239) == pytest.approx(1e-3 / 48) and short(216) == pytest.approx(5e-4)
    network = torch.nn.Linear(2, 1)
    for steps in (2, 5):
        fit("line", network, lambda step: network(torch.ones(1, 2)).square().sum(), Schedule(0.1, steps), tmp_path)
    output = capfd.readouterr().out
    assert "line: resumed at step 2" in output and "line: step 5/5" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": "all of them"}, "expected one of all, vae, decoder, unet, clip, detector, save, got 'all of them'"),
        ({"world": "flowers"}, "world: expected shapes or objects, got 'flowers'"),
        ({"world": "shapes", "phantom": 0.5}, "captions of the world shapes are true"),
        ({"world": "objects", "phantom": 2.0}, "phantom: expected a number in [0, 1], got 2.0"),
        ({"scenes": 0}, "expected at least 1, got 0"),
        ({"noun_loss": 0.1}, "expected 0, or a number above it with --world objects, got 0.1"),
        ({"world": "objects", "noun_loss": -0.1}, "expected 0, or a number above it with --world objects, got -0.1"),
        ({"unet_batch": 0}, "expected at least 1, got 0"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(typer.BadParameter) as error:
        train(out=tmp_path, **options)
    assert message in str(error.value)


def test_it_is_a_command(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["train", "--out", str(tmp_path), "--stage", "all of them"])
    with pytest.raises(SystemExit) as exit, pytest.warns(RuntimeWarning, match="found in sys.modules"):
        runpy.run_module("sdattn_fast.lab.train", run_name="__main__")
    assert exit.value.code == 2 and "expected one of all, vae, decoder" in capsys.readouterr().err


def _train_here(out: Path, options: dict[str, Any]) -> None:
    train(out=out, **{name.replace("-", "_"): value for name, value in options.items()})


def _can_be_loaded(folder: Path) -> None:
    StableDiffusionPipeline.from_pretrained(folder)
    CLIPModel.from_pretrained(folder / "clip")
