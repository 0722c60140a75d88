"""The CUDA backend: `csrc/cuda` through the compiled module `_cuda`; NVIDIA GPUs from Ampere on, forward only.

The kernels take addresses and strides; this file checks what they can serve, allocates the results and hands tensors
over, on torch's current stream. Nothing else is allocated and nobody waits, so calls may be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from ..plan import Plan, RowPlan, gaussian_radius
from ..reference import gaussian_kernel
from ..streams import Kept, capturing, current_stream
from .devices import gpu_index, on_device
from .layout import address, check_rows, row_program, strided
from .limits import beyond_limits, full_bias
from .refusal import launching
from .results import empty_bits, empty_results, heads_added_up_after, zeroed

__all__ = ["availability", "not_supported_reasons", "attention", "folded_refusal", "smooth", "info"]

_OLDEST = (8, 0)
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_DRIVERS = {12: "525", 13: "580"}  # the first that serves a major version of the runtime


def _load() -> tuple[Any, str | None]:
    try:
        from .. import _cuda  # type: ignore[attr-defined]
    except ImportError as error:
        is_built = importlib.util.find_spec(".._cuda", __package__) is not None
        return None, (
            f"the CUDA kernels {f'cannot be loaded ({error})' if is_built else 'are not built'}; `pip install -e .` "
            "builds them where it finds nvcc: on the PATH, in CUDA_HOME, or from pip install 'nvidia-cuda-nvcc==13.*' "
            "(SDATTN_FAST_CUDA=1 says what is missing)"
        )
    return _cuda, None


_cuda, _why_not = _load()
_device_type = "cuda"  # tests put a module in _cuda's place that emulates a GPU, and "cpu" here


def availability(device: torch.device | None = None) -> str | None:
    """None where the kernels can run on a device, torch's current one by default, else the reason and how to fix it."""
    if _cuda is None:
        return _why_not
    if _device_type == "cpu":
        return None
    if torch.version.hip is not None:
        return "torch is built for ROCm, and these kernels are CUDA's; use 'triton'"
    driver, runtime = _cuda.info()["driver"], _cuda.info()["runtime"]
    if driver // 1000 < runtime // 1000:
        have = f"the driver here serves CUDA {_version(driver)}" if driver else "there is no NVIDIA driver here"
        least = _DRIVERS.get(runtime // 1000)
        wanted = f"driver {least} or newer" if least else "a newer driver"
        return f"{have}, and the kernels were built with CUDA {_version(runtime)}, which wants {wanted}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device (is it a CPU build, or CUDA_VISIBLE_DEVICES empty?)"
    return _refusal_of_device(gpu_index(device))


def not_supported_reasons(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, plan: Plan, needs_grad: bool
) -> list[str]:
    """What of this call the kernels do not serve; looks at shapes, strides, dtypes and devices alone."""
    reasons = beyond_limits(query, key, value, bias, _device_type, _DTYPES)
    if query.shape[3] == 0:
        reasons.append("head dimension 0")
    if plan.picture is not None:
        reasons.append("the program looks over the picture, and the CUDA kernels at rows alone")
    if needs_grad:
        reasons.append("gradients are asked for, and there is no backward kernel")
    return reasons


@heads_added_up_after
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    rows: RowPlan,
    return_bits: bool = False,
    keep_layout: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Steps 1 to 6 and 8 for every row, in one launch: (out, maps, bits) as of `cpu.attention`.

    Raises: KernelRefused with CUDA's words where the launch fails.
    """
    b, h, m, d = query.shape
    n, dv = key.shape[2], value.shape[3]
    out, maps = empty_results(query, value, rows, keep_layout)
    bits = empty_bits(query, n) if return_bits else None
    if b * h * m == 0 or n == 0:
        return *zeroed(out, maps), bits
    bias = full_bias(bias, b, h, m, n)
    arguments = (
        *(_row_strided(x) for x in (query, key, value, out)),
        _strided(bias),
        0 if bias is None else _DTYPES[bias.dtype],
        address(maps),
        address(bits),
        _row_program(rows),
        rows.max_content,
        rows.max_drop,
    )
    with on_device(query.device), launching("cuda", "rows_kernel"):
        sizes, dtype, stream = (b, h, m, n, d, dv), _DTYPES[query.dtype], current_stream(query.device)
        _cuda.attention(sizes, dtype, scale, *arguments, stream)
    return out, maps, bits


def folded_refusal(x: Tensor, plan: Plan) -> str | None:
    """Why a folded layer on rows like x (B, M, C) is not served: always."""
    return "there is no folded kernel in CUDA C++"


def smooth(x: Tensor, grid: tuple[int, int], sigma: float, times: int, where: Tensor | None) -> Tensor:
    """A new tensor: x (B, H, height * width, C) convolved `times` times with the Gaussian over the grid where `where`,
    a (B, H) bool, says so (None: everywhere), else copied. `scipy.ndimage.gaussian_filter`'s radius and edges."""
    b, h, _, c = x.shape
    radius = gaussian_radius(sigma)
    if x.numel() == 0 or times == 0 or radius == 0:
        return x.clone(memory_format=torch.contiguous_format)
    kept = x.dtype
    # Several times are one filter: what lies between them is not rounded.
    x = x.to(torch.float32) if times > 1 or kept not in _DTYPES else x
    if where is not None:
        where = where.to(torch.uint8).expand(b, h).contiguous()
    weights = _gaussian(sigma, x.device)
    with on_device(x.device), launching("cuda", "smooth_kernel"):
        for _ in range(times):
            x = x.contiguous()
            out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            sizes, addresses = (b, h, *grid, c), [address(one) for one in (x, out, where, weights)]
            _cuda.smooth(sizes, _DTYPES[x.dtype], *addresses, radius, current_stream(x.device))
            x = out
    return x.to(kept)


def info() -> dict[str, object]:
    """The versions of CUDA that the kernels were built with ("runtime") and that the driver serves ("driver", 0 without
    one), 13000 for 13.0, and "architectures", "8.0 8.6 ... 12.0+PTX"; empty where the kernels are not built."""
    return {} if _cuda is None else _cuda.info()


@functools.cache
def _refusal_of_device(index: int) -> str | None:
    have = torch.cuda.get_device_capability(index)
    what = f"{torch.cuda.get_device_name(index)} has compute capability {have[0]}.{have[1]}"
    if have < _OLDEST:
        return f"{what}, and the kernels want {_OLDEST[0]}.{_OLDEST[1]} or more"
    built_for = _cuda.info()["architectures"]
    if not any(_serves(name, have) for name in built_for.split()):
        return (
            f"{what}, and the kernels were built for {built_for}; build with TORCH_CUDA_ARCH_LIST={have[0]}.{have[1]}"
        )
    return None


def _serves(built_for: str, have: tuple[int, int]) -> bool:
    """Whether code for "8.6", "9.0a", "10.0f" or "12.0+PTX" runs on this device. Binaries run on the same major version
    from their minor one on, PTX on everything newer; "a" is for one device alone and "f" for one major version."""
    name, ptx = built_for.removesuffix("+PTX"), built_for.endswith("+PTX")
    major, minor = (int(part) for part in name.rstrip("af").split("."))
    if name.endswith("a"):
        return have == (major, minor)
    if ptx and not name.endswith("f") and have >= (major, minor):
        return True
    return have[0] == major and have[1] >= minor


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


# Never given up: a CUDA graph that was captured with one reads it at every replay.
_gaussians: dict[tuple[float, torch.device], Kept] = {}


def _gaussian(sigma: float, device: torch.device) -> Tensor:
    """Made on the device, so that nobody waits; not kept from a CUDA graph's capture, whose memory is the graph's."""
    if (sigma, device) not in _gaussians:
        weights = gaussian_kernel(sigma, dtype=torch.float32, device=device)
        if capturing(device):
            return weights
        _gaussians[sigma, device] = Kept(weights)
    return _gaussians[sigma, device].get()


def _row_program(rows: RowPlan) -> tuple[Any, ...]:
    programmed = rows.content is not None and rows.max_content > 0
    return row_program(rows, rows.content if programmed else None)


def _strided(x: Tensor | None) -> tuple[int, ...]:
    """As `layout.strided`; 0 for a dimension of size 1, whose stride may be anything and says nothing of alignment."""
    place, *strides = strided(x)
    return place, *(strides if x is None else (0 if n == 1 else s for n, s in zip(x.shape, strides, strict=True)))


def _row_strided(x: Tensor | None) -> tuple[int, ...]:
    check_rows(x)
    return _strided(x)
