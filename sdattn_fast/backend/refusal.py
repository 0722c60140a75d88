"""`KernelRefused`: a kernel that does not compile, or that the device does not launch; `launching` raises it.

A named backend lets it through. "auto" goes on to the next backend, and remembers the refusal, since a compiler that
failed once would fail again at every step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["KernelRefused", "launching"]


class KernelRefused(RuntimeError):
    """A kernel could not be compiled or launched. None of its results was written.

    Attributes:
        backend: Name of the backend.
        reason: Name of the kernel, and the last line that the compiler or driver wrote.

    Examples:
        >>> try:
        ...     out = sdattn_fast.semantic_attention(query, key, value, backend="triton")
        ... except sdattn_fast.KernelRefused as error:
        ...     print(error.reason)
    """

    def __init__(self, backend: str, reason: str) -> None:
        super().__init__(backend, reason)
        self.backend, self.reason = backend, reason

    def __str__(self) -> str:
        return f"backend: {self.backend!r} could not launch {self.reason}"


@contextlib.contextmanager
def launching(backend: str, kernel: str) -> Iterator[None]:
    """Turns what a compiler or a driver raises inside into `KernelRefused`; torch's out of memory stays what it is."""
    try:
        yield
    except (torch.OutOfMemoryError, KernelRefused):
        raise
    except Exception as error:
        raise KernelRefused(backend, f"{kernel}: {_last_line(error)}") from error


def _last_line(error: BaseException) -> str:
    """Of the first cause: what wraps it shows the source line by line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join([f"{type(error).__name__}:", *lines[-1:]])
