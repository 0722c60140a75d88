"""The training loop of the lab's models: seeded by step, with checkpoints that survive a kill."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..files import atomic_write

__all__ = ["Schedule", "fit", "is_first", "load_average", "progress", "say", "seeded", "write_tensors"]


class Schedule:
    """Learning rate by step: 100 steps of warm-up, then `peak`, and over the last fifth linearly down to zero.

    The plateau does not depend on the number of steps, so a run that is given more of them later goes on from its
    checkpoint as though it had been given them at once, unless that checkpoint lies in the last fifth already.
    """

    def __init__(self, peak: float, steps: int) -> None:
        self.peak, self.steps = peak, steps

    def __call__(self, step: int) -> float:
        left = (self.steps - step) / max(1, self.steps // 5)
        return self.peak * min(1.0, (step + 1) / 100, left)


def fit(
    name: str,
    model: nn.Module,
    loss: Callable[[int], Tensor],
    schedule: Schedule,
    folder: Path,
    *,
    save_every: int = 250,
    bf16: bool = False,
) -> None:
    """Train to `schedule.steps` with AdamW and clipped gradients; keep a moving average of the weights.

    Resumes from ``folder/name.safetensors`` where that is there. `loss` is of a number and must depend on that alone
    for a resumed run to be the uninterrupted one. Of n processes of a process group, each takes every n-th number, and
    a step is of n of them. bf16: the forward pass under autocast.
    """
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    named: dict[str, Tensor] = {key: p for key, p in model.named_parameters() if p.requires_grad}
    device = next(iter(named.values())).device
    optimizer = torch.optim.AdamW(named.values(), lr=schedule.peak, weight_decay=0.01, fused=True)
    average = {key: p.detach().clone() for key, p in named.items()}
    path = folder / f"{name}.safetensors"
    first = _resume(path, named, average, optimizer) if path.exists() else 0
    if first:
        say(f"{name}: resumed at step {first}")
    model.train()
    seen: list[Tensor] = []
    since = time.perf_counter()
    for step in progress(name, range(first, schedule.steps), schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            value = loss(step * processes + rank)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        if processes > 1:
            _average_gradients(list(named.values()), processes)
        nn.utils.clip_grad_norm_(list(named.values()), 1.0)
        optimizer.step()
        with torch.no_grad():
            share = 1 - min(0.999, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.values()), list(named.values()), share)
        seen.append(value.detach())
        if (step + 1) % save_every == 0 or step + 1 == schedule.steps:
            if is_first():
                _checkpoint(path, step + 1, named, average, optimizer)
            took = (time.perf_counter() - since) / len(seen)
            mean = torch.stack(seen).mean().item()
            say(f"{name}: step {step + 1}/{schedule.steps}  loss {mean:.4f}  {took:.3f} s a step")
            seen, since = [], time.perf_counter()
    if processes > 1:
        dist.barrier()  # the last checkpoint is there for all of them


def load_average(model: nn.Module, path: Path) -> None:
    """The averaged weights of a checkpoint, into the model, which goes to evaluation mode."""
    tensors = load_file(path)
    for key, p in model.named_parameters():
        if f"ema/{key}" in tensors:
            p.data.copy_(tensors[f"ema/{key}"])
    model.eval()


def seeded(seed: int, step: int) -> torch.Generator:
    """What a step draws from, a function of both numbers alone, on the CPU."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """To a file that appears when it is whole."""
    with atomic_write(path) as temporary:
        save_file({key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}, temporary)


def progress(name: str, items: Iterable[int], total: int) -> Iterable[int]:
    """With a bar, on a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console()
    if not console.is_terminal:
        return items
    return track(items, description=name, total=total, console=console)


def is_first() -> bool:
    """Whether this is the only process, or the first of several."""
    return not dist.is_initialized() or dist.get_rank() == 0


def say(text: str) -> None:
    """By the first of several processes."""
    if is_first():
        print(text, flush=True)


def _average_gradients(parameters: list[Tensor], processes: int) -> None:
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = nn.utils.parameters_to_vector(gradients)
    dist.all_reduce(flat)
    nn.utils.vector_to_parameters(flat / processes, gradients)


def _checkpoint(path: Path, step: int, named: dict[str, Tensor], average: dict[str, Tensor], optimizer: Any) -> None:
    tensors = {"step": torch.tensor(step)}
    for key, p in named.items():
        state = optimizer.state[p]
        tensors |= {f"model/{key}": p, f"ema/{key}": average[key]}
        tensors |= {f"m/{key}": state["exp_avg"], f"v/{key}": state["exp_avg_sq"]}
    write_tensors(path, tensors)


def _resume(path: Path, named: dict[str, Tensor], average: dict[str, Tensor], optimizer: Any) -> int:
    tensors = load_file(path)
    step = int(tensors["step"])
    for key, p in named.items():
        if f"model/{key}" not in tensors:
            continue  # it was not trained before
        p.data.copy_(tensors[f"model/{key}"])
        average[key].copy_(tensors[f"ema/{key}"])
        optimizer.state[p] = {
            "step": torch.tensor(float(step), device=p.device),
            "exp_avg": tensors[f"m/{key}"].to(p.device),
            "exp_avg_sq": tensors[f"v/{key}"].to(p.device),
        }
    return step
