"""A UNet as a CUDA graph and compiled, made with one text and run with others.

No times: whether the pictures are right, whether nothing is compiled anew, and whether a graph with a text that was not
shown gives NaN.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import sdattn_fast
from sdattn_fast.cli.bench import full_program
from sdattn_fast.cli.registry import UNET_CONFIGS, build_random_unet, random_inputs, twin_of

from .checks import of_backend
from .ground import DEVICE, DRY, prompt_inputs
from .unet_step import DRY_CONFIG

__all__ = ["compiled_once", "graph_of_other_text"]

CONTENT = (30, 7, 20, 3, 12)  # tokens of the prompts, the longest first: a graph serves those that are no longer
BATCH = 2


@torch.no_grad()
def graph_of_other_text(backend: str, model: str) -> None:
    """One graph of a whole UNet, for five texts. Raises: AssertionError."""
    of_backend(backend)
    stock, inputs = _model(model)
    unet = twin_of(stock)
    patch = sdattn_fast.apply(unet, full_program(), **prompt_inputs(BATCH, CONTENT[0]), backend=backend, fold="never")
    text = inputs["encoder_hidden_states"]
    with _graph(lambda: unet(**inputs).sample) as (replay, out):
        replay()
        assert out().isfinite().all(), "the graph's own text: not finite"
        for content in CONTENT:
            text.normal_()
            if content != CONTENT[0]:
                replay()
                assert out().isnan().any(dim=(1, 2, 3)).all(), "a text that was not shown gave a picture"
            patch.update(**prompt_inputs(BATCH, content))
            patch.update_text(text)
            expected = _eager(stock, inputs, content, backend)
            unet(**{**inputs, "encoder_hidden_states": torch.randn_like(text)})  # others, from Python, in between
            for _ in range(2):
                replay()
                _close(out(), expected, f"{content} content tokens in a CUDA graph")
    patch.remove()


@torch.no_grad()
def compiled_once(backend: str) -> None:
    """A small UNet under torch.compile with its CUDA graphs, for five texts. Raises: AssertionError, or what dynamo
    raises where it would compile anew."""
    of_backend(backend)
    stock, inputs = _model("small")
    unet = twin_of(stock)
    patch = sdattn_fast.apply(unet, full_program(), **prompt_inputs(BATCH, CONTENT[0]), backend=backend)
    run = torch.compile(unet, backend="aot_eager") if DRY else torch.compile(unet, mode="reduce-overhead")
    for content in CONTENT:
        inputs["encoder_hidden_states"] = torch.randn_like(inputs["encoder_hidden_states"])
        patch.update(**prompt_inputs(BATCH, content))
        expected = _eager(stock, inputs, content, backend)
        with torch._dynamo.config.patch(error_on_recompile=content != CONTENT[0]):
            for _ in range(3):  # runs, records, replays
                torch.compiler.cudagraph_mark_step_begin()
                _close(run(**inputs).sample.clone(), expected, f"{content} content tokens, compiled")
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs == 1, f"the UNet is {graphs} graphs and not one"
    patch.remove()


def _model(model: str) -> tuple[Any, dict[str, Any]]:
    if DRY or model == "small":
        UNET_CONFIGS[model] = DRY_CONFIG
    torch.manual_seed(0)
    dtype = torch.float32 if DRY else torch.float16
    return build_random_unet(model, dtype, DEVICE), random_inputs(UNET_CONFIGS[model], BATCH, dtype, DEVICE)


def _eager(stock: Any, inputs: dict[str, Any], content: int, backend: str) -> Tensor:
    unet = twin_of(stock)
    with sdattn_fast.apply(unet, full_program(), **prompt_inputs(BATCH, content), backend=backend, text_cache=False):
        return unet(**inputs).sample


def _close(got: Tensor, expected: Tensor, name: str) -> None:
    error = float((got - expected).norm() / expected.norm())
    assert error <= (1e-4 if DRY else 0.01), f"{name}: off by {error:.2%} of the picture"


@contextlib.contextmanager
def _graph(call: Callable[[], Tensor]) -> Iterator[tuple[Callable[[], object], Callable[[], Tensor]]]:
    """(replay, what the latest replay gave) of a CUDA graph; in a dry run, of its imitation."""
    if DRY:
        from emulated_graph import EmulatedGraph, emulated_gpu

        with emulated_gpu():
            call()
            imitation = EmulatedGraph()
            with imitation.capture():
                out = call()
            yield imitation.replay, lambda: out
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    yield graph.replay, lambda: out
