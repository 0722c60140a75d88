"""A GPU that is not there, to find where the host would wait for it.

Tensors say that they are on "cuda:0" and lie on the CPU, where torch's ops run on them; our own kernels are launched
nowhere and leave zeros. `waits` lists the calls from our code at which a real GPU would make the host wait: a number is
read, a tensor's size hangs on numbers, a tensor goes to the CPU, or comes from memory that is not pinned.

It changes torch for good, so it is used in a process of its own. Backward passes do not run through torch's engine,
which wants a real driver; a node's own backward can be called.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

import sdattn_fast

__all__ = ["GPU", "switched_on", "waits"]

GPU = torch.device("cuda:0")
waits: list[str] = []  # "equal at patching/text_cache.py:171 in _number"

_READS = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "bincount",
}
_PACKAGE = str(Path(sdattn_fast.__file__).parent)
_pinned: set[int] = set()  # storages


class OnGPU(Tensor):
    """A tensor on the GPU; `data_` holds its numbers."""

    data_: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data: Tensor) -> OnGPU:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, data.shape, strides=data.stride(), storage_offset=data.storage_offset(), dtype=data.dtype, device=GPU
        )
        made.data_ = data
        return made

    def tolist(self) -> Any:  # torch has it for plain tensors alone
        _wait("tolist")
        return self.data_.tolist()

    def __repr__(self) -> str:
        return f"OnGPU({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Also for ops that make a tensor of none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.removeprefix("aten::")
    inputs = _tensors((args, *kwargs.values()))
    from_gpu = any(isinstance(x, OnGPU) for x in inputs)
    device = kwargs.get("device")
    to_gpu = torch.device(device).type == "cuda" if device is not None else from_gpu
    if name == "_pin_memory":
        copy = args[0].clone()
        _pinned.add(copy.untyped_storage()._cdata)
        return copy
    _note(name, args, kwargs, inputs, from_gpu, to_gpu)
    inner = {k: torch.device("cpu") if k == "device" and v is not None else v for k, v in kwargs.items()}
    out = func(*_each(_plain, args), **{k: _each(_plain, x) for k, x in inner.items()})
    if name == "_to_copy" and from_gpu != to_gpu:
        out = out.clone()
    if not to_gpu or not _tensors(out):
        return out
    wrapped = _each(OnGPU, out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if from_gpu and _aliases(func) else wrapped


def _each(change: Callable[[Tensor], Any], x: Any) -> Any:
    """Change every tensor in nested tuples and lists; torch's own, for any structure, takes most of the time here."""
    if isinstance(x, Tensor):
        return change(x)
    return type(x)(_each(change, one) for one in x) if type(x) in (tuple, list) else x


def _tensors(x: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _each(found.append, x)
    return found


@functools.cache
def _aliases(func: Any) -> bool:
    """Whether what comes out may be a view of what went in, or that itself."""
    return any(argument.alias_info is not None for argument in func._schema.arguments)


def _plain(x: Tensor) -> Tensor:
    return x.data_ if isinstance(x, OnGPU) else x


def _note(name: str, args: Any, kwargs: Any, inputs: list[Tensor], from_gpu: bool, to_gpu: bool) -> None:
    # A mask is counted, and an index on the CPU is sent.
    dear_index = name in ("index", "index_put_", "index_put") and any(
        x.dtype in (torch.bool, torch.uint8) or not isinstance(x, OnGPU) for x in _tensors(args[1])
    )
    sized_by_numbers = name == "repeat_interleave" and kwargs.get("output_size") is None
    reads = from_gpu and (name in _READS or dear_index or sized_by_numbers)
    asynchronous = False
    if name == "_to_copy":
        crosses = from_gpu != to_gpu
        asynchronous = bool(kwargs.get("non_blocking")) and args[0].untyped_storage()._cdata in _pinned
    elif name in ("copy_", "_foreach_copy_"):
        crosses = from_gpu and not all(isinstance(x, OnGPU) for x in inputs)
    else:
        crosses = False
    if reads or (crosses and not asynchronous):
        _wait(name)


def _wait(name: str) -> None:
    where = _our_frame()
    if where is not None:
        waits.append(f"{name} at {where}")


def _our_frame() -> str | None:
    """The line of the package that asked for it; None where another library did so by itself."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if any(f"/{library}/" in path for library in ("diffusers", "transformers")):
            return None
        if path.startswith(_PACKAGE):
            return f"{path.removeprefix(_PACKAGE)[1:]}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return None


@contextlib.contextmanager
def switched_on() -> Iterator[None]:
    """From here on "cuda" works, and `waits` is kept."""
    _guard()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    stream = SimpleNamespace(cuda_stream=0, wait_event=lambda event: None)
    changes: dict[str, Any] = {
        "_lazy_init": lambda: None, "is_available": lambda: True, "current_device": lambda: 0,
        "device_count": lambda: 1, "current_stream": lambda device=None: stream,
        "is_current_stream_capturing": lambda: False, "device": lambda device: contextlib.nullcontext(),
        "Event": lambda *args, **kwargs: SimpleNamespace(record=lambda stream: None),
    }  # fmt: skip
    for name, change in changes.items():
        setattr(torch.cuda, name, change)
    torch._C._cuda_getCurrentRawStream = lambda index: 0
    Tensor.pin_memory = lambda self, device=None: torch.ops.aten._pin_memory(self)  # type: ignore[method-assign]
    _no_kernels()
    torch._C._set_only_lift_cpu_tensors(True)
    with _Mode():
        yield
    torch._C._set_only_lift_cpu_tensors(False)


def _guard() -> None:
    torch._C._ensureCUDADeviceGuardSet()  # suffices where torch was built with CUDA
    if torch.backends.cuda.is_built():
        return
    source, root = Path(__file__).with_suffix(".cpp"), Path(torch.__file__).parent
    flags = ["-std=c++20", "-O0", "-fPIC", "-shared", f"-I{root}/include", f"-L{root}/lib", "-lc10"]
    flags.append(f"-Wl,-rpath,{root}/lib")
    mark = hashlib.sha256("\0".join([torch.__version__, *flags]).encode() + source.read_bytes()).hexdigest()[:16]
    library = Path(__file__).parents[2] / "build" / f"absent_gpu-{mark}.so"
    if not library.is_file():
        library.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = f"{folder}/{library.name}"
            subprocess.run(["g++", str(source), "-o", made, *flags], check=True)
            os.replace(made, library)
    ctypes.CDLL(str(library))


def _no_kernels() -> None:
    """Both GPU backends, up to the launch."""
    from sdattn_fast.backend import cuda, triton
    from sdattn_fast.backend.triton import gpu, launch

    for backend in (triton, cuda):
        backend.availability = lambda device=None: None
    gpu.num_sms = lambda device: 132
    launch.launch = launch.launch_bound = lambda *call: None
    cuda._refusal_of_device = lambda index: None
    cuda._cuda = SimpleNamespace(**{name: (lambda *call: None) for name in ("attention", "smooth")})
    cuda._handle = cuda._address = lambda x: 0
