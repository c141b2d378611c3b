"""LayerNorm of one scale's channels, inside the kernels that read or write whole tokens."""

import triton
import triton.language as tl

from dca_kernels.triton_backend.primitives import load_vector, sum_images


@triton.jit
def row_statistics(rows, mask, SIZE: tl.constexpr, EPS: tl.constexpr):
    """Mean and reciprocal standard deviation of each row: rows, zero where mask is not, [rows, SIZE] -> [rows].

    The second step removes the rounding of the first: a constant row is zero when its mean is subtracted.
    """
    mean = tl.sum(rows, 1) / SIZE
    mean += tl.sum(tl.where(mask, rows - mean[:, None], 0.0), 1) / SIZE
    centred = tl.where(mask, rows - mean[:, None], 0.0)
    return mean, tl.rsqrt(tl.sum(centred * centred, 1) / SIZE + EPS)


@triton.jit
def statistics_pointers(statistics, b, i, offs_n, SHAPE: tl.constexpr):
    """Where mean and reciprocal standard deviation of tokens are: (B, S, 2, N)."""
    ptrs = statistics + (b * len(SHAPE.channels) + i) * 2 * SHAPE.tokens + offs_n
    return ptrs, ptrs + SHAPE.tokens


@triton.jit
def store_statistics(
    tokens, mask, statistics, sums, b, block, offs_n,
    i: tl.constexpr, BLOCKS: tl.constexpr, EPS: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """LayerNorm's statistics of tokens [rows, channels], and this block's sums of the normalised and of the plain ones.

    statistics (B, S, 2, N), sums (B, BLOCKS, 2, C).
    """
    mean, rstd = row_statistics(tokens, mask, SHAPE.channels[i], EPS)
    mean_ptrs, rstd_ptrs = statistics_pointers(statistics, b, i, offs_n, SHAPE)
    tl.store(mean_ptrs, mean, mask=offs_n < SHAPE.tokens)
    tl.store(rstd_ptrs, rstd, mask=offs_n < SHAPE.tokens)
    normalised = tl.where(mask, (tokens - mean[:, None]) * rstd[:, None], 0.0)
    offs_c = tl.arange(0, tokens.shape[1])
    sums_ptrs = sums + (b * BLOCKS + block) * 2 * SHAPE.total + SHAPE.offsets[i] + offs_c
    tl.store(sums_ptrs, tl.sum(normalised, 0), mask=offs_c < SHAPE.channels[i])
    tl.store(sums_ptrs + SHAPE.total, tl.sum(tokens, 0), mask=offs_c < SHAPE.channels[i])


@triton.jit
def _normalise_vector(vector, mask, SIZE: tl.constexpr, EPS: tl.constexpr):
    """LayerNorm of one token [SIZE], without its weight and bias."""
    mean = tl.sum(vector) / SIZE
    mean += tl.sum(tl.where(mask, vector - mean, 0.0)) / SIZE
    centred = tl.where(mask, vector - mean, 0.0)
    return centred * tl.rsqrt(tl.sum(centred * centred) / SIZE + EPS)


@triton.jit
def store_normalised(
    tokens, mask, mean_token, norms, statistics, normalised, level, b, offs_n,
    i: tl.constexpr, EPS: tl.constexpr, SHAPE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The LayerNorm of tokens [rows, channels] less a level per image and channel, and the level: (B, N, C) and (B, C).

    The level is the LayerNorm of the mean token: what is left is small where tokens differ little, and keeps its digits
    when it is rounded. Spatial attention takes any level (docs/algebra.md).
    """
    N: tl.constexpr = SHAPE.tokens
    TOTAL: tl.constexpr = SHAPE.total
    offs_c = tl.arange(0, tokens.shape[1])
    mask_c = offs_c < SHAPE.channels[i]
    gamma, beta = load_vector(norms.weight[i], offs_c, mask_c, ACC), load_vector(norms.bias[i], offs_c, mask_c, ACC)
    of_mean = _normalise_vector(mean_token, mask_c, SHAPE.channels[i], EPS)
    mean, rstd = row_statistics(tokens, mask, SHAPE.channels[i], EPS)
    if statistics is not None:  # the backward will need them
        mean_ptrs, rstd_ptrs = statistics_pointers(statistics, b, i, offs_n, SHAPE)
        tl.store(mean_ptrs, mean, mask=offs_n < N)
        tl.store(rstd_ptrs, rstd, mask=offs_n < N)
    out = gamma * ((tokens - mean[:, None]) * rstd[:, None] - of_mean[None, :])
    offs_all = SHAPE.offsets[i] + offs_c
    tl.store(normalised + b * N * TOTAL + offs_n[:, None] * TOTAL + offs_all[None, :], out, mask=mask)
    tl.store(level + b * TOTAL + offs_all, gamma * of_mean + beta, mask=mask_c & (tl.min(offs_n) == 0))


@triton.jit
def store_tokens_gradient(
    tokens, statistics, dnormalised, dresidual, norms, dtokens, b, offs_n,
    i: tl.constexpr, SHAPE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient of tokens (B, N, C) through their LayerNorm, and the residual's (B, N, C), in dtokens (B, N, C).

    dnormalised [rows, channels], zero where there is no token, is that of the normalised tokens of scale i; statistics
    (B, S, 2, N). Returns the rows' sums for LayerNorm's weight and bias: [channels] each.
    """
    N: tl.constexpr = SHAPE.tokens
    TOTAL: tl.constexpr = SHAPE.total
    SIZE: tl.constexpr = SHAPE.channels[i]
    offs_c = tl.arange(0, dnormalised.shape[1])
    mask_n, mask_c = offs_n < N, offs_c < SIZE
    mask = mask_n[:, None] & mask_c[None, :]
    offs = b * N * TOTAL + offs_n[:, None] * TOTAL + (SHAPE.offsets[i] + offs_c)[None, :]
    rows = tl.load(tokens + offs, mask=mask, other=0.0).to(ACC)
    past = tl.load(dresidual + offs, mask=mask, other=0.0)  # before the sums, which would wait for it
    mean_ptrs, rstd_ptrs = statistics_pointers(statistics, b, i, offs_n, SHAPE)
    mean, rstd = tl.load(mean_ptrs, mask=mask_n, other=0.0), tl.load(rstd_ptrs, mask=mask_n, other=0.0)
    gamma = load_vector(norms.weight[i], offs_c, mask_c, ACC)
    normalised = (rows - mean[:, None]) * rstd[:, None]
    scaled = dnormalised * gamma[None, :]
    along_mean = tl.sum(scaled, 1) / SIZE
    along_std = tl.sum(scaled * normalised, 1) / SIZE
    drows = rstd[:, None] * (scaled - along_mean[:, None] - normalised * along_std[:, None]) + past.to(ACC)
    tl.store(dtokens + offs, drows, mask=mask)
    return tl.sum(dnormalised * normalised, 0), tl.sum(dnormalised, 0)


@triton.jit
def store_norm_gradients(dnorm, out, offs, batch, BLOCKS: tl.constexpr, SHAPE: tl.constexpr, ACC: tl.constexpr):
    """The sums of `_layer_norm_backward_kernel` over blocks and images: elements `offs` of weight and bias, (2, C)."""
    TOTAL: tl.constexpr = SHAPE.total
    mask = offs < 2 * TOTAL
    tl.store(out + offs, sum_images(dnorm, offs, mask, batch, BLOCKS, 2 * TOTAL, BLOCKS * 2 * TOTAL, ACC), mask=mask)
