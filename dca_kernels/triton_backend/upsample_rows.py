"""The passes over contiguous maps whose pooling windows are all alike: each pixel lies near its window's token.

Where all windows have R rows and K columns, pixel (r, j) of window (p, q) lies less than one token from token (p, q),
along both axes: j (P_w - 1) - q (K - 1) of W_i - 1 parts of it to the right. Interpolation takes nothing but this token
and its neighbours, and the transposed one gives nothing to others. A program has rows of windows, p, from one side of
the map to the other. What interpolation takes is loaded once for R rows of the map; a row then needs sums and products
alone, with no word between threads.
"""

import functools
import math

import triton
import triton.language as tl

from dca_kernels.backends import power_of_two
from dca_kernels.triton_backend import launch
from dca_kernels.triton_backend.batch_norm import load_affine, load_mean, take_norm, through_relu
from dca_kernels.triton_backend.grid import ROW_PARTS, in_two_parts, transposed_columns, window_offset, window_offsets
from dca_kernels.triton_backend.layout import (
    Tile,
    Tiles,
    counted,
    has_tile,
    size_of,
    split_tiles,
    steps_of,
    strides_of,
)
from dca_kernels.triton_backend.primitives import Shape, divide, kernel, load_vector, number

# What pixels have of the token grid


@triton.jit
def load_row(tokens, b, p, c_begin, i: tl.constexpr, SHAPE: tl.constexpr, LAYOUT: tl.constexpr, ACC: tl.constexpr):
    """Row p of the token grid in a tile's channels of scale i: [channels, windows]. tokens (B, N, C)."""
    GRID: tl.constexpr = LAYOUT.grid
    TILE: tl.constexpr = LAYOUT.of[i].tile
    offs_c, offs_q = c_begin + tl.arange(0, TILE.channels), tl.arange(0, TILE.tokens)
    offs = SHAPE.offsets[i] + offs_c[:, None] + ((p * GRID[1] + offs_q) * SHAPE.total)[None, :]
    mask = (offs_c < SHAPE.channels[i])[:, None] & (offs_q < GRID[1])[None, :]
    return tl.load(tokens + b * SHAPE.tokens * SHAPE.total + offs, mask=mask, other=0.0).to(ACC)


@triton.jit
def load_surroundings(
    z, less, b, p, c_begin, i: tl.constexpr, SHAPE: tl.constexpr, LAYOUT: tl.constexpr, ACC: tl.constexpr
):
    """Of row p of the grid: z - less, what z gains one row below, and one above; each with its gain to the right and
    to the left: [channels, windows] each, for `interpolated`.

    z (B, C, N).
    """
    GRID: tl.constexpr = LAYOUT.grid
    MAP: tl.constexpr = LAYOUT.of[i]
    offs_c = c_begin + tl.arange(0, MAP.tile.channels)
    mask = offs_c < SHAPE.channels[i]
    ptrs = z + b * SHAPE.tokens * SHAPE.total + (SHAPE.offsets[i] + offs_c) * SHAPE.tokens
    here = _load_columns(ptrs, p, mask, MAP, GRID, ACC)
    of_here = here[0] - less[:, None], here[1], here[2]
    if MAP.windows[0] == 1:
        return of_here, of_here, of_here  # a row lies on its token's
    else:
        below = _load_columns(ptrs, tl.minimum(p + 1, GRID[0] - 1), mask, MAP, GRID, ACC)
        above = _load_columns(ptrs, tl.maximum(p - 1, 0), mask, MAP, GRID, ACC)
        of_below = below[0] - here[0], below[1] - here[1], below[2] - here[2]
        return of_here, of_below, (here[0] - above[0], here[1] - above[1], here[2] - above[2])


@triton.jit
def _load_columns(ptrs, p, mask, MAP: tl.constexpr, GRID: tl.constexpr, ACC: tl.constexpr):
    """Row p, and its gain to the right and to the left: [channels, windows] each. ptrs [channels]."""
    offs_q = tl.arange(0, MAP.tile.tokens)
    here = _load_moved(ptrs, p, offs_q, mask, MAP, GRID, ACC)
    if MAP.windows[1] == 1:
        return here, here, here  # a column lies on its token's
    else:
        right = _load_moved(ptrs, p, offs_q + 1, mask, MAP, GRID, ACC)
        left = _load_moved(ptrs, p, offs_q - 1, mask, MAP, GRID, ACC)
        return here, right - here, here - left


@triton.jit
def _load_moved(ptrs, p, offs_q, mask, MAP: tl.constexpr, GRID: tl.constexpr, ACC: tl.constexpr):
    """Columns of row p, zero beyond it, where no weight is: [channels, windows].

    A thread then has the tokens whose columns it loads, as many as are known to be aligned: no word between threads.
    """
    row = tl.multiple_of(p * GRID[1], windows_of_a_vector(MAP.windows[1], MAP.unit, GRID[1]))
    mask = mask[:, None] & ((offs_q >= 0) & (offs_q < GRID[1]))[None, :]
    return tl.load(ptrs[:, None] + (row + offs_q)[None, :], mask=mask, other=0.0).to(ACC)


@triton.constexpr_function
def windows_of_a_vector(window, unit, windows):
    """How many windows the columns have that a thread loads at once, `unit`; of one image's row a divisor."""
    return math.gcd(max(1, unit // window), windows)


@triton.jit
def interpolated(surroundings, vertical, horizontal, i: tl.constexpr, LAYOUT: tl.constexpr):
    """up(z - less) in one row of the map: [channels, columns].

    surroundings: `load_surroundings`; vertical: `window_offset`; horizontal: `window_offsets`.
    """
    MAP: tl.constexpr = LAYOUT.of[i]
    up = _at(surroundings, 0, vertical, MAP)[:, :, None]
    if MAP.windows[1] != 1:
        up += _at(surroundings, 1, vertical, MAP)[:, :, None] * horizontal[0][None, :, :]
        up += _at(surroundings, 2, vertical, MAP)[:, :, None] * horizontal[1][None, :, :]
    return tl.reshape(up, [MAP.tile.channels, MAP.tile.columns])


@triton.jit
def _at(surroundings, K: tl.constexpr, vertical, MAP: tl.constexpr):
    here, below, above = surroundings
    if MAP.windows[0] == 1:
        return here[K]
    else:
        return here[K] + below[K] * vertical[0] + above[K] * vertical[1]


@triton.jit
def of_columns(windows, i: tl.constexpr, LAYOUT: tl.constexpr):
    """Each window's value in all its columns: [channels, windows] -> [channels, columns]."""
    TILE: tl.constexpr = LAYOUT.of[i].tile
    repeated = tl.broadcast_to(windows[:, :, None], [TILE.channels, TILE.tokens, TILE.columns // TILE.tokens])
    return tl.reshape(repeated, [TILE.channels, TILE.columns])


@triton.jit
def sum_windows(row, i: tl.constexpr, LAYOUT: tl.constexpr):
    """[channels, columns] -> [channels, windows]."""
    TILE: tl.constexpr = LAYOUT.of[i].tile
    return tl.sum(tl.reshape(row, [TILE.channels, TILE.tokens, TILE.columns // TILE.tokens]), 2)


@triton.jit
def sum_weighted(row, weights, i: tl.constexpr, LAYOUT: tl.constexpr):
    """As `sum_windows`, weights [windows, WINDOW]."""
    TILE: tl.constexpr = LAYOUT.of[i].tile
    windows = tl.reshape(row, [TILE.channels, TILE.tokens, TILE.columns // TILE.tokens])
    return tl.sum(windows * weights[None, :, :], 2)


@triton.jit
def place_of(tile, sizes, counts, i: tl.constexpr, SHAPE: tl.constexpr, LAYOUT: tl.constexpr, ACC: tl.constexpr):
    """Of a tile of scale i: first channel, first row of windows, which pixels of a row there are [channels, columns],
    the step of `window_offset`, and `window_offsets` of its columns.
    """
    MAP: tl.constexpr = LAYOUT.of[i]
    TILE: tl.constexpr = MAP.tile
    WINDOW: tl.constexpr = MAP.windows[1]
    height, width = size_of(sizes, i, LAYOUT, i)
    block, row = divide(tile, counts.rows[i])
    c_begin = block * TILE.channels
    mask = (c_begin + tl.arange(0, TILE.channels) < SHAPE.channels[i])[:, None]
    mask &= (tl.arange(0, TILE.columns) < width)[None, :]
    row_step, column_step = steps_of(sizes, i, height, width, LAYOUT, i, ACC)
    horizontal = window_offsets(tl.arange(0, TILE.tokens), column_step, WINDOW, ACC)
    return c_begin, row * TILE.rows, mask, row_step, horizontal


@triton.jit
def row_pointers(
    ptr, b, c_begin, p_begin, sizes, STRIDE: tl.constexpr, i: tl.constexpr, LAYOUT: tl.constexpr
):  # fmt: skip
    """Where a tile's first row lies in a map (B, C_i, H_i, W_i), [channels, columns]; and how far apart rows are."""
    MAP: tl.constexpr = LAYOUT.of[i]
    TILE: tl.constexpr = MAP.tile
    height, width = size_of(sizes, i, LAYOUT, i)
    strides = strides_of(STRIDE, height, width)
    offs_c, offs_w = c_begin + tl.arange(0, TILE.channels), tl.arange(0, TILE.columns)
    offs = (offs_c * strides[1] + p_begin * MAP.windows[0] * strides[2])[:, None] + (offs_w * strides[3])[None, :]
    return ptr + b * strides[0] + offs, strides[2]


@triton.jit
def load_rows(ptrs, step, mask, first: tl.constexpr, END: tl.constexpr):
    """Some rows, one after the other, [channels, columns] each: none waits for another, nor for what is stored."""
    rows = ()
    for r in tl.static_range(first, END):
        rows += (tl.load(ptrs + r * step, mask=mask, other=0.0),)  # type: ignore[assignment]
    return rows


# Forward


@kernel
def _upsample_rows_kernel(
    maps, z, biases, affines, buffers, outs, used, sizes, counts,
    SHAPE: tl.constexpr, LAYOUT: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """As `upsample._upsample_kernel`: one program, some rows of windows in a block of channels of one map.

    z (B, C, N).
    """
    b, tile = split_tiles(counts)
    for i in tl.static_range(len(SHAPE.channels)):
        if has_tile(tile, counts, i):
            _upsample_rows(
                x=maps[i], z=z, bias=biases[i], affines=affines, buffers=buffers, out=outs[i],
                used=used, b=b, tile=tile - number(counts.first[i]), sizes=sizes, counts=counts, i=i,
                SHAPE=SHAPE, LAYOUT=LAYOUT, ACC=ACC, BLOCK_R=BLOCK_R,
            )  # fmt: skip


@triton.jit
def _upsample_rows(
    x, z, bias, affines, buffers, out, used, b, tile, sizes, counts,
    i: tl.constexpr, SHAPE: tl.constexpr, LAYOUT: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`_upsample_rows_kernel` for tile `tile` of image b and scale i."""
    GRID: tl.constexpr = LAYOUT.grid
    MAP: tl.constexpr = LAYOUT.of[i]
    TILE: tl.constexpr = MAP.tile
    ROWS: tl.constexpr = MAP.windows[0]
    STRIDE: tl.constexpr = MAP.stride
    OUT_STRIDE: tl.constexpr = MAP.out_stride
    c_begin, p_begin, mask, row_step, horizontal = place_of(tile, sizes, counts, i, SHAPE, LAYOUT, ACC)
    is_first = (b == 0) & (p_begin == 0)
    mean, factor, shift = take_norm(bias, affines, buffers, used, c_begin, is_first, i, SHAPE, LAYOUT, ACC)
    rounded, lost = in_two_parts(mean, ACC)
    x_ptrs, x_step = row_pointers(x, b, c_begin, p_begin, sizes, STRIDE, i, LAYOUT)
    out_ptrs, out_step = row_pointers(out, b, c_begin, p_begin, sizes, OUT_STRIDE, i, LAYOUT)
    for k in tl.range(0, tl.minimum(TILE.rows, GRID[0] - p_begin), num_stages=1):
        p = p_begin + k
        surroundings = load_surroundings(z, lost, b, p, c_begin, i, SHAPE, LAYOUT, ACC)
        for first in tl.static_range(0, ROWS, BLOCK_R):
            pixels = load_rows(x_ptrs, x_step, mask, first, min(first + BLOCK_R, ROWS))
            for k in tl.static_range(len(pixels)):
                r = first + k
                vertical = window_offset(p * ROWS + r, p, row_step, ACC)
                y = pixels[k].to(ACC) - rounded[:, None] + interpolated(surroundings, vertical, horizontal, i, LAYOUT)
                if MAP.norm is not None:
                    y = y * factor[:, None] + shift[:, None]
                    y = tl.where(y < 0, 0.0, y)  # keeps NaN
                tl.store(out_ptrs + r * out_step, y, mask=mask)
        x_ptrs += ROWS * x_step
        out_ptrs += ROWS * out_step


# Backward


@triton.jit
def _relu_gradient(
    pixels, gradient, surroundings, vertical, horizontal, rounded, affine,
    i: tl.constexpr, LAYOUT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """In one row: x; up(z) + x less its mean; and the gradient of what BatchNorm gave, through the ReLU.

    [channels, columns] each. gradient: of the output.
    """
    pixels, gradient = pixels.to(ACC), gradient.to(ACC)
    y = pixels - rounded[:, None] + interpolated(surroundings, vertical, horizontal, i, LAYOUT)
    if LAYOUT.of[i].norm is not None:
        gradient = through_relu(y, gradient, affine, 1)
    return pixels, y, gradient


@kernel
def _upsample_backward_rows_kernel(
    maps, z, douts, affines, used, sums, strips, sizes, counts, sum_blocks,
    SHAPE: tl.constexpr, LAYOUT: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """As `upsample_backward._upsample_backward_kernel`: one program, some rows of windows in a block of channels.

    z (B, C, N). Writes sums (B, sum_blocks, 2, C) over its pixels of the gradient g behind the ReLU, and of g y; and
    strips (B, 3, N, C), what its rows of windows give the transposed interpolation of g: their own row of the grid,
    the row below, and the row above.
    """
    b, tile = split_tiles(counts)
    for i in tl.static_range(len(SHAPE.channels)):
        if has_tile(tile, counts, i):
            _upsample_backward_rows(
                x=maps[i], z=z, dout=douts[i], affines=affines, used=used,
                sums=sums + b * sum_blocks * 2 * SHAPE.total, parts=strips, b=b, tile=tile - number(counts.first[i]),
                sizes=sizes, counts=counts, i=i, SHAPE=SHAPE, LAYOUT=LAYOUT, ACC=ACC, BLOCK_R=BLOCK_R,
            )  # fmt: skip


@triton.jit
def _upsample_backward_rows(
    x, z, dout, affines, used, sums, parts, b, tile, sizes, counts,
    i: tl.constexpr, SHAPE: tl.constexpr, LAYOUT: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`_upsample_backward_rows_kernel` for tile `tile` of image b and scale i; sums are those of image b."""
    GRID: tl.constexpr = LAYOUT.grid
    TOTAL: tl.constexpr = SHAPE.total
    PART: tl.constexpr = SHAPE.tokens * TOTAL
    MAP: tl.constexpr = LAYOUT.of[i]
    TILE: tl.constexpr = MAP.tile
    TOKENS: tl.constexpr = TILE.tokens
    ROWS: tl.constexpr = MAP.windows[0]
    WINDOW: tl.constexpr = MAP.windows[1]
    STRIDE: tl.constexpr = MAP.stride
    OUT_STRIDE: tl.constexpr = MAP.out_stride
    c_begin, p_begin, mask, row_step, horizontal = place_of(tile, sizes, counts, i, SHAPE, LAYOUT, ACC)
    rounded, lost = in_two_parts(load_mean(used, c_begin, i, SHAPE, LAYOUT), ACC)
    affine = (rounded, rounded)
    if MAP.norm is not None:
        affine = load_affine(used, affines, c_begin, i, SHAPE, LAYOUT, ACC)
    x_ptrs, x_step = row_pointers(x, b, c_begin, p_begin, sizes, STRIDE, i, LAYOUT)
    dout_ptrs, dout_step = row_pointers(dout, b, c_begin, p_begin, sizes, OUT_STRIDE, i, LAYOUT)
    offs_c, offs_q = c_begin + tl.arange(0, TILE.channels), tl.arange(0, TOKENS)
    mask_c = offs_c < SHAPE.channels[i]
    mask_part = mask_c[:, None] & (offs_q < GRID[1])[None, :]
    part_ptrs = parts + b * (ROW_PARTS * PART) + SHAPE.offsets[i]
    part_ptrs = part_ptrs + offs_c[:, None] + (p_begin * GRID[1] + offs_q)[None, :] * TOTAL
    sum_gradient = tl.zeros([offs_c.shape[0], TOKENS], ACC)
    sum_product = tl.zeros([offs_c.shape[0], TOKENS], ACC)
    for k in tl.range(0, tl.minimum(TILE.rows, GRID[0] - p_begin), num_stages=1):
        p = p_begin + k
        surroundings = load_surroundings(z, lost, b, p, c_begin, i, SHAPE, LAYOUT, ACC)
        own, below, above = _zeros(sum_gradient), _zeros(sum_gradient), _zeros(sum_gradient)
        for first in tl.static_range(0, ROWS, BLOCK_R):
            pixels = load_rows(x_ptrs, x_step, mask, first, min(first + BLOCK_R, ROWS))
            gradients = load_rows(dout_ptrs, dout_step, mask, first, min(first + BLOCK_R, ROWS))
            for k in tl.static_range(len(pixels)):
                vertical = window_offset(p * ROWS + first + k, p, row_step, ACC)
                _, y, gradient = _relu_gradient(
                    pixels[k], gradients[k], surroundings, vertical, horizontal, rounded, affine, i, LAYOUT, ACC
                )
                sum_product += sum_windows(gradient * y, i, LAYOUT)
                of_row = _sums_of_row(gradient, horizontal, i, LAYOUT)
                own = _added(own, of_row, 1.0)
                below = _added(below, of_row, vertical[0])
                above = _added(above, of_row, vertical[1])  # negative
        x_ptrs += ROWS * x_step
        dout_ptrs += ROWS * dout_step
        sum_gradient += own[0]
        of_own = transposed_columns(own, GRID[1], WINDOW)
        if ROWS > 1:  # else nothing for other rows
            of_below = transposed_columns(below, GRID[1], WINDOW)
            of_above = transposed_columns(above, GRID[1], WINDOW)
            of_own += of_above - of_below
            tl.store(part_ptrs + PART, of_below / (ROWS * WINDOW), mask=mask_part)
            tl.store(part_ptrs + 2 * PART, -of_above / (ROWS * WINDOW), mask=mask_part)
        tl.store(part_ptrs, of_own / (ROWS * WINDOW), mask=mask_part)
        part_ptrs += GRID[1] * TOTAL
    sums_ptrs = sums + p_begin // TILE.rows * 2 * TOTAL + SHAPE.offsets[i] + offs_c
    tl.store(sums_ptrs, tl.sum(sum_gradient, 1), mask=mask_c)
    tl.store(sums_ptrs + TOTAL, tl.sum(sum_product, 1), mask=mask_c)


@triton.jit
def _zeros(like):
    zeros = tl.zeros_like(like)
    return zeros, zeros, zeros


@triton.jit
def _sums_of_row(row, horizontal, i: tl.constexpr, LAYOUT: tl.constexpr):
    """Over the windows of a row, plain and by `window_offsets`: [channels, windows] each."""
    sums = sum_windows(row, i, LAYOUT)
    if LAYOUT.of[i].windows[1] == 1:
        return sums, sums, sums
    else:
        return sums, sum_weighted(row, horizontal[0], i, LAYOUT), sum_weighted(row, horizontal[1], i, LAYOUT)


@triton.jit
def _added(sums, of_row, weight):
    return sums[0] + of_row[0] * weight, sums[1] + of_row[1] * weight, sums[2] + of_row[2] * weight


@kernel
def _map_gradient_rows_kernel(
    maps, z, douts, affines, used, through_statistics, dtokens, weights, dmaps, sums, sizes, counts, sum_blocks,
    SHAPE: tl.constexpr, LAYOUT: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """As `map_gradient._map_gradient_kernel`: one program, some rows of windows in a block of channels of one map.

    z (B, C, N).
    """
    b, tile = split_tiles(counts)
    for i in tl.static_range(len(SHAPE.channels)):
        if has_tile(tile, counts, i):
            _map_gradient_rows(
                x=maps[i], z=z, dout=douts[i], affines=affines, used=used, through_statistics=through_statistics,
                dtokens=dtokens, weight=weights[i], dmap=dmaps[i], sums=sums + b * sum_blocks * 2 * SHAPE.total,
                b=b, tile=tile - number(counts.first[i]), sizes=sizes, counts=counts, i=i, SHAPE=SHAPE, LAYOUT=LAYOUT,
                ACC=ACC, BLOCK_R=BLOCK_R,
            )  # fmt: skip


@triton.jit
def _map_gradient_rows(
    x, z, dout, affines, used, through_statistics, dtokens, weight, dmap, sums, b, tile, sizes, counts,
    i: tl.constexpr, SHAPE: tl.constexpr, LAYOUT: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`_map_gradient_rows_kernel` for tile `tile` of image b and scale i; sums are those of image b."""
    GRID: tl.constexpr = LAYOUT.grid
    TOTAL: tl.constexpr = SHAPE.total
    MAP: tl.constexpr = LAYOUT.of[i]
    NORM: tl.constexpr = MAP.norm
    TILE: tl.constexpr = MAP.tile
    TOKENS: tl.constexpr = TILE.tokens
    ROWS: tl.constexpr = MAP.windows[0]
    AREA: tl.constexpr = MAP.windows[0] * MAP.windows[1]
    STRIDE: tl.constexpr = MAP.stride
    OUT_STRIDE: tl.constexpr = MAP.out_stride
    GRADIENT_STRIDE: tl.constexpr = MAP.gradient_stride
    c_begin, p_begin, mask, row_step, horizontal = place_of(tile, sizes, counts, i, SHAPE, LAYOUT, ACC)
    rounded, lost = in_two_parts(load_mean(used, c_begin, i, SHAPE, LAYOUT), ACC)
    offs_c = c_begin + tl.arange(0, TILE.channels)
    mask_c = offs_c < SHAPE.channels[i]
    weights = load_vector(weight, offs_c, mask_c, ACC) / AREA
    constant, multiple = tl.zeros(offs_c.shape, ACC), tl.zeros(offs_c.shape, ACC)
    affine = (tl.full(offs_c.shape, 1.0, ACC), constant)
    if NORM is not None:
        affine = load_affine(used, affines, c_begin, i, SHAPE, LAYOUT, ACC)
        if NORM.from_batch:
            offs_all = SHAPE.offsets[i] + offs_c
            constant = affine[0] * load_vector(through_statistics, offs_all, mask_c, ACC)
            multiple = affine[0] * load_vector(through_statistics + TOTAL, offs_all, mask_c, ACC)
    x_ptrs, x_step = row_pointers(x, b, c_begin, p_begin, sizes, STRIDE, i, LAYOUT)
    dout_ptrs, dout_step = row_pointers(dout, b, c_begin, p_begin, sizes, OUT_STRIDE, i, LAYOUT)
    if dmap is not None:
        dmap_ptrs, dmap_step = row_pointers(dmap, b, c_begin, p_begin, sizes, GRADIENT_STRIDE, i, LAYOUT)
    sum_gradient = tl.zeros([offs_c.shape[0], TOKENS], ACC)
    sum_product = tl.zeros([offs_c.shape[0], TOKENS], ACC)
    for k in tl.range(0, tl.minimum(TILE.rows, GRID[0] - p_begin), num_stages=1):
        p = p_begin + k
        surroundings = load_surroundings(z, lost, b, p, c_begin, i, SHAPE, LAYOUT, ACC)
        of_tokens = load_row(dtokens, b, p, c_begin, i, SHAPE, LAYOUT, ACC)
        pooled = of_tokens * weights[:, None] - constant[:, None]
        of_pixels = tl.zeros(of_tokens.shape, ACC)
        for first in tl.static_range(0, ROWS, BLOCK_R):
            pixels = load_rows(x_ptrs, x_step, mask, first, min(first + BLOCK_R, ROWS))
            gradients = load_rows(dout_ptrs, dout_step, mask, first, min(first + BLOCK_R, ROWS))
            for k in tl.static_range(len(pixels)):
                r = first + k
                vertical = window_offset(p * ROWS + r, p, row_step, ACC)
                row, y, gradient = _relu_gradient(
                    pixels[k], gradients[k], surroundings, vertical, horizontal, rounded, affine, i, LAYOUT, ACC
                )
                of_pixels += sum_windows(row, i, LAYOUT)
                if dmap is not None:
                    rest = of_columns(pooled, i, LAYOUT)
                    if (NORM is not None) and NORM.from_batch:
                        rest -= y * multiple[:, None]
                    tl.store(dmap_ptrs + r * dmap_step, gradient * affine[0][:, None] + rest, mask=mask)
        x_ptrs += ROWS * x_step
        dout_ptrs += ROWS * dout_step
        if dmap is not None:
            dmap_ptrs += ROWS * dmap_step
        sum_gradient += of_tokens
        sum_product += of_tokens * (of_pixels / AREA)
    sums_ptrs = sums + p_begin // TILE.rows * 2 * TOTAL + SHAPE.offsets[i] + offs_c
    tl.store(sums_ptrs, tl.sum(sum_product, 1), mask=mask_c)
    tl.store(sums_ptrs + TOTAL, tl.sum(sum_gradient, 1), mask=mask_c)


# Where it is done


@functools.cache
def tiles_of_rows(
    shape: Shape, sizes: tuple[tuple[int, int], ...], grid: tuple[int, int], elements: int, rows: int
) -> Tiles:
    """Tiles of at most `elements` in a row, and of at least `rows` rows of the map, of whole windows."""
    tiles, blocks, tokens = [], [], launch.padded(grid[1])
    for c, (height, width) in zip(shape.channels, sizes, strict=True):
        columns = tokens * (width // grid[1])
        channels = min(power_of_two(c), max(1, elements // columns))
        windows = max(1, rows * grid[0] // height)
        tiles.append(Tile(channels, windows, columns, tokens))
        blocks.append((launch.blocks(c, channels), launch.blocks(grid[0], windows), 1))
    return counted(tiles, blocks)
