"""The six networks as the official repository has them: its names, its order of parts, its order of concatenation.

Each is `Network(attention, patch, out_features)` for images of three colours, with `reference.DCA`, whose names are the
official module's. `reference.unets` have other classes, names and orders; the tests compare what both compute.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reference import DCA

WIDTHS = (32, 64, 128, 256, 512)
COLOURS = 3


def cat(*maps: Tensor) -> Tensor:
    return torch.cat(maps, dim=1)


def enlarge(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


class ConvBlock(nn.Module):
    def __init__(
        self, before: int, after: int, kernel: int = 3, dilation: int = 1, norm=True, activation=True, bias=True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel, 1, dilation * (kernel // 2), dilation, bias=bias)
        if norm:
            self.norm = nn.BatchNorm2d(after)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.norm(x) if hasattr(self, "norm") else x
        return x.relu() if self.activation else x


def bare(before: int, after: int, kernel: int = 3) -> ConvBlock:
    return ConvBlock(before, after, kernel, norm=False, activation=False)


class NormRelu(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x).relu()


class Upconv(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = ConvBlock(before, after)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(enlarge(x))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        inner = channels // reduction
        self.fc = nn.Sequential(
            nn.Linear(channels, inner, bias=False), nn.ReLU(), nn.Linear(inner, channels, bias=False), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))[:, :, None, None]


class DoubleConv(nn.Module):
    def __init__(self, before: int, after: int, last_norm: bool = True) -> None:
        super().__init__()
        self.conv1 = ConvBlock(before, after)
        self.conv2 = ConvBlock(after, after) if last_norm else bare(after, after)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


class Unet(nn.Module):
    """`normed`: without attention the decoder gets the maps after their norm and activation; officially before."""

    def __init__(
        self, attention: bool, patch: tuple[int, int], out_features: int, normed: bool = False, widths=WIDTHS
    ) -> None:
        super().__init__()
        self.attention, self.normed = attention, normed
        for i, (before, after) in enumerate(pairwise([COLOURS, *widths[:-1]]), start=1):
            setattr(self, f"conv{i}", DoubleConv(before, after, last_norm=False))
            setattr(self, f"norm{i}", nn.BatchNorm2d(after))
        self.conv5 = DoubleConv(*widths[-2:])
        if attention:
            self.DCA = DCA(widths[:-1], patch=patch)
        for i, (before, after) in enumerate(pairwise(widths[::-1]), start=1):
            setattr(self, f"up{i}", Upconv(before, after))
            setattr(self, f"upconv{i}", DoubleConv(2 * after, after))
        self.out = bare(widths[0], out_features, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i in range(1, 5):
            raw = getattr(self, f"conv{i}")(x)
            x = getattr(self, f"norm{i}")(raw).relu()
            skips.append(x if self.normed else raw)
            x = F.max_pool2d(x, 2)
        x = self.conv5(x)
        if self.attention:
            skips = self.DCA(skips)
        for i in range(1, 5):
            x = getattr(self, f"upconv{i}")(cat(getattr(self, f"up{i}")(x), skips[-i]))
        return self.out(x)


class VnetConv(nn.Module):
    def __init__(self, before: int, after: int, last: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, 5, padding=2)
        self.last = last
        if not last:
            self.bn, self.prelu = nn.BatchNorm2d(after), nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if self.last else self.prelu(self.bn(x))


def vnet_convs(before: int, after: int, n: int) -> nn.ModuleList:
    return nn.ModuleList(VnetConv(after if i else before, after, last=i == n - 1) for i in range(n))


class VnetInput(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, 5, padding=2)
        self.conv_skip = nn.Conv2d(before, after, 1)
        self.bn, self.prelu = nn.BatchNorm2d(after), nn.PReLU()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return self.prelu(self.bn(y)), y + self.conv_skip(x)


class VnetDown(nn.Module):
    def __init__(self, before: int, after: int, n: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(before, after, 2, stride=2)
        self.conv = vnet_convs(after, after, n)
        self.bn, self.prelu = nn.BatchNorm2d(after), nn.PReLU()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = residual = self.down(x)
        for conv in self.conv:
            x = conv(x)
        raw = x + residual
        return self.prelu(self.bn(raw)), raw


class VnetUp(nn.Module):
    """With one convolution it is no list, in the finest level."""

    def __init__(self, before: int, after: int, n: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(before, after, 2, stride=2)
        self.bn_in, self.prelu_in = nn.BatchNorm2d(after), nn.PReLU()
        self.conv = vnet_convs(2 * after, after, n) if n > 1 else nn.Conv2d(2 * after, after, 5, padding=2)
        self.bn, self.prelu = nn.BatchNorm2d(after), nn.PReLU()

    def forward(self, skip: Tensor, x: Tensor) -> Tensor:
        residual = self.up(x)
        x = cat(skip, self.prelu_in(self.bn_in(residual)))
        for conv in self.conv if isinstance(self.conv, nn.ModuleList) else [self.conv]:
            x = conv(x)
        return self.prelu(self.bn(x + residual))


class Vnet(nn.Module):
    def __init__(self, attention: bool, patch: tuple[int, int], out_features: int) -> None:
        super().__init__()
        self.attention = attention
        self.conv1 = VnetInput(COLOURS, WIDTHS[0])
        for i, (widths, n) in enumerate(zip(pairwise(WIDTHS), (2, 3, 3, 3), strict=True), start=2):
            setattr(self, f"conv{i}", VnetDown(*widths, n))
        if attention:
            self.DCA = DCA(WIDTHS[:-1], patch=patch)
        for i, (widths, n) in enumerate(zip(pairwise(WIDTHS[::-1]), (3, 3, 2, 1), strict=True), start=1):
            setattr(self, f"up{i}", VnetUp(*widths, n))
        self.out = nn.Conv2d(WIDTHS[0], out_features, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips, raws = [], []
        for i in range(1, 5):
            x, raw = getattr(self, f"conv{i}")(x)
            skips.append(x)
            raws.append(raw)
        x, _ = self.conv5(x)
        if self.attention:
            skips = self.DCA(raws)
        for i in range(1, 5):
            x = getattr(self, f"up{i}")(skips[-i], x)
        return self.out(x)


class Recurrent(nn.Module):
    def __init__(self, conv: ConvBlock) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        for _ in range(2):
            y = self.conv(x + y)
        return y


class RecurrentResidual(nn.Module):
    """The norm that is called first is made last."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = bare(before, after, 1)
        self.block = nn.Sequential(Recurrent(ConvBlock(after, after)), Recurrent(bare(after, after)))
        self.norm = nn.BatchNorm2d(after)
        self.norm_c = nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv(x)
        raw = x + self.block(self.norm_c(x).relu())
        return self.norm(raw).relu(), raw


class R2Unet(nn.Module):
    def __init__(self, attention: bool, patch: tuple[int, int], out_features: int) -> None:
        super().__init__()
        self.attention = attention
        for i, widths in enumerate(pairwise([COLOURS, *WIDTHS]), start=1):
            setattr(self, f"rconv{i}", RecurrentResidual(*widths))
        if attention:
            self.DCA = DCA(WIDTHS[:-1], patch=patch)
        for i, (before, after) in enumerate(pairwise(WIDTHS[::-1]), start=1):
            setattr(self, f"up{i}", Upconv(before, after))
            setattr(self, f"rconv{i + 5}", RecurrentResidual(2 * after, after))
        self.out = nn.Conv2d(WIDTHS[0], out_features, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips, raws = [], []
        for i in range(1, 5):
            x, raw = getattr(self, f"rconv{i}")(x)
            skips.append(x)
            raws.append(raw)
            x = F.max_pool2d(x, 2)
        x, _ = self.rconv5(x)
        if self.attention:
            skips = self.DCA(raws)
        for i in range(1, 5):
            x, _ = getattr(self, f"rconv{i + 5}")(cat(getattr(self, f"up{i}")(x), skips[-i]))
        return self.out(x)


class ResConv(nn.Module):
    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            NormRelu(before),
            nn.Conv2d(before, after, 3, stride, 1),
            NormRelu(after),
            nn.Conv2d(after, after, 3, padding=1),
        )
        self.skip = nn.Conv2d(before, after, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.skip(x)


class Aspp(nn.Module):
    def __init__(self, before: int, after: int, activation: bool) -> None:
        super().__init__()
        for i, rate in enumerate((1, 6, 12, 18), start=1):
            setattr(self, f"block{i}", ConvBlock(before, after, dilation=rate, activation=activation))
        self.out = ConvBlock(after, after, 1, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(sum(getattr(self, f"block{i}")(x) for i in range(1, 5)))


class Gate(nn.Module):
    """Its norms are in the state dict twice: by themselves, and in the sequences that call them."""

    def __init__(self, encoder: int, decoder: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.BatchNorm2d(encoder), nn.BatchNorm2d(decoder), nn.BatchNorm2d(decoder)
        self.conv_encoder = nn.Sequential(
            self.norm1, nn.ReLU(), nn.Conv2d(encoder, decoder, 3, padding=1), nn.MaxPool2d(2)
        )
        self.conv_decoder = nn.Sequential(self.norm2, nn.ReLU(), nn.Conv2d(decoder, decoder, 3, padding=1))
        self.conv_attn = nn.Sequential(self.norm3, nn.ReLU(), nn.Conv2d(decoder, 1, 1))

    def forward(self, skip: Tensor, x: Tensor) -> Tensor:
        return self.conv_attn(self.conv_encoder(skip) + self.conv_decoder(x)) * x


class ResUnetPlus(nn.Module):
    def __init__(self, attention: bool, patch: tuple[int, int], out_features: int) -> None:
        super().__init__()
        self.attention = attention
        first = WIDTHS[0]
        self.input_layer = nn.Sequential(ConvBlock(COLOURS, first), nn.Conv2d(first, first, 3, padding=1))
        self.input_skip = nn.Sequential(nn.Conv2d(COLOURS, first, 3, padding=1))
        for i, ((before, after), reduction) in enumerate(zip(pairwise(WIDTHS[:4]), (8, 16, 16), strict=True), start=1):
            setattr(self, f"squeeze_excite{i}", SqueezeExcite(before, reduction))
            setattr(self, f"residual_conv{i}", ResConv(before, after, stride=2))
        self.aspp_bridge = Aspp(*WIDTHS[3:], activation=False)
        if attention:
            self.DCA = DCA(WIDTHS[:3], patch=patch)
        for i, (skip, before) in enumerate(zip(WIDTHS[2::-1], (512, 256, 128), strict=True), start=1):
            setattr(self, f"attn{i}", Gate(skip, before))
            setattr(self, f"up_residual_conv{i}", ResConv(before + skip, before // 2))
        self.aspp_out = Aspp(64, 32, activation=True)
        self.output_layer = nn.Conv2d(32, out_features, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_layer(x) + self.input_skip(x)
        skips = []
        for i in range(1, 4):
            skips.append(x)
            x = getattr(self, f"residual_conv{i}")(getattr(self, f"squeeze_excite{i}")(x))
        x = self.aspp_bridge(x)
        if self.attention:
            skips = self.DCA(skips)
        for i in range(1, 4):
            x = F.interpolate(getattr(self, f"attn{i}")(skips[-i], x), scale_factor=2, mode="nearest")
            x = getattr(self, f"up_residual_conv{i}")(cat(x, skips[-i]))
        return self.output_layer(self.aspp_out(x))


class DoubleBlock(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = ConvBlock(before, after), bare(after, after)
        self.bn = nn.BatchNorm2d(after)
        self.se = SqueezeExcite(after, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raw = self.conv2(self.conv1(x))
        return self.se(self.bn(raw).relu()), raw


class DoubleAspp(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.block1 = ConvBlock(before, after, 1)
        for i, rate in enumerate((1, 6, 12, 18), start=2):
            setattr(self, f"block{i}", ConvBlock(before, after, dilation=rate, bias=False))
        self.out = ConvBlock(5 * after, after, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(cat(*(getattr(self, f"block{i}")(x) for i in range(1, 6))))


def vgg_slices() -> list[nn.Sequential]:
    """The five levels of VGG-19, each without its last activation; layers are named by their number in the whole."""
    layers, before = [], COLOURS
    for width, count in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
        for channels in pairwise([before] + [width] * count):
            layers += [nn.Conv2d(*channels, 3, padding=1), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
        before = width
    whole = nn.Sequential(*layers)
    return [whole[:3], whole[4:8], whole[9:17], whole[18:26], whole[27:35]]


class DoubleUnet(nn.Module):
    """With what the official code lacks: one grid for all DCAs; without attention, maps after norm and activation."""

    def __init__(self, attention: bool, patch: tuple[int, int], out_features: int) -> None:
        super().__init__()
        self.attention = attention
        for i, layers in enumerate(vgg_slices(), start=1):
            setattr(self, f"vgg{i}", layers)
        self.aspp_1 = DoubleAspp(512, 64)
        if attention:
            self.DCA_vgg1 = DCA([64, 128, 256, 512], patch=patch)
            self.DCA_vgg2 = DCA([64, 128, 256, 512], patch=patch)
            self.DCA = DCA([32, 64, 128, 256], patch=patch)
        for i, widths in enumerate([(64 + 512, 256), (256 + 256, 128), (128 + 128, 64), (64 + 64, 32)], start=1):
            setattr(self, f"decode{i}", DoubleBlock(*widths))
        self.out1 = nn.Sequential(nn.Conv2d(32, COLOURS, 1), nn.Sigmoid())
        for i, widths in enumerate(pairwise([COLOURS, 32, 64, 128, 256]), start=1):
            setattr(self, f"encode2_{i}", DoubleBlock(*widths))
        self.aspp_2 = DoubleAspp(256, 64)
        for i, widths in enumerate([(832, 256), (640, 128), (320, 64), (160, 32)], start=1):
            setattr(self, f"decode2_{i}", DoubleBlock(*widths))
        self.out = nn.Conv2d(32, out_features, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
        x = image = (x - mean) / deviation
        raws, vgg = [], []
        for i in range(1, 5):
            raws.append(getattr(self, f"vgg{i}")(x))
            x = raws[-1].relu()
            vgg.append(x)
        x = self.aspp_1(self.vgg5(x).relu())
        vgg1 = self.DCA_vgg1(raws) if self.attention else vgg
        vgg2 = self.DCA_vgg2(vgg1) if self.attention else vgg
        for i in range(1, 5):
            x, _ = getattr(self, f"decode{i}")(cat(vgg1[-i], enlarge(x)))
        x = image * self.out1(x)
        raws, own = [], []
        for i in range(1, 5):
            x, raw = getattr(self, f"encode2_{i}")(x)
            raws.append(raw)
            own.append(x)
            x = F.max_pool2d(x, 2)
        x = self.aspp_2(x)
        own = self.DCA(raws) if self.attention else own
        for i in range(1, 5):
            x, _ = getattr(self, f"decode2_{i}")(cat(vgg2[-i], own[-i], enlarge(x)))
        return self.out(x)


class MultiRes(nn.Module):
    """The residual is made first and added last."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        parts = [int(1.67 * width * share) for share in (0.167, 0.333, 0.5)]
        self.total = sum(parts)
        self.skip = ConvBlock(before, self.total, 1, activation=False)
        self.c1, self.c2, self.c3 = (ConvBlock(*channels) for channels in pairwise([before, *parts]))
        self.bn1 = nn.BatchNorm2d(self.total)

    def forward(self, x: Tensor) -> Tensor:
        first = self.c1(x)
        second = self.c2(first)
        return (self.bn1(cat(first, second, self.c3(second))) + self.skip(x)).relu()


class ResPath(nn.Module):
    """Three lists, the norms first."""

    def __init__(self, before: int, after: int, n: int) -> None:
        super().__init__()
        widths = list(pairwise([before] + [after] * n))
        self.bns = nn.ModuleList(nn.BatchNorm2d(after) for _ in widths)
        self.skips = nn.ModuleList(bare(*channels, 1) for channels in widths)
        self.convs = nn.ModuleList(bare(*channels) for channels in widths)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for norm, skip, conv in zip(self.bns, self.skips, self.convs, strict=True):
            raw = conv(x) + skip(x)
            x = norm(raw).relu()
        return x, raw


class MultiResUnet(nn.Module):
    def __init__(self, attention: bool, patch: tuple[int, int], out_features: int) -> None:
        super().__init__()
        self.attention = attention
        before = COLOURS
        for i, width in enumerate(WIDTHS, start=1):
            setattr(self, f"mr{i}", MultiRes(before, width))
            before = getattr(self, f"mr{i}").total
            if i < 5:
                setattr(self, f"respath{i}", ResPath(before, width, 5 - i))
        if attention:
            self.DCA = DCA(WIDTHS[:-1], patch=patch)
        for i, width in enumerate(WIDTHS[-2::-1], start=1):
            up = nn.ConvTranspose2d(before, width, 2, stride=2)
            setattr(self, f"up{i}", nn.Sequential(up, nn.BatchNorm2d(width), nn.ReLU()))
            setattr(self, f"mr{i + 5}", MultiRes(2 * width, width))
            before = getattr(self, f"mr{i + 5}").total
        self.out = nn.Conv2d(before, out_features, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips, raws = [], []
        for i in range(1, 5):
            x = getattr(self, f"mr{i}")(x)
            skip, raw = getattr(self, f"respath{i}")(x)
            skips.append(skip)
            raws.append(raw)
            x = F.max_pool2d(x, 2)
        x = self.mr5(x)
        if self.attention:
            skips = self.DCA(raws)
        for i in range(1, 5):
            x = getattr(self, f"mr{i + 5}")(cat(getattr(self, f"up{i}")(x), skips[-i]))
        return self.out(x)


NETWORKS = {  # of each host that has an official network
    "UNet": Unet,
    "VNet": Vnet,
    "R2UNet": R2Unet,
    "ResUNetPP": ResUnetPlus,
    "DoubleUNet": DoubleUnet,
    "MultiResUNet": MultiResUnet,
}
