"""Correct a picture while it is drawn: after a step, move the latents, or the attention, towards a higher score.

Three ways, each with one more forward and backward of the prompts' half at the next timestep:

- "gradient": latents + strength * g, with g the score's gradient, as Attend-and-Excite's step; by default scaled to a
  root mean square of 1 a picture, so that one strength fits models of any size.
- "reweight": from the next step to the next correction the tokens' attention in the layers asked is multiplied by
  1 - strength + strength * r / mean(r), r their relevance (`gradcam`), and every row sums to 1 again: a bias of the
  logits.
- "scale": latents * (1 + sigmoid(g)), g the gradient's mean over channels, as first proposed. A gradient near zero
  makes that a factor of 1.5, whatever the score; it is here to be compared with.

Source: Chefer et al. 2023, "Attend-and-Excite", algorithm 1; gradcam.py beside this.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..patching.forwards import Forward, entries_of
from ..patching.layers import select_layers
from ..patching.patch import Patch
from ..program import finite_number
from .phrases import NounPhrase
from .relevance import Loss, check_gradients_may_be, gradcam, run

__all__ = ["Correction", "steps_of"]

HOW = ("gradient", "reweight", "scale")


class Correction:
    """A correction during sampling: a ``callback_on_step_end`` that moves the picture towards a higher score.

    After each chosen step it runs one more forward and backward pass of the prompts at the next timestep, and changes
    the latents, or the attention of the next step. As a context manager it ends with `remove`.

    Args:
        patch: A patch of a pipeline; `Presence` needs one with `capture`.
        score: Takes a `Seen` and returns the scalar tensor that is to grow. If it says ``needs_prediction = False``, as
            `Presence`, `Segregation` and `Binding` do, the UNet may stop after the last captured layer.
        how: "gradient" adds ``strength * g`` to the latents, g the score's gradient with a root mean square of 1.
            "reweight" multiplies the tokens' attention in the next `every` steps by ``1 - strength + strength * r /
            mean(r)``, r their relevance by `gradcam`, and normalizes the rows again. "scale" multiplies the latents by
            ``1 + sigmoid(g)``, as first proposed; it draws noise and is for comparison only (docs/gradcam.md).
        steps: (first, end): steps after which the correction acts, end excluded. Where the scheduler's next step does
            not read the latents, as every other one of second order, it acts a step later.
        every: Of these steps it takes every n-th: first, first + n, and so on.
        strength: For "gradient" the root mean square of the change, >= 0; for "reweight" in [0, 1]. On our objects
            pipeline, which neglects objects, 0.02 after each of the first ten of twenty steps drew 0.076 more of those
            asked for (docs/evaluation.md); for fewer corrections, see the recipes.
        normalize: For "gradient", whether g has a root mean square of 1. False: g is the gradient of each picture's
            score as it is, so that `strength` is the step size of Attend-and-Excite and SynGen, 20 for Stable
            Diffusion. The score must have `by_picture`, as `Presence` and `Binding` have.
        targets: For "gradient", {step: score}: after these steps the change is repeated until each picture's score
            reaches the number, as Attend-and-Excite's iterative refinement. The score must have `by_picture`, as
            `Presence` and `Binding` have. None: one change after each step.
        repeats: The most changes after a step with a target.
        tokens: For "reweight", indices of tokens, or what `find_phrases` gives, whose nouns count; or a list of either
            for each picture. None: all tokens.
        layers: For "reweight", as in `gradcam`. Else which of the captured layers' maps the score sees, as names or
            fnmatch patterns; where it needs no prediction, the UNet stops after the last of them. None: all.
        heads: For "reweight", as in `gradcam`.

    Warns:
        UserWarning: After the last correction of a picture, if a change was not finite, as where float16 overflows; the
            picture was then left as it was.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.

    Examples:
        >>> presence = Presence([(3,), (8,)])  # the tokens of two objects
        >>> with sdattn_fast.apply(pipe, capture=Capture()) as patch:
        ...     with Correction(patch, presence, targets={0: 0.05, 10: 0.5, 20: 0.8}) as correct:
        ...         image = pipe(prompt, callback_on_step_end=correct).images[0]

    Source: Attend-and-Excite, Chefer et al. 2023, algorithm 1, arXiv 2301.13826.
    """

    def __init__(
        self,
        patch: Patch,
        score: Loss,
        *,
        how: str = "gradient",
        steps: tuple[int, int] = (0, 25),
        every: int = 1,
        strength: float = 0.05,
        normalize: bool = True,
        targets: Mapping[int, float] | None = None,
        repeats: int = 20,
        tokens: Sequence[int] | Sequence[Sequence[int]] | None = None,
        layers: str | Sequence[str] | None = None,
        heads: Any = None,
    ) -> None:
        if not isinstance(patch, Patch) or patch.pipe is None:
            raise TypeError(f"patch: expected sdattn_fast.apply(pipe, ...) of a pipeline, got {patch!r}")
        if not callable(score):
            raise TypeError(f"score: expected a callable, got {type(score).__name__}")
        if how not in HOW:
            raise ValueError(f"how: expected one of {HOW}, got {how!r}")
        if (
            not isinstance(steps, tuple)
            or len(steps) != 2
            or any(isinstance(s, bool) or not isinstance(s, int) for s in steps)
        ):
            raise TypeError(f"steps: expected (first, end), two ints, got {steps!r}")
        if not 0 <= steps[0] < steps[1]:
            raise ValueError(f"steps: expected 0 <= first < end, got {steps!r}")
        most = 1.0 if how == "reweight" else float("inf")
        if not 0.0 <= finite_number("strength", strength) <= most:
            raise ValueError(f"strength: expected a number in [0, {most:g}], got {strength!r}")
        for name, count in (("every", every), ("repeats", repeats)):
            if isinstance(count, bool) or not isinstance(count, int):
                raise TypeError(f"{name}: expected an int, got {type(count).__name__}")
            if count < 1:
                raise ValueError(f"{name}: expected at least 1, got {count}")
        self.targets = {} if targets is None else _checked_targets(targets, steps, every, how)
        if not isinstance(normalize, bool):
            raise TypeError(f"normalize: expected a bool, got {type(normalize).__name__}")
        if not normalize and how != "gradient":
            raise ValueError(f"normalize: False goes with how='gradient', got {how!r}")
        if (self.targets or not normalize) and not callable(getattr(score, "by_picture", None)):
            what = "targets need" if self.targets else "normalize=False needs"
            raise TypeError(f"score: {what} a score with by_picture, and {type(score).__name__} has none")
        self.repeats, self.every, self.normalize = repeats, every, normalize
        self._not_finite: list[Tensor] = []  # of each change, whether it was; read once a picture
        self._postponed: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # call -> its step
        self.patch, self.score, self.how, self.steps, self.strength = patch, score, how, steps, float(strength)
        self.tokens, self.layers, self.heads = tokens, layers, heads
        if patch.unet is None:
            raise ValueError(f"patch: expected one with cross-attention layers, got {patch!r}")
        select_layers(layers, [layer.name for layer in patch.unet_layers])
        self._stop = patch.keep_forwards()

    # As diffusers' MultiPipelineCallbacks asks.
    tensor_inputs = ("latents",)

    def __call__(self, pipe: Any, step: int, timestep: Any, kept: dict[str, Any]) -> dict[str, Any]:
        """Called by diffusers at the end of each step, with its arguments.

        Args:
            pipe: The pipeline.
            step: Index of the step.
            timestep: Its timestep.
            kept: The pipeline's tensors by name, with "latents".

        Returns:
            `kept`, with the corrected latents.

        Raises:
            RuntimeError: Inside torch.inference_mode, which forbids gradients.
            ValueError: If the prompts of the step are not known, or `layers` are of those captured none.
        """
        check_gradients_may_be("Correction")
        following = _next_timestep(pipe, step, timestep)
        if following is None or step < self.steps[0] or (step - self.steps[0]) % self.every == 0:
            self._unbiased()
        due = self._due(step, pipe.scheduler)
        if due is None or following is None:
            return kept
        latents: Tensor = kept["latents"]
        if self.how == "reweight":
            self._reweight(latents, *self._next_inputs(pipe, latents, following))
            return kept
        if self.how == "scale":
            gradient = self._gradient(pipe, latents, following)
            assert gradient is not None
            return {**kept, "latents": latents * (1 + torch.sigmoid(gradient.mean(1, keepdim=True)))}
        target = self.targets.get(due)
        for _ in range(1 if target is None else self.repeats):
            gradient = self._gradient(pipe, latents, following, target)
            if gradient is None:
                break
            latents = latents + self._change(gradient)
        if due + self.every >= min(self.steps[1], steps_of(pipe) - 1):
            self._warn_of_not_finite()
        return {**kept, "latents": latents}

    def remove(self) -> None:
        """Remove the changes to attention, and stop watching the UNet."""
        self._stop()
        self._unbiased()

    def __enter__(self) -> Correction:
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()

    def _due(self, step: int, scheduler: Any) -> int | None:
        """The step whose correction is to be made now. A scheduler that does not read the latents of this step would
        throw it away: it waits for the next one."""
        first, end = self.steps
        call = self.patch.current_call
        if first <= step < end and (step - first) % self.every == 0:
            self._postponed[call] = step
        if self.how != "reweight" and not _reads_latents(scheduler):
            return None
        return self._postponed.pop(call, None)

    def _change(self, gradient: Tensor) -> Tensor:
        """What is added to the latents: nothing to a picture for which it is not finite."""
        change = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        if self.normalize:
            change = change / change.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=1e-12)
        change = (self.strength * change).to(gradient.dtype)
        finite = change.isfinite().all(1).all(1).all(1)[:, None, None, None]
        self._not_finite.append(~finite.all())
        return torch.where(finite, change, 0)

    def _warn_of_not_finite(self) -> None:
        lost, self._not_finite = self._not_finite, []
        if lost and bool(torch.stack(lost).any()):
            warnings.warn(
                "sdattn_fast: a correction was not finite, and the picture was left as it was at that step; where a "
                "model overflows in float16, run it in bfloat16 or float32; or lower the strength",
                UserWarning,
                stacklevel=3,
            )

    def _gradient(self, pipe: Any, latents: Tensor, timestep: Tensor, target: float | None = None) -> Tensor | None:
        """The score's gradient, like the latents: zeros for pictures that have reached the target; None: all have."""
        inputs, _ = self._next_inputs(pipe, latents, timestep)
        with torch.enable_grad():
            x = inputs.pop("sample").detach().requires_grad_()
            t, text = inputs.pop("timestep"), inputs.pop("encoder_hidden_states")
            maps_alone = not getattr(self.score, "needs_prediction", True)
            seen = run(self.patch, x, t, text, maps_alone=maps_alone, maps_of=self.layers, **inputs)
            by_picture = bool(self.targets) or not self.normalize
            scores = self.score.by_picture(seen) if by_picture else self.score(seen)  # type: ignore[attr-defined]
            if not isinstance(scores, Tensor):
                raise TypeError(f"score: expected one that gives a tensor, got {type(scores).__name__}")
            short = None if target is None else ~(scores >= target)  # NaN, too
            if short is not None and not short.any():
                return None
            (gradient,) = torch.autograd.grad(scores.sum(), x)
        # Of the latents: an inpainting model has further channels, and a scheduler's scaling cancels in the direction.
        gradient = gradient[:, : latents.shape[1]].to(latents.dtype)
        return gradient if short is None else torch.where(short[:, None, None, None], gradient, 0)

    def _reweight(self, latents: Tensor, inputs: dict[str, Any], entries: list[int]) -> None:
        x, t, text = (inputs.pop(name) for name in ("sample", "timestep", "encoder_hidden_states"))
        of_entries, asked = _by_entry(self.tokens, len(latents))
        with self.patch.aside():
            maps = gradcam(
                self.patch, x, t, text, self.score, tokens=asked, layers=self.layers, heads=self.heads, **inputs
            )
            grids = {layer.name: layer.grid for layer in self.patch.unet_layers}
        theirs = torch.ones(len(latents), len(maps.tokens), 1, dtype=torch.bool, device=latents.device)
        for mine, wanted in zip(theirs, of_entries, strict=False):
            mine[:, 0] = torch.tensor([token in wanted for token in maps.tokens])
        relevance = maps.upsample((latents.shape[2], latents.shape[3])).clamp(min=0)  # bicubic undershoots
        biases = {}
        for name, grid in grids.items():
            if name not in maps or grid is None or len(grid) == 3:
                continue
            r = F.adaptive_avg_pool2d(relevance, grid).flatten(2)  # (B, T, M)
            mean = r.mean(2, keepdim=True)
            weight = torch.where(
                theirs & (mean > 0), 1 - self.strength + self.strength * r / mean.clamp(min=1e-30), 1.0
            )
            of_prompts = torch.zeros(len(latents), r.shape[2], text.shape[1], device=r.device)
            of_prompts[:, :, list(maps.tokens)] = weight.clamp(min=1e-4).log().transpose(1, 2)
            biases[name] = of_prompts[:, None]
        self.patch.current_call.biases[self] = biases

    def _unbiased(self) -> None:
        self.patch.current_call.biases.pop(self, None)

    def _asked(self) -> Forward:
        """The step's forward that asked the prompts."""
        forwards = self.patch.current_call.forwards
        asked = next((one for one in forwards if one.prompts), None)
        if asked is None:
            raise ValueError(
                "patch: expected a callback of the pipeline that was patched, whose UNet has run with prompts that are "
                "known; pass active= and protected= to sdattn_fast.apply where they are not"
            )
        return asked

    def _next_inputs(self, pipe: Any, latents: Tensor, timestep: Tensor) -> tuple[dict[str, Any], list[int]]:
        """The UNet's inputs for the prompts at the next timestep, and which entries of its batch those are."""
        asked = self._asked()
        batch, entries = len(asked.prediction), asked.prompts
        if len(entries) != len(latents):
            raise ValueError(
                f"patch: expected a picture for each of {len(latents)} latents of {type(pipe).__name__}, got "
                f"{len(entries)} in the UNet's batch of {batch}"
            )
        inputs: dict[str, Any] = entries_of(asked.inputs, batch, entries)
        inputs.pop("return_dict", None)
        scaled = pipe.scheduler.scale_model_input(latents, timestep)
        inputs["sample"] = torch.cat([scaled, inputs["sample"][:, latents.shape[1] :]], 1)
        inputs["timestep"] = timestep
        return inputs, entries


def _checked_targets(targets: Any, steps: tuple[int, int], every: int, how: str) -> dict[int, float]:
    if not isinstance(targets, Mapping):
        raise TypeError(f"targets: expected {{step: score}}, got {type(targets).__name__}")
    if how != "gradient":
        raise ValueError(f"targets: expected how='gradient', got {how!r}")
    for step, target in targets.items():
        if isinstance(step, bool) or not isinstance(step, int) or not steps[0] <= step < steps[1]:
            raise ValueError(f"targets: expected steps from {steps[0]} to {steps[1] - 1}, got {step!r}")
        if (step - steps[0]) % every:
            raise ValueError(f"targets: expected every {every}-th step from {steps[0]} on, got {step}")
        finite_number(f"targets: of step {step}", target)
    return {step: float(target) for step, target in targets.items()}


def _next_timestep(pipe: Any, step: int, timestep: Any) -> Tensor | None:
    """After a step of a call; None where none follows. A call may begin and end inside the scheduler's timesteps, as
    image-to-image and SDXL's base model do."""
    times: Tensor = pipe.scheduler.timesteps
    if step + 1 >= steps_of(pipe):
        return None
    if isinstance(timestep, Tensor) and timestep.untyped_storage().data_ptr() == times.untyped_storage().data_ptr():
        place = timestep.storage_offset() - times.storage_offset()
    else:
        place = int((times == timestep).nonzero()[-1])
    return times[place + 1] if place + 1 < len(times) else None


def _reads_latents(scheduler: Any) -> bool:
    """Whether the scheduler's next step starts from the latents that it is given, and not from some of its own: those
    of second order do in every other step, PNDM not in its second, nor inside its Runge-Kutta steps."""
    if not getattr(scheduler, "state_in_first_order", True):
        return False
    runge_kutta = getattr(scheduler, "prk_timesteps", None)
    if runge_kutta is None:
        return True
    if scheduler.config.skip_prk_steps:
        return bool(scheduler.counter != 1)
    return bool(scheduler.counter >= len(runge_kutta) or scheduler.counter % 4 == 0)


def steps_of(pipe: Any) -> int:
    """How many steps the pipeline's call has; known after the first one."""
    return int(getattr(pipe, "num_timesteps", len(pipe.scheduler.timesteps)))


def _by_entry(tokens: Any, entries: int) -> tuple[list[Sequence[int]], Sequence[int] | None]:
    """The tokens of each entry (none: the same for all), and all of them together."""
    if tokens is not None:
        of_one = any(isinstance(token, (int, NounPhrase)) for token in tokens)
        tokens = _indices(tokens) if of_one else [_indices(some) for some in tokens]
    if tokens is None or all(isinstance(token, int) for token in tokens):
        return [], tokens
    if len(tokens) != entries:
        raise ValueError(f"tokens: expected a list of them for each of {entries} entries, got {len(tokens)}")
    return list(tokens), sorted({token for some in tokens for token in some})


def _indices(tokens: Sequence[Any]) -> list[int]:
    """The tokens, a phrase's noun's in place of a phrase."""
    return [i for token in tokens for i in (token.tokens("noun") if isinstance(token, NounPhrase) else (token,))]
