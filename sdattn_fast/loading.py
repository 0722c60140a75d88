"""Loading of models with diffusers and transformers: whole, and without their progress bars."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["checked_device", "load_model", "quiet_loading"]


def checked_device(name: str | None) -> str:
    """A device that a model can be moved to, "cpu" or "cuda", with or without an index; None: "cuda" if available.

    Raises: ValueError for other names, and for a GPU that is not there.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {name!r} was asked for, and torch sees no CUDA device")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(f"device: expected cuda:0 to cuda:{torch.cuda.device_count() - 1}, got {name!r}")
    return name


def load_model(kind: Any, source: str | Path, argument: str, device: Any = "cpu") -> Any:
    """``kind.from_pretrained(source)`` in float32, without gradients, in eval mode.

    Raises:
        ValueError: naming the argument, where files are broken, lack weights or have others than the config says.
        OSError, from transformers, where there is no model.
    """
    source = str(source)
    try:
        with quiet_loading():
            model, info = kind.from_pretrained(
                source, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except (OSError, ImportError):
        raise
    except Exception as error:  # of safetensors, or whatever reads the config
        raise ValueError(f"{argument}: cannot load {source!r} as a {kind.__name__}: {error}") from error
    weights = {name for name, _ in model.named_parameters()}
    other = sorted(str(entry[0] if isinstance(entry, (tuple, list)) else entry) for entry in info["mismatched_keys"])
    missing = sorted(weights & set(info["missing_keys"]))
    for names, fault in ((other, "of another shape than its config says"), (missing, "missing in its files")):
        if names:
            raise ValueError(
                f"{argument}: {source!r} is no whole {kind.__name__}: {len(names)} of its {len(weights)} weights are "
                f"{fault}, such as {names[0]!r}"
            )
    return model.float().to(device).eval().requires_grad_(False)


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Without the libraries' progress bars and warnings, as of the missing torchvision, which nothing here needs."""
    loggers = []
    for library in ("transformers", "diffusers"):  # in this order: diffusers looks at transformers' switches
        with contextlib.suppress(ImportError):
            loggers.append(importlib.import_module(f"{library}.utils.logging"))
    before = [(logger.get_verbosity(), logger.is_progress_bar_enabled()) for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
        logger.disable_progress_bar()
    try:
        yield
    finally:
        for logger, (verbosity, bars) in zip(loggers, before, strict=True):
            logger.set_verbosity(verbosity)
            if bars:
                logger.enable_progress_bar()
