"""What kernels are given of a contract, each a tuple with one element a scale; and gradients as the contract has them.

Of 32 pointers in eight tuples Triton's JIT launches in 13 us, of the same in a nested structure a scale in 22.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dca_kernels.contract import Affine, Attention, BatchNorm, Buffers, Contract, Projections, flatten, learned

Tensors = tuple[Tensor, ...]
Optionals = tuple[Tensor | None, ...]


class AffinePointers(NamedTuple):
    """Weights and biases; of a BatchNorm either may be None."""

    weight: Optionals
    bias: Optionals


class ProjectionPointers(NamedTuple):
    """The depthwise projections of an attention, see `dca_kernels.contract.Projections`."""

    query_weight: Tensors
    query_bias: Tensors
    key_weight: Tensors
    key_bias: Tensors
    value_weight: Tensors
    value_bias: Tensors
    output_weight: Tensors
    output_bias: Tensors


class BufferPointers(NamedTuple):
    """BatchNorms' buffers, None where there are none."""

    mean: Optionals
    variance: Optionals
    counter: Optionals


def affines_of(scales: Sequence[Affine]) -> AffinePointers:
    """Of depthwise projections or of convolutions."""
    return AffinePointers(*zip(*scales, strict=True))


def batch_norms_of(norms: Sequence[BatchNorm | None]) -> AffinePointers:
    """BatchNorms' weights and biases, None where there is no BatchNorm."""
    return AffinePointers(*zip(*[(None, None) if norm is None else norm[:2] for norm in norms], strict=True))


def buffers_of(scales: Sequence[Buffers | None]) -> BufferPointers:
    """BatchNorms' buffers."""
    return BufferPointers(
        *zip(*[(None, None, None) if buffers is None else buffers for buffers in scales], strict=True)
    )


def layer_norms_of(attention: Sequence[Attention]) -> AffinePointers:
    """LayerNorms' weights and biases."""
    return AffinePointers(*zip(*[scale.norm for scale in attention], strict=True))


def projections_of(attention: Sequence[Attention]) -> ProjectionPointers:
    """The depthwise projections of an attention."""
    flat = [(*q, *k, *v, *out) for q, k, v, out in (scale.projections for scale in attention)]
    return ProjectionPointers(*zip(*flat, strict=True))


def heads_of(attention: Sequence[Attention]) -> tuple[int, ...]:
    """How many heads each scale has."""
    return tuple([scale.heads for scale in attention])


def eps_of(attention: Sequence[Attention]) -> tuple[float, ...]:
    """LayerNorms' eps."""
    return tuple([scale.eps for scale in attention])


def cancels_of(attention: Sequence[Attention]) -> tuple[bool, ...]:
    """For each scale, whether a constant added to a channel changes nothing."""
    return tuple([scale.shift_cancels for scale in attention])


def promoted(tensors: Sequence[Tensor]) -> torch.dtype:
    """What their dtypes promote to."""
    return functools.reduce(torch.promote_types, [t.dtype for t in tensors])


def gradient_dtype(contract: Contract) -> torch.dtype:
    """Of all parameters' gradients, as the kernels write them: they share one allocation."""
    return promoted(flatten(learned(contract)))


def attention_gradients(
    attention: Sequence[Attention], of_all: dict[str, Tensor], of_scale: dict[str, Tensor], norm: Tensor
) -> tuple[Attention, ...]:
    """An attention's gradients as the contract has the parameters: views.

    Args:
        attention: the S scales.
        of_all: of the projections of all channels, by name: (S, 2, C), a weight and a bias.
        of_scale: of those of a scale's channels: (2, C).
        norm: of the LayerNorms, (2, C).
    """
    channels = [len(scale.norm.bias) for scale in attention]
    found: dict[str, list[Affine]] = {
        name: [Affine(*rows.unbind()) for rows in t.unbind()] for name, t in of_all.items()
    }
    for name, rows in (of_scale | {"norm": norm}).items():
        weights, biases = (row.split(channels) for row in rows.unbind())
        found[name] = list(map(Affine, weights, biases))
    norms = found.pop("norm")
    scales = []
    for i, scale in enumerate(attention):
        projections = Projections(**{name: affines[i] for name, affines in found.items()})
        scales.append(Attention(norms[i], projections, *scale[2:]))
    return tuple(scales)
