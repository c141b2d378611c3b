"""The spatial attention of one scale by tiles of its scores, forward and backward, as operators.

The arguments have the same names everywhere: tokens y (B, N, C) of all scales, normalised and centred; values
(B, N, C_i), one scale's of them; query_key_weight (C), the product of both weights and the scores' factor; key_scores
(B, h, N), the part of the scores that depends on the key only. Functions of one image have them without B.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, library

from dca_kernels.torch_backend.common import (
    LIBRARY,
    Context,
    contiguous_like,
    differentiable_grad,
    independent,
    keep_undefined,
    no_autocast,
    operator,
    spans,
    split_heads,
    without_negligible,
)

TILE_BYTES = 2**20  # scores in memory at a time: they stay in a cache, and threads seldom wait for each other
MAX_EXPONENT = 40.0  # the largest power of two, up or down, of a normaliser and of a key weight: see `_attend_tiles`


def _attend_tiles(
    tokens: Tensor, values: Tensor, query_key_weight: Tensor, key_scores: Tensor
) -> tuple[Tensor, Tensor]:
    """The attended values (B, N, C_i) and the normalisers (B, h, 1, N), by tiles of scores, which are never saved.

    The scores are sym[n, m] + r[m], where sym = y diag(query_key_weight) y^T is symmetric and r are the key scores. So
    is E = 2^sym, and with w = 2^(r - max r) the attention is E [v w, w]: its last column is the normaliser. A tile of E
    serves the queries of its rows and, transposed, those of its columns: half of the products and of the exponentials.

    The backward needs dS + dS^T only, the symmetric part of the scores' gradient, which is E times a product of
    matrices with few columns. docs/algebra.md derives both.

    Nothing over- or underflows while the normalisers stay within 2^-MAX_EXPONENT .. 2^MAX_EXPONENT and the weights w
    of the keys above the first: the backward divides by a normaliser before it multiplies by w. An image for which one
    does not (rare: the tokens are normalised) is done again with a row-wise softmax.
    """
    key_weights = _key_weights(key_scores)
    weighted = _weighted_values(values, key_weights)  # (B, h, dv + 1, N)
    total = torch.empty_like(weighted)
    tiles = _Tiles(key_scores)
    for b in range(tokens.shape[0]):
        total[b] = _symmetric_product(tokens[b], query_key_weight, weighted[b], tiles)
    normaliser = total[:, :, -1:].clone(memory_format=torch.contiguous_format)
    out = (total[:, :, :-1] / normaliser).flatten(1, 2).mT.contiguous()
    for b in (b for b, in_range in enumerate(_in_range(normaliser, key_scores)) if not in_range):
        for rows in _row_spans(key_scores):
            out[b, rows] = _attend_rows(rows, tokens[b], values[b], query_key_weight, key_scores[b])
    return out, normaliser


def _attend_tiles_backward(
    tokens: Tensor,
    values: Tensor,
    query_key_weight: Tensor,
    key_scores: Tensor,
    out: Tensor,
    normaliser: Tensor,
    dout: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `_attend_tiles` for its arguments."""
    dtokens, dvalues, dweight, dkey_scores = contiguous_like(tokens, values, query_key_weight, key_scores)
    dweight.zero_()
    key_weights = _key_weights(key_scores)
    tiles = _Tiles(key_scores)
    with no_autocast(tokens):
        for b, in_range in enumerate(_in_range(normaliser, key_scores)):
            if in_range:
                of_image = out[b], key_weights[b], normaliser[b], dout[b], tiles, dtokens[b]
                dvalues[b], of_weight, dkey_scores[b] = _symmetric_backward(
                    tokens[b], values[b], query_key_weight, *of_image
                )
            else:
                dtokens[b], dvalues[b], of_weight, dkey_scores[b] = _rows_backward(
                    tokens[b], values[b], query_key_weight, key_scores[b], dout[b]
                )
            dweight += of_weight
    return dtokens, dvalues, dweight, dkey_scores


attend_tiles = operator(
    "spatial_attention(Tensor tokens, Tensor values, Tensor query_key_weight, Tensor key_scores) -> (Tensor, Tensor)",
    _attend_tiles,
    lambda tokens, values, query_key_weight, key_scores: contiguous_like(values, key_scores[:, :, None]),
)
attend_tiles_backward = operator(
    "spatial_attention_backward(Tensor tokens, Tensor values, Tensor query_key_weight, Tensor key_scores, Tensor out, "
    "Tensor normaliser, Tensor dout) -> (Tensor, Tensor, Tensor, Tensor)",
    _attend_tiles_backward,
    lambda tokens, values, query_key_weight, key_scores, *_: contiguous_like(
        tokens, values, query_key_weight, key_scores
    ),
)


def _save(ctx: Context, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    keep_undefined(ctx)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx: Context, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return None, None, None, None
    tokens, values, query_key_weight, key_scores, out, normaliser = ctx.saved_tensors
    if torch.is_grad_enabled():  # a graph of the backward is asked for
        inputs = independent(tokens, values, query_key_weight, key_scores)
        with no_autocast(tokens):
            again = _attend_rows(slice(None), *inputs)
            return tuple(differentiable_grad(again, inputs, dout, ctx.needs_input_grad))
    return attend_tiles_backward(tokens, values, query_key_weight, key_scores, out, normaliser, dout)


library.register_autograd("dca_kernels::spatial_attention", _differentiate, setup_context=_save, lib=LIBRARY)


# By tiles of a symmetric matrix


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

    def rows(self, matrix: Tensor) -> list[Tensor]:
        """(h, N, d) -> blocks (h, n, d)."""
        return [matrix[:, span] for span in self.spans]

    def columns(self, matrix: Tensor) -> list[Tensor]:
        """(h, d, N) -> blocks (h, d, n)."""
        return [matrix[:, :, span] for span in self.spans]


def tile_spans(key_scores: Tensor) -> list[slice]:
    """Spans of tokens such that the scores of one with another, of every head, take at most `TILE_BYTES`."""
    heads, length = key_scores.shape[-2:]
    return spans(length, math.isqrt(TILE_BYTES // (heads * key_scores.element_size())), multiple=16)


def _symmetric_product(tokens: Tensor, query_key_weight: Tensor, weighted: Tensor, tiles: _Tiles) -> Tensor:
    """weighted E of one image: tokens (N, C), weighted (h, d, N) -> (h, d, N)."""
    heads = len(weighted)
    queries = tiles.rows(split_heads(tokens * query_key_weight, heads))
    keys = tiles.columns(split_heads(tokens, heads).mT)
    blocks = tiles.columns(weighted)
    product = _zeros(blocks)
    for i, j, tile, _ in tiles.upper:
        torch.bmm(queries[i], keys[j], out=tile).exp2_()  # E: (h, rows, columns)
        product[i].baddbmm_(blocks[j], tile.mT)
        if i != j:
            product[j].baddbmm_(blocks[i], tile)
    return torch.cat(product, 2)


def _symmetric_backward(
    tokens: Tensor,
    values: Tensor,
    query_key_weight: Tensor,
    out: Tensor,
    key_weights: Tensor,
    normaliser: Tensor,
    dout: Tensor,
    tiles: _Tiles,
    dtokens: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """One image's gradients of values, query_key_weight and key scores; that of the tokens goes into `dtokens`."""
    heads, depth = len(key_weights), values.shape[1] // len(key_weights) + 1
    factors = values.new_empty(heads, 3 * depth, values.shape[0])  # [weighted, upstream, weighted]
    weighted = factors[:, :depth]  # [v w, w]
    upstream = factors[:, depth : 2 * depth]  # [u, -u out] for u = log(2) dout / normaliser
    weighted[:] = factors[:, 2 * depth :] = _weighted_values(values, key_weights)
    of_values = torch.div(_columns(dout, heads), normaliser / math.log(2), out=upstream[:, :-1])
    torch.sum(of_values * _columns(out, heads), 1, keepdim=True, out=upstream[:, -1:]).neg_()
    received = _symmetric_gradient(tokens, query_key_weight, factors, tiles, dtokens)
    dkey_scores = (weighted * received).sum(1)  # (h, N)
    dvalues = (received[:, :-1] * (key_weights / math.log(2))).flatten(0, 1).mT  # (N, C_i)
    dweight = 0.5 * (dtokens * tokens).sum(0)
    dtokens.mul_(query_key_weight)
    return dvalues, dweight, dkey_scores


def _symmetric_gradient(
    tokens: Tensor, query_key_weight: Tensor, factors: Tensor, tiles: _Tiles, dscores: Tensor
) -> Tensor:
    """(dS + dS^T) y into `dscores` (N, C), and upstream E (h, dv + 1, N), from [weighted, upstream, weighted]."""
    heads, depth = len(factors), factors.shape[1] // 3
    left = tiles.rows(factors[:, depth:].mT)
    right = tiles.columns(factors[:, : 2 * depth])
    upstream = tiles.columns(factors[:, depth : 2 * depth])
    queries = tiles.rows(split_heads(tokens * query_key_weight, heads))
    keys = tiles.rows(split_heads(tokens, heads))
    received = _zeros(upstream)  # (h, dv + 1, n)
    products = _zeros(keys)  # (h, n, dk)
    for i, j, tile, second in tiles.upper:
        torch.bmm(queries[i], keys[j].mT, out=tile).exp2_()  # E: (h, rows, columns)
        received[i].baddbmm_(upstream[j], tile.mT)
        if i != j:
            received[j].baddbmm_(upstream[i], tile)
        tile.mul_(torch.bmm(left[i], right[j], out=second))  # dS + dS^T
        products[i].baddbmm_(tile, keys[j])
        if i != j:
            products[j].baddbmm_(tile.mT, keys[i])
    for span, block in zip(tiles.spans, products, strict=True):
        split_heads(dscores[span], heads).copy_(block)
    return torch.cat(received, 2)


def _key_weights(key_scores: Tensor) -> Tensor:
    """2^(r - max r): (B, h, N) -> (B, h, 1, N)."""
    return torch.exp2(key_scores - key_scores.amax(2, keepdim=True))[:, :, None]


def _in_range(normaliser: Tensor, key_scores: Tensor) -> list[bool]:
    """For each image, whether all of its normalisers and key weights are."""
    are = (normaliser.log2().abs() <= MAX_EXPONENT).flatten(1).all(1)
    return (are & (key_scores.amax(2) - key_scores.amin(2) <= MAX_EXPONENT).all(1)).tolist()


def _weighted_values(values: Tensor, key_weights: Tensor) -> Tensor:
    """[v w, w]: values (.., N, C_i), key_weights (.., h, 1, N) -> (.., h, dv + 1, N)."""
    return torch.cat([_columns(values, key_weights.shape[-3]) * key_weights, key_weights], -2)


def _columns(tokens: Tensor, heads: int) -> Tensor:
    """(.., N, C) -> (.., h, C / h, N), a view."""
    return tokens.mT.unflatten(-2, (heads, -1))


def _zeros(blocks: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(block, memory_format=torch.contiguous_format) for block in blocks]


# By row-wise softmax


def _attend_rows(rows: slice, tokens: Tensor, values: Tensor, query_key_weight: Tensor, key_scores: Tensor) -> Tensor:
    """The attended values of some of the queries, with their scores in memory; differentiable any number of times."""
    weights = _row_weights(rows, tokens, query_key_weight, key_scores)
    return (weights @ split_heads(values, key_scores.shape[-2])).transpose(-3, -2).flatten(-2)


def _row_weights(rows: slice, tokens: Tensor, query_key_weight: Tensor, key_scores: Tensor) -> Tensor:
    """The attention weights of some of the queries: (.., h, rows, N)."""
    heads = key_scores.shape[-2]
    scores = split_heads(tokens[..., rows, :] * query_key_weight, heads) @ split_heads(tokens, heads).mT
    scores = scores + key_scores[..., None, :]
    return without_negligible(torch.softmax(scores * math.log(2), -1))


def _rows_backward(
    tokens: Tensor, values: Tensor, query_key_weight: Tensor, key_scores: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One image's gradients of tokens, values, query_key_weight and key scores."""
    heads = len(key_scores)
    keys, by_head, upstream = (split_heads(t, heads) for t in (tokens, values, dout))  # (h, N, dk or dv)
    dqueries, dkeys, dvalues = (torch.zeros_like(t) for t in (keys, keys, by_head))
    dkey_scores = torch.zeros_like(key_scores)
    for rows in _row_spans(key_scores):
        weights = _row_weights(rows, tokens, query_key_weight, key_scores)  # (h, rows, N)
        dvalues += weights.mT @ upstream[:, rows]
        dscores = _through_softmax(weights, upstream[:, rows] @ by_head.mT).mul_(math.log(2))
        dqueries[:, rows] = dscores @ keys
        dkeys += dscores.mT @ split_heads(tokens[rows] * query_key_weight, heads)
        dkey_scores += dscores.sum(1)
    of_queries, of_keys, of_values = (t.transpose(0, 1).flatten(1) for t in (dqueries, dkeys, dvalues))
    return of_queries * query_key_weight + of_keys, of_values, (of_queries * tokens).sum(0), dkey_scores


def _through_softmax(weights: Tensor, dweights: Tensor) -> Tensor:
    """The gradient of the scores, in the weights' memory: of a weight of 1 it is 0 to the bit, whatever its own was."""
    dweights -= (weights * dweights).sum(-1, keepdim=True)
    return weights.mul_(dweights)


def _row_spans(key_scores: Tensor) -> list[slice]:
    """Spans of queries such that their scores with all keys, of every head, take at most `TILE_BYTES`."""
    heads, length = key_scores.shape[-2:]
    return spans(length, TILE_BYTES // (heads * length * key_scores.element_size()))
