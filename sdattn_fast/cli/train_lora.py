"""`sdattn-fast train-lora`: a LoRA from a folder of pictures and captions, salience dropout in training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .generate import pipeline_of
from .options import DropoutAxis, DropoutMode, Model, Ratio, check_out_folder, program_of, within

__all__ = ["train_lora"]


def train_lora(
    data: Annotated[Path, typer.Option(help="Folder of captioned pictures: metadata.jsonl, or a.txt beside a.png.")],
    model: Model = "shapes",
    out: Annotated[Path, typer.Option(help="Output folder; run the same command again to resume.")] = Path("lora"),
    steps: Annotated[int, typer.Option(help="Optimizer steps.", callback=within(1, 10**9))] = 1000,
    batch: Annotated[int, typer.Option(help="Pictures per step and process.", callback=within(1, 4096))] = 4,
    accumulate: Annotated[
        int, typer.Option(help="Gradient accumulation: forward passes per step.", callback=within(1, 10**6))
    ] = 1,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 1e-4,
    warmup: Annotated[int, typer.Option(help="Steps of linear warm-up.", callback=within(0, 10**9))] = 0,
    rank: Annotated[int, typer.Option(help="Rank of the LoRA.", callback=within(1, 4096))] = 8,
    size: Annotated[
        int | None, typer.Option(help="Side of the pictures in pixels; default: the model's.", callback=within(8, 8192))
    ] = None,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror half of the pictures.")] = False,
    empty_captions: Annotated[
        float, typer.Option(help="Share of captions replaced by the empty one, for guidance.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of everything random.", callback=within(0, 2**63 - 1))] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.", callback=within(1, 10**9))] = 100,
    precision: Annotated[
        str | None,
        typer.Option(help="no, bf16 or fp16, also for the model's weights; default: bf16 on cuda, no on cpu."),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Saves memory, takes time.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if available.")] = None,
    dropout_ratio: Ratio = None,
    dropout_axis: DropoutAxis = "token",
    dropout_mode: DropoutMode = "topk",
    dropout_when: Annotated[
        str, typer.Option(help="training, or a schedule over steps such as 0:0.0,500:0.2 (step:ratio).")
    ] = "training",
) -> None:
    """Train a LoRA for a diffusers UNet; on several GPUs with `accelerate launch -m sdattn_fast.cli.train_lora`."""
    from accelerate import PartialState
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ..loading import checked_device
    from ..training import LoraTraining
    from ..training import train_lora as train

    device = checked_device(device)
    check_out_folder(out)
    precision = precision or ("bf16" if device.startswith("cuda") else "no")
    program = program_of(dropout_ratio, dropout_axis, dropout_mode, 1, None, None, "token", "none")
    training = LoraTraining(
        steps=steps, batch=batch, learning_rate=learning_rate, warmup=warmup, accumulate=accumulate, rank=rank,
        size=None if size is None else (size, size), flip=flip, empty_captions=empty_captions, seed=seed,
        dropout_when=_when(dropout_when), precision=precision, gradient_checkpointing=gradient_checkpointing,
    )  # fmt: skip
    pipe = pipeline_of(model, device, {"bf16": "bfloat16", "fp16": "float16"}.get(precision, "float32"))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    main = PartialState(cpu=device == "cpu").is_main_process
    with Progress(*columns, disable=not main) as progress:
        task = progress.add_task("training", total=steps)
        mean = [float("nan")]

        def tell(step: int, loss: float) -> None:
            mean[0] = loss if step == 1 or mean[0] != mean[0] else 0.98 * mean[0] + 0.02 * loss
            progress.update(task, completed=step, description=f"training, loss {mean[0]:.4f}")

        path = train(pipe, data, out, training, program, save_every=save_every, tell=tell)
    if not main:
        return
    print(f"wrote {path}")
    print(f"draw with it: sdattn-fast generate --model {model} --lora {out} --prompt ...")


def _when(text: str) -> str | dict[int, float]:
    if ":" not in text:
        return text
    try:
        return {int(step): float(ratio) for step, ratio in (point.split(":") for point in text.split(","))}
    except ValueError:
        raise typer.BadParameter(
            f"expected training, always, or step:ratio,step:ratio, got {text!r}", param_hint="--dropout-when"
        ) from None


if __name__ == "__main__":
    typer.run(train_lora)
