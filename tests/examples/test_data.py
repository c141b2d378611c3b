"""The folders that the training example reads, what it makes of them, and what it refuses."""

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from examples import check, data, files
from tests.datasets import (
    MakesFolder,
    arrays_of,
    clinic,
    glas,
    image_of,
    kvasir,
    monuseg,
    monuseg_test,
    one_folder,
    overwrite,
    picture,
    polygons,
    remove,
    rename,
    split,
    synapse,
    truncate,
    with_volumes,
    write_image,
)


def find(root: Path, seed: int = 0) -> data.Data:
    return data.split(data.find(root), 0.3, seed)


LAYOUTS: dict[str, tuple[Callable[[Path], None], str, int, int]] = {
    # how it is made, what is said of it, how many train and validate at a share of 0.3
    "glas": (glas, "GlaS", 2, 1),
    "monuseg": (monuseg, "Tissue Images/ and Annotations/, polygons", 2, 1),
    "monuseg_test": (monuseg_test, "MoNuSeg", 2, 1),
    "kvasir": (kvasir, "images/ and masks/", 3, 1),
    "clinic": (clinic, "Original/ and Ground Truth/", 8, 3),
    "synapse": (synapse, "Synapse, slices of 3 cases, listed in train.txt", 4, 2),
    "split": (split, "train/ and val/", 4, 3),
    "one folder": (one_folder, "images and masks of", 3, 1),
}


@pytest.mark.parametrize("name, inside", [(name, "") for name in LAYOUTS] + [(name, "download") for name in LAYOUTS])
def test_layouts(name: str, inside: str, tmp_path: Path) -> None:
    make, layout, training, validation = LAYOUTS[name]
    make(tmp_path / inside)
    found = find(tmp_path)
    assert layout in found.layout
    assert (len(found.train), len(found.validation)) == (training, validation)
    assert len({*found.train, *found.validation}) == training + validation
    check.check(found, side=32)
    for sample in found.train:
        image, mask = files.load(sample)
        assert image.shape == (*mask.shape, 3) and image.dtype == np.float32 and mask.dtype == np.int64
        assert 0 <= image.min() < 0.2 and 0.8 < image.max() <= 1
        # boxes are brighter than what is around them: image and mask belong together, and no axis is swapped
        if "monuseg" not in name:
            assert image[mask > 0].mean() > image[mask == 0].mean() + 0.4


def test_split_is_seeded_and_keeps_neighbours_together(tmp_path: Path) -> None:
    synapse(tmp_path / "synapse")
    splits = [find(tmp_path / "synapse", seed) for seed in range(8)]
    assert splits[0] == find(tmp_path / "synapse")
    held_out = {found.validation[0].group for found in splits}
    assert len(held_out) > 1
    for found in splits:
        assert not {s.group for s in found.train} & {s.group for s in found.validation}
    clinic(tmp_path / "clinic")
    frames = [int(s.image.stem) for s in find(tmp_path / "clinic").validation]
    assert frames == [9, 10, 11]


def test_masks(tmp_path: Path) -> None:
    glas(tmp_path / "glas")
    found = find(tmp_path / "glas")
    assert all(s.image.name.startswith("train_") for s in found.train + found.validation)
    for sample in found.train:
        np.testing.assert_array_equal(files.load(sample)[1], np.asarray(Image.open(sample.mask)) > 0)
    monuseg(tmp_path / "monuseg")
    expected = np.zeros((40, 48))
    expected[4:21, 6:31] = expected[24:31, 2:10] = 1
    np.testing.assert_array_equal(files.load(find(tmp_path / "monuseg").train[0])[1], expected)
    kvasir(tmp_path / "kvasir")
    sample = next(s for s in find(tmp_path / "kvasir").train if s.group == "cju0b")
    np.testing.assert_array_equal(files.load(sample)[1], picture(1, 41)[1] > 0)  # a JPEG's ringing is not foreground
    synapse(tmp_path / "synapse")
    sample = find(tmp_path / "synapse").train[0]
    with np.load(sample.image) as arrays:
        np.testing.assert_array_equal(files.load(sample)[1], arrays["label"])


def test_resize(tmp_path: Path) -> None:
    synapse(tmp_path)
    for sample in find(tmp_path).train:
        image, mask = files.load(sample, size=64)
        assert image.shape == (64, 64, 3) and mask.shape == (64, 64)
        assert set(np.unique(mask)) <= {0, 4, 8} and mask.any()


def no_foreground(root: Path) -> None:
    for path in (root / "masks").iterdir():
        write_image(path, np.zeros((40 + ord(path.stem[-1]) - ord("a"), 48), np.uint8))


SMALL, GREY = np.zeros((20, 30), np.uint8), np.zeros((40, 48), np.float32)
SLICE = "train_npz/case0005_slice001.npz"

XML = "Annotations/TCGA-21-01.xml"
OUTLINE = polygons((4, 6, 20, 30))
BOMB = "".join(f'<!ENTITY {b} "{10 * f"&{a};"}">' for a, b in zip("abcdefgh", "bcdefghi", strict=True))


def npz_of(header: str) -> bytes:
    """An .npz whose `image` has this header, and no data."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        line = header.encode() + b"\n"
        archive.writestr("image.npy", b"\x93NUMPY\x01\x00" + len(line).to_bytes(2, "little") + line)
    return content.getvalue()


def damaged_npz(root: Path) -> None:
    np.savez_compressed(root / SLICE, image=GREY, label=GREY)
    content = bytearray((root / SLICE).read_bytes())
    content[60:80] = bytes(20)
    (root / SLICE).write_bytes(content)


def large_image(root: Path) -> None:
    (root / "images" / "cju0c.jpg").unlink()
    Image.new("1", (8192, 8193)).save(root / "images" / "cju0c.png")


def turned(name: str, orientation: int | bytes) -> Callable[[Path], None]:
    """The same pixels, and EXIF data that say how they are seen: in a number, or in words of four letters."""
    kind, value = (3, struct.pack(">HH", orientation, 0)) if isinstance(orientation, int) else (2, orientation)
    count = 1 if isinstance(orientation, int) else 4
    exif = b"Exif\0\0" + struct.pack(">2sHIHHHI4sI", b"MM", 42, 8, 1, files.ORIENTATION, kind, count, value, 0)

    def save(root: Path) -> None:
        with Image.open(root / name) as image:
            image.copy().save(root / name, exif=exif)

    return save


def written(name: str, array: np.ndarray, **layout: str) -> Callable[[Path], None]:
    """A file of Kvasir-SEG's as the TIFF that tifffile makes of an array."""

    def save(root: Path) -> None:
        (root / f"{name}.jpg").unlink()
        tifffile.imwrite(root / f"{name}.tif", array, **layout)

    return save


FAULTS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None], str]] = {
    # the data set, what happens to it, what is said of it
    "glas without a mask": (glas, remove("train_2_anno.bmp"), r"train_2\.bmp: expected a mask of this name in"),
    "glas without an image": (glas, remove("train_2.bmp"), r"train_2_anno\.bmp: expected an image of this name in"),
    "glas unreadable": (
        glas,
        truncate("train_2.bmp"),
        r"train_2\.bmp: expected an image that can be read, got OSError",
    ),
    "glas not an image": (
        glas,
        overwrite("train_1_anno.bmp", "<html>"),
        r"train_1_anno\.bmp: expected an image of 8 or 16 bits, got",
    ),
    "glas wrong size": (
        glas,
        image_of("train_1_anno.bmp", SMALL),
        r"train_1_anno\.bmp: expected the size of .*train_1\.bmp, 40 x 48 \(height x width\), got 20 x 30",
    ),
    "monuseg without polygons": (
        monuseg,
        overwrite("Annotations/TCGA-21-01.xml", "<Annotations/>"),
        r"TCGA-21-01\.xml: expected Region elements with Vertex elements, found none",
    ),
    "monuseg broken": (monuseg, truncate("Annotations/TCGA-21-01.xml"), r"TCGA-21-01\.xml: expected XML with Region"),
    "monuseg of another encoding": (
        monuseg,
        overwrite(XML, "<?xml version='1.0' encoding='x-none'?><a/>"),
        r"TCGA-21-01\.xml: expected XML with Region and Vertex X, Y, got LookupError",
    ),
    "monuseg with an entity bomb": (
        monuseg,
        overwrite(XML, f'<!DOCTYPE a [<!ENTITY a "{10 * "lol"}">{BOMB}]><a>&i;</a>'),
        r"TCGA-21-01\.xml: expected XML with Region and Vertex X, Y, got ParseError: limit on input amplification",
    ),
    "monuseg with another file": (
        monuseg,
        overwrite(XML, '<!DOCTYPE a [<!ENTITY a SYSTEM "file:///etc/passwd">]><a>&a;</a>'),
        r"TCGA-21-01\.xml: expected XML with Region and Vertex X, Y, got ParseError: undefined entity",
    ),
    "monuseg at infinity": (
        monuseg,
        overwrite(XML, OUTLINE.replace('"30.0"', '"inf"')),
        r"TCGA-21-01\.xml: expected Vertex X, Y within 16777216 pixels, got inf",
    ),
    "monuseg not a number": (
        monuseg,
        overwrite(XML, OUTLINE.replace('"30.0"', '"nan"')),
        r"TCGA-21-01\.xml: expected Vertex X, Y within 16777216 pixels, got nan",
    ),
    "monuseg without a mask": (monuseg, remove("Annotations/TCGA-21-01.xml"), r"TCGA-21-01\.tif: expected a mask"),
    "monuseg unreadable": (monuseg_test, truncate("TCGA-21-01.tif"), r"TCGA-21-01\.tif: expected an image that can be"),
    "kvasir without masks/": (
        kvasir,
        rename("masks", "truth"),
        r"expected masks/ .* beside images/, found images/, truth/",
    ),
    "kvasir without images/": (kvasir, rename("images", "x"), r"expected images/ .* beside masks/, found masks/, x/"),
    "kvasir other name": (
        kvasir,
        rename("masks/cju0b.jpg", "masks/b.jpg"),
        r"cju0b\.jpg: expected a mask of this name",
    ),
    "kvasir twice": (
        kvasir,
        image_of("images/cju0b.png", SMALL),
        r"cju0b\.png: expected one file of this name, found cju0b\.jpg too",
    ),
    "kvasir unreadable": (kvasir, truncate("images/cju0c.jpg"), r"cju0c\.jpg: expected an image that can be read"),
    "kvasir empty file": (
        kvasir,
        overwrite("masks/cju0c.jpg", b""),
        r"cju0c\.jpg: expected an image of 8 or 16 bits, got another file",
    ),
    "kvasir for Ghostscript": (
        kvasir,
        overwrite("images/cju0c.jpg", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"),
        r"cju0c\.jpg: expected an image of 8 or 16 bits, got another file",
    ),
    "kvasir large": (
        kvasir,
        large_image,
        r"cju0c\.png: expected an image of at most 67108864 pixels, got 8193 x 8192",
    ),
    "kvasir turned": (
        kvasir,
        turned("images/cju0c.jpg", 3),
        r"cju0c\.jpg: expected pixels as they are seen, got EXIF orientation 3: save it turned",
    ),
    "kvasir turned in words": (
        kvasir,
        turned("images/cju0c.jpg", b"abc\0"),
        r"cju0c\.jpg: expected pixels as they are seen, got EXIF orientation 'abc': save it turned",
    ),
    "kvasir mask turned": (kvasir, turned("masks/cju0c.jpg", 6), r"masks/cju0c\.jpg: expected pixels as they are seen"),
    "kvasir planes of 16 bits": (
        kvasir,
        written("images/cju0c", np.zeros((3, 42, 48), np.uint16), photometric="rgb", planarconfig="separate"),
        r"cju0c\.tif: expected 8 bits a colour, got 16",
    ),
    "kvasir white is zero, 16 bits": (
        kvasir,
        written("images/cju0c", np.ones((42, 48), np.uint16), photometric="miniswhite"),
        r"cju0c\.tif: expected 0 to be black, got a TIFF of more than 8 bits in which it is white",
    ),
    "kvasir mask white is zero": (
        kvasir,
        written("masks/cju0c", np.eye(42, 48, dtype=bool)),
        r'cju0c\.tif: expected 0 to be black, .* save it as PNG, or as TIFF with photometric="minisblack"',
    ),
    "kvasir of 64 bits": (
        kvasir,
        written("images/cju0c", np.ones((42, 48))),
        r"cju0c\.tif: expected an image of 8 or 16 bits, got another file, another type of pixels",
    ),
    "kvasir infinite": (
        kvasir,
        lambda root: (
            (root / "images/cju0c.jpg").unlink()
            or Image.fromarray(np.full((42, 48), np.inf, np.float32)).save(root / "images/cju0c.tif")
        ),
        r"cju0c\.tif: expected values from 0, .*Hounsfield",
    ),
    "kvasir negative": (
        kvasir,
        lambda root: (
            (root / "images/cju0c.jpg").unlink()
            or Image.fromarray(np.full((42, 48), -1000, np.int32)).save(root / "images/cju0c.tif")
        ),
        r"cju0c\.tif: expected values from 0, .*Hounsfield",
    ),
    "kvasir no foreground": (kvasir, no_foreground, r"masks: expected masks, got only background in all 4"),
    "clinic wrong size": (clinic, image_of("Ground Truth/3.tif", SMALL), r"Ground Truth.3\.tif: expected the size of"),
    "clinic small": (
        clinic,
        lambda root: [image_of(f"{d}/3.tif", SMALL)(root) for d in ("Original", "Ground Truth")] and None,
        r"Original.3\.tif: expected at least 32 x 32, the size of a crop, got 20 x 30",
    ),
    "synapse without a slice": (
        synapse,
        remove(SLICE),
        r"case0005_slice001\.npz: expected this slice, which .*train\.txt",
    ),
    "synapse broken": (
        synapse,
        truncate(SLICE),
        r"case0005_slice001\.npz: expected arrays `image` and `label`, got BadZip",
    ),
    "synapse empty file": (synapse, overwrite(SLICE, b""), r"expected arrays `image` and `label`, got BadZipFile"),
    "synapse damaged": (
        synapse,
        damaged_npz,
        r"slice001\.npz: expected arrays `image` and `label`, got error: Error -3",
    ),
    "synapse of an empty array": (
        synapse,
        lambda root: zipfile.ZipFile(root / SLICE, "w").writestr("image.npy", b""),
        r"slice001\.npz: expected arrays `image` and `label`, got ",
    ),
    "synapse of 160 GB": (
        synapse,
        overwrite(SLICE, npz_of("{'descr': '<f4', 'fortran_order': False, 'shape': (200000, 200000)}")),
        r"slice001\.npz: expected arrays `image` and `label`, got (MemoryError|ValueError)",
    ),
    "synapse of too many pixels to count": (
        synapse,
        overwrite(SLICE, npz_of(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**70}, 1)}}")),
        r"slice001\.npz: expected arrays `image` and `label`, got OverflowError",
    ),
    "synapse with a header that does not end": (
        synapse,
        overwrite(SLICE, npz_of("(" * 3000)),
        r"slice001\.npz: expected arrays `image` and `label`, got ",
    ),
    "synapse of text": (
        synapse,
        arrays_of(SLICE, image=np.full((40, 48), "x"), label=GREY),
        r"slice001\.npz: expected numbers in `image`, got <U1",
    ),
    "synapse complex": (
        synapse,
        arrays_of(SLICE, image=GREY + 0j, label=GREY),
        r"slice001\.npz: expected numbers in `image`, got complex",
    ),
    "synapse of objects": (
        synapse,
        lambda root: arrays_of(SLICE, image=np.array([MakesFolder(root / "unpickled")]), label=GREY)(root),
        r"slice001\.npz: expected arrays `image` and `label`, got ValueError: Object arrays",
    ),
    "synapse without labels": (
        synapse,
        arrays_of(SLICE, image=GREY),
        r"expected arrays `image` and `label`, got KeyError",
    ),
    "synapse wrong shape": (synapse, arrays_of(SLICE, image=GREY[None], label=GREY), r"expected image \(H, W\) or"),
    "synapse of no pixels": (
        synapse,
        arrays_of(SLICE, image=GREY[:0, :0], label=GREY[:0, :0]),
        r"case0005_slice001\.npz: expected image \(H, W\) or \(H, W, 3\) of at least one pixel, got \(0, 0\)",
    ),
    "synapse wrong size": (synapse, arrays_of(SLICE, image=GREY, label=GREY[:9]), r"expected the size of"),
    "synapse not prepared": (synapse, arrays_of(SLICE, image=GREY - 125, label=GREY), r"values in 0 \.\. 1, got -125"),
    "synapse not a number": (
        synapse,
        arrays_of(SLICE, image=GREY * np.nan, label=GREY),
        r"values in 0 \.\. 1, got nan",
    ),
    "synapse other classes": (
        synapse,
        arrays_of(SLICE, image=GREY, label=GREY + 9),
        r"expected class indices below 9, the number of classes, got 9",
    ),
    "nothing": (lambda root: None, lambda root: None, r"expected NAME\.bmp .* found nothing"),
    "something else": (lambda root: None, overwrite("notes.doc", "x"), r"expected NAME\.bmp .* found notes\.doc"),
    "empty folders": (
        lambda root: [(root / name).mkdir() for name in ("images", "masks")] and None,
        lambda root: None,
        r"images: expected images .*found nothing",
    ),
    "empty train_npz": (lambda root: (root / "train_npz").mkdir(), lambda root: None, r"train_npz: expected slices"),
    "two data sets": (
        lambda root: [kvasir(root / name) for name in ("TIF", "PNG")] and None,
        lambda root: None,
        r"expected one data set, found one in each of PNG/, TIF/: name the one to use",
    ),
    "one image": (
        lambda root: [write_image(root / name / "a.png", picture(0)[0]) for name in ("images", "masks")] and None,
        lambda root: None,
        r"expected at least 2 images, to train on and to validate on, got 1",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named(name: str, tmp_path: Path) -> None:
    make, damage, message = FAULTS[name]
    make(tmp_path)
    damage(tmp_path)
    with pytest.raises(files.DataError, match=f"(?s){message}") as raised:
        found = find(tmp_path)
        check.check(found, side=32)
    assert str(tmp_path) in str(raised.value)
    assert not (tmp_path / "unpickled").exists()


BOUNDS: list[tuple[str, Callable[[Path], None], str]] = [
    ("TEXT", monuseg, r"TCGA-18-01\.xml: expected at most 9 bytes, got "),
    ("TEXT", synapse, r"train\.txt: expected at most 9 bytes, got "),
    ("CROSSINGS", monuseg, r"TCGA-18-01\.xml: expected at most 9 vertices times rows of its outlines, got 88"),
    ("STORED_BYTES", synapse, r"slice000\.npz: expected at most 9 bytes of `image`, got "),
    ("PIXELS", synapse, r"slice000\.npz: expected image of at most 9 pixels, got \(40, 48\)"),
    ("PIXELS", kvasir, r"cju0a\.jpg: expected an image of at most 9 pixels, got 40 x 48"),
    ("PIXELS", with_volumes, r"\.h5: expected image of at most 4096 slices, 9 pixels in each and .* \(3, 40, 48\)"),
    ("VOXELS", with_volumes, r"\.h5: expected image of at most 4096 slices, .* and 9 in all, got \(3, 40, 48\)"),
]


@pytest.mark.parametrize("name, make, message", BOUNDS)
def test_bounds(name: str, make: Callable[[Path], None], message: str, tmp_path: Path, monkeypatch) -> None:
    make(tmp_path)
    monkeypatch.setattr(files, name, 9)
    with pytest.raises(files.DataError, match=message):
        check.check(find(tmp_path))


def test_a_region_inside_of_another_has_its_own_outline(tmp_path: Path) -> None:
    inner = polygons((30, 30, 35, 44)).replace("Annotations>", "a>")
    monuseg(tmp_path)
    (tmp_path / XML).write_text(OUTLINE.replace("</Region>", f"{inner}</Region>", 1))
    expected = np.zeros((40, 48))
    expected[4:21, 6:31] = expected[30:36, 30:45] = 1
    np.testing.assert_array_equal(files.load(data.find(tmp_path).train[1])[1], expected)


def test_digits_that_are_no_numbers(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        for name in ("²1", "²10", "²9"):
            write_image(tmp_path / folder / f"{name}.png", picture(0)[1] * np.uint8(255))
    assert [sample.name for sample in data.find(tmp_path).train] == ["²1", "²9", "²10"]


def test_every_bad_file_is_named_at_once(tmp_path: Path) -> None:
    kvasir(tmp_path)
    for name in ("images/cju0a.jpg", "masks/cju0d.jpg"):
        truncate(name)(tmp_path)
    found = find(tmp_path)
    with pytest.raises(files.DataError, match=r"(?s)cju0a.*cju0d|cju0d.*cju0a"):
        check.check(found, side=32)


@pytest.mark.parametrize("make", [monuseg, monuseg_test, synapse, with_volumes, kvasir])
def test_endings_in_upper_case(make: Callable[[Path], None], tmp_path: Path) -> None:
    for name in ("lower", "upper"):
        make(tmp_path / name)
    for path in list((tmp_path / "upper").rglob("*.*")):
        if path.suffix != ".txt":
            path.rename(path.with_suffix(path.suffix.upper()))
    lower, upper = (data.find(tmp_path / name) for name in ("lower", "upper"))
    check.check(upper)
    pairs = list(zip(_all(lower), _all(upper), strict=True))
    assert pairs and all(b.image.suffix.isupper() and b.mask.suffix.isupper() for _, b in pairs)
    for one, other in pairs:
        for array, same in zip(files.load(one), files.load(other), strict=True):
            np.testing.assert_array_equal(array, same)


def _all(found: data.Data) -> list[files.Sample]:
    return [*found.train, *(sample for samples in found.tests.values() for sample in samples)]


def test_polygons_in_upper_case_have_no_classes(tmp_path: Path) -> None:
    monuseg(tmp_path)
    for path in list((tmp_path / "Annotations").iterdir()):
        path.rename(path.with_suffix(".XML"))
    with pytest.raises(files.DataError, match="polygons, which have no classes"):
        data.with_classes(data.find(tmp_path), 3)


def test_a_resized_mask_has_the_pixels_in_the_middle(tmp_path: Path) -> None:
    """Of each 3 x 3 pixels that become one."""
    classes = np.arange(81, dtype=np.uint8).reshape(9, 9)
    for name in ("image", "mask"):
        write_image(tmp_path / f"{name}.png", classes)
    sample = files.Sample(tmp_path / "image.png", tmp_path / "mask.png", "", files.Values.CLASSES)
    np.testing.assert_array_equal(files.load(sample, 3)[1], classes[1::3, 1::3])


def test_an_image_may_be_black(tmp_path: Path) -> None:
    """An empty frame of a camera of 16 bits, as of one of 8."""
    Image.fromarray(np.zeros((4, 5), np.uint16)).save(tmp_path / "a.png")
    image = files.read_image(files.Sample(tmp_path / "a.png", None, ""))
    assert image.dtype == np.float32 and image.shape == (4, 5, 3) and not image.any()
