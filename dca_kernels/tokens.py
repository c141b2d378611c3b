"""The tokens between the stages of the `triton` backend, and their LayerNorm where no stage could do it in passing."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dca_kernels import launch
from dca_kernels.parameters import LayerNorm
from dca_kernels.primitives import (
    kernel,
    offset,
    padded,
    split_program,
    store_layer_norm_backward,
    store_normalised,
    store_statistics,
    sum_blocks,
    total,
)


@dataclass
class Tokens:
    """The token grid of all scales, and what the stage that wrote it has prepared for the next.

    Attributes:
        values: (B, N, C), the channels of all scales side by side.
        channels: C_i of each scale.
        statistics: (B, S, 2, N), mean and reciprocal standard deviation of each token of each scale.
        sums: (B, blocks, 2, C), sums over blocks of tokens, normalised and plain.
        normalised: (B, N, C), the LayerNorm for the spatial attention, less `level`.
        level: (B, C).
    """

    values: Tensor
    channels: tuple[int, ...]
    statistics: Tensor | None = None
    sums: Tensor | None = None
    normalised: Tensor | None = None
    level: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, N, C)."""
        batch, count, total = self.values.shape
        return batch, count, total

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where the channels of each scale begin."""
        return tuple(sum(self.channels[:i]) for i in range(len(self.channels)))

    @property
    def accumulation(self) -> torch.dtype:
        """float64 for float64 tokens, else float32."""
        return torch.float64 if self.values.dtype == torch.float64 else torch.float32

    def new_empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An empty tensor beside the tokens, by default in the accumulation dtype."""
        return torch.empty(shape, dtype=dtype or self.accumulation, device=self.values.device)


@kernel
def _statistics_kernel(
    tokens_ptr, statistics_ptr, sums_ptr,
    N: tl.constexpr, CHANNELS: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: LayerNorm's statistics, and sums, of BLOCK_N tokens of one scale."""
    BLOCKS: tl.constexpr = triton.cdiv(N, BLOCK_N)
    b, tile = split_program(len(CHANNELS) * BLOCKS)
    offs_n = tile % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    for i in tl.static_range(len(CHANNELS)):
        if tile // BLOCKS == i:
            tokens, mask = _load_scale(tokens_ptr, b, i, offs_n, N, CHANNELS, ACC)
            store_statistics(
                tokens, mask, b, i, tile % BLOCKS, offs_n, statistics_ptr, sums_ptr, N, CHANNELS, BLOCKS, EPS[i]
            )


@kernel
def _normalise_kernel(
    tokens_ptr, sums_ptr, gammas, betas, normalised_ptr, level_ptr,
    N: tl.constexpr, CHANNELS: tl.constexpr, SUM_BLOCKS: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: the LayerNorm of BLOCK_N tokens of one scale, where the stage before could not do it."""
    TOTAL: tl.constexpr = total(CHANNELS)
    BLOCKS: tl.constexpr = triton.cdiv(N, BLOCK_N)
    b, tile = split_program(len(CHANNELS) * BLOCKS)
    offs_n = tile % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    for i in tl.static_range(len(CHANNELS)):
        if tile // BLOCKS == i:
            offs_c = tl.arange(0, padded(CHANNELS[i]))
            plain_sums_ptr = sums_ptr + (b * SUM_BLOCKS * 2 + 1) * TOTAL + offset(CHANNELS, i)
            mean_token = sum_blocks(plain_sums_ptr, offs_c, offs_c < CHANNELS[i], SUM_BLOCKS, 2 * TOTAL, ACC) / N
            tokens, mask = _load_scale(tokens_ptr, b, i, offs_n, N, CHANNELS, ACC)
            store_normalised(
                tokens, mask, mean_token, b, i, offs_n, gammas[i], betas[i], normalised_ptr, level_ptr, N, CHANNELS,
                EPS[i], ACC,
            )  # fmt: skip


@triton.jit
def _load_scale(tokens_ptr, b, i: tl.constexpr, offs_n, N: tl.constexpr, CHANNELS: tl.constexpr, ACC: tl.constexpr):
    """All channels of scale i of some tokens, zero where the mask, returned as well, says that there is nothing."""
    offs_c = tl.arange(0, padded(CHANNELS[i]))
    mask = (offs_n < N)[:, None] & (offs_c < CHANNELS[i])[None, :]
    ptrs = tokens_ptr + b * N * total(CHANNELS) + offs_n[:, None] * total(CHANNELS) + offset(CHANNELS, i)
    return tl.load(ptrs + offs_c[None, :], mask=mask, other=0.0).to(ACC), mask


@kernel
def _layer_norm_backward_kernel(
    tokens_ptr, dnormalised_ptr, dvalues_ptr, dresidual_ptr, gammas, dtokens_ptr, daffine_ptr,
    N: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, COUNTS: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of tokens of one scale through their LayerNorm, and the residual's.

    The normalised tokens' is dvalues (B, N, C) and the sum of dnormalised (B, PARTS, N, C). COUNTS[i] blocks of BLOCK_N
    tokens of scale i are a program's, FIRST[i] is its first program within an image.
    """
    BLOCKS: tl.constexpr = triton.cdiv(N, BLOCK_N)
    b, tile = split_program(FIRST[len(CHANNELS)])
    for i in tl.static_range(len(CHANNELS)):
        if (tile >= FIRST[i]) & (tile < FIRST[i + 1]):
            block = (tile - FIRST[i]) * COUNTS[i]
            offs_n = block * BLOCK_N + tl.arange(0, COUNTS[i] * BLOCK_N)
            dnormalised, _ = _load_scale(dvalues_ptr, b, i, offs_n, N, CHANNELS, ACC)
            for k in tl.static_range(PARTS):
                part, _ = _load_scale(dnormalised_ptr, b * PARTS + k, i, offs_n, N, CHANNELS, ACC)
                dnormalised += part
            store_layer_norm_backward(
                tokens_ptr, dnormalised, dresidual_ptr, gammas[i], dtokens_ptr, daffine_ptr, b, i, block, offs_n, N,
                CHANNELS, BLOCKS, EPS[i], ACC, COUNTS[i],
            )  # fmt: skip


def statistics_of(tokens: Tokens, norms: Sequence[LayerNorm]) -> tuple[Tensor, Tensor]:
    """`statistics` and `sums`; taken here where the tokens' writer did not have whole tokens at hand."""
    if tokens.statistics is not None and tokens.sums is not None:
        return tokens.statistics, tokens.sums
    batch, count, width = tokens.shape
    config = _configuration(tokens)
    statistics = tokens.new_empty(batch, len(tokens.channels), 2, count)
    sums = tokens.new_empty(batch, launch.blocks(count, config["block_n"]), 2, width)
    launch.run(
        _statistics_kernel,
        batch * len(tokens.channels) * launch.blocks(count, config["block_n"]),
        config,
        tokens_ptr=tokens.values,
        statistics_ptr=statistics,
        sums_ptr=sums,
        N=count,
        CHANNELS=tokens.channels,
        EPS=launch.epsilons(norms),
        ACC=launch.triton_type(tokens.accumulation),
        BLOCK_N=config["block_n"],
    )
    return statistics, sums


def normalised_of(tokens: Tokens, norms: Sequence[LayerNorm]) -> tuple[Tensor, Tensor]:
    """`normalised` and `level`; made here where no channel attention did."""
    if tokens.normalised is not None and tokens.level is not None:
        return tokens.normalised, tokens.level
    _, sums = statistics_of(tokens, norms)
    batch, count, width = tokens.shape
    config = _configuration(tokens)
    normalised, level = torch.empty_like(tokens.values), tokens.new_empty(batch, width)
    launch.run(
        _normalise_kernel,
        batch * len(tokens.channels) * launch.blocks(count, config["block_n"]),
        config,
        tokens_ptr=tokens.values,
        sums_ptr=sums,
        gammas=launch.weights(norms),
        betas=launch.biases(norms),
        normalised_ptr=normalised,
        level_ptr=level,
        N=count,
        CHANNELS=tokens.channels,
        SUM_BLOCKS=sums.shape[1],
        EPS=launch.epsilons(norms),
        ACC=launch.triton_type(tokens.accumulation),
        BLOCK_N=config["block_n"],
    )
    return normalised, level


def layer_norm_backward(
    tokens: Tokens, norms: Sequence[LayerNorm], dnormalised: Tensor, dvalues: Tensor, dresidual: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of tokens (B, N, C), and partial sums (B, blocks, 2, C) of LayerNorm's weights and biases.

    Args:
        tokens: what was normalised.
        norms: S LayerNorms.
        dnormalised: (B, parts, N, C), summed over the parts.
        dvalues: (B, N, C), added to that.
        dresidual: (B, N, C), the gradient that reached the tokens past the LayerNorm.
    """
    batch, count, width = tokens.shape
    config = _configuration(tokens)
    blocks = launch.blocks(count, config["block_n"])
    counts, first = _counts(tokens.channels, blocks)
    dtokens = torch.empty_like(tokens.values)
    daffine = tokens.new_empty(batch, blocks, 2, width)
    launch.run(
        _layer_norm_backward_kernel,
        batch * first[-1],
        config,
        tokens_ptr=tokens.values,
        dnormalised_ptr=dnormalised,
        dvalues_ptr=dvalues,
        dresidual_ptr=dresidual,
        gammas=launch.weights(norms),
        dtokens_ptr=dtokens,
        daffine_ptr=daffine,
        N=count,
        CHANNELS=tokens.channels,
        PARTS=dnormalised.shape[1],
        EPS=launch.epsilons(norms),
        ACC=launch.triton_type(tokens.accumulation),
        BLOCK_N=config["block_n"],
        COUNTS=counts,
        FIRST=first,
    )
    return dtokens, daffine


@functools.cache
def _counts(channels: tuple[int, ...], blocks: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How many blocks of tokens a program of each scale has, and where each scale's programs begin within an image.

    The narrower the scale, the more, so that all programs have as much to do; but no more than there are.
    """
    widest = max(map(launch.padded, channels))
    counts = tuple(min(widest // launch.padded(c), triton.next_power_of_2(blocks)) for c in channels)
    return counts, (0, *itertools.accumulate(launch.blocks(blocks, count) for count in counts))


def _configuration(tokens: Tokens) -> dict[str, int]:
    target = launch.architecture(tokens.values.device)
    return launch.configuration("tokens", target, tokens.values.dtype, max(launch.padded(c) for c in tokens.channels))
