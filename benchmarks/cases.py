"""What is measured: cases, sizes and modes, and the inputs that all providers of a case get."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dca_kernels
import reference
from benchmarks import images
from reference import unets

FEATURES = (32, 64, 128, 256)
STRIDES = (8, 4, 2, 1)
SEED = 0

STAGES = ("patch_embed", "channel_attention", "spatial_attention", "upsample")
HOSTS = unets.HOSTS
CASES = (*STAGES, "dca", *HOSTS)
BATCHES = (1, 8, 32)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# In evaluation nothing is kept for a backward. A host's step is its forward and backward, without the optimizer.
MODES = {"eval": ("forward",), "train": ("forward", "backward", "full")}


@dataclass(frozen=True)
class Size:
    """Channels of each skip map and the side of the token grid; each map has twice the side of the next, the last the
    grid's."""

    features: tuple[int, ...]
    patch: int

    @property
    def side(self) -> int:
        """Pixels of the image and of the largest map."""
        return self.patch * 2 ** (len(self.features) - 1)

    @property
    def sides(self) -> tuple[int, ...]:
        return tuple(self.side // 2**i for i in range(len(self.features)))


SIZES = {
    "paper": Size(FEATURES, 28),
    "wide": Size((64, 128, 256, 512), 28),
    "resunetpp": Size((32, 64, 128), 56),
    "grid56": Size(FEATURES, 56),
    "grid112": Size(FEATURES, 112),
    "tiny": Size((8, 16), 4),  # for tests: nothing of its times holds for the others
}


@dataclass(frozen=True)
class Problem:
    """One case at one size: what all its providers are built from. `training` is of BatchNorm and of autograd."""

    case: str
    size: Size
    batch: int
    dtype: torch.dtype
    training: bool

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES["train" if self.training else "eval"]

    def reference_bytes(self, itemsize: int) -> int:
        """Roughly what the reference's attention matrices and maps take: three at a time, or all for a backward."""
        tokens, scales = self.size.patch**2, len(self.size.features)
        scores = 4 * tokens**2 if self.case in ("spatial_attention", "dca", *HOSTS) else 0
        maps = sum(c * s * s for c, s in zip(self.size.features, self.size.sides, strict=True))
        copies = 3 * scales if self.training else 3
        return itemsize * self.batch * (copies * scores + 2 * copies * maps)


def sizes_of(case: str) -> tuple[str, ...]:
    """The sizes that a case is measured at. The hosts have their own channels; their images are the paper's."""
    if case in HOSTS:
        return ("resunetpp",) if case == "ResUNetPP" else ("paper",)
    return tuple(name for name in SIZES if name != "tiny")


def load_image(path: Path | None) -> np.ndarray:
    """An RGB image (H, W, 3), float32 in 0 .. 1: the file's (see `images.load`), or a tissue slide (256 x 256).

    The slide is rows and columns 128 .. 383 of scikit-image's `immunohistochemistry`, which has no known copyright.

    Raises:
        ValueError: the file holds no image that is read here.
    """
    if path is not None:
        return images.load(path)
    return np.load(Path(__file__).parent / "slide.npy").astype(np.float32) / np.float32(255)


def cut_tiles(image: np.ndarray, count: int, side: int) -> Tensor:
    """`count` tiles (count, 3, side, side) on a regular grid over the image, which is enlarged if it is too small."""
    whole = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)  # (3, H, W)
    if min(whole.shape[1:]) < side:
        scale = side / min(whole.shape[1:])
        size = [math.ceil(n * scale) for n in whole.shape[1:]]
        whole = F.interpolate(whole[None], size, mode="bilinear", align_corners=False)[0]
    per_axis = math.ceil(math.sqrt(count))
    tops, lefts = (np.linspace(0, n - side, per_axis).round().astype(int) for n in whole.shape[1:])
    tiles = [whole[:, top : top + side, left : left + side] for top in tops for left in lefts]
    return torch.stack(tiles[:count])


class Encoder(nn.Module):
    """A U-Net encoder (two 3x3 convolutions a level), untrained; its skip maps are taken before the last norm."""

    def __init__(self, features: Sequence[int] = FEATURES) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        for before, after in zip((3, *features[:-1]), features, strict=True):
            first = nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU())
            self.levels.append(nn.Sequential(first, nn.Conv2d(after, after, 3, padding=1)))
        self.between = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.MaxPool2d(2)) for c in features[:-1]
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, side, side) -> a skip map a level, each of half the side of the one before."""
        maps = []
        for i, level in enumerate(self.levels):
            maps.append(level(self.between[i - 1](maps[-1]) if maps else x))
        return maps


def skip_maps(
    image: np.ndarray,
    batch: int,
    patch: int,
    dtype: torch.dtype,
    device: torch.device,
    features: Sequence[int] = FEATURES,
) -> list[Tensor]:
    """The skip maps of `batch` tiles, whose side makes the token grid the size of the last map, as in the paper."""
    torch.manual_seed(SEED)
    encoder = Encoder(features).to(device)
    tiles = cut_tiles(image, batch, Size(tuple(features), patch).side).to(device)
    with torch.no_grad():
        images = [[x.to(dtype) for x in encoder(tile[None])] for tile in tiles]  # one at a time: some are large
    return [torch.cat(scale) for scale in zip(*images, strict=True)]


def modules(
    patch: int, dtype: torch.dtype, device: torch.device, features: Sequence[int] = FEATURES
) -> dict[str, nn.Module]:
    """The reference and the fused module with the same weights."""
    torch.manual_seed(SEED)
    plain = reference.DCA(features, None, patch)
    fused = dca_kernels.DCA(features, None, patch)
    fused.load_state_dict(plain.state_dict())
    return {"reference": plain.to(device, dtype), "fused": fused.to(device, dtype)}


def upstream(outputs: Sequence[Tensor]) -> list[Tensor]:
    """A gradient for each output."""
    generator = torch.Generator().manual_seed(SEED)
    return [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in outputs]


def step(module: nn.Module, maps: list[Tensor], gradients: list[Tensor] | None) -> tuple[list[Tensor], list[Tensor]]:
    """One forward, and one backward where upstream gradients are given: the outputs, and the gradients of the maps."""
    if gradients is None:
        with torch.no_grad():
            return list(module(maps)), []
    leaves = [x.detach().requires_grad_() for x in maps]
    module.zero_grad(set_to_none=True)
    outputs = module(leaves)
    torch.autograd.backward(outputs, gradients)
    return [y.detach() for y in outputs], [x.grad for x in leaves if x.grad is not None]
