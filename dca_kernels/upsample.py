"""Stage 4 of the `triton` backend: upsample the tokens and merge them with the skip maps."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from dca_kernels import launch
from dca_kernels.fused import memory_format
from dca_kernels.parameters import Affine, BatchNorm
from dca_kernels.partials import sum_partials
from dca_kernels.primitives import (
    band,
    band_begin,
    blocks_before,
    first_window,
    interpolation,
    interpolation_matrix,
    kernel,
    load_vector,
    of_scale,
    offset,
    padded,
    split_program,
    sum_images,
    total,
    window_begin,
    window_end,
)
from dca_kernels.tokens import Tokens

# How much larger its two parts may be than a variance, before it is taken directly.
CANCELLATION = tl.constexpr(100.0)


@kernel
def _conv_kernel(
    tokens_ptr, weights, z_ptr,
    N: tl.constexpr, CHANNELS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: the 1x1 convolution, without its bias, of BLOCK_N tokens into BLOCK_C channels of one scale.

    OPERAND is the dtype of the products.
    """
    TOTAL: tl.constexpr = total(CHANNELS)
    TILES: tl.constexpr = blocks_before(CHANNELS, BLOCK_C, len(CHANNELS))
    b, tile = split_program(triton.cdiv(N, BLOCK_N) * TILES)
    offs_n = tile // TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    image = b * N * TOTAL
    for i in tl.static_range(len(CHANNELS)):
        block = tile % TILES - blocks_before(CHANNELS, BLOCK_C, i)
        if (block >= 0) & (block < triton.cdiv(CHANNELS[i], BLOCK_C)):
            _conv(
                tokens_ptr + image + offset(CHANNELS, i), weights[i], z_ptr + image + offset(CHANNELS, i), offs_n,
                block * BLOCK_C + tl.arange(0, BLOCK_C), N, TOTAL, CHANNELS[i], OPERAND, PRECISION, ACC, BLOCK_C,
            )  # fmt: skip


@triton.jit
def _conv(
    tokens_ptr, weight_ptr, z_ptr, offs_n, offs_out,
    N: tl.constexpr, TOTAL: tl.constexpr, CHANNELS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """z[n, out] = sum over channels of tokens[n, in] weight[out, in]."""
    STEP: tl.constexpr = min(padded(CHANNELS), BLOCK_K)
    mask_n, mask_out = offs_n < N, offs_out < CHANNELS
    z = tl.zeros([offs_n.shape[0], offs_out.shape[0]], ACC)
    for start in range(0, CHANNELS, STEP):
        offs_in = start + tl.arange(0, STEP)
        mask_in = offs_in < CHANNELS
        tokens_ptrs = tokens_ptr + offs_n[:, None] * TOTAL + offs_in[None, :]
        tokens = tl.load(tokens_ptrs, mask=mask_n[:, None] & mask_in[None, :], other=0.0).to(OPERAND)
        weight_ptrs = weight_ptr + offs_out[:, None] * CHANNELS + offs_in[None, :]
        weight = tl.load(weight_ptrs, mask=mask_out[:, None] & mask_in[None, :], other=0.0).to(OPERAND)
        z = tl.dot(tokens, tl.trans(weight), z, input_precision=PRECISION, out_dtype=ACC)
    tl.store(z_ptr + offs_n[:, None] * TOTAL + offs_out[None, :], z, mask=mask_n[:, None] & mask_out[None, :])


@kernel
def _batch_statistics_kernel(
    maps, z_ptr, moments_ptr, adjoint_ptr, tables_ptr, counters, statistics_ptr,
    CHANNELS: tl.constexpr, SIZES: tl.constexpr, STRIDES: tl.constexpr, GRID: tl.constexpr, FROM_BATCH: tl.constexpr,
    MOMENT_BLOCKS: tl.constexpr, GUARDED: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program: mean and centred squares of up(z) + x over one image, for BLOCK_C channels: (B, 2, C), float64.

    They follow from the map's own moments, from z, and from the transposed interpolation of the map. Where the two
    parts nearly cancel, too few digits would be left, and a pass over the map takes them directly.
    """
    TOTAL: tl.constexpr = total(CHANNELS)
    SUM: tl.constexpr = tl.float64 if GUARDED else ACC
    b, tile = split_program(blocks_before(CHANNELS, BLOCK_C, len(CHANNELS)))
    image = b * GRID[0] * GRID[1] * TOTAL
    for i in tl.static_range(len(CHANNELS)):
        block = tile - blocks_before(CHANNELS, BLOCK_C, i)
        if FROM_BATCH[i] and (block >= 0) & (block < triton.cdiv(CHANNELS[i], BLOCK_C)):
            offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
            mask_c = offs_c < CHANNELS[i]
            own = offset(CHANNELS, i) + offs_c
            x_ptrs = maps[i] + b * STRIDES[i][0] + offs_c * STRIDES[i][1]
            first = tl.load(x_ptrs, mask=mask_c, other=0.0).to(tl.float64)
            x_mean, x_squares = _merge_moments(
                moments_ptr + b * MOMENT_BLOCKS * 2 * TOTAL, own, mask_c, of_scale(SIZES, i), GRID, TOTAL,
                MOMENT_BLOCKS, SUM, BLOCK_N,
            )  # fmt: skip
            z_mean, z_squares, products = _interpolated_moments(
                z_ptr + image, adjoint_ptr + image, tables_ptr + i * 3 * (GRID[0] + GRID[1]), own, mask_c,
                SIZES[i][0] * SIZES[i][1], GRID, TOTAL, ACC, SUM, BLOCK_N,
            )  # fmt: skip
            mean = first + x_mean + z_mean
            squares = x_squares + z_squares + 2 * products
            if GUARDED:
                if tl.max(tl.where(mask_c, x_squares + z_squares - squares * CANCELLATION, 0.0)) > 0:
                    mean, squares = _direct_moments(
                        x_ptrs, z_ptr + image + own, mask_c,
                        of_scale(SIZES, i), of_scale(STRIDES, i), GRID, TOTAL, ACC, BLOCK_P,
                    )  # fmt: skip
            tl.store(statistics_ptr + b * 2 * TOTAL + own, mean, mask=mask_c)
            tl.store(statistics_ptr + (b * 2 + 1) * TOTAL + own, tl.maximum(squares, 0.0), mask=mask_c)
            if counters[i] is not None and (b == 0) & (block == 0):
                tl.store(counters[i], tl.load(counters[i]) + 1)


@triton.jit
def _merge_moments(
    moments_ptr, offs_c, mask_c, SIZE: tl.constexpr, GRID: tl.constexpr, TOTAL: tl.constexpr, BLOCKS: tl.constexpr,
    SUM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Mean and centred squares of a map less its first pixel, from those of its blocks, in SUM: each [BLOCK_C]."""
    mean = tl.zeros([BLOCK_N, offs_c.shape[0]], SUM)
    for start in range(0, BLOCKS, BLOCK_N):
        block_mean, _, count = _load_moments(
            moments_ptr, start, offs_c, mask_c, SIZE, GRID, TOTAL, BLOCKS, SUM, BLOCK_N
        )
        mean += block_mean * count[:, None]
    mean = tl.sum(mean, 0) / (SIZE[0] * SIZE[1])
    squares = tl.zeros([BLOCK_N, offs_c.shape[0]], SUM)
    for start in range(0, BLOCKS, BLOCK_N):
        block_mean, block_squares, count = _load_moments(
            moments_ptr, start, offs_c, mask_c, SIZE, GRID, TOTAL, BLOCKS, SUM, BLOCK_N
        )
        apart = block_mean - mean[None, :]
        squares += block_squares + apart * apart * count[:, None]
    return mean, tl.sum(squares, 0)


@triton.jit
def _load_moments(
    moments_ptr, start, offs_c, mask_c, SIZE: tl.constexpr, GRID: tl.constexpr, TOTAL: tl.constexpr,
    BLOCKS: tl.constexpr, SUM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Means, centred squares [BLOCK_N, BLOCK_C] and pixels [BLOCK_N] of some blocks, in SUM."""
    COLUMN_BLOCKS: tl.constexpr = BLOCKS // GRID[0]
    BLOCK_Q: tl.constexpr = triton.next_power_of_2(triton.cdiv(GRID[1], COLUMN_BLOCKS))
    offs = start + tl.arange(0, BLOCK_N)
    mask = (offs < BLOCKS)[:, None] & mask_c[None, :]
    ptrs = moments_ptr + offs[:, None] * 2 * TOTAL + offs_c[None, :]
    means = tl.load(ptrs, mask=mask, other=0.0).to(SUM)
    squares = tl.load(ptrs + TOTAL, mask=mask, other=0.0).to(SUM)
    p, q = offs // COLUMN_BLOCKS, offs % COLUMN_BLOCKS * BLOCK_Q
    rows = window_begin(p + 1, SIZE[0], GRID[0]) - window_begin(p, SIZE[0], GRID[0])
    columns = window_begin(tl.minimum(q + BLOCK_Q, GRID[1]), SIZE[1], GRID[1]) - window_begin(q, SIZE[1], GRID[1])
    return means, squares, tl.where(offs < BLOCKS, rows * columns, 0).to(SUM)


@triton.jit
def _interpolated_moments(
    z_ptr, adjoint_ptr, tables_ptr, offs_c, mask_c, PIXELS: tl.constexpr, GRID: tl.constexpr, TOTAL: tl.constexpr,
    ACC: tl.constexpr, SUM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Mean and centred squares of up(z), and its products with the map, without the map's resolution: each [BLOCK_C].

    With z less its mean, sum of up(z)^2 = z^T (G_h x G_w) z, where G = U^T U has three diagonals, and sum of up(z) x =
    sum of z U^T x.
    """
    N: tl.constexpr = GRID[0] * GRID[1]
    mean = tl.zeros([BLOCK_N, offs_c.shape[0]], SUM)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        p, q = offs_n // GRID[1], offs_n % GRID[1]
        weight = _table(tables_ptr, 0, p, GRID[0], 0) * _table(tables_ptr, 0, q, GRID[1], 3 * GRID[0])
        z = _load_grid(z_ptr, p, q, offs_c, mask_c, GRID, TOTAL, ACC)
        mean += (z * weight[:, None]).to(SUM)
    mean = tl.sum(mean, 0) / PIXELS
    squares = tl.zeros([BLOCK_N, offs_c.shape[0]], SUM)
    products = tl.zeros([BLOCK_N, offs_c.shape[0]], SUM)
    adjoints = tl.zeros([BLOCK_N, offs_c.shape[0]], SUM)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        p, q = offs_n // GRID[1], offs_n % GRID[1]
        row, row_next = _table(tables_ptr, 1, p, GRID[0], 0), 2 * _table(tables_ptr, 2, p, GRID[0], 0)
        column = _table(tables_ptr, 1, q, GRID[1], 3 * GRID[0])
        column_next = _table(tables_ptr, 2, q, GRID[1], 3 * GRID[0])
        column_before = _table(tables_ptr, 2, q - 1, GRID[1], 3 * GRID[0])
        z = _load_shifted(z_ptr, mean, p, q, offs_c, mask_c, GRID, TOTAL, ACC)
        right = _load_shifted(z_ptr, mean, p, q + 1, offs_c, mask_c, GRID, TOTAL, ACC)
        below = _load_shifted(z_ptr, mean, p + 1, q, offs_c, mask_c, GRID, TOTAL, ACC)
        below_right = _load_shifted(z_ptr, mean, p + 1, q + 1, offs_c, mask_c, GRID, TOTAL, ACC)
        below_left = _load_shifted(z_ptr, mean, p + 1, q - 1, offs_c, mask_c, GRID, TOTAL, ACC)
        here = (row * column)[:, None] * z + (2 * row * column_next)[:, None] * right
        here += (row_next * column)[:, None] * below + (row_next * column_next)[:, None] * below_right
        here += (row_next * column_before)[:, None] * below_left
        squares += (z * here).to(SUM)
        adjoint = _load_grid(adjoint_ptr, p, q, offs_c, mask_c, GRID, TOTAL, ACC) * (PIXELS / N)
        products += (z * adjoint).to(SUM)
        adjoints += adjoint.to(SUM)
    squares, products = tl.sum(squares, 0), tl.sum(products, 0)
    if SUM != ACC:  # the mean was rounded when it was subtracted
        products -= (mean - mean.to(ACC).to(SUM)) * tl.sum(adjoints, 0)
    return mean, squares, products


@triton.jit
def _table(tables_ptr, k, position, SIZE: tl.constexpr, begin):
    """Column sums (k = 0), diagonal (1) or next diagonal (2) of G for one axis; zero beyond."""
    return tl.load(tables_ptr + begin + k * SIZE + position, mask=(position >= 0) & (position < SIZE), other=0.0)


@triton.jit
def _load_grid(ptr, p, q, offs_c, mask_c, GRID: tl.constexpr, TOTAL: tl.constexpr, ACC: tl.constexpr):
    """[positions, channels] of a token grid, zero beyond it."""
    mask = (p >= 0) & (p < GRID[0]) & (q >= 0) & (q < GRID[1])
    ptrs = ptr + (p * GRID[1] + q)[:, None] * TOTAL + offs_c[None, :]
    return tl.load(ptrs, mask=mask[:, None] & mask_c[None, :], other=0.0).to(ACC)


@triton.jit
def _load_shifted(ptr, mean, p, q, offs_c, mask_c, GRID: tl.constexpr, TOTAL: tl.constexpr, ACC: tl.constexpr):
    """As `_load_grid`, less the mean."""
    inside = (p < GRID[0]) & (q >= 0) & (q < GRID[1])
    z = _load_grid(ptr, p, q, offs_c, mask_c, GRID, TOTAL, ACC)
    return tl.where(inside[:, None], z - mean.to(ACC)[None, :], 0.0)


@triton.jit
def _direct_moments(
    x_ptrs, z_ptrs, mask_c, SIZE: tl.constexpr, STRIDE: tl.constexpr, GRID: tl.constexpr, TOTAL: tl.constexpr,
    ACC: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Mean and centred squares of up(z) + x over all its pixels, in two passes: each [BLOCK_C], float64."""
    PIXELS: tl.constexpr = SIZE[0] * SIZE[1]
    mean = tl.zeros(mask_c.shape, tl.float64)
    for start in range(0, PIXELS, BLOCK_P):
        y, _ = _load_merged(x_ptrs, z_ptrs, mask_c, start + tl.arange(0, BLOCK_P), SIZE, STRIDE, GRID, TOTAL, ACC)
        mean += tl.sum(y.to(tl.float64), 0)
    mean /= PIXELS
    squares = tl.zeros(mask_c.shape, tl.float64)
    for start in range(0, PIXELS, BLOCK_P):
        y, mask = _load_merged(x_ptrs, z_ptrs, mask_c, start + tl.arange(0, BLOCK_P), SIZE, STRIDE, GRID, TOTAL, ACC)
        apart = tl.where(mask, y.to(tl.float64) - mean[None, :], 0.0)
        squares += tl.sum(apart * apart, 0)
    return mean, squares


@triton.jit
def _load_merged(
    x_ptrs, z_ptrs, mask_c, pixel, SIZE: tl.constexpr, STRIDE: tl.constexpr, GRID: tl.constexpr, TOTAL: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """up(z) + x at some pixels [pixels, BLOCK_C], and which of them exist."""
    h, w = pixel // SIZE[1], pixel % SIZE[1]
    mask = (pixel < SIZE[0] * SIZE[1])[:, None] & mask_c[None, :]
    top, bottom, fraction_h = interpolation(h, SIZE[0], GRID[0], ACC)
    left, right, fraction_w = interpolation(w, SIZE[1], GRID[1], ACC)
    top_left = tl.load(z_ptrs[None, :] + (top * GRID[1] + left)[:, None] * TOTAL, mask=mask, other=0.0).to(ACC)
    top_right = tl.load(z_ptrs[None, :] + (top * GRID[1] + right)[:, None] * TOTAL, mask=mask, other=0.0).to(ACC)
    bottom_left = tl.load(z_ptrs[None, :] + (bottom * GRID[1] + left)[:, None] * TOTAL, mask=mask, other=0.0).to(ACC)
    bottom_right = tl.load(z_ptrs[None, :] + (bottom * GRID[1] + right)[:, None] * TOTAL, mask=mask, other=0.0).to(ACC)
    upper = top_left * (1.0 - fraction_w)[:, None] + top_right * fraction_w[:, None]
    lower = bottom_left * (1.0 - fraction_w)[:, None] + bottom_right * fraction_w[:, None]
    x_ptrs = x_ptrs[None, :] + (h * STRIDE[2] + w * STRIDE[3])[:, None]
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(ACC)
    return upper * (1.0 - fraction_h)[:, None] + lower * fraction_h[:, None] + x, mask


@kernel
def _upsample_kernel(
    maps, z_ptr, conv_biases, gammas, betas, means, variances, counters, statistics_ptr, outs, saved_ptr, batch,
    CHANNELS: tl.constexpr, SIZES: tl.constexpr, STRIDES: tl.constexpr, OUT_STRIDES: tl.constexpr, GRID: tl.constexpr,
    NORM: tl.constexpr, FROM_BATCH: tl.constexpr, EPS: tl.constexpr, UPDATES: tl.constexpr,
    MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, BLOCKS: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """One program: relu(BatchNorm(up(z) + bias + x)) in one tile of channels, rows and columns of one map.

    BLOCKS[i] is the tile of scale i, FIRST[i] its first program within an image.
    """
    b, tile = split_program(FIRST[len(CHANNELS)])
    for i in tl.static_range(len(CHANNELS)):
        if (tile >= FIRST[i]) & (tile < FIRST[i + 1]):
            _merge(
                maps[i], z_ptr, conv_biases[i], gammas[i], betas[i], means[i], variances[i], counters[i],
                statistics_ptr, outs[i], saved_ptr, batch, b, tile - FIRST[i], CHANNELS[i], offset(CHANNELS, i),
                total(CHANNELS), of_scale(SIZES, i), of_scale(STRIDES, i), of_scale(OUT_STRIDES, i), GRID, NORM[i],
                FROM_BATCH[i], EPS[i], UPDATES[i], MOMENTUM[i], PRECISION, ACC, BLOCKS[i][0], BLOCKS[i][1],
                BLOCKS[i][2],
            )  # fmt: skip


@triton.jit
def _merge(
    x_ptr, z_ptr, bias_ptr, gamma_ptr, beta_ptr, mean_ptr, variance_ptr, counter_ptr, statistics_ptr, out_ptr,
    saved_ptr, batch, b, tile, CHANNELS: tl.constexpr, OFFSET: tl.constexpr, TOTAL: tl.constexpr, SIZE: tl.constexpr,
    STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr, GRID: tl.constexpr, NORM: tl.constexpr, FROM_BATCH: tl.constexpr,
    EPS: tl.constexpr, UPDATES: tl.constexpr, MOMENTUM: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    COLUMNS: tl.constexpr = triton.cdiv(SIZE[1], BLOCK_W)
    ROWS: tl.constexpr = triton.cdiv(SIZE[0], BLOCK_H)
    c_begin = tile // (ROWS * COLUMNS) * BLOCK_C
    h_begin = tile // COLUMNS % ROWS * BLOCK_H
    w_begin = tile % COLUMNS * BLOCK_W

    offs_c = c_begin + tl.arange(0, BLOCK_C)
    mask_c = offs_c < CHANNELS
    bias = load_vector(bias_ptr, offs_c, mask_c, ACC)
    if FROM_BATCH:
        mean, variance = _merge_images(statistics_ptr, OFFSET + offs_c, mask_c, batch, SIZE[0] * SIZE[1], TOTAL, ACC)
        if UPDATES and (b == 0) & (h_begin == 0) & (w_begin == 0):
            _update_buffers(
                mean_ptr, variance_ptr, counter_ptr, (mean + bias).to(ACC), variance, offs_c, mask_c,
                batch.to(tl.int64) * SIZE[0] * SIZE[1], MOMENTUM, ACC,
            )  # fmt: skip
    elif NORM:
        mean = load_vector(mean_ptr, offs_c, mask_c, tl.float64) - bias
        variance = load_vector(variance_ptr, offs_c, mask_c, ACC)
    else:
        mean = -bias.to(tl.float64)
        variance = tl.zeros([BLOCK_C], ACC)
    if (saved_ptr is not None) and (b == 0) & (h_begin == 0) & (w_begin == 0):  # the backward will need them
        tl.store(saved_ptr + OFFSET + offs_c, mean, mask=mask_c)
        tl.store(saved_ptr + TOTAL + OFFSET + offs_c, variance, mask=mask_c)

    pair_c, pair_h, mask_pair = _pairs(c_begin, h_begin, CHANNELS, SIZE, BLOCK_C, BLOCK_H)
    offs_w = w_begin + tl.arange(0, BLOCK_W)
    mask = mask_pair[:, None] & (offs_w < SIZE[1])[None, :]
    z_ptrs = z_ptr + b * GRID[0] * GRID[1] * TOTAL + OFFSET + pair_c
    up = _interpolate(z_ptrs, mask_pair, pair_h, w_begin, offs_w, SIZE, GRID, TOTAL, PRECISION, ACC, BLOCK_W)
    x = _load_map(x_ptr + b * STRIDE[0], pair_c, pair_h, offs_w, mask, STRIDE, ACC)
    y = _less_mean(x, up, mean, BLOCK_H, ACC)
    if NORM:
        scale = tl.rsqrt(variance + EPS)
        if gamma_ptr is not None:
            scale *= load_vector(gamma_ptr, offs_c, mask_c, ACC)
        y *= _of_pairs(scale, BLOCK_H)[:, None]
        if beta_ptr is not None:
            y += _of_pairs(load_vector(beta_ptr, offs_c, mask_c, ACC), BLOCK_H)[:, None]
        y = tl.where(y < 0, 0.0, y)  # keeps NaN
    tl.store(_map_pointers(out_ptr + b * OUT_STRIDE[0], pair_c, pair_h, offs_w, OUT_STRIDE), y, mask=mask)


@triton.jit
def _pairs(c_begin, h_begin, CHANNELS: tl.constexpr, SIZE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr):
    """The rows of a tile are (row, channel) pairs, the channel fastest: channel, row, whether both exist."""
    pair = tl.arange(0, BLOCK_H * BLOCK_C)
    c, h = c_begin + pair % BLOCK_C, h_begin + pair // BLOCK_C
    return c, h, (c < CHANNELS) & (h < SIZE[0])


@triton.jit
def _map_pointers(ptr, pair_c, pair_h, offs_w, STRIDE: tl.constexpr):
    offs = pair_c * STRIDE[1] + pair_h * STRIDE[2]
    return ptr + offs[:, None] + (offs_w * STRIDE[3])[None, :]


@triton.jit
def _load_map(ptr, pair_c, pair_h, offs_w, mask, STRIDE: tl.constexpr, ACC: tl.constexpr):
    return tl.load(_map_pointers(ptr, pair_c, pair_h, offs_w, STRIDE), mask=mask, other=0.0).to(ACC)


@triton.jit
def _less_mean(x, up, mean, BLOCK_H: tl.constexpr, ACC: tl.constexpr):
    """x + up - mean, mean in float64: what is lost when it is rounded is the same everywhere, and taken off as well."""
    rounded = mean.to(ACC)
    lost = (mean - rounded.to(tl.float64)).to(ACC)
    return x - _of_pairs(rounded, BLOCK_H)[:, None] + up - _of_pairs(lost, BLOCK_H)[:, None]


@triton.jit
def _of_pairs(vector, BLOCK_H: tl.constexpr):
    """[BLOCK_C] -> [BLOCK_H * BLOCK_C]."""
    rows = tl.broadcast_to(vector[None, :], [BLOCK_H, vector.shape[0]])
    return tl.reshape(rows, [BLOCK_H * vector.shape[0]])


@triton.constexpr_function
def _columns_needed(block, high, low):
    """How many low-resolution columns at most `block` neighbouring high-resolution ones take from."""
    if high == 1:
        return 1
    return min(low, (block - 1) * (low - 1) // (high - 1) + 3)


@triton.jit
def _interpolate(
    z_ptrs, mask_pair, pair_h, w_begin, offs_w, SIZE: tl.constexpr, GRID: tl.constexpr, TOTAL: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_W: tl.constexpr, BY_PRODUCT: tl.constexpr = False,
):  # fmt: skip
    """up(z) in a tile: rows by weighting two of them, then columns.

    BY_PRODUCT: columns by a product with the interpolation's matrix, where that is needed anyway. It rounds up(z) to
    what the products have, less than z itself is rounded.
    """
    if (SIZE[0] == GRID[0]) and (SIZE[1] == GRID[1]):
        z_ptrs += pair_h * GRID[1] * TOTAL
        mask = mask_pair[:, None] & (offs_w < SIZE[1])[None, :]
        return tl.load(z_ptrs[:, None] + offs_w[None, :] * TOTAL, mask=mask, other=0.0).to(ACC)
    K: tl.constexpr = padded(_columns_needed(BLOCK_W, SIZE[1], GRID[1]))
    first, _, _ = interpolation(w_begin, SIZE[1], GRID[1], ACC)
    offs_q = first + tl.arange(0, K)
    top, bottom, fraction = interpolation(pair_h, SIZE[0], GRID[0], ACC)
    above_ptrs, below_ptrs = z_ptrs + top * GRID[1] * TOTAL, z_ptrs + bottom * GRID[1] * TOTAL
    mask = mask_pair[:, None] & (offs_q < GRID[1])[None, :]
    above = tl.load(above_ptrs[:, None] + offs_q[None, :] * TOTAL, mask=mask, other=0.0).to(ACC)
    below = tl.load(below_ptrs[:, None] + offs_q[None, :] * TOTAL, mask=mask, other=0.0).to(ACC)
    rows = above * (1.0 - fraction)[:, None] + below * fraction[:, None]
    if BY_PRODUCT:
        matrix = interpolation_matrix(offs_q, offs_w, SIZE[1], GRID[1], ACC)
        return tl.dot(rows, matrix, input_precision=PRECISION, out_dtype=ACC)
    left, right, fraction = interpolation(offs_w, SIZE[1], GRID[1], ACC)
    return _columns(rows, left - first) * (1.0 - fraction)[None, :] + _columns(rows, right - first) * fraction[None, :]


@triton.jit
def _columns(rows, columns):
    """Some columns of each row: [rows, columns]. A number beyond the last column stands for the last."""
    columns = tl.minimum(columns, rows.shape[1] - 1)
    return tl.gather(rows, tl.broadcast_to(columns[None, :], [rows.shape[0], columns.shape[0]]), 1)


@triton.jit
def _merge_images(statistics_ptr, offs_c, mask_c, batch, PIXELS: tl.constexpr, TOTAL: tl.constexpr, ACC: tl.constexpr):
    """Mean, in float64, and biased variance over the batch, from mean and centred squares of each image."""
    STEP: tl.constexpr = 16
    mean = tl.zeros(offs_c.shape, tl.float64)
    for start in range(0, batch, STEP):
        image_mean, _, _ = _load_images(statistics_ptr, start, offs_c, mask_c, batch, TOTAL, STEP)
        mean += tl.sum(image_mean, 0)
    mean /= batch
    variance = tl.zeros(offs_c.shape, tl.float64)
    for start in range(0, batch, STEP):
        image_mean, squares, mask = _load_images(statistics_ptr, start, offs_c, mask_c, batch, TOTAL, STEP)
        apart = tl.where(mask, image_mean - mean[None, :], 0.0)
        variance += tl.sum(squares / PIXELS + apart * apart, 0)
    return mean, (variance / batch).to(ACC)


@triton.jit
def _load_images(statistics_ptr, start, offs_c, mask_c, batch, TOTAL: tl.constexpr, STEP: tl.constexpr):
    """Means and centred squares of some images [STEP, BLOCK_C] in float64, and which of them exist."""
    offs_b = start + tl.arange(0, STEP)
    mask = (offs_b < batch)[:, None] & mask_c[None, :]
    ptrs = statistics_ptr + offs_b.to(tl.int64)[:, None] * 2 * TOTAL + offs_c[None, :]
    means = tl.load(ptrs, mask=mask, other=0.0).to(tl.float64)
    return means, tl.load(ptrs + TOTAL, mask=mask, other=0.0).to(tl.float64), mask


@triton.jit
def _update_buffers(
    mean_ptr, variance_ptr, counter_ptr, mean, variance, offs_c, mask_c, count, MOMENTUM: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """What BatchNorm2d does to its running buffers; the variance that it keeps is the unbiased one."""
    if MOMENTUM is None:  # a cumulative average
        momentum = 1.0 / tl.load(counter_ptr).to(ACC)
    else:
        momentum = tl.full([], MOMENTUM, ACC)
    old_mean = load_vector(mean_ptr, offs_c, mask_c, ACC)
    old_variance = load_vector(variance_ptr, offs_c, mask_c, ACC)
    unbiased = variance * (count.to(ACC) / (count - 1).to(ACC))
    tl.store(mean_ptr + offs_c, old_mean + momentum * (mean - old_mean), mask=mask_c)
    tl.store(variance_ptr + offs_c, old_variance + momentum * (unbiased - old_variance), mask=mask_c)


@triton.jit
def _masked_gradient(
    x_ptr, z_ptr, dout_ptr, gamma_ptr, beta_ptr, saved_ptr, b, c_begin, h_begin,
    CHANNELS: tl.constexpr, OFFSET: tl.constexpr, TOTAL: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr, GRID: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    BY_PRODUCT: tl.constexpr,
):  # fmt: skip
    """In one tile: x; up(z) + x less its mean; and the gradient of what BatchNorm gave, through the ReLU."""
    offs_c = c_begin + tl.arange(0, BLOCK_C)
    mask_c = offs_c < CHANNELS
    mean = load_vector(saved_ptr, OFFSET + offs_c, mask_c, tl.float64)
    pair_c, pair_h, mask_pair = _pairs(c_begin, h_begin, CHANNELS, SIZE, BLOCK_C, BLOCK_H)
    offs_w = tl.arange(0, BLOCK_W)
    mask = mask_pair[:, None] & (offs_w < SIZE[1])[None, :]
    z_ptrs = z_ptr + b * GRID[0] * GRID[1] * TOTAL + OFFSET + pair_c
    up = _interpolate(
        z_ptrs, mask_pair, pair_h, tl.zeros([], tl.int32), offs_w, SIZE, GRID, TOTAL, PRECISION, ACC, BLOCK_W,
        BY_PRODUCT,
    )  # fmt: skip
    x = _load_map(x_ptr + b * STRIDE[0], pair_c, pair_h, offs_w, mask, STRIDE, ACC)
    y = _less_mean(x, up, mean, BLOCK_H, ACC)
    gradient = _load_map(dout_ptr + b * OUT_STRIDE[0], pair_c, pair_h, offs_w, mask, OUT_STRIDE, ACC)
    if NORM:
        scale = tl.rsqrt(load_vector(saved_ptr + TOTAL, OFFSET + offs_c, mask_c, ACC) + EPS)
        if gamma_ptr is not None:
            scale *= load_vector(gamma_ptr, offs_c, mask_c, ACC)
        before_relu = y * _of_pairs(scale, BLOCK_H)[:, None]
        if beta_ptr is not None:
            before_relu += _of_pairs(load_vector(beta_ptr, offs_c, mask_c, ACC), BLOCK_H)[:, None]
        gradient = tl.where(before_relu <= 0, 0.0, gradient)
    return x, y, gradient


@kernel
def _merge_gradient_kernel(
    maps, z_ptr, douts, gammas, betas, saved_ptr, sums_ptr, wide_ptr,
    CHANNELS: tl.constexpr, SIZES: tl.constexpr, STRIDES: tl.constexpr, OUT_STRIDES: tl.constexpr, GRID: tl.constexpr,
    NORM: tl.constexpr, EPS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCKS: tl.constexpr,
    FIRST: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """One program: a tile of whole rows of one map. Sums over its pixels of the gradient g behind the ReLU, and of g y.

    Writes sums (B, MOST, 2, C) and g times the transposed interpolation along rows, for each image the S arrays
    (H_i, P_w, C_i).
    """
    TOTAL: tl.constexpr = total(CHANNELS)
    b, tile = split_program(FIRST[len(CHANNELS)])
    for i in tl.static_range(len(CHANNELS)):
        if (tile >= FIRST[i]) & (tile < FIRST[i + 1]):
            _merge_gradient(
                maps[i], z_ptr, douts[i], gammas[i], betas[i], saved_ptr, sums_ptr + b * MOST * 2 * TOTAL,
                wide_ptr + b * _wide(CHANNELS, SIZES, GRID, len(CHANNELS)) + _wide(CHANNELS, SIZES, GRID, i), b,
                tile - FIRST[i], CHANNELS[i], offset(CHANNELS, i), TOTAL, of_scale(SIZES, i), of_scale(STRIDES, i),
                of_scale(OUT_STRIDES, i), GRID, NORM[i], EPS[i], PRECISION, ACC, BLOCKS[i][0], BLOCKS[i][1],
                BLOCKS[i][2],
            )  # fmt: skip


@triton.constexpr_function
def _wide(channels, sizes, grid, i):
    """Elements of the first i maps of one image with the rows brought to the grid's width."""
    return sum(channels[k] * sizes[k][0] * grid[1] for k in range(i))


@triton.jit
def _merge_gradient(
    x_ptr, z_ptr, dout_ptr, gamma_ptr, beta_ptr, saved_ptr, sums_ptr, wide_ptr, b, tile,
    CHANNELS: tl.constexpr, OFFSET: tl.constexpr, TOTAL: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr, GRID: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = triton.cdiv(SIZE[0], BLOCK_H)
    c_begin, h_begin = tile // ROWS * BLOCK_C, tile % ROWS * BLOCK_H
    _, y, gradient = _masked_gradient(
        x_ptr, z_ptr, dout_ptr, gamma_ptr, beta_ptr, saved_ptr, b, c_begin, h_begin, CHANNELS, OFFSET, TOTAL, SIZE,
        STRIDE, OUT_STRIDE, GRID, NORM, EPS, PRECISION, ACC, BLOCK_C, BLOCK_H, BLOCK_W, True,
    )  # fmt: skip
    pair_c, pair_h, mask_pair = _pairs(c_begin, h_begin, CHANNELS, SIZE, BLOCK_C, BLOCK_H)
    offs_w = tl.arange(0, BLOCK_W)
    offs_c = c_begin + tl.arange(0, BLOCK_C)
    sums_ptrs = sums_ptr + tile % ROWS * 2 * TOTAL + OFFSET + offs_c
    tl.store(sums_ptrs, _sum_pairs(gradient, BLOCK_C, BLOCK_H), mask=offs_c < CHANNELS)
    tl.store(sums_ptrs + TOTAL, _sum_pairs(gradient * y, BLOCK_C, BLOCK_H), mask=offs_c < CHANNELS)
    offs_q = tl.arange(0, padded(GRID[1]))
    matrix = interpolation_matrix(offs_q, offs_w, SIZE[1], GRID[1], ACC)
    wide = tl.dot(gradient, tl.trans(matrix), input_precision=PRECISION, out_dtype=ACC)  # [pairs, P_w]
    wide_ptrs = wide_ptr + (pair_h * GRID[1] * CHANNELS + pair_c)[:, None] + (offs_q * CHANNELS)[None, :]
    wide /= SIZE[1] / GRID[1]  # of a gradient's size, whatever the stride
    tl.store(wide_ptrs, wide, mask=mask_pair[:, None] & (offs_q < GRID[1])[None, :])


@triton.jit
def _sum_pairs(tile, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr):
    """[BLOCK_H * BLOCK_C, columns] -> [BLOCK_C]."""
    return tl.sum(tl.reshape(tl.sum(tile, 1), [BLOCK_H, BLOCK_C]), 0)


@kernel
def _norm_gradient_kernel(
    sums_ptr, saved_ptr, gammas, gradients_ptr, removed_ptr, batch,
    CHANNELS: tl.constexpr, SIZES: tl.constexpr, NORM: tl.constexpr, FROM_BATCH: tl.constexpr, EPS: tl.constexpr,
    ACC: tl.constexpr, BLOCKS: tl.constexpr, MOST: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: a sum of BLOCK_C channels of one scale, over images and tiles in a fixed order, and what it is for.

    gradients (3, C): BatchNorm's weight and bias, the convolution's bias. removed (2, C): what the gradient of
    up(z) + x loses where the statistics are the batch's: a constant, and a multiple of up(z) + x less its mean.
    """
    TOTAL: tl.constexpr = total(CHANNELS)
    TILES: tl.constexpr = blocks_before(CHANNELS, BLOCK_C, len(CHANNELS))
    k, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    for i in tl.static_range(len(CHANNELS)):
        block = tile - blocks_before(CHANNELS, BLOCK_C, i)
        if (block >= 0) & (block < triton.cdiv(CHANNELS[i], BLOCK_C)):
            offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
            mask_c = offs_c < CHANNELS[i]
            own = offset(CHANNELS, i) + offs_c
            rstd = tl.full([BLOCK_C], 1.0, ACC)
            scale = rstd
            if NORM[i]:
                rstd = tl.rsqrt(load_vector(saved_ptr + TOTAL, own, mask_c, ACC) + EPS[i])
                scale = rstd
                if gammas[i] is not None:
                    scale *= load_vector(gammas[i], offs_c, mask_c, ACC)
            pixels = batch.to(ACC) * (SIZES[i][0] * SIZES[i][1])
            gradient = sum_images(sums_ptr + k * TOTAL, own, mask_c, batch, BLOCKS[i], 2 * TOTAL, MOST * 2 * TOTAL, ACC)
            if k == 0:
                tl.store(gradients_ptr + TOTAL + own, gradient, mask=mask_c)
                if FROM_BATCH[i]:
                    tl.store(gradients_ptr + 2 * TOTAL + own, tl.zeros([BLOCK_C], ACC), mask=mask_c)
                    tl.store(removed_ptr + own, gradient / pixels, mask=mask_c)
                else:
                    tl.store(gradients_ptr + 2 * TOTAL + own, scale * gradient, mask=mask_c)
            else:
                tl.store(gradients_ptr + own, gradient * rstd, mask=mask_c)
                if FROM_BATCH[i]:
                    tl.store(removed_ptr + TOTAL + own, gradient * rstd * rstd / pixels, mask=mask_c)


@kernel
def _grid_gradient_kernel(
    maps, z_ptr, adjoint_ptr, tables_ptr, wide_ptr, saved_ptr, gammas, removed_ptr, weights, dz_ptr, dtokens_ptr,
    CHANNELS: tl.constexpr, SIZES: tl.constexpr, STRIDES: tl.constexpr, GRID: tl.constexpr, NORM: tl.constexpr,
    FROM_BATCH: tl.constexpr, EPS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of the tokens in one row of the grid, for BLOCK_C channels of one scale: (B, N, C).

    It is that of z, (B, N, C), through the transposed convolution, where it is wanted. Every block of channels needs
    all of z's, BLOCK_K at a time, and writes its own.
    """
    TOTAL: tl.constexpr = total(CHANNELS)
    ROW_BLOCKS: tl.constexpr = blocks_before(CHANNELS, BLOCK_C, len(CHANNELS))
    b, tile = split_program(GRID[0] * ROW_BLOCKS)
    p = tile // ROW_BLOCKS
    image = b * GRID[0] * GRID[1] * TOTAL
    offs_q = tl.arange(0, padded(GRID[1]))
    row = image + (p * GRID[1] + offs_q) * TOTAL
    for i in tl.static_range(len(CHANNELS)):
        block = tile % ROW_BLOCKS - blocks_before(CHANNELS, BLOCK_C, i)
        if (block >= 0) & (block < triton.cdiv(CHANNELS[i], BLOCK_C)):
            STEP: tl.constexpr = min(padded(CHANNELS[i]), BLOCK_K)
            offs_in = block * BLOCK_C + tl.arange(0, min(padded(CHANNELS[i]), BLOCK_C))
            mask_in = offs_in < CHANNELS[i]
            dtokens = tl.zeros([offs_q.shape[0], offs_in.shape[0]], ACC)
            for start in range(0, CHANNELS[i], STEP):
                offs_c = start + tl.arange(0, STEP)
                mask_c = offs_c < CHANNELS[i]
                dz = _grid_gradient(
                    maps[i] + b * STRIDES[i][0], z_ptr + image, adjoint_ptr, image,
                    tables_ptr + i * 3 * (GRID[0] + GRID[1]),
                    wide_ptr + b * _wide(CHANNELS, SIZES, GRID, len(CHANNELS)) + _wide(CHANNELS, SIZES, GRID, i),
                    saved_ptr, gammas[i], removed_ptr, p, offs_q, offs_c, mask_c, CHANNELS[i], offset(CHANNELS, i),
                    TOTAL, of_scale(SIZES, i), of_scale(STRIDES, i), GRID, NORM[i], FROM_BATCH[i], EPS[i], ACC,
                ).to(dz_ptr.dtype.element_ty)  # fmt: skip
                own = (start // BLOCK_C == block) & (offs_q < GRID[1])[:, None] & mask_c[None, :]
                tl.store(dz_ptr + row[:, None] + (offset(CHANNELS, i) + offs_c)[None, :], dz, mask=own)
                if dtokens_ptr is not None:
                    weight_ptrs = weights[i] + offs_c[:, None] * CHANNELS[i] + offs_in[None, :]
                    weight = tl.load(weight_ptrs, mask=mask_c[:, None] & mask_in[None, :], other=0.0).to(OPERAND)
                    dtokens = tl.dot(dz.to(OPERAND), weight, dtokens, input_precision=PRECISION, out_dtype=ACC)
            if dtokens_ptr is not None:
                dtokens_ptrs = dtokens_ptr + row[:, None] + (offset(CHANNELS, i) + offs_in)[None, :]
                tl.store(dtokens_ptrs, dtokens, mask=(offs_q < GRID[1])[:, None] & mask_in[None, :])


@triton.jit
def _grid_gradient(
    x_ptr, z_ptr, adjoint_ptr, image, tables_ptr, wide_ptr, saved_ptr, gamma_ptr, removed_ptr, p, offs_q,
    offs_c, mask_c,
    CHANNELS: tl.constexpr, OFFSET: tl.constexpr, TOTAL: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr,
    GRID: tl.constexpr, NORM: tl.constexpr, FROM_BATCH: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient of z in one row of the grid: [columns, channels]."""
    own = OFFSET + offs_c
    mask = (offs_q < GRID[1])[:, None] & mask_c[None, :]
    wide_ptrs = wide_ptr + offs_q[:, None] * CHANNELS + offs_c[None, :]
    dz = tl.zeros(mask.shape, ACC)
    begin = band_begin(p, SIZE[0], GRID[0])
    for r in range(band(SIZE[0], GRID[0], 1)):
        h = begin + r
        top, bottom, fraction = interpolation(h, SIZE[0], GRID[0], ACC)
        weight = tl.where(top == p, 1.0 - fraction, 0.0) + tl.where(bottom == p, fraction, 0.0)
        row = tl.load(wide_ptrs + h * (GRID[1] * CHANNELS), mask=mask & (h < SIZE[0]), other=0.0)
        dz += tl.where(weight != 0, weight * row.to(ACC), 0.0)
    dz *= SIZE[1] / GRID[1]
    if FROM_BATCH:
        rows = p + tl.zeros(offs_q.shape, tl.int32)
        ones = _table(tables_ptr, 0, rows, GRID[0], 0) * _table(tables_ptr, 0, offs_q, GRID[1], 3 * GRID[0])
        first = tl.load(x_ptr + offs_c * STRIDE[1], mask=mask_c, other=0.0).to(ACC)
        token = load_vector(z_ptr, own, mask_c, ACC)  # taken off z: as a mean is, it may be far larger than what varies
        level = (first.to(tl.float64) + token - load_vector(saved_ptr, own, mask_c, tl.float64)).to(ACC)
        constant = load_vector(removed_ptr, own, mask_c, ACC)
        multiple = load_vector(removed_ptr + TOTAL, own, mask_c, ACC)
        y = _load_grid(adjoint_ptr + image, rows, offs_q, own, mask_c, GRID, TOTAL, ACC)
        y *= SIZE[0] * SIZE[1] / (GRID[0] * GRID[1])
        y += _interpolated_twice(z_ptr, token, tables_ptr, rows, offs_q, own, mask_c, GRID, TOTAL, ACC)
        y += ones[:, None] * level[None, :]
        dz -= constant[None, :] * ones[:, None] + multiple[None, :] * y
    if NORM:
        scale = tl.rsqrt(load_vector(saved_ptr + TOTAL, own, mask_c, ACC) + EPS)
        if gamma_ptr is not None:
            scale *= load_vector(gamma_ptr, offs_c, mask_c, ACC)
        dz *= scale[None, :]
    return dz


@triton.jit
def _interpolated_twice(
    z_ptr, token, tables_ptr, p, q, offs_c, mask_c, GRID: tl.constexpr, TOTAL: tl.constexpr, ACC: tl.constexpr
):
    """U^T U (z - token) at some positions: (G_h x G_w) of it, both with three diagonals, zero beyond the grid."""
    out = tl.zeros([p.shape[0], offs_c.shape[0]], ACC)
    for dp in tl.static_range(-1, 2):
        for dq in tl.static_range(-1, 2):
            row = _table(tables_ptr, 1 if dp == 0 else 2, p if dp >= 0 else p - 1, GRID[0], 0)
            column = _table(tables_ptr, 1 if dq == 0 else 2, q if dq >= 0 else q - 1, GRID[1], 3 * GRID[0])
            z = _load_grid(z_ptr, p + dp, q + dq, offs_c, mask_c, GRID, TOTAL, ACC) - token[None, :]
            out += (row * column)[:, None] * z
    return out


@kernel
def _conv_gradient_kernel(
    tokens_ptr, dz_ptr, dweight_ptr,
    N: tl.constexpr, CHANNELS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: a tile of dz^T tokens, the gradient of one scale's convolution, over one image.

    dweight: for each image the S matrices (C_i, C_i), one after another.
    """
    TOTAL: tl.constexpr = total(CHANNELS)
    b, tile = split_program(_squares(CHANNELS, BLOCK_C, len(CHANNELS)))
    image = b * N * TOTAL
    for i in tl.static_range(len(CHANNELS)):
        local = tile - _squares(CHANNELS, BLOCK_C, i)
        if (local >= 0) & (local < triton.cdiv(CHANNELS[i], BLOCK_C) * triton.cdiv(CHANNELS[i], BLOCK_C)):
            offs_out = local // triton.cdiv(CHANNELS[i], BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
            offs_in = local % triton.cdiv(CHANNELS[i], BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
            mask_out, mask_in = offs_out < CHANNELS[i], offs_in < CHANNELS[i]
            dweight = tl.zeros([BLOCK_C, BLOCK_C], ACC)
            for start in range(0, N, BLOCK_N):
                offs_n = start + tl.arange(0, BLOCK_N)
                mask_n = (offs_n < N)[:, None]
                ptrs = image + offs_n[:, None] * TOTAL + offset(CHANNELS, i)
                dz = tl.load(dz_ptr + ptrs + offs_out[None, :], mask=mask_n & mask_out[None, :], other=0.0)
                tokens = tl.load(tokens_ptr + ptrs + offs_in[None, :], mask=mask_n & mask_in[None, :], other=0.0)
                dweight = tl.dot(
                    tl.trans(dz.to(OPERAND)), tokens.to(OPERAND), dweight, input_precision=PRECISION, out_dtype=ACC
                )
            matrix = b * _squares(CHANNELS, 1, len(CHANNELS)) + _squares(CHANNELS, 1, i)
            dweight_ptrs = dweight_ptr + matrix + offs_out[:, None] * CHANNELS[i] + offs_in[None, :]
            tl.store(dweight_ptrs, dweight, mask=mask_out[:, None] & mask_in[None, :])


@triton.constexpr_function
def _squares(sizes, block, i):
    """Tiles of the first i square matrices."""
    return sum((-(-sizes[k] // block)) ** 2 for k in range(i))


@kernel
def _map_gradient_kernel(
    maps, z_ptr, douts, gammas, betas, saved_ptr, removed_ptr, dtokens_ptr, avg_weights, dmaps, sums_ptr,
    CHANNELS: tl.constexpr, SIZES: tl.constexpr, STRIDES: tl.constexpr, OUT_STRIDES: tl.constexpr,
    MAP_STRIDES: tl.constexpr, GRID: tl.constexpr, NORM: tl.constexpr, FROM_BATCH: tl.constexpr, EPS: tl.constexpr,
    SHARED: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCKS: tl.constexpr, FIRST: tl.constexpr,
    MOST: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of a tile of whole rows of one map, past the attention and through its pooling.

    SHARED is how many windows at most have a row of each map in common. sums (B, MOST, 2, C): over the tile, of the
    pooling's gradient times x, and of the pooling's gradient: the shares of `avg_map`.
    """
    b, tile = split_program(FIRST[len(CHANNELS)])
    for i in tl.static_range(len(CHANNELS)):
        if (tile >= FIRST[i]) & (tile < FIRST[i + 1]):
            _map_gradient(
                maps[i], z_ptr, douts[i], gammas[i], betas[i], saved_ptr, removed_ptr, dtokens_ptr, avg_weights[i],
                dmaps[i], sums_ptr, b, tile - FIRST[i], CHANNELS[i], offset(CHANNELS, i), total(CHANNELS),
                of_scale(SIZES, i), of_scale(STRIDES, i), of_scale(OUT_STRIDES, i), of_scale(MAP_STRIDES, i), GRID,
                NORM[i], FROM_BATCH[i], EPS[i], SHARED[i], PRECISION, ACC, BLOCKS[i][0], BLOCKS[i][1], BLOCKS[i][2],
                MOST,
            )  # fmt: skip


@triton.jit
def _map_gradient(
    x_ptr, z_ptr, dout_ptr, gamma_ptr, beta_ptr, saved_ptr, removed_ptr, dtokens_ptr, avg_weight_ptr, dmap_ptr,
    sums_ptr, b, tile, CHANNELS: tl.constexpr, OFFSET: tl.constexpr, TOTAL: tl.constexpr, SIZE: tl.constexpr,
    STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr, MAP_STRIDE: tl.constexpr, GRID: tl.constexpr, NORM: tl.constexpr,
    FROM_BATCH: tl.constexpr, EPS: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = triton.cdiv(SIZE[0], BLOCK_H)
    c_begin, h_begin = tile // ROWS * BLOCK_C, tile % ROWS * BLOCK_H
    x, y, gradient = _masked_gradient(
        x_ptr, z_ptr, dout_ptr, gamma_ptr, beta_ptr, saved_ptr, b, c_begin, h_begin, CHANNELS, OFFSET, TOTAL, SIZE,
        STRIDE, OUT_STRIDE, GRID, NORM, EPS, PRECISION, ACC, BLOCK_C, BLOCK_H, BLOCK_W, False,
    )  # fmt: skip
    offs_c = c_begin + tl.arange(0, BLOCK_C)
    mask_c = offs_c < CHANNELS
    if FROM_BATCH:
        constant = load_vector(removed_ptr, OFFSET + offs_c, mask_c, ACC)
        multiple = load_vector(removed_ptr + TOTAL, OFFSET + offs_c, mask_c, ACC)
        gradient -= _of_pairs(constant, BLOCK_H)[:, None] + y * _of_pairs(multiple, BLOCK_H)[:, None]
    if NORM:
        scale = tl.rsqrt(load_vector(saved_ptr + TOTAL, OFFSET + offs_c, mask_c, ACC) + EPS)
        if gamma_ptr is not None:
            scale *= load_vector(gamma_ptr, offs_c, mask_c, ACC)
        gradient *= _of_pairs(scale, BLOCK_H)[:, None]

    pair_c, pair_h, mask_pair = _pairs(c_begin, h_begin, CHANNELS, SIZE, BLOCK_C, BLOCK_H)
    offs_w = tl.arange(0, BLOCK_W)
    offs_q = tl.arange(0, padded(GRID[1]))
    rows = tl.zeros([BLOCK_H * BLOCK_C, padded(GRID[1])], ACC)
    dtokens_ptrs = dtokens_ptr + b * GRID[0] * GRID[1] * TOTAL + OFFSET + pair_c[:, None] + (offs_q * TOTAL)[None, :]
    for k in tl.static_range(SHARED):
        p = first_window(pair_h, SIZE[0], GRID[0]) + k
        begin, end = window_begin(p, SIZE[0], GRID[0]), window_end(p, SIZE[0], GRID[0])
        inside = mask_pair & (p < GRID[0]) & (begin <= pair_h) & (pair_h < end)
        mask = inside[:, None] & (offs_q < GRID[1])[None, :]
        dtokens = tl.load(dtokens_ptrs + (p * GRID[1] * TOTAL)[:, None], mask=mask, other=0.0)
        rows += dtokens.to(ACC) / (end - begin).to(ACC)[:, None]
    pooled = _unpooled(rows, offs_q, offs_w, SIZE[1], GRID[1], PRECISION, ACC)
    if dmap_ptr is not None:
        gradient += pooled * _of_pairs(load_vector(avg_weight_ptr, offs_c, mask_c, ACC), BLOCK_H)[:, None]
        mask = mask_pair[:, None] & (offs_w < SIZE[1])[None, :]
        tl.store(_map_pointers(dmap_ptr + b * MAP_STRIDE[0], pair_c, pair_h, offs_w, MAP_STRIDE), gradient, mask=mask)
    sums_ptrs = sums_ptr + (b * MOST + tile % ROWS) * 2 * TOTAL + OFFSET + offs_c
    tl.store(sums_ptrs, _sum_pairs(pooled * x, BLOCK_C, BLOCK_H), mask=mask_c)
    tl.store(sums_ptrs + TOTAL, _sum_pairs(rows, BLOCK_C, BLOCK_H), mask=mask_c)  # each window's value, once a column


@triton.jit
def _unpooled(rows, offs_q, offs_w, SIZE: tl.constexpr, GRID: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """[pairs, windows] -> [pairs, columns]: each window's value over its width, summed where two windows meet."""
    WIDTH: tl.constexpr = SIZE // GRID
    if offs_q.shape[0] * WIDTH == offs_w.shape[0] and SIZE % GRID == 0:
        repeated = tl.broadcast_to(rows[:, :, None], [rows.shape[0], rows.shape[1], WIDTH])
        return tl.reshape(repeated, [rows.shape[0], offs_w.shape[0]]) / WIDTH
    begin, end = window_begin(offs_q, SIZE, GRID), window_end(offs_q, SIZE, GRID)
    inside = (begin[:, None] <= offs_w[None, :]) & (offs_w[None, :] < end[:, None]) & (offs_q < GRID)[:, None]
    windows = tl.where(inside, 1.0 / (end - begin).to(ACC)[:, None], 0.0)
    return tl.dot(rows, windows, input_precision=PRECISION, out_dtype=ACC)


@kernel
def _avg_map_gradient_kernel(
    sums_ptr, gradients_ptr, batch,
    CHANNELS: tl.constexpr, ACC: tl.constexpr, BLOCKS: tl.constexpr, MOST: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: weight or bias, (2, C), of BLOCK_C channels of a scale, over images and tiles in a fixed order."""
    TOTAL: tl.constexpr = total(CHANNELS)
    TILES: tl.constexpr = blocks_before(CHANNELS, BLOCK_C, len(CHANNELS))
    k, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    for i in tl.static_range(len(CHANNELS)):
        block = tile - blocks_before(CHANNELS, BLOCK_C, i)
        if (block >= 0) & (block < triton.cdiv(CHANNELS[i], BLOCK_C)):
            offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
            mask_c = offs_c < CHANNELS[i]
            own = k * TOTAL + offset(CHANNELS, i) + offs_c
            gradient = sum_images(sums_ptr, own, mask_c, batch, BLOCKS[i], 2 * TOTAL, MOST * 2 * TOTAL, ACC)
            tl.store(gradients_ptr + own, gradient, mask=mask_c)


class Saved(NamedTuple):
    """What the backward needs: the maps, which the network holds anyway, and token-sized tensors."""

    tokens: Tokens
    maps: Sequence[Tensor]
    z: Tensor
    adjoint: Tensor | None  # of the maps, (B, N, C)
    statistics: Tensor | None  # (2, C) in float64, mean without the convolution's bias and variance that BatchNorm took


class Gradients(NamedTuple):
    """Gradients of the upsampling, but for the maps', which wait for the tokens'."""

    tokens: Tensor | None  # (B, N, C), where wanted
    removed: Tensor  # (2, C), what the statistics of a batch take off the maps' gradient
    convs: Tensor  # the S matrices (C_i, C_i), one after another
    norms: Tensor  # (3, C): BatchNorm's weights and biases, the convolutions' biases


def upsample(
    tokens: Tokens,
    maps: Sequence[Tensor],
    moments: tuple[Tensor, Tensor] | None,
    upconvs: Sequence[Affine],
    norms: Sequence[BatchNorm | None],
    grid: tuple[int, int],
    training: bool,
) -> tuple[list[Tensor], Saved]:
    """1x1 convolution at the grid's size, bilinear upsampling, raw map added, BatchNorm, ReLU (paper, eq. 5).

    Args:
        tokens: the tokens.
        maps: S tensors (B, C_i, H_i, W_i), any strides.
        moments: what `patch_embed` returned for BatchNorm.
        upconvs: S dense 1x1 convolutions.
        norms: S BatchNorms; where None, the map is returned as it enters BatchNorm and ReLU.
        grid: (P_h, P_w).
        training: whether there will be a backward.

    Returns:
        S tensors (B, C_i, H_i, W_i) in the dtype that the map's and the tokens' promote to, channels_last where the map
        is; and what the backward needs. BatchNorm's running buffers are updated.
    """
    batch, count, width = tokens.shape
    target, dtype = launch.architecture(tokens.values.device), tokens.values.dtype
    sizes = launch.sizes(maps)
    from_batch = _from_batch(norms)
    shared = {
        "CHANNELS": tokens.channels,
        "ACC": launch.triton_type(tokens.accumulation),
    }

    config = launch.configuration("conv", target, dtype, max(launch.padded(c) for c in tokens.channels))
    z = torch.empty_like(tokens.values)
    column_blocks = sum(launch.blocks(c, config["block_c"]) for c in tokens.channels)
    launch.run(
        _conv_kernel,
        batch * launch.blocks(count, config["block_n"]) * column_blocks,
        config,
        tokens_ptr=tokens.values,
        weights=launch.weights(upconvs),
        z_ptr=z,
        N=count,
        OPERAND=launch.triton_type(dtype),
        PRECISION=launch.precision(dtype, target),
        BLOCK_N=config["block_n"],
        BLOCK_C=config["block_c"],
        **shared,
    )

    counters = tuple(None if norm is None or not norm.updates else norm.counter for norm in norms)
    statistics = None
    if moments is not None:
        config = launch.configuration("batch_statistics", target, dtype, batch)
        statistics = tokens.new_empty(batch, 2, width, dtype=torch.float64)
        launch.run(
            _batch_statistics_kernel,
            batch * sum(launch.blocks(c, config["block_c"]) for c in tokens.channels),
            config,
            maps=tuple(maps),
            z_ptr=z,
            moments_ptr=moments[0],
            adjoint_ptr=moments[1],
            tables_ptr=_tables(sizes, grid, tokens.accumulation, z.device),
            counters=counters,
            statistics_ptr=statistics,
            SIZES=sizes,
            STRIDES=launch.strides(maps),
            GRID=grid,
            FROM_BATCH=from_batch,
            GUARDED=dtype in (torch.float32, torch.float64),  # 16-bit sums lose more than the cancellation does
            MOMENT_BLOCKS=moments[0].shape[1],
            BLOCK_N=config["block_n"],
            BLOCK_C=config["block_c"],
            BLOCK_P=config["block_p"],
            **shared,
        )

    if batch == 0:  # no program runs, and BatchNorm counts the batch all the same
        for counter in (c for c in counters if c is not None):
            counter.add_(1)
    outs = [
        torch.empty_like(x, dtype=torch.promote_types(x.dtype, dtype), memory_format=memory_format(x)) for x in maps
    ]
    widest = max(w for _, w in sizes)
    layout = "channels_last" if all(x.stride(1) == 1 for x in maps) else "contiguous"
    config = launch.configuration(f"upsample_{layout}", target, dtype, widest)
    tiles, first = _tiles(tokens.channels, sizes, config["tile"], config["block_c"], config["block_w"])
    kept = tokens.new_empty(2, width, dtype=torch.float64) if training or any(from_batch) else None
    if batch == 0 and kept is not None:
        kept.zero_()
    launch.run(
        _upsample_kernel,
        batch * first[-1],
        config,
        maps=tuple(maps),
        z_ptr=z,
        conv_biases=launch.biases(upconvs),
        gammas=_affine_of(norms, "weight"),
        betas=_affine_of(norms, "bias"),
        means=tuple(None if norm is None else norm.running_mean for norm in norms),
        variances=tuple(None if norm is None else norm.running_var for norm in norms),
        counters=counters,
        statistics_ptr=statistics,
        outs=tuple(outs),
        saved_ptr=kept,
        batch=batch,
        SIZES=sizes,
        STRIDES=launch.strides(maps),
        OUT_STRIDES=launch.strides(outs),
        GRID=grid,
        NORM=tuple(norm is not None for norm in norms),
        FROM_BATCH=from_batch,
        EPS=tuple(0.0 if norm is None else norm.eps for norm in norms),
        UPDATES=tuple(norm is not None and norm.updates for norm in norms),
        MOMENTUM=tuple(None if norm is None else norm.momentum for norm in norms),
        PRECISION=launch.precision(dtype, target),
        BLOCKS=tiles,
        FIRST=first,
        **shared,
    )
    adjoint = None if moments is None else moments[1]
    return outs, Saved(tokens, maps, z, adjoint, kept)


def upsample_backward(
    saved: Saved,
    douts: Sequence[Tensor],
    upconvs: Sequence[Affine],
    norms: Sequence[BatchNorm | None],
    grid: tuple[int, int],
    tokens_wanted: bool,
) -> Gradients:
    """The gradients of `upsample`, but for the maps'.

    Args:
        saved: what the forward returned.
        douts: S tensors (B, C_i, H_i, W_i), any strides.
        upconvs, norms, grid: as in the forward.
        tokens_wanted: whether the tokens' gradient is.
    """
    tokens = saved.tokens
    batch, count, width = tokens.shape
    target, dtype = launch.architecture(tokens.values.device), tokens.values.dtype
    precision = launch.precision(dtype, target)
    config, shared, (blocks, first) = _backward_arguments("merge_gradient", saved, norms)
    rows = tuple(launch.blocks(x.shape[2], block[1]) for x, block in zip(saved.maps, blocks, strict=True))
    sums = tokens.new_empty(batch, max(rows), 2, width)
    wide_size = sum(x.shape[1] * x.shape[2] * grid[1] for x in saved.maps)
    wide = tokens.new_empty(batch, wide_size, dtype=dtype)
    launch.run(
        _merge_gradient_kernel,
        batch * first[-1],
        config,
        maps=tuple(saved.maps),
        z_ptr=saved.z,
        douts=tuple(douts),
        gammas=_affine_of(norms, "weight"),
        betas=_affine_of(norms, "bias"),
        saved_ptr=saved.statistics,
        sums_ptr=sums,
        wide_ptr=wide,
        STRIDES=launch.strides(saved.maps),
        OUT_STRIDES=launch.strides(douts),
        GRID=grid,
        PRECISION=precision,
        BLOCKS=blocks,
        FIRST=first,
        MOST=max(rows),
        **shared,
    )

    block_c, from_batch = 8, _from_batch(norms)
    norm_gradients = tokens.new_empty(3, width, dtype=upconvs[0].weight.dtype)
    removed = tokens.new_empty(2, width)
    launch.run(
        _norm_gradient_kernel,
        2 * sum(launch.blocks(c, block_c) for c in tokens.channels),
        {"num_warps": 8, "num_stages": 2},
        sums_ptr=sums,
        saved_ptr=saved.statistics,
        gammas=_affine_of(norms, "weight"),
        gradients_ptr=norm_gradients,
        removed_ptr=removed,
        batch=batch,
        FROM_BATCH=from_batch,
        BLOCKS=rows,
        MOST=max(rows),
        BLOCK_C=block_c,
        **shared,
    )

    products = {"OPERAND": launch.triton_type(dtype), "PRECISION": precision, "ACC": shared["ACC"]}
    widest = max(launch.padded(c) for c in tokens.channels)
    config = launch.configuration("grid_gradient", target, dtype, widest)
    dz, dtokens = torch.empty_like(saved.z), torch.empty_like(saved.z) if tokens_wanted else None
    launch.run(
        _grid_gradient_kernel,
        batch * grid[0] * sum(launch.blocks(c, config["block_c"]) for c in tokens.channels),
        config,
        maps=tuple(saved.maps),
        z_ptr=saved.z,
        adjoint_ptr=saved.adjoint,
        tables_ptr=_tables(launch.sizes(saved.maps), grid, tokens.accumulation, saved.z.device),
        wide_ptr=wide,
        saved_ptr=saved.statistics,
        gammas=_affine_of(norms, "weight"),
        removed_ptr=removed,
        weights=launch.weights(upconvs),
        dz_ptr=dz,
        dtokens_ptr=dtokens,
        STRIDES=launch.strides(saved.maps),
        GRID=grid,
        FROM_BATCH=from_batch,
        BLOCK_C=config["block_c"],
        BLOCK_K=config["block_k"],
        **shared | products,
    )

    config = launch.configuration("conv", target, dtype, widest)
    own = upconvs[0].weight.dtype
    dweight = tokens.new_empty(batch, sum(c * c for c in tokens.channels), dtype=own if batch == 1 else None)
    launch.run(
        _conv_gradient_kernel,
        batch * sum(launch.blocks(c, config["block_c"]) ** 2 for c in tokens.channels),
        config,
        tokens_ptr=tokens.values,
        dz_ptr=dz,
        dweight_ptr=dweight,
        N=count,
        CHANNELS=tokens.channels,
        BLOCK_C=config["block_c"],
        BLOCK_N=config["block_n"],
        **products,
    )
    convs = dweight[0] if batch == 1 else sum_partials(dweight, own)
    return Gradients(dtokens, removed, convs, norm_gradients)


def split_gradients(convs: Tensor, norms: Tensor, channels: Sequence[int]) -> list[Sequence[Tensor]]:
    """`Gradients` of the parameters: the convolutions' weights and biases, BatchNorm's weights and biases, S each."""
    dgamma, dbeta, dbias = (row.split(channels) for row in norms)
    return [convs.split([c * c for c in channels]), dbias, dgamma, dbeta]


def map_gradients(
    saved: Saved,
    removed: Tensor,
    dtokens: Tensor,
    douts: Sequence[Tensor],
    avg_map: Sequence[Affine],
    norms: Sequence[BatchNorm | None],
    grid: tuple[int, int],
    wanted: Sequence[bool],
) -> tuple[list[Tensor | None], Tensor]:
    """The gradients of the maps, past the attention and through their pooling, and of `avg_map`, in one pass.

    Args:
        saved: what `upsample` returned.
        removed: of what `upsample_backward` returned.
        dtokens: (B, N, C), the gradient of what `patch_embed` wrote.
        douts, norms, grid: as in `upsample_backward`.
        avg_map: as in `patch_embed`.
        wanted: which maps' gradients are.

    Returns:
        S tensors of the maps' shapes, None where not wanted; and the gradients of weights and biases, (2, C).
    """
    target, dtype = launch.architecture(dtokens.device), saved.tokens.values.dtype
    batch, _, width = dtokens.shape
    config, shared, (blocks, first) = _backward_arguments("map_gradient", saved, norms)
    rows = tuple(launch.blocks(x.shape[2], block[1]) for x, block in zip(saved.maps, blocks, strict=True))
    sums = saved.tokens.new_empty(batch, max(rows), 2, width)
    dmaps = [
        torch.empty_like(x, memory_format=memory_format(x)) if want else None
        for x, want in zip(saved.maps, wanted, strict=True)
    ]
    launch.run(
        _map_gradient_kernel,
        batch * first[-1],
        config,
        maps=tuple(saved.maps),
        z_ptr=saved.z,
        douts=tuple(douts),
        gammas=_affine_of(norms, "weight"),
        betas=_affine_of(norms, "bias"),
        saved_ptr=saved.statistics,
        removed_ptr=removed,
        dtokens_ptr=dtokens,
        avg_weights=launch.weights(avg_map),
        dmaps=tuple(dmaps),
        sums_ptr=sums,
        STRIDES=launch.strides(saved.maps),
        OUT_STRIDES=launch.strides(douts),
        MAP_STRIDES=launch.strides(dmaps),
        GRID=grid,
        FROM_BATCH=_from_batch(norms),
        SHARED=tuple(_shared_windows(x.shape[2], grid[0]) for x in saved.maps),
        PRECISION=launch.precision(dtype, target),
        BLOCKS=blocks,
        FIRST=first,
        MOST=max(rows),
        **shared,
    )

    block_c = 8
    gradients = saved.tokens.new_empty(2, width, dtype=avg_map[0].weight.dtype)
    launch.run(
        _avg_map_gradient_kernel,
        2 * sum(launch.blocks(x.shape[1], block_c) for x in saved.maps),
        {"num_warps": 8, "num_stages": 2},
        sums_ptr=sums,
        gradients_ptr=gradients,
        batch=batch,
        CHANNELS=saved.tokens.channels,
        ACC=shared["ACC"],
        BLOCKS=rows,
        MOST=max(rows),
        BLOCK_C=block_c,
    )
    return dmaps, gradients


def _backward_arguments(
    kernel: str, saved: Saved, norms: Sequence[BatchNorm | None]
) -> tuple[dict[str, int], dict[str, Any], Any]:
    """Configuration, common arguments and tiles of a kernel that goes over the maps again."""
    tokens, sizes = saved.tokens, launch.sizes(saved.maps)
    widest = max(w for _, w in sizes)
    layout = "channels_last" if all(x.stride(1) == 1 for x in saved.maps) else "contiguous"
    target = launch.architecture(saved.z.device)
    config = launch.configuration(f"{kernel}_{layout}", target, tokens.values.dtype, widest)
    return (
        config,
        {
            "CHANNELS": tokens.channels,
            "SIZES": sizes,
            "NORM": tuple(norm is not None for norm in norms),
            "EPS": tuple(0.0 if norm is None else norm.eps for norm in norms),
            "ACC": launch.triton_type(tokens.accumulation),
        },
        _tiles(tokens.channels, sizes, config["tile"], config["block_c"], launch.padded(widest)),
    )


def _from_batch(norms: Sequence[BatchNorm | None]) -> tuple[bool, ...]:
    return tuple(norm is not None and norm.from_batch for norm in norms)


def _affine_of(norms: Sequence[BatchNorm | None], name: str) -> tuple[Tensor | None, ...]:
    """BatchNorm's weights or biases, None where there is none."""
    return tuple(None if norm is None else getattr(norm, name) for norm in norms)


@functools.cache
def _shared_windows(size: int, windows: int) -> int:
    """How many windows of `adaptive_avg_pool1d` at most have a position in common."""
    inside = [0] * size
    for w in range(windows):
        for position in range(w * size // windows, -(-(w + 1) * size // windows)):
            inside[position] += 1
    return max(inside)


@functools.cache
def _tiles(
    channels: tuple[int, ...], sizes: tuple[tuple[int, int], ...], elements: int, most_c: int, most_w: int
) -> tuple[tuple[tuple[int, int, int], ...], tuple[int, ...]]:
    """Channels, rows and columns of each scale's tiles, and where the programs of each scale begin within an image.

    A tile has at most `elements`, `most_c` channels and `most_w` columns; products need 16 rows (pairs of row and
    channel) and columns.
    """
    tiles, first = [], [0]
    for c, (height, width) in zip(channels, sizes, strict=True):
        block_w = min(most_w, launch.padded(width))
        pairs = max(16, elements // block_w)
        block_c = min(most_c, launch.padded(c), pairs)
        tiles.append((block_c, pairs // block_c, block_w))
        extents = zip((c, height, width), tiles[-1], strict=True)
        first.append(first[-1] + math.prod(launch.blocks(extent, block) for extent, block in extents))
    return tuple(tiles), tuple(first)


@functools.cache  # a few kilobytes each, and never freed: a CUDA graph replays with their addresses
def _tables(
    sizes: tuple[tuple[int, int], ...], grid: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """For U, the interpolation along rows, then columns: column sums, diagonal and next diagonal of U^T U.

    (S, 3 (P_h + P_w)), from the weights as the kernels round them.

    Raises:
        RuntimeError: they are first needed while a CUDA graph is captured, which allows no copy from the host.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"maps: expected sizes that were run before a CUDA graph is captured, got {sizes} for the first time: run "
            "the module once with such maps, then capture"
        )
    rows = []
    for size in sizes:
        for high, low in zip(size, grid, strict=True):
            position = torch.arange(high, dtype=dtype) * ((low - 1) / (high - 1) if high > 1 else 0.0)
            left = position.long().clamp(max=low - 1)
            fraction = (position - left).double()
            u = torch.zeros(high, low, dtype=torch.float64)
            u.scatter_add_(1, left[:, None], 1.0 - fraction[:, None])
            u.scatter_add_(1, (left + 1).clamp(max=low - 1)[:, None], fraction[:, None])
            product = u.mT @ u
            rows += [u.sum(0), product.diagonal(), F.pad(product.diagonal(1), (0, 1))]
    return torch.cat(rows).view(len(sizes), -1).to(device, dtype)
