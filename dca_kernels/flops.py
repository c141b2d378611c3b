"""Floating point operations of both backends' operators, for `torch.utils.flop_counter.FlopCounterMode`.

Import this before a counter is made; nothing else does, since PyTorch's counter imports triton. As PyTorch's own
formulas, these count products of matrices, two operations for each multiplication. The `torch` backend interpolates by
such products; the kernels do not, but for a few weights a pixel, which are left out as those of PyTorch's own
interpolation are.

Shapes are those of `dca_kernels.fused`.
"""

import importlib.util
from collections.abc import Sequence
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


# The `triton` backend: products of the module's own sizes, without what pads them to tiles.

if importlib.util.find_spec("triton") is not None:
    from dca_kernels import pipeline
    from dca_kernels.parameters import Spec

    @register_flop_formula(torch.ops.dca_kernels.refine, get_raw=True)
    def refine(maps: Sequence[Tensor], parameters: Any, buffers: Any, *rest: Any, **_: Any) -> int:
        """For each image: covariance up to its diagonal, mixing; scores and values of each scale; convolutions."""
        *numbers, _training = rest
        spec, channels = Spec(*numbers), [x.shape[1] for x in maps]
        width, tokens = sum(channels), spec.grid[0] * spec.grid[1]
        products = tokens * sum(c * c for c in channels)
        if spec.channel_heads:
            products += spec.blocks * (tokens * width * (width + 1) // 2 + tokens * width**2)
        if spec.spatial_heads:
            products += spec.blocks * tokens**2 * (len(maps) * width + width)
        return 2 * maps[0].shape[0] * products

    @register_flop_formula(torch.ops.dca_kernels.refine_backward, get_raw=True)
    def refine_backward(douts: Any, maps: Sequence[Tensor], parameters: Any, saved: Any, *rest: Any, **_: Any) -> int:
        """For each image, back to the first stage that is asked for: what each product of the forward takes.

        A convolution two, the mixing three with the covariance, the scores and values of a scale two and three.
        """
        *numbers, wanted = rest
        spec, channels = Spec(*numbers), [x.shape[1] for x in maps]
        width, tokens = sum(channels), spec.grid[0] * spec.grid[1]
        attentions = []
        for _block in range(spec.blocks):
            attentions += [3 * tokens * width**2] if spec.channel_heads else []
            attentions += [tokens**2 * (2 * len(maps) * width + 3 * width)] if spec.spatial_heads else []
        first = max(pipeline._first_wanted(spec, wanted) - 1, 0)
        products = 2 * tokens * sum(c * c for c in channels) + sum(attentions[first:])
        return 2 * maps[0].shape[0] * products
