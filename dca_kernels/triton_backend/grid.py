"""Between a skip map and the token grid: windows, interpolation, and the tiles in which kernels go over a map."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from dca_kernels.contract import BatchNorm
from dca_kernels.triton_backend import launch
from dca_kernels.triton_backend.primitives import Shape, padded

# What kernels take as constants


class Norm(NamedTuple):
    """The numbers of one BatchNorm: see `dca_kernels.contract.BatchNorm`. Only a forward updates buffers."""

    eps: float
    from_batch: bool
    updates: bool = False
    momentum: float | None = None


class Map(NamedTuple):
    """One scale.

    Attributes:
        size: (H_i, W_i).
        stride: of the map (B, C_i, H_i, W_i).
        norm: its BatchNorm, where there is one and the kernel has to do with it.
        out_stride: of the output or of its gradient.
        gradient_stride: of the map's gradient.
        window: rows and columns of the largest pooling window.
    """

    size: tuple[int, int]
    stride: tuple[int, ...]
    norm: Norm | None = None
    out_stride: tuple[int, ...] | None = None
    gradient_stride: tuple[int, ...] | None = None
    window: tuple[int, int] | None = None


class Layout(NamedTuple):
    """The token grid (P_h, P_w) and the maps of all scales."""

    grid: tuple[int, int]
    of: tuple[Map, ...]

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(H_i, W_i) of each map."""
        return tuple([one.size for one in self.of])


class Tile(NamedTuple):
    """How many channels, rows and columns of a map one program has."""

    channels: int
    rows: int
    columns: int


class Tiles(NamedTuple):
    """The tile of each scale, and where its programs begin within an image; the last number is that of all."""

    of: tuple[Tile, ...]
    first: tuple[int, ...]


def layout_of(
    maps: Sequence[Tensor],
    grid: tuple[int, int],
    norms: Sequence[Norm | None] | None = None,
    outs: Sequence[Tensor] | None = None,
    gradients: Sequence[Tensor | None] | None = None,
) -> Layout:
    """Of S maps, their BatchNorms, the outputs (or their gradients) and the maps' gradients, where there are any."""
    scales = []
    for i, x in enumerate(maps):
        _, _, height, width = x.shape
        norm = None if norms is None else norms[i]
        out_stride = None if outs is None else outs[i].stride()
        gradient = None if gradients is None else gradients[i]
        gradient_stride = None if gradient is None else gradient.stride()
        scales.append(Map((height, width), x.stride(), norm, out_stride, gradient_stride))
    return Layout(grid, tuple(scales))


def norms_of(norms: Sequence[BatchNorm | None], updates: bool = False) -> tuple[Norm | None, ...]:
    """The numbers of S BatchNorms, None where there is none; with those of `updates` for a forward."""
    found = []
    for norm in norms:
        rule = (norm.updates, norm.momentum) if norm is not None and updates else ()
        found.append(None if norm is None else Norm(norm.eps, norm.from_batch, *rule))
    return tuple(found)


def memory_of(maps: Sequence[Tensor]) -> str:
    """Which rows of `configurations.json` the maps' kernels take: those of channels_last where all maps are."""
    return "_channels_last" if all(x.stride(1) == 1 for x in maps) else "_contiguous"


@functools.cache
def tiles_of(shape: Shape, sizes: tuple[tuple[int, int], ...], elements: int, most_c: int, most_w: int) -> Tiles:
    """Tiles of at most `elements`, `most_c` channels and `most_w` columns.

    Products need 16 rows (pairs of row and channel) and columns.
    """
    tiles, first = [], [0]
    for c, (height, width) in zip(shape.channels, sizes, strict=True):
        columns = min(most_w, launch.padded(width))
        pairs = max(16, elements // columns)
        channels = min(most_c, launch.padded(c), pairs)
        tiles.append(Tile(channels, pairs // channels, columns))
        extents = zip((c, height, width), tiles[-1], strict=True)
        first.append(first[-1] + math.prod(launch.blocks(extent, block) for extent, block in extents))
    return Tiles(tuple(tiles), tuple(first))


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
def window_begin(window, SIZE: tl.constexpr, WINDOWS: tl.constexpr):
    """Where a window of adaptive average pooling begins."""
    if SIZE % WINDOWS == 0:
        return window * (SIZE // WINDOWS)
    return quotient(window * SIZE, WINDOWS)


@triton.jit
def window_end(window, SIZE: tl.constexpr, WINDOWS: tl.constexpr):
    """Where it ends; neighbouring windows may have a position in common."""
    if SIZE % WINDOWS == 0:
        return (window + 1) * (SIZE // WINDOWS)
    return quotient((window + 1) * SIZE + WINDOWS - 1, WINDOWS)


@triton.jit
def first_window(position, SIZE: tl.constexpr, WINDOWS: tl.constexpr):
    """A window not after the first that holds a position."""
    if SIZE % WINDOWS == 0:
        return quotient(position, SIZE // WINDOWS)
    return quotient(position * WINDOWS, SIZE)


# Bilinear interpolation, align_corners=True, from LOW positions to HIGH: the matrix U


@triton.jit
def interpolation(offs, HIGH: tl.constexpr, LOW: tl.constexpr, ACC: tl.constexpr):
    """As PyTorch computes it: left and right neighbour of high-resolution positions, the weight of the right one."""
    position = _position(offs, HIGH, LOW, ACC)
    left = tl.minimum(position.to(tl.int32), LOW - 1)
    return left, tl.minimum(left + 1, LOW - 1), position - left.to(ACC)


@triton.jit
def _position(offs, HIGH: tl.constexpr, LOW: tl.constexpr, ACC: tl.constexpr):
    """Of high-resolution positions among the low-resolution ones."""
    STEP: tl.constexpr = (LOW - 1) / (HIGH - 1) if HIGH > 1 else 0.0
    return offs.to(ACC) * STEP


@triton.jit
def interpolation_matrix(offs_low, offs_high, HIGH: tl.constexpr, LOW: tl.constexpr, ACC: tl.constexpr):
    """The weight of each low-resolution position in each high-resolution one: [low, high]."""
    apart = _position(offs_high, HIGH, LOW, ACC)[None, :] - offs_low.to(ACC)[:, None]
    return tl.maximum(1.0 - tl.abs(apart), 0.0)


@triton.jit
def weight_in_row(p, h, HIGH: tl.constexpr, LOW: tl.constexpr, ACC: tl.constexpr):
    """The weight of low-resolution row p in high-resolution row h."""
    top, bottom, fraction = interpolation(h, HIGH, LOW, ACC)
    return tl.where(top == p, 1.0 - fraction, 0.0) + tl.where(bottom == p, fraction, 0.0)


@triton.constexpr_function
def band(high, low, count):
    """How many high-resolution positions at most take from `count` neighbouring low-resolution ones."""
    if low == 1:
        return high
    return min(high, math.ceil((count + 1) * (high - 1) / (low - 1)) + 2)


@triton.jit
def band_begin(position, HIGH: tl.constexpr, LOW: tl.constexpr):
    """A high-resolution position not after the first that takes from a low-resolution one."""
    if LOW == 1:
        return position * 0
    return quotient(tl.maximum(position - 1, 0) * (HIGH - 1), LOW - 1)


@triton.constexpr_function
def _columns_needed(block, high, low):
    """How many low-resolution columns at most `block` neighbouring high-resolution ones take from."""
    if high == 1:
        return 1
    return min(low, (block - 1) * (low - 1) // (high - 1) + 3)


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


@triton.jit
def pairs(c_begin, h_begin, CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, TILE: tl.constexpr):
    """The rows of a tile are (row, channel) pairs, the channel fastest: channel, row, whether both exist: [pairs]."""
    pair = tl.arange(0, TILE.rows * TILE.channels)
    c, h = c_begin + pair % TILE.channels, h_begin + pair // TILE.channels
    return c, h, (c < CHANNELS) & (h < HEIGHT)


@triton.jit
def of_pairs(vector, ROWS: tl.constexpr):
    """What each pair's channel has: [channels] -> [pairs]."""
    rows = tl.broadcast_to(vector[None, :], [ROWS, vector.shape[0]])
    return tl.reshape(rows, [ROWS * vector.shape[0]])


@triton.jit
def sum_pairs(tile, TILE: tl.constexpr):
    """[pairs, columns] -> [channels]."""
    return tl.sum(tl.reshape(tl.sum(tile, 1), [TILE.rows, TILE.channels]), 0)


@triton.jit
def map_pointers(ptr, pair_c, pair_h, offs_w, STRIDE: tl.constexpr):
    """Of one image (C_i, H_i, W_i): [pairs, columns]."""
    offs = pair_c * STRIDE[1] + pair_h * STRIDE[2]
    return ptr + offs[:, None] + (offs_w * STRIDE[3])[None, :]


@triton.jit
def load_map(ptr, pair_c, pair_h, offs_w, mask, STRIDE: tl.constexpr, ACC: tl.constexpr):
    """A tile of one image (C_i, H_i, W_i): [pairs, columns]."""
    return tl.load(map_pointers(ptr, pair_c, pair_h, offs_w, STRIDE), mask=mask, other=0.0).to(ACC)


@triton.jit
def less_mean(x, up, mean, ROWS: tl.constexpr, ACC: tl.constexpr):
    """x + up - mean: [pairs, columns] twice, and [channels] in float64.

    What is lost when the mean is rounded is the same everywhere, and taken off as well.
    """
    rounded = mean.to(ACC)
    lost = (mean - rounded.to(tl.float64)).to(ACC)
    return x - of_pairs(rounded, ROWS)[:, None] + up - of_pairs(lost, ROWS)[:, None]


@triton.jit
def interpolate(
    z_ptrs, mask_pair, pair_h, w_begin, offs_w,
    SIZE: tl.constexpr, GRID: tl.constexpr, TOTAL: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BY_PRODUCT: tl.constexpr = False,
):  # fmt: skip
    """up(z) in a tile: rows by weighting two of them, then columns: [pairs, columns].

    z_ptrs [pairs] point to the channel's first token. BY_PRODUCT: columns by a product with the interpolation's matrix,
    where that is needed anyway. It rounds up(z) to what the products have, less than z itself is rounded.
    """
    if (SIZE[0] == GRID[0]) and (SIZE[1] == GRID[1]):
        z_ptrs += pair_h * GRID[1] * TOTAL
        mask = mask_pair[:, None] & (offs_w < SIZE[1])[None, :]
        return tl.load(z_ptrs[:, None] + offs_w[None, :] * TOTAL, mask=mask, other=0.0).to(ACC)
    K: tl.constexpr = padded(_columns_needed(offs_w.shape[0], SIZE[1], GRID[1]))
    first, _, _ = interpolation(w_begin, SIZE[1], GRID[1], ACC)
    offs_q = first + tl.arange(0, K)
    top, bottom, fraction = interpolation(pair_h, SIZE[0], GRID[0], ACC)
    above_ptrs, below_ptrs = z_ptrs + top * GRID[1] * TOTAL, z_ptrs + bottom * GRID[1] * TOTAL
    mask = mask_pair[:, None] & (offs_q < GRID[1])[None, :]
    above = tl.load(above_ptrs[:, None] + offs_q[None, :] * TOTAL, mask=mask, other=0.0).to(ACC)
    below = tl.load(below_ptrs[:, None] + offs_q[None, :] * TOTAL, mask=mask, other=0.0).to(ACC)
    rows = above * (1.0 - fraction)[:, None] + below * fraction[:, None]  # [pairs, K]
    if BY_PRODUCT:
        matrix = interpolation_matrix(offs_q, offs_w, SIZE[1], GRID[1], ACC)
        return tl.dot(rows, matrix, input_precision=PRECISION, out_dtype=ACC)  # [pairs, K] [K, columns]
    left, right, fraction = interpolation(offs_w, SIZE[1], GRID[1], ACC)
    return _columns(rows, left - first) * (1.0 - fraction)[None, :] + _columns(rows, right - first) * fraction[None, :]


@triton.jit
def _columns(rows, columns):
    """Some columns of each row: [rows, columns]. A number beyond the last column stands for the last."""
    columns = tl.minimum(columns, rows.shape[1] - 1)
    return tl.gather(rows, tl.broadcast_to(columns[None, :], [rows.shape[0], columns.shape[0]]), 1)
