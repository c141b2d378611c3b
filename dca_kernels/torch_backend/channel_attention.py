"""Stage 2: attend across channels, with LayerNorms and a residual (paper, eq. 3)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dca_kernels.contract import Contract, Projections
from dca_kernels.torch_backend.common import (
    Context,
    depthwise,
    keep_undefined,
    multiply,
    no_autocast,
    normalise,
    product,
    split_heads,
    with_zero_grad,
    without_negligible,
)


def channel_attention(tokens: Sequence[Tensor], contract: Contract, block: int) -> list[Tensor]:
    """One Gram matrix of the centred tokens serves every scale, and one matrix mixes the channels of each.

    That matrix is the attention, the value map and the projection in one: docs/algebra.md, "Channel cross-attention".

    Args:
        tokens: S tensors (B, N, C_i).
        contract: its `dtype` is that of the large products' operands, the tokens' or 16-bit.
        block: which of the contract's.

    Returns:
        S tensors (B, N, C_i): the same where the block has no channel attention.
    """
    attentions = contract.blocks[block].channel_attention
    if attentions is None:
        return list(tokens)
    centred, mean = normalise(tokens, attentions)  # (B, N, C) and (B, C)
    refined = mean + centred.detach().mean(1)  # what rounding left: the logits have N times the means' products
    gram = _Gram.apply(centred, [t.shape[2] for t in tokens], contract.dtype)  # (B, C, C)
    out, end = [], 0
    for t, attention in zip(tokens, attentions, strict=True):
        begin, end, heads = end, end + t.shape[2], attention.heads
        v_weight, v_bias = depthwise(attention.projections.value, t.dtype)
        p_weight, p_bias = depthwise(attention.projections.output, t.dtype)
        if attention.shift_cancels:
            p_bias = with_zero_grad(p_bias.detach(), p_bias)
        weights = _weights(attention.projections, heads, gram, refined, slice(begin, end), t.shape[1])
        v_mean = mean * v_weight + v_bias
        shift = p_weight * (weights @ v_mean.unflatten(1, (heads, -1, 1))).flatten(1) + p_bias  # (B, C_i)
        mixing = p_weight.unflatten(0, (heads, -1, 1)) * weights * v_weight.unflatten(0, (heads, 1, -1))
        residual, operand = split_heads(t, heads).flatten(0, 1), split_heads(centred, heads).flatten(0, 1)
        mixed = _add_product(residual, operand, mixing.flatten(0, 1).mT, contract.dtype)  # (B h, N, C_i / h)
        out.append(mixed.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2).add_(shift[:, None]))
    return out


def _weights(
    projections: Projections, heads: int, gram: Tensor, mean: Tensor, channels: slice, n_tokens: int
) -> Tensor:
    """The attention weights of one scale (B, h, C_i / h, C / h).

    Args:
        projections: the scale's.
        heads: how many.
        gram: the Gram matrix of the centred tokens (B, C, C).
        mean: the tokens' (B, C).
        channels: those of the scale among all.
        n_tokens: N.
    """
    q_weight, q_bias = depthwise(projections.query, gram.dtype)
    k_weight, k_bias = depthwise(projections.key, gram.dtype)
    scale = gram.shape[2] ** -0.5  # of all channels, whatever the number of heads
    q_weight, q_mean = q_weight * scale, (mean[:, channels] * q_weight + q_bias) * scale
    k_mean = mean * k_weight + k_bias
    covariance = q_weight[:, None] * k_weight * gram[:, channels]  # (B, C_i, C)
    logits = _head_blocks(covariance, heads) + n_tokens * (
        q_mean.unflatten(1, (heads, -1, 1)) * k_mean.unflatten(1, (heads, 1, -1))
    )
    return without_negligible(torch.softmax(logits, -1))


def _head_blocks(matrix: Tensor, heads: int) -> Tensor:
    """The diagonal blocks of a matrix with rows and columns split into heads: (B, R, C) -> (B, h, R / h, C / h)."""
    blocks = matrix.unflatten(2, (heads, -1)).unflatten(1, (heads, -1))  # (B, h, R / h, h, C / h)
    return blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1)


def _add_product(c: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """c + `product`."""
    return torch.baddbmm(c, a, b) if dtype == a.dtype else c + product(a, b, dtype)


class _Gram(torch.autograd.Function):
    """x^T x over the tokens, of operands in `dtype`: (B, N, C) -> (B, C, C).

    Symmetric, so each row block stops at its diagonal; the backward is one product, not the two of a general one.
    """

    @staticmethod
    def forward(ctx: Context, x: Tensor, row_blocks: Sequence[int], dtype: torch.dtype) -> Tensor:
        keep_undefined(ctx)
        ctx.save_for_backward(x)
        ctx.dtype = dtype
        if dtype != x.dtype:  # at most 2 sqrt(C_i) times LayerNorm's weight: far within float16's range
            x = x.to(dtype)
            return multiply(x.mT, x)  # whole: on a GPU, one call in place of several takes less time
        gram = x.new_empty(x.shape[0], x.shape[2], x.shape[2])
        end = 0
        for size in row_blocks:
            begin, end = end, end + size
            gram[:, begin:end, :end] = x[:, :, begin:end].mT @ x[:, :, :end]
            gram[:, :begin, begin:end] = gram[:, begin:end, :begin].mT
        return gram

    @staticmethod
    def backward(ctx: Context, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        (x,), (dgram,) = ctx.saved_tensors, grads
        if dgram is None:
            return None, None, None
        with no_autocast(x):
            return product(x, dgram + dgram.mT, ctx.dtype), None, None
