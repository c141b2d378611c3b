"""MultiResUNet (Ibtehaz and Rahman, arXiv 1902.04049) as the DCA paper has it."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from reference.unets.blocks import (
    Attention,
    Decoder,
    EncoderDecoder,
    Patch,
    Sum,
    build_dca,
    conv,
    conv_norm_act,
    norm_act,
)

WIDTHS = (32, 64, 128, 256, 512)  # of the U-Net that the blocks replace


def split(width: int) -> list[int]:
    """Channels of the three convolutions of a block in place of a U-Net's `width`: about 1/6, 1/3 and 1/2 of 1.67."""
    return [int(1.67 * width * share) for share in (0.167, 0.333, 0.5)]


class Chain(nn.ModuleList):
    """Each module on the output of the one before; all their outputs side by side along the channels."""

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for module in self:
            x = module(x)
            outputs.append(x)
        return torch.cat(outputs, dim=1)


def multi_res(before: int, width: int) -> nn.Sequential:
    """Three 3x3 convolutions in a chain, all of whose outputs count, with a residual around them."""
    parts = split(width)
    total = sum(parts)
    chain = Chain(conv_norm_act(*channels) for channels in pairwise([before, *parts]))
    residual = nn.Sequential(conv(before, total, 1), nn.BatchNorm2d(total))
    return nn.Sequential(Sum([nn.Sequential(chain, nn.BatchNorm2d(total)), residual]), nn.ReLU())


class PathLevel(nn.Module):
    """One level of the encoder, which returns as `Level` does; the skip map goes through a path of its own.

    With DCA the path's last norm and activation are not used; the official network holds them all the same.
    """

    def __init__(self, body: nn.Module, before: int, after: int, length: int) -> None:
        super().__init__()
        self.body = body
        path = []
        for channels in pairwise([before] + [after] * length):
            path += [Sum([conv(*channels, 3), conv(*channels, 1)]), norm_act(after)]
        self.path, self.head = nn.Sequential(*path[:-1]), path[-1]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.body(x)
        before = self.path(x)
        return x, before, self.head(before)


class MultiResUNet(EncoderDecoder):
    """A chain of three 3x3 convolutions a level; residual paths of four to one steps on the skip connections.

    Arguments: see `reference.unets`. Images are (B, in_channels, H, W) with H and W multiples of 16.
    """

    def __init__(self, in_channels: int = 3, out_channels: int = 1, dca: Attention = False, patch: Patch = 28) -> None:
        totals = [sum(split(width)) for width in WIDTHS]
        levels = []
        for i, (before, width) in enumerate(zip([in_channels, *totals], WIDTHS[:-1], strict=False)):
            pool = nn.MaxPool2d(2) if i else nn.Identity()
            body = nn.Sequential(pool, multi_res(before, width))
            levels.append(PathLevel(body, totals[i], width, length=4 - i))
        decoders = []
        for before, width in zip(totals[:0:-1], WIDTHS[-2::-1], strict=True):
            up = nn.Sequential(nn.ConvTranspose2d(before, width, kernel_size=2, stride=2), *norm_act(width))
            decoders.append(Decoder(up, multi_res(2 * width, width)))
        super().__init__(
            levels,
            bottom=nn.Sequential(nn.MaxPool2d(2), multi_res(totals[-2], WIDTHS[-1])),
            decoders=decoders,
            head=conv(totals[0], out_channels, 1),
            dca=build_dca(dca, WIDTHS[:-1], [8, 4, 2, 1], patch),
        )
