"""CLIP's tokenizer with a vocabulary made in code: every byte, a few merges, and no file to download."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["WithoutOffsets", "byte_level_tokenizer"]


def byte_level_tokenizer(folder: Path, merges: Sequence[str] = (), **how: Any) -> Any:
    """A CLIPTokenizer of the installed transformers. merges: pairs such as "c a" or "ca r</w>", as merges.txt has."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())
    pieces = [*alphabet, *(c + "</w>" for c in alphabet), *(m.replace(" ", "") for m in merges)]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return CLIPTokenizer.from_pretrained(str(folder), model_max_length=77, **how)


class WithoutOffsets:
    """A tokenizer without offsets, as transformers 4's CLIPTokenizer."""

    is_fast = False

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, *args: Any, **how: Any) -> Any:
        assert "return_offsets_mapping" not in how
        return self.tokenizer(*args, **how)
