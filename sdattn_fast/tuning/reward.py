"""The reward of a program: what CLIP makes of the pictures that it draws, of a set of prompts.

The reward of a picture is ``sigmoid(cosine / temperature)``, the cosine being CLIP's of picture and prompt; a program's
is the mean over the prompts, each with the same noise whatever the program. So programs are paired by picture.

Source: the reward after PnP-OVSS (Luo et al. 2024), which tunes without labels by CLIP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..api import apply
from ..arguments import check_seed
from ..files import ProgramFile
from ..guidance.clip_score import ClipScorer
from ..guidance.pictures import pil_pictures
from ..measure.paired import interval
from ..patching.layers import cross_attention_layers
from ..program import finite_number

__all__ = ["PictureJudge", "Reward", "compare"]

PictureJudge = Callable[[Sequence[str], Sequence[Any]], np.ndarray]


class Reward:
    """Draws a set of prompts under a program, and rewards the pictures by CLIP.

    The reward of a picture is ``sigmoid(cosine / temperature)``, CLIP's cosine of picture and prompt. Every program
    draws from the same noise, so programs can be compared picture by picture.

    Args:
        pipe: A diffusers pipeline, not patched.
        clip: The CLIP that rewards.
        prompts: The texts.
        seeds: Number of pictures per prompt.
        seed: Picture j of prompt i is drawn from the noise of ``seed + i * seeds + j``.
        temperature: Temperature of the sigmoid, > 0.
        batch: Number of pictures drawn at once.
        **call_kwargs: Passed to the pipeline where the program's file does not say otherwise, such as
            ``num_inference_steps``.

    Attributes:
        texts: Each prompt `seeds` times, one for each picture.

    Raises:
        ValueError: If an argument is out of range or has the wrong type.

    Examples:
        >>> reward = Reward(pipe, clip, ["a red car and a blue bench"], seeds=2, num_inference_steps=30)
        >>> rewards, pictures = reward.all(ProgramFile())  # of stock attention
        >>> for which, pictures in reward.pictures(ProgramFile(Program(SalienceDropout(0.1)))):
        ...     rewards = reward.score(which, pictures)

    Source: tuning by CLIP without labels: PnP-OVSS, Luo et al. 2024, arXiv 2311.17095.
    """

    def __init__(
        self,
        pipe: Any,
        clip: ClipScorer,
        prompts: Sequence[str],
        *,
        seeds: int = 1,
        seed: int = 0,
        temperature: float = 0.25,
        batch: int = 8,
        **call_kwargs: Any,
    ) -> None:
        if isinstance(prompts, str) or not prompts or any(not isinstance(p, str) or not p.strip() for p in prompts):
            raise ValueError(f"prompts: expected at least one, each some words, got {prompts!r}")
        for name, value in (("seeds", seeds), ("batch", batch)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an int >= 1, got {value!r}")
        check_seed(seed)
        if finite_number("temperature", temperature) <= 0:
            raise ValueError(f"temperature: expected a finite number > 0, got {temperature!r}")
        self.pipe = pipe
        self.clip = clip
        self.texts = [prompt for prompt in prompts for _ in range(seeds)]
        self.seed = seed
        self.temperature = float(temperature)
        self.batch = batch
        self.call_kwargs = call_kwargs
        self.seeds = seeds

    @property
    def model_layers(self) -> list[str]:
        """The names of the pipeline's cross-attention layers."""
        return [name for name, _ in cross_attention_layers(self.pipe.unet)]

    def pictures(self, file: ProgramFile, which: Sequence[int] | None = None) -> Iterator[tuple[list[int], list[Any]]]:
        """Draw pictures under a program.

        Args:
            file: The program with its settings.
            which: Indices into `texts`. None: all.

        Yields:
            For each batch, the indices and the PIL images.

        Raises:
            ValueError: If a picture is not finite.
        """
        which = range(len(self.texts)) if which is None else which
        call_kwargs = dict(self.call_kwargs)
        for name in ("guidance_scale", "num_inference_steps"):
            if getattr(file, name) is not None:
                call_kwargs[name] = getattr(file, name)
        with apply(self.pipe, file) as patch:
            for start in range(0, len(which), self.batch):
                part = [int(i) for i in which[start : start + self.batch]]
                seeds = [self.seed + i for i in part]
                noise = [torch.Generator().manual_seed(seed) for seed in seeds]
                patch.update(seed=[seed % 2**63 for seed in seeds])
                texts = [self.texts[i] for i in part]
                images = self.pipe(texts, **{**call_kwargs, "output_type": "np"}, generator=noise).images
                yield part, pil_pictures(images)

    def score(self, which: Sequence[int], pictures: Sequence[Any]) -> np.ndarray:
        """The rewards of pictures.

        Args:
            which: For each picture, its index into `texts`.
            pictures: n PIL images.

        Returns:
            (n,) float64 array in (0, 1).
        """
        cosines = self.clip.similarity(pictures, [self.texts[i] for i in which]).double()
        return torch.sigmoid(cosines / self.temperature).numpy()

    def all(self, file: ProgramFile) -> tuple[np.ndarray, list[Any]]:
        """Draw and reward a picture for each entry of `texts`.

        Args:
            file: The program with its settings.

        Returns:
            (n,) float64 array of rewards, and n PIL images.
        """
        pictures = [picture for _, batch in self.pictures(file) for picture in batch]
        return self.score(range(len(self.texts)), pictures), pictures

    def describe(self) -> dict[str, Any]:
        """The settings that make two rewards comparable, as a study keeps them.

        Returns:
            Their names and values, which JSON can hold.
        """
        plain = {key: x for key, x in self.call_kwargs.items() if isinstance(x, (str, int, float))}
        return {"prompts": self.texts[:: self.seeds], "seeds": self.seeds, "seed": self.seed,
                "temperature": self.temperature, "asked": plain}  # fmt: skip


def compare(reward: Reward, file: ProgramFile, judge: PictureJudge | None = None) -> dict[str, dict[str, Any]]:
    """Compare a program with stock attention, on prompts that were not used to choose it.

    Args:
        reward: A reward of the other prompts.
        file: The program with its settings.
        judge: Takes n texts and n pictures and returns (n,) scores. None: no judge beside the reward.

    Returns:
        "reward", and "judge" if there is one: each with the means "stock" and "tuned", their "difference", its 95 %
        paired bootstrap interval "low" and "high", the number of "pictures", and what that "supports": "better",
        "worse" or "no difference".

    Examples:
        >>> others = Reward(pipe, clip, ["a yellow bird on a red roof"], seed=1000)
        >>> compare(others, best)["reward"]["supports"]
        'no difference'
    """
    (stock, stock_pictures), (tuned, tuned_pictures) = (reward.all(x) for x in (ProgramFile(), file))
    figures = {"reward": _paired(stock, tuned)}
    if judge is not None:
        drawn = (stock_pictures, tuned_pictures)
        figures["judge"] = _paired(*(np.asarray(judge(reward.texts, x), dtype=float) for x in drawn))
    return figures


def _paired(stock: np.ndarray, tuned: np.ndarray) -> dict[str, Any]:
    difference = tuned - stock
    low, high = interval(difference)
    supports = "better" if low > 0 else "worse" if high < 0 else "no difference"
    return {
        "stock": float(stock.mean()), "tuned": float(tuned.mean()), "difference": float(difference.mean()),
        "low": low, "high": high, "pictures": len(difference), "supports": supports,
    }  # fmt: skip
