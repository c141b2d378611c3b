"""What the hosts are built of.

Convolutions keep the height and width and have a bias, unless said otherwise; the official code has one also where a
BatchNorm follows and makes it void.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from reference.dca import DCA

# `False`: no attention; `True`: the reference's DCA; else called as DCA is, with (features, strides, patch).
Attention = bool | Callable[..., nn.Module]
Patch = int | tuple[int, int]


def build_dca(dca: Attention, features: Sequence[int], strides: Sequence[int], patch: Patch) -> nn.Module | None:
    """The module that a host's `dca` argument asks for, or None for no attention."""
    if dca is False:
        return None
    return (DCA if dca is True else dca)(features, strides, patch)


def conv(before: int, after: int, kernel: int = 3, dilation: int = 1, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    padding = dilation * (kernel // 2)
    return nn.Conv2d(before, after, kernel, stride, padding, dilation, bias=bias)


def norm_act(channels: int, act: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels), act())


def conv_norm_act(before: int, after: int, *args, act: Callable[[], nn.Module] = nn.ReLU, **kwargs) -> nn.Sequential:
    """`conv` with its further arguments, then BatchNorm and activation."""
    return nn.Sequential(conv(before, after, *args, **kwargs), *norm_act(after, act))


def upsample() -> nn.Upsample:
    """Twice the height and width."""
    return nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)


class Sum(nn.ModuleList):
    """The sum of its modules' outputs."""

    def forward(self, x: Tensor) -> Tensor:
        return sum(module(x) for module in self)


class Concat(nn.ModuleList):
    """Its modules' outputs side by side along the channels."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([module(x) for module in self], dim=1)


class SqueezeExcite(nn.Module):
    """A weight in 0 .. 1 for each channel, from the means of all channels."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.weigh = nn.Sequential(
            nn.Linear(channels, channels // reduction, bias=False),
            nn.ReLU(),
            nn.Linear(channels // reduction, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weigh(x.mean((2, 3)))[:, :, None, None]  # (B, C, H, W)


class Level(nn.Module):
    """One level of an encoder: `body`, then `head`, which is the level's last norm and activation.

    Returns what goes on to the next level, and the skip map before and after `head`. DCA takes the map before it,
    since it ends with a norm and an activation of its own; the one after is for a decoder without DCA.
    """

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        before = self.body(x)
        after = self.head(before)
        return after, before, after


class Decoder(nn.Module):
    """One level of a decoder: `body` over the coarser map enlarged and the skip map, in this order."""

    def __init__(self, up: nn.Module, body: nn.Module) -> None:
        super().__init__()
        self.up, self.body = up, body

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.body(torch.cat([self.up(x), skip], dim=1))


def encode(levels: Iterable[nn.Module], x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The last level's output, and each level's skip map before and after the last norm and activation."""
    befores, afters = [], []
    for level in levels:
        x, before, after = level(x)
        befores.append(before)
        afters.append(after)
    return x, befores, afters


def decode(decoders: Iterable[nn.Module], x: Tensor, skips: Sequence[Tensor]) -> Tensor:
    """Through the decoders, coarsest first. `skips` is finest first, as the encoder gives it."""
    for decoder, skip in zip(decoders, reversed(skips), strict=True):
        x = decoder(x, skip)
    return x


class EncoderDecoder(nn.Module):
    """A U-shaped network of which a host gives the parts: levels finest first, decoders coarsest first."""

    def __init__(
        self,
        levels: Iterable[nn.Module],
        bottom: nn.Module,
        decoders: Iterable[nn.Module],
        head: nn.Module,
        dca: nn.Module | None,
    ) -> None:
        super().__init__()
        self.levels = nn.ModuleList(levels)
        self.bottom = bottom
        self.dca = dca
        self.decoders = nn.ModuleList(decoders)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> logits (B, out_channels, H, W)."""
        x, befores, afters = encode(self.levels, x)
        x = self.bottom(x)
        skips = afters if self.dca is None else self.dca(befores)
        return self.head(decode(self.decoders, x, skips))
