"""The prediction that a pipeline steps with, made of what its UNet gave for prompts and unconditional entries.

Source: Ho and Salimans 2022, "Classifier-Free Diffusion Guidance"; diffusers' pipelines, each for its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..patching.call import draws_in_windows
from ..patching.forwards import Forward, entries_of

__all__ = ["guided_prediction"]


def guided_prediction(pipe: Any, forwards: Sequence[Forward]) -> Tensor:
    """(A, C, height, width), of the A pictures, from a step's forwards: one, or one of prompts and one without.

    Raises: ValueError where they are others, as those of a pipeline whose guidance is not known here.
    """
    if draws_in_windows(pipe):
        raise ValueError(f"pipe: expected a pipeline that draws a picture whole; {type(pipe).__name__} has windows")
    asked = [one for one in forwards if one.prompts]
    others = [one for one in forwards if not one.prompts]
    if len(asked) != 1 or len(others) > 1 or (others and asked[0].unconditional):
        raise ValueError(
            f"pipe: {type(pipe).__name__} asked its UNet {len(forwards)} times in a step, and how it puts the answers "
            "together is not known; expected one forward, or one of the prompts and one without"
        )
    conditional = _of(asked[0], asked[0].prompts)
    parts = [_of(one, one.unconditional) for one in forwards if one.unconditional]
    said: dict[str, Any] = {
        name: getattr(pipe, name, None) if x is None else x for name, x in asked[0].guidance.items()
    }
    if not said["do_classifier_free_guidance"] or not parts:
        guided = conditional
    elif len(parts[0]) == len(conditional):
        guided = parts[0] + said["guidance_scale"] * (conditional - parts[0])
    elif len(parts[0]) == 2 * len(conditional) and said["image_guidance_scale"] is not None:
        image, neither = parts[0].chunk(2)  # InstructPix2Pix
        guided = neither + said["guidance_scale"] * (conditional - image)
        guided = guided + said["image_guidance_scale"] * (image - neither)
    else:
        raise ValueError(
            f"pipe: {type(pipe).__name__} has {len(parts[0])} unconditional entries for {len(conditional)} pictures, "
            "and its guidance is not known; expected as many"
        )
    if asked[0].perturbed:
        scale = pipe._get_pag_scale(torch.as_tensor(asked[0].inputs["timestep"]))
        guided = guided + scale * (conditional - _of(asked[0], asked[0].perturbed))
    if said["guidance_rescale"] and said["do_classifier_free_guidance"]:
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

        guided = rescale_noise_cfg(guided, conditional, guidance_rescale=said["guidance_rescale"])
    return guided


def _of(forward: Forward, entries: Sequence[int]) -> Tensor:
    found: Tensor = entries_of(forward.prediction, len(forward.prediction), entries)
    return found
