"""A prompt drawn twice from the same noise, stock and patched: pictures, the words' maps, time and memory.

A drawing is timed by itself, after one step of each that is not; `sdattn-fast bench` and `evaluate` are what measures.
Stock's maps take a drawing of their own, for stock attention keeps none, and so does memory on a CPU, where torch's
profiler counts it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ..evaluation.conditions import Condition, ConditionInputs, apply_condition
from ..guidance.clip_gate import ClipGate
from ..guidance.clip_score import ClipScorer
from ..guidance.phrases import head_words
from ..measure.memory import peak_mib
from ..patching.words import tokenizer_of, words_of
from .controls import Controls, DrawRequest, chosen_phrases

__all__ = ["Comparison", "draw_both"]

Tell = Callable[[float, str], None]
Detected = Callable[[np.ndarray], str]


@dataclass(frozen=True)
class Side:
    """picture: PIL. maps: word -> PIL, the picture with the word's map over it. seconds: of the whole call. mib: what
    its tensors take at the most beside the weights. seen: what a detector finds. score: CLIP's cosine of picture and
    prompt. None: not measured."""

    picture: Any
    seconds: float
    maps: Mapping[str, Any] = field(default_factory=dict)
    mib: float | None = None
    seen: str | None = None
    score: float | None = None


@dataclass(frozen=True)
class Comparison:
    """patched: None while it is under way. looked: what the CLIP gate saw, a line a look."""

    stock: Side
    patched: Side | None = None
    looked: tuple[str, ...] = ()


def draw_both(
    pipe: Any, request: DrawRequest, controls: Controls, *, scorer: ClipScorer | None = None, stock_maps: bool = True,
    memory: bool = False, detected: Detected | None = None, tell: Tell = lambda share, stage: None,
) -> Iterator[Comparison]:  # fmt: skip
    """Stock as soon as it is there, then both, then both with what was asked beside. The pipeline is as before
    whenever the iterator is closed.

    scorer: a CLIP, which the gate needs. memory: on a CPU too. detected: of a picture, what a detector finds. tell:
    share of the work done, and what is under way.

    Raises: ValueError, TypeError, naming what is wrong.
    """
    condition = controls.condition(request)
    tokenizer = tokenizer_of(pipe)
    phrases = chosen_phrases(request.prompt, tokenizer, request.phrases)
    if controls.needs_phrases() and not phrases:
        raise ValueError(
            "phrases: expected at least one for what is switched on; the grammar found none in the prompt, say yours"
        )
    if condition.gate is not None and scorer is None:
        raise ValueError("semantic gate: expected a CLIP, and none is loaded; start with --clip")
    words = head_words(phrases, words_of(tokenizer, request.prompt))
    inputs = ConditionInputs([request.prompt], [phrases], [phrases], [words], request.steps, scorer, 0.0)

    plain = Condition("stock", "page")
    count = 2 + bool(stock_maps) + 2 * (memory and not _on_cuda(pipe))
    done = 0

    def run(condition: Condition | None, stage: str, maps: bool = True) -> tuple[Side, tuple[str, ...]]:
        nonlocal done
        result = _draw(pipe, request, condition, inputs, lambda share: tell((done + share) / count, stage), maps)
        done += 1
        return result

    # In this order: what is wrong with the condition is said before anything is drawn.
    for warmed_up in (condition, None):
        _draw(
            pipe,
            replace(request, steps=min(2, request.steps)),
            warmed_up,
            inputs,
            lambda share: tell(0.0, "Warming up"),
            False,
        )
    stock = _judged(run(None, "Stock")[0], request, scorer, detected)
    yield Comparison(stock)
    patched, looked = run(condition, "Patched")
    patched = _judged(patched, request, scorer, detected)
    yield Comparison(stock, patched, looked)
    if stock_maps:
        stock = replace(stock, maps=run(plain, "Stock's maps")[0].maps)
        yield Comparison(stock, patched, looked)
    if memory and not _on_cuda(pipe):
        stock = replace(stock, mib=peak_mib(lambda: run(None, "Stock's memory", False)))
        patched = replace(patched, mib=peak_mib(lambda: run(condition, "Patched memory", False)))
        yield Comparison(stock, patched, looked)


def _draw(
    pipe: Any,
    request: DrawRequest,
    condition: Condition | None,
    inputs: ConditionInputs,
    tell: Callable[[float], None],
    maps: bool,
) -> tuple[Side, tuple[str, ...]]:
    if condition is None:
        picture, seconds, mib = _timed(pipe, request, None, tell)
        return Side(picture, seconds, {}, mib), ()
    with apply_condition(condition, pipe, inputs) as (patch, callback, _):
        picture, seconds, mib = _timed(pipe, request, callback, tell)
        overlays = patch.maps.overlay(picture, request.prompt) if maps else {}
        return Side(picture, seconds, overlays, mib), _looks(callback, inputs)


def _timed(
    pipe: Any, request: DrawRequest, callback: Any, tell: Callable[[float], None]
) -> tuple[Any, float, float | None]:
    def after(pipe: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        tell((step + 1) / request.steps)
        return callback_kwargs if callback is None else callback(pipe, step, timestep, callback_kwargs)

    drawn: dict[str, Any] = {}

    def draw() -> None:
        start = time.perf_counter()
        drawn["picture"] = pipe(
            request.prompt, negative_prompt=request.negative_prompt or None, num_inference_steps=request.steps,
            guidance_scale=request.guidance_scale, generator=torch.Generator().manual_seed(request.seed),
            callback_on_step_end=after,
        ).images[0]  # fmt: skip
        drawn["seconds"] = time.perf_counter() - start  # the picture is on the CPU: the device has nothing left to do

    mib = None
    if _on_cuda(pipe):
        mib = peak_mib(draw, "cuda")
    else:
        draw()
    return drawn["picture"], drawn["seconds"], mib


def _judged(side: Side, request: DrawRequest, scorer: ClipScorer | None, detected: Detected | None) -> Side:
    picture = np.asarray(side.picture.convert("RGB"))
    if scorer is not None:
        side = replace(side, score=float(scorer.similarity([picture], [request.prompt])[0]))
    return side if detected is None else replace(side, seen=detected(picture))


def _on_cuda(pipe: Any) -> bool:
    return torch.device(pipe.device).type == "cuda"


def _looks(callback: Any, inputs: ConditionInputs) -> tuple[str, ...]:
    gates = [part for part in getattr(callback, "parts", ()) if isinstance(part, ClipGate)]
    return tuple(
        f"after step {step + 1}: "
        + ", ".join(f"{p.text} {score:.3f}" for p, score in zip(inputs.objects[0], scores[0].tolist(), strict=True))
        for gate in gates
        for step, scores in gate.scores
    )
