"""A CLIPTokenizer whose byte-pair merges are learnt on the captions of a world."""

from __future__ import annotations

import json
import string
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

__all__ = ["MAX_TOKENS", "byte_pair_tokenizer", "write_vocabulary"]

MAX_TOKENS = 77


def byte_pair_tokenizer(captions: Iterable[str], vocabulary: int, split: Collection[str] = ()) -> Any:
    """A CLIPTokenizer of 77 positions; words it does not know fall into characters.

    Args:
        captions: what the merges are learnt on.
        vocabulary: at most so many tokens.
        split: words that stay in two pieces or more, as long words do in the real tokenizer.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator([*(string.ascii_lowercase + string.digits + string.punctuation), *captions], trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split()) for m in learned["merges"]]
    merges = [m for m in merges if "".join(m) not in {word + "</w>" for word in split}]
    # The trainer numbers single characters in the order of a hash table, another one in every process.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(m) for m in merges)]
    vocabulary_of = {p: i for i, p in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary_of, merges=merges, model_max_length=MAX_TOKENS)  # type: ignore[arg-type]


def write_vocabulary(folder: Path) -> None:
    """vocab.json and merges.txt beside a saved tokenizer.json, which transformers 4 does not read."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
