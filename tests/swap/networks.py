"""Small U-Nets in the styles in which people write them, none with a seam between an encoder and a decoder."""

import itertools
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (4, 8, 16)


def double(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True), nn.Conv2d(after, after, 1)
    )


def excitation(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1), nn.Sigmoid())


class PaddedUp(nn.Module):
    """Enlarges, pads to the skip map's size, concatenates: the block has both, as an argument each."""

    def __init__(self, before: int, after: int, bilinear: bool) -> None:
        super().__init__()
        if bilinear:
            self.up: nn.Module = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        else:
            self.up = nn.ConvTranspose2d(before, before, 2, stride=2)
        self.conv = double(before + after, after)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        x1 = self.up(x1)
        rows, columns = x2.size()[2] - x1.size()[2], x2.size()[3] - x1.size()[3]
        x1 = F.pad(x1, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        return self.conv(torch.cat([x2, x1], dim=1))


class PaddedUNet(nn.Module):
    """The most copied U-Net: a block each for the way down and the way up."""

    def __init__(self, bilinear: bool = False) -> None:
        super().__init__()
        a, b, c = WIDTHS
        self.inc, self.outc = double(3, a), nn.Conv2d(a, 2, 1)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), double(a, b))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), double(b, c))
        self.up1, self.up2 = PaddedUp(c, b, bilinear), PaddedUp(b, a, bilinear)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x = self.up1(x3, x2)
        x = self.up2(x, x1)
        return self.outc(x)


class Gate(nn.Module):
    """An attention gate: the skip map x, weighted by itself and what comes from further down, g."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.of_g, self.of_x = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.psi = nn.Sequential(nn.Conv2d(channels, 1, 1), nn.Sigmoid())

    def forward(self, g: Tensor, x: Tensor) -> Tensor:
        return x * self.psi(F.relu(self.of_g(g) + self.of_x(x)))


class ConcatenatingUNet(nn.Module):
    """Everything in one forward: pooling, concatenation, gates where wanted."""

    def __init__(self, gated: bool = False) -> None:
        super().__init__()
        a, b, c = WIDTHS
        self.pool = nn.MaxPool2d(2)
        self.conv1, self.conv2, self.conv3 = double(3, a), double(a, b), double(b, c)
        self.up3, self.up2 = nn.Conv2d(c, b, 1), nn.Conv2d(b, a, 1)
        self.conv_up3, self.conv_up2 = double(2 * b, b), double(2 * a, a)
        self.gates = nn.ModuleList([Gate(b), Gate(a)] if gated else [])
        self.out = nn.Conv2d(a, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.conv1(x)
        x2 = self.conv2(self.pool(x1))
        x3 = self.conv3(self.pool(x2))
        d3 = self.up3(F.interpolate(x3, size=x2.shape[2:]))
        if len(self.gates) > 0:
            x2 = self.gates[0](g=d3, x=x2)
        d3 = self.conv_up3(torch.cat((x2, d3), dim=1))
        d2 = self.up2(F.interpolate(d3, size=x1.shape[2:]))
        if len(self.gates) > 0:
            x1 = self.gates[1](g=d2, x=x1)
        return self.out(self.conv_up2(torch.cat((x1, d2), dim=1)))


class ListUNet(nn.Module):
    """Blocks in loops, skip maps in a list, cropped in the middle to what comes from further down."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, *WIDTHS]
        self.down = nn.ModuleList(double(*c) for c in itertools.pairwise(widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * c, c, 2, 2) for c in reversed(WIDTHS[:-1]))
        self.conv = nn.ModuleList(double(2 * c, c) for c in reversed(WIDTHS[:-1]))
        self.last = nn.Conv2d(WIDTHS[0], 2, 1)

    def crop(self, bridge: Tensor, size: torch.Size) -> Tensor:
        _, _, height, width = bridge.size()
        top, left = (height - size[0]) // 2, (width - size[1]) // 2
        return bridge[:, :, top : top + size[0], left : left + size[1]]

    def forward(self, x: Tensor) -> Tensor:
        blocks = []
        for i, down in enumerate(self.down):
            x = down(x)
            if i != len(self.down) - 1:
                blocks.append(x)
                x = F.max_pool2d(x, 2)
        for i, (up, conv) in enumerate(zip(self.up, self.conv, strict=True)):
            x = up(x)
            x = conv(torch.cat([x, self.crop(blocks[-i - 1], x.shape[2:])], 1))
        return self.last(x)


class Nested(nn.Module):
    """One level: what is further down is within it."""

    def __init__(self, before: int, after: int, inner: nn.Module | None) -> None:
        super().__init__()
        layers = [nn.Conv2d(before, after, 4, 2, 1), nn.ReLU()]
        inside = after if inner is None else 2 * after
        self.model = nn.Sequential(
            *layers, *([] if inner is None else [inner]), nn.ConvTranspose2d(inside, before, 4, 2, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.model(x)], 1)


class NestedUNet(nn.Module):
    """Levels within levels, and a Sequential of all."""

    def __init__(self) -> None:
        super().__init__()
        a, b, c = WIDTHS
        self.model = nn.Sequential(double(3, a), Nested(a, b, Nested(b, c, None)), nn.Conv2d(2 * a, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class AddingUNet(nn.Module):
    """Adds its skip maps, as LinkNet does."""

    def __init__(self) -> None:
        super().__init__()
        a, b, c = WIDTHS
        self.encoder1, self.encoder2, self.encoder3 = (
            nn.Sequential(nn.Conv2d(before, after, 3, 2, 1), nn.ReLU()) for before, after in ((3, a), (a, b), (b, c))
        )
        self.decoder3, self.decoder2, self.decoder1 = (
            nn.ConvTranspose2d(before, after, 2, 2) for before, after in ((c, b), (b, a), (a, 2))
        )

    def forward(self, x: Tensor) -> Tensor:
        e1 = self.encoder1(x)
        e2 = self.encoder2(e1)
        d2 = self.decoder3(self.encoder3(e2)) + e2
        return self.decoder1(self.decoder2(d2) + e1)


class DenseUNet(nn.Module):
    """U-Net++: some skip maps are used before the others exist; one output a column while training."""

    def __init__(self) -> None:
        super().__init__()
        a, b, c = WIDTHS
        self.x00, self.x10, self.x20 = double(3, a), double(a, b), double(b, c)
        self.x01, self.x11, self.x02 = double(a + b, a), double(b + c, b), double(2 * a + b, a)
        self.out1, self.out2 = nn.Conv2d(a, 2, 1), nn.Conv2d(a, 2, 1)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        up = nn.Upsample(scale_factor=2)
        x00 = self.x00(x)
        x10 = self.x10(F.max_pool2d(x00, 2))
        x01 = self.x01(torch.cat([x00, up(x10)], 1))
        x20 = self.x20(F.max_pool2d(x10, 2))
        x11 = self.x11(torch.cat([x10, up(x20)], 1))
        x02 = self.x02(torch.cat([x00, x01, up(x11)], 1))
        x02 = F.dropout(x02, 0.5, training=self.training)
        return [self.out1(x01), self.out2(x02)] if self.training else self.out2(x02)


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Conv2d(*c, 3, 2, 1) for c in ((3, 4), (4, 8), (8, 16)))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = OrderedDict()
        for i, stage in enumerate(self.stages):
            x = stage(x)
            found[f"layer{i}"] = x
        return found


class PyramidNetwork(nn.Module):
    """All maps of a backbone, as a dictionary, each through a convolution of its own, at one size side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.lateral = nn.ModuleDict({f"layer{i}": nn.Conv2d(c, 4, 1) for i, c in enumerate(WIDTHS)})
        self.head = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.backbone(x)
        largest, *_ = features.values()
        size = largest.shape[-2:]
        maps = [F.interpolate(self.lateral[name](y), size=size) for name, y in features.items()]
        return {"out": F.interpolate(self.head(torch.cat(maps, 1)), size=x.shape[-2:])}


class ScaledUNet(AddingUNet):
    """Has a parameter of its own in its forward, and enlarges the image first."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        e1 = self.encoder1(F.interpolate(x, scale_factor=2))
        e2 = self.encoder2(e1) * self.scale
        return self.decoder1(self.decoder2(self.decoder3(self.encoder3(e2)) + e2) + e1)


class MultipleUNet(AddingUNet):
    """Pads images to a multiple of what it halves, and crops the result."""

    def forward(self, x: Tensor) -> Tensor:
        _, _, height, width = x.shape
        rows, columns = -height % 24, -width % 24
        if rows or columns:
            x = F.pad(x, (0, columns, 0, rows))
        return super().forward(x)[:, :, :height, :width]


class FullScaleUNet(nn.Module):
    """UNet 3+: a skip map goes to smaller levels as well, pooled."""

    def __init__(self) -> None:
        super().__init__()
        a, b, c = WIDTHS
        self.h1, self.h2, self.h3 = double(3, a), double(a, b), double(b, c)
        self.h1_to_2, self.h1_to_1, self.h2_to_2 = (nn.Conv2d(w, 4, 1) for w in (a, a, b))
        self.d2, self.d1 = double(8 + c, 4), double(4 + 4 + c, 2)

    def forward(self, x: Tensor) -> Tensor:
        h1 = self.h1(x)
        h2 = self.h2(F.max_pool2d(h1, 2))
        h3 = self.h3(F.max_pool2d(h2, 2))
        small, large = h2.shape[2:], h1.shape[2:]
        d2 = torch.cat([self.h1_to_2(F.max_pool2d(h1, 2)), self.h2_to_2(h2), F.interpolate(h3, size=small)], 1)
        d1 = [self.h1_to_1(h1), F.interpolate(self.d2(d2), size=large), F.interpolate(h3, size=large)]
        return self.d1(torch.cat(d1, 1))


class FullScaleOfBackbone(nn.Module):
    """The same of a backbone's outputs, which nothing leads down from."""

    def __init__(self) -> None:
        super().__init__()
        a, b, c = WIDTHS
        self.backbone = Backbone()
        self.h1_to_2, self.h1_to_1, self.h2_to_2 = (nn.Conv2d(w, 4, 1) for w in (a, a, b))
        self.d2, self.d1 = double(8 + c, 4), double(4 + 4 + c, 2)

    def refine(self, h1: Tensor, h2: Tensor) -> tuple[Tensor, ...]:
        return h1, h2

    def forward(self, x: Tensor) -> Tensor:
        h1, h2, h3 = self.backbone(x).values()
        h1, h2 = self.refine(h1, h2)
        small, large = h2.shape[2:], h1.shape[2:]
        d2 = torch.cat([self.h1_to_2(F.max_pool2d(h1, 2)), self.h2_to_2(h2), F.interpolate(h3, size=small)], 1)
        d1 = [self.h1_to_1(h1), F.interpolate(self.d2(d2), size=large), F.interpolate(h3, size=large)]
        return self.d1(torch.cat(d1, 1))


class SiameseUNet(nn.Module):
    """Compares two images, here one and its mirror image: of the first one's way down there are skips only."""

    def __init__(self) -> None:
        super().__init__()
        a, b, c = WIDTHS
        self.conv1, self.conv2, self.conv3 = double(3, a), double(a, b), double(b, c)
        self.up2, self.up1 = nn.ConvTranspose2d(c, b, 2, 2), nn.ConvTranspose2d(b, a, 2, 2)
        self.conv_up2, self.conv_up1 = double(3 * b, b), double(3 * a, a)
        self.out, self.scale = nn.Conv2d(a, 2, 1), nn.Parameter(torch.ones(a, 1, 1))
        self.weights = excitation(a)

    def refine(self, *maps: Tensor) -> tuple[Tensor, ...]:
        return maps

    def forward(self, x: Tensor) -> Tensor:
        a1 = self.conv1(x.flip(3)) * self.scale
        b1 = self.conv2(F.max_pool2d(a1 * self.weights(a1), 2))
        a2 = self.conv1(x) * self.scale
        b2 = self.conv2(F.max_pool2d(a2 * self.weights(a2), 2))
        y = self.conv3(F.max_pool2d(b2, 2))
        a1, a2, b1, b2 = self.refine(a1, a2, b1, b2)
        y = self.conv_up2(torch.cat([self.up2(y), b1, b2], 1))
        return self.out(self.conv_up1(torch.cat([self.up1(y), a1, a2], 1)))


class Halving(nn.Module):
    """A level: its skip map, and what leads down."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = double(before, after)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return y, F.max_pool2d(y, 2)


class EdgeUNet(nn.Module):
    """A second encoder, of edges, gives skips only; its levels return two maps."""

    def __init__(self) -> None:
        super().__init__()
        a, b, c = WIDTHS
        self.edge1, self.edge2 = Halving(3, a), Halving(a, b)
        self.level1, self.level2, self.bottom = Halving(3, a), Halving(a, b), double(b, c)
        self.up2, self.up1 = nn.ConvTranspose2d(c, b, 2, 2), nn.ConvTranspose2d(b, a, 2, 2)
        self.conv_up2, self.conv_up1 = double(3 * b, b), double(3 * a, a)
        self.out = nn.Conv2d(a, 2, 1)

    def refine(self, *maps: Tensor) -> tuple[Tensor, ...]:
        return maps

    def forward(self, x: Tensor) -> Tensor:
        e1, e = self.edge1(x - F.avg_pool2d(x, 3, 1, 1))
        e2, _ = self.edge2(e)
        x1, y = self.level1(x)
        x2, y = self.level2(y)
        y = self.bottom(y)
        e1, x1, e2, x2 = self.refine(e1, x1, e2, x2)
        y = self.conv_up2(torch.cat([self.up2(y), e2, x2], 1))
        return self.out(self.conv_up1(torch.cat([self.up1(y), e1, x1], 1)))


class ExcitedUNet(nn.Module):
    """Weighs its skip maps by what is pooled of them, channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        a, b, c = WIDTHS
        self.conv1, self.conv2, self.conv3 = double(3, a), double(a, b), double(b, c)
        self.weights1, self.weights2 = excitation(a), excitation(b)
        self.up2, self.up1 = nn.ConvTranspose2d(c, b, 2, 2), nn.ConvTranspose2d(b, a, 2, 2)
        self.conv_up2, self.conv_up1 = double(2 * b, b), double(2 * a, 2)

    def refine(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, ...]:
        return x1, x2

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.conv1(x)
        x2 = self.conv2(F.max_pool2d(x1, 2))
        y = self.up2(self.conv3(F.max_pool2d(x2, 2)))
        x1, x2 = self.refine(x1, x2)
        y = self.conv_up2(torch.cat([x2 * self.weights2(x2), y], 1))
        return self.conv_up1(torch.cat([x1 * self.weights1(x1), self.up1(y)], 1))


class Transformer(nn.Module):
    """Attention over the positions of a map, whose scores have four axes as maps have."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv, self.reduced = nn.Linear(channels, 3 * channels), nn.Conv2d(channels, channels, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        q = self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, -1)[0].view(batch, -1, 2, channels // 2).transpose(1, 2)
        _, k, v = self.qkv(self.reduced(x).flatten(2).transpose(1, 2)).chunk(3, -1)
        k, v = (t.view(batch, -1, 2, channels // 2).transpose(1, 2) for t in (k, v))
        scores = (q @ k.transpose(2, 3)).softmax(-1)
        return x + (scores @ v).transpose(2, 3).reshape(batch, channels, height, width)


class AttentiveUNet(PaddedUNet):
    """Attends on its way down."""

    def __init__(self) -> None:
        super().__init__()
        self.down2 = nn.Sequential(self.down2, Transformer(16), Transformer(16))
        self.down1 = nn.Sequential(self.down1, Transformer(8))


class Wrapper(nn.Module):
    """A training framework's module around a network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


# The same with a DCA, written by hand


class PaddedByHand(PaddedUNet):
    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x1, x2 = self.dca([x1, x2])
        return self.outc(self.up2(self.up1(x3, x2), x1))


class NestedByHand(NestedUNet):
    def forward(self, x: Tensor) -> Tensor:
        inner = self.model[1].model
        x1 = self.model[0](x)
        x2 = inner[1](inner[0](x1))
        x3 = inner[2].model(x2)
        x1, x2 = self.dca([x1, x2])
        return self.model[2](torch.cat([x1, inner[3](torch.cat([x2, x3], 1))], 1))


class DenseByHand(DenseUNet):
    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        up = nn.Upsample(scale_factor=2)
        x00 = self.x00(x)
        x10 = self.x10(F.max_pool2d(x00, 2))
        x20 = self.x20(F.max_pool2d(x10, 2))
        x00, x10 = self.dca([x00, x10])
        x01 = self.x01(torch.cat([x00, up(x10)], 1))
        x11 = self.x11(torch.cat([x10, up(x20)], 1))
        x02 = F.dropout(self.x02(torch.cat([x00, x01, up(x11)], 1)), 0.5, training=self.training)
        return [self.out1(x01), self.out2(x02)] if self.training else self.out2(x02)


class FullScaleByHand(FullScaleOfBackbone):
    def refine(self, h1: Tensor, h2: Tensor) -> tuple[Tensor, ...]:
        return self.dca([h1, h2])


class ExcitedByHand(ExcitedUNet):
    def refine(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, ...]:
        return self.dca([x1, x2])


class SiameseByHand(SiameseUNet):
    def refine(self, *maps: Tensor) -> tuple[Tensor, ...]:
        return self.dca(list(maps))


class EdgeByHand(EdgeUNet):
    def refine(self, *maps: Tensor) -> tuple[Tensor, ...]:
        return self.dca(list(maps))


# Of each: how to make it, and the channels of its skip maps.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[int]]] = {
    "padded": (PaddedUNet, [4, 8]),
    "padded_bilinear": (lambda: PaddedUNet(bilinear=True), [4, 8]),
    "concatenating": (ConcatenatingUNet, [4, 8]),
    "gated": (lambda: ConcatenatingUNet(gated=True), [4, 8]),
    "lists": (ListUNet, [4, 8]),
    "nested": (NestedUNet, [4, 8]),
    "adding": (AddingUNet, [4, 8]),
    "dense": (DenseUNet, [4, 8]),
    "pyramid": (PyramidNetwork, [4, 8]),
    "scaled": (ScaledUNet, [4, 8]),
    "multiple": (MultipleUNet, [4, 8]),
    "full_scale": (FullScaleUNet, [4, 8]),
    "full_scale_of_backbone": (FullScaleOfBackbone, [4, 8]),
    "siamese": (SiameseUNet, [4, 4, 8, 8]),
    "edge": (EdgeUNet, [4, 4, 8, 8]),
    "excited": (ExcitedUNet, [4, 8]),
    "attentive": (AttentiveUNet, [4, 8]),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    build, _ = NETWORKS[name]
    return build().double()
