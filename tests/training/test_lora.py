"""Training a LoRA: any UNet, resumed as if never killed, loaded by diffusers, the program in place while it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

pytest.importorskip("peft")
pytest.importorskip("accelerate")

from diffusers import StableDiffusionPipeline

from sdattn_fast import Program, SalienceDropout
from sdattn_fast.patching.processor import SemanticAttnProcessor
from sdattn_fast.training import LoraTraining, train_lora

SHORT = LoraTraining(steps=4, batch=2, learning_rate=1e-3, rank=2, seed=3, flip=True, empty_captions=0.2)
DROPS = Program(SalienceDropout(0.5, mode="random"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    colours = np.random.default_rng(0)
    for i, caption in enumerate(("a red car", "a blue hat", "a green box")):
        Image.fromarray(colours.integers(0, 255, (40, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


@pytest.fixture
def pipe_of(build: Callable[[str], Any]) -> Callable[[str], Any]:
    """Pipelines whose UNet is a copy, since training leaves adapters in it."""
    import copy

    def made(name: str) -> Any:
        pipe = build(name)
        pipe.unet = copy.deepcopy(pipe.unet)
        return pipe

    return made


def _weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


@pytest.mark.parametrize("name", ["sd15", "sd2", "sdxl"])
def test_what_it_writes_diffusers_loads(name: str, pipe_of: Any, draw: Any, data: Path, tmp_path: Path) -> None:
    pipe = pipe_of(name)
    stock = draw(pipe)
    losses: list[float] = []
    processors = {k: type(p) for k, p in pipe.unet.attn_processors.items()}
    path = train_lora(pipe, data, tmp_path, SHORT, DROPS, tell=lambda step, loss: losses.append(loss))
    assert path == tmp_path / "pytorch_lora_weights.safetensors" and len(losses) == 4
    assert {k: type(p) for k, p in pipe.unet.attn_processors.items()} == processors and not pipe.unet.training
    trained = draw(pipe)
    assert (trained != stock).any()
    other = pipe_of(name)
    other.load_lora_weights(str(tmp_path))
    np.testing.assert_allclose(draw(other), trained, atol=2e-3)
    other.unload_lora_weights()
    np.testing.assert_allclose(draw(other), stock, atol=1e-5)


def test_a_run_goes_on_as_if_never_killed(pipe_of: Any, data: Path, tmp_path: Path) -> None:
    whole = _weights(train_lora(pipe_of("sd15"), data, tmp_path / "whole", SHORT, DROPS))

    class Killed(Exception):
        pass

    def kill(step: int, loss: float) -> None:
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        train_lora(pipe_of("sd15"), data, tmp_path / "killed", SHORT, DROPS, save_every=2, tell=kill)
    steps: list[int] = []
    path = train_lora(
        pipe_of("sd15"), data, tmp_path / "killed", SHORT, DROPS, tell=lambda step, loss: steps.append(step)
    )
    assert steps == [3, 4]
    assert all(torch.equal(x, whole[key]) for key, x in _weights(path).items())
    # Longer is the same run; anything else is another.
    longer = replace(SHORT, steps=5)
    train_lora(pipe_of("sd15"), data, tmp_path / "killed", longer, DROPS, tell=lambda step, loss: steps.append(step))
    assert steps == [3, 4, 5]
    with pytest.raises(ValueError, match=r"other settings .*learning_rate 0\.001, now 0\.1"):
        train_lora(pipe_of("sd15"), data, tmp_path / "killed", replace(longer, learning_rate=0.1), DROPS)
    with pytest.raises(ValueError, match=r"other settings .*program"):
        train_lora(pipe_of("sd15"), data, tmp_path / "killed", longer)


def test_it_learns(pipe_of: Any, data: Path, tmp_path: Path) -> None:
    losses: list[float] = []
    training = LoraTraining(steps=30, batch=4, learning_rate=3e-2, rank=4, warmup=5)
    train_lora(pipe_of("sd15"), data, tmp_path, training, tell=lambda step, loss: losses.append(loss))
    assert np.mean(losses[-15:]) < 0.95 * np.mean(losses[:5])


def test_dropout_applies_when_it_is_said(pipe_of: Any, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    seen: list[Any] = []
    from sdattn_fast.patching.text_state import TextState

    prepared = TextState.prepared

    def watched(self: Any, *arguments: Any) -> Any:
        found = prepared(self, *arguments)
        seen.append((self.step, found.program.dropout))
        return found

    monkeypatch.setattr(TextState, "prepared", watched)
    train_lora(pipe_of("sd15"), data, tmp_path / "training", replace(SHORT, steps=1), DROPS)
    assert {dropout for _, dropout in seen} == {DROPS.dropout}
    seen.clear()
    schedule = replace(SHORT, steps=3, dropout_when={0: 0.0, 2: 0.5})
    train_lora(pipe_of("sd15"), data, tmp_path / "schedule", schedule, DROPS)
    ratios = {(step, None if dropout is None else dropout.ratio) for step, dropout in seen}
    assert ratios == {(0, None), (1, 0.25), (2, 0.5)}


def test_protected_tokens_are_found(pipe_of: Any, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from sdattn_fast.patching.text_state import TextState

    seen: list[Any] = []
    see = TextState.see
    monkeypatch.setattr(TextState, "see", lambda self, rows, *number: (seen.append(rows), see(self, rows, *number))[1])
    train_lora(pipe_of("sd15"), data, tmp_path, replace(SHORT, steps=1, empty_captions=0.0), DROPS)
    assert seen and all(rows.prompt == [0, 1] and not rows.protected.all(1).any() for rows in seen)


def test_accumulated_batches_are_other_pictures(pipe_of: Any, data: Path, tmp_path: Path) -> None:
    one, two = replace(SHORT, steps=1), replace(SHORT, steps=1, accumulate=2)
    weights = [_weights(train_lora(pipe_of("sd15"), data, tmp_path / str(i), t)) for i, t in enumerate((one, two))]
    assert any(not torch.equal(x, weights[1][key]) for key, x in weights[0].items())


def test_gradient_checkpointing_changes_nothing(pipe_of: Any, data: Path, tmp_path: Path) -> None:
    plain, saving = replace(SHORT, steps=2), replace(SHORT, steps=2, gradient_checkpointing=True)
    weights = [
        _weights(train_lora(pipe_of("sd15"), data, tmp_path / str(i), t, DROPS)) for i, t in enumerate((plain, saving))
    ]
    for key, x in weights[0].items():
        torch.testing.assert_close(x, weights[1][key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "field, value, error",
    [
        ("steps", 0, ValueError), ("batch", 1.5, TypeError), ("rank", True, TypeError), ("warmup", -1, ValueError),
        ("learning_rate", 0.0, ValueError), ("empty_captions", 1.5, ValueError), ("precision", "int4", ValueError),
        ("targets", (), ValueError), ("alpha", 0, ValueError),
    ],
)  # fmt: skip
def test_bad_settings(field: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=field):
        LoraTraining(**{field: value})


def test_bad_pipelines_and_checkpoints(pipe_of: Any, data: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="pipe: expected a diffusers pipeline"):
        train_lora(pipe_of("sd15").unet, data, tmp_path, SHORT)
    with pytest.raises(ValueError, match=r"dropout_when: .* no dropout"):
        train_lora(pipe_of("sd15"), data, tmp_path, replace(SHORT, dropout_when={0: 0.1}))
    (tmp_path / "checkpoint.safetensors").write_bytes(b"not one")
    with pytest.raises(ValueError, match="no checkpoint of a LoRA"):
        train_lora(pipe_of("sd15"), data, tmp_path, SHORT)


def test_a_loss_that_is_not_finite_ends_it(pipe_of: Any, data: Path, tmp_path: Path) -> None:
    pipe = pipe_of("sd15")
    with torch.no_grad():
        next(pipe.unet.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="the loss is nan at step 0"):
        train_lora(pipe, data, tmp_path, SHORT)
    assert {type(p) for p in pipe.unet.attn_processors.values()} != {SemanticAttnProcessor}


def test_a_full_disk_is_said_and_the_run_goes_on_from_its_checkpoint(
    pipe_of: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As safetensors says it, of the checkpoint and of the weights."""
    run = partial(train_lora, data=data, out=tmp_path, training=replace(SHORT, steps=1))

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    for owner, name, file in (
        (safetensors.torch, "save_file", "checkpoint"),
        (StableDiffusionPipeline, "save_lora_weights", "pytorch_lora_weights"),
    ):
        with monkeypatch.context() as disk:
            disk.setattr(owner, name, full)
            with pytest.raises(OSError, match=rf"out: cannot write .*{file}\.safetensors: .*No space left"):
                run(pipe_of("sd15"))
    assert run(pipe_of("sd15")).exists()
