"""The submodules of a DCA, with the official module's names. A call of one does the official module's operations.

A backend reads their parameters and calls none of them; `dca_kernels.plain` calls them all. PyTorch's modules hold the
parameters.

Shapes: B batch, S scales, C_i channels of scale i, C = sum of C_i, H_i x W_i its size, P_h x P_w the token grid,
N = P_h * P_w tokens, h heads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DepthwiseConv(nn.Module):
    """A depthwise 1x1 convolution: one scale and one bias a channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, kernel_size=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(x)  # (B, C, P_h, P_w)


class DepthwiseProjection(nn.Module):
    """The depthwise 1x1 convolution on tokens."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = DepthwiseConv(channels)

    @property
    def convolution(self) -> nn.Conv2d:
        """`proj.depthwise`, without `nn.Module.__getattr__`: a call reads them all, and would spend time on that."""
        return self._modules["proj"]._modules["depthwise"]  # type: ignore[union-attr, return-value]

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        x = tokens.transpose(1, 2).unflatten(2, grid)  # (B, N, C) -> (B, C, P_h, P_w)
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, N, C)


class ChannelAttention(nn.Module):
    """One scale's cross-attention over channels: its C_i channels attend to all C channels (paper, eq. 3)."""

    def __init__(self, total: int, channels: int, heads: int) -> None:
        super().__init__()
        self.total, self.heads = total, heads
        self.q_map = DepthwiseProjection(channels)
        self.k_map = DepthwiseProjection(total)
        self.v_map = DepthwiseProjection(total)
        self.projection = DepthwiseProjection(channels)

    def forward(self, tokens: Tensor, joined: Tensor, grid: tuple[int, int]) -> Tensor:
        projected = (self.q_map(tokens, grid), self.k_map(joined, grid), self.v_map(joined, grid))  # (B, N, C_i or C)
        q, k, v = (t.transpose(1, 2).unflatten(1, (self.heads, -1)) for t in projected)  # (B, h, C_i / h or C / h, N)
        logits = q @ k.transpose(2, 3) * self.total**-0.5  # the same for any number of heads
        weights = torch.softmax(logits, -1)  # (B, h, C_i / h, C / h)
        return self.projection((weights @ v).flatten(1, 2).transpose(1, 2), grid)  # (B, N, C_i)


class SpatialAttention(nn.Module):
    """One scale's cross-attention over tokens: values are of its C_i channels, queries and keys of all C (eq. 4)."""

    def __init__(self, total: int, channels: int, heads: int) -> None:
        super().__init__()
        self.total, self.heads = total, heads
        self.q_map = DepthwiseProjection(total)
        self.k_map = DepthwiseProjection(total)
        self.v_map = DepthwiseProjection(channels)
        self.projection = DepthwiseProjection(channels)

    def forward(self, tokens: Tensor, joined: Tensor, grid: tuple[int, int]) -> Tensor:
        projected = (self.q_map(joined, grid), self.k_map(joined, grid), self.v_map(tokens, grid))  # (B, N, C or C_i)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in projected)  # (B, h, N, C / h or C_i / h)
        logits = q @ k.transpose(2, 3) * (self.total // self.heads) ** -0.5  # of one head's channels
        weights = torch.softmax(logits, -1)  # (B, h, N, N)
        return self.projection((weights @ v).transpose(1, 2).flatten(2), grid)  # (B, N, C_i)


class LayerNorms(nn.ModuleList):
    """One LayerNorm a scale."""

    def __init__(self, features: Sequence[int]) -> None:
        super().__init__(nn.LayerNorm(c, eps=1e-6) for c in features)


class Block(nn.Module):
    """Channel, then spatial cross-attention, each with its LayerNorms and its residual."""

    def __init__(self, features: Sequence[int], channel_heads: Sequence[int], spatial_heads: Sequence[int]) -> None:
        """Make the attentions that heads are given for."""
        super().__init__()
        total = sum(features)
        if channel_heads:
            self.channel_norm = LayerNorms(features)
            self.c_attention = nn.ModuleList(
                ChannelAttention(total, c, heads) for c, heads in zip(features, channel_heads, strict=True)
            )
        if spatial_heads:
            self.spatial_norm = LayerNorms(features)
            self.s_attention = nn.ModuleList(
                SpatialAttention(total, c, heads) for c, heads in zip(features, spatial_heads, strict=True)
            )

    def norms(self, name: str) -> list[nn.Module]:
        """The LayerNorm of each scale, also where each is in a list of its own, as official modules once had them."""
        return [norm[0] if isinstance(norm, LayerNorms) else norm for norm in getattr(self, name)]

    def forward(self, tokens: Sequence[Tensor], grid: tuple[int, int]) -> Sequence[Tensor]:
        for norms, attentions in (("channel_norm", "c_attention"), ("spatial_norm", "s_attention")):
            if hasattr(self, attentions):
                normed = [norm(t) for norm, t in zip(self.norms(norms), tokens, strict=True)]  # S of (B, N, C_i)
                joined = torch.cat(normed, 2)  # (B, N, C)
                scales = zip(tokens, getattr(self, attentions), normed, strict=True)
                tokens = [t + attention(n, joined, grid) for t, attention, n in scales]
        return tokens  # S of (B, N, C_i)


class PointwiseConv(nn.Module):
    """A dense 1x1 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # (B, C_i, H_i, W_i)


class UpsampleConv(nn.Module):
    """Bilinear upsampling to the skip map's size, then the 1x1 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = PointwiseConv(channels)

    @property
    def convolution(self) -> nn.Conv2d:
        """`conv.conv`, without `nn.Module.__getattr__`."""
        return self._modules["conv"]._modules["conv"]  # type: ignore[union-attr, return-value]

    def forward(self, z: Tensor, size: Sequence[int]) -> Tensor:
        return self.conv(F.interpolate(z, size=size, mode="bilinear", align_corners=True))  # (B, C_i, H_i, W_i)
