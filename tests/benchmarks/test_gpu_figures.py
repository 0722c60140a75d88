"""What benchmarks/on_gpu makes of times and results, and benchmarks/prefer.py of its figures. The times are made up."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def prefer():
    return importlib.import_module("prefer")


def test_shares_are_of_the_median():
    figures = importlib.import_module("on_gpu.timing").figures
    times = {"sdpa": [4e-6, 4e-6, 9e-6], "sdpa-flash": [2e-6] * 3, "sdpa-math": [8e-6] * 3, "cuda-full": [3e-6] * 3}
    rows = figures(times, least=1.5e-6)
    assert rows["cuda-full"] == {
        "median_us": 3.0, "p20_us": 3.0, "p80_us": 3.0, "of_sdpa": 0.75, "of_best_sdpa": 1.5, "of_roofline": 0.5,
    }  # fmt: skip
    assert rows["sdpa-flash"]["of_best_sdpa"] == 1.0 and rows["sdpa"]["median_us"] == 4.0
    assert set(figures({"cuda-full": [3e-6] * 3})["cuda-full"]) == {"median_us", "p20_us", "p80_us"}
    assert figures({"stock": [4e-3] * 3, "triton": [3e-3] * 3}, of="stock")["triton"]["of_stock"] == 0.75


def test_what_is_off_is_said():
    off = importlib.import_module("on_gpu.checks").off
    exact = torch.randn(2, 3, 1000, 40, dtype=torch.float64)
    assert off((exact + 1e-3).half(), exact) is None
    wrong = exact.clone()
    wrong[0, 0, :6] += 1  # a row in a thousand may hang on rounding
    assert off(wrong.half(), exact) is None
    wrong[0, 0, 6] += 1
    assert off(wrong.half(), exact) == "disagrees with the definition on 7 of 6000 rows"
    assert off(wrong.half(), exact, 0.03) is None
    wrong = exact.half()
    wrong[1, 2, 3, 4] = float("nan")
    assert off(wrong, exact) and off(exact.half()[:, :, :-1], exact)


def test_results_do_not_say_where_things_lie():
    without_paths = importlib.import_module("on_gpu.record").without_paths
    for text, shortened in (
        ("FAILED ../../../a/b/tests/interpreted_rows.py::test[1-2]", "FAILED interpreted_rows.py::test[1-2]"),
        ('File "/a/b/c.py", line 3', 'File "c.py", line 3'), ("(/usr/bin/python3.12)", "(python3.12)"),
        ("https://a.org/b/c", "https://a.org/b/c"), ("of a/b.py", "of a/b.py"), ("1 / 3, /x", "1 / 3, /x"),
    ):  # fmt: skip
        assert without_paths(text) == shortened
    for file in (FOLDER / "results").iterdir():
        assert without_paths(file.read_text()) == file.read_text(), file.name


def test_nothing_is_timed_that_has_not_passed(tmp_path, monkeypatch):
    checks, record = importlib.import_module("on_gpu.checks"), importlib.import_module("on_gpu.record")
    monkeypatch.setenv("SDATTN_GPU_RESULTS", str(tmp_path))
    assert checks.failed_check("cuda", ["full"], "sd15-8x8") == "check/cuda/full/sd15-8x8: not run"
    for status in ("failed", "passed"):
        record.append("item", item="check/cuda/full/sd15-8x8", status=status)
        why = checks.failed_check("cuda", ["full"], "sd15-8x8")
        assert why == (None if status == "passed" else "check/cuda/full/sd15-8x8: failed")


def test_contestants_agree_where_there_is_no_gpu(monkeypatch):
    """torch's attention and the stored maps of diffusers' processors compute what they are said to."""
    pytest.importorskip("diffusers")
    contestants, ground = importlib.import_module("on_gpu.contestants"), importlib.import_module("on_gpu.ground")
    programs, off = importlib.import_module("on_gpu.programs"), importlib.import_module("on_gpu.checks").off
    for module in (ground, contestants, programs):
        monkeypatch.setattr(module, "DEVICE", torch.device("cpu"))
    untimed = {}
    tensors = programs.inputs("sd15-8x8", 2, torch.float32)
    by_name = {c.name: c for c in contestants.others("sd15-8x8", tensors, untimed)}
    assert {"sdpa", "attend-and-excite", "hooks"} <= set(by_name) and not untimed
    for name in ("sdpa", "attend-and-excite", "hooks"):
        assert off(by_name[name].call(), by_name[name].exact()) is None


def run(device="Card", dry_run=False):
    return {"kind": "run", "device": device, "dry_run": dry_run}


def figure(contestant, median, pixels=4096, how="graph", batch=2, **fields):
    return {
        "kind": "figure", "dtype": "float16", "head_dim": 40, "tokens": 77, "batch": batch, "heads": 8,
        "pixels": pixels, "contestant": contestant, "how": how, "median_us": median, **fields,
    }  # fmt: skip


def written(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_what_was_measured_is_preferred(prefer, tmp_path, capsys):
    results = written(
        tmp_path / "card.jsonl", run(), {"kind": "item", "item": "x", "status": "failed"},
        figure("triton-full", 5.0), figure("cuda-full", 9.0),
        figure("cuda-full", 4.0),  # again, faster
        figure("cuda-full", 1.0, version="baseline"),
        figure("triton-full", 1.0, how="call"), figure("triton-plain", 1.0), figure("sdpa", 1.0),
        figure("triton-full", 2.0, batch=16), figure("cuda-full", 3.0, batch=16),
        figure("triton-full", 1.0, pixels=1024),  # alone
        run("Other"), figure("triton-full", 1.0),
    )  # fmt: skip
    to = tmp_path / "measured.json"
    to.write_text(json.dumps({"about": "", "devices": {"Third": [], "Card": []}}))
    prefer.main([str(results), "--to", str(to)])
    devices = json.loads(to.read_text())["devices"]
    assert set(devices) == {"Card", "Third"}
    assert [(shape["batch"], shape["pixels"], shape["fastest"]) for shape in devices["Card"]] == [
        (2, 4096, "cuda"), (16, 4096, "triton"),
    ]  # fmt: skip
    assert "Card: 2 shapes, triton at 1, cuda at 1" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["card.jsonl", "measured.json"], "nothing is left aside"


def test_what_prefer_writes_auto_reads(prefer, tmp_path, monkeypatch):
    from sdattn_fast.backend import measured

    to = tmp_path / "measured.json"
    to.write_text(prefer.as_json(prefer.preferences([run(), figure("triton-full", 5.0), figure("cuda-full", 4.0)])))
    monkeypatch.setattr(measured, "FILE", to)
    monkeypatch.setattr(measured, "_name", lambda device: "Card")
    device = torch.device("cuda:0")
    measured._table.cache_clear()
    measured._nearest.cache_clear()
    try:
        assert measured.is_known(device) and not measured.is_known(torch.device("cpu"))
        assert measured.fastest(device, torch.float16, 2, 8, 4096, 40, 77) == "cuda"
        assert measured.fastest(device, torch.float16, 2, 8, 4096, 64, 77) is None
    finally:
        measured._table.cache_clear()
        measured._nearest.cache_clear()


both = figure("triton-full", 5.0), figure("cuda-full", 4.0)


@pytest.mark.parametrize(
    "records, words",
    [
        ([run(), figure("triton-full", 5.0)], "nothing is written"),
        ([run(dry_run=True), *both], "dry run"),
        ([*both], 'before any "run" line'),
        ([run(), *({k: x for k, x in f.items() if k != "heads"} for f in both)], "triton-full without heads"),
    ],
)
def test_results_with_nothing_to_choose_write_nothing(prefer, tmp_path, records, words):
    to = tmp_path / "measured.json"
    with pytest.raises(SystemExit, match=words):
        prefer.main([str(written(tmp_path / "card.jsonl", *records)), "--to", str(to)])
    assert not to.exists()


def test_a_line_that_was_cut_off_is_the_last(prefer, tmp_path):
    path = written(tmp_path / "card.jsonl", run())
    path.write_text(path.read_text() + '{"kind": "fig')
    assert prefer.read(path) == [run()]
    path.write_text(path.read_text() + '\n{"kind": "run"}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        prefer.read(path)


def test_shapes_of_several_runs_are_put_together(prefer, tmp_path):
    """A second run that measured less does not take the first one's shapes away."""
    first = [run(), figure("triton-full", 5.0), figure("cuda-full", 4.0)]
    first += [figure("triton-full", 5.0, pixels=64), figure("cuda-full", 6.0, pixels=64)]
    second = [run(), figure("triton-full", 3.0), figure("cuda-full", 4.0)]
    to = tmp_path / "measured.json"
    to.write_text('{"devices": {}}')
    paths = [written(tmp_path / f"{i}.jsonl", *records) for i, records in enumerate((first, second))]
    prefer.main([*map(str, paths), "--to", str(to)])
    shapes = json.loads(to.read_text())["devices"]["Card"]
    assert {shape["pixels"]: shape["fastest"] for shape in shapes} == {64: "triton", 4096: "triton"}


def test_the_page_is_what_the_results_say():
    page = importlib.import_module("gpu_figures")
    results = sorted((FOLDER / "results").glob("*.jsonl"))
    assert results and page.of_results(results) == page.PAGE.read_text()


def test_the_page_takes_the_last_run_and_names_what_did_not_pass(tmp_path):
    page = importlib.import_module("gpu_figures")
    about = {"commit": "0", "torch": "2", "triton": "3", "diffusers": "0", "copy_tb_per_s": 4.0}
    step = {"kind": "figure", "item": "step/sd15/2", "how": "graph", "of_stock": 0.5}
    item = {"kind": "item", "item": "suite/triton"}
    runs = []
    for number, (median, status) in enumerate(((9000.0, "failed"), (8000.0, "passed"), (7000.0, "not run"))):
        stock = step | {"contestant": "stock", "median_us": median, "of_stock": 1.0}
        ours = step | {"contestant": "triton", "median_us": median / 2}
        records = [run() | about, stock, ours, item | {"status": status}]
        runs.append(written(tmp_path / f"{number}.jsonl", *records))
    assert "not: suite/triton (failed)" in page.of_results(runs[:1])
    whole = page.of_results(runs)
    assert "| sd15/2 | 2 | graph | 7.0 ms | 0.500 |" in whole and "1 items passed." in whole
