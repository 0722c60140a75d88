"""The tiny models, for every test of this folder."""

from tiny_models import (  # noqa: F401
    _one_thread,
    _what_is_imported_is_no_garbage,
    build,
    draw,
    ip_adapter,
    parts,
    psnr,
    tokenizer,
    tokenizer_2,
)
