"""Where a patched model makes the host wait for a GPU: at most once a prompt, and in no step after.

Not collected by itself: test_waiting.py runs it in a process of its own, on a GPU that is not there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import absent_gpu
import pytest
import torch
from absent_gpu import GPU, switched_on, waits
from tiny_models import TEXT
from tiny_transformers import inputs_of, pixart, video_inputs_of, wan

import sdattn_fast
from sdattn_fast import Capture, Program, Refinement, SalienceDropout

DROPS = Program(SalienceDropout(0.3), Refinement(1, 0.1, 1.0), "content")
RANDOM = Program(SalienceDropout(0.3, mode="random"))
PLAIN = Program()
N = 77

# What is asked of `apply`; one step draws on all that it names.
ASKED: dict[str, tuple[Program, dict[str, Any]]] = {
    "plain": (PLAIN, {}),
    "program": (DROPS, {}),
    "gate": (PLAIN, {"gate": torch.rand(N)}),
    "gate and program": (DROPS, {"gate": torch.rand(N) > 0.5, "phrases": torch.arange(N) // 3}),
    "heads": (DROPS, {"heads": [0]}),
    "zero heads": (DROPS, {"heads": [1], "inactive_heads": "zero"}),
    "capture": (DROPS, {"capture": Capture()}),
    "all maps": (DROPS, {"capture": Capture(tokens=(1, 5), reduce="none", stage="softmax", layers="*")}),
    "some steps": (DROPS, {"capture": Capture(steps=(0, 2))}),
    "schedule": (DROPS, {"dropout_when": {0: 0.5, 3: 0.0}}),
    "random": (RANDOM, {}),
    "seeded": (RANDOM, {"seed": 7}),
    "no cache": (DROPS, {"text_cache": False}),
    "no cache, maps": (DROPS, {"text_cache": False, "capture": Capture()}),
    "picture": (Program(None, Refinement(2, 0.1, 1.0, axis="space"), "row"), {}),
    "reference": (DROPS, {"backend": "reference", "capture": Capture()}),
}


@pytest.fixture(scope="module", autouse=True)
def _switched_on() -> Iterator[None]:
    with switched_on():
        yield


@pytest.fixture(autouse=True)
def _from_nothing() -> None:
    waits.clear()


@pytest.fixture(scope="module")
def moved() -> Callable[[Any], Any]:
    """moved(module): a copy on the GPU, one for all tests, which leave it as it was."""
    made: dict[Any, Any] = {}

    def moved(module: Any) -> Any:
        if module not in made:
            made[module] = copy.deepcopy(module).to(GPU)
        return made[module]

    return moved


@pytest.fixture
def unet(parts: dict[str, Any], moved: Callable[[Any], Any]) -> Any:
    return moved(parts["small"])


@pytest.fixture
def pipe(build: Callable[[str], Any], moved: Callable[[Any], Any]) -> Callable[[str], Any]:
    def pipe(name: str) -> Any:
        made = build(name)
        for part, module in made.components.items():
            if isinstance(module, torch.nn.Module):
                setattr(made, part, moved(module))
        return made

    return pipe


@pytest.fixture
def draw(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Up to the latents: after the UNet there is none of our code."""

    def latents(pipe: Any, prompt: Any = "a red car", **keywords: Any) -> Any:
        return draw(pipe, prompt, output_type="latent", **keywords)

    return latents


def noise(batch: int = 2, channels: int = 4) -> torch.Tensor:
    return torch.randn(batch, channels, 8, 8).to(GPU)


def words(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, N, TEXT).to(GPU)


def schedule(count: int = 4) -> torch.Tensor:
    return torch.arange(count).flip(0).mul(250).to(GPU)


def by_step(step: Callable[[int], Any], steps: int = 3) -> list[list[str]]:
    """What waited, by step."""
    found = []
    for i in range(steps):
        waits.clear()
        step(i)
        found.append(list(waits))
    return found


WAITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x[0]),
    "bool": lambda x: 1 if x.any() else 0,
    "tolist": lambda x: x.tolist(),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "mask on the CPU": lambda x: x[torch.tensor([True, False, True])],
    "list of indices": lambda x: x[[0, 2]],
    "cpu": lambda x: x.cpu(),
    "cpu, later": lambda x: x.to("cpu", non_blocking=True),
    "to": lambda x: torch.ones(3).to(x.device),
    "to, pageable": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "tensor": lambda x: torch.tensor([1, 2], device=x.device),
    "copy_": lambda x: x.copy_(torch.ones(3)),
    "repeats": lambda x: x.repeat_interleave(x.to(torch.int64) + 1),
}
NO_WAITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "sum": lambda x: (x * 2 + 1).sum(),
    "view": lambda x: x[1:].view(2, 1).expand(2, 4),
    "index": lambda x: x.index_select(0, x.argsort()),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "dtype": lambda x: x.to(torch.float16),
    "made there": lambda x: torch.zeros(3, device=x.device),
    "pinned": lambda x: torch.ones(3).pin_memory().to(x.device, non_blocking=True),
}


@pytest.mark.parametrize("what", [*WAITS, *NO_WAITS])
def test_the_gpu_that_is_not_there_sees_what_waits(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(3).to(GPU)
    assert not waits, "what a test does is not counted"
    monkeypatch.setattr(absent_gpu, "_PACKAGE", str(Path(__file__).parent))
    (WAITS | NO_WAITS)[what](x)
    assert bool(waits) == (what in WAITS), waits


@pytest.mark.parametrize(
    "asked, backend",
    [*((asked, "triton") for asked in ASKED), *((asked, "cuda") for asked in ("zero heads", "all maps", "seeded"))],
)
@torch.no_grad()
def test_a_unet_alone(asked: str, backend: str, unet: Any) -> None:
    program, settings = ASKED[asked]
    settings = {"backend": backend, "protected": torch.arange(N) > 9, **settings}
    x, times = noise(), schedule(3)
    with sdattn_fast.apply(unet, program, active=torch.tensor([False, True]), **settings) as patch:
        for prompt, text in enumerate((words(), words())):
            found = by_step(lambda i, text=text: unet(x, times[i], encoder_hidden_states=text))
            counts_steps = "capture" in settings or "dropout_when" in settings
            # The timesteps of a schedule, once.
            assert len(found[0]) == (1 if prompt == 0 and counts_steps else 0), found[0]
            assert not any(found[1:]), found
        if "capture" in settings:
            waits.clear()
            assert len(patch.maps) > 0
            assert not waits


@torch.no_grad()
def test_text_in_turn(unet: Any) -> None:
    """Unbatched guidance: two texts take turns."""
    x, times = noise(1), schedule()
    texts = words(1), words(1)
    with sdattn_fast.apply(unet, DROPS, backend="triton"):
        found = by_step(lambda i: [unet(x, times[i], encoder_hidden_states=text) for text in texts])
    assert not any(found), found


@pytest.mark.parametrize("make", [pixart, wan])
@torch.no_grad()
def test_padding_is_read_once_a_prompt(make: Callable[[], Any]) -> None:
    """Of two texts that take turns, too, as those of guidance in two forwards."""
    model = make().to(GPU)
    of_model = inputs_of if make is pixart else video_inputs_of
    both = [
        {name: x.to(GPU) if isinstance(x, torch.Tensor) else x for name, x in of_model(model).items()} for _ in range(2)
    ]
    with sdattn_fast.apply(model, DROPS, backend="triton", active=torch.tensor([False, True])):
        found = by_step(lambda i: [model(**inputs) for inputs in both])
    assert len(found[0]) == 2 and not any(found[1:]), found


@torch.no_grad()
def test_text_that_is_a_new_tensor_at_every_step(unet: Any) -> None:
    x, times, text = noise(), schedule(), words()
    with sdattn_fast.apply(unet, DROPS, backend="triton"):
        views = by_step(lambda i: unet(x, times[i], encoder_hidden_states=text[:2]))
        copies = by_step(lambda i: unet(x, times[i], encoder_hidden_states=text.clone()))
    assert not any(views + copies), (views, copies)


@torch.no_grad()
def test_numbers_for_timesteps(unet: Any) -> None:
    x, text = noise(), words()
    with sdattn_fast.apply(unet, RANDOM, backend="triton", seed=3, capture=Capture()):
        plain = by_step(lambda i: unet(x, 900 - i, encoder_hidden_states=text))
        on_cpu = by_step(lambda i: unet(x, torch.tensor(900 - i), encoder_hidden_states=text))
    assert not any(plain + on_cpu), (plain, on_cpu)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("asked", ["program", "capture", "seeded", "schedule", "no cache"])
def test_training(asked: str, backend: str, unet: Any) -> None:
    """The forward passes, whose timesteps are drawn at random and new at every step."""
    program, settings = ASKED[asked]
    unet = copy.deepcopy(unet).train().requires_grad_(True)
    gate = torch.rand(N).to(GPU).requires_grad_()
    x, text = noise(), words()
    with sdattn_fast.apply(unet, program, backend=backend, gate=gate, **settings) as patch:

        def step(i: int) -> None:
            patch.step = i
            out = unet(x, torch.randint(1000, (2,), device=GPU), encoder_hidden_states=text).sample
            assert out.requires_grad

        waits.clear()
        found = by_step(step)
    assert not any(found), found


@pytest.mark.parametrize("given_under_no_grad", [True, False])
@pytest.mark.parametrize("shape", [(N,), (1, N), (2, N), (2, 2, N)])
@pytest.mark.parametrize("program", [DROPS, PLAIN], ids=["drops", "plain"])
def test_a_learnt_gate_is_tried(program: Program, shape: tuple[int, ...], given_under_no_grad: bool, unet: Any) -> None:
    x, times, text = noise(), schedule(3), words()
    gate = torch.nn.Parameter(torch.rand(shape).to(GPU))
    told = {"protected": torch.arange(N) > 9, "active": torch.tensor([False, True])}
    with torch.set_grad_enabled(not given_under_no_grad):
        patch = sdattn_fast.apply(unet, program, backend="reference", gate=gate, **told)
    waits.clear()
    with patch, torch.no_grad():
        found = by_step(lambda i: unet(x, times[i], encoder_hidden_states=text))
    assert not any(found), found


@pytest.mark.parametrize("program", [DROPS, RANDOM, Program(renormalize="row")], ids=["drops", "random", "renormalize"])
def test_a_backward_pass(program: Program) -> None:
    """Its nodes, called as torch's engine would."""
    text = {"protected": torch.arange(N).expand(2, N) > 9, "gate": torch.rand(2, N), "heads": [1]}
    prepared = sdattn_fast.functional.prepare(
        program, batch=2, heads_count=2, tokens=N, device="cpu", capture=Capture((1, 2)), backend="triton", **text
    ).to(GPU)
    query, key, value = (torch.randn(2, 2, length, 16).to(GPU).requires_grad_() for length in (64, N, N))
    found = []
    for _ in range(2):
        waits.clear()
        out, maps = prepared(query, key, value, grid=(8, 8), seed=5)
        node, grad = out.grad_fn, torch.ones_like(out)
        if program.refine is not None:
            assert type(node).__name__ == "_SmoothBackward"
            grad = node.apply(grad)[0]
            node = node.next_functions[0][0]
        assert type(node).__name__ == "_RowsBackward" and maps is not None
        grads = node.apply(grad, None, None)
        assert [g.shape for g in grads[:3]] == [query.shape, key.shape, value.shape]
        found.append(list(waits))
    assert not any(found), found


def test_a_schedule_is_read_once_and_what_is_written_over_it_again() -> None:
    """A loop's run begins where timesteps rise, read or not."""
    calls = sdattn_fast.patching.call.Calls(lambda: None)
    times = schedule()

    def steps(change: Callable[[Any], Any] = lambda t: t) -> list[int]:
        return [calls.step(change(t))[0].steps.index for t in times]

    assert steps() == [0, 1, 2, 3]
    assert steps() == [0, 1, 2, 3]
    assert steps(lambda t: t.expand(2)) == [0, 1, 2, 3]
    assert len(waits) == 1
    times += 1  # the first is above the last of before
    assert steps() == [0, 1, 2, 3]
    assert len(waits) == 2
    waits.clear()
    assert steps(lambda t: t.clone()) == [0, 1, 2, 3]
    assert waits, "timesteps of their own are each read"


def test_rows_are_sorted_once_a_prompt(unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random dropout has another seed in every layer and step, and the same content tokens."""
    sorted_rows = []
    original = sdattn_fast.backend.triton.rows.content_first
    monkeypatch.setattr(
        sdattn_fast.backend.triton.rows, "content_first", lambda content: sorted_rows.append(1) or original(content)
    )
    x, times, text = noise(), schedule(), words()
    with torch.no_grad(), sdattn_fast.apply(unet, RANDOM, backend="triton", seed=7, protected=torch.arange(N) > 9):
        by_step(lambda i: unet(x, times[i], encoder_hidden_states=text))
    assert len(sorted_rows) == 1


@pytest.mark.parametrize(
    "name, asked",
    [
        *(("small", asked) for asked in ("program", "gate", "capture", "schedule", "seeded", "no cache")),
        *((name, asked) for name in ("sdxl", "controlnet", "pix2pix") for asked in ("program", "capture")),
    ],
)
def test_pipelines(name: str, asked: str, pipe: Any, draw: Any) -> None:
    program, settings = ASKED[asked]
    made = pipe(name)
    with sdattn_fast.apply(made, program, backend="triton", **settings):
        for prompt in ("a red car", "a blue cube on a green ball"):
            waits.clear()
            draw(made, prompt)
            assert len(waits) == 1, waits


def test_guess_mode(pipe: Any, draw: Any) -> None:
    """A ControlNet that sees another view of the prompts at every step."""
    made = pipe("controlnet")
    with sdattn_fast.apply(made, DROPS, backend="triton", capture=Capture()):
        draw(made, num_inference_steps=2, guess_mode=True)
        few = len(waits)
        waits.clear()
        draw(made, num_inference_steps=4, guess_mode=True)
        assert len(waits) == few == 2, waits


def test_embeds_that_were_made_before(pipe: Any, draw: Any) -> None:
    made = pipe("small")
    with sdattn_fast.apply(made, DROPS, backend="triton"):
        embeds = made.encode_prompt("a red car", GPU, 1, False)[0]
        made.encode_prompt("something else", GPU, 1, False)
        waits.clear()
        draw(made, None, prompt_embeds=embeds, negative_prompt_embeds=torch.zeros_like(embeds), num_inference_steps=4)
    assert len(waits) == 1, waits


def test_where_no_writes_are_counted_a_pipeline_waits_once_a_step(
    pipe: Any, draw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in inference mode, which these tensors do not know."""
    for module in ("places", "patching.text_cache"):
        monkeypatch.setattr(f"sdattn_fast.{module}.version_of", lambda x: None)
    made = pipe("small")
    with sdattn_fast.apply(made, DROPS, backend="triton"):
        draw(made, num_inference_steps=4)
    assert [one.split(" in ")[-1] for one in waits] == ["_read"] * 4
