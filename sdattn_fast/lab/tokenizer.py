"""A CLIPTokenizer whose byte-pair merges are learnt on the captions of a world."""

from __future__ import annotations

import json
import string
import tempfile
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
    merges = [m for m in _pairs(learned["merges"]) if "".join(m) not in {word + "</w>" for word in split}]
    # The trainer numbers single characters in the order of a hash table, another one in every process.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(m) for m in merges)]
    vocabulary_of = {p: i for i, p in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), vocabulary_of, merges)
        return CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)


def write_vocabulary(folder: Path) -> None:
    """vocab.json and merges.txt beside a saved tokenizer.json, which transformers 4 neither reads nor writes."""
    saved = folder / "tokenizer.json"
    if not saved.exists():
        return
    model = json.loads(saved.read_text())["model"]
    _write(folder, model["vocab"], _pairs(model["merges"]))


def _pairs(merges: Iterable[str | list[str]]) -> list[tuple[str, ...]]:
    return [tuple(m) if isinstance(m, list) else tuple(m.split()) for m in merges]


def _write(folder: Path, vocabulary: dict[str, int], merges: Iterable[tuple[str, ...]]) -> None:
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]))
