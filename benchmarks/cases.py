"""What is measured: the skip maps of a U-Net encoder over tiles of a real image, and two modules of equal weights."""

import math
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from skimage import color, data, io, transform
from torch import Tensor, nn

import dca_kernels
import reference

FEATURES = (32, 64, 128, 256)
STRIDES = (8, 4, 2, 1)
SEED = 0


def load_image(path: Path | None) -> np.ndarray:
    """An RGB image (H, W, 3), float32 in 0 .. 1: the file's, or scikit-image's tissue slide (512 x 512)."""
    image = data.immunohistochemistry() if path is None else _read(path)
    if image.ndim == 2:
        image = color.gray2rgb(image)
    if image.ndim != 3 or image.shape[2] not in (3, 4):
        raise ValueError(f"{path}: expected a grey, RGB or RGBA image, got an array of shape {image.shape}")
    limit = np.iinfo(image.dtype).max if np.issubdtype(image.dtype, np.integer) else 1.0
    return np.asarray(image[..., :3], np.float32) / np.float32(limit)


def _read(path: Path) -> np.ndarray:
    try:
        return io.imread(BytesIO(path.read_bytes()))  # of a path, the readers that fail leave the file open
    except OSError as error:
        raise ValueError(f"{path}: expected an image: {error}") from error


def cut_tiles(image: np.ndarray, count: int, side: int) -> Tensor:
    """`count` tiles (count, 3, side, side) on a regular grid over the image, which is enlarged if it is too small."""
    if min(image.shape[:2]) < side:
        scale = side / min(image.shape[:2])
        image = transform.resize(image, [math.ceil(n * scale) for n in image.shape[:2]], anti_aliasing=True)
    per_axis = math.ceil(math.sqrt(count))
    tops, lefts = (np.linspace(0, n - side, per_axis).round().astype(int) for n in image.shape[:2])
    tiles = [image[top : top + side, left : left + side] for top in tops for left in lefts]
    return torch.from_numpy(np.stack(tiles[:count]).astype(np.float32)).permute(0, 3, 1, 2).contiguous()


class Encoder(nn.Module):
    """A U-Net encoder (two 3x3 convolutions a level), untrained; its skip maps are taken before the last norm."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        for before, after in zip((3, *FEATURES[:-1]), FEATURES, strict=True):
            first = nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU())
            self.levels.append(nn.Sequential(first, nn.Conv2d(after, after, 3, padding=1)))
        self.between = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.MaxPool2d(2)) for c in FEATURES[:-1]
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, side, side) -> the four skip maps, of side, side / 2, side / 4, side / 8."""
        maps = []
        for i, level in enumerate(self.levels):
            maps.append(level(self.between[i - 1](maps[-1]) if maps else x))
        return maps


def skip_maps(image: np.ndarray, batch: int, patch: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """The four skip maps of `batch` tiles of patch * 8 pixels a side, so that the grid is the paper's ratio of them."""
    torch.manual_seed(SEED)
    encoder = Encoder()
    with torch.no_grad():
        maps = encoder(cut_tiles(image, batch, patch * STRIDES[0]))
    return [x.to(device, dtype) for x in maps]


def modules(patch: int, dtype: torch.dtype, device: torch.device) -> dict[str, nn.Module]:
    """The reference and the fused module with the same weights."""
    torch.manual_seed(SEED)
    plain = reference.DCA(FEATURES, STRIDES, patch)
    fused = dca_kernels.DCA(FEATURES, STRIDES, patch)
    fused.load_state_dict(plain.state_dict())
    return {"reference": plain.to(device, dtype), "fused": fused.to(device, dtype)}


def upstream(maps: list[Tensor]) -> list[Tensor]:
    """A gradient for each output."""
    generator = torch.Generator().manual_seed(SEED)
    return [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in maps]


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
