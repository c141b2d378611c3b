"""Dual Cross-Attention as the paper and its official code compute it.

Source: Ates, Mohan, Celik, "Dual Cross-Attention for Medical Image Segmentation", arXiv 2303.17696, and the authors'
MIT-licensed PyTorch module. Operation for operation this is that module: separate query, key and value maps, attention
matrices in memory, the 1x1 convolution after the upsampling, the module's names in the state dict. Nothing here is
optimised and nothing is slowed down: it is what the fused kernels are tested against and timed against.

Two things the official module cannot do are allowed, and change nothing at the sizes that it accepts: a rectangular
token grid, and skip maps of any height and width (each is upsampled to its own size, not to patch * stride).

Shapes: B batch, S scales, C_i channels of scale i, C = sum of C_i, H_i x W_i its size, P_h x P_w the token grid,
N = P_h * P_w tokens, h heads.
"""

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

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        x = tokens.unflatten(1, grid).permute(0, 3, 1, 2)  # (B, N, C) -> (B, C, P_h, P_w)
        x = self.proj(x)  # (B, C, P_h, P_w)
        return x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, N, C)


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q k^T * scale) v over the last two axes, with the attention matrix in memory."""
    logits = torch.einsum("bhcw,bhwk->bhck", q, k.transpose(-2, -1)) * scale  # (B, h, rows of q, rows of k)
    attention = torch.softmax(logits, dim=-1)  # (B, h, rows of q, rows of k)
    return torch.einsum("bhcw,bhwk->bhck", attention, v)  # (B, h, rows of q, columns of v)


class ChannelAttention(nn.Module):
    """Cross-attention over channels: the C_i channels of one scale attend to the C channels of all (paper, eq. 3)."""

    def __init__(self, total: int, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_map = DepthwiseProjection(channels)
        self.k_map = DepthwiseProjection(total)
        self.v_map = DepthwiseProjection(total)
        self.projection = DepthwiseProjection(channels)

    def forward(self, own: Tensor, every: Tensor, grid: tuple[int, int]) -> Tensor:
        q = self.q_map(own, grid)  # (B, N, C_i)
        k = self.k_map(every, grid)  # (B, N, C)
        v = self.v_map(every, grid)  # (B, N, C)
        scale = k.shape[2] ** -0.5  # of all channels, whatever the number of heads
        q, k, v = (t.unflatten(2, (self.heads, -1)).permute(0, 2, 3, 1) for t in (q, k, v))  # (B, h, C_* / h, N)
        out = scaled_dot_product(q, k, v, scale)  # (B, h, C_i / h, N)
        out = out.permute(0, 3, 1, 2).flatten(2)  # (B, N, C_i)
        return self.projection(out, grid)  # (B, N, C_i)


class SpatialAttention(nn.Module):
    """Cross-attention over tokens: queries and keys from all channels, values from one scale's (paper, eq. 4)."""

    def __init__(self, total: int, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_map = DepthwiseProjection(total)
        self.k_map = DepthwiseProjection(total)
        self.v_map = DepthwiseProjection(channels)
        self.projection = DepthwiseProjection(channels)

    def forward(self, own: Tensor, every: Tensor, grid: tuple[int, int]) -> Tensor:
        q = self.q_map(every, grid)  # (B, N, C)
        k = self.k_map(every, grid)  # (B, N, C)
        v = self.v_map(own, grid)  # (B, N, C_i)
        scale = (q.shape[2] // self.heads) ** -0.5  # of one head's channels
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, h, N, C_* / h)
        out = scaled_dot_product(q, k, v, scale)  # (B, h, N, C_i / h)
        out = out.transpose(1, 2).flatten(2)  # (B, N, C_i)
        return self.projection(out, grid)  # (B, N, C_i)


class Block(nn.Module):
    """Channel cross-attention, then spatial cross-attention, each with its LayerNorms and its residual."""

    def __init__(
        self,
        features: list[int],
        channel_head: list[int],
        spatial_head: list[int],
        channel_att: bool,
        spatial_att: bool,
    ) -> None:
        super().__init__()
        total = sum(features)
        self.channel_att, self.spatial_att = channel_att, spatial_att
        if channel_att:
            self.channel_norm = nn.ModuleList(nn.LayerNorm(c, eps=1e-6) for c in features)
            self.c_attention = nn.ModuleList(
                ChannelAttention(total, c, h) for c, h in zip(features, channel_head, strict=True)
            )
        if spatial_att:
            self.spatial_norm = nn.ModuleList(nn.LayerNorm(c, eps=1e-6) for c in features)
            self.s_attention = nn.ModuleList(
                SpatialAttention(total, c, h) for c, h in zip(features, spatial_head, strict=True)
            )

    def forward(self, tokens: list[Tensor], grid: tuple[int, int]) -> list[Tensor]:
        if self.channel_att:
            tokens = self.attend(tokens, self.channel_norm, self.c_attention, grid)
        if self.spatial_att:
            tokens = self.attend(tokens, self.spatial_norm, self.s_attention, grid)
        return tokens  # S of (B, N, C_i)

    @staticmethod
    def attend(
        tokens: list[Tensor], norms: nn.ModuleList, attentions: nn.ModuleList, grid: tuple[int, int]
    ) -> list[Tensor]:
        normed = [norm(t) for norm, t in zip(norms, tokens, strict=True)]  # S of (B, N, C_i)
        every = torch.cat(normed, dim=2)  # (B, N, C)
        out = [attention(own, every, grid) for attention, own in zip(attentions, normed, strict=True)]
        return [t + o for t, o in zip(tokens, out, strict=True)]  # S of (B, N, C_i)


class PointwiseConv(nn.Module):
    """A dense 1x1 convolution with bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # (B, C_i, H_i, W_i)


class UpsampleConv(nn.Module):
    """Bilinear upsampling to the skip map's size, then the 1x1 convolution at that size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = PointwiseConv(channels)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=True)  # (B, C_i, H_i, W_i)
        return self.conv(x)  # (B, C_i, H_i, W_i)


class DCA(nn.Module):
    """The paper's Dual Cross-Attention over the skip maps of a U-Net.

    Args:
        features: channels C_i of each skip map.
        strides: size of each skip map over the token grid, as the official constructor takes it. It is not needed:
            every map is upsampled to its own size.
        patch: side of the token grid, or (P_h, P_w).
        channel_att, spatial_att: which of the two attentions a block has.
        n: number of blocks in sequence.
        channel_head, spatial_head: heads of each scale; 1 and 4 where None.
    """

    def __init__(
        self,
        features: list[int],
        strides: list[int] | None = None,
        patch: int | tuple[int, int] = 28,
        channel_att: bool = True,
        spatial_att: bool = True,
        n: int = 1,
        channel_head: list[int] | None = None,
        spatial_head: list[int] | None = None,
    ) -> None:
        super().__init__()
        channel_head = channel_head or [1] * len(features)
        spatial_head = spatial_head or [4] * len(features)
        self.grid = (patch, patch) if isinstance(patch, int) else tuple(patch)
        self.avg_map = nn.ModuleList(DepthwiseProjection(c) for c in features)
        self.attention = nn.ModuleList(
            Block(features, channel_head, spatial_head, channel_att, spatial_att) for _ in range(n)
        )
        self.upconvs = nn.ModuleList(UpsampleConv(c) for c in features)
        self.bn_relu = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(c), nn.ReLU()) for c in features)

    def forward(self, maps: list[Tensor] | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """S maps of (B, C_i, H_i, W_i) -> S maps of the same shapes."""
        tokens = self.patch_embed(maps)  # S of (B, N, C_i)
        for block in self.attention:
            tokens = block(tokens, self.grid)
        return self.upsample(tokens, maps)

    def patch_embed(self, maps: list[Tensor] | tuple[Tensor, ...]) -> list[Tensor]:
        """S maps of (B, C_i, H_i, W_i) -> S of (B, N, C_i)."""
        pooled = [F.adaptive_avg_pool2d(x, self.grid) for x in maps]  # S of (B, C_i, P_h, P_w)
        tokens = [x.flatten(2).transpose(1, 2) for x in pooled]  # S of (B, N, C_i)
        return [scale(t, self.grid) for scale, t in zip(self.avg_map, tokens, strict=True)]  # S of (B, N, C_i)

    def upsample(self, tokens: list[Tensor], maps: list[Tensor] | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """S of (B, N, C_i), and the S maps -> S maps of the same shapes."""
        low = [t.transpose(1, 2).unflatten(2, self.grid) for t in tokens]  # S of (B, C_i, P_h, P_w)
        up = [conv(z, x.shape[-2:]) for conv, z, x in zip(self.upconvs, low, maps, strict=True)]  # as the maps
        summed = [u + x for u, x in zip(up, maps, strict=True)]  # S of (B, C_i, H_i, W_i)
        return tuple(bn_relu(y) for bn_relu, y in zip(self.bn_relu, summed, strict=True))
