"""What benchmarks/gpu_measure.py makes of times, and benchmarks/prefer.py of its tables. The times are made up."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prefer = script("prefer")


@pytest.fixture(scope="module")
def gpu_measure():
    pytest.importorskip("triton")
    return script("gpu_measure")


def test_shares_are_of_the_median(gpu_measure):
    times = {"sdpa": [4e-6, 4e-6, 9e-6], "sdpa-flash": [2e-6] * 3, "sdpa-math": [8e-6] * 3, "cuda-full": [3e-6] * 3}
    rows = {row["contestant"]: row for row in gpu_measure.figures(times, "graph", least=1.5e-6)}
    assert rows["cuda-full"] == {
        "contestant": "cuda-full", "how": "graph", "median_us": "3.00", "p20_us": "3.00", "p80_us": "3.00",
        "of_sdpa": "0.750", "of_best_sdpa": "1.500", "of_roofline": "0.500",
    }  # fmt: skip
    assert rows["sdpa-flash"]["of_best_sdpa"] == "1.000" and rows["sdpa"]["median_us"] == "4.00"
    (row,) = gpu_measure.figures({"cuda-full": [3e-6] * 3}, "call")
    assert not {"of_sdpa", "of_best_sdpa", "of_roofline"} & set(row)


def test_a_backend_that_is_not_there_is_noted(gpu_measure, monkeypatch):
    monkeypatch.setattr(
        gpu_measure, "backends", lambda: {"triton": True, "cuda": "not built\n(/home/me/x.py)", "cpu": True}
    )
    assert gpu_measure.served() == (["triton"], {"cuda": "not built (...)"})


def test_a_result_that_is_off_ends_the_run(gpu_measure):
    exact = torch.randn(2, 3, 1000, 40)
    gpu_measure.compare("cuda-full", exact + 1e-3, exact, torch.float16)
    off = exact.clone()
    off[0, 0, :6] += 1  # a row in a thousand may hang on rounding
    gpu_measure.compare("cuda-full", off, exact, torch.float16)
    off[0, 0, 6] += 1
    with pytest.raises(SystemExit, match="cuda-full disagrees with the definition on 7 of 6000 rows"):
        gpu_measure.compare("cuda-full", off, exact, torch.float16)
    off = exact.clone()
    off[1, 2, 3, 4] = float("nan")
    with pytest.raises(SystemExit):
        gpu_measure.compare("cuda-full", off, exact, torch.float16)


def row(contestant, median, device="Card", pixels="64x64", how="graph", batch=2):
    return {
        "device": device, "dtype": "float16", "head_dim": 40, "tokens": 77, "batch": batch, "heads": 8,
        "pixels": pixels, "contestant": contestant, "how": how, "median_us": median,
    }  # fmt: skip


def test_rows_are_kept_and_other_columns_refused(gpu_measure, tmp_path):
    path = tmp_path / "results" / "card.csv"
    for _ in range(2):
        gpu_measure.append(path, [row("cuda-full", "3.00")])
    with path.open(newline="") as file:
        kept = list(csv.DictReader(file))
    assert len(kept) == 2 and kept[1]["contestant"] == "cuda-full" and tuple(kept[0]) == gpu_measure.COLUMNS
    path.write_text("date,device\n")
    with pytest.raises(SystemExit, match="other columns"):
        gpu_measure.append(path, [row("cuda-full", "3.00")])


def test_what_was_measured_is_preferred(gpu_measure, tmp_path, capsys):
    rows = [
        row("triton-full", "5.00"), row("cuda-full", "9.00"),
        row("cuda-full", "4.00"),  # again, faster
        row("triton-full", "1.00", how="call"), row("triton-plain", "1.00"), row("sdpa", "1.00"),
        row("triton-full", "2.00", batch=16), row("cuda-full", "3.00", batch=16),
        row("triton-full", "1.00", pixels="32x32"),  # alone
        row("triton-full", "1.00", device="Other"),
    ]  # fmt: skip
    gpu_measure.append(tmp_path / "card.csv", rows)
    to = tmp_path / "measured.json"
    to.write_text(json.dumps({"about": "", "devices": {"Third": [], "Card": []}}))
    prefer.main([str(tmp_path / "card.csv"), "--to", str(to)])
    devices = json.loads(to.read_text())["devices"]
    assert set(devices) == {"Card", "Third"}
    assert [(shape["batch"], shape["pixels"], shape["fastest"]) for shape in devices["Card"]] == [
        (2, 4096, "cuda"), (16, 4096, "triton"),
    ]  # fmt: skip
    assert "Card: 2 shapes, triton at 1, cuda at 1" in capsys.readouterr().out


def test_what_prefer_writes_auto_reads(tmp_path, monkeypatch):
    from sdattn_fast.backend import measured

    to = tmp_path / "measured.json"
    times = [{k: str(v) for k, v in row(name, t).items()} for name, t in (("triton-full", 5.0), ("cuda-full", 4.0))]
    to.write_text(prefer.as_json(prefer.preferences(times)))
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


def test_a_table_with_nothing_to_choose_writes_nothing(gpu_measure, tmp_path):
    gpu_measure.append(tmp_path / "card.csv", [row("triton-full", "5.00")])
    to = tmp_path / "measured.json"
    with pytest.raises(SystemExit, match="nothing is written"):
        prefer.main([str(tmp_path / "card.csv"), "--to", str(to)])
    assert not to.exists()
