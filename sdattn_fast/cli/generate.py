"""`sdattn-fast generate`: a picture from any diffusers pipeline, through the program."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated, Any

import typer

from ..files import atomic_write
from .options import (
    DropoutAxis,
    DropoutMode,
    Guidance,
    Model,
    NumSteps,
    Ratio,
    RefineAxis,
    Renormalize,
    Sigma,
    Steps,
    Threshold,
    check_out_file,
    program_of,
    sampling_options,
    within,
)

__all__ = ["generate", "pipeline_of"]

MOST_PIXELS = 8192  # of a side


def generate(
    prompt: Annotated[str, typer.Option(help="What to draw.")],
    model: Model = "shapes",
    negative_prompt: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the latents and of random dropout.", callback=within(0, 2**63 - 1))
    ] = 0,
    num_inference_steps: NumSteps = None,
    guidance_scale: Guidance = None,
    height: Annotated[
        int | None, typer.Option(help="Height in pixels; default: the model's.", callback=within(1, MOST_PIXELS))
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="Width in pixels; default: the model's.", callback=within(1, MOST_PIXELS))
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if available.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; default: float16 on cuda.")] = None,
    backend: Annotated[str, typer.Option(help="auto, triton, cuda, cpu or reference.")] = "auto",
    lora: Annotated[
        str | None,
        typer.Option(help="LoRA to load: a folder of `sdattn-fast train-lora`, or anything that diffusers loads."),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also save the stock picture of the same seed.")] = False,
    out: Annotated[Path, typer.Option(help="Output file.")] = Path("picture.png"),
    dropout_ratio: Ratio = None,
    dropout_axis: DropoutAxis = "token",
    dropout_mode: DropoutMode = "topk",
    refine_steps: Steps = 1,
    threshold: Threshold = None,
    sigma: Sigma = None,
    refine_axis: RefineAxis = "token",
    renormalize: Renormalize = "none",
    recipe: Annotated[
        str | None,
        typer.Option(
            help="objects, binding, both or fast: correct the picture between its steps, as sdattn_fast.apply does."
        ),
    ] = None,
    program_file: Annotated[
        Path | None,
        typer.Option("--program", help="File of `sdattn-fast tune`, in place of the program options."),
    ] = None,
) -> None:
    """Draw a picture with a diffusers pipeline and a program."""
    import torch

    from .. import Program, apply
    from ..files import ProgramFile
    from ..loading import quiet_loading

    program = program_of(
        dropout_ratio, dropout_axis, dropout_mode, refine_steps, threshold, sigma, refine_axis, renormalize
    )
    file = ProgramFile(program)
    if program_file is not None:
        if program != Program():
            raise typer.BadParameter("expected a file or options that say a program, got both", param_hint="--program")
        file = ProgramFile.load(program_file)
    chosen = None
    if recipe is not None:  # before a model is loaded
        from ..guidance import Recipe

        chosen = Recipe.named(recipe)
    if not prompt.strip():
        raise typer.BadParameter("expected some words, got an empty prompt", param_hint="--prompt")
    if not out.suffix and (not out.exists() or out.is_file()):  # neither a folder nor a device
        out = out.with_name(f"{out.name}.png")
    check_out_file(out)
    picture_format = _format_of(out)
    pipe = pipeline_of(model, device, dtype)
    if lora is not None:
        try:
            with quiet_loading():
                pipe.load_lora_weights(lora)
        except Exception as error:  # of diffusers, peft, safetensors, or whatever speaks with the hub
            raise ValueError(f"lora: expected a folder or hub id of a LoRA, got {lora!r}: {error}") from error
    call_kwargs: dict[str, Any] = {"prompt": prompt, **_size_options(pipe, height, width)}
    if negative_prompt is not None:
        call_kwargs["negative_prompt"] = negative_prompt
    call_kwargs |= sampling_options(model, num_inference_steps, guidance_scale)

    # The stock picture is what the pipeline gives without the file; an option on the command line holds for both.
    tuned = dict(call_kwargs)
    if num_inference_steps is None and file.num_inference_steps is not None:
        tuned["num_inference_steps"] = file.num_inference_steps
    if guidance_scale is None and file.guidance_scale is not None:
        tuned["guidance_scale"] = file.guidance_scale

    def draw(call_kwargs: dict[str, Any]) -> Any:
        return pipe(**call_kwargs, generator=torch.Generator("cpu").manual_seed(seed)).images[0]

    if compare:
        # What does not fit the model is said before the stock picture is drawn.
        apply(pipe, file, recipe=chosen, seed=seed, backend=backend).remove()
        _save(draw(call_kwargs), out.with_name(f"{out.stem}.stock{out.suffix}"), picture_format)
    with apply(pipe, file, recipe=chosen, seed=seed, backend=backend):
        _save(draw(tuned), out, picture_format)


def pipeline_of(model: str, device: str | None = None, dtype: str | None = None) -> Any:
    """`DiffusionPipeline.from_pretrained` on a folder or hub id, or one of the lab's pipelines.

    Raises: ValueError for a dtype, device or folder that is not there; OSError, from diffusers, for other models.
    """
    import torch

    from ..lab.pipeline import WORLDS, load_pipeline
    from ..loading import checked_device

    device = checked_device(device)
    dtype = dtype or ("float16" if device.startswith("cuda") else "float32")
    if dtype not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"dtype: expected float32, float16 or bfloat16, got {dtype!r}")
    kind = getattr(torch, dtype)
    if (not model or model.startswith((".", "~")) or Path(model).is_absolute()) and not Path(model or "?").is_dir():
        raise ValueError(f"model: expected a folder, a hub id, 'shapes' or 'objects', and there is no folder {model!r}")
    if model in WORLDS:
        return load_pipeline(kind, world=model).to(device)
    try:
        import diffusers
        from packaging.version import Version
    except ImportError as error:
        raise ImportError("generate needs diffusers: pip install 'sdattn-fast[diffusers]'") from error
    new = Version(diffusers.__version__) >= Version("0.42.0")
    load_options: dict[str, Any] = {"dtype" if new else "torch_dtype": kind, "use_safetensors": True}
    return diffusers.DiffusionPipeline.from_pretrained(model, **load_options).to(device)


def _size_options(pipe: Any, height: int | None, width: int | None) -> dict[str, int]:
    """Both sides where one is named: diffusers ignores one without the other.

    Raises: BadParameter where a side is no multiple of what a latent's pixel covers.
    """
    if height is None and width is None:
        return {}
    from ..patching.model_kinds import denoisers

    factor = int(getattr(pipe, "vae_scale_factor", 8))
    model: Any = next(iter(denoisers(pipe).values()))
    sample = model.config.sample_size
    sides = (sample, sample) if isinstance(sample, int) else sample
    size = {}
    for name, side, default in zip(("height", "width"), (height, width), sides, strict=True):
        size[name] = int(default) * factor if side is None else side
        if size[name] % max(factor, 8):  # diffusers asks for multiples of 8 at least
            raise typer.BadParameter(f"expected a multiple of {max(factor, 8)}, got {side}", param_hint=f"--{name}")
    return size


def _format_of(path: Path) -> str:
    """How Pillow names the format of a picture's file. Raises: BadParameter for one it cannot write."""
    from PIL import Image

    kind = Image.registered_extensions().get(path.suffix.lower() or ".png", "")
    try:
        Image.new("RGB", (8, 8)).save(io.BytesIO(), kind)
    except (KeyError, OSError, ValueError):
        raise typer.BadParameter(
            f"expected the name of a picture, such as a.png, got {path}", param_hint="--out"
        ) from None
    return kind


def _save(picture: Any, path: Path, picture_format: str) -> None:
    data = io.BytesIO()  # Pillow asks for a file that can be read back, which a pipe is not
    picture.save(data, picture_format)
    with atomic_write(path) as temporary:
        temporary.write_bytes(data.getvalue())
    print(f"wrote {path}")
