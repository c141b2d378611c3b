"""Small data sets in the layouts that the examples read, ways to damage them, and the examples' commands on them."""

import json
import os
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from reference import unets

ROOT = Path(__file__).parents[1]
WIDTHS = (4, 8, 8, 16, 16)
# A network of a thousandth of the parameters, for the same script in another process.
NARROW = f"""
from functools import partial
from reference import unets
unets.UNet = partial(unets.UNet, widths={WIDTHS})
"""
TINY = ["--crop", "32", "--batch", "2", "--steps", "3", "--epochs", "3"]
SHORT = ["--crop", "32", "--batch", "2", "--steps", "1", "--epochs", "1"]


def script(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs a command with a small network in this process and gives its exit status."""
    monkeypatch.setattr(unets, "UNet", partial(unets.UNet, widths=WIDTHS))

    def run(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", [module.__name__, *map(str, arguments)])
        return module.main()

    return run


def read_json(path: Path) -> Any:
    """Of a file that is JSON as other programs read it: NaN is none."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{path}: {constant}")

    return json.loads(path.read_text(), parse_constant=refuse)


def history(folder: Path) -> list[dict]:
    return read_json(folder / "history.json")


def picture(seed: int, height: int = 40, width: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """A noisy image (H, W, 3) uint8 with two bright boxes, and their instances 0, 1, 2."""
    generator = np.random.default_rng(seed)
    instances = np.zeros((height, width), np.uint8)
    for i in (1, 2):
        top, left = generator.integers(height - 16), generator.integers(width - 16)
        instances[top : top + 14, left : left + 14] = i
    image = generator.integers(100, size=(height, width, 3)) + 120 * (instances > 0)[..., None]
    return image.astype(np.uint8), instances


class Bright(nn.Module):
    """A network that finds the boxes of `picture`, without an error, and takes each for the class `index`."""

    def __init__(self, outputs: int = 1, index: int = 0) -> None:
        super().__init__()
        self.outputs, self.index = outputs, index

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.zeros(len(x), self.outputs, *x.shape[2:])
        logits[:, self.index] = 99 * (x[:, 0] - 110 / 255)
        return logits


def write_image(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))


def glas(root: Path) -> None:
    for i, name in enumerate(["train_1", "train_2", "train_10", "testA_1"]):
        image, instances = picture(i)
        write_image(root / f"{name}.bmp", image)
        write_image(root / f"{name}_anno.bmp", instances)
    (root / "Grade.csv").write_text("name\n")


def polygons(*boxes: tuple[int, int, int, int]) -> str:
    """ImageScope's XML; a box is top, left, bottom, right."""
    regions = ""
    for top, left, bottom, right in boxes:
        corners = ((top, left), (top, right), (bottom, right), (bottom, left))
        corners = "".join(f'<Vertex X="{x}.0" Y="{y}.0" Z="0.0" />' for y, x in corners)
        regions += f"<Region><Vertices>{corners}</Vertices></Region>"
    regions += '<Region><Vertices><Vertex X="3.0" Y="3.0" /></Vertices></Region>'
    return f"<Annotations><Annotation><Regions>{regions}</Regions></Annotation></Annotations>"


def monuseg(root: Path) -> None:
    for i, name in enumerate(["TCGA-18-01", "TCGA-21-01", "TCGA-38-01"]):
        write_image(root / "Tissue Images" / f"{name}.tif", picture(i)[0])
        (root / "Annotations").mkdir(exist_ok=True)
        (root / "Annotations" / f"{name}.xml").write_text(polygons((4, 6, 20, 30), (24, 2, 30, 9)))


def monuseg_test(root: Path) -> None:
    for i, name in enumerate(["TCGA-18-01", "TCGA-21-01", "TCGA-38-01"]):
        write_image(root / f"{name}.tif", picture(i)[0])
        (root / f"{name}.xml").write_text(polygons((4, 6, 20, 30), (24, 2, 30, 9)))


def kvasir(root: Path) -> None:
    for i, name in enumerate(["cju0a", "cju0b", "cju0c", "cju0d"]):
        image, instances = picture(i, 40 + i)
        write_image(root / "images" / f"{name}.jpg", image)
        write_image(root / "masks" / f"{name}.jpg", np.repeat((instances > 0)[..., None] * np.uint8(255), 3, axis=2))


def clinic(root: Path) -> None:
    for i in range(1, 12):
        image, instances = picture(i)
        write_image(root / "Original" / f"{i}.tif", image)
        write_image(root / "Ground Truth" / f"{i}.tif", (instances > 0) * np.uint8(255))


def one_folder(root: Path) -> None:
    for i in range(4):
        image, instances = picture(i)
        write_image(root / f"benign ({i}).png", image)
        write_image(root / f"benign ({i})_mask.png", (instances > 0) * np.uint8(255))


def synapse(root: Path) -> None:
    (root / "train_npz").mkdir(parents=True)
    names = [f"case{case}_slice{i:03}" for case in ("0005", "0006", "0040") for i in range(2)]
    for i, name in enumerate(names):
        image, instances = picture(i)
        label = (instances * 4).astype(np.float32)  # classes 4 and 8
        np.savez(root / "train_npz" / f"{name}.npz", image=image.mean(2, dtype=np.float32) / 255, label=label)
    (root / "lists" / "lists_Synapse").mkdir(parents=True)
    (root / "lists" / "lists_Synapse" / "train.txt").write_text("\n".join(names) + "\n")


def volumes(root: Path) -> None:
    """Two cases of three slices, for beside `synapse`; the second one is empty at the top."""
    import h5py

    (root / "test_vol_h5").mkdir(parents=True)
    for case in (1, 8):
        slices = [picture(10 * case + i) for i in range(3)]
        image = np.stack([image.mean(2, dtype=np.float32) / 255 for image, _ in slices])
        label = np.stack([instances * 4.0 for _, instances in slices])
        label[2] *= case == 1
        with h5py.File(root / "test_vol_h5" / f"case{case:04}.npy.h5", "w") as file:
            file["image"], file["label"] = image, label


def with_volumes(root: Path) -> None:
    synapse(root)
    volumes(root)


def split(root: Path) -> None:
    kvasir(root / "train")
    kvasir(root / "val")
    (root / "val" / "images" / "cju0a.jpg").unlink()
    (root / "val" / "masks" / "cju0a.jpg").unlink()


def isic(root: Path) -> None:
    for i in range(4):
        image, instances = picture(i)
        write_image(root / "Input" / f"ISIC_{i:04}.jpg", image)
        write_image(root / "Truth" / f"ISIC_{i:04}_segmentation.png", (instances > 0) * np.uint8(255))


def masked(root: Path, mask: Callable[[np.ndarray], object], suffix: str = ".png") -> None:
    """images/ and masks/ of four pictures; `mask` makes an array or an image of the instances (0, 1, 2)."""
    for i in range(4):
        image, instances = picture(i)
        write_image(root / "images" / f"{i}.png", image)
        made = mask(instances)
        (root / "masks").mkdir(exist_ok=True)
        (made if isinstance(made, Image.Image) else Image.fromarray(made)).save(root / "masks" / f"{i}{suffix}")


def overwrite(name: str, content: bytes | str) -> Callable[[Path], None]:
    return lambda root: (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def truncate(name: str) -> Callable[[Path], None]:
    return lambda root: os.truncate(root / name, (root / name).stat().st_size // 2)


class MakesFolder:
    """What a pickle of this runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


def compressed(path: Path) -> None:
    """Replace a zip by one that is smaller than what it holds."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def remove(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


def rename(name: str, to: str) -> Callable[[Path], None]:
    return lambda root: (root / name).rename(root / to) and None


def image_of(name: str, array: np.ndarray) -> Callable[[Path], None]:
    return lambda root: write_image(root / name, array)


def arrays_of(name: str, **arrays: np.ndarray) -> Callable[[Path], None]:
    return lambda root: np.savez(root / name, **arrays)
