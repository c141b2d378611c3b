"""The four stages alone, of each implementation, on the same token values; each as the module would run it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dca_kernels import fused


class ReferenceStage(nn.Module):
    """A stage of the reference: S maps, S token tensors (B, N, C_i), or for `upsample` both, tokens first."""

    def __init__(self, dca: Any, stage: str) -> None:
        super().__init__()
        self.dca, self.stage = dca, stage

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


class TorchStage(nn.Module):
    """A stage of the `torch` backend, whose tokens are float32, or float64 for float64 maps."""

    def __init__(self, dca: Any, stage: str) -> None:
        super().__init__()
        self.dca, self.stage = dca, stage

    def forward(self, *inputs: Tensor) -> Sequence[Tensor]:
        dca, block = self.dca, self.dca.attention[0]
        if self.stage == "patch_embed":
            return fused.patch_embed(inputs, dca.avg_map, dca.grid)[0]
        if self.stage == "channel_attention":
            return fused.channel_attention(inputs, block.channel_norm, block.c_attention, [False] * len(inputs))
        if self.stage == "spatial_attention":  # in training BatchNorm behind it removes what it adds to a channel
            removed = [dca.training] * len(inputs)
            return fused.spatial_attention(inputs, block.spatial_norm, block.s_attention, removed)
        scales = len(inputs) // 2
        tokens, maps = inputs[:scales], inputs[scales:]
        dtypes = [x.dtype for x in maps]
        return fused.upsample(tokens, maps, dca.upconvs, [head[0] for head in dca.bn_relu], dca.grid, dtypes)


class TritonStage:
    """A stage of the `triton` backend, its tokens prepared as the stage before leaves them.

    The backward of `upsample` makes the maps' whole gradient, that of `patch_embed` included, in one pass.
    """

    def __init__(self, dca: Any, stage: str, inputs: Sequence[Tensor], gradients: Sequence[Tensor] | None) -> None:
        from dca_kernels.tokens import Tokens, normalised_of, statistics_of  # imports triton

        self.dca, self.stage, self.training = dca, stage, gradients is not None
        self.has_backward = self.training and stage != "patch_embed"
        self.norms = [head[0] for head in dca.bn_relu]
        scales = len(dca.features)
        self.maps = list(inputs if stage == "patch_embed" else inputs[scales:])
        self.saved: Any = None
        self.moments: Any = None
        self.douts = gradients
        if stage == "patch_embed":
            return
        values = [t.detach() for t in inputs[:scales]]
        self.tokens = Tokens(torch.cat(values, 2), tuple(dca.features))
        block = dca.attention[0]
        if stage == "channel_attention":
            self.tokens.statistics, self.tokens.sums = statistics_of(self.tokens, block.channel_norm)
        elif stage == "spatial_attention":
            self.tokens.normalised, self.tokens.level = normalised_of(self.tokens, block.spatial_norm)
        elif self.training:
            self.moments = self._embed()[1]
        if stage != "upsample" and gradients is not None:
            self.douts = [torch.cat(list(gradients), 2).to(self.tokens.accumulation)]

    def _embed(self) -> Any:
        from dca_kernels.patch_embed import patch_embed

        dca = self.dca
        from_batch = [self.training] * len(self.maps)
        dtype, following = self.maps[0].dtype, dca.attention[0].channel_norm
        return patch_embed(self.maps, dca.avg_map, dca.grid, dtype, following, from_batch, self.training)

    @torch.no_grad()
    def forward(self) -> list[Tensor]:
        from dca_kernels.channel_attention import channel_attention
        from dca_kernels.spatial_attention import spatial_attention
        from dca_kernels.upsample import upsample

        dca, block = self.dca, self.dca.attention[0]
        if self.stage == "patch_embed":
            tokens = self._embed()[0]
        elif self.stage == "channel_attention":
            tokens, self.saved = channel_attention(
                self.tokens, block.channel_norm, block.c_attention, block.spatial_norm
            )
        elif self.stage == "spatial_attention":
            tokens, self.saved = spatial_attention(self.tokens, block.spatial_norm, block.s_attention, self.training)
        else:
            dtypes = [x.dtype for x in self.maps]
            outs, self.saved = upsample(
                self.tokens, self.maps, self.moments, dca.upconvs, self.norms, dca.grid, dtypes, self.training
            )
            return outs
        return list(tokens.values.split(tokens.channels, 2))

    @torch.no_grad()
    def backward(self) -> list[Tensor]:
        """Gradients of the inputs, for `upsample` of its tokens and then of its maps."""
        from dca_kernels.channel_attention import channel_attention_backward
        from dca_kernels.spatial_attention import spatial_attention_backward
        from dca_kernels.tokens import layer_norm_backward
        from dca_kernels.upsample import map_gradients, upsample_backward

        dca, block, douts = self.dca, self.dca.attention[0], self.douts
        if self.stage == "channel_attention":
            removed = [False] * len(dca.features)
            dtokens = channel_attention_backward(
                self.saved, douts[0], block.channel_norm, block.c_attention, removed
            ).tokens
        elif self.stage == "spatial_attention":
            removed = [self.training] * len(dca.features)
            spatial = spatial_attention_backward(self.saved, douts[0], block.s_attention, removed)
            normalised, values = spatial.normalised, spatial.values
            dtokens, _ = layer_norm_backward(self.saved.tokens, block.spatial_norm, normalised, values, douts[0])
        else:
            last = upsample_backward(self.saved, douts, dca.upconvs, self.norms, dca.grid)
            none = torch.zeros_like(last.tokens)  # what would have come back from the attention
            dmaps = map_gradients(self.saved, last, none, douts, dca.avg_map, self.norms, dca.grid)
            return [*last.tokens.split(self.tokens.channels, 2), *dmaps]
        return list(dtokens.split(self.tokens.channels, 2))

    def release(self) -> None:
        self.saved = None
