"""The last step of a parameter's gradient in the `triton` backend: many programs' partial sums, in a fixed order."""

import torch
import triton.language as tl
from torch import Tensor

from dca_kernels import launch
from dca_kernels.primitives import kernel


@kernel
def _sum_partials_kernel(
    partials_ptr, out_ptr, count,
    SIZE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK columns of partials (count, SIZE), summed."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < SIZE
    out = tl.zeros([BLOCK], ACC)
    for start in range(0, count, STEP):
        offs_row = start + tl.arange(0, STEP)
        ptrs = partials_ptr + offs_row.to(tl.int64)[:, None] * SIZE + offs[None, :]
        out += tl.sum(tl.load(ptrs, mask=(offs_row < count)[:, None] & mask[None, :], other=0.0), 0)
    tl.store(out_ptr + offs, out, mask=mask)


def sum_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums over all axes but the last, in a fixed order: (.., K) -> (K), in `dtype`."""
    size = partials.shape[-1]
    block = 128
    out = torch.empty(size, dtype=dtype, device=partials.device)
    if partials.numel() == 0:
        return out.zero_()
    launch.run(
        _sum_partials_kernel,
        launch.blocks(size, block),
        {"num_warps": 4, "num_stages": 2},
        partials_ptr=partials,
        out_ptr=out,
        count=partials.numel() // size,
        SIZE=size,
        ACC=launch.triton_type(partials.dtype),
        BLOCK=block,
        STEP=16,
    )
    return out
