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
from dca_kernels.triton_backend.grid import (
    first_window,
    layout_of,
    map_pointers,
    memory_of,
    norms_of,
    of_pairs,
    pairs,
    sum_pairs,
    tiles_of,
    window_begin,
    window_end,
)
from dca_kernels.triton_backend.parameters import affines_of, batch_norms_of
from dca_kernels.triton_backend.primitives import (
    blocks_before,
    kernel,
    load_vector,
    padded,
    split_program,
    sum_images,
)
from dca_kernels.triton_backend.tokens import Tokens
from dca_kernels.triton_backend.upsample import Saved
from dca_kernels.triton_backend.upsample_backward import load_relu_gradient, load_scale


@kernel
def _map_gradient_kernel(
    maps, z, douts, affines, used, through_statistics, dtokens, weights, dmaps, sums,
    SHAPE: tl.constexpr, LAYOUT: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    TILES: tl.constexpr, SUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of a tile of whole rows of one map, past the attention and through its pooling.

    maps, douts, dmaps (B, C_i, H_i, W_i), z, dtokens (B, N, C), used, through_statistics (2, C). SHARED is how many
    windows at most have a row of each map in common. sums (B, SUM_BLOCKS, 2, C): over the tile, of the pooling's
    gradient times x, and of the pooling's gradient: the shares of the depthwise projection.
    """
    b, tile = split_program(TILES.first[len(SHAPE.channels)])
    for i in tl.static_range(len(SHAPE.channels)):
        if (tile >= TILES.first[i]) & (tile < TILES.first[i + 1]):
            _map_gradient(
                x=maps[i], z=z, dout=douts[i], affines=affines, used=used, through_statistics=through_statistics,
                dtokens=dtokens, weight=weights[i], dmap=dmaps[i], sums=sums,
                b=b, tile=tile - TILES.first[i], i=i, SHAPE=SHAPE, LAYOUT=LAYOUT, SHARED=SHARED,
                PRECISION=PRECISION, ACC=ACC, TILES=TILES, SUM_BLOCKS=SUM_BLOCKS,
            )  # fmt: skip


@triton.jit
def _map_gradient(
    x, z, dout, affines, used, through_statistics, dtokens, weight, dmap, sums, b, tile,
    i: tl.constexpr, SHAPE: tl.constexpr, LAYOUT: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, TILES: tl.constexpr, SUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """`_map_gradient_kernel` for tile `tile` of image b and scale i."""
    GRID: tl.constexpr = LAYOUT.grid
    TOTAL: tl.constexpr = SHAPE.total
    SIZE: tl.constexpr = LAYOUT.of[i].size
    NORM: tl.constexpr = LAYOUT.of[i].norm
    TILE: tl.constexpr = TILES.of[i]
    ROWS: tl.constexpr = triton.cdiv(SIZE[0], TILE.rows)
    c_begin, h_begin = tile // ROWS * TILE.channels, tile % ROWS * TILE.rows
    pixels, y, gradient = load_relu_gradient(
        x=x, z=z, dout=dout, affines=affines, used=used, b=b, c_begin=c_begin, h_begin=h_begin, i=i, SHAPE=SHAPE,
        LAYOUT=LAYOUT, PRECISION=PRECISION, ACC=ACC, TILES=TILES, BY_PRODUCT=False,
    )  # fmt: skip
    offs_c = c_begin + tl.arange(0, TILE.channels)
    mask_c = offs_c < SHAPE.channels[i]
    offs_all = SHAPE.offsets[i] + offs_c
    if (NORM is not None) and NORM.from_batch:
        constant = load_vector(through_statistics, offs_all, mask_c, ACC)
        multiple = load_vector(through_statistics + TOTAL, offs_all, mask_c, ACC)
        gradient -= of_pairs(constant, TILE.rows)[:, None] + y * of_pairs(multiple, TILE.rows)[:, None]
    if NORM is not None:
        scale = load_scale(used, affines, offs_c, offs_all, mask_c, i, NORM.eps, TOTAL, ACC)
        gradient *= of_pairs(scale, TILE.rows)[:, None]

    pair_c, pair_h, mask_pair = pairs(c_begin, h_begin, SHAPE.channels[i], SIZE[0], TILE)
    offs_w = tl.arange(0, TILE.columns)
    offs_q = tl.arange(0, padded(GRID[1]))
    image = dtokens + b * GRID[0] * GRID[1] * TOTAL + SHAPE.offsets[i]
    rows = _load_windows(
        dtokens_ptrs=image + pair_c[:, None] + (offs_q * TOTAL)[None, :], pair_h=pair_h, mask_pair=mask_pair,
        offs_q=offs_q, HEIGHT=SIZE[0], GRID=GRID, SHARED=SHARED[i], TOTAL=TOTAL, ACC=ACC,
    )  # fmt: skip
    pooled = _unpool(rows, offs_q, offs_w, SIZE[1], GRID[1], PRECISION, ACC)
    if dmap is not None:
        GRADIENT_STRIDE: tl.constexpr = LAYOUT.of[i].gradient_stride
        weights = load_vector(weight, offs_c, mask_c, ACC)
        gradient += pooled * of_pairs(weights, TILE.rows)[:, None]
        mask = mask_pair[:, None] & (offs_w < SIZE[1])[None, :]
        ptrs = map_pointers(dmap + b * GRADIENT_STRIDE[0], pair_c, pair_h, offs_w, GRADIENT_STRIDE)
        tl.store(ptrs, gradient, mask=mask)
    sums_ptrs = sums + (b * SUM_BLOCKS + tile % ROWS) * 2 * TOTAL + offs_all
    tl.store(sums_ptrs, sum_pairs(pooled * pixels, TILE), mask=mask_c)
    tl.store(sums_ptrs + TOTAL, sum_pairs(rows, TILE), mask=mask_c)  # each window's value, once a column


@triton.jit
def _load_windows(
    dtokens_ptrs, pair_h, mask_pair, offs_q,
    HEIGHT: tl.constexpr, GRID: tl.constexpr, SHARED: tl.constexpr, TOTAL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The tokens' gradients over their windows' heights, of the windows that hold each pair's row: [pairs, windows]."""
    rows = tl.zeros(dtokens_ptrs.shape, ACC)
    for k in tl.static_range(SHARED):
        p = first_window(pair_h, HEIGHT, GRID[0]) + k
        begin, end = window_begin(p, HEIGHT, GRID[0]), window_end(p, HEIGHT, GRID[0])
        inside = mask_pair & (p < GRID[0]) & (begin <= pair_h) & (pair_h < end)
        mask = inside[:, None] & (offs_q < GRID[1])[None, :]
        gradient = tl.load(dtokens_ptrs + (p * GRID[1] * TOTAL)[:, None], mask=mask, other=0.0)
        rows += gradient.to(ACC) / (end - begin).to(ACC)[:, None]
    return rows


@triton.jit
def _unpool(rows, offs_q, offs_w, SIZE: tl.constexpr, GRID: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """[pairs, windows] -> [pairs, columns]: each window's value over its width, summed where two windows meet."""
    WIDTH: tl.constexpr = SIZE // GRID
    if offs_q.shape[0] * WIDTH == offs_w.shape[0] and SIZE % GRID == 0:
        repeated = tl.broadcast_to(rows[:, :, None], [rows.shape[0], rows.shape[1], WIDTH])
        return tl.reshape(repeated, [rows.shape[0], offs_w.shape[0]]) / WIDTH
    begin, end = window_begin(offs_q, SIZE, GRID), window_end(offs_q, SIZE, GRID)
    inside = (begin[:, None] <= offs_w[None, :]) & (offs_w[None, :] < end[:, None]) & (offs_q < GRID)[:, None]
    windows = tl.where(inside, 1.0 / (end - begin).to(ACC)[:, None], 0.0)
    return tl.dot(rows, windows, input_precision=PRECISION, out_dtype=ACC)  # [pairs, windows] [windows, columns]


@kernel
def _patch_embed_gradients_kernel(
    sums, out, batch,
    SHAPE: tl.constexpr, ACC: tl.constexpr, BLOCKS: tl.constexpr, SUM_BLOCKS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: weight or bias, out (2, C), of BLOCK_C channels of a scale, over images and tiles in a fixed order.

    sums (B, SUM_BLOCKS, 2, C), of scale i in BLOCKS[i] blocks.
    """
    TOTAL: tl.constexpr = SHAPE.total
    TILES: tl.constexpr = blocks_before(SHAPE.channels, BLOCK_C, len(SHAPE.channels))
    k, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    for i in tl.static_range(len(SHAPE.channels)):
        block = tile - blocks_before(SHAPE.channels, BLOCK_C, i)
        if (block >= 0) & (block < triton.cdiv(SHAPE.channels[i], BLOCK_C)):
            offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
            mask_c = offs_c < SHAPE.channels[i]
            offs = k * TOTAL + SHAPE.offsets[i] + offs_c
            gradient = sum_images(sums, offs, mask_c, batch, BLOCKS[i], 2 * TOTAL, SUM_BLOCKS * 2 * TOTAL, ACC)
            tl.store(out + offs, gradient, mask=mask_c)


class Gradients(NamedTuple):
    """Of the depthwise projections: weight and bias."""

    projections: Tensor  # (2, C)

    @classmethod
    def empty(cls, tokens: Tokens, dtype: torch.dtype) -> "Gradients":
        """Fresh memory for those of an embedding into these tokens, in the parameters' dtype."""
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
    layout = layout_of(maps, grid, norms_of(contract.norms), douts, dmaps)
    sizes = layout.sizes
    widest = max([width for _, width in sizes])
    config = launcher.config("map_gradient" + memory_of(maps), widest)
    tiles = tiles_of(shape, sizes, config["tile"], config["block_c"], launch.padded(widest))
    blocks = tuple([launch.blocks(size[0], tile.rows) for size, tile in zip(sizes, tiles.of, strict=True)])
    sums = tokens.empty(batch, max(blocks), 2, shape.total)
    launcher(
        _map_gradient_kernel, config, batch * tiles.first[-1],
        maps=tuple(maps), z=saved.z, douts=tuple(douts), affines=batch_norms_of(contract.norms), used=saved.used,
        through_statistics=through_statistics, dtokens=dtokens, weights=affines_of(contract.patch_embed).weight,
        dmaps=tuple(dmaps), sums=sums, LAYOUT=layout,
        SHARED=tuple([_shared_windows(size[0], grid[0]) for size in sizes]), TILES=tiles, SUM_BLOCKS=max(blocks),
    )  # fmt: skip

    config = launcher.config("patch_embed_gradients")
    gradients = Gradients.empty(tokens, contract.patch_embed[0].weight.dtype)
    launcher(
        _patch_embed_gradients_kernel, config, 2 * sum([launch.blocks(c, config["block_c"]) for c in shape.channels]),
        sums=sums, out=gradients.projections, batch=batch, BLOCKS=blocks, SUM_BLOCKS=max(blocks),
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
