"""GradCAM: held against stored maps in plain torch, round by round; the objectives; beside a pipeline's own run."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel

import sdattn_fast
from sdattn_fast import Capture, Program, Refinement, SalienceDropout
from sdattn_fast.guidance.objectives import ClipSimilarity, NoisePrediction, Presence
from sdattn_fast.guidance.relevance import Seen, gradcam
from sdattn_fast.reference import _smooth, row_program

TOKENS = 7
FULL = Program(SalienceDropout(0.3), Refinement(threshold=0.3), "content")


class Stored:
    """A processor in plain torch that keeps its probabilities, with their gradients."""

    def __init__(self, program: Program, bias: torch.Tensor | None = None) -> None:
        self.program, self.bias, self.p = program, bias, None

    def __call__(self, attn: Any, x: Any, encoder_hidden_states: Any = None, attention_mask: Any = None) -> Any:
        text = encoder_hidden_states
        query, key, value = (
            y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in (attn.to_q(x), attn.to_k(text), attn.to_v(text))
        )
        logits = query @ key.transpose(-1, -2) * attn.scale
        p = (logits if self.bias is None else logits + self.bias).softmax(-1)
        refine = self.program.refine
        rows = self.program if refine is None else replace(self.program, refine=replace(refine, sigma=0))
        self.p = p = row_program(p, rows, torch.ones(text.shape[:2], dtype=torch.bool))
        self.p.retain_grad()
        if refine is not None:  # the last smoothing comes after A
            p = _smooth(p, (8, 12) if x.shape[1] == 96 else (4, 6), refine.sigma)
        return attn.to_out[0]((p @ value).transpose(1, 2).flatten(2))


@pytest.fixture
def unet() -> UNet2DConditionModel:
    torch.manual_seed(1)
    model = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=8, cross_attention_dim=12,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=4,
    )  # fmt: skip
    # Weights that make rows far from uniform.
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "attn2.to_" in name:
                p.mul_(3.0)
    return model.requires_grad_(False).eval()


def inputs() -> tuple[torch.Tensor, int, torch.Tensor]:
    return torch.randn(2, 4, 8, 12), 40, torch.randn(2, TOKENS, 12)


def stored_relevance(unet, program, loss, x, t, text, tokens, heads, biases=None) -> dict[str, torch.Tensor]:
    """Layer -> (B, T, M)."""
    before = dict(unet.attn_processors)
    kept = {}
    for name, attn in unet.named_modules():
        if name.endswith("attn2"):
            kept[name] = Stored(program, None if biases is None else biases.get(name))
            attn.set_processor(kept[name])
    out = unet(x.requires_grad_(), t, text).sample
    loss(Seen(out, x, t, None)).backward()  # type: ignore[arg-type]
    unet.set_attn_processor(before)
    return {
        name: (s.p * s.p.grad.relu())[:, heads].sum(1)[..., tokens].transpose(1, 2).detach() for name, s in kept.items()
    }


def shift(seen: Seen) -> torch.Tensor:
    return (seen.prediction * torch.linspace(-1, 1, 12)).sum()


@pytest.mark.parametrize("program", [Program(), FULL], ids=["plain", "full"])
@pytest.mark.parametrize("heads", [None, (0, 2)], ids=["every head", "two heads"])
def test_equals_stored_maps(unet, program, heads) -> None:
    x, t, text = inputs()
    tokens = [1, 4, 5]
    want = stored_relevance(unet, program, shift, x.clone(), t, text, tokens, [0, 1, 2, 3] if heads is None else heads)
    got = gradcam(unet, x, t, text, shift, tokens=tokens, layers="*", heads=heads, program=program)
    assert set(got) == set(want) and got.tokens == tuple(tokens)
    for name, maps in got.items():
        assert maps.shape[:2] == (2, 3) and maps.shape[2] * 3 == maps.shape[3] * 2
        assert maps.max() > 0
        torch.testing.assert_close(maps.flatten(2), want[name], rtol=1e-3, atol=3e-4 * float(want[name].max()))
    assert not any(isinstance(p, sdattn_fast.SemanticAttnProcessor) for p in unet.attn_processors.values())


def test_rounds_take_the_salient_pixels_away_and_add_up(unet) -> None:
    x, t, text = inputs()
    tokens = [2, 3]
    first = stored_relevance(unet, Program(), shift, x.clone(), t, text, tokens, [0, 1, 2, 3])
    grids = {name: (8, 12) if maps.shape[2] == 96 else (4, 6) for name, maps in first.items()}
    pictures = [
        F.interpolate(m.mean(1).unflatten(-1, grids[n])[:, None], (8, 12), mode="bilinear") for n, m in first.items()
    ]
    mean = sum(pictures).flatten(1)
    k = round(0.1 * 96)
    dropped = (mean >= mean.topk(k).values[:, -1:]).view(2, 1, 8, 12).float()
    biases = {}
    for name, grid in grids.items():
        there = F.adaptive_max_pool2d(dropped, grid).flatten(2)[..., None]  # (B, 1, M, 1)
        of_tokens = torch.zeros(TOKENS)
        of_tokens[tokens] = 1
        biases[name] = torch.where(there * of_tokens > 0, float("-inf"), 0.0)
    second = stored_relevance(unet, Program(), shift, x.clone(), t, text, tokens, [0, 1, 2, 3], biases)
    got = gradcam(unet, x, t, text, shift, tokens=tokens, layers="*", rounds=2, drop=0.1)
    for name, maps in got.items():
        want = first[name] + second[name]
        torch.testing.assert_close(maps.flatten(2), want, rtol=1e-3, atol=3e-4 * float(want.max()))
    once = gradcam(unet, x, t, text, shift, tokens=tokens, layers="*")
    for name, maps in once.items():  # nothing of the rounds is left behind
        torch.testing.assert_close(maps.flatten(2), first[name], rtol=1e-3, atol=3e-4 * float(first[name].max()))


def test_noise_prediction_is_minus_the_error(unet) -> None:
    x, t, text = inputs()
    target = torch.randn(2, 4, 8, 12)
    prediction = unet(x, t, text).sample
    score = NoisePrediction(target)(Seen(prediction, x, t, None))  # type: ignore[arg-type]
    assert score.item() == pytest.approx(-((prediction - target) ** 2).mean().item(), rel=1e-6)
    assert max(maps.max() for maps in gradcam(unet, x, t, text, NoisePrediction(target)).values()) > 0


def test_presence_is_the_weakest_phrase_at_its_strongest_pixel(unet) -> None:
    x, t, text = inputs()
    presence = Presence([(1,), (3, 4)])
    layers = "*up_blocks.1*"
    values = []

    def score(seen: Seen) -> torch.Tensor:
        values.append((presence.strongest(seen), seen.maps.upsample((8, 12))))
        return presence(seen)

    with sdattn_fast.apply(unet, capture=Capture(tokens=(1, 3, 4), layers=layers)) as patch:
        maps = gradcam(patch, x, t, text, score, tokens=(1, 3, 4), layers=layers)
    by_entry, upsampled = values[0]
    strongest = torch.stack(by_entry)
    assert strongest.shape == (2, 2) and bool((strongest > 0).all())
    # Blurring cannot raise a maximum, and takes at most what eight neighbours of zero would.
    assert bool((strongest[:, 0] <= upsampled[:, 0].amax((1, 2))).all())
    assert bool((strongest[:, 0] >= 0.5 * upsampled[:, 0].amax((1, 2))).all())
    assert sum(float(m.sum()) for m in maps.values()) > 0
    weak = strongest.argmin(1)
    # The weakest phrase's tokens alone bear on the score directly; in the last layer nothing else does.
    last = maps[list(maps)[-1]]
    assert all(float(last[b, 0 if weak[b] else 1].abs().sum()) == 0 for b in range(2))


def test_clip_similarity_is_what_clip_says(pipe) -> None:
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    from sdattn_fast.lab import shapes_path

    folder = str(shapes_path() / "clip")
    clip = CLIPModel.from_pretrained(folder, torch_dtype=torch.float32).requires_grad_(False)
    tokenizer, processor = CLIPTokenizer.from_pretrained(folder), CLIPImageProcessor.from_pretrained(folder)
    caption = "a large red circle on a gray background"
    score = ClipSimilarity(pipe, clip, tokenizer, processor, caption)
    latents, t = torch.randn(1, 4, 16, 16), torch.tensor(300)
    with sdattn_fast.apply(pipe) as patch:
        text = pipe.encode_prompt(caption, "cpu", 1, False)[0]
        maps = gradcam(patch, latents, t, text, score, tokens=(3, 4))
        from sdattn_fast.guidance.relevance import run

        seen = run(patch, latents, t, text)
        value = score(seen)
    alpha = pipe.scheduler.alphas_cumprod[300]
    clean = alpha.sqrt() * latents - (1 - alpha).sqrt() * seen.prediction  # velocity
    image = pipe.image_processor.postprocess(pipe.vae.decode(clean / pipe.vae.config.scaling_factor).sample.detach())
    want = clip(
        pixel_values=processor(image, return_tensors="pt").pixel_values,
        input_ids=tokenizer([caption], padding="max_length", return_tensors="pt").input_ids,
    )
    want = (want.image_embeds * want.text_embeds).sum()
    assert value.item() == pytest.approx(want.item(), abs=0.01)  # its processor rounds to bytes
    assert sum(float(m.sum()) for m in maps.values()) > 0


def test_beside_a_run_it_leaves_no_trace(pipe) -> None:
    """The pictures and the maps of a run are the same, bit by bit, with GradCAM asked in between."""
    caption = "a large red circle on a gray background"

    def draw(ask: bool) -> tuple[torch.Tensor, torch.Tensor]:
        def between(pipe: Any, step: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
            if ask:
                text = pipe.encode_prompt(caption, "cpu", 1, False)[0] if step == 7 else kept["prompt_embeds"][1:]
                gradcam(patch, kept["latents"], t, text, shift16, tokens=(3,))
            return kept

        with sdattn_fast.apply(pipe, FULL, capture=Capture()) as patch:
            out = pipe(
                caption, num_inference_steps=3, output_type="latent", generator=torch.Generator().manual_seed(0),
                callback_on_step_end=between, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
            ).images  # fmt: skip
            return out, patch.maps.upsample()

    def shift16(seen: Seen) -> torch.Tensor:
        return (seen.prediction * torch.linspace(-1, 1, 16)).sum()

    for with_, without in zip(draw(True), draw(False), strict=True):
        torch.testing.assert_close(with_, without, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokens": (9,)}, "tokens: expected indices < 7"),
        ({"tokens": ()}, "tokens: expected indices < 7, at least one"),
        ({"layers": "middle"}, "layers: 'middle' matches none"),
        ({"heads": (4,)}, "heads: "),
        ({"rounds": 0}, "rounds: expected an int >= 1, got 0"),
        ({"drop": 1.0}, r"drop: expected a share in \(0, 1\), got 1.0"),
        ({"loss": lambda seen: seen.prediction}, "loss: expected a scalar tensor"),
        ({"loss": lambda seen: torch.zeros(())}, "loss: what it gave does not depend on the attention"),
        ({"loss": 3}, "loss: expected a callable, got int"),
        ({"text": torch.randn(1, 7, 12)}, "text: expected 2 entries"),
        ({"latents": torch.randn(4, 8, 8)}, "latents: expected"),
        ({"unet": "unet"}, "unet: expected a UNet or a Patch, got str"),
        ({"program": Program(refine=Refinement(3, 0.2))}, "backend: relevance comes from a fused backward kernel"),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_bad_input(unet, changes, said) -> None:
    x, t, text = inputs()
    given = {"unet": unet, "latents": x, "t": t, "text": text, "loss": shift} | changes
    with pytest.raises((TypeError, ValueError), match=said):
        gradcam(**given)


def test_inference_mode_is_refused_and_no_grad_is_not(unet) -> None:
    x, t, text = inputs()
    want = stored_relevance(unet, Program(), shift, x.clone(), t, text, [1, 4], [0, 1, 2, 3])
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"gradcam: .*leave that off \(torch.no_grad is"):
        gradcam(unet, x, t, text, shift, tokens=[1, 4], layers="*")
    assert not any(isinstance(p, sdattn_fast.SemanticAttnProcessor) for p in unet.attn_processors.values())
    with torch.no_grad():
        got = gradcam(unet, x, t, text, shift, tokens=[1, 4], layers="*")
    with torch.inference_mode():
        latents, texts, step = x.clone(), text.clone(), torch.tensor(t)
    of_inference = gradcam(unet, latents, step, texts, shift, tokens=[1, 4], layers="*")
    for name, maps in got.items():
        torch.testing.assert_close(maps.flatten(2), want[name], rtol=1e-3, atol=3e-4 * float(want[name].max()))
        torch.testing.assert_close(maps, of_inference[name])


def test_a_model_made_in_inference_mode_is_named(unet) -> None:
    x, t, text = inputs()
    with torch.inference_mode():
        made_there = copy.deepcopy(unet)
    with pytest.raises(RuntimeError, match=r"unet: its weights were made in torch\.inference_mode.*load it outside"):
        gradcam(made_there, x, t, text, shift, layers="*")
