"""Finds image and mask pairs in the folders that segmentation data sets come in, checks them and reads them.

Recognised by their structure, in the folder that is named or in the only one inside it that has such a structure:

- GlaS: one folder with NAME.bmp and NAME_anno.bmp (instances, 0 is background). train_* are used where there are any:
  testA_* and testB_* stay unseen.
- MoNuSeg: "Tissue Images"/NAME.tif and Annotations/NAME.xml, or both in one folder (polygons in pixels, as ImageScope
  writes them).
- Kvasir-SEG, CVC-ClinicDB and most prepared sets: images/NAME.* and masks/NAME.*, or Original/ and "Ground Truth"/.
- Synapse as TransUNet's authors prepared it: train_npz/caseNNNN_sliceNNN.npz with `image` (H, W) in 0 .. 1 and `label`
  (H, W) of 9 classes, and where it is there a train.txt that lists the slices.
- Any of these twice, in train/ and val/.
"""

import importlib.util
import re
import zipfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.nn import functional as F
from tqdm import tqdm

ORGANS = ("aorta", "gallbladder", "left kidney", "right kidney", "liver", "pancreas", "spleen", "stomach")
JPEG = {".jpg", ".jpeg"}
IMAGES = {".bmp", ".png", ".tif", ".tiff"} | JPEG
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "original", "tissue images")
MASK_FOLDERS = ("masks", "mask", "ground truth", "groundtruth", "gt", "labels", "label", "annotations")


class DataError(ValueError):
    """The data are not what was expected; the message names the file."""


@dataclass(frozen=True)
class Sample:
    """An image and its mask: two files, or one .npz that holds both."""

    image: Path
    mask: Path
    group: str  # samples of one group are not split between training and validation
    columns: tuple[int, int | None] = (0, None)  # those of the image that belong to the sample


@dataclass(frozen=True)
class Pairs:
    """What was found in a folder."""

    layout: str
    samples: list[Sample]
    classes: tuple[str, ...]  # without the background, which is class 0
    in_order: bool = False  # neighbours resemble each other, as frames of a video do


@dataclass(frozen=True)
class Data:
    """Samples to train on and samples to validate on."""

    layout: str
    train: list[Sample]
    validation: list[Sample]
    classes: tuple[str, ...]


def nuclei() -> Data:
    """The microscope image (512 x 512) and its 125 outlined nuclei that the stardist package brings along.

    Its left 384 columns are to train on, the others to validate on. stardist is not imported: it would import more.
    """
    spec = importlib.util.find_spec("stardist")
    if spec is None or spec.origin is None:
        raise DataError("stardist: expected the package, which brings the image: pip install --no-deps stardist==0.9.2")
    files = [Path(spec.origin).parent / "data" / "images" / name for name in ("img2d.tif", "mask2d.tif")]
    train, validation = (Sample(*files, "nuclei", columns) for columns in ((0, 384), (384, None)))
    return Data("nuclei, the image that comes with stardist", [train], [validation], ("nucleus",))


def find(root: Path, share: float, seed: int) -> Data:
    """The data set in a folder; where it has no val/ of its own, `share` of the samples validate.

    Raises:
        DataError: the folder holds none of the layouts above, or one that is not complete.
    """
    if not root.is_dir():
        raise DataError(
            f"{root}: expected a folder with a data set, " + ("got a file" if root.exists() else "found none")
        )
    if (root / "train").is_dir() and (root / "val").is_dir():
        train, validation = (_detect(root / name) for name in ("train", "val"))
        return Data(f"train/ and val/, {train.layout}", train.samples, validation.samples, train.classes)
    pairs = _detect(root)
    groups = list(dict.fromkeys(sample.group for sample in pairs.samples))
    if len(groups) < 2:
        raise DataError(
            f"{root}: expected at least 2 {_unit(pairs)}, to train on and to validate on, got {len(groups)}"
        )
    if not pairs.in_order:
        np.random.default_rng(seed).shuffle(groups)
    held_out = set(groups[-min(max(round(share * len(groups)), 1), len(groups) - 1) :])
    train, validation = ([s for s in pairs.samples if (s.group in held_out) is out] for out in (False, True))
    return Data(pairs.layout, train, validation, pairs.classes)


def check(samples: Sequence[Sample], classes: int, side: int, size: int | None) -> None:
    """Read every sample once, before anything is trained on the first.

    Args:
        classes: the number of them, with the background.
        side: of the crops, which no sample may be smaller than.
        size: as for `load`.

    Raises:
        DataError: names each file that cannot be used, what was expected of it and what it is (up to ten).
    """
    examine = partial(_examine, classes=classes, side=side, size=size)
    with ThreadPoolExecutor() as pool:
        results = list(tqdm(pool.map(examine, samples), "checking", len(samples), leave=False))
    problems = [problem for problem, _ in results if problem]
    if problems:
        more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise DataError("\n".join(problems[:10] + more))
    if not any(foreground for _, foreground in results):
        raise DataError(f"{samples[0].mask.parent}: expected masks, got only background in all {len(samples)}")


def load(sample: Sample, size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W, 3), float32 in 0 .. 1, and its mask (H, W), int64 classes; both size x size if that is given."""
    if sample.image.suffix == ".npz":
        image, mask = _read_slice(sample.image)
    else:
        image = _read_image(sample.image)
        if sample.mask.suffix == ".xml":
            mask = _read_polygons(sample.mask, image.shape[:2])
        else:
            mask = _read_mask(sample.mask)
    if image.shape[:2] != mask.shape:
        raise DataError(
            f"{sample.mask}: expected the size of {sample.image}, {_size(image)} (height x width), got {_size(mask)}"
        )
    columns = slice(*sample.columns)
    image, mask = image[:, columns], mask[:, columns]
    if size is not None:
        pixels, labels = torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(mask)[None].double()
        pixels = F.interpolate(pixels[None], (size, size), mode="bilinear", antialias=True)[0]
        image = pixels.permute(1, 2, 0).numpy()
        mask = F.interpolate(labels[None], (size, size), mode="nearest-exact")[0, 0].long().numpy()
    return image, mask


def _examine(sample: Sample, classes: int, side: int, size: int | None) -> tuple[str, bool]:
    """What is wrong with a sample, if anything, and whether it has any foreground."""
    try:
        _, mask = load(sample, size)
    except DataError as error:
        return str(error), False
    if min(mask.shape) < side:
        return f"{sample.image}: expected at least {side} x {side}, the size of a crop, got {_size(mask)}", False
    if mask.min() < 0 or mask.max() >= classes:
        return (
            f"{sample.mask}: expected --classes {classes}, 0 .. {classes - 1}, got {mask.min()} .. {mask.max()}",
            False,
        )
    return "", bool(mask.any())


def _detect(root: Path) -> Pairs:
    pairs = _pairs_in(root)
    if pairs is not None:
        return pairs
    inner = {folder: found for folder in _folders(root) if (found := _pairs_in(folder)) is not None}
    if len(inner) > 1:
        raise DataError(f"{root}: expected one data set, found one in each of {_names(inner)}: name the one to use")
    if not inner:
        entries = _names(path for path in root.iterdir() if not path.name.startswith("."))
        raise DataError(
            f"{root}: expected NAME.bmp with NAME_anno.bmp, NAME.tif with NAME.xml, the folders images/ and masks/ "
            f'or Original/ and "Ground Truth"/, or train_npz/*.npz; found {entries or "nothing"}'
        )
    return next(iter(inner.values()))


def _pairs_in(root: Path) -> Pairs | None:
    """The samples of the first layout that the folder itself has."""
    folders = {folder.name.lower(): folder for folder in _folders(root)}
    slices = folders.get("train_npz", root)
    if folders.get("train_npz") or _files(root, {".npz"}):
        return _synapse(root, slices)
    images = next((folders[name] for name in IMAGE_FOLDERS if name in folders), None)
    masks = next((folders[name] for name in MASK_FOLDERS if name in folders), None)
    if images and masks:
        polygons = _files(masks, {".xml"})
        layout = f"{images.name}/ and {masks.name}/, the same names" + (", polygons" if polygons else "")
        in_order = images.name.lower() == "original"  # CVC-ClinicDB numbers the frames of its videos
        return _matched(layout, _files(images, IMAGES), polygons or _files(masks, IMAGES), images, masks, in_order)
    if images or masks:
        wanted = (
            "masks/ (or one of " + ", ".join(MASK_FOLDERS[1:])
            if images
            else "images/ (or one of " + ", ".join(IMAGE_FOLDERS[1:])
        )
        raise DataError(
            f"{root}: expected {wanted}) beside {(images or masks).name}/, found {_names(folders.values())}"
        )
    bitmaps, outlines = _files(root, {".bmp"}), _files(root, {".xml"})
    annotated = [path for path in bitmaps if path.stem.endswith("_anno")]
    if annotated:
        plain = [path for path in bitmaps if not path.stem.endswith("_anno")]
        training = any(path.name.startswith("train_") for path in plain)
        plain, annotated = ([p for p in c if p.name.startswith("train_") or not training] for c in (plain, annotated))
        return _matched(
            "GlaS, NAME.bmp and NAME_anno.bmp" + ", train_* of them" * training, plain, annotated, root, root
        )
    if outlines:
        return _matched("MoNuSeg, NAME.tif and NAME.xml, polygons", _files(root, IMAGES), outlines, root, root)
    return None


def _matched(
    layout: str, images: list[Path], masks: list[Path], image_folder: Path, mask_folder: Path, in_order: bool = False
) -> Pairs:
    """Pairs by name; every image needs a mask and every mask an image."""
    if not images:
        raise DataError(f"{image_folder}: expected images ({', '.join(sorted(IMAGES))}), found none")
    by_name: list[dict[str, Path]] = []
    for paths in (images, masks):
        names: dict[str, Path] = {}
        for path in paths:
            name = re.sub(r"_(anno|mask|segmentation)$", "", path.stem)
            if name in names:
                raise DataError(f"{path}: expected one file of this name, found {names[name].name} too")
            names[name] = path
        by_name.append(names)
    alone = sorted(by_name[0].keys() - by_name[1].keys())
    if alone:
        raise DataError(
            f"{by_name[0][alone[0]]}: expected a mask of this name in {mask_folder}, found none{_more(alone)}"
        )
    alone = sorted(by_name[1].keys() - by_name[0].keys())
    if alone:
        raise DataError(
            f"{by_name[1][alone[0]]}: expected an image of this name in {image_folder}, found none{_more(alone)}"
        )
    return Pairs(layout, [Sample(by_name[0][n], by_name[1][n], n) for n in by_name[0]], ("foreground",), in_order)


def _synapse(root: Path, folder: Path) -> Pairs:
    slices = {path.stem: path for path in _files(folder, {".npz"})}
    if not slices:
        raise DataError(f"{folder}: expected slices, caseNNNN_sliceNNN.npz, found none")
    lists = [path for path in (root / "train.txt", *sorted(root.glob("lists*/**/train.txt"))) if path.is_file()]
    names = lists[0].read_text().split() if lists else list(slices)
    for name in names:
        if name not in slices:
            raise DataError(f"{folder / name}.npz: expected this slice, which {lists[0]} lists, found none")
    samples = [Sample(slices[n], slices[n], n.split("_slice")[0]) for n in names]
    layout = f"Synapse, slices of {len({s.group for s in samples})} cases" + f" listed in {lists[0].name}" * bool(lists)
    return Pairs(layout, samples, ORGANS)


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: expected an image that can be read, got {type(error).__name__}: {error}") from error
    return image


def _read_image(path: Path) -> np.ndarray:
    image = _read(path)
    if image.mode not in ("F", "I", "I;16", "I;16B"):
        return np.asarray(image.convert("RGB"), np.float32) / 255
    grey = np.asarray(image, np.float32)  # of more than 8 bits, of which a camera uses some
    white = np.percentile(grey, 99.8)
    if not (np.isfinite(grey).all() and white > 0):
        raise DataError(
            f"{path}: expected finite values, at least 0.2% of them above 0, got {grey.min()} .. {grey.max()}"
        )
    return np.repeat(np.clip(grey / white, 0, 1, dtype=np.float32)[..., None], 3, axis=2)


def _read_mask(path: Path) -> np.ndarray:
    """Everything that is not 0 is foreground; in a JPEG, which blurs edges, everything above half."""
    image = _read(path)
    values = np.asarray(image if image.mode in ("1", "F", "I", "I;16", "I;16B", "L", "P") else image.convert("RGB"))
    if values.ndim == 3:
        values = values.max(axis=2)
    return (values > (127 if path.suffix.lower() in JPEG else 0)).astype(np.int64)


def _read_polygons(path: Path, shape: tuple[int, int]) -> np.ndarray:
    try:
        regions = list(ElementTree.parse(path).iter("Region"))
        outlines = [[(float(v.attrib["X"]), float(v.attrib["Y"])) for v in region.iter("Vertex")] for region in regions]
    except (ElementTree.ParseError, KeyError, ValueError) as error:
        raise DataError(
            f"{path}: expected XML with Region and Vertex X, Y, got {type(error).__name__}: {error}"
        ) from error
    if not any(outlines):
        raise DataError(f"{path}: expected Region elements with Vertex elements, found none")
    mask = Image.new("1", (shape[1], shape[0]))
    for outline in outlines:
        if len(outline) > 2:  # MoNuSeg has a few slips of the pen
            ImageDraw.Draw(mask).polygon(outline, fill=1)
    return np.asarray(mask, np.int64)


def _read_slice(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with open(path, "rb") as file, np.load(file) as arrays:
            image, label = (arrays[name] for name in ("image", "label"))
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: expected arrays `image` and `label`, got {type(error).__name__}: {error}") from error
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3) or label.ndim != 2:
        raise DataError(f"{path}: expected image (H, W) or (H, W, 3), label (H, W), got {image.shape}, {label.shape}")
    if image.dtype == np.uint8:
        image = image / np.float32(255)
    if not (image.min() >= -1e-3 and image.max() <= 1 + 1e-3):  # NaN is neither
        raise DataError(f"{path}: expected image values in 0 .. 1, got {image.min()} .. {image.max()}")
    image = image.astype(np.float32)
    return np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image, label.astype(np.int64)


def _files(folder: Path, suffixes: set[str]) -> list[Path]:
    """In natural order: 2 before 10."""
    paths = [p for p in folder.iterdir() if p.suffix.lower() in suffixes and p.is_file() and not p.name.startswith(".")]
    return sorted(paths, key=lambda p: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", p.name)])


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def _names(paths: Iterable[Path]) -> str:
    names = sorted(path.name + "/" * path.is_dir() for path in paths)
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _more(alone: list[str]) -> str:
    return f" (and {len(alone) - 1} more like it)" if len(alone) > 1 else ""


def _unit(pairs: Pairs) -> str:
    return "cases" if pairs.classes == ORGANS else "images"


def _size(array: np.ndarray) -> str:
    return f"{array.shape[0]} x {array.shape[1]}"
