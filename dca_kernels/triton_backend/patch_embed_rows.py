"""Stage 1 where every pooling window is a power of two wide and all are as high: each map is read once.

Column j of window q, K columns wide, lies e = (qK + j) (P_w - 1) / (W - 1) - q columns of tokens right of token q, and
(W - 1) e = j (P_w - 1) - q (K - 1): never a whole one. Interpolation takes a window's columns from three tokens alone,
its own by 1 - |e|, the right one by max(e, 0), the left one by -min(e, 0); and rows likewise. So the transposed
interpolation is made of sums over windows, as their mean is.
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from dca_kernels.backends import power_of_two
from dca_kernels.triton_backend import launch
from dca_kernels.triton_backend.grid import ROW_PARTS, load_origin, transposed_columns, window_offset, window_offsets
from dca_kernels.triton_backend.launch import Launcher
from dca_kernels.triton_backend.layer_norm import store_statistics
from dca_kernels.triton_backend.layout import Reach, Tile, layout_of, strides_of
from dca_kernels.triton_backend.primitives import kernel, load_tokens, load_vector, padded, split_program

# Loads of a map that follow one another without a loop.
UNROLLED = tl.constexpr(8)


@kernel
def _patch_embed_rows_kernel(
    maps, embedding, tokens, statistics, sums, moments,
    SHAPE: tl.constexpr, LAYOUT: tl.constexpr, EPS: tl.constexpr, FROM_BATCH: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: a row of tokens (B, N, C), all channels of one scale, some at a time.

    Writes as `patch_embed._patch_embed_kernel` does, `sums` of BLOCK_N tokens and moments of the row. Of the transposed
    interpolation (B, 3, N, C) a row gives to its own tokens, to those below it and to those above.
    """
    GRID: tl.constexpr = LAYOUT.grid
    b, tile = split_program(len(SHAPE.channels) * GRID[0])
    p = tile % GRID[0]
    for i in tl.static_range(len(SHAPE.channels)):
        if tile // GRID[0] == i:
            TILE: tl.constexpr = LAYOUT.of[i].tile
            for c_begin in tl.range(0, SHAPE.channels[i], TILE.channels):
                _embed_row(
                    x=maps[i], embedding=embedding, tokens=tokens, moments=moments, b=b, p=p, c_begin=c_begin, i=i,
                    SHAPE=SHAPE, LAYOUT=LAYOUT, FROM_BATCH=FROM_BATCH[i], ACC=ACC,
                )  # fmt: skip
            if EPS is not None:
                tl.debug_barrier()  # what other threads wrote is read
                _store_statistics_of_row(tokens, statistics, sums, b, p, i, GRID, EPS[i], SHAPE, ACC, BLOCK_N)


@triton.jit
def _embed_row(
    x, embedding, tokens, moments, b, p, c_begin,
    i: tl.constexpr, SHAPE: tl.constexpr, LAYOUT: tl.constexpr, FROM_BATCH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """`_patch_embed_rows_kernel` for row p and some channels of scale i."""
    GRID: tl.constexpr = LAYOUT.grid
    MAP: tl.constexpr = LAYOUT.of[i]
    TILE: tl.constexpr = MAP.tile
    WINDOW: tl.constexpr = MAP.windows
    STRIDE: tl.constexpr = MAP.stride
    AREA: tl.constexpr = WINDOW[0] * WINDOW[1]
    HEIGHT: tl.constexpr = GRID[0] * WINDOW[0]
    WIDTH: tl.constexpr = GRID[1] * WINDOW[1]
    COLUMN_STEP: tl.constexpr = _step(WIDTH, GRID[1])
    strides = strides_of(STRIDE, tl.full([], HEIGHT, tl.int64), tl.full([], WIDTH, tl.int32))
    offs_c, offs_q = c_begin + tl.arange(0, TILE.channels), tl.arange(0, TILE.tokens)
    mask_c = offs_c < SHAPE.channels[i]
    image_ptrs = x + b * strides[0] + offs_c * strides[1]
    x_ptrs = image_ptrs + p * WINDOW[0] * strides[2]
    if FROM_BATCH:
        origin = load_origin(image_ptrs, mask_c, HEIGHT, WIDTH, strides[2], strides[3], ACC)
        level = tl.sum(_load_row(x_ptrs, mask_c, strides[3], WINDOW[1], GRID[1], ACC), 2) / WINDOW[1]
        sums, squares, weights = _sum_windows(
            x_ptrs=x_ptrs, level=level, mask_c=mask_c, p=p, strides=strides, row_step=_step(HEIGHT, GRID[0]),
            column_step=COLUMN_STEP, GRID_WIDTH=GRID[1], WINDOW=WINDOW, ACC=ACC,
        )  # fmt: skip
        window_sums = sums[0] + level * AREA
        level = tl.where((offs_q < GRID[1])[None, :], level - origin[:, None], 0.0)
        mean, centred = _moments_of_row(level, sums[0], squares, GRID[1], AREA)
        transposed = _interpolate_transposed(sums, level, weights, COLUMN_STEP, GRID[1], WINDOW)
        for part in tl.static_range(len(transposed)):
            grid = b * ROW_PARTS + part
            _store_row(moments.less_origin.transposed, transposed[part] / AREA, grid, p, offs_c, mask_c, i, GRID, SHAPE)
        moments_ptrs = moments.blocks + (b * GRID[0] + p) * 2 * SHAPE.total + SHAPE.offsets[i] + offs_c
        tl.store(moments_ptrs, mean, mask=mask_c)
        tl.store(moments_ptrs + SHAPE.total, centred, mask=mask_c)
        if p == 0:
            origin_ptrs = moments.less_origin.origins + b * SHAPE.total + SHAPE.offsets[i] + offs_c
            # Loaded again: every program would hold it in the store's layout, too.
            origin = load_origin(image_ptrs, mask_c, HEIGHT, WIDTH, strides[2], strides[3], ACC)
            tl.store(origin_ptrs, origin, mask=mask_c)
    else:
        window_sums = tl.zeros([offs_c.shape[0], offs_q.shape[0]], ACC)
        ROWS: tl.constexpr = WINDOW[0]
        for r in tl.range(0, ROWS, loop_unroll_factor=_unrolled(ROWS)):
            pixels = _load_row(x_ptrs + r * strides[2], mask_c, strides[3], WINDOW[1], GRID[1], ACC)
            window_sums += tl.sum(pixels, 2)
    weight = load_vector(embedding.weight[i], offs_c, mask_c, ACC) * (1.0 / AREA)
    bias = load_vector(embedding.bias[i], offs_c, mask_c, ACC)
    out = window_sums * weight[:, None] + bias[:, None]
    _store_row(tokens, out, b, p, offs_c, mask_c, i, GRID, SHAPE)


@triton.constexpr_function
def _step(high, low):
    """Tokens from one position of a map to the next."""
    return (low - 1) / max(high - 1, 1)


@triton.constexpr_function
def _unrolled(rows):
    """How many rows of a map are summed without a loop."""
    return min(rows, UNROLLED.value)


@triton.jit
def _load_row(row_ptrs, mask_c, stride, WINDOW: tl.constexpr, GRID_WIDTH: tl.constexpr, ACC: tl.constexpr):
    """One row of a map, zero beyond it: [channels, windows, WINDOW]. row_ptrs [channels]."""
    TOKENS: tl.constexpr = padded(GRID_WIDTH)
    offs_w = tl.arange(0, TOKENS * WINDOW)
    mask = mask_c[:, None] & (offs_w < GRID_WIDTH * WINDOW)[None, :]
    pixels = tl.load(row_ptrs[:, None] + (offs_w * stride)[None, :], mask=mask, other=0.0)
    return tl.reshape(pixels, [mask_c.shape[0], TOKENS, WINDOW]).to(ACC)


@triton.jit
def _sum_windows(
    x_ptrs, level, mask_c, p, strides, row_step, column_step,
    GRID_WIDTH: tl.constexpr, WINDOW: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of row p of windows, sums of what pixels are apart from a level of each window, and of its squares.

    Each is [channels, windows]. The sums are those of all pairs of a weight along rows and one along columns: 1, and
    `window_offset`. Last come the sums of both weights along rows. The level is the mean of a window's first row: since
    these are one of n rows, squares are at most n + 1 times the centred ones.
    """
    ROWS: tl.constexpr = WINDOW[0]
    WIDTH: tl.constexpr = WINDOW[1]
    TOKENS: tl.constexpr = level.shape[1]
    zeros = tl.zeros(level.shape, ACC)
    sums = (zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros)
    squares, to_below, to_above = zeros, tl.zeros([], ACC), tl.zeros([], ACC)
    to_right, to_left = window_offsets(tl.arange(0, TOKENS), column_step, WIDTH, ACC)
    for r in tl.range(0, ROWS, loop_unroll_factor=_unrolled(ROWS)):
        pixels = _load_row(x_ptrs + r * strides[2], mask_c, strides[3], WIDTH, GRID_WIDTH, ACC) - level[:, :, None]
        squares += tl.sum(pixels * pixels, 2)
        plain, right, left = tl.sum(pixels, 2), zeros, zeros
        if WIDTH > 1:
            right = tl.sum(pixels * to_right[None, :, :], 2)
            left = tl.sum(pixels * to_left[None, :, :], 2)
        below, above = window_offset(p * ROWS + r, p, row_step, ACC)
        sums = (
            sums[0] + plain, sums[1] + right, sums[2] + left,
            sums[3] + below * plain, sums[4] + below * right, sums[5] + below * left,
            sums[6] + above * plain, sums[7] + above * right, sums[8] + above * left,
        )  # fmt: skip
        to_below += below
        to_above += above
    return sums, squares, (to_below, to_above)


@triton.jit
def _moments_of_row(level, sums, squares, GRID_WIDTH: tl.constexpr, AREA: tl.constexpr):
    """Mean and centred squares of a row of windows [channels].

    For each window [channels, windows]: a level, sums of what its pixels are apart from it, and of its squares.
    """
    apart = sums * (1.0 / AREA)
    of_windows = level + apart
    mask_q = (tl.arange(0, level.shape[1]) < GRID_WIDTH)[None, :]
    mean = tl.sum(of_windows, 1) * (1.0 / GRID_WIDTH)  # zero in those that there are not
    mean += tl.sum(tl.where(mask_q, of_windows - mean[:, None], 0.0), 1) * (1.0 / GRID_WIDTH)
    of_windows = tl.where(mask_q, of_windows - mean[:, None], 0.0)
    return mean, tl.sum(squares - sums * apart + AREA * of_windows * of_windows, 1)


@triton.jit
def _interpolate_transposed(sums, level, weights, column_step, GRID_WIDTH: tl.constexpr, WINDOW: tl.constexpr):
    """The transposed interpolation of a row of windows: for its own tokens, those below, those above.

    [channels, windows], of `_sum_windows` of what is apart from the level. A map with as many rows as the grid has
    nothing for others.
    """
    plain = _along_columns(sums[0], sums[1], sums[2], level * WINDOW[0], column_step, GRID_WIDTH, WINDOW[1])
    if WINDOW[0] == 1:
        return (plain,)
    else:
        below = _along_columns(sums[3], sums[4], sums[5], level * weights[0], column_step, GRID_WIDTH, WINDOW[1])
        above = _along_columns(sums[6], sums[7], sums[8], level * weights[1], column_step, GRID_WIDTH, WINDOW[1])
        return plain - below + above, below, -above


@triton.jit
def _along_columns(plain, right, left, level, column_step, GRID_WIDTH: tl.constexpr, WINDOW: tl.constexpr):
    """Each window's sums, and the level in each of its columns, to its token and to both beside it."""
    if WINDOW > 1:
        to_right, to_left = window_offsets(tl.arange(0, plain.shape[1]), column_step, WINDOW, plain.dtype)
        right += level * tl.sum(to_right, 1)[None, :]
        left += level * tl.sum(to_left, 1)[None, :]
    return transposed_columns((plain + WINDOW * level, right, left), GRID_WIDTH, WINDOW)


@triton.jit
def _store_row(
    out, row, grid_number, p, offs_c, mask_c, i: tl.constexpr, GRID: tl.constexpr, SHAPE: tl.constexpr
):  # fmt: skip
    """Row p of one of the token grids of out (grids, N, C): [channels, columns of tokens]."""
    offs_q = tl.arange(0, row.shape[1])
    ptrs = out + (grid_number * GRID[0] + p) * GRID[1] * SHAPE.total + SHAPE.offsets[i]
    ptrs += offs_q[:, None] * SHAPE.total + offs_c[None, :]
    mask = (offs_q < GRID[1])[:, None] & mask_c[None, :]
    tl.store(ptrs, tl.trans(row).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _store_statistics_of_row(
    tokens, statistics, sums, b, p,
    i: tl.constexpr, GRID: tl.constexpr, EPS: tl.constexpr, SHAPE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`store_statistics` of row p of the tokens (B, N, C), BLOCK_N at a time: each is a block of the sums."""
    BLOCKS: tl.constexpr = triton.cdiv(GRID[1], BLOCK_N)
    image = tokens + b * GRID[0] * GRID[1] * SHAPE.total
    offs_c = tl.arange(0, padded(SHAPE.channels[i]))
    mask_c = offs_c < SHAPE.channels[i]
    for block in tl.range(BLOCKS):
        offs_q = block * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_q = offs_q < GRID[1]
        offs_n = tl.where(mask_q, p * GRID[1] + offs_q, SHAPE.tokens)
        rows = load_tokens(image, offs_n, SHAPE.offsets[i] + offs_c, mask_q, mask_c, SHAPE.total).to(ACC)
        store_statistics(
            tokens=rows, mask=mask_q[:, None] & mask_c[None, :], statistics=statistics, sums=sums, b=b,
            block=p * BLOCKS + block, offs_n=offs_n, i=i, BLOCKS=GRID[0] * BLOCKS, EPS=EPS, SHAPE=SHAPE,
        )  # fmt: skip


def patch_embed_rows(
    launcher: Launcher, config: dict[str, int], maps: Sequence[Tensor], grid: tuple[int, int], **arguments: Any
) -> None:
    """Launch the kernel; `arguments` are those that `patch_embed` has for both kernels."""
    tiles, reaches = zip(*[_tile_of(x, grid, config["tile"]) for x in maps], strict=True)
    launcher(
        _patch_embed_rows_kernel, config, maps[0].shape[0] * len(maps) * grid[0], maps=tuple(maps), **arguments,
        LAYOUT=layout_of(maps, grid, tiles=tiles, reaches=reaches),
        BLOCK_N=tokens_at_once(launcher.shape.channels, grid, config["tile"]),
    )  # fmt: skip


def _tile_of(x: Tensor, grid: tuple[int, int], elements: int) -> tuple[Tile, Reach]:
    """What a program has at once of one scale: rows of some channels, of all windows side by side."""
    channels, rows, columns = x.shape[1], x.shape[2] // grid[0], x.shape[3] // grid[1]
    tokens = launch.padded(grid[1])
    held = 1 if columns == 1 else max(columns, 4)  # the sums of a window take as many registers as four of its columns
    at_once = min(max(1, elements // (tokens * held)), power_of_two(channels))
    return Tile(at_once, rows, tokens * columns, tokens), Reach((rows, columns), None)


def tokens_at_once(channels: Sequence[int], grid: tuple[int, int], elements: int) -> int:
    """How many tokens of a row LayerNorm's statistics are taken of at once, with all channels of a scale."""
    return max(1, min(2 * elements // launch.padded(max(channels)), power_of_two(grid[1])))
