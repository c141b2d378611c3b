"""The backward of stage 4, as far as the tokens; the maps' gradients wait for those of the first stage's tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dca_kernels.contract import Affine, BatchNorm, Contract
from dca_kernels.triton_backend import launch
from dca_kernels.triton_backend.batch_norm import load_affine, load_mean, load_scale, through_relu
from dca_kernels.triton_backend.grid import (
    ROW_PARTS,
    interpolate,
    interpolate_rows,
    interpolation_matrix,
    less_mean,
    load_map,
    of_channels,
    pairs,
)
from dca_kernels.triton_backend.grid_gradient import grid_gradient, strips_of
from dca_kernels.triton_backend.layout import (
    backward_config,
    grouped,
    has_tile,
    in_group,
    layout_of,
    norms_of,
    size_arguments,
    size_of,
    sizes_of,
    split_tiles,
    steps_of,
    stretch_of,
    strides_of,
    tiles_of,
)
from dca_kernels.triton_backend.parameters import batch_norms_of, gradient_dtype
from dca_kernels.triton_backend.partials import sum_partials
from dca_kernels.triton_backend.primitives import (
    argument,
    divide,
    first_blocks,
    kernel,
    load_tokens,
    load_vector,
    number,
    of_scale,
    padded,
    scale_of,
    split_program,
    sum_images,
)
from dca_kernels.triton_backend.tokens import Tokens, widest_scale
from dca_kernels.triton_backend.upsample import Saved
from dca_kernels.triton_backend.upsample_rows import _upsample_backward_rows_kernel, tiles_of_rows


@triton.jit
def load_relu_gradient(
    x, z, dout, affines, used, b, c_begin, h_begin, sizes, height, width,
    i: tl.constexpr, SHAPE: tl.constexpr, LAYOUT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """In one tile of whole rows: x; up(z) + x less its mean; and the gradient of what BatchNorm gave, through the ReLU.

    Each [pairs, columns]. x, dout (B, C_i, H_i, W_i), z (B, N, C), used (2, C).
    """
    GRID: tl.constexpr = LAYOUT.grid
    TOTAL: tl.constexpr = SHAPE.total
    MAP: tl.constexpr = LAYOUT.of[i]
    STRIDE: tl.constexpr = MAP.stride
    OUT_STRIDE: tl.constexpr = MAP.out_stride
    TILE: tl.constexpr = MAP.tile
    mean = load_mean(used, c_begin, i, SHAPE, LAYOUT)
    pair_c, pair_h, mask_pair = pairs(c_begin, h_begin, SHAPE.channels[i], height, TILE)
    offs_w = tl.arange(0, TILE.columns)
    mask = mask_pair[:, None] & (offs_w < width)[None, :]
    z_ptrs = z + b * GRID[0] * GRID[1] * TOTAL + SHAPE.offsets[i] + pair_c
    row_step, column_step = steps_of(sizes, i, height, width, LAYOUT, i, ACC)
    up = interpolate(
        z_ptrs=z_ptrs, mask_pair=mask_pair, pair_h=pair_h, first=0, offs_w=offs_w, row_step=row_step,
        column_step=column_step, TOKENS=TILE.tokens, GRID=GRID, TOTAL=TOTAL, ACC=ACC,
    )  # fmt: skip
    pixels = load_map(x, b, pair_c, pair_h, offs_w, mask, strides_of(STRIDE, height, width), ACC)
    y = less_mean(pixels, up, mean, TILE.rows, ACC)
    gradient = load_map(dout, b, pair_c, pair_h, offs_w, mask, strides_of(OUT_STRIDE, height, width), ACC)
    if MAP.norm is not None:
        affine = load_affine(used, affines, c_begin, i, SHAPE, LAYOUT, ACC)
        gradient = through_relu(y, gradient, affine, TILE.rows)
    return pixels, y, gradient


@kernel
def _upsample_backward_kernel(
    maps, z, douts, affines, used, sums, strips, sizes, counts, sum_blocks,
    SHAPE: tl.constexpr, LAYOUT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: a tile of whole rows of one map. Sums over its pixels of the gradient g behind the ReLU, and of g y.

    maps, douts (B, C_i, H_i, W_i), z (B, N, C), used (2, C). Writes sums (B, sum_blocks, 2, C); and strips, g times the
    transposed interpolation along rows: for each image S arrays (H_i, P_w, C_i), one after another.
    """
    b, tile = split_tiles(counts)
    for i in tl.static_range(len(SHAPE.channels)):
        if has_tile(tile, counts, i):
            _upsample_backward(
                x=maps[i], z=z, dout=douts[i], affines=affines, used=used,
                sums=sums + b * sum_blocks * 2 * SHAPE.total,
                strips=strips_of(strips, b, sizes, i, SHAPE, LAYOUT.grid[1]), b=b, tile=tile - number(counts.first[i]),
                sizes=sizes, counts=counts, i=i, SHAPE=SHAPE, LAYOUT=LAYOUT, PRECISION=PRECISION, ACC=ACC,
            )  # fmt: skip


@triton.jit
def _upsample_backward(
    x, z, dout, affines, used, sums, strips, b, tile, sizes, counts,
    i: tl.constexpr, SHAPE: tl.constexpr, LAYOUT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """`_upsample_backward_kernel` for tile `tile` of image b and scale i; sums and strips are those of image b.

    It goes over its rows some columns at a time: however wide the map is, a tile has as many rows as products need.
    """
    CHANNELS: tl.constexpr = SHAPE.channels[i]
    GRID: tl.constexpr = LAYOUT.grid
    MAP: tl.constexpr = LAYOUT.of[i]
    STRIDE: tl.constexpr = MAP.stride
    OUT_STRIDE: tl.constexpr = MAP.out_stride
    TILE: tl.constexpr = MAP.tile
    height, width = size_of(sizes, i, LAYOUT, i)
    strides, out_strides = strides_of(STRIDE, height, width), strides_of(OUT_STRIDE, height, width)
    block, row = divide(tile, counts.rows[i])
    c_begin, h_begin = block * TILE.channels, row * TILE.rows
    mean = load_mean(used, c_begin, i, SHAPE, LAYOUT)
    if MAP.norm is not None:
        affine = load_affine(used, affines, c_begin, i, SHAPE, LAYOUT, ACC)
    pair_c, pair_h, mask_pair = pairs(c_begin, h_begin, CHANNELS, height, TILE)
    z_ptrs = z + b * GRID[0] * GRID[1] * SHAPE.total + SHAPE.offsets[i] + pair_c
    offs_q = tl.arange(0, padded(GRID[1]))
    row_step, column_step = steps_of(sizes, i, height, width, LAYOUT, i, ACC)
    rows = interpolate_rows(z_ptrs, mask_pair, pair_h, offs_q, row_step, GRID, SHAPE.total, ACC, TILE.channels)
    sum_gradient, sum_product = tl.zeros(pair_c.shape, ACC), tl.zeros(pair_c.shape, ACC)
    strip = tl.zeros([pair_c.shape[0], offs_q.shape[0]], ACC)
    for w_begin in range(0, width, TILE.columns):
        offs_w = w_begin + tl.arange(0, TILE.columns)
        matrix = interpolation_matrix(offs_q, offs_w, column_step, ACC)
        mask = mask_pair[:, None] & (offs_w < width)[None, :]
        # Both before the product: Triton then sums in its layout, not in that of the loads, which would be a way
        # through shared memory for all that is summed.
        pixels = load_map(x, b, pair_c, pair_h, offs_w, mask, strides, ACC)
        gradient = load_map(dout, b, pair_c, pair_h, offs_w, mask, out_strides, ACC)
        # [pairs, P_w] [P_w, columns]: up(z) is rounded to what products have, less than z itself
        up = tl.dot(rows, matrix, input_precision=PRECISION, out_dtype=ACC)
        y = less_mean(pixels, up, mean, TILE.rows, ACC)
        if MAP.norm is not None:
            gradient = through_relu(y, gradient, affine, TILE.rows)
        sum_gradient += tl.sum(gradient, 1)
        sum_product += tl.sum(gradient * y, 1)
        # [pairs, columns] [columns, P_w]
        strip = tl.dot(gradient, tl.trans(matrix), strip, input_precision=PRECISION, out_dtype=ACC)
    offs_c = c_begin + tl.arange(0, TILE.channels)
    sums_ptrs = sums + row * 2 * SHAPE.total + SHAPE.offsets[i] + offs_c
    tl.store(sums_ptrs, of_channels(sum_gradient, TILE), mask=offs_c < CHANNELS)
    tl.store(sums_ptrs + SHAPE.total, of_channels(sum_product, TILE), mask=offs_c < CHANNELS)
    ptrs = strips + (pair_h * GRID[1] * CHANNELS + pair_c)[:, None] + (offs_q * CHANNELS)[None, :]
    strip /= stretch_of(sizes, i, width, LAYOUT, i, ACC)  # of a gradient's size, whatever the stride
    tl.store(ptrs, strip, mask=mask_pair[:, None] & (offs_q < GRID[1])[None, :])


@kernel
def _norm_gradients_kernel(
    sums, used, affines, out, through_statistics, batch, sizes, blocks, sum_blocks,
    SHAPE: tl.constexpr, LAYOUT: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: a sum of BLOCK_C channels of one scale, over images and tiles in a fixed order, and what it is for.

    out (3, C): BatchNorm's weight and bias, the convolution's bias. through_statistics (2, C): what the gradient of
    up(z) + x loses where the statistics are the batch's: a constant, and a multiple of up(z) + x less its mean. sums
    (B, sum_blocks, 2, C), of scale i in blocks[i] blocks, used (2, C).
    """
    CHANNELS: tl.constexpr = SHAPE.channels
    FIRST: tl.constexpr = first_blocks(CHANNELS, BLOCK_C)
    k, tile = tl.program_id(0) // FIRST[len(CHANNELS)], tl.program_id(0) % FIRST[len(CHANNELS)]
    scale, block = scale_of(tile, FIRST)
    offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    for g in tl.static_range(len(LAYOUT.groups)):
        if in_group(scale, LAYOUT, g):
            _norm_gradients(
                sums=sums, used=used, affines=affines, out=out, through_statistics=through_statistics, batch=batch,
                sizes=sizes, blocks=blocks, sum_blocks=sum_blocks, k=k, scale=scale, offs_c=offs_c, SHAPE=SHAPE,
                LAYOUT=LAYOUT, g=g, ACC=ACC,
            )  # fmt: skip


@triton.jit
def _norm_gradients(
    sums, used, affines, out, through_statistics, batch, sizes, blocks, sum_blocks, k, scale, offs_c,
    SHAPE: tl.constexpr, LAYOUT: tl.constexpr, g: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """`_norm_gradients_kernel` for sum k of some channels of a scale of group g."""
    GROUP: tl.constexpr = LAYOUT.groups[g]
    SCALES: tl.constexpr = GROUP.scales
    NORM: tl.constexpr = LAYOUT.of[GROUP.scales[0]].norm
    CHANNELS: tl.constexpr = SHAPE.channels
    OFFSETS: tl.constexpr = SHAPE.offsets
    TOTAL: tl.constexpr = SHAPE.total
    mask_c = offs_c < of_scale(CHANNELS, scale, SCALES)
    offs_all = of_scale(OFFSETS, scale, SCALES) + offs_c
    height, width = size_of(sizes, scale, LAYOUT, g)
    rstd = tl.full(offs_c.shape, 1.0, ACC)
    factor = rstd
    if NORM is not None:
        rstd = tl.rsqrt(load_vector(used + TOTAL, offs_all, mask_c, ACC) + NORM.eps)
        factor = load_scale(used, affines, offs_c, offs_all, mask_c, scale, LAYOUT, g, TOTAL, ACC)
    pixels = batch.to(ACC) * (height * width)
    gradient = sum_images(
        ptr=sums + k * TOTAL, offs=offs_all, mask=mask_c, batch=batch, blocks=number(of_scale(blocks, scale, SCALES)),
        STRIDE=2 * TOTAL, image_stride=sum_blocks * 2 * TOTAL, ACC=ACC,
    )  # fmt: skip
    if k == 0:
        tl.store(out + TOTAL + offs_all, gradient, mask=mask_c)
        if (NORM is not None) and NORM.from_batch:
            tl.store(out + 2 * TOTAL + offs_all, tl.zeros(offs_c.shape, ACC), mask=mask_c)
            tl.store(through_statistics + offs_all, gradient / pixels, mask=mask_c)
        else:
            tl.store(out + 2 * TOTAL + offs_all, factor * gradient, mask=mask_c)
    else:
        tl.store(out + offs_all, gradient * rstd, mask=mask_c)
        if (NORM is not None) and NORM.from_batch:
            tl.store(through_statistics + TOTAL + offs_all, gradient * rstd * rstd / pixels, mask=mask_c)


@kernel
def _conv_gradient_kernel(
    tokens, dz, dweight,
    SHAPE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: a tile of dz^T tokens, the gradient of one scale's convolution, over one image.

    tokens, dz (B, N, C). dweight: for each image the S matrices (C_i, C_i), one after another.
    """
    N: tl.constexpr = SHAPE.tokens
    TOTAL: tl.constexpr = SHAPE.total
    CHANNELS: tl.constexpr = SHAPE.channels
    OFFSETS: tl.constexpr = SHAPE.offsets
    FIRST: tl.constexpr = _first_squares(CHANNELS, BLOCK_C)
    ELEMENTS: tl.constexpr = _first_squares(CHANNELS, 1)
    b, tile = split_program(FIRST[len(CHANNELS)])
    scale, local = scale_of(tile, FIRST)
    channels = of_scale(CHANNELS, scale)
    first = b * N * TOTAL + of_scale(OFFSETS, scale)
    rows = tl.cdiv(channels, BLOCK_C)
    offs_out = local // rows * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_in = local % rows * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_out, mask_in = offs_out < channels, offs_in < channels
    out = tl.zeros([BLOCK_C, BLOCK_C], ACC)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        gradient = load_tokens(dz + first, offs_n, offs_out, offs_n < N, mask_out, TOTAL)
        its_tokens = load_tokens(tokens + first, offs_n, offs_in, offs_n < N, mask_in, TOTAL)
        out = tl.dot(  # [BLOCK_C, BLOCK_N] [BLOCK_N, BLOCK_C]
            tl.trans(gradient.to(OPERAND)), its_tokens.to(OPERAND), out, input_precision=PRECISION, out_dtype=ACC
        )
    matrix = b * ELEMENTS[len(CHANNELS)] + of_scale(ELEMENTS, scale)
    ptrs = dweight + matrix + offs_out[:, None] * channels + offs_in[None, :]
    tl.store(ptrs, out, mask=mask_out[:, None] & mask_in[None, :])


@triton.constexpr_function
def _first_squares(sizes, block):
    """Where the tiles of each square matrix begin among all; the last number is that of all."""
    return tuple(sum((-(-size // block)) ** 2 for size in sizes[:i]) for i in range(len(sizes) + 1))


class Gradients(NamedTuple):
    """Of the parameters: the S matrices (C_i, C_i), one after another; and what `_norm_gradients_kernel` wrote."""

    convolutions: Tensor
    norms: Tensor  # (3, C): BatchNorm's weights and biases, the convolutions' biases

    @classmethod
    def empty(cls, tokens: Tokens, dtype: torch.dtype) -> "Gradients":
        """Fresh memory for those of an upsampling of these tokens, of `gradient_dtype`."""
        squares = sum(c * c for c in tokens.channels)
        return cls(tokens.empty(squares, dtype=dtype), tokens.empty(3, tokens.shape.total, dtype=dtype))

    def split(
        self, norms: Sequence[BatchNorm | None], channels: Sequence[int]
    ) -> tuple[tuple[Affine, ...], tuple[BatchNorm | None, ...]]:
        """As the contract has them, of the convolutions and of the BatchNorms: views."""
        dgammas, dbetas, dbiases = (row.split(channels) for row in self.norms)
        weights = self.convolutions.split([c * c for c in channels])
        scales = zip(norms, dgammas, dbetas, strict=True)
        of_norms = [None if norm is None else norm._replace(weight=weight, bias=bias) for norm, weight, bias in scales]
        return tuple(map(Affine, weights, dbiases)), tuple(of_norms)


class Backward(NamedTuple):
    """What `upsample_backward` returns.

    Attributes:
        dtokens: (B, N, C), where wanted.
        through_statistics: (2, C), what the statistics of a batch take off the maps' gradient.
        parameters: their gradients.
    """

    dtokens: Tensor | None
    through_statistics: Tensor
    parameters: Gradients


def upsample_backward(
    saved: Saved, maps: Sequence[Tensor], douts: Sequence[Tensor], contract: Contract, tokens_wanted: bool
) -> Backward:
    """The gradients of `upsample`, but for the maps'.

    Args:
        saved: what the forward returned.
        maps: as in the forward.
        douts: S tensors (B, C_i, H_i, W_i), any strides.
        contract: as in the forward.
        tokens_wanted: whether the tokens' gradient is.
    """
    tokens, launcher, batch = saved.tokens, saved.tokens.launcher, saved.tokens.batch
    shape, grid, sizes = launcher.shape, contract.grid, sizes_of(maps)
    affines, norms = batch_norms_of(contract.norms), norms_of(contract.norms)
    size_args, widest = size_arguments(sizes, grid), max([width for _, width in sizes])
    by_rows = saved.by_rows
    if by_rows:
        config = launcher.config("upsample_backward_rows", widest)
        tiles = tiles_of_rows(shape, sizes, grid, config["tile"], config["rows"])
        strips = tokens.empty(batch, ROW_PARTS.value, shape.tokens, shape.total, dtype=launcher.dtype)
    else:
        config = backward_config("upsample_backward", launcher, maps, grid)
        tiles = tiles_of(shape, sizes, grid, config["tile"], config["block_c"], config["block_w"], whole_rows=True)
        elements = sum([c * height * grid[1] for c, (height, _) in zip(shape.channels, sizes, strict=True)])
        strips = tokens.empty(batch, elements, dtype=launcher.dtype)
    most = max(tiles.rows)
    sums = tokens.empty(batch, most, 2, shape.total)
    of_scales = zip(maps, norms, affines.weight, strict=True)
    keys = tuple([(x.dtype, norm, weight is None) for x, norm, weight in of_scales])
    layout = grouped(layout_of(maps, grid, norms), keys)
    launcher(
        _upsample_backward_rows_kernel if by_rows else _upsample_backward_kernel, config, batch * tiles.programs,
        maps=tuple(maps), z=saved.forms[-1], douts=tuple(douts), affines=affines, used=saved.used, sums=sums,
        strips=strips, sizes=size_args, counts=tiles.counts, sum_blocks=most,
        LAYOUT=layout_of(maps, grid, norms, douts, tiles=tiles.of, by_rows=by_rows),
    )  # fmt: skip

    config = launcher.config("norm_gradients")
    gradients, through_statistics = Gradients.empty(tokens, gradient_dtype(contract)), tokens.empty(2, shape.total)
    launcher(
        _norm_gradients_kernel, config, 2 * sum([launch.blocks(c, config["block_c"]) for c in shape.channels]),
        sums=sums, used=saved.used, affines=affines, out=gradients.norms, through_statistics=through_statistics,
        batch=batch, sizes=size_args, blocks=tuple(map(argument, tiles.rows)), sum_blocks=most, LAYOUT=layout,
    )  # fmt: skip

    dz, dtokens = grid_gradient(saved, strips, through_statistics, contract, sizes, layout, tokens_wanted)

    config = launcher.config("conv", widest_scale(shape))
    dweight = gradients.convolutions[None] if batch == 1 else tokens.empty(batch, gradients.convolutions.numel())
    launcher(
        _conv_gradient_kernel, config, batch * sum([launch.blocks(c, config["block_c"]) ** 2 for c in shape.channels]),
        tokens=tokens.plain, dz=dz, dweight=dweight,
    )  # fmt: skip
    if batch != 1:
        sum_partials(dweight, gradients.convolutions, launcher)
    return Backward(dtokens, through_statistics, gradients)
