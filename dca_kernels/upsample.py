"""Stage 4 of the `triton` backend: upsample the tokens and merge them with the skip maps."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn import functional as F

from dca_kernels import launch
from dca_kernels.fused import checked, memory_format, uses_batch_statistics
from dca_kernels.primitives import (
    blocks_before,
    interpolation,
    interpolation_matrix,
    load_vector,
    offset,
    padded,
    split_program,
    total,
)
from dca_kernels.tokens import Tokens

# How much larger its two parts may be than a variance, before it is taken directly.
CANCELLATION = tl.constexpr(100.0)


@triton.jit
def _conv_kernel(
    tokens_ptr, weights, z_ptr,
    N: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: the 1x1 convolution, without its bias, of BLOCK_N tokens into BLOCK_C channels of one scale."""
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
                block * BLOCK_C + tl.arange(0, BLOCK_C), N, TOTAL, CHANNELS[i], PRECISION, ACC, BLOCK_C,
            )  # fmt: skip


@triton.jit
def _conv(
    tokens_ptr, weight_ptr, z_ptr, offs_n, offs_out,
    N: tl.constexpr, TOTAL: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """z[n, out] = sum over channels of tokens[n, in] weight[out, in]."""
    STEP: tl.constexpr = min(padded(CHANNELS), BLOCK_K)
    mask_n, mask_out = offs_n < N, offs_out < CHANNELS
    z = tl.zeros([offs_n.shape[0], offs_out.shape[0]], ACC)
    for start in range(0, CHANNELS, STEP):
        offs_in = start + tl.arange(0, STEP)
        mask_in = offs_in < CHANNELS
        tokens_ptrs = tokens_ptr + offs_n[:, None] * TOTAL + offs_in[None, :]
        tokens = tl.load(tokens_ptrs, mask=mask_n[:, None] & mask_in[None, :], other=0.0)
        weight_ptrs = weight_ptr + offs_out[:, None] * CHANNELS + offs_in[None, :]
        weight = tl.load(weight_ptrs, mask=mask_out[:, None] & mask_in[None, :], other=0.0).to(tokens.dtype)
        z = tl.dot(tokens, tl.trans(weight), z, input_precision=PRECISION, out_dtype=ACC)
    tl.store(z_ptr + offs_n[:, None] * TOTAL + offs_out[None, :], z, mask=mask_n[:, None] & mask_out[None, :])


@triton.jit
def _batch_statistics_kernel(
    maps, z_ptr, moments_ptr, adjoint_ptr, tables_ptr, counters, statistics_ptr,
    CHANNELS: tl.constexpr, SIZES: tl.constexpr, STRIDES: tl.constexpr, GRID: tl.constexpr, FROM_BATCH: tl.constexpr,
    MOMENT_BLOCKS: tl.constexpr, GUARDED: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program: mean and centred squares of up(z) + x over one image, for BLOCK_C channels: (B, 2, C).

    They follow from the map's own moments, from z, and from the transposed interpolation of the map. Where the two
    parts nearly cancel, too few digits would be left, and a pass over the map takes them directly.
    """
    TOTAL: tl.constexpr = total(CHANNELS)
    b, tile = split_program(blocks_before(CHANNELS, BLOCK_C, len(CHANNELS)))
    image = b * GRID[0] * GRID[1] * TOTAL
    for i in tl.static_range(len(CHANNELS)):
        block = tile - blocks_before(CHANNELS, BLOCK_C, i)
        if FROM_BATCH[i] and (block >= 0) & (block < triton.cdiv(CHANNELS[i], BLOCK_C)):
            offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
            mask_c = offs_c < CHANNELS[i]
            own = offset(CHANNELS, i) + offs_c
            x_mean, x_squares = _merge_moments(
                moments_ptr + b * MOMENT_BLOCKS * 2 * TOTAL, own, mask_c, SIZES[i], GRID, TOTAL, MOMENT_BLOCKS, BLOCK_N
            )
            z_mean, z_squares, products = _interpolated_moments(
                z_ptr + image, adjoint_ptr + image, tables_ptr + i * 3 * (GRID[0] + GRID[1]), own, mask_c,
                SIZES[i][0] * SIZES[i][1], GRID, TOTAL, ACC, BLOCK_N,
            )  # fmt: skip
            mean = x_mean + z_mean
            squares = x_squares + z_squares + 2 * products
            if GUARDED:
                if tl.max(tl.where(mask_c, x_squares + z_squares - squares * CANCELLATION, 0.0)) > 0:
                    mean, squares = _direct_moments(
                        maps[i] + b * STRIDES[i][0] + offs_c * STRIDES[i][1], z_ptr + image + own, mask_c,
                        SIZES[i], STRIDES[i], GRID, TOTAL, ACC, BLOCK_P,
                    )  # fmt: skip
            tl.store(statistics_ptr + b * 2 * TOTAL + own, mean, mask=mask_c)
            tl.store(statistics_ptr + (b * 2 + 1) * TOTAL + own, tl.maximum(squares, 0.0), mask=mask_c)
            if counters[i] is not None and (b == 0) & (block == 0):
                tl.store(counters[i], tl.load(counters[i]) + 1)


@triton.jit
def _merge_moments(
    moments_ptr, offs_c, mask_c, SIZE: tl.constexpr, GRID: tl.constexpr, TOTAL: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Mean and centred squares of a map from those of its blocks, in float64: each [BLOCK_C]."""
    mean = tl.zeros(offs_c.shape, tl.float64)
    for start in range(0, BLOCKS, BLOCK_N):
        block_mean, _, count = _load_moments(moments_ptr, start, offs_c, mask_c, SIZE, GRID, TOTAL, BLOCKS, BLOCK_N)
        mean += tl.sum(block_mean * count[:, None], 0)
    mean /= SIZE[0] * SIZE[1]
    squares = tl.zeros(offs_c.shape, tl.float64)
    for start in range(0, BLOCKS, BLOCK_N):
        block_mean, block_squares, count = _load_moments(
            moments_ptr, start, offs_c, mask_c, SIZE, GRID, TOTAL, BLOCKS, BLOCK_N
        )
        apart = block_mean - mean[None, :]
        squares += tl.sum(block_squares + apart * apart * count[:, None], 0)
    return mean, squares


@triton.jit
def _load_moments(
    moments_ptr, start, offs_c, mask_c, SIZE: tl.constexpr, GRID: tl.constexpr, TOTAL: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Means, centred squares [BLOCK_N, BLOCK_C] and pixels [BLOCK_N] of some blocks, in float64."""
    COLUMN_BLOCKS: tl.constexpr = BLOCKS // GRID[0]
    BLOCK_Q: tl.constexpr = triton.next_power_of_2(triton.cdiv(GRID[1], COLUMN_BLOCKS))
    offs = start + tl.arange(0, BLOCK_N)
    mask = (offs < BLOCKS)[:, None] & mask_c[None, :]
    ptrs = moments_ptr + offs[:, None] * 2 * TOTAL + offs_c[None, :]
    means = tl.load(ptrs, mask=mask, other=0.0).to(tl.float64)
    squares = tl.load(ptrs + TOTAL, mask=mask, other=0.0).to(tl.float64)
    p, q = offs // COLUMN_BLOCKS, offs % COLUMN_BLOCKS * BLOCK_Q
    rows = (p + 1) * SIZE[0] // GRID[0] - p * SIZE[0] // GRID[0]
    columns = tl.minimum(q + BLOCK_Q, GRID[1]) * SIZE[1] // GRID[1] - q * SIZE[1] // GRID[1]
    return means, squares, tl.where(offs < BLOCKS, rows * columns, 0).to(tl.float64)


@triton.jit
def _interpolated_moments(
    z_ptr, adjoint_ptr, tables_ptr, offs_c, mask_c, PIXELS: tl.constexpr, GRID: tl.constexpr, TOTAL: tl.constexpr,
    ACC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Mean and centred squares of up(z), and its products with the map, without the map's resolution: each [BLOCK_C].

    With z less its mean, sum of up(z)^2 = z^T (G_h x G_w) z, where G = U^T U has three diagonals, and sum of up(z) x =
    sum of z U^T x.
    """
    N: tl.constexpr = GRID[0] * GRID[1]
    mean = tl.zeros(offs_c.shape, tl.float64)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        p, q = offs_n // GRID[1], offs_n % GRID[1]
        weight = _table(tables_ptr, 0, p, GRID[0], 0) * _table(tables_ptr, 0, q, GRID[1], 3 * GRID[0])
        z = _load_grid(z_ptr, p, q, offs_c, mask_c, GRID, TOTAL)
        mean += tl.sum((z * weight[:, None]).to(tl.float64), 0)
    mean /= PIXELS
    squares = tl.zeros(offs_c.shape, tl.float64)
    products = tl.zeros(offs_c.shape, tl.float64)
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
        squares += tl.sum((z * here).to(tl.float64), 0)
        products += tl.sum((z * _load_grid(adjoint_ptr, p, q, offs_c, mask_c, GRID, TOTAL)).to(tl.float64), 0)
    return mean, squares, products


@triton.jit
def _table(tables_ptr, k, position, SIZE: tl.constexpr, begin):
    """Column sums (k = 0), diagonal (1) or next diagonal (2) of G for one axis; zero beyond."""
    return tl.load(tables_ptr + begin + k * SIZE + position, mask=(position >= 0) & (position < SIZE), other=0.0)


@triton.jit
def _load_grid(ptr, p, q, offs_c, mask_c, GRID: tl.constexpr, TOTAL: tl.constexpr):
    """[positions, channels] of a token grid, zero beyond it."""
    mask = (p < GRID[0]) & (q >= 0) & (q < GRID[1])
    ptrs = ptr + (p * GRID[1] + q)[:, None] * TOTAL + offs_c[None, :]
    return tl.load(ptrs, mask=mask[:, None] & mask_c[None, :], other=0.0)


@triton.jit
def _load_shifted(ptr, mean, p, q, offs_c, mask_c, GRID: tl.constexpr, TOTAL: tl.constexpr, ACC: tl.constexpr):
    """As `_load_grid`, less the mean."""
    inside = (p < GRID[0]) & (q >= 0) & (q < GRID[1])
    z = _load_grid(ptr, p, q, offs_c, mask_c, GRID, TOTAL)
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
    top_left = tl.load(z_ptrs[None, :] + (top * GRID[1] + left)[:, None] * TOTAL, mask=mask, other=0.0)
    top_right = tl.load(z_ptrs[None, :] + (top * GRID[1] + right)[:, None] * TOTAL, mask=mask, other=0.0)
    bottom_left = tl.load(z_ptrs[None, :] + (bottom * GRID[1] + left)[:, None] * TOTAL, mask=mask, other=0.0)
    bottom_right = tl.load(z_ptrs[None, :] + (bottom * GRID[1] + right)[:, None] * TOTAL, mask=mask, other=0.0)
    upper = top_left * (1.0 - fraction_w)[:, None] + top_right * fraction_w[:, None]
    lower = bottom_left * (1.0 - fraction_w)[:, None] + bottom_right * fraction_w[:, None]
    x_ptrs = x_ptrs[None, :] + (h * STRIDE[2] + w * STRIDE[3])[:, None]
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(ACC)
    return upper * (1.0 - fraction_h)[:, None] + lower * fraction_h[:, None] + x, mask


@triton.jit
def _upsample_kernel(
    maps, z_ptr, conv_biases, gammas, betas, means, variances, counters, statistics_ptr, outs, batch,
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
                statistics_ptr, outs[i], batch, b, tile - FIRST[i], CHANNELS[i], offset(CHANNELS, i), total(CHANNELS),
                SIZES[i], STRIDES[i], OUT_STRIDES[i], GRID, NORM[i], FROM_BATCH[i], EPS[i], UPDATES[i], MOMENTUM[i],
                PRECISION, ACC, BLOCKS[i][0], BLOCKS[i][1], BLOCKS[i][2],
            )  # fmt: skip


@triton.jit
def _merge(
    x_ptr, z_ptr, bias_ptr, gamma_ptr, beta_ptr, mean_ptr, variance_ptr, counter_ptr, statistics_ptr, out_ptr, batch,
    b, tile, CHANNELS: tl.constexpr, OFFSET: tl.constexpr, TOTAL: tl.constexpr, SIZE: tl.constexpr,
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
                mean_ptr, variance_ptr, counter_ptr, mean + bias, variance, offs_c, mask_c,
                batch.to(tl.int64) * SIZE[0] * SIZE[1], MOMENTUM, ACC,
            )  # fmt: skip
    elif NORM:
        mean = load_vector(mean_ptr, offs_c, mask_c, ACC) - bias
        variance = load_vector(variance_ptr, offs_c, mask_c, ACC)
    else:
        mean = -bias

    # Rows of the tile are (row, channel) pairs, the channel fastest.
    pair = tl.arange(0, BLOCK_H * BLOCK_C)
    pair_c = c_begin + pair % BLOCK_C
    pair_h = h_begin + pair // BLOCK_C
    mask_pair = (pair_c < CHANNELS) & (pair_h < SIZE[0])
    offs_w = w_begin + tl.arange(0, BLOCK_W)
    mask = mask_pair[:, None] & (offs_w < SIZE[1])[None, :]
    z_ptrs = z_ptr + b * GRID[0] * GRID[1] * TOTAL + OFFSET + pair_c
    up = _interpolate(z_ptrs, mask_pair, pair_h, w_begin, offs_w, SIZE, GRID, TOTAL, PRECISION, ACC, BLOCK_W)
    offs_x = pair_c * STRIDE[1] + pair_h * STRIDE[2]
    x_ptrs = x_ptr + b * STRIDE[0] + offs_x[:, None] + (offs_w * STRIDE[3])[None, :]
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(ACC)
    y = x - _of_pairs(mean, BLOCK_H)[:, None] + up
    if NORM:
        scale = tl.rsqrt(variance + EPS)
        if gamma_ptr is not None:
            scale *= load_vector(gamma_ptr, offs_c, mask_c, ACC)
        y *= _of_pairs(scale, BLOCK_H)[:, None]
        if beta_ptr is not None:
            y += _of_pairs(load_vector(beta_ptr, offs_c, mask_c, ACC), BLOCK_H)[:, None]
        y = tl.where(y < 0, 0.0, y)  # keeps NaN
    offs_y = pair_c * OUT_STRIDE[1] + pair_h * OUT_STRIDE[2]
    y_ptrs = out_ptr + b * OUT_STRIDE[0] + offs_y[:, None] + (offs_w * OUT_STRIDE[3])[None, :]
    tl.store(y_ptrs, y, mask=mask)


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
    PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """up(z) in a tile: rows by weighting two of them, columns by a product with their few weights."""
    if (SIZE[0] == GRID[0]) and (SIZE[1] == GRID[1]):
        offs = (pair_h * GRID[1])[:, None] + offs_w[None, :]
        mask = mask_pair[:, None] & (offs_w < SIZE[1])[None, :]
        up = tl.load(z_ptrs[:, None] + offs * TOTAL, mask=mask, other=0.0)
    else:
        K: tl.constexpr = padded(_columns_needed(BLOCK_W, SIZE[1], GRID[1]))
        first, _, _ = interpolation(w_begin, SIZE[1], GRID[1], ACC)
        offs_q = first + tl.arange(0, K)
        top, bottom, fraction = interpolation(pair_h, SIZE[0], GRID[0], ACC)
        mask = mask_pair[:, None] & (offs_q < GRID[1])[None, :]
        columns_ptrs = z_ptrs[:, None] + offs_q[None, :] * TOTAL
        above = tl.load(columns_ptrs + (top * GRID[1] * TOTAL)[:, None], mask=mask, other=0.0)
        below = tl.load(columns_ptrs + (bottom * GRID[1] * TOTAL)[:, None], mask=mask, other=0.0)
        rows = above * (1.0 - fraction)[:, None] + below * fraction[:, None]
        matrix = interpolation_matrix(offs_q, offs_w, SIZE[1], GRID[1], ACC)
        up = tl.dot(rows, matrix, input_precision=PRECISION, out_dtype=ACC)
    return up


@triton.jit
def _merge_images(statistics_ptr, offs_c, mask_c, batch, PIXELS: tl.constexpr, TOTAL: tl.constexpr, ACC: tl.constexpr):
    """Mean and biased variance over the batch, from mean and centred squares of each image."""
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
    return mean.to(ACC), (variance / batch).to(ACC)


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


def upsample(
    tokens: Tokens,
    maps: Sequence[Tensor],
    moments: tuple[Tensor, Tensor] | None,
    upconvs: Sequence[Any],
    norms: Sequence[Any],
    grid: tuple[int, int],
    dtypes: Sequence[torch.dtype],
) -> list[Tensor]:
    """1x1 convolution at the grid's size, bilinear upsampling, raw map added, BatchNorm, ReLU (paper, eq. 5).

    Args:
        tokens: the tokens.
        maps: S tensors (B, C_i, H_i, W_i), any strides.
        moments: what `patch_embed` returned for BatchNorm.
        upconvs: S modules with `conv.conv`, a dense 1x1 convolution.
        norms: S BatchNorms; where None, the map is returned as it enters BatchNorm and ReLU.
        grid: (P_h, P_w).
        dtypes: dtype of each output.

    Returns:
        S tensors (B, C_i, H_i, W_i), channels_last where the map is. BatchNorm's running buffers are updated.
    """
    batch, count, width = tokens.shape
    target, dtype = launch.architecture(tokens.values.device), tokens.values.dtype
    sizes = tuple((x.shape[2], x.shape[3]) for x in maps)
    convs = [checked(upconv.conv.conv, nn.Conv2d) for upconv in upconvs]
    from_batch = tuple(norm is not None and uses_batch_statistics(norm) for norm in norms)
    shared = {
        "CHANNELS": tokens.channels,
        "ACC": launch.triton_type(tokens.accumulation),
    }

    config = launch.configuration("conv", target, dtype, max(launch.padded(c) for c in tokens.channels))
    z = tokens.new_empty(batch, count, width)
    column_blocks = sum(launch.blocks(c, config["block_c"]) for c in tokens.channels)
    launch.run(
        _conv_kernel,
        batch * launch.blocks(count, config["block_n"]) * column_blocks,
        config,
        tokens_ptr=tokens.values,
        weights=launch.weights(convs),
        z_ptr=z,
        N=count,
        PRECISION=launch.precision(dtype, target),
        BLOCK_N=config["block_n"],
        BLOCK_C=config["block_c"],
        **shared,
    )

    counters = tuple(norm.num_batches_tracked if _updates(norm) else None for norm in norms)
    statistics = None
    if moments is not None:
        config = launch.configuration("batch_statistics", target, dtype, batch)
        statistics = tokens.new_empty(batch, 2, width)
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
            STRIDES=tuple(x.stride() for x in maps),
            GRID=grid,
            FROM_BATCH=from_batch,
            GUARDED=dtype in (torch.float32, torch.float64),  # 16-bit sums lose more than the cancellation does
            MOMENT_BLOCKS=moments[0].shape[1],
            BLOCK_N=config["block_n"],
            BLOCK_C=config["block_c"],
            BLOCK_P=config["block_p"],
            **shared,
        )

    outs = [torch.empty_like(x, dtype=d, memory_format=memory_format(x)) for x, d in zip(maps, dtypes, strict=True)]
    widest = max(w for _, w in sizes)
    layout = "channels_last" if all(x.stride(1) == 1 for x in maps) else "contiguous"
    config = launch.configuration(f"upsample_{layout}", target, dtype, widest)
    tiles, first = _tiles(tokens.channels, sizes, config["tile"], config["block_c"], config["block_w"])
    launch.run(
        _upsample_kernel,
        batch * first[-1],
        config,
        maps=tuple(maps),
        z_ptr=z,
        conv_biases=launch.biases(convs),
        gammas=tuple(None if norm is None else norm.weight for norm in norms),
        betas=tuple(None if norm is None else norm.bias for norm in norms),
        means=tuple(None if norm is None else norm.running_mean for norm in norms),
        variances=tuple(None if norm is None else norm.running_var for norm in norms),
        counters=counters,
        statistics_ptr=statistics,
        outs=tuple(outs),
        batch=batch,
        SIZES=sizes,
        STRIDES=tuple(x.stride() for x in maps),
        OUT_STRIDES=tuple(y.stride() for y in outs),
        GRID=grid,
        NORM=tuple(norm is not None for norm in norms),
        FROM_BATCH=from_batch,
        EPS=tuple(0.0 if norm is None else norm.eps for norm in norms),
        UPDATES=tuple(_updates(norm) for norm in norms),
        MOMENTUM=tuple(None if norm is None else norm.momentum for norm in norms),
        PRECISION=launch.precision(dtype, target),
        BLOCKS=tiles,
        FIRST=first,
        **shared,
    )
    return outs


def _updates(norm: Any) -> bool:
    """Whether BatchNorm updates its running buffers in this forward."""
    return norm is not None and norm.training and norm.track_running_stats and norm.running_mean is not None


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


@functools.lru_cache(maxsize=64)
def _tables(
    sizes: tuple[tuple[int, int], ...], grid: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """For U, the interpolation along rows, then columns: column sums, diagonal and next diagonal of U^T U.

    (S, 3 (P_h + P_w)), from the weights as the kernels round them.
    """
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
