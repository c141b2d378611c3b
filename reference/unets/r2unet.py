"""R2U-Net (Alom et al., arXiv 1802.06955) as the DCA paper has it: half the width, a norm before the recurrence."""

from itertools import pairwise

from torch import Tensor, nn

from reference.unets.blocks import (
    Attention,
    Decoder,
    EncoderDecoder,
    Level,
    Patch,
    Sum,
    build_dca,
    conv,
    conv_norm_act,
    norm_act,
    upsample,
)

WIDTHS = (32, 64, 128, 256, 512)


class Recurrent(nn.Module):
    """One convolution applied three times, the second and third time to its input plus its last output."""

    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        y = self.step(x)
        for _ in range(2):
            y = self.step(x + y)
        return y


def residual(before: int, after: int) -> nn.Sequential:
    """Two recurrent convolutions with a residual around them, before the last norm and activation."""
    first, second = Recurrent(conv_norm_act(after, after)), Recurrent(conv(after, after))
    return nn.Sequential(conv(before, after, 1), Sum([nn.Identity(), nn.Sequential(norm_act(after), first, second)]))


class R2UNet(EncoderDecoder):
    """Two recurrent 3x3 convolutions a level with a residual around them.

    Arguments: see `reference.unets`. Images are (B, in_channels, H, W) with H and W multiples of 16.
    """

    def __init__(self, in_channels: int = 3, out_channels: int = 1, dca: Attention = False, patch: Patch = 28) -> None:
        levels = []
        for i, (before, after) in enumerate(pairwise([in_channels, *WIDTHS[:-1]])):
            pool = nn.MaxPool2d(2) if i else nn.Identity()
            levels.append(Level(nn.Sequential(pool, residual(before, after)), norm_act(after)))
        super().__init__(
            levels,
            bottom=nn.Sequential(nn.MaxPool2d(2), residual(*WIDTHS[-2:]), norm_act(WIDTHS[-1])),
            decoders=[
                Decoder(
                    nn.Sequential(upsample(), conv_norm_act(before, after)),
                    nn.Sequential(residual(2 * after, after), norm_act(after)),
                )
                for before, after in pairwise(WIDTHS[::-1])
            ],
            head=conv(WIDTHS[0], out_channels, 1),
            dca=build_dca(dca, WIDTHS[:-1], [8, 4, 2, 1], patch),
        )
