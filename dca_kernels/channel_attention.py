"""Stage 2 of the `triton` backend: channel cross-attention. docs/algebra.md derives the three products."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dca_kernels import launch
from dca_kernels.parameters import Attention, LayerNorm
from dca_kernels.primitives import (
    blocks_before,
    kernel,
    load_vector,
    offset,
    padded,
    split_program,
    statistics_pointers,
    store_affine_gradients,
    store_layer_norm_backward,
    store_normalised,
    sum_blocks,
    sum_images,
    total,
    without_removed,
)
from dca_kernels.tokens import Tokens, statistics_of


@kernel
def _centre_kernel(
    tokens_ptr, statistics_ptr, sums_ptr, gammas, betas, centred_ptr, mean_ptr,
    N: tl.constexpr, CHANNELS: tl.constexpr, SUM_BLOCKS: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: the centred tokens Z (B, N, C), of BLOCK_N tokens and BLOCK_C channels of one scale.

    That is their LayerNorm less its mean over the grid, and rounded then. Writes the means (B, C) as well.
    """
    TOTAL: tl.constexpr = total(CHANNELS)
    TILES: tl.constexpr = blocks_before(CHANNELS, BLOCK_C, len(CHANNELS))
    b, tile = split_program(triton.cdiv(N, BLOCK_N) * TILES)
    offs_n = tile // TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    for i in tl.static_range(len(CHANNELS)):
        block = tile % TILES - blocks_before(CHANNELS, BLOCK_C, i)
        if (block >= 0) & (block < triton.cdiv(CHANNELS[i], BLOCK_C)):
            offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
            mask_c = offs_c < CHANNELS[i]
            own = offset(CHANNELS, i) + offs_c
            mask = mask_n[:, None] & mask_c[None, :]
            offs = b * N * TOTAL + offs_n[:, None] * TOTAL + own[None, :]
            tokens = tl.load(tokens_ptr + offs, mask=mask, other=0.0).to(ACC)
            mean_ptrs, rstd_ptrs = statistics_pointers(statistics_ptr, b, i, offs_n, N, len(CHANNELS))
            token_mean, rstd = tl.load(mean_ptrs, mask=mask_n, other=0.0), tl.load(rstd_ptrs, mask=mask_n, other=0.0)
            mean = sum_blocks(sums_ptr + b * SUM_BLOCKS * 2 * TOTAL, own, mask_c, SUM_BLOCKS, 2 * TOTAL, ACC) / N
            gamma, beta = load_vector(gammas[i], offs_c, mask_c, ACC), load_vector(betas[i], offs_c, mask_c, ACC)
            centred = gamma[None, :] * ((tokens - token_mean[:, None]) * rstd[:, None] - mean[None, :])
            tl.store(centred_ptr + offs, centred, mask=mask)
            tl.store(mean_ptr + b * TOTAL + own, gamma * mean + beta, mask=mask_c & (tile < TILES))


@kernel
def _covariance_kernel(
    centred_ptr, covariance_ptr,
    N: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: one tile on or below the diagonal of Z^T Z (B, C, C), and its mirror image."""
    TOTAL: tl.constexpr = total(CHANNELS)
    ROWS: tl.constexpr = triton.cdiv(TOTAL, BLOCK_C)
    b, tile = split_program(ROWS * (ROWS + 1) // 2)
    row = 0
    for r in tl.static_range(1, ROWS):
        row = tl.where(tile >= r * (r + 1) // 2, r, row)
    column = tile - row * (row + 1) // 2
    offs_c = row * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_d = column * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c, mask_d = offs_c < TOTAL, offs_d < TOTAL
    centred_ptr += b * N * TOTAL
    covariance = tl.zeros([BLOCK_C, BLOCK_C], ACC)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        left = _load_tile(centred_ptr, offs_n, offs_c, N, TOTAL)
        right = _load_tile(centred_ptr, offs_n, offs_d, N, TOTAL)
        covariance = tl.dot(tl.trans(left), right, covariance, input_precision=PRECISION, out_dtype=ACC)
    covariance_ptr += b * TOTAL * TOTAL
    mask = mask_c[:, None] & mask_d[None, :]
    tl.store(covariance_ptr + offs_c[:, None] * TOTAL + offs_d[None, :], covariance, mask=mask)
    mask = mask_d[:, None] & mask_c[None, :] & (row != column)
    tl.store(covariance_ptr + offs_d[:, None] * TOTAL + offs_c[None, :], tl.trans(covariance), mask=mask)


@triton.jit
def _load_tile(ptr, rows, columns, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Some rows and columns of a matrix, zero beyond it."""
    mask = (rows < HEIGHT)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(ptr + rows[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _add_product(
    out, left_ptr, right_ptr, offs_n, own, TRANSPOSED: tl.constexpr,
    N: tl.constexpr, TOTAL: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out + rows offs_n and columns `own` of the product of a matrix (N, C) and one (C, C) or its transpose."""
    for start in range(0, TOTAL, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        left = _load_tile(left_ptr, offs_n, offs_c, N, TOTAL)
        if TRANSPOSED:
            right = tl.trans(_load_tile(right_ptr, own, offs_c, TOTAL, TOTAL))
        else:
            right = _load_tile(right_ptr, offs_c, own, TOTAL, TOTAL)
        out = tl.dot(left, right, out, input_precision=PRECISION, out_dtype=ACC)
    return out


@kernel
def _mixing_kernel(
    covariance_ptr, mean_ptr, sums_ptr, q_weights, q_biases, k_weights, k_biases, v_weights, v_biases, p_weights,
    p_biases, mixing_ptr, shift_ptr, mean_token_ptr,
    N: tl.constexpr, CHANNELS: tl.constexpr, HEADS: tl.constexpr, SUM_BLOCKS: tl.constexpr,
    ACC: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: the softmax of BLOCK_C channels of one scale, folded with its neighbours into one matrix.

    The attention's result is Z mixing^T + shift, Z as in `_centre_kernel`. Writes mixing (B, C, C), shift (B, C)
    and the mean token behind the residual, (B, C).
    """
    TOTAL: tl.constexpr = total(CHANNELS)
    b, tile = split_program(blocks_before(CHANNELS, BLOCK_C, len(CHANNELS)))
    mean_ptr += b * TOTAL
    offs_d = tl.arange(0, padded(TOTAL))
    mask_d = offs_d < TOTAL
    mean_d = load_vector(mean_ptr, offs_d, mask_d, ACC)
    for i in tl.static_range(len(CHANNELS)):
        block = tile - blocks_before(CHANNELS, BLOCK_C, i)
        if (block >= 0) & (block < triton.cdiv(CHANNELS[i], BLOCK_C)):
            offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
            mask_c = offs_c < CHANNELS[i]
            own = offset(CHANNELS, i) + offs_c
            mask = mask_c[:, None] & mask_d[None, :]
            matrix = b * TOTAL * TOTAL + own[:, None] * TOTAL + offs_d[None, :]
            covariance = tl.load(covariance_ptr + matrix, mask=mask, other=0.0)
            mean_c = load_vector(mean_ptr, own, mask_c, ACC)
            q_weight = load_vector(q_weights[i], offs_c, mask_c, ACC)
            k_weight = load_vector(k_weights[i], offs_d, mask_d, ACC)
            q_mean = q_weight * mean_c + load_vector(q_biases[i], offs_c, mask_c, ACC)
            k_mean = k_weight * mean_d + load_vector(k_biases[i], offs_d, mask_d, ACC)
            weights = _attention_weights(
                covariance, q_weight, k_weight, q_mean, k_mean, CHANNELS[i] // HEADS[i], offs_c, offs_d, N, TOTAL,
                HEADS[i],
            )  # fmt: skip
            v_weight = load_vector(v_weights[i], offs_d, mask_d, ACC)
            v_mean = v_weight * mean_d + load_vector(v_biases[i], offs_d, mask_d, ACC)
            p_weight = load_vector(p_weights[i], offs_c, mask_c, ACC)
            shift = p_weight * tl.sum(weights * v_mean[None, :], 1) + load_vector(p_biases[i], offs_c, mask_c, ACC)
            tl.store(mixing_ptr + matrix, p_weight[:, None] * weights * v_weight[None, :], mask=mask)
            tl.store(shift_ptr + b * TOTAL + own, shift, mask=mask_c)
            plain_sums_ptr = sums_ptr + (b * SUM_BLOCKS * 2 + 1) * TOTAL
            mean_token = sum_blocks(plain_sums_ptr, own, mask_c, SUM_BLOCKS, 2 * TOTAL, ACC) / N + shift
            tl.store(mean_token_ptr + b * TOTAL + own, mean_token, mask=mask_c)


@triton.jit
def _attention_weights(
    covariance, q_weight, k_weight, q_mean, k_mean, own_width: tl.constexpr, offs_c, offs_d,
    N: tl.constexpr, TOTAL: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """softmax over d of C^-1/2 (q_weight_c k_weight_d covariance[c, d] + N q_mean_c k_mean_d) in a head."""
    logits = q_weight[:, None] * k_weight[None, :] * covariance
    logits = (logits + N * q_mean[:, None] * k_mean[None, :]) * TOTAL**-0.5
    same_head = (offs_c // own_width)[:, None] == (offs_d // (TOTAL // HEADS))[None, :]
    logits = tl.where(same_head & (offs_d < TOTAL)[None, :], logits, float("-inf"))
    logits = tl.where((offs_c < own_width * HEADS)[:, None], logits, 0.0)  # rows beyond the scale stay finite
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@kernel
def _mix_kernel(
    tokens_ptr, centred_ptr, mixing_ptr, shift_ptr, mean_token_ptr, gammas, betas, mixed_ptr, normalised_ptr, level_ptr,
    N: tl.constexpr, CHANNELS: tl.constexpr, EPS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: tokens + Z mixing^T + shift for BLOCK_N tokens, all channels of one scale, and their LayerNorm."""
    TOTAL: tl.constexpr = total(CHANNELS)
    BLOCKS: tl.constexpr = triton.cdiv(N, BLOCK_N)
    b, tile = split_program(len(CHANNELS) * BLOCKS)
    offs_n = tile % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    for i in tl.static_range(len(CHANNELS)):
        if tile // BLOCKS == len(CHANNELS) - 1 - i:  # the widest scale, usually the last, first
            _mix(
                tokens_ptr, centred_ptr + b * N * TOTAL, mixing_ptr + b * TOTAL * TOTAL, shift_ptr + b * TOTAL,
                mean_token_ptr + b * TOTAL, gammas, betas, mixed_ptr, normalised_ptr, level_ptr, b, offs_n, i, N,
                TOTAL, CHANNELS, EPS, PRECISION, ACC, BLOCK_C,
            )  # fmt: skip


@triton.jit
def _mix(
    tokens_ptr, centred_ptr, mixing_ptr, shift_ptr, mean_token_ptr, gammas, betas, mixed_ptr, normalised_ptr,
    level_ptr, b, offs_n,
    i: tl.constexpr, N: tl.constexpr, TOTAL: tl.constexpr, CHANNELS: tl.constexpr, EPS: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    offs_c = tl.arange(0, padded(CHANNELS[i]))
    mask_c = offs_c < CHANNELS[i]
    own = offset(CHANNELS, i) + offs_c
    mixed = tl.zeros([offs_n.shape[0], padded(CHANNELS[i])], ACC)
    mixed = _add_product(mixed, centred_ptr, mixing_ptr, offs_n, own, True, N, TOTAL, PRECISION, ACC, BLOCK_C)
    mask = (offs_n < N)[:, None] & mask_c[None, :]
    offs = b * N * TOTAL + offs_n[:, None] * TOTAL + own[None, :]
    shift = load_vector(shift_ptr, own, mask_c, ACC)
    mixed += tl.load(tokens_ptr + offs, mask=mask, other=0.0).to(ACC) + shift[None, :]
    mixed = mixed.to(mixed_ptr.dtype.element_ty)
    tl.store(mixed_ptr + offs, mixed, mask=mask)
    if EPS is not None:
        mean_token = load_vector(mean_token_ptr, own, mask_c, ACC)
        store_normalised(
            tl.where(mask, mixed.to(ACC), 0.0), mask, mean_token, b, i, offs_n, gammas[i], betas[i],
            normalised_ptr, level_ptr, N, CHANNELS, EPS[i], ACC,
        )  # fmt: skip


@kernel
def _mixing_gradient_kernel(
    centred_ptr, dmixed_ptr, dmixing_ptr, dshift_ptr,
    N: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: one tile of dmixed^T Z / N (B, C, C), Z as in `_centre_kernel`; and sums of dmixed (B, C)."""
    TOTAL: tl.constexpr = total(CHANNELS)
    ROWS: tl.constexpr = triton.cdiv(TOTAL, BLOCK_C)
    b, tile = split_program(ROWS * ROWS)
    offs_c = tile // ROWS * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_d = tile % ROWS * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c, mask_d = offs_c < TOTAL, offs_d < TOTAL
    centred_ptr += b * N * TOTAL
    dmixed_ptr += b * N * TOTAL
    dmixing = tl.zeros([BLOCK_C, BLOCK_C], ACC)
    sums = tl.zeros([BLOCK_N, BLOCK_C], ACC)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        dmixed = _load_tile(dmixed_ptr, offs_n, offs_c, N, TOTAL)
        centred = _load_tile(centred_ptr, offs_n, offs_d, N, TOTAL)
        dmixing = tl.dot(tl.trans(dmixed), centred, dmixing, input_precision=PRECISION, out_dtype=ACC)
        sums += dmixed.to(ACC)
    dmixing_ptrs = dmixing_ptr + b * TOTAL * TOTAL + offs_c[:, None] * TOTAL + offs_d[None, :]
    tl.store(dmixing_ptrs, dmixing / N, mask=mask_c[:, None] & mask_d[None, :])
    tl.store(dshift_ptr + b * TOTAL + offs_c, tl.sum(sums, 0), mask=mask_c & (tile % ROWS == 0))


@kernel
def _mixing_backward_kernel(
    covariance_ptr, mean_ptr, dmixing_ptr, dshift_ptr, q_weights, q_biases, k_weights, k_biases, v_weights, v_biases,
    p_weights, mixing_ptr, dcovariance_ptr, rows_ptr, columns_ptr,
    N: tl.constexpr, CHANNELS: tl.constexpr, HEADS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: the softmax of BLOCK_C channels of one scale, backward.

    Writes the mixing matrix, (B, C, C), again; the gradient of the covariance, (B, C, C); sums over d for q weight,
    q bias, p weight, p bias and the normalised tokens, (B, 5, C); and sums over the block's channels for k weight,
    k bias, v weight, v bias and the normalised tokens, (B, blocks, 5, C).
    """
    TOTAL: tl.constexpr = total(CHANNELS)
    BLOCKS: tl.constexpr = blocks_before(CHANNELS, BLOCK_C, len(CHANNELS))
    b, tile = split_program(BLOCKS)
    mean_ptr += b * TOTAL
    offs_d = tl.arange(0, padded(TOTAL))
    mask_d = offs_d < TOTAL
    mean_d = load_vector(mean_ptr, offs_d, mask_d, ACC)
    for i in tl.static_range(len(CHANNELS)):
        block = tile - blocks_before(CHANNELS, BLOCK_C, i)
        if (block >= 0) & (block < triton.cdiv(CHANNELS[i], BLOCK_C)):
            offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
            mask_c = offs_c < CHANNELS[i]
            own = offset(CHANNELS, i) + offs_c
            mask = mask_c[:, None] & mask_d[None, :]
            matrix = b * TOTAL * TOTAL + own[:, None] * TOTAL + offs_d[None, :]
            covariance = tl.load(covariance_ptr + matrix, mask=mask, other=0.0)
            mean_c = load_vector(mean_ptr, own, mask_c, ACC)
            q_weight = load_vector(q_weights[i], offs_c, mask_c, ACC)
            k_weight = load_vector(k_weights[i], offs_d, mask_d, ACC)
            q_mean = q_weight * mean_c + load_vector(q_biases[i], offs_c, mask_c, ACC)
            k_mean = k_weight * mean_d + load_vector(k_biases[i], offs_d, mask_d, ACC)
            weights = _attention_weights(
                covariance, q_weight, k_weight, q_mean, k_mean, CHANNELS[i] // HEADS[i], offs_c, offs_d, N, TOTAL,
                HEADS[i],
            )  # fmt: skip
            v_weight = load_vector(v_weights[i], offs_d, mask_d, ACC)
            v_mean = v_weight * mean_d + load_vector(v_biases[i], offs_d, mask_d, ACC)
            p_weight = load_vector(p_weights[i], offs_c, mask_c, ACC)
            dshift = load_vector(dshift_ptr + b * TOTAL, own, mask_c, ACC)
            dmixing = tl.load(dmixing_ptr + matrix, mask=mask, other=0.0).to(ACC) * N

            unfolded = p_weight[:, None] * weights
            dweights = dmixing * v_weight[None, :] + dshift[:, None] * v_mean[None, :]
            dp_weight = tl.sum(weights * dweights, 1)
            dlogits = weights * (dweights - dp_weight[:, None]) * (p_weight * TOTAL**-0.5)[:, None]
            tl.store(mixing_ptr + matrix, unfolded * v_weight[None, :], mask=mask)
            tl.store(dcovariance_ptr + matrix, dlogits * q_weight[:, None] * k_weight[None, :], mask=mask)

            dq_mean = N * tl.sum(dlogits * k_mean[None, :], 1)
            dq_weight = tl.sum(dlogits * k_weight[None, :] * covariance, 1) + dq_mean * mean_c
            row_ptr = rows_ptr + b * 5 * TOTAL + own
            tl.store(row_ptr, dq_weight, mask=mask_c)
            tl.store(row_ptr + TOTAL, dq_mean, mask=mask_c)
            tl.store(row_ptr + 2 * TOTAL, dp_weight, mask=mask_c)
            tl.store(row_ptr + 3 * TOTAL, dshift, mask=mask_c)
            tl.store(row_ptr + 4 * TOTAL, q_weight * dq_mean / N, mask=mask_c)

            dk_mean = N * tl.sum(dlogits * q_mean[:, None], 0)
            dk_weight = tl.sum(dlogits * q_weight[:, None] * covariance, 0) + dk_mean * mean_d
            dv_bias = tl.sum(unfolded * dshift[:, None], 0)
            dv_weight = tl.sum(unfolded * dmixing, 0) + dv_bias * mean_d
            column_ptr = columns_ptr + (b * BLOCKS + tile) * 5 * TOTAL + offs_d
            tl.store(column_ptr, dk_weight, mask=mask_d)
            tl.store(column_ptr + TOTAL, dk_mean, mask=mask_d)
            tl.store(column_ptr + 2 * TOTAL, dv_weight, mask=mask_d)
            tl.store(column_ptr + 3 * TOTAL, dv_bias, mask=mask_d)
            tl.store(column_ptr + 4 * TOTAL, k_weight * dk_mean / N, mask=mask_d)


@kernel
def _mix_backward_kernel(
    tokens_ptr, centred_ptr, mixing_ptr, dcovariance_ptr, rows_ptr, columns_ptr, dmixed_ptr, gammas, dtokens_ptr,
    daffine_ptr,
    N: tl.constexpr, CHANNELS: tl.constexpr, COLUMN_BLOCKS: tl.constexpr, EPS: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of BLOCK_N tokens of one scale, through attention, LayerNorm and residual."""
    TOTAL: tl.constexpr = total(CHANNELS)
    BLOCKS: tl.constexpr = triton.cdiv(N, BLOCK_N)
    b, tile = split_program(len(CHANNELS) * BLOCKS)
    offs_n = tile % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    for i in tl.static_range(len(CHANNELS)):
        if tile // BLOCKS == len(CHANNELS) - 1 - i:
            dnormalised = _mix_backward(
                centred_ptr + b * N * TOTAL, mixing_ptr + b * TOTAL * TOTAL, dcovariance_ptr + b * TOTAL * TOTAL,
                rows_ptr + b * 5 * TOTAL, columns_ptr + b * COLUMN_BLOCKS * 5 * TOTAL, dmixed_ptr + b * N * TOTAL,
                offs_n, i, N, TOTAL, CHANNELS, COLUMN_BLOCKS, PRECISION, ACC, BLOCK_C,
            )  # fmt: skip
            store_layer_norm_backward(
                tokens_ptr, dnormalised, dmixed_ptr, gammas[i], dtokens_ptr, daffine_ptr, b, i, tile % BLOCKS, offs_n,
                N, CHANNELS, BLOCKS, EPS[i], ACC,
            )  # fmt: skip


@triton.jit
def _mix_backward(
    centred_ptr, mixing_ptr, dcovariance_ptr, rows_ptr, columns_ptr, dmixed_ptr, offs_n,
    i: tl.constexpr, N: tl.constexpr, TOTAL: tl.constexpr, CHANNELS: tl.constexpr, COLUMN_BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dmixed mixing + Z (dcovariance + dcovariance^T) + the share of the token means, for all channels of scale i."""
    offs_d = tl.arange(0, padded(CHANNELS[i]))
    mask_d = offs_d < CHANNELS[i]
    own = offset(CHANNELS, i) + offs_d
    gradient = tl.zeros([offs_n.shape[0], padded(CHANNELS[i])], ACC)
    # In a loop each: of products in one loop, Triton 3.6 gives the sums different layouts, and moves them every time.
    gradient = _add_product(gradient, dmixed_ptr, mixing_ptr, offs_n, own, False, N, TOTAL, PRECISION, ACC, BLOCK_C)
    gradient = _add_product(
        gradient, centred_ptr, dcovariance_ptr, offs_n, own, False, N, TOTAL, PRECISION, ACC, BLOCK_C
    )
    gradient = _add_product(
        gradient, centred_ptr, dcovariance_ptr, offs_n, own, True, N, TOTAL, PRECISION, ACC, BLOCK_C
    )
    of_means = load_vector(rows_ptr + 4 * TOTAL, own, mask_d, ACC)
    of_means += sum_blocks(columns_ptr + 4 * TOTAL, own, mask_d, COLUMN_BLOCKS, 5 * TOTAL, ACC)
    return gradient + of_means[None, :]


@kernel
def _channel_gradients_kernel(
    rows_ptr, columns_ptr, daffine_ptr, gradients_ptr, batch,
    CHANNELS: tl.constexpr, BLOCK_ROWS: tl.constexpr, AFFINE_BLOCKS: tl.constexpr, REMOVED: tl.constexpr,
    ACC: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_C elements of the maps' gradients, summed over images in a fixed order.

    gradients (S, 4, C) of k weight, k bias, v weight and v bias, then (4, C) of q weight, q bias, p weight and p bias,
    then (2, C) of LayerNorm's. BLOCK_ROWS is how many channels a program of `_mixing_backward_kernel` had.
    """
    TOTAL: tl.constexpr = total(CHANNELS)
    SCALES: tl.constexpr = len(CHANNELS)
    BLOCKS: tl.constexpr = blocks_before(CHANNELS, BLOCK_ROWS, SCALES)
    TILES: tl.constexpr = triton.cdiv(4 * TOTAL, BLOCK_C)
    pid = tl.program_id(0)
    offs = pid % TILES * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = offs < 4 * TOTAL
    out_ptr = gradients_ptr + pid // TILES * 4 * TOTAL
    for i in tl.static_range(SCALES):
        if pid // TILES == i:
            own_ptr = columns_ptr + blocks_before(CHANNELS, BLOCK_ROWS, i) * 5 * TOTAL
            own_blocks: tl.constexpr = triton.cdiv(CHANNELS[i], BLOCK_ROWS)
            gradient = sum_images(own_ptr, offs, mask, batch, own_blocks, 5 * TOTAL, BLOCKS * 5 * TOTAL, ACC)
            tl.store(out_ptr + offs, gradient, mask=mask)
    if pid // TILES == SCALES:
        gradient = sum_images(rows_ptr, offs, mask, batch, 1, 0, 5 * TOTAL, ACC)
        gradient = without_removed(gradient, offs - 3 * TOTAL, CHANNELS, REMOVED)  # of the bias, the last
        tl.store(out_ptr + offs, gradient, mask=mask)
    if pid // TILES > SCALES:
        store_affine_gradients(daffine_ptr, out_ptr, offs, batch, TOTAL, AFFINE_BLOCKS, ACC)


class Saved(NamedTuple):
    """What the backward of one channel attention needs: tokens, also centred, their means and the covariance."""

    tokens: Tokens
    centred: Tensor
    mean: Tensor
    covariance: Tensor


def channel_attention(
    tokens: Tokens, attention: Attention, following: Sequence[LayerNorm] | None
) -> tuple[Tokens, Saved]:
    """Attend across channels, with the residual (paper, eq. 3).

    Args:
        tokens: with their statistics for the attention's norms, or without.
        attention: its parameters.
        following: the LayerNorms of the spatial attention that comes next, None where none does.

    Returns:
        The tokens, normalised for `following`, and what the backward needs.
    """
    statistics, sums = statistics_of(tokens, attention.norms)
    batch, count, width = tokens.shape
    target, dtype = launch.architecture(tokens.values.device), tokens.values.dtype
    shared = {
        "N": count,
        "CHANNELS": tokens.channels,
        "ACC": launch.triton_type(tokens.accumulation),
    }

    block_n, block_c = 128, 64
    centred, mean = torch.empty_like(tokens.values), tokens.new_empty(batch, width)
    launch.run(
        _centre_kernel,
        batch * launch.blocks(count, block_n) * sum(launch.blocks(c, block_c) for c in tokens.channels),
        {"num_warps": 8, "num_stages": 2},
        tokens_ptr=tokens.values,
        statistics_ptr=statistics,
        sums_ptr=sums,
        gammas=launch.weights(attention.norms),
        betas=launch.biases(attention.norms),
        centred_ptr=centred,
        mean_ptr=mean,
        SUM_BLOCKS=sums.shape[1],
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        **shared,
    )

    config = launch.configuration("covariance", target, dtype, batch)
    blocks = launch.blocks(width, config["block_c"])
    covariance = tokens.new_empty(batch, width, width)
    launch.run(
        _covariance_kernel,
        batch * blocks * (blocks + 1) // 2,
        config,
        centred_ptr=centred,
        covariance_ptr=covariance,
        PRECISION=launch.precision(dtype, target),
        BLOCK_C=config["block_c"],
        BLOCK_N=config["block_n"],
        **shared,
    )

    config = launch.configuration("mixing", target, dtype, launch.padded(width))
    mixing = torch.empty(batch, width, width, dtype=dtype, device=tokens.values.device)
    shift, mean_token = tokens.new_empty(batch, width), tokens.new_empty(batch, width)
    launch.run(
        _mixing_kernel,
        batch * sum(launch.blocks(c, config["block_c"]) for c in tokens.channels),
        config,
        covariance_ptr=covariance,
        mean_ptr=mean,
        sums_ptr=sums,
        q_weights=launch.weights(attention.q_maps),
        q_biases=launch.biases(attention.q_maps),
        k_weights=launch.weights(attention.k_maps),
        k_biases=launch.biases(attention.k_maps),
        v_weights=launch.weights(attention.v_maps),
        v_biases=launch.biases(attention.v_maps),
        p_weights=launch.weights(attention.projections),
        p_biases=launch.biases(attention.projections),
        mixing_ptr=mixing,
        shift_ptr=shift,
        mean_token_ptr=mean_token,
        HEADS=tuple(attention.heads),
        SUM_BLOCKS=sums.shape[1],
        BLOCK_C=config["block_c"],
        **shared,
    )

    config = launch.configuration("mix", target, dtype, max(launch.padded(c) for c in tokens.channels))
    mixed = Tokens(torch.empty_like(tokens.values), tokens.channels)
    if following is not None:
        mixed.normalised, mixed.level = torch.empty_like(tokens.values), tokens.new_empty(batch, width)
    launch.run(
        _mix_kernel,
        batch * len(tokens.channels) * launch.blocks(count, config["block_n"]),
        config,
        tokens_ptr=tokens.values,
        centred_ptr=centred,
        mixing_ptr=mixing,
        shift_ptr=shift,
        mean_token_ptr=mean_token,
        gammas=None if following is None else launch.weights(following),
        betas=None if following is None else launch.biases(following),
        mixed_ptr=mixed.values,
        normalised_ptr=mixed.normalised,
        level_ptr=mixed.level,
        EPS=None if following is None else launch.epsilons(following),
        PRECISION=launch.precision(dtype, target),
        BLOCK_N=config["block_n"],
        BLOCK_C=config["block_c"],
        **shared,
    )
    return mixed, Saved(tokens, centred, mean, covariance)


def channel_attention_backward(
    saved: Saved, dmixed: Tensor, attention: Attention, removed: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """The gradients of `channel_attention`, through its LayerNorm and its residual.

    Args:
        saved: what the forward returned.
        dmixed: (B, N, C), the gradient of its result, in the tokens' dtype.
        attention: as in the forward.
        removed: for each scale, whether the BatchNorm behind removes a per-channel constant added here.

    Returns:
        The gradient of the tokens, (B, N, C), and of the parameters, see `split_gradients`.
    """
    tokens = saved.tokens
    batch, count, width = tokens.shape
    scales = len(tokens.channels)
    target, dtype = launch.architecture(tokens.values.device), tokens.values.dtype
    shared = {"CHANNELS": tokens.channels, "ACC": launch.triton_type(tokens.accumulation)}

    config = launch.configuration("mixing_gradient", target, dtype, batch)
    blocks = launch.blocks(width, config["block_c"])
    dmixing = tokens.new_empty(batch, width, width, dtype=dtype)
    dshift = tokens.new_empty(batch, width)
    launch.run(
        _mixing_gradient_kernel,
        batch * blocks * blocks,
        config,
        centred_ptr=saved.centred,
        dmixed_ptr=dmixed,
        dmixing_ptr=dmixing,
        dshift_ptr=dshift,
        N=count,
        PRECISION=launch.precision(dtype, target),
        BLOCK_C=config["block_c"],
        BLOCK_N=config["block_n"],
        **shared,
    )

    config = launch.configuration("mixing_backward", target, dtype, launch.padded(width))
    block_rows = config["block_c"]
    column_blocks = sum(launch.blocks(c, block_rows) for c in tokens.channels)
    mixing, dcovariance = torch.empty_like(dmixing), torch.empty_like(dmixing)
    rows, columns = tokens.new_empty(batch, 5, width), tokens.new_empty(batch, column_blocks, 5, width)
    launch.run(
        _mixing_backward_kernel,
        batch * column_blocks,
        config,
        covariance_ptr=saved.covariance,
        mean_ptr=saved.mean,
        dmixing_ptr=dmixing,
        dshift_ptr=dshift,
        q_weights=launch.weights(attention.q_maps),
        q_biases=launch.biases(attention.q_maps),
        k_weights=launch.weights(attention.k_maps),
        k_biases=launch.biases(attention.k_maps),
        v_weights=launch.weights(attention.v_maps),
        v_biases=launch.biases(attention.v_maps),
        p_weights=launch.weights(attention.projections),
        mixing_ptr=mixing,
        dcovariance_ptr=dcovariance,
        rows_ptr=rows,
        columns_ptr=columns,
        N=count,
        HEADS=tuple(attention.heads),
        BLOCK_C=block_rows,
        **shared,
    )

    config = launch.configuration("mix_backward", target, dtype, max(launch.padded(c) for c in tokens.channels))
    dtokens = torch.empty_like(tokens.values)
    daffine = tokens.new_empty(batch, launch.blocks(count, config["block_n"]), 2, width)
    launch.run(
        _mix_backward_kernel,
        batch * scales * launch.blocks(count, config["block_n"]),
        config,
        tokens_ptr=tokens.values,
        centred_ptr=saved.centred,
        mixing_ptr=mixing,
        dcovariance_ptr=dcovariance,
        rows_ptr=rows,
        columns_ptr=columns,
        dmixed_ptr=dmixed,
        gammas=launch.weights(attention.norms),
        dtokens_ptr=dtokens,
        daffine_ptr=daffine,
        N=count,
        COLUMN_BLOCKS=column_blocks,
        EPS=launch.epsilons(attention.norms),
        PRECISION=launch.precision(dtype, target),
        BLOCK_N=config["block_n"],
        BLOCK_C=config["block_c"],
        **shared,
    )

    block_c = 16
    gradients = tokens.new_empty(4 * scales + 6, width, dtype=attention.q_maps[0].weight.dtype)
    launch.run(
        _channel_gradients_kernel,
        (scales + 1) * launch.blocks(4 * width, block_c) + launch.blocks(2 * width, block_c),
        {"num_warps": 4, "num_stages": 2},
        rows_ptr=rows,
        columns_ptr=columns,
        daffine_ptr=daffine,
        gradients_ptr=gradients,
        batch=batch,
        BLOCK_ROWS=block_rows,
        AFFINE_BLOCKS=daffine.shape[1],
        REMOVED=tuple(removed),
        BLOCK_C=block_c,
        **shared,
    )
    return dtokens, gradients


def split_gradients(gradients: Tensor, channels: Sequence[int]) -> list[Sequence[Tensor]]:
    """What `channel_attention_backward` returned of the parameters, a weight and a bias of S scales after the other.

    In the order of norms, q, k, v maps and projections.
    """
    key_value, own = gradients.split([4 * len(channels), 6])
    q_weight, q_bias, p_weight, p_bias, gamma, beta = (row.split(channels) for row in own)
    k_weight, k_bias, v_weight, v_bias = (key_value[k::4].unbind() for k in range(4))
    return [gamma, beta, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, p_weight, p_bias]
