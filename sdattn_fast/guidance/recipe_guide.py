"""A recipe at work: of each call of the pipeline it finds the objects, and corrects the picture between steps."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import re
import textwrap
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..patching.call import draws_in_windows
from ..patching.layers import select_layers
from ..patching.model_kinds import denoisers
from ..patching.patch import Patch
from ..patching.step_callback import StepCallback
from ..patching.text_tokens import text_tokens
from ..patching.watched_pipeline import encode_function
from ..patching.words import tokenizer_of
from .binding import Binding, BindingPair, syntactic_pairs
from .correction import Correction, steps_of
from .objectives import Presence
from .phrases import NounPhrase, find_phrases
from .recipe import Recipe
from .relevance import check_gradients_may_be
from .segregation import Segregation
from .token_maps import TokenScore, WeightedScore

__all__ = ["RecipeGuide", "check_pipeline", "objects_of"]

# Nouns that name the picture, its quality or a part of it that is no object, in the singular.
_OF_THE_PICTURE = frozenset(
    """art artstation artwork background bokeh close-up closeup composition depth detail drawing foreground front hdr
    illustration image landscape lighting masterpiece painting photo photograph photography picture portrait quality
    render rendering resolution scene shot sketch style texture view wallpaper""".split()
)


def check_pipeline(pipe: Any) -> None:
    """Whether a recipe can act on a pipeline at all.

    Raises:
        TypeError: If it is not a pipeline.
        ValueError: If it has no UNet, tokenizer or `encode_prompt`, does not call back after its steps, draws videos or
            in windows, or perturbs attention.
        ImportError: If TextBlob or NLTK is missing.
    """
    kind = type(pipe).__name__
    if not hasattr(pipe, "unet") and denoisers(pipe):
        raise ValueError(f"recipe: its corrections serve pipelines with a UNet; got {kind}, which has a transformer")
    if not hasattr(pipe, "unet"):
        raise TypeError(f"recipe: expected a pipeline, whose prompts it reads, got {kind}")
    if tokenizer_of(pipe) is None:
        raise ValueError(f"recipe: expected a pipeline with a tokenizer, to find the tokens of words; {kind} has none")
    if encode_function(pipe) is None:
        raise ValueError(f"recipe: expected a pipeline with encode_prompt, to know prompts by; {kind} has none")
    parameters = inspect.signature(type(pipe).__call__).parameters
    if "callback_on_step_end" not in parameters:
        raise ValueError(f"recipe: expected a pipeline that takes callback_on_step_end; {kind} does not")
    if "num_frames" in parameters:
        raise ValueError(f"recipe: expected a pipeline of pictures; {kind} draws videos")
    if draws_in_windows(pipe):
        raise ValueError(f"recipe: expected a pipeline that draws a picture whole; {kind} draws it in windows")
    if "pag_scale" in parameters:
        raise ValueError(f"recipe: expected a pipeline with attention of its own; {kind} perturbs it (PAG)")
    find_phrases("", tokenizer_of(pipe))


def objects_of(phrases: Sequence[NounPhrase]) -> list[NounPhrase]:
    """Of the noun phrases of a prompt, those that name objects, and not the picture itself."""

    def names_an_object(noun: str) -> bool:
        of_the_picture = noun in _OF_THE_PICTURE or noun.removesuffix("s") in _OF_THE_PICTURE
        return not of_the_picture and not any(c.isdigit() for c in noun)  # 8k

    return [phrase for phrase in phrases if names_an_object(phrase.head.text.lower())]


class RecipeGuide:
    """What a patch asks before each call of its pipeline. Calls of several threads have nothing in common."""

    def __init__(self, patch: Patch, recipe: Recipe) -> None:
        select_layers(recipe.layers, [layer.name for layer in patch.unet_layers], "Recipe.layers")
        self.patch, self.recipe = patch, recipe
        self._stop = patch.keep_forwards()
        self._tokenizers = _Tokenizers()

    def begin(self, pipe: Any, arguments: Mapping[str, Any]) -> StepCallback | None:
        """The callback of a call with these arguments; None where there is nothing to correct.

        Raises: RuntimeError inside torch.inference_mode, before a step is drawn.
        """
        check_gradients_may_be("recipe")
        left_out = self.patch.current_call.left_out
        left_out.clear()  # of an earlier picture of the same `Patch.call`
        score = self._score(pipe, arguments, left_out)
        for reason in left_out:
            warnings.warn(f"sdattn_fast: the recipe left out {reason}", UserWarning, stacklevel=4)
        return None if score is None else _Correcting(self.patch, self.recipe, score)

    def check(self, pipe: Any) -> None:
        """Raises: as `check_pipeline`, for another pipeline that is to be watched."""
        check_pipeline(pipe)

    def remove(self) -> None:
        """Stop watching the UNet."""
        self._stop()

    def _score(self, pipe: Any, arguments: Mapping[str, Any], left_out: list[str]) -> TokenScore | None:
        prompt = arguments.get("prompt")
        if arguments.get("prompt_embeds") is not None:
            left_out.append("all corrections: the call has prompt_embeds, and no prompt to find words in")
            return None
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, (list, tuple)) or not all(isinstance(one, str) for one in prompts):
            return None  # the pipeline says what it expects
        images = arguments.get("num_images_per_prompt") or 1
        with self._tokenizers.of(pipe) as tokenizer:
            words = [self._words(tokenizer, one, left_out) for one in prompts]
        of_pictures = [one for one in words for _ in range(images)]
        objects = [one.objects for one in of_pictures]
        weighted: list[tuple[float, TokenScore]] = []
        if self.recipe.presence and any(objects):
            weighted.append((self.recipe.presence, Presence(objects, sharpness=self.recipe.sharpness)))
        if self.recipe.segregation and any(len(some) > 1 for some in objects):
            weighted.append((self.recipe.segregation, Segregation(objects)))
        if self.recipe.binding and any(one.pairs for one in words):
            weighted.append((self.recipe.binding, Binding([one.pairs for one in of_pictures])))
        return WeightedScore(weighted) if weighted else None

    def _words(self, tokenizer: Any, prompt: str, left_out: list[str]) -> _Words:
        wanted = self.recipe.objects
        phrases = find_phrases(prompt, tokenizer)
        if wanted is None:
            objects = objects_of(phrases)
        else:
            objects = _named(prompt, wanted, tokenizer)
        pairs = syntactic_pairs(tokenizer, prompt, phrases) if self.recipe.binding else []
        cut = _cut_off(prompt, tokenizer)
        if cut:
            left_out.append(f"{cut!r}, for which the text encoder has no room")
        if self.recipe.presence and not objects:
            none = "it has no noun that names an object" if wanted is None else f"it has none of {list(wanted)}"
            left_out.append(f"presence in {prompt!r}: {none}")
        if self.recipe.segregation and len(objects) < 2:
            left_out.append(f"segregation in {prompt!r}: it has fewer than two nouns that name an object")
        if self.recipe.binding and not pairs:
            left_out.append(f"binding in {prompt!r}: no noun of it has a modifier")
        return _Words([phrase.tokens("noun") for phrase in objects], pairs)


class _Tokenizers:
    """A copy of a pipeline's tokenizer, for one thread at a time. transformers' fast tokenizers keep padding and
    truncation of the latest call inside, so words that are looked up in one thread would spoil another's prompt."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By the original: its length when it was copied, and the copy.
        self._copies: weakref.WeakKeyDictionary[Any, tuple[int, Any]] = weakref.WeakKeyDictionary()

    @contextlib.contextmanager
    def of(self, pipe: Any) -> Iterator[Any]:
        original = tokenizer_of(pipe)
        with self._lock:
            length, own = self._copies.get(original, (0, None))
            if length != len(original):  # or a textual inversion was loaded
                own = copy.deepcopy(original)
                self._copies[original] = len(original), own
            yield own


@dataclass(frozen=True)
class _Words:
    """Of a prompt: the tokens of each object's noun, and the modifiers with their nouns."""

    objects: list[tuple[int, ...]]
    pairs: list[BindingPair]


class _Correcting:
    """The callback of one call. How many steps it has is known after the first one."""

    def __init__(self, patch: Patch, recipe: Recipe, score: TokenScore) -> None:
        self.patch, self.recipe, self.score = patch, recipe, score
        self._correction: Correction | None = None

    def __call__(self, pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if not self.patch.installed:  # a callback of the user's removed it
            return values
        if step == 0:
            self._correction = self._for_steps(steps_of(pipe))
        return values if self._correction is None else self._correction(pipe, step, timestep, values)

    def _for_steps(self, count: int) -> Correction | None:
        recipe = self.recipe
        # A correction after a step is one before the next: the first step is not corrected.
        end = max(1, round(recipe.until * count) - 1)
        if count < 2:
            reason = "all corrections: there is one step, and a recipe acts between steps"
            self.patch.current_call.left_out.append(reason)
            warnings.warn(f"sdattn_fast: the recipe left out {reason}", UserWarning, stacklevel=4)
            return None
        every = 1 if recipe.corrections is None else math.ceil(end / recipe.corrections)
        taken = range(0, end, every)
        targets = {
            min(taken, key=lambda step: abs(step + 1 - share * count)): score
            for share, score in dict(recipe.targets).items()
            if share * count >= 0.5  # the others' step is the first
        }
        correction = Correction(
            self.patch, self.score, steps=(0, end), every=every, strength=recipe.strength,
            normalize=recipe.normalize, targets=targets, repeats=recipe.repeats, layers=recipe.layers,
        )  # fmt: skip
        correction.remove()  # the guide watches the UNet for all of them
        return correction


def _named(prompt: str, wanted: Sequence[str], tokenizer: Any) -> list[NounPhrase]:
    """Those of the phrases that the prompt has; one that is named twice is a second one of its kind."""
    there: list[str] = []
    found: list[NounPhrase] = []
    for phrase in wanted:
        with contextlib.suppress(ValueError):
            found = find_phrases(prompt, tokenizer, phrases=[*there, phrase])
            there.append(phrase)
    return found


def _cut_off(prompt: str, tokenizer: Any) -> str:
    """The first of the words at the end of a prompt of which the text encoder sees nothing."""
    rest = prompt[max((token.end for token in text_tokens(tokenizer, prompt)), default=0) :].strip()
    return textwrap.shorten(rest, 100, placeholder="...") if re.search(r"\w", rest) else ""
