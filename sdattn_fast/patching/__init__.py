"""In diffusers: `apply` a program to a pipeline or UNet, or set `SemanticAttnProcessor` by hand.

diffusers and transformers are imported where they are used, so that `import sdattn_fast` needs torch alone.
"""

from __future__ import annotations

from .apply import apply
from .maps import Maps
from .patch import Patch
from .processor import SemanticAttnProcessor

__all__ = ["Maps", "Patch", "SemanticAttnProcessor", "apply"]
