"""CUDA graphs of a patched model: captured with one prompt, replayed with others. On a CPU, with graphs in imitation;
benchmarks/on_gpu runs real ones."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulated_graph import EmulatedGraph, emulated_gpu
from torch import Tensor

import sdattn_fast
from sdattn_fast import Capture, Program, Refinement, SalienceDropout

LONG = "a red car and a blue cat beside one dog"
PROMPTS = ("a red car", "dog", "x", "some other dog", "a cat and a dog", "a blue car beside a cat")
MID = "mid_block.attentions.0.transformer_blocks.0.attn2"
ROWS = Program(SalienceDropout(0.3), Refinement(1, 0.2, 0.0), "content")


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    with emulated_gpu(), torch.no_grad():
        yield


@pytest.fixture
def twins(build: Any) -> Any:
    """Two pipelines with the same weights: one for the graph, one to say what is right."""
    pipes = build("small"), build("small")
    for pipe in pipes:
        pipe.register_modules(unet=copy.deepcopy(pipe.unet))
    return pipes


def apply(pipe: Any, program: Program = ROWS, **asked: Any) -> Any:
    """On a CPU "auto" folds, and the folded kernel is no op that the imitation could replay; on GPUs it does not."""
    return sdattn_fast.apply(pipe, program, **{"fold": "never", **asked})


def text_of(pipe: Any, prompt: str) -> Tensor:
    """(2, 77, E), the unconditional half first."""
    positive, negative = pipe.encode_prompt(prompt, "cpu", 1, True)
    return torch.cat([negative, positive])


class Captured:
    """A pipeline's UNet as a graph, captured with a prompt."""

    def __init__(self, pipe: Any, patch: Any, prompt: str, size: int = 8) -> None:
        self.pipe, self.patch = pipe, patch
        self.x, self.t = torch.randn(2, 4, size, size), torch.tensor([7])
        self.text = text_of(pipe, prompt)
        pipe.unet(self.x, self.t, self.text)
        self.graph = EmulatedGraph()
        with self.graph.capture():
            self.out = pipe.unet(self.x, self.t, self.text)[0]

    def write(self, prompt: str) -> None:
        self.text.copy_(text_of(self.pipe, prompt))

    def replay(self) -> Tensor:
        self.graph.replay()
        return self.out


def right(pipe: Any, captured: Captured, prompt: str) -> Tensor:
    return pipe.unet(captured.x, captured.t, text_of(pipe, prompt))[0]


WAYS = {
    "rows": dict(program=ROWS),
    "the reference": dict(program=ROWS, backend="reference"),
    "linear steps": dict(program=Program(), gate=torch.linspace(0, 2, 77), phrases=torch.arange(77) // 2),
    "over the picture": dict(program=Program(SalienceDropout(0.3, axis="space"), Refinement(2, 0.2, 0.7))),
    "random": dict(program=Program(SalienceDropout(0.5, mode="random")), seed=3),
    "heads": dict(program=ROWS, heads=[1], inactive_heads="zero", gate=torch.linspace(0, 2, 77)),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_graph_serves_prompts_that_it_was_not_captured_with(way: str, twins: Any) -> None:
    mine, theirs = twins
    with apply(mine, **WAYS[way]) as patch, apply(theirs, **WAYS[way]):
        captured = Captured(mine, patch, LONG)
        assert torch.allclose(captured.replay(), right(theirs, captured, LONG), atol=1e-5)
        held = [x.data_ptr() for graph in patch._models[0].text.graphs for x in everything(graph)]
        assert len(held) > 2 * len(patch.layers)
        pictures = []
        for step, prompt in enumerate(PROMPTS):  # more than the cache holds
            captured.write(prompt)
            patch.update_text(captured.text)
            captured.t.fill_(7 - step)
            expected = right(theirs, captured, prompt)
            for _ in range(2):
                assert torch.allclose(captured.replay(), expected, atol=1e-5)
            pictures.append(expected)
            right(mine, captured, PROMPTS[step - 1])  # other text, from Python, in between
            assert torch.allclose(captured.replay(), expected, atol=1e-5)
        assert held == [x.data_ptr() for graph in patch._models[0].text.graphs for x in everything(graph)]
        assert all(not torch.allclose(a, b, atol=1e-3) for a, b in itertools.pairwise(pictures))


def everything(graph: Any) -> list[Tensor]:
    calls = [x for _, prepared in graph.calls for x in prepared.tensors()]
    entries = [x for held in graph.layers if held.entry is not None for x in held.entry.tensors()]
    return [graph.text, graph.shown, *calls, *entries]


def test_the_models_next_call_brings_a_graph_up_to_date(twins: Any) -> None:
    mine, theirs = twins
    with apply(mine) as patch, apply(theirs):
        captured = Captured(mine, patch, LONG)
        for prompt in PROMPTS:
            captured.write(prompt)
            expected = right(theirs, captured, prompt)
            assert torch.allclose(mine.unet(captured.x, captured.t, captured.text)[0], expected, atol=1e-5)
            assert torch.allclose(captured.replay(), expected, atol=1e-5)


def test_a_graph_has_the_seed_it_was_captured_with(twins: Any) -> None:
    mine, _ = twins
    with apply(mine, Program(SalienceDropout(0.5, mode="random")), seed=3) as patch:
        captured = Captured(mine, patch, LONG)
        before = captured.replay().clone()
        with pytest.raises(ValueError, match=r"^seed: a captured CUDA graph draws by the seed that it was captured"):
            patch.update(seed=4)
        assert torch.equal(captured.replay(), before)
        patch.refresh()
        patch.update(seed=4)
        assert not torch.allclose(Captured(mine, patch, LONG).replay(), before, atol=1e-3)


@pytest.mark.parametrize("how", ["not shown", "refreshed", "removed", "another prompt by hand"])
def test_a_graph_whose_text_is_not_the_one_shown_gives_nan(how: str, twins: Any) -> None:
    mine, _ = twins
    patch = apply(mine)
    captured = Captured(mine, patch, LONG)
    assert captured.replay().isfinite().all()
    if how == "not shown":
        captured.write("dog")
    elif how == "refreshed":
        patch.refresh()
    elif how == "removed":
        patch.remove()
    else:
        captured.text.data[1, 3, 0] += 1e-3
    assert captured.replay().isnan().all()
    if how == "another prompt by hand":
        captured.text.data[1, 3, 0] -= 1e-3
        captured.write(LONG)
        patch.update_text(captured.text)
        assert captured.replay().isfinite().all()


def test_an_update_reaches_the_graph(twins: Any) -> None:
    mine, theirs = twins
    gates = [torch.linspace(0, 2, 77), torch.linspace(3, 0, 77)]
    with apply(mine, gate=gates[0]) as patch, apply(theirs, gate=gates[1]):
        captured = Captured(mine, patch, LONG)
        before = captured.replay().clone()
        patch.update(gate=gates[1])
        expected = right(theirs, captured, LONG)
        assert torch.allclose(captured.replay(), expected, atol=1e-5)
        assert not torch.allclose(before, expected, atol=1e-3)
        with pytest.raises(ValueError, match=r"gate was there, now it is not.*refresh\(\) and capture again"):
            patch.update(gate=None)
        with pytest.raises(ValueError, match=r"gate was \(2, 1, 77\).*now it is \(2, 2, 77\)"):
            patch.update(gate=torch.ones(2, 2, 77))
        assert torch.allclose(captured.replay(), expected, atol=1e-5)
        assert torch.allclose(mine.unet(captured.x, captured.t, captured.text)[0], expected, atol=1e-5)
        patch.refresh()
        patch.update(gate=None)
        again = Captured(mine, patch, LONG)
        assert again.replay().isfinite().all() and captured.replay().isnan().all()


def test_two_graphs_with_tokens_of_the_same_classes_keep_their_own(twins: Any) -> None:
    mine, theirs = twins
    with apply(mine) as patch, apply(theirs):
        one, two = Captured(mine, patch, "a red car"), Captured(mine, patch, "a big cat", size=16)
        one.write("dog")
        patch.update_text(one.text)
        for captured, prompt in ((two, "a big cat"), (one, "dog")):
            assert torch.allclose(captured.replay(), right(theirs, captured, prompt), atol=1e-5)
        two.write("cat")
        patch.update_text(two.text)
        for captured, prompt in ((two, "cat"), (one, "dog")):
            assert torch.allclose(captured.replay(), right(theirs, captured, prompt), atol=1e-5)


def test_two_graphs_of_one_text_with_other_prompts_between_their_captures(twins: Any) -> None:
    mine, theirs = twins
    with apply(mine) as patch, apply(theirs):
        one = Captured(mine, patch, LONG)
        for prompt in PROMPTS[:3]:  # more than is kept
            right(mine, one, prompt)
        mine.unet(one.x, one.t, one.text)
        for _ in range(2):
            two = EmulatedGraph()
            with two.capture():
                out = mine.unet(one.x, one.t, one.text)[0]
        (graph,) = patch._models[0].text.graphs
        assert len(graph.layers) == len(patch.layers)  # captured again, nothing more is kept
        one.write("dog")
        patch.update_text(one.text)
        expected = right(theirs, one, "dog")
        two.replay()
        assert torch.allclose(one.replay(), expected, atol=1e-5) and torch.allclose(out, expected, atol=1e-5)


def test_a_copy_of_a_patched_unet_is_not_patched(twins: Any) -> None:
    mine, _ = twins
    with apply(mine) as patch:
        Captured(mine, patch, LONG)
        with pytest.warns(UserWarning, match="the copy is not patched"):
            copied = copy.deepcopy(mine.unet)
    assert not any(getattr(module, "_sdattn_fast_layer", None) for module in copied.modules())


def test_unbatched_guidance_in_one_graph(twins: Any) -> None:
    mine, theirs = twins
    with apply(mine) as patch, apply(theirs):
        x, t = torch.randn(1, 4, 8, 8), torch.tensor([7])
        texts = [half.clone() for half in text_of(mine, LONG).split(1)]
        for _ in range(2):
            for text in texts:
                mine.unet(x, t, text)
        graph = EmulatedGraph()
        with graph.capture():
            outs = [mine.unet(x, t, text)[0] for text in texts]
        for prompt in PROMPTS[:3]:
            for text, new in zip(texts, text_of(mine, prompt).split(1), strict=True):
                text.copy_(new)
                patch.update_text(text)
            graph.replay()
            for out, text in zip(outs, text_of(theirs, prompt).split(1), strict=True):
                assert torch.allclose(out, theirs.unet(x, t, text)[0], atol=1e-5)


def test_maps_are_those_of_the_latest_replay(twins: Any) -> None:
    mine, theirs = twins
    capture = Capture(tokens=(1, 2), layers="*", steps="latest")
    with (
        apply(mine, capture=capture) as patch,
        apply(theirs, capture=capture) as told,
    ):
        captured = Captured(mine, patch, LONG)
        for prompt in PROMPTS[:3]:
            captured.write(prompt)
            patch.update_text(captured.text)
            captured.replay()
            right(theirs, captured, prompt)
            assert torch.allclose(patch.maps[MID], told.maps[MID], atol=1e-5)


def test_maps_of_a_text_that_was_not_shown_are_nan(twins: Any) -> None:
    mine, _ = twins
    capture = Capture(tokens=(1, 2), layers="*", steps="latest")
    with apply(mine, capture=capture, layers=[MID]) as patch:
        captured = Captured(mine, patch, LONG)
        captured.replay()
        assert patch.maps[MID].isfinite().all()
        captured.write("dog")
        captured.replay()
        assert patch.maps[MID].isnan().all()


def test_maps_beside_two_graphs_are_those_captured_last(twins: Any) -> None:
    mine, _ = twins
    with apply(mine, capture=Capture(tokens=(1, 2), layers="*", steps="latest")) as patch:
        one, two = Captured(mine, patch, LONG), Captured(mine, patch, LONG, size=16)
        one.write("dog")
        patch.update_text(one.text)
        one.replay()
        assert patch.maps[MID].shape[-1] == 16 and two.replay().isfinite().all()


@pytest.mark.parametrize("fold", ["always", "never"])
def test_what_is_folded_into_the_text_is_rewritten_in_place(fold: str, twins: Any) -> None:
    """Python reads what a graph would."""
    mine, theirs = twins
    with apply(mine, fold=fold) as patch, apply(theirs, fold=fold):
        captured = Captured(mine, patch, LONG)
        (graph,) = patch._models[0].text.graphs
        folds = [fold for held in graph.layers for fold in held.served.folds.values()]
        assert len(folds) == (len(graph.layers) if fold == "always" else 0)
        before = [x.data_ptr() for one in folds for x in one.tensors()]
        for prompt in PROMPTS[:3]:
            captured.write(prompt)
            patch.update_text(captured.text)
            expected = right(theirs, captured, prompt)
            assert torch.allclose(mine.unet(captured.x, captured.t, captured.text)[0], expected, atol=1e-5)
            assert [fold for held in graph.layers for fold in held.served.folds.values()] == folds
            assert [x.data_ptr() for one in folds for x in one.tensors()] == before


@pytest.mark.parametrize("how", ["told", "by the model's next call"])
def test_new_weights_reach_the_graph_with_the_text(how: str, twins: Any) -> None:
    mine, theirs = twins
    with apply(mine) as patch, apply(theirs):
        captured = Captured(mine, patch, LONG)
        for pipe in (mine, theirs):
            for name, p in pipe.unet.named_parameters():
                if "attn2.to_k" in name:
                    p.mul_(1.5)
        if how == "told":
            patch.update_text(captured.text)
        else:
            mine.unet(captured.x, captured.t, captured.text)
        assert torch.allclose(captured.replay(), right(theirs, captured, LONG), atol=1e-5)
        keys = [held.entry.key._version for held in patch._models[0].text.graphs[0].layers]
        mine.unet(captured.x, captured.t, captured.text)  # nothing is new
        assert [held.entry.key._version for held in patch._models[0].text.graphs[0].layers] == keys


def test_autocast_is_as_it_was_in_the_capture(twins: Any) -> None:
    mine, theirs = twins
    with apply(mine) as patch, apply(theirs):
        with torch.autocast("cpu", torch.bfloat16):
            captured = Captured(mine, patch, LONG)
        (graph,) = patch._models[0].text.graphs
        assert all(held.entry.key.dtype == torch.bfloat16 for held in graph.layers)
        captured.write("dog")
        patch.update_text(captured.text)
        with torch.autocast("cpu", torch.bfloat16):
            expected = right(theirs, captured, "dog")
        assert torch.allclose(captured.replay().float(), expected.float(), atol=2e-2)
        captured.write(LONG)
        assert captured.replay().isnan().all()


def test_a_control_net_and_its_unet_in_one_graph(build: Any) -> None:
    mine, theirs = build("controlnet"), build("controlnet")
    for pipe in (mine, theirs):
        pipe.register_modules(unet=copy.deepcopy(pipe.unet), controlnet=copy.deepcopy(pipe.controlnet))
    x, t, picture = torch.randn(2, 4, 8, 8), torch.tensor([7]), torch.rand(2, 3, 16, 16)

    def step(pipe: Any, text: Tensor) -> Tensor:
        down, mid = pipe.controlnet(x, t, text, picture, return_dict=False)
        return pipe.unet(x, t, text, down_block_additional_residuals=down, mid_block_additional_residual=mid)[0]

    with apply(mine) as patch, apply(theirs):
        text = text_of(mine, LONG)
        step(mine, text)
        graph = EmulatedGraph()
        with graph.capture():
            out = step(mine, text)
        for prompt in PROMPTS[:2]:
            text.copy_(text_of(mine, prompt))
            patch.update_text(text)
            graph.replay()
            assert torch.allclose(out, step(theirs, text_of(theirs, prompt)), atol=1e-5)


def test_a_prompt_without_room_leaves_the_graph_as_it_was(twins: Any) -> None:
    mine, theirs = twins
    with apply(mine) as patch, apply(theirs):
        captured = Captured(mine, patch, "a red car")
        before = captured.replay().clone()
        captured.write("dog " * 40)
        with pytest.raises(ValueError, match=r"up to 16 content tokens were there, now there are up to 77.*capture"):
            patch.update_text(captured.text)
        assert captured.replay().isnan().all()
        for _ in range(2):  # Python needs no room
            expected = right(theirs, captured, "dog " * 40)
            assert torch.allclose(mine.unet(captured.x, captured.t, captured.text)[0], expected, atol=1e-5)
        assert captured.replay().isnan().all()
        captured.write("a red car")
        patch.update_text(captured.text)
        assert torch.allclose(captured.replay(), before, atol=1e-6)


def test_captures_that_cannot_be_right_are_refused(twins: Any) -> None:
    mine, _ = twins
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([7])
    with apply(mine) as patch:
        text = text_of(mine, LONG)
        with pytest.raises(RuntimeError, match=r"the patch has not seen.*once before the capture"), _capture():
            mine.unet(x, t, text)
        mine.unet(x, t, text)
        with pytest.raises(RuntimeError, match=r"Capture unet.* as a whole"), _capture():
            mine.unet.forward(x, t, text)
        with pytest.raises(ValueError, match=r"there is none.*write into that one"):
            patch.update_text(text)
        with pytest.raises(TypeError, match=r"encoder_hidden_states: expected a torch.Tensor .*got list"):
            patch.update_text([text])
        captured = Captured(mine, patch, LONG)
        with pytest.raises(ValueError, match=r"captured with \(\(2, 77, 32\) torch.float32\), got another, \(2, 77"):
            patch.update_text(captured.text.clone())
        with pytest.raises(ValueError, match=r"got another, \(1, 77, 32\)"):
            patch.update_text(captured.text[1:])
        with pytest.raises(RuntimeError, match=r"cross_attention_kwargs: .*set_adapters"), _capture():
            mine.unet(x, t, text, cross_attention_kwargs={"scale": 0.2})
        with pytest.raises(ValueError, match=r"gate: it wants a gradient"), torch.enable_grad():
            patch.update(gate=torch.ones(77, requires_grad=True))
    with torch.enable_grad():
        patch = apply(mine, gate=torch.ones(77, requires_grad=True))
    with patch:
        text = text_of(mine, LONG)
        mine.unet(x, t, text)
        with pytest.raises(RuntimeError, match=r"gate: it wants a gradient"), _capture():
            mine.unet(x, t, text)
    with apply(mine):
        with torch.inference_mode():
            text = text_of(mine, LONG)
            mine.unet(x, t, text)
            with pytest.raises(RuntimeError, match=r"not made in inference mode"), _capture():
                mine.unet(x, t, text)
        mine.unet.compile(backend="eager")
        text = text_of(mine, LONG)
        with pytest.raises(RuntimeError, match=r"captured of a compiled model"), _capture():
            mine.unet(x, t, text)
        mine.unet._compiled_call_impl = None
    with apply(mine, dropout_when={0: 0.2, 9: 0.5}):
        text = text_of(mine, LONG)
        mine.unet(x, t, text)
        with pytest.raises(RuntimeError, match=r"dropout_when: a schedule"), _capture():
            mine.unet(x, t, text)


def _capture() -> Any:
    return EmulatedGraph().capture()
