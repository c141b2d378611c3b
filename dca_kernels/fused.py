"""The `torch` backend: the four stages of Dual Cross-Attention by exact algebra, in PyTorch calls.

Every map of the paper's module is affine per channel, so the query, key and value maps fold into their neighbours
(docs/algebra.md derives each step). Tokens travel between the stages as S tensors (B, N, C_i), in float32, or in
float64 for float64 maps; only the merge writes the maps' own dtype again. On CUDA the operands of the large products
have 16-bit maps' dtype (`operand_dtype`). Autocast is off meanwhile.

Shapes: B batch, S scales, C_i channels of scale i, C = sum of C_i, H_i x W_i its size, P_h x P_w the token grid,
N = P_h * P_w tokens, h heads, dk = C / h, dv = C_i / h.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, library
from torch.nn import functional as F

TILE_BYTES = 2**20  # scores in memory at a time: they stay in a cache, and threads seldom wait for each other
PLANE_BYTES = 2**22  # full-resolution values in flight at a time while a skip map is merged
NEGLIGIBLE = 1e-18  # smaller attention weights are zero: far below rounding, and subnormal products cost 50x on a CPU
MAX_EXPONENT = 40.0  # the largest power of two, up or down, of a normaliser: see `_SpatialAttention`

Holder = Any  # a module that holds parameters under the official module's names

_LIBRARY = library.Library("dca_kernels", "FRAGMENT")


def _operator(schema: str, compute: Callable, describe: Callable) -> Any:
    """An operator, `torch.ops.dca_kernels.<name>`, that torch.compile and torch.export take as a whole.

    `describe` returns empty results, for tracing: as `compute`, but for their values.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=[torch.Tag.pt2_compliant_tag])
    _LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    library.register_fake(f"dca_kernels::{name}", describe, lib=_LIBRARY)
    return getattr(torch.ops.dca_kernels, name).default


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every other floating dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def operand_dtype(maps: Sequence[Tensor]) -> torch.dtype:
    """Of the large products' operands: on CUDA the maps' own, whose products are many times as fast in 16 bit.

    Elsewhere it is the accumulation dtype: CPUs are faster with it, and on ROCm not every product has a float32 result.
    """
    if maps[0].is_cuda and torch.version.hip is None:
        return reduce(torch.promote_types, (x.dtype for x in maps))
    return accumulation_dtype(maps[0].dtype)


def refine(dca: Holder, maps: Sequence[Tensor], norms: Sequence[Holder], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """The skip maps refined by a DCA's blocks.

    Args:
        dca: the module that holds the parameters.
        maps: S tensors (B, C_i, H_i, W_i).
        norms: S BatchNorms; where None, the map is returned as it enters BatchNorm and ReLU.
        dtypes: dtype of each output.

    Returns:
        S tensors (B, C_i, H_i, W_i).
    """
    # BatchNorm with batch statistics removes the constants that the last attention adds to a channel.
    removed = [norm is not None and uses_batch_statistics(norm) for norm in norms]
    kept = [False] * len(removed)
    attentions: list[tuple[Any, ...]] = []
    for block in dca.attention:
        if dca.channel_att:
            attentions.append((channel_attention, block.channel_norm, block.c_attention))
        if dca.spatial_att:
            attentions.append((spatial_attention, block.spatial_norm, block.s_attention))
    dtype = operand_dtype(maps)
    with _no_autocast(maps[0]):
        tokens, maps = patch_embed(maps, dca.avg_map, dca.grid, norms)
        for i, (attend, *modules) in enumerate(attentions, start=1):
            tokens = attend(tokens, *modules, removed if i == len(attentions) else kept, dtype)
        return upsample(tokens, maps, dca.upconvs, norms, dca.grid, dtypes)


# Stage 1: patch embedding


def patch_embed(
    maps: Sequence[Tensor], avg_map: Sequence[Holder], grid: tuple[int, int], norms: Sequence[Holder | None]
) -> tuple[list[Tensor], list[Tensor]]:
    """Average each skip map over the token grid, then scale and shift each channel (paper, eq. 1).

    Args:
        maps: S tensors (B, C_i, H_i, W_i).
        avg_map: S depthwise projections.
        grid: (P_h, P_w).
        norms: `upsample`'s. Where None, the gradient that it gives a map may be someone else's memory.

    Returns:
        S tensors (B, N, C_i), and the maps as `upsample` takes them: the gradients of both meet in one pass.
    """
    tokens, passed = [], []
    for x, projection, norm in zip(maps, avg_map, norms, strict=True):
        pooled, same = _AdaptiveAvgPool.apply(x, grid, norm is not None)
        pooled = pooled.flatten(2).transpose(1, 2).contiguous()  # (B, N, C_i)
        weight, bias = _affine(projection, pooled.dtype)
        tokens.append(torch.addcmul(bias, pooled, weight))
        passed.append(same)
    return tokens, passed


class _AdaptiveAvgPool(torch.autograd.Function):
    """`adaptive_avg_pool2d`, accumulated in float32, beside the map itself: (B, C, P_h, P_w) and (B, C, H, W).

    Deterministic, also backward. The map's gradient passes through here, and the average's is added to it: in its own
    memory where that is `fresh`, as the merge's is.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: tuple[int, int], fresh: bool) -> tuple[Tensor, Tensor]:
        _keep_undefined(ctx)
        ctx.size, ctx.dtype, ctx.fresh = x.shape[2:], x.dtype, fresh
        dtype = accumulation_dtype(x.dtype)
        if ctx.size == grid:
            return x.to(dtype, copy=True), x.view_as(x)
        columns = _window_matrix(x.shape[3], grid[1], x.device, dtype)
        if x.shape[2] % grid[0] == 0:  # equal windows: a plain sum over their rows
            rows = x.unflatten(2, (grid[0], -1)).sum(3, dtype=dtype)  # (B, C, P_h, W)
            pooled = rows @ (columns * (grid[0] / x.shape[2])).mT
        else:
            rows = _window_matrix(x.shape[2], grid[0], x.device, dtype) @ x.to(dtype)  # (B, C, P_h, W)
            pooled = rows @ columns.mT
        return pooled, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        dpooled, dx = grads
        if dpooled is None:
            return dx, None, None
        (height, width), grid = ctx.size, dpooled.shape[2:]
        if dx is None:
            dx = dpooled.new_zeros(*dpooled.shape[:2], height, width, dtype=ctx.dtype)
        if torch.is_grad_enabled() or not ctx.fresh:
            dx = dx.clone()
        if ctx.size == grid:
            return dx.add_(dpooled), None, None
        with _no_autocast(dx):
            rows = dpooled @ _window_matrix(width, grid[1], dx.device, dpooled.dtype)  # (B, C, P_h, W)
            if height % grid[0] == 0:
                rows *= grid[0] / height
                dx.view(*dx.shape[:2], grid[0], height // grid[0], width).add_(rows[:, :, :, None])
            else:
                dx.add_(_window_matrix(height, grid[0], dx.device, dpooled.dtype).mT @ rows)
        return dx, None, None


def _window_matrix(size: int, windows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The averages of `adaptive_avg_pool1d` as a matrix (windows, size)."""
    window = torch.arange(windows, device=device)[:, None]
    position = torch.arange(size, device=device)
    inside = (position >= window * size // windows) & (position * windows < (window + 1) * size)
    return inside.to(dtype) / inside.sum(1, keepdim=True)


# Stage 2: channel cross-attention


def channel_attention(
    tokens: Sequence[Tensor],
    norms: Sequence[Holder],
    attentions: Sequence[Holder],
    removed: Sequence[bool],
    dtype: torch.dtype,
) -> list[Tensor]:
    """Attend across channels, with its LayerNorms and its residual (paper, eq. 3).

    One Gram matrix of the centred tokens serves every scale, and the attention, the value map and the projection become
    one matrix that mixes channels: docs/algebra.md, "Channel cross-attention".

    Args:
        tokens: S tensors (B, N, C_i).
        norms: S LayerNorms over C_i.
        attentions: S modules with `q_map`, `k_map`, `v_map`, `projection` and `heads`.
        removed: for each scale, whether the BatchNorm behind removes a per-channel constant added here.
        dtype: of the large products' operands, the tokens' or 16-bit.

    Returns:
        S tensors (B, N, C_i).
    """
    every = torch.cat(_layer_norm(tokens, norms), dim=2)  # (B, N, C)
    n_tokens, total = every.shape[1:]
    mean = every.mean(1)  # (B, C)
    centred = every - mean[:, None]
    refined = mean + centred.detach().mean(1)  # what rounding left: the logits have N times the means' products
    gram = _Gram.apply(centred, [t.shape[2] for t in tokens], dtype)  # (B, C, C)
    out, begin = [], 0
    for t, attention, no_shift in zip(tokens, attentions, removed, strict=True):
        own, heads = slice(begin, begin + t.shape[2]), attention.heads
        begin = own.stop
        q_weight, q_bias = _affine(attention.q_map, t.dtype)
        k_weight, k_bias = _affine(attention.k_map, t.dtype)
        v_weight, v_bias = _affine(attention.v_map, t.dtype)
        p_weight, p_bias = _affine(attention.projection, t.dtype)
        if no_shift:
            p_bias = _with_zero_grad(p_bias.detach(), p_bias)
        q_weight, q_mean = q_weight * total**-0.5, (refined[:, own] * q_weight + q_bias) * total**-0.5
        k_mean = refined * k_weight + k_bias
        covariance = q_weight[:, None] * k_weight * gram[:, own]  # (B, C_i, C)
        logits = _head_blocks(covariance, heads) + n_tokens * (
            q_mean.unflatten(1, (heads, -1, 1)) * k_mean.unflatten(1, (heads, 1, -1))
        )  # (B, h, C_i / h, C / h)
        weights = _cut(torch.softmax(logits, -1))
        v_mean = mean * v_weight + v_bias
        shift = p_weight * (weights @ v_mean.unflatten(1, (heads, -1, 1))).flatten(1) + p_bias  # (B, C_i)
        mixing = p_weight.unflatten(0, (heads, -1, 1)) * weights * v_weight.unflatten(0, (heads, 1, -1))
        residual, operand = _heads(t, heads).flatten(0, 1), _heads(centred, heads).flatten(0, 1)
        mixed = _add_product(residual, operand, mixing.flatten(0, 1).mT, dtype)  # (B h, N, C_i / h)
        out.append(mixed.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2).add_(shift[:, None]))
    return out


class _Gram(torch.autograd.Function):
    """x^T x over the tokens, of operands in `dtype`: (B, N, C) -> (B, C, C).

    Symmetric, so each row block stops at its diagonal; the backward is one product, not the two of a general one.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, row_blocks: Sequence[int], dtype: torch.dtype) -> Tensor:
        _keep_undefined(ctx)
        ctx.save_for_backward(x)
        ctx.dtype = dtype
        if dtype != x.dtype:  # at most 2 sqrt(C_i) times LayerNorm's weight: far within float16's range
            x = x.to(dtype)
            return _multiply(x.mT, x)  # whole: on a GPU, one call in place of several takes less time
        gram = x.new_empty(x.shape[0], x.shape[2], x.shape[2])
        end = 0
        for size in row_blocks:
            begin, end = end, end + size
            gram[:, begin:end, :end] = x[:, :, begin:end].mT @ x[:, :, :end]
            gram[:, :begin, begin:end] = gram[:, begin:end, :begin].mT
        return gram

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        (x,), (dgram,) = ctx.saved_tensors, grads
        if dgram is None:
            return None, None, None
        with _no_autocast(x):
            return _product(x, dgram + dgram.mT, ctx.dtype), None, None


def _head_blocks(matrix: Tensor, heads: int) -> Tensor:
    """The diagonal blocks of a matrix with rows and columns split into heads: (B, R, C) -> (B, h, R / h, C / h)."""
    blocks = matrix.unflatten(2, (heads, -1)).unflatten(1, (heads, -1))  # (B, h, R / h, h, C / h)
    return blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1)


# Stage 3: spatial cross-attention


def spatial_attention(
    tokens: Sequence[Tensor],
    norms: Sequence[Holder],
    attentions: Sequence[Holder],
    removed: Sequence[bool],
    dtype: torch.dtype,
) -> list[Tensor]:
    """Attend across tokens, with its LayerNorms and its residual (paper, eq. 4).

    Keys are the normalised tokens, the same for every scale, and values one scale's of them; the value map and the
    projection are applied to the result, since attention weights sum to one. Tokens are centred over the grid first:
    their mean moves into the keys' own scores and the result. The key map's bias drops out of the softmax, whatever its
    value: its gradient is exactly zero. docs/algebra.md, "Spatial cross-attention".

    Args, returns: as `channel_attention`.
    """
    every = torch.cat(_layer_norm(tokens, norms), dim=2)  # (B, N, C)
    mean = every.mean(1)  # (B, C)
    every = every - mean[:, None]
    heads = [attention.heads for attention in attentions]
    pairs, keys = [], []  # S of (C) and of (B, C)
    for attention, h in zip(attentions, heads, strict=True):
        q_weight, q_bias = _affine(attention.q_map, every.dtype)
        k_weight, k_bias = _affine(attention.k_map, every.dtype)
        scale = (every.shape[2] // h) ** -0.5 * math.log2(math.e)  # attention weights are powers of two
        pairs.append(_with_zero_grad(scale * q_weight * k_weight, k_bias))
        keys.append(scale * (mean * q_weight + q_bias) * k_weight)
    key_scores = _head_sums(every, keys, heads)  # S of (B, h, N)
    sizes = [t.shape[2] for t in tokens]
    owns, means = every.split(sizes, 2), mean.split(sizes, 1)  # S of (B, N, C_i) and of (B, C_i)
    out = []
    for i, (t, attention, no_shift) in enumerate(zip(tokens, attentions, removed, strict=True)):
        attended = _attend(every, owns[i], pairs[i], key_scores[i], dtype)  # (B, N, C_i)
        v_weight, v_bias = _affine(attention.v_map, t.dtype)
        p_weight, p_bias = _affine(attention.projection, t.dtype)
        weight, bias = p_weight * v_weight, p_weight * v_bias + p_bias  # (C_i)
        if no_shift:
            bias = _with_zero_grad(bias.detach(), v_bias, p_bias)
        shift = means[i] * weight + bias  # (B, C_i)
        out.append(torch.addcmul(t, attended, weight).add_(shift[:, None]))
    return out


def _head_sums(tokens: Tensor, vectors: Sequence[Tensor], heads: Sequence[int]) -> list[Tensor]:
    """Sums of tokens * vector over each head's channels: (B, N, C), S of (B, C) -> S of (B, h, N)."""
    columns = []  # S of (B, C, h)
    for vector, h in zip(vectors, heads, strict=True):
        head_of = torch.eye(h, device=vector.device, dtype=vector.dtype).repeat_interleave(vector.shape[1] // h, 0)
        columns.append(vector[:, :, None] * head_of)
    if torch.compiler.is_compiling():  # cannot trace what gives no gradient
        return [(tokens @ column).mT for column in columns]
    return list((_JointProduct.apply if torch.is_grad_enabled() else _joint_product)(tokens, *columns))


def _joint_product(tokens: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
    """(tokens @ columns)^T for each scale's columns, in one product: (B, N, C), S of (B, C, h) -> S of (B, h, N)."""
    return (tokens @ torch.cat(columns, 2)).mT.split([c.shape[2] for c in columns], 1)


class _JointProduct(torch.autograd.Function):
    """`_joint_product`. The columns of a result without a gradient get none, where `torch.cat` would give zeros."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
        _keep_undefined(ctx)
        ctx.save_for_backward(tokens, *columns)
        return _joint_product(tokens, *columns)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tokens, *columns = ctx.saved_tensors
        used = [(c, g) for c, g in zip(columns, grads, strict=True) if g is not None]
        if not used:
            return None, *grads
        with _no_autocast(tokens):
            upstream = torch.cat([g for _, g in used], 1).mT  # (B, N, h of all)
            dtokens = upstream @ torch.cat([c for c, _ in used], 2).mT
            dcolumns = iter((tokens.mT @ upstream).split([c.shape[2] for c, _ in used], 2))
        return dtokens, *(None if g is None else next(dcolumns) for g in grads)


def _attend(every: Tensor, own: Tensor, pair: Tensor, key_scores: Tensor, dtype: torch.dtype) -> Tensor:
    """softmax over m of log(2) * (y_n diag(pair) y_m + key_scores_m), applied to the values: y = every, values = own.

    every (B, N, C), own (B, N, C_i), pair (C), key_scores (B, h, N) -> (B, N, C_i). The products' operands are in
    `dtype`, these tensors' or 16-bit.
    """
    if dtype != every.dtype or (every.is_cuda and every.dtype == torch.float32):
        return _attend_flash(every, own, pair, key_scores, dtype)
    return _spatial_attention(every, own, pair, key_scores)[0]


def _attend_flash(every: Tensor, own: Tensor, pair: Tensor, key_scores: Tensor, dtype: torch.dtype) -> Tensor:
    """`_attend` by the flash attention that PyTorch has for GPUs, the key scores as more channels.

    Scores may be hundreds, where a step of bfloat16 is 2: in 16 bit they take two channels, the rounded score and the
    rest. In float16 tokens and scores need no factor: LayerNorm bounds the tokens, and centred ones have scores around
    zero, within range wherever the reference's logits are, for heads of nine channels or more.
    """
    query, scores = every * pair, [key_scores]
    if dtype != every.dtype:
        query, every, own, rounded, factor = _Rounded.apply(dtype, query, every, own, key_scores)
        scores = [rounded, (key_scores - rounded).detach().to(dtype)]
    heads = key_scores.shape[1]
    values = _heads(own, heads)  # (B, h, N, dv)
    query = F.pad(_heads(query, heads), (0, len(scores)), value=1.0)  # (B, h, N, dk + 1 or 2)
    keys = torch.cat([_heads(every, heads), *(score[..., None] for score in scores)], -1)
    # Its kernels take multiples of eight channels; for others it would hold all scores in memory.
    query, keys, padded = (F.pad(t, (0, -t.shape[-1] % 8)) for t in (query, keys, values))
    out = F.scaled_dot_product_attention(query, keys, padded, scale=math.log(2))
    out = out[..., : values.shape[-1]].transpose(1, 2).flatten(2)
    return out if dtype == key_scores.dtype else _Restored.apply(out, factor)


class _Rounded(torch.autograd.Function):
    """Tensors (B, .., ..) in a 16-bit dtype, and ones (B, 1, 1), whose gradient is the factor `_Restored` took off."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        _keep_undefined(ctx)
        return *(t.to(dtype) for t in tensors), tensors[0].new_ones(tensors[0].shape[0], 1, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *of_tensors, factor = grads
        if factor is None:
            return None, *of_tensors
        return None, *(None if g is None else g * factor for g in of_tensors)


class _Restored(torch.autograd.Function):
    """A 16-bit tensor (B, .., ..) in the factor's dtype; float16 gradients are rounded with their size taken off."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: Tensor) -> Tensor:
        _keep_undefined(ctx)
        ctx.dtype = tensor.dtype
        return tensor.to(factor.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        (dout,) = grads
        if dout is None:
            return None, None
        if ctx.dtype != torch.float16:
            return dout.to(ctx.dtype), dout.new_ones(dout.shape[0], 1, 1)
        factor = _magnitude(dout)
        return (dout / factor).to(ctx.dtype), factor


def _attend_rows(rows: slice, every: Tensor, own: Tensor, pair: Tensor, key_scores: Tensor) -> Tensor:
    """`_attend` for some of the queries, with their scores in memory; differentiable any number of times."""
    weights = _row_weights(rows, every, pair, key_scores)
    return (weights @ _heads(own, key_scores.shape[-2])).transpose(-3, -2).flatten(-2)


def _row_weights(rows: slice, every: Tensor, pair: Tensor, key_scores: Tensor) -> Tensor:
    """The attention weights of some of the queries: (.., h, rows, N)."""
    heads = key_scores.shape[-2]
    scores = _heads(every[..., rows, :] * pair, heads) @ _heads(every, heads).mT + key_scores[..., None, :]
    return _cut(torch.softmax(scores * math.log(2), -1))


def _attend_tiles(every: Tensor, own: Tensor, pair: Tensor, key_scores: Tensor) -> tuple[Tensor, Tensor]:
    """`_attend`, and the normalisers (B, h, 1, N), by cache-sized tiles of scores, which are never saved.

    The scores are sym[n, m] + r[m], where sym = y diag(pair) y^T is symmetric and r are the key scores. So is
    E = 2^sym, and with w = 2^(r - max r) the attention is E [v w, w]: its last column is the normaliser. A tile of E
    serves the queries of its rows and, transposed, those of its columns: half of the products and of the exponentials.

    The backward needs dS + dS^T only, the symmetric part of the scores' gradient, which is E times a product of thin
    matrices. docs/algebra.md derives both.

    Nothing over- or underflows while the normalisers stay within 2^-MAX_EXPONENT .. 2^MAX_EXPONENT. An image for which
    one does not (rare: the tokens are normalised) is done again with a row-wise softmax.
    """
    weights = _key_weights(key_scores)
    values = _weighted_values(own, weights)  # (B, h, dv + 1, N)
    total = torch.empty_like(values)
    tiles = _Tiles(key_scores)
    for b in range(every.shape[0]):
        total[b] = _symmetric_product(every[b], pair, values[b], tiles)
    normaliser = total[:, :, -1:].clone(memory_format=torch.contiguous_format)
    out = (total[:, :, :-1] / normaliser).flatten(1, 2).mT.contiguous()
    for b in (b for b, in_range in enumerate(_in_range(normaliser)) if not in_range):
        for rows in _row_spans(key_scores):
            out[b, rows] = _attend_rows(rows, every[b], own[b], pair, key_scores[b])
    return out, normaliser


def _attend_tiles_backward(
    every: Tensor, own: Tensor, pair: Tensor, key_scores: Tensor, out: Tensor, normaliser: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `_attend_tiles` for its arguments."""
    devery, down, dpair, dkey_scores = _contiguous_like(every, own, pair, key_scores)
    dpair.zero_()
    weights = _key_weights(key_scores)
    tiles = _Tiles(key_scores)
    with _no_autocast(every):
        for b, in_range in enumerate(_in_range(normaliser)):
            if in_range:
                of_image = out[b], weights[b], normaliser[b], dout[b], tiles, devery[b]
                down[b], of_pair, dkey_scores[b] = _symmetric_backward(every[b], own[b], pair, *of_image)
            else:
                devery[b], down[b], of_pair, dkey_scores[b] = _rows_backward(
                    every[b], own[b], pair, key_scores[b], out[b], dout[b]
                )
            dpair += of_pair
    return devery, down, dpair, dkey_scores


_spatial_attention = _operator(
    "spatial_attention(Tensor every, Tensor own, Tensor pair, Tensor key_scores) -> (Tensor, Tensor)",
    _attend_tiles,
    lambda every, own, pair, key_scores: _contiguous_like(own, key_scores[:, :, None]),
)
_spatial_attention_backward = _operator(
    "spatial_attention_backward(Tensor every, Tensor own, Tensor pair, Tensor key_scores, Tensor out, "
    "Tensor normaliser, Tensor dout) -> (Tensor, Tensor, Tensor, Tensor)",
    _attend_tiles_backward,
    lambda every, own, pair, key_scores, out, normaliser, dout: _contiguous_like(every, own, pair, key_scores),
)


def _save_spatial_attention(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    _keep_undefined(ctx)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, *output)


def _differentiate_spatial_attention(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return None, None, None, None
    every, own, pair, key_scores, out, normaliser = ctx.saved_tensors
    if torch.is_grad_enabled():  # a graph of the backward is asked for
        inputs = _partial(every, own, pair, key_scores)
        with _no_autocast(every):
            again = _attend_rows(slice(None), *inputs)
            return tuple(_differentiable_grad(again, inputs, dout, ctx.needs_input_grad))
    return _spatial_attention_backward(every, own, pair, key_scores, out, normaliser, dout)


library.register_autograd(
    "dca_kernels::spatial_attention",
    _differentiate_spatial_attention,
    setup_context=_save_spatial_attention,
    lib=_LIBRARY,
)


def _key_weights(key_scores: Tensor) -> Tensor:
    """2^(r - max r): (B, h, N) -> (B, h, 1, N)."""
    return torch.exp2(key_scores - key_scores.amax(2, keepdim=True))[:, :, None]


def _in_range(normaliser: Tensor) -> list[bool]:
    """For each image, whether all of its normalisers are."""
    return (normaliser.log2().abs() <= MAX_EXPONENT).flatten(1).all(1).tolist()


class _Tiles:
    """The tiles of one image's symmetric score matrix on and above its diagonal, and the memory that they share."""

    def __init__(self, key_scores: Tensor) -> None:
        heads = key_scores.shape[1]
        self.spans = tile_spans(key_scores)
        sizes = [span.stop - span.start for span in self.spans]
        memory = key_scores.new_empty(2, heads * sizes[0] ** 2).unbind()
        self.upper = []  # row block, column block, memory for the tile, memory for a second one of its shape
        for i, rows in enumerate(sizes):
            for j, columns in enumerate(sizes[i:], start=i):
                tile, second = (part[: heads * rows * columns].view(heads, rows, columns) for part in memory)
                self.upper.append((i, j, tile, second))

    def rows(self, tokens: Tensor) -> list[Tensor]:
        """(h, N, d) -> blocks (h, n, d)."""
        return [tokens[:, span] for span in self.spans]

    def columns(self, tokens: Tensor) -> list[Tensor]:
        """(h, d, N) -> blocks (h, d, n)."""
        return [tokens[:, :, span] for span in self.spans]


def _zeros(blocks: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(block, memory_format=torch.contiguous_format) for block in blocks]


def _symmetric_product(every: Tensor, pair: Tensor, values: Tensor, tiles: _Tiles) -> Tensor:
    """values E for one image, E = 2^(y diag(pair) y^T): every (N, C), values (h, d, N) -> (h, d, N)."""
    heads = len(values)
    queries = tiles.rows(_heads(every * pair, heads))
    keys = tiles.columns(_heads(every, heads).mT)
    blocks = tiles.columns(values)
    product = _zeros(blocks)
    for i, j, tile, _ in tiles.upper:
        torch.bmm(queries[i], keys[j], out=tile).exp2_()  # E: (h, rows, columns)
        product[i].baddbmm_(blocks[j], tile.mT)
        if i != j:
            product[j].baddbmm_(blocks[i], tile)
    return torch.cat(product, 2)


def _symmetric_backward(
    every: Tensor,
    own: Tensor,
    pair: Tensor,
    out: Tensor,
    weights: Tensor,
    normaliser: Tensor,
    dout: Tensor,
    tiles: _Tiles,
    devery: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of one image's own (N, C_i), pair (C) and key scores (h, N); that of every (N, C) into `devery`."""
    heads, depth = len(weights), own.shape[1] // len(weights) + 1
    thin = own.new_empty(heads, 3 * depth, own.shape[0])  # [values, upstream, values]
    values = thin[:, :depth]  # [v w, w]
    upstream = thin[:, depth : 2 * depth]  # [u, -u out] for u = log(2) dout / normaliser
    values[:] = thin[:, 2 * depth :] = _weighted_values(own, weights)
    of_values = torch.div(_columns(dout, heads), normaliser / math.log(2), out=upstream[:, :-1])
    torch.sum(of_values * _columns(out, heads), 1, keepdim=True, out=upstream[:, -1:]).neg_()
    received = _symmetric_gradient(every, pair, thin, tiles, devery)
    dkey_scores = (values * received).sum(1)  # (h, N)
    down = (received[:, :-1] * (weights / math.log(2))).flatten(0, 1).mT  # (N, C_i)
    dpair = 0.5 * (devery * every).sum(0)
    devery.mul_(pair)
    return down, dpair, dkey_scores


def _symmetric_gradient(every: Tensor, pair: Tensor, thin: Tensor, tiles: _Tiles, dscores: Tensor) -> Tensor:
    """(dS + dS^T) y into `dscores` (N, C), and upstream E (h, dv + 1, N), from [values, upstream, values]."""
    heads, depth = len(thin), thin.shape[1] // 3
    left = tiles.rows(thin[:, depth:].mT)
    right = tiles.columns(thin[:, : 2 * depth])
    upstream = tiles.columns(thin[:, depth : 2 * depth])
    queries = tiles.rows(_heads(every * pair, heads))
    plain = tiles.rows(_heads(every, heads))
    received = _zeros(upstream)  # (h, dv + 1, n)
    products = _zeros(plain)  # (h, n, dk)
    for i, j, tile, second in tiles.upper:
        torch.bmm(queries[i], plain[j].mT, out=tile).exp2_()  # E: (h, rows, columns)
        received[i].baddbmm_(upstream[j], tile.mT)
        if i != j:
            received[j].baddbmm_(upstream[i], tile)
        tile.mul_(torch.bmm(left[i], right[j], out=second))  # dS + dS^T
        products[i].baddbmm_(tile, plain[j])
        if i != j:
            products[j].baddbmm_(tile.mT, plain[i])
    for span, block in zip(tiles.spans, products, strict=True):
        _heads(dscores[span], heads).copy_(block)
    return torch.cat(received, 2)


def _rows_backward(
    every: Tensor, own: Tensor, pair: Tensor, key_scores: Tensor, out: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of one image's every, own, pair and key scores, by row-wise softmax."""
    heads = len(key_scores)
    keys, values, upstream = _heads(every, heads), _heads(own, heads), _heads(dout, heads)  # (h, N, dk or dv)
    centre = (upstream * _heads(out, heads)).sum(-1, keepdim=True)  # (h, N, 1)
    dqueries, dkeys, dvalues = (torch.zeros_like(t) for t in (keys, keys, values))
    dkey_scores = torch.zeros_like(key_scores)
    for rows in _row_spans(key_scores):
        weights = _row_weights(rows, every, pair, key_scores)  # (h, rows, N)
        dvalues += weights.mT @ upstream[:, rows]
        dscores = weights.mul_(upstream[:, rows] @ values.mT - centre[:, rows]).mul_(math.log(2))
        dqueries[:, rows] = dscores @ keys
        dkeys += dscores.mT @ _heads(every[rows] * pair, heads)
        dkey_scores += dscores.sum(1)
    dpair_tokens, dkey_tokens, down = (t.transpose(0, 1).flatten(1) for t in (dqueries, dkeys, dvalues))
    return dpair_tokens * pair + dkey_tokens, down, (dpair_tokens * every).sum(0), dkey_scores


def _weighted_values(own: Tensor, weights: Tensor) -> Tensor:
    """[v w, w]: own (.., N, C_i), weights (.., h, 1, N) -> (.., h, dv + 1, N)."""
    return torch.cat([_columns(own, weights.shape[-3]) * weights, weights], -2)


def _columns(tokens: Tensor, heads: int) -> Tensor:
    """(.., N, C) -> (.., h, C / h, N), a view."""
    return tokens.mT.unflatten(-2, (heads, -1))


def _heads(tokens: Tensor, heads: int) -> Tensor:
    """(.., N, C) -> (.., h, N, C / h), a view."""
    return tokens.unflatten(-1, (heads, -1)).transpose(-3, -2)


def tile_spans(key_scores: Tensor) -> list[slice]:
    """Spans of tokens such that the scores of one with another, of every head, take at most `TILE_BYTES`."""
    heads, length = key_scores.shape[-2:]
    return _spans(length, math.isqrt(TILE_BYTES // (heads * key_scores.element_size())), multiple=16)


def _row_spans(key_scores: Tensor) -> list[slice]:
    """Spans of queries such that their scores with all keys, of every head, take at most `TILE_BYTES`."""
    heads, length = key_scores.shape[-2:]
    return _spans(length, TILE_BYTES // (heads * length * key_scores.element_size()))


def _spans(length: int, most: int, multiple: int = 1) -> list[slice]:
    """0 .. length in equal spans of at most `most` (at least one) each; of the next multiple, if that is allowed."""
    most = max(1, most)
    step = math.ceil(length / max(1, math.ceil(length / most)))
    step = max(1, min(most, math.ceil(step / multiple) * multiple))
    return [slice(begin, min(begin + step, length)) for begin in range(0, length, step)]


# Stage 4: upsample and merge


def upsample(
    tokens: Sequence[Tensor],
    maps: Sequence[Tensor],
    upconvs: Sequence[Holder],
    norms: Sequence[Holder | None],
    grid: tuple[int, int],
    dtypes: Sequence[torch.dtype],
) -> list[Tensor]:
    """1x1 convolution at the grid's size, bilinear upsampling, raw map added, BatchNorm, ReLU (paper, eq. 5).

    The convolution commutes with the interpolation; its bias is added after it, in float32. BatchNorm's running buffers
    are updated when every map is done. Pooling and interpolation have float32 operands on every device: they read and
    write full-resolution maps, and that takes their time.

    Args:
        tokens: S tensors (B, N, C_i).
        maps: S tensors (B, C_i, H_i, W_i).
        upconvs: S modules with `conv.conv`, a dense 1x1 convolution.
        norms: S BatchNorms; where None, the map is returned as it enters BatchNorm and ReLU.
        grid: (P_h, P_w).
        dtypes: dtype of each output.

    Returns:
        S tensors (B, C_i, H_i, W_i), channels_last where the map is.
    """
    outs: list[Tensor] = []
    updates = []
    operands = operand_dtype(maps)
    for t, x, upconv, norm, dtype in zip(tokens, maps, upconvs, norms, dtypes, strict=True):
        conv = upconv.leaf
        z = _pointwise(conv.weight.flatten(1).to(t.dtype), t, operands).unflatten(2, grid)  # (B, C_i, P_h, P_w)
        bias = conv.bias.to(t.dtype)
        if norm is None:
            outs.append((x + (_interpolate(z, x) + _plane(bias))).to(dtype))  # x first: the sum has its layout
            continue
        gamma = t.new_ones(t.shape[2]) if norm.weight is None else norm.weight.to(t.dtype)
        beta = t.new_zeros(t.shape[2]) if norm.bias is None else norm.bias.to(t.dtype)
        if uses_batch_statistics(norm):
            z_mean = z.mean((0, 2, 3))  # BatchNorm removes it: gone before it is rounded into every pixel
            z = _with_zero_grad(z - _plane(z_mean), bias)
            out, mean, variance = _merge(x, z, gamma, beta, None, None, norm.eps, dtype)
            updates.append((norm, mean + z_mean.detach() + bias.detach(), variance, x.numel() // x.shape[1]))
        else:
            mean, variance = norm.running_mean.to(t.dtype), norm.running_var.to(t.dtype)
            out, _, _ = _merge(x, z, gamma, beta, mean - bias, variance, norm.eps, dtype)
        outs.append(out)
    for update in updates:
        update_running_buffers(*update)
    return outs


def _pointwise(weight: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """weight (C, C) @ tokens (B, N, C)^T, of operands in `dtype`; the tokens are centred before they are rounded."""
    if dtype == tokens.dtype:
        return weight @ tokens.mT
    mean = tokens.mean(1, keepdim=True)
    centred = (tokens - mean).flatten(0, 1)[None]  # one product for all images: no gradient of a weight for each
    return (_product(centred, weight.mT[None], dtype).view_as(tokens) + mean @ weight.mT).mT


def uses_batch_statistics(norm: Holder) -> bool:
    """Whether BatchNorm normalises by the batch's mean and variance rather than by its buffers."""
    return norm.training or norm.running_mean is None


def update_running_buffers(norm: Holder, mean: Tensor, variance: Tensor, count: int) -> None:
    """What BatchNorm2d does to its buffers in a forward in train mode; `count` values a channel."""
    if not (norm.training and norm.track_running_stats) or norm.running_mean is None:
        return
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = norm.num_batches_tracked.to(mean.dtype).reciprocal()
    if count == 0 or momentum is None:
        return
    unbiased = variance * (count / (count - 1))
    for buffer, value in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        buffer.copy_(torch.lerp(buffer.to(value.dtype), value, momentum))


def _merge_planes(
    x: Tensor,
    z: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """relu(gamma * (up(z) + x - mean) / sqrt(variance + eps) + beta), a few planes at a time.

    x (B, C, H, W) in any floating dtype, z (B, C, P_h, P_w) and gamma, beta, mean, variance (C) in the accumulation
    dtype. Where mean is None, mean and variance are the batch's (the variance biased). Returns the merged map, the mean
    and the variance. Of full resolution only x is saved: the backward interpolates again.
    """
    planes = _Planes(x, z)
    out = torch.empty_like(x, dtype=dtype, memory_format=memory_format(x))
    from_batch = mean is None or variance is None
    if mean is None or variance is None:
        centre = planes.mean()
        mean, variance = _contiguous_like(gamma, gamma)
    else:
        centre = mean
        mean, variance = mean.clone(), variance.clone()  # an operator does not hand on its arguments
    for c in planes.channels:
        pieces = planes.pieces(partial(planes.centred, c, centre))
        left = gamma.new_zeros(1)
        if from_batch:  # the centre is the mean up to rounding: taking what is left off the squares is safe
            sums = sum((planes.sums(y, y) for _, y in pieces()), gamma.new_zeros(2, 1, dtype=torch.float64))
            left, squares = sums / planes.count
            mean[c] = centre[c] + left
            variance[c] = (squares - left.square()).clamp_(min=0)
        scale = gamma[c] * torch.rsqrt(variance[c] + eps)
        shift = beta[c] - scale * left.to(scale.dtype)
        for b, y in pieces():
            torch.add(y.mul_(_plane(scale)), _plane(shift), out=out[b, c]).relu_()
    return out, mean, variance


def _merge_planes_backward(
    x: Tensor,
    z: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    variance: Tensor,
    dout: Tensor,
    eps: float,
    from_batch: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, z, gamma, beta and, where it is not the batch's, the mean."""
    with _no_autocast(x):
        planes = _Planes(x, z)
        inv_std = torch.rsqrt(variance + eps)
        scale = gamma * inv_std
        dx, dz = torch.empty_like(x, memory_format=memory_format(x)), *_contiguous_like(z)
        dbeta, dgamma = _contiguous_like(beta, gamma)
        for c in planes.channels:
            pieces = planes.pieces(partial(planes.masked, c, mean, scale, beta, dout))
            sums = sum((planes.sums(g, y) for _, (y, g) in pieces()), gamma.new_zeros(2, 1, dtype=torch.float64))
            dbeta[c], dgamma[c] = sums[0], sums[1] * inv_std[c]
            through_mean = scale[c] * dbeta[c] / planes.count
            through_variance = scale[c] * inv_std[c] * dgamma[c] / planes.count
            for b, (y, g) in pieces():
                dy = g.mul_(_plane(scale[c]))
                if from_batch:
                    dy.sub_(y.mul_(_plane(through_variance)).add_(_plane(through_mean)))
                dx[b, c] = dy
                dz[b, c] = planes.adjoint(dy)
    return dx, dz, dgamma, dbeta, -scale * dbeta


_merge = _operator(
    "merge(Tensor x, Tensor z, Tensor gamma, Tensor beta, Tensor? mean, Tensor? variance, float eps, "
    "ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    _merge_planes,
    lambda x, z, gamma, beta, mean, variance, eps, dtype: (
        torch.empty_like(x, dtype=dtype, memory_format=memory_format(x)),
        *_contiguous_like(gamma, gamma),
    ),
)
_merge_backward = _operator(
    "merge_backward(Tensor x, Tensor z, Tensor gamma, Tensor beta, Tensor mean, Tensor variance, Tensor dout, "
    "float eps, bool from_batch) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _merge_planes_backward,
    lambda x, z, gamma, beta, mean, variance, dout, eps, from_batch: (
        torch.empty_like(x, memory_format=memory_format(x)),
        *_contiguous_like(z, gamma, beta, mean),
    ),
)


def _save_merge(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, mean, _, ctx.eps, _ = inputs
    _keep_undefined(ctx)
    ctx.from_batch = mean is None
    ctx.mark_non_differentiable(*output[1:])
    # The variance that came may be BatchNorm's buffer, which a forward in training changes: the output is a copy of it.
    ctx.save_for_backward(*tensors, output[1] if ctx.from_batch else mean, output[2])


def _differentiate_merge(ctx: Any, dout: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 8
    x, z, gamma, beta, mean, variance = ctx.saved_tensors
    if torch.is_grad_enabled():  # a graph of the backward is asked for
        inputs = x, z, gamma, beta, mean = _partial(x, z, gamma, beta, mean)
        with _no_autocast(x):
            y = _interpolate(z, x) + x
            if ctx.from_batch:
                variance, mean = torch.var_mean(y, (0, 2, 3), correction=0)
            scale = gamma * torch.rsqrt(variance + ctx.eps)
            again = torch.relu((y - _plane(mean)) * _plane(scale) + _plane(beta)).to(dout.dtype)
            return *_differentiable_grad(again, inputs, dout, ctx.needs_input_grad), None, None, None
    *grads, dmean = _merge_backward(x, z, gamma, beta, mean, variance, dout, ctx.eps, ctx.from_batch)
    return *grads, None if ctx.from_batch else dmean, None, None, None


library.register_autograd("dca_kernels::merge", _differentiate_merge, setup_context=_save_merge, lib=_LIBRARY)


class _Planes:
    """up(z) + x, some channels of some images at a time: what is done to them happens in the cache."""

    def __init__(self, x: Tensor, z: Tensor) -> None:
        self.x, self.z = x, z
        self.rows, self.columns = _interpolation_matrices(z, x)
        self.count = max(1, x.numel() // x.shape[1])  # values a channel
        planes = max(1, PLANE_BYTES // (x.shape[2] * x.shape[3] * z.element_size()))
        # A few channels of all images; in channels_last memory those lie far apart, so all channels of a few images.
        images = planes if memory_format(x) == torch.contiguous_format else planes // x.shape[1]
        self.images = _spans(x.shape[0], images)
        images = self.images[0].stop if self.images else 1
        self.channels = _spans(x.shape[1], planes // images)
        self.most = images * self.channels[0].stop  # planes of a piece
        self.memory: dict[str, Tensor] = {}  # of a piece, by what it is for

    def pieces(self, compute: Callable[[slice], Any]) -> Callable[[], Iterable[tuple[slice, Any]]]:
        """What walks through the spans of images, each with its `compute`; a single one is computed once, and kept."""
        if len(self.images) != 1:
            return lambda: ((b, compute(b)) for b in self.images)
        kept = [(b, compute(b)) for b in self.images]
        return lambda: kept

    def mean(self) -> Tensor:
        """The mean of up(z) + x over images and pixels, up to rounding: (C)."""
        of_x = self.x.sum((2, 3), dtype=self.z.dtype).sum(0) / self.count
        of_z = self.z.sum(0) / max(1, len(self.z))  # (C, P_h, P_w)
        return of_x + self.rows.mean(0) @ of_z @ self.columns.mean(0)

    def centred(self, c: slice, centre: Tensor, b: slice) -> Tensor:
        """up(z) + x - centre, in the accumulation dtype: centre (C) -> (b, c, H, W)."""
        y = self._scratch("centred", b.stop - b.start, c.stop - c.start)
        torch.sub(self.x[b, c], _plane(centre[c]), out=y)
        if self.z.shape == self.x.shape:
            return y.add_(self.z[b, c])
        wide = (self.z[b, c] @ self.columns.mT).flatten(0, 1)  # (b c, P_h, W)
        y.flatten(0, 1).baddbmm_(self.rows.expand(len(wide), -1, -1), wide)
        return y

    def masked(
        self, c: slice, mean: Tensor, scale: Tensor, beta: Tensor, dout: Tensor, b: slice
    ) -> tuple[Tensor, Tensor]:
        """`centred`, and dout where the ReLU let y * scale + beta through."""
        y = self.centred(c, mean, b)
        before_relu = torch.mul(y, _plane(scale[c]), out=self._scratch("masked", *y.shape[:2])).add_(_plane(beta[c]))
        upstream = dout[b, c].to(y.dtype)
        return y, torch.ops.aten.threshold_backward.grad_input(upstream, before_relu, 0, grad_input=before_relu)

    def sums(self, left: Tensor, right: Tensor) -> Tensor:
        """left and left * right summed over images and pixels: two of (b, c, H, W) -> (2, c) in float64."""
        product = torch.mul(left, right, out=self._scratch("product", *left.shape[:2]))
        return torch.stack([t.sum((2, 3)).sum(0, dtype=torch.float64) for t in (left, product)])

    def adjoint(self, dy: Tensor) -> Tensor:
        """The transposed interpolation: (b, c, H, W) -> (b, c, P_h, P_w)."""
        tall = dy.flatten(0, 1)  # (b c, H, W)
        low = torch.bmm(self.rows.mT.expand(len(tall), -1, -1), tall) @ self.columns
        return low.unflatten(0, dy.shape[:2])

    def _scratch(self, use: str, images: int, channels: int) -> Tensor:
        """(images, channels, H, W), the same memory for every piece."""
        if use not in self.memory:
            self.memory[use] = self.z.new_empty(self.most, *self.x.shape[2:])
        return self.memory[use][: images * channels].unflatten(0, (images, channels))


def _interpolate(z: Tensor, x: Tensor) -> Tensor:
    """z upsampled to the size of x."""
    rows, columns = _interpolation_matrices(z, x)
    return rows @ (z @ columns.mT)


def _interpolation_matrices(z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Bilinear interpolation as rows @ z @ columns^T: (H, P_h) and (W, P_w), with PyTorch's own weights."""

    def matrix(low: int, high: int) -> Tensor:
        identity = torch.eye(low, device=z.device, dtype=z.dtype)[None]
        return F.interpolate(identity, size=high, mode="linear", align_corners=True)[0].mT.contiguous()

    return matrix(z.shape[2], x.shape[2]), matrix(z.shape[3], x.shape[3])


def _plane(vector: Tensor) -> Tensor:
    """(C) -> (C, 1, 1)."""
    return vector[:, None, None]


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last for a channels_last map, else contiguous."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


# Shared by the stages


def _affine(projection: Holder, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight (C) and bias (C) of a depthwise projection."""
    conv = projection.leaf
    return conv.weight.flatten().to(dtype), conv.bias.to(dtype)


def _layer_norm(tokens: Sequence[Tensor], norms: Sequence[Holder]) -> list[Tensor]:
    return [
        F.layer_norm(t, norm.normalized_shape, norm.weight.to(t.dtype), norm.bias.to(t.dtype), norm.eps)
        for t, norm in zip(tokens, norms, strict=True)
    ]


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a (B, n, k) @ b (B, k, m), of operands in `dtype`; sums and result in a's dtype."""
    return a @ b if dtype == a.dtype else _Product.apply(a, b, dtype)


def _add_product(c: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """c + `_product`."""
    return torch.baddbmm(c, a, b) if dtype == a.dtype else c + _Product.apply(a, b, dtype)


class _Product(torch.autograd.Function):
    """The product of float32 tensors, rounded to 16 bit on the way; so are the gradient's. Differentiable again."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        _keep_undefined(ctx)
        ctx.save_for_backward(a, b)
        ctx.dtype = dtype
        if dtype != torch.float16:
            return _multiply(a.to(dtype), b.to(dtype))
        of_a, of_b = _magnitude(a), _magnitude(b)
        return _multiply((a / of_a).to(dtype), (b / of_b).to(dtype)).mul_(of_a * of_b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        (a, b), (dout,) = ctx.saved_tensors, grads
        if dout is None:
            return None, None, None
        with _no_autocast(dout):
            da = _Product.apply(dout, b.mT, ctx.dtype) if ctx.needs_input_grad[0] else None
            db = _Product.apply(a.mT, dout, ctx.dtype) if ctx.needs_input_grad[1] else None
        return da, db, None


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """a (B, n, k) @ b (B, k, m) of 16-bit tensors, with float32 sums and a float32 result; no gradients."""
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def _magnitude(x: Tensor) -> Tensor:
    """A power of two (B, 1, 1) that brings the largest value of x (B, .., ..) to 1 .. 2: any float32 then fits float16.

    Gradients need it, whose size a loss scale sets, and of which attention weights make small factors.
    """
    if x.numel() == 0:
        return x.new_ones(x.shape[0], 1, 1)
    largest = torch.linalg.vector_norm(x.detach(), math.inf, (1, 2), keepdim=True)
    return torch.exp2(torch.floor(torch.log2(largest.clamp(min=torch.finfo(x.dtype).tiny))))


def _cut(weights: Tensor) -> Tensor:
    """Attention weights with the negligible ones at zero."""
    return F.threshold(weights, NEGLIGIBLE, 0.0)


class _ZeroGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, *parameters: Tensor) -> Tensor:
        _keep_undefined(ctx)
        ctx.shapes = [p.shape for p in parameters]
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (dvalue,) = grads
        return dvalue, *(None if dvalue is None else dvalue.new_zeros(shape) for shape in ctx.shapes)


def _with_zero_grad(value: Tensor, *parameters: Tensor) -> Tensor:
    """`value`, with gradients of exactly zero (not None) for parameters that it does not depend on."""
    return _ZeroGrad.apply(value, *parameters)


def _partial(*inputs: Tensor) -> list[Tensor]:
    """The inputs as independent variables: a derivative for one must not reach it through another as well."""
    return [t.view_as(t) for t in inputs]


def _differentiable_grad(
    out: Tensor, inputs: Sequence[Tensor], dout: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of `out` for the inputs that need one, with a graph of their own."""
    wanted = [t for t, need in zip(inputs, needed, strict=False) if need]
    grads = iter(torch.autograd.grad(out, wanted, dout, create_graph=True))
    return [next(grads) if need else None for need in needed[: len(inputs)]]


def _keep_undefined(ctx: Any) -> None:
    """Let an output that no loss uses have the gradient None in the backward too.

    The zeros that PyTorch would put there reach parameters, whose gradient is None in the reference.
    """
    if not torch.compiler.is_compiling():  # it cannot trace this, and no gradient is None there
        ctx.set_materialize_grads(False)


def _contiguous_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Fresh memory for a tensor of each of these shapes."""
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)


def _no_autocast(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)
