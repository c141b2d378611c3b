"""A real image with real masks, from an installed package."""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from skimage import io
from torch import Tensor


def nuclei() -> tuple[Tensor, Tensor]:
    """A fluorescence image (1, 512, 512), float32 in 0 .. 1, and its 125 nuclei, 1 or 0 in the same shape and dtype.

    The image is of the 2018 Data Science Bowl; it and the outlines come with the stardist package, whose files are read
    without importing it: an import would need more packages.

    Raises:
        ModuleNotFoundError: stardist is not installed.
    """
    spec = importlib.util.find_spec("stardist")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("stardist: expected to be installed, for its image: pip install --no-deps stardist")
    folder = Path(spec.origin).parent / "data" / "images"
    image, instances = (io.imread(folder / name).astype(np.float32) for name in ("img2d.tif", "mask2d.tif"))
    image = np.clip(image / np.percentile(image, 99.8), 0, 1, dtype=np.float32)
    return torch.from_numpy(image)[None], torch.from_numpy(instances > 0)[None].float()
