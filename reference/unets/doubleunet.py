"""DoubleU-Net (Jha et al., arXiv 2006.04868) with DCA.

The authors' code for this network cannot run, with DCA or without: names in it are not defined. What is here has its
layers and is an interpretation where the code says nothing: in the size of the second and third DCA's grid, which is
the first one's, and in the skip maps without DCA, which are those after the last norm and activation. (Without DCA the
code gives its first decoder those before, and its second decoder some that are not defined.)
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from reference.unets.blocks import (
    Attention,
    Concat,
    Level,
    Patch,
    SqueezeExcite,
    build_dca,
    conv,
    conv_norm_act,
    decode,
    encode,
    norm_act,
    upsample,
)

VGG_WIDTHS = (64, 128, 256, 512, 512)
VGG_CONVS = (2, 2, 4, 4, 4)  # a level
WIDTHS = (32, 64, 128, 256)  # of the second encoder, and of both decoders
PYRAMID = 64
STRIDES = (8, 4, 2, 1)
COLOURS = 3  # as VGG-19 takes


def vgg19() -> list[Level]:
    """The convolutions of VGG-19 (Simonyan and Zisserman, arXiv 1409.1556), untrained; levels end before a pooling.

    There is no norm in it: initial weights are He's, as torchvision's, so that the maps do not fade with depth.
    """
    levels = []
    for i, (before, after) in enumerate(pairwise([COLOURS, *VGG_WIDTHS])):
        layers: list[nn.Module] = [nn.MaxPool2d(2)] if i else []
        for channels in pairwise([before] + [after] * VGG_CONVS[i]):
            layers += [conv(*channels), nn.ReLU()]
            nn.init.kaiming_normal_(layers[-2].weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layers[-2].bias)
        levels.append(Level(nn.Sequential(*layers[:-1]), layers[-1]))
    return levels


def pyramid(before: int) -> nn.Sequential:
    """A 1x1 and four dilated 3x3 convolutions side by side (ASPP), then a 1x1 convolution."""
    dilated = [conv_norm_act(before, PYRAMID, dilation=rate, bias=False) for rate in (1, 6, 12, 18)]
    branches = Concat([conv_norm_act(before, PYRAMID, 1), *dilated])
    return nn.Sequential(branches, conv_norm_act(5 * PYRAMID, PYRAMID, 1, bias=False))


def body(before: int, after: int) -> nn.Sequential:
    """Two 3x3 convolutions."""
    return nn.Sequential(conv_norm_act(before, after), conv(after, after))


def head(channels: int) -> nn.Sequential:
    """The last norm and activation of a level, then squeeze and excitation."""
    return nn.Sequential(norm_act(channels), SqueezeExcite(channels, reduction=8))


class SkipFirst(nn.Module):
    """One level of a decoder: `body` over the skip map and the coarser map enlarged, in this order."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.up, self.body = upsample(), body

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.body(torch.cat([skip, self.up(x)], dim=1))


def decoders(skips: Sequence[int]) -> nn.ModuleList:
    """From the pyramid to the finest level; `skips` are the channels of each level's skip maps, finest first."""
    widths = pairwise([PYRAMID, *reversed(WIDTHS)])
    return nn.ModuleList(
        SkipFirst(nn.Sequential(body(skip + before, after), head(after)))
        for (before, after), skip in zip(widths, reversed(skips), strict=True)
    )


class DoubleUNet(nn.Module):
    """A U-Net on VGG-19, whose output weighs the image for a second one, which has the skip maps of both encoders.

    With DCA the VGG maps are refined once for the first decoder and once more for the second, by DCAs of their own; a
    third refines the maps of the second encoder.

    Arguments: see `reference.unets`; `in_channels` is 3, or 1 for grey images, which are taken as three equal colours.
    Images are (B, in_channels, H, W) in 0 .. 1 with H and W multiples of 16; they are normalised by ImageNet's mean and
    deviation here.

    Raises:
        ValueError: `in_channels` is neither 1 nor 3.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, in_channels: int = 3, out_channels: int = 1, dca: Attention = False, patch: Patch = 28) -> None:
        super().__init__()
        if in_channels not in (1, COLOURS):
            raise ValueError(f"in_channels: expected 1 or {COLOURS}, got {in_channels}")
        colours = (1, COLOURS, 1, 1)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(colours), persistent=False)
        self.register_buffer("deviation", torch.tensor([0.229, 0.224, 0.225]).view(colours), persistent=False)

        *levels, last = vgg19()
        self.vgg = nn.ModuleList(levels)
        self.vgg_bottom = nn.Sequential(last.body, last.head, pyramid(VGG_WIDTHS[-1]))
        self.vgg_dca1 = build_dca(dca, VGG_WIDTHS[:-1], STRIDES, patch)
        self.vgg_dca2 = build_dca(dca, VGG_WIDTHS[:-1], STRIDES, patch)
        self.dca = build_dca(dca, WIDTHS, STRIDES, patch)
        self.vgg_decoders = decoders(VGG_WIDTHS[:-1])
        self.gate = nn.Sequential(conv(WIDTHS[0], COLOURS, 1), nn.Sigmoid())

        self.levels = nn.ModuleList()
        for i, (before, after) in enumerate(pairwise([COLOURS, *WIDTHS])):
            pool = nn.MaxPool2d(2) if i else nn.Identity()
            self.levels.append(Level(nn.Sequential(pool, body(before, after)), head(after)))
        self.bottom = nn.Sequential(nn.MaxPool2d(2), pyramid(WIDTHS[-1]))
        self.decoders = decoders([sum(pair) for pair in zip(VGG_WIDTHS[:-1], WIDTHS, strict=True)])
        self.head = conv(WIDTHS[0], out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> logits (B, out_channels, H, W)."""
        image = (x - self.mean) / self.deviation  # (B, 3, H, W)
        x, befores, vgg = encode(self.vgg, image)
        x = self.vgg_bottom(x)
        vgg1 = vgg if self.vgg_dca1 is None else self.vgg_dca1(befores)
        x = decode(self.vgg_decoders, x, vgg1)
        x, befores, own = encode(self.levels, image * self.gate(x))
        x = self.bottom(x)
        vgg2 = vgg if self.vgg_dca2 is None else self.vgg_dca2(vgg1)
        own = own if self.dca is None else self.dca(befores)
        skips = [torch.cat(pair, dim=1) for pair in zip(vgg2, own, strict=True)]
        return self.head(decode(self.decoders, x, skips))
