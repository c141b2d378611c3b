"""Between a skip map and the token grid: pooling windows, interpolation, and tiles of maps."""

import concurrent.futures
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

# Windows of adaptive average pooling


@triton.constexpr_function
def _reciprocal_shift(divisor):
    return 31 + divisor.bit_length()


@triton.constexpr_function
def _reciprocal(divisor):
    return -(-(1 << _reciprocal_shift(divisor)) // divisor)


@triton.jit
def quotient(numbers, DIVISOR: tl.constexpr):
    """`numbers // DIVISOR` for 0 <= numbers < 2**31, by a product with the reciprocal.

    LLVM divides small numbers in 16 bits, two at a time, and ptxas 12.8 then loses a constant that was added before
    (`add.s16x2` with one half unused adds zero), which pooled windows of no columns.
    """
    return (numbers.to(tl.int64) * _reciprocal(DIVISOR) >> _reciprocal_shift(DIVISOR)).to(tl.int32)


@triton.jit
def window_begin(window, size, WINDOWS: tl.constexpr, WINDOW: tl.constexpr = None):
    """Where a window of adaptive average pooling begins. WINDOW is the size of all, where it is the same."""
    if WINDOW is not None:
        return window * WINDOW
    return quotient(window * size, WINDOWS)


@triton.jit
def window_end(window, size, WINDOWS: tl.constexpr, WINDOW: tl.constexpr = None):
    """Where it ends; neighbouring windows may have a position in common."""
    if WINDOW is not None:
        return (window + 1) * WINDOW
    return quotient((window + 1) * size + WINDOWS - 1, WINDOWS)


@triton.jit
def first_window(position, size, WINDOWS: tl.constexpr):
    """A window not after the first that holds a position."""
    return position * WINDOWS // size


# Bilinear interpolation, align_corners=True, from LOW positions to `high`, `step` apart among the LOW: the matrix U


@triton.jit
def interpolation(offs, step, LOW: tl.constexpr, ACC: tl.constexpr):
    """As PyTorch computes it: left and right neighbour of high-resolution positions, the weight of the right one."""
    position = offs.to(ACC) * step
    left = tl.minimum(position.to(tl.int32), LOW - 1)
    return left, tl.minimum(left + 1, LOW - 1), position - left.to(ACC)


@triton.jit
def interpolation_matrix(offs_low, offs_high, step, ACC: tl.constexpr):
    """The weight of each low-resolution position in each high-resolution one: [low, high]."""
    apart = (offs_high.to(ACC) * step)[None, :] - offs_low.to(ACC)[:, None]
    return tl.maximum(1.0 - tl.abs(apart), 0.0)


@triton.jit
def weight_in_row(p, h, step, LOW: tl.constexpr, ACC: tl.constexpr):
    """The weight of low-resolution row p in high-resolution row h."""
    position = tl.minimum(h.to(ACC) * step, LOW - 1)
    return tl.maximum(1.0 - tl.abs(position - p), 0.0)


@triton.jit
def window_offset(position, window, step, ACC: tl.constexpr):
    """How far high-resolution positions lie behind the low-resolution one of their window, and, negative, before it.

    Less than 1, where all windows are of one size: their weights for the next one, and, negative, for the one before.
    """
    offset = position.to(ACC) * step - window.to(ACC)
    return tl.maximum(offset, 0.0), tl.minimum(offset, 0.0)


@triton.jit
def window_offsets(window, step, WINDOW: tl.constexpr, ACC: tl.constexpr):
    """`window_offset` of all positions of some windows of one size: [windows, WINDOW]."""
    position = window[:, None] * WINDOW + tl.arange(0, WINDOW)[None, :]
    return window_offset(position, window[:, None], step, ACC)


@triton.jit
def transposed_columns(sums, GRID_WIDTH: tl.constexpr, WINDOW: tl.constexpr):
    """The transposed interpolation of columns, of sums over windows: plain, and weighted by both of `window_offsets`.

    [channels, windows] each, zero beyond the last window.
    """
    plain, to_right, to_left = sums
    if WINDOW == 1:
        return plain
    else:
        beside = _moved(to_right, 1, GRID_WIDTH) - _moved(to_left, -1, GRID_WIDTH)
        return plain - to_right + to_left + beside


@triton.jit
def _moved(tile, TO: tl.constexpr, GRID_WIDTH: tl.constexpr):
    """What is moved so many windows to the right, zero where nothing arrives: [channels, windows]."""
    WINDOWS: tl.constexpr = tile.shape[1]
    offs_q = tl.arange(0, WINDOWS)
    source = (offs_q + (WINDOWS - TO)) % WINDOWS
    moved = tl.gather(tile, tl.broadcast_to(source[None, :], tile.shape), 1)
    if GRID_WIDTH == WINDOWS:  # else there is a zero between the last and the first
        moved = tl.where((source + TO == offs_q)[None, :], moved, 0.0)
    return moved


def band(high: int, low: int, count: int) -> int:
    """How many high-resolution positions at most take from `count` neighbouring low-resolution ones."""
    if low == 1:
        return high
    return min(high, -(-(count + 1) * (high - 1) // (low - 1)) + 2)


@triton.jit
def band_begin(position, high, LOW: tl.constexpr):
    """A high-resolution position not after the first that takes from a low-resolution one."""
    if LOW == 1:
        return position * 0
    return quotient(tl.maximum(position - 1, 0) * (high - 1), LOW - 1)


@triton.jit
def band_end(position, high, LOW: tl.constexpr):
    """One not before the last that does, and one more."""
    if LOW == 1:
        return position * 0 + high
    return tl.minimum(quotient((position + 1) * (high - 1), LOW - 1) + 2, high)


# Tables of U: its column sums, and the three diagonals of U^T U

COLUMN_SUMS = tl.constexpr(0)
DIAGONAL = tl.constexpr(1)
NEXT_DIAGONAL = tl.constexpr(2)
TABLES = tl.constexpr(3)  # for each axis


@triton.jit
def row_table(tables, KIND: tl.constexpr, p, GRID: tl.constexpr):
    """Of the interpolation along rows: `tables` is where one scale's begin; zero beyond the grid."""
    return tl.load(tables + KIND * GRID[0] + p, mask=(p >= 0) & (p < GRID[0]), other=0.0)


@triton.jit
def column_table(tables, KIND: tl.constexpr, q, GRID: tl.constexpr):
    """Of the interpolation along columns."""
    ptrs = tables + TABLES * GRID[0] + KIND * GRID[1] + q
    return tl.load(ptrs, mask=(q >= 0) & (q < GRID[1]), other=0.0)


@functools.cache  # a few kilobytes each, and never freed: a CUDA graph replays with their addresses
def interpolation_tables(
    sizes: tuple[tuple[int, int], ...], grid: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """For each scale, along rows, then columns: column sums of U, diagonal and next diagonal of U^T U.

    (S, 3 (P_h + P_w)), from the weights as the kernels round them.

    Raises:
        RuntimeError: they are first needed while a CUDA graph is captured, which allows no copy from the host.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"maps: expected sizes that were run before a CUDA graph is captured, got {sizes} for the first time: run "
            "the module once with such maps, then capture"
        )
    # By a thread of its own: torch.compile's CUDA graphs take all that this one allocates for theirs, and refuse what
    # is kept; and it has no default device.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(_interpolation_tables, sizes, grid, dtype, device).result()


def _interpolation_tables(
    sizes: tuple[tuple[int, int], ...], grid: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
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


# Token grids and tiles of maps


@triton.jit
def load_grid(ptr, p, q, offs_all, mask_c, GRID: tl.constexpr, TOTAL: tl.constexpr, ACC: tl.constexpr):
    """Positions of one image's token grid (P_h, P_w, C), zero beyond it: [positions, channels]."""
    mask = (p >= 0) & (p < GRID[0]) & (q >= 0) & (q < GRID[1])
    ptrs = ptr + (p * GRID[1] + q)[:, None] * TOTAL + offs_all[None, :]
    return tl.load(ptrs, mask=mask[:, None] & mask_c[None, :], other=0.0).to(ACC)


# Parts of a transposed interpolation that programs with rows of windows write: what each row gives to its own row of
# tokens, to the one below it, and to the one above.
ROW_PARTS = tl.constexpr(3)


@triton.jit
def load_transposed(
    ptr, p, q, offs_all, mask_c, height, PARTS: tl.constexpr, GRID: tl.constexpr, TOTAL: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """Positions of the transposed interpolation of one image's map (PARTS, N, C): [positions, channels].

    A map with as many rows as the grid has given nothing to others, and no other part is written.
    """
    transposed = load_grid(ptr, p, q, offs_all, mask_c, GRID, TOTAL, ACC)
    if PARTS == ROW_PARTS:
        PART: tl.constexpr = GRID[0] * GRID[1] * TOTAL
        if height != GRID[0]:
            transposed += load_grid(ptr + PART, p - 1, q, offs_all, mask_c, GRID, TOTAL, ACC)
            transposed += load_grid(ptr + 2 * PART, p + 1, q, offs_all, mask_c, GRID, TOTAL, ACC)
    return transposed


@triton.jit
def load_origin(ptrs, mask, height, width, row_stride, column_stride, ACC: tl.constexpr):
    """What is taken off a map before it is summed, since any constant does: the median of three pixels, [channels].

    On the diagonal, away from the corners, which may have much in common: one pixel that is far off spoils no other.
    ptrs [channels] point to the first of all.
    """
    first = tl.load(ptrs + (height // 4 * row_stride + width // 4 * column_stride), mask=mask, other=0.0).to(ACC)
    middle = tl.load(ptrs + (height // 2 * row_stride + width // 2 * column_stride), mask=mask, other=0.0).to(ACC)
    last = tl.load(ptrs + (3 * height // 4 * row_stride + 3 * width // 4 * column_stride), mask=mask, other=0.0).to(ACC)
    return median(first, middle, last)


@triton.jit
def median(a, b, c):
    return tl.maximum(tl.minimum(a, b), tl.minimum(tl.maximum(a, b), c))


@triton.jit
def pairs(c_begin, h_begin, CHANNELS: tl.constexpr, height, TILE: tl.constexpr):
    """The rows of a tile are (row, channel) pairs, the channel fastest: channel, row, whether both exist: [pairs]."""
    pair = tl.arange(0, TILE.rows * TILE.channels)
    c, h = c_begin + pair % TILE.channels, h_begin + pair // TILE.channels
    return c, h, (c < CHANNELS) & (h < height)


@triton.jit
def of_pairs(vector, ROWS: tl.constexpr):
    """What each pair's channel has: [channels] -> [pairs]."""
    rows = tl.broadcast_to(vector[None, :], [ROWS, vector.shape[0]])
    return tl.reshape(rows, [ROWS * vector.shape[0]])


@triton.jit
def sum_pairs(tile, TILE: tl.constexpr):
    """[pairs, columns] -> [channels]."""
    return of_channels(tl.sum(tile, 1), TILE)


@triton.jit
def of_channels(vector, TILE: tl.constexpr):
    """The sum of what each channel's pairs have: [pairs] -> [channels]."""
    return tl.sum(tl.reshape(vector, [TILE.rows, TILE.channels]), 0)


@triton.jit
def map_pointers(ptr, b, pair_c, pair_h, offs_w, strides):
    """Of image b of a map (B, C_i, H_i, W_i): [pairs, columns]."""
    offs = pair_c * strides[1] + pair_h * strides[2]
    return ptr + b * strides[0] + offs[:, None] + (offs_w * strides[3])[None, :]


@triton.jit
def load_map(ptr, b, pair_c, pair_h, offs_w, mask, strides, ACC: tl.constexpr):
    """A tile of image b of a map (B, C_i, H_i, W_i): [pairs, columns]."""
    return tl.load(map_pointers(ptr, b, pair_c, pair_h, offs_w, strides), mask=mask, other=0.0).to(ACC)


@triton.jit
def in_two_parts(mean, ACC: tl.constexpr):
    """Means in float64 as ACC has them, and what that rounding takes off everywhere: [channels] each."""
    rounded = mean.to(ACC)
    return rounded, (mean - rounded.to(tl.float64)).to(ACC)


@triton.jit
def less_mean(x, up, mean, ROWS: tl.constexpr, ACC: tl.constexpr):
    """x + up - mean: [pairs, columns] twice, and [channels] in float64."""
    rounded, lost = in_two_parts(mean, ACC)
    return x - of_pairs(rounded, ROWS)[:, None] + up - of_pairs(lost, ROWS)[:, None]


@triton.jit
def interpolate(
    z_ptrs, mask_pair, pair_h, first, offs_w, row_step, column_step,
    TOKENS: tl.constexpr, GRID: tl.constexpr, TOTAL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """up(z) in a tile: rows by weighting two of them, then columns: [pairs, columns].

    z_ptrs [pairs] point to the channel's first token, `first` is the first column of the grid that the tile takes from.
    TOKENS is the tile's number.
    """
    if TOKENS == 0:
        return _load_row(z_ptrs + pair_h * GRID[1] * TOTAL, mask_pair, offs_w, GRID, TOTAL, ACC)
    else:
        offs_q = first + tl.arange(0, TOKENS)
        rows = interpolate_rows(z_ptrs, mask_pair, pair_h, offs_q, row_step, GRID, TOTAL, ACC)
        left, right, fraction = interpolation(offs_w, column_step, GRID[1], ACC)
        of_left, of_right = _columns(rows, left - first), _columns(rows, right - first)
        return of_left * (1.0 - fraction)[None, :] + of_right * fraction[None, :]


@triton.jit
def _load_row(z_ptrs, mask_pair, offs_q, GRID: tl.constexpr, TOTAL: tl.constexpr, ACC: tl.constexpr):
    """Columns of one row of the token grid for each pair, zero beyond it: [pairs, columns]."""
    mask = mask_pair[:, None] & (offs_q < GRID[1])[None, :]
    return tl.load(z_ptrs[:, None] + offs_q[None, :] * TOTAL, mask=mask, other=0.0).to(ACC)


@triton.jit
def interpolate_rows(
    z_ptrs, mask_pair, pair_h, offs_q, row_step,
    GRID: tl.constexpr, TOTAL: tl.constexpr, ACC: tl.constexpr, CHANNELS: tl.constexpr = 1,
):  # fmt: skip
    """Columns of the token grid in a map's rows, by weighting two of the grid's: [pairs, columns].

    CHANNELS neighbouring pairs are known to be of one row: what is loaded of them is one access.
    """
    top, bottom, fraction = interpolation(pair_h, row_step, GRID[0], ACC)
    top, bottom = top * GRID[1] * TOTAL, bottom * GRID[1] * TOTAL
    if CHANNELS != 1:
        top, bottom = tl.max_constancy(top, CHANNELS), tl.max_constancy(bottom, CHANNELS)
    above = _load_row(z_ptrs + top, mask_pair, offs_q, GRID, TOTAL, ACC)
    below = _load_row(z_ptrs + bottom, mask_pair, offs_q, GRID, TOTAL, ACC)
    return above * (1.0 - fraction)[:, None] + below * fraction[:, None]


@triton.jit
def _columns(rows, columns):
    """Some columns of each row: [rows, columns]. A number beyond the last column stands for the last."""
    columns = tl.minimum(columns, rows.shape[1] - 1)
    return tl.gather(rows, tl.broadcast_to(columns[None, :], [rows.shape[0], columns.shape[0]]), 1)
