"""Stage 3: spatial cross-attention. docs/algebra.md derives its scores."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dca_kernels.contract import Attention, Contract
from dca_kernels.triton_backend import launch
from dca_kernels.triton_backend.launch import Launcher
from dca_kernels.triton_backend.parameters import heads_of, projections_of
from dca_kernels.triton_backend.primitives import (
    LOG2_E,
    kernel,
    load_tokens,
    load_vector,
    padded,
    split_program,
)
from dca_kernels.triton_backend.tokens import Tokens, with_normalised


@triton.constexpr_function
def first_head(heads, i):
    """How many heads the scales before scale i have."""
    return sum(heads[k] for k in range(i))


@kernel
def _spatial_attention_kernel(
    tokens, normalised, level, projections, attended, averaged, scores,
    SHAPE: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_NARROW: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head of one scale, against all keys.

    tokens, normalised, attended (B, N, C), level (B, C). For a backward, averaged (B, N, C) and scores
    (B, heads, 3, N), see `Saved`; else None.
    """
    ALL_HEADS: tl.constexpr = first_head(HEADS, len(HEADS))
    BLOCKS: tl.constexpr = triton.cdiv(SHAPE.tokens, BLOCK_M)
    b, tile = split_program(ALL_HEADS * BLOCKS)
    head_of_all = ALL_HEADS - 1 - tile // BLOCKS  # the widest scale, usually the last, first
    offs_m = tile % BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    for i in tl.static_range(len(SHAPE.channels)):
        head = head_of_all - first_head(HEADS, i)
        if (head >= 0) & (head < HEADS[i]):
            _attend(
                tokens=tokens, normalised=normalised, level=level, projections=projections, attended=attended,
                averaged=averaged, scores=scores, scores_offset=(b * ALL_HEADS + head_of_all) * 3 * SHAPE.tokens, b=b,
                head=head, offs_m=offs_m, i=i, SHAPE=SHAPE, HEADS=HEADS, PRECISION=PRECISION, ACC=ACC, BLOCK_N=BLOCK_N,
                BLOCK_NARROW=BLOCK_NARROW,
            )  # fmt: skip


@triton.jit
def _attend(
    tokens, normalised, level, projections, attended, averaged, scores, scores_offset, b, head, offs_m,
    i: tl.constexpr, SHAPE: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_NARROW: tl.constexpr,
):  # fmt: skip
    """tokens + projection of softmax(scores) values; keys and values are the normalised tokens."""
    N: tl.constexpr = SHAPE.tokens
    TOTAL: tl.constexpr = SHAPE.total
    OFFSET: tl.constexpr = SHAPE.offsets[i]
    DK: tl.constexpr = SHAPE.total // HEADS[i]
    DV: tl.constexpr = SHAPE.channels[i] // HEADS[i]
    tokens += b * N * TOTAL
    normalised += b * N * TOTAL
    level += b * TOTAL
    offs_k = head * DK + tl.arange(0, padded(DK))
    offs_v = head * DV + tl.arange(0, padded(DV))
    mask_k, mask_v, mask_m = offs_k < (head + 1) * DK, offs_v < (head + 1) * DV, offs_m < N

    bilinear, linear = load_score_terms(projections, level, offs_k, mask_k, i, DK, ACC)
    query = load_tokens(normalised, offs_m, offs_k, mask_m, mask_k, TOTAL)  # [BLOCK_M, DK]
    if scores is not None:  # the backward will need them
        key_scores = tl.sum(query.to(ACC) * linear[None, :], 1)
        tl.store(scores + scores_offset + offs_m, key_scores, mask=mask_m)
    query = (query.to(ACC) * bilinear[None, :] + linear[None, :]).to(query.dtype)

    AT_ONCE: tl.constexpr = keys_at_once(DV, BLOCK_N, BLOCK_NARROW)
    shift = tl.zeros(offs_m.shape, ACC)
    normaliser, out = _attend_as_they_are(
        query=query, normalised=normalised, offs_k=offs_k, offs_all=OFFSET + offs_v, mask_k=mask_k, mask_v=mask_v, N=N,
        TOTAL=TOTAL, PRECISION=PRECISION, ACC=ACC, BLOCK_N=AT_ONCE,
    )  # fmt: skip
    sound = (normaliser > 0.1) & (normaliser < largest_sum(query.dtype)) | (offs_m >= N)
    if tl.min(sound.to(tl.int32)) == 0:
        shift, normaliser, out = _attend_online(
            query=query, normalised=normalised, offs_k=offs_k, offs_all=OFFSET + offs_v, mask_k=mask_k, mask_v=mask_v,
            N=N, TOTAL=TOTAL, PRECISION=PRECISION, ACC=ACC, BLOCK_N=AT_ONCE,
        )  # fmt: skip

    values = out / normaliser[:, None]
    offs = b * N * TOTAL + offs_m[:, None] * TOTAL + (OFFSET + offs_v)[None, :]
    mask = mask_m[:, None] & mask_v[None, :]
    if scores is not None:
        tl.store(scores + scores_offset + N + offs_m, shift, mask=mask_m)
        tl.store(scores + scores_offset + 2 * N + offs_m, tl.log2(normaliser), mask=mask_m)
        tl.store(averaged + offs, values, mask=mask)
    p_weight = load_vector(projections.output_weight[i], offs_v, mask_v, ACC)
    weight = p_weight * load_vector(projections.value_weight[i], offs_v, mask_v, ACC)
    bias = p_weight * load_vector(projections.value_bias[i], offs_v, mask_v, ACC)
    bias += load_vector(projections.output_bias[i], offs_v, mask_v, ACC)
    bias += weight * load_vector(level + OFFSET, offs_v, mask_v, ACC)
    values = values * weight[None, :] + bias[None, :]
    values += load_tokens(tokens, offs_m, OFFSET + offs_v, mask_m, mask_v, TOTAL).to(ACC)
    tl.store(attended + offs, values, mask=mask)


@triton.constexpr_function
def keys_at_once(dv, block, block_narrow):
    """How many: narrow values leave registers for more."""
    return block_narrow if dv <= 32 else block


@triton.constexpr_function
def largest_sum(dtype):
    """What weights of a dtype may come to: each is a number of it, and their products with values are of ACC."""
    return 2.0**15 if dtype == tl.float16 else 2.0**64


@triton.jit
def _attend_as_they_are(
    query, normalised, offs_k, offs_all, mask_k, mask_v,
    N: tl.constexpr, TOTAL: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sum of weights, and weighted values, where a weight is 2^score: the softmax of scores that are not large.

    Where they are large, either way, the sum says so.
    """
    normaliser = tl.zeros([query.shape[0]], ACC)
    out = tl.zeros([query.shape[0], offs_all.shape[0]], ACC)
    WHOLE: tl.constexpr = N // BLOCK_N * BLOCK_N
    for start in range(0, WHOLE, BLOCK_N):
        normaliser, out = _add_keys(
            normaliser=normaliser, attended=out, query=query, normalised=normalised,
            offs_n=start + tl.arange(0, BLOCK_N), offs_k=offs_k, offs_all=offs_all, mask_k=mask_k, mask_v=mask_v, N=N,
            TOTAL=TOTAL, PRECISION=PRECISION, ACC=ACC, END=WHOLE,
        )  # fmt: skip
    if WHOLE < N:
        normaliser, out = _add_keys(
            normaliser=normaliser, attended=out, query=query, normalised=normalised,
            offs_n=WHOLE + tl.arange(0, BLOCK_N), offs_k=offs_k, offs_all=offs_all, mask_k=mask_k, mask_v=mask_v, N=N,
            TOTAL=TOTAL, PRECISION=PRECISION, ACC=ACC, END=WHOLE + BLOCK_N,
        )  # fmt: skip
    return normaliser, out


@triton.jit
def _add_keys(
    normaliser, attended, query, normalised, offs_n, offs_k, offs_all, mask_k, mask_v,
    N: tl.constexpr, TOTAL: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, END: tl.constexpr,
):  # fmt: skip
    """Sum of weights, and weighted values, with the keys offs_n < END as well."""
    scores, values = _scores_and_values(
        query=query, normalised=normalised, offs_n=offs_n, offs_k=offs_k, offs_all=offs_all, mask_k=mask_k,
        mask_v=mask_v, N=N, TOTAL=TOTAL, PRECISION=PRECISION, ACC=ACC, END=END,
    )  # fmt: skip
    weights = tl.exp2(scores)
    # [BLOCK_M, BLOCK_N] [BLOCK_N, DV]
    attended = tl.dot(weights.to(values.dtype), values, attended, input_precision=PRECISION, out_dtype=ACC)
    return normaliser + tl.sum(weights, 1), attended


@triton.jit
def _attend_online(
    query, normalised, offs_k, offs_all, mask_k, mask_v,
    N: tl.constexpr, TOTAL: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Largest score, sum of weights and weighted values, a weight being 2^(score - largest): online softmax."""
    largest = tl.full([query.shape[0]], float("-inf"), ACC)
    normaliser = tl.zeros([query.shape[0]], ACC)
    out = tl.zeros([query.shape[0], offs_all.shape[0]], ACC)
    for start in tl.range(0, N, BLOCK_N, num_stages=1):  # it is rare: small code is better than fast code
        scores, values = _scores_and_values(
            query=query, normalised=normalised, offs_n=start + tl.arange(0, BLOCK_N), offs_k=offs_k, offs_all=offs_all,
            mask_k=mask_k, mask_v=mask_v, N=N, TOTAL=TOTAL, PRECISION=PRECISION, ACC=ACC,
            END=triton.cdiv(N, BLOCK_N) * BLOCK_N,
        )  # fmt: skip
        larger = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - larger[:, None])
        shrink = tl.exp2(largest - larger)
        normaliser = normaliser * shrink + tl.sum(weights, 1)
        # [BLOCK_M, BLOCK_N] [BLOCK_N, DV]
        out = tl.dot(weights.to(values.dtype), values, out * shrink[:, None], input_precision=PRECISION, out_dtype=ACC)
        largest = larger
    return largest, normaliser, out


@triton.jit
def _scores_and_values(
    query, normalised, offs_n, offs_k, offs_all, mask_k, mask_v,
    N: tl.constexpr, TOTAL: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, END: tl.constexpr,
):  # fmt: skip
    """Of the keys offs_n < END, -inf for those beyond N: [BLOCK_M, BLOCK_N], [BLOCK_N, DV]."""
    mask_n = _exist(offs_n, N, END)
    keys = load_tokens(normalised, offs_n, offs_k, mask_n, mask_k, TOTAL)
    values = load_tokens(normalised, offs_n, offs_all, mask_n, mask_v, TOTAL)
    # [BLOCK_M, DK] [DK, BLOCK_N]
    scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION, out_dtype=ACC)
    if END > N:
        scores = tl.where(mask_n[None, :], scores, float("-inf"))
    return scores, values


@triton.jit
def _exist(offs_n, N: tl.constexpr, END: tl.constexpr):
    """Which tokens before END there are: a constant where all are, so that no tile but the last one is masked."""
    if END > N:
        return offs_n < N
    return tl.full(offs_n.shape, True, tl.int1)


@triton.jit
def load_score_terms(projections, level, offs_k, mask_k, i: tl.constexpr, DK: tl.constexpr, ACC: tl.constexpr):
    """score[m, n] = sum over k of (bilinear_k d_mk + linear_k) d_nk, times log2(e); d: the tokens less their level."""
    scale: tl.constexpr = DK**-0.5 * LOG2_E
    q_weight = load_vector(projections.query_weight[i], offs_k, mask_k, ACC)
    q_bias = load_vector(projections.query_bias[i], offs_k, mask_k, ACC)
    k_weight = load_vector(projections.key_weight[i], offs_k, mask_k, ACC)
    of_level = load_vector(level, offs_k, mask_k, ACC)
    return q_weight * scale * k_weight, (q_weight * of_level + q_bias) * scale * k_weight


class Saved(NamedTuple):
    """What the backward of one spatial attention needs.

    Attributes:
        tokens: with `statistics`, `normalised` and `level`.
        averaged: (B, N, C), each query's values, averaged by its weights, before their maps and less their level.
        scores: (B, heads, 3, N), of each token as a key, the linear part of its scores; as a query, what is taken off
            its scores, and log2 of the sum of its weights then. Their sum is a score's size, and so is its rounding.
    """

    tokens: Tokens
    averaged: Tensor
    scores: Tensor

    @classmethod
    def empty(cls, tokens: Tokens, heads: tuple[int, ...]) -> "Saved":
        """These tokens, and fresh memory for what else the forward saves."""
        scores = tokens.empty(tokens.batch, sum(heads), 3, tokens.shape.tokens)
        return cls(
            tokens._replace(sums=None, mean=None),
            torch.empty_like(tokens.plain),
            scores,
        )


def spatial_attention(tokens: Tokens, contract: Contract, block: int) -> tuple[Tokens, Saved | None]:
    """Attend across tokens, with the residual (paper, eq. 4).

    Args:
        tokens: normalised for the attention's LayerNorms, or not yet.
        contract: of the call. The key map's bias drops out.
        block: which of its blocks.

    Returns:
        The tokens, and what the backward needs where there will be one; of a block without a spatial attention the
        tokens as they came, and None.
    """
    attention = contract.blocks[block].spatial_attention
    if attention is None:
        return tokens, None
    tokens = with_normalised(tokens, attention, contract.backward)
    launcher, heads = tokens.launcher, heads_of(attention)
    config, precision = configured("spatial_attention", launcher, attention, tokens.batch)
    attended = Tokens(torch.empty_like(tokens.plain), tokens.channels)
    saved = Saved.empty(tokens, heads) if contract.backward else None
    launcher(
        _spatial_attention_kernel, config,
        tokens.batch * sum(heads) * launch.blocks(launcher.shape.tokens, config["block_m"]),
        tokens=tokens.plain, normalised=tokens.normalised, level=tokens.level, projections=projections_of(attention),
        attended=attended.plain, averaged=None if saved is None else saved.averaged,
        scores=None if saved is None else saved.scores, HEADS=heads, PRECISION=precision,
    )  # fmt: skip
    return attended, saved


def configured(
    name: str, launcher: Launcher, attention: tuple[Attention, ...], images: int
) -> tuple[dict[str, Any], str]:
    """A kernel's configuration, and the precision of its products."""
    config = launcher.config(name, launch.padded(launcher.shape.total // min(heads_of(attention))), images)
    ieee = launcher.precision == "tf32x3" and config.get("ieee")  # wide heads spill otherwise
    return config, "ieee" if ieee else launcher.precision
