"""Training survives kill -9, and what it then makes is what an uninterrupted run makes, to the bit."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPModel

from sdattn_fast.lab.train import train

STEPS = {"vae-steps": 1, "decoder-steps": 1, "unet-steps": 2, "clip-steps": 1, "scenes": 8, "save-every": 1}

# Four scenes a step instead of up to 128, and a tokenizer that learns on fewer captions. Run by this process and by the
# one that is killed: the steps and the files are the real ones.
SMALLER = """
import itertools
from sdattn_fast.lab import model
from sdattn_fast.lab.train import _World, train

def smaller(patch, batch=_World.batch, corpus=model._corpus):
    patch(_World, "batch", lambda self, step, size: batch(self, step, min(size, 4)))
    patch(model, "_corpus", lambda: itertools.islice(corpus(), 300))
"""
KILLED = SMALLER + "import typer; smaller(setattr); typer.run(train)"


@pytest.fixture
def smaller(monkeypatch):
    """And one thread, as the other process has: sums in one order."""
    names: dict = {}
    exec(SMALLER, names)
    names["smaller"](monkeypatch.setattr)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_killed_run_resumes(tmp_path, smaller, capfd):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    _train_here(whole)

    # A new interpreter, not a fork: what depends on the process, as the order of a hash table, is then another.
    options = [x for name, value in STEPS.items() for x in (f"--{name}", str(value))]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, "--out", str(killed), *options], stdout=subprocess.PIPE,
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
    _train_here(killed)
    assert "unet: resumed at step" in capfd.readouterr().out

    files = sorted(p.relative_to(whole) for p in whole.rglob("*.safetensors") if "checkpoints" not in p.parts)
    assert [str(f.parent) for f in files] == ["clip", "text_encoder", "unet", "vae"]
    for file in files:
        want, have = load_file(whole / file), load_file(killed / file)
        assert want.keys() == have.keys()
        for key, x in want.items():
            assert x.equal(have[key]), (file, key)

    StableDiffusionPipeline.from_pretrained(whole)
    CLIPModel.from_pretrained(whole / "clip")


def test_it_is_a_command(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["train", "--out", str(tmp_path), "--stage", "all of them"])
    with pytest.raises(SystemExit) as exit, pytest.warns(RuntimeWarning, match="found in sys.modules"):
        runpy.run_module("sdattn_fast.lab.train", run_name="__main__")
    assert exit.value.code == 2 and "expected all, vae, decoder, unet, clip or save" in capsys.readouterr().err


def _train_here(out: Path) -> None:
    train(out, **{name.replace("-", "_"): value for name, value in STEPS.items()})
