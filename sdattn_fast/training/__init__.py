"""Training with the program in place."""

from .captions import CaptionedFolder
from .lora import LoraTraining, train_lora

__all__ = ["CaptionedFolder", "LoraTraining", "train_lora"]
