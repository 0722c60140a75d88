"""`warm_up`: compile what a patched pipeline will need, before its first picture."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .backend.triton import compile_ahead
from .patching.compiled import is_compiled
from .patching.layers import LAYER

__all__ = ["warm_up"]

# Few, and still some with a recipe's corrections and some without.
_DEFAULTS = {"prompt": "a red car and a blue bus", "num_inference_steps": 4, "output_type": "latent"}


def warm_up(pipe: Any, **call: Any) -> int:
    """Compile the Triton kernels that a patched pipeline will need, on all cores, with a progress bar.

    Without it, they are compiled one after another during the first picture. The pipeline is called twice: once with
    zeros in place of what kernels would compute, to list the launches, and once for real. Kernels depend on the dtype,
    the shapes, the program and, in powers of two from 16 on, on how many tokens of the prompt are words: call it with
    what you will call the pipeline with, once for each size. Triton keeps what it compiled in ``~/.triton/cache``, so
    that later processes only load it. A model that torch.compile compiles is called once, and compiles in its own way.

    Args:
        pipe: A diffusers pipeline after `apply`.
        **call: Arguments of the pipeline's calls, such as ``height``, ``width`` and ``prompt``. By default the prompt
            has 7 words, ``num_inference_steps`` is 4 and ``output_type`` "latent", which leaves the VAE out. Callbacks
            are called too. The states of generators, torch's own among them, are put back afterwards.

    Returns:
        How many kernels were compiled, or loaded from Triton's cache; 0 if there is nothing to do: there is no GPU, and
        then the pipeline is not called either; an earlier call has done it; or the backend is not Triton.

    Raises:
        ValueError: If the pipeline is not patched.
        TypeError: If `pipe` is not a diffusers pipeline.
        KernelRefused: If a kernel does not compile and the patch names its backend.
        Exception: What the pipeline raises.

    Examples:
        >>> sdattn_fast.apply(pipe, recipe="objects")
        >>> sdattn_fast.warm_up(pipe, height=768, width=768)

    Source: docs/performance.md, "The first picture".
    """
    models = _patched_models(pipe)
    if not compile_ahead.compiles():
        return 0
    given = inspect.signature(type(pipe).__call__).parameters
    defaults = {name: value for name, value in _DEFAULTS.items() if name in given}
    if "prompt_embeds" in call:
        defaults.pop("prompt", None)
    call = defaults | call
    done = 0
    with _generators_put_back(call.get("generator")):
        if not any(map(_has_compiled, models)):
            with _no_progress_bar(pipe), compile_ahead.planned() as launches:
                pipe(**call)
            if not launches:
                return 0
            with pipe.progress_bar(total=len(launches)) as bar:
                bar.set_description("sdattn_fast: compiling kernels")
                for compiled in compile_ahead.compiled(launches):
                    done += compiled
                    bar.update()
            launches.clear()  # their tensors
        with _no_progress_bar(pipe):
            pipe(**call)
    return done


def _patched_models(pipe: Any) -> list[nn.Module]:
    if not hasattr(pipe, "components") or not hasattr(pipe, "progress_bar"):
        raise TypeError(
            f"pipe: expected a diffusers pipeline, got {type(pipe).__name__}; a model alone is warmed up by a call"
        )
    models = [model for model in pipe.components.values() if isinstance(model, nn.Module)]
    patched = [model for model in models if any(getattr(m, LAYER, None) is not None for m in model.modules())]
    if not patched:
        raise ValueError(f"pipe: this {type(pipe).__name__} is not patched; call sdattn_fast.apply(pipe, ...) first")
    return patched


def _has_compiled(model: nn.Module) -> bool:
    """Whether torch.compile has compiled it or a part. Its graphs, CUDA graphs among them, want every launch made."""
    modules = list(model.modules())
    return any(hasattr(module, "_orig_mod") for module in modules) or is_compiled(modules)


@contextlib.contextmanager
def _generators_put_back(given: Any) -> Iterator[None]:
    generators = [one for one in (given if isinstance(given, (list, tuple)) else [given]) if one is not None]
    states = [one.get_state() for one in generators]
    try:
        with torch.random.fork_rng(list(range(torch.cuda.device_count()))):
            yield
    finally:
        for one, state in zip(generators, states, strict=True):
            one.set_state(state)


@contextlib.contextmanager
def _no_progress_bar(pipe: Any) -> Iterator[None]:
    config = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**config, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**config)
