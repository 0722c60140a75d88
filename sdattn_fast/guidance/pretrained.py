"""Models of transformers from a folder or hub id, whole: a weight that the files lack would be drawn at random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["load_model"]


def load_model(kind: Any, source: str | Path, argument: str, device: Any = "cpu") -> Any:
    """``kind.from_pretrained(source)`` in float32, without gradients, in eval mode.

    Raises:
        ValueError: naming the argument, where files are broken, lack weights or have others than the config says.
        OSError, from transformers, where there is no model.
    """
    from ..lab import quiet_loading

    source = str(source)
    try:
        with quiet_loading():
            model, found = kind.from_pretrained(
                source, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except (OSError, ImportError):
        raise
    except Exception as error:  # of safetensors, or whatever reads the config
        raise ValueError(f"{argument}: cannot load {source!r} as a {kind.__name__}: {error}") from error
    weights = {name for name, _ in model.named_parameters()}
    other = sorted(str(entry[0] if isinstance(entry, (tuple, list)) else entry) for entry in found["mismatched_keys"])
    missing = sorted(weights & set(found["missing_keys"]))
    for names, what in ((other, "of another shape than its config says"), (missing, "missing in its files")):
        if names:
            raise ValueError(
                f"{argument}: {source!r} is no whole {kind.__name__}: {len(names)} of its {len(weights)} weights are "
                f"{what}, such as {names[0]!r}"
            )
    return model.float().to(device).eval().requires_grad_(False)
