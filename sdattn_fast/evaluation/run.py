"""Every condition draws every prompt from the same noise, batch by batch, over as many processes as there are.

A batch's measures are a file of their own, written aside and renamed: a run that was killed, or met a full disk, goes
on with what is missing. Processes (accelerate's) share the batches out and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import atomic_write, parse_json
from ..guidance.phrases import head_words
from ..guidance.pictures import uint8_pictures
from ..patching.words import tokenizer_of, words_of
from .conditions import Condition, ConditionInputs, apply_condition
from .subjects import Subject

__all__ = ["Evaluation", "draw_batch", "inputs_for"]

REPORT_PICTURES = 8  # pictures of each condition, for the report
_FIRST_NOISE = 1_000_000


class Evaluation:
    """An evaluation in a folder.

    Args:
        folder: of `settings.json`, batches and pictures. pipe: a diffusers pipeline. subject: whom to ask.
        conditions: what to compare; those that cannot be drawn are left out, and said in `left_out`.
        inputs: what conditions draw on; its prompts, phrases, objects and words are made here, from the subject.
        model: a name for the report. batch: prompts a call.

    Raises: ValueError where conditions have the same name, or the folder holds an evaluation of something else.
    """

    def __init__(
        self, folder: str | Path, pipe: Any, subject: Subject, conditions: Sequence[Condition], inputs: ConditionInputs,
        model: str, batch: int = 16,
    ) -> None:  # fmt: skip
        self.folder, self.pipe, self.subject, self.batch, self.model = Path(folder), pipe, subject, batch, model
        self.inputs = inputs
        names = [c.name for c in conditions]
        if len(set(names)) != len(names):
            raise ValueError(f"conditions: expected names that differ, got {names}")
        reasons = {c.name: c.left_out(inputs, pipe, subject.guidance) for c in conditions}
        self.left_out = {name: reason for name, reason in reasons.items() if reason is not None}
        self.conditions = [c for c in conditions if c.name not in self.left_out]
        self._check_settings()
        # Processes must agree on it: each opens the evaluation before any of them draws.
        self._to_draw = [unit for unit in self.units() if not self._is_drawn(*unit)]

    @property
    def parts(self) -> list[range]:
        count = len(self.subject.prompts)
        return [range(start, min(start + self.batch, count)) for start in range(0, count, self.batch)]

    def units(self) -> list[tuple[Condition, range]]:
        """All that there is to draw, conditions inside, so that what is broken off is complete for its prompts."""
        return [(condition, part) for part in self.parts for condition in self.conditions]

    def run(self, process: int = 0, processes: int = 1, tell: Callable[[str], None] | None = None) -> None:
        """Draw and measure this process's share of what was missing when the evaluation was opened."""
        for condition, part in self._to_draw[process::processes]:
            path = self._path(condition, part)
            if path.exists():
                continue
            pictures, maps = draw_batch(
                self.pipe, condition, inputs_for(self.subject, part, self.pipe, self.inputs), self.subject, part
            )
            rows = self.subject.measure(part, pictures, maps)
            if part.start == 0:
                self._keep_pictures(condition, pictures[:REPORT_PICTURES])
            _write(path, json.dumps(rows))
            if tell is not None:
                tell(f"{condition.name}: {part.stop} of {len(self.subject.prompts)}")

    def missing(self) -> int:
        return sum(not self._path(condition, part).exists() for condition, part in self.units())

    def results(self) -> dict[str, list[dict[str, float]]]:
        """Condition -> of every prompt, its measures. Raises: ValueError while any are missing."""
        if self.missing():
            raise ValueError(f"folder: {self.missing()} batches of {self.folder} are not drawn yet")
        results: dict[str, list[dict[str, float]]] = {}
        for condition, part in self.units():
            results.setdefault(condition.name, []).extend(self._rows(self._path(condition, part), len(part)))
        return results

    def _is_drawn(self, condition: Condition, part: range) -> bool:
        path = self._path(condition, part)
        return path.exists() and bool(self._rows(path, len(part)))

    def _rows(self, path: Path, count: int) -> list[dict[str, float]]:
        """A batch's measures. Raises: ValueError, naming the file, where it is not what was written."""
        broken = f"folder: {path} is not as it was written; remove it, and call again to draw this batch anew"
        rows = parse_json(path.read_bytes(), broken)
        measures = set(self.subject.measures)
        whole = isinstance(rows, list) and len(rows) == count and all(isinstance(row, dict) for row in rows)
        if not whole or any(not measures <= set(row) or not all(map(_is_number, row.values())) for row in rows):
            raise ValueError(broken)
        return rows

    def pictures(self, condition: Condition) -> list[Path]:
        return sorted((self.folder / "pictures" / _file_name(condition)).glob("*.png"))

    def _path(self, condition: Condition, part: range) -> Path:
        return self.folder / "batches" / _file_name(condition) / f"{part.start:05}-{part.stop:05}.json"

    def _keep_pictures(self, condition: Condition, pictures: Sequence[np.ndarray]) -> None:
        from PIL import Image

        for i, picture in enumerate(pictures):
            with atomic_write(self.folder / "pictures" / _file_name(condition) / f"{i}.png") as temporary:
                Image.fromarray(picture).save(temporary, format="PNG")

    def _check_settings(self) -> None:
        """Batches are of one evaluation: the same prompts, drawn the same way, by the same conditions."""
        prompts = hashlib.sha256("\n".join(self.subject.prompts).encode()).hexdigest()[:16]
        fixed: dict[str, Any] = {
            "model": self.model, "prompts": prompts, "count": len(self.subject.prompts), "batch": self.batch,
            "guidance": self.subject.guidance, "steps": self.subject.steps, "threshold": self.inputs.threshold,
            "heads": self.inputs.heads, "tuned": None if self.inputs.tuned is None else repr(self.inputs.tuned),
        }  # fmt: skip
        settings = json.loads(json.dumps({**fixed, "measures": list(self.subject.measures)}, default=str))
        path = self.folder / "settings.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        described = {c.name: json.loads(json.dumps(_described(c), default=str)) for c in self.conditions}
        if path.exists():
            broken = f"folder: {path} is not as it was written; name another folder"
            before = parse_json(path.read_bytes(), broken)
            if not isinstance(before, dict) or not isinstance(before.get("conditions"), dict):
                raise ValueError(broken)
            changed = [name for name in settings if before.get(name) != settings[name]]
            changed += [name for name, c in described.items() if before["conditions"].get(name, c) != c]
            if changed:
                changes = ", ".join(f"{n}: {before.get(n)!r}, now {settings.get(n)!r}" for n in changed[:3])
                raise ValueError(f"folder: {self.folder} has another evaluation ({changes}); name another folder")
            described = {**before["conditions"], **described}
        _write(path, json.dumps({**settings, "conditions": described}, indent=1) + "\n")


def inputs_for(subject: Subject, part: range, pipe: Any, inputs: ConditionInputs) -> ConditionInputs:
    """`inputs` with the prompts, phrases, objects and words of one batch."""
    phrases, objects, words = [], [], []
    tokenizer = tokenizer_of(pipe)
    for i in part:
        every, things = subject.phrases(i, tokenizer)
        phrases.append(every)
        objects.append(things)
        words.append(head_words(things, words_of(tokenizer, subject.prompts[i])))
    prompts = [subject.prompts[i] for i in part]
    return replace(inputs, prompts=prompts, phrases=phrases, objects=objects, words=words, steps=subject.steps)


def draw_batch(
    pipe: Any, condition: Condition, inputs: ConditionInputs, subject: Subject, part: range
) -> tuple[list[np.ndarray], list[list[np.ndarray] | None]]:
    """Pictures (height, width, 3) uint8, what is random in each depending on its prompt's index alone; and of each, its
    objects' maps (height, width), None where the condition keeps none or the subject wants none."""
    seeds = [_FIRST_NOISE + i for i in part]
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    if condition.peer is not None:
        peer_args = (inputs.prompts, inputs.objects, noise, subject.guidance, subject.steps)
        return list(condition.peer.draw(pipe, *peer_args)), [None] * len(part)
    with apply_condition(condition, pipe, inputs) as (patch, callback, tuned_options):
        call_kwargs: dict[str, Any] = {"guidance_scale": subject.guidance, "num_inference_steps": subject.steps}
        call_kwargs |= tuned_options
        if patch is not None:
            patch.update(seed=seeds)  # of random dropout
        if callback is not None:
            call_kwargs["callback_on_step_end"] = callback
        with warnings.catch_warnings():
            # Of prompts without a modifier, or with one object; there are many among those that are evaluated.
            warnings.filterwarnings("ignore", "sdattn_fast: the recipe left out")
            images = pipe(list(inputs.prompts), generator=noise, output_type="np", **call_kwargs).images
        pictures = list(uint8_pictures(images))
        maps: list[list[np.ndarray] | None] = [None] * len(pictures)
        if patch is not None and subject.needs_maps:
            whole = patch.maps.upsample(pictures[0].shape[:2])
            if len(whole) == len(pictures):  # not where every entry is active
                maps = [
                    [heat[list(p.head.tokens)].mean(0).float().numpy() for p in things]
                    for heat, things in zip(whole.cpu(), inputs.objects, strict=True)
                ]
    return pictures, maps


def _described(condition: Condition) -> dict[str, Any]:
    """Its fields; but the later ones only where they say something, so that a folder of an earlier release goes on."""
    unsaid = {"peer": None, "bias": None, "score": {"presence": 1.0}}
    return {name: x for name, x in asdict(condition).items() if name not in unsaid or x != unsaid[name]}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _file_name(condition: Condition) -> str:
    return "".join(c if c.isalnum() else "-" for c in condition.name)


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text)
