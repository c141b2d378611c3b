"""BatchNorm's statistics of up(z) + x, from parts of the token grid's size, and what it does with them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dca_kernels.contract import Contract, accumulation_dtype, from_batch
from dca_kernels.triton_backend import launch
from dca_kernels.triton_backend.grid import (
    COLUMN_SUMS,
    DIAGONAL,
    NEXT_DIAGONAL,
    TABLES,
    column_table,
    interpolation,
    interpolation_tables,
    load_grid,
    load_transposed,
    row_table,
    window_begin,
)
from dca_kernels.triton_backend.layout import (
    area_of,
    grouped,
    in_group,
    layout_of,
    norms_of,
    size_arguments,
    size_of,
    sizes_of,
    steps_of,
    stride_of_scale,
)
from dca_kernels.triton_backend.parameters import affines_of, buffers_of
from dca_kernels.triton_backend.patch_embed import Maps
from dca_kernels.triton_backend.primitives import (
    first_blocks,
    kernel,
    load_vector,
    of_scale,
    scale_of,
    split_program,
)
from dca_kernels.triton_backend.tokens import Tokens

# How much larger its two parts may be than a variance, before it is taken directly: of 32 bit, and of 16, whose
# products with the map are rounded.
CANCELLATION = tl.constexpr(100.0)
CANCELLATION_IN_16_BIT = tl.constexpr(8.0)


@kernel
def _batch_statistics_kernel(
    maps, z, moments, tables, counters, statistics, sizes,
    SHAPE: tl.constexpr, LAYOUT: tl.constexpr, MOMENT_BLOCK: tl.constexpr, PARTS: tl.constexpr,
    ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program: mean and centred squares of up(z) + x over one image, for BLOCK_C channels: (B, 2, C), float64.

    They follow from the map's own moments (`patch_embed.Moments`), from z (B, N, C), and from the transposed
    interpolation of the map. Where the two parts nearly cancel, too few digits would be left, and a pass over the map
    takes them directly. tables (S, 3 (P_h + P_w)), see `grid.interpolation_tables`. LAYOUT groups the scales whose
    BatchNorm takes the batch's statistics.
    """
    CHANNELS: tl.constexpr = SHAPE.channels
    FIRST: tl.constexpr = first_blocks(CHANNELS, BLOCK_C)
    b, tile = split_program(FIRST[len(CHANNELS)])
    scale, block = scale_of(tile, FIRST)
    offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    for g in tl.static_range(len(LAYOUT.groups)):
        if in_group(scale, LAYOUT, g):
            _batch_statistics(
                maps=maps, z=z, moments=moments, tables=tables, statistics=statistics, sizes=sizes, b=b, scale=scale,
                offs_c=offs_c, SHAPE=SHAPE, LAYOUT=LAYOUT, g=g, MOMENT_BLOCK=MOMENT_BLOCK, PARTS=PARTS,
                ACC=ACC, BLOCK_N=BLOCK_N, BLOCK_P=BLOCK_P,
            )  # fmt: skip
    for i in tl.static_range(len(CHANNELS)):
        if counters[i] is not None and (scale == i) & (b == 0) & (block == 0):
            tl.store(counters[i], tl.load(counters[i]) + 1)


@triton.jit
def _batch_statistics(
    maps, z, moments, tables, statistics, sizes, b, scale, offs_c,
    SHAPE: tl.constexpr, LAYOUT: tl.constexpr, g: tl.constexpr, MOMENT_BLOCK: tl.constexpr, PARTS: tl.constexpr,
    ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """`_batch_statistics_kernel` for image b and a scale of group g."""
    GROUP: tl.constexpr = LAYOUT.groups[g]
    CHANNELS: tl.constexpr = SHAPE.channels
    OFFSETS: tl.constexpr = SHAPE.offsets
    SCALES: tl.constexpr = GROUP.scales
    GRID: tl.constexpr = LAYOUT.grid
    TOTAL: tl.constexpr = SHAPE.total
    IN_16_BIT: tl.constexpr = z.dtype.element_ty.primitive_bitwidth == 16
    MOST: tl.constexpr = CANCELLATION_IN_16_BIT if IN_16_BIT else CANCELLATION
    SUM: tl.constexpr = ACC if IN_16_BIT else tl.float64
    image = b * GRID[0] * GRID[1] * TOTAL
    mask_c = offs_c < of_scale(CHANNELS, scale, SCALES)
    offs_all = of_scale(OFFSETS, scale, SCALES) + offs_c
    height, width = size_of(sizes, scale, LAYOUT, g)
    strides = (
        stride_of_scale(LAYOUT, g, 0, height.to(tl.int64), width, scale),
        stride_of_scale(LAYOUT, g, 1, height, width, scale),
        stride_of_scale(LAYOUT, g, 2, height, width, scale),
        stride_of_scale(LAYOUT, g, 3, height, width, scale),
    )
    x_ptrs = of_scale(maps, scale, SCALES) + b * strides[0] + offs_c * strides[1]
    origin = load_vector(moments.less_origin.origins + b * TOTAL, offs_all, mask_c, tl.float64)
    MOMENT_BLOCKS: tl.constexpr = triton.cdiv(GRID[0], MOMENT_BLOCK[0]) * triton.cdiv(GRID[1], MOMENT_BLOCK[1])
    x_mean, x_squares = _combine_blocks(
        moments=moments.blocks + b * MOMENT_BLOCKS * 2 * TOTAL, offs_all=offs_all, mask_c=mask_c, height=height,
        width=width, GRID=GRID, TOTAL=TOTAL, BLOCKS=MOMENT_BLOCKS, BLOCK=MOMENT_BLOCK, SUM=SUM, BLOCK_N=BLOCK_N,
    )  # fmt: skip
    z_mean, z_squares, products = _interpolated_moments(
        z=z + image, transposed=moments.less_origin.transposed + image * PARTS,
        tables=tables + scale * (TABLES * (GRID[0] + GRID[1])), offs_all=offs_all, mask_c=mask_c, height=height,
        pixels=height * width, area=area_of(sizes, scale, height * width, LAYOUT, g, ACC), PARTS=PARTS, GRID=GRID,
        TOTAL=TOTAL, ACC=ACC, SUM=SUM, BLOCK_N=BLOCK_N,
    )  # fmt: skip
    mean = origin + x_mean + z_mean
    squares = (x_squares + z_squares + 2 * products).to(tl.float64)
    if tl.max(tl.where(mask_c, x_squares + z_squares - squares * MOST, 0.0)) > 0:
        row_step, column_step = steps_of(sizes, scale, height, width, LAYOUT, g, ACC)
        mean, squares = _direct_moments(
            x_ptrs=x_ptrs, z_ptrs=z + image + offs_all, mask_c=mask_c, height=height, width=width, row_step=row_step,
            column_step=column_step, strides=strides, GRID=GRID, TOTAL=TOTAL, ACC=ACC, BLOCK_P=BLOCK_P,
        )  # fmt: skip
    tl.store(statistics + b * 2 * TOTAL + offs_all, mean, mask=mask_c)
    tl.store(statistics + (b * 2 + 1) * TOTAL + offs_all, tl.maximum(squares, 0.0), mask=mask_c)


@triton.jit
def _combine_blocks(
    moments, offs_all, mask_c, height, width,
    GRID: tl.constexpr, TOTAL: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
    SUM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Mean and centred squares of a map less its origin, from those of its blocks, in SUM: each [BLOCK_C]."""
    mean = tl.zeros([BLOCK_N, offs_all.shape[0]], SUM)
    for start in range(0, BLOCKS, BLOCK_N):
        block_mean, _, count = _load_blocks(
            moments, start, offs_all, mask_c, height, width, GRID, TOTAL, BLOCKS, BLOCK, SUM, BLOCK_N
        )
        mean += block_mean * count[:, None]
    mean = tl.sum(mean, 0) / (height * width)
    squares = tl.zeros([BLOCK_N, offs_all.shape[0]], SUM)
    for start in range(0, BLOCKS, BLOCK_N):
        block_mean, block_squares, count = _load_blocks(
            moments, start, offs_all, mask_c, height, width, GRID, TOTAL, BLOCKS, BLOCK, SUM, BLOCK_N
        )
        apart = block_mean - mean[None, :]
        squares += block_squares + apart * apart * count[:, None]
    return mean, tl.sum(squares, 0)


@triton.jit
def _load_blocks(
    moments, start, offs_all, mask_c, height, width,
    GRID: tl.constexpr, TOTAL: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
    SUM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Means, centred squares [BLOCK_N, BLOCK_C] and pixels [BLOCK_N] of some blocks, in SUM."""
    COLUMN_BLOCKS: tl.constexpr = triton.cdiv(GRID[1], BLOCK[1])
    offs = start + tl.arange(0, BLOCK_N)
    mask = (offs < BLOCKS)[:, None] & mask_c[None, :]
    ptrs = moments + offs[:, None] * 2 * TOTAL + offs_all[None, :]
    means = tl.load(ptrs, mask=mask, other=0.0).to(SUM)
    squares = tl.load(ptrs + TOTAL, mask=mask, other=0.0).to(SUM)
    p, q = offs // COLUMN_BLOCKS * BLOCK[0], offs % COLUMN_BLOCKS * BLOCK[1]
    rows = window_begin(tl.minimum(p + BLOCK[0], GRID[0]), height, GRID[0]) - window_begin(p, height, GRID[0])
    columns = window_begin(tl.minimum(q + BLOCK[1], GRID[1]), width, GRID[1]) - window_begin(q, width, GRID[1])
    return means, squares, tl.where(offs < BLOCKS, rows * columns, 0).to(SUM)


@triton.jit
def _interpolated_moments(
    z, transposed, tables, offs_all, mask_c, height, pixels, area,
    PARTS: tl.constexpr, GRID: tl.constexpr, TOTAL: tl.constexpr, ACC: tl.constexpr, SUM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Mean and centred squares of up(z), and its products with the map, without the map's resolution: each [BLOCK_C].

    With z less its mean, sum of up(z)^2 = z^T (G_h x G_w) z, where G = U^T U has three diagonals, and sum of up(z) x =
    sum of z U^T x. z (N, C), transposed (PARTS, N, C).
    """
    N: tl.constexpr = GRID[0] * GRID[1]
    mean = tl.zeros([BLOCK_N, offs_all.shape[0]], SUM)
    for start in tl.range(0, N, BLOCK_N, loop_unroll_factor=min(triton.cdiv(N, BLOCK_N), 8)):
        offs_n = start + tl.arange(0, BLOCK_N)
        p, q = offs_n // GRID[1], offs_n % GRID[1]
        weight = row_table(tables, COLUMN_SUMS, p, GRID) * column_table(tables, COLUMN_SUMS, q, GRID)
        mean += (load_grid(z, p, q, offs_all, mask_c, GRID, TOTAL, ACC) * weight[:, None]).to(SUM)
    mean = tl.sum(mean, 0) / pixels
    squares = tl.zeros([BLOCK_N, offs_all.shape[0]], SUM)
    products = tl.zeros([BLOCK_N, offs_all.shape[0]], SUM)
    map_sums = tl.zeros([BLOCK_N, offs_all.shape[0]], SUM)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        p, q = offs_n // GRID[1], offs_n % GRID[1]
        row, row_next = row_table(tables, DIAGONAL, p, GRID), 2 * row_table(tables, NEXT_DIAGONAL, p, GRID)
        column = column_table(tables, DIAGONAL, q, GRID)
        column_next = column_table(tables, NEXT_DIAGONAL, q, GRID)
        column_before = column_table(tables, NEXT_DIAGONAL, q - 1, GRID)
        here = _load_less_mean(z, mean, p, q, offs_all, mask_c, GRID, TOTAL, ACC)
        right = _load_less_mean(z, mean, p, q + 1, offs_all, mask_c, GRID, TOTAL, ACC)
        below = _load_less_mean(z, mean, p + 1, q, offs_all, mask_c, GRID, TOTAL, ACC)
        below_right = _load_less_mean(z, mean, p + 1, q + 1, offs_all, mask_c, GRID, TOTAL, ACC)
        below_left = _load_less_mean(z, mean, p + 1, q - 1, offs_all, mask_c, GRID, TOTAL, ACC)
        product = (row * column)[:, None] * here + (2 * row * column_next)[:, None] * right
        product += (row_next * column)[:, None] * below + (row_next * column_next)[:, None] * below_right
        product += (row_next * column_before)[:, None] * below_left
        squares += (here * product).to(SUM)
        of_map = load_transposed(transposed, p, q, offs_all, mask_c, height, PARTS, GRID, TOTAL, ACC) * area
        products += (here * of_map).to(SUM)
        map_sums += of_map.to(SUM)
    squares, products = tl.sum(squares, 0), tl.sum(products, 0)
    if SUM != ACC:  # the mean was rounded when it was subtracted
        products -= (mean - mean.to(ACC).to(SUM)) * tl.sum(map_sums, 0)
    return mean, squares, products


@triton.jit
def _load_less_mean(z, mean, p, q, offs_all, mask_c, GRID: tl.constexpr, TOTAL: tl.constexpr, ACC: tl.constexpr):
    """Positions of a token grid (N, C) less its mean [channels], zero beyond the grid: [positions, channels]."""
    inside = (p < GRID[0]) & (q >= 0) & (q < GRID[1])
    tokens = load_grid(z, p, q, offs_all, mask_c, GRID, TOTAL, ACC)
    return tl.where(inside[:, None], tokens - mean.to(ACC)[None, :], 0.0)


@triton.jit
def _direct_moments(
    x_ptrs, z_ptrs, mask_c, height, width, row_step, column_step, strides,
    GRID: tl.constexpr, TOTAL: tl.constexpr, ACC: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Mean and centred squares of up(z) + x over all its pixels, in two passes: each [BLOCK_C], float64."""
    mean = tl.zeros(mask_c.shape, tl.float64)
    for start in range(0, height * width, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        y, _ = _load_upsampled(
            x_ptrs, z_ptrs, mask_c, pixel, height, width, row_step, column_step, strides, GRID, TOTAL, ACC
        )
        mean += tl.sum(y.to(tl.float64), 0)
    mean /= height * width
    squares = tl.zeros(mask_c.shape, tl.float64)
    for start in range(0, height * width, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        y, mask = _load_upsampled(
            x_ptrs, z_ptrs, mask_c, pixel, height, width, row_step, column_step, strides, GRID, TOTAL, ACC
        )
        apart = tl.where(mask, y.to(tl.float64) - mean[None, :], 0.0)
        squares += tl.sum(apart * apart, 0)
    return mean, squares


@triton.jit
def _load_upsampled(
    x_ptrs, z_ptrs, mask_c, pixel, height, width, row_step, column_step, strides,
    GRID: tl.constexpr, TOTAL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """up(z) + x at some pixels [pixels, BLOCK_C], and which of them exist."""
    h, w = pixel // width, pixel % width
    mask = (pixel < height * width)[:, None] & mask_c[None, :]
    top, bottom, fraction_h = interpolation(h, row_step, GRID[0], ACC)
    left, right, fraction_w = interpolation(w, column_step, GRID[1], ACC)
    top_left = tl.load(z_ptrs[None, :] + (top * GRID[1] + left)[:, None] * TOTAL, mask=mask, other=0.0).to(ACC)
    top_right = tl.load(z_ptrs[None, :] + (top * GRID[1] + right)[:, None] * TOTAL, mask=mask, other=0.0).to(ACC)
    bottom_left = tl.load(z_ptrs[None, :] + (bottom * GRID[1] + left)[:, None] * TOTAL, mask=mask, other=0.0).to(ACC)
    bottom_right = tl.load(z_ptrs[None, :] + (bottom * GRID[1] + right)[:, None] * TOTAL, mask=mask, other=0.0).to(ACC)
    upper = top_left * (1.0 - fraction_w)[:, None] + top_right * fraction_w[:, None]
    lower = bottom_left * (1.0 - fraction_w)[:, None] + bottom_right * fraction_w[:, None]
    x_ptrs = x_ptrs[None, :] + (h * strides[2] + w * strides[3])[:, None]
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(ACC)
    return upper * (1.0 - fraction_h)[:, None] + lower * fraction_h[:, None] + x, mask


@kernel
def _combine_images_kernel(
    statistics, biases, buffers, used, batch, sizes,
    SHAPE: tl.constexpr, LAYOUT: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: mean and variance that BatchNorm takes of the batch, for BLOCK_C channels of one scale; its buffers.

    used (2, C) in float64 has the mean without the convolution's bias, statistics (B, 2, C) each image's.
    """
    CHANNELS: tl.constexpr = SHAPE.channels
    FIRST: tl.constexpr = first_blocks(CHANNELS, BLOCK_C)
    scale, block = scale_of(tl.program_id(0), FIRST)
    offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    for i in tl.static_range(len(CHANNELS)):
        if scale == i:
            _take_batch(
                statistics=statistics, bias=biases[i], buffers=buffers, used=used, batch=batch, sizes=sizes,
                offs_c=offs_c, i=i, SHAPE=SHAPE, LAYOUT=LAYOUT, ACC=ACC,
            )  # fmt: skip


@triton.jit
def _take_batch(
    statistics, bias, buffers, used, batch, sizes, offs_c,
    i: tl.constexpr, SHAPE: tl.constexpr, LAYOUT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """`_combine_images_kernel` for some channels of scale i, where its BatchNorm takes the batch's statistics."""
    NORM: tl.constexpr = LAYOUT.of[i].norm
    TOTAL: tl.constexpr = SHAPE.total
    if (NORM is not None) and NORM.from_batch:
        mask_c = offs_c < SHAPE.channels[i]
        offs_all = SHAPE.offsets[i] + offs_c
        height, width = size_of(sizes, i, LAYOUT, i)
        mean, variance = _combine_images(statistics, offs_all, mask_c, batch, height * width, TOTAL, ACC)
        tl.store(used + offs_all, mean, mask=mask_c)
        tl.store(used + TOTAL + offs_all, variance, mask=mask_c)
        if NORM.updates:
            mean += load_vector(bias, offs_c, mask_c, ACC)
            _update_buffers(
                buffers=buffers, i=i, mean=mean.to(ACC), variance=variance, offs_c=offs_c, mask_c=mask_c,
                count=batch.to(tl.int64) * height * width, MOMENTUM=NORM.momentum, ACC=ACC,
            )  # fmt: skip


@triton.jit
def _combine_images(statistics, offs_all, mask_c, batch, pixels, TOTAL: tl.constexpr, ACC: tl.constexpr):
    """Mean, in float64, and biased variance over the batch [channels], from each image's statistics (B, 2, C)."""
    STEP: tl.constexpr = 16
    mean = tl.zeros(offs_all.shape, tl.float64)
    for start in range(0, batch, STEP):
        image_mean, _, _ = _load_images(statistics, start, offs_all, mask_c, batch, TOTAL, STEP)
        mean += tl.sum(image_mean, 0)
    mean /= batch
    variance = tl.zeros(offs_all.shape, tl.float64)
    for start in range(0, batch, STEP):
        image_mean, squares, mask = _load_images(statistics, start, offs_all, mask_c, batch, TOTAL, STEP)
        apart = tl.where(mask, image_mean - mean[None, :], 0.0)
        variance += tl.sum(squares / pixels + apart * apart, 0)
    return mean, (variance / batch).to(ACC)


@triton.jit
def _load_images(statistics, start, offs_all, mask_c, batch, TOTAL: tl.constexpr, STEP: tl.constexpr):
    """Means and centred squares of some images [STEP, channels] in float64, and which of them exist."""
    offs_b = start + tl.arange(0, STEP)
    mask = (offs_b < batch)[:, None] & mask_c[None, :]
    ptrs = statistics + offs_b.to(tl.int64)[:, None] * 2 * TOTAL + offs_all[None, :]
    means = tl.load(ptrs, mask=mask, other=0.0).to(tl.float64)
    return means, tl.load(ptrs + TOTAL, mask=mask, other=0.0).to(tl.float64), mask


@triton.jit
def _update_buffers(
    buffers, mean, variance, offs_c, mask_c, count, i: tl.constexpr, MOMENTUM: tl.constexpr, ACC: tl.constexpr
):
    """What BatchNorm2d does to its running buffers (C_i); the variance that it keeps is the unbiased one."""
    if MOMENTUM is None:  # a cumulative average
        momentum = 1.0 / tl.load(buffers.counter[i]).to(ACC)
    else:
        momentum = tl.full([], MOMENTUM, ACC)
    old_mean = load_vector(buffers.mean[i], offs_c, mask_c, ACC)
    old_variance = load_vector(buffers.variance[i], offs_c, mask_c, ACC)
    unbiased = variance * (count.to(ACC) / (count - 1).to(ACC))
    tl.store(buffers.mean[i] + offs_c, (1 - momentum) * old_mean + momentum * mean, mask=mask_c)
    tl.store(buffers.variance[i] + offs_c, (1 - momentum) * old_variance + momentum * unbiased, mask=mask_c)


def batch_statistics(tokens: Tokens, z: Tensor, used: Tensor, maps: Maps, contract: Contract) -> None:
    """Mean and variance of up(z) + x over the batch, for the scales whose BatchNorm takes them; updates its buffers.

    Args:
        tokens: which z is made of.
        z: (B, N, C).
        used: (2, C) in float64, that they are written to.
        maps: with their moments.
        contract: of the call.
    """
    assert maps.moments is not None
    launcher, batch = tokens.launcher, tokens.batch
    sizes = sizes_of(maps.maps)
    keys = tuple([x.dtype if taken else None for x, taken in zip(maps.maps, from_batch(contract), strict=True)])
    config = launcher.config("batch_statistics", batch)
    blocks = sum([launch.blocks(c, config["block_c"]) for c in tokens.channels])
    statistics = tokens.empty(batch, 2, launcher.shape.total, dtype=torch.float64)
    launcher(
        _batch_statistics_kernel, config, batch * blocks,
        maps=maps.maps, z=z, moments=maps.moments,
        tables=interpolation_tables(sizes, contract.grid, accumulation_dtype(z.dtype), launcher.device),
        counters=counters_of(contract), statistics=statistics, sizes=size_arguments(sizes, contract.grid),
        LAYOUT=grouped(layout_of(maps.maps, contract.grid), keys), MOMENT_BLOCK=maps.block,
        PARTS=maps.moments.less_origin.transposed.shape[1],
    )  # fmt: skip
    config = launcher.config("combine_images")
    blocks = sum([launch.blocks(c, config["block_c"]) for c in tokens.channels])
    launcher(
        _combine_images_kernel, config, blocks if batch else 0,
        statistics=statistics, biases=affines_of(contract.upsample).bias, buffers=buffers_of(contract.buffers),
        used=used, batch=batch, sizes=size_arguments(sizes, contract.grid),
        LAYOUT=layout_of(maps.maps, contract.grid, norms_of(contract.norms, updates=True)),
    )  # fmt: skip


def counters_of(contract: Contract) -> tuple[Tensor | None, ...]:
    """Each scale's counter of batches that this call counts."""
    counters: list[Tensor | None] = []
    for norm, buffers in zip(contract.norms, contract.buffers, strict=True):
        counters.append(buffers.counter if norm is not None and buffers is not None and norm.updates else None)
    return tuple(counters)
