"""A GPU works behind the host: `to_device` sends it tensors; `MadeOn` and `Kept` let its streams share them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Kept", "MadeOn", "capturing", "current_stream", "take_entries", "to_device"]


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on a device; from the CPU to a GPU without waiting for what the GPU still has to do, unless x wants a gradient.

    Pinned, because of pageable memory CUDA says that the driver may wait for the stream. The pinned copy is torch's,
    which gives its memory to nobody before the GPU has read it.

    Raises: RuntimeError while a CUDA graph is captured, which would read the CPU's memory again at every replay.
    """
    if device.type != "cuda" or x.device.type != "cpu" or torch.compiler.is_compiling():
        return x.to(device)
    if capturing(device):
        raise RuntimeError(
            "sdattn_fast: a CUDA graph is captured, and something is still to be sent to the GPU. Run the same call "
            "once before the capture, with text_cache=True and a timestep on the GPU"
        )
    return x.to(device) if x.requires_grad else x.pin_memory().to(device, non_blocking=True)


def take_entries(x: Tensor, entries: Sequence[int]) -> Tensor:
    """The entries of a batch, by slices, since an index would be sent to x's device."""
    if entries and entries[-1] - entries[0] + 1 == len(entries):
        return x[entries[0] : entries[-1] + 1]
    return torch.stack([x[i] for i in entries]) if entries else x[:0]


def capturing(device: torch.device) -> bool:
    """Whether what is launched on a device goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def current_stream(device: torch.device) -> int:
    """The handle of the current stream of a GPU; 0 on a CPU, which has none."""
    if device.type != "cuda":
        return 0
    # torch.cuda.current_stream makes an object, and every layer asks several times.
    return torch._C._cuda_getCurrentRawStream(torch.cuda.current_device() if device.index is None else device.index)


class MadeOn:
    """The stream that was current on a device when this was made, right after the tensors were; nothing on a CPU.

    Without it, a second stream could read kept tensors before they are written, and the allocator, which knows of the
    first stream alone, could give their memory to somebody else while the second one still reads it.

    Example: ``made = MadeOn(key.device)``, kept beside the key, and ``made.use(lambda: (key,))`` before each use.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ready: Any = None
        self._safe_on: set[int] = set()  # streams by their handle
        if device.type == "cuda":
            self._safe_on.add(current_stream(device))
            # An event of a capture means nothing outside it.
            if not torch.cuda.is_current_stream_capturing():
                self._ready = torch.cuda.Event()
                self._ready.record(torch.cuda.current_stream(device))

    def again(self) -> None:
        """The tensors were written to, on the stream that is current."""
        self.__init__(self._device)  # type: ignore[misc]

    def __reduce__(self) -> tuple[Any, ...]:
        return MadeOn, (self._device,)  # what is copied with it is written on the stream that is current then

    def use(self, tensors: Callable[[], Iterable[Tensor]]) -> None:
        """Before the tensors are read on the current stream: it waits, once, for what made them; the host does not.

        tensors: gives them; called only for a stream that is new, since this runs in every layer at every step.
        """
        if self._device.type != "cuda":
            return
        if current_stream(self._device) in self._safe_on:
            return
        stream = torch.cuda.current_stream(self._device)
        # A stream that is captured may not wait for one that is not; torch.cuda.graph has waited for all of them.
        capturing = torch.cuda.is_current_stream_capturing()
        if self._ready is not None and not capturing:
            stream.wait_event(self._ready)
        for tensor in tensors():
            tensor.record_stream(stream)
        if not capturing:
            self._safe_on.add(stream.cuda_stream)


class Kept:
    """One tensor, just made, that is kept for use on any stream."""

    def __init__(self, x: Tensor) -> None:
        self._x = x
        self._made = MadeOn(x.device)

    def get(self) -> Tensor:
        """The tensor, for the current stream."""
        self._made.use(lambda: (self._x,))
        return self._x
