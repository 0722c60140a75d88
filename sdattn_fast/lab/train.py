"""Train the shapes pipeline: `python -m sdattn_fast.lab.train`.

Four stages, each seeded, each with checkpoints that survive a kill: the autoencoder, its decoder alone, the UNet
together with the text encoder, and a CLIP vision tower fitted to that text encoder, which is then locked. Two CPU cores
take a few hours; a GPU minutes. What a step draws depends on the seed and the step's number alone, so a resumed run
draws what an uninterrupted one would. More steps than before go on from where it ended.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..files import written_aside
from ..loading import quiet_loading
from .model import build_clip, build_scheduler, build_text_encoder, build_tokenizer, build_unet, build_vae
from .world import sample_scene

__all__ = ["train"]

_EMPTY_CAPTIONS = 0.1


def train(
    out: Annotated[Path, typer.Option(help="Folder of the pipeline; checkpoints in OUT/checkpoints.")] = Path("shapes"),
    stage: Annotated[str, typer.Option(help="all, vae, decoder, unet, clip or save.")] = "all",
    vae_steps: Annotated[int, typer.Option(help="Of 16 scenes.")] = 1500,
    decoder_steps: Annotated[int, typer.Option(help="Of 32 scenes; the encoder stays.")] = 3000,
    unet_steps: Annotated[int, typer.Option(help="Of 32 scenes.")] = 5000,
    clip_steps: Annotated[int, typer.Option(help="Of 128 scenes.")] = 1200,
    scenes: Annotated[int, typer.Option(help="How many training scenes to draw from.")] = 12000,
    learning_rate: Annotated[float, typer.Option(help="Peak of the cosine, of each stage.")] = 1e-3,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 250,
    seed: Annotated[int, typer.Option()] = 0,
    device: Annotated[str, typer.Option()] = "cpu",
) -> None:
    """Train, or go on with training, and save the pipeline in half precision."""
    if stage not in ("all", "vae", "decoder", "unet", "clip", "save"):
        raise typer.BadParameter(f"expected all, vae, decoder, unet, clip or save, got {stage!r}", param_hint="--stage")
    checkpoints = out / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    parts = {
        "vae": build_vae(),
        "unet": build_unet(),
        "text_encoder": build_text_encoder(tokenizer),
        "clip": build_clip(tokenizer),
    }
    parts = {name: part.to(device) for name, part in parts.items()}
    world = _World(scenes, seed, tokenizer, device)

    if stage in ("all", "vae"):
        _train_vae(parts["vae"], world, vae_steps, learning_rate, checkpoints, save_every, seed)
    _load_ema(parts["vae"], checkpoints / "vae.safetensors")
    if stage in ("all", "decoder"):
        _train_decoder(parts["vae"], world, decoder_steps, learning_rate, checkpoints, save_every, seed)
    if (checkpoints / "decoder.safetensors").exists():
        _load_ema(parts["vae"], checkpoints / "decoder.safetensors")
    if stage in ("all", "unet"):
        _train_unet(parts, world, unet_steps, learning_rate, checkpoints, save_every, seed)
    if not (checkpoints / "unet.safetensors").exists():
        _say("nothing saved: there is no UNet yet")
        return
    _load_ema(_both(parts), checkpoints / "unet.safetensors")
    if stage in ("all", "clip"):
        _train_clip(parts, world, clip_steps, learning_rate, checkpoints, save_every, seed)
    if (checkpoints / "clip.safetensors").exists():
        _load_ema(parts["clip"], checkpoints / "clip.safetensors")
    _save(parts, tokenizer, checkpoints, out)
    _say(f"saved {out}")


def _train_vae(vae: Any, world: _World, steps: int, rate: float, checkpoints: Path, save_every: int, seed: int) -> None:
    def loss(step: int) -> Tensor:
        picture = world.pictures(world.batch(step, 16))
        posterior = vae.encode(picture).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=_generator(seed, step)).to(picture.device)
        error = vae.decode(posterior.mean + posterior.std * noise).sample - picture
        return error.abs().mean() + error.square().mean() + 1e-6 * posterior.kl().mean()

    _loop("vae", vae, loss, steps, rate, checkpoints, save_every)


def _train_decoder(
    vae: Any, world: _World, steps: int, rate: float, checkpoints: Path, save_every: int, seed: int
) -> None:
    """The decoder alone, on the latents that the UNet learns: they stay, and it can go on as long as it gains."""
    latents = world.latents(vae, checkpoints)
    spread = _scale(latents)
    for parameter in (*vae.encoder.parameters(), *vae.quant_conv.parameters()):
        parameter.requires_grad_(False)

    def loss(step: int) -> Tensor:
        chosen = world.batch(step, 32)
        noise = torch.randn(latents[chosen].shape, generator=_generator(seed + 2, step))
        error = vae.decode((latents[chosen] + 0.03 * spread * noise).to(world.device)).sample - world.pictures(chosen)
        return error.abs().mean() + error.square().mean()

    _loop("decoder", vae, loss, steps, rate, checkpoints, save_every)


def _train_unet(
    parts: dict[str, Any], world: _World, steps: int, rate: float, checkpoints: Path, save_every: int, seed: int
) -> None:
    unet, text = parts["unet"], parts["text_encoder"]
    scheduler = build_scheduler()
    latents = world.latents(parts["vae"], checkpoints)
    latents = latents / _scale(latents)

    def loss(step: int) -> Tensor:
        chosen = world.batch(step, 32)
        generator = _generator(seed + 1, step)
        clean = latents[chosen].to(world.device)
        noise = torch.randn(clean.shape, generator=generator).to(world.device)
        when = torch.randint(1000, (len(chosen),), generator=generator).to(world.device)
        empty = torch.rand(len(chosen), generator=generator) < _EMPTY_CAPTIONS
        states = text(world.tokens(chosen, empty)).last_hidden_state
        guess = unet(scheduler.add_noise(clean, noise, when), when, states).sample
        return F.mse_loss(guess, scheduler.get_velocity(clean, noise, when))

    _loop("unet", _both(parts), loss, steps, rate, checkpoints, save_every)


def _train_clip(
    parts: dict[str, Any], world: _World, steps: int, rate: float, checkpoints: Path, save_every: int, seed: int
) -> None:
    clip = parts["clip"]
    clip.text_model.load_state_dict(_text_state(parts["text_encoder"], clip))
    for parameter in clip.text_model.parameters():
        parameter.requires_grad_(False)

    def loss(step: int) -> Tensor:
        chosen = world.batch(step, 128)
        captions = world.tokens(chosen, torch.zeros(len(chosen), dtype=torch.bool))
        return clip(input_ids=captions, pixel_values=world.pictures(chosen), return_loss=True).loss

    _loop("clip", clip, loss, steps, rate, checkpoints, save_every)


def _loop(
    name: str,
    model: nn.Module,
    loss: Callable[[int], Tensor],
    steps: int,
    rate: float,
    checkpoints: Path,
    save_every: int,
) -> None:
    """AdamW, warm-up and cosine, clipped gradients, an exponential moving average; resumes from its checkpoint."""
    named: dict[str, Tensor] = {key: p for key, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(named.values(), lr=rate, weight_decay=0.01)
    average = {key: p.detach().clone() for key, p in named.items()}
    path = checkpoints / f"{name}.safetensors"
    first = _resume(path, named, average, optimizer) if path.exists() else 0
    if first:
        _say(f"{name}: resumed at step {first}")
    model.train()
    seen, since = [], time.perf_counter()
    for step in _progress(name, range(first, steps), steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        value = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(list(named.values()), 1.0)
        optimizer.step()
        decay = min(0.999, (step + 1) / (step + 10))
        with torch.no_grad():
            for key, p in named.items():
                average[key].lerp_(p, 1 - decay)
        seen.append(value.item())
        if (step + 1) % save_every == 0 or step + 1 == steps:
            _checkpoint(path, step + 1, named, average, optimizer)
            took = (time.perf_counter() - since) / len(seen)
            _say(f"{name}: step {step + 1}/{steps}  loss {sum(seen) / len(seen):.4f}  {took:.2f} s a step")
            seen, since = [], time.perf_counter()


class _World:
    """The training scenes, drawn once; everything that a step takes from them is a function of its number."""

    def __init__(self, count: int, seed: int, tokenizer: Any, device: str) -> None:
        if count < 1:
            raise typer.BadParameter(f"expected at least 1, got {count}", param_hint="--scenes")
        self.device, self.seed = device, seed
        drawn = [sample_scene(seed * 1_000_000 + i) for i in _progress("scenes", range(count), count)]
        self.images = torch.from_numpy(np.stack([s.image for s in drawn]))
        captions = tokenizer([s.caption for s in drawn] + [""], padding="max_length", return_tensors="pt").input_ids
        self.captions, self.empty = captions[:-1], captions[-1]

    def batch(self, step: int, size: int) -> Tensor:
        return torch.randint(len(self.images), (size,), generator=_generator(self.seed, step))

    def pictures(self, chosen: Tensor) -> Tensor:
        """(n, 3, 64, 64) in [-1, 1]."""
        return (self.images[chosen].permute(0, 3, 1, 2).float() / 127.5 - 1).to(self.device)

    def tokens(self, chosen: Tensor, empty: Tensor) -> Tensor:
        return torch.where(empty[:, None], self.empty, self.captions[chosen]).to(self.device)

    def latents(self, vae: Any, checkpoints: Path) -> Tensor:
        """The posterior means of all scenes, (n, 4, 16, 16), kept beside the checkpoints for this autoencoder."""
        path = checkpoints / "latents.safetensors"
        of = load_file(checkpoints / "vae.safetensors")["step"]
        if path.exists():
            kept = load_file(path)
            if len(kept["latents"]) == len(self.images) and torch.equal(kept.get("vae_step", of), of):
                return kept["latents"]
        with torch.no_grad():
            means = [
                vae.encode(self.pictures(torch.arange(i, min(i + 64, len(self.images))))).latent_dist.mean.cpu()
                for i in _progress("latents", range(0, len(self.images), 64), len(self.images) // 64)
            ]
        latents = torch.cat(means).contiguous()
        _write(path, {"latents": latents, "vae_step": of})
        _write(checkpoints / "scale.safetensors", {"scale": _scale(latents).reshape(1)})
        return latents


def _scale(latents: Tensor) -> Tensor:
    return latents[:2000].std()


def _both(parts: dict[str, Any]) -> nn.Module:
    return nn.ModuleDict({"unet": parts["unet"], "text": parts["text_encoder"]})


def _text_state(text_encoder: nn.Module, clip: Any) -> dict[str, Tensor]:
    """The text encoder's weights under the names of CLIPModel's text tower, whichever way this release nests them."""
    want, have = clip.text_model.state_dict(), text_encoder.state_dict()
    return {key: have[key] if key in have else have[f"text_model.{key}"] for key in want}


def _checkpoint(path: Path, step: int, named: dict[str, Tensor], average: dict[str, Tensor], optimizer: Any) -> None:
    tensors = {"step": torch.tensor(step)}
    for key, p in named.items():
        state = optimizer.state[p]
        tensors |= {f"model/{key}": p, f"ema/{key}": average[key]}
        tensors |= {f"m/{key}": state["exp_avg"], f"v/{key}": state["exp_avg_sq"]}
    _write(path, {key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()})


def _resume(path: Path, named: dict[str, Tensor], average: dict[str, Tensor], optimizer: Any) -> int:
    tensors = load_file(path)
    step = int(tensors["step"])
    for key, p in named.items():
        p.data.copy_(tensors[f"model/{key}"])
        average[key].copy_(tensors[f"ema/{key}"])
        optimizer.state[p] = {
            "step": torch.tensor(float(step)),
            "exp_avg": tensors[f"m/{key}"].to(p.device),
            "exp_avg_sq": tensors[f"v/{key}"].to(p.device),
        }
    return step


def _load_ema(model: nn.Module, path: Path) -> None:
    tensors = load_file(path)
    for key, p in model.named_parameters():
        if f"ema/{key}" in tensors:
            p.data.copy_(tensors[f"ema/{key}"])
    model.eval()


def _save(parts: dict[str, Any], tokenizer: Any, checkpoints: Path, out: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPImageProcessor

    vae = parts["vae"]
    scale = checkpoints / "scale.safetensors"
    if scale.exists():
        vae.register_to_config(scaling_factor=1.0 / load_file(scale)["scale"].item())
    pipe: Any = StableDiffusionPipeline(
        vae=vae, text_encoder=parts["text_encoder"], tokenizer=tokenizer, unet=parts["unet"],
        scheduler=build_scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    clip = parts["clip"]
    clip.text_model.load_state_dict(_text_state(parts["text_encoder"], clip))
    with quiet_loading():
        pipe.to("cpu", torch.float16, silence_dtype_warnings=True).save_pretrained(out)
        clip.to("cpu", torch.float16).save_pretrained(out / "clip")
    tokenizer.save_pretrained(out / "clip")
    side = {"height": 64, "width": 64}
    CLIPImageProcessor(
        do_resize=True, size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(out / "clip")


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    with written_aside(path) as aside:
        save_file(tensors, aside)


def _generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def _progress(name: str, items: Iterable[int], total: int) -> Iterable[int]:
    from rich.console import Console
    from rich.progress import track

    console = Console()
    if not console.is_terminal:
        return items
    return track(items, description=name, total=total, console=console)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    typer.run(train)
