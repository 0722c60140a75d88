"""The stages in which a lab's pipeline is trained: what each minimises. `train` runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .loop import Schedule, fit, seeded
from .parts import build_scheduler
from .training_set import TrainingSet, scale_of

__all__ = [
    "noun_shares",
    "text_state",
    "train_clip",
    "train_decoder",
    "train_detector",
    "train_unet",
    "train_vae",
    "trained_part",
]

_EMPTY_CAPTIONS = 0.1
Parts = dict[str, Any]  # "vae", "unet", "text_encoder", "clip" and, of the world objects, "detector"


def train_vae(
    parts: Parts, scenes: TrainingSet, schedule: Schedule, folder: Path, batch: int, **fit_options: Any
) -> None:
    """Encoder and decoder: absolute and squared error, and a breath of the posterior's divergence."""
    vae = parts["vae"]

    def loss(step: int) -> Tensor:
        picture = scenes.pictures(scenes.batch(step, batch))
        posterior = vae.encode(picture).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=seeded(scenes.seed, step)).to(picture.device)
        error = vae.decode(posterior.mean + posterior.std * noise).sample.float() - picture
        return error.abs().mean() + error.square().mean() + 1e-6 * posterior.kl().float().mean()

    fit("vae", vae, loss, schedule, folder, **fit_options)


def train_decoder(
    parts: Parts, scenes: TrainingSet, schedule: Schedule, folder: Path, batch: int, **fit_options: Any
) -> None:
    """The decoder alone, on the latents that the UNet learns: they stay, and it can go on as long as it gains."""
    vae = parts["vae"]
    latents = scenes.latents(vae, folder)
    spread = scale_of(latents)
    for parameter in (*vae.encoder.parameters(), *vae.quant_conv.parameters()):
        parameter.requires_grad_(False)

    def loss(step: int) -> Tensor:
        chosen = scenes.batch(step, batch)
        noise = torch.randn(latents[chosen].shape, generator=seeded(scenes.seed + 2, step)).to(latents.device)
        error = vae.decode(latents[chosen] + 0.03 * spread * noise).sample.float() - scenes.pictures(chosen)
        return error.abs().mean() + error.square().mean()

    fit("decoder", vae, loss, schedule, folder, **fit_options)


def train_unet(
    parts: Parts,
    scenes: TrainingSet,
    schedule: Schedule,
    folder: Path,
    batch: int,
    *,
    compiles: bool = False,
    noun_loss: float = 0.0,
    **fit_options: Any,
) -> None:
    """The UNet together with the text encoder: velocity, a tenth of the captions empty. compiles: by torch.compile.

    A batch's timesteps lie one in each of as many equal parts of the schedule, which gives a loss of less variance.
    noun_loss: times the cross-entropy with which a linear layer on the features of the second up block tells the nouns
    of every latent pixel of the true scene. Representations that are supervised so are learnt many times faster (Yu et
    al. 2025, "Representation Alignment for Generation"); here the exact masks are the representation.
    """
    unet, text = parts["unet"], parts["text_encoder"]
    if scenes.device == "cpu":
        # The backward pass of torch's fused attention takes as long as all the rest of a step there.
        from diffusers.models.attention_processor import AttnProcessor

        unet.set_attn_processor(AttnProcessor())
        if hasattr(text, "set_attn_implementation"):  # transformers 4.48 has none
            text.set_attn_implementation("eager")
    trained, features, labels = trained_part(parts, "unet"), list[Tensor](), scenes.labels
    if noun_loss:
        assert labels is not None
        classes = 1 + int(labels.max())
        trained["nouns"] = nouns = nn.Conv2d(unet.config.block_out_channels[1], classes, 1).to(scenes.device)
        hook = unet.up_blocks[1].register_forward_hook(lambda _module, _inputs, output: features.append(output))

    def guess_of(noisy: Tensor, when: Tensor, states: Tensor) -> tuple[Tensor, Tensor | None]:
        features.clear()
        guess = unet(noisy, when, states).sample
        return guess, nouns(features[0]) if noun_loss else None

    if compiles:
        guess_of, text = torch.compile(guess_of), torch.compile(text)
    scheduler = build_scheduler()
    latents = scenes.latents(parts["vae"], folder)
    latents = latents / scale_of(latents)
    alphas = scheduler.alphas_cumprod.to(latents.device)
    signal, spread = alphas.sqrt()[:, None, None, None], (1 - alphas).sqrt()[:, None, None, None]

    def loss(step: int) -> Tensor:
        chosen = scenes.batch(step, batch)
        generator = seeded(scenes.seed + 1, step)
        clean = latents[chosen]
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        parts_of_schedule = torch.arange(batch) + torch.rand(batch, generator=generator)
        when = (parts_of_schedule * (len(alphas) / batch)).long().clamp(max=len(alphas) - 1).to(clean.device)
        empty = torch.rand(batch, generator=generator) < _EMPTY_CAPTIONS
        states = text(scenes.tokens(chosen, empty)).last_hidden_state
        guess, told = guess_of(signal[when] * clean + spread[when] * noise, when, states)
        error = F.mse_loss(guess.float(), signal[when] * noise - spread[when] * clean)
        if told is None or labels is None:
            return error
        return error + noun_loss * F.cross_entropy(told.float(), noun_shares(labels[chosen], told.shape))

    fit("unet", trained, loss, schedule, folder, **fit_options)
    if noun_loss:
        hook.remove()


def train_clip(
    parts: Parts, scenes: TrainingSet, schedule: Schedule, folder: Path, batch: int, **fit_options: Any
) -> None:
    """The vision tower alone, against the text encoder of the UNet, which is locked."""
    clip = parts["clip"]
    clip.text_model.load_state_dict(text_state(parts["text_encoder"], clip))
    for parameter in clip.text_model.parameters():
        parameter.requires_grad_(False)

    def loss(step: int) -> Tensor:
        chosen = scenes.batch(step, batch)
        captions = scenes.tokens(chosen)
        return clip(input_ids=captions, pixel_values=scenes.pictures(chosen), return_loss=True).loss

    fit("clip", clip, loss, schedule, folder, **fit_options)


def train_detector(
    parts: Parts, scenes: TrainingSet, schedule: Schedule, folder: Path, batch: int, **fit_options: Any
) -> None:
    """The judge of pictures: the noun of every pixel of true scenes, roughened; an eighth of a batch has no objects."""
    from .objects.detector import roughened, without_objects

    assert scenes.labels is not None
    network, labels = parts["detector"], scenes.labels

    def loss(step: int) -> Tensor:
        chosen, generator = scenes.batch(step, batch), seeded(scenes.seed + 3, step)
        pictures, nouns, empty = scenes.pictures(chosen), labels[chosen].long(), batch // 8
        pictures[:empty], nouns[:empty] = without_objects(pictures[:empty], generator), 0
        return F.cross_entropy(network(roughened(pictures, generator)).float(), nouns)

    fit("detector", network, loss, schedule, folder, **fit_options)


def noun_shares(labels: Tensor, shape: torch.Size) -> Tensor:
    """Which share of every latent pixel's area each noun has.

    labels: (n, height, width) uint8, of every pixel; shape: (n, nouns and the background, rows, columns).
    """
    n, classes, rows, columns = shape
    inside = labels.long().unflatten(2, (columns, -1)).unflatten(1, (rows, -1)).transpose(2, 3).flatten(3)
    ones = torch.ones(inside.shape, device=labels.device) / inside.shape[3]
    shares = torch.zeros(n, rows, columns, classes, device=labels.device)
    return shares.scatter_add_(3, inside, ones).permute(0, 3, 1, 2)


def trained_part(parts: Parts, stage: str) -> Any:
    """What a stage trains: UNet and text encoder as one module; otherwise the part that it is named after."""
    if stage == "unet":
        return nn.ModuleDict({"unet": parts["unet"], "text": parts["text_encoder"]})
    return parts["vae" if stage == "decoder" else stage]


def text_state(text_encoder: nn.Module, clip: Any) -> dict[str, Tensor]:
    """The text encoder's weights under the names of CLIPModel's text tower, whichever way this release nests them."""
    want, have = clip.text_model.state_dict(), text_encoder.state_dict()
    return {key: have[key] if key in have else have[f"text_model.{key}"] for key in want}
