"""What the kernels take of a module: its tensors in lists, and plain numbers for all else, as an operator does."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dca_kernels.fused import uses_batch_statistics

ALIGNMENT = 16  # bytes


def power_of_two(size: int) -> int:
    """The smallest one that is not below `size`."""
    return 1 << (size - 1).bit_length()


class Affine(NamedTuple):
    """A weight and a bias: of a depthwise projection (C, 1, 1, 1) or of a convolution (C_i, C_i, 1, 1), and (C)."""

    weight: Tensor
    bias: Tensor


class LayerNorm(NamedTuple):
    """One scale's LayerNorm: (C_i)."""

    weight: Tensor
    bias: Tensor
    eps: float


class BatchNorm(NamedTuple):
    """One scale's BatchNorm.

    Attributes:
        weight, bias: (C_i) or None.
        running_mean, running_var: (C_i) or None.
        counter: `num_batches_tracked`, or None.
        eps: as PyTorch's.
        momentum: as PyTorch's; None is a cumulative average.
        from_batch: whether it normalises by the batch's statistics.
        updates: whether this forward updates its buffers.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    counter: Tensor | None
    eps: float
    momentum: float | None
    from_batch: bool
    updates: bool


class Attention(NamedTuple):
    """One attention; each list has one element a scale."""

    heads: list[int]
    norms: list[LayerNorm]
    q_maps: list[Affine]
    k_maps: list[Affine]
    v_maps: list[Affine]
    projections: list[Affine]


class Parameters(NamedTuple):
    """Every parameter and buffer, a stage at a time; an attention that is switched off is None."""

    avg_map: list[Affine]
    blocks: list[tuple[Attention | None, Attention | None]]  # channel, spatial
    upconvs: list[Affine]
    norms: list[BatchNorm | None]  # None: the map is returned as it enters BatchNorm


class Spec(NamedTuple):
    """What is not a tensor; lists over scales, over blocks and scales for `*_eps` of the attentions.

    Attributes:
        grid: P_h, P_w.
        blocks: how many.
        channel_heads, spatial_heads: empty where the attention is switched off.
        channel_eps, spatial_eps: of the LayerNorms.
        fused: whether BatchNorm and ReLU are part of the forward.
        affine: for each scale twice, whether a fused BatchNorm has a weight, and a bias.
        buffered: whether a fused BatchNorm has running buffers.
        counted: whether it has a counter.
        from_batch, updates, norm_eps, momenta: see `BatchNorm`; a momentum of -1 is None.
        dtype: of the tokens and of the operands of products.
    """

    grid: list[int]
    blocks: int
    channel_heads: list[int]
    spatial_heads: list[int]
    channel_eps: list[float]
    spatial_eps: list[float]
    fused: list[bool]
    affine: list[bool]
    buffered: list[bool]
    counted: list[bool]
    from_batch: list[bool]
    updates: list[bool]
    norm_eps: list[float]
    momenta: list[float]
    dtype: torch.dtype

    @property
    def attentions(self) -> int:
        """How many there are, of all blocks."""
        return self.blocks * (bool(self.channel_heads) + bool(self.spatial_heads))


def describe(dca: Any, norms: Sequence[Any], dtype: torch.dtype) -> Spec:
    """The numbers of a module.

    Args:
        dca: the module that holds the parameters.
        norms: S BatchNorms; where None, the map is returned as it enters BatchNorm and ReLU.
        dtype: of the tokens.
    """
    blocks = list(dca.attention)
    return Spec(
        list(dca.grid),
        len(blocks),
        list(dca.channel_head) if dca.channel_att else [],
        list(dca.spatial_head) if dca.spatial_att else [],
        [norm.eps for block in blocks if dca.channel_att for norm in block.channel_norm],
        [norm.eps for block in blocks if dca.spatial_att for norm in block.spatial_norm],
        [norm is not None for norm in norms],
        [norm is not None and t is not None for norm in norms for t in _affine_of(norm)],
        [norm is not None and norm.running_mean is not None for norm in norms],
        [norm is not None and norm.num_batches_tracked is not None for norm in norms],
        [norm is not None and uses_batch_statistics(norm) for norm in norms],
        [norm is not None and _updates(norm) for norm in norms],
        [0.0 if norm is None else norm.eps for norm in norms],
        [-1.0 if norm is None or norm.momentum is None else norm.momentum for norm in norms],
        dtype,
    )


def flatten(dca: Any, norms: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters, each weight followed by its bias, and the buffers of a module, in the order of `unflatten`."""
    modules = [m.leaf for m in dca.avg_map]
    for block in dca.attention:
        for layer_norms, attentions in (("channel_norm", "c_attention"), ("spatial_norm", "s_attention")):
            if hasattr(block, attentions):
                modules.extend(getattr(block, layer_norms))
                for name in ("q_map", "k_map", "v_map", "projection"):
                    modules += [getattr(attention, name).leaf for attention in getattr(block, attentions)]
    modules += [upconv.leaf for upconv in dca.upconvs]
    parameters = [t for module in modules for t in (module.weight, module.bias) if t is not None]
    parameters += [t for norm in norms for t in _affine_of(norm) if t is not None]
    fused = [norm for norm in norms if norm is not None]
    buffers = [t for norm in fused for t in (norm.running_mean, norm.running_var, norm.num_batches_tracked)]
    return parameters, [t for t in buffers if t is not None]


def unflatten(spec: Spec, parameters: Sequence[Tensor], buffers: Sequence[Tensor] | None) -> Parameters:
    """The lists of `flatten`, a stage at a time; a backward has no buffers."""
    scales = len(spec.fused)
    rest = map(_as_kernels_take_it, parameters)
    state = iter(buffers or ())

    def affine() -> list[Affine]:
        return [Affine(next(rest), next(rest)) for _ in range(scales)]

    def attention(heads: list[int], eps: Sequence[float]) -> Attention | None:
        if not heads:
            return None
        norms = [LayerNorm(*pair, e) for pair, e in zip(affine(), eps, strict=True)]
        return Attention(heads, norms, affine(), affine(), affine(), affine())

    avg_map = affine()
    blocks = []
    for k in range(spec.blocks):
        own = slice(k * scales, (k + 1) * scales)
        channel = attention(spec.channel_heads, spec.channel_eps[own])
        blocks.append((channel, attention(spec.spatial_heads, spec.spatial_eps[own])))
    upconvs = affine()
    norms: list[BatchNorm | None] = []
    for i in range(scales):
        weight, bias = (next(rest) if there else None for there in spec.affine[2 * i : 2 * i + 2])
        of_buffers = (spec.buffered[i], spec.buffered[i], spec.counted[i])
        mean, variance, counter = (next(state) if there and buffers is not None else None for there in of_buffers)
        momentum = None if spec.momenta[i] == -1.0 else spec.momenta[i]
        norm = BatchNorm(
            weight, bias, mean, variance, counter, spec.norm_eps[i], momentum, spec.from_batch[i], spec.updates[i]
        )  # fmt: skip
        norms.append(norm if spec.fused[i] else None)
    return Parameters(avg_map, blocks, upconvs, norms)


def _as_kernels_take_it(parameter: Tensor) -> Tensor:
    """Contiguous, and at an address that is a multiple of 16 bytes.

    Triton compiles another kernel for any other address; a copy is faster by far.
    """
    contiguous = parameter.contiguous()
    return contiguous if contiguous.data_ptr() % ALIGNMENT == 0 else contiguous.clone()


def _affine_of(norm: Any) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if norm is None else (norm.weight, norm.bias)


def _updates(norm: Any) -> bool:
    """Whether BatchNorm updates its running buffers in this forward."""
    return norm.training and norm.track_running_stats and norm.running_mean is not None
