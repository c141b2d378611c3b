"""The end of the backward, of stages 4 and 1 in one pass: the maps' gradients, past the attention and through it."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dca_kernels.contract import Affine, Contract, memory_format
from dca_kernels.triton_backend import launch
from dca_kernels.triton_backend.batch_norm import load_scale
from dca_kernels.triton_backend.grid import (
    first_window,
    map_pointers,
    of_pairs,
    pairs,
    sum_pairs,
    window_begin,
    window_end,
)
from dca_kernels.triton_backend.layout import (
    backward_config,
    has_tile,
    layout_of,
    norms_of,
    size_arguments,
    size_of,
    sizes_of,
    split_tiles,
    strides_of,
    tiles_of,
)
from dca_kernels.triton_backend.parameters import affines_of, batch_norms_of, gradient_dtype
from dca_kernels.triton_backend.primitives import (
    argument,
    divide,
    first_blocks,
    kernel,
    load_vector,
    number,
    of_scale,
    padded,
    scale_of,
    sum_images,
)
from dca_kernels.triton_backend.tokens import Tokens
from dca_kernels.triton_backend.upsample import Saved
from dca_kernels.triton_backend.upsample_backward import load_relu_gradient
from dca_kernels.triton_backend.upsample_rows import _map_gradient_rows_kernel, tiles_of_rows


@kernel
def _map_gradient_kernel(
    maps, z, douts, affines, used, through_statistics, dtokens, weights, dmaps, sums, sizes, counts,
    sum_blocks,
    SHAPE: tl.constexpr, LAYOUT: tl.constexpr, SHARED_ROWS: tl.constexpr, SHARED_COLUMNS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of a tile of whole rows of one map, past the attention and through its pooling.

    maps, douts, dmaps (B, C_i, H_i, W_i), z, dtokens (B, N, C), used, through_statistics (2, C). SHARED_ROWS
    and SHARED_COLUMNS are how many windows at most have a row, a column of each map in common. sums (B, sum_blocks, 2,
    C): over the tile, of the pooling's gradient times x, and of the pooling's gradient: the shares of the depthwise
    projection.
    """
    b, tile = split_tiles(counts)
    for i in tl.static_range(len(SHAPE.channels)):
        if has_tile(tile, counts, i):
            _map_gradient(
                x=maps[i], z=z, dout=douts[i], affines=affines, used=used, through_statistics=through_statistics,
                dtokens=dtokens, weight=weights[i], dmap=dmaps[i], sums=sums + b * sum_blocks * 2 * SHAPE.total,
                b=b, tile=tile - number(counts.first[i]), sizes=sizes, counts=counts, i=i, SHAPE=SHAPE, LAYOUT=LAYOUT,
                SHARED_ROWS=SHARED_ROWS[i], SHARED_COLUMNS=SHARED_COLUMNS[i], ACC=ACC,
            )  # fmt: skip


@triton.jit
def _map_gradient(
    x, z, dout, affines, used, through_statistics, dtokens, weight, dmap, sums, b, tile, sizes, counts,
    i: tl.constexpr, SHAPE: tl.constexpr, LAYOUT: tl.constexpr, SHARED_ROWS: tl.constexpr,
    SHARED_COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """`_map_gradient_kernel` for tile `tile` of image b and scale i; sums are those of image b."""
    GRID: tl.constexpr = LAYOUT.grid
    TOTAL: tl.constexpr = SHAPE.total
    MAP: tl.constexpr = LAYOUT.of[i]
    NORM: tl.constexpr = MAP.norm
    TILE: tl.constexpr = MAP.tile
    height, width = size_of(sizes, i, LAYOUT, i)
    block, row = divide(tile, counts.rows[i])
    c_begin, h_begin = block * TILE.channels, row * TILE.rows
    pixels, y, gradient = load_relu_gradient(
        x=x, z=z, dout=dout, affines=affines, used=used, b=b, c_begin=c_begin, h_begin=h_begin, sizes=sizes,
        height=height, width=width, i=i, SHAPE=SHAPE, LAYOUT=LAYOUT, ACC=ACC,
    )  # fmt: skip
    offs_c = c_begin + tl.arange(0, TILE.channels)
    mask_c = offs_c < SHAPE.channels[i]
    offs_all = SHAPE.offsets[i] + offs_c
    if (NORM is not None) and NORM.from_batch:
        constant = load_vector(through_statistics, offs_all, mask_c, ACC)
        multiple = load_vector(through_statistics + TOTAL, offs_all, mask_c, ACC)
        gradient -= of_pairs(constant, TILE.rows)[:, None] + y * of_pairs(multiple, TILE.rows)[:, None]
    if NORM is not None:
        scale = load_scale(used, affines, offs_c, offs_all, mask_c, i, LAYOUT, i, TOTAL, ACC)
        gradient *= of_pairs(scale, TILE.rows)[:, None]

    pair_c, pair_h, mask_pair = pairs(c_begin, h_begin, SHAPE.channels[i], height, TILE)
    offs_w = tl.arange(0, TILE.columns)
    offs_q = tl.arange(0, padded(GRID[1]))
    image = dtokens + b * GRID[0] * GRID[1] * TOTAL + SHAPE.offsets[i]
    rows = _load_windows(
        dtokens_ptrs=image + pair_c[:, None] + (offs_q * TOTAL)[None, :], pair_h=pair_h, mask_pair=mask_pair,
        offs_q=offs_q, height=height, GRID=GRID, SHARED=SHARED_ROWS, TOTAL=TOTAL, ACC=ACC,
    )  # fmt: skip
    pooled = _unpool(rows, offs_q, offs_w, width, MAP.windows[1], GRID[1], SHARED_COLUMNS, ACC)
    if dmap is not None:
        weights = load_vector(weight, offs_c, mask_c, ACC)
        gradient += pooled * of_pairs(weights, TILE.rows)[:, None]
        mask = mask_pair[:, None] & (offs_w < width)[None, :]
        STRIDE: tl.constexpr = MAP.gradient_stride
        strides = strides_of(STRIDE, height, width)
        tl.store(map_pointers(dmap, b, pair_c, pair_h, offs_w, strides), gradient, mask=mask)
    sums_ptrs = sums + row * 2 * TOTAL + offs_all
    tl.store(sums_ptrs, sum_pairs(pooled * pixels, TILE), mask=mask_c)
    tl.store(sums_ptrs + TOTAL, sum_pairs(rows, TILE), mask=mask_c)  # each window's value, once a column


@triton.jit
def _load_windows(
    dtokens_ptrs, pair_h, mask_pair, offs_q, height,
    GRID: tl.constexpr, SHARED: tl.constexpr, TOTAL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The tokens' gradients over their windows' heights, of the windows that hold each pair's row: [pairs, windows]."""
    rows = tl.zeros(dtokens_ptrs.shape, ACC)
    for k in tl.static_range(SHARED):
        p = first_window(pair_h, height, GRID[0]) + k
        begin, end = window_begin(p, height, GRID[0]), window_end(p, height, GRID[0])
        inside = mask_pair & (p < GRID[0]) & (begin <= pair_h) & (pair_h < end)
        mask = inside[:, None] & (offs_q < GRID[1])[None, :]
        gradient = tl.load(dtokens_ptrs + (p * GRID[1] * TOTAL)[:, None], mask=mask, other=0.0)
        rows += gradient.to(ACC) / (end - begin).to(ACC)[:, None]
    return rows


@triton.jit
def _unpool(
    rows, offs_q, offs_w, width,
    WINDOW: tl.constexpr, GRID_WIDTH: tl.constexpr, SHARED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """[pairs, windows] -> [pairs, columns]: each window's value over its width, summed where windows meet.

    WINDOW is the width of all, where the padded windows are the padded columns.
    """
    if WINDOW is not None:
        repeated = tl.broadcast_to(rows[:, :, None], [rows.shape[0], rows.shape[1], WINDOW])
        return tl.reshape(repeated, [rows.shape[0], offs_w.shape[0]]) / WINDOW
    else:
        # Not by a product with a matrix of all windows and columns, which shared memory may not hold.
        rows /= (window_end(offs_q, width, GRID_WIDTH) - window_begin(offs_q, width, GRID_WIDTH)).to(ACC)[None, :]
        out = tl.zeros([rows.shape[0], offs_w.shape[0]], ACC)
        for k in tl.static_range(SHARED):
            q = first_window(offs_w, width, GRID_WIDTH) + k
            begin, end = window_begin(q, width, GRID_WIDTH), window_end(q, width, GRID_WIDTH)
            inside = (q < GRID_WIDTH) & (begin <= offs_w) & (offs_w < end)
            taken = tl.gather(rows, tl.broadcast_to(tl.where(inside, q, 0)[None, :], out.shape), 1)
            out += tl.where(inside[None, :], taken, 0.0)
        return out


@kernel
def _patch_embed_gradients_kernel(
    sums, out, batch, blocks, sum_blocks, SHAPE: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """One program: weight or bias, out (2, C), of BLOCK_C channels of a scale, over images and tiles in a fixed order.

    sums (B, sum_blocks, 2, C), of scale i in blocks[i] blocks.
    """
    TOTAL: tl.constexpr = SHAPE.total
    CHANNELS: tl.constexpr = SHAPE.channels
    OFFSETS: tl.constexpr = SHAPE.offsets
    FIRST: tl.constexpr = first_blocks(CHANNELS, BLOCK_C)
    k, tile = tl.program_id(0) // FIRST[len(CHANNELS)], tl.program_id(0) % FIRST[len(CHANNELS)]
    scale, block = scale_of(tile, FIRST)
    offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < of_scale(CHANNELS, scale)
    offs = k * TOTAL + of_scale(OFFSETS, scale) + offs_c
    gradient = sum_images(
        ptr=sums, offs=offs, mask=mask_c, batch=batch, blocks=number(of_scale(blocks, scale)), STRIDE=2 * TOTAL,
        image_stride=sum_blocks * 2 * TOTAL, ACC=ACC,
    )  # fmt: skip
    tl.store(out + offs, gradient, mask=mask_c)


class Gradients(NamedTuple):
    """Of the depthwise projections: weight and bias."""

    projections: Tensor  # (2, C)

    @classmethod
    def empty(cls, tokens: Tokens, dtype: torch.dtype) -> "Gradients":
        """Fresh memory for those of an embedding into these tokens, of `gradient_dtype`."""
        return cls(tokens.empty(2, tokens.shape.total, dtype=dtype))

    def split(self, channels: Sequence[int]) -> tuple[Affine, ...]:
        """As the contract has them: views."""
        return tuple(Affine(*affine) for affine in self.projections.split(channels, 1))


def map_gradients(
    saved: Saved,
    maps: Sequence[Tensor],
    through_statistics: Tensor,
    dtokens: Tensor,
    douts: Sequence[Tensor],
    contract: Contract,
    wanted: Sequence[bool],
) -> tuple[list[Tensor | None], Gradients]:
    """The gradients of the maps, past the attention and through their pooling, and of `patch_embed`'s parameters.

    Args:
        saved: what `upsample` returned.
        maps: S tensors (B, C_i, H_i, W_i).
        through_statistics: of what `upsample_backward` returned.
        dtokens: (B, N, C), the gradient of what `patch_embed` wrote.
        douts, contract: as in `upsample_backward`.
        wanted: which maps' gradients are.

    Returns:
        S tensors of the maps' shapes, None where not wanted; and the parameters' gradients.
    """
    tokens, launcher, batch, grid = saved.tokens, saved.tokens.launcher, saved.tokens.batch, contract.grid
    shape = launcher.shape
    dmaps = [
        torch.empty_like(x, memory_format=memory_format(x)) if want else None
        for x, want in zip(maps, wanted, strict=True)
    ]
    sizes = sizes_of(maps)
    widest, by_rows = max([width for _, width in sizes]), saved.by_rows
    shared = {}
    if by_rows:
        kernel, config = _map_gradient_rows_kernel, launcher.config("map_gradient_rows", widest)
        tiles = tiles_of_rows(shape, sizes, grid, config["tile"], config["rows"])
    else:
        kernel, config = _map_gradient_kernel, backward_config("map_gradient", launcher, maps, grid)
        tiles = tiles_of(shape, sizes, grid, config["tile"], config["block_c"], launch.padded(widest))
        shared["SHARED_ROWS"] = tuple([_shared_windows(height, grid[0]) for height, _ in sizes])
        shared["SHARED_COLUMNS"] = tuple([_shared_windows(width, grid[1]) for _, width in sizes])
    most = max(tiles.rows)
    sums = tokens.empty(batch, most, 2, shape.total)
    layout = layout_of(maps, grid, norms_of(contract.norms), douts, dmaps, tiles.of, by_rows=by_rows)
    launcher(
        kernel, config, batch * tiles.programs,
        maps=tuple(maps), z=saved.forms[-1], douts=tuple(douts), affines=batch_norms_of(contract.norms),
        used=saved.used, through_statistics=through_statistics, dtokens=dtokens,
        weights=affines_of(contract.patch_embed).weight, dmaps=tuple(dmaps), sums=sums,
        sizes=size_arguments(sizes, grid), counts=tiles.counts, sum_blocks=most, LAYOUT=layout, **shared,
    )  # fmt: skip

    config = launcher.config("patch_embed_gradients")
    gradients = Gradients.empty(tokens, gradient_dtype(contract))
    launcher(
        _patch_embed_gradients_kernel, config, 2 * sum([launch.blocks(c, config["block_c"]) for c in shape.channels]),
        sums=sums, out=gradients.projections, batch=batch, blocks=tuple(map(argument, tiles.rows)),
        sum_blocks=most,
    )  # fmt: skip
    return dmaps, gradients


@functools.cache
def _shared_windows(size: int, windows: int) -> int:
    """How many windows of `adaptive_avg_pool1d` at most have a position in common."""
    inside = [0] * size
    for w in range(windows):
        for position in range(w * size // windows, -(-(w + 1) * size // windows)):
            inside[position] += 1
    return max(inside)
