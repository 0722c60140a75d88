"""Folded layers give what unfolded ones give: every kind, on odd sizes, against float64 and against diffusers' own."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sdattn_fast
from sdattn_fast import Capture, Program, Refinement, SalienceDropout, SemanticAttnProcessor
from sdattn_fast.execute import Prepared
from sdattn_fast.folded_layer import call_folded, may_sum_heads
from sdattn_fast.functional import prepare
from sdattn_fast.patching.fold import KINDS, Shape, choose_fold, fold_text, seconds_of
from sdattn_fast.patching.projections import key_value, query_of

B, H, D, C, E, N, GRID = 2, 3, 12, 37, 20, 19, (5, 9)
M = GRID[0] * GRID[1]

PROGRAMS = {
    "plain": Program(),
    "nms": Program(refine=Refinement(1, 0.4, 0.0), renormalize="content"),
    "dropout": Program(SalienceDropout(0.3), renormalize="row"),
    "smooth": Program(SalienceDropout(0.2), Refinement(1, 0.2, 0.7), "content"),
    "random": Program(SalienceDropout(0.4, mode="random")),
}


def _attn(q_bias: bool = False) -> Any:
    from diffusers.models.attention_processor import Attention

    attn = Attention(C, E, heads=H, dim_head=D, bias=q_bias).eval()
    return attn.requires_grad_(False)


def _prepared(program: Program, **keywords: Any) -> Prepared:
    generator = torch.Generator().manual_seed(1)
    protected = torch.ones(B, N, dtype=torch.bool)
    protected[:, 1:9] = False
    phrases = torch.full((B, N), -1)
    phrases[:, 2:4] = 0
    text = {"protected": protected, "phrases": phrases, "gate": torch.rand(B, N, generator=generator) + 0.5}
    text |= {"active": torch.tensor([True, False]), **keywords}
    return prepare(program, batch=B, heads_count=H, tokens=N, device=torch.device("cpu"), seed=7, **text)


def _folded(attn: Any, kind: str, prepared: Prepared, x: Tensor, text: Tensor, mask: Tensor | None) -> tuple[Any, Any]:
    fold = fold_text(attn, kind, *key_value(attn, text), prepared)
    out, maps = call_folded(prepared, x if fold.shared_query else query_of(attn, x), fold, bias=mask, grid=GRID)
    if not fold.summed:
        out = attn.to_out[0](out.transpose(1, 2).reshape(B, M, -1))
    return out, maps


def _unfolded(attn: Any, prepared: Prepared, x: Tensor, text: Tensor, mask: Tensor | None) -> tuple[Any, Any]:
    out, maps = prepared(query_of(attn, x), *key_value(attn, text), bias=mask, grid=GRID)
    return attn.to_out[0](out.transpose(1, 2).reshape(B, M, -1)), maps


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("heads", [None, [0, 2]], ids=["all", "some"])
def test_kinds_and_programs(kind: str, program: str, heads: Any) -> None:
    attn, x, text = _attn(q_bias=True), torch.randn(B, M, C), torch.randn(B, N, E)
    mask = torch.randn(B, 1, 1, N)
    prepared = _prepared(PROGRAMS[program], heads=heads, inactive_heads="zero", capture=Capture((2, 5)))
    exact, exact_maps = _unfolded(attn.double(), _prepared64(prepared), x.double(), text.double(), mask.double())
    got, maps = _folded(attn.float(), kind, prepared, x, text, mask)
    torch.testing.assert_close(got, exact.float(), atol=3e-6, rtol=1e-5)
    torch.testing.assert_close(maps, exact_maps, atol=2e-6, rtol=1e-5)


def _prepared64(prepared: Prepared) -> Prepared:
    side = prepared.side
    return Prepared(prepared.program, side, None, prepared.capture, "reference", prepared.seed)


def test_smoothing_of_some_heads_does_not_commute_with_their_sum() -> None:
    assert may_sum_heads(_prepared(PROGRAMS["smooth"]))
    assert may_sum_heads(_prepared(PROGRAMS["smooth"], heads=[0], inactive_heads="zero"))
    assert not may_sum_heads(_prepared(PROGRAMS["smooth"], heads=[0]))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_bfloat16_is_as_good_as_stock(kind: str) -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0

    errors = {"stock": 0.0, "ours": 0.0}
    for _ in range(8):
        attn, x, text = _attn(), torch.randn(B, M, C).bfloat16(), torch.randn(B, N, E).bfloat16()
        attn = attn.bfloat16()
        exact = AttnProcessor2_0()(attn.double(), x.double(), text.double())
        attn = attn.bfloat16()
        stock = AttnProcessor2_0()(attn, x, text)
        ours, _ = _folded(attn, kind, _prepared(Program(), gate=None, phrases=None), x, text, None)
        errors["stock"] += float((stock - exact).square().mean())
        errors["ours"] += float((ours - exact).square().mean())
    assert errors["ours"] <= 1.5**2 * errors["stock"]


def test_rows_whose_channels_are_not_contiguous() -> None:
    attn, text, prepared = _attn(), torch.randn(B, N, E), _prepared(PROGRAMS["nms"])
    x = torch.randn(B, C, M).transpose(1, 2)
    got, _ = _folded(attn, "both", prepared, x, text, None)
    want, _ = _folded(attn, "both", prepared, x.contiguous(), text, None)
    assert torch.equal(got, want)


def test_one_head_and_one_pixel() -> None:
    from diffusers.models.attention_processor import Attention

    attn = Attention(C, E, heads=1, dim_head=D).eval().requires_grad_(False)
    x, text = torch.randn(1, 1, C), torch.randn(1, N, E)
    prepared = prepare(PROGRAMS["nms"], batch=1, heads_count=1, tokens=N, device=torch.device("cpu"))
    fold = fold_text(attn, "both", *key_value(attn, text), prepared)
    got, _ = call_folded(prepared, x, fold)
    out, _ = prepared(query_of(attn, x), *key_value(attn, text))
    torch.testing.assert_close(got, attn.to_out[0](out.transpose(1, 2).reshape(1, 1, -1)), atol=1e-6, rtol=1e-5)


def test_packed_for_another_instruction_set_is_refused() -> None:
    from sdattn_fast.backend import cpu

    isas = cpu.info()["isas"]
    assert isinstance(isas, list)
    attn, x, text, prepared = _attn(), torch.randn(B, M, C), torch.randn(B, N, E), _prepared(Program())
    fold = fold_text(attn, "both", *key_value(attn, text), prepared)
    now = str(cpu.info()["isa"])
    try:
        cpu.set_isa("portable")
        if now == "portable":
            assert isas == ["portable"]
            return
        with pytest.raises(ValueError, match=f"packed: laid out for {now}"):
            call_folded(prepared, x, fold)
    finally:
        cpu.set_isa(now)


def test_adapters_are_folded_in() -> None:
    peft = pytest.importorskip("peft")
    attn, x, text, prepared = _attn(), torch.randn(B, M, C), torch.randn(B, N, E), _prepared(PROGRAMS["nms"])
    config = peft.LoraConfig(r=3, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, attn)
    attn.eval()
    want, _ = _unfolded(attn, prepared, x, text, None)
    got, _ = _folded(attn, "both", prepared, x, text, None)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_folding_pays_where_the_text_is_narrower_than_the_channels() -> None:
    """With equal rates the choice is the flops': H * N < C + N, and the kinds order as flops and calls do."""
    narrow = Shape(2, 256, 8, 77, 160, 1280, 1280, 1280, torch.bfloat16)
    wide = Shape(2, 4096, 8, 77, 40, 320, 320, 320, torch.bfloat16)
    assert choose_fold(narrow) == "both"
    assert choose_fold(wide) == "none"
    assert choose_fold(narrow, may_out=False) == "query"
    assert choose_fold(narrow, may_query=False) == "out"
    assert choose_fold(narrow, may_query=False, may_out=False) == "none"
    for shape in (narrow, wide):
        once, twice = (seconds_of(Shape(**{**shape.__dict__, "batch": b}), "both") for b in (1, 2))
        assert once < twice < 2.01 * once
    few = Shape(2, 4096, 2, 77, 40, 320, 320, 320, torch.bfloat16)
    assert choose_fold(few) == "both", "heads that are zero cost nothing"


@pytest.mark.parametrize("head_dim", [1, 2, 3])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_narrow_heads_are_as_diffusers_has_them(heads: int, head_dim: int) -> None:
    """With a head dimension of 1 the products that fold come out permuted."""
    from diffusers.models.attention_processor import Attention

    channels = heads * head_dim
    attn = Attention(channels, E, heads=heads, dim_head=head_dim).eval().requires_grad_(False)
    x, text = torch.randn(B, M, channels), torch.randn(B, N, E)
    stock = attn(x, text)
    for fold in ("never", "auto", "always"):
        attn.set_processor(SemanticAttnProcessor(Program(), fold=fold))
        for laid in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
            torch.testing.assert_close(attn(laid, text), stock, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("cheap_to_fold")
@pytest.mark.parametrize("which", [("to_q",), ("to_out.0",), ("to_k", "to_v"), ("to_q", "to_k", "to_v", "to_out.0")])
@pytest.mark.parametrize("fold", ["never", "auto"])
def test_quantised_projections_are_called_and_never_read(which: tuple[str, ...], fold: str) -> None:
    """Their `weight` is a method, their `bias` no parameter: read as a Linear's, the bias lands in the weights."""
    attn, x, text = _layer()
    for name in which:
        _replace(attn, name, torch.ao.nn.quantized.dynamic.Linear.from_float(_quantisable(attn.get_submodule(name))))
    stock = attn(x, text)
    attn.set_processor(SemanticAttnProcessor(Program(), fold=fold))
    for _ in range(2):
        torch.testing.assert_close(attn(x, text), stock, rtol=1e-5, atol=1e-6)
    attn.set_processor(SemanticAttnProcessor(Program(), fold="always"))
    with pytest.raises(ValueError, match=r"fold: 'always'.*torch\.ao\.nn\.quantized\.dynamic\.modules\.linear\.Linear"):
        attn(x, text)


@pytest.mark.usefixtures("cheap_to_fold")
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
def test_a_dynamically_quantised_unet(parts: dict[str, Any]) -> None:
    unet = torch.ao.quantization.quantize_dynamic(copy.deepcopy(parts["small"]), {torch.nn.Linear})
    inputs = torch.randn(2, 4, 8, 8), 5, torch.randn(2, 77, 32)
    with torch.no_grad():
        stock = unet(*inputs).sample
        with sdattn_fast.apply(unet):
            for _ in range(2):
                torch.testing.assert_close(unet(*inputs).sample, stock, rtol=1e-5, atol=1e-5)
        with sdattn_fast.apply(unet, fold="always"), pytest.raises(ValueError, match=r"to_k is a torch\.ao\.nn"):
            unet(*inputs)


@pytest.mark.usefixtures("cheap_to_fold")
@pytest.mark.parametrize("name", ["to_q", "to_k", "to_out.0"])
def test_modules_of_a_class_that_is_not_known_are_called(name: str) -> None:
    """As of bitsandbytes, quanto, GGUF: subclasses of Linear, whose forward is their own and whose state nobody sees
    change."""
    attn, x, text = _layer()
    inner = attn.get_submodule(name)
    mine = _Turned(inner.in_features, inner.out_features, bias=inner.bias is not None)
    mine.load_state_dict(inner.state_dict())
    _replace(attn, name, mine.requires_grad_(False))
    stocks = []
    for sign in (1.0, -1.0):
        mine.sign = sign
        stocks.append(attn(x, text))
    assert not torch.allclose(*stocks, atol=1e-2)
    attn.set_processor(SemanticAttnProcessor(Program()))
    for sign, stock in zip((1.0, -1.0), stocks, strict=True):
        mine.sign = sign
        torch.testing.assert_close(attn(x, text), stock, rtol=1e-5, atol=1e-6)
    attn.set_processor(SemanticAttnProcessor(Program(), fold="always"))
    with pytest.raises(ValueError, match=r"fold: 'always'.*_Turned"):
        attn(x, text)


class _Turned(torch.nn.Linear):
    sign = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.sign * super().forward(x).roll(1, -1)


@pytest.mark.usefixtures("cheap_to_fold")
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_forward_that_is_put_over_torchs_own(wrapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As LoRA loaders outside diffusers do it, for all Linear layers at once and at any time."""
    attn, x, text = _layer()
    forward, sign = torch.nn.Linear.forward, [1.0]

    def over_it(self: Any, x: Tensor) -> Tensor:
        return sign[0] * forward(self, x)

    attn_of_stock = copy.deepcopy(attn)
    attn.set_processor(SemanticAttnProcessor(Program()))
    attn(x, text)
    monkeypatch.setattr(torch.nn.Linear, "forward", functools.wraps(forward)(over_it) if wrapped else over_it)
    stocks = []
    for sign[0] in (1.0, -1.0, 0.5):
        stocks.append(attn_of_stock(x, text))
        torch.testing.assert_close(attn(x, text), stocks[-1], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(stocks[0], stocks[2], atol=1e-2)


@pytest.mark.usefixtures("cheap_to_fold")
@pytest.mark.parametrize("how", ["parametrize", "weight_norm", "layerwise casting", "hook", "forward"])
@pytest.mark.parametrize("name", ["to_q", "to_k", "to_out.0"])
def test_linears_that_are_more_than_their_class_are_called(name: str, how: str) -> None:
    attn, x, text = _layer()
    linear = attn.get_submodule(name)
    if how == "parametrize":
        torch.nn.utils.parametrize.register_parametrization(linear, "weight", torch.nn.Tanh())
    elif how == "weight_norm":
        torch.nn.utils.weight_norm(linear)
    elif how == "layerwise casting":
        from diffusers.hooks import apply_layerwise_casting

        apply_layerwise_casting(linear, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=())
    elif how == "hook":
        linear.register_forward_hook(lambda module, args, out: 2 * out)
    else:
        forward = linear.forward
        linear.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]
    stock = attn(x, text)
    attn.set_processor(SemanticAttnProcessor(Program()))
    for _ in range(2):
        torch.testing.assert_close(attn(x, text), stock, rtol=1e-5, atol=1e-6)
    attn.set_processor(SemanticAttnProcessor(Program(), fold="always"))
    with pytest.raises(ValueError, match="fold: 'always'"):
        attn(x, text)


@pytest.mark.usefixtures("cheap_to_fold")
def test_keys_and_values_are_kept_beside_a_query_projection_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    attn, x, text = _layer()
    _replace(attn, "to_q", torch.ao.nn.quantized.dynamic.Linear.from_float(_quantisable(attn.to_q)))
    attn.set_processor(SemanticAttnProcessor(Program()))
    calls: list[int] = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, weight, bias: calls.append(id(weight)) or linear(x, weight, bias))
    first, second = attn(x, text), attn(x, text)
    assert torch.equal(first, second)
    assert calls.count(id(attn.to_k.weight)) == calls.count(id(attn.to_v.weight)) == 1


@pytest.fixture
def cheap_to_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where "auto" folds whatever may be folded."""
    from sdattn_fast.patching import cross_attention

    monkeypatch.setattr(cross_attention, "choose_fold", lambda shape, may_out=True: "both" if may_out else "query")


def _layer() -> tuple[Any, Tensor, Tensor]:
    return _attn(q_bias=True), torch.randn(B, M, C), torch.randn(B, N, E)


def _quantisable(linear: Any) -> Any:
    linear.qconfig = torch.ao.quantization.default_dynamic_qconfig
    return linear


def _replace(attn: Any, name: str, module: Any) -> None:
    parent, _, last = name.rpartition(".")
    setattr(attn.get_submodule(parent) if parent else attn, last, module)
