"""Structure: smooth latents inside objects and never across their boundaries.

Where objects are is asked of the word maps and the picture together: the maps give unaries, `dense_crf` fits them to
the picture, Canny finds edges. Then every latent pixel becomes a mean of its neighbours in the same object, weighed by
distance and by how surely they belong together; pixels on an edge stay. Each channel's mean and variance are restored,
which the denoiser relies on. Labels and edges are decisions, constants to autograd; the smoothing is differentiable.

Source: Canny 1986, "A computational approach to edge detection", as kornia implements it; crf.py beside this.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..patching.words import tokenizer_of, words_of
from ..program import finite_number
from .crf import PairwiseBilateral, PairwiseGaussian, dense_crf
from .preview import Preview

__all__ = ["Structure", "refine_latents", "object_marginals", "canny_edges"]

# `dense_crf` has 32 labels, and background is one.
_MOST_WORDS = 31
_MOST_SIGMA = 32  # each pixel has (4 sigma)**2 weights


def refine_latents(
    latents: Tensor,
    maps: Tensor | Mapping[str, Tensor],
    *,
    picture: Tensor | None = None,
    strength: float = 1.0,
    sigma: float = 1.0,
    background: float = 0.5,
    iterations: int = 5,
) -> Tensor:
    """Smooth latents inside objects, and not across their boundaries.

    The words' maps and a dense CRF find the objects, and Canny edges their boundaries. Each pixel becomes a mean of its
    neighbours in the same object.

    Args:
        latents: (B, C, height, width) floating tensor, C <= 6.
        maps: (B, W, height, width) tensor, one map for each of at most 31 words; or the mapping that `Maps.per_word`
            gives.
        picture: (B, channels, height, width) tensor with at most 6 channels, in which edges and colours are found.
            None: the latents.
        strength: In [0, 1]: 0 leaves the latents, 1 smooths them.
        sigma: Standard deviation of the smoothing, in latent pixels, above 0, at most 32.
        background: In [0, 1]: where a word's map, scaled to [0, 1], is below this, background is more likely.
        iterations: Number of iterations of the CRF, >= 0; with 0 the maps alone decide.

    Returns:
        (B, C, height, width) tensor with the mean and variance of each channel of `latents`, differentiable in them.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has the wrong shape or value.
        ImportError: If kornia is missing.

    Examples:
        >>> smooth = refine_latents(latents, patch.maps.per_word(prompt))

    Source: Canny 1986, "A computational approach to edge detection"; Krähenbühl and Koltun 2011, arXiv 1210.5644.
    """
    _check_picture("latents", latents)
    maps = _stacked(maps)
    picture = latents if picture is None else picture
    _check_picture("picture", picture)
    for name, x in (("maps", maps), ("picture", picture)):
        if x.shape[0] != latents.shape[0] or x.shape[2:] != latents.shape[2:]:
            raise ValueError(
                f"{name}: expected {latents.shape[0]} entries of {latents.shape[2]} x {latents.shape[3]} pixels, as "
                f"the latents, got {tuple(x.shape)}"
            )
    _check_range("strength", strength, 0.0, 1.0)
    if not 0.0 < finite_number("sigma", sigma) <= _MOST_SIGMA:
        raise ValueError(f"sigma: expected a number above 0, at most {_MOST_SIGMA}, got {sigma!r}")
    with torch.no_grad():
        marginals = object_marginals(maps, picture, background=background, iterations=iterations)
        weights = _weights(marginals.to(latents.dtype), canny_edges(picture).to(latents.dtype), float(sigma))
    radius = (math.isqrt(weights.shape[1]) - 1) // 2
    batch, channels, height, width = latents.shape
    windows = F.unfold(latents, 2 * radius + 1, padding=radius).view(batch, channels, -1, height, width)
    smoothed = (windows * weights[:, None]).sum(2)
    return _with_moments_of(latents, latents + strength * (smoothed - latents))


def object_marginals(
    maps: Tensor | Mapping[str, Tensor], picture: Tensor, *, background: float = 0.5, iterations: int = 5
) -> Tensor:
    """(B, 1 + W, height, width): how likely each pixel is background, or each word's object; they sum to 1.

    Args:
        maps: as in `refine_latents`. Each is scaled to [0, 1] over its picture.
        picture: (B, channels, height, width); each channel is scaled to unit variance, whatever its units.
        background: the scaled map's value below which background is likelier, in [0, 1].
        iterations: of mean field, >= 0; 0: the maps alone decide.

    Raises: TypeError, ValueError.
    """
    maps = _stacked(maps)
    _check_picture("picture", picture)
    _check_range("background", background, 0.0, 1.0)
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    scaled = (maps - low) / (high - low).clamp(min=1e-12)
    # A softmax of 10 is sure of a word (e^5 to 1) where its map is highest.
    energies = -10.0 * torch.cat([torch.full_like(scaled[:, :1], background), scaled], 1)
    colours = (picture / picture.std((2, 3), keepdim=True, unbiased=False).clamp(min=1e-6)).to(energies.dtype)
    reach = max(2.0, max(picture.shape[2:]) / 8)
    pairwise = (PairwiseGaussian(1.0, 1.0), PairwiseBilateral(reach, 5.0, 0.5))
    return torch.stack(
        [
            dense_crf(one.contiguous(), image.movedim(0, -1), pairwise, iterations=iterations)
            for one, image in zip(energies, colours, strict=True)
        ]
    )


def canny_edges(picture: Tensor, low: float = 0.2, high: float = 0.5, sigma: float = 1.0) -> Tensor:
    """(B, 1, height, width) of zeros and ones: pixels where any channel has a Canny edge.

    Args:
        picture: (B, channels, height, width) floating; each channel is scaled to [0, 1] first.
        low, high: thresholds of the (unnormalised Sobel) gradient, low <= high; a step from 0 to 1 has about 2.5.
        sigma: of the blur before it, in pixels.

    Raises: TypeError, ValueError; ImportError without kornia.
    """
    _check_picture("picture", picture)
    if not (_is_number(low) and _is_number(high) and 0 < low <= high):
        raise ValueError(f"low, high: expected 0 < low <= high, got {low!r} and {high!r}")
    try:
        from kornia.filters import canny
    except ImportError as error:
        raise ImportError("Canny edges need kornia: pip install 'sdattn-fast[guidance]'") from error
    x = picture.detach().to(torch.promote_types(picture.dtype, torch.float32))
    lowest, highest = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    x = ((x - lowest) / (highest - lowest).clamp(min=1e-12)).flatten(0, 1)[:, None]
    # kornia reflects at the border, which wants more pixels than the kernel's half.
    size = 5 if min(x.shape[2:]) > 2 else 1
    _, edges = canny(x, float(low), float(high), (size, size), (float(sigma), float(sigma)))
    return edges.view(picture.shape).amax(1, keepdim=True).to(picture.dtype)


class Structure:
    """Structure refinement during sampling: `refine_latents` as a ``callback_on_step_end``.

    On one of our test models the words' maps fit their objects better with it, but fewer objects had their colours; on
    the other the objects did not change (docs/evaluation.md). As a context manager it ends with `remove`.

    Args:
        patch: A patch of a pipeline, with `capture`.
        prompt: What is drawn; a list where the pipeline draws several prompts.
        words: The words that name objects, at most 31 of a prompt; a list of such lists for several prompts. None: all
            words. A prompt without words is not refined.
        steps: Indices of the steps after which latents are refined.
        before_decoding: Whether latents are refined after the last step too.
        preview: Where edges and colours are found: in the predicted clean "latent", or in the "decoded" picture.
        **how: `strength`, `sigma`, `background` and `iterations` of `refine_latents`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, or the patch has no `capture` or no tokenizer.

    Examples:
        >>> with sdattn_fast.apply(pipe, capture=Capture()) as patch:
        ...     with Structure(patch, prompt, words=["car", "bench"], steps=(25,)) as refine:
        ...         image = pipe(prompt, callback_on_step_end=refine).images[0]
    """

    def __init__(
        self,
        patch: Any,
        prompt: str | Sequence[str],
        *,
        words: Sequence[str] | Sequence[Sequence[str]] | None = None,
        steps: Sequence[int] = (),
        before_decoding: bool = True,
        preview: str = "latent",
        **how: Any,
    ) -> None:
        pipe = getattr(patch, "pipe", None)
        if pipe is None or not patch.captures:
            raise ValueError("patch: expected sdattn_fast.apply(pipe, ..., capture=Capture()) of a pipeline")
        if preview not in ("latent", "decoded"):
            raise ValueError(f"preview: expected 'latent' or 'decoded', got {preview!r}")
        self.prompts = [prompt] if isinstance(prompt, str) or not isinstance(prompt, Sequence) else list(prompt)
        if not self.prompts or any(not isinstance(p, str) for p in self.prompts):
            raise TypeError(f"prompt: expected a str or a list of them, got {prompt!r}")
        self.words: list[Any] | None = None if words is None else [words] if isinstance(prompt, str) else list(words)
        if self.words is not None and (
            len(self.words) != len(self.prompts) or any(isinstance(some, str) for some in self.words)
        ):
            raise TypeError(f"words: expected a list of words (for each of {len(self.prompts)} prompts), got {words!r}")
        if not isinstance(steps, Iterable):
            raise TypeError(f"steps: expected indices of steps, got {steps!r}")
        if any(isinstance(s, bool) or not isinstance(s, int) or s < 0 for s in steps):
            raise ValueError(f"steps: expected indices >= 0, got {steps!r}")
        unknown = set(how) - {"strength", "sigma", "background", "iterations"}
        if unknown:
            raise TypeError(f"how: expected strength, sigma, background, iterations, got {sorted(unknown)}")
        self.patch = patch
        self.steps, self.before_decoding, self.preview, self.how = set(steps), before_decoding, preview, how
        tokenizer = tokenizer_of(pipe)
        if tokenizer is None:
            raise ValueError(f"patch: expected a pipeline with a tokenizer, got {type(pipe).__name__} without one")
        asked = [words_of(tokenizer, p) for p in self.prompts] if self.words is None else self.words
        self._any = [len(some) > 0 for some in asked]
        for some in asked:
            _check_count(some)
        self._preview = Preview(patch)

    # As diffusers' MultiPipelineCallbacks asks.
    tensor_inputs = ("latents",)

    def __call__(self, pipe: Any, step: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """Called by diffusers at the end of each step, with its arguments.

        Args:
            pipe: The pipeline.
            step: Index of the step.
            timestep: Its timestep.
            inputs: The pipeline's tensors by name, with "latents".

        Returns:
            `inputs`, with the refined latents.

        Raises:
            ValueError: If a word is not in the prompt.
        """
        last = step + 1 == getattr(pipe, "num_timesteps", -1)
        if step not in self.steps and not (last and self.before_decoding):
            return inputs
        latents: Tensor = inputs["latents"]
        picture = self._picture(pipe, (latents.shape[2], latents.shape[3]))
        refined = []
        for i in range(len(latents)):
            latent, maps = latents[i : i + 1].float(), self._maps(i, latents)
            refined.append(refine_latents(latent, maps, picture=picture[i : i + 1], **self.how) if maps else latent)
        return {**inputs, "latents": torch.cat(refined).to(latents.dtype)}

    def _maps(self, entry: int, latents: Tensor) -> dict[str, Tensor]:
        """The maps of one entry's words, (1, height, width). A pipeline's entries are its prompts, each repeated."""
        place = entry * len(self.prompts) // len(latents)
        if not self._any[place]:
            return {}
        maps = self.patch.maps.per_word(self.prompts[place], (latents.shape[2], latents.shape[3]))
        words: list[str] = list(maps if self.words is None else self.words[place])
        missing = [word for word in words if word not in maps]
        if missing:
            raise ValueError(f"words: {missing[0]!r} is not among the prompt's words, {list(maps)}")
        _check_count(words)  # a text in chunks may have more words than its first
        return {word: maps[word][entry : entry + 1] for word in words}

    def remove(self) -> None:
        """Stop watching the UNet."""
        self._preview.remove()

    def __enter__(self) -> Structure:
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()

    def _picture(self, pipe: Any, size: tuple[int, int]) -> Tensor:
        if self.preview == "latent":
            return self._preview.latent(pipe).float()
        return F.interpolate(self._preview.decoded(pipe), size=size, mode="area")


def _weights(marginals: Tensor, edges: Tensor, sigma: float) -> Tensor:
    """(B, K*K, height, width), summing to 1 over the window: neighbours of one's own label, off the edges."""
    radius = max(1, int(2.0 * sigma + 0.5))
    size = 2 * radius + 1
    batch, _, height, width = marginals.shape

    def windows(x: Tensor) -> Tensor:
        return F.unfold(x, size, padding=radius).view(batch, x.shape[1], size * size, height, width)

    label = marginals.argmax(1, keepdim=True).to(marginals.dtype) + 1  # outside the picture: 0
    same = (windows(label) == label[:, :, None])[:, 0].to(marginals.dtype)
    together = (windows(marginals) * marginals[:, :, None]).sum(1)
    inside = (windows(1 - edges) * (1 - edges)[:, :, None])[:, 0]
    at = torch.arange(-radius, radius + 1, dtype=marginals.dtype, device=marginals.device)
    near = torch.exp(-0.5 * (at[:, None] ** 2 + at**2) / sigma**2).reshape(1, -1, 1, 1)
    weights = near * same * together * inside
    centre = size * size // 2
    itself = torch.zeros_like(weights)
    itself[:, centre] = weights[:, centre].clamp(min=1e-6)
    others = weights.clone()
    others[:, centre] = 0
    weights = others + itself
    return weights / weights.sum(1, keepdim=True)


def _with_moments_of(x: Tensor, y: Tensor) -> Tensor:
    """y, each channel shifted and scaled to x's mean and variance over the pixels."""
    mean, mean_y = x.mean((2, 3), keepdim=True), y.mean((2, 3), keepdim=True)
    variance = x.var((2, 3), keepdim=True, unbiased=False)
    variance_y = y.var((2, 3), keepdim=True, unbiased=False)
    scale = (variance / variance_y.clamp(min=1e-12)).clamp(min=1e-24).sqrt()
    return (y - mean_y) * scale + mean


def _check_count(words: Collection[str]) -> None:
    if len(words) > _MOST_WORDS:
        raise ValueError(f"words: expected at most {_MOST_WORDS} of a prompt's, got {len(words)}: name the objects")


def _stacked(maps: Any) -> Tensor:
    if isinstance(maps, Mapping):
        if not maps:
            raise ValueError("maps: expected at least one word")
        maps = torch.stack(list(maps.values()), 1)
    if not isinstance(maps, Tensor):
        raise TypeError(f"maps: expected a torch.Tensor or a mapping of words to them, got {type(maps).__name__}")
    _check_picture("maps", maps, most=_MOST_WORDS)
    return maps


def _check_picture(name: str, x: Any, most: int = 6) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {x.dtype}")
    if x.dim() != 4 or not 1 <= x.shape[1] <= most:
        raise ValueError(f"{name}: expected (batch, 1 to {most}, height, width), got shape {tuple(x.shape)}")
    if not x.numel():
        raise ValueError(f"{name}: expected at least one pixel, got shape {tuple(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")


def _check_range(name: str, x: Any, low: float, high: float) -> None:
    if not _is_number(x) or not low <= x <= high:
        raise ValueError(f"{name}: expected a number in [{low:g}, {high:g}], got {x!r}")


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)
