"""A DCA as third parties have it in their code: the official module's layout, attributes and calls.

Beside the parameters of `reference.DCA` it has the official modules without any (`patch_avg`, `sdp`, `up`), keeps its
head counts as `n_heads`, and takes only square grids and maps of exactly patch * stride. The variants have the same
names in their state dicts, or nearly, and compute something else; each changes one thing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Depthwise(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(x)


class Projection(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = Depthwise(channels)

    def forward(self, tokens: Tensor) -> Tensor:
        side = int(tokens.shape[1] ** 0.5)
        return to_tokens(self.proj(to_map(tokens, side)))


def to_map(tokens: Tensor, side: int) -> Tensor:
    return tokens.mT.unflatten(2, (side, -1))


def to_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).mT


class Pool(nn.Module):
    def __init__(self, patch: int) -> None:
        super().__init__()
        self.projection = nn.AdaptiveAvgPool2d((patch, patch))

    def forward(self, x: Tensor) -> Tensor:
        return to_tokens(self.projection(x))


class ScaledDotProduct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return self.softmax(q @ k.mT * scale) @ v


class Attention(nn.Module):
    """Of one scale. Tokens (B, N, C_*) come as [q, k, v]."""

    order = ("q_map", "k_map", "v_map")

    def __init__(self, queries: int, total: int, values: int, own: int, heads: int) -> None:
        super().__init__()
        self.n_heads = heads
        self.q_map, self.k_map, self.v_map = Projection(queries), Projection(total), Projection(values)
        self.projection = Projection(own)
        self.sdp = ScaledDotProduct()

    def mapped(self, x: Sequence[Tensor]) -> list[Tensor]:
        maps = (getattr(self, name) for name in self.order)
        return [m(t).unflatten(2, (self.n_heads, -1)).transpose(1, 2) for m, t in zip(maps, x, strict=True)]


class ChannelAttention(Attention):
    def __init__(self, total: int, own: int, heads: int) -> None:
        super().__init__(own, total, total, own, heads)

    def scale(self, total: int) -> float:
        return total**-0.5

    def forward(self, x: Sequence[Tensor]) -> Tensor:
        q, k, v = (t.mT for t in self.mapped(x))  # (B, h, C_* / h, N)
        return self.projection(to_tokens(self.sdp(q, k, v, self.scale(x[1].shape[2])).flatten(1, 2)))


class SpatialAttention(Attention):
    def __init__(self, total: int, own: int, heads: int) -> None:
        super().__init__(total, total, own, own, heads)

    def forward(self, x: Sequence[Tensor]) -> Tensor:
        q, k, v = self.mapped(x)  # (B, h, N, C_* / h)
        return self.projection(self.sdp(q, k, v, q.shape[3] ** -0.5).transpose(1, 2).flatten(2))


class Block(nn.Module):
    channel_attention_class, spatial_attention_class = ChannelAttention, SpatialAttention

    def __init__(
        self,
        features: list[int],
        channel_head: list[int],
        spatial_head: list[int],
        channel_att: bool,
        spatial_att: bool,
    ) -> None:
        super().__init__()
        self.channel_att, self.spatial_att = channel_att, spatial_att
        if channel_att:
            self.channel_norm = nn.ModuleList(nn.LayerNorm(c, eps=1e-6) for c in features)
            self.c_attention = nn.ModuleList(
                self.channel_attention_class(sum(features), c, h) for c, h in zip(features, channel_head, strict=False)
            )
        if spatial_att:
            self.spatial_norm = nn.ModuleList(nn.LayerNorm(c, eps=1e-6) for c in features)
            self.s_attention = nn.ModuleList(
                self.spatial_attention_class(sum(features), c, h) for c, h in zip(features, spatial_head, strict=False)
            )

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        if self.channel_att:
            x = added(x, self.channel_attention(x))
        if self.spatial_att:
            x = added(x, self.spatial_attention(x))
        return x

    def channel_attention(self, x: list[Tensor]) -> list[Tensor]:
        x = applied(self.channel_norm, x)
        every = torch.cat(x, 2)
        return applied(self.c_attention, [[q, every, every] for q in x])

    def spatial_attention(self, x: list[Tensor]) -> list[Tensor]:
        x = applied(self.spatial_norm, x)
        every = torch.cat(x, 2)
        return applied(self.s_attention, [[every, every, v] for v in x])


def applied(modules: nn.ModuleList, inputs: Sequence) -> list[Tensor]:
    return [module(x) for module, x in zip(modules, inputs, strict=True)]


def added(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
    return [a + b for a, b in zip(first, second, strict=True)]


class Conv(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class UpsampleConv(nn.Module):
    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.up = nn.Upsample(scale_factor=stride, mode="bilinear", align_corners=True)
        self.conv = Conv(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.up(x))


class DualCrossAttention(nn.Module):
    """The official constructor and forward, under a name of the third party's own."""

    block_class = Block

    def __init__(
        self,
        features: list[int],
        strides: list[int],
        patch: int = 28,
        channel_att: bool = True,
        spatial_att: bool = True,
        n: int = 1,
        channel_head: Sequence[int] = (1, 1, 1, 1),
        spatial_head: Sequence[int] = (4, 4, 4, 4),
    ) -> None:
        super().__init__()
        self.patch = patch
        self.patch_avg = nn.ModuleList(Pool(patch) for _ in features)
        self.avg_map = nn.ModuleList(Projection(c) for c in features)
        self.attention = nn.ModuleList(
            self.block_class(features, channel_head, spatial_head, channel_att, spatial_att) for _ in range(n)
        )
        self.upconvs = nn.ModuleList(UpsampleConv(c, s) for c, s in zip(features, strides, strict=True))
        self.bn_relu = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(c), nn.ReLU()) for c in features)

    def forward(self, raw: Sequence[Tensor]) -> tuple[Tensor, ...]:
        x = applied(self.avg_map, applied(self.patch_avg, raw))
        for block in self.attention:
            x = block(x)
        x = applied(self.upconvs, [to_map(t, self.patch) for t in x])
        return (*applied(self.bn_relu, self.merged(x, raw)),)

    def merged(self, x: list[Tensor], raw: Sequence[Tensor]) -> list[Tensor]:
        return added(x, raw)


class NormInSequential(Block):
    """As it was before March 2023: keys `channel_norm.{i}.0.weight`."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        for name in {"channel_norm", "spatial_norm"} & self._modules.keys():
            setattr(self, name, nn.ModuleList(nn.Sequential(norm) for norm in getattr(self, name)))


class EarlyLayout(DualCrossAttention):
    block_class = NormInSequential


class GridOfTwelve(DualCrossAttention):
    """Has its grid as a number in its code."""

    def forward(self, raw: Sequence[Tensor]) -> tuple[Tensor, ...]:
        x = applied(self.avg_map, [to_tokens(nn.functional.adaptive_avg_pool2d(m, 12)) for m in raw])
        for block in self.attention:
            x = block(x)
        x = applied(self.upconvs, [t.mT.reshape(len(t), -1, 12, 12) for t in x])
        return (*applied(self.bn_relu, self.merged(x, raw)),)


class ConvolvedFirst(UpsampleConv):
    """Convolution, then upsampling: the same function."""

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.conv(x))


# Variants


class ParallelBlock(Block):
    """The sum of both attentions, without residuals."""

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        return added(self.channel_attention(x), self.spatial_attention(x))


class Parallel(DualCrossAttention):
    block_class = ParallelBlock


class ExchangedMaps(SpatialAttention):
    """Queries and keys have each other's map: every tensor has the official name and shape."""

    order = ("k_map", "q_map", "v_map")


class DetachedKeys(SpatialAttention):
    """The official outputs, with other gradients."""

    def mapped(self, x: Sequence[Tensor]) -> list[Tensor]:
        q, k, v = super().mapped(x)
        return [q, k.detach(), v]


class OwnQueries(SpatialAttention):
    """Queries of the own scale, keys and values of all."""

    def __init__(self, total: int, own: int, heads: int) -> None:
        Attention.__init__(self, own, total, total, own, heads)


class ScaleOfHead(ChannelAttention):
    def scale(self, total: int) -> float:
        return (total // self.n_heads) ** -0.5


def with_attention(channel: type = ChannelAttention, spatial: type = SpatialAttention) -> type:
    class VariantBlock(Block):
        channel_attention_class, spatial_attention_class = channel, spatial

    class Variant(DualCrossAttention):
        block_class = VariantBlock

    return Variant


class WithoutResidual(DualCrossAttention):
    def merged(self, x: list[Tensor], raw: Sequence[Tensor]) -> list[Tensor]:
        return x


class ReturnsList(DualCrossAttention):
    def forward(self, raw: Sequence[Tensor]) -> list[Tensor]:
        return list(super().forward(raw))


class Gated(DualCrossAttention):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.gate = nn.Parameter(torch.ones(1))


class TakesMapsOneByOne(DualCrossAttention):
    def forward(self, *raw: Tensor) -> tuple[Tensor, ...]:
        if len(raw) == 1:
            raise TypeError("expected a map for each scale")
        return super().forward(raw)
