"""A real image with real masks: the one that the training example starts with."""

from dataclasses import replace

import torch
from torch import Tensor

from examples import data, files


def nuclei() -> tuple[Tensor, Tensor]:
    """A fluorescence image (1, 512, 512), float32 in 0 .. 1, and its 125 nuclei, 1 or 0 in the same shape and dtype.

    The image is of the 2018 Data Science Bowl; it and the outlines come with the stardist package.

    Raises:
        examples.files.DataError: stardist is not installed.
    """
    whole = replace(data.nuclei().train[0], columns=(0, None))
    image, mask = files.load(whole)
    return torch.from_numpy(image[..., 0].copy())[None], torch.from_numpy(mask)[None].float()
