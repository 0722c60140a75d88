"""Pictures through a pipeline's VAE and out of it, as SDXL's pipeline has them; one that is not finite is an error.

A VAE that says `force_upcast` overflows in float16, so it runs in float32 and is float16 again afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["check_finite", "decode_latents", "encode_pictures", "pil_pictures", "signed_pictures", "uint8_pictures"]


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """(B, 3, height, width) float32, about [-1, 1], of latents as a UNet has them.

    Raises: ValueError for pictures that are not finite, and where gradients would have to pass a VAE that is upcast.
    """
    with _upcast(vae, latents):
        latents = latents.to(vae.dtype)
        mean, deviation = _normalisation(vae, latents)
        latents = latents * deviation / vae.config.scaling_factor + mean
        pictures: Tensor = vae.decode(latents, return_dict=False)[0].float()
    check_finite(pictures)
    return pictures


def encode_pictures(vae: Any, pictures: Tensor, sample: bool = False) -> Tensor:
    """The latents, scaled as a UNet has them, of pictures (B, 3, height, width) in [-1, 1]: the mode of what the VAE
    says, or a sample of it.

    Raises: as `decode_latents`.
    """
    with _upcast(vae, pictures):
        found = vae.encode(pictures.to(vae.device, vae.dtype)).latent_dist
    latents = found.sample() if sample else found.mode()
    mean, deviation = _normalisation(vae, latents)
    return (latents - mean) * vae.config.scaling_factor / deviation


def signed_pictures(pictures: Tensor) -> Tensor:
    """(n, 3, height, width) float32 in [-1, 1], as a VAE takes them, of (n, height, width, 3) uint8."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def check_finite(pictures: Any) -> None:
    """Raises: ValueError naming the first of some pictures that has NaN or infinity."""
    for i, picture in enumerate(pictures):
        if not _is_finite(picture):
            raise ValueError(
                f"pictures: expected finite numbers, got NaN or infinity in picture {i} of {len(pictures)}; where a "
                "model overflows in float16, run it in bfloat16 or float32"
            )


def uint8_pictures(images: Any) -> np.ndarray:
    """(n, height, width, 3) uint8 of a pipeline's pictures in [0, 1], as output_type="np" gives them.

    Raises: ValueError for one that is not finite, which a cast to uint8 would make black without a word.
    """
    check_finite(images)
    return np.rint(np.asarray(images) * 255).astype(np.uint8)


def pil_pictures(images: Any) -> list[Any]:
    """As `uint8_pictures`, for PIL: what output_type="pil" gives, but for its black pictures."""
    from PIL import Image

    return [Image.fromarray(picture) for picture in uint8_pictures(images)]


def _is_finite(picture: Any) -> bool:
    if isinstance(picture, Tensor):
        return bool(torch.isfinite(picture).all())
    # Only floats can be otherwise, and a PIL picture has none.
    return not (isinstance(picture, np.ndarray) and picture.dtype.kind == "f") or bool(np.isfinite(picture).all())


@contextlib.contextmanager
def _upcast(vae: Any, x: Tensor) -> Iterator[None]:
    """Inside, a VAE that overflows in float16 is in float32."""
    if vae.dtype != torch.float16 or not getattr(vae.config, "force_upcast", False):
        yield
        return
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "vae: gradients cannot pass a VAE in float16 that asks for force_upcast; call pipe.vae.to(torch.float32)"
        )
    # Not `vae.to`, which warns at every call and makes float16 of what was kept in float32.
    narrow = [p for p in (*vae.parameters(), *vae.buffers()) if p.dtype == torch.float16]
    try:
        for p in narrow:
            p.data = p.data.float()
        yield
    finally:
        for p in narrow:
            p.data = p.data.half()


def _normalisation(vae: Any, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """The mean and standard deviation by which a UNet's latents differ from the VAE's, beside its scaling factor."""
    mean, deviation = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is None or deviation is None:
        return getattr(vae.config, "shift_factor", None) or 0.0, 1.0
    of_channels = (torch.tensor(x, device=latents.device, dtype=latents.dtype) for x in (mean, deviation))
    mean, deviation = (x.view(1, -1, 1, 1) for x in of_channels)
    return mean, deviation
