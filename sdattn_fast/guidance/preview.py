"""The picture that the steps so far amount to: the clean latent which the UNet's latest output stands for, decoded.

Source: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", equation 15.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..patching.forwards import entries_of
from ..patching.patch import Patch
from .guided import guided_prediction
from .pictures import decode_latents, encode_pictures

__all__ = ["LinearDecoder", "Preview", "predicted_clean"]


class Preview:
    """The picture that a patched pipeline is about to draw: the clean latents that its latest step predicts.

    Args:
        patch: A patch of the pipeline.

    Attributes:
        patch: That patch.
        remove: A function that stops watching the UNet.

    Examples:
        >>> with sdattn_fast.apply(pipe) as patch:
        ...     preview = Preview(patch)
        ...     def look(pipe, step, timestep, kept):
        ...         pictures.append(preview.decoded(pipe))  # preview.latent(pipe) does not decode
        ...         return kept
        ...     image = pipe(prompt, callback_on_step_end=look).images[0]

    Source: DDPM, Ho et al. 2020, equation 15, arXiv 2006.11239.
    """

    def __init__(self, patch: Patch) -> None:
        self.patch = patch
        self.remove = patch.keep_forwards()

    def latent(self, pipe: Any) -> Tensor:
        """The predicted clean latents of the prompts, with guidance.

        Args:
            pipe: The pipeline.

        Returns:
            A (B, C, height, width) tensor.

        Raises:
            ValueError: Before the first step, if the pipeline's guidance is not known, or in the cases of
                `predicted_clean`.
        """
        forwards = self.patch.current_call.forwards
        if not forwards:
            raise ValueError("pipe: its UNet has not run yet; expected the pipeline that was patched")
        first = next((one for one in forwards if one.prompts), None)
        if first is None:
            raise ValueError(
                f"pipe: {type(pipe).__name__} asked its UNet for no prompt that is known in this step; pass active= "
                "and protected= to sdattn_fast.apply where prompts are not known"
            )
        prediction = guided_prediction(pipe, forwards)
        sample = entries_of(first.inputs["sample"], len(first.prediction), first.prompts)
        # Inpainting models have further channels beside the latent.
        sample = sample.detach()[:, : prediction.shape[1]]
        return predicted_clean(pipe.scheduler, sample, first.inputs["timestep"], prediction)

    @torch.no_grad()
    def decoded(self, pipe: Any) -> Tensor:
        """The predicted clean latents, decoded by the pipeline's VAE.

        Args:
            pipe: The pipeline.

        Returns:
            A (B, 3, height, width) float32 tensor, about in [-1, 1].

        Raises:
            ValueError: In the cases of `latent`, or if a picture is not finite.
        """
        return decode_latents(pipe.vae, self.latent(pipe))


@dataclass(frozen=True)
class LinearDecoder:
    """A decoder that makes each pixel a linear function of the latent at its place: fast, small and blurred.

    Args:
        weight: (C, 3) float32 tensor.
        bias: (3,) float32 tensor.

    Examples:
        >>> pictures = pipe.image_processor.preprocess([image])  # (1, 3, height, width) in [-1, 1]
        >>> decoder = LinearDecoder.fit(pipe.vae, pictures)
        >>> small = decoder(latents)  # (B, 3, height, width) of the latents
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    @torch.no_grad()
    def fit(cls, vae: Any, pictures: Tensor) -> LinearDecoder:
        """Fit a decoder to a VAE by least squares.

        Args:
            vae: The pipeline's VAE.
            pictures: (n, 3, height, width) tensor in [-1, 1].

        Returns:
            The decoder.

        Raises:
            ValueError: If the shape is another, or there are fewer latent pixels than unknowns.
        """
        if not isinstance(pictures, Tensor) or pictures.dim() != 4 or pictures.shape[1] != 3:
            got = tuple(pictures.shape) if isinstance(pictures, Tensor) else type(pictures).__name__
            raise ValueError(f"pictures: expected (n, 3, height, width), got {got}")
        latents = encode_pictures(vae, pictures)
        small = F.interpolate(decode_latents(vae, latents), size=latents.shape[2:], mode="area")
        x = latents.float().movedim(1, -1).flatten(0, 2)
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        if x.shape[0] < x.shape[1]:
            raise ValueError(f"pictures: expected at least {x.shape[1]} latent pixels in all, got {x.shape[0]}")
        fitted = torch.linalg.lstsq(x, small.movedim(1, -1).flatten(0, 2)).solution
        return cls(fitted[:-1], fitted[-1])

    def __call__(self, latents: Tensor) -> Tensor:
        """Decode latents.

        Args:
            latents: (B, C, height, width) tensor.

        Returns:
            (B, 3, height, width) float32 tensor in [-1, 1], at the size of the latents.
        """
        colours = torch.einsum("bchw,cr->brhw", latents.float(), self.weight.to(latents.device))
        return (colours + self.bias.to(latents.device)[:, None, None]).clamp(-1, 1)


def predicted_clean(scheduler: Any, sample: Tensor, timestep: Any, prediction: Tensor) -> Tensor:
    """The clean latents that a UNet's output predicts.

    Args:
        scheduler: A diffusers scheduler, which knows what the UNet predicts.
        sample: (B, C, height, width) tensor, the UNet's (scaled) input.
        timestep: Its timestep, a number or a tensor.
        prediction: The UNet's output, of the sample's shape.

    Returns:
        A tensor of the sample's shape.

    Raises:
        ValueError: If the scheduler has no `alphas_cumprod` (flow matching), or predicts neither epsilon, v nor the
            sample.

    Examples:
        >>> clean = predicted_clean(pipe.scheduler, latents, t, pipe.unet(latents, t, text).sample)

    Source: Ho et al. 2020, equation 15, arXiv 2006.11239; for v: Salimans and Ho 2022, arXiv 2202.00512.
    """
    kind = getattr(scheduler.config, "prediction_type", None)
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None or kind not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(
            "scheduler: expected alphas_cumprod and a prediction of epsilon, v or sample, got "
            f"{type(scheduler).__name__} with {kind!r}"
        )
    index = int(torch.as_tensor(timestep).reshape(-1)[0])
    signal = float(alphas[index]) ** 0.5
    noise = (1 - float(alphas[index])) ** 0.5
    if kind == "sample":
        return prediction
    if kind == "v_prediction":
        return signal * sample - noise * prediction
    # At zero terminal SNR there is no signal to divide by; epsilon says nothing of the picture there.
    return (sample - noise * prediction) / max(signal, 1e-3)
