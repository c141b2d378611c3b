"""Stage 2: channel cross-attention. docs/algebra.md derives the three products."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dca_kernels.contract import Attention, Contract
from dca_kernels.triton_backend import launch
from dca_kernels.triton_backend.launch import Launcher
from dca_kernels.triton_backend.layer_norm import statistics_pointers
from dca_kernels.triton_backend.parameters import heads_of, layer_norms_of, projections_of
from dca_kernels.triton_backend.primitives import (
    Shape,
    first_blocks,
    kernel,
    load_tile,
    load_vector,
    of_scale,
    padded,
    scale_of,
    split_program,
    store_tile,
    sum_blocks,
)
from dca_kernels.triton_backend.tokens import Tokens, with_statistics


@kernel
def _centre_kernel(
    tokens, statistics, sums, norms, centred, mean,
    SHAPE: tl.constexpr, SUM_BLOCKS: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: the centred tokens Z (B, N, C), of BLOCK_N tokens and BLOCK_C channels of one scale.

    That is the tokens' LayerNorm less its mean over the grid, and rounded then. Writes the means (B, C) as well.
    tokens (B, N, C), statistics (B, S, 2, N), sums (B, SUM_BLOCKS, 2, C).
    """
    N: tl.constexpr = SHAPE.tokens
    TOTAL: tl.constexpr = SHAPE.total
    FIRST: tl.constexpr = first_blocks(SHAPE.channels, BLOCK_C)
    TILES: tl.constexpr = FIRST[len(SHAPE.channels)]
    b, tile = split_program(triton.cdiv(N, BLOCK_N) * TILES)
    i, block = scale_of(tile % TILES, FIRST)
    offs_n = tile // TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c, offs_all, mask_c = channels_of_block(block, i, SHAPE, BLOCK_C)
    mask_n = offs_n < N
    mask = mask_n[:, None] & mask_c[None, :]
    offs = b * N * TOTAL + offs_n[:, None] * TOTAL + offs_all[None, :]
    rows = tl.load(tokens + offs, mask=mask, other=0.0).to(ACC)
    mean_ptrs, rstd_ptrs = statistics_pointers(statistics, b, i, offs_n, SHAPE)
    token_mean, rstd = tl.load(mean_ptrs, mask=mask_n, other=0.0), tl.load(rstd_ptrs, mask=mask_n, other=0.0)
    image_sums = sums + b * SUM_BLOCKS * 2 * TOTAL
    of_grid = sum_blocks(image_sums, offs_all, mask_c, SUM_BLOCKS, 2 * TOTAL, ACC) / N
    gamma = load_vector(of_scale(norms.weight, i), offs_c, mask_c, ACC)
    beta = load_vector(of_scale(norms.bias, i), offs_c, mask_c, ACC)
    out = gamma[None, :] * ((rows - token_mean[:, None]) * rstd[:, None] - of_grid[None, :])
    tl.store(centred + offs, out, mask=mask)
    tl.store(mean + b * TOTAL + offs_all, gamma * of_grid + beta, mask=mask_c & (tile < TILES))


@kernel
def _covariance_kernel(
    centred, covariance,
    SHAPE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: one tile on or below the diagonal of Z^T Z (B, C, C), and its mirror image. centred (B, N, C)."""
    N: tl.constexpr = SHAPE.tokens
    TOTAL: tl.constexpr = SHAPE.total
    ROWS: tl.constexpr = triton.cdiv(TOTAL, BLOCK_C)
    b, tile = split_program(ROWS * (ROWS + 1) // 2)
    row = 0
    for r in tl.static_range(1, ROWS):
        row = tl.where(tile >= r * (r + 1) // 2, r, row)
    column = tile - row * (row + 1) // 2
    offs_c = row * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_d = column * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c, mask_d = offs_c < TOTAL, offs_d < TOTAL
    centred += b * N * TOTAL
    out = tl.zeros([BLOCK_C, BLOCK_C], ACC)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        left = load_tile(centred, offs_n, offs_c, N, TOTAL)
        right = load_tile(centred, offs_n, offs_d, N, TOTAL)
        # [BLOCK_C, BLOCK_N] [BLOCK_N, BLOCK_C]
        out = tl.dot(tl.trans(left), right, out, input_precision=PRECISION, out_dtype=ACC)
    covariance += b * TOTAL * TOTAL
    mask = mask_c[:, None] & mask_d[None, :]
    tl.store(covariance + offs_c[:, None] * TOTAL + offs_d[None, :], out, mask=mask)
    mask = mask_d[:, None] & mask_c[None, :] & (row != column)
    tl.store(covariance + offs_d[:, None] * TOTAL + offs_c[None, :], tl.trans(out), mask=mask)


@triton.jit
def add_product(
    out, left, right, offs_n, offs_all,
    TRANSPOSED: tl.constexpr, SHAPE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out + tokens offs_n and channels offs_all of left right, or left right^T: left (N, C), right (C, C)."""
    N: tl.constexpr = SHAPE.tokens
    TOTAL: tl.constexpr = SHAPE.total
    for start in range(0, TOTAL, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        a = load_tile(left, offs_n, offs_k, N, TOTAL)
        if TRANSPOSED:
            b = tl.trans(load_tile(right, offs_all, offs_k, TOTAL, TOTAL))
        else:
            b = load_tile(right, offs_k, offs_all, TOTAL, TOTAL)
        out = tl.dot(a, b, out, input_precision=PRECISION, out_dtype=ACC)  # [tokens, BLOCK_K] [BLOCK_K, channels]
    return out


@kernel
def _mixing_kernel(
    covariance, mean, sums, projections, mixing, shift, mean_token,
    SHAPE: tl.constexpr, HEADS: tl.constexpr, SUM_BLOCKS: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: the softmax of BLOCK_C channels of one scale, folded with its neighbours into one matrix.

    The attention's result is Z mixing^T + shift, Z as in `_centre_kernel`. Writes mixing (B, C, C), shift (B, C) and
    the mean token behind the residual, (B, C). covariance (B, C, C), mean (B, C), sums (B, SUM_BLOCKS, 2, C).
    """
    N: tl.constexpr = SHAPE.tokens
    TOTAL: tl.constexpr = SHAPE.total
    FIRST: tl.constexpr = first_blocks(SHAPE.channels, BLOCK_C)
    b, tile = split_program(FIRST[len(SHAPE.channels)])
    i, block = scale_of(tile, FIRST)
    offs_c, offs_all, mask_c = channels_of_block(block, i, SHAPE, BLOCK_C)
    offs_d = tl.arange(0, padded(TOTAL))
    mask_d = offs_d < TOTAL
    mask = mask_c[:, None] & mask_d[None, :]
    matrix = b * TOTAL * TOTAL + offs_all[:, None] * TOTAL + offs_d[None, :]
    products = tl.load(covariance + matrix, mask=mask, other=0.0)
    mean += b * TOTAL
    mean_c, mean_d = load_vector(mean, offs_all, mask_c, ACC), load_vector(mean, offs_d, mask_d, ACC)
    q_weight, k_weight, q_mean, k_mean = load_query_and_key(
        projections=projections, mean_c=mean_c, mean_d=mean_d, offs_c=offs_c, offs_d=offs_d, mask_c=mask_c,
        mask_d=mask_d, i=i, ACC=ACC,
    )  # fmt: skip
    weights = attention_weights(
        covariance=products, q_weight=q_weight, k_weight=k_weight, q_mean=q_mean, k_mean=k_mean, offs_c=offs_c,
        offs_d=offs_d, i=i, HEADS=HEADS, SHAPE=SHAPE,
    )  # fmt: skip
    v_weight = load_vector(of_scale(projections.value_weight, i), offs_d, mask_d, ACC)
    v_mean = v_weight * mean_d + load_vector(of_scale(projections.value_bias, i), offs_d, mask_d, ACC)
    p_weight = load_vector(of_scale(projections.output_weight, i), offs_c, mask_c, ACC)
    constant = p_weight * tl.sum(weights * v_mean[None, :], 1)
    constant += load_vector(of_scale(projections.output_bias, i), offs_c, mask_c, ACC)
    tl.store(mixing + matrix, p_weight[:, None] * weights * v_weight[None, :], mask=mask)
    tl.store(shift + b * TOTAL + offs_all, constant, mask=mask_c)
    plain_sums = sums + (b * SUM_BLOCKS * 2 + 1) * TOTAL
    behind = sum_blocks(plain_sums, offs_all, mask_c, SUM_BLOCKS, 2 * TOTAL, ACC) / N + constant
    tl.store(mean_token + b * TOTAL + offs_all, behind, mask=mask_c)


@triton.jit
def channels_of_block(block, i, SHAPE: tl.constexpr, BLOCK_C: tl.constexpr):
    """The channels of a block of scale i: among the scale's, among all, and which there are: [BLOCK_C] each."""
    CHANNELS: tl.constexpr = SHAPE.channels
    OFFSETS: tl.constexpr = SHAPE.offsets
    offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    return offs_c, of_scale(OFFSETS, i) + offs_c, offs_c < of_scale(CHANNELS, i)


@triton.jit
def load_query_and_key(projections, mean_c, mean_d, offs_c, offs_d, mask_c, mask_d, i, ACC: tl.constexpr):
    """Weights of the query map [BLOCK_C] and the key map [C], and what both make of the tokens' means."""
    q_weight = load_vector(of_scale(projections.query_weight, i), offs_c, mask_c, ACC)
    k_weight = load_vector(of_scale(projections.key_weight, i), offs_d, mask_d, ACC)
    q_mean = q_weight * mean_c + load_vector(of_scale(projections.query_bias, i), offs_c, mask_c, ACC)
    k_mean = k_weight * mean_d + load_vector(of_scale(projections.key_bias, i), offs_d, mask_d, ACC)
    return q_weight, k_weight, q_mean, k_mean


@triton.jit
def attention_weights(
    covariance, q_weight, k_weight, q_mean, k_mean, offs_c, offs_d, i, HEADS: tl.constexpr, SHAPE: tl.constexpr
):
    """softmax over d of C^-1/2 (q_weight_c k_weight_d covariance[c, d] + N q_mean_c k_mean_d) in a head.

    covariance and the result [BLOCK_C, C], query [BLOCK_C], key [C].
    """
    TOTAL: tl.constexpr = SHAPE.total
    CHANNELS: tl.constexpr = SHAPE.channels
    logits = q_weight[:, None] * k_weight[None, :] * covariance
    logits = (logits + SHAPE.tokens * q_mean[:, None] * k_mean[None, :]) * TOTAL**-0.5
    channels, heads = of_scale(CHANNELS, i), of_scale(HEADS, i)
    width = TOTAL // heads
    place = offs_d[None, :] - (offs_c // (channels // heads) * width)[:, None]  # of a key in the channel's head
    logits = tl.where((place >= 0) & (place < width) & (offs_d < TOTAL)[None, :], logits, float("-inf"))
    logits = tl.where((offs_c < channels)[:, None], logits, 0.0)  # rows beyond the scale stay finite
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@kernel
def _mix_kernel(
    tokens, centred, mixing, shift, mixed,
    SHAPE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: tokens + Z mixing^T + shift for BLOCK_N tokens and BLOCK_C channels.

    tokens, centred, which is Z, and mixed (B, N, C), mixing (B, C, C), shift (B, C).
    """
    N: tl.constexpr = SHAPE.tokens
    TOTAL: tl.constexpr = SHAPE.total
    b, offs_n, offs_c = tile_of_product(SHAPE, BLOCK_N, BLOCK_C)
    image = b * N * TOTAL
    out = tl.zeros([BLOCK_N, BLOCK_C], ACC)
    out = add_product(
        out=out, left=centred + image, right=mixing + b * TOTAL * TOTAL, offs_n=offs_n, offs_all=offs_c,
        TRANSPOSED=True, SHAPE=SHAPE, PRECISION=PRECISION, ACC=ACC, BLOCK_K=BLOCK_K,
    )  # fmt: skip
    out += load_vector(shift + b * TOTAL, offs_c, offs_c < TOTAL, ACC)[None, :]
    out += load_tile(tokens + image, offs_n, offs_c, N, TOTAL).to(ACC)
    store_tile(mixed + image, out, offs_n, offs_c, N, TOTAL)


@triton.jit
def tile_of_product(SHAPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """The image, the tokens and the channels, of all scales, of a program that makes one tile of (B, N, C)."""
    COLUMNS: tl.constexpr = triton.cdiv(SHAPE.total, BLOCK_C)
    b, tile = split_program(triton.cdiv(SHAPE.tokens, BLOCK_N) * COLUMNS)
    offs_n = tile // COLUMNS * BLOCK_N + tl.arange(0, BLOCK_N)
    return b, offs_n, tile % COLUMNS * BLOCK_C + tl.arange(0, BLOCK_C)


def tiles_of_product(shape: Shape, config: dict[str, int]) -> int:
    """How many of them an image has."""
    return launch.blocks(shape.tokens, config["block_n"]) * launch.blocks(shape.total, config["block_c"])


class Saved(NamedTuple):
    """What the backward of one channel attention needs: tokens, also centred, their means and the covariance."""

    tokens: Tokens  # (B, N, C)
    centred: Tensor  # (B, N, C)
    mean: Tensor  # (B, C)
    covariance: Tensor  # (B, C, C)

    @classmethod
    def empty(cls, tokens: Tokens) -> "Saved":
        """Fresh memory for what the forward saves of these tokens."""
        batch, total = tokens.batch, tokens.shape.total
        return cls(
            Tokens(tokens.plain, tokens.channels, statistics=tokens.statistics),
            torch.empty_like(tokens.plain),
            tokens.empty(batch, total),
            tokens.empty(batch, total, total),
        )


def channel_attention(tokens: Tokens, contract: Contract, block: int) -> tuple[Tokens, Saved | None]:
    """Attend across channels, with the residual (paper, eq. 3).

    Args:
        tokens: with their statistics for the attention's LayerNorms, or without.
        contract: of the call.
        block: which of its blocks.

    Returns:
        The tokens, with their mean, and what the backward needs; of a block without a channel attention the tokens as
        they came, and None.
    """
    attention = contract.blocks[block].channel_attention
    if attention is None:
        return tokens, None
    tokens = with_statistics(tokens, attention)
    launcher, saved = tokens.launcher, Saved.empty(tokens)
    _centre_and_multiply(launcher, tokens, attention, saved)
    return _mix_tokens(launcher, tokens, attention, saved), saved


def _centre_and_multiply(launcher: Launcher, tokens: Tokens, attention: tuple[Attention, ...], saved: Saved) -> None:
    """Write the centred tokens, their means and their covariance."""
    batch, shape = tokens.batch, launcher.shape
    config = launcher.config("centre")
    tiles = sum([launch.blocks(c, config["block_c"]) for c in shape.channels])
    launcher(
        _centre_kernel, config, batch * launch.blocks(shape.tokens, config["block_n"]) * tiles,
        tokens=tokens.plain, statistics=tokens.statistics, sums=tokens.sums, norms=layer_norms_of(attention),
        centred=saved.centred, mean=saved.mean, SUM_BLOCKS=tokens.sum_blocks,
    )  # fmt: skip
    config = launcher.config("covariance", batch)
    rows = launch.blocks(shape.total, config["block_c"])
    launcher(
        _covariance_kernel, config, batch * rows * (rows + 1) // 2, centred=saved.centred, covariance=saved.covariance
    )


def _mix_tokens(launcher: Launcher, tokens: Tokens, attention: tuple[Attention, ...], saved: Saved) -> Tokens:
    """The tokens behind the attention, by the softmax of the covariance."""
    batch, shape = tokens.batch, launcher.shape
    config = launcher.config("mixing", launch.padded(shape.total))
    mixing = tokens.empty(batch, shape.total, shape.total, dtype=launcher.dtype)
    shift, mean = tokens.empty(batch, shape.total), tokens.empty(batch, shape.total)
    launcher(
        _mixing_kernel, config, batch * sum([launch.blocks(c, config["block_c"]) for c in shape.channels]),
        covariance=saved.covariance, mean=saved.mean, sums=tokens.sums, projections=projections_of(attention),
        mixing=mixing, shift=shift, mean_token=mean, HEADS=heads_of(attention), SUM_BLOCKS=tokens.sum_blocks,
    )  # fmt: skip
    config = launcher.config("mix", batch)
    mixed = Tokens(torch.empty_like(tokens.plain), tokens.channels, mean=mean)
    launcher(
        _mix_kernel, config, batch * tiles_of_product(shape, config),
        tokens=tokens.plain, centred=saved.centred, mixing=mixing, shift=shift, mixed=mixed.plain,
    )  # fmt: skip
    return mixed
