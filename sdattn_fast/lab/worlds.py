"""The worlds that a lab's pipeline can be trained on: how a scene is drawn, and what the pipeline is built of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .objects.faults import Faults

__all__ = ["World", "world_of"]


@dataclass(frozen=True)
class World:
    """draw: of a seed, a training scene as `TrainingSet` takes it. build_tokenizer, channels: its pipeline's own,
    of the tokenizer and the UNet."""

    draw: Callable[[int], tuple[np.ndarray, str, np.ndarray | None]]
    build_tokenizer: Callable[[], Any]
    channels: tuple[int, int, int]


def world_of(name: str, faults: Faults) -> World:
    """The world of that name, "shapes" or "objects".

    Raises: ValueError: another name, or faults for the captions of "shapes", which are true.
    """
    if name == "objects":
        from .objects import model as objects_model

        return World(partial(_objects_scene, faults), objects_model.build_tokenizer, objects_model.CHANNELS)
    if name != "shapes":
        raise ValueError(f"world: expected shapes or objects, got {name!r}")
    if faults != Faults():
        raise ValueError(f"faults: captions of the world shapes are true, got {faults}")
    from .shapes import model as shapes_model

    return World(_shapes_scene, shapes_model.build_tokenizer, shapes_model.CHANNELS)


def _objects_scene(faults: Faults, seed: int) -> tuple[np.ndarray, str, np.ndarray | None]:
    from .objects.faults import faulty_caption
    from .objects.world import sample_scene

    scene = sample_scene(seed)
    return scene.image, faulty_caption(scene, faults, seed), scene.labels()


def _shapes_scene(seed: int) -> tuple[np.ndarray, str, np.ndarray | None]:
    from .shapes.world import sample_scene

    scene = sample_scene(seed)
    return scene.image, scene.caption, None
