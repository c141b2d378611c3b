"""U-Net (Ronneberger et al., arXiv 1505.04597) as the DCA paper has it: half the width, with BatchNorm."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from reference.unets.blocks import (
    Attention,
    Decoder,
    EncoderDecoder,
    Level,
    Patch,
    build_dca,
    conv,
    conv_norm_act,
    norm_act,
    upsample,
)


def double_conv(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(conv_norm_act(before, after), conv_norm_act(after, after))


class UNet(EncoderDecoder):
    """Two 3x3 convolutions a level.

    Without DCA the official network gives its decoder the maps before their norm; here, as in any U-Net, those after.

    Args:
        in_channels, out_channels: of the image and of the logits.
        dca: False, True or a factory (see `reference.unets`).
        patch: token grid of DCA, the image's side over 8 in the paper; P for P x P or (P_h, P_w).
        widths: channels of each level, finest first, the last one below all skip maps; the paper's where not given.

    Images are (B, in_channels, H, W) with H and W multiples of 16 (2 to the number of skip maps).
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 1,
        dca: Attention = False,
        patch: Patch = 28,
        widths: Sequence[int] = (32, 64, 128, 256, 512),
    ) -> None:
        levels = []
        for i, (before, after) in enumerate(pairwise([in_channels, *widths[:-1]])):
            pool = nn.MaxPool2d(2) if i else nn.Identity()
            body = nn.Sequential(pool, conv_norm_act(before, after), conv(after, after))
            levels.append(Level(body, norm_act(after)))
        super().__init__(
            levels,
            bottom=nn.Sequential(nn.MaxPool2d(2), double_conv(*widths[-2:])),
            decoders=[
                Decoder(nn.Sequential(upsample(), conv_norm_act(before, after)), double_conv(2 * after, after))
                for before, after in pairwise(reversed(widths))
            ],
            head=conv(widths[0], out_channels, 1),
            dca=build_dca(dca, widths[:-1], [2**i for i in reversed(range(len(levels)))], patch),
        )
