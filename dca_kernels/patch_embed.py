"""Stage 1 of the `triton` backend: average each skip map over the token grid, then scale and shift each channel."""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dca_kernels import launch
from dca_kernels.parameters import Affine, LayerNorm, power_of_two
from dca_kernels.primitives import (
    band,
    band_begin,
    interpolation,
    interpolation_matrix,
    kernel,
    load_vector,
    of_scale,
    offset,
    padded,
    split_program,
    store_statistics,
    total,
    window_begin,
    window_end,
)
from dca_kernels.tokens import Tokens

# Columns are read from a multiple of this one on: 16 bytes at a time, of 16-bit maps.
ALIGNMENT = tl.constexpr(8)


@kernel
def _patch_embed_kernel(
    maps, weights, biases, tokens_ptr, statistics_ptr, sums_ptr, moments_ptr, adjoint_ptr,
    CHANNELS: tl.constexpr, SIZES: tl.constexpr, STRIDES: tl.constexpr, WINDOWS: tl.constexpr, GRID: tl.constexpr,
    EPS: tl.constexpr, FROM_BATCH: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """One program: the tokens of BLOCK_Q neighbouring windows, all channels of one scale."""
    COLUMN_BLOCKS: tl.constexpr = triton.cdiv(GRID[1], BLOCK_Q)
    BLOCKS: tl.constexpr = GRID[0] * COLUMN_BLOCKS
    b, tile = split_program(len(CHANNELS) * BLOCKS)
    block = tile % BLOCKS
    p, q_begin = block // COLUMN_BLOCKS, block % COLUMN_BLOCKS * BLOCK_Q
    for i in tl.static_range(len(CHANNELS)):
        if tile // BLOCKS == i:
            x_ptr = maps[i] + b * STRIDES[i][0]
            sums, lane_means, lane_squares = _sum_windows(
                x_ptr, p, q_begin, CHANNELS[i], of_scale(SIZES, i), of_scale(STRIDES, i), of_scale(WINDOWS, i), GRID,
                FROM_BATCH[i], ACC, BLOCK_Q,
            )  # fmt: skip
            offs_q = q_begin + tl.arange(0, BLOCK_Q)
            offs_c = tl.arange(0, padded(CHANNELS[i]))
            mask_c = offs_c < CHANNELS[i]
            rows = window_end(p, SIZES[i][0], GRID[0]) - window_begin(p, SIZES[i][0], GRID[0])
            columns = window_end(offs_q, SIZES[i][1], GRID[1]) - window_begin(offs_q, SIZES[i][1], GRID[1])
            weight = load_vector(weights[i], offs_c, mask_c, ACC)
            bias = load_vector(biases[i], offs_c, mask_c, ACC)
            pooled = sums / (rows * columns).to(ACC)[None, :]
            tokens = tl.trans(pooled * weight[:, None] + bias[:, None])  # [BLOCK_Q, C_i]
            offs_n = tl.where(offs_q < GRID[1], p * GRID[1] + offs_q, GRID[0] * GRID[1])
            mask = (offs_q < GRID[1])[:, None] & mask_c[None, :]
            own = b * GRID[0] * GRID[1] * total(CHANNELS) + offset(CHANNELS, i)
            offs_tokens = own + offs_n[:, None] * total(CHANNELS) + offs_c[None, :]
            tokens = tokens.to(tokens_ptr.dtype.element_ty)
            tl.store(tokens_ptr + offs_tokens, tokens, mask=mask)
            if EPS is not None:
                store_statistics(
                    tl.where(mask, tokens.to(ACC), 0.0), mask, b, i, block, offs_n, statistics_ptr, sums_ptr,
                    GRID[0] * GRID[1], CHANNELS, BLOCKS, EPS[i],
                )  # fmt: skip
            if FROM_BATCH[i]:
                mean, squares = _merge_lanes(
                    lane_means, lane_squares, p, q_begin, of_scale(SIZES, i), of_scale(WINDOWS, i), GRID, ACC, BLOCK_Q
                )
                moments_ptrs = moments_ptr + (b * BLOCKS + block) * 2 * total(CHANNELS) + offset(CHANNELS, i) + offs_c
                tl.store(moments_ptrs, mean, mask=mask_c)
                tl.store(moments_ptrs + total(CHANNELS), squares, mask=mask_c)
                adjoint = _adjoint(
                    x_ptr, p, q_begin, CHANNELS[i], of_scale(SIZES, i), of_scale(STRIDES, i), GRID, PRECISION, ACC,
                    BLOCK_Q,
                )  # fmt: skip
                adjoint /= SIZES[i][0] * SIZES[i][1] / (GRID[0] * GRID[1])  # of a map's size, whatever the stride
                tl.store(adjoint_ptr + offs_tokens, tl.trans(adjoint), mask=mask)


@triton.jit
def _lanes(q_begin, WIDTH: tl.constexpr, WINDOW: tl.constexpr, GRID_WIDTH: tl.constexpr, BLOCK_Q: tl.constexpr):
    """The columns of BLOCK_Q neighbouring windows, padded to powers of two: column, window, whether it exists."""
    PADDED: tl.constexpr = triton.next_power_of_2(WINDOW)
    lane = tl.arange(0, BLOCK_Q * PADDED)
    if GRID_WIDTH * PADDED == WIDTH:  # one contiguous run
        column = q_begin * PADDED + lane
        return column, q_begin + lane // PADDED, column < WIDTH
    window = q_begin + lane // PADDED
    column = window_begin(window, WIDTH, GRID_WIDTH) + lane % PADDED
    return column, window, (column < window_end(window, WIDTH, GRID_WIDTH)) & (window < GRID_WIDTH)


@triton.jit
def _sum_windows(
    x_ptr, p, q_begin, CHANNELS: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr,
    GRID: tl.constexpr, FROM_BATCH: tl.constexpr, ACC: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Sums over windows [C_i, BLOCK_Q]; for each lane, mean and centred squares over the rows that are the block's own.

    Neighbouring windows may share a row (and a column): it is the own one of the later window. Means are those of the
    map less its first pixel: small where it varies little.
    """
    PADDED: tl.constexpr = triton.next_power_of_2(WINDOW[1])
    offs_c = tl.arange(0, padded(CHANNELS))
    column, _, mask_w = _lanes(q_begin, SIZE[1], WINDOW[1], GRID[1], BLOCK_Q)
    mask = (offs_c < CHANNELS)[:, None] & mask_w[None, :]
    begin, end = window_begin(p, SIZE[0], GRID[0]), window_end(p, SIZE[0], GRID[0])
    own_end = window_begin(p + 1, SIZE[0], GRID[0])
    x_ptrs = x_ptr + begin * STRIDE[2] + offs_c[:, None] * STRIDE[1] + column[None, :] * STRIDE[3]
    first = _first_pixel(x_ptr, CHANNELS, STRIDE, ACC)
    sums = tl.zeros(mask.shape, ACC)
    means = tl.zeros(mask.shape, ACC)
    squares = tl.zeros(mask.shape, ACC)
    for r in tl.range(0, WINDOW[0], loop_unroll_factor=min(WINDOW[0], 8)):
        x = tl.load(x_ptrs + r * STRIDE[2], mask=mask & (begin + r < end), other=0.0).to(ACC)
        sums += x
        if FROM_BATCH:
            x -= first[:, None]
            delta = x - means
            if SIZE[0] % GRID[0] != 0:  # else every row is the block's own
                delta = tl.where(begin + r < own_end, delta, 0.0)
            means += delta / (r + 1)
            squares += delta * (x - means)
    return tl.sum(tl.reshape(sums, [padded(CHANNELS), BLOCK_Q, PADDED]), 2), means, squares


@triton.jit
def _first_pixel(x_ptr, CHANNELS: tl.constexpr, STRIDE: tl.constexpr, ACC: tl.constexpr):
    """What is taken off a map before it is summed: its own first pixel, since any constant does."""
    offs_c = tl.arange(0, padded(CHANNELS))
    return tl.load(x_ptr + offs_c * STRIDE[1], mask=offs_c < CHANNELS, other=0.0).to(ACC)


@triton.jit
def _merge_lanes(
    means, squares, p, q_begin, SIZE: tl.constexpr, WINDOW: tl.constexpr, GRID: tl.constexpr, ACC: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Mean and sum of centred squares of the block's own pixels, from those of its lanes: [C_i]."""
    column, window, mask_w = _lanes(q_begin, SIZE[1], WINDOW[1], GRID[1], BLOCK_Q)
    own = mask_w & (column < window_begin(window + 1, SIZE[1], GRID[1]))
    lanes = tl.maximum(tl.sum(own.to(tl.int32)), 1).to(ACC)
    rows = (window_begin(p + 1, SIZE[0], GRID[0]) - window_begin(p, SIZE[0], GRID[0])).to(ACC)
    mean = tl.sum(tl.where(own[None, :], means, 0.0), 1) / lanes
    mean += tl.sum(tl.where(own[None, :], means - mean[:, None], 0.0), 1) / lanes
    apart = means - mean[:, None]
    return mean, tl.sum(tl.where(own[None, :], squares + rows * apart * apart, 0.0), 1)


@triton.jit
def _adjoint(
    x_ptr, p, q_begin, CHANNELS: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, GRID: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """The transposed interpolation of the map less its first pixel: [C_i, BLOCK_Q]."""
    ROWS: tl.constexpr = band(SIZE[0], GRID[0], 1)
    COLUMNS: tl.constexpr = padded(band(SIZE[1], GRID[1], BLOCK_Q) + ALIGNMENT - 1)
    offs_c = tl.arange(0, padded(CHANNELS))
    offs_q = q_begin + tl.arange(0, BLOCK_Q)
    offs_w = band_begin(q_begin, SIZE[1], GRID[1]) // ALIGNMENT * ALIGNMENT + tl.arange(0, COLUMNS)
    mask = (offs_c < CHANNELS)[:, None] & (offs_w < SIZE[1])[None, :]
    first = _first_pixel(x_ptr, CHANNELS, STRIDE, ACC)
    x_ptrs = x_ptr + offs_c[:, None] * STRIDE[1] + offs_w[None, :] * STRIDE[3]
    begin = band_begin(p, SIZE[0], GRID[0])
    strip = tl.zeros(mask.shape, ACC)
    for r in tl.range(0, ROWS, loop_unroll_factor=min(ROWS, 4)):
        h = begin + r
        left, right, fraction = interpolation(h, SIZE[0], GRID[0], ACC)
        weight = tl.where(left == p, 1.0 - fraction, 0.0) + tl.where(right == p, fraction, 0.0)
        weight = tl.where(h < SIZE[0], weight, 0.0)
        x = tl.load(x_ptrs + h * STRIDE[2], mask=mask & (h < SIZE[0]), other=0.0).to(ACC)
        strip += weight * (x - first[:, None])
    strip = tl.where(mask, strip, 0.0)
    columns = tl.trans(interpolation_matrix(offs_q, offs_w, SIZE[1], GRID[1], ACC))  # [COLUMNS, BLOCK_Q]
    return tl.dot(strip, columns, input_precision=PRECISION, out_dtype=ACC)


def patch_embed(
    maps: Sequence[Tensor],
    avg_map: Sequence[Affine],
    grid: tuple[int, int],
    dtype: torch.dtype,
    following: Sequence[LayerNorm] | None,
    from_batch: Sequence[bool],
) -> tuple[Tokens, tuple[Tensor, Tensor] | None]:
    """Average each skip map over the token grid, then scale and shift each channel (paper, eq. 1).

    Args:
        maps: S tensors (B, C_i, H_i, W_i), any strides.
        avg_map: of each scale's depthwise projection.
        grid: (P_h, P_w).
        dtype: of the tokens.
        following: the S LayerNorms of the attention that comes next, None where none does.
        from_batch: for each scale, whether BatchNorm will need statistics of the batch.

    Returns:
        The tokens with their statistics for `following`; and for BatchNorm, where any scale needs them, of each map
        less its first pixel: mean and centred squares of each block of pixels, (B, blocks, 2, C), and the transposed
        interpolation over the pixels of a token, (B, N, C) in `dtype` (docs/algebra.md, "Upsample and merge").
    """
    batch, channels = maps[0].shape[0], tuple(x.shape[1] for x in maps)
    sizes = launch.sizes(maps)
    windows = tuple((_widest(h, grid[0]), _widest(w, grid[1])) for h, w in sizes)
    target = launch.architecture(maps[0].device)
    widest = max(launch.padded(c) * power_of_two(w) for c, (_, w) in zip(channels, windows, strict=True))
    kernel = "patch_embed_train" if any(from_batch) else "patch_embed"
    config = launch.configuration(kernel, target, dtype, widest)
    block_q = min(config["block_q"], power_of_two(grid[1]))
    blocks = grid[0] * launch.blocks(grid[1], block_q)
    values = torch.empty(batch, grid[0] * grid[1], sum(channels), dtype=dtype, device=maps[0].device)
    tokens = Tokens(values, channels)
    if following is not None:
        tokens.statistics = tokens.new_empty(batch, len(channels), 2, values.shape[1])
        tokens.sums = tokens.new_empty(batch, blocks, 2, values.shape[2])
    moments = adjoint = None
    if any(from_batch):
        moments = tokens.new_empty(batch, blocks, 2, values.shape[2])
        adjoint = torch.empty_like(values)
    launch.run(
        _patch_embed_kernel,
        batch * len(channels) * blocks,
        config,
        maps=tuple(maps),
        weights=launch.weights(avg_map),
        biases=launch.biases(avg_map),
        tokens_ptr=values,
        statistics_ptr=tokens.statistics,
        sums_ptr=tokens.sums,
        moments_ptr=moments,
        adjoint_ptr=adjoint,
        CHANNELS=channels,
        SIZES=sizes,
        STRIDES=launch.strides(maps),
        WINDOWS=windows,
        GRID=grid,
        EPS=None if following is None else launch.epsilons(following),
        FROM_BATCH=tuple(from_batch),
        PRECISION=launch.precision(dtype, target),
        ACC=launch.triton_type(tokens.accumulation),
        BLOCK_Q=block_q,
    )
    return tokens, None if moments is None or adjoint is None else (moments, adjoint)


@functools.cache
def _widest(size: int, windows: int) -> int:
    """The largest window of `adaptive_avg_pool1d`."""
    return max(-(-(w + 1) * size // windows) - w * size // windows for w in range(windows))
