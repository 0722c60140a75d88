"""The tiny models, for every test of this folder."""

from tiny_models import _one_thread, build, draw, parts, tokenizer, tokenizer_2  # noqa: F401
