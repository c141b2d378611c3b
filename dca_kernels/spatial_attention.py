"""Stage 3 of the `triton` backend: spatial cross-attention. docs/algebra.md derives its scores."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dca_kernels import launch
from dca_kernels.parameters import Attention
from dca_kernels.primitives import (
    image_rows,
    kernel,
    load_concatenated,
    load_vector,
    offset,
    padded,
    split_program,
    store_affine_gradients,
    total,
    without_removed,
)
from dca_kernels.tokens import Tokens, layer_norm_backward, normalised_of


@triton.constexpr_function
def _first_head(heads, i):
    """How many heads the scales before scale i have."""
    return sum(heads[k] for k in range(i))


@kernel
def _spatial_attention_kernel(
    tokens_ptr, normalised_ptr, level_ptr, q_weights, q_biases, k_weights, v_weights, v_biases, p_weights, p_biases,
    attended_ptr, projected_ptr, scores_ptr,
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
                v_biases[i], p_weights[i], p_biases[i], attended_ptr, projected_ptr,
                scores_ptr, (b * ALL_HEADS + every_head) * 2 * N, b, head, offs_m, N, total(CHANNELS),
                offset(CHANNELS, i), total(CHANNELS) // HEADS[i], CHANNELS[i] // HEADS[i], PRECISION, ACC, BLOCK_N,
            )  # fmt: skip


@triton.jit
def _attend(
    tokens_ptr, normalised_ptr, level_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr, v_weight_ptr, v_bias_ptr,
    p_weight_ptr, p_bias_ptr, attended_ptr, projected_ptr, scores_ptr, scores_offset, b, head, offs_m,
    N: tl.constexpr, TOTAL: tl.constexpr, OFFSET: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """tokens + projection of softmax(scores) values; keys and values are the normalised tokens, online softmax."""
    tokens_ptr += b * N * TOTAL
    normalised_ptr += b * N * TOTAL
    offs_k = head * DK + tl.arange(0, padded(DK))
    offs_v = head * DV + tl.arange(0, padded(DV))
    mask_k, mask_v, mask_m = offs_k < (head + 1) * DK, offs_v < (head + 1) * DV, offs_m < N

    pair, key = _load_pair_and_key(
        q_weight_ptr, q_bias_ptr, k_weight_ptr, level_ptr + b * TOTAL, offs_k, mask_k, DK, ACC
    )
    query = _load_tokens(normalised_ptr, offs_m, offs_k, mask_m, mask_k, TOTAL)
    if scores_ptr is not None:  # the backward will need them
        key_scores = tl.sum(query.to(ACC) * key[None, :], 1)
        tl.store(scores_ptr + scores_offset + offs_m, key_scores, mask=mask_m)
    query = (query.to(ACC) * pair[None, :] + key[None, :]).to(query.dtype)

    most = tl.full(offs_m.shape, float("-inf"), ACC)
    normaliser = tl.zeros(offs_m.shape, ACC)
    attended = tl.zeros([offs_m.shape[0], padded(DV)], ACC)
    WHOLE: tl.constexpr = N // BLOCK_N * BLOCK_N
    for start in range(0, WHOLE, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        most, normaliser, attended = _attend_keys(
            most, normaliser, attended, query, normalised_ptr, offs_n, offs_k, OFFSET + offs_v, mask_k, mask_v, N,
            TOTAL, PRECISION, ACC, WHOLE,
        )  # fmt: skip
    if WHOLE < N:
        offs_n = WHOLE + tl.arange(0, BLOCK_N)
        most, normaliser, attended = _attend_keys(
            most, normaliser, attended, query, normalised_ptr, offs_n, offs_k, OFFSET + offs_v, mask_k, mask_v, N,
            TOTAL, PRECISION, ACC, WHOLE + BLOCK_N,
        )  # fmt: skip

    p_weight = load_vector(p_weight_ptr, offs_v, mask_v, ACC)
    weight = p_weight * load_vector(v_weight_ptr, offs_v, mask_v, ACC)
    projected = attended / normaliser[:, None] * weight[None, :]
    out_offs = b * N * TOTAL + offs_m[:, None] * TOTAL + (OFFSET + offs_v)[None, :]
    mask = mask_m[:, None] & mask_v[None, :]
    if scores_ptr is not None:
        tl.store(scores_ptr + scores_offset + N + offs_m, most + tl.log2(normaliser), mask=mask_m)
        tl.store(projected_ptr + out_offs, projected, mask=mask)
    bias = p_weight * load_vector(v_bias_ptr, offs_v, mask_v, ACC) + load_vector(p_bias_ptr, offs_v, mask_v, ACC)
    bias += weight * load_vector(level_ptr + b * TOTAL + OFFSET, offs_v, mask_v, ACC)
    out = projected + bias[None, :]
    out += _load_tokens(tokens_ptr, offs_m, OFFSET + offs_v, mask_m, mask_v, TOTAL).to(ACC)
    tl.store(attended_ptr + out_offs, out, mask=mask)


@triton.jit
def _attend_keys(
    most, normaliser, attended, query, normalised_ptr, offs_n, offs_k, own, mask_k, mask_v,
    N: tl.constexpr, TOTAL: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, END: tl.constexpr,
):  # fmt: skip
    """Online softmax: largest score, sum of weights, weighted values, with the keys offs_n < END as well."""
    mask_n = _exist(offs_n, N, END)
    keys = _load_tokens(normalised_ptr, offs_n, offs_k, mask_n, mask_k, TOTAL)
    values = _load_tokens(normalised_ptr, offs_n, own, mask_n, mask_v, TOTAL)
    scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION, out_dtype=ACC)
    if END > N:
        scores = tl.where(mask_n[None, :], scores, float("-inf"))
    larger = tl.maximum(most, tl.max(scores, 1))
    weights = tl.exp2(scores - larger[:, None])
    shrink = tl.exp2(most - larger)
    normaliser = normaliser * shrink + tl.sum(weights, 1)
    attended = tl.dot(
        weights.to(values.dtype), values, attended * shrink[:, None], input_precision=PRECISION, out_dtype=ACC
    )
    return larger, normaliser, attended


@triton.jit
def _exist(offs_n, N: tl.constexpr, END: tl.constexpr):
    """Which tokens before END there are: a constant where all are, so that no tile but the last one is masked."""
    if END > N:
        return offs_n < N
    return tl.full(offs_n.shape, True, tl.int1)


@triton.jit
def _load_pair_and_key(
    q_weight_ptr, q_bias_ptr, k_weight_ptr, level_ptr, offs_k, mask_k, DK: tl.constexpr, ACC: tl.constexpr
):
    """score[m, n] = sum over k of (pair_k d_mk + key_k) d_nk, times log2(e); d: the tokens less their level."""
    scale: tl.constexpr = DK**-0.5 * 1.4426950408889634
    q_weight, q_bias = load_vector(q_weight_ptr, offs_k, mask_k, ACC), load_vector(q_bias_ptr, offs_k, mask_k, ACC)
    k_weight, level = load_vector(k_weight_ptr, offs_k, mask_k, ACC), load_vector(level_ptr, offs_k, mask_k, ACC)
    return scale * q_weight * k_weight, scale * (q_weight * level + q_bias) * k_weight


@triton.jit
def _load_tokens(ptr, offs_n, offs_c, mask_n, mask_c, TOTAL: tl.constexpr):
    """[tokens, channels] of one image, zero beyond the masks."""
    mask = mask_n[:, None] & mask_c[None, :]
    return tl.load(ptr + offs_n[:, None] * TOTAL + offs_c[None, :], mask=mask, other=0.0)


@kernel
def _expected_gradient_kernel(
    scores_ptr, projected_ptr, dattended_ptr, expected_ptr,
    N: tl.constexpr, CHANNELS: tl.constexpr, HEADS: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: for BLOCK_N queries of one head of one scale, the gradient of a weight that all weights expect.

    The softmax subtracts it: sum over channels of dattended (B, N, C) times projected (B, N, C). Beside it, in
    (B, heads, 2, N), what is subtracted from scores where these queries are columns.
    """
    ALL_HEADS: tl.constexpr = _first_head(HEADS, len(HEADS))
    BLOCKS: tl.constexpr = triton.cdiv(N, BLOCK_N)
    b, tile = split_program(ALL_HEADS * BLOCKS)
    every_head = tile // BLOCKS
    offs_n = tile % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    image = b * N * total(CHANNELS)
    for i in tl.static_range(len(CHANNELS)):
        head = every_head - _first_head(HEADS, i)
        if (head >= 0) & (head < HEADS[i]):
            DV: tl.constexpr = CHANNELS[i] // HEADS[i]
            offs_v = head * DV + tl.arange(0, padded(DV))
            own, mask_v = offset(CHANNELS, i) + offs_v, offs_v < (head + 1) * DV
            dattended = _load_tokens(dattended_ptr + image, offs_n, own, offs_n < N, mask_v, total(CHANNELS)).to(ACC)
            projected = _load_tokens(projected_ptr + image, offs_n, own, offs_n < N, mask_v, total(CHANNELS)).to(ACC)
            rows = (b * ALL_HEADS + every_head) * 2 * N + offs_n
            key_score = tl.load(scores_ptr + rows, mask=offs_n < N)
            normaliser = tl.load(scores_ptr + rows + N, mask=offs_n < N)
            tl.store(expected_ptr + rows, tl.sum(dattended * projected, 1), mask=offs_n < N)
            tl.store(expected_ptr + rows + N, key_score + normaliser, mask=offs_n < N)


@kernel
def _spatial_attention_backward_kernel(
    normalised_ptr, level_ptr, scores_ptr, expected_ptr, dattended_ptr, q_weights, q_biases, k_weights, v_weights,
    p_weights, dnormalised_ptr, dvalues_ptr, dpair_ptr, dweight_ptr,
    N: tl.constexpr, CHANNELS: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M tokens of one head of one scale, as queries and as keys and values, against all tokens.

    Writes the gradients of the normalised tokens (B, S, N, C), through the scores, and of the values (B, N, C); and
    sums over its tokens: of pair and key, (B, BLOCKS, S, 2, C), and of weight and bias of the result,
    (B, BLOCKS, 2, C).
    """
    ALL_HEADS: tl.constexpr = _first_head(HEADS, len(HEADS))
    BLOCKS: tl.constexpr = triton.cdiv(N, BLOCK_M)
    b, tile = split_program(ALL_HEADS * BLOCKS)
    every_head = ALL_HEADS - 1 - tile // BLOCKS
    block = tile % BLOCKS
    for i in tl.static_range(len(CHANNELS)):
        head = every_head - _first_head(HEADS, i)
        if (head >= 0) & (head < HEADS[i]):
            _attend_backward(
                normalised_ptr, level_ptr, scores_ptr + (b * ALL_HEADS + every_head) * 2 * N,
                expected_ptr + (b * ALL_HEADS + every_head) * 2 * N, dattended_ptr, q_weights[i], q_biases[i],
                k_weights[i], v_weights[i], p_weights[i],
                dnormalised_ptr + (b * len(CHANNELS) + i) * N * total(CHANNELS), dvalues_ptr,
                dpair_ptr + ((b * BLOCKS + block) * len(CHANNELS) + i) * 2 * total(CHANNELS),
                dweight_ptr + (b * BLOCKS + block) * 2 * total(CHANNELS), b, head,
                block * BLOCK_M + tl.arange(0, BLOCK_M), N, total(CHANNELS), offset(CHANNELS, i),
                total(CHANNELS) // HEADS[i], CHANNELS[i] // HEADS[i], PRECISION, ACC, BLOCK_N,
            )  # fmt: skip


@triton.jit
def _attend_backward(
    normalised_ptr, level_ptr, scores_ptr, expected_ptr, dattended_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr,
    v_weight_ptr, p_weight_ptr, dnormalised_ptr, dvalues_ptr, dpair_ptr, dweight_ptr, b, head, offs_m,
    N: tl.constexpr, TOTAL: tl.constexpr, OFFSET: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """With A = dS + dS^T, S the scores: d d_m = pair * sum over n of A[m, n] d_n + key * sum over n of dS[n, m]."""
    image = b * N * TOTAL
    offs_k = head * DK + tl.arange(0, padded(DK))
    offs_v = head * DV + tl.arange(0, padded(DV))
    mask_k, mask_v, mask_m = offs_k < (head + 1) * DK, offs_v < (head + 1) * DV, offs_m < N
    own = OFFSET + offs_v
    pair, key = _load_pair_and_key(
        q_weight_ptr, q_bias_ptr, k_weight_ptr, level_ptr + b * TOTAL, offs_k, mask_k, DK, ACC
    )
    weight = load_vector(p_weight_ptr, offs_v, mask_v, ACC) * load_vector(v_weight_ptr, offs_v, mask_v, ACC)
    tokens_m = _load_tokens(normalised_ptr + image, offs_m, offs_k, mask_m, mask_k, TOTAL)
    query = (tokens_m.to(ACC) * pair[None, :] + key[None, :]).to(tokens_m.dtype)
    values_m = _load_tokens(normalised_ptr + image, offs_m, own, mask_m, mask_v, TOTAL)
    values_m = (values_m.to(ACC) * weight[None, :]).to(values_m.dtype)
    dattended_m = _load_tokens(dattended_ptr + image, offs_m, own, mask_m, mask_v, TOTAL)
    tl.store(dweight_ptr + TOTAL + own, tl.sum(dattended_m.to(ACC), 0), mask=mask_v)
    dattended_m = (dattended_m.to(ACC) * weight[None, :]).to(values_m.dtype)
    key_score_m = tl.load(scores_ptr + offs_m, mask=mask_m, other=0.0)
    normaliser_m = tl.load(scores_ptr + N + offs_m, mask=mask_m, other=float("inf"))  # rows beyond have no weight
    expected_m = tl.load(expected_ptr + offs_m, mask=mask_m, other=0.0)

    through_pairs = tl.zeros(query.shape, ACC)
    through_keys = tl.zeros(offs_m.shape, ACC)
    dvalues = tl.zeros(values_m.shape, ACC)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        tokens_n = _load_tokens(normalised_ptr + image, offs_n, offs_k, mask_n, mask_k, TOTAL)
        values_n = _load_tokens(normalised_ptr + image, offs_n, own, mask_n, mask_v, TOTAL)
        dattended_n = _load_tokens(dattended_ptr + image, offs_n, own, mask_n, mask_v, TOTAL)
        expected_n = tl.load(expected_ptr + offs_n, mask=mask_n, other=0.0)
        normaliser_n = tl.load(expected_ptr + N + offs_n, mask=mask_n, other=float("inf"))
        scores = tl.dot(query, tl.trans(tokens_n), input_precision=PRECISION, out_dtype=ACC)
        columns = tl.exp2(scores + key_score_m[:, None] - normaliser_n[None, :])  # weight[n, m]
        along_columns = tl.dot(values_m, tl.trans(dattended_n), input_precision=PRECISION, out_dtype=ACC)
        dvalues = tl.dot(columns.to(tokens_n.dtype), dattended_n, dvalues, input_precision=PRECISION, out_dtype=ACC)
        dcolumns = columns * (along_columns - expected_n[None, :])
        through_keys += tl.sum(dcolumns, 1)
        rows = tl.exp2(scores - normaliser_m[:, None])  # weight[m, n]
        if N % BLOCK_N != 0:
            rows = tl.where(mask_n[None, :], rows, 0.0)
        along_rows = tl.dot(dattended_m, tl.trans(values_n), input_precision=PRECISION, out_dtype=ACC)
        both = rows * (along_rows - expected_m[:, None]) + dcolumns
        through_pairs = tl.dot(
            both.to(tokens_n.dtype), tokens_n, through_pairs, input_precision=PRECISION, out_dtype=ACC
        )

    # What follows is loaded again, and one result done before the next: else they would spill.
    tl.debug_barrier()
    values_m = _load_tokens(normalised_ptr + image, offs_m, own, mask_m, mask_v, TOTAL).to(ACC)
    weight = load_vector(p_weight_ptr, offs_v, mask_v, ACC) * load_vector(v_weight_ptr, offs_v, mask_v, ACC)
    mask = mask_m[:, None] & mask_v[None, :]
    tl.store(dvalues_ptr + image + offs_m[:, None] * TOTAL + own[None, :], dvalues * weight[None, :], mask=mask)
    tl.store(dweight_ptr + own, tl.sum(dvalues * values_m, 0), mask=mask_v)
    tl.debug_barrier()
    tokens_m = _load_tokens(normalised_ptr + image, offs_m, offs_k, mask_m, mask_k, TOTAL).to(ACC)
    through_pairs *= 0.6931471805599453
    through_keys = tl.where(mask_m, through_keys * 0.6931471805599453, 0.0)
    tl.store(dpair_ptr + offs_k, 0.5 * tl.sum(through_pairs * tokens_m, 0), mask=mask_k)
    tl.store(dpair_ptr + TOTAL + offs_k, tl.sum(through_keys[:, None] * tokens_m, 0), mask=mask_k)
    tl.debug_barrier()
    pair, key = _load_pair_and_key(
        q_weight_ptr, q_bias_ptr, k_weight_ptr, level_ptr + b * TOTAL, offs_k, mask_k, DK, ACC
    )
    dtokens = through_pairs * pair[None, :] + through_keys[:, None] * key[None, :]
    mask = mask_m[:, None] & mask_k[None, :]
    tl.store(dnormalised_ptr + offs_m[:, None] * TOTAL + offs_k[None, :], dtokens, mask=mask)


@kernel
def _spatial_gradients_kernel(
    level_ptr, dpair_ptr, dweight_ptr, daffine_ptr, q_weights, q_biases, k_weights, v_weights, v_biases, p_weights,
    gradients_ptr, batch,
    CHANNELS: tl.constexpr, HEADS: tl.constexpr, BLOCKS: tl.constexpr, AFFINE_BLOCKS: tl.constexpr,
    REMOVED: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_C channels of some of the maps' gradients, summed over images in a fixed order.

    gradients (S, 4, C) of q weight, q bias, k weight and k bias, then (4, C) of v weight, v bias, p weight and p bias,
    then (2, C) of LayerNorm's. The key map's bias drops out of the softmax.
    """
    TOTAL: tl.constexpr = total(CHANNELS)
    SCALES: tl.constexpr = len(CHANNELS)
    TILES: tl.constexpr = triton.cdiv(TOTAL, BLOCK_C)
    pid = tl.program_id(0)
    offs_c = pid % TILES * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < TOTAL
    for i in tl.static_range(SCALES):
        if pid // TILES == i:
            scale: tl.constexpr = (TOTAL // HEADS[i]) ** -0.5 * 1.4426950408889634
            q_weight = scale * load_vector(q_weights[i], offs_c, mask_c, ACC)
            q_bias = scale * load_vector(q_biases[i], offs_c, mask_c, ACC)
            k_weight = scale * load_vector(k_weights[i], offs_c, mask_c, ACC)
            dpair, dkey = _sum_levelled(
                dpair_ptr + i * 2 * TOTAL, level_ptr, offs_c, mask_c, batch, BLOCKS, SCALES * 2 * TOTAL, TOTAL, ACC
            )
            out_ptr = gradients_ptr + i * 4 * TOTAL + offs_c
            tl.store(out_ptr, k_weight * dpair, mask=mask_c)
            tl.store(out_ptr + TOTAL, k_weight * dkey, mask=mask_c)
            tl.store(out_ptr + 2 * TOTAL, q_weight * dpair + q_bias * dkey, mask=mask_c)
            tl.store(out_ptr + 3 * TOTAL, tl.zeros([BLOCK_C], ACC), mask=mask_c)
    if pid // TILES == SCALES:
        v_weight = load_concatenated(v_weights, offs_c, CHANNELS, ACC)
        v_bias = load_concatenated(v_biases, offs_c, CHANNELS, ACC)
        p_weight = load_concatenated(p_weights, offs_c, CHANNELS, ACC)
        dweight, dbias = _sum_levelled(dweight_ptr, level_ptr, offs_c, mask_c, batch, BLOCKS, 2 * TOTAL, TOTAL, ACC)
        dbias = without_removed(dbias, offs_c, CHANNELS, REMOVED)
        out_ptr = gradients_ptr + SCALES * 4 * TOTAL + offs_c
        tl.store(out_ptr, p_weight * dweight, mask=mask_c)
        tl.store(out_ptr + TOTAL, p_weight * dbias, mask=mask_c)
        tl.store(out_ptr + 2 * TOTAL, v_weight * dweight + v_bias * dbias, mask=mask_c)
        tl.store(out_ptr + 3 * TOTAL, dbias, mask=mask_c)
    if pid // TILES > SCALES:
        offs = (pid - (SCALES + 1) * TILES) * BLOCK_C + tl.arange(0, BLOCK_C)
        affine_ptr = gradients_ptr + (SCALES + 1) * 4 * TOTAL
        store_affine_gradients(daffine_ptr, affine_ptr, offs, batch, TOTAL, AFFINE_BLOCKS, ACC)


@triton.jit
def _sum_levelled(
    ptr, level_ptr, offs, mask, batch, BLOCKS: tl.constexpr, STRIDE: tl.constexpr, TOTAL: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """As `sum_images`, of vectors in pairs, TOTAL apart: the first plus level times the second; and the second."""
    ROWS: tl.constexpr = 2048 // offs.shape[0]
    levelled = tl.zeros([ROWS, offs.shape[0]], ACC)
    plain = tl.zeros([ROWS, offs.shape[0]], ACC)
    for start in range(0, batch * BLOCKS, ROWS):
        b, begin, mask_row = image_rows(start, ROWS, batch, BLOCKS, STRIDE, BLOCKS * STRIDE)
        here = mask_row[:, None] & mask[None, :]
        ptrs = ptr + begin[:, None] + offs[None, :]
        first, second = tl.load(ptrs, mask=here, other=0.0), tl.load(ptrs + TOTAL, mask=here, other=0.0)
        level = tl.load(level_ptr + (b * TOTAL)[:, None] + offs[None, :], mask=here, other=0.0)
        levelled += first + second * level
        plain += second
    return tl.sum(levelled, 0), tl.sum(plain, 0)


class Saved(NamedTuple):
    """What the backward of one spatial attention needs: token-sized tensors."""

    tokens: Tokens
    normalised: Tensor
    level: Tensor
    projected: Tensor
    scores: Tensor


def spatial_attention(tokens: Tokens, attention: Attention, training: bool) -> tuple[Tokens, Saved | None]:
    """Attend across tokens, with the residual (paper, eq. 4).

    Args:
        tokens: normalised for the attention's norms, or not yet.
        attention: its parameters. The key map's bias drops out.
        training: whether there will be a backward.

    Returns:
        The tokens, and what the backward needs.
    """
    batch, count, _ = tokens.shape
    normalised, level = normalised_of(tokens, attention.norms)
    heads = tuple(attention.heads)
    config, shared = _configured("spatial_attention", tokens, heads)
    attended = Tokens(torch.empty_like(tokens.values), tokens.channels)
    projected = torch.empty_like(tokens.values) if training else None
    scores = tokens.new_empty(batch, sum(heads), 2, count) if training else None
    launch.run(
        _spatial_attention_kernel,
        batch * sum(heads) * launch.blocks(count, config["block_m"]),
        config,
        tokens_ptr=tokens.values,
        normalised_ptr=normalised,
        level_ptr=level,
        q_weights=launch.weights(attention.q_maps),
        q_biases=launch.biases(attention.q_maps),
        k_weights=launch.weights(attention.k_maps),
        v_weights=launch.weights(attention.v_maps),
        v_biases=launch.biases(attention.v_maps),
        p_weights=launch.weights(attention.projections),
        p_biases=launch.biases(attention.projections),
        attended_ptr=attended.values,
        projected_ptr=projected,
        scores_ptr=scores,
        **shared,
    )
    if projected is None or scores is None:
        return attended, None
    return attended, Saved(tokens, normalised, level, projected, scores)


def spatial_attention_backward(
    saved: Saved, dattended: Tensor, attention: Attention, removed: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """The gradients of `spatial_attention`, through its LayerNorm and its residual.

    Args:
        saved: what the forward returned.
        dattended: (B, N, C), the gradient of its result, in the tokens' dtype.
        attention: as in the forward.
        removed: for each scale, whether the BatchNorm behind removes a per-channel constant added here.

    Returns:
        The gradient of the tokens, (B, N, C), and of the parameters, see `split_gradients`.
    """
    tokens = saved.tokens
    batch, count, width = tokens.shape
    scales = len(tokens.channels)
    heads = tuple(attention.heads)
    config, shared = _configured("spatial_attention_backward", tokens, heads)
    blocks = launch.blocks(count, config["block_m"])
    dnormalised = tokens.new_empty(batch, scales, count, width, dtype=tokens.values.dtype)
    dvalues = torch.empty_like(tokens.values)
    dpair = tokens.new_empty(batch, blocks, scales, 2, width)
    dweight = tokens.new_empty(batch, blocks, 2, width)
    block_n = 128
    expected = tokens.new_empty(batch, sum(heads), 2, count)
    launch.run(
        _expected_gradient_kernel,
        batch * sum(heads) * launch.blocks(count, block_n),
        {"num_warps": 4, "num_stages": 2},
        scores_ptr=saved.scores,
        projected_ptr=saved.projected,
        dattended_ptr=dattended,
        expected_ptr=expected,
        N=count,
        CHANNELS=tokens.channels,
        HEADS=heads,
        ACC=shared["ACC"],
        BLOCK_N=block_n,
    )
    launch.run(
        _spatial_attention_backward_kernel,
        batch * sum(heads) * blocks,
        config,
        normalised_ptr=saved.normalised,
        level_ptr=saved.level,
        scores_ptr=saved.scores,
        expected_ptr=expected,
        dattended_ptr=dattended,
        q_weights=launch.weights(attention.q_maps),
        q_biases=launch.biases(attention.q_maps),
        k_weights=launch.weights(attention.k_maps),
        v_weights=launch.weights(attention.v_maps),
        p_weights=launch.weights(attention.projections),
        dnormalised_ptr=dnormalised,
        dvalues_ptr=dvalues,
        dpair_ptr=dpair,
        dweight_ptr=dweight,
        **shared,
    )

    dtokens, daffine = layer_norm_backward(tokens, attention.norms, dnormalised, dvalues, dattended)

    block_c = 8
    gradients = tokens.new_empty(4 * scales + 6, width, dtype=attention.q_maps[0].weight.dtype)
    launch.run(
        _spatial_gradients_kernel,
        (scales + 1) * launch.blocks(width, block_c) + launch.blocks(2 * width, block_c),
        {"num_warps": 4, "num_stages": 2},
        level_ptr=saved.level,
        dpair_ptr=dpair,
        dweight_ptr=dweight,
        daffine_ptr=daffine,
        q_weights=launch.weights(attention.q_maps),
        q_biases=launch.biases(attention.q_maps),
        k_weights=launch.weights(attention.k_maps),
        v_weights=launch.weights(attention.v_maps),
        v_biases=launch.biases(attention.v_maps),
        p_weights=launch.weights(attention.projections),
        gradients_ptr=gradients,
        batch=batch,
        CHANNELS=tokens.channels,
        HEADS=heads,
        BLOCKS=blocks,
        AFFINE_BLOCKS=daffine.shape[1],
        REMOVED=tuple(removed),
        ACC=shared["ACC"],
        BLOCK_C=block_c,
    )
    return dtokens, gradients


def split_gradients(gradients: Tensor, channels: Sequence[int]) -> list[Sequence[Tensor]]:
    """What `spatial_attention_backward` returned of the parameters, a weight and a bias of S scales after the other.

    In the order of norms, q, k, v maps and projections.
    """
    query_key, own = gradients.split([4 * len(channels), 6])
    v_weight, v_bias, p_weight, p_bias, gamma, beta = (row.split(channels) for row in own)
    q_weight, q_bias, k_weight, k_bias = (query_key[k::4].unbind() for k in range(4))
    return [gamma, beta, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, p_weight, p_bias]


def _configured(kernel: str, tokens: Tokens, heads: tuple[int, ...]) -> tuple[dict[str, int], dict[str, Any]]:
    """A kernel's configuration, and the arguments that forward and backward share."""
    target, dtype = launch.architecture(tokens.values.device), tokens.values.dtype
    config = launch.configuration(kernel, target, dtype, launch.padded(tokens.shape[2] // min(heads)))
    precision = launch.precision(dtype, target)
    if precision == "tf32x3" and config.get("ieee"):  # wide heads spill otherwise
        precision = "ieee"
    return config, {
        "N": tokens.shape[1],
        "CHANNELS": tokens.channels,
        "HEADS": heads,
        "PRECISION": precision,
        "ACC": launch.triton_type(tokens.accumulation),
        "BLOCK_M": config["block_m"],
        "BLOCK_N": config["block_n"],
    }
