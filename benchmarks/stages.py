"""The four stages alone, of each implementation, on the same token values; each as the module would run it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dca_kernels import fused


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


class TorchStage(_Stage):
    """A stage of the `torch` backend, whose tokens are float32, or float64 for float64 maps."""

    def forward(self, *inputs: Tensor) -> Sequence[Tensor]:
        dca, block = self.dca, self.dca.attention[0]
        operands = fused.operand_dtype([dca.avg_map[0].proj.depthwise.weight])  # which has the maps' dtype
        if self.stage == "patch_embed":
            norms = [head[0] for head in dca.bn_relu]
            return fused.patch_embed(inputs, dca.avg_map, dca.grid, norms)[0]
        if self.stage == "channel_attention":
            removed = [False] * len(inputs)
            return fused.channel_attention(inputs, block.channel_norm, block.c_attention, removed, operands)
        if self.stage == "spatial_attention":  # in training BatchNorm behind it removes what it adds to a channel
            removed = [dca.training] * len(inputs)
            return fused.spatial_attention(inputs, block.spatial_norm, block.s_attention, removed, operands)
        scales = len(inputs) // 2
        tokens, maps = inputs[:scales], inputs[scales:]
        dtypes = [x.dtype for x in maps]
        return fused.upsample(tokens, maps, dca.upconvs, [head[0] for head in dca.bn_relu], dca.grid, dtypes)


class TritonStage:
    """A stage of the `triton` backend, its tokens prepared as the stage before leaves them.

    The backward of `upsample` makes the maps' whole gradient, that of `patch_embed` included, in one pass.
    """

    def __init__(self, dca: Any, stage: str, inputs: Sequence[Tensor], gradients: Sequence[Tensor] | None) -> None:
        from dca_kernels import parameters, patch_embed  # these import triton
        from dca_kernels.tokens import Tokens, normalised_of, statistics_of

        self.stage, self.training, self.douts = stage, gradients is not None, gradients
        self.has_backward = self.training and stage != "patch_embed"
        scales, self.dtype = len(dca.features), inputs[0].dtype
        norms = [head[0] for head in dca.bn_relu]
        spec = parameters.describe(dca, norms, self.dtype)
        flat, buffers = parameters.flatten(dca, norms)
        self.parameters = parameters.unflatten(spec, [t.detach() for t in flat], buffers)
        self.grid, self.from_batch, self.channels = dca.grid, spec.from_batch, tuple(dca.features)
        self.of_channels, self.of_tokens = self.parameters.blocks[0]
        self.maps = [x.detach() for x in (inputs if stage == "patch_embed" else inputs[scales:])]
        self.saved: Any = None
        if stage == "patch_embed":
            return
        self.tokens = Tokens(torch.cat([t.detach() for t in inputs[:scales]], 2), self.channels)
        if stage == "channel_attention":
            self.tokens.statistics, self.tokens.sums = statistics_of(self.tokens, self.of_channels.norms)
        elif stage == "spatial_attention":
            self.tokens.normalised, self.tokens.level = normalised_of(self.tokens, self.of_tokens.norms)
        else:
            self.moments = patch_embed.patch_embed(self.maps, *self._embedding())[1]
        if gradients is not None and stage != "upsample":
            self.douts = [torch.cat(list(gradients), 2)]

    def _embedding(self) -> tuple[Any, ...]:
        return self.parameters.avg_map, self.grid, self.dtype, self.of_channels.norms, self.from_batch

    @torch.no_grad()
    def forward(self) -> list[Tensor]:
        from dca_kernels import channel_attention, patch_embed, spatial_attention, upsample

        if self.stage == "patch_embed":
            tokens, _ = patch_embed.patch_embed(self.maps, *self._embedding())
        elif self.stage == "channel_attention":
            following = self.of_tokens.norms
            tokens, self.saved = channel_attention.channel_attention(self.tokens, self.of_channels, following)
        elif self.stage == "spatial_attention":
            tokens, self.saved = spatial_attention.spatial_attention(self.tokens, self.of_tokens, self.training)
        else:
            upconvs, norms = self.parameters.upconvs, self.parameters.norms
            outs, self.saved = upsample.upsample(
                self.tokens, self.maps, self.moments, upconvs, norms, self.grid, self.training
            )
            return outs
        return list(tokens.values.split(self.channels, 2))

    @torch.no_grad()
    def backward(self) -> list[Tensor]:
        """Gradients of the inputs, for `upsample` of its tokens and then of its maps."""
        from dca_kernels import channel_attention, spatial_attention, upsample

        scales, dmaps = len(self.channels), []
        if self.stage == "channel_attention":
            kept = [False] * scales
            dtokens, _ = channel_attention.channel_attention_backward(self.saved, *self.douts, self.of_channels, kept)
        elif self.stage == "spatial_attention":
            removed = self.from_batch
            dtokens, _ = spatial_attention.spatial_attention_backward(self.saved, *self.douts, self.of_tokens, removed)
        else:
            norms = self.parameters.norms
            last = upsample.upsample_backward(self.saved, self.douts, self.parameters.upconvs, norms, self.grid, True)
            dtokens = last.tokens
            none = torch.zeros_like(dtokens)  # what would have come back from the attention
            avg_map, wanted = self.parameters.avg_map, [True] * scales
            dmaps, _ = upsample.map_gradients(
                self.saved, last.removed, none, self.douts, avg_map, norms, self.grid, wanted
            )
        return [*dtokens.split(self.channels, 2), *dmaps]

    def release(self) -> None:
        self.saved = None
