"""Stage 3 of the `triton` backend: spatial cross-attention. docs/algebra.md derives its scores."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from dca_kernels import launch
from dca_kernels.primitives import load_vector, offset, padded, split_program, total
from dca_kernels.tokens import Tokens, normalised_of


@triton.constexpr_function
def _first_head(heads, i):
    """How many heads the scales before scale i have."""
    return sum(heads[k] for k in range(i))


@triton.jit
def _spatial_attention_kernel(
    tokens_ptr, normalised_ptr, level_ptr, q_weights, q_biases, k_weights, v_weights, v_biases, p_weights, p_biases,
    attended_ptr,
    N: tl.constexpr, CHANNELS: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head of one scale, against all keys."""
    ALL_HEADS: tl.constexpr = _first_head(HEADS, len(HEADS))
    BLOCKS: tl.constexpr = triton.cdiv(N, BLOCK_M)
    b, tile = split_program(ALL_HEADS * BLOCKS)
    every_head = ALL_HEADS - 1 - tile // BLOCKS  # the widest scale, usually the last, first
    offs_m = tile % BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    for i in tl.static_range(len(CHANNELS)):
        head = every_head - _first_head(HEADS, i)
        if (head >= 0) & (head < HEADS[i]):
            _attend(
                tokens_ptr, normalised_ptr, level_ptr, q_weights[i], q_biases[i], k_weights[i], v_weights[i],
                v_biases[i], p_weights[i], p_biases[i], attended_ptr, b, head, offs_m, N, total(CHANNELS),
                offset(CHANNELS, i), total(CHANNELS) // HEADS[i], CHANNELS[i] // HEADS[i], PRECISION, ACC, BLOCK_N,
            )  # fmt: skip


@triton.jit
def _attend(
    tokens_ptr, normalised_ptr, level_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr, v_weight_ptr, v_bias_ptr,
    p_weight_ptr, p_bias_ptr, attended_ptr, b, head, offs_m,
    N: tl.constexpr, TOTAL: tl.constexpr, OFFSET: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """tokens + projection of softmax(scores) values; keys and values are the normalised tokens, online softmax."""
    tokens_ptr += b * N * TOTAL
    normalised_ptr += b * N * TOTAL
    offs_k = head * DK + tl.arange(0, padded(DK))
    offs_v = head * DV + tl.arange(0, padded(DV))
    mask_k, mask_v, mask_m = offs_k < (head + 1) * DK, offs_v < (head + 1) * DV, offs_m < N

    # score[m, n] = sum over k of (pair_k d_mk + key_k) d_nk, times log2(e)
    scale: tl.constexpr = DK**-0.5 * 1.4426950408889634
    q_weight, q_bias = load_vector(q_weight_ptr, offs_k, mask_k, ACC), load_vector(q_bias_ptr, offs_k, mask_k, ACC)
    k_weight = load_vector(k_weight_ptr, offs_k, mask_k, ACC)
    level = load_vector(level_ptr + b * TOTAL, offs_k, mask_k, ACC)
    pair = scale * q_weight * k_weight
    key = scale * (q_weight * level + q_bias) * k_weight
    query = _load_tokens(normalised_ptr, offs_m, offs_k, mask_m, mask_k, TOTAL)
    query = (query.to(ACC) * pair[None, :] + key[None, :]).to(query.dtype)

    most = tl.full(offs_m.shape, float("-inf"), ACC)
    normaliser = tl.zeros(offs_m.shape, ACC)
    attended = tl.zeros([offs_m.shape[0], padded(DV)], ACC)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        keys = _load_tokens(normalised_ptr, offs_n, offs_k, offs_n < N, mask_k, TOTAL)
        scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION, out_dtype=ACC)
        if N % BLOCK_N != 0:
            scores = tl.where((offs_n < N)[None, :], scores, float("-inf"))
        previous, most = most, tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp2(scores - most[:, None])
        shrink = tl.exp2(previous - most)
        normaliser = normaliser * shrink + tl.sum(weights, 1)
        values = _load_tokens(normalised_ptr, offs_n, OFFSET + offs_v, offs_n < N, mask_v, TOTAL)
        attended = tl.dot(
            weights.to(values.dtype), values, attended * shrink[:, None], input_precision=PRECISION, out_dtype=ACC
        )

    p_weight = load_vector(p_weight_ptr, offs_v, mask_v, ACC)
    weight = p_weight * load_vector(v_weight_ptr, offs_v, mask_v, ACC)
    bias = p_weight * load_vector(v_bias_ptr, offs_v, mask_v, ACC) + load_vector(p_bias_ptr, offs_v, mask_v, ACC)
    bias += weight * load_vector(level_ptr + b * TOTAL + OFFSET, offs_v, mask_v, ACC)
    out = attended / normaliser[:, None] * weight[None, :] + bias[None, :]
    out += _load_tokens(tokens_ptr, offs_m, OFFSET + offs_v, mask_m, mask_v, TOTAL).to(ACC)
    out_ptrs = attended_ptr + b * N * TOTAL + offs_m[:, None] * TOTAL + (OFFSET + offs_v)[None, :]
    tl.store(out_ptrs, out, mask=mask_m[:, None] & mask_v[None, :])


@triton.jit
def _load_tokens(ptr, offs_n, offs_c, mask_n, mask_c, TOTAL: tl.constexpr):
    """[tokens, channels] of one image, zero beyond the masks."""
    mask = mask_n[:, None] & mask_c[None, :]
    return tl.load(ptr + offs_n[:, None] * TOTAL + offs_c[None, :], mask=mask, other=0.0)


def spatial_attention(tokens: Tokens, norms: Sequence[Any], attentions: Sequence[Any]) -> Tokens:
    """Attend across tokens, with the residual (paper, eq. 4).

    Args:
        tokens: normalised for `norms`, or not yet.
        norms: S LayerNorms over C_i.
        attentions: S modules with `q_map`, `k_map`, `v_map`, `projection` and `heads`. The key map's bias drops out.

    Returns:
        The tokens.
    """
    batch, count, _ = tokens.shape
    normalised, level = normalised_of(tokens, norms)
    target, dtype = launch.architecture(tokens.values.device), tokens.values.dtype
    heads = tuple(attention.heads for attention in attentions)
    config = launch.configuration("spatial_attention", target, dtype, launch.padded(tokens.shape[2] // min(heads)))
    attended = Tokens(torch.empty_like(tokens.values), tokens.channels)
    q_maps = [launch.depthwise(attention.q_map) for attention in attentions]
    k_maps = [launch.depthwise(attention.k_map) for attention in attentions]
    v_maps = [launch.depthwise(attention.v_map) for attention in attentions]
    projections = [launch.depthwise(attention.projection) for attention in attentions]
    launch.run(
        _spatial_attention_kernel,
        batch * sum(heads) * launch.blocks(count, config["block_m"]),
        config,
        tokens_ptr=tokens.values,
        normalised_ptr=normalised,
        level_ptr=level,
        q_weights=launch.weights(q_maps),
        q_biases=launch.biases(q_maps),
        k_weights=launch.weights(k_maps),
        v_weights=launch.weights(v_maps),
        v_biases=launch.biases(v_maps),
        p_weights=launch.weights(projections),
        p_biases=launch.biases(projections),
        attended_ptr=attended.values,
        N=count,
        CHANNELS=tokens.channels,
        HEADS=heads,
        PRECISION="ieee" if config.get("ieee") else launch.precision(dtype, target),  # wide heads spill otherwise
        ACC=launch.triton_type(tokens.accumulation),
        BLOCK_M=config["block_m"],
        BLOCK_N=config["block_n"],
    )
    return attended
