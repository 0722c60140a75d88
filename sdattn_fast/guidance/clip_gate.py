"""A gate that CLIP sets while a picture is drawn: is each noun phrase there yet?

Every few steps the predicted clean picture is decoded and compared with every noun phrase of the prompt. The tokens of
a phrase under the threshold are turned up ("amplify"), turned down ("soft"), or silenced ("hard"). Up is the default: a
missing object may need more attention, not less.

Source: the semantic gate of PnP-OVSS, whose score is CLIP's; docs/design.md, "Step 2: gate".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..patching.patch import Patch
from ..patching.words import tokenizer_of
from ..program import finite_number
from .clip_score import ClipScorer
from .phrases import NounPhrase, find_phrases
from .pictures import check_finite, uint8_pictures
from .preview import LinearDecoder, Preview

__all__ = ["ClipGate", "calibrate", "calibrated_threshold"]

HOW = ("hard", "soft", "amplify")


class ClipGate:
    """A gate that CLIP sets during sampling: a ``callback_on_step_end`` that finds out which phrases the picture shows.

    Every few steps it decodes the clean picture that the step predicts, and compares it with each noun phrase of the
    prompt. The scores become the gates of the phrases' tokens. The gate belongs to this call of the pipeline and ends
    with it. As a context manager it ends with `remove`.

    Args:
        patch: A patch of a pipeline, without a gate.
        prompt: What is drawn; a list where the pipeline draws several prompts.
        scorer: The CLIP that compares.
        phrases: Texts, or what `find_phrases` gives; a list of such lists for several prompts. None: all noun phrases.
        how: "amplify": phrases with a score below `threshold` get `strength`. "hard": they get the gate 0. "soft": each
            phrase gets ``sigmoid((score - threshold) / temperature)``. None drew measurably more objects. On one of our
            test models "soft" and "hard" lost 0.13 and 0.12 of those asked for, on the other "amplify" lost 0.021
            (docs/evaluation.md).
        threshold: Score below which a phrase counts as missing. The score is CLIP's cosine, less the largest cosine of
            a distractor. `clip_gate.calibrate` finds a threshold.
        distractors: Texts of things that are not in the picture.
        steps: (first, end): the gate is set after step first at the earliest, and before step end.
        every: Number of steps between two looks at the picture.
        strength: Gate of missing phrases for "amplify", more than 1.
        temperature: Width of the sigmoid for "soft", in units of the cosine, more than 0.
        decoder: Decodes the predicted latents, fast and blurred. None: the pipeline's VAE (docs/clip_gate.md).
        fuse: Which words of a phrase are gated: "all", "adjective-noun" or "noun", as in `NounPhrase.tokens`.

    Attributes:
        scores: After a run, (step, scores) of each look: for each picture a tensor with one score per phrase.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, or the patch has a gate or no tokenizer.

    Examples:
        >>> clip = ClipScorer.load("openai/clip-vit-large-patch14")
        >>> with sdattn_fast.apply(pipe) as patch, ClipGate(patch, prompt, clip, threshold=0.22) as gate:
        ...     image = pipe(prompt, callback_on_step_end=gate).images[0]

    Source: PnP-OVSS, Luo et al. 2024, arXiv 2311.17095; docs/design.md, "Step 2: gate".
    """

    def __init__(
        self,
        patch: Patch,
        prompt: str | Sequence[str],
        scorer: ClipScorer,
        *,
        phrases: Sequence[str | NounPhrase] | Sequence[Sequence[str | NounPhrase]] | None = None,
        how: str = "amplify",
        threshold: float = 0.0,
        distractors: Sequence[str] = (),
        steps: tuple[int, int] = (2, 15),
        every: int = 3,
        strength: float = 2.0,
        temperature: float = 0.02,
        decoder: LinearDecoder | None = None,
        fuse: str = "adjective-noun",
    ) -> None:
        if not isinstance(patch, Patch) or patch.pipe is None:
            raise TypeError(f"patch: expected sdattn_fast.apply(pipe, ...) of a pipeline, got {patch!r}")
        if patch.gate is not None:
            raise ValueError("patch: expected one without a gate, which ClipGate sets")
        if not isinstance(scorer, ClipScorer):
            raise TypeError(f"scorer: expected a ClipScorer, got {type(scorer).__name__}")
        if how not in HOW:
            raise ValueError(f"how: expected one of {HOW}, got {how!r}")
        self._check_numbers(threshold, steps, every, strength, temperature)
        if isinstance(distractors, str) or any(not isinstance(text, str) for text in distractors):
            raise TypeError(f"distractors: expected a list of texts, got {distractors!r:.80}")
        if decoder is not None and not isinstance(decoder, LinearDecoder):
            raise TypeError(f"decoder: expected None or a LinearDecoder, got {type(decoder).__name__}")
        pipe = patch.pipe
        prompts = [prompt] if isinstance(prompt, str) or not isinstance(prompt, Sequence) else list(prompt)
        of_prompts: Any = [None] * len(prompts) if phrases is None else phrases
        given: list[Any] = [phrases] if isinstance(prompt, str) else list(of_prompts)
        if len(given) != len(prompts):
            raise ValueError(f"phrases: expected a list for each of {len(prompts)} prompts, got {len(given)}")
        tokenizer = tokenizer_of(pipe)
        if tokenizer is None:
            raise ValueError(f"patch: expected one of a pipeline with a tokenizer, got a {type(pipe).__name__} without")
        self.phrases = [_phrases(p, some, tokenizer) for p, some in zip(prompts, given, strict=True)]
        for phrase in (p for some in self.phrases for p in some):
            phrase.tokens(fuse)
        self.patch, self.scorer, self.how, self.distractors = patch, scorer, how, tuple(distractors)
        self.threshold, self.steps, self.every = float(threshold), steps, every
        self.strength, self.temperature, self.decoder, self.fuse = float(strength), float(temperature), decoder, fuse
        self.scores: list[tuple[int, list[Tensor]]] = []
        self._tokens = int(tokenizer.model_max_length)
        self._preview = Preview(patch)

    # As diffusers' MultiPipelineCallbacks asks.
    tensor_inputs = ("latents",)

    def __call__(self, pipe: Any, step: int, timestep: Any, kept: dict[str, Any]) -> dict[str, Any]:
        """Called by diffusers at the end of each step, with its arguments.

        Args:
            pipe: The pipeline.
            step: Index of the step.
            timestep: Its timestep.
            kept: The pipeline's tensors by name.

        Returns:
            `kept`.
        """
        if step == 0:
            self.scores = []
        if self.steps[0] <= step < self.steps[1] and (step - self.steps[0]) % self.every == 0:
            scores = self._score(pipe)
            self.scores.append((step, scores))
            self.patch.current_call.gate = self._gate(scores)
        return kept

    def remove(self) -> None:
        """Remove the gate, and stop watching the UNet."""
        self._preview.remove()
        self.patch.current_call.gate = None

    def __enter__(self) -> ClipGate:
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()

    def _score(self, pipe: Any) -> list[Tensor]:
        """Of every entry, (its phrases,): the cosine, less the distractors' greatest."""
        if self.decoder is None:
            pictures = self._preview.decoded(pipe)
        else:
            latent = self._preview.latent(pipe)
            size = [int(s) * int(pipe.vae_scale_factor) for s in latent.shape[2:]]
            pictures = F.interpolate(self.decoder(latent), size=size, mode="bilinear")
        check_finite(pictures)
        pixels = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(1, -1).cpu().numpy()
        seen = self.scorer.pictures(list(pixels))
        if len(seen) % len(self.phrases):
            raise ValueError(
                f"prompt: expected as many as the pipeline draws, {len(seen)} pictures, got {len(self.phrases)}"
            )
        rivals = (seen @ self.scorer.texts(self.distractors).T).amax(1) if self.distractors else torch.zeros(len(seen))
        found = []
        for i, picture in enumerate(seen):
            phrases = self.phrases[i * len(self.phrases) // len(seen)]
            texts = self.scorer.texts([p.text for p in phrases]) if phrases else picture.new_zeros(0, len(picture))
            found.append(texts @ picture - rivals[i])
        return found

    def _gate(self, scores: list[Tensor]) -> Tensor:
        gate = torch.ones(len(scores), self._tokens)
        for i, of_entry in enumerate(scores):
            phrases = self.phrases[i * len(self.phrases) // len(scores)]
            for phrase, score in zip(phrases, of_entry.tolist(), strict=True):
                gate[i, list(phrase.tokens(self.fuse))] = self._value(score)
        return gate

    def _value(self, score: float) -> float:
        if self.how == "soft":
            return float(torch.sigmoid(torch.tensor((score - self.threshold) / self.temperature)))
        missing = score < self.threshold
        return (0.0 if self.how == "hard" else self.strength) if missing else 1.0

    @staticmethod
    def _check_numbers(threshold: Any, steps: Any, every: Any, strength: Any, temperature: Any) -> None:
        for name, x in (("threshold", threshold), ("strength", strength), ("temperature", temperature)):
            finite_number(name, x)
        if strength <= 1.0:
            raise ValueError(f"strength: expected a number above 1, got {strength!r}")
        if not temperature > 0.0:
            raise ValueError(f"temperature: expected a number above 0, got {temperature!r}")
        whole = [s for s in steps if isinstance(s, int) and not isinstance(s, bool)] if isinstance(steps, tuple) else []
        if len(whole) != 2 or not 0 <= whole[0] < whole[1]:
            raise ValueError(f"steps: expected (first, end), ints with 0 <= first < end, got {steps!r}")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every: expected an int >= 1, got {every!r}")


def _phrases(prompt: str, given: Any, tokenizer: Any) -> list[NounPhrase]:
    if given is not None and all(isinstance(phrase, NounPhrase) for phrase in given):
        return list(given)
    if given is not None and not isinstance(given, str):
        given = [phrase.text if isinstance(phrase, NounPhrase) else phrase for phrase in given]
    return find_phrases(prompt, tokenizer, phrases=given)


def calibrate(
    pipe: Any,
    scorer: ClipScorer,
    prompts: Sequence[str],
    phrases: Sequence[Sequence[str]],
    *,
    batch: int = 8,
    **how: Any,
) -> float:
    """The threshold of `ClipGate` that best separates phrases of a picture's own prompt from those of other prompts.

    It draws the prompts, prompt i from the noise of seed i, and scores every phrase in every picture.

    Args:
        pipe: A diffusers pipeline.
        scorer: The CLIP that compares.
        prompts: What to draw.
        phrases: The texts of each prompt's phrases.
        batch: Number of prompts drawn at once.
        **how: Passed to the pipeline, such as ``num_inference_steps``.

    Returns:
        The threshold, by `calibrated_threshold`.

    Raises:
        ValueError: If the counts differ, or every prompt has every phrase.

    Examples:
        >>> threshold = calibrate(pipe, clip, ["a red car", "a blue bench"], [["a red car"], ["a blue bench"]])
    """
    if len(phrases) != len(prompts):
        raise ValueError(f"phrases: expected a list for each of {len(prompts)} prompts, got {len(phrases)}")
    every = sorted({phrase for some in phrases for phrase in some})
    if all(phrase in some for phrase in every for some in phrases):
        raise ValueError(
            f"prompts: to calibrate a threshold, expected a phrase of one that another lacks, got {len(prompts)} with "
            f"the phrases {every!r}; say a threshold, or give more prompts"
        )
    present: list[float] = []
    absent: list[float] = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        noise = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        images = pipe(part, generator=noise, output_type="np", **how).images
        scores = scorer.pictures(list(uint8_pictures(images))) @ scorer.texts(every).T
        for mine, row in zip(phrases[start : start + batch], scores.tolist(), strict=True):
            for phrase, score in zip(every, row, strict=True):
                (present if phrase in mine else absent).append(score)
    return calibrated_threshold(present, absent)


def calibrated_threshold(present: Sequence[float] | Tensor, absent: Sequence[float] | Tensor) -> float:
    """The score with the greatest balanced accuracy, midway between its two neighbours.

    Args:
        present: Scores of phrases that are in their pictures.
        absent: Scores of phrases that are not.

    Returns:
        The threshold: phrases with this score or more count as present.

    Raises:
        ValueError: If either is empty or not finite.

    Examples:
        >>> calibrated_threshold([0.25, 0.3], [0.1, 0.2])
        0.225
    """
    there, missing = (torch.as_tensor(x, dtype=torch.float64).flatten() for x in (present, absent))
    for name, x in (("present", there), ("absent", missing)):
        if not x.numel() or not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name}: expected at least one finite score, got {x.tolist()!r}")
    scores = torch.cat([there, missing]).unique()
    cuts = torch.cat([scores[:1] - 1e-6, (scores[1:] + scores[:-1]) / 2, scores[-1:] + 1e-6])
    lost, refused = (torch.searchsorted(x.sort().values, cuts).double() / len(x) for x in (there, missing))
    accuracy = refused - lost
    return float(cuts[int(accuracy.argmax())])
