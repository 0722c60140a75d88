"""Does salience dropout in training help binding? `python -m sdattn_fast.studies.lora`: LoRAs of the shapes pipeline.

The same LoRA is trained on the same scenes (pairs of colour and shape that the pipeline was trained on) without
dropout, with the largest content entries dropped, and with random ones dropped, in train mode alone; each with three
seeds, and with one seed all see the same pictures, noise and timesteps. The detector judges what each draws, from the
same noise, of captions whose pairs neither the pipeline nor the LoRA saw. Differences are paired by seed and caption;
the interval is a bootstrap over both. A run can be broken off and taken up again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ..files import atomic_write
from ..lab.pipeline import draw_scenes, load_pipeline
from ..lab.shapes.captions import held_out_scenes
from ..lab.shapes.judge import judge_picture
from ..lab.shapes.world import sample_scene
from ..loading import quiet_loading
from ..measure.paired import cell_text, interval_of_means, summary_table

__all__ = ["CONDITIONS", "write_scenes"]

CONDITIONS: dict[str, tuple[float, str] | None] = {
    "without dropout": None,
    "topk, 0.1": (0.1, "topk"),
    "topk, 0.3": (0.3, "topk"),
    "random, 0.3": (0.3, "random"),
}
_MEASURES = ("present", "bound", "all right")
_DATA_SEED = 70_000_000


def write_scenes(folder: Path, count: int) -> None:
    """Scenes of pairs seen in training, as `train-lora` takes them."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        scene = sample_scene(_DATA_SEED + i)
        Image.fromarray(scene.image).save(folder / f"{i:05}.png")
        lines.append(json.dumps({"file_name": f"{i:05}.png", "text": scene.caption}))
    with atomic_write(folder / "metadata.jsonl") as temporary:
        temporary.write_text("\n".join(lines) + "\n")


def _run(
    pictures: Annotated[int, typer.Option(help="How many held-out captions.")] = 256,
    seeds: Annotated[int, typer.Option(help="LoRAs a condition.")] = 3,
    steps: Annotated[int, typer.Option(help="Of training.")] = 400,
    batch: Annotated[int, typer.Option(help="Scenes a step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 5e-4,
    scenes: Annotated[int, typer.Option(help="To train on.")] = 1024,
    folder: Annotated[Path, typer.Option(help="Where LoRAs and results are kept.")] = Path("runs/lora"),
) -> None:
    """Train, draw, judge, compare."""
    from rich.console import Console

    if pictures < 2 or seeds < 1:
        raise typer.BadParameter(f"expected at least 2 pictures and 1 seed, got {pictures} and {seeds}")
    console = Console()
    if not (folder / "data" / "metadata.jsonl").exists():
        write_scenes(folder / "data", scenes)
    reported = held_out_scenes(pictures)

    def judged(name: str, make: Any) -> np.ndarray:
        """(captions, measures), kept."""
        path = folder / f"{name}-{pictures}.json"
        if not path.exists():
            images = draw_scenes(make(), reported)
            rows = [judge_picture(s, x) for s, x in zip(reported, images, strict=True)]
            np.save(folder / f"{name}.npy", images[:8])
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps([[r.present, r.bound, float(r.right)] for r in rows]))
            console.print(f"{name}: bound {np.mean([r.bound for r in rows]):.3f}")
        return np.array(json.loads(path.read_text()))

    stock = judged("no LoRA", _quiet_pipeline)
    results_by_condition = {}
    for name, dropout in CONDITIONS.items():
        of_seeds = []
        for seed in range(seeds):
            out = folder / f"{name} {seed}"

            def trained(out: Path = out, seed: int = seed, dropout: Any = dropout) -> Any:
                return _trained(folder / "data", out, dropout, seed, steps, batch, learning_rate)

            of_seeds.append(judged(out.name, trained))
        results_by_condition[name] = np.stack(of_seeds)

    base = results_by_condition["without dropout"]
    still = np.broadcast_to(stock, base.shape)
    tables: dict[str, Any] = {"no LoRA": {m: {"mean": float(stock[:, i].mean())} for i, m in enumerate(_MEASURES)}}
    for name, results in results_by_condition.items():
        against = still if results is base else base
        tables[name] = {m: _compared(results[..., i], against[..., i]) for i, m in enumerate(_MEASURES)}
    settings = {"pictures": pictures, "seeds": seeds, "steps": steps, "batch": batch, "learning_rate": learning_rate}
    (folder / "summary.json").write_text(json.dumps({**settings, "scenes": scenes, **tables}, indent=1) + "\n")
    title = f"{pictures} held-out captions, {seeds} seeds; without dropout against no LoRA, others against it"
    console.print(summary_table(tables, title, "trained", _cell_text))


def _trained(
    data: Path, out: Path, dropout: tuple[float, str] | None, seed: int, steps: int, batch: int, rate: float
) -> Any:
    """The pipeline with the LoRA, as a user loads it."""
    from .. import Program, SalienceDropout
    from ..training import LoraTraining, train_lora

    program = Program()
    if dropout is not None:
        program = Program(SalienceDropout(dropout[0], mode=dropout[1]), renormalize="content")
    training = LoraTraining(steps=steps, batch=batch, learning_rate=rate, seed=seed, empty_captions=0.1, warmup=20)
    train_lora(_quiet_pipeline(), data, out, training, program)
    pipe = _quiet_pipeline()
    with quiet_loading():
        pipe.load_lora_weights(str(out))
    return pipe


def _quiet_pipeline() -> Any:
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _compared(results: np.ndarray, base: np.ndarray) -> dict[str, Any]:
    """Of results and base (seeds, captions): means, and the mean difference with its interval."""
    difference = results - base
    low, high = interval_of_means(difference)
    return {
        "mean": float(results.mean()), "base": float(base.mean()), "difference": float(difference.mean()),
        "low": low, "high": high, "by_seed": [float(x) for x in difference.mean(1)],
    }  # fmt: skip


def _cell_text(cell: dict[str, Any]) -> str:
    return f"{cell['mean']:.3f}, {cell_text(cell)}" if "difference" in cell else cell_text(cell)


if __name__ == "__main__":
    typer.run(_run)
