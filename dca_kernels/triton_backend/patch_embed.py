"""Stage 1: average each skip map over the token grid, then scale and shift each channel."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from dca_kernels.backends import power_of_two
from dca_kernels.contract import Contract, attentions_of, from_batch
from dca_kernels.triton_backend import launch
from dca_kernels.triton_backend.grid import (
    ROW_PARTS,
    band,
    band_begin,
    band_end,
    interpolation_matrix,
    load_origin,
    median,
    of_pairs,
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
    taken_by_rows,
)
from dca_kernels.triton_backend.parameters import affines_of, eps_of
from dca_kernels.triton_backend.patch_embed_rows import patch_embed_rows, tokens_at_once
from dca_kernels.triton_backend.primitives import kernel, load_vector, padded, split_program
from dca_kernels.triton_backend.tokens import Tokens

# Columns are read from a multiple of this one on: 16 bytes at a time, of 16-bit maps.
ALIGNMENT = tl.constexpr(8)
# Rows of the transposed interpolation at a time, where each is weighted by itself.
UNROLLED = tl.constexpr(4)
# Pairs of row and channel at a time, where they are rows of a product.
PAIRS = tl.constexpr(128)


class LessOrigin(NamedTuple):
    """What BatchNorm's statistics and their gradient need of each map less its origin.

    Attributes:
        origins: (B, C), see `grid.load_origin`.
        transposed: (B, parts, N, C), the transposed interpolation of the rest, over the pixels of a token: see
            `grid.load_transposed`.
    """

    origins: Tensor
    transposed: Tensor

    @classmethod
    def empty(cls, tokens: Tokens, by_rows: bool) -> "LessOrigin":
        """Fresh memory for those of the maps that these tokens are of."""
        batch, count, channels = tokens.plain.shape
        parts = ROW_PARTS.value if by_rows else 1
        return cls(tokens.empty(batch, channels), tokens.plain.new_empty((batch, parts, count, channels)))


class Moments(NamedTuple):
    """What BatchNorm's statistics need of each map (docs/algebra.md, "Upsample").

    Attributes:
        blocks: (B, blocks, 2, C), mean and centred squares of each block of pixels less their origin.
    """

    blocks: Tensor
    less_origin: LessOrigin


class Maps(NamedTuple):
    """S skip maps (B, C_i, H_i, W_i), and their moments where a BatchNorm takes the batch's statistics.

    Attributes:
        block: how many windows, one above the other and side by side, a block of the moments has.
    """

    maps: tuple[Tensor, ...]
    moments: Moments | None
    block: tuple[int, int]


@kernel
def _patch_embed_kernel(
    maps, embedding, tokens, statistics, sums, moments, sizes,
    SHAPE: tl.constexpr, LAYOUT: tl.constexpr, EPS: tl.constexpr, FROM_BATCH: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the tokens (B, N, C) of one block, all channels of one scale.

    A block is BLOCK[0] x BLOCK[1] neighbouring windows. Writes their `statistics` (B, S, 2, N) and `sums`
    (B, blocks, 2, C) where EPS is the next LayerNorms', and `Moments` where BatchNorm will need them.
    """
    GRID: tl.constexpr = LAYOUT.grid
    COLUMN_BLOCKS: tl.constexpr = triton.cdiv(GRID[1], BLOCK[1])
    BLOCKS: tl.constexpr = triton.cdiv(GRID[0], BLOCK[0]) * COLUMN_BLOCKS
    b, tile = split_program(len(SHAPE.channels) * BLOCKS)
    block = tile % BLOCKS
    p_begin, q_begin = block // COLUMN_BLOCKS * BLOCK[0], block % COLUMN_BLOCKS * BLOCK[1]
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
            offs_c = tl.arange(0, padded(CHANNELS))
            mask_c = offs_c < CHANNELS
            origin = None
            if FROM_BATCH[i]:
                origin = load_origin(x + offs_c * strides[1], mask_c, height, width, strides[2], strides[3], ACC)
            window_sums, lane_means, lane_squares = _sum_windows(
                x=x, origin=origin, p_begin=p_begin, q_begin=q_begin, height=height, width=width, strides=strides,
                CHANNELS=CHANNELS, WINDOWS=WINDOWS, LARGEST=LARGEST, GRID=GRID, ACC=ACC, BLOCK=BLOCK,
            )  # fmt: skip
            window = tl.arange(0, BLOCK[0] * BLOCK[1])
            offs_p, offs_q = p_begin + window // BLOCK[1], q_begin + window % BLOCK[1]
            rows = _extent(offs_p, height, GRID[0], WINDOWS[0])
            columns = _extent(offs_q, width, GRID[1], WINDOWS[1])
            weight = load_vector(embedding.weight[i], offs_c, mask_c, ACC)
            bias = load_vector(embedding.bias[i], offs_c, mask_c, ACC)
            pooled = window_sums / (rows * columns).to(ACC)[None, :]
            out = tl.trans(pooled * weight[:, None] + bias[:, None])  # [windows, C_i]
            inside = (offs_p < GRID[0]) & (offs_q < GRID[1])
            offs_n = tl.where(inside, offs_p * GRID[1] + offs_q, SHAPE.tokens)
            mask = inside[:, None] & mask_c[None, :]
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
                    means=lane_means, squares=lane_squares, p_begin=p_begin, q_begin=q_begin, height=height,
                    width=width, WINDOWS=WINDOWS, LARGEST=LARGEST, GRID=GRID, ACC=ACC, BLOCK=BLOCK,
                )  # fmt: skip
                moments_ptrs = moments.blocks + (b * BLOCKS + block) * 2 * SHAPE.total + SHAPE.offsets[i] + offs_c
                tl.store(moments_ptrs, mean, mask=mask_c)
                tl.store(moments_ptrs + SHAPE.total, squares, mask=mask_c)
                origin_ptrs = moments.less_origin.origins + b * SHAPE.total + SHAPE.offsets[i] + offs_c
                tl.store(origin_ptrs, origin, mask=mask_c & (block == 0))
                if BAND is None:  # a lane is a pixel
                    tl.store(moments.less_origin.transposed + offs_tokens, tl.trans(lane_means), mask=mask)
                else:
                    row_step, column_step = steps_of(sizes, i, height, width, LAYOUT, i, ACC)
                    _interpolate_transposed(
                        x=x, origin=origin, out=moments.less_origin.transposed + image, p_begin=p_begin,
                        q_begin=q_begin, height=height, width=width, row_step=row_step, column_step=column_step,
                        strides=strides,
                        area=area_of(sizes, i, height * width, LAYOUT, i, ACC),  # of a map's size, whatever the stride
                        CHANNELS=CHANNELS, BAND=BAND, GRID=GRID, TOTAL=SHAPE.total, PRECISION=PRECISION, ACC=ACC,
                        BLOCK=BLOCK,
                    )  # fmt: skip


@triton.jit
def _interpolate_transposed(
    x, origin, out, p_begin, q_begin, height, width, row_step, column_step, strides, area,
    CHANNELS: tl.constexpr, BAND: tl.constexpr, GRID: tl.constexpr, TOTAL: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The transposed interpolation of the map less its origin, over the pixels of a token: out (N, C).

    Of maps in 16 bit columns come first, by products with the pixels as they are, each row of the map for all rows of
    the block; what is weighted after are few numbers. Larger dtypes would be split for such a product: there, rows come
    first.
    """
    HALF: tl.constexpr = x.dtype.element_ty.primitive_bitwidth == 16 and out.dtype.element_ty.primitive_bitwidth == 16
    offs_c = tl.arange(0, padded(CHANNELS))
    offs_q = q_begin + tl.arange(0, BLOCK[1])
    out_ptrs = out + offs_q[:, None] * TOTAL + offs_c[None, :]
    mask = (offs_q < GRID[1])[:, None] & (offs_c < CHANNELS)[None, :]
    if HALF:
        strips = _products_weighted(
            x=x, origin=origin, p_begin=p_begin, q_begin=q_begin, height=height, width=width, row_step=row_step,
            column_step=column_step, strides=strides, CHANNELS=CHANNELS, BAND=BAND, GRID=GRID, ACC=ACC, BLOCK=BLOCK,
        )  # fmt: skip
        for k in tl.static_range(len(strips)):
            p = p_begin + k
            parts = tl.sum(tl.reshape(strips[k], [_rows_at_once(CHANNELS), padded(CHANNELS), 2 * BLOCK[1]]), 0)
            transposed = tl.sum(tl.reshape(parts, [padded(CHANNELS), 2, BLOCK[1]]), 1) * (1.0 / area)
            tl.store(out_ptrs + p * GRID[1] * TOTAL, tl.trans(transposed), mask=mask & (p < GRID[0]))
    else:
        for k in tl.range(BLOCK[0]):
            p = p_begin + k
            transposed = _product_of_weighted(
                x=x, origin=origin, p=p, q_begin=q_begin, height=height, width=width, row_step=row_step,
                column_step=column_step, strides=strides, CHANNELS=CHANNELS, BAND=BAND, GRID=GRID, PRECISION=PRECISION,
                ACC=ACC, BLOCK=BLOCK,
            )  # fmt: skip
            transposed /= area
            tl.store(out_ptrs + p * GRID[1] * TOTAL, tl.trans(transposed), mask=mask & (p < GRID[0]))


@triton.constexpr_function
def _rows_at_once(channels):
    return max(PAIRS.value // padded(channels), 1)


@triton.jit
def _products_weighted(
    x, origin, p_begin, q_begin, height, width, row_step, column_step, strides,
    CHANNELS: tl.constexpr, BAND: tl.constexpr, GRID: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For each of the block's rows of tokens, [pairs, 2 BLOCK[1]]: to be summed over the pairs' rows and both parts."""
    ROWS: tl.constexpr = _rows_at_once(CHANNELS)
    pair = tl.arange(0, ROWS * padded(CHANNELS))
    offs_c, offs_r = pair % padded(CHANNELS), pair // padded(CHANNELS)
    offs_w, mask_w = _band_columns(q_begin, width, BAND, GRID[1], BLOCK[1])
    mask_c = offs_c < CHANNELS
    mask = mask_c[:, None] & mask_w[None, :]
    x_ptrs = x + offs_c[:, None] * strides[1] + offs_w[None, :] * strides[3]
    columns = _weights_in_two_parts(offs_w, mask_w, q_begin, column_step, x.dtype.element_ty, ACC, BLOCK[1])
    origin = of_pairs(origin.to(x.dtype.element_ty), ROWS)
    # by the same product, such that nothing is left of a map that is its origin everywhere
    of_origin = tl.dot(tl.broadcast_to(origin[:, None], mask.shape), columns, out_dtype=ACC)
    strips = ()
    COUNT: tl.constexpr = BLOCK[0]
    for _ in tl.static_range(COUNT):
        strips += (tl.zeros(of_origin.shape, ACC),)  # type: ignore[assignment]
    begin, end = band_begin(p_begin, height, GRID[0]), band_end(p_begin + BLOCK[0] - 1, height, GRID[0])
    for h_begin in tl.range(begin, end, ROWS):
        h = h_begin + offs_r
        pixels = tl.load(x_ptrs + (h * strides[2])[:, None], mask=mask & (h < end)[:, None], other=0.0)
        product = tl.dot(pixels, columns, out_dtype=ACC) - of_origin
        weighted = ()
        for k in tl.static_range(COUNT):
            weight = tl.where(h < end, weight_in_row(p_begin + k, h, row_step, GRID[0], ACC), 0.0)
            weighted += (strips[k] + weight[:, None] * product,)  # type: ignore[assignment]
        strips = weighted
    return strips


@triton.jit
def _band_columns(q_begin, width, BAND: tl.constexpr, GRID_WIDTH: tl.constexpr, BLOCK_Q: tl.constexpr):
    """The columns that BLOCK_Q neighbouring columns of tokens take from, and which of them they do."""
    offs_w = band_begin(q_begin, width, GRID_WIDTH) // ALIGNMENT * ALIGNMENT + tl.arange(0, BAND[1])
    end = tl.cdiv(band_end(q_begin + BLOCK_Q - 1, width, GRID_WIDTH), ALIGNMENT) * ALIGNMENT
    return offs_w, offs_w < tl.minimum(end, width)


@triton.jit
def _weights_in_two_parts(
    offs_w, mask_w, q_begin, step, OPERAND: tl.constexpr, ACC: tl.constexpr, BLOCK_Q: tl.constexpr
):  # fmt: skip
    """The interpolation's weights as they are rounded, and beside them what that takes off: [columns, 2 BLOCK_Q]."""
    column = tl.arange(0, 2 * BLOCK_Q)
    weights = tl.trans(interpolation_matrix(q_begin + column % BLOCK_Q, offs_w, step, ACC))
    weights = tl.where(mask_w[:, None], weights, 0.0)
    rounded = weights.to(OPERAND)
    return tl.where((column < BLOCK_Q)[None, :], rounded, (weights - rounded.to(ACC)).to(OPERAND))


@triton.jit
def _product_of_weighted(
    x, origin, p, q_begin, height, width, row_step, column_step, strides,
    CHANNELS: tl.constexpr, BAND: tl.constexpr, GRID: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """For row p of tokens: [C_i, BLOCK[1]]."""
    offs_c = tl.arange(0, padded(CHANNELS))
    offs_q = q_begin + tl.arange(0, BLOCK[1])
    offs_w, mask_w = _band_columns(q_begin, width, BAND, GRID[1], BLOCK[1])
    mask = (offs_c < CHANNELS)[:, None] & mask_w[None, :]
    x_ptrs = x + offs_c[:, None] * strides[1] + offs_w[None, :] * strides[3]
    begin, end = band_begin(p, height, GRID[0]), band_end(p, height, GRID[0])
    strip = tl.zeros(mask.shape, ACC)
    for r in tl.range(0, BAND[0], loop_unroll_factor=UNROLLED):
        h = begin + r
        weight = tl.where(h < end, weight_in_row(p, h, row_step, GRID[0], ACC), 0.0)
        pixels = tl.load(x_ptrs + h * strides[2], mask=mask & (h < end), other=0.0).to(ACC)
        strip += weight * (pixels - origin[:, None])
    strip = tl.where(mask, strip, 0.0)
    columns = tl.trans(interpolation_matrix(offs_q, offs_w, column_step, ACC))
    return tl.dot(strip, columns, input_precision=PRECISION, out_dtype=ACC)  # [C_i, columns] [columns, BLOCK[1]]


@triton.jit
def _extent(window, size, WINDOWS: tl.constexpr, WINDOW: tl.constexpr):
    """How many positions a window has."""
    return window_end(window, size, WINDOWS, WINDOW) - window_begin(window, size, WINDOWS, WINDOW)


@triton.jit
def _lanes(
    p_begin, q_begin, width, WINDOW: tl.constexpr, PADDED: tl.constexpr, GRID: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The columns of a block's windows, padded to powers of two: the window (p, q), the column, whether both exist.

    WINDOW is how wide all windows are, None where they differ.
    """
    lane = tl.arange(0, BLOCK[0] * BLOCK[1] * PADDED)
    p, along = p_begin + lane // (BLOCK[1] * PADDED), lane % (BLOCK[1] * PADDED)
    q = q_begin + along // PADDED
    if WINDOW == PADDED:  # in each row one contiguous run
        column = q_begin * PADDED + along
        inside = column < width
    else:
        column = window_begin(q, width, GRID[1], WINDOW) + along % PADDED
        inside = (column < window_end(q, width, GRID[1], WINDOW)) & (q < GRID[1])
    if GRID[0] % BLOCK[0] != 0:
        inside &= p < GRID[0]
    return p, q, column, inside


@triton.jit
def _sum_windows(
    x, origin, p_begin, q_begin, height, width, strides,
    CHANNELS: tl.constexpr, WINDOWS: tl.constexpr, LARGEST: tl.constexpr, GRID: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over windows [C_i, windows]; for each lane, mean and centred squares over its rows [C_i, lanes].

    x is one image (C_i, H_i, W_i). Neighbouring windows may share a row (and a column): it belongs to the later window.
    Means are those of the map less its origin [C_i], where there is one: small where it varies little. A lane's pixels
    are summed less the median of three of them: one that is far off spoils no other.
    """
    PADDED: tl.constexpr = LARGEST[1]
    offs_c = tl.arange(0, padded(CHANNELS))
    p, _, column, mask_w = _lanes(p_begin, q_begin, width, WINDOWS[1], PADDED, GRID, BLOCK)
    mask = (offs_c < CHANNELS)[:, None] & mask_w[None, :]
    begin, end = window_begin(p, height, GRID[0], WINDOWS[0]), window_end(p, height, GRID[0], WINDOWS[0])
    next_begin = window_begin(p + 1, height, GRID[0], WINDOWS[0])
    x_ptrs = x + offs_c[:, None] * strides[1] + (begin * strides[2] + column * strides[3])[None, :]
    level = 0.0
    if origin is not None:
        first = tl.load(x_ptrs, mask=mask, other=0.0).to(ACC)
        middle = tl.load(x_ptrs + ((end - begin) // 2 * strides[2])[None, :], mask=mask, other=0.0).to(ACC)
        last = tl.load(x_ptrs + ((end - begin - 1) * strides[2])[None, :], mask=mask, other=0.0).to(ACC)
        level = median(first, middle, last)
    sums = tl.zeros(mask.shape, ACC)
    belonging = tl.zeros(mask.shape, ACC)
    squares = tl.zeros(mask.shape, ACC)
    for r in tl.range(0, LARGEST[0], loop_unroll_factor=min(LARGEST[0], 8)):
        # where all windows are as high, each has all rows, and none of them belongs to a later window
        here = mask if WINDOWS[0] is not None else mask & (begin + r < end)[None, :]
        pixels = tl.load(x_ptrs + r * strides[2], mask=here, other=0.0).to(ACC)
        if origin is not None:
            pixels -= level
            if WINDOWS[0] is None:
                pixels = tl.where(here, pixels, 0.0)
                belonging += tl.where((begin + r < next_begin)[None, :], pixels, 0.0)
                squares += tl.where((begin + r < next_begin)[None, :], pixels * pixels, 0.0)
            else:
                squares += pixels * pixels
        sums += pixels
    means = sums
    if origin is not None:
        if WINDOWS[0] is not None:
            belonging = sums
        mean = belonging / tl.maximum(next_begin - begin, 1).to(ACC)[None, :]
        squares -= belonging * mean
        means = level - origin[:, None] + mean
        sums += level * (end - begin).to(ACC)[None, :]
    return tl.sum(tl.reshape(sums, [padded(CHANNELS), BLOCK[0] * BLOCK[1], PADDED]), 2), means, squares


@triton.jit
def _combine_lanes(
    means, squares, p_begin, q_begin, height, width,
    WINDOWS: tl.constexpr, LARGEST: tl.constexpr, GRID: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and sum of centred squares of the pixels that belong to the block [C_i], from those of its lanes."""
    p, q, column, mask_w = _lanes(p_begin, q_begin, width, WINDOWS[1], LARGEST[1], GRID, BLOCK)
    belongs = mask_w & (column < window_begin(q + 1, width, GRID[1], WINDOWS[1]))
    rows = window_begin(p + 1, height, GRID[0], WINDOWS[0]) - window_begin(p, height, GRID[0], WINDOWS[0])
    rows = tl.where(belongs, rows, 0)
    weights = rows.to(ACC) / tl.maximum(tl.sum(rows), 1).to(ACC)
    mean = tl.sum(means * weights[None, :], 1)
    mean += tl.sum((means - mean[:, None]) * weights[None, :], 1)
    apart = means - mean[:, None]
    return mean, tl.sum(tl.where(belongs[None, :], squares + rows.to(ACC)[None, :] * apart * apart, 0.0), 1)


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
    sizes, train, following = sizes_of(maps), any(from_batch(contract)), next(attentions_of(contract), None)
    by_rows = train and taken_by_rows(maps, grid)
    if by_rows:
        config = launcher.config("patch_embed_rows", images=batch)
        block, blocks = (1, grid[1]), grid[0]
        sum_blocks = blocks * launch.blocks(grid[1], tokens_at_once(shape.channels, grid, config["tile"]))
    else:
        config = _config(launcher, sizes, grid, train, batch)
        block = min(config["block_p"], power_of_two(grid[0])), min(config["block_q"], power_of_two(grid[1]))
        blocks = sum_blocks = launch.blocks(grid[0], block[0]) * launch.blocks(grid[1], block[1])
    if following is not None:
        statistics, sums = tokens.empty(batch, scales, 2, shape.tokens), tokens.empty(batch, sum_blocks, 2, shape.total)
        tokens = tokens._replace(statistics=statistics, sums=sums)
    moments = None
    if train:
        moments = Moments(tokens.empty(batch, blocks, 2, shape.total), LessOrigin.empty(tokens, by_rows))
    arguments: dict[str, Any] = {
        "embedding": affines_of(contract.patch_embed),
        "tokens": tokens.plain,
        "statistics": tokens.statistics,
        "sums": tokens.sums,
        "moments": moments,
        "EPS": None if following is None else eps_of(following),
        "FROM_BATCH": from_batch(contract),
    }
    if by_rows:
        patch_embed_rows(launcher, config, maps, grid, **arguments)
    else:
        launcher(
            _patch_embed_kernel, config, batch * scales * blocks, maps=tuple(maps), **arguments,
            sizes=size_arguments(sizes, grid), BLOCK=block,
            LAYOUT=layout_of(maps, grid, reaches=[_reach(size, grid, block[1]) for size in sizes]),
        )  # fmt: skip
    return tokens, Maps(tuple(maps), moments, block)


def _config(
    launcher: Launcher, sizes: Sequence[tuple[int, int]], grid: tuple[int, int], statistics: bool, images: int
) -> dict[str, int]:
    """The kernel's blocks; where BatchNorm needs `statistics` it holds more."""
    widest = 0
    for c, size in zip(launcher.shape.channels, sizes, strict=True):
        widest = max(widest, launch.padded(c) * power_of_two(_widest_window(size, grid)[1]))
    return launcher.config("patch_embed_train" if statistics else "patch_embed", widest, images)


@functools.cache
def _reach(size: tuple[int, int], grid: tuple[int, int], block_q: int) -> Reach:
    """Of one scale; `block_q` is how many columns of tokens a program has."""
    rows, columns = _widest_window(size, grid)
    window = rows, power_of_two(columns)
    if size == grid:
        return Reach(window, None)
    band_rows = launch.blocks(band(size[0], grid[0], 1), UNROLLED.value) * UNROLLED.value
    band_columns = launch.padded(band(size[1], grid[1], block_q) + ALIGNMENT.value - 1)
    return Reach(window, (band_rows, band_columns))


@functools.cache
def _widest_window(size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the largest window of `adaptive_avg_pool2d`."""
    rows, columns = (
        max(-(-(w + 1) * pixels // windows) - w * pixels // windows for w in range(windows))
        for pixels, windows in zip(size, grid, strict=True)
    )
    return rows, columns
