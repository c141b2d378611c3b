"""ResUNet++ (Jha et al., arXiv 1911.07067) as the DCA paper has it."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from reference.unets.blocks import (
    Attention,
    EncoderDecoder,
    Level,
    Patch,
    SqueezeExcite,
    Sum,
    build_dca,
    conv,
    conv_norm_act,
    norm_act,
)

WIDTHS = (32, 64, 128, 256)  # of the encoder; its coarsest map goes into the bridge
BRIDGE = 512
REDUCTIONS = (8, 16, 16)  # of the channels, in the squeeze and excitation after each level with a skip map


def residual(before: int, after: int, stride: int = 1) -> Sum:
    """Two 3x3 convolutions, norms and activations before them, beside a 1x1 convolution."""
    body = nn.Sequential(norm_act(before), conv(before, after, stride=stride), norm_act(after), conv(after, after))
    return Sum([body, conv(before, after, 1, stride=stride)])


def pyramid(before: int, after: int, act: type[nn.Module]) -> nn.Sequential:
    """The sum of 3x3 convolutions at four dilations (ASPP), then a 1x1 convolution."""
    branches = [conv_norm_act(before, after, dilation=rate, act=act) for rate in (1, 6, 12, 18)]
    return nn.Sequential(Sum(branches), conv_norm_act(after, after, 1, act=act))


class GatedDecoder(nn.Module):
    """One level of the decoder: the coarser map, weighed by itself and the skip map, enlarged and joined to the skip.

    The skip maps have no norm of their own: gate and body begin with one.
    """

    def __init__(self, before: int, skip: int, after: int) -> None:
        super().__init__()
        self.from_skip = nn.Sequential(norm_act(skip), conv(skip, before), nn.MaxPool2d(2))
        self.from_coarse = nn.Sequential(norm_act(before), conv(before, before))
        self.gate = nn.Sequential(norm_act(before), conv(before, 1, 1))
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.body = residual(before + skip, after)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = x * self.gate(self.from_skip(skip) + self.from_coarse(x))
        return self.body(torch.cat([self.up(x), skip], dim=1))


class ResUNetPP(EncoderDecoder):
    """Residual blocks with squeeze and excitation, dilated pyramids below and above, gates on three skip connections.

    Arguments: see `reference.unets`; `patch` is the image's side over 4 in the paper. Images are (B, in_channels, H, W)
    with H and W multiples of 8.
    """

    def __init__(self, in_channels: int = 3, out_channels: int = 1, dca: Attention = False, patch: Patch = 56) -> None:
        first = Sum(
            [
                nn.Sequential(conv_norm_act(in_channels, WIDTHS[0]), conv(WIDTHS[0], WIDTHS[0])),
                conv(in_channels, WIDTHS[0]),
            ]
        )
        below = [
            nn.Sequential(SqueezeExcite(before, reduction), residual(before, after, stride=2))
            for (before, after), reduction in zip(pairwise(WIDTHS), REDUCTIONS, strict=True)
        ]
        coarse = [BRIDGE, *WIDTHS[:0:-1]]  # channels into each decoder, and out of the last
        super().__init__(
            [Level(body, nn.Identity()) for body in (first, *below[:-1])],
            bottom=nn.Sequential(below[-1], pyramid(WIDTHS[-1], BRIDGE, act=nn.Identity)),
            decoders=[
                GatedDecoder(before, skip, after)
                for (before, after), skip in zip(pairwise(coarse), WIDTHS[-2::-1], strict=True)
            ],
            head=nn.Sequential(pyramid(coarse[-1], WIDTHS[0], act=nn.ReLU), conv(WIDTHS[0], out_channels, 1)),
            dca=build_dca(dca, WIDTHS[:-1], [4, 2, 1], patch),
        )
