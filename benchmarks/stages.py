"""The four stages alone, of each implementation, on the same token values; each as the module would run it."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dca_kernels import contract, torch_backend
from dca_kernels.contract import Contract


class _Stage(nn.Module):
    """A stage of a module; called with S maps, S token tensors (B, N, C_i), or for `upsample` both, tokens first."""

    def __init__(self, dca: Any, stage: str) -> None:
        super().__init__()
        self.dca, self.stage = dca, stage


class ReferenceStage(_Stage):
    """A stage of the reference."""

    def forward(self, *inputs: Tensor) -> Sequence[Tensor]:
        dca, block = self.dca, self.dca.attention[0]
        if self.stage == "patch_embed":
            return dca.patch_embed(inputs)
        if self.stage == "channel_attention":
            return block.attend(inputs, block.channel_norm, block.c_attention, dca.grid)
        if self.stage == "spatial_attention":
            return block.attend(inputs, block.spatial_norm, block.s_attention, dca.grid)
        scales = len(inputs) // 2
        return dca.upsample(inputs[:scales], inputs[scales:])


def contract_of(dca: Any, backend: ModuleType, dtype: torch.dtype) -> Contract:
    """What a backend is given for maps of a dtype, which is the module's own."""
    norms = [head[0] for head in dca.bn_relu]
    operands = backend.operand_dtype([torch.empty(0, dtype=dtype, device=next(dca.parameters()).device)])
    return contract.read(dca, norms, operands, [dtype] * len(norms))


class TorchStage(_Stage):
    """A stage of the `torch` backend, whose tokens are float32, or float64 for float64 maps."""

    def forward(self, *inputs: Tensor) -> Sequence[Tensor]:
        # The maps have the parameters' dtype.
        its = contract_of(self.dca, torch_backend, next(self.dca.parameters()).dtype)
        if self.stage == "patch_embed":
            return torch_backend.patch_embed.patch_embed(inputs, its)[0]
        if self.stage == "upsample":
            scales = len(inputs) // 2
            return torch_backend.upsample.upsample(inputs[:scales], inputs[scales:], its)
        stage = getattr(torch_backend, self.stage)
        return getattr(stage, self.stage)(inputs, its, 0)


class TritonStage:
    """A stage of the `triton` backend, its tokens prepared as the stage before leaves them.

    The backward of `upsample` makes the maps' whole gradient, that of `patch_embed` included, in one pass.
    """

    def __init__(self, dca: Any, stage: str, inputs: Sequence[Tensor], gradients: Sequence[Tensor] | None) -> None:
        from dca_kernels import triton_backend  # imports triton
        from dca_kernels.triton_backend.tokens import Tokens, with_normalised, with_statistics

        scales, channels, dtype = len(dca.features), tuple(dca.features), inputs[0].dtype
        self.stage, self.channels, self.douts = stage, channels, gradients
        self.has_backward = gradients is not None and stage != "patch_embed"
        self.contract = contract_of(dca, triton_backend, dtype)._replace(backward=gradients is not None)
        self.maps = [x.detach() for x in (inputs if stage == "patch_embed" else inputs[scales:])]
        self.saved: Any = None
        if stage == "patch_embed":
            return
        block = self.contract.blocks[0]
        self.tokens = Tokens(torch.cat([t.detach() for t in inputs[:scales]], 2), channels)
        if stage == "channel_attention":
            self.tokens = with_statistics(self.tokens, block.channel_attention)
        elif stage == "spatial_attention":
            self.tokens = with_normalised(self.tokens, block.spatial_attention, self.contract.backward)
        else:
            self.embedded = triton_backend.patch_embed.patch_embed(self.maps, self.contract)[1]
        if gradients is not None and stage != "upsample":
            self.douts = [torch.cat(list(gradients), 2)]

    @torch.no_grad()
    def forward(self) -> list[Tensor]:
        from dca_kernels import triton_backend

        if self.stage == "upsample":
            outs, self.saved = triton_backend.upsample.upsample(self.tokens, self.embedded, self.contract)
            return outs
        if self.stage == "patch_embed":
            tokens, _ = triton_backend.patch_embed.patch_embed(self.maps, self.contract)
        else:
            stage = getattr(triton_backend, self.stage)
            tokens, self.saved = getattr(stage, self.stage)(self.tokens, self.contract, 0)
        return list(tokens.plain.split(self.channels, 2))

    @torch.no_grad()
    def backward(self) -> list[Tensor]:
        """Gradients of the inputs, for `upsample` of its tokens and then of its maps."""
        from dca_kernels.triton_backend import map_gradient, passes

        if self.stage != "upsample":
            stage = passes.CHANNEL_ATTENTION if self.stage == "channel_attention" else passes.SPATIAL_ATTENTION
            dtokens, _ = stage.backward(self.saved, *self.douts, self.contract, 0)
            return list(dtokens.split(self.channels, 2))
        last = passes.upsample_backward.upsample_backward(self.saved, self.maps, self.douts, self.contract, True)
        none = torch.zeros_like(last.dtokens)  # what would have come back from the attention
        dmaps, _ = map_gradient.map_gradients(
            self.saved, self.maps, last.through_statistics, none, self.douts, self.contract, [True] * len(self.maps)
        )
        return [*last.dtokens.split(self.channels, 2), *dmaps]

    def release(self) -> None:
        self.saved = None
