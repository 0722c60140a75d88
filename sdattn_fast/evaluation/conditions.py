"""What the evaluation compares: stock, each of the nine techniques alone, pairs, the tuned whole, sketches, recipes,
peers and alternatives to the recipes.

A condition puts something in place around a pipeline and says which callback goes with it. Everything else (prompts,
noise, steps, guidance) is the same for all. The sketches are the formulas as they were first proposed, where ours
differ: they are here to be compared with, and nowhere else. Peers are methods of others, and draw by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..api import apply
from ..files import ProgramFile
from ..guidance.clip_gate import ClipGate
from ..guidance.clip_score import ClipScorer
from ..guidance.correction import Correction
from ..guidance.objectives import Presence
from ..guidance.phrases import NounPhrase, phrase_ids
from ..guidance.recipe import RECIPES, Recipe
from ..guidance.segregation import Segregation
from ..guidance.structure import Structure
from ..guidance.token_maps import TokenScore, WeightedScore
from ..patching.patch import Patch
from ..program import Capture, Program, Refinement, SalienceDropout
from .alternatives import AttentionBias, Concentration, LearnedPresence
from .peers import Peer, peers
from .sketches import RandomMasks

__all__ = [
    "CONTROL",
    "NOT_TECHNIQUES",
    "Callbacks",
    "Condition",
    "ConditionInputs",
    "acting_steps",
    "apply_condition",
    "conditions",
    "recipe_condition",
]

STOCK = "stock"
CONTROL = "control"
# What else `Condition.technique` says.
NOT_TECHNIQUES = frozenset({STOCK, CONTROL, "pair", "sketch", "recipe", "peer", "alternative"})


@dataclass(frozen=True)
class ConditionInputs:
    """What conditions draw on beside the pipeline.

    phrases: each prompt's noun phrases; objects: those of them that are things to be drawn. words: of each prompt, the
    objects' words, as `Maps.per_word` names them. heads: {layer: indices}, of `sdattn-fast heads`. tuned: of
    `sdattn-fast tune`. threshold: of the CLIP gate, calibrated. network: a `PresenceNetwork`. None: not known, and
    what needs it is left out.
    """

    prompts: Sequence[str]
    phrases: Sequence[Sequence[NounPhrase]]
    objects: Sequence[Sequence[NounPhrase]]
    words: Sequence[Sequence[str]]
    steps: int
    scorer: ClipScorer | None = None
    threshold: float | None = None
    heads: Mapping[str, Sequence[int]] | None = None
    tuned: ProgramFile | None = None
    network: torch.nn.Module | None = None


@dataclass(frozen=True)
class Condition:
    """name: as the report calls it. technique: which of the nine, or of `NOT_TECHNIQUES`.
    needs: fields of `ConditionInputs` that it cannot do without. program, patch: keywords of `apply`. gate, correct: of
    `ClipGate` and `Correction`. score: {"presence", "segregation", "concentration" or "learned": weight}, what
    corrections raise. bias: of `AttentionBias`. fuse: of `phrase_ids`. structure: with `Structure`. tuned: the program,
    guidance scale and number of steps are those of `ConditionInputs.tuned`; "options": the last two alone. sketch:
    "masks" on logits, or "unprotected". peer: what draws, in place of the pipeline; then all of the above but the names
    is unused."""

    name: str
    technique: str
    needs: tuple[str, ...] = ()
    program: Program = field(default_factory=Program)
    patch: Mapping[str, Any] = field(default_factory=dict)
    gate: Mapping[str, Any] | None = None
    correct: Mapping[str, Any] | None = None
    score: Mapping[str, float] = field(default_factory=lambda: {"presence": 1.0})
    bias: Mapping[str, Any] | None = None
    fuse: str | None = None
    structure: bool = False
    tuned: bool | Literal["options"] = False
    sketch: str | None = None
    peer: Peer | None = None

    def left_out(self, inputs: ConditionInputs, pipe: Any, guidance: float) -> str | None:
        """Why the condition cannot be drawn with this pipeline and guidance, None where it can."""
        missing = [name for name in self.needs if getattr(inputs, name) is None]
        if missing:
            return f"no {', '.join(missing)}"
        return None if self.peer is None else self.peer.left_out(pipe, guidance)


def conditions() -> list[Condition]:
    """All of them, stock first."""
    nms = Program(refine=Refinement(1), renormalize="content")
    spatial_nms = Program(refine=Refinement(1, axis="space"), renormalize="content")
    dropout = Program(SalienceDropout(0.2), renormalize="content")
    random = Program(SalienceDropout(0.2, mode="random"), renormalize="content")
    both = Program(SalienceDropout(0.2), Refinement(1), "content")
    gradient = {"how": "gradient", "strength": 0.05}
    clip = ("scorer", "threshold")
    return [
        Condition(STOCK, STOCK),
        *(
            Condition(f"gate, {mode}", "semantic gate", clip, gate={"how": mode})
            for mode in ("hard", "soft", "amplify")
        ),
        Condition("phrases, all words", "phrase fusion", fuse="all"),
        Condition("phrases, adjective and noun", "phrase fusion", fuse="adjective-noun"),
        Condition("heads, others zero", "head selection", ("heads",), patch={"inactive_heads": "zero"}),
        Condition("dropout", "salience dropout", program=dropout),
        Condition("dropout, random", "salience dropout", program=random),
        Condition("NMS and smoothing", "NMS with smoothing", program=nms),
        Condition("NMS, over the picture", "NMS with smoothing", program=spatial_nms),
        Condition("GradCAM, gradient", "GradCAM", correct=gradient),
        Condition("GradCAM, reweighted", "GradCAM", correct={"how": "reweight", "strength": 1.0}),
        Condition("structure", "structure refinement", structure=True),
        Condition("maps", "selective maps"),
        Condition("tuned", "CLIP-rewarded tuning", ("tuned",), tuned=True),
        Condition("stock, tuned guidance", CONTROL, ("tuned",), tuned="options"),
        Condition("dropout + NMS", "pair", program=both),
        Condition("dropout + NMS, chosen heads", "pair", ("heads",), program=both),
        Condition("phrases + GradCAM", "pair", fuse="adjective-noun", correct=gradient),
        Condition("phrases + NMS", "pair", fuse="adjective-noun", program=nms),
        Condition("gate, amplify + GradCAM", "pair", clip, gate={"how": "amplify"}, correct=gradient),
        Condition("GradCAM + structure", "pair", correct=gradient, structure=True),
        Condition("tuned + GradCAM", "pair", ("tuned",), tuned=True, correct=gradient),
        Condition("random masks on logits", "sketch", sketch="masks"),
        Condition("dropout + NMS, nothing protected", "sketch", program=both, sketch="unprotected"),
        Condition("latent * (1 + sigmoid)", "sketch", correct={"how": "scale"}),
        *(recipe_condition(f"recipe, {name}", name) for name in RECIPES),
        *(Condition(peer.name, "peer", peer=peer) for peer in peers()),
    ]  # fmt: skip


def recipe_condition(name: str, recipe: Recipe | str) -> Condition:
    """A recipe as `apply` takes it, to be drawn beside the others."""
    return Condition(name, "recipe", patch={"recipe": recipe})


@contextmanager
def apply_condition(condition: Condition, pipe: Any, inputs: ConditionInputs) -> Any:
    """The condition, no peer's, in place: yields (patch or None, callback or None, keywords of the pipeline's call)."""
    assert condition.peer is None, condition.name
    with ExitStack() as stack:
        if condition.sketch == "masks":
            stack.enter_context(RandomMasks(pipe.unet, 0.2))
            yield None, None, {}
            return
        patch = stack.enter_context(_patch(condition, pipe, inputs))
        callbacks = Callbacks()
        at = acting_steps(inputs.steps)
        if condition.gate is not None:
            assert inputs.scorer is not None and inputs.threshold is not None
            objects = [list(phrases) for phrases in inputs.objects]
            gate = {"steps": at["gate_steps"], "threshold": inputs.threshold, **condition.gate}
            callbacks.parts.append(
                stack.enter_context(ClipGate(patch, list(inputs.prompts), inputs.scorer, phrases=objects, **gate))
            )
        nouns = [[p.tokens("noun") for p in phrases] for phrases in inputs.objects]
        if condition.bias is not None:
            callbacks.parts.append(stack.enter_context(AttentionBias(patch, nouns, **condition.bias)))
        if condition.correct is not None:
            correction = {"steps": at["correct_steps"], **condition.correct}
            if correction["how"] == "reweight":
                correction["tokens"] = [[i for noun in of_prompt for i in noun] for of_prompt in nouns]
            callbacks.parts.append(
                stack.enter_context(Correction(patch, _score(condition, inputs, nouns), **correction))
            )
        if condition.structure:
            structure = Structure(patch, list(inputs.prompts), words=list(inputs.words), steps=at["structure_steps"])
            callbacks.parts.append(stack.enter_context(structure))
        yield patch, callbacks if callbacks.parts else None, _tuned_options(condition, inputs)


def acting_steps(steps: int) -> dict[str, tuple[int, int]]:
    """Of so many denoising steps, those between which the gate looks and a correction acts, and those after which
    structure refines."""
    half, three_quarters = steps // 2, 3 * steps // 4
    return {
        "gate_steps": (2, max(3, three_quarters)),
        "correct_steps": (0, max(1, half)),
        "structure_steps": (half, three_quarters),
    }


@dataclass(frozen=True)
class Callbacks:
    """Several ``callback_on_step_end``, one after the other."""

    parts: list[Callable[..., Any]] = field(default_factory=list)

    def __call__(self, pipe: Any, step: int, timestep: Any, callback_kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
        for callback in self.parts:
            callback_kwargs = callback(pipe, step, timestep, callback_kwargs)
        return callback_kwargs


def _score(condition: Condition, inputs: ConditionInputs, nouns: Sequence[Sequence[tuple[int, ...]]]) -> TokenScore:
    def named(name: str) -> TokenScore:
        if name == "learned":
            assert inputs.network is not None
            return LearnedPresence(nouns, inputs.network)
        return {"presence": Presence, "segregation": Segregation, "concentration": Concentration}[name](nouns)

    return WeightedScore([(weight, named(name)) for name, weight in condition.score.items()])


def _patch(condition: Condition, pipe: Any, inputs: ConditionInputs) -> Patch:
    keywords: dict[str, Any] = {"capture": Capture(), **condition.patch}
    program: Any = condition.program
    if condition.tuned is True:
        program = inputs.tuned
    if "heads" in condition.needs:
        keywords["heads"] = inputs.heads
    if condition.fuse is not None:
        keywords["phrases"] = phrase_ids([list(phrases) for phrases in inputs.phrases], fuse=condition.fuse)
    if condition.sketch == "unprotected":
        # As first written: every token, the first one too, which has most of the mass; the unconditional half also.
        batch = 2 * len(inputs.prompts)
        keywords["protected"] = torch.zeros(77, dtype=torch.bool)
        keywords["active"] = torch.ones(batch, dtype=torch.bool)
    return apply(pipe, program, **keywords)


def _tuned_options(condition: Condition, inputs: ConditionInputs) -> dict[str, Any]:
    if not condition.tuned or inputs.tuned is None:
        return {}
    options = {"guidance_scale": inputs.tuned.guidance_scale, "num_inference_steps": inputs.tuned.num_inference_steps}
    return {name: x for name, x in options.items() if x is not None}
