"""The `torch` backend: the four stages of Dual Cross-Attention by exact algebra, in PyTorch calls.

Every map of the paper's module is affine per channel, so the query, key and value maps fold into their neighbours
(docs/algebra.md derives each step). Tokens travel between the stages as S tensors (B, N, C_i), in float32, or in
float64 for float64 maps; only `upsample` writes the maps' own dtype again. On CUDA the operands of the large products
have 16-bit maps' dtype (`operand_dtype`). Autocast is off meanwhile.

Shapes: B batch, S scales, C_i channels of scale i, C = sum of C_i, H_i x W_i its size, P_h x P_w the token grid,
N = P_h * P_w tokens, h heads, dk = C / h, dv = C_i / h.
"""

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from dca_kernels.contract import Contract, accumulation_dtype, skeleton, unflatten
from dca_kernels.torch_backend import channel_attention, patch_embed, spatial_attention, upsample
from dca_kernels.torch_backend.common import no_autocast


def operand_dtype(maps: Sequence[Tensor]) -> torch.dtype:
    """Of the large products' operands: on CUDA the maps' own, whose products are many times as fast in 16 bit.

    Elsewhere it is the accumulation dtype: CPUs are faster with it, and on ROCm not every product has a float32 result.
    """
    if maps[0].is_cuda and torch.version.hip is None:
        return reduce(torch.promote_types, (x.dtype for x in maps))
    return accumulation_dtype(maps[0].dtype)


def refine(maps: Sequence[Tensor], contract: Contract) -> list[Tensor]:
    """The skip maps refined by a DCA's blocks.

    Args:
        maps: S tensors (B, C_i, H_i, W_i).
        contract: its `dtype` is `operand_dtype(maps)`.

    Returns:
        S tensors (B, C_i, H_i, W_i), of the contract's output dtypes.
    """
    with no_autocast(maps[0]):
        tokens, maps = patch_embed.patch_embed(maps, contract)
        for block in range(len(contract.blocks)):
            tokens = channel_attention.channel_attention(tokens, contract, block)
            tokens = spatial_attention.spatial_attention(tokens, contract, block)
        return upsample.upsample(tokens, maps, contract)


def prepared(
    maps: Sequence[Tensor], contract: Contract
) -> Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]:
    """Calls of the same kind as this one, of maps and of the contract's tensors."""
    its = skeleton(contract)
    return lambda maps, tensors: refine(maps, unflatten(its, iter(tensors)))


def warm_up(maps: Sequence[Tensor], contract: Contract) -> None:
    """Nothing is compiled here."""
