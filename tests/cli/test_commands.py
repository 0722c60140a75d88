"""Each command runs and prints what it is for; bad input is one line on stderr and exit status 2."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from sdattn_fast.cli import main
from sdattn_fast.cli.folds import FoldRow
from sdattn_fast.cli.options import plain_console


@pytest.fixture
def run(capsys):
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            main(list(arguments))
        out, err = capsys.readouterr()
        return exit.value.code, out, err

    return run


@pytest.mark.parametrize(
    "command", ["doctor", "demo", "generate", "heads", "tune", "train-lora", "evaluate", "ui", "bench"]
)
def test_help_of_each_command(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"sdattn-fast {command}" in out
    assert command in run("--help")[1]


def test_version(run):
    from sdattn_fast import __version__

    assert run("--version")[:2] == (0, __version__ + "\n")


def test_doctor_names_every_backend_and_why_not(run):
    from sdattn_fast import backends

    code, out, _ = run("doctor")
    assert code == 0
    flat = " ".join(out.replace("│", " ").split())
    for name, state in backends().items():
        assert name in out
        if state is not True:
            assert " ".join(str(state).split()[:4]) in flat


def test_doctor_is_fit_for_a_bug_report(run, monkeypatch):
    from sdattn_fast import backend
    from sdattn_fast.cli import doctor

    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("SDATTN_FAST_ISA", "portable")
    broken = "cannot import '_core' from '/home/somebody/sdattn_fast/__init__.py'"
    real = backend.unavailable
    monkeypatch.setattr(
        backend, "unavailable", lambda name, device=None: broken if name == "cpu" else real(name, device)
    )
    versions = {"torch": "2.6.0", "transformers": "4.48.0"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    code, out, _ = run("doctor")
    assert code == 0 and "somebody" not in out and "portable" in out
    last = out.strip().splitlines()[-2:]
    assert last[0].startswith("Next: fix the backend cpu") and last[1].startswith("Next: pip install 'sdattn-fast[diff")
    monkeypatch.undo()
    assert doctor.next_steps()[0].startswith("try sdattn-fast demo")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("sdattn_fast.backend.unavailable", lambda *asked: None)
    assert "sdattn_fast.warm_up(pipe)" in doctor.next_steps()[-1]


def test_doctor_asks_of_every_gpu(monkeypatch):
    from sdattn_fast import backend
    from sdattn_fast.cli.doctor import backend_rows

    old = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(backend, "unavailable", lambda name, device: "too old" if device == old else None)
    monkeypatch.setattr(backend, "remark", lambda name, device: "not yet run" if name == "triton" else None)
    assert backend_rows() == [
        ("triton on GPU 0", "yes", "not yet run"), ("triton on GPU 1", "no", "too old"),
        ("cuda on GPU 0", "yes", ""), ("cuda on GPU 1", "no", "too old"), ("cpu", "yes", ""), ("reference", "yes", ""),
    ]  # fmt: skip


def test_doctor_shows_what_is_folded_in_a_model(run, monkeypatch):
    # What is worth folding depends on the processor.
    monkeypatch.setattr("sdattn_fast.patching.fold.seconds_of", lambda shape, kind: 0.0 if kind == "both" else 1.0)
    code, out, _ = run("doctor", "--model", "shapes")
    assert code == 0
    flat = " ".join(out.split())
    for text in ("shapes, batch 2, float32", "256", "both", "MB per prompt"):
        assert text in flat


@pytest.mark.parametrize("measured", [1.0, 3.0])
def test_doctor_says_why_it_folds_where_that_measured_slower(run, monkeypatch, measured):
    row = FoldRow(["a", "b"], 256, 64, 4, "both", {"both": 1.0, "none": 2.0}, measured, 2.0, 1000)
    monkeypatch.setattr("sdattn_fast.cli.folds.fold_table", lambda *_: [row])
    code, out, _ = run("doctor", "--model", "shapes")
    assert code == 0
    assert ("In 2 layers folding measured slower" in " ".join(out.split())) == (measured > 2.0)


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory:\n x"), 1, "out of memory: DefaultCPU"),
        (MemoryError(), 1, "out of memory"),
    ],
)
def test_an_interruption_and_too_little_memory_are_a_line(run, monkeypatch, error, code, says):
    def fail():
        raise error

    monkeypatch.setattr("sdattn_fast.cli.doctor.backend_rows", fail)
    status, _, err = run("doctor")
    assert status == code and err.strip().startswith(f"sdattn-fast: {says}") and err.strip().count("\n") == 0


def test_an_interruption_of_its_start_is_a_line(tmp_path):
    """Before there is anything of ours that could catch it: PyTorch takes a second."""
    (tmp_path / "torch.py").write_text("import signal; signal.raise_signal(signal.SIGINT)")
    command = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    command += "from sdattn_fast_command import main; main()"
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert (done.returncode, done.stderr) == (130, "sdattn-fast: interrupted\n")


def test_a_terminal_that_has_not_all_letters():
    """After all that was drawn."""
    command = "from sdattn_fast.cli import main; main(['generate', '--prompt', 'x', '--out', '/proc/caf\u00e9/a.png'])"
    ascii_alone = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, env=ascii_alone)
    assert (
        done.returncode == 2 and rb"cannot write /proc/caf\xe9/a.png" in done.stderr and done.stderr.count(b"\n") == 1
    )


def test_a_device_is_written_to_as_it_is(run, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    code, _, err = run("generate", "--prompt", "a red circle", "--steps", "1", "--out", str(pipe))
    assert code == 0, err
    assert os.read(reader, 4) == b"\x89PNG" and pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"]
    os.close(reader)


def test_what_a_user_says_is_no_markup(capsys):
    console = plain_console()
    console.print("[red]a :car:[/bold]")
    assert capsys.readouterr().out == "[red]a :car:[/bold]\n"


def test_bench_prints_every_layer_of_a_model(run):
    code, out, _ = run("bench", "--model", "sd15", "--seconds", "0.01")
    assert code == 0
    for text in ("64x64", "32x32", "16x16", "8x8", "Geometric mean", "threads"):
        assert text in out


def test_generate_writes_the_picture_and_the_stock_one_beside_it(run, tmp_path):
    code, out, _ = run(
        "generate", "--prompt", "a large red circle", "--steps", "2", "--compare", "--out", str(tmp_path / "a.png"),
        "--dropout-ratio", "0.4", "--threshold", "0.2", "--sigma", "0.5", "--renormalize", "content",
    )  # fmt: skip
    assert code == 0
    patched, stock = Image.open(tmp_path / "a.png"), Image.open(tmp_path / "a.stock.png")
    assert patched.size == stock.size == (64, 64)
    assert patched.tobytes() != stock.tobytes()
    assert str(tmp_path / "a.png") in out


def test_one_side_leaves_the_other_as_the_model_has_it(run, tmp_path):
    code, _, err = run("generate", "--prompt", "x", "--steps", "1", "--height", "96", "--out", str(tmp_path / "a"))
    assert code == 0, err
    assert Image.open(tmp_path / "a.png").size == (64, 96)


def test_generate_takes_a_program_file(run, tmp_path):
    from sdattn_fast import Program, SalienceDropout
    from sdattn_fast.files import ProgramFile

    file, arguments = tmp_path / "program.json", ["generate", "--prompt", "a large red circle", "--out"]
    ProgramFile(Program(SalienceDropout(0.4)), guidance_scale=2.0, num_inference_steps=2).save(file)
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    assert run(*arguments, str(one), "--program", str(file))[0] == 0
    assert run(*arguments, str(two), "--dropout-ratio", "0.4", "--guidance-scale", "2", "--steps", "2")[0] == 0
    assert Image.open(one).tobytes() == Image.open(two).tobytes()
    code, _, err = run(*arguments, str(one), "--program", str(file), "--sigma", "1")
    assert code == 2 and "--program: expected a file or options" in err
    code, _, err = run(*arguments, str(one), "--program", str(tmp_path / "none.json"))
    assert code == 2 and "none.json" in err


def test_generate_loads_a_pipeline_from_a_folder(run, tmp_path):
    from sdattn_fast.lab import shapes_path

    picture = tmp_path / "b.png"
    code, _, _ = run(
        "generate", "--model", str(shapes_path()), "--prompt", "a star", "--steps", "1", "--out", str(picture)
    )
    assert code == 0
    assert Image.open(picture).size == (64, 64)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["generate"], "--prompt"),
        (["generate", "--prompt", " "], "--prompt: expected some words"),
        (["generate", "--prompt", "x", "--seed", "-1"], "--seed"),
        (["generate", "--prompt", "x", "--steps", "0"], "'--steps': expected 1 to 10000, got 0"),
        (["generate", "--prompt", "x", "--guidance-scale", "nan"], "'--guidance-scale': expected 0 to 1000, got nan"),
        (["generate", "--prompt", "x", "--height", "-8"], "--height"),
        (["generate", "--prompt", "x", "--width", "10000000"], "--width"),
        (["generate", "--prompt", "x", "--height", "65"], "--height: expected a multiple of 8, got 65"),
        (["generate", "--prompt", "x", "--refine-steps", "3"], "does nothing without --threshold or --sigma"),
        (["generate", "--prompt", "x", "--dropout-mode", "random"], "does nothing without --dropout-ratio"),
        (["generate", "--prompt", "x", "--refine-axis", "depth"], "Refinement.axis: expected one of"),
        (["generate", "--prompt", "x", "--sigma", "1e9"], "Refinement.sigma: expected a number in [0, 1000]"),
        (["generate", "--prompt", "x", "--device", "tpu"], "device: expected cpu or cuda, got 'tpu'"),
        (["generate", "--prompt", "x", "--device", "meta"], "device: expected cpu or cuda, got 'meta'"),
        (["generate", "--prompt", "x", "--device", ""], "device: expected cpu or cuda, got ''"),
        (["generate", "--prompt", "x", "--model", "./nowhere"], "model: expected a folder"),
        (["generate", "--prompt", "x", "--model", ""], "model: expected a folder"),
        (["generate", "--prompt", "x", "--out", "/proc/nowhere/a.png"], "--out: cannot write /proc/nowhere/a.png"),
        (["generate", "--prompt", "x", "--out", "/dev/null/a.png"], "--out: cannot write /dev/null/a.png"),
        (["generate", "--prompt", "x", "--out", "a.xyz"], "--out: expected the name of a picture, such as a.png"),
        (["generate", "--prompt", "x", "--out", "a" * 300], "File name too long"),
        (["generate", "--prompt", "x", "--model", "/nowhere"], "model: expected a folder"),
        (["generate", "--prompt", "x", "--out", "/"], "--out: expected a file"),
        (["generate", "--prompt", "x", "--dtype", "int8"], "dtype: expected float32"),
        (["generate", "--prompt", "x", "--backend", "fast"], "backend: expected one of"),
        (["generate", "--prompt", "x", "--dropout-ratio", "2"], "SalienceDropout.ratio: expected a number in [0, 1]"),
        (["generate", "--prompt", "x", "--threshold", "1"], "Refinement.threshold"),
        (["generate", "--prompt", "x", "--sigma", "-1"], "Refinement.sigma"),
        (["generate", "--prompt", "x", "--renormalize", "all"], "renormalize"),
        (["bench", "--model", "sd9"], "--model: expected one of sd15, sd21, sdxl"),
        (["bench", "--dtype", "int8"], "--dtype"),
        (["bench", "--batch", "0"], "--batch"),
        (["bench", "--content", "78"], "--content"),
        (["bench", "--backend", "fast"], "--backend"),
        (["doctor", "--model", "/nowhere"], "model: expected a folder"),
        (["doctor", "--model", "shapes", "--dtype", "float16"], "--dtype"),
        (["doctor", "--model", "shapes", "--batch", "0"], "--batch"),
        (["demo", "--seed", "-1"], "--seed"),
        (["demo", "--prompt", ""], "--prompt"),
        (["demo", "--out", "/proc/nowhere"], "--out: cannot write /proc/nowhere"),
        (["bench", "--seconds", "nan"], "--seconds"),
        (["bench", "--device", "tpu"], "device: expected cpu or cuda"),
        (["train-lora", "--data", "/nowhere", "--device", "tpu"], "device: expected cpu or cuda"),
        (["train-lora", "--data", "/nowhere", "--out", "/proc/nowhere"], "--out: cannot write"),
        (["train-lora", "--data", "/nowhere", "--save-every", "0"], "--save-every"),
        (["train-lora", "--data", "/nowhere", "--dropout-axis", "space"], "does nothing without --dropout-ratio"),
        (["ui", "--device", "tpu"], "device: expected cpu or cuda"),
        (["dream"], "dream"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(run, arguments, says):
    if arguments[0] == "ui":
        pytest.importorskip("gradio")
    code, _, err = run(*arguments)
    assert code == 2
    assert err.startswith("sdattn-fast: ") and err.count("\n") == 1
    assert says in err


def test_the_installed_command_starts():
    done = subprocess.run(
        [sys.executable, "-c", "from sdattn_fast.cli import main; main(['dream'])"], capture_output=True
    )
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr


def test_a_lora_is_trained_and_drawn_with(run, tmp_path):
    from sdattn_fast.studies.lora import write_scenes

    write_scenes(tmp_path / "data", 3)
    arguments = ("train-lora", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "lora"), "--batch", "1")
    code, out, _ = run(
        *arguments, "--steps", "2", "--rank", "2", "--dropout-ratio", "0.3", "--dropout-when", "0:0,9:0.3"
    )
    assert code == 0 and f"--lora {tmp_path / 'lora'}" in " ".join(out.split())
    picture = tmp_path / "picture.png"
    code, _, _ = run(
        "generate", "--prompt", "a red star", "--steps", "1", "--lora", str(tmp_path / "lora"), "--out", str(picture)
    )
    assert code == 0 and Image.open(picture).size == (64, 64)
    code, _, err = run(*arguments, "--dropout-ratio", "0.3", "--dropout-when", "0:x")
    assert code == 2 and "step:ratio" in err and err.count("\n") == 1
    code, _, err = run("generate", "--prompt", "a", "--lora", str(tmp_path / "data"))
    assert (
        code == 2
        and err.startswith("sdattn-fast: lora: expected a folder or hub id of a LoRA")
        and err.count("\n") == 1
    )


def test_one_side_of_a_picture_with_a_transformer():
    from tiny_transformers import pixart_pipeline

    from sdattn_fast.cli.generate import _size_options

    assert _size_options(pixart_pipeline(), 128, None) == {"height": 128, "width": 64}
