"""Stage 4: upsample the tokens and merge them with the skip maps."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dca_kernels.contract import Contract, from_batch, memory_format
from dca_kernels.triton_backend import launch
from dca_kernels.triton_backend.batch_norm import take_norm
from dca_kernels.triton_backend.batch_statistics import batch_statistics, counters_of
from dca_kernels.triton_backend.grid import (
    interpolate,
    interpolation,
    less_mean,
    load_map,
    map_pointers,
    of_pairs,
    pairs,
)
from dca_kernels.triton_backend.layout import (
    has_tile,
    layout_of,
    memory_of,
    norms_of,
    size_arguments,
    size_of,
    sizes_of,
    split_tiles,
    steps_of,
    strides_of,
    taken_by_rows,
    tiles_of,
)
from dca_kernels.triton_backend.parameters import affines_of, batch_norms_of, buffers_of
from dca_kernels.triton_backend.patch_embed import LessOrigin, Maps
from dca_kernels.triton_backend.primitives import (
    divide,
    first_blocks,
    kernel,
    largest,
    load_tokens,
    number,
    of_scale,
    padded,
    scale_of,
    split_program,
)
from dca_kernels.triton_backend.tokens import Tokens, widest_scale
from dca_kernels.triton_backend.upsample_rows import _upsample_rows_kernel, tiles_of_rows


@kernel
def _conv_kernel(
    tokens, weights, z, planes,
    SHAPE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: the 1x1 convolution, without its bias, of BLOCK_N tokens into BLOCK_C channels of one scale.

    tokens (B, N, C), weights (C_i, C_i). Writes z (B, N, C) or planes (B, C, N), or both. OPERAND is the dtype of the
    products.
    """
    N: tl.constexpr = SHAPE.tokens
    TOTAL: tl.constexpr = SHAPE.total
    CHANNELS: tl.constexpr = SHAPE.channels
    OFFSETS: tl.constexpr = SHAPE.offsets
    FIRST: tl.constexpr = first_blocks(CHANNELS, BLOCK_C)
    COLUMN_BLOCKS: tl.constexpr = FIRST[len(CHANNELS)]
    STEP: tl.constexpr = min(padded(largest(CHANNELS)), BLOCK_C)
    b, tile = split_program(triton.cdiv(N, BLOCK_N) * COLUMN_BLOCKS)
    scale, block = scale_of(tile % COLUMN_BLOCKS, FIRST)
    channels = of_scale(CHANNELS, scale)
    first = b * N * TOTAL + of_scale(OFFSETS, scale)
    weight = of_scale(weights, scale)
    offs_n = tile // COLUMN_BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_out = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_n, mask_out = offs_n < N, offs_out < channels
    out = tl.zeros([BLOCK_N, BLOCK_C], ACC)
    for start in range(0, channels, STEP):
        offs_in = start + tl.arange(0, STEP)
        mask_in = offs_in < channels
        rows = load_tokens(tokens + first, offs_n, offs_in, mask_n, mask_in, TOTAL).to(OPERAND)
        weight_ptrs = weight + offs_out[:, None] * channels + offs_in[None, :]
        columns = tl.load(weight_ptrs, mask=mask_out[:, None] & mask_in[None, :], other=0.0).to(OPERAND)
        # [BLOCK_N, STEP] [STEP, BLOCK_C]
        out = tl.dot(rows, tl.trans(columns), out, input_precision=PRECISION, out_dtype=ACC)
    mask = mask_n[:, None] & mask_out[None, :]
    if z is not None:
        tl.store(z + first + offs_n[:, None] * TOTAL + offs_out[None, :], out, mask=mask)
    if planes is not None:
        ptrs = planes + b * N * TOTAL + (of_scale(OFFSETS, scale) + offs_out)[None, :] * N
        tl.store(ptrs + offs_n[:, None], out, mask=mask)


@kernel
def _upsample_kernel(
    maps, z, biases, affines, buffers, outs, used, sizes, counts,
    SHAPE: tl.constexpr, LAYOUT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: relu(BatchNorm(up(z) + bias + x)) in one tile of channels, rows and columns of one map.

    z (B, N, C). Writes outs (B, C_i, H_i, W_i). used (2, C): see `batch_norm.take_norm`.
    """
    b, tile = split_tiles(counts)
    for i in tl.static_range(len(SHAPE.channels)):
        if has_tile(tile, counts, i):
            _upsample(
                x=maps[i], z=z, bias=biases[i], affines=affines, buffers=buffers,
                out=outs[i], used=used, b=b, tile=tile - number(counts.first[i]),
                sizes=sizes, counts=counts, i=i, SHAPE=SHAPE, LAYOUT=LAYOUT, ACC=ACC,
            )  # fmt: skip


@triton.jit
def _upsample(
    x, z, bias, affines, buffers, out, used, b, tile, sizes, counts,
    i: tl.constexpr, SHAPE: tl.constexpr, LAYOUT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """`_upsample_kernel` for tile `tile` of image b and scale i."""
    CHANNELS: tl.constexpr = SHAPE.channels[i]
    TOTAL: tl.constexpr = SHAPE.total
    GRID: tl.constexpr = LAYOUT.grid
    MAP: tl.constexpr = LAYOUT.of[i]
    STRIDE: tl.constexpr = MAP.stride
    OUT_STRIDE: tl.constexpr = MAP.out_stride
    TILE: tl.constexpr = MAP.tile
    height, width = size_of(sizes, i, LAYOUT, i)
    row, column = divide(tile, counts.columns[i])
    block, row = divide(row, counts.rows[i])
    c_begin, h_begin, w_begin = block * TILE.channels, row * TILE.rows, column * TILE.columns

    is_first = (b == 0) & (h_begin == 0) & (w_begin == 0)
    mean, factor, shift = take_norm(bias, affines, buffers, used, c_begin, is_first, i, SHAPE, LAYOUT, ACC)
    pair_c, pair_h, mask_pair = pairs(c_begin, h_begin, CHANNELS, height, TILE)
    offs_w = w_begin + tl.arange(0, TILE.columns)
    mask = mask_pair[:, None] & (offs_w < width)[None, :]
    z_ptrs = z + b * GRID[0] * GRID[1] * TOTAL + SHAPE.offsets[i] + pair_c
    row_step, column_step = steps_of(sizes, i, height, width, LAYOUT, i, ACC)
    first, _, _ = interpolation(w_begin, column_step, GRID[1], ACC)
    up = interpolate(
        z_ptrs=z_ptrs, mask_pair=mask_pair, pair_h=pair_h, first=first, offs_w=offs_w, row_step=row_step,
        column_step=column_step, TOKENS=TILE.tokens, GRID=GRID, TOTAL=TOTAL, ACC=ACC,
    )  # fmt: skip
    pixels = load_map(x, b, pair_c, pair_h, offs_w, mask, strides_of(STRIDE, height, width), ACC)
    y = less_mean(pixels, up, mean, TILE.rows, ACC)  # [pairs, columns]
    if MAP.norm is not None:
        y = y * of_pairs(factor, TILE.rows)[:, None] + of_pairs(shift, TILE.rows)[:, None]
        y = tl.where(y < 0, 0.0, y)  # keeps NaN
    tl.store(map_pointers(out, b, pair_c, pair_h, offs_w, strides_of(OUT_STRIDE, height, width)), y, mask=mask)


class Saved(NamedTuple):
    """What the backward needs beside the maps, which the network holds anyway.

    Attributes:
        tokens: (B, N, C).
        forms: (1 or 2, B, N, C), the convolution of the tokens, z: as it is, where there will be a backward or a
            BatchNorm takes the batch's statistics; and as the passes over the maps take it, (B, C, N) by rows.
        less_origin: of the maps whose BatchNorm takes the batch's statistics.
        used: (2, C) in float64, mean without the convolution's bias, and variance, that BatchNorm took; where there
            will be a backward or a BatchNorm takes the batch's.
    """

    tokens: Tokens
    forms: Tensor
    less_origin: LessOrigin | None
    used: Tensor | None

    @property
    def z(self) -> Tensor:
        """(B, N, C), of a backward."""
        return self.forms[0]

    @property
    def by_rows(self) -> bool:
        """Whether `upsample_rows` has the passes over the maps of a backward."""
        return self.forms.shape[0] == 2

    @classmethod
    def empty(cls, tokens: Tokens, less_origin: LessOrigin | None, by_rows: bool, contract: Contract) -> "Saved":
        """These, and fresh memory for what else the forward saves."""
        twice = contract.backward or any(from_batch(contract))
        used = tokens.empty(2, tokens.shape.total, dtype=torch.float64) if twice else None
        forms = tokens.plain.new_empty((2 if twice and by_rows else 1, *tokens.plain.shape))
        return cls(Tokens(tokens.plain, tokens.channels), forms, less_origin, used)


def upsample(tokens: Tokens, maps: Maps, contract: Contract) -> tuple[list[Tensor], Saved]:
    """1x1 convolution at the grid's size, bilinear upsampling, raw map added, BatchNorm, ReLU (paper, eq. 5).

    Args:
        tokens: the tokens.
        maps: what `patch_embed` returned.
        contract: of the call.

    Returns:
        S tensors (B, C_i, H_i, W_i) in the contract's output dtypes, channels_last where the map is; and what the
        backward needs. BatchNorm's running buffers are updated.
    """
    launcher, batch, shape = tokens.launcher, tokens.batch, tokens.shape
    moments = maps.moments
    by_rows = taken_by_rows(maps.maps, contract.grid)
    saved = Saved.empty(tokens, None if moments is None else moments.less_origin, by_rows, contract)
    config = launcher.config("conv", widest_scale(shape))
    column_blocks = sum([launch.blocks(c, config["block_c"]) for c in shape.channels])
    launcher(
        _conv_kernel, config, batch * launch.blocks(shape.tokens, config["block_n"]) * column_blocks,
        tokens=tokens.plain, weights=affines_of(contract.upsample).weight,
        z=None if by_rows and saved.used is None else saved.z, planes=saved.forms[-1] if by_rows else None,
    )  # fmt: skip
    if moments is not None:
        assert saved.used is not None
        batch_statistics(tokens, saved.z, saved.used, maps, contract)
    outs = [
        torch.empty_like(x, dtype=dtype, memory_format=memory_format(x))
        for x, dtype in zip(maps.maps, contract.output_dtypes, strict=True)
    ]
    if batch == 0:  # no program runs: BatchNorm counts the batch all the same, and takes no mean of it
        for counter in (c for c in counters_of(contract) if c is not None):
            counter.add_(1)
        if saved.used is not None:
            saved.used.zero_()
    sizes = sizes_of(maps.maps)
    widest = max([width for _, width in sizes])
    if by_rows:
        kernel, config = _upsample_rows_kernel, launcher.config("upsample_rows", widest)
        tiles = tiles_of_rows(shape, sizes, contract.grid, config["tile"], config["rows"])
    else:
        kernel, config = _upsample_kernel, launcher.config("upsample" + memory_of(maps.maps), widest)
        tiles = tiles_of(shape, sizes, contract.grid, config["tile"], config["block_c"], config["block_w"])
    norms = norms_of(contract.norms, updates=True)
    launcher(
        kernel, config, batch * tiles.programs,
        maps=maps.maps, z=saved.forms[-1], biases=affines_of(contract.upsample).bias,
        affines=batch_norms_of(contract.norms), buffers=buffers_of(contract.buffers),
        outs=tuple(outs), used=saved.used, sizes=size_arguments(sizes, contract.grid), counts=tiles.counts,
        LAYOUT=layout_of(maps.maps, contract.grid, norms, outs, tiles=tiles.of, by_rows=by_rows),
    )  # fmt: skip
    return outs, saved
