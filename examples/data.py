"""Finds the images and masks in the folders that segmentation data sets come in.

Recognised by their structure, in the folder that is named or in the only one inside it that has such a structure:

- GlaS: one folder with NAME.bmp and NAME_anno.bmp (instances, 0 is background). Where there are train_* they are
  trained on, and testA_* and testB_* are test sets.
- MoNuSeg: "Tissue Images"/NAME.tif and Annotations/NAME.xml, or both in one folder (polygons in pixels, as ImageScope
  writes them).
- Kvasir-SEG, CVC-ClinicDB and most prepared sets: images/NAME.* and masks/NAME.*, or Original/ and "Ground Truth"/.
- NAME.* and NAME_mask.* in one folder.
- Synapse as TransUNet's authors prepared it: train_npz/caseNNNN_sliceNNN.npz with `image` (H, W) in 0 .. 1 and `label`
  (H, W) of 9 classes, and where it is there a train.txt that lists the slices. The volumes beside it,
  test_vol_h5/caseNNNN.npy.h5 with `image` and `label` (slices, H, W), are a test set.
- Any of these in train/ beside val/ or test/ or both; test/ may have no masks, and is predicted only.

Two folders that are named, one of images and one of masks, may have any layout (`paired`). A mask is called as its
image is, or that and one of SUFFIXES.
"""

import importlib.util
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from examples.files import IMAGES, JPEG, OUTLINES, DataError, Sample, Values, ending, reading, require_text, slices_in

ORGANS = ("aorta", "gallbladder", "left kidney", "right kidney", "liver", "pancreas", "spleen", "stomach")
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "original", "tissue images")
MASK_FOLDERS = ("masks", "mask", "ground truth", "groundtruth", "gt", "labels", "label", "annotations")
BLURRED = "a JPEG, whose values are blurred: save masks as PNG"
PARTS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
SUFFIXES = ("_anno", "_annotation", "_groundtruth", "_gt", "_label", "_mask", "_seg", "_segmentation")
KNOWN_SUFFIX = re.compile(f"({'|'.join(SUFFIXES)})$", re.IGNORECASE)


@dataclass(frozen=True)
class Data:
    """What was found: samples to train on, to validate on, and the sets that neither is done on."""

    layout: str
    train: list[Sample]
    classes: tuple[str, ...]  # without the background, which is class 0
    validation: list[Sample] = field(default_factory=list)  # empty where the folder does not set them apart
    tests: dict[str, list[Sample]] = field(default_factory=dict)
    unmasked: dict[str, list[Sample]] = field(default_factory=dict)  # test sets that can be predicted only
    unit: str = "images"  # what the samples' groups are
    in_order: bool = False  # neighbours resemble each other, as frames of a video do
    left_out: tuple[str, ...] = ()  # what else is there, and why it is not used


def nuclei() -> Data:
    """The microscope image (512 x 512) and its 125 outlined nuclei that the stardist package brings along.

    Its left 384 columns are to train on, the others to validate on. stardist is not imported: it would import more.
    """
    spec = importlib.util.find_spec("stardist")
    if spec is None or spec.origin is None:
        raise DataError("stardist: expected the package, which brings the image: pip install --no-deps stardist==0.9.2")
    image, mask = (Path(spec.origin).parent / "data" / "images" / name for name in ("img2d.tif", "mask2d.tif"))
    train, validation = (
        Sample(image, mask, "nuclei", Values.INSTANCES, columns) for columns in ((0, 384), (384, None))
    )
    return Data("nuclei, the image that comes with stardist", [train], ("nucleus",), [validation])


def find(root: Path) -> Data:
    """The data set in a folder.

    Raises:
        DataError: the folder holds none of the layouts above, or one that is not complete.
    """
    _require_folder(root)
    found = _data_in(root)
    if found is not None:
        return found
    inner = {folder: data for folder in _folders(root) if (data := _data_in(folder)) is not None}
    if len(inner) > 1:
        raise DataError(f"{root}: expected one data set, found one in each of {_names(inner)}: name the one to use")
    if not inner:
        raise DataError(
            f"{root}: expected NAME.bmp with NAME_anno.bmp, NAME.tif with NAME.xml, the folders images/ and masks/ "
            'or Original/ and "Ground Truth"/, or train_npz/*.npz, or other folders by --images and --masks '
            f"(images are {', '.join(sorted(IMAGES))}); {_found(root)}"
        )
    return next(iter(inner.values()))


def paired(images: Path, masks: Path, suffix: str | None = None) -> Data:
    """The images of one folder with the masks of another, or of the same one.

    Args:
        suffix: what follows the image's name in the mask's; where it is None, nothing or one of SUFFIXES.

    Raises:
        DataError: there are none, or an image has no mask, or a mask no image.
    """
    for folder in (images, masks):
        _require_folder(folder)
    outlines = _files(masks, OUTLINES)
    candidates = outlines or _files(masks, IMAGES)
    together = images.resolve() == masks.resolve() and not outlines
    if suffix is not None:
        found = [path for path in candidates if path.stem.endswith(suffix)]
        if not found:
            raise DataError(f"{masks}: expected masks NAME{suffix}.*, {_found(masks)}")
    else:
        found = [path for path in candidates if KNOWN_SUFFIX.search(path.stem)] if together else candidates
    pictures = _files(images, IMAGES)
    if together:
        pictures = [path for path in pictures if path not in found]
    names = [folder.resolve().name for folder in (images, masks)]
    layout = f"images and masks of {names[0]}/" if together else f"{names[0]}/ and {names[1]}/"
    return _matched(layout + (", polygons" if outlines else ""), pictures, found, images, masks, suffix)


def images_alone(root: Path) -> list[Sample]:
    """The images of a folder, or of images/ in it, where there are no masks; nothing where there are."""
    _require_folder(root)
    folders = _by_name(root)
    if any(name in folders for name in (*MASK_FOLDERS, *PARTS["train"], "train_npz")):
        return []
    inner = next((folders[name] for name in IMAGE_FOLDERS if name in folders), None)
    if inner is None and _data_in(root) is not None:
        return []
    images = _distinct({path: path.stem for path in _files(inner or root, IMAGES)})
    return [Sample(path, None, name) for name, path in images.items()]


def split(data: Data, share: float, seed: int) -> Data:
    """`data`, where `share` of its samples validate if it has none of its own for that."""
    if data.validation:
        return data
    groups = list(dict.fromkeys(sample.group for sample in data.train))
    if len(groups) < 2:
        folder = data.train[0].image.parent
        raise DataError(f"{folder}: expected at least 2 {data.unit}, to train on and to validate on, got {len(groups)}")
    if not data.in_order:
        np.random.default_rng(seed).shuffle(groups)
    held_out = set(groups[-min(max(round(share * len(groups)), 1), len(groups) - 1) :])
    train, validation = ([s for s in data.train if (s.group in held_out) is out] for out in (False, True))
    return replace(data, train=train, validation=validation)


def with_classes(data: Data, count: int) -> Data:
    """`data` with `count` classes, the background among them; mask images are read as indices if that is more than 2.

    Raises:
        DataError: its masks cannot hold class indices.
    """
    if count - 1 == len(data.classes):
        return data
    changed = _changed(data, lambda sample: _indexed(sample, count)) if count > 2 else data
    return replace(changed, classes=tuple(f"class {i}" for i in range(1, count)))


def as_instances(data: Data) -> Data:
    """`data` with masks that number their objects: all that is not 0 is foreground.

    Raises:
        DataError: its masks cannot number objects.
    """
    return _changed(data, _numbered)


def _changed(data: Data, change: Callable[[Sample], Sample]) -> Data:
    """`data` with another sample for each of all its sets."""
    train, validation = (list(map(change, samples)) for samples in (data.train, data.validation))
    tests = {name: list(map(change, samples)) for name, samples in data.tests.items()}
    return replace(data, train=train, validation=validation, tests=tests)


def counted(sets: dict[str, list[Sample]]) -> str:
    """The names of sets, each with the number of its samples."""
    return ", ".join(f"{name} ({len(samples)})" for name, samples in sets.items())


def _indexed(sample: Sample, count: int) -> Sample:
    if ending(sample.mask) in OUTLINES:
        got = "polygons, which have no classes"
    elif sample.values is Values.INSTANCES:
        got = "instances, each of its own value"
    elif ending(sample.mask) in JPEG:
        got = BLURRED
    else:
        return replace(sample, values=Values.CLASSES)
    raise DataError(f"{sample.mask}: expected class indices 0 .. {count - 1} for {count} classes, got {got}")


def _numbered(sample: Sample) -> Sample:
    if sample.values is Values.CLASSES:
        got = "labels of classes"
    elif ending(sample.mask) in JPEG:
        got = BLURRED
    else:
        return replace(sample, values=Values.INSTANCES)
    raise DataError(f"{sample.mask}: expected masks that number objects, got {got}")


def _data_in(root: Path) -> Data | None:
    """What the folder itself holds, in train/ and what is beside it or in the first layout that it has."""
    folders = _by_name(root)
    parts = {part: folders[name] for part, names in PARTS.items() for name in names if name in folders}
    if not parts.keys() & {"val", "test"}:
        return _pairs_in(root)
    data = find(parts["train"]) if "train" in parts else _pairs_in(root)
    if data is None:
        return None
    if "val" in parts:
        inner = _without_tests(parts["val"])
        data = replace(data, validation=inner.train, left_out=data.left_out + inner.left_out)
    alone = images_alone(parts["test"]) if "test" in parts else []
    if alone:
        said = f"data: {parts['test'].name}/ is not scored: it has no masks"
        data = replace(data, unmasked={"test": alone}, left_out=(*data.left_out, said))
    elif "test" in parts:
        inner = _without_tests(parts["test"])
        data = replace(data, tests=data.tests | {"test": inner.train}, left_out=data.left_out + inner.left_out)
    layout = " and ".join(f"{folder.name}/" for folder in parts.values())
    return replace(data, layout=f"{layout}, {data.layout}")


def _without_tests(folder: Path) -> Data:
    """What val/ or test/ holds; test sets inside of it are left out, which is said."""
    data = find(folder)
    if not data.tests:
        return data
    said = f"data: {folder.name}/ holds test sets, which are left out: {counted(data.tests)}"
    return replace(data, tests={}, left_out=(*data.left_out, said))


def _pairs_in(root: Path) -> Data | None:
    """The samples of the first layout that the folder itself has."""
    folders = _by_name(root)
    if folders.get("train_npz") or _files(root, {".npz"}):
        return _synapse(root, folders.get("train_npz", root))
    images = next((folders[name] for name in IMAGE_FOLDERS if name in folders), None)
    masks = next((folders[name] for name in MASK_FOLDERS if name in folders), None)
    if images and masks:
        data = paired(images, masks)
        return replace(data, in_order=images.name.lower() == "original")  # CVC-ClinicDB: frames of its videos
    if images or masks:
        kind, names = ("masks", MASK_FOLDERS) if images else ("images", IMAGE_FOLDERS)
        raise DataError(
            f"{root}: expected {kind}/ (or one of {', '.join(names[1:])}) beside {(images or masks).name}/, "
            f"found {_names(folders.values())}"
        )
    if any(path.stem.endswith("_anno") for path in _files(root, {".bmp"})):
        return _glas(root)
    if _files(root, OUTLINES):
        return replace(paired(root, root), layout="MoNuSeg, NAME.tif and NAME.xml, polygons")
    pictures = _files(root, IMAGES)
    stems = {path.stem for path in pictures}
    if any(KNOWN_SUFFIX.sub("", stem) in stems for stem in stems if KNOWN_SUFFIX.search(stem)):
        return paired(root, root)
    return None


def _glas(root: Path) -> Data:
    bitmaps = _files(root, {".bmp"})
    masks = [path for path in bitmaps if path.stem.endswith("_anno")]
    images = [path for path in bitmaps if path not in masks]
    data = _matched("GlaS, NAME.bmp and NAME_anno.bmp", images, masks, root, root)
    samples = [replace(sample, values=Values.INSTANCES) for sample in data.train]
    training = [sample for sample in samples if sample.name.startswith("train_")]
    if not training:
        return replace(data, train=samples)
    tests: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample not in training:
            tests.setdefault(sample.name.split("_")[0], []).append(sample)
    return replace(data, layout=f"{data.layout}, train_* of them", train=training, tests=tests)


def _synapse(root: Path, folder: Path) -> Data:
    slices = {path.stem: path for path in _files(folder, {".npz"})}
    if not slices:
        raise DataError(f"{folder}: expected slices, caseNNNN_sliceNNN.npz, found none")
    lists = [path for path in (root / "train.txt", *sorted(root.glob("lists*/**/train.txt"))) if path.is_file()]
    names = _listed(lists[0]) if lists else list(slices)
    if not names:
        raise DataError(f"{lists[0]}: expected names of slices, caseNNNN_sliceNNN, found none")
    for name in names:
        if name not in slices:
            raise DataError(f"{folder / name}.npz: expected this slice, which {lists[0]} lists, found none")
    samples = [Sample(slices[n], slices[n], n.split("_slice")[0], Values.CLASSES) for n in names]
    listed = f"listed in {lists[0].name}" if lists else "all of them, there is no train.txt"
    layout = f"Synapse, slices of {len({s.group for s in samples})} cases, {listed}"
    data = Data(layout, samples, ORGANS, unit="cases")
    volumes = _files(root / "test_vol_h5", {".h5"}) if (root / "test_vol_h5").is_dir() else []
    if not volumes:
        return data
    if importlib.util.find_spec("h5py") is None:
        return replace(data, left_out=("data: test_vol_h5/ is not scored: its volumes need h5py, pip install h5py",))
    tests = [
        Sample(path, path, path.name.split(".")[0], Values.CLASSES, slice=i)
        for path in volumes
        for i in range(slices_in(path))
    ]
    return replace(data, tests={"test_vol_h5": tests})


def _listed(path: Path) -> list[str]:
    with reading(path, "names of slices, caseNNNN_sliceNNN"):
        require_text(path)
        return path.read_text(errors="replace").split()


def _matched(
    layout: str, images: list[Path], masks: list[Path], image_folder: Path, mask_folder: Path, suffix: str | None = None
) -> Data:
    """Pairs by name; every image needs a mask and every mask an image."""
    if not images:
        raise DataError(f"{image_folder}: expected images ({', '.join(sorted(IMAGES))}), {_found(image_folder)}")
    by_name = _distinct({path: path.stem for path in images})
    truths = _distinct({path: _image_name(path.stem, by_name, suffix) for path in masks})
    if masks and not by_name.keys() & truths.keys():
        raise DataError(
            f"{image_folder}: expected masks of the images' names in {mask_folder}, found images like {images[0].name} "
            f"and masks like {masks[0].name}: "
            "--images, --masks and --mask-suffix say what follows an image's name in its mask's"
        )
    for some, others, kind, folder in (
        (by_name, truths, "a mask", mask_folder),
        (truths, by_name, "an image", image_folder),
    ):
        alone = sorted(some.keys() - others.keys())
        if alone:
            more = f" (and {len(alone) - 1} more like it)" if len(alone) > 1 else ""
            raise DataError(f"{some[alone[0]]}: expected {kind} of this name in {folder}, found none{more}")
    return Data(layout, [Sample(path, truths[name], name) for name, path in by_name.items()], ("foreground",))


def _image_name(stem: str, images: Iterable[str], suffix: str | None) -> str:
    """Of a mask's name, the part that is its image's."""
    if suffix is not None:
        return stem.removesuffix(suffix)
    return stem if stem in images else KNOWN_SUFFIX.sub("", stem)


def _distinct(names: dict[Path, str]) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    for path, name in names.items():
        if name in paths:
            raise DataError(f"{path}: expected one file of this name, found {paths[name].name} too")
        paths[name] = path
    return paths


def _require_folder(root: Path) -> None:
    with reading(root, "a folder with data"):
        if not root.is_dir():
            found = "got a file" if root.exists() else "found none"
            raise DataError(f"{root}: expected a folder with data, {found}")


def _files(folder: Path, suffixes: set[str]) -> list[Path]:
    """In natural order: 2 before 10."""
    with reading(folder, "a folder that can be read"):
        paths = [p for p in folder.iterdir() if ending(p) in suffixes and p.is_file() and not p.name.startswith(".")]
    return sorted(paths, key=lambda p: [int(t) if t.isdecimal() else t for t in re.split(r"(\d+)", p.name)])


def _folders(root: Path) -> list[Path]:
    with reading(root, "a folder that can be read"):
        return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def _by_name(root: Path) -> dict[str, Path]:
    return {folder.name.lower(): folder for folder in _folders(root)}


def _names(paths: Iterable[Path]) -> str:
    names = sorted(path.name + "/" * path.is_dir() for path in paths)
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _found(root: Path) -> str:
    entries = _names(path for path in root.iterdir() if not path.name.startswith("."))
    return f"found {entries or 'nothing'}"
