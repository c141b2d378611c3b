"""The last step of a parameter's gradient: many programs' partial sums, in a fixed order."""

import triton.language as tl
from torch import Tensor

from dca_kernels.triton_backend import launch
from dca_kernels.triton_backend.launch import Launcher
from dca_kernels.triton_backend.primitives import kernel


@kernel
def _sum_partials_kernel(
    partials, out, count, SIZE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr
):
    """One program: BLOCK columns of partials (count, SIZE), summed: out (SIZE)."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < SIZE
    sums = tl.zeros([BLOCK], ACC)
    for start in range(0, count, STEP):
        offs_row = start + tl.arange(0, STEP)
        ptrs = partials + offs_row.to(tl.int64)[:, None] * SIZE + offs[None, :]
        sums += tl.sum(tl.load(ptrs, mask=(offs_row < count)[:, None] & mask[None, :], other=0.0), 0)
    tl.store(out + offs, sums, mask=mask)


def sum_partials(partials: Tensor, out: Tensor, launcher: Launcher) -> None:
    """Sums over the first axis, in a fixed order: (count, K), in the dtype of sums, -> (K)."""
    count, size = partials.shape
    if count == 0:
        out.zero_()
        return
    config = launcher.config("sum_partials")
    launcher(
        _sum_partials_kernel, config, launch.blocks(size, config["block"]),
        partials=partials, out=out, count=count, SIZE=size,
    )  # fmt: skip
