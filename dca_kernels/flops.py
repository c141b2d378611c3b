"""Floating point operations of both backends' operators, for `torch.utils.flop_counter.FlopCounterMode`.

Import this before you make a counter. No other module of the package imports it, since PyTorch's counter imports
triton. Like PyTorch's formulas, these count products of matrices, two operations for each multiplication. The `torch`
backend interpolates by such products. The kernels interpolate by a few weights a pixel; these are left out, as
PyTorch's formulas leave out those of `F.interpolate`.

Shapes are those of `dca_kernels.torch_backend`.
"""

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dca_kernels.torch_backend.spatial_tiles import tile_spans


@register_flop_formula(torch.ops.dca_kernels.spatial_attention, get_raw=True)
def spatial_attention(tokens: Tensor, values: Tensor, weight: Tensor, key_scores: Tensor, **_: object) -> int:
    """Scores on and above the diagonal's tiles, and their product with the values and the normaliser's ones."""
    scores, columns, length = _scores(key_scores), _value_columns(values, key_scores), tokens.shape[1]
    return 2 * scores * tokens.shape[2] + 2 * len(tokens) * length**2 * columns


@register_flop_formula(torch.ops.dca_kernels.spatial_attention_backward, get_raw=True)
def spatial_attention_backward(
    tokens: Tensor, values: Tensor, weight: Tensor, key_scores: Tensor, *_: object, **__: object
) -> int:
    """Scores and their gradients on and above the diagonal's tiles, each with the product that it goes into."""
    scores, columns, length = _scores(key_scores), _value_columns(values, key_scores), tokens.shape[1]
    both = scores * (tokens.shape[2] + 2 * columns)
    return 2 * both + 2 * len(tokens) * length**2 * (columns + tokens.shape[2])


@register_flop_formula(torch.ops.dca_kernels.upsample, get_raw=True)
def upsample(x: Tensor, z: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor | None, *_: object, **__: object) -> int:
    """The interpolation, twice where the batch's statistics are taken first."""
    columns, rows = _interpolation(x, z)
    return columns + rows * (2 if mean is None else 1)


@register_flop_formula(torch.ops.dca_kernels.upsample_backward, get_raw=True)
def upsample_backward(x: Tensor, z: Tensor, *_: object, **__: object) -> int:
    """The interpolation twice, and transposed once."""
    columns, rows = _interpolation(x, z)
    return 2 * columns + 3 * rows


def _scores(key_scores: Tensor) -> int:
    """How many scores are computed, for one head of every image."""
    batch, _, length = key_scores.shape
    sizes = [span.stop - span.start for span in tile_spans(key_scores)]
    return batch * (length**2 + sum(size**2 for size in sizes)) // 2


def _value_columns(values: Tensor, key_scores: Tensor) -> int:
    """Channels of all heads' values, and for each head one more, for the normaliser."""
    return values.shape[2] + key_scores.shape[1]


def _interpolation(x: Tensor, z: Tensor) -> tuple[int, int]:
    """Operations along the columns of a grid, and then along its rows."""
    if x.shape == z.shape:
        return 0, 0
    planes, rows, columns = z.shape[0] * z.shape[1], z.shape[2], z.shape[3]
    return 2 * planes * rows * columns * x.shape[3], 2 * planes * rows * x.shape[2] * x.shape[3]


# The `triton` backend: products of the module's sizes, without what pads them to tiles.

if importlib.util.find_spec("triton") is not None:
    from dca_kernels.contract import Contract, channels_of
    from dca_kernels.triton_backend import operator, passes

    @register_flop_formula(torch.ops.dca_kernels.refine, get_raw=True)
    def refine(
        maps: Sequence[Tensor],
        parameters: Sequence[Tensor],
        buffers: object,
        floats: object,
        text: str,
        *_: object,
        **__: object,
    ) -> int:
        """For each image: covariance up to its diagonal, mixing; scores and values of each scale; convolutions."""
        contract = operator.restored(text, parameters, ())
        width, tokens = sum(channels_of(contract)), contract.grid[0] * contract.grid[1]
        products = _convolutions(contract)
        for block in contract.blocks:
            if block.channel_attention is not None:
                products += tokens * width * (width + 1) // 2 + tokens * width**2
            if block.spatial_attention is not None:
                products += tokens**2 * (len(maps) * width + width)
        return 2 * len(maps[0]) * products

    @register_flop_formula(torch.ops.dca_kernels.refine_backward, get_raw=True)
    def refine_backward(
        douts: object,
        maps: Sequence[Tensor],
        parameters: Sequence[Tensor],
        saved: object,
        floats: object,
        text: str,
        wanted: Sequence[bool],
        **_: object,
    ) -> int:
        """For each image, products of the stages back to the first one with a wanted gradient.

        A convolution takes two, the mixing and its covariance three together, a scale's scores two, its values three.
        """
        contract = operator.restored(text, parameters, ())
        width, tokens = sum(channels_of(contract)), contract.grid[0] * contract.grid[1]
        of_channels, of_tokens = 3 * tokens * width**2, tokens**2 * (2 * len(maps) * width + 3 * width)
        attentions = [
            of_channels if attention is block.channel_attention else of_tokens
            for block in contract.blocks
            for attention in block
            if attention is not None
        ]
        first = max(passes.first_wanted(contract, wanted) - 1, 0)
        return 2 * len(maps[0]) * (2 * _convolutions(contract) + sum(attentions[first:]))

    def _convolutions(contract: Contract) -> int:
        return contract.grid[0] * contract.grid[1] * sum(c * c for c in channels_of(contract))
