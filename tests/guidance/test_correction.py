"""Corrections during sampling: the score grows, attention goes where it is relevant, and nothing stays behind."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import sdattn_fast
from sdattn_fast import Capture, Program, Refinement, SalienceDropout
from sdattn_fast.guidance.binding import Binding
from sdattn_fast.guidance.correction import Correction, _by_entry
from sdattn_fast.guidance.objectives import Presence
from sdattn_fast.guidance.phrases import NounPhrase, Word, find_phrases
from sdattn_fast.guidance.relevance import run
from sdattn_fast.guidance.segregation import Segregation

CAPTION = "a large red circle and a small blue square on a gray background"
PHRASES = [(3, 4), (8, 9)]
FULL = Program(SalienceDropout(0.1), Refinement(threshold=0.1), "content")

NOUNS = {"circle": (3,), "star": (7, 8)}


def draw(pipe: Any, callback: Any, captions: Any = CAPTION, **given: Any) -> torch.Tensor:
    return pipe(
        captions, num_inference_steps=4, output_type="latent", generator=torch.Generator().manual_seed(0),
        callback_on_step_end=callback, **given,
    ).images  # fmt: skip


@pytest.mark.parametrize("guidance_scale", [4.0, 1.0], ids=["guided", "unguided"])
def test_a_gradient_step_has_the_size_asked_and_raises_the_score(pipe, guidance_scale) -> None:
    seen = []
    with sdattn_fast.apply(pipe, FULL, capture=Capture()) as patch:
        presence = Presence(PHRASES)
        with Correction(patch, presence, steps=(1, 2), strength=0.02) as correct:

            def watched(pipe: Any, step: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
                after = correct(pipe, step, t, dict(kept))
                if step == 1:
                    inputs, _ = correct._next_inputs(pipe, kept["latents"], pipe.scheduler.timesteps[2])
                    t, text = inputs["timestep"], inputs["encoder_hidden_states"]
                    seen.extend(presence(run(patch, x, t, text)).item() for x in (kept["latents"], after["latents"]))
                    seen.append((after["latents"] - kept["latents"]).square().mean().sqrt().item())
                else:
                    assert after["latents"] is kept["latents"]
                return after

            draw(pipe, watched, guidance_scale=guidance_scale)
    before, after, size = seen
    assert after > before
    assert size == pytest.approx(0.02, rel=1e-3)


def test_reweighting_moves_attention_to_where_it_is_relevant(pipe) -> None:
    """And does so for the prompts alone, only at the next step, to the tokens named."""
    biases = []

    def maps(strength: float) -> list[torch.Tensor]:
        found = []
        with sdattn_fast.apply(pipe, capture=Capture(steps="latest")) as patch:
            with Correction(
                patch, Presence(PHRASES), how="reweight", steps=(1, 2), strength=strength, tokens=(4, 9)
            ) as c:

                def watched(pipe: Any, step: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
                    found.append(patch.maps.upsample().clone())
                    after = c(pipe, step, t, kept)
                    biases.append(list(patch.current_call.bias.values()))
                    return after

                draw(pipe, watched)
            assert not patch.current_call.bias
        return found

    plain, moved = maps(0.0), maps(0.8)
    *_, (zeros, at_1, at_2, at_3) = biases[:4], biases[4:]
    assert not at_2 and not at_3 and len(at_1) == 3 and not zeros
    for bias in at_1:
        assert bias.shape[:2] == (1, 1)  # the unconditional entry has none
        named = [4, 9]
        others = [i for i in range(77) if i not in named]
        assert bool((bias[0][..., others] == 0).all()) and bool((bias[0][..., named] != 0).any())
    for step in (0, 1):
        torch.testing.assert_close(moved[step], plain[step])
    weight = torch.nn.functional.interpolate(at_1[0][0, 0][:, 4].view(1, 1, 16, 16), plain[2].shape[-2:])[0, 0]
    change = (moved[2] - plain[2])[0, 4]
    assert torch.corrcoef(torch.stack([weight.flatten(), change.flatten()]))[0, 1] > 0.3


def test_the_original_formula_scales_all_latents_by_about_one_and_a_half(pipe) -> None:
    factors = []
    with sdattn_fast.apply(pipe, capture=Capture()) as patch:
        with Correction(patch, Presence(PHRASES), how="scale", steps=(0, 3)) as correct:

            def watched(pipe: Any, step: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
                after = correct(pipe, step, t, dict(kept))
                factors.append((after["latents"] / kept["latents"]).mean().item())
                return after

            draw(pipe, watched)
    assert factors[:3] == pytest.approx([1.5] * 3, abs=0.02) and factors[3] == 1.0


def test_strength_zero_leaves_the_picture(pipe) -> None:
    with sdattn_fast.apply(pipe, FULL, capture=Capture()) as patch:
        plain = draw(pipe, None)
        for how in ("gradient", "reweight"):
            with Correction(patch, Presence(PHRASES), how=how, strength=0.0, tokens=(4,)) as correct:
                torch.testing.assert_close(draw(pipe, correct), plain, rtol=1e-4, atol=1e-4)


def test_entries_have_phrases_and_tokens_of_their_own(pipe) -> None:
    """A batch of prompts is corrected as each prompt by itself."""
    captions = [CAPTION, "a small pink star on a black background"]
    phrases = [PHRASES, [(3, 4)]]
    tokens = [(4, 9), (4,)]

    def noise() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(i) for i in range(2)]

    def drawn(which: slice, how: str) -> torch.Tensor:
        with sdattn_fast.apply(pipe, capture=Capture()) as patch:
            with Correction(patch, Presence(phrases[which]), how=how, strength=0.3, tokens=tokens[which]) as correct:
                return pipe(
                    captions[which], num_inference_steps=3, output_type="latent", generator=noise()[which],
                    callback_on_step_end=correct,
                ).images  # fmt: skip

    for how in ("gradient", "reweight"):
        together = drawn(slice(0, 2), how)
        for i in range(2):
            torch.testing.assert_close(together[i : i + 1], drawn(slice(i, i + 1), how), rtol=2e-2, atol=2e-2)


def test_changes_are_repeated_until_each_picture_reaches_the_target(pipe) -> None:
    """And no longer: a picture that is there already does not move while the other one does."""
    captions, first, last = [CAPTION, "a small pink star on a black background"], [], []

    class Watched(Presence):
        def by_picture(self, seen: Any) -> torch.Tensor:
            scores = super().by_picture(seen)
            last.append(scores.tolist())
            return scores

    presence = Watched([PHRASES, [(3, 4)]])

    def drawn(**how: Any) -> list[torch.Tensor]:
        moved: list[torch.Tensor] = []
        last.clear()
        with sdattn_fast.apply(pipe, capture=Capture()) as patch:
            with Correction(patch, presence, steps=(1, 2), strength=0.004, **how) as correct:

                def watched(pipe: Any, step: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
                    after = correct(pipe, step, t, dict(kept))
                    moved.append((after["latents"] - kept["latents"]).abs().amax((1, 2, 3)))
                    return after

                draw(pipe, watched, captions)
        return moved

    drawn(targets={1: 0.0})
    (first,) = last  # looked at once, and nothing to do
    low, high = sorted(first)
    target = low + 0.5 * (high - low)  # one of them is there
    moved = drawn(targets={1: target}, repeats=50)
    assert 2 < len(last) < 51 and min(last[-1]) >= target > min(last[-2])
    short = first.index(low)
    assert moved[1][short] > 0 and moved[1][1 - short] == 0 and not moved[0].any() and not moved[2].any()
    drawn(targets={1: 1e9}, repeats=3)
    assert len(last) == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"targets": [0.5]}, "targets: expected {step: score}, got list"),
        ({"targets": {0: 0.5}, "how": "reweight", "strength": 0.5}, "targets: expected how='gradient', got 'reweight'"),
        ({"targets": {25: 0.5}}, "targets: expected steps from 0 to 24, got 25"),
        ({"targets": {True: 0.5}}, "targets: expected steps from 0 to 24, got True"),
        ({"targets": {1: float("nan")}}, "targets: of step 1: expected a finite number, got nan"),
        ({"targets": {1: 10**400}}, "targets: of step 1: expected a finite number"),
        ({"strength": 10**400}, "strength: expected a finite number"),
        ({"targets": {1: 0.5}, "score": max}, "score: targets need a score with by_picture"),
        ({"repeats": 0}, "repeats: expected at least 1, got 0"),
        ({"repeats": 2.0}, "repeats: expected an int, got float"),
        ({"how": "push"}, "how: expected one of"),
        ({"steps": (3, 3)}, "steps: expected 0 <= first < end"),
        ({"steps": 3}, "steps: expected"),
        ({"strength": -1.0}, "strength: expected a number in"),
        ({"how": "reweight", "strength": 2.0}, r"strength: expected a number in \[0, 1\]"),
        ({"score": "presence"}, "score: expected a callable"),
        ({"patch": None}, "patch: expected"),
    ],
    ids=str,
)
def test_bad_input(pipe, changes, said) -> None:
    with sdattn_fast.apply(pipe) as patch, pytest.raises((TypeError, ValueError), match=said):
        Correction(**({"patch": patch, "score": Presence(PHRASES)} | changes))


def test_presence_says_which_maps_it_misses(pipe) -> None:
    with sdattn_fast.apply(pipe) as patch, Correction(patch, Presence(PHRASES)) as correct:
        with pytest.raises(ValueError, match="phrases: expected maps of tokens"):
            draw(pipe, correct)
    with pytest.raises(ValueError, match="phrases: expected token indices"):
        Presence([()])


@pytest.mark.parametrize("how", ["gradient", "reweight", "scale"])
def test_inference_mode_is_refused_in_one_line(pipe, how) -> None:
    with (
        sdattn_fast.apply(pipe, capture=Capture()) as patch,
        Correction(patch, Presence(PHRASES), how=how, strength=0.5, tokens=(4, 9)) as correct,
        torch.inference_mode(),
        pytest.raises(RuntimeError, match=r"Correction: .*leave that off \(torch\.no_grad is fine\)"),
    ):
        draw(pipe, correct)
    assert not patch.current_call.bias


def test_presence_takes_phrases_as_they_are(pipe) -> None:
    first, second = ("a large red circle and a blue square", "a green star")
    found = [find_phrases(text, pipe.tokenizer) for text in (first, second)]
    nouns = [[phrase.tokens("noun") for phrase in some] for some in found]
    assert Presence(found[0]).phrases == Presence(nouns[0]).phrases == [nouns[0]]
    assert Presence(found).phrases == Presence(nouns).phrases == nouns
    assert Presence([found[0], []]).phrases == [nouns[0], []]
    for phrases in ("circle", ["circle"], None, [(1.5,)], [(True,)], 3, {1: 2}):
        with pytest.raises(TypeError, match="phrases: expected token indices of each phrase"):
            Presence(phrases)
    with pytest.raises(ValueError, match="phrases: expected token indices >= 0, got -1"):
        Presence([(-1,)])


def test_reweighting_takes_phrases_as_they_are() -> None:
    circle, star = (NounPhrase(text, (Word(text, "NN", 0, 1, tokens),), 0, 1) for text, tokens in NOUNS.items())
    assert _by_entry([circle, star], 1) == ([], [3, 7, 8])
    assert _by_entry([[circle], [star], []], 3) == ([[3], [7, 8], []], [3, 7, 8])
    assert _by_entry([(3,), (7, 8)], 2) == ([[3], [7, 8]], [3, 7, 8])


def test_relevance_is_reused_between_corrections(pipe) -> None:
    """Made after steps 1 and 3, it acts in the two steps that follow, and in none after the picture's end."""
    seen = []
    with sdattn_fast.apply(pipe, capture=Capture()) as patch:
        with Correction(
            patch, Presence(PHRASES), how="reweight", steps=(1, 4), every=2, strength=0.5, tokens=(4, 9)
        ) as correct:

            def watched(pipe: Any, step: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
                after = correct(pipe, step, t, kept)
                seen.append(dict(patch.current_call.biases).get(correct))
                return after

            for steps in (7, 5):
                pipe(CAPTION, num_inference_steps=steps, output_type="latent", callback_on_step_end=watched)
    longer, shorter = seen[:7], seen[7:]
    for made in (longer, shorter):
        assert made[0] is None and made[1] is made[2] is not None and made[3] is not None
        assert made[3] is not made[2]
    assert longer[3] is longer[4] and longer[5:] == [None, None]
    assert shorter[4] is None


@pytest.mark.parametrize("gives", [None, 3.0])
def test_a_score_that_gives_no_tensor(pipe, gives) -> None:
    with (
        sdattn_fast.apply(pipe) as patch,
        Correction(patch, lambda seen: gives) as correct,
        pytest.raises(TypeError, match="score: expected one that gives a tensor"),
    ):
        pipe("a red circle", num_inference_steps=2, callback_on_step_end=correct)


class Whole(Presence):
    """As `Presence`, of a forward to its end."""

    needs_prediction = True


def corrected_with(pipe: Any, score: Any, **given: Any) -> tuple[torch.Tensor, int]:
    """The latents after one correction, by maps of the way down, and how often the UNet's last layer ran."""
    ran: list[None] = []
    watching = pipe.unet.conv_out.register_forward_hook(lambda *of_call: ran.append(None))
    try:
        with sdattn_fast.apply(pipe, FULL, capture=Capture(layers="down_blocks.1.*")) as patch:
            with Correction(patch, score, steps=(1, 2)) as correct:
                latents = draw(pipe, correct, **given)
    finally:
        watching.remove()
    return latents, len(ran)


def test_a_forward_for_maps_alone_ends_with_them(pipe) -> None:
    early, ran_early = corrected_with(pipe, Presence(PHRASES))
    whole, ran_whole = corrected_with(pipe, Whole(PHRASES))
    assert torch.equal(early, whole)
    assert (ran_early, ran_whole) == (4, 5)


def hooked(pipe: Any) -> Any:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    add_hook_to_module(pipe.unet.mid_block, ModelHook())
    return lambda: remove_hook_from_module(pipe.unet.mid_block)


def checkpointed(pipe: Any) -> Any:
    pipe.unet.enable_gradient_checkpointing()
    return pipe.unet.disable_gradient_checkpointing


def compiled(pipe: Any) -> Any:
    pipe.unet.compile()
    return lambda: setattr(pipe.unet, "_compiled_call_impl", None)


def undone_by_a_hook(pipe: Any) -> Any:
    return pipe.unet.down_blocks[1].register_forward_hook(lambda *of_call: None).remove


def wrapped(pipe: Any) -> Any:
    block = pipe.unet.mid_block
    block.forward = functools.partial(block.forward)
    return lambda: delattr(block, "forward")


@pytest.mark.parametrize("waits", [hooked, checkpointed, compiled, undone_by_a_hook, wrapped])
def test_a_forward_whose_end_something_waits_for_runs_to_its_end(pipe, waits) -> None:
    with sdattn_fast.apply(pipe, FULL) as patch:
        assert patch.may_end_early()
    undo = waits(pipe)
    try:
        with sdattn_fast.apply(pipe, FULL) as patch:
            assert not patch.may_end_early()
    finally:
        undo()


def test_a_forward_that_ends_early_scales_loras_back(pipe) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    try:
        how = {"cross_attention_kwargs": {"scale": 0.5}}
        early, ran = corrected_with(pipe, Presence(PHRASES), **how)
        whole, _ = corrected_with(pipe, Whole(PHRASES), **how)
        assert ran == 4 and torch.equal(early, whole)
        scales = {x for m in pipe.unet.modules() for x in getattr(m, "scaling", {}).values()}
        assert scales == {4.0}  # alpha 8, rank 2
    finally:
        pipe.unet.unload_lora()


def test_only_the_forward_of_a_correction_ends_early(pipe) -> None:
    """A layer that is called by itself afterwards runs as ever."""
    attn = pipe.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn2
    x, text = torch.randn(1, 64, attn.to_q.in_features), torch.randn(1, 77, attn.to_k.in_features)
    with sdattn_fast.apply(pipe, capture=Capture(layers="down_blocks.1.*")) as patch:
        with Correction(patch, Presence(PHRASES), steps=(0, 1)) as correct:

            def after(pipe: Any, step: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
                kept = correct(pipe, step, t, kept)
                if step == 0:  # after the forward of the prompt alone
                    assert attn(x, text).shape == x.shape
                return kept

            draw(pipe, after)


def test_a_score_of_ones_own_may_read_the_prediction(pipe) -> None:
    class Mine(Presence):
        def by_picture(self, seen: Any) -> torch.Tensor:
            return super().by_picture(seen) - 1e-3 * seen.prediction.square().mean((1, 2, 3))

    assert corrected_with(pipe, Mine(PHRASES))[1] == 5
    assert not any(kind.needs_prediction for kind in (Presence, Segregation, Binding))
