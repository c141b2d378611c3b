"""What the training example's picture shows."""

from pathlib import Path

import numpy as np
import pytest

from examples import picture, train
from tests.datasets import SHORT, script, synapse


def test_classes_are_colours_and_outlines_are_seen() -> None:
    image = np.full((9, 9, 3), 0.2)
    found, true = np.zeros((2, 9, 9), np.int64)
    found[1, 1], found[4, 4], true[3:8, 3:8] = 1, 2, 2
    plain, outlined = picture.overlay(image, found), picture.overlay(image, found, true)
    assert plain.dtype == np.uint8 and (plain[0, 0] == 51).all()
    for place, index in (((1, 1), 1), ((4, 4), 2)):
        expected = 255 * (0.2 * (1 - picture.OPACITY) + picture.OPACITY * picture.colour(index))
        np.testing.assert_allclose(plain[place], expected, atol=0.5)
    assert (outlined[3, 3:8] == 255).all() and (outlined[2, 3:8] == 0).all() and (outlined[5, 5] == 51).all()
    assert (image == 0.2).all()


def test_colours_differ() -> None:
    """For the eight classes of Synapse."""
    colours = np.stack([picture.colour(i) for i in range(1, 9)])
    away = np.linalg.norm(colours[:, None] - colours[None], axis=-1)
    assert away[~np.eye(8, dtype=bool)].min() > 0.25


def test_names_are_no_formulas(tmp_path: Path) -> None:
    """A file may be called so, and a class."""
    scene = picture.Scene("a$$b", np.zeros((9, 9, 3)), *np.zeros((2, 9, 9), np.int64), 0.5)
    picture.draw([scene], ["$x^{$", "c$"], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 0


def test_the_figure_says_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    close = picture.plt.close
    monkeypatch.setattr(picture.plt, "close", lambda figure: figures.append(figure) or close(figure))
    synapse(tmp_path / "data")
    run = script(train, monkeypatch)
    assert run("--data", tmp_path / "data", "--out", tmp_path / "run", *SHORT) == 0
    (figure,) = figures
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[0] == "aorta" and legend[7] == "stomach" and legend[8] == "outline of the mask"
    titles = [axis.get_title() for axis in figure.axes[:3]]
    assert titles[0].startswith("case00") and titles[1] == "mask" and titles[2].startswith("prediction, Dice 0.")
    assert (tmp_path / "run" / "prediction.png").stat().st_size > 0
