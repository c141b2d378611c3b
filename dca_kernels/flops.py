"""Floating point operations of the `torch` backend's operators, for `torch.utils.flop_counter.FlopCounterMode`.

Import this before a counter is made; nothing else does, since PyTorch's counter imports triton. As PyTorch's own
formulas, these count products of matrices, two operations for each multiplication.

Shapes are those of `dca_kernels.fused`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dca_kernels.fused import tile_spans


@register_flop_formula(torch.ops.dca_kernels.spatial_attention, get_raw=True)
def spatial_attention(every: Tensor, own: Tensor, pair: Tensor, key_scores: Tensor, **_: Any) -> int:
    """Scores on and above the diagonal's tiles, and their product with the values and the normaliser's ones."""
    scores, width, length = _scores(key_scores), _value_width(own, key_scores), every.shape[1]
    return 2 * scores * every.shape[2] + 2 * len(every) * length**2 * width


@register_flop_formula(torch.ops.dca_kernels.spatial_attention_backward, get_raw=True)
def spatial_attention_backward(every: Tensor, own: Tensor, pair: Tensor, key_scores: Tensor, *_: Any, **__: Any) -> int:
    """Scores and their gradients on and above the diagonal's tiles, each with the product that it goes into."""
    scores, width, length = _scores(key_scores), _value_width(own, key_scores), every.shape[1]
    return 2 * scores * (every.shape[2] + 2 * width) + 2 * len(every) * length**2 * (width + every.shape[2])


@register_flop_formula(torch.ops.dca_kernels.merge, get_raw=True)
def merge(x: Tensor, z: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor | None, *_: Any, **__: Any) -> int:
    """The interpolation, twice where the batch's statistics are taken first."""
    columns, rows = _interpolation(x, z)
    return columns + rows * (2 if mean is None else 1)


@register_flop_formula(torch.ops.dca_kernels.merge_backward, get_raw=True)
def merge_backward(x: Tensor, z: Tensor, *_: Any, **__: Any) -> int:
    """The interpolation twice, and its adjoint."""
    columns, rows = _interpolation(x, z)
    return 2 * columns + 3 * rows


def _scores(key_scores: Tensor) -> int:
    """Of one head of every image: how many are computed."""
    batch, _, length = key_scores.shape
    sizes = [span.stop - span.start for span in tile_spans(key_scores)]
    return batch * (length**2 + sum(size**2 for size in sizes)) // 2


def _value_width(own: Tensor, key_scores: Tensor) -> int:
    """Channels of all heads' values, each head's with one for the normaliser."""
    return own.shape[2] + key_scores.shape[1]


def _interpolation(x: Tensor, z: Tensor) -> tuple[int, int]:
    """Of a grid's columns, and then of its rows."""
    if x.shape == z.shape:
        return 0, 0
    planes, rows, columns = z.shape[0] * z.shape[1], z.shape[2], z.shape[3]
    return 2 * planes * rows * columns * x.shape[3], 2 * planes * rows * x.shape[2] * x.shape[3]
