"""The options that several commands share, and the checks that are made before anything is loaded or drawn."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..program import Program, Refinement, SalienceDropout

__all__ = [
    "Model",
    "Guidance",
    "NumSteps",
    "Ratio",
    "DropoutAxis",
    "DropoutMode",
    "Steps",
    "Threshold",
    "Sigma",
    "RefineAxis",
    "Renormalize",
    "check_out_file",
    "check_out_folder",
    "plain_console",
    "program_of",
    "sampling_options",
    "within",
]


def within(least: float, most: float) -> Callable[[Any], Any]:
    """The callback of an option that is a number from `least` to `most`; None passes."""

    def check(value: Any) -> Any:
        if value is not None and not least <= value <= most:  # NaN, too
            raise typer.BadParameter(f"expected {least} to {most}, got {value}")
        return value

    return check


Model = Annotated[
    str, typer.Option(help="Folder or hub ID of a diffusers pipeline, or 'shapes' or 'objects', the lab's.")
]
NumSteps = Annotated[int | None, typer.Option("--steps", help="Number of denoising steps.", callback=within(1, 10_000))]
Guidance = Annotated[
    float | None,
    typer.Option("--guidance-scale", help="Scale of classifier-free guidance.", callback=within(0, 1000)),
]

_PANEL = "Program (none given: plain attention)"

Ratio = Annotated[
    float | None,
    typer.Option("--dropout-ratio", help="Salience dropout: share of entries to drop, 0 to 1.", rich_help_panel=_PANEL),
]
DropoutAxis = Annotated[str, typer.Option("--dropout-axis", help="token or space.", rich_help_panel=_PANEL)]
DropoutMode = Annotated[str, typer.Option("--dropout-mode", help="topk or random.", rich_help_panel=_PANEL)]
Steps = Annotated[
    int, typer.Option("--refine-steps", help="Rounds of NMS, renormalization and smoothing.", rich_help_panel=_PANEL)
]
Threshold = Annotated[
    float | None, typer.Option("--threshold", help="NMS: share of the maximum, 0 to below 1.", rich_help_panel=_PANEL)
]
Sigma = Annotated[
    float | None,
    typer.Option(
        "--sigma", help="Gaussian smoothing: standard deviation in pixels of the layer.", rich_help_panel=_PANEL
    ),
]
RefineAxis = Annotated[str, typer.Option("--refine-axis", help="token or space.", rich_help_panel=_PANEL)]
Renormalize = Annotated[str, typer.Option("--renormalize", help="none, content or row.", rich_help_panel=_PANEL)]


def plain_console(**keywords: Any) -> Console:
    """A console that shows a user's text as it is: "[red]" is no colour and ":car:" no picture."""
    return Console(markup=False, emoji=False, **keywords)


def check_out_file(path: Path, hint: str = "--out") -> None:
    """Whether that file can be written; its folder need not be there. Raises: BadParameter."""
    if path.is_dir():
        raise typer.BadParameter(f"expected a file to write, got the folder {path}", param_hint=hint)
    _check_writable(path, path.parent, hint)


def check_out_folder(path: Path, hint: str = "--out") -> None:
    """Whether files can be written into that folder, which need not be there. Raises: BadParameter."""
    if path.exists() and not path.is_dir():
        raise typer.BadParameter(f"expected a folder, got the file {path}", param_hint=hint)
    _check_writable(path, path, hint)


def _check_writable(path: Path, folder: Path, hint: str) -> None:
    try:
        path.exists()  # a name may be too long
        with tempfile.TemporaryFile(dir=next(p for p in (folder, *folder.parents) if p.exists())):
            pass
    except OSError as error:
        raise typer.BadParameter(f"cannot write {path}: {error.strerror}", param_hint=hint) from None


def program_of(
    ratio: float | None,
    dropout_axis: str,
    dropout_mode: str,
    steps: int,
    threshold: float | None,
    sigma: float | None,
    refine_axis: str,
    renormalize: str,
) -> Program:
    """The program that these options say; without ratio, threshold and sigma it neither drops nor refines.

    Raises: BadParameter where an option would do nothing without another; ValueError, TypeError, naming the field.
    """
    dropout = SalienceDropout(0.0 if ratio is None else ratio, dropout_axis, dropout_mode)
    refine = Refinement(steps, threshold, 0.0 if sigma is None else sigma, refine_axis)
    refines = threshold is not None or sigma is not None
    if ratio is None and dropout != SalienceDropout(0.0):
        raise typer.BadParameter("does nothing without --dropout-ratio", param_hint="--dropout-axis, --dropout-mode")
    if not refines and refine != Refinement(1, None, 0.0):
        raise typer.BadParameter(
            "does nothing without --threshold or --sigma", param_hint="--refine-steps, --refine-axis"
        )
    return Program(None if ratio is None else dropout, refine if refines else None, renormalize)


def sampling_options(model: str, num_inference_steps: int | None, guidance_scale: float | None) -> dict[str, Any]:
    """Steps and guidance for the pipeline's call: of the command line, else those of the lab's pipelines; a model
    of the user's has its own defaults."""
    from ..lab.pipeline import GUIDANCE, STEPS, WORLDS

    options: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE} if model in WORLDS else {}
    if num_inference_steps is not None:
        options["num_inference_steps"] = num_inference_steps
    if guidance_scale is not None:
        options["guidance_scale"] = guidance_scale
    return options
