"""Stage 1: average each skip map over the token grid, then scale and shift each channel (paper, eq. 1)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dca_kernels.contract import Contract, accumulation_dtype
from dca_kernels.torch_backend.common import Context, depthwise, keep_undefined, no_autocast


def patch_embed(maps: Sequence[Tensor], contract: Contract) -> tuple[list[Tensor], list[Tensor]]:
    """The tokens of each skip map.

    Args:
        maps: S tensors (B, C_i, H_i, W_i).
        contract: it has the projections and the grid.

    Returns:
        S tensors (B, N, C_i), and the maps as `upsample` takes them: the gradients of both meet in one pass.
    """
    tokens, passed = [], []
    # torch.compile takes a function's view of a map that is a view itself for a change of its base, and raises.
    copied = torch.compiler.is_compiling() and torch.is_grad_enabled()
    for x, projection, norm in zip(maps, contract.patch_embed, contract.norms, strict=True):
        # Without a BatchNorm, the gradient that `upsample` gives the map may be someone else's memory.
        pooled, same = _AdaptiveAvgPool.apply(x, contract.grid, norm is not None, copied)
        pooled = pooled.flatten(2).transpose(1, 2).contiguous()  # (B, N, C_i)
        weight, bias = depthwise(projection, pooled.dtype)
        tokens.append(torch.addcmul(bias, pooled, weight))
        passed.append(same)
    return tokens, passed


class _AdaptiveAvgPool(torch.autograd.Function):
    """`adaptive_avg_pool2d`, accumulated in float32, beside the map itself: (B, C, P_h, P_w) and (B, C, H, W).

    Deterministic, also backward. The map's gradient passes through here, and the average's is added to it: in its own
    memory where that is `fresh`, as `upsample` makes it. The map is a view of what was given, or `copied`.
    """

    @staticmethod
    def forward(ctx: Context, x: Tensor, grid: tuple[int, int], fresh: bool, copied: bool) -> tuple[Tensor, Tensor]:
        keep_undefined(ctx)
        ctx.size, ctx.dtype, ctx.fresh = x.shape[2:], x.dtype, fresh
        dtype = accumulation_dtype(x.dtype)
        same = x.clone() if copied else x.view_as(x)
        if _holds(ctx.size[0] == grid[0]) and _holds(ctx.size[1] == grid[1]):
            return x.to(dtype, copy=True), same
        columns = _window_matrix(x.shape[3], grid[1], x.device, dtype)
        if _holds(x.shape[2] % grid[0] == 0):  # equal windows: a plain sum over their rows
            rows = x.unflatten(2, (grid[0], -1)).sum(3, dtype=dtype)  # (B, C, P_h, W)
            pooled = rows @ (columns * (grid[0] / x.shape[2])).mT
        else:
            rows = _window_matrix(x.shape[2], grid[0], x.device, dtype) @ x.to(dtype)  # (B, C, P_h, W)
            pooled = rows @ columns.mT
        return pooled, same

    @staticmethod
    def backward(ctx: Context, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        dpooled, dx = grads
        if dpooled is None:
            return dx, None, None, None
        (height, width), grid = ctx.size, dpooled.shape[2:]
        if dx is None:
            dx = dpooled.new_zeros(*dpooled.shape[:2], height, width, dtype=ctx.dtype)
        if torch.is_grad_enabled() or not ctx.fresh:
            dx = dx.clone()
        if _holds(height == grid[0]) and _holds(width == grid[1]):
            return dx.add_(dpooled), None, None, None
        with no_autocast(dx):
            rows = dpooled @ _window_matrix(width, grid[1], dx.device, dpooled.dtype)  # (B, C, P_h, W)
            if _holds(height % grid[0] == 0):
                rows *= grid[0] / height
                dx.view(*dx.shape[:2], grid[0], height // grid[0], width).add_(rows[:, :, :, None])
            else:
                dx.add_(_window_matrix(height, grid[0], dx.device, dpooled.dtype).mT @ rows)
        return dx, None, None, None


def _holds(condition: bool) -> bool:
    """A condition on sizes; of a program that is exported, whether it holds for all that these may be.

    Else it would become one on the program's sizes, which an AOTInductor package does not check.
    """
    if not torch.compiler.is_exporting():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports sympy

    return statically_known_true(condition)


def _window_matrix(size: int, windows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The averages of `adaptive_avg_pool1d` as a matrix (windows, size)."""
    window = torch.arange(windows, device=device)[:, None]
    position = torch.arange(size, device=device)
    inside = (position >= window * size // windows) & (position * windows < (window + 1) * size)
    return inside.to(dtype) / inside.sum(1, keepdim=True)
