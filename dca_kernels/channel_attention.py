"""Stage 2 of the `triton` backend: channel cross-attention. docs/algebra.md derives the three products."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from dca_kernels import launch
from dca_kernels.primitives import (
    blocks_before,
    load_concatenated,
    load_vector,
    offset,
    padded,
    split_program,
    statistics_pointers,
    store_normalised,
    sum_blocks,
    total,
)
from dca_kernels.tokens import Tokens, statistics_of


@triton.jit
def _covariance_kernel(
    tokens_ptr, statistics_ptr, sums_ptr, mean_ptr, covariance_ptr,
    N: tl.constexpr, CHANNELS: tl.constexpr, SUM_BLOCKS: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: one tile of X^T X, X the normalised tokens less their mean, over a part of the tokens.

    X^T X is symmetric: a tile below the diagonal is stored transposed as well. Writes mean (B, C) and covariance
    (B, SPLITS, C, C), to be summed over SPLITS.
    """
    ROWS: tl.constexpr = blocks_before(CHANNELS, BLOCK_C, len(CHANNELS))
    TILES: tl.constexpr = ROWS * (ROWS + 1) // 2
    TOTAL: tl.constexpr = total(CHANNELS)
    b, tile = split_program(SPLITS * TILES)
    split, tile = tile // TILES, tile % TILES
    row = 0
    for r in tl.static_range(1, ROWS):
        row = tl.where(tile >= r * (r + 1) // 2, r, row)
    column = tile - row * (row + 1) // 2
    i, offs_i, mask_i = _channel_block(row, CHANNELS, BLOCK_C)
    j, offs_j, mask_j = _channel_block(column, CHANNELS, BLOCK_C)
    sums_ptr += b * SUM_BLOCKS * 2 * TOTAL
    mean_i = sum_blocks(sums_ptr, offs_i, mask_i, SUM_BLOCKS, 2 * TOTAL, ACC) / N
    mean_j = sum_blocks(sums_ptr, offs_j, mask_j, SUM_BLOCKS, 2 * TOTAL, ACC) / N
    part = tl.zeros([BLOCK_C, BLOCK_C], ACC)
    CHUNK: tl.constexpr = triton.cdiv(triton.cdiv(N, SPLITS), BLOCK_N) * BLOCK_N
    for start in range(0, CHUNK, BLOCK_N):
        offs_n = split * CHUNK + start + tl.arange(0, BLOCK_N)
        x_i = _load_centred(
            tokens_ptr, statistics_ptr, mean_i, b, i, offs_n, offs_i, mask_i, N, TOTAL, len(CHANNELS), ACC
        )
        x_j = _load_centred(
            tokens_ptr, statistics_ptr, mean_j, b, j, offs_n, offs_j, mask_j, N, TOTAL, len(CHANNELS), ACC
        )
        part = tl.dot(tl.trans(x_i), x_j, part, input_precision=PRECISION, out_dtype=ACC)
    covariance_ptr += (b * SPLITS + split) * TOTAL * TOTAL
    mask = mask_i[:, None] & mask_j[None, :]
    tl.store(covariance_ptr + offs_i[:, None] * TOTAL + offs_j[None, :], part, mask=mask)
    if row != column:
        tl.store(covariance_ptr + offs_j[:, None] * TOTAL + offs_i[None, :], tl.trans(part), mask=tl.trans(mask))
    if (row == column) & (split == 0):
        tl.store(mean_ptr + b * TOTAL + offs_i, mean_i, mask=mask_i)


@triton.jit
def _channel_block(block, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The scale, the channels and their mask of a block of channels."""
    scale = 0
    begin = 0
    end = CHANNELS[0]
    for k in tl.static_range(len(CHANNELS)):
        local = block - blocks_before(CHANNELS, BLOCK_C, k)
        scale = tl.where(local >= 0, k, scale)
        begin = tl.where(local >= 0, offset(CHANNELS, k) + local * BLOCK_C, begin)
        end = tl.where(local >= 0, offset(CHANNELS, k) + CHANNELS[k], end)
    offs = begin + tl.arange(0, BLOCK_C)
    return scale, offs, offs < end


@triton.jit
def _load_centred(
    tokens_ptr, statistics_ptr, mean, b, i, offs_n, offs_c, mask_c,
    N: tl.constexpr, TOTAL: tl.constexpr, SCALES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Normalised tokens less their mean over the grid, in the tokens' dtype; offs_c are channels of scale i."""
    mask_n = offs_n < N
    mask = mask_n[:, None] & mask_c[None, :]
    tokens = tl.load(tokens_ptr + b * N * TOTAL + offs_n[:, None] * TOTAL + offs_c[None, :], mask=mask, other=0.0)
    mean_ptrs, rstd_ptrs = statistics_pointers(statistics_ptr, b, i, offs_n, N, SCALES)
    token_mean = tl.load(mean_ptrs, mask=mask_n, other=0.0)
    rstd = tl.load(rstd_ptrs, mask=mask_n, other=0.0)
    centred = (tokens.to(ACC) - token_mean[:, None]) * rstd[:, None] - mean[None, :]
    return tl.where(mask, centred, 0.0).to(tokens.dtype)


@triton.jit
def _mixing_kernel(
    covariance_ptr, mean_ptr, sums_ptr, gammas, betas, q_weights, q_biases, k_weights, k_biases, v_weights, v_biases,
    p_weights, p_biases, mixing_ptr, shift_ptr, mean_token_ptr,
    N: tl.constexpr, CHANNELS: tl.constexpr, HEADS: tl.constexpr, SUM_BLOCKS: tl.constexpr, SPLITS: tl.constexpr,
    ACC: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: the softmax of BLOCK_C channels of one scale, folded with its neighbours into one matrix.

    The attention's result is X mixing^T + shift, X as in `_covariance_kernel`. Writes mixing (B, C, C), shift (B, C)
    and the mean token behind the residual, (B, C).
    """
    TOTAL: tl.constexpr = total(CHANNELS)
    b, tile = split_program(blocks_before(CHANNELS, BLOCK_C, len(CHANNELS)))
    covariance_ptr += b * SPLITS * TOTAL * TOTAL
    mean_ptr += b * TOTAL
    offs_d = tl.arange(0, padded(TOTAL))
    mask_d = offs_d < TOTAL
    gamma_d = load_concatenated(gammas, offs_d, CHANNELS, ACC)
    mean_d = gamma_d * load_vector(mean_ptr, offs_d, mask_d, ACC) + load_concatenated(betas, offs_d, CHANNELS, ACC)
    for i in tl.static_range(len(CHANNELS)):
        block = tile - blocks_before(CHANNELS, BLOCK_C, i)
        if (block >= 0) & (block < triton.cdiv(CHANNELS[i], BLOCK_C)):
            offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
            mask_c = offs_c < CHANNELS[i]
            own = offset(CHANNELS, i) + offs_c
            mask = mask_c[:, None] & mask_d[None, :]
            gamma_c = load_vector(gammas[i], offs_c, mask_c, ACC)
            mean_c = gamma_c * load_vector(mean_ptr, own, mask_c, ACC) + load_vector(betas[i], offs_c, mask_c, ACC)
            q_weight = load_vector(q_weights[i], offs_c, mask_c, ACC)
            k_weight = load_vector(k_weights[i], offs_d, mask_d, ACC)
            q_mean = q_weight * mean_c + load_vector(q_biases[i], offs_c, mask_c, ACC)
            k_mean = k_weight * mean_d + load_vector(k_biases[i], offs_d, mask_d, ACC)
            covariance = tl.zeros([BLOCK_C, padded(TOTAL)], ACC)
            for split in range(SPLITS):
                rows_ptrs = covariance_ptr + split * TOTAL * TOTAL + own[:, None] * TOTAL + offs_d[None, :]
                covariance += tl.load(rows_ptrs, mask=mask, other=0.0)
            logits = (q_weight * gamma_c)[:, None] * (k_weight * gamma_d)[None, :] * covariance
            logits = (logits + N * q_mean[:, None] * k_mean[None, :]) * TOTAL**-0.5
            same_head = (offs_c // (CHANNELS[i] // HEADS[i]))[:, None] == (offs_d // (TOTAL // HEADS[i]))[None, :]
            logits = tl.where(same_head & mask, logits, float("-inf"))
            logits = tl.where(mask_c[:, None], logits, 0.0)
            weights = tl.exp(logits - tl.max(logits, 1)[:, None])
            weights /= tl.sum(weights, 1)[:, None]
            v_weight = load_vector(v_weights[i], offs_d, mask_d, ACC)
            v_mean = v_weight * mean_d + load_vector(v_biases[i], offs_d, mask_d, ACC)
            p_weight = load_vector(p_weights[i], offs_c, mask_c, ACC)
            shift = p_weight * tl.sum(weights * v_mean[None, :], 1) + load_vector(p_biases[i], offs_c, mask_c, ACC)
            mixing = p_weight[:, None] * weights * (v_weight * gamma_d)[None, :]
            tl.store(mixing_ptr + b * TOTAL * TOTAL + own[:, None] * TOTAL + offs_d[None, :], mixing, mask=mask)
            tl.store(shift_ptr + b * TOTAL + own, shift, mask=mask_c)
            plain_sums_ptr = sums_ptr + (b * SUM_BLOCKS * 2 + 1) * TOTAL
            mean_token = sum_blocks(plain_sums_ptr, own, mask_c, SUM_BLOCKS, 2 * TOTAL, ACC) / N + shift
            tl.store(mean_token_ptr + b * TOTAL + own, mean_token, mask=mask_c)


@triton.jit
def _mix_kernel(
    tokens_ptr, statistics_ptr, mean_ptr, mixing_ptr, shift_ptr, mean_token_ptr, gammas, betas,
    mixed_ptr, normalised_ptr, level_ptr,
    N: tl.constexpr, CHANNELS: tl.constexpr, EPS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: tokens + X mixing^T + shift for BLOCK_N tokens, all channels of one scale, and their LayerNorm."""
    TOTAL: tl.constexpr = total(CHANNELS)
    BLOCKS: tl.constexpr = triton.cdiv(N, BLOCK_N)
    b, tile = split_program(len(CHANNELS) * BLOCKS)
    offs_n = tile % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    for i in tl.static_range(len(CHANNELS)):
        if tile // BLOCKS == len(CHANNELS) - 1 - i:  # the widest scale, usually the last, first
            _mix(
                tokens_ptr, statistics_ptr, mean_ptr + b * TOTAL, mixing_ptr + b * TOTAL * TOTAL,
                shift_ptr + b * TOTAL, mean_token_ptr, gammas, betas, mixed_ptr, normalised_ptr, level_ptr, b, offs_n,
                i, N, TOTAL, CHANNELS, EPS, PRECISION, ACC, BLOCK_C,
            )  # fmt: skip


@triton.jit
def _mix(
    tokens_ptr, statistics_ptr, mean_ptr, mixing_ptr, shift_ptr, mean_token_ptr, gammas, betas,
    mixed_ptr, normalised_ptr, level_ptr, b, offs_n,
    i: tl.constexpr, N: tl.constexpr, TOTAL: tl.constexpr, CHANNELS: tl.constexpr, EPS: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    offs_c = tl.arange(0, padded(CHANNELS[i]))
    mask_c = offs_c < CHANNELS[i]
    own = offset(CHANNELS, i) + offs_c
    mixed = tl.zeros([offs_n.shape[0], padded(CHANNELS[i])], ACC)
    for j in tl.static_range(len(CHANNELS)):
        for start in range(0, CHANNELS[j], min(padded(CHANNELS[j]), BLOCK_C)):
            local = start + tl.arange(0, min(padded(CHANNELS[j]), BLOCK_C))
            offs_d, mask_d = offset(CHANNELS, j) + local, local < CHANNELS[j]
            mean = load_vector(mean_ptr, offs_d, mask_d, ACC)
            x = _load_centred(
                tokens_ptr, statistics_ptr, mean, b, j, offs_n, offs_d, mask_d, N, TOTAL, len(CHANNELS), ACC
            )
            mixing_ptrs = mixing_ptr + own[:, None] * TOTAL + offs_d[None, :]
            mixing = tl.load(mixing_ptrs, mask=mask_c[:, None] & mask_d[None, :], other=0.0)
            mixed = tl.dot(x, tl.trans(mixing), mixed, input_precision=PRECISION, out_dtype=ACC)
    mask = (offs_n < N)[:, None] & mask_c[None, :]
    offs = b * N * TOTAL + offs_n[:, None] * TOTAL + own[None, :]
    shift = load_vector(shift_ptr, own, mask_c, ACC)
    mixed += tl.load(tokens_ptr + offs, mask=mask, other=0.0).to(ACC) + shift[None, :]
    mixed = mixed.to(mixed_ptr.dtype.element_ty)
    tl.store(mixed_ptr + offs, mixed, mask=mask)
    if EPS is not None:
        mean_token = load_vector(mean_token_ptr + b * TOTAL, own, mask_c, ACC)
        store_normalised(
            tl.where(mask, mixed.to(ACC), 0.0), mask, mean_token, b, i, offs_n, gammas[i], betas[i],
            normalised_ptr, level_ptr, N, CHANNELS, EPS[i], ACC,
        )  # fmt: skip


def channel_attention(
    tokens: Tokens, norms: Sequence[Any], attentions: Sequence[Any], following: Sequence[Any] | None
) -> Tokens:
    """Attend across channels, with the residual (paper, eq. 3).

    Args:
        tokens: with their statistics for `norms`, or without.
        norms: S LayerNorms over C_i.
        attentions: S modules with `q_map`, `k_map`, `v_map`, `projection` and `heads`.
        following: the LayerNorms of the spatial attention that comes next, None where none does.

    Returns:
        The tokens, normalised for `following`.
    """
    statistics, sums = statistics_of(tokens, norms)
    batch, count, width = tokens.shape
    target, dtype = launch.architecture(tokens.values.device), tokens.values.dtype
    q_maps = [launch.depthwise(attention.q_map) for attention in attentions]
    k_maps = [launch.depthwise(attention.k_map) for attention in attentions]
    v_maps = [launch.depthwise(attention.v_map) for attention in attentions]
    projections = [launch.depthwise(attention.projection) for attention in attentions]
    shared = {
        "N": count,
        "CHANNELS": tokens.channels,
        "ACC": launch.triton_type(tokens.accumulation),
    }

    config = launch.configuration("covariance", target, dtype, batch)
    blocks = sum(launch.blocks(c, config["block_c"]) for c in tokens.channels)
    splits = min(config["splits"], launch.blocks(count, config["block_n"]))
    mean = tokens.new_empty(batch, width)
    covariance = tokens.new_empty(batch, splits, width, width)
    launch.run(
        _covariance_kernel,
        batch * splits * blocks * (blocks + 1) // 2,
        config,
        tokens_ptr=tokens.values,
        statistics_ptr=statistics,
        sums_ptr=sums,
        mean_ptr=mean,
        covariance_ptr=covariance,
        SUM_BLOCKS=sums.shape[1],
        SPLITS=splits,
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
        gammas=launch.weights(norms),
        betas=launch.biases(norms),
        q_weights=launch.weights(q_maps),
        q_biases=launch.biases(q_maps),
        k_weights=launch.weights(k_maps),
        k_biases=launch.biases(k_maps),
        v_weights=launch.weights(v_maps),
        v_biases=launch.biases(v_maps),
        p_weights=launch.weights(projections),
        p_biases=launch.biases(projections),
        mixing_ptr=mixing,
        shift_ptr=shift,
        mean_token_ptr=mean_token,
        HEADS=tuple(attention.heads for attention in attentions),
        SUM_BLOCKS=sums.shape[1],
        SPLITS=splits,
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
        statistics_ptr=statistics,
        mean_ptr=mean,
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
    return mixed
