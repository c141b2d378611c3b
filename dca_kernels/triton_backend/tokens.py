"""The tokens between the stages, and their LayerNorm where no stage could do it in passing."""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dca_kernels.contract import Attention, Contract, accumulation_dtype, channels_of
from dca_kernels.triton_backend import launch
from dca_kernels.triton_backend.launch import Launcher
from dca_kernels.triton_backend.layer_norm import store_normalised, store_statistics, store_tokens_gradient
from dca_kernels.triton_backend.parameters import eps_of, layer_norms_of
from dca_kernels.triton_backend.primitives import (
    Shape,
    kernel,
    load_tokens,
    load_vector,
    padded,
    shape_of,
    split_program,
    sum_blocks,
)


class Tokens(NamedTuple):
    """The token grid of all scales, and what the stage that wrote it has prepared for the next.

    Attributes:
        plain: (B, N, C), the channels of all scales side by side.
        channels: C_i of each scale.
        statistics: (B, S, 2, N), mean and reciprocal standard deviation of each token of each scale.
        sums: (B, blocks, 2, C), sums over blocks of tokens, normalised and plain.
        mean: (B, C), the mean token.
        normalised: (B, N, C), the LayerNorm for the spatial attention, less `level`.
        level: (B, C).
    """

    plain: Tensor
    channels: tuple[int, ...]
    statistics: Tensor | None = None
    sums: Tensor | None = None
    mean: Tensor | None = None
    normalised: Tensor | None = None
    level: Tensor | None = None

    @classmethod
    def beside(cls, maps: Sequence[Tensor], contract: Contract) -> "Tokens":
        """Fresh memory for the tokens of these maps."""
        channels = channels_of(contract)
        count = contract.grid[0] * contract.grid[1]
        return cls(maps[0].new_empty((maps[0].shape[0], count, sum(channels)), dtype=contract.dtype), channels)

    @property
    def batch(self) -> int:
        return self.plain.shape[0]

    @property
    def shape(self) -> Shape:
        return shape_of(self.plain.shape[1], self.channels)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Fresh memory beside the tokens, by default in the dtype of sums and statistics."""
        return self.plain.new_empty(shape, dtype=dtype or accumulation_dtype(self.plain.dtype))

    def empty_statistics(self) -> Tensor:
        """Fresh memory for `statistics`."""
        return self.empty(self.batch, len(self.channels), 2, self.shape.tokens)

    @property
    def sum_blocks(self) -> int:
        """How many blocks of tokens `sums` has."""
        assert self.sums is not None
        return self.sums.shape[1]

    @property
    def launcher(self) -> Launcher:
        """What launches kernels for these tokens."""
        return Launcher(self.plain.device, self.plain.dtype, self.shape)


@kernel
def _statistics_kernel(
    tokens, statistics, sums, SHAPE: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr
):
    """One program: LayerNorm's statistics (B, S, 2, N), and sums (B, blocks, 2, C), of BLOCK_N tokens of one scale.

    tokens (B, N, C).
    """
    BLOCKS: tl.constexpr = triton.cdiv(SHAPE.tokens, BLOCK_N)
    b, tile = split_program(len(SHAPE.channels) * BLOCKS)
    offs_n = tile % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    for i in tl.static_range(len(SHAPE.channels)):
        if tile // BLOCKS == i:
            rows, mask = _load_scale(tokens, b, offs_n, i, SHAPE, ACC)
            store_statistics(
                tokens=rows, mask=mask, statistics=statistics, sums=sums, b=b, block=tile % BLOCKS, offs_n=offs_n,
                i=i, BLOCKS=BLOCKS, EPS=EPS[i], SHAPE=SHAPE,
            )  # fmt: skip


@kernel
def _normalise_kernel(
    tokens, mean, sums, norms, statistics, normalised, level,
    SHAPE: tl.constexpr, SUM_BLOCKS: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr,
    COUNTS: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """One program: the LayerNorm of COUNTS[i] blocks of BLOCK_N tokens of one scale, the first FIRST[i] of an image.

    tokens, normalised (B, N, C), level (B, C). The mean token is mean (B, C), or of sums (B, SUM_BLOCKS, 2, C). For a
    backward, and if they are not known, statistics (B, S, 2, N), else None.
    """
    TOTAL: tl.constexpr = SHAPE.total
    b, tile = split_program(FIRST[len(SHAPE.channels)])
    for i in tl.static_range(len(SHAPE.channels)):
        if (tile >= FIRST[i]) & (tile < FIRST[i + 1]):
            offs_n = (tile - FIRST[i]) * COUNTS[i] * BLOCK_N + tl.arange(0, COUNTS[i] * BLOCK_N)
            offs_c = tl.arange(0, padded(SHAPE.channels[i]))
            offs_all, mask_c = SHAPE.offsets[i] + offs_c, offs_c < SHAPE.channels[i]
            if mean is not None:
                mean_token = load_vector(mean + b * TOTAL, offs_all, mask_c, ACC)
            else:
                plain_sums = sums + (b * SUM_BLOCKS * 2 + 1) * TOTAL
                mean_token = sum_blocks(plain_sums, offs_all, mask_c, SUM_BLOCKS, 2 * TOTAL, ACC) / SHAPE.tokens
            rows, mask = _load_scale(tokens, b, offs_n, i, SHAPE, ACC)
            store_normalised(
                tokens=rows, mask=mask, mean_token=mean_token, norms=norms, statistics=statistics,
                normalised=normalised, level=level, b=b, offs_n=offs_n, i=i, EPS=EPS[i], SHAPE=SHAPE, ACC=ACC,
            )  # fmt: skip


@triton.jit
def _load_scale(tokens, b, offs_n, i: tl.constexpr, SHAPE: tl.constexpr, ACC: tl.constexpr):
    """All channels of scale i of some tokens (B, N, C): [tokens, channels], and the mask of what there is."""
    offs_c = tl.arange(0, padded(SHAPE.channels[i]))
    mask_n, mask_c = offs_n < SHAPE.tokens, offs_c < SHAPE.channels[i]
    image = tokens + b * SHAPE.tokens * SHAPE.total
    rows = load_tokens(image, offs_n, SHAPE.offsets[i] + offs_c, mask_n, mask_c, SHAPE.total)
    return rows.to(ACC), mask_n[:, None] & mask_c[None, :]


@kernel
def _layer_norm_backward_kernel(
    tokens, statistics, dnormalised, parts, dresidual, norms, dtokens, dnorm,
    SHAPE: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr,
    COUNTS: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of tokens (B, N, C) of one scale through their LayerNorm, and the residual's.

    The normalised tokens' is dnormalised (B, N, C) and the sum of parts (B, PARTS, N, C); statistics (B, S, 2, N).
    COUNTS[i] blocks of BLOCK_N tokens of scale i are a program's, in STEPS steps; FIRST[i] is its first program within
    an image. dnorm (B, blocks, 2, C), of which a program's first block has the sums of all its blocks.
    """
    TOTAL: tl.constexpr = SHAPE.total
    BLOCKS: tl.constexpr = triton.cdiv(SHAPE.tokens, BLOCK_N)
    b, tile = split_program(FIRST[len(SHAPE.channels)])
    for i in tl.static_range(len(SHAPE.channels)):
        if (tile >= FIRST[i]) & (tile < FIRST[i + 1]):
            COUNT: tl.constexpr = COUNTS[i]
            ROWS: tl.constexpr = COUNT * BLOCK_N // STEPS
            block = (tile - FIRST[i]) * COUNT
            offs_c = tl.arange(0, padded(SHAPE.channels[i]))
            of_weight, of_bias = tl.zeros(offs_c.shape, ACC), tl.zeros(offs_c.shape, ACC)
            for step in range(STEPS):
                offs_n = block * BLOCK_N + step * ROWS + tl.arange(0, ROWS)
                drows, _ = _load_scale(dnormalised, b, offs_n, i, SHAPE, ACC)
                for k in tl.static_range(PARTS):
                    part, _ = _load_scale(parts, b * PARTS + k, offs_n, i, SHAPE, ACC)
                    drows += part
                weight, bias = store_tokens_gradient(
                    tokens=tokens, statistics=statistics, dnormalised=drows, dresidual=dresidual, norms=norms,
                    dtokens=dtokens, b=b, offs_n=offs_n, i=i, SHAPE=SHAPE, ACC=ACC,
                )  # fmt: skip
                of_weight, of_bias = of_weight + weight, of_bias + bias
            offs_block = tl.arange(0, COUNT)
            begin = (b * BLOCKS + block + offs_block) * 2 * TOTAL
            ptrs = dnorm + begin[:, None] + (SHAPE.offsets[i] + offs_c)[None, :]
            mask = (block + offs_block < BLOCKS)[:, None] & (offs_c < SHAPE.channels[i])[None, :]
            first = (offs_block == 0)[:, None]
            tl.store(ptrs, tl.where(first, of_weight[None, :], 0.0), mask=mask)
            tl.store(ptrs + TOTAL, tl.where(first, of_bias[None, :], 0.0), mask=mask)


def with_statistics(tokens: Tokens, attention: Sequence[Attention]) -> Tokens:
    """The tokens with `statistics` and `sums`, taken here where their writer did not have whole tokens at hand."""
    if tokens.statistics is not None and tokens.sums is not None:
        return tokens
    launcher, batch, shape = tokens.launcher, tokens.batch, tokens.shape
    config = launcher.config("tokens", widest_scale(shape))
    blocks = launch.blocks(shape.tokens, config["block_n"])
    statistics = tokens.empty_statistics()
    sums = tokens.empty(batch, blocks, 2, shape.total)
    launcher(
        _statistics_kernel, config, batch * len(shape.channels) * blocks,
        tokens=tokens.plain, statistics=statistics, sums=sums, EPS=eps_of(attention),
    )  # fmt: skip
    return tokens._replace(statistics=statistics, sums=sums)


def with_normalised(tokens: Tokens, attention: Sequence[Attention], backward: bool) -> Tokens:
    """The tokens with `normalised` and `level`; where there will be a backward, with `statistics` as well."""
    if tokens.normalised is not None and tokens.level is not None:
        return tokens
    if tokens.mean is None:
        tokens = with_statistics(tokens, attention)
        sums, blocks = tokens.sums, tokens.sum_blocks
    else:
        sums, blocks = None, 0
    launcher, batch, shape = tokens.launcher, tokens.batch, tokens.shape
    config = launcher.config("tokens", widest_scale(shape))
    counts, first = _counts(shape.channels, launch.blocks(shape.tokens, config["block_n"]))
    normalised, level = torch.empty_like(tokens.plain), tokens.empty(batch, shape.total)
    statistics = tokens.empty_statistics() if backward and tokens.statistics is None else None
    launcher(
        _normalise_kernel, config, batch * first[-1],
        tokens=tokens.plain, mean=tokens.mean, sums=sums, norms=layer_norms_of(attention), statistics=statistics,
        normalised=normalised, level=level, SUM_BLOCKS=blocks, EPS=eps_of(attention), COUNTS=counts, FIRST=first,
    )  # fmt: skip
    if statistics is not None:
        tokens = tokens._replace(statistics=statistics)
    return tokens._replace(normalised=normalised, level=level)


def layer_norm_backward(
    tokens: Tokens,
    attention: Sequence[Attention],
    dnormalised: Tensor,
    dresidual: Tensor,
    parts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of tokens (B, N, C), and partial sums (B, blocks, 2, C) of LayerNorm's weights and biases.

    Args:
        tokens: what was normalised, with its statistics.
        attention: S scales with their LayerNorms.
        dnormalised: (B, N, C), the gradient of the normalised tokens.
        dresidual: (B, N, C), the gradient that reached the tokens past the LayerNorm.
        parts: (B, parts, N, C), more of the normalised tokens' gradient, to be summed.
    """
    launcher, batch, shape = tokens.launcher, tokens.batch, tokens.shape
    config = launcher.config("layer_norm_backward", widest_scale(shape))
    blocks = launch.blocks(shape.tokens, config["block_n"])
    counts, first = _counts(shape.channels, blocks)
    dtokens = torch.empty_like(tokens.plain)
    dnorm = tokens.empty(batch, blocks, 2, shape.total)
    launcher(
        _layer_norm_backward_kernel, config, batch * first[-1],
        tokens=tokens.plain, statistics=tokens.statistics, dnormalised=dnormalised, parts=parts, dresidual=dresidual,
        norms=layer_norms_of(attention), dtokens=dtokens, dnorm=dnorm, PARTS=0 if parts is None else parts.shape[1],
        COUNTS=counts, FIRST=first,
    )  # fmt: skip
    return dtokens, dnorm


@functools.cache
def _counts(channels: tuple[int, ...], blocks: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How many blocks of tokens a program of each scale has, and where each scale's programs begin within an image.

    The narrower the scale, the more, so that all programs have as much to do; but no more than there are.
    """
    widest = max(map(launch.padded, channels))
    counts = tuple(min(widest // launch.padded(c), triton.next_power_of_2(blocks)) for c in channels)
    return counts, (0, *itertools.accumulate(launch.blocks(blocks, count) for count in counts))


def widest_scale(shape: Shape) -> int:
    """Channels of the widest scale, padded to a power of two."""
    return launch.padded(max(shape.channels))
