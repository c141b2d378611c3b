"""The backward of stage 2, channel cross-attention, through its LayerNorm and its residual."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dca_kernels.contract import Attention, Contract
from dca_kernels.triton_backend import launch
from dca_kernels.triton_backend.channel_attention import (
    Saved,
    add_product,
    attention_weights,
    channels_of_block,
    load_query_and_key,
    tile_of_product,
    tiles_of_product,
)
from dca_kernels.triton_backend.layer_norm import store_norm_gradients
from dca_kernels.triton_backend.parameters import (
    attention_gradients,
    cancels_of,
    gradient_dtype,
    heads_of,
    projections_of,
)
from dca_kernels.triton_backend.primitives import (
    first_blocks,
    kernel,
    load_tile,
    load_vector,
    of_scale,
    padded,
    scale_of,
    split_program,
    store_tile,
    store_vectors,
    sum_blocks,
    sum_images,
    zero_where_it_cancels,
)
from dca_kernels.triton_backend.tokens import Tokens, layer_norm_backward

# The vectors that a program of `_mixing_backward_kernel` sums, one behind another: weight and bias of two maps (query
# and projection, or key and value), then the gradient of the centred tokens' means.
PARAMETERS = tl.constexpr(4)
VECTORS = tl.constexpr(5)


@kernel
def _mixing_gradient_kernel(
    centred, dmixed, dmixing, dshift,
    SHAPE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: one tile of dmixed^T Z / N (B, C, C); and sums of dmixed, dshift (B, C).

    centred, which is Z, and dmixed (B, N, C).
    """
    N: tl.constexpr = SHAPE.tokens
    TOTAL: tl.constexpr = SHAPE.total
    ROWS: tl.constexpr = triton.cdiv(TOTAL, BLOCK_C)
    b, tile = split_program(ROWS * ROWS)
    offs_c = tile // ROWS * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_d = tile % ROWS * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c, mask_d = offs_c < TOTAL, offs_d < TOTAL
    centred += b * N * TOTAL
    dmixed += b * N * TOTAL
    out = tl.zeros([BLOCK_C, BLOCK_C], ACC)
    sums = tl.zeros([BLOCK_N, BLOCK_C], ACC)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        gradient = load_tile(dmixed, offs_n, offs_c, N, TOTAL)
        z = load_tile(centred, offs_n, offs_d, N, TOTAL)
        # [BLOCK_C, BLOCK_N] [BLOCK_N, BLOCK_C]
        out = tl.dot(tl.trans(gradient), z, out, input_precision=PRECISION, out_dtype=ACC)
        sums += gradient.to(ACC)
    ptrs = dmixing + b * TOTAL * TOTAL + offs_c[:, None] * TOTAL + offs_d[None, :]
    tl.store(ptrs, out / N, mask=mask_c[:, None] & mask_d[None, :])
    tl.store(dshift + b * TOTAL + offs_c, tl.sum(sums, 0), mask=mask_c & (tile % ROWS == 0))


@kernel
def _mixing_backward_kernel(
    covariance, mean, dmixing, dshift, projections, mixing, dcovariance, row_sums, column_sums,
    SHAPE: tl.constexpr, HEADS: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: the softmax of BLOCK_C channels of one scale, backward.

    Writes the mixing matrix and the gradient of the covariance, (B, C, C); sums over d for query, projection and the
    normalised tokens, row_sums (B, 5, C); and sums over the block's channels for key, value and the normalised tokens,
    column_sums (B, blocks, 5, C). covariance, dmixing (B, C, C), mean, dshift (B, C).
    """
    N: tl.constexpr = SHAPE.tokens
    TOTAL: tl.constexpr = SHAPE.total
    FIRST: tl.constexpr = first_blocks(SHAPE.channels, BLOCK_C)
    BLOCKS: tl.constexpr = FIRST[len(SHAPE.channels)]
    b, tile = split_program(BLOCKS)
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
    dconstant = load_vector(dshift + b * TOTAL, offs_all, mask_c, ACC)
    dmatrix = tl.load(dmixing + matrix, mask=mask, other=0.0).to(ACC) * N

    projected = p_weight[:, None] * weights
    dweights = dmatrix * v_weight[None, :] + dconstant[:, None] * v_mean[None, :]
    dp_weight = tl.sum(weights * dweights, 1)
    dlogits = weights * (dweights - dp_weight[:, None]) * (p_weight * TOTAL**-0.5)[:, None]
    tl.store(mixing + matrix, projected * v_weight[None, :], mask=mask)
    tl.store(dcovariance + matrix, dlogits * q_weight[:, None] * k_weight[None, :], mask=mask)

    dq_mean = N * tl.sum(dlogits * k_mean[None, :], 1)
    dq_weight = tl.sum(dlogits * k_weight[None, :] * products, 1) + dq_mean * mean_c
    of_rows = (dq_weight, dq_mean, dp_weight, dconstant, q_weight * dq_mean / N)
    store_vectors(row_sums + b * VECTORS * TOTAL + offs_all, of_rows, mask_c, TOTAL)

    dk_mean = N * tl.sum(dlogits * q_mean[:, None], 0)
    dk_weight = tl.sum(dlogits * q_weight[:, None] * products, 0) + dk_mean * mean_d
    dv_bias = tl.sum(projected * dconstant[:, None], 0)
    dv_weight = tl.sum(projected * dmatrix, 0) + dv_bias * mean_d
    of_columns = (dk_weight, dk_mean, dv_weight, dv_bias, k_weight * dk_mean / N)
    store_vectors(column_sums + (b * BLOCKS + tile) * VECTORS * TOTAL + offs_d, of_columns, mask_d, TOTAL)


@kernel
def _mix_backward_kernel(
    centred, mixing, dcovariance, row_sums, column_sums, dmixed, dnormalised,
    SHAPE: tl.constexpr, COLUMN_BLOCKS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of the normalised tokens, for BLOCK_N of them and BLOCK_C channels.

    dmixed mixing + Z (dcovariance + dcovariance^T) + the share of the token means. centred, which is Z, dmixed and
    dnormalised (B, N, C), mixing, dcovariance (B, C, C); the sums as `_mixing_backward_kernel` wrote them.
    """
    N: tl.constexpr = SHAPE.tokens
    TOTAL: tl.constexpr = SHAPE.total
    b, offs_n, offs_c = tile_of_product(SHAPE, BLOCK_N, BLOCK_C)
    image, matrix = b * N * TOTAL, b * TOTAL * TOTAL
    gradient = tl.zeros([BLOCK_N, BLOCK_C], ACC)
    # A loop for each form of product: in one, Triton 3.6 gives the sums different layouts, and moves them every time.
    # It fails to pipeline the loop over the first two where they have one step each.
    left, right = dmixed + image, mixing + matrix
    for _ in tl.range(0, 2, num_stages=1):
        gradient = add_product(
            out=gradient, left=left, right=right, offs_n=offs_n, offs_all=offs_c, TRANSPOSED=False, SHAPE=SHAPE,
            PRECISION=PRECISION, ACC=ACC, BLOCK_K=BLOCK_K,
        )  # fmt: skip
        left, right = centred + image, dcovariance + matrix
    gradient = add_product(
        out=gradient, left=left, right=right, offs_n=offs_n, offs_all=offs_c, TRANSPOSED=True, SHAPE=SHAPE,
        PRECISION=PRECISION, ACC=ACC, BLOCK_K=BLOCK_K,
    )  # fmt: skip
    mask_c = offs_c < TOTAL
    of_means = load_vector(row_sums + (b * VECTORS + PARAMETERS) * TOTAL, offs_c, mask_c, ACC)
    columns = column_sums + (b * COLUMN_BLOCKS * VECTORS + PARAMETERS) * TOTAL
    of_means += sum_blocks(columns, offs_c, mask_c, COLUMN_BLOCKS, VECTORS * TOTAL, ACC)
    store_tile(dnormalised + image, gradient + of_means[None, :], offs_n, offs_c, N, TOTAL)


@kernel
def _channel_gradients_kernel(
    row_sums, column_sums, dnorm, out, batch,
    SHAPE: tl.constexpr, BLOCK_ROWS: tl.constexpr, NORM_BLOCKS: tl.constexpr, SHIFT_CANCELS: tl.constexpr,
    ACC: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_C elements of the parameters' gradients, `Gradients`, over images in a fixed order.

    BLOCK_ROWS is how many channels a program of `_mixing_backward_kernel` had.
    """
    TOTAL: tl.constexpr = SHAPE.total
    SCALES: tl.constexpr = len(SHAPE.channels)
    FIRST: tl.constexpr = first_blocks(SHAPE.channels, BLOCK_ROWS)
    BLOCKS: tl.constexpr = FIRST[SCALES]
    TILES: tl.constexpr = triton.cdiv(PARAMETERS * TOTAL, BLOCK_C)
    pid = tl.program_id(0)
    offs = pid % TILES * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = offs < PARAMETERS * TOTAL
    for i in tl.static_range(SCALES):
        if pid // TILES == i:
            first = column_sums + FIRST[i] * VECTORS * TOTAL
            count: tl.constexpr = FIRST[i + 1] - FIRST[i]
            gradient = sum_images(first, offs, mask, batch, count, VECTORS * TOTAL, BLOCKS * VECTORS * TOTAL, ACC)
            tl.store(out.key_value + i * PARAMETERS * TOTAL + offs, gradient, mask=mask)
    if pid // TILES == SCALES:
        gradient = sum_images(row_sums, offs, mask, batch, 1, 0, VECTORS * TOTAL, ACC)
        offs_bias = offs - (PARAMETERS - 1) * TOTAL  # the projection's, the last
        gradient = zero_where_it_cancels(gradient, offs_bias, SHIFT_CANCELS, SHAPE)
        tl.store(out.query_output + offs, gradient, mask=mask)
    if pid // TILES > SCALES:
        store_norm_gradients(dnorm, out.norm, offs, batch, NORM_BLOCKS, SHAPE, ACC)


class Gradients(NamedTuple):
    """Of the parameters: a weight, then a bias, of each projection."""

    key_value: Tensor  # (S, 4, C)
    query_output: Tensor  # (4, C)
    norm: Tensor  # (2, C)

    @classmethod
    def empty(cls, tokens: Tokens, dtype: torch.dtype) -> "Gradients":
        """Fresh memory for those of an attention of these tokens, of `gradient_dtype`."""
        scales, total = len(tokens.channels), tokens.shape.total
        return cls(*(tokens.empty(*rows, total, dtype=dtype) for rows in ((scales, 4), (4,), (2,))))

    def split(self, attention: tuple[Attention, ...]) -> tuple[Attention, ...]:
        """As the contract has them: views."""
        key, value = self.key_value.split(2, 1)
        query, output = self.query_output.split(2)
        return attention_gradients(
            attention, {"key": key, "value": value}, {"query": query, "output": output}, self.norm
        )


def channel_attention_backward(
    saved: Saved, dmixed: Tensor, contract: Contract, block: int
) -> tuple[Tensor, Gradients]:
    """The gradients of `channel_attention`.

    Args:
        saved: what the forward returned.
        dmixed: (B, N, C), the gradient of its result, in the tokens' dtype.
        contract, block: as in the forward.

    Returns:
        The gradient of the tokens, (B, N, C), and of the parameters.
    """
    attention = contract.blocks[block].channel_attention
    assert attention is not None
    tokens, launcher = saved.tokens, saved.tokens.launcher
    batch, shape = tokens.batch, launcher.shape

    config = launcher.config("mixing_gradient", batch)
    dmixing = tokens.empty(batch, shape.total, shape.total, dtype=launcher.dtype)
    dshift = tokens.empty(batch, shape.total)
    launcher(
        _mixing_gradient_kernel, config, batch * launch.blocks(shape.total, config["block_c"]) ** 2,
        centred=saved.centred, dmixed=dmixed, dmixing=dmixing, dshift=dshift,
    )  # fmt: skip

    config = launcher.config("mixing_backward", launch.padded(shape.total))
    block_rows = config["block_c"]
    column_blocks = sum([launch.blocks(c, block_rows) for c in shape.channels])
    mixing, dcovariance = torch.empty_like(dmixing), torch.empty_like(dmixing)
    row_sums = tokens.empty(batch, VECTORS.value, shape.total)
    column_sums = tokens.empty(batch, column_blocks, VECTORS.value, shape.total)
    launcher(
        _mixing_backward_kernel, config, batch * column_blocks,
        covariance=saved.covariance, mean=saved.mean, dmixing=dmixing, dshift=dshift,
        projections=projections_of(attention), mixing=mixing, dcovariance=dcovariance, row_sums=row_sums,
        column_sums=column_sums, HEADS=heads_of(attention),
    )  # fmt: skip

    config = launcher.config("mix_backward", batch)
    dnormalised = tokens.empty(batch, shape.tokens, shape.total)  # rounded, it would be the largest error of all
    launcher(
        _mix_backward_kernel, config, batch * tiles_of_product(shape, config),
        centred=saved.centred, mixing=mixing, dcovariance=dcovariance, row_sums=row_sums, column_sums=column_sums,
        dmixed=dmixed, dnormalised=dnormalised, COLUMN_BLOCKS=column_blocks,
    )  # fmt: skip
    dtokens, dnorm = layer_norm_backward(tokens, attention, dnormalised, dmixed)

    config = launcher.config("channel_gradients")
    tiles = launch.blocks(PARAMETERS.value * shape.total, config["block_c"])
    gradients = Gradients.empty(tokens, gradient_dtype(contract))
    launcher(
        _channel_gradients_kernel, config,
        (len(shape.channels) + 1) * tiles + launch.blocks(2 * shape.total, config["block_c"]),
        row_sums=row_sums, column_sums=column_sums, dnorm=dnorm, out=gradients, batch=batch, BLOCK_ROWS=block_rows,
        NORM_BLOCKS=dnorm.shape[1], SHIFT_CANCELS=cancels_of(attention),
    )  # fmt: skip
    return dtokens, gradients
