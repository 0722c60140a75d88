"""Which stream waits for which, with streams and tensors that only take notes; CUDA itself is not here."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdattn_fast import streams
from sdattn_fast.streams import MadeOn, to_device

CUDA = torch.device("cuda", 0)


class Stream:
    def __init__(self, handle: int) -> None:
        self.cuda_stream = handle
        self.waited: list[Any] = []

    def wait_event(self, event: Any) -> None:
        self.waited.append(event.recorded_on)


class Event:
    def record(self, stream: Stream) -> None:
        self.recorded_on = stream


class Noted:
    def __init__(self) -> None:
        self.read_on: list[Stream] = []

    def record_stream(self, stream: Stream) -> None:
        self.read_on.append(stream)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU with two streams, the first of them current."""
    found = SimpleNamespace(first=Stream(1), second=Stream(2), capturing=False)
    found.current = found.first
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: found.current)
    monkeypatch.setattr(streams, "current_stream", lambda device: found.current.cuda_stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.capturing)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return found


def test_another_stream_waits_once_and_the_allocator_is_told(gpu):
    key, made = Noted(), MadeOn(CUDA)
    made.use(lambda: pytest.fail("the stream that made them needs nothing"))
    gpu.current = gpu.second
    made.use(lambda: (key,))
    made.use(lambda: (key,))
    assert gpu.second.waited == [gpu.first]
    assert key.read_on == [gpu.second]


def test_a_capture_waits_for_no_stream_outside_it(gpu):
    key, made = Noted(), MadeOn(CUDA)
    gpu.current, gpu.capturing = gpu.second, True
    made.use(lambda: (key,))
    assert gpu.second.waited == [] and key.read_on == [gpu.second]
    gpu.capturing = False
    made.use(lambda: (key,))
    assert gpu.second.waited == [gpu.first], "after the capture the stream still has to wait"


def test_a_copy_belongs_to_the_stream_that_made_the_copy(gpu):
    made = MadeOn(CUDA)
    gpu.current = gpu.second
    copied = copy.deepcopy(made)
    copied.use(lambda: pytest.fail("the stream that made them needs nothing"))


def test_a_cpu_has_no_streams(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: pytest.fail("no CUDA here"))
    MadeOn(torch.device("cpu")).use(lambda: pytest.fail("nothing to record"))


def test_nothing_is_sent_in_a_capture(gpu):
    """A replay would read the CPU's memory, which is somebody else's by then."""
    gpu.capturing = True
    with pytest.raises(RuntimeError, match="Run the same call once before the capture"):
        to_device(torch.zeros(2), CUDA)
    assert to_device(torch.zeros(2), torch.device("meta")).is_meta
