"""Stage 4 backward, on the token grid: the gradient of z, and through the transposed convolution that of the tokens."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dca_kernels.contract import Contract, accumulation_dtype
from dca_kernels.triton_backend import launch
from dca_kernels.triton_backend.batch_norm import load_scale
from dca_kernels.triton_backend.grid import (
    COLUMN_SUMS,
    DIAGONAL,
    NEXT_DIAGONAL,
    ROW_PARTS,
    TABLES,
    band_begin,
    band_end,
    column_table,
    interpolation_tables,
    load_transposed,
    row_table,
    weight_in_row,
)
from dca_kernels.triton_backend.layout import (
    Layout,
    area_of,
    in_group,
    size_arguments,
    size_of,
    steps_of,
    stretch_of,
)
from dca_kernels.triton_backend.parameters import affines_of, batch_norms_of
from dca_kernels.triton_backend.primitives import (
    first_blocks,
    kernel,
    largest,
    load_vector,
    number,
    of_scale,
    padded,
    scale_of,
    split_program,
)
from dca_kernels.triton_backend.tokens import widest_scale
from dca_kernels.triton_backend.upsample import Saved

ROWS = tl.constexpr(4)  # of the strips, that are loaded at once


@kernel
def _grid_gradient_kernel(
    z, less_origin, used, tables, strips, affines, through_statistics, weights, dz, dtokens, sizes,
    SHAPE: tl.constexpr, LAYOUT: tl.constexpr, BY_ROWS: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of the tokens in one row of the grid, for BLOCK_C channels of one scale: (B, N, C).

    It is that of z, dz (B, N, C), through the transposed convolution, where it is wanted. Every block of channels needs
    all of z's, BLOCK_K at a time, and writes those of its own channels. z (B, N, C), used, through_statistics (2, C),
    tables (S, 3 (P_h + P_w)), strips as `_upsample_backward_kernel` wrote them or, BY_ROWS,
    `upsample_rows._upsample_backward_rows_kernel`.
    """
    CHANNELS: tl.constexpr = SHAPE.channels
    FIRST: tl.constexpr = first_blocks(CHANNELS, BLOCK_C)
    ROW_BLOCKS: tl.constexpr = FIRST[len(CHANNELS)]
    b, tile = split_program(LAYOUT.grid[0] * ROW_BLOCKS)
    scale, block = scale_of(tile % ROW_BLOCKS, FIRST)
    for g in tl.static_range(len(LAYOUT.groups)):
        if in_group(scale, LAYOUT, g):
            _grid_gradient(
                z=z, less_origin=less_origin, used=used, tables=tables, strips=strips, affines=affines,
                through_statistics=through_statistics, weights=weights, dz=dz, dtokens=dtokens, sizes=sizes, b=b,
                p=tile // ROW_BLOCKS, scale=scale, block=block, SHAPE=SHAPE, LAYOUT=LAYOUT, g=g, BY_ROWS=BY_ROWS,
                OPERAND=OPERAND, PRECISION=PRECISION, ACC=ACC, BLOCK_C=BLOCK_C, BLOCK_K=BLOCK_K,
            )  # fmt: skip


@triton.jit
def _grid_gradient(
    z, less_origin, used, tables, strips, affines, through_statistics, weights, dz, dtokens, sizes, b, p, scale, block,
    SHAPE: tl.constexpr, LAYOUT: tl.constexpr, g: tl.constexpr, BY_ROWS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`_grid_gradient_kernel` for row p of image b, and a block of channels of a scale of group g."""
    GROUP: tl.constexpr = LAYOUT.groups[g]
    SCALES: tl.constexpr = GROUP.scales
    CHANNELS: tl.constexpr = SHAPE.channels
    OFFSETS: tl.constexpr = SHAPE.offsets
    GRID: tl.constexpr = LAYOUT.grid
    TOTAL: tl.constexpr = SHAPE.total
    WIDEST: tl.constexpr = padded(largest(CHANNELS))
    STEP: tl.constexpr = min(WIDEST, BLOCK_K)
    channels, offset = of_scale(CHANNELS, scale, SCALES), of_scale(OFFSETS, scale, SCALES)
    image = b * GRID[0] * GRID[1] * TOTAL
    offs_q = tl.arange(0, padded(GRID[1]))
    row = image + (p * GRID[1] + offs_q) * TOTAL
    offs_in = block * BLOCK_C + tl.arange(0, min(WIDEST, BLOCK_C))
    mask_in = offs_in < channels
    its_tables = _tables_of(tables + scale * (TABLES * (GRID[0] + GRID[1])), p, offs_q, GRID)
    out = tl.zeros([offs_q.shape[0], offs_in.shape[0]], ACC)
    for start in range(0, channels, STEP):
        offs_c = start + tl.arange(0, STEP)
        mask_c = offs_c < channels
        gradient = _gradient_of_z(
            z=z, less_origin=less_origin, used=used, b=b, tables=its_tables, strips=strips, affines=affines,
            through_statistics=through_statistics, p=p, offs_q=offs_q, offs_c=offs_c, mask_c=mask_c, sizes=sizes,
            scale=scale, channels=channels, offset=offset, SHAPE=SHAPE, LAYOUT=LAYOUT, g=g, BY_ROWS=BY_ROWS, ACC=ACC,
        ).to(dz.dtype.element_ty)  # fmt: skip
        here = (start // BLOCK_C == block) & (offs_q < GRID[1])[:, None] & mask_c[None, :]
        tl.store(dz + row[:, None] + (offset + offs_c)[None, :], gradient, mask=here)
        if dtokens is not None:
            weight_ptrs = of_scale(weights, scale, SCALES) + offs_c[:, None] * channels + offs_in[None, :]
            weight = tl.load(weight_ptrs, mask=mask_c[:, None] & mask_in[None, :], other=0.0).to(OPERAND)
            # [P_w, STEP] [STEP, BLOCK_C]
            out = tl.dot(gradient.to(OPERAND), weight, out, input_precision=PRECISION, out_dtype=ACC)
    if dtokens is not None:
        ptrs = dtokens + row[:, None] + (offset + offs_in)[None, :]
        tl.store(ptrs, out, mask=(offs_q < GRID[1])[:, None] & mask_in[None, :])


@triton.jit
def _tables_of(tables, p, offs_q, GRID: tl.constexpr):
    """In row p: the column sums of U [columns]; of U^T U, the weights of its three diagonals, p's and [columns]."""
    ones = row_table(tables, COLUMN_SUMS, p, GRID) * column_table(tables, COLUMN_SUMS, offs_q, GRID)
    above = row_table(tables, NEXT_DIAGONAL, p - 1, GRID)
    here, below = row_table(tables, DIAGONAL, p, GRID), row_table(tables, NEXT_DIAGONAL, p, GRID)
    left = column_table(tables, NEXT_DIAGONAL, offs_q - 1, GRID)
    middle, right = column_table(tables, DIAGONAL, offs_q, GRID), column_table(tables, NEXT_DIAGONAL, offs_q, GRID)
    return ones, (above, here, below), (left, middle, right)


@triton.jit
def _gradient_of_z(
    z, less_origin, used, b, tables, strips, affines, through_statistics, p, offs_q, offs_c, mask_c, sizes, scale,
    channels, offset,
    SHAPE: tl.constexpr, LAYOUT: tl.constexpr, g: tl.constexpr, BY_ROWS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """In row p of the grid of image b: [columns, channels]. tables: `_tables_of`."""
    GROUP: tl.constexpr = LAYOUT.groups[g]
    NORM: tl.constexpr = LAYOUT.of[GROUP.scales[0]].norm
    GRID: tl.constexpr = LAYOUT.grid
    TOTAL: tl.constexpr = SHAPE.total
    PARTS: tl.constexpr = ROW_PARTS if BY_ROWS else 1
    offs_all = offset + offs_c
    image = b * GRID[0] * GRID[1] * TOTAL
    height, width = size_of(sizes, scale, LAYOUT, g)
    through = tl.zeros([offs_q.shape[0], offs_c.shape[0]], ACC)
    if (NORM is not None) and NORM.from_batch:
        ones, of_rows, of_columns = tables
        origin = load_vector(less_origin.origins + b * TOTAL, offs_all, mask_c, tl.float64)
        # Taken off z: as a mean is, it may be far larger than what varies.
        token = load_vector(z + image, offs_all, mask_c, ACC)
        apart = (origin + token - load_vector(used, offs_all, mask_c, tl.float64)).to(ACC)
        constant = load_vector(through_statistics, offs_all, mask_c, ACC)
        multiple = load_vector(through_statistics + TOTAL, offs_all, mask_c, ACC)
        y = _interpolated_twice(z + image, token, of_rows, of_columns, p, offs_q, offs_all, mask_c, GRID, TOTAL, ACC)
        transposed = less_origin.transposed + image * PARTS
        of_map = load_transposed(transposed, p, offs_q, offs_all, mask_c, height, PARTS, GRID, TOTAL, ACC)
        y += of_map * area_of(sizes, scale, height * width, LAYOUT, g, ACC)
        through += (constant + multiple * apart)[None, :] * ones[:, None] + multiple[None, :] * y
    if BY_ROWS:
        dz = load_transposed(strips + image * PARTS, p, offs_q, offs_all, mask_c, height, PARTS, GRID, TOTAL, ACC)
        dz *= area_of(sizes, scale, height * width, LAYOUT, g, ACC)
    else:
        row_step, _ = steps_of(sizes, scale, height, width, LAYOUT, g, ACC)
        of_scale_i = strips_of(strips, b, sizes, scale, SHAPE, GRID[1])
        dz = _of_strips(of_scale_i, p, offs_q, offs_c, mask_c, height, row_step, channels, GRID, ACC)
        dz *= stretch_of(sizes, scale, width, LAYOUT, g, ACC)
    dz -= through
    if NORM is not None:
        dz *= load_scale(used, affines, offs_c, offs_all, mask_c, scale, LAYOUT, g, TOTAL, ACC)[None, :]
    return dz


@triton.jit
def strips_of(strips, b, sizes, scale, SHAPE: tl.constexpr, GRID_WIDTH: tl.constexpr):
    """Where those of a scale of image b begin."""
    before, total = tl.zeros([], tl.int64), tl.zeros([], tl.int64)
    for k in tl.static_range(len(SHAPE.channels)):
        before = tl.where(scale == k, total, before)
        total += number(sizes.height[k]) * (GRID_WIDTH * SHAPE.channels[k])
    return strips + b * total + before


@triton.jit
def _of_strips(
    strips, p, offs_q, offs_c, mask_c, height, row_step, channels, GRID: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """The transposed interpolation along columns, in row p: [columns, channels]. strips (H_i, P_w, C_i)."""
    begin = band_begin(p, height, GRID[0])
    count = band_end(p, height, GRID[0]) - begin
    mask = (offs_q < GRID[1])[:, None] & mask_c[None, :]
    stride = channels * GRID[1]
    ptrs = strips + begin * stride + offs_q[:, None] * channels + offs_c[None, :]
    out = tl.zeros(mask.shape, ACC)
    for start in range(0, count, ROWS):
        for r in tl.static_range(ROWS):  # none waits for another's load
            weight = weight_in_row(p, begin + start + r, row_step, GRID[0], ACC)
            inside = start + r < tl.where(weight > 0, count, 0)
            out += weight * tl.load(ptrs, mask=mask & inside, other=0.0).to(ACC)
            ptrs += stride
    return out


@triton.jit
def _interpolated_twice(
    z, token, of_rows, of_columns, p, q, offs_all, mask_c, GRID: tl.constexpr, TOTAL: tl.constexpr, ACC: tl.constexpr
):
    """U^T U (z - token) in row p: (G_h x G_w) of it, both with three diagonals: [columns, channels]."""
    out = tl.zeros([q.shape[0], offs_all.shape[0]], ACC)
    ptrs = z + (p * GRID[1] + q)[:, None] * TOTAL + offs_all[None, :]
    for dq in tl.static_range(-1, 2):
        column = tl.zeros(out.shape, ACC)
        for dp in tl.static_range(-1, 2):
            inside = (p + dp >= 0) & (p + dp < GRID[0]) & (q + dq >= 0) & (q + dq < GRID[1])
            mask = inside[:, None] & mask_c[None, :]
            # a constant away from the middle, as loads can have it
            tokens = tl.load(ptrs + (dp * GRID[1] + dq) * TOTAL, mask=mask, other=0.0).to(ACC)
            column += of_rows[dp + 1] * (tokens - token[None, :])
        out += of_columns[dq + 1][:, None] * column
    return out


def grid_gradient(
    saved: Saved,
    strips: Tensor,
    through_statistics: Tensor,
    contract: Contract,
    sizes: Sequence[tuple[int, int]],
    layout: Layout,
    tokens_wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of z and, where wanted, of the tokens: (B, N, C).

    Args:
        saved: what the forward returned.
        strips: the maps' gradients with their rows brought to the grid's width, or, `saved.by_rows`, to the grid.
        through_statistics: (2, C), what the statistics of a batch take off the maps' gradient.
        contract: as in the forward.
        sizes: (H_i, W_i) of each map.
        layout: of the maps, in groups.
        tokens_wanted: whether the tokens' gradient is.
    """
    tokens, launcher, grid = saved.tokens, saved.tokens.launcher, contract.grid
    shape = launcher.shape
    config = launcher.config("grid_gradient", widest_scale(shape) * launch.padded(grid[1]))
    dz, dtokens = torch.empty_like(tokens.plain), torch.empty_like(tokens.plain) if tokens_wanted else None
    launcher(
        _grid_gradient_kernel, config,
        tokens.batch * grid[0] * sum([launch.blocks(c, config["block_c"]) for c in shape.channels]),
        z=saved.z, less_origin=saved.less_origin, used=saved.used,
        tables=interpolation_tables(sizes, grid, accumulation_dtype(launcher.dtype), launcher.device), strips=strips,
        affines=batch_norms_of(contract.norms), through_statistics=through_statistics,
        weights=affines_of(contract.upsample).weight, dz=dz, dtokens=dtokens, sizes=size_arguments(sizes, grid),
        LAYOUT=layout, BY_ROWS=saved.by_rows,
    )  # fmt: skip
    return dz, dtokens
