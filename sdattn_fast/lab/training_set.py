"""The scenes that a lab's model is trained on, drawn once; what a step takes from them is a function of its number."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..guidance.pictures import signed_pictures
from .loop import progress, seeded, write_tensors

__all__ = ["TrainingSet", "scale_of"]


class TrainingSet:
    """Pictures, captions and, where the world has them, labels of every pixel.

    draw: of a seed, (picture (64, 64, 3) uint8, caption, labels (64, 64) uint8 or None); it goes to other processes, so
    it must be picklable.
    """

    def __init__(
        self, draw: Callable[[int], tuple[np.ndarray, str, np.ndarray | None]], count: int, seed: int, tokenizer: Any,
        device: str,
    ) -> None:  # fmt: skip
        self.device, self.seed = device, seed
        drawn = _drawn(draw, range(seed * 1_000_000, seed * 1_000_000 + count))
        self.images = torch.from_numpy(np.stack([image for image, _, _ in drawn])).to(device)
        captions = [caption for _, caption, _ in drawn]
        ids = tokenizer([*captions, ""], padding="max_length", truncation=True, return_tensors="pt").input_ids
        self.captions, self.empty = ids[:-1].to(device), ids[-1].to(device)
        labels = [label for _, _, label in drawn if label is not None]
        self.labels = torch.from_numpy(np.stack(labels)).to(device) if labels else None

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, step: int, size: int) -> Tensor:
        """The indices that a step takes, (size,) int64."""
        return torch.randint(len(self), (size,), generator=seeded(self.seed, step)).to(self.device)

    def pictures(self, chosen: Tensor) -> Tensor:
        """(n, 3, 64, 64) float32 in [-1, 1]."""
        return signed_pictures(self.images[chosen])

    def tokens(self, chosen: Tensor, empty: Tensor | None = None) -> Tensor:
        """(n, 77) int64; the empty caption's where `empty`, (n,) bool."""
        ids = self.captions[chosen]
        return ids if empty is None else torch.where(empty.to(ids.device)[:, None], self.empty, ids)

    def latents(self, vae: Any, folder: Path) -> Tensor:
        """The posterior means of all scenes, (n, 4, 16, 16), kept beside the checkpoints for this encoder."""
        path = folder / "latents.safetensors"
        encoder = [*vae.encoder.parameters(), *vae.quant_conv.parameters()]
        sums = torch.stack([p.detach().double().sum().cpu() for p in encoder])
        if path.exists():
            cached = load_file(path)
            if len(cached["latents"]) == len(self) and torch.equal(cached["encoder"], sums):
                return cached["latents"].to(self.device)
        starts = range(0, len(self), 64)
        with torch.no_grad():
            means = [
                vae.encode(self.pictures(torch.arange(i, min(i + 64, len(self)), device=self.device))).latent_dist.mean
                for i in progress("latents", starts, len(starts))
            ]
        latents = torch.cat(means).float()
        write_tensors(path, {"latents": latents, "encoder": sums})
        write_tensors(folder / "scale.safetensors", {"scale": scale_of(latents).reshape(1)})
        return latents


def scale_of(latents: Tensor) -> Tensor:
    """What latents are divided by, so that they have a standard deviation of one."""
    return latents[:2000].std()


def _drawn(draw: Callable[[int], Any], seeds: range) -> list[Any]:
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers == 1 or len(seeds) < 2000:
        return [draw(seed) for seed in progress("scenes", seeds, len(seeds))]
    # Threads that PyTorch has started do not survive a fork.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(draw, seeds, chunksize=500))
