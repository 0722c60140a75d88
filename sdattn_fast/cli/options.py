"""The options that say a program, shared by the commands that run one."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..program import Program, Refinement, SalienceDropout

__all__ = [
    "Ratio",
    "DropoutAxis",
    "DropoutMode",
    "Steps",
    "Threshold",
    "Sigma",
    "RefineAxis",
    "Renormalize",
    "program_of",
    "sampling_options",
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

    Raises: ValueError, TypeError, naming the field.
    """
    dropout = None if ratio is None else SalienceDropout(ratio, dropout_axis, dropout_mode)
    refine = None
    if threshold is not None or sigma is not None:
        refine = Refinement(steps, threshold, 0.0 if sigma is None else sigma, refine_axis)
    return Program(dropout, refine, renormalize)


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
