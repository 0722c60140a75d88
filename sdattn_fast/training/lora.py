"""Train a LoRA on a folder of pictures and captions, the program in place: salience dropout as a regulariser.

PEFT has the adapters, accelerate the devices, processes and precisions, diffusers the file. What is drawn at random in
a step follows from the seed and the step's number alone, so a run that was killed goes on as if it had not been.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..api import apply
from ..files import atomic_write
from ..guidance.pictures import encode_pictures
from ..program import Program
from .captions import CaptionedFolder

__all__ = ["LoraTraining", "train_lora"]

WEIGHTS = "pytorch_lora_weights.safetensors"
_CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class LoraTraining:
    """The settings of `train_lora`.

    Args:
        steps: Number of optimizer steps.
        batch: Pictures per forward pass and process.
        learning_rate: Learning rate of AdamW.
        warmup: Steps in which the learning rate grows linearly.
        accumulate: Forward passes per step.
        rank: Rank of the LoRA.
        alpha: The LoRA is scaled by alpha / rank. None: the rank.
        targets: Names of the modules that get a LoRA.
        size: (height, width) of the pictures in pixels. None: the model's.
        flip: Whether half of the pictures are mirrored.
        empty_captions: Share of captions that are replaced by "", for classifier-free guidance, in [0, 1].
        seed: Seed of everything that is drawn at random.
        dropout_when: When the program's salience dropout applies, as in `apply`.
        precision: Mixed precision by accelerate: "no", "bf16" or "fp16".
        gradient_checkpointing: Whether to save memory at the cost of time.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.

    Examples:
        >>> training = LoraTraining(steps=500, rank=16, precision="bf16", gradient_checkpointing=True)

    Source: LoRA, Hu et al. 2021, arXiv 2106.09685.
    """

    steps: int = 1000
    batch: int = 4
    learning_rate: float = 1e-4
    warmup: int = 0
    accumulate: int = 1
    rank: int = 8
    alpha: int | None = None
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    size: tuple[int, int] | None = None
    flip: bool = False
    empty_captions: float = 0.0
    seed: int = 0
    dropout_when: str | Mapping[int, float] = "training"
    precision: str = "no"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "rank"):
            _whole(name, getattr(self, name), 1)
        for name in ("warmup", "seed"):
            _whole(name, getattr(self, name), 0)
        if self.alpha is not None:
            _whole("alpha", self.alpha, 1)
        if not 0.0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate: expected a number > 0, got {self.learning_rate!r}")
        if not 0.0 <= self.empty_captions <= 1.0:
            raise ValueError(f"empty_captions: expected a share in [0, 1], got {self.empty_captions!r}")
        if self.precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"precision: expected 'no', 'bf16' or 'fp16', got {self.precision!r}")
        if not self.targets:
            raise ValueError("targets: expected at least one module's name, got none")


def train_lora(
    pipe: Any,
    data: str | Path | CaptionedFolder,
    out: str | Path,
    training: LoraTraining | None = None,
    program: Program = Program(),
    *,
    save_every: int = 100,
    tell: Callable[[int, float], None] | None = None,
) -> Path:
    """Train a LoRA for a pipeline's UNet, with the program in place, and write it for ``pipe.load_lora_weights(out)``.

    A checkpoint in `out` lets an interrupted run continue, with the same result as one that was not interrupted.

    Args:
        pipe: A pipeline of Stable Diffusion 1.x, 2.x or XL. Its UNet keeps the trained adapter.
        data: A folder of pictures and captions, as `CaptionedFolder` describes.
        out: The folder to write to.
        training: The settings. None: the defaults.
        program: The program of every cross-attention layer; `training.dropout_when` says when its dropout applies.
        save_every: Steps between two checkpoints.
        tell: Called after each step with the number of steps done and the loss, in the main process.

    Returns:
        The path of the weights, a safetensors file.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, `out` has a checkpoint with other settings, or the loss is not
            finite.
        ImportError: If peft or accelerate is missing.

    Examples:
        >>> program = Program(SalienceDropout(0.1, mode="random"))
        >>> weights = train_lora(pipe, "pictures", "lora", LoraTraining(steps=500), program)

    Source: LoRA, Hu et al. 2021, arXiv 2106.09685. What dropout did in training is in docs/training.md.
    """
    try:
        from accelerate import Accelerator
        from diffusers import DDPMScheduler
        from diffusers.training_utils import cast_training_params
        from peft import LoraConfig
        from peft.utils import get_peft_model_state_dict
    except ImportError as error:
        raise ImportError("train_lora needs peft and accelerate: pip install 'sdattn-fast[train]'") from error
    training = LoraTraining() if training is None else training
    folder = data if isinstance(data, CaptionedFolder) else CaptionedFolder(data)
    if not hasattr(pipe, "unet") or not hasattr(type(pipe), "save_lora_weights"):
        raise TypeError(f"pipe: expected a diffusers pipeline with a UNet and LoRA, got {type(pipe).__name__}")
    _whole("save_every", save_every, 1)
    if program.dropout is None and training.dropout_when != "training":
        raise ValueError(f"dropout_when: {training.dropout_when!r} says when to drop, and the program has no dropout")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)

    accelerator = Accelerator(mixed_precision=training.precision, gradient_accumulation_steps=1)
    unet = pipe.unet
    for part in (unet, pipe.vae, pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
        if part is not None:
            part.requires_grad_(False)
    pipe.to(accelerator.device)
    with torch.random.fork_rng():
        torch.manual_seed(training.seed)
        config = LoraConfig(
            r=training.rank,
            lora_alpha=training.alpha or training.rank,
            init_lora_weights="gaussian",
            target_modules=list(training.targets),
        )
        unet.add_adapter(config)
    cast_training_params(unet, torch.float32)
    if training.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    named = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    optimizer: Any = torch.optim.AdamW(named.values(), lr=training.learning_rate)
    checkpoint = _Checkpoint(out / _CHECKPOINT, named, optimizer, training, program, len(folder))
    start = checkpoint.load()
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    size = training.size or _native_size(pipe)

    with apply(pipe, program, dropout_when=training.dropout_when if program.dropout else "always") as patch:
        model, optimizer = accelerator.prepare(unet, optimizer)
        model.train()
        with torch.random.fork_rng():
            for step in range(start, training.steps):
                patch.step = step
                for group in optimizer.param_groups:
                    group["lr"] = training.learning_rate * min(1.0, (step + 1) / (training.warmup + 1))
                total = 0.0
                for part in range(training.accumulate):
                    place = (step * training.accumulate + part) * accelerator.num_processes + accelerator.process_index
                    torch.manual_seed(_mixed(training.seed, place))
                    chosen = _chosen(folder, place, training)
                    loss = _loss(pipe, model, schedule, folder, chosen, size, training) / training.accumulate
                    if not bool(torch.isfinite(loss)):
                        raise ValueError(
                            f"training: the loss is {loss.item()} at step {step}; a smaller learning_rate than "
                            f"{training.learning_rate} may help"
                        )
                    accelerator.backward(loss)
                    total += float(loss.detach())
                accelerator.clip_grad_norm_(list(named.values()), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                if accelerator.is_main_process:
                    if tell is not None:
                        tell(step + 1, total)
                    if (step + 1) % save_every == 0 or step + 1 == training.steps:
                        checkpoint.save(step + 1)
        accelerator.wait_for_everyone()
    unet.eval()
    if accelerator.is_main_process:
        from diffusers.utils import convert_state_dict_to_diffusers

        with _full_disk_said(out / WEIGHTS):
            type(pipe).save_lora_weights(
                str(out), unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
            )
    return out / WEIGHTS


def _loss(
    pipe: Any, model: Any, schedule: Any, folder: CaptionedFolder, chosen: list[int], size: tuple[int, int],
    training: LoraTraining,
) -> Tensor:  # fmt: skip
    """Of a batch, the mean squared error of what the scheduler's prediction type means."""
    device = pipe.unet.device
    with torch.no_grad():
        flips = torch.rand(len(chosen)) < 0.5
        pixels = torch.stack(
            [folder.picture(i, size, training.flip and bool(f)) for i, f in zip(chosen, flips, strict=True)]
        )
        latents = encode_pictures(pipe.vae, pixels, sample=True)
        empty = torch.rand(len(chosen)) < training.empty_captions
        captions = ["" if e else folder.caption(i) for i, e in zip(chosen, empty, strict=True)]
        text, conditions = _encoded(pipe, captions, size)
        noise = torch.randn_like(latents)
        t = torch.randint(int(schedule.config.num_train_timesteps), (len(chosen),), device=device)
        noisy = schedule.add_noise(latents, noise, t)
        kind = schedule.config.prediction_type
        if kind == "v_prediction":
            target = schedule.get_velocity(latents, noise, t)
        else:
            target = {"epsilon": noise, "sample": latents}[kind]
    prediction = model(noisy.to(pipe.unet.dtype), t, encoder_hidden_states=text, return_dict=False, **conditions)[0]
    return F.mse_loss(prediction.float(), target.float())


def _encoded(pipe: Any, captions: list[str], size: tuple[int, int]) -> tuple[Tensor, dict[str, Any]]:
    """The text and what else the UNet is told; from the pipeline itself, whose prompts the patch knows."""
    if getattr(pipe, "text_encoder_2", None) is None:
        return pipe.encode_prompt(captions, pipe.unet.device, 1, False)[0], {}
    text, _, pooled, _ = pipe.encode_prompt(captions, device=pipe.unet.device, do_classifier_free_guidance=False)
    ids = pipe._get_add_time_ids(
        size, (0, 0), size, text.dtype, text_encoder_projection_dim=pipe.text_encoder_2.config.projection_dim
    )
    ids = ids.to(text.device).repeat(len(captions), 1)
    return text, {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}


def _chosen(folder: CaptionedFolder, place: int, training: LoraTraining) -> list[int]:
    """The pictures of a batch: every epoch in an order of its own."""
    places = [divmod(i, len(folder)) for i in range(place * training.batch, (place + 1) * training.batch)]
    orders = {
        epoch: torch.randperm(len(folder), generator=torch.Generator().manual_seed(_mixed(training.seed, -1 - epoch)))
        for epoch in {epoch for epoch, _ in places}
    }
    return [int(orders[epoch][within]) for epoch, within in places]


def _mixed(seed: int, number: int) -> int:
    return (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9) % 2**63


def _native_size(pipe: Any) -> tuple[int, int]:
    sample = pipe.unet.config.sample_size
    height, width = (sample, sample) if isinstance(sample, int) else sample
    return int(height) * pipe.vae_scale_factor, int(width) * pipe.vae_scale_factor


@contextlib.contextmanager
def _full_disk_said(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(f"out: cannot write {path}: {error}; make room and call again, and it resumes") from error


class _Checkpoint:
    """LoRA weights, AdamW's moments and the number of steps done, with the settings that they belong to."""

    def __init__(
        self, path: Path, named: dict[str, Any], optimizer: Any, training: LoraTraining, program: Program, pictures: int
    ) -> None:
        self.path, self.named, self.optimizer = path, named, optimizer
        settings = asdict(training)
        settings.pop("steps")  # a run may be made longer
        self.settings = json.dumps({**settings, "program": repr(program), "pictures": pictures}, default=str)

    def save(self, step: int) -> None:
        from safetensors.torch import save_file

        tensors = {"step": torch.tensor(step)}
        for name, p in self.named.items():
            state = self.optimizer.state[p]
            tensors |= {f"weight/{name}": p, f"mean/{name}": state["exp_avg"], f"square/{name}": state["exp_avg_sq"]}
        tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
        with atomic_write(self.path) as temporary, _full_disk_said(self.path):
            save_file(tensors, temporary, {"settings": self.settings})

    def load(self) -> int:
        """The steps done, 0 without a checkpoint."""
        from safetensors import SafetensorError, safe_open

        if not self.path.exists():
            return 0
        try:
            with safe_open(self.path, "pt") as file:
                before = json.loads((file.metadata() or {}).get("settings", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"out: {self.path} is no checkpoint of a LoRA: {error}") from error
        now = json.loads(self.settings)
        changed = [name for name in now if before.get(name) != now[name]]
        if changed:
            changes = ", ".join(f"{name} {before.get(name)!r}, now {now[name]!r}" for name in changed)
            raise ValueError(f"out: {self.path} was made with other settings ({changes}); name another folder")
        step = int(tensors["step"])
        for name, p in self.named.items():
            p.data.copy_(tensors[f"weight/{name}"])
            self.optimizer.state[p] = {
                "step": torch.tensor(float(step)),
                "exp_avg": tensors[f"mean/{name}"].to(p.device),
                "exp_avg_sq": tensors[f"square/{name}"].to(p.device),
            }
        return step


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
