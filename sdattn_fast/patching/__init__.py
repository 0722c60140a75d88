"""In diffusers: a program in place in a pipeline or UNet, or set by hand with `SemanticAttnProcessor`.

diffusers and transformers are imported where they are used, so that `import sdattn_fast` needs torch alone.
"""

from __future__ import annotations

from .maps import Maps
from .patch import Patch
from .processor import SemanticAttnProcessor

__all__ = ["Maps", "Patch", "SemanticAttnProcessor"]
