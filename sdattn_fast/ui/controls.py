"""What the page's controls say, as a condition to be entered around the pipeline and as a program's file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..evaluation.conditions import Condition
from ..files import ProgramFile, load_heads, parse_json, read_json
from ..guidance.phrases import NounPhrase, find_phrases
from ..guidance.recipe import Recipe
from ..program import Program, Refinement, SalienceDropout

__all__ = ["Controls", "DrawRequest", "chosen_phrases", "loaded_from"]

_NO_OBJECT = "background"
_MOST_EXACT = 2**53 - 1  # of a browser's whole numbers, which are floats


@dataclass(frozen=True)
class DrawRequest:
    """What the pipeline is called with. phrases: those the techniques work on, as texts of the prompt.

    Raises: ValueError, naming the field.
    """

    prompt: str
    phrases: tuple[str, ...] = ()
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 20
    guidance_scale: float = 7.5

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ValueError(f"prompt: expected some words, got {self.prompt!r}")
        object.__setattr__(self, "phrases", tuple(self.phrases or ()))
        object.__setattr__(self, "seed", _whole("seed", self.seed, 0, _MOST_EXACT))
        object.__setattr__(self, "steps", _whole("steps", self.steps, 1, 1000))
        if not _is_number(self.guidance_scale) or not 0 <= self.guidance_scale <= 100:
            raise ValueError(f"guidance scale: expected a number in [0, 100], got {self.guidance_scale!r}")


@dataclass(frozen=True)
class Controls:
    """A technique is off where its control says "off", or 0; `Program`, `ClipGate`, `Correction` and `apply` say what
    the others mean. heads: JSON of {layer: indices}, "" for all. ratio, threshold, sigma: dropout, NMS, smoothing."""

    gate: str = "off"
    gate_threshold: float = 0.2
    gate_strength: float = 2.0
    gate_every: int = 3
    fuse: str = "off"
    heads: str = ""
    inactive_heads: str = "plain"
    layers: tuple[str, ...] = ()
    ratio: float = 0.0
    dropout_axis: str = "token"
    dropout_mode: str = "topk"
    threshold: float = 0.0
    sigma: float = 0.0
    rounds: int = 1
    refine_axis: str = "token"
    renormalize: str = "content"
    recipe: str = "off"
    correct: str = "off"
    gradient_strength: float = 0.05
    reweight_strength: float = 1.0
    structure: bool = False
    backend: str = "auto"

    def program(self) -> Program:
        """Raises: ValueError, TypeError, naming the field."""
        dropout = SalienceDropout(self.ratio, self.dropout_axis, self.dropout_mode) if self.ratio else None
        refine = None
        if self.threshold or self.sigma:
            rounds = _whole("rounds", self.rounds, 1, 64)
            refine = Refinement(rounds, self.threshold or None, self.sigma, self.refine_axis)
        return Program(dropout, refine, self.renormalize)

    def file(self, request: DrawRequest) -> ProgramFile:
        """What `generate --program` and `apply` load: the program, its layers and heads. Raises: as `program`."""
        wanted = f'heads: expected JSON such as {{"up_blocks.*": [0, 2]}}, got {self.heads!r:.80}'
        heads = parse_json(self.heads, wanted) if self.heads.strip() else None
        return ProgramFile(
            self.program(), tuple(self.layers) or None, heads, self.inactive_heads, float(request.guidance_scale),
            request.steps,
        )  # fmt: skip

    def needs_phrases(self) -> bool:
        return any(x != "off" for x in (self.gate, self.fuse, self.recipe, self.correct)) or self.structure

    def condition(self, request: DrawRequest) -> Condition:
        """All of it, to be entered around a pipeline. Raises: ValueError, TypeError, naming the control."""
        file = self.file(request)
        keywords: dict[str, Any] = {"layers": file.layers, "heads": file.heads, "inactive_heads": file.inactive_heads}
        return Condition(
            "patched",
            "page",
            program=file.program,
            patch={**keywords, **self._recipe(request), "backend": self.backend, "seed": request.seed},
            gate=self._gate() if self.gate != "off" else None,
            correct=self._correct() if self.correct != "off" else None,
            fuse=None if self.fuse == "off" else self.fuse,
            structure=bool(self.structure),
        )

    def _gate(self) -> Mapping[str, Any]:
        every = _whole("look every", self.gate_every, 1, 1000)
        shared = {"how": self.gate, "threshold": self.gate_threshold, "every": every}
        return {**shared, "strength": self.gate_strength} if self.gate == "amplify" else shared

    def _recipe(self, request: DrawRequest) -> Mapping[str, Any]:
        if self.recipe == "off" or not request.phrases:
            return {}
        return {"recipe": replace(Recipe.named(self.recipe), objects=request.phrases)}

    def _correct(self) -> Mapping[str, Any]:
        strength = self.gradient_strength if self.correct == "gradient" else self.reweight_strength
        return {"how": self.correct, "strength": strength}


def chosen_phrases(prompt: str, tokenizer: Any, chosen: Sequence[str] | None = None) -> list[NounPhrase]:
    """The noun phrases that techniques work on: those chosen, by their texts; None: all that the grammar finds but for
    backgrounds, which are no objects. Raises: ValueError for a text that the prompt does not have."""
    phrases = find_phrases(prompt, tokenizer)
    if chosen is None:
        return [p for p in phrases if p.head.text.lower() != _NO_OBJECT]
    known = {p.text for p in phrases}
    return [p for p in phrases if p.text in chosen] + find_phrases(
        prompt, tokenizer, phrases=[text for text in chosen if text not in known]
    )


def loaded_from(path: Path, controls: Controls) -> tuple[Controls, dict[str, Any]]:
    """The controls with what a file says, of a program or of a choice of heads, and the fields of `DrawRequest` that it
    says.

    Raises: ValueError, TypeError, naming the file and the field; OSError.
    """
    try:
        try:
            read_json(path, "sdattn-fast heads")
        except ValueError:
            file = ProgramFile.load(path)
        else:
            return replace(controls, heads=_json(load_heads(path)[0])), {}
    except (ValueError, TypeError) as error:
        # The browser's file lies in a folder that means nothing to who chose it.
        raise type(error)(str(error).replace(str(path), path.name)) from None
    sampling = {"steps": file.num_inference_steps, "guidance_scale": file.guidance_scale}
    return _of_file(file, controls), {name: value for name, value in sampling.items() if value is not None}


def _of_file(file: ProgramFile, controls: Controls) -> Controls:
    dropout, refine = file.program.dropout, file.program.refine
    loaded = replace(
        controls, layers=file.layers or (), heads="" if file.heads is None else _json(file.heads),
        inactive_heads=file.inactive_heads, ratio=0.0, threshold=0.0, sigma=0.0, rounds=1,
        renormalize=file.program.renormalize,
    )  # fmt: skip
    if dropout is not None:
        loaded = replace(loaded, ratio=dropout.ratio, dropout_axis=dropout.axis, dropout_mode=dropout.mode)
    if refine is not None:
        loaded = replace(
            loaded, threshold=refine.threshold or 0.0, sigma=refine.sigma, rounds=refine.steps, refine_axis=refine.axis
        )
    return loaded


def _whole(name: str, value: Any, least: int, most: int) -> int:
    """A browser's number as an int: its fields give None where they are empty, and floats."""
    if not _is_number(value) or not least <= value <= most or value != int(value):
        raise ValueError(f"{name}: expected a whole number in [{least}, {most}], got {value!r}")
    return int(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _json(heads: Mapping[str, Sequence[int]]) -> str:
    return json.dumps({name: list(indices) for name, indices in heads.items()})
