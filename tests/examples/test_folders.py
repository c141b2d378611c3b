"""Data sets that the training example finds by itself or in two folders, their test sets, and what it says of them."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest
from PIL import Image

from examples import train
from tests.datasets import (
    SHORT,
    glas,
    isic,
    kvasir,
    overwrite,
    picture,
    script,
    split,
    synapse,
    truncate,
    with_volumes,
    write_image,
)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    return script(train, monkeypatch)


def test_synapse_without_its_list(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synapse(tmp_path / "data")
    (tmp_path / "data" / "lists" / "lists_Synapse" / "train.txt").unlink()
    assert run("--data", tmp_path / "data", "--out", tmp_path / "run", *SHORT) == 0
    assert "slices of 3 cases, all of them, there is no train.txt: 4 to train on, 2 to" in capsys.readouterr().out


@pytest.mark.parametrize(
    "make, options",
    [
        (isic, []),
        (isic, ["--mask-suffix", "_segmentation"]),
        (lambda root: [rename_masks(isic, root, "_lesion")], ["--mask-suffix", "_lesion"]),
        (lambda root: [merge(root)], []),
    ],
)
def test_training_on_two_folders(
    make, options: list[str], run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "data")
    inputs, truths = (tmp_path / "data" / name for name in ("Input", "Truth"))
    given = ["--images", inputs, "--masks", truths if truths.is_dir() else inputs, *options]
    assert run(*given, "--out", tmp_path / "run", *SHORT) == 0
    assert "3 to train on, 1 to validate on" in capsys.readouterr().out


def rename_masks(make: Callable[[Path], None], root: Path, suffix: str) -> None:
    make(root)
    for path in (root / "Truth").iterdir():
        path.rename(path.with_name(path.name.replace("_segmentation", suffix)))


def merge(root: Path) -> None:
    """Images and masks in one folder."""
    isic(root)
    for path in (root / "Truth").iterdir():
        path.rename(root / "Input" / path.name)
    (root / "Truth").rmdir()


@pytest.mark.parametrize(
    "given, message",
    [
        (["--images", "Input"], "--masks: expected a folder beside --images, got none"),
        (["--masks", "Truth"], "--images: expected a folder beside --masks, got none"),
        (["--images", "Input", "--masks", "Truth", "--data", "."], "--images, --masks: expected instead of --data"),
        (["--mask-suffix", "_seg"], "--mask-suffix: expected beside --images and --masks, got it alone"),
        (["--images", "Input", "--masks", "none"], "none: expected a folder with data, found none"),
        (
            ["--images", "Input", "--masks", "Truth", "--mask-suffix", "_seg"],
            "Truth: expected masks NAME_seg.*, found ISIC_0000_segmentation.png",
        ),
        (
            ["--images", "Input", "--masks", "Other"],
            "found images like ISIC_0000.jpg and masks like lesion0.png: --images, --masks and --mask-suffix say what",
        ),
        (["--images", "Input", "--masks", "Few"], "Input/ISIC_0001.jpg: expected a mask of this name in"),
    ],
)
def test_two_folders_that_do_not_match(
    given: list[str], message: str, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    isic(tmp_path)
    for folder, name in (("Other", "lesion0"), ("Few", "ISIC_0000")):
        write_image(tmp_path / folder / f"{name}.png", picture(0)[1])
    monkeypatch.chdir(tmp_path)
    try:
        status = run(*given, "--out", tmp_path / "run", *SHORT)
    except SystemExit as left:
        status = left.code
    error = capsys.readouterr().err
    assert status == 2 and message in error and "Traceback" not in error


def test_files_that_are_not_read(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overwrite("scan1.dcm", "DICM")(tmp_path)
    assert run("--data", tmp_path, "--out", tmp_path / "run", *SHORT) == 2
    error = capsys.readouterr().err
    assert "found scan1.dcm" in error and ".png" in error and error.count("\n") == 1


def beside_train(root: Path) -> None:
    kvasir(root / "train")
    kvasir(root / "test")


def with_unmasked_test(root: Path) -> None:
    kvasir(root / "train")
    write_image(root / "test" / "1.png", picture(0)[0])


@pytest.mark.parametrize(
    "make, said",
    [
        (glas, ["2 to train on, 1 to validate on; test sets: testA (1)", "test set testA (1):"]),
        (
            beside_train,
            ["train/ and test/", "3 to train on, 1 to validate on; test sets: test (4)", "test set test (4):"],
        ),
        (
            lambda root: [split(root), kvasir(root / "test")],
            ["train/ and val/ and test/", "4 to train on, 3 to validate on; test sets: test (4)"],
        ),
        (with_unmasked_test, ["3 to train on, 1 to validate on\n", "data: test/ is not scored: it has no masks"]),
        (
            with_volumes,
            [
                "4 to train on, 2 to validate on; test sets: test_vol_h5 (6)",
                "test_vol_h5 (6 slices, means over 2 cases)",
                "case0008",
            ],
        ),
    ],
)
def test_test_sets(make, said: list[str], run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "data")
    assert run("--data", tmp_path / "data", "--out", tmp_path / "run", *SHORT) == 0
    out = capsys.readouterr().out
    assert [text for text in said if text not in out] == []


@pytest.mark.parametrize(
    "names, said",
    [
        (("training", "valid", "testing"), "training/ and valid/ and testing/, images/ and masks/: 4 to train on, 4"),
        (("", "validation", "test"), "validation/ and test/, images/ and masks/: 4 to train on, 4"),
    ],
)
def test_other_names_of_parts(names: tuple[str, ...], said: str, run, tmp_path: Path, capsys) -> None:
    """Also beside images/ and masks/ themselves. None of them is left out, and nothing is split off to validate."""
    for name in names:
        kvasir(tmp_path / "data" / name)
    assert run("--data", tmp_path / "data", "--out", tmp_path / "run", *SHORT) == 0
    out = capsys.readouterr().out
    assert f"data: {said} to validate on; test sets: test (4)\n" in out


def test_a_photograph_with_its_preview(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Phones write such JPEGs."""
    kvasir(tmp_path / "data")
    path = tmp_path / "data" / "images" / "cju0b.jpg"
    with Image.open(path) as image:
        image.load()
    image.save(path, format="MPO", save_all=True, append_images=[image.resize((8, 8))])
    with Image.open(path) as image:
        assert image.format == "MPO" and image.n_frames == 2
    assert run("--data", tmp_path / "data", "--out", tmp_path / "run", *SHORT) == 0


def test_a_test_set_is_checked_before_training(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beside_train(tmp_path / "data")
    truncate("test/masks/cju0b.jpg")(tmp_path / "data")
    assert run("--data", tmp_path / "data", "--out", tmp_path / "run", *SHORT) == 2
    assert "test/masks/cju0b.jpg: expected an image that can be read" in capsys.readouterr().err


VOLUME = "test_vol_h5/case0001.npy.h5"


def volume_of(create: Callable[[Any, str], None]) -> Callable[[Path], None]:
    """Replaces a volume by what `create` makes of a file and a name, once for each of its two arrays."""

    def damage(root: Path) -> None:
        with h5py.File(root / VOLUME, "w") as file:
            for name in ("image", "label"):
                create(file, name)

    return damage


def linked(file: Any, name: str) -> None:
    file[name] = h5py.ExternalLink("case0008.npy.h5", name)


def external(file: Any, name: str) -> None:
    """In bytes of a file that is no volume."""
    file.create_dataset(name, (3, 4, 4), "u1", external=[("../lists/lists_Synapse/train.txt", 0, 48)])


def virtual(file: Any, name: str) -> None:
    layout = h5py.VirtualLayout((3, 40, 48), "f4")
    layout[:] = h5py.VirtualSource("case0008.npy.h5", name, (3, 40, 48))
    file.create_virtual_dataset(name, layout)


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            truncate("test_vol_h5/case0008.npy.h5"),
            "case0008.npy.h5: expected a volume with `image` and `label`",
        ),
        (overwrite(VOLUME, "x"), "case0001.npy.h5: expected a volume with `image` and `label`"),
        (volume_of(lambda file, name: file.create_group(name)), "expected a volume with `image` and `label`, got "),
        (volume_of(lambda file, name: file.create_dataset(name, data=1.0)), "of at least one pixel, got ()"),
        (volume_of(lambda file, name: file.create_dataset(name, data=h5py.Empty("f4"))), "one pixel, got None"),
        (volume_of(lambda file, name: file.create_dataset(name, (3, 0, 4), "f4")), "one pixel, got (3, 0, 4)"),
        (
            volume_of(lambda file, name: file.create_dataset(name, (5000, 4, 4), "f4")),
            "expected image of at most 4096 slices, 67108864 pixels in each and 536870912 in all, got (5000, 4, 4)",
        ),
        (
            volume_of(lambda file, name: file.create_dataset(name, (300, 500, 500), "u1", chunks=(300, 500, 500))),
            "expected image in chunks of at most 67108864 pixels, got (300, 500, 500)",
        ),
        (
            volume_of(lambda file, name: file.create_dataset(name, (3, 4, 4), h5py.string_dtype())),
            "expected numbers in `image`, got object",
        ),
        (volume_of(linked), "expected `image` in this file, got a link to another one"),
        (volume_of(external), "expected `image` in this file, got a link to another one"),
        (volume_of(virtual), "expected `image` in this file, got a link to another one"),
    ],
)
def test_volumes_that_cannot_be_read(damage, message: str, run, tmp_path: Path, capsys) -> None:
    with_volumes(tmp_path / "data")
    damage(tmp_path / "data")
    assert run("--data", tmp_path / "data", "--out", tmp_path / "run", *SHORT) == 2
    assert message in capsys.readouterr().err


def test_volumes_without_h5py(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    with_volumes(tmp_path / "data")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "h5py" else found(name))
    assert run("--data", tmp_path / "data", "--out", tmp_path / "run", *SHORT) == 0
    assert "data: test_vol_h5/ is not scored: its volumes need h5py, pip install h5py" in capsys.readouterr().out


def test_what_is_left_out_of_a_set_is_said(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "h5py" else found(name))
    synapse(tmp_path / "data" / "train")
    with_volumes(tmp_path / "data" / "val")
    assert run("--data", tmp_path / "data", "--out", tmp_path / "run", *SHORT) == 0
    assert "data: test_vol_h5/ is not scored: its volumes need h5py, pip install h5py" in capsys.readouterr().out


def test_test_sets_inside_of_a_set_are_said(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train", "val", "test"):
        glas(tmp_path / "data" / name)
    assert run("--data", tmp_path / "data", "--out", tmp_path / "run", *SHORT) == 0
    out = capsys.readouterr().out
    assert "test sets: testA (1), test (3)" in out
    assert "data: val/ holds test sets, which are left out: testA (1)\n" in out
    assert "data: test/ holds test sets, which are left out: testA (1)\n" in out
