"""What peers need of a pipeline: others built on its parts, its parts left as they were, its noise, its pictures."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...guidance.pictures import uint8_pictures
from ...loading import quiet_loading

__all__ = ["first_noise", "no_stable_diffusion", "pictures", "preserved", "sibling", "stand_in"]


def stand_in(pipe: Any) -> Any:
    """The pipeline on the same modules, with a scheduler and attributes of its own, so that a call leaves no trace."""
    other = copy.copy(pipe)
    other.scheduler = copy.deepcopy(pipe.scheduler)
    return other


def sibling(kind: Any, pipe: Any, **class_kwargs: Any) -> Any:
    """A pipeline of another class on the modules of this one, and a copy of its scheduler.

    Not by `from_pipe`, which makes float32 of the modules that it shares. class_kwargs: keywords of the class.
    """
    source = stand_in(pipe)
    wanted = set(inspect.signature(kind.__init__).parameters)
    init_kwargs = {**dict(source.config), **source.components}
    with quiet_loading():  # both warn: of their age, and of a safety checker that the first pipeline has not either
        made = kind(**{name: value for name, value in init_kwargs.items() if name in wanted}, **class_kwargs)
    made.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return made


@contextlib.contextmanager
def preserved(unet: Any) -> Iterator[None]:
    """Afterwards the UNet has the attention processors, the config, the gradients and the requires_grad that it had.

    Inside, no weight asks for gradients: those of latents are all that peers look at, and weights' would be kept.
    """
    processors = [(m, m.processor) for m in unet.modules() if hasattr(m, "set_processor")]
    weights = [(p, p.requires_grad, p.grad) for p in unet.parameters()]
    config = unet._internal_dict
    try:
        for p, *_ in weights:
            p.requires_grad_(False)
        yield
    finally:
        for module, processor in processors:
            if module.processor is not processor:
                module.set_processor(processor)
        for p, required_grad, gradient in weights:
            p.requires_grad_(required_grad)
            p.grad = gradient
        unet._internal_dict = config


def first_noise(pipe: Any, generator: torch.Generator) -> Tensor:
    """(1, C, height, width): the noise that the pipeline would begin with, not yet scaled by its scheduler."""
    from diffusers.utils.torch_utils import randn_tensor

    size = pipe.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    shape = (1, pipe.unet.config.in_channels, height, width)
    return randn_tensor(shape, generator=generator, device=pipe._execution_device, dtype=pipe.text_encoder.dtype)


def pictures(
    pipe: Any,
    prompts: Sequence[str],
    generators: Sequence[torch.Generator],
    guidance: float,
    steps: int,
    **call_kwargs: Any,
) -> np.ndarray:
    """What a pipeline draws, (prompts, height, width, 3) uint8. call_kwargs: keywords of its call."""
    images = pipe(
        list(prompts), generator=list(generators), guidance_scale=guidance, num_inference_steps=steps,
        output_type="np", **call_kwargs,
    ).images  # fmt: skip
    return uint8_pictures(images)


def no_stable_diffusion(pipe: Any) -> str | None:
    """Why this is not what the papers are about: Stable Diffusion with one text encoder; None where it is."""
    from diffusers import StableDiffusionPipeline

    kind: Any = StableDiffusionPipeline
    if not isinstance(pipe, kind):
        return f"expected a StableDiffusionPipeline, got a {type(pipe).__name__}"
    if pipe.text_encoder is None or pipe.tokenizer is None:
        return "the pipeline has no text encoder"
    config = pipe.unet.config
    for name, reason in (
        ("encoder_hid_dim_type", "an IP-Adapter is loaded"),
        ("addition_embed_type", "the UNet is asked for more than the text"),
        ("class_embed_type", "the UNet is asked for more than the text"),
        ("time_cond_proj_dim", "the UNet takes guidance as an input"),
    ):
        if getattr(config, name, None) is not None:
            return reason
    return None
