"""What a backend is given: the tensors and numbers of a DCA by name, read off the module once a call.

A backend has a function for each stage, `patch_embed`, `channel_attention`, `spatial_attention` and `upsample`, and
each takes what the stage before it made, and the contract. Tensors come first in each structure, numbers behind them.

Shapes: S scales, C_i channels of scale i, C = sum of C_i, P_h x P_w the token grid.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from dca_kernels import layers

Structure = TypeVar("Structure", bound=tuple)


class Affine(NamedTuple):
    """A weight and a bias.

    (C, 1, 1, 1) and (C) of a depthwise projection, (C_i, C_i, 1, 1) and (C_i) of a convolution, (C_i) of a LayerNorm.
    """

    weight: Tensor
    bias: Tensor


class Projections(NamedTuple):
    """The depthwise projections of one scale of an attention.

    Those of the channel attention have C_i, C, C and C_i channels, those of the spatial attention C, C, C_i and C_i.
    """

    query: Affine
    key: Affine
    value: Affine
    output: Affine


class Attention(NamedTuple):
    """One scale of an attention.

    Attributes:
        norm: its LayerNorm's weight and bias.
        projections: query, key, value and output.
        heads: how many.
        eps: LayerNorm's.
        shift_cancels: whether a BatchNorm that takes the batch's mean follows with nothing but a convolution between:
            a constant that is added to a channel changes nothing then, and its gradient is zero.
    """

    norm: Affine
    projections: Projections
    heads: int
    eps: float
    shift_cancels: bool


class Block(NamedTuple):
    """One block: S scales of each attention, None where it is switched off."""

    channel_attention: tuple[Attention, ...] | None
    spatial_attention: tuple[Attention, ...] | None


class BatchNorm(NamedTuple):
    """One scale's BatchNorm, without its buffers.

    Attributes:
        weight, bias: (C_i), or None.
        eps: as PyTorch's.
        momentum: as PyTorch's; None is a cumulative average.
        from_batch: whether it normalises by the batch's statistics rather than by its buffers.
        updates: whether this forward updates its buffers.
    """

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    momentum: float | None
    from_batch: bool
    updates: bool


class Buffers(NamedTuple):
    """One scale's BatchNorm buffers: (C_i), (C_i) and (), each None where it has none."""

    mean: Tensor | None
    variance: Tensor | None
    counter: Tensor | None


class Contract(NamedTuple):
    """A DCA and one call of it.

    Attributes:
        patch_embed: S depthwise projections.
        blocks: of attentions, in sequence.
        upsample: S dense 1x1 convolutions.
        norms: S BatchNorms; where None, the map is returned as it enters BatchNorm and ReLU.
        buffers: theirs; the last tensors of the contract, since they have no gradients.
        grid: (P_h, P_w).
        dtype: of the operands of large products.
        output_dtypes: of the S outputs.
        backward: whether gradients may be asked for.
    """

    patch_embed: tuple[Affine, ...]
    blocks: tuple[Block, ...]
    upsample: tuple[Affine, ...]
    norms: tuple[BatchNorm | None, ...]
    buffers: tuple[Buffers | None, ...]
    grid: tuple[int, int]
    dtype: torch.dtype
    output_dtypes: tuple[torch.dtype, ...]
    backward: bool


Get = Callable[[nn.Module, str], Any]


def read(
    dca: Any,
    norms: Sequence[nn.BatchNorm2d | None],
    dtype: torch.dtype,
    output_dtypes: Sequence[torch.dtype],
    get: Get = getattr,
) -> Contract:
    """The contract of a module, for a call with gradients where they are enabled.

    Args:
        dca: the module, whose submodules have been checked.
        norms: S BatchNorms; where None, the map is returned as it enters BatchNorm and ReLU.
        dtype: of the operands of large products.
        output_dtypes: of the S outputs.
        get: what stands for a module's tensor of a name.
    """
    cancels = [norm is not None and uses_batch_statistics(norm) for norm in norms]
    kept, last = [False] * len(cancels), len(dca.attention) - 1
    blocks = []
    for i, block in enumerate(dca.attention):
        channel = spatial = None
        if dca.channel_att:
            is_last = i == last and not dca.spatial_att
            channel = _attention(block.norms("channel_norm"), block.c_attention, cancels if is_last else kept, get)
        if dca.spatial_att:
            spatial = _attention(block.norms("spatial_norm"), block.s_attention, cancels if i == last else kept, get)
        blocks.append(Block(channel, spatial))
    return Contract(
        patch_embed=tuple([_affine(embedding.convolution, get) for embedding in dca.avg_map]),
        blocks=tuple(blocks),
        upsample=tuple([_affine(upconv.convolution, get) for upconv in dca.upconvs]),
        norms=tuple([None if norm is None else _batch_norm(norm, get) for norm in norms]),
        buffers=tuple([None if norm is None else _buffers(norm, get) for norm in norms]),
        grid=dca.grid,
        dtype=dtype,
        output_dtypes=tuple(output_dtypes),
        backward=torch.is_grad_enabled(),
    )


def _attention(
    norms: Iterable[nn.LayerNorm],
    attentions: Iterable[layers.ChannelAttention | layers.SpatialAttention],
    cancels: Iterable[bool],
    get: Get,
) -> tuple[Attention, ...]:
    return tuple(
        [
            Attention(
                _affine(norm, get),
                Projections(
                    _affine(attention.q_map.convolution, get),
                    _affine(attention.k_map.convolution, get),
                    _affine(attention.v_map.convolution, get),
                    _affine(attention.projection.convolution, get),
                ),
                attention.heads,
                norm.eps,
                shift_cancels,
            )
            for norm, attention, shift_cancels in zip(norms, attentions, cancels, strict=True)
        ]
    )


def _affine(module: nn.Conv2d | nn.LayerNorm, get: Get) -> Affine:
    return Affine(get(module, "weight"), get(module, "bias"))  # `plain.hooked` refuses one without a bias


def _batch_norm(norm: nn.BatchNorm2d, get: Get) -> BatchNorm:
    updates = norm.training and norm.track_running_stats and norm.running_mean is not None
    affine = get(norm, "weight"), get(norm, "bias")
    cumulative = norm.momentum is None and norm.num_batches_tracked is not None
    momentum = None if cumulative else float(norm.momentum or 0.0)  # without a counter, as PyTorch
    return BatchNorm(*affine, float(norm.eps), momentum, uses_batch_statistics(norm), updates)


def _buffers(norm: nn.BatchNorm2d, get: Get) -> Buffers:
    return Buffers(*[get(norm, name) for name in ("running_mean", "running_var", "num_batches_tracked")])


def attentions_of(contract: Contract) -> Iterator[tuple[Attention, ...]]:
    """The attentions of all blocks, in sequence."""
    return (attention for block in contract.blocks for attention in block if attention is not None)


def channels_of(contract: Contract) -> tuple[int, ...]:
    """C_i of each scale."""
    return tuple([len(projection.bias) for projection in contract.patch_embed])


def learned(contract: Contract) -> Contract:
    """The contract without BatchNorm's buffers: all its tensors are parameters."""
    return contract._replace(buffers=())


# The rules of BatchNorm


def uses_batch_statistics(norm: nn.BatchNorm2d) -> bool:
    """Whether BatchNorm normalises by the batch's mean and variance rather than by its buffers."""
    return norm.training or norm.running_mean is None


def from_batch(contract: Contract) -> tuple[bool, ...]:
    """For each scale, whether its BatchNorm takes the batch's statistics."""
    return tuple([norm is not None and norm.from_batch for norm in contract.norms])


def update_buffers(norm: BatchNorm, buffers: Buffers, mean: Tensor, variance: Tensor, count: int) -> None:
    """What BatchNorm2d does to its buffers in a forward in train mode.

    Args:
        norm: its rule.
        buffers: changed in place where the rule says so.
        mean, variance: (C_i) of the batch, the variance biased.
        count: values a channel.
    """
    if not norm.updates or buffers.mean is None or buffers.variance is None:
        return
    momentum: float | Tensor | None = norm.momentum
    if buffers.counter is not None:
        buffers.counter.add_(1)
        if momentum is None:
            momentum = buffers.counter.to(mean.dtype).reciprocal()
    if count == 0 or momentum is None:
        return
    unbiased = variance * (count / (count - 1))
    for buffer, value in ((buffers.mean, mean), (buffers.variance, unbiased)):
        buffer.copy_((1 - momentum) * buffer.to(value.dtype) + momentum * value)  # infinite stays infinite


# Structures: tuples, named or not, of structures, tensors and whatever else


def flatten(structure: object) -> list[Tensor]:
    """Its tensors, in their order."""
    found: list[Tensor] = []
    _collect((structure,), found)
    return found


def _collect(parts: tuple[object, ...], found: list[Tensor]) -> None:
    for part in parts:
        if isinstance(part, tuple):
            _collect(part, found)
        elif isinstance(part, Tensor):
            found.append(part)


def unflatten(structure: Structure, tensors: Iterator[Tensor]) -> Structure:
    """A structure with the next of `tensors` in the place of each of its own."""
    parts = [
        unflatten(part, tensors) if isinstance(part, tuple) else next(tensors) if isinstance(part, Tensor) else part
        for part in structure
    ]
    return tuple.__new__(type(structure), parts)  # of a NamedTuple's class as well


def skeleton(structure: Structure) -> Structure:
    """The structure with one and the same empty tensor in the place of each of its own, for `unflatten`."""
    return unflatten(structure, itertools.repeat(torch.empty(0)))


def in_place_of(structure: tuple[object, ...], other: tuple[object, ...] | None) -> list[Tensor | None]:
    """For each tensor of a structure, what another one of its shape has there; None where it, or a part, is None."""
    found: list[Tensor | None] = []
    for i, part in enumerate(structure):
        its = None if other is None else other[i]
        if isinstance(part, tuple):
            found += in_place_of(part, its if isinstance(its, tuple) else None)
        elif isinstance(part, Tensor):
            found.append(its if isinstance(its, Tensor) else None)
    return found


# What maps and dtypes say to both backends


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of sums and statistics: float64 for float64, float32 for every other floating dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last for a channels_last map, else contiguous."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format
