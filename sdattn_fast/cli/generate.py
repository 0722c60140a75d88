"""`sdattn-fast generate`: a picture from any diffusers pipeline, through the program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import (
    DropoutAxis,
    DropoutMode,
    Ratio,
    RefineAxis,
    Renormalize,
    Sigma,
    Steps,
    Threshold,
    program_of,
    sampling_options,
)

__all__ = ["generate", "pipeline_of"]


def generate(
    prompt: Annotated[str, typer.Option(help="What to draw.")],
    model: Annotated[
        str, typer.Option(help="Folder or hub ID of a diffusers pipeline, or 'shapes', the demo's.")
    ] = "shapes",
    negative_prompt: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the latents and of random dropout.")] = 0,
    num_inference_steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Number of denoising steps.")
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Scale of classifier-free guidance.")] = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels; default: the model's.")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels; default: the model's.")] = None,
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
            help="objects, binding or both: correct the picture between its steps, as sdattn_fast.apply does."
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
    if not 0 <= seed < 2**63:
        raise typer.BadParameter(f"expected 0 <= seed < 2**63, got {seed}", param_hint="--seed")
    if out.is_dir():
        raise typer.BadParameter(f"expected a file to write, got the folder {out}", param_hint="--out")
    pipe = pipeline_of(model, device, dtype)
    if lora is not None:
        try:
            with quiet_loading():
                pipe.load_lora_weights(lora)
        except Exception as error:  # of diffusers, peft, safetensors, or whatever speaks with the hub
            raise ValueError(f"lora: expected a folder or hub id of a LoRA, got {lora!r}: {error}") from error
    options = {"prompt": prompt, "negative_prompt": negative_prompt, "height": height, "width": width}
    call_kwargs: dict[str, Any] = {key: x for key, x in options.items() if x is not None}
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
        _save(draw(call_kwargs), out.with_name(f"{out.stem}.stock{out.suffix or '.png'}"))
    with apply(pipe, file, recipe=chosen, seed=seed, backend=backend):
        _save(draw(tuned), out if out.suffix else out.with_suffix(".png"))


def pipeline_of(model: str, device: str | None = None, dtype: str | None = None) -> Any:
    """`DiffusionPipeline.from_pretrained` on a folder or hub id, or one of the lab's pipelines.

    Raises: ValueError for a dtype, device or folder that is not there; OSError, from diffusers, for other models.
    """
    import torch

    from ..lab.pipeline import WORLDS, load_pipeline

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("float16" if device.startswith("cuda") else "float32")
    if dtype not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"dtype: expected float32, float16 or bfloat16, got {dtype!r}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device: {device!r} was asked for, and torch sees no CUDA device")
    kind = getattr(torch, dtype)
    if Path(model).is_absolute() and not Path(model).is_dir():
        raise ValueError(f"model: expected a folder, a hub id or 'shapes', and there is no folder {model}")
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


def _save(picture: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    print(f"wrote {path}")
