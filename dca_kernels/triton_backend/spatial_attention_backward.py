"""The backward of stage 3, spatial cross-attention, through its LayerNorm and its residual."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dca_kernels.contract import Contract
from dca_kernels.triton_backend import launch
from dca_kernels.triton_backend.parameters import (
    heads_of,
    projections_of,
)
from dca_kernels.triton_backend.primitives import (
    LN_2,
    kernel,
    load_tokens,
    load_vector,
    padded,
    split_program,
)
from dca_kernels.triton_backend.spatial_attention import (
    Saved,
    configured,
    first_head,
    keys_at_once,
    largest_sum,
    load_score_terms,
)
from dca_kernels.triton_backend.spatial_gradients import Gradients, Partials, spatial_gradients
from dca_kernels.triton_backend.tokens import layer_norm_backward


@kernel
def _expected_gradient_kernel(
    scores, averaged, dattended, projections, expected, shares, unsound,
    SHAPE: tl.constexpr, HEADS: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: for BLOCK_N queries of one head of one scale, the gradient of a weight that all weights expect.

    The softmax subtracts it: sum over channels of dattended (B, N, C), back through the maps, times averaged (B, N, C).
    Where these queries are columns, weights have a factor of theirs, their share: expected (B, heads, 2, N) has it
    without and with the share, shares (B, N, C) is dattended with it. unsound (B, heads, blocks) is 1 where some of
    their weights may not be taken apart. scores (B, heads, 3, N).
    """
    N: tl.constexpr = SHAPE.tokens
    ALL_HEADS: tl.constexpr = first_head(HEADS, len(HEADS))
    BLOCKS: tl.constexpr = triton.cdiv(N, BLOCK_N)
    b, tile = split_program(ALL_HEADS * BLOCKS)
    head_of_all = tile // BLOCKS
    offs_n = tile % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    image = b * N * SHAPE.total
    for i in tl.static_range(len(SHAPE.channels)):
        head = head_of_all - first_head(HEADS, i)
        if (head >= 0) & (head < HEADS[i]):
            DV: tl.constexpr = SHAPE.channels[i] // HEADS[i]
            offs_v = head * DV + tl.arange(0, padded(DV))
            offs_all, mask_v = SHAPE.offsets[i] + offs_v, offs_v < (head + 1) * DV
            gradient = load_tokens(dattended + image, offs_n, offs_all, mask_n, mask_v, SHAPE.total).to(ACC)
            values = load_tokens(averaged + image, offs_n, offs_all, mask_n, mask_v, SHAPE.total).to(ACC)
            weight = _value_weight(projections, offs_v, mask_v, i, ACC)
            of_head = (b * ALL_HEADS + head_of_all) * N
            rows, offs_scores = 2 * of_head + offs_n, 3 * of_head + offs_n
            SHIFT: tl.constexpr = typical_normaliser(N)
            shift, normaliser = _load_shift_and_normaliser(scores, offs_scores, mask_n, SHIFT, N)
            normaliser += shift
            of_column = tl.load(scores + offs_scores, mask=mask_n, other=0.0) + normaliser - SHIFT
            share = tl.exp2(-of_column)
            expects = tl.sum(gradient * weight[None, :] * values, 1)
            tl.store(expected + rows, expects, mask=mask_n)
            tl.store(expected + rows + N, expects * share, mask=mask_n)
            out = shares + image + offs_n[:, None] * SHAPE.total + offs_all[None, :]
            tl.store(out, gradient * share[:, None], mask=mask_n[:, None] & mask_v[None, :])
            OPERAND: tl.constexpr = shares.dtype.element_ty
            LIMIT: tl.constexpr = largest_exponent(OPERAND)
            sound = (tl.abs(normaliser - SHIFT) < LIMIT) & (tl.abs(of_column) < LIMIT)
            sound &= tl.exp2(normaliser) < largest_sum(OPERAND)
            tl.store(unsound + b * ALL_HEADS * BLOCKS + tile, 1 - tl.min(sound.to(tl.int32)))


@triton.jit
def _value_weight(projections, offs_v, mask_v, i: tl.constexpr, ACC: tl.constexpr):
    """What the value map and the projection multiply the values of scale i by: [channels]."""
    p_weight = load_vector(projections.output_weight[i], offs_v, mask_v, ACC)
    return p_weight * load_vector(projections.value_weight[i], offs_v, mask_v, ACC)


@triton.constexpr_function
def typical_normaliser(tokens):
    """log2 of a sum of weights, about: that of N scores of zero."""
    return float(tokens.bit_length() - 1)


@triton.constexpr_function
def largest_exponent(dtype):
    """How far a normaliser may lie from the typical one, and a share's inverse from 1, both as powers of two."""
    return 4.0 if dtype == tl.float16 else 32.0


@kernel
def _spatial_attention_backward_kernel(
    normalised, level, scores, averaged, expected, dattended, shares, unsound, projections, dnormalised, dvalues,
    dterms, daffine,
    SHAPE: tl.constexpr, HEADS: tl.constexpr, SOUND_BLOCKS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_NARROW: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M tokens of one head of one scale, as queries and as keys and values, against all tokens.

    Writes the gradients of the normalised tokens through the scores, dnormalised (B, S, N, C), and of the values,
    dvalues (B, N, C); and `Partials`, sums over its tokens: dterms and daffine. normalised, averaged, dattended, shares
    (B, N, C), level (B, C), scores (B, heads, 3, N), expected (B, heads, 2, N), unsound (B, heads, SOUND_BLOCKS).
    """
    N: tl.constexpr = SHAPE.tokens
    TOTAL: tl.constexpr = SHAPE.total
    SCALES: tl.constexpr = len(SHAPE.channels)
    ALL_HEADS: tl.constexpr = first_head(HEADS, len(HEADS))
    BLOCKS: tl.constexpr = triton.cdiv(N, BLOCK_M)
    b, tile = split_program(ALL_HEADS * BLOCKS)
    head_of_all = ALL_HEADS - 1 - tile // BLOCKS
    block = tile % BLOCKS
    for i in tl.static_range(SCALES):
        head = head_of_all - first_head(HEADS, i)
        if (head >= 0) & (head < HEADS[i]):
            of_head = (b * ALL_HEADS + head_of_all) * N
            offs_block = tl.arange(0, triton.next_power_of_2(SOUND_BLOCKS))
            of_blocks = unsound + (b * ALL_HEADS + head_of_all) * SOUND_BLOCKS + offs_block
            is_unsound = tl.max(tl.load(of_blocks, mask=offs_block < SOUND_BLOCKS, other=0)) > 0
            for UNSOUND in tl.static_range(2):  # each by itself, for where two loops meet, registers spill
                if is_unsound == (UNSOUND > 0):
                    tl.debug_barrier()  # what both begin with is not done before
                    _attend_backward(
                        normalised=normalised, level=level, scores=scores + 3 * of_head, averaged=averaged,
                        expected=expected + 2 * of_head, dattended=dattended, shares=shares, projections=projections,
                        dnormalised=dnormalised + (b * SCALES + i) * N * TOTAL, dvalues=dvalues,
                        dterms=dterms + ((b * BLOCKS + block) * SCALES + i) * 2 * TOTAL,
                        daffine=daffine + (b * BLOCKS + block) * 2 * TOTAL, b=b, head=head,
                        offs_m=block * BLOCK_M + tl.arange(0, BLOCK_M), i=i, SHAPE=SHAPE, HEADS=HEADS, UNSOUND=UNSOUND,
                        PRECISION=PRECISION, ACC=ACC, BLOCK_N=BLOCK_N, BLOCK_NARROW=BLOCK_NARROW,
                    )  # fmt: skip


@triton.jit
def _attend_backward(
    normalised, level, scores, averaged, expected, dattended, shares, projections, dnormalised, dvalues, dterms,
    daffine, b, head, offs_m,
    i: tl.constexpr, SHAPE: tl.constexpr, HEADS: tl.constexpr, UNSOUND: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_NARROW: tl.constexpr,
):  # fmt: skip
    """With A = dS + dS^T, S the scores:

    d d_m = bilinear * sum over n of A[m, n] d_n + linear * sum over n of dS[n, m].
    """
    N: tl.constexpr = SHAPE.tokens
    TOTAL: tl.constexpr = SHAPE.total
    DK: tl.constexpr = SHAPE.total // HEADS[i]
    DV: tl.constexpr = SHAPE.channels[i] // HEADS[i]
    image = b * N * TOTAL
    offs_k = head * DK + tl.arange(0, padded(DK))
    offs_v = head * DV + tl.arange(0, padded(DV))
    mask_k, mask_v, mask_m = offs_k < (head + 1) * DK, offs_v < (head + 1) * DV, offs_m < N
    offs_all = SHAPE.offsets[i] + offs_v
    bilinear, linear = load_score_terms(projections, level + b * TOTAL, offs_k, mask_k, i, DK, ACC)
    weight = _value_weight(projections, offs_v, mask_v, i, ACC)
    tokens_m = load_tokens(normalised + image, offs_m, offs_k, mask_m, mask_k, TOTAL)  # [BLOCK_M, DK]
    query = (tokens_m.to(ACC) * bilinear[None, :] + linear[None, :]).to(tokens_m.dtype)
    values_m = load_tokens(normalised + image, offs_m, offs_all, mask_m, mask_v, TOTAL)  # [BLOCK_M, DV]
    dattended_m = load_tokens(dattended + image, offs_m, offs_all, mask_m, mask_v, TOTAL)
    tl.store(daffine + TOTAL + offs_all, tl.sum(dattended_m.to(ACC), 0), mask=mask_v)
    dattended_m = (dattended_m.to(ACC) * weight[None, :]).to(values_m.dtype)

    if UNSOUND:
        through_bilinear, through_linear, dvalues_m = _gradients(
            normalised=normalised + image, averaged=averaged + image, dattended=dattended + image, scores=scores,
            bilinear=bilinear, linear=linear, weight=weight, query=query, dattended_m=dattended_m, offs_m=offs_m,
            offs_k=offs_k, offs_all=offs_all, mask_m=mask_m, mask_k=mask_k, mask_v=mask_v, N=N, TOTAL=TOTAL,
            PRECISION=PRECISION, ACC=ACC,
            BLOCK_N=16,  # or more registers spill
        )  # fmt: skip
    else:
        values_m = (values_m.to(ACC) * weight[None, :]).to(values_m.dtype)
        through_bilinear, through_linear, dvalues_m = _gradients_by_shares(
            normalised=normalised + image, shares=shares + image, scores=scores, expected=expected, query=query,
            values_m=values_m, dattended_m=dattended_m, offs_m=offs_m, offs_k=offs_k, offs_all=offs_all, mask_m=mask_m,
            mask_k=mask_k, mask_v=mask_v, N=N, TOTAL=TOTAL, PRECISION=PRECISION, ACC=ACC,
            BLOCK_N=keys_at_once(DV, BLOCK_N, BLOCK_NARROW),
        )  # fmt: skip

    # What follows is loaded again, and one result done before the next: else they would spill.
    tl.debug_barrier()
    values_m = load_tokens(normalised + image, offs_m, offs_all, mask_m, mask_v, TOTAL).to(ACC)
    weight = _value_weight(projections, offs_v, mask_v, i, ACC)
    mask = mask_m[:, None] & mask_v[None, :]
    tl.store(dvalues + image + offs_m[:, None] * TOTAL + offs_all[None, :], dvalues_m * weight[None, :], mask=mask)
    tl.store(daffine + offs_all, tl.sum(dvalues_m * values_m, 0), mask=mask_v)
    tl.debug_barrier()
    tokens_m = load_tokens(normalised + image, offs_m, offs_k, mask_m, mask_k, TOTAL).to(ACC)
    through_bilinear *= LN_2
    through_linear = tl.where(mask_m, through_linear * LN_2, 0.0)
    tl.store(dterms + offs_k, 0.5 * tl.sum(through_bilinear * tokens_m, 0), mask=mask_k)
    tl.store(dterms + TOTAL + offs_k, tl.sum(through_linear[:, None] * tokens_m, 0), mask=mask_k)
    tl.debug_barrier()
    bilinear, linear = load_score_terms(projections, level + b * TOTAL, offs_k, mask_k, i, DK, ACC)
    dtokens = through_bilinear * bilinear[None, :] + through_linear[:, None] * linear[None, :]
    mask = mask_m[:, None] & mask_k[None, :]
    tl.store(dnormalised + offs_m[:, None] * TOTAL + offs_k[None, :], dtokens, mask=mask)


@triton.jit
def _gradients_by_shares(
    normalised, shares, scores, expected, query, values_m, dattended_m, offs_m, offs_k, offs_all, mask_m, mask_k,
    mask_v,
    N: tl.constexpr, TOTAL: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """As `_gradients`, of scores that are not large: one exponential makes both weights.

    weight[m, n] = 2^score row_m and weight[n, m] = 2^score column_m share_n; rows beyond N have no weight.
    """
    SHIFT: tl.constexpr = typical_normaliser(N)
    shift, normaliser = _load_shift_and_normaliser(scores, offs_m, mask_m, float("inf"), N)
    row = tl.exp2(-shift - normaliser)
    column = tl.exp2(tl.load(scores + offs_m, mask=mask_m, other=float("-inf")) - SHIFT)
    expected_m = tl.load(expected + offs_m, mask=mask_m, other=0.0) * row
    through_bilinear = tl.zeros(query.shape, ACC)
    through_linear = tl.zeros(offs_m.shape, ACC)
    dvalues_m = tl.zeros(values_m.shape, ACC)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        tokens_n = load_tokens(normalised, offs_n, offs_k, mask_n, mask_k, TOTAL)
        values_n = load_tokens(normalised, offs_n, offs_all, mask_n, mask_v, TOTAL)
        shares_n = load_tokens(shares, offs_n, offs_all, mask_n, mask_v, TOTAL)
        expected_n = tl.load(expected + N + offs_n, mask=mask_n, other=0.0)
        # [BLOCK_M, DK] [DK, BLOCK_N]
        score = tl.dot(query, tl.trans(tokens_n), input_precision=PRECISION, out_dtype=ACC)
        # [BLOCK_M, DV] [DV, BLOCK_N], twice
        along_columns = tl.dot(values_m, tl.trans(shares_n), input_precision=PRECISION, out_dtype=ACC)
        along_rows = tl.dot(dattended_m, tl.trans(values_n), input_precision=PRECISION, out_dtype=ACC)
        weights = tl.exp2(score)
        # [BLOCK_M, BLOCK_N] [BLOCK_N, DV]
        dvalues_m = tl.dot(weights.to(tokens_n.dtype), shares_n, dvalues_m, input_precision=PRECISION, out_dtype=ACC)
        along_columns -= expected_n[None, :]
        through_linear += tl.sum(weights * along_columns, 1)
        both = weights * (along_columns * column[:, None] + (along_rows * row[:, None] - expected_m[:, None]))
        # [BLOCK_M, BLOCK_N] [BLOCK_N, DK]
        through_bilinear = tl.dot(
            both.to(tokens_n.dtype), tokens_n, through_bilinear, input_precision=PRECISION, out_dtype=ACC
        )
    return through_bilinear, through_linear * column, dvalues_m * column[:, None]


@triton.jit
def _gradients(
    normalised, averaged, dattended, scores, bilinear, linear, weight, query, dattended_m, offs_m, offs_k, offs_all,
    mask_m, mask_k, mask_v,
    N: tl.constexpr, TOTAL: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums over all tokens n: of A[m, n] d_n and of dS[n, m], and the gradient of the values: [BLOCK_M, DK], [BLOCK_M]
    and [BLOCK_M, DV].

    Of a score of some hundreds, what rounding leaves is much for a weight; and where one weight is 1, gradients cancel.
    So the scores are the forward's products, and the gradient that all weights expect is a product like that of one.
    """
    # Each loop by itself, or registers spill. They are rare: small code is better than fast code.
    averaged_m = load_tokens(averaged, offs_m, offs_all, mask_m, mask_v, TOTAL)
    expected_m = _dot_of_rows(dattended_m, averaged_m, PRECISION, ACC)
    shift_m, normaliser_m = _load_shift_and_normaliser(scores, offs_m, mask_m, float("inf"), N)
    through_bilinear = tl.zeros(query.shape, ACC)
    for start in tl.range(0, N, BLOCK_N, num_stages=1):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        tokens_n = load_tokens(normalised, offs_n, offs_k, mask_n, mask_k, TOTAL)
        values_n = load_tokens(normalised, offs_n, offs_all, mask_n, mask_v, TOTAL)
        # [BLOCK_M, DK] [DK, BLOCK_N]
        score = tl.dot(query, tl.trans(tokens_n), input_precision=PRECISION, out_dtype=ACC)
        score = tl.where(mask_n[None, :], score, float("-inf"))  # a score of 0 may be far above all others
        weights = tl.exp2(score - shift_m[:, None] - normaliser_m[:, None])  # [m, n]
        # [BLOCK_M, DV] [DV, BLOCK_N]
        along = tl.dot(dattended_m, tl.trans(values_n), input_precision=PRECISION, out_dtype=ACC)
        dscores = (weights * (along - expected_m[:, None])).to(tokens_n.dtype)
        # [BLOCK_M, BLOCK_N] [BLOCK_N, DK]
        through_bilinear = tl.dot(dscores, tokens_n, through_bilinear, input_precision=PRECISION, out_dtype=ACC)
    tl.debug_barrier()
    tokens_m = load_tokens(normalised, offs_m, offs_k, mask_m, mask_k, TOTAL)
    values_m = load_tokens(normalised, offs_m, offs_all, mask_m, mask_v, TOTAL)
    through_linear = tl.zeros(offs_m.shape, ACC)
    dvalues_m = tl.zeros(values_m.shape, ACC)
    for start in tl.range(0, N, BLOCK_N, num_stages=1):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        tokens_n = load_tokens(normalised, offs_n, offs_k, mask_n, mask_k, TOTAL)
        query_n = (tokens_n.to(ACC) * bilinear[None, :] + linear[None, :]).to(tokens_n.dtype)
        averaged_n = load_tokens(averaged, offs_n, offs_all, mask_n, mask_v, TOTAL)
        dattended_n = load_tokens(dattended, offs_n, offs_all, mask_n, mask_v, TOTAL)
        through_maps = (dattended_n.to(ACC) * weight[None, :]).to(dattended_n.dtype)
        expected_n = _dot_of_rows(averaged_n, through_maps, PRECISION, ACC)
        shift_n, normaliser_n = _load_shift_and_normaliser(scores, offs_n, mask_n, float("inf"), N)
        # [BLOCK_M, DK] [DK, BLOCK_N]
        score = tl.dot(tokens_m, tl.trans(query_n), input_precision=PRECISION, out_dtype=ACC)
        score = tl.where(mask_m[:, None], score, float("-inf"))
        weights = tl.exp2(score - shift_n[None, :] - normaliser_n[None, :])  # [n, m], transposed
        # [BLOCK_M, BLOCK_N] [BLOCK_N, DV]
        dvalues_m = tl.dot(weights.to(tokens_n.dtype), dattended_n, dvalues_m, input_precision=PRECISION, out_dtype=ACC)
        # [BLOCK_M, DV] [DV, BLOCK_N]
        along = tl.dot(values_m, tl.trans(through_maps), input_precision=PRECISION, out_dtype=ACC)
        dscores = weights * (along - expected_n[None, :])
        through_linear += tl.sum(dscores, 1)
        # [BLOCK_M, BLOCK_N] [BLOCK_N, DK]
        through_bilinear = tl.dot(
            dscores.to(tokens_n.dtype), tokens_n, through_bilinear, input_precision=PRECISION, out_dtype=ACC
        )
    return through_bilinear, through_linear, dvalues_m


@triton.jit
def _dot_of_rows(x, y, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """Of each row of x with that of y, by the instructions of larger products: the same numbers give the same bits."""
    products = tl.dot(x, tl.trans(y), input_precision=PRECISION, out_dtype=ACC)
    index = tl.arange(0, x.shape[0])
    return tl.sum(tl.where(index[:, None] == index[None, :], products, 0.0), 1)


@triton.jit
def _load_shift_and_normaliser(scores, offs_n, mask_n, other, N: tl.constexpr):
    """What is taken off the scores of some queries, and log2 of the sum of their weights then, `other` beyond the mask:
    [queries] each. scores (3, N).
    """
    shift = tl.load(scores + N + offs_n, mask=mask_n, other=0.0)
    return shift, tl.load(scores + 2 * N + offs_n, mask=mask_n, other=other)


def spatial_attention_backward(
    saved: Saved, dattended: Tensor, contract: Contract, block: int
) -> tuple[Tensor, Gradients]:
    """The gradients of `spatial_attention`.

    Args:
        saved: what the forward returned.
        dattended: (B, N, C), the gradient of its result, in the tokens' dtype.
        contract, block: as in the forward.

    Returns:
        The gradient of the tokens, (B, N, C), and of the parameters.
    """
    attention = contract.blocks[block].spatial_attention
    assert attention is not None
    tokens, launcher = saved.tokens, saved.tokens.launcher
    batch, shape, heads, projections = tokens.batch, launcher.shape, heads_of(attention), projections_of(attention)

    config = launcher.config("expected_gradient")
    sound_blocks = launch.blocks(shape.tokens, config["block_n"])
    expected, shares = tokens.empty(batch, sum(heads), 2, shape.tokens), torch.empty_like(dattended)
    unsound = tokens.empty(batch, sum(heads), sound_blocks, dtype=torch.int32)
    launcher(
        _expected_gradient_kernel, config, batch * sum(heads) * sound_blocks,
        scores=saved.scores, averaged=saved.averaged, dattended=dattended, projections=projections, expected=expected,
        shares=shares, unsound=unsound, HEADS=heads,
    )  # fmt: skip

    config, precision = configured("spatial_attention_backward", launcher, attention, batch)
    blocks, scales = launch.blocks(shape.tokens, config["block_m"]), len(shape.channels)
    dnormalised = tokens.empty(batch, scales, shape.tokens, shape.total, dtype=launcher.dtype)
    dvalues = torch.empty_like(tokens.plain)
    dterms = tokens.empty(batch, blocks, scales, 2, shape.total)
    daffine = tokens.empty(batch, blocks, 2, shape.total)
    launcher(
        _spatial_attention_backward_kernel, config, batch * sum(heads) * blocks,
        normalised=tokens.normalised, level=tokens.level, scores=saved.scores, averaged=saved.averaged,
        expected=expected, dattended=dattended, shares=shares, unsound=unsound, projections=projections,
        dnormalised=dnormalised, dvalues=dvalues, dterms=dterms, daffine=daffine, HEADS=heads,
        SOUND_BLOCKS=sound_blocks, PRECISION=precision,
    )  # fmt: skip

    dtokens, dnorm = layer_norm_backward(tokens, attention, dvalues, dattended, parts=dnormalised)
    return dtokens, spatial_gradients(tokens, Partials(dterms, daffine, dnorm), contract, block)
