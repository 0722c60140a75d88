"""The Triton kernels. They import nothing but triton: pointers, sizes and strides go in, and a grid.

`rows_kernel`: attention with the row program on axis "token". `folded_kernel`: the first half of a folded layer.
`picture_kernel`: a stage of a program that looks over the picture. `smooth_kernel`: one pass of a Gaussian over the
picture. `gaussian_kernel`: the filter of a dense CRF. `backward_kernel`, `shared_kernel`, `sum_kernel`: gradients.
The Python side, which allocates and launches, is `sdattn_fast.backend.triton`.
"""

from .backward import backward_kernel, shared_kernel, sum_kernel
from .folded import folded_kernel
from .gaussian_attention import gaussian_kernel
from .refine import picture_kernel
from .rows import rows_kernel
from .smooth import smooth_kernel

__all__ = [
    "backward_kernel", "folded_kernel", "gaussian_kernel", "picture_kernel", "rows_kernel", "shared_kernel",
    "smooth_kernel", "sum_kernel",
]  # fmt: skip
