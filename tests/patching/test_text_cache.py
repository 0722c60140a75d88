"""The text cache is never stale: whatever happens to text, weights, adapters or modes, what comes out is stock's.

Random sequences of events run on one patched UNet, and after each the same UNet runs with diffusers' own processors.
"""

from __future__ import annotations

import copy
import gc
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from side_by_side import side_by_side
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_hook

import sdattn_fast
from sdattn_fast import Program, SalienceDropout, SemanticAttnProcessor
from sdattn_fast.patching import bound
from sdattn_fast.patching.text_cache import TEXTS, TextCache, Weights
from sdattn_fast.streams import MadeOn

peft = pytest.importorskip("peft")

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
LORA = {"r": 2, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"], "init_lora_weights": False}


class World:
    """A UNet, its latents and the text of the moment."""

    def __init__(self, unet: nn.Module, bare: bool, fold: str) -> None:
        self.unet: Any = copy.deepcopy(unet)
        self.unet.set_attn_processor(_stock())
        self.x = torch.randn(2, 4, 8, 8)
        self.text = torch.randn(2, 77, 32)
        self.other = torch.randn(2, 77, 32)
        self.attn = self.unet.get_submodule(LAYER)
        self.adapter = "none"
        self.run: Callable[[], Tensor] = self.plain
        self.patch = None if bare else sdattn_fast.apply(self.unet, fold=fold)
        self.processor = SemanticAttnProcessor(fold=fold) if bare else None
        if bare:
            self.unet.set_attn_processor(self.processor)

    def plain(self) -> Tensor:
        return self.unet(self.x, 5, self.text).sample

    def stock(self) -> Tensor:
        """The same modules under diffusers' processors, our hook out of the way."""
        hooks, self.unet._forward_pre_hooks = self.unet._forward_pre_hooks, OrderedDict()
        placed = {m: m.processor for m in self.unet.modules() if hasattr(m, "set_processor")}
        try:
            for module in placed:
                module.processor = _stock()
            return self.run()
        finally:
            for module, processor in placed.items():
                module.processor = processor
            self.unet._forward_pre_hooks = hooks

    def in_float32(self) -> Tensor:
        """The same numbers in parameters and inputs, nothing rounded after."""
        parameters = {name: p.detach().float() for name, p in self.unet.named_parameters()}
        return torch.func.functional_call(self.unet, parameters, (self.x.float(), 5, self.text.float())).sample

    def check(self) -> None:
        with torch.no_grad():
            ours, stock = self.run().float(), self.stock().float()
            error = 1e-5 * stock.norm()
            if torch.is_autocast_enabled("cpu"):
                with torch.autocast("cpu", enabled=False):
                    error = (stock - self.stock()).norm()
            elif self.x.dtype != torch.float32:
                run, self.run = self.run, self.in_float32
                error = (stock - self.stock()).norm()
                self.run = run
            assert (ours - stock).norm() <= 2 * error

    @property
    def to_k(self) -> Any:
        return getattr(self.attn.to_k, "base_layer", self.attn.to_k)


def _stock() -> Any:
    from diffusers.models.attention_processor import AttnProcessor2_0

    return AttnProcessor2_0()


def new_text(w: World) -> None:
    w.text = torch.randn(2, 77, 32)


def freed_text(w: World) -> None:
    w.text = None
    gc.collect()
    w.text = torch.randn(2, 77, 32)


def same_values(w: World) -> None:
    w.text = w.text.clone()


def two_texts_in_turn(w: World) -> None:
    w.text, w.other = w.other, w.text


def edit_in_place(w: World) -> None:
    w.text[1, 3] += 1.0


def edit_data(w: World) -> None:
    w.text.data[0, 2, 5] += 1.0


def text_from_inference_mode(w: World) -> None:
    with torch.inference_mode():
        w.text = torch.randn(2, 77, 32)


def edit_inference_text(w: World) -> None:
    text_from_inference_mode(w)
    w.check()
    with torch.inference_mode():
        w.text[0, 1] -= 2.0


def run_in_inference_mode(w: World) -> None:
    with torch.inference_mode():
        w.check()


def run_under_autocast(w: World) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        w.check()


def weight_in_place(w: World) -> None:
    with torch.no_grad():
        w.to_k.weight.mul_(1.1)


def weight_data_and_new_prompt(w: World) -> None:
    w.to_k.weight.data.copy_(torch.randn_like(w.to_k.weight) * 0.3)
    w.text = w.text.clone()


def weight_data(w: World) -> None:
    w.to_k.weight.data.mul_(-1.1)


def weight_storage_freed(w: World) -> None:
    """The new numbers lie where the old ones lay: parameter, version and address are as before."""
    place = np.empty(w.to_k.weight.shape, np.float32)
    for _ in range(2):
        place[:] = torch.randn(place.shape) * 0.3
        freed_and_back(w.to_k.weight, place)
        w.check()


def freed_and_back(weight: nn.Parameter, place: Any) -> None:
    """Free a weight's storage, then let it have a new one over the memory of an array."""
    weight.data = torch.empty(0)
    weight.data = torch.from_numpy(place)


def weight_transposed(w: World) -> None:
    """A view of the same storage at the same address."""
    weight = getattr(w.attn.to_q, "base_layer", w.attn.to_q).weight
    weight.data = weight.data.t()


def query_weight(w: World) -> None:
    with torch.no_grad():
        getattr(w.attn.to_q, "base_layer", w.attn.to_q).weight.mul_(0.9)


def out_bias(w: World) -> None:
    with torch.no_grad():
        getattr(w.attn.to_out[0], "base_layer", w.attn.to_out[0]).bias.add_(0.5)


def weight_replaced(w: World) -> None:
    w.to_k.weight = nn.Parameter(torch.randn_like(w.to_k.weight) * 0.3)
    gc.collect()


def module_replaced(w: World) -> None:
    if w.adapter == "none":
        w.attn.to_v = nn.Linear(32, w.attn.to_v.out_features, bias=False)


def hook_on_a_projection(w: World) -> None:
    handle = w.to_k.register_forward_hook(lambda module, args, out: out * 2)
    w.check()
    handle.remove()


def hook_on_all_modules(w: World) -> None:
    to_k = w.to_k
    handle = register_module_forward_hook(lambda module, args, out: out * 2 if module is to_k else None)
    w.check()
    handle.remove()


def lora(w: World) -> None:
    """Added, then disabled and enabled in turn."""
    if w.adapter == "none":
        w.unet.add_adapter(peft.LoraConfig(**LORA), "one")
        w.unet.eval()
        w.adapter = "on"
    elif w.adapter == "on":
        w.unet.disable_adapters()
        w.adapter = "off"
    else:
        w.unet.enable_adapters()
        w.adapter = "on"


def lora_scaled(w: World) -> None:
    w.run = lambda: w.unet(w.x, 5, w.text, cross_attention_kwargs={"scale": 0.25}).sample
    w.check()
    w.run = w.plain


def lora_fused(w: World) -> None:
    if w.adapter == "on":
        w.unet.fuse_lora()
        w.check()
        w.unet.unfuse_lora()


def lora_fused_and_unloaded(w: World) -> None:
    """The modules are then those of before, with other numbers, and no forward has seen anything between."""
    if w.adapter == "none":
        w.unet.add_adapter(peft.LoraConfig(**LORA), "one")
        w.unet.eval()
        w.unet.fuse_lora()
        w.unet.unload_lora()


def lora_deleted(w: World) -> None:
    if w.adapter != "none":
        w.unet.enable_adapters()
        w.unet.delete_adapters("one")
        w.adapter = "none"


def there_and_back_in_bfloat16(w: World) -> None:
    w.unet.to(torch.bfloat16)
    x, text, other = w.x, w.text, w.other
    w.x, w.text, w.other = x.bfloat16(), text.bfloat16(), other.bfloat16()
    w.check()
    w.unet.to(torch.float32)
    w.x, w.text, w.other = x, text, other


def refresh(w: World) -> None:
    if w.patch is not None:
        w.patch.refresh()


EVENTS = (
    new_text, freed_text, same_values, two_texts_in_turn, edit_in_place, edit_data, text_from_inference_mode,
    edit_inference_text, run_in_inference_mode, run_under_autocast, weight_in_place, weight_data_and_new_prompt,
    weight_data, weight_storage_freed, weight_transposed, query_weight, out_bias, weight_replaced, module_replaced,
    hook_on_a_projection, hook_on_all_modules, lora, lora_scaled, lora_fused, lora_deleted, lora_fused_and_unloaded,
    there_and_back_in_bfloat16, refresh,
)  # fmt: skip


# What leaves no trace where a look would wait for the device; `Patch.refresh` is for that.
UNSEEN = (edit_data, weight_data, lora_fused_and_unloaded)


@pytest.mark.parametrize("bare, fold", [(False, "never"), (False, "always"), (True, "always")])
@pytest.mark.parametrize("looking", ["free", "dear"])
@pytest.mark.filterwarnings("ignore")
def test_whatever_happens(
    parts: dict[str, Any], bare: bool, fold: str, looking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """looking: on a CPU, and as on a GPU, where texts are known by their memory."""
    if looking == "dear":
        dear(monkeypatch)
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]

    @settings(max_examples=6, deadline=None, suppress_health_check=quiet, derandomize=True)
    @example(EVENTS)
    @given(st.lists(st.sampled_from(EVENTS), min_size=3, max_size=7))
    def run(events: Sequence[Callable[[World], None]]) -> None:
        torch.manual_seed(0)
        # Where nothing can be kept, "always" has nothing to fold and says so; that is tested by itself.
        unkept = {run_under_autocast, hook_on_a_projection, hook_on_all_modules}
        if fold == "always":
            events = [event for event in events if event not in unkept]
        if looking == "dear":
            events = [event for event in events if event not in UNSEEN]
        world = World(parts["small"], bare, fold)
        world.check()
        world.check()
        for event in events:
            event(world)
            world.check()

    run()


def dear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the cache take the CPU for a device that it would have to wait for."""

    def look(*tensors: Tensor) -> bool:
        raise AssertionError("a look at the numbers of a text")

    for module in ("places", "patching.text_cache"):
        monkeypatch.setattr(f"sdattn_fast.{module}.looking_is_free", lambda device: False)
    monkeypatch.setattr("sdattn_fast.places._equal", look)
    monkeypatch.setattr(Weights, "sampled_alike", look)


@pytest.mark.parametrize("event", UNSEEN, ids=lambda event: event.__name__)
def test_refresh_is_for_what_leaves_no_trace(
    event: Callable[[World], None], parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    dear(monkeypatch)
    world = World(parts["small"], bare=False, fold="never")
    world.check()
    event(world)
    with pytest.raises(AssertionError):
        world.check()
    refresh(world)
    world.check()


@pytest.fixture
def cached(parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any, list[int]]]:
    """A patched UNet, its cache, and how often a layer's `to_k` ran."""
    unet = copy.deepcopy(parts["small"])
    calls: list[int] = []
    to_k = unet.get_submodule(LAYER).to_k
    linear = F.linear

    def counting(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if weight is to_k.weight:
            calls.append(1)
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", counting)  # of another forward, a subclass or a hook, nothing would be kept
    with sdattn_fast.apply(unet) as patch:
        yield unet, patch, calls


def test_keys_are_computed_once_a_prompt(cached: tuple[Any, Any, list[int]]) -> None:
    unet, patch, calls = cached
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32)
    with torch.no_grad():
        for _ in range(3):
            unet(x, 5, text)
        assert len(calls) == 1
        unet(x, 5, text.clone())
        assert len(calls) == 1
        unet(x, 5, torch.randn(2, 77, 32))
        assert len(calls) == 2
        patch.refresh()
        unet(x, 5, text)
        assert len(calls) == 3
    unet(x, 5, text)
    unet(x, 5, text)
    assert len(calls) == 5, "with gradients nothing is kept"


def test_where_a_look_is_dear_a_text_is_its_memory(
    cached: tuple[Any, Any, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    dear(monkeypatch)
    unet, patch, calls = cached
    x, both = torch.randn(2, 4, 8, 8), torch.randn(4, 77, 32)

    def computed(text: Tensor) -> int:
        calls.clear()
        with torch.no_grad():
            unet(x, 5, text)
        return len(calls)

    assert computed(both[:2]) == 1
    assert computed(both[:2]) == 0, "another view of the same"
    assert computed(both.view(2, 2, 77, 32)[0]) == 0
    assert computed(both[2:]) == 1 and computed(both[:2]) == 0 and computed(both[2:]) == 0, "two in turn"
    assert computed(both[:2].clone()) == 1
    both[3] += 1
    assert computed(both[2:]) == 1, "written to through another view"
    with torch.inference_mode():
        unversioned = torch.randn(2, 77, 32)
        assert computed(unversioned) == 1 and computed(unversioned) == 1, "no writes are counted there"
    assert patch._models[0].text.cached.bytes() > 0


def test_memory_is_bounded_and_freed(cached: tuple[Any, Any, list[int]]) -> None:
    unet, patch, _ = cached
    cache = patch._models[0].text.cached
    with torch.no_grad():
        sizes = []
        for _ in range(TEXTS + 3):
            unet(torch.randn(2, 4, 8, 8), 5, torch.randn(2, 77, 32))
            sizes.append(cache.bytes())
    assert sizes[0] > 0 and sizes[TEXTS - 1] == sizes[-1]
    patch.remove()
    assert cache.bytes() == 0


def test_training_gives_the_uncached_gradients(parts: dict[str, Any]) -> None:
    grads = []
    for cache in (True, False):
        unet = copy.deepcopy(parts["small"])
        torch.manual_seed(0)
        x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32, requires_grad=True)
        with sdattn_fast.apply(unet, text_cache=cache):
            with torch.no_grad():
                unet(x, 5, text)
            for _ in range(2):
                unet(x, 5, text).sample.square().mean().backward()
        grads.append([text.grad, *(p.grad for p in unet.parameters() if p.grad is not None)])
    assert len(grads[0]) > 10
    for mine, plain in zip(*grads, strict=True):
        assert torch.equal(mine, plain)


def test_always_says_why_it_cannot(parts: dict[str, Any]) -> None:
    unet = copy.deepcopy(parts["small"])
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32)
    with sdattn_fast.apply(unet, fold="always"):
        with pytest.raises(ValueError, match="fold: 'always' needs text that stands still"):
            unet(x, 5, text)
        with torch.no_grad(), pytest.raises(ValueError, match="fold: 'always' cannot be served, because"):
            unet.to(torch.float64)(x.double(), 5, text.double())


@pytest.mark.parametrize("fold", ["never", "always"])
def test_threads_with_texts_of_their_own(parts: dict[str, Any], fold: str) -> None:
    """Two threads share one UNet; what each looks at last is not what the other computes from."""
    unet: Any = copy.deepcopy(parts["small"])
    unet.set_attn_processor(_stock())
    x, texts = torch.randn(2, 4, 8, 8), [torch.randn(2, 77, 32) for _ in range(3)]
    with torch.no_grad():
        want = [unet(x, 5, text).sample for text in texts]
    wrong: list[Any] = []

    def work(first: int) -> None:
        with torch.no_grad():
            for i in range(8):
                which = (first + i // 2) % 3
                error = float((unet(x, 5, texts[which]).sample - want[which]).norm() / want[which].norm())
                if not error < 1e-4:
                    wrong.append((first, i, error))

    with sdattn_fast.apply(unet, fold=fold):
        side_by_side(work, range(2))
    assert not wrong


def test_a_look_by_another_thread_between(parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst moment for it: after this thread's look, before its layer asks."""
    cache, other = TextCache(), torch.randn(1, 3, 4)
    attn, text = nn.Linear(4, 4), torch.randn(1, 3, 4)
    look = TextCache.look

    def look_twice(self: TextCache, x: Tensor) -> Any:
        mine = look(self, x)
        look(self, other)
        return mine

    look(cache, other)
    theirs = cache.find(attn, other, (attn,))
    monkeypatch.setattr(TextCache, "look", look_twice)
    mine = cache.find(attn, text, (attn,))
    assert mine is not None and theirs is not None and mine[0] != theirs[0]


def test_weights_that_want_gradients_later_get_them(parts: dict[str, Any]) -> None:
    """Kept while they were frozen, their keys and values have no part in a graph."""
    unet = copy.deepcopy(parts["small"]).requires_grad_(False)
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32)
    with sdattn_fast.apply(unet, Program(SalienceDropout(0.3))):
        unet(x, 3, text)
        unet.requires_grad_(True)
        unet(x, 3, text)[0].sum().backward()
    grads = [p.grad for name, p in unet.named_parameters() if "attn2.to_k" in name]
    assert grads and all(grad is not None and grad.abs().max() > 0 for grad in grads)


def test_two_pipelines_on_one_unet(build: Callable[[str], Any], draw: Any, psnr: Any) -> None:
    one, two = build("small"), build("small")
    assert one.unet is two.unet
    stock = [draw(one, "a red car"), draw(two, "a blue dog")]
    with sdattn_fast.apply(one.unet):
        for _ in range(2):
            assert psnr(stock[0], draw(one, "a red car")) > 110
            assert psnr(stock[1], draw(two, "a blue dog")) > 110


def test_replicas_keep_nothing(parts: dict[str, Any]) -> None:
    """DataParallel's replicas hold tensors in their parameters' places, which nobody could watch."""
    attn = copy.deepcopy(parts["small"].get_submodule(LAYER))
    assert Weights.of(attn.to_k) is not None
    weight = attn.to_k.weight
    del attn.to_k._parameters["weight"]
    attn.to_k.weight = weight.detach().clone()
    assert Weights.of(attn.to_k) is None


def test_old_storages_are_not_kept_alive(cached: tuple[Any, Any, list[int]]) -> None:
    """What a model frees by moving away is free, though the cache knows its name."""
    unet, _, _ = cached
    with torch.no_grad():
        unet(torch.randn(2, 4, 8, 8), 5, torch.randn(2, 77, 32))
    weight = unet.get_submodule(LAYER).to_q.weight
    storage = StorageWeakRef(weight.untyped_storage())
    weight.data = weight.data.clone()
    assert storage.expired()


@pytest.mark.parametrize("fold", ["never", "always"])
def test_what_is_kept_is_announced_before_it_is_read_on_another_stream(
    fold: str, parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    announced: set[int] = set()
    monkeypatch.setattr(MadeOn, "use", lambda self, tensors: announced.update(id(x) for x in tensors()))
    monkeypatch.setattr(bound, "current_stream", partial(next, count()))
    unet: Any = copy.deepcopy(parts["small"])
    program = Program(SalienceDropout(0.2))
    patch = sdattn_fast.apply(unet, program, fold=fold, protected=torch.zeros(77, dtype=torch.bool))
    text = torch.randn(2, 77, 32)
    with torch.no_grad():
        for _ in range(2):
            announced.clear()
            unet(torch.randn(2, 4, 8, 8), 5, text)
    layers = list(patch._models[0].text.cached._entries.values())
    assert layers
    for entry in (entry for of_layer in layers for entry in of_layer.values()):
        assert entry.served is not None and entry.served.prepared.plan is not None
        read = [entry.key, entry.value, entry.served.value_folded, entry.served.prepared.plan.rows.content]
        read += [x for fold in entry.folds.values() for x in fold.tensors()]
        assert {id(x) for x in read} <= announced


def test_weights_know_their_storages_and_strides() -> None:
    """Without a look at the numbers, which a GPU gets at new prompts alone."""
    linear = nn.Linear(4, 4, bias=False)

    def kept() -> Weights:
        weights = Weights.of(linear)
        assert weights is not None
        weights.sample()
        return weights

    assert kept().same_as(kept())
    place = np.zeros((4, 4), np.float32)
    freed_and_back(linear.weight, place)
    before = kept()
    for _ in range(50):  # the allocator would give the storage's own place again, were it not kept from it
        freed_and_back(linear.weight, place)
        assert linear.weight.data_ptr() == place.ctypes.data
        assert not before.same_as(kept())
    before = kept()
    linear.weight.data = linear.weight.data.t()
    assert linear.weight.data_ptr() == before.parameters[0].data_ptr()
    assert not before.same_as(kept())
