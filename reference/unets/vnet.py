"""V-Net (Milletari et al., arXiv 1606.04797) in two dimensions, as the DCA paper has it: with BatchNorm."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from reference.unets.blocks import (
    Attention,
    EncoderDecoder,
    Level,
    Patch,
    Sum,
    build_dca,
    conv,
    conv_norm_act,
    norm_act,
)

WIDTHS = (32, 64, 128, 256, 512)
CONVS = (1, 2, 3, 3, 3)  # a level, in encoder and decoder


def convs(before: int, after: int, count: int) -> nn.Sequential:
    """5x5 convolutions, each but the last with norm and activation."""
    widths = [before] + [after] * (count - 1)
    return nn.Sequential(*(conv_norm_act(c, after, 5, act=nn.PReLU) for c in widths[:-1]), conv(widths[-1], after, 5))


class InputLevel(nn.Module):
    """The finest level, which returns as `Level` does. The map before the head has a residual, the one after has none.

    So it is in the official code. Without DCA the residual is not used.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv, self.residual = conv(before, after, 5), conv(before, after, 1)
        self.head = norm_act(after, nn.PReLU)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.conv(x)
        after = self.head(y)
        return after, y + self.residual(x), after


class ResidualDecoder(nn.Module):
    """One level of the decoder: the coarser map enlarged, plus convolutions over the skip map and it, in this order."""

    def __init__(self, before: int, after: int, count: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(before, after, kernel_size=2, stride=2)
        self.up_head = norm_act(after, nn.PReLU)
        self.convs = convs(2 * after, after, count)
        self.head = norm_act(after, nn.PReLU)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up(x)
        return self.head(x + self.convs(torch.cat([skip, self.up_head(x)], dim=1)))


class VNet(EncoderDecoder):
    """One to three 5x5 convolutions a level with a residual around them; strided convolutions instead of pooling.

    Arguments: see `reference.unets`. Images are (B, in_channels, H, W) with H and W multiples of 16.
    """

    def __init__(self, in_channels: int = 3, out_channels: int = 1, dca: Attention = False, patch: Patch = 28) -> None:
        def level(before: int, after: int, count: int) -> Level:
            down = nn.Conv2d(before, after, kernel_size=2, stride=2)
            residual = Sum([nn.Identity(), convs(after, after, count)])
            return Level(nn.Sequential(down, residual), norm_act(after, nn.PReLU))

        below = [level(*widths, count) for widths, count in zip(pairwise(WIDTHS), CONVS[1:], strict=True)]
        decoders = [
            ResidualDecoder(before, after, count)
            for (before, after), count in zip(pairwise(WIDTHS[::-1]), CONVS[-2::-1], strict=True)
        ]
        super().__init__(
            [InputLevel(in_channels, WIDTHS[0]), *below[:-1]],
            bottom=nn.Sequential(below[-1].body, below[-1].head),
            decoders=decoders,
            head=conv(WIDTHS[0], out_channels, 1),
            dca=build_dca(dca, WIDTHS[:-1], [8, 4, 2, 1], patch),
        )
