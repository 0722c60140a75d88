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
from safetensors.torch import load_file, save_file

from ..files import atomic_write
from ..loading import quiet_loading
from .loop import Schedule, is_first, load_average, say, write_tensors
from .objects.detector import PictogramDetector, PixelNouns
from .objects.faults import Faults
from .parts import build_clip, build_scheduler, build_text_encoder, build_unet, build_vae
from .pipeline import load_clip, load_pipeline
from .stages import text_state, train_clip, train_decoder, train_detector, train_unet, train_vae, trained_part
from .tokenizer import write_vocabulary
from .training_set import TrainingSet
from .worlds import world_of

__all__ = ["train"]

_STAGES = ("all", "vae", "decoder", "unet", "clip", "detector", "save")


def train(
    world: Annotated[str, typer.Option(help="shapes or objects.")] = "shapes",
    out: Annotated[Path | None, typer.Option(help="Folder of the pipeline, by default named after the world.")] = None,
    stage: Annotated[str, typer.Option(help=", ".join(_STAGES))] = "all",
    start_from: Annotated[
        Path | None, typer.Option(help="A pipeline's folder, with whose weights begins what has no checkpoint yet.")
    ] = None,
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
    noun_loss: Annotated[
        float, typer.Option(help="Weight of telling the nouns of every latent pixel, while the UNet trains (objects).")
    ] = 0.0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 250,
    seed: Annotated[int, typer.Option()] = 0,
    device: Annotated[str, typer.Option(help="cpu, or such as cuda.")] = "cpu",
    bf16: Annotated[bool, typer.Option(help="Forward passes under autocast.")] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="The UNet by torch.compile: minutes at first, and a third faster.")
    ] = False,
) -> None:
    """Train, or go on with training, and save the pipeline in half precision."""
    if stage not in _STAGES:
        raise typer.BadParameter(f"expected one of {', '.join(_STAGES)}, got {stage!r}", param_hint="--stage")
    plan = {
        "vae": (vae_steps, vae_batch),
        "decoder": (decoder_steps, decoder_batch),
        "unet": (unet_steps, unet_batch),
        "clip": (clip_steps, clip_batch),
        "detector": (detector_steps, detector_batch),
    }
    for name, value in {"scenes": scenes, **{f"{name}-batch": batch for name, (_, batch) in plan.items()}}.items():
        if value < 1:
            raise typer.BadParameter(f"expected at least 1, got {value}", param_hint=f"--{name}")
    try:
        chosen_world = world_of(world, Faults(phantom, omitted, swapped))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if not 0.0 <= noun_loss < float("inf") or (noun_loss and world != "objects"):
        raise typer.BadParameter(
            f"expected 0, or a number above it with --world objects, got {noun_loss}", param_hint="--noun-loss"
        )
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    out = out or Path(world)
    folder = out / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    tokenizer = chosen_world.build_tokenizer()
    parts = {
        "detector": PixelNouns() if world == "objects" else None,
        "vae": build_vae(),
        "unet": build_unet(chosen_world.channels),
        "text_encoder": build_text_encoder(tokenizer),
        "clip": build_clip(tokenizer),
    }
    if start_from is not None:
        _start_from(parts, tokenizer, start_from)
    parts = {name: part.to(device) for name, part in parts.items() if part is not None}
    drawn = TrainingSet(chosen_world.draw, scenes, seed, tokenizer, device)
    trainers = {"detector": train_detector, "vae": train_vae, "decoder": train_decoder, "unet": train_unet}
    for name, run in {**trainers, "clip": train_clip}.items():
        if name == "detector" and "detector" not in parts:
            continue
        if stage in ("all", name):
            steps, batch = plan[name]
            if name in ("decoder", "unet") and start_from is None and not (folder / "vae.safetensors").exists():
                raise typer.BadParameter("expected vae first: there is no autoencoder yet", param_hint="--stage")
            options = {"compiles": compiled, "noun_loss": noun_loss} if name == "unet" else {}
            run(
                parts, drawn, Schedule(learning_rate, steps), folder, batch, save_every=save_every, bf16=bf16, **options
            )
        if (folder / f"{name}.safetensors").exists():
            load_average(trained_part(parts, name), folder / f"{name}.safetensors")
    if not is_first():
        return
    if "detector" in parts and (start_from is not None or (folder / "detector.safetensors").exists()):
        weights = {key: t.half() for key, t in parts["detector"].state_dict().items()}
        write_tensors(out / "detector.safetensors", weights)
    if start_from is None and not (folder / "unet.safetensors").exists():
        say("no pipeline saved: there is no UNet yet")
        return
    _save(parts, tokenizer, folder, out)
    say(f"saved {out}")


def _start_from(parts: dict[str, Any], tokenizer: Any, folder: Path) -> None:
    """The weights of a pipeline, of its CLIP and of its detector, into the parts."""
    pipe, (clip, _) = load_pipeline(folder=folder), load_clip(folder=folder)
    if pipe.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise typer.BadParameter(f"{folder} has another vocabulary than this world", param_hint="--start-from")
    for name, source in {"vae": pipe.vae, "unet": pipe.unet, "text_encoder": pipe.text_encoder, "clip": clip}.items():
        parts[name].load_state_dict(source.state_dict())
    if parts["detector"] is not None:
        parts["detector"] = PictogramDetector.load(folder).network


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
    for config in (out / "text_encoder" / "config.json", out / "clip" / "config.json"):
        # transformers 5 loads in the dtype that it reads here, and the UNet is loaded in float32.
        config.write_text(config.read_text().replace('dtype": "float16"', 'dtype": "float32"'))
    _name_as_transformers_4(out / "text_encoder" / "model.safetensors")
    tokenizer.save_pretrained(out / "clip")
    for saved in (out / "tokenizer", out / "clip"):
        write_vocabulary(saved)
    side = {"height": 64, "width": 64}
    CLIPImageProcessor(
        do_resize=True, size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(out / "clip")


def _name_as_transformers_4(weights: Path) -> None:
    """Version 5 reads these names too; version 4 takes unread weights for a warning, and draws with random ones."""
    tensors = load_file(weights)
    with atomic_write(weights) as temporary:
        prefixed = {name if name.startswith("text_model.") else f"text_model.{name}": t for name, t in tensors.items()}
        save_file(prefixed, temporary, metadata={"format": "pt"})


if __name__ == "__main__":
    typer.run(train)
