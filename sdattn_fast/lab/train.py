"""Train a lab's pipeline: `python -m sdattn_fast.lab.train --world objects`.

Stages, each seeded, each with checkpoints that survive a kill: the autoencoder, its decoder alone, the UNet together
with the text encoder, a CLIP vision tower fitted to that text encoder, which is then locked, and for the world
"objects" the detector that judges its pictures. Two CPU cores take hours; a GPU minutes. On CPUs a process a core is
faster than several threads: `OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m sdattn_fast.lab.train`. What a step
draws depends on the seed and the step's number alone: a resumed run draws what an uninterrupted one would, and more
steps than before go on from where it ended.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file

from ..loading import quiet_loading
from .loop import Schedule, load_average, say, write_tensors
from .objects.detector import PixelNouns
from .objects.faults import Faults
from .parts import build_clip, build_scheduler, build_text_encoder, build_vae
from .stages import both, text_state, train_clip, train_decoder, train_detector, train_unet, train_vae
from .training_set import TrainingSet
from .worlds import world_of

__all__ = ["train"]

_STAGES = ("all", "vae", "decoder", "unet", "clip", "detector", "save")


def train(
    world: Annotated[str, typer.Option(help="shapes or objects.")] = "shapes",
    out: Annotated[Path | None, typer.Option(help="Folder of the pipeline, by default named after the world.")] = None,
    stage: Annotated[str, typer.Option(help=", ".join(_STAGES))] = "all",
    vae_steps: Annotated[int, typer.Option()] = 1500,
    decoder_steps: Annotated[int, typer.Option(help="The encoder stays.")] = 3000,
    unet_steps: Annotated[int, typer.Option()] = 5000,
    clip_steps: Annotated[int, typer.Option()] = 1200,
    detector_steps: Annotated[int, typer.Option(help="Of the judge (objects).")] = 3000,
    vae_batch: Annotated[int, typer.Option(help="Scenes a step.")] = 16,
    decoder_batch: Annotated[int, typer.Option()] = 32,
    unet_batch: Annotated[int, typer.Option()] = 32,
    clip_batch: Annotated[int, typer.Option()] = 128,
    detector_batch: Annotated[int, typer.Option()] = 32,
    scenes: Annotated[int, typer.Option(help="How many training scenes to draw from.")] = 12000,
    learning_rate: Annotated[float, typer.Option(help="Of each stage, between warm-up and decay.")] = 1e-3,
    phantom: Annotated[float, typer.Option(help="Share of captions that name what is not there (objects).")] = 0.0,
    omitted: Annotated[float, typer.Option(help="Share that leave out what is there (objects).")] = 0.0,
    swapped: Annotated[float, typer.Option(help="Share that swap two colours (objects).")] = 0.0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 250,
    seed: Annotated[int, typer.Option()] = 0,
    device: Annotated[str, typer.Option(help="cpu, or such as cuda.")] = "cpu",
    bf16: Annotated[bool, typer.Option(help="Forward passes under autocast.")] = False,
) -> None:
    """Train, or go on with training, and save the pipeline in half precision."""
    if stage not in _STAGES:
        raise typer.BadParameter(f"expected one of {', '.join(_STAGES)}, got {stage!r}", param_hint="--stage")
    sizes = {
        "vae": vae_batch,
        "decoder": decoder_batch,
        "unet": unet_batch,
        "clip": clip_batch,
        "detector": detector_batch,
    }
    for name, value in {"scenes": scenes, **{f"{name}-batch": size for name, size in sizes.items()}}.items():
        if value < 1:
            raise typer.BadParameter(f"expected at least 1, got {value}", param_hint=f"--{name}")
    try:
        of = world_of(world, Faults(phantom, omitted, swapped))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    out = out or Path(world)
    folder = out / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    tokenizer = of.build_tokenizer()
    parts = {
        "vae": build_vae(),
        "unet": of.build_unet(),
        "text_encoder": build_text_encoder(tokenizer),
        "clip": build_clip(tokenizer),
    }
    parts = {name: part.to(device) for name, part in parts.items()}
    drawn = TrainingSet(of.draw, scenes, seed, tokenizer, device)
    how: dict[str, Any] = {"save_every": save_every, "bf16": bf16}

    def schedule(steps: int) -> Schedule:
        return Schedule(learning_rate, steps)

    if drawn.labels is not None:
        detector = PixelNouns().to(device)
        if stage in ("all", "detector"):
            train_detector(detector, drawn, schedule(detector_steps), folder, detector_batch, **how)
        if (folder / "detector.safetensors").exists():
            load_average(detector, folder / "detector.safetensors")
            weights = {key: t.half() for key, t in detector.state_dict().items()}
            write_tensors(out / "detector.safetensors", weights)
    if stage == "detector":
        return
    if stage in ("all", "vae"):
        train_vae(parts["vae"], drawn, schedule(vae_steps), folder, vae_batch, **how)
    load_average(parts["vae"], folder / "vae.safetensors")
    if stage in ("all", "decoder"):
        train_decoder(parts["vae"], drawn, schedule(decoder_steps), folder, decoder_batch, **how)
    if (folder / "decoder.safetensors").exists():
        load_average(parts["vae"], folder / "decoder.safetensors")
    if stage in ("all", "unet"):
        train_unet(parts, drawn, schedule(unet_steps), folder, unet_batch, **how)
    if not (folder / "unet.safetensors").exists():
        say("nothing saved: there is no UNet yet")
        return
    load_average(both(parts), folder / "unet.safetensors")
    if stage in ("all", "clip"):
        train_clip(parts, drawn, schedule(clip_steps), folder, clip_batch, **how)
    if (folder / "clip.safetensors").exists():
        load_average(parts["clip"], folder / "clip.safetensors")
    _save(parts, tokenizer, folder, out)
    say(f"saved {out}")


def _save(parts: dict[str, Any], tokenizer: Any, folder: Path, out: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPImageProcessor

    vae = parts["vae"]
    scale = folder / "scale.safetensors"
    if scale.exists():
        vae.register_to_config(scaling_factor=1.0 / load_file(scale)["scale"].item())
    pipe: Any = StableDiffusionPipeline(
        vae=vae, text_encoder=parts["text_encoder"], tokenizer=tokenizer, unet=parts["unet"],
        scheduler=build_scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    clip = parts["clip"]
    clip.text_model.load_state_dict(text_state(parts["text_encoder"], clip))
    with quiet_loading():
        pipe.to("cpu", torch.float16, silence_dtype_warnings=True).save_pretrained(out)
        clip.to("cpu", torch.float16).save_pretrained(out / "clip")
    tokenizer.save_pretrained(out / "clip")
    side = {"height": 64, "width": 64}
    CLIPImageProcessor(
        do_resize=True, size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(out / "clip")


if __name__ == "__main__":
    typer.run(train)
