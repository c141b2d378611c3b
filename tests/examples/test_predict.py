"""Prediction from a saved network: what is written, how it is scored, and what is refused."""

import csv
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples import data, network, predict, scores, train
from examples import picture as pictures
from tests.datasets import (
    SHORT,
    Bright,
    MakesFolder,
    glas,
    isic,
    kvasir,
    masked,
    overwrite,
    picture,
    script,
    split,
    with_volumes,
    write_image,
)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    return script(predict, monkeypatch)


@pytest.fixture
def best(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """Trains on four pictures for a moment, with the options given, and gives the saved network."""
    run = script(train, monkeypatch)

    def best(make: Callable[[Path], None] = kvasir, *options: object) -> Path:
        make(tmp_path / "training")
        assert run("--data", tmp_path / "training", "--out", tmp_path / "run", *SHORT, *options) == 0
        return tmp_path / "run" / "best.pt"

    return best


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_folder_of_images(run, best, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = best()
    sizes = [(40, 48), (70, 33), (20, 90)]  # the last is lower than a tile
    for i, (height, width) in enumerate(sizes):
        write_image(tmp_path / "new" / f"{i}.png", picture(i, height, width)[0])
    capsys.readouterr()
    assert run(weights, tmp_path / "new") == 0
    out = capsys.readouterr().out
    assert "data: images without masks: 3\n" in out and "Dice" not in out
    folder = tmp_path / "run" / "new-predicted"
    for i, (height, width) in enumerate(sizes):
        mask = np.asarray(Image.open(folder / "masks" / f"{i}.png"))
        assert mask.shape == (height, width) and mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 255}
        assert np.asarray(Image.open(folder / "overlays" / f"{i}.png")).shape == (height, width, 3)
    assert not list(folder.rglob("*.csv")) and not list(folder.rglob("*.unfinished"))


@pytest.mark.parametrize("resize", [[], ["--resize", 32]])
def test_scores_are_of_the_written_masks(resize, run, best, tmp_path: Path, capsys) -> None:
    """At the images' own size, also where the network sees them resized."""
    weights = best(lambda root: masked(root, lambda i: i), "--classes", 3, *resize)
    capsys.readouterr()
    assert run(weights, tmp_path / "training", "--out", tmp_path / "out") == 0
    out = capsys.readouterr().out
    lines = rows(tmp_path / "out" / "scores.csv")
    assert [(line["image"], line["class"]) for line in lines] == [
        (str(i), f"class {c}") for i in range(4) for c in (1, 2)
    ]
    for line in lines:
        i, c = int(line["image"]), int(line["class"][-1])
        found = np.asarray(Image.open(tmp_path / "out" / "masks" / f"{i}.png"))
        true = picture(i)[1]
        assert found.shape == true.shape and found.max() <= 2
        here, there = found == c, true == c
        assert float(line["Dice"]) == pytest.approx(2 * (here & there).sum() / (here.sum() + there.sum()))
        assert float(line["IoU"]) == pytest.approx((here & there).sum() / (here | there).sum())
        assert float(line["HD95"]) == pytest.approx(hd95_by_pairs(here, there))
    mean = np.mean([float(line["Dice"]) for line in lines])
    assert f"| mean    | {mean:.4f} |" in out and "| class 2 |" in out


def test_long_tables_are_shortened(run, best, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(predict, "SHOWN", 3)
    weights = best()
    capsys.readouterr()
    assert run(weights, tmp_path / "training") == 0
    out = capsys.readouterr().out
    assert "| ... 1 more, in scores.csv |" in out and "cju0d" not in out
    assert len(rows(tmp_path / "run" / "training-predicted" / "scores.csv")) == 4


@pytest.mark.parametrize(
    "make, said, names",
    [
        (glas, "train_* of them: testA (1); what is there to train on is left out", {"testA/masks/testA_1.png"}),
        (split, "val (3)", {f"val/masks/cju0{i}.png" for i in "bcd"}),
        (
            with_volumes,
            "test_vol_h5 (6)",
            {f"test_vol_h5/masks/case000{c}_slice00{i}.png" for c in (1, 8) for i in range(3)},
        ),
    ],
)
def test_sets_of_a_data_set(make, said: str, names: set[str], run, best, tmp_path: Path, capsys) -> None:
    weights = best(make)
    capsys.readouterr()
    assert run(weights, tmp_path / "training", "--out", tmp_path / "out") == 0
    assert said in capsys.readouterr().out
    assert {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("masks/*")} == names


def with_unmasked_test(root: Path) -> None:
    kvasir(root / "train")
    for i in (5, 6):
        write_image(root / "test" / f"{i}.png", picture(i)[0])


TRAINED_ON = "data: no test set and no val/: the network may have been trained on these images\n"


def test_a_test_set_without_masks_is_predicted(run, best, tmp_path: Path, capsys) -> None:
    weights = best(with_unmasked_test)
    assert "data: test/ is not scored: it has no masks\n" in capsys.readouterr().out
    assert run(weights, tmp_path / "training", "--out", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "test (2); what is there to train on is left out" in out and "is not scored" in out
    assert "Dice" not in out and TRAINED_ON not in out and out.endswith(f"masks, overlays: {tmp_path / 'out'}\n")
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert written == {f"test/{kind}/{i}.png" for kind in ("masks", "overlays") for i in (5, 6)}


def test_images_to_train_on_are_said(run, best, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = best()
    capsys.readouterr()
    assert run(weights, tmp_path / "training", "--out", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert TRAINED_ON in out and "scores: means over images, at their own size; a volume" in out
    assert out.endswith(f"masks, overlays and scores: {tmp_path / 'out'}\n")


@pytest.mark.parametrize("masks", [True, False])
def test_masks_and_overlays_show_what_was_found(masks: bool, run, best, tmp_path: Path, monkeypatch) -> None:
    """By a network that finds exactly the boxes."""
    weights = best()
    plan, _ = network.read_network(weights)
    monkeypatch.setattr(predict, "read_network", lambda path: (plan, Bright()))
    masked(tmp_path / "new", lambda instances: (instances > 1) * np.uint8(255))  # not the same as what is found
    folder = tmp_path / "new" if masks else tmp_path / "new" / "images"
    assert run(weights, folder, "--out", tmp_path / "out") == 0
    for i in range(4):
        image, instances = picture(i)
        found = (instances > 0).astype(np.int64)
        mask, overlay = (np.asarray(Image.open(tmp_path / "out" / d / f"{i}.png")) for d in ("masks", "overlays"))
        np.testing.assert_array_equal(mask, 255 * found)
        expected = pictures.overlay(image / np.float32(255), found, instances > 1 if masks else None)
        np.testing.assert_array_equal(overlay, expected)


def test_volumes_are_scored_whole(run, best, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the second one the last slice is empty: alone, it would have no score."""
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    weights = best(with_volumes)
    capsys.readouterr()
    assert run(weights, tmp_path / "training", "--out", tmp_path / "out") == 0
    assert re.search(r"\| case0001 +\|", capsys.readouterr().out)
    lines = rows(tmp_path / "out" / "test_vol_h5" / "scores.csv")
    assert [(line["image"], line["class"]) for line in lines] == [
        (case, organ) for case in ("case0001", "case0008") for organ in data.ORGANS
    ]
    for line in lines:
        masks = sorted((tmp_path / "out" / "test_vol_h5" / "masks").glob(f"{line['image']}_*.png"))
        with h5py.File(tmp_path / "training" / "test_vol_h5" / f"{line['image']}.npy.h5") as file:
            true = file["label"][:] == 1 + data.ORGANS.index(line["class"])
        found = np.stack([np.asarray(Image.open(path)) for path in masks]) == 1 + data.ORGANS.index(line["class"])
        assert found.shape == true.shape == (3, 40, 48)
        expected = hd95_by_pairs(found, true)
        assert float(line["HD95"] or "nan") == pytest.approx(expected, nan_ok=True)
        both = found.sum() + true.sum()
        expected = 2 * (found & true).sum() / both if both else np.nan
        assert float(line["Dice"] or "nan") == pytest.approx(expected, nan_ok=True)


def test_an_image_of_one_row_is_scored_as_one(run, best, tmp_path: Path) -> None:
    """It has two axes: a surface has neighbours along both."""
    weights = best()
    true = np.zeros((1, 48), np.uint8)
    true[:, 10:30] = 255
    for name in ("images", "masks"):
        write_image(tmp_path / "rows" / name / "a$$b.png", true)
    assert run(weights, tmp_path / "rows", "--out", tmp_path / "out") == 0
    (line,) = rows(tmp_path / "out" / "scores.csv")
    found = np.asarray(Image.open(tmp_path / "out" / "masks" / "a$$b.png"))
    expected = hd95_by_pairs(found > 0, true > 0) if found.any() else np.hypot(1, 48)
    assert float(line["HD95"]) == pytest.approx(expected)


def test_prediction_for_two_folders(run, best, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = best()
    isic(tmp_path / "ISIC")
    capsys.readouterr()
    given = ["--images", tmp_path / "ISIC" / "Input", "--masks", tmp_path / "ISIC" / "Truth"]
    assert run(weights, *given, "--mask-suffix", "_segmentation") == 0
    assert "| ISIC_0003 |" in capsys.readouterr().out


def doubled(times: int) -> list:
    """A small value that is endless to print."""
    value: list = []
    for _ in range(times):
        value = [value, value]
    return value


PLANS = {"host": doubled(60), "dca": {}, "patch": 0, "crop": 10**9, "resize": "all", "classes": ()}


def test_what_prediction_refuses(run, best, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = best()
    image = tmp_path / "new" / "images" / "a.png"
    write_image(image, picture(0)[0])
    write_image(tmp_path / "broken" / "a.png", picture(0)[0])
    (tmp_path / "broken" / "b.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "scans").mkdir()
    overwrite("scans/1.dcm", "DICM")(tmp_path)
    torch.save(torch.load(weights)["weights"], tmp_path / "plain.pt")
    state = torch.load(weights)
    torch.save(state | {"plan": state["plan"] | {"dca": "none"}}, tmp_path / "other.pt")
    torch.save(state | {"plan": {"host": "UNet"}}, tmp_path / "part.pt")
    for name, value in PLANS.items():
        torch.save(state | {"plan": state["plan"] | {name: value}}, tmp_path / f"{name}.pt")
    first, tensor = next(iter(state["weights"].items()))
    for name, changed in {
        "nan": tensor * torch.nan,
        "complex": tensor + 0j,
        "wide": tensor.expand(9, *tensor.shape),
    }.items():
        torch.save(state | {"weights": state["weights"] | {first: changed}}, tmp_path / f"{name}.pt")
    torch.save(state | {"weights": [1]}, tmp_path / "list.pt")
    torch.save(state | {"weights": MakesFolder(tmp_path / "unpickled")}, tmp_path / "program.pt")
    (tmp_path / "picture.pt").write_bytes(image.read_bytes())
    for name in ("masks", "overlays"):
        write_image(tmp_path / name / "a.png", picture(0)[0])
    for given, message in [
        ([tmp_path / "none.pt", tmp_path / "new"], "none.pt: expected a file of examples.train, found none\n"),
        ([tmp_path / "picture.pt", tmp_path / "new"], "picture.pt: expected a file of examples.train"),
        ([tmp_path / "plain.pt", tmp_path / "new"], "plain.pt: expected a file of examples.train with plan, weights"),
        (
            [tmp_path / "run" / "last.pt", tmp_path / "new"],
            "last.pt: expected a file of examples.train with",
        ),
        ([tmp_path / "other.pt", tmp_path / "new"], "other.pt: expected weights of UNet"),
        ([tmp_path / "part.pt", tmp_path / "new"], "part.pt: expected the plan of a network"),
        *(
            ([tmp_path / f"{name}.pt", tmp_path / "new"], f"{name}.pt: expected the plan of a network")
            for name in PLANS
        ),
        ([tmp_path / "nan.pt", tmp_path / "new"], f"nan.pt: expected finite weights, got others in {first}"),
        ([tmp_path / "complex.pt", tmp_path / "new"], "complex.pt: expected weights of UNet"),
        ([tmp_path / "wide.pt", tmp_path / "new"], "wide.pt: expected weights of UNet"),
        ([tmp_path / "list.pt", tmp_path / "new"], "list.pt: expected weights of UNet"),
        ([tmp_path / "program.pt", tmp_path / "new"], "program.pt: expected a file of examples.train, got another one"),
        ([tmp_path / (300 * "x"), tmp_path / "new"], "x: expected a file of examples.train, got OSError: "),
        ([weights, tmp_path / "none"], "none: expected a folder with data, found none"),
        ([weights, tmp_path / "empty"], "empty: expected NAME.bmp"),
        ([weights, tmp_path / "scans"], "found 1.dcm"),
        ([weights, tmp_path / "broken"], "broken/b.png: expected an image of 8 or 16 bits, got another file"),
        ([weights, tmp_path / "masks", "--out", tmp_path], "expected another folder"),
        ([weights, tmp_path / "new", "--out", image], "a.png: expected a folder, got a file"),
    ]:
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
        assert run(*given) == 2, message
        said = capsys.readouterr()
        assert message in said.err and said.err.count("\n") == 1 and len(said.err) < 1000
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize(
    "given, message",
    [
        (["best.pt"], "FOLDER: expected a folder of images, or --images and --masks, got none"),
        (["best.pt", "a", "--images", "b", "--masks", "c"], "--images, --masks: expected instead of FOLDER, got both"),
        (["best.pt", "--masks", "c"], "--images: expected a folder beside --masks, got none"),
        (["best.pt", "--instances"], "--instances: expected beside FOLDER or --images, got it alone"),
        (["best.pt", "a", "--batch", "0"], "--batch: expected an integer of at least 1, got 0"),
    ],
)
def test_arguments_of_prediction(given: list[str], message: str, run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(*given)
    assert message in capsys.readouterr().err


def test_help_of_prediction_says_defaults_in_words(run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        run("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert "nothing" not in said and "(default: FOLDER-predicted, beside WEIGHTS)" in said


def test_a_saved_network_is_plain_and_whole(best) -> None:
    weights = best(kvasir, "--dca", "reference")
    state = torch.load(weights, weights_only=True)
    assert state["plan"] == {
        "host": "UNet",
        "dca": "reference",
        "patch": 4,
        "crop": 32,
        "resize": None,
        "classes": ("foreground",),
    }
    plan, built = network.read_network(weights)
    assert plan.classes == ("foreground",)
    for name, tensor in built.state_dict().items():
        assert torch.equal(tensor, state["weights"][name])


def hd95_by_pairs(found: np.ndarray, true: np.ndarray) -> float:
    """By all pairs of surface pixels; NaN and the diagonal where there is nothing in both or in one."""
    if not found.any() or not true.any():
        return np.nan if not found.any() and not true.any() else np.linalg.norm(found.shape)

    def surface(mask: np.ndarray) -> np.ndarray:
        padded = np.pad(mask, 1)
        neighbours = [np.roll(padded, step, axis) for axis in range(mask.ndim) for step in (-1, 1)]
        return np.argwhere(padded & ~np.logical_and.reduce(neighbours))

    away = np.linalg.norm(surface(found)[:, None] - surface(true)[None], axis=-1)
    return np.percentile(np.concatenate([away.min(0), away.min(1)]), 95)


@pytest.mark.parametrize("seed", range(8))
def test_hd95(seed: int) -> None:
    generator = np.random.default_rng(seed)
    found, true = (np.zeros((19, 23), bool) for _ in range(2))
    for mask in (found, true):
        top, left = generator.integers(10, size=2)
        mask[top : top + generator.integers(1, 12), left : left + generator.integers(1, 12)] = True
        mask |= generator.random(mask.shape) < 0.02
    assert scores.hd95(found, true) == pytest.approx(hd95_by_pairs(found, true))
    assert scores.hd95(found, found) == 0


def test_classes_that_are_not_there() -> None:
    """In neither: no score, and means leave it out. In one of both: 0, and the diagonal."""
    nothing, something = np.zeros((3, 4), np.int64), np.eye(3, 4, dtype=np.int64)
    assert np.isnan(scores.hd95(nothing > 0, nothing > 0))
    assert scores.hd95(nothing > 0, something > 0) == scores.hd95(something > 0, nothing > 0) == 5
    pixels = np.stack([scores.count(nothing, nothing, 1), scores.count(nothing, something, 1)])
    dice, iou = scores.overlap(pixels)
    np.testing.assert_array_equal(dice[:, 0], [np.nan, 0])
    np.testing.assert_array_equal(iou[:, 0], [np.nan, 0])
    assert scores.mean(dice) == 0 and np.isnan(scores.mean(dice[:1]))
