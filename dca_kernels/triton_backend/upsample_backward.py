"""The backward of stage 4, as far as the tokens; the maps' gradients wait for those of the first stage's tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dca_kernels.contract import Affine, BatchNorm, Contract, accumulation_dtype
from dca_kernels.triton_backend import launch
from dca_kernels.triton_backend.batch_norm import load_affine, load_mean, load_scale, through_relu
from dca_kernels.triton_backend.grid import (
    COLUMN_SUMS,
    DIAGONAL,
    NEXT_DIAGONAL,
    ROW_PARTS,
    TABLES,
    band_begin,
    band_end,
    column_table,
    interpolate,
    interpolate_rows,
    interpolation_matrix,
    interpolation_tables,
    less_mean,
    load_map,
    load_transposed,
    of_channels,
    pairs,
    row_table,
    weight_in_row,
)
from dca_kernels.triton_backend.layout import (
    area_of,
    grouped,
    has_tile,
    in_group,
    layout_of,
    memory_of,
    norms_of,
    size_arguments,
    size_of,
    sizes_of,
    split_tiles,
    steps_of,
    stretch_of,
    strides_of,
    tiles_of,
)
from dca_kernels.triton_backend.parameters import affines_of, batch_norms_of, gradient_dtype
from dca_kernels.triton_backend.partials import sum_partials
from dca_kernels.triton_backend.primitives import (
    argument,
    divide,
    first_blocks,
    kernel,
    largest,
    load_tokens,
    load_vector,
    number,
    of_scale,
    padded,
    scale_of,
    split_program,
    sum_images,
)
from dca_kernels.triton_backend.tokens import Tokens, widest_scale
from dca_kernels.triton_backend.upsample import Saved
from dca_kernels.triton_backend.upsample_rows import _upsample_backward_rows_kernel, tiles_of_rows

ROWS = tl.constexpr(4)  # of the strips, that are loaded at once


@triton.jit
def load_relu_gradient(
    x, z, dout, affines, used, b, c_begin, h_begin, sizes, height, width,
    i: tl.constexpr, SHAPE: tl.constexpr, LAYOUT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """In one tile of whole rows: x; up(z) + x less its mean; and the gradient of what BatchNorm gave, through the ReLU.

    Each [pairs, columns]. x, dout (B, C_i, H_i, W_i), z (B, N, C), used (2, C).
    """
    GRID: tl.constexpr = LAYOUT.grid
    TOTAL: tl.constexpr = SHAPE.total
    MAP: tl.constexpr = LAYOUT.of[i]
    STRIDE: tl.constexpr = MAP.stride
    OUT_STRIDE: tl.constexpr = MAP.out_stride
    TILE: tl.constexpr = MAP.tile
    mean = load_mean(used, c_begin, i, SHAPE, LAYOUT)
    pair_c, pair_h, mask_pair = pairs(c_begin, h_begin, SHAPE.channels[i], height, TILE)
    offs_w = tl.arange(0, TILE.columns)
    mask = mask_pair[:, None] & (offs_w < width)[None, :]
    z_ptrs = z + b * GRID[0] * GRID[1] * TOTAL + SHAPE.offsets[i] + pair_c
    row_step, column_step = steps_of(sizes, i, height, width, LAYOUT, i, ACC)
    up = interpolate(
        z_ptrs=z_ptrs, mask_pair=mask_pair, pair_h=pair_h, first=0, offs_w=offs_w, row_step=row_step,
        column_step=column_step, TOKENS=TILE.tokens, GRID=GRID, TOTAL=TOTAL, PRECISION=PRECISION, ACC=ACC,
    )  # fmt: skip
    pixels = load_map(x, b, pair_c, pair_h, offs_w, mask, strides_of(STRIDE, height, width), ACC)
    y = less_mean(pixels, up, mean, TILE.rows, ACC)
    gradient = load_map(dout, b, pair_c, pair_h, offs_w, mask, strides_of(OUT_STRIDE, height, width), ACC)
    if MAP.norm is not None:
        affine = load_affine(used, affines, c_begin, i, SHAPE, LAYOUT, ACC)
        gradient = through_relu(y, gradient, affine, TILE.rows)
    return pixels, y, gradient


@kernel
def _upsample_backward_kernel(
    maps, z, douts, affines, used, sums, strips, sizes, counts, sum_blocks,
    SHAPE: tl.constexpr, LAYOUT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: a tile of whole rows of one map. Sums over its pixels of the gradient g behind the ReLU, and of g y.

    maps, douts (B, C_i, H_i, W_i), z (B, N, C), used (2, C). Writes sums (B, sum_blocks, 2, C); and strips, g times the
    transposed interpolation along rows: for each image S arrays (H_i, P_w, C_i), one after another.
    """
    b, tile = split_tiles(counts)
    for i in tl.static_range(len(SHAPE.channels)):
        if has_tile(tile, counts, i):
            _upsample_backward(
                x=maps[i], z=z, dout=douts[i], affines=affines, used=used,
                sums=sums + b * sum_blocks * 2 * SHAPE.total,
                strips=_strips_of(strips, b, sizes, i, SHAPE, LAYOUT.grid[1]), b=b, tile=tile - number(counts.first[i]),
                sizes=sizes, counts=counts, i=i, SHAPE=SHAPE, LAYOUT=LAYOUT, PRECISION=PRECISION, ACC=ACC,
            )  # fmt: skip


@triton.jit
def _strips_of(strips, b, sizes, scale, SHAPE: tl.constexpr, GRID_WIDTH: tl.constexpr):
    """Where those of a scale of image b begin."""
    before, total = tl.zeros([], tl.int64), tl.zeros([], tl.int64)
    for k in tl.static_range(len(SHAPE.channels)):
        before = tl.where(scale == k, total, before)
        total += number(sizes.height[k]) * (GRID_WIDTH * SHAPE.channels[k])
    return strips + b * total + before


@triton.jit
def _upsample_backward(
    x, z, dout, affines, used, sums, strips, b, tile, sizes, counts,
    i: tl.constexpr, SHAPE: tl.constexpr, LAYOUT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """`_upsample_backward_kernel` for tile `tile` of image b and scale i; sums and strips are those of image b.

    It goes over its rows some columns at a time: however wide the map is, a tile has as many rows as products need.
    """
    CHANNELS: tl.constexpr = SHAPE.channels[i]
    GRID: tl.constexpr = LAYOUT.grid
    MAP: tl.constexpr = LAYOUT.of[i]
    STRIDE: tl.constexpr = MAP.stride
    OUT_STRIDE: tl.constexpr = MAP.out_stride
    TILE: tl.constexpr = MAP.tile
    height, width = size_of(sizes, i, LAYOUT, i)
    strides, out_strides = strides_of(STRIDE, height, width), strides_of(OUT_STRIDE, height, width)
    block, row = divide(tile, counts.rows[i])
    c_begin, h_begin = block * TILE.channels, row * TILE.rows
    mean = load_mean(used, c_begin, i, SHAPE, LAYOUT)
    if MAP.norm is not None:
        affine = load_affine(used, affines, c_begin, i, SHAPE, LAYOUT, ACC)
    pair_c, pair_h, mask_pair = pairs(c_begin, h_begin, CHANNELS, height, TILE)
    z_ptrs = z + b * GRID[0] * GRID[1] * SHAPE.total + SHAPE.offsets[i] + pair_c
    offs_q = tl.arange(0, padded(GRID[1]))
    row_step, column_step = steps_of(sizes, i, height, width, LAYOUT, i, ACC)
    rows = interpolate_rows(z_ptrs, mask_pair, pair_h, offs_q, row_step, GRID, SHAPE.total, ACC, TILE.channels)
    sum_gradient, sum_product = tl.zeros(pair_c.shape, ACC), tl.zeros(pair_c.shape, ACC)
    strip = tl.zeros([pair_c.shape[0], offs_q.shape[0]], ACC)
    for w_begin in range(0, width, TILE.columns):
        offs_w = w_begin + tl.arange(0, TILE.columns)
        matrix = interpolation_matrix(offs_q, offs_w, column_step, ACC)
        mask = mask_pair[:, None] & (offs_w < width)[None, :]
        # Both before the product: Triton then sums in its layout, not in that of the loads, which would be a way
        # through shared memory for all that is summed.
        pixels = load_map(x, b, pair_c, pair_h, offs_w, mask, strides, ACC)
        gradient = load_map(dout, b, pair_c, pair_h, offs_w, mask, out_strides, ACC)
        # [pairs, P_w] [P_w, columns]: up(z) is rounded to what products have, less than z itself
        up = tl.dot(rows, matrix, input_precision=PRECISION, out_dtype=ACC)
        y = less_mean(pixels, up, mean, TILE.rows, ACC)
        if MAP.norm is not None:
            gradient = through_relu(y, gradient, affine, TILE.rows)
        sum_gradient += tl.sum(gradient, 1)
        sum_product += tl.sum(gradient * y, 1)
        # [pairs, columns] [columns, P_w]
        strip = tl.dot(gradient, tl.trans(matrix), strip, input_precision=PRECISION, out_dtype=ACC)
    offs_c = c_begin + tl.arange(0, TILE.channels)
    sums_ptrs = sums + row * 2 * SHAPE.total + SHAPE.offsets[i] + offs_c
    tl.store(sums_ptrs, of_channels(sum_gradient, TILE), mask=offs_c < CHANNELS)
    tl.store(sums_ptrs + SHAPE.total, of_channels(sum_product, TILE), mask=offs_c < CHANNELS)
    ptrs = strips + (pair_h * GRID[1] * CHANNELS + pair_c)[:, None] + (offs_q * CHANNELS)[None, :]
    strip /= stretch_of(sizes, i, width, LAYOUT, i, ACC)  # of a gradient's size, whatever the stride
    tl.store(ptrs, strip, mask=mask_pair[:, None] & (offs_q < GRID[1])[None, :])


@kernel
def _norm_gradients_kernel(
    sums, used, affines, out, through_statistics, batch, sizes, blocks, sum_blocks,
    SHAPE: tl.constexpr, LAYOUT: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: a sum of BLOCK_C channels of one scale, over images and tiles in a fixed order, and what it is for.

    out (3, C): BatchNorm's weight and bias, the convolution's bias. through_statistics (2, C): what the gradient of
    up(z) + x loses where the statistics are the batch's: a constant, and a multiple of up(z) + x less its mean. sums
    (B, sum_blocks, 2, C), of scale i in blocks[i] blocks, used (2, C).
    """
    CHANNELS: tl.constexpr = SHAPE.channels
    FIRST: tl.constexpr = first_blocks(CHANNELS, BLOCK_C)
    k, tile = tl.program_id(0) // FIRST[len(CHANNELS)], tl.program_id(0) % FIRST[len(CHANNELS)]
    scale, block = scale_of(tile, FIRST)
    offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    for g in tl.static_range(len(LAYOUT.groups)):
        if in_group(scale, LAYOUT, g):
            _norm_gradients(
                sums=sums, used=used, affines=affines, out=out, through_statistics=through_statistics, batch=batch,
                sizes=sizes, blocks=blocks, sum_blocks=sum_blocks, k=k, scale=scale, offs_c=offs_c, SHAPE=SHAPE,
                LAYOUT=LAYOUT, g=g, ACC=ACC,
            )  # fmt: skip


@triton.jit
def _norm_gradients(
    sums, used, affines, out, through_statistics, batch, sizes, blocks, sum_blocks, k, scale, offs_c,
    SHAPE: tl.constexpr, LAYOUT: tl.constexpr, g: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """`_norm_gradients_kernel` for sum k of some channels of a scale of group g."""
    GROUP: tl.constexpr = LAYOUT.groups[g]
    SCALES: tl.constexpr = GROUP.scales
    NORM: tl.constexpr = LAYOUT.of[GROUP.scales[0]].norm
    CHANNELS: tl.constexpr = SHAPE.channels
    OFFSETS: tl.constexpr = SHAPE.offsets
    TOTAL: tl.constexpr = SHAPE.total
    mask_c = offs_c < of_scale(CHANNELS, scale, SCALES)
    offs_all = of_scale(OFFSETS, scale, SCALES) + offs_c
    height, width = size_of(sizes, scale, LAYOUT, g)
    rstd = tl.full(offs_c.shape, 1.0, ACC)
    factor = rstd
    if NORM is not None:
        rstd = tl.rsqrt(load_vector(used + TOTAL, offs_all, mask_c, ACC) + NORM.eps)
        factor = load_scale(used, affines, offs_c, offs_all, mask_c, scale, LAYOUT, g, TOTAL, ACC)
    pixels = batch.to(ACC) * (height * width)
    gradient = sum_images(
        ptr=sums + k * TOTAL, offs=offs_all, mask=mask_c, batch=batch, blocks=number(of_scale(blocks, scale, SCALES)),
        STRIDE=2 * TOTAL, image_stride=sum_blocks * 2 * TOTAL, ACC=ACC,
    )  # fmt: skip
    if k == 0:
        tl.store(out + TOTAL + offs_all, gradient, mask=mask_c)
        if (NORM is not None) and NORM.from_batch:
            tl.store(out + 2 * TOTAL + offs_all, tl.zeros(offs_c.shape, ACC), mask=mask_c)
            tl.store(through_statistics + offs_all, gradient / pixels, mask=mask_c)
        else:
            tl.store(out + 2 * TOTAL + offs_all, factor * gradient, mask=mask_c)
    else:
        tl.store(out + offs_all, gradient * rstd, mask=mask_c)
        if (NORM is not None) and NORM.from_batch:
            tl.store(through_statistics + TOTAL + offs_all, gradient * rstd * rstd / pixels, mask=mask_c)


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
        of_scale_i = _strips_of(strips, b, sizes, scale, SHAPE, GRID[1])
        dz = _of_strips(of_scale_i, p, offs_q, offs_c, mask_c, height, row_step, channels, GRID, ACC)
        dz *= stretch_of(sizes, scale, width, LAYOUT, g, ACC)
    dz -= through
    if NORM is not None:
        dz *= load_scale(used, affines, offs_c, offs_all, mask_c, scale, LAYOUT, g, TOTAL, ACC)[None, :]
    return dz


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


@kernel
def _conv_gradient_kernel(
    tokens, dz, dweight,
    SHAPE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: a tile of dz^T tokens, the gradient of one scale's convolution, over one image.

    tokens, dz (B, N, C). dweight: for each image the S matrices (C_i, C_i), one after another.
    """
    N: tl.constexpr = SHAPE.tokens
    TOTAL: tl.constexpr = SHAPE.total
    CHANNELS: tl.constexpr = SHAPE.channels
    OFFSETS: tl.constexpr = SHAPE.offsets
    FIRST: tl.constexpr = _first_squares(CHANNELS, BLOCK_C)
    ELEMENTS: tl.constexpr = _first_squares(CHANNELS, 1)
    b, tile = split_program(FIRST[len(CHANNELS)])
    scale, local = scale_of(tile, FIRST)
    channels = of_scale(CHANNELS, scale)
    first = b * N * TOTAL + of_scale(OFFSETS, scale)
    rows = tl.cdiv(channels, BLOCK_C)
    offs_out = local // rows * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_in = local % rows * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_out, mask_in = offs_out < channels, offs_in < channels
    out = tl.zeros([BLOCK_C, BLOCK_C], ACC)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        gradient = load_tokens(dz + first, offs_n, offs_out, offs_n < N, mask_out, TOTAL)
        its_tokens = load_tokens(tokens + first, offs_n, offs_in, offs_n < N, mask_in, TOTAL)
        out = tl.dot(  # [BLOCK_C, BLOCK_N] [BLOCK_N, BLOCK_C]
            tl.trans(gradient.to(OPERAND)), its_tokens.to(OPERAND), out, input_precision=PRECISION, out_dtype=ACC
        )
    matrix = b * ELEMENTS[len(CHANNELS)] + of_scale(ELEMENTS, scale)
    ptrs = dweight + matrix + offs_out[:, None] * channels + offs_in[None, :]
    tl.store(ptrs, out, mask=mask_out[:, None] & mask_in[None, :])


@triton.constexpr_function
def _first_squares(sizes, block):
    """Where the tiles of each square matrix begin among all; the last number is that of all."""
    return tuple(sum((-(-size // block)) ** 2 for size in sizes[:i]) for i in range(len(sizes) + 1))


class Gradients(NamedTuple):
    """Of the parameters: the S matrices (C_i, C_i), one after another; and what `_norm_gradients_kernel` wrote."""

    convolutions: Tensor
    norms: Tensor  # (3, C): BatchNorm's weights and biases, the convolutions' biases

    @classmethod
    def empty(cls, tokens: Tokens, dtype: torch.dtype) -> "Gradients":
        """Fresh memory for those of an upsampling of these tokens, of `gradient_dtype`."""
        squares = sum(c * c for c in tokens.channels)
        return cls(tokens.empty(squares, dtype=dtype), tokens.empty(3, tokens.shape.total, dtype=dtype))

    def split(
        self, norms: Sequence[BatchNorm | None], channels: Sequence[int]
    ) -> tuple[tuple[Affine, ...], tuple[BatchNorm | None, ...]]:
        """As the contract has them, of the convolutions and of the BatchNorms: views."""
        dgammas, dbetas, dbiases = (row.split(channels) for row in self.norms)
        weights = self.convolutions.split([c * c for c in channels])
        scales = zip(norms, dgammas, dbetas, strict=True)
        of_norms = [None if norm is None else norm._replace(weight=weight, bias=bias) for norm, weight, bias in scales]
        return tuple(map(Affine, weights, dbiases)), tuple(of_norms)


class Backward(NamedTuple):
    """What `upsample_backward` returns.

    Attributes:
        dtokens: (B, N, C), where wanted.
        through_statistics: (2, C), what the statistics of a batch take off the maps' gradient.
        parameters: their gradients.
    """

    dtokens: Tensor | None
    through_statistics: Tensor
    parameters: Gradients


def upsample_backward(
    saved: Saved, maps: Sequence[Tensor], douts: Sequence[Tensor], contract: Contract, tokens_wanted: bool
) -> Backward:
    """The gradients of `upsample`, but for the maps'.

    Args:
        saved: what the forward returned.
        maps: as in the forward.
        douts: S tensors (B, C_i, H_i, W_i), any strides.
        contract: as in the forward.
        tokens_wanted: whether the tokens' gradient is.
    """
    tokens, launcher, batch = saved.tokens, saved.tokens.launcher, saved.tokens.batch
    shape, grid, affines, norms = (
        launcher.shape,
        contract.grid,
        batch_norms_of(contract.norms),
        norms_of(contract.norms),
    )
    sizes = sizes_of(maps)
    size_args, widest = size_arguments(sizes, grid), max([width for _, width in sizes])
    by_rows = saved.by_rows
    if by_rows:
        config = launcher.config("upsample_backward_rows", widest)
        tiles = tiles_of_rows(shape, sizes, grid, config["tile"], config["rows"])
        strips = tokens.empty(batch, ROW_PARTS.value, shape.tokens, shape.total, dtype=launcher.dtype)
    else:
        config = launcher.config("upsample_backward" + memory_of(maps), widest)
        tiles = tiles_of(shape, sizes, grid, config["tile"], config["block_c"], config["block_w"], whole_rows=True)
        elements = sum([c * height * grid[1] for c, (height, _) in zip(shape.channels, sizes, strict=True)])
        strips = tokens.empty(batch, elements, dtype=launcher.dtype)
    most = max(tiles.rows)
    sums = tokens.empty(batch, most, 2, shape.total)
    of_scales = zip(maps, norms, affines.weight, strict=True)
    keys = tuple([(x.dtype, norm, weight is None) for x, norm, weight in of_scales])
    layout = grouped(layout_of(maps, grid, norms), keys)
    launcher(
        _upsample_backward_rows_kernel if by_rows else _upsample_backward_kernel, config, batch * tiles.programs,
        maps=tuple(maps), z=saved.forms[-1], douts=tuple(douts), affines=affines, used=saved.used, sums=sums,
        strips=strips, sizes=size_args, counts=tiles.counts, sum_blocks=most,
        LAYOUT=layout_of(maps, grid, norms, douts, tiles=tiles.of, by_rows=by_rows),
    )  # fmt: skip

    config = launcher.config("norm_gradients")
    gradients, through_statistics = Gradients.empty(tokens, gradient_dtype(contract)), tokens.empty(2, shape.total)
    launcher(
        _norm_gradients_kernel, config, 2 * sum([launch.blocks(c, config["block_c"]) for c in shape.channels]),
        sums=sums, used=saved.used, affines=affines, out=gradients.norms, through_statistics=through_statistics,
        batch=batch, sizes=size_args, blocks=tuple(map(argument, tiles.rows)), sum_blocks=most, LAYOUT=layout,
    )  # fmt: skip

    config = launcher.config("grid_gradient", widest_scale(shape) * launch.padded(grid[1]))
    dz, dtokens = torch.empty_like(tokens.plain), torch.empty_like(tokens.plain) if tokens_wanted else None
    launcher(
        _grid_gradient_kernel, config,
        batch * grid[0] * sum([launch.blocks(c, config["block_c"]) for c in shape.channels]),
        z=saved.z, less_origin=saved.less_origin, used=saved.used,
        tables=interpolation_tables(sizes, grid, accumulation_dtype(launcher.dtype), launcher.device), strips=strips,
        affines=affines, through_statistics=through_statistics, weights=affines_of(contract.upsample).weight, dz=dz,
        dtokens=dtokens, sizes=size_args, LAYOUT=layout, BY_ROWS=by_rows,
    )  # fmt: skip

    config = launcher.config("conv", widest_scale(shape))
    dweight = gradients.convolutions[None] if batch == 1 else tokens.empty(batch, gradients.convolutions.numel())
    launcher(
        _conv_gradient_kernel, config, batch * sum([launch.blocks(c, config["block_c"]) ** 2 for c in shape.channels]),
        tokens=tokens.plain, dz=dz, dweight=dweight,
    )  # fmt: skip
    if batch != 1:
        sum_partials(dweight, gradients.convolutions, launcher)
    return Backward(dtokens, through_statistics, gradients)
