"""The `triton` backend: the four stages as kernels, each of which prepares its tokens for the next."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dca_kernels.channel_attention import channel_attention
from dca_kernels.fused import uses_batch_statistics
from dca_kernels.patch_embed import patch_embed
from dca_kernels.spatial_attention import spatial_attention
from dca_kernels.upsample import upsample

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
        RuntimeError: a gradient is asked for: there are no backward kernels yet.
    """
    _check(dca, maps)
    autocast = torch.is_autocast_enabled(maps[0].device.type) and maps[0].dtype != torch.float64
    dtype = torch.get_autocast_dtype(maps[0].device.type) if autocast else maps[0].dtype
    blocks, first = list(dca.attention), None
    if dca.channel_att:
        first = blocks[0].channel_norm
    elif dca.spatial_att:
        first = blocks[0].spatial_norm
    from_batch = [norm is not None and uses_batch_statistics(norm) for norm in norms]
    tokens, moments = patch_embed(maps, dca.avg_map, dca.grid, dtype, first, from_batch)
    for block in blocks:
        if dca.channel_att:
            following = block.spatial_norm if dca.spatial_att else None
            tokens = channel_attention(tokens, block.channel_norm, block.c_attention, following)
        if dca.spatial_att:
            tokens = spatial_attention(tokens, block.spatial_norm, block.s_attention)
    return upsample(tokens, maps, moments, dca.upconvs, norms, dca.grid, dtypes)


def _check(dca: Any, maps: Sequence[Tensor]) -> None:
    """Raise for what the kernels do not take, before any of them runs."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*maps, *dca.parameters())):
        raise RuntimeError(
            "the 'triton' backend has no backward yet: call it under torch.no_grad(), or use the 'torch' backend"
        )
    for i, x in enumerate(maps):
        last = sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
        if last >= MAX_OFFSET:
            raise ValueError(
                f"maps[{i}]: expected an image whose elements lie within {MAX_OFFSET} of the first, got {last}"
            )
