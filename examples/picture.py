"""Pictures of predictions: classes as colours over the image, the mask's outlines as lines."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from skimage.segmentation import find_boundaries

matplotlib.use("Agg")
from matplotlib import patheffects
from matplotlib import pyplot as plt  # the backend above comes first: there may be no screen
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

# Okabe and Ito's colours, which colour-blind people tell apart; wine for their black, which is not seen on images.
COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#882255")
OPACITY = 0.65
LARGEST = 3.6, 7.0  # width and height of a panel, inches


@dataclass(frozen=True)
class Scene:
    """An image, its mask and what was predicted of it."""

    name: str
    image: np.ndarray  # (H, W, 3), 0 .. 1
    true: np.ndarray  # (H, W) classes
    found: np.ndarray  # (H, W) classes
    dice: float


def colour(index: int) -> np.ndarray:
    """(3,) in 0 .. 1 of the class `index`, 1 or more; after the last colour the first comes again."""
    return np.array(matplotlib.colors.to_rgb(COLOURS[(index - 1) % len(COLOURS)]))


def overlay(image: np.ndarray, found: np.ndarray, true: np.ndarray | None = None) -> np.ndarray:
    """An image (H, W, 3) in 0 .. 1 with classes (H, W) as colours; (H, W, 3) uint8.

    With a mask `true` (H, W), its outlines are white lines beside black ones.
    """
    picture = np.array(image)
    for index in np.unique(found[found > 0]):
        picture[found == index] = (1 - OPACITY) * picture[found == index] + OPACITY * colour(index)
    if true is not None:
        picture[find_boundaries(true, mode="thick")] = 0
        picture[find_boundaries(true, mode="inner")] = 1
    return np.round(255 * picture).clip(0, 255).astype(np.uint8)


def draw(scenes: Sequence[Scene], classes: Sequence[str], path: Path) -> None:
    """A row for each scene: the image, its mask, and the prediction with the mask's outlines; a legend below."""
    height = max(scene.image.shape[0] / scene.image.shape[1] for scene in scenes)  # of a panel, in widths
    width = min(LARGEST[0], LARGEST[1] / height)
    size = max(3 * width, 6), (width * height + 0.4) * len(scenes) + 0.8
    figure, axes = plt.subplots(len(scenes), 3, figsize=size, squeeze=False, layout="constrained")
    edge = [patheffects.withStroke(linewidth=2.6, foreground="black")]
    for row, scene in zip(axes, scenes, strict=True):
        panels = [
            (scene.name, scene.image),
            ("mask", overlay(scene.image, scene.true)),
            (f"prediction, Dice {scene.dice:.3f}", overlay(scene.image, scene.found)),
        ]
        for axis, (title, panel) in zip(row, panels, strict=True):
            axis.imshow(panel)
            axis.set_title(title, fontsize=10, parse_math=False)  # a file may be called a$b$
            axis.axis("off")
        for index in np.unique(scene.true[scene.true > 0]):
            row[2].contour(scene.true == index, [0.5], colors="white", linewidths=1.2).set_path_effects(edge)
    keys = [Patch(color=colour(i), label=name) for i, name in enumerate(classes, start=1)]
    keys.append(Line2D([], [], color="white", linewidth=1.2, path_effects=edge, label="outline of the mask"))
    legend = figure.legend(handles=keys, loc="outside lower center", ncols=3, fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.savefig(path, dpi=150, format="png", bbox_inches="tight")
    plt.close(figure)
