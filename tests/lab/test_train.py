"""Training survives kill -9, and what it then makes is what an uninterrupted run makes, to the bit."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPModel

STEPS = {"vae-steps": 1, "decoder-steps": 1, "unet-steps": 2, "clip-steps": 1, "scenes": 40, "save-every": 1}


def test_a_killed_run_resumes(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert _start(whole).wait() == 0

    process = _start(killed)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("unet: step 1/2"):
            break
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "model_index.json").exists()

    again = _start(killed)
    assert again.wait() == 0 and again.stdout is not None
    assert "unet: resumed at step" in again.stdout.read()

    files = sorted(p.relative_to(whole) for p in whole.rglob("*.safetensors") if "checkpoints" not in p.parts)
    assert [str(f.parent) for f in files] == ["clip", "text_encoder", "unet", "vae"]
    for file in files:
        want, have = load_file(whole / file), load_file(killed / file)
        assert want.keys() == have.keys()
        for key, x in want.items():
            assert x.equal(have[key]), (file, key)

    StableDiffusionPipeline.from_pretrained(whole)
    CLIPModel.from_pretrained(whole / "clip")


def _start(out: Path) -> subprocess.Popen[str]:
    options = [x for name, value in STEPS.items() for x in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "sdattn_fast.lab.train", "--out", str(out), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
