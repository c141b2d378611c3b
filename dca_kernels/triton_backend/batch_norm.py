"""BatchNorm and its ReLU in one tile of a map: what a forward takes of it, and what a backward does."""

import triton
import triton.language as tl

from dca_kernels.triton_backend.grid import of_pairs
from dca_kernels.triton_backend.primitives import load_vector, of_scale


@triton.jit
def take_norm(
    bias, affines, buffers, used, c_begin, is_first,
    i: tl.constexpr, SHAPE: tl.constexpr, LAYOUT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What BatchNorm takes off x + up(z) in a tile of scale i, in float64, its factor, and its bias: [channels] each.

    It is in `used` (2, C) where it is the batch's; else the first tile of all writes there what a backward will need.
    bias is the convolution's. Without a BatchNorm, what is taken off is minus that bias.
    """
    NORM: tl.constexpr = LAYOUT.of[i].norm
    TOTAL: tl.constexpr = SHAPE.total
    offs_c = c_begin + tl.arange(0, LAYOUT.of[i].tile.channels)
    mask_c = offs_c < SHAPE.channels[i]
    offs_all = SHAPE.offsets[i] + offs_c
    constant = load_vector(bias, offs_c, mask_c, ACC)
    if NORM is None:
        mean = -constant.to(tl.float64)
        variance = tl.zeros(offs_c.shape, ACC)
    elif NORM.from_batch:
        mean = load_vector(used, offs_all, mask_c, tl.float64)
        variance = load_vector(used + TOTAL, offs_all, mask_c, ACC)
    else:
        mean = load_vector(buffers.mean[i], offs_c, mask_c, tl.float64) - constant
        variance = load_vector(buffers.variance[i], offs_c, mask_c, ACC)
    if (NORM is None) or (not NORM.from_batch):
        if (used is not None) and is_first:
            tl.store(used + offs_all, mean, mask=mask_c)
            tl.store(used + TOTAL + offs_all, variance, mask=mask_c)
    factor, shift = tl.full(offs_c.shape, 1.0, ACC), tl.zeros(offs_c.shape, ACC)
    if NORM is not None:
        factor = tl.rsqrt(variance + NORM.eps)
        if affines.weight[i] is not None:
            factor *= load_vector(affines.weight[i], offs_c, mask_c, ACC)
        if affines.bias[i] is not None:
            shift = load_vector(affines.bias[i], offs_c, mask_c, ACC)
    return mean, factor, shift


@triton.jit
def load_scale(
    used, affines, offs_c, offs_all, mask_c, scale,
    LAYOUT: tl.constexpr, g: tl.constexpr, TOTAL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What the BatchNorm of a scale of group g multiplies by: gamma / sqrt(variance + eps), [channels]. used (2, C)."""
    GROUP: tl.constexpr = LAYOUT.groups[g]
    SCALES: tl.constexpr = GROUP.scales
    NORM: tl.constexpr = LAYOUT.of[GROUP.scales[0]].norm
    factor = tl.rsqrt(load_vector(used + TOTAL, offs_all, mask_c, ACC) + NORM.eps)
    if affines.weight[GROUP.scales[0]] is not None:
        factor *= load_vector(of_scale(affines.weight, scale, SCALES), offs_c, mask_c, ACC)
    return tl.where(mask_c, factor, 0.0)  # with an eps of 0, it is not finite beyond the channels, and products take it


@triton.jit
def load_mean(used, c_begin, i: tl.constexpr, SHAPE: tl.constexpr, LAYOUT: tl.constexpr):
    """What BatchNorm took off a tile's channels of scale i, in float64: [channels]. used (2, C)."""
    offs_c = c_begin + tl.arange(0, LAYOUT.of[i].tile.channels)
    return load_vector(used, SHAPE.offsets[i] + offs_c, offs_c < SHAPE.channels[i], tl.float64)


@triton.jit
def load_affine(
    used, affines, c_begin, i: tl.constexpr, SHAPE: tl.constexpr, LAYOUT: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """`load_scale` and BatchNorm's bias in a tile's channels of scale i: [channels] each."""
    offs_c = c_begin + tl.arange(0, LAYOUT.of[i].tile.channels)
    mask_c = offs_c < SHAPE.channels[i]
    offs_all = SHAPE.offsets[i] + offs_c
    scale = load_scale(used, affines, offs_c, offs_all, mask_c, i, LAYOUT, i, SHAPE.total, ACC)
    bias = tl.zeros(offs_c.shape, ACC)  # one FMA with the scale, so that none costs nothing
    if affines.bias[i] is not None:
        bias = load_vector(affines.bias[i], offs_c, mask_c, ACC)
    return scale, bias


@triton.jit
def through_relu(y, gradient, affine, ROWS: tl.constexpr):
    """The gradient of what BatchNorm gave: [pairs, columns]. y: its input less the mean; affine: `load_affine`."""
    scale, bias = affine
    before_relu = y * of_pairs(scale, ROWS)[:, None] + of_pairs(bias, ROWS)[:, None]
    return tl.where(before_relu <= 0, 0.0, gradient)
