"""The gradients of stage 3's parameters, from sums over blocks of tokens."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dca_kernels.contract import Attention, Contract
from dca_kernels.triton_backend import launch
from dca_kernels.triton_backend.layer_norm import store_norm_gradients
from dca_kernels.triton_backend.parameters import (
    attention_gradients,
    cancels_of,
    gradient_dtype,
    heads_of,
    projections_of,
)
from dca_kernels.triton_backend.primitives import (
    LOG2_E,
    image_rows,
    kernel,
    load_vector,
    number_of_scale,
    of_scale,
    store_vectors,
    zero_where_it_cancels,
)
from dca_kernels.triton_backend.tokens import Tokens

PARAMETERS = tl.constexpr(4)  # weight and bias of two maps: query and key, or value and projection


class Partials(NamedTuple):
    """Sums over blocks of tokens, from which the parameters' gradients follow.

    Attributes:
        terms: (B, blocks, S, 2, C), of the bilinear and of the linear term of the scores.
        affine: (B, blocks, 2, C), of weight and bias of the result.
        norm: (B, blocks, 2, C), of LayerNorm's weight and bias.
    """

    terms: Tensor
    affine: Tensor
    norm: Tensor


@triton.constexpr_function
def score_scales(total, heads):
    """What each scale's scores are multiplied by, DK^-1/2 log2(e)."""
    return tuple((total // count) ** -0.5 * LOG2_E.value for count in heads)


@kernel
def _spatial_gradients_kernel(
    level, partials, projections, out, batch,
    SHAPE: tl.constexpr, HEADS: tl.constexpr, BLOCKS: tl.constexpr, NORM_BLOCKS: tl.constexpr,
    SHIFT_CANCELS: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_C channels of some of the parameters' gradients, `Gradients`, over images in a fixed order.

    level (B, C), partials `Partials`, of BLOCKS blocks and, of LayerNorm's, of NORM_BLOCKS. The key map's bias drops
    out of the softmax.
    """
    TOTAL: tl.constexpr = SHAPE.total
    SCALES: tl.constexpr = len(SHAPE.channels)
    TILES: tl.constexpr = triton.cdiv(TOTAL, BLOCK_C)
    pid = tl.program_id(0)
    offs_c = pid % TILES * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < TOTAL
    i = pid // TILES
    if i < SCALES:
        scale = number_of_scale(score_scales(TOTAL, HEADS), i, ACC)
        q_weight = load_vector(of_scale(projections.query_weight, i), offs_c, mask_c, ACC) * scale
        q_bias = load_vector(of_scale(projections.query_bias, i), offs_c, mask_c, ACC) * scale
        k_weight = load_vector(of_scale(projections.key_weight, i), offs_c, mask_c, ACC) * scale
        dbilinear, dlinear = sum_with_level(
            partials.terms + i * 2 * TOTAL, level, offs_c, mask_c, batch, BLOCKS, SCALES * 2 * TOTAL, TOTAL, ACC
        )
        dq_weight, dq_bias = k_weight * dbilinear, k_weight * dlinear
        dk_weight, dk_bias = q_weight * dbilinear + q_bias * dlinear, tl.zeros([BLOCK_C], ACC)
        out_ptrs = out.query_key + i * PARAMETERS * TOTAL + offs_c
        store_vectors(out_ptrs, (dq_weight, dq_bias, dk_weight, dk_bias), mask_c, TOTAL)
    elif i == SCALES:
        v_weight, v_bias, p_weight = _load_values_and_outputs(projections, offs_c, SHAPE, ACC)
        dweight, dbias = sum_with_level(partials.affine, level, offs_c, mask_c, batch, BLOCKS, 2 * TOTAL, TOTAL, ACC)
        dbias = zero_where_it_cancels(dbias, offs_c, SHIFT_CANCELS, SHAPE)
        dv_weight, dv_bias = p_weight * dweight, p_weight * dbias
        dp_weight = v_weight * dweight + v_bias * dbias
        store_vectors(out.value_output + offs_c, (dv_weight, dv_bias, dp_weight, dbias), mask_c, TOTAL)
    else:
        offs = (pid - (SCALES + 1) * TILES) * BLOCK_C + tl.arange(0, BLOCK_C)
        store_norm_gradients(partials.norm, out.norm, offs, batch, NORM_BLOCKS, SHAPE, ACC)


@triton.jit
def _load_values_and_outputs(projections, offs_all, SHAPE: tl.constexpr, ACC: tl.constexpr):
    """The value maps' weights and biases and the projections' weights, those of all scales side by side."""
    v_weight = tl.zeros(offs_all.shape, ACC)
    v_bias = tl.zeros(offs_all.shape, ACC)
    p_weight = tl.zeros(offs_all.shape, ACC)
    for i in tl.static_range(len(SHAPE.channels)):
        offs_c = offs_all - SHAPE.offsets[i]
        mask_c = (offs_c >= 0) & (offs_c < SHAPE.channels[i])
        v_weight += load_vector(projections.value_weight[i], offs_c, mask_c, ACC)
        v_bias += load_vector(projections.value_bias[i], offs_c, mask_c, ACC)
        p_weight += load_vector(projections.output_weight[i], offs_c, mask_c, ACC)
    return v_weight, v_bias, p_weight


@triton.jit
def sum_with_level(
    ptr, level, offs, mask, batch, BLOCKS: tl.constexpr, STRIDE: tl.constexpr, TOTAL: tl.constexpr, ACC: tl.constexpr
):
    """As `sum_images`, of two vectors, TOTAL apart: the first plus level (B, C) times the second; and the second."""
    ROWS: tl.constexpr = 2048 // offs.shape[0]
    first = tl.zeros([ROWS, offs.shape[0]], ACC)
    second = tl.zeros([ROWS, offs.shape[0]], ACC)
    for start in range(0, batch * BLOCKS, ROWS):
        b, begin, mask_row = image_rows(start, ROWS, batch, BLOCKS, STRIDE, BLOCKS * STRIDE)
        here = mask_row[:, None] & mask[None, :]
        ptrs = ptr + begin[:, None] + offs[None, :]
        one, other = tl.load(ptrs, mask=here, other=0.0), tl.load(ptrs + TOTAL, mask=here, other=0.0)
        of_level = tl.load(level + (b * TOTAL)[:, None] + offs[None, :], mask=here, other=0.0)
        first += one + other * of_level
        second += other
    return tl.sum(first, 0), tl.sum(second, 0)


class Gradients(NamedTuple):
    """Of the parameters: a weight, then a bias, of each projection."""

    query_key: Tensor  # (S, 4, C)
    value_output: Tensor  # (4, C)
    norm: Tensor  # (2, C)

    @classmethod
    def empty(cls, tokens: Tokens, dtype: torch.dtype) -> "Gradients":
        """Fresh memory for those of an attention of these tokens, of `gradient_dtype`."""
        scales, total = len(tokens.channels), tokens.shape.total
        return cls(*(tokens.empty(*rows, total, dtype=dtype) for rows in ((scales, 4), (4,), (2,))))

    def split(self, attention: tuple[Attention, ...]) -> tuple[Attention, ...]:
        """As the contract has them: views."""
        query, key = self.query_key.split(2, 1)
        value, output = self.value_output.split(2)
        return attention_gradients(
            attention, {"query": query, "key": key}, {"value": value, "output": output}, self.norm
        )


def spatial_gradients(tokens: Tokens, partials: Partials, contract: Contract, block: int) -> Gradients:
    """The gradients of the parameters of the spatial attention `block`, whose tokens these are."""
    attention = contract.blocks[block].spatial_attention
    assert attention is not None
    launcher, shape = tokens.launcher, tokens.launcher.shape
    config = launcher.config("spatial_gradients")
    gradients = Gradients.empty(tokens, gradient_dtype(contract))
    tiles, norm_tiles = (launch.blocks(size, config["block_c"]) for size in (shape.total, 2 * shape.total))
    launcher(
        _spatial_gradients_kernel, config, (len(shape.channels) + 1) * tiles + norm_tiles,
        level=tokens.level, partials=partials, projections=projections_of(attention), out=gradients,
        batch=tokens.batch, HEADS=heads_of(attention), BLOCKS=partials.terms.shape[1],
        NORM_BLOCKS=partials.norm.shape[1], SHIFT_CANCELS=cancels_of(attention),
    )  # fmt: skip
    return gradients
