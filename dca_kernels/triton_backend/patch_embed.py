"""Stage 1: average each skip map over the token grid, then scale and shift each channel."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dca_kernels.backends import power_of_two
from dca_kernels.contract import Contract, attentions_of, from_batch
from dca_kernels.triton_backend import launch
from dca_kernels.triton_backend.grid import (
    band,
    band_begin,
    band_end,
    interpolation_matrix,
    weight_in_row,
    window_begin,
    window_end,
)
from dca_kernels.triton_backend.launch import Launcher
from dca_kernels.triton_backend.layer_norm import store_statistics
from dca_kernels.triton_backend.layout import (
    Reach,
    area_of,
    layout_of,
    size_arguments,
    size_of,
    sizes_of,
    steps_of,
    strides_of,
)
from dca_kernels.triton_backend.parameters import affines_of, eps_of
from dca_kernels.triton_backend.primitives import kernel, load_vector, padded, split_program
from dca_kernels.triton_backend.tokens import Tokens

# Columns are read from a multiple of this one on: 16 bytes at a time, of 16-bit maps.
ALIGNMENT = tl.constexpr(8)
# Rows of the transposed interpolation at a time.
UNROLLED = tl.constexpr(4)


class Moments(NamedTuple):
    """What BatchNorm's statistics need of each map less its first pixel (docs/algebra.md, "Upsample").

    Attributes:
        blocks: (B, blocks, 2, C), mean and centred squares of each block of pixels.
        transposed: (B, N, C), the transposed interpolation of the map, over the pixels of a token.
    """

    blocks: Tensor
    transposed: Tensor


class Maps(NamedTuple):
    """S skip maps (B, C_i, H_i, W_i), and their moments where a BatchNorm takes the batch's statistics."""

    maps: tuple[Tensor, ...]
    moments: Moments | None


@kernel
def _patch_embed_kernel(
    maps, embedding, tokens, statistics, sums, moments, sizes,
    SHAPE: tl.constexpr, LAYOUT: tl.constexpr, EPS: tl.constexpr, FROM_BATCH: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """One program: the tokens (B, N, C) of BLOCK_Q neighbouring windows, all channels of one scale.

    Writes their `statistics` (B, S, 2, N) and `sums` (B, blocks, 2, C) where EPS is the next LayerNorms', and `Moments`
    where BatchNorm will need them.
    """
    GRID: tl.constexpr = LAYOUT.grid
    COLUMN_BLOCKS: tl.constexpr = triton.cdiv(GRID[1], BLOCK_Q)
    BLOCKS: tl.constexpr = GRID[0] * COLUMN_BLOCKS
    b, tile = split_program(len(SHAPE.channels) * BLOCKS)
    block = tile % BLOCKS
    p, q_begin = block // COLUMN_BLOCKS, block % COLUMN_BLOCKS * BLOCK_Q
    for i in tl.static_range(len(SHAPE.channels)):
        if tile // BLOCKS == i:
            MAP: tl.constexpr = LAYOUT.of[i]
            CHANNELS: tl.constexpr = SHAPE.channels[i]
            height, width = size_of(sizes, i, LAYOUT, i)
            STRIDE: tl.constexpr = MAP.stride
            WINDOWS: tl.constexpr = MAP.windows
            REACH: tl.constexpr = MAP.reach
            LARGEST: tl.constexpr = REACH.window
            BAND: tl.constexpr = REACH.band
            strides = strides_of(STRIDE, height, width)
            x = maps[i] + b * strides[0]
            window_sums, lane_means, lane_squares = _sum_windows(
                x=x, p=p, q_begin=q_begin, height=height, width=width, strides=strides, CHANNELS=CHANNELS,
                WINDOWS=WINDOWS, LARGEST=LARGEST, GRID=GRID, FROM_BATCH=FROM_BATCH[i], ACC=ACC,
                BLOCK_Q=BLOCK_Q,
            )  # fmt: skip
            offs_q = q_begin + tl.arange(0, BLOCK_Q)
            offs_c = tl.arange(0, padded(CHANNELS))
            mask_c = offs_c < CHANNELS
            rows = _extent(p, height, GRID[0], WINDOWS[0])
            columns = _extent(offs_q, width, GRID[1], WINDOWS[1])
            weight = load_vector(embedding.weight[i], offs_c, mask_c, ACC)
            bias = load_vector(embedding.bias[i], offs_c, mask_c, ACC)
            pooled = window_sums / (rows * columns).to(ACC)[None, :]
            out = tl.trans(pooled * weight[:, None] + bias[:, None])  # [BLOCK_Q, C_i]
            offs_n = tl.where(offs_q < GRID[1], p * GRID[1] + offs_q, SHAPE.tokens)
            mask = (offs_q < GRID[1])[:, None] & mask_c[None, :]
            image = b * GRID[0] * GRID[1] * SHAPE.total + SHAPE.offsets[i]
            offs_tokens = image + offs_n[:, None] * SHAPE.total + offs_c[None, :]
            out = out.to(tokens.dtype.element_ty)
            tl.store(tokens + offs_tokens, out, mask=mask)
            if EPS is not None:
                store_statistics(
                    tokens=tl.where(mask, out.to(ACC), 0.0), mask=mask, statistics=statistics, sums=sums, b=b,
                    block=block, offs_n=offs_n, i=i, BLOCKS=BLOCKS, EPS=EPS[i], SHAPE=SHAPE,
                )  # fmt: skip
            if FROM_BATCH[i]:
                mean, squares = _combine_lanes(
                    means=lane_means, squares=lane_squares, p=p, q_begin=q_begin, height=height, width=width,
                    WINDOWS=WINDOWS, LARGEST=LARGEST, GRID=GRID, ACC=ACC, BLOCK_Q=BLOCK_Q,
                )  # fmt: skip
                moments_ptrs = moments.blocks + (b * BLOCKS + block) * 2 * SHAPE.total + SHAPE.offsets[i] + offs_c
                tl.store(moments_ptrs, mean, mask=mask_c)
                tl.store(moments_ptrs + SHAPE.total, squares, mask=mask_c)
                row_step, column_step = steps_of(sizes, i, height, width, LAYOUT, i, ACC)
                transposed = _interpolate_transposed(
                    x=x, p=p, q_begin=q_begin, height=height, width=width, row_step=row_step,
                    column_step=column_step, strides=strides, CHANNELS=CHANNELS,
                    BAND=BAND, GRID=GRID, PRECISION=PRECISION, ACC=ACC, BLOCK_Q=BLOCK_Q,
                )  # fmt: skip
                transposed /= area_of(sizes, i, height * width, LAYOUT, i, ACC)  # of a map's size, whatever the stride
                tl.store(moments.transposed + offs_tokens, tl.trans(transposed), mask=mask)


@triton.jit
def _extent(window, size, WINDOWS: tl.constexpr, WINDOW: tl.constexpr):
    """How many positions a window has."""
    return window_end(window, size, WINDOWS, WINDOW) - window_begin(window, size, WINDOWS, WINDOW)


@triton.jit
def _lanes(q_begin, width, PADDED: tl.constexpr, GRID_WIDTH: tl.constexpr, WINDOW: tl.constexpr, BLOCK_Q: tl.constexpr):
    """The columns of BLOCK_Q neighbouring windows, padded to powers of two: column, window, whether it exists."""
    lane = tl.arange(0, BLOCK_Q * PADDED)
    if WINDOW == PADDED:  # one contiguous run
        column = q_begin * PADDED + lane
        return column, q_begin + lane // PADDED, column < width
    window = q_begin + lane // PADDED
    column = window_begin(window, width, GRID_WIDTH, WINDOW) + lane % PADDED
    return column, window, (column < window_end(window, width, GRID_WIDTH, WINDOW)) & (window < GRID_WIDTH)


@triton.jit
def _sum_windows(
    x, p, q_begin, height, width, strides,
    CHANNELS: tl.constexpr, WINDOWS: tl.constexpr, LARGEST: tl.constexpr, GRID: tl.constexpr,
    FROM_BATCH: tl.constexpr, ACC: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Sums over windows [C_i, BLOCK_Q]; for each lane, mean and centred squares over the block's rows [C_i, lanes].

    x is one image (C_i, H_i, W_i). Neighbouring windows may share a row (and a column): it belongs to the later window.
    Means are those of the map less its first pixel: small where it varies little.
    """
    PADDED: tl.constexpr = LARGEST[1]
    offs_c = tl.arange(0, padded(CHANNELS))
    column, _, mask_w = _lanes(q_begin, width, LARGEST[1], GRID[1], WINDOWS[1], BLOCK_Q)
    mask = (offs_c < CHANNELS)[:, None] & mask_w[None, :]
    begin, end = window_begin(p, height, GRID[0], WINDOWS[0]), window_end(p, height, GRID[0], WINDOWS[0])
    next_begin = window_begin(p + 1, height, GRID[0], WINDOWS[0])
    x_ptrs = x + begin * strides[2] + offs_c[:, None] * strides[1] + column[None, :] * strides[3]
    first = _first_pixel(x, strides, CHANNELS, ACC)
    sums = tl.zeros(mask.shape, ACC)
    means = tl.zeros(mask.shape, ACC)
    squares = tl.zeros(mask.shape, ACC)
    for r in tl.range(0, LARGEST[0], loop_unroll_factor=min(LARGEST[0], 8)):
        # where all windows are as high, each has all rows, and none of them belongs to a later window
        here = mask if WINDOWS[0] is not None else mask & (begin + r < end)
        pixels = tl.load(x_ptrs + r * strides[2], mask=here, other=0.0).to(ACC)
        sums += pixels
        if FROM_BATCH:
            pixels -= first[:, None]
            delta = pixels - means
            if WINDOWS[0] is None:
                delta = tl.where(begin + r < next_begin, delta, 0.0)
            means += delta / (r + 1)
            squares += delta * (pixels - means)
    return tl.sum(tl.reshape(sums, [padded(CHANNELS), BLOCK_Q, PADDED]), 2), means, squares


@triton.jit
def _first_pixel(x, strides, CHANNELS: tl.constexpr, ACC: tl.constexpr):
    """What is taken off a map before it is summed: its own first pixel [C_i], since any constant does."""
    offs_c = tl.arange(0, padded(CHANNELS))
    return tl.load(x + offs_c * strides[1], mask=offs_c < CHANNELS, other=0.0).to(ACC)


@triton.jit
def _combine_lanes(
    means, squares, p, q_begin, height, width,
    WINDOWS: tl.constexpr, LARGEST: tl.constexpr, GRID: tl.constexpr, ACC: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Mean and sum of centred squares of the pixels that belong to the block [C_i], from those of its lanes."""
    column, window, mask_w = _lanes(q_begin, width, LARGEST[1], GRID[1], WINDOWS[1], BLOCK_Q)
    belongs = mask_w & (column < window_begin(window + 1, width, GRID[1], WINDOWS[1]))
    lanes = tl.maximum(tl.sum(belongs.to(tl.int32)), 1).to(ACC)
    rows = window_begin(p + 1, height, GRID[0], WINDOWS[0]) - window_begin(p, height, GRID[0], WINDOWS[0])
    mean = tl.sum(tl.where(belongs[None, :], means, 0.0), 1) / lanes
    mean += tl.sum(tl.where(belongs[None, :], means - mean[:, None], 0.0), 1) / lanes
    apart = means - mean[:, None]
    return mean, tl.sum(tl.where(belongs[None, :], squares + rows.to(ACC) * apart * apart, 0.0), 1)


@triton.jit
def _interpolate_transposed(
    x, p, q_begin, height, width, row_step, column_step, strides,
    CHANNELS: tl.constexpr, BAND: tl.constexpr, GRID: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """The transposed interpolation of the map less its first pixel: [C_i, BLOCK_Q]."""
    offs_c = tl.arange(0, padded(CHANNELS))
    offs_q = q_begin + tl.arange(0, BLOCK_Q)
    offs_w = band_begin(q_begin, width, GRID[1]) // ALIGNMENT * ALIGNMENT + tl.arange(0, BAND[1])
    mask = (offs_c < CHANNELS)[:, None] & (offs_w < width)[None, :]
    first = _first_pixel(x, strides, CHANNELS, ACC)
    x_ptrs = x + offs_c[:, None] * strides[1] + offs_w[None, :] * strides[3]
    begin, end = band_begin(p, height, GRID[0]), band_end(p, height, GRID[0])
    strip = tl.zeros(mask.shape, ACC)
    for r in tl.range(0, BAND[0], loop_unroll_factor=UNROLLED):
        h = begin + r
        weight = tl.where(h < end, weight_in_row(p, h, row_step, GRID[0], ACC), 0.0)
        pixels = tl.load(x_ptrs + h * strides[2], mask=mask & (h < end), other=0.0).to(ACC)
        strip += weight * (pixels - first[:, None])
    strip = tl.where(mask, strip, 0.0)
    columns = tl.trans(interpolation_matrix(offs_q, offs_w, column_step, ACC))
    return tl.dot(strip, columns, input_precision=PRECISION, out_dtype=ACC)  # [C_i, columns] [columns, BLOCK_Q]


def patch_embed(maps: Sequence[Tensor], contract: Contract) -> tuple[Tokens, Maps]:
    """Average each skip map over the token grid, then scale and shift each channel (paper, eq. 1).

    Args:
        maps: S tensors (B, C_i, H_i, W_i), any strides.
        contract: of the call.

    Returns:
        The tokens (B, N, C) in the contract's dtype, with their statistics for the first attention; and the maps as
        `upsample` takes them.
    """
    tokens, grid, scales = Tokens.beside(maps, contract), contract.grid, len(maps)
    launcher, batch, shape = tokens.launcher, tokens.batch, tokens.shape
    sizes = sizes_of(maps)
    config = _config(launcher, sizes, grid, any(from_batch(contract)))
    block_q = min(config["block_q"], power_of_two(grid[1]))
    blocks = grid[0] * launch.blocks(grid[1], block_q)
    following = next(attentions_of(contract), None)
    if following is not None:
        statistics, sums = tokens.empty(batch, scales, 2, shape.tokens), tokens.empty(batch, blocks, 2, shape.total)
        tokens = tokens._replace(statistics=statistics, sums=sums)
    moments = None
    if any(from_batch(contract)):
        moments = Moments(tokens.empty(batch, blocks, 2, shape.total), torch.empty_like(tokens.plain))
    launcher(
        _patch_embed_kernel, config, batch * scales * blocks,
        maps=tuple(maps), embedding=affines_of(contract.patch_embed), tokens=tokens.plain,
        statistics=tokens.statistics, sums=tokens.sums, moments=moments, sizes=size_arguments(sizes, grid),
        LAYOUT=layout_of(maps, grid, reaches=[_reach(size, grid, block_q) for size in sizes]),
        EPS=None if following is None else eps_of(following), FROM_BATCH=from_batch(contract), BLOCK_Q=block_q,
    )  # fmt: skip
    return tokens, Maps(tuple(maps), moments)


def _config(
    launcher: Launcher, sizes: Sequence[tuple[int, int]], grid: tuple[int, int], statistics: bool
) -> dict[str, int]:
    """The kernel's blocks; where BatchNorm needs `statistics` it holds more."""
    widest = 0
    for c, size in zip(launcher.shape.channels, sizes, strict=True):
        widest = max(widest, launch.padded(c) * power_of_two(_widest_window(size, grid)[1]))
    return launcher.config("patch_embed_train" if statistics else "patch_embed", widest)


@functools.cache
def _reach(size: tuple[int, int], grid: tuple[int, int], block_q: int) -> Reach:
    """Of one scale; `block_q` is how many columns of tokens a program has."""
    rows, columns = _widest_window(size, grid)
    band_rows = launch.blocks(band(size[0], grid[0], 1), UNROLLED.value) * UNROLLED.value
    band_columns = launch.padded(band(size[1], grid[1], block_q) + ALIGNMENT.value - 1)
    return Reach((rows, power_of_two(columns)), (band_rows, band_columns))


@functools.cache
def _widest_window(size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the largest window of `adaptive_avg_pool2d`."""
    rows, columns = (
        max(-(-(w + 1) * pixels // windows) - w * pixels // windows for w in range(windows))
        for pixels, windows in zip(size, grid, strict=True)
    )
    return rows, columns
