"""Trains `PresenceNetwork` on true scenes of the objects world, noised as they are while a picture is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..api import apply
from ..evaluation.alternatives.learned_presence import PresenceNetwork, object_features
from ..guidance.phrases import find_phrases
from ..guidance.pictures import encode_pictures, signed_pictures
from ..guidance.relevance import run
from ..lab.loop import write_tensors
from ..lab.objects.faults import Faults, faulty_naming
from ..lab.objects.world import ObjectsScene, sample_scene
from ..program import Capture

__all__ = ["Trained", "train_presence_network"]

# About a third of what these captions name is not there, or has another colour.
_FAULTS = Faults(phantom=1.0, swapped=0.3)
_BATCH, _EPOCHS, _HELD_OUT = 32, 6, 0.1
_TIMES = (450, 960)  # from the middle of a picture's steps to the first correction


@dataclass(frozen=True)
class Trained:
    """network: what was trained. objects: on how many. accuracy: of held-out ones, the share of pairs of one that is
    there and one that is not which it puts in order; `strongest`: the same of the objects' greatest attention."""

    network: PresenceNetwork
    objects: int
    accuracy: float
    strongest: float


def train_presence_network(pipe: Any, scenes: int, path: Path, first_seed: int = 300_000_000) -> Trained:
    """Train on so many scenes, and write the weights. pipe: the objects world's, whose every layer is looked at.

    Raises: ValueError for fewer scenes than two batches.
    """
    if scenes < 2 * _BATCH:
        raise ValueError(f"scenes: expected at least {2 * _BATCH}, got {scenes}")
    parts = list(_features(pipe, scenes, first_seed))
    features, there = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    held_out = int(_HELD_OUT * len(features))
    network = _fitted(features[held_out:], there[held_out:])
    write_tensors(path, dict(network.state_dict()))
    with torch.no_grad():
        logits = torch.cat([network(x) for x in features[:held_out].split(512)])
    layers = features.shape[1] // 2
    strongest = features[:held_out, :layers].float().mean(1).amax((1, 2))
    truth = there[:held_out]
    return Trained(network, len(features) - held_out, _ordered(logits, truth), _ordered(strongest, truth))


def _features(pipe: Any, scenes: int, first_seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of (objects' features, float16; whether each is there)."""
    generator = torch.Generator().manual_seed(first_seed)
    with apply(pipe, capture=Capture(layers="*", steps="latest")) as patch, torch.no_grad():
        for start in range(first_seed, first_seed + scenes - _BATCH + 1, _BATCH):
            captions, nouns, there, images = [], [], [], []
            for seed in range(start, start + _BATCH):
                scene = sample_scene(seed)
                caption, named = faulty_naming(scene, _FAULTS, seed)
                phrases = find_phrases(caption, pipe.tokenizer)[: len(named)]  # the background's is the last
                captions.append(caption)
                nouns.append([phrase.tokens("noun") for phrase in phrases])
                there += [_is_there(scene, item.noun, item.colour) for item in named]
                images.append(scene.image)
            latents = encode_pictures(pipe.vae, signed_pictures(torch.from_numpy(np.stack(images))))
            when = torch.randint(*_TIMES, (_BATCH,), generator=generator)
            noise = torch.randn(latents.shape, generator=generator)
            text, _ = pipe.encode_prompt(captions, "cpu", 1, False)
            seen = run(patch, pipe.scheduler.add_noise(latents, noise, when), when, text, maps_alone=True)
            yield torch.cat(object_features(seen.maps, nouns)).detach().half(), torch.tensor(there)


def _is_there(scene: ObjectsScene, noun: str, colour: str | None) -> bool:
    return any(item.noun == noun and item.colour == colour for item in scene.named)


def _fitted(features: Tensor, there: Tensor) -> PresenceNetwork:
    torch.manual_seed(0)
    network = PresenceNetwork(features.shape[1] // 2)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-2)
    batches = -(-len(features) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=_EPOCHS * batches)
    for _ in range(_EPOCHS):
        for number, chosen in enumerate(torch.randperm(len(features)).split(128)):
            x = features[chosen].float()
            logits = network(x.flip(3) if number % 2 else x)
            loss = F.binary_cross_entropy_with_logits(logits, there[chosen].float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.requires_grad_(False).eval()


def _ordered(scores: Tensor, truth: Tensor) -> float:
    """The area under the receiver operating characteristic: of all pairs, the share in which what is there scores
    more."""
    from scipy import stats

    there, missing = scores[truth].numpy(), scores[~truth].numpy()
    return float(stats.mannwhitneyu(there, missing).statistic / (len(there) * len(missing)))
