"""Stage 3: attend across tokens, with LayerNorms and a residual (paper, eq. 4)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dca_kernels.contract import Contract
from dca_kernels.torch_backend.common import (
    Context,
    depthwise,
    keep_undefined,
    magnitude,
    no_autocast,
    normalise,
    split_heads,
    with_zero_grad,
)
from dca_kernels.torch_backend.spatial_tiles import attend_tiles


def spatial_attention(tokens: Sequence[Tensor], contract: Contract, block: int) -> list[Tensor]:
    """Keys are the normalised tokens, the same for every scale, and values one scale's of them.

    The value map and the projection are applied to the result, since attention weights sum to one. Tokens are centred
    over the grid first: their mean moves into the keys' own scores and the result. The key map's bias drops out of the
    softmax, whatever its value: its gradient is exactly zero. docs/algebra.md, "Spatial cross-attention".

    Args:
        tokens: S tensors (B, N, C_i).
        contract: its `dtype` is that of the large products' operands, the tokens' or 16-bit.
        block: which of the contract's.

    Returns:
        S tensors (B, N, C_i): the same where the block has no spatial attention.
    """
    attentions = contract.blocks[block].spatial_attention
    if attentions is None:
        return list(tokens)
    centred, mean = normalise(tokens, attentions)  # (B, N, C) and (B, C)
    query_key_weights, key_vectors = [], []  # S of (C) and of (B, C)
    for attention in attentions:
        q_weight, q_bias = depthwise(attention.projections.query, centred.dtype)
        k_weight, k_bias = depthwise(attention.projections.key, centred.dtype)
        scale = (centred.shape[2] // attention.heads) ** -0.5 * math.log2(math.e)  # attention weights: powers of two
        query_key_weights.append(with_zero_grad(scale * q_weight * k_weight, k_bias))
        key_vectors.append(scale * (mean * q_weight + q_bias) * k_weight)
    key_scores = _head_sums(centred, key_vectors, [attention.heads for attention in attentions])  # S of (B, h, N)
    sizes = [t.shape[2] for t in tokens]
    values, means = centred.split(sizes, 2), mean.split(sizes, 1)  # S of (B, N, C_i) and of (B, C_i)
    out = []
    for i, (t, attention) in enumerate(zip(tokens, attentions, strict=True)):
        attended = _attend(centred, values[i], query_key_weights[i], key_scores[i], contract.dtype)  # (B, N, C_i)
        v_weight, v_bias = depthwise(attention.projections.value, t.dtype)
        p_weight, p_bias = depthwise(attention.projections.output, t.dtype)
        weight, bias = p_weight * v_weight, p_weight * v_bias + p_bias  # (C_i)
        if attention.shift_cancels:
            bias = with_zero_grad(bias.detach(), v_bias, p_bias)
        shift = means[i] * weight + bias  # (B, C_i)
        out.append(torch.addcmul(t, attended, weight).add_(shift[:, None]))
    return out


# The keys' own scores


def _head_sums(tokens: Tensor, vectors: Sequence[Tensor], heads: Sequence[int]) -> list[Tensor]:
    """Sums of tokens * vector over each head's channels: (B, N, C), S of (B, C) -> S of (B, h, N)."""
    columns = []  # S of (B, C, h)
    for vector, h in zip(vectors, heads, strict=True):
        head_of = torch.eye(h, device=vector.device, dtype=vector.dtype).repeat_interleave(vector.shape[1] // h, 0)
        columns.append(vector[:, :, None] * head_of)
    if torch.compiler.is_compiling():  # cannot trace what gives no gradient
        return [(tokens @ column).mT for column in columns]
    return list((_JointProduct.apply if torch.is_grad_enabled() else _joint_product)(tokens, *columns))


def _joint_product(tokens: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
    """(tokens @ columns)^T for each scale's columns, in one product: (B, N, C), S of (B, C, h) -> S of (B, h, N)."""
    return (tokens @ torch.cat(columns, 2)).mT.split([c.shape[2] for c in columns], 1)


class _JointProduct(torch.autograd.Function):
    """`_joint_product`. The columns of a result without a gradient get none, where `torch.cat` would give zeros."""

    @staticmethod
    def forward(ctx: Context, tokens: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
        keep_undefined(ctx)
        ctx.save_for_backward(tokens, *columns)
        return _joint_product(tokens, *columns)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tokens, *columns = ctx.saved_tensors
        used = [(c, g) for c, g in zip(columns, grads, strict=True) if g is not None]
        if not used:
            return None, *grads
        with no_autocast(tokens):
            upstream = torch.cat([g for _, g in used], 1).mT  # (B, N, h of all)
            dtokens = upstream @ torch.cat([c for c, _ in used], 2).mT
            dcolumns = iter((tokens.mT @ upstream).split([c.shape[2] for c, _ in used], 2))
        return dtokens, *(None if g is None else next(dcolumns) for g in grads)


# The attention of one scale


def _attend(tokens: Tensor, values: Tensor, query_key_weight: Tensor, key_scores: Tensor, dtype: torch.dtype) -> Tensor:
    """softmax over m of log(2) * (y_n diag(query_key_weight) y_m + key_scores_m), applied to the values.

    y are the tokens (B, N, C) of all scales; values (B, N, C_i), query_key_weight (C), key_scores (B, h, N) ->
    (B, N, C_i). The products' operands are in `dtype`, these tensors' or 16-bit.
    """
    if dtype != tokens.dtype or (tokens.is_cuda and tokens.dtype == torch.float32):
        return _attend_flash(tokens, values, query_key_weight, key_scores, dtype)
    return attend_tiles(tokens, values, query_key_weight, key_scores)[0]


def _attend_flash(
    tokens: Tensor, values: Tensor, query_key_weight: Tensor, key_scores: Tensor, dtype: torch.dtype
) -> Tensor:
    """`_attend` by the flash attention that PyTorch has for GPUs, the key scores as more channels.

    Scores may be hundreds, where a step of bfloat16 is 2: in 16 bit they take two channels, the rounded score and the
    rest. In float16 tokens and scores need no factor: LayerNorm bounds the tokens, and centred ones have scores around
    zero, within range wherever the reference's logits are, for heads of nine channels or more.
    """
    query, scores = tokens * query_key_weight, [key_scores]
    if dtype != tokens.dtype:
        query, tokens, values, rounded, factor = _Rounded.apply(dtype, query, tokens, values, key_scores)
        scores = [rounded, (key_scores - rounded).detach().to(dtype)]
    heads = key_scores.shape[1]
    values = split_heads(values, heads)  # (B, h, N, dv)
    query = F.pad(split_heads(query, heads), (0, len(scores)), value=1.0)  # (B, h, N, dk + 1 or 2)
    keys = torch.cat([split_heads(tokens, heads), *(score[..., None] for score in scores)], -1)
    # Its kernels take multiples of eight channels; for others it would hold all scores in memory.
    query, keys, padded = (F.pad(t, (0, -t.shape[-1] % 8)) for t in (query, keys, values))
    out = F.scaled_dot_product_attention(query, keys, padded, scale=math.log(2))
    out = out[..., : values.shape[-1]].transpose(1, 2).flatten(2)
    return out if dtype == key_scores.dtype else _Restored.apply(out, factor)


class _Rounded(torch.autograd.Function):
    """Tensors (B, .., ..) in a 16-bit dtype, and ones (B, 1, 1), whose gradient is the factor `_Restored` took off."""

    @staticmethod
    def forward(ctx: Context, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        keep_undefined(ctx)
        return *(t.to(dtype) for t in tensors), tensors[0].new_ones(tensors[0].shape[0], 1, 1)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *of_tensors, factor = grads
        if factor is None:
            return None, *of_tensors
        return None, *(None if g is None else g * factor for g in of_tensors)


class _Restored(torch.autograd.Function):
    """A 16-bit tensor (B, .., ..) in the factor's dtype; float16 gradients are rounded with their size taken off."""

    @staticmethod
    def forward(ctx: Context, tensor: Tensor, factor: Tensor) -> Tensor:
        keep_undefined(ctx)
        ctx.dtype = tensor.dtype
        return tensor.to(factor.dtype)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        (dout,) = grads
        if dout is None:
            return None, None
        if ctx.dtype != torch.float16:
            return dout.to(ctx.dtype), dout.new_ones(dout.shape[0], 1, 1)
        factor = magnitude(dout)
        return (dout / factor).to(ctx.dtype), factor
