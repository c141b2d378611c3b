"""Dice, IoU and HD95 of predicted classes.

A class that is neither in the prediction nor in the mask has no score (NaN), and means leave it out, as nnU-Net's and
MONAI's do: to count it as 1 would make rare classes look good. Where only one of both has it, Dice and IoU are 0 and
HD95 is the image's diagonal, the largest distance there can be, as in the BraTS challenges.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scipy import ndimage
from tabulate import tabulate

Row = dict[str, Any]
DECIMALS = {"Dice": ".4f", "IoU": ".4f", "HD95": ".2f"}


def count(found: np.ndarray, true: np.ndarray, classes: int) -> np.ndarray:
    """Pixels (classes, 3) of each class but the background: in both, in `found`, in `true` (classes of any shape)."""
    pixels = np.zeros((classes, 3), np.int64)
    for i in range(classes):
        here, there = found == i + 1, true == i + 1
        pixels[i] = (here & there).sum(), here.sum(), there.sum()
    return pixels


def overlap(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Dice and IoU (...) from pixels (..., 3)."""
    both, found, true = np.moveaxis(pixels.astype(np.float64), -1, 0)
    nowhere = np.where(found + true > 0, 1.0, np.nan)
    return 2 * both / ((found + true) * nowhere), both / ((found + true - both) * nowhere)


def hd95(found: np.ndarray, true: np.ndarray) -> float:
    """The 95th percentile of the distances from each surface's pixels to the other surface, in pixels, as medpy's hd95.

    Args:
        found, true: (H, W) or (slices, H, W) bool. The surface is the pixels with a neighbour along an axis that is not
            in it; what is outside the image is not. Slices are as far apart as pixels.
    """
    if not found.any() and not true.any():
        return float("nan")
    if not found.any() or not true.any():
        return float(np.linalg.norm(found.shape))
    surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in (found, true)]
    away = [ndimage.distance_transform_edt(~surface) for surface in surfaces]
    return float(np.percentile(np.concatenate([away[1][surfaces[0]], away[0][surfaces[1]]]), 95))


def mean(values: np.ndarray | list[float], axis: int | None = None) -> Any:
    """Of those that are not NaN; NaN where all are."""
    values = np.asarray(values, np.float64)
    there = ~np.isnan(values)
    number = there.sum(axis)
    return np.where(there, values, 0).sum(axis) / np.where(number > 0, number, np.nan)


def summary(pixels: np.ndarray, names: tuple[str, ...]) -> Row:
    """Scores of each class and their means, from pixels (groups, classes, 3): means over the groups come first."""
    dice, iou = (mean(score, axis=0) for score in overlap(pixels))
    return {
        "dice": float(mean(dice)),
        "iou": float(mean(iou)),
        "dice of": dict(zip(names, dice.tolist(), strict=True)),
        "iou of": dict(zip(names, iou.tolist(), strict=True)),
    }


def table(lines: Iterable[Sequence[Any]], *headers: str) -> str:
    """Lines of a name and scores as a table; a score that there is not (NaN) is empty."""
    lines = [[None if value != value else value for value in line] for line in lines]
    formats = [DECIMALS.get(header, "") for header in headers]
    return tabulate(lines, headers, tablefmt="github", floatfmt=formats, disable_numparse=[0])
