"""The `triton` backend: the four stages as kernels, each of which prepares its tokens for the next."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dca_kernels import launch
from dca_kernels.channel_attention import channel_attention, channel_attention_backward
from dca_kernels.fused import uses_batch_statistics
from dca_kernels.patch_embed import patch_embed
from dca_kernels.spatial_attention import spatial_attention, spatial_attention_backward
from dca_kernels.tokens import layer_norm_backward
from dca_kernels.upsample import map_gradients, upsample, upsample_backward

MAX_OFFSET = 2**31  # elements: within one image the kernels' indices have 32 bit


def refine(dca: Any, maps: Sequence[Tensor], norms: Sequence[Any], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """The skip maps refined by a DCA's blocks: at most eight launches where it has one block.

    Args:
        dca: the module that holds the parameters.
        maps: S tensors (B, C_i, H_i, W_i), any strides.
        norms: S BatchNorms; where None, the map is returned as it enters BatchNorm and ReLU.
        dtypes: dtype of each output.

    Returns:
        S tensors (B, C_i, H_i, W_i). Tokens and the operands of products have the maps' dtype, under autocast its own;
        sums and statistics are float32, or float64 for float64 maps.

    Raises:
        ValueError: a map's image is too large for 32-bit indices, or a size too large for the kernels' tiles.
    """
    _check(maps)
    parameters = _parameters(dca, norms)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*maps, *parameters)):
        return list(_Refine.apply(dca, norms, dtypes, len(maps), *maps, *parameters))
    return _forward(dca, maps, norms, dtypes, training=False)[0]


@dataclass
class _Saved:
    """What the backward needs of each stage."""

    pooled: Tensor
    attentions: list[Any]
    upsampled: Any


def _forward(
    dca: Any, maps: Sequence[Tensor], norms: Sequence[Any], dtypes: Sequence[torch.dtype], training: bool
) -> tuple[list[Tensor], _Saved | None]:
    autocast = torch.is_autocast_enabled(maps[0].device.type) and maps[0].dtype != torch.float64
    dtype = torch.get_autocast_dtype(maps[0].device.type) if autocast else maps[0].dtype
    blocks, first = list(dca.attention), None
    if dca.channel_att:
        first = blocks[0].channel_norm
    elif dca.spatial_att:
        first = blocks[0].spatial_norm
    from_batch = [norm is not None and uses_batch_statistics(norm) for norm in norms]
    tokens, moments, pooled = patch_embed(maps, dca.avg_map, dca.grid, dtype, first, from_batch, training)
    attentions: list[Any] = []
    for block in blocks:
        saved: Any
        if dca.channel_att:
            following = block.spatial_norm if dca.spatial_att else None
            tokens, saved = channel_attention(tokens, block.channel_norm, block.c_attention, following)
            attentions.append(saved)
        if dca.spatial_att:
            tokens, saved = spatial_attention(tokens, block.spatial_norm, block.s_attention, training)
            attentions.append(saved)
    outs, upsampled = upsample(tokens, maps, moments, dca.upconvs, norms, dca.grid, dtypes, training)
    return outs, None if pooled is None else _Saved(pooled, attentions, upsampled)


def _parameters(dca: Any, norms: Sequence[Any]) -> list[Tensor | None]:
    """Every weight and bias that the stages use, in the order of `_gradients`."""
    modules = [launch.depthwise(m) for m in dca.avg_map]
    for block in dca.attention:
        for kind, layer_norms in (("c_attention", "channel_norm"), ("s_attention", "spatial_norm")):
            if hasattr(block, kind):
                modules += getattr(block, layer_norms)
                for name in ("q_map", "k_map", "v_map", "projection"):
                    modules += [launch.depthwise(getattr(attention, name)) for attention in getattr(block, kind)]
    modules += [upconv.conv.conv for upconv in dca.upconvs]
    used = [t for module in modules for t in (module.weight, module.bias)]
    return used + [t for norm in norms for t in ((None, None) if norm is None else (norm.weight, norm.bias))]


class _Refine(torch.autograd.Function):
    """The forward, and its backward by kernels: once, deterministic."""

    @staticmethod
    def forward(ctx: Any, dca: Any, norms: Any, dtypes: Any, scales: int, *tensors: Any) -> tuple[Tensor, ...]:
        outs, ctx.saved = _forward(dca, tensors[:scales], norms, dtypes, training=True)
        ctx.dca, ctx.norms, ctx.scales = dca, norms, scales
        ctx.save_for_backward(*tensors)  # an error where one was changed in place
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        dmaps, gradients = _backward(
            ctx.dca, ctx.norms, ctx.saved, douts, any(ctx.needs_input_grad[4 : 4 + ctx.scales])
        )
        parameters = tensors[ctx.scales :]
        shaped = [
            None if t is None else g.reshape(t.shape).to(t.dtype) for g, t in zip(gradients, parameters, strict=True)
        ]
        wanted = ctx.needs_input_grad[4:]
        return None, None, None, None, *(g if need else None for g, need in zip((*dmaps, *shaped), wanted, strict=True))


def _backward(
    dca: Any, norms: Sequence[Any], saved: _Saved, douts: Sequence[Tensor], for_maps: bool
) -> tuple[list[Tensor | None], list[Tensor]]:
    """Gradients of the maps (None where they are not asked for), and of `_parameters`."""
    from_batch = [norm is not None and uses_batch_statistics(norm) for norm in norms]
    kept = [False] * len(norms)
    widths = saved.upsampled.tokens.channels
    last = upsample_backward(saved.upsampled, douts, dca.upconvs, norms, dca.grid)
    norm_weight, norm_bias, conv_bias = (row.split(widths) for row in last.norms[:3])
    after = [g for pair in zip(last.convs, conv_bias, strict=True) for g in pair]
    after += [g for pair in zip(norm_weight, norm_bias, strict=True) for g in pair]

    dtokens = last.tokens
    between: list[Tensor] = []
    stages = list(saved.attentions)
    for block in reversed(dca.attention):
        gradients: list[Tensor] = []
        if dca.spatial_att:
            removed = from_batch if len(stages) == len(saved.attentions) else kept
            kept_by = stages.pop()
            spatial = spatial_attention_backward(kept_by, dtokens, block.s_attention, removed)
            dtokens, affine = layer_norm_backward(
                kept_by.tokens, block.spatial_norm, spatial.normalised, spatial.values, dtokens
            )
            q_weight, q_bias, k_weight, *others = spatial.parameters
            k_bias = tuple(torch.zeros_like(g) for g in k_weight)
            gradients = _interleaved(
                *(row.split(widths) for row in affine), q_weight, q_bias, k_weight, k_bias, *others
            )
        if dca.channel_att:
            removed = from_batch if len(stages) == len(saved.attentions) else kept
            channel = channel_attention_backward(stages.pop(), dtokens, block.channel_norm, block.c_attention, removed)
            dtokens = channel.tokens
            gradients = _interleaved(*(row.split(widths) for row in channel.affine), *channel.parameters) + gradients
        between = gradients + between

    weight, bias = (dtokens * saved.pooled).sum((0, 1)), dtokens.sum((0, 1))
    before = _interleaved(weight.split(widths), bias.split(widths))
    dmaps: list[Any] = [None] * len(norms)
    if for_maps:
        dmaps = map_gradients(saved.upsampled, last, dtokens, douts, dca.avg_map, norms, dca.grid)
    return dmaps, before + between + after


def _interleaved(*groups: Sequence[Tensor]) -> list[Tensor]:
    """weights, biases, weights, biases, ... of S each -> weight, bias of each scale, then those of the next."""
    pairs = zip(groups[::2], groups[1::2], strict=True)
    return [g for weights, biases in pairs for pair in zip(weights, biases, strict=True) for g in pair]


def _check(maps: Sequence[Tensor]) -> None:
    """Raise for what the kernels do not take, before any of them runs."""
    for i, x in enumerate(maps):
        last = sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
        if last >= MAX_OFFSET:
            raise ValueError(
                f"maps[{i}]: expected an image whose elements lie within {MAX_OFFSET} of the first, got {last}"
            )
