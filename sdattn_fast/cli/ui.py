"""`sdattn-fast ui`: a page to play with, in the browser."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Model

__all__ = ["ui"]

# As `sdattn-fast evaluate` calibrates the CLIP gate on captions of each world.
_THRESHOLDS = {"shapes": 0.12, "objects": -0.02}


def ui(
    model: Model = "shapes",
    clip: Annotated[
        str | None, typer.Option(help="Folder or hub ID of a CLIP model for the gate; default: the pipeline's own.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 accepts other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 7860,
    browser: Annotated[bool, typer.Option(help="Open a browser.")] = True,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if available.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; default: float16 on cuda.")] = None,
) -> None:
    """Serve a page that draws a prompt with and without a program, with controls for each technique and heat maps."""
    from ..lab.pipeline import GUIDANCE, STEPS
    from ..measure.memory import peak_mib
    from .generate import pipeline_of
    from .heads import clip_of, clip_source

    if not 0 < port < 65536:
        raise typer.BadParameter(f"expected a port, 1 to 65535, got {port}", param_hint="--port")
    try:
        from ..ui.page import LAUNCH, ServedPipeline, page
    except ModuleNotFoundError as error:
        raise ImportError(f"ui needs gradio: pip install 'sdattn-fast[ui]' ({error})") from None
    pipe = pipeline_of(model, device, dtype)
    pipe.set_progress_bar_config(disable=True)
    missing = [name for name in ("unet", "vae", "tokenizer") if getattr(pipe, name, None) is None]
    if missing:
        raise ValueError(
            f"model: expected a pipeline with a UNet, a VAE and CLIP's tokenizer, got {type(pipe).__name__}, which has "
            f"no {missing[0]}"
        )
    for part in (pipe.unet, pipe.vae):
        part.requires_grad_(False)
    source = None
    try:
        source = clip_source(model, clip)
    except ValueError:
        if clip is not None:
            raise
        print("no CLIP: the semantic gate is off; --clip names one")
    scorer = None if source is None else clip_of(model, clip, pipe.device)
    served = ServedPipeline(pipe, model, scorer, source)
    if served.world:
        served = ServedPipeline(pipe, model, scorer, source, _THRESHOLDS[served.world], STEPS, GUIDANCE)
    # The profiler, which counts memory, has its first use in the thread that loaded it, or it complains on stderr.
    peak_mib(lambda: None)
    blocks = page(served)
    try:
        _, url, _ = blocks.launch(server_name=host, server_port=port, inbrowser=browser, **LAUNCH)
    except OSError as error:
        raise OSError(f"port: cannot listen on {host}:{port}; name another with --port ({error})") from None
    print(f"{url} is the page; Ctrl-C ends it", flush=True)
    blocks.block_thread()
