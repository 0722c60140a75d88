"""What is known of models that are no UNet: transformers with cross-attention, told by their exact class.

Source: docs/design.md, "Transformers".
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

__all__ = ["ModelKind", "argument_names", "denoisers", "kind_of"]


@dataclass(frozen=True)
class ModelKind:
    """How a model's layers come by their text and their pixels.

    reads_own_text: they read the very tensor that the model is called with, and not a projection made in each forward.
    keeps_tokens: that text has the tokens of the model's, one for one. padding: of the text, "masked": has a logit of
    -10000 by `encoder_attention_mask`; "zeros": is rows of zeros, attended to; "": is as all other tokens. grid:
    "patches": they see the input in patches of `config.patch_size` pixels; "arguments": the model is called with
    num_frames, height and width; "": of the blocks around them. text_layers: how the names of those end that read text,
    where the modules do not say. repeats_text: an entry's text comes to its layers once for each of its frames, which
    are entries there. guided: corrections and previews, which call the model again, know its arguments.
    """

    reads_own_text: bool = True
    keeps_tokens: bool = True
    padding: str = ""
    grid: str = ""
    text_layers: str = ""
    repeats_text: bool = False
    guided: bool = True


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The models of a pipeline that draw, by name: its UNet, or one transformer or two."""
    found = {name: getattr(pipe, name, None) for name in ("unet", "transformer", "transformer_2")}
    return {name: model for name, model in found.items() if isinstance(model, nn.Module)}


def kind_of(model: nn.Module) -> ModelKind:
    """Of a class that is not listed: as of a UNet."""
    return _KINDS.get((type(model).__module__, type(model).__qualname__), ModelKind())


def argument_names(model: nn.Module) -> tuple[str, ...]:
    """Of a model's forward, in their order; the first is of its latents."""
    positional = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = inspect.signature(type(model).forward).parameters.values()
    names = tuple(p.name for p in parameters if p.kind in positional)[1:]
    return names if "encoder_hidden_states" in names else _NAMES_OF_UNET


_NAMES_OF_UNET = ("sample", "timestep", "encoder_hidden_states")
_MASKED = ModelKind(reads_own_text=False, padding="masked", grid="patches", guided=False)
_ZEROS = ModelKind(reads_own_text=False, padding="zeros", grid="patches", guided=False)
# One after the other; tokens that its masks leave out become an embedding that is learnt.
_TWO_TEXTS = ModelKind(reads_own_text=False, keeps_tokens=False, grid="patches", guided=False)
# By name, since `import sdattn_fast` needs torch alone.
_KINDS: dict[tuple[str, str], ModelKind] = {
    ("diffusers.models.transformers.pixart_transformer_2d", "PixArtTransformer2DModel"): _MASKED,
    ("diffusers.models.transformers.sana_transformer", "SanaTransformer2DModel"): _MASKED,
    ("diffusers.models.controlnets.controlnet_sana", "SanaControlNetModel"): _MASKED,
    ("diffusers.models.transformers.transformer_wan", "WanTransformer3DModel"): _ZEROS,
    ("diffusers.models.transformers.transformer_wan_vace", "WanVACETransformer3DModel"): _ZEROS,
    ("diffusers.models.transformers.transformer_chronoedit", "ChronoEditTransformer3DModel"): _ZEROS,
    ("diffusers.models.transformers.transformer_skyreels_v2", "SkyReelsV2Transformer3DModel"): _ZEROS,
    ("diffusers.models.transformers.transformer_ltx", "LTXVideoTransformer3DModel"): replace(
        _MASKED, grid="arguments", text_layers=".attn2"
    ),
    ("diffusers.models.transformers.latte_transformer_3d", "LatteTransformer3DModel"): ModelKind(
        reads_own_text=False, grid="patches", repeats_text=True, guided=False
    ),
    ("diffusers.models.unets.unet_3d_condition", "UNet3DConditionModel"): ModelKind(
        reads_own_text=False, repeats_text=True, guided=False
    ),
    ("diffusers.models.transformers.hunyuan_transformer_2d", "HunyuanDiT2DModel"): _TWO_TEXTS,
    ("diffusers.models.controlnets.controlnet_hunyuan", "HunyuanDiT2DControlNetModel"): _TWO_TEXTS,
}
