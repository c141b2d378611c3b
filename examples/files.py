"""Files to arrays: reads images and masks, and says in one line why one cannot be read.

A file takes bounded memory and time, whatever it claims to hold, and nothing in it is run: see the bounds below.

Images are .bmp, .jpg, .png and .tif of 8 or 16 bits, slices in .npz, volumes in .h5. Masks are images, polygons in
.xml, or lie in the .npz or .h5 beside the image. What the pixels of a mask image mean is said by its sample (`Values`).
"""

import math
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image, ImageDraw, UnidentifiedImageError
from torch.nn import functional as F

JPEG = {".jpg", ".jpeg"}
STORED = {".npz", ".h5"}
OUTLINES = {".xml"}
IMAGES = {".bmp", ".png", ".tif", ".tiff"} | JPEG
ONE_CHANNEL = ("1", "F", "I", "I;16", "I;16B", "L", "P")
DEEP = ("F", "I", "I;16", "I;16B")  # more than 8 bits a channel
FORMATS = ("BMP", "JPEG", "PNG", "TIFF")  # Pillow knows more, and starts Ghostscript for one of them
BITS, PHOTOMETRIC, ORIENTATION = 258, 262, 274  # tags of TIFF and EXIF
WHITE_IS_ZERO = 0
SPREAD = {"L;2": 85, "L;4": 17}  # grey of fewer bits, that Pillow brings to 0 .. 255

COLOURS = 2**8  # of a mask, that are counted

PIXELS = 2**26  # of an image or a slice, at most: 8192 x 8192
SLICES = 2**12  # of a volume
VOXELS = 2**29  # of a volume
TEXT = 2**25  # bytes of a file of polygons, or of a list
CROSSINGS = 2**27  # of the polygons in a file: each has its vertices times its rows of pixels
STORED_BYTES = 3 * 8 * PIXELS  # of an array in an .npz: three colours of 64 bits
FARTHEST = 2**24  # of a polygon's vertex from the image's corner
SAID = 200  # letters of a library's error

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of more pixels than PIXELS


class DataError(ValueError):
    """The data are not what was expected; the message names the file."""


@contextmanager
def reading(path: Path, expected: str) -> Iterator[None]:
    """Of a damaged file the libraries raise all kinds of errors: each becomes a DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        said = f"{type(error).__name__}: {lines[0][:SAID]}"
        raise DataError(f"{path}: expected {expected}, got {said}") from error


class LowValuesError(DataError):
    """A mask that should be foreground and background has several values, all too low for grey levels."""

    def __init__(self, path: Path, levels: np.ndarray, white: int | None) -> None:
        self.highest = int(levels.max())
        grey = f", or grey levels up to {white}" if white else f" in a mask of {levels.dtype}"
        super().__init__(f"{path}: expected 0 and one other value{grey}, got several up to {self.highest}")


class Values(Enum):
    """What the pixels of a mask image mean.

    FOREGROUND: 0 is background, the one other value foreground. Where there are more values they are grey levels, and
        the upper half of the dtype's range is foreground. Colours are as bright as their brightest channel. Where alpha
        varies and the colours do not, alpha is the mask; else it lies over black. Indices of a coloured palette are
        values, unless black has another one than 0; a grey palette is its grey levels.
    INSTANCES: 0 is background, every other value an object, and foreground.
    CLASSES: indices of classes, 0 is background; of a palette image its indices, whatever their colours.
    """

    FOREGROUND = "foreground"
    INSTANCES = "instances"
    CLASSES = "classes"


@dataclass(frozen=True)
class Sample:
    """An image and its mask, if it has one: two files, or one .npz or .h5 that holds both."""

    image: Path
    mask: Path | None
    group: str  # samples of one group are not split between training and validation
    values: Values = Values.FOREGROUND
    columns: tuple[int, int | None] = (0, None)  # those of the image that belong to the sample
    slice: int | None = None  # its index in a volume

    @property
    def name(self) -> str:
        """Of the image's file without its ending, and of the slice."""
        return self.image.stem if self.slice is None else f"{self.group}_slice{self.slice:03}"

    @property
    def case(self) -> str:
        """What is scored as one: the image, or the volume."""
        return self.name if self.slice is None else self.group


@dataclass(frozen=True)
class Reading:
    """What `Values.FOREGROUND` found in a file."""

    foreground: int | None = None  # the only value beside 0
    white: int | None = None  # the largest value of the dtype, where grey levels were parted at its half
    grey: int = 0  # pixels between 0 and white


@dataclass(frozen=True)
class Mask:
    """A mask, and how it was read."""

    classes: np.ndarray  # (H, W) int64
    reading: Reading = Reading()


def load(sample: Sample, size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W, 3), float32 in 0 .. 1, and its mask (H, W), int64 classes; both size x size if that is given.

    Raises:
        DataError: a file cannot be read, or holds something else.
    """
    image = read_image(sample)
    classes = read_mask(sample, image).classes
    return (image, classes) if size is None else (resize_image(image, size), resize_classes(classes, (size, size)))


def read_image(sample: Sample) -> np.ndarray:
    """(H, W, 3), float32 in 0 .. 1."""
    image = _stored_image(sample) if ending(sample.image) in STORED else _image(sample.image)
    return image[:, slice(*sample.columns)]


def read_mask(sample: Sample, image: np.ndarray) -> Mask:
    """The mask of a sample that has one, and whose image has been read."""
    path, shape = sample.mask, image.shape[:2]
    if ending(path) in STORED:
        mask = Mask(_stored_labels(sample))
    elif ending(path) in OUTLINES:
        mask = Mask(_polygons(path, shape))
    else:
        mask = _mask_image(path, sample.values, slice(*sample.columns))
    if mask.classes.shape != shape:
        raise DataError(
            f"{path}: expected the size of {sample.image}, {size_of(image)} (height x width), "
            f"got {size_of(mask.classes)}"
        )
    return mask


def resize_image(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) -> (size, size, 3), bilinear."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    return F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


def resize_classes(classes: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(H, W) int64 -> `shape`, the nearest pixel's."""
    labels = torch.from_numpy(classes)[None, None].double()
    return F.interpolate(labels, shape, mode="nearest-exact")[0, 0].long().numpy()


def ending(path: Path) -> str:
    """Of a file's name, with its dot, in lower case."""
    return path.suffix.lower()


def size_of(array: np.ndarray) -> str:
    return f"{array.shape[0]} x {array.shape[1]}"


def require_text(path: Path) -> None:
    """Raise DataError if the file is longer than a text that is read as a whole."""
    size = path.stat().st_size
    if size > TEXT:
        raise DataError(f"{path}: expected at most {TEXT} bytes, got {size}")


def slices_in(path: Path) -> int:
    """The number of slices of a volume, a .h5 with `image` and `label` (slices, H, W); h5py must be there."""
    import h5py

    with reading(path, "a volume with `image` and `label`"), h5py.File(path) as file:
        shapes = [_volume(path, file, name).shape for name in ("image", "label")]
    if shapes[0] != shapes[1]:
        raise DataError(f"{path}: expected image and label of one shape, got {shapes[0]}, {shapes[1]}")
    return shapes[0][0]


def _volume(path: Path, file: Any, name: str) -> Any:
    """A volume's dataset (slices, H, W), which h5py reads slice by slice."""
    volume = file[name]
    if volume.file.filename != file.filename or volume.external or volume.is_virtual:
        raise DataError(f"{path}: expected `{name}` in this file, got a link to another one")
    shape = volume.shape
    if shape is None or len(shape) != 3 or 0 in shape:
        raise DataError(f"{path}: expected {name} (slices, H, W) of at least one pixel, got {shape}")
    if shape[0] > SLICES or math.prod(shape) > VOXELS or math.prod(shape[1:]) > PIXELS:
        raise DataError(
            f"{path}: expected {name} of at most {SLICES} slices, {PIXELS} pixels in each and {VOXELS} in all, "
            f"got {shape}"
        )
    if math.prod(volume.chunks or ()) > PIXELS:
        raise DataError(f"{path}: expected {name} in chunks of at most {PIXELS} pixels, got {volume.chunks}")
    _require_numbers(path, name, volume.dtype)
    return volume


def _require_numbers(path: Path, name: str, dtype: np.dtype) -> None:
    if dtype.kind not in "biuf":
        raise DataError(f"{path}: expected numbers in `{name}`, got {dtype}")


def _open(path: Path) -> Image.Image:
    with reading(path, "an image that can be read"):
        try:
            image = Image.open(path, formats=FORMATS)
        except UnidentifiedImageError as error:
            said = "another file, another type of pixels, or a damaged one"
            raise DataError(f"{path}: expected an image of 8 or 16 bits, got {said}") from error
        with image:
            if image.width * image.height > PIXELS:
                size = f"{image.height} x {image.width}"
                raise DataError(f"{path}: expected an image of at most {PIXELS} pixels, got {size}")
            several = image.format != "MPO" and getattr(image, "is_animated", False)  # a photograph and its preview
            tags = getattr(image, "tag_v2", {})  # of a TIFF, whose planes do not say how many bits they have
            deep = np.max(tags.get(BITS, 8)) > 8
            raw = " ".join(str(tile[3]) for tile in image.tile)
            cut = image.mode not in DEEP and (deep or ";16" in raw)
            inverse = deep and tags.get(PHOTOMETRIC) == WHITE_IS_ZERO
            orientation = image.getexif().get(ORIENTATION, 1)
            image.load()
            image.info["raw"] = raw
    if several:
        raise DataError(f"{path}: expected one image, got several in one file")
    if cut:
        raise DataError(f"{path}: expected 8 bits a colour, got 16, of which Pillow keeps 8: save it with 8")
    if inverse:
        raise DataError(f"{path}: expected 0 to be black, got a TIFF of more than 8 bits in which it is white")
    if orientation not in (0, 1):  # of any type
        raise DataError(
            f"{path}: expected pixels as they are seen, got EXIF orientation {orientation!r:.9}: save it turned "
            "(PIL.ImageOps.exif_transpose) if its mask was drawn so, else without EXIF"
        )
    return image


def _image(path: Path) -> np.ndarray:
    image = _open(path)
    if image.mode not in DEEP:
        return np.asarray(image.convert("RGB"), np.float32) / 255
    grey = np.asarray(image, np.float32)  # a camera of more than 8 bits uses some of them
    least, largest = grey.min(), grey.max()  # NaN if any is
    if least == largest == 0:  # black
        return np.zeros((*grey.shape, 3), np.float32)
    white = np.percentile(grey, 99.8) if least >= 0 and largest < np.inf else 0
    if not white > 0:
        raise DataError(
            f"{path}: expected values from 0, at least 0.2% of them above, got {least:g} .. {largest:g}: "
            "scale what has other units, such as Hounsfield's, to 8 bits first"
        )
    return np.repeat((np.minimum(grey, white) / white)[..., None], 3, axis=2)


def _mask_image(path: Path, meaning: Values, columns: slice) -> Mask:
    image = _open(path)
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO:
        raise DataError(
            f"{path}: expected 0 to be black, got a TIFF in which it is white, and writers do not agree on what its "
            'mask is then: save it as PNG, or as TIFF with photometric="minisblack"'
        )
    if meaning is Values.CLASSES:
        if image.mode not in ONE_CHANNEL:
            raise DataError(f"{path}: expected class indices in one channel or in a palette, got {image.mode}")
        indices = np.asarray(image)[:, columns]
        for mode, step in SPREAD.items():
            if mode in image.info["raw"]:
                indices = indices // step
        return Mask(_whole(path, indices))
    if meaning is Values.FOREGROUND:
        image = _by_colour(image)
    if meaning is Values.FOREGROUND and ending(path) not in JPEG:
        _require_one_colour(path, image)
    levels = _levels(image)[:, columns]
    whole = _whole(path, levels)
    return Mask((whole != 0).astype(np.int64)) if meaning is Values.INSTANCES else _foreground(path, levels, whole)


def _by_colour(image: Image.Image) -> Image.Image:
    """An image with a palette of colours in which some pixels are black, but not those of index 0: without it."""
    if image.mode != "P":
        return image
    palette = np.zeros((COLOURS, 3), np.uint8)  # as Pillow takes indices beyond it
    known = np.reshape(image.getpalette(), (-1, 3))
    palette[: len(known)] = known
    used = np.unique(np.asarray(image))
    black = used[~palette[used].any(axis=1)]
    return image.convert("RGB") if black.size and 0 not in black else image


def _require_one_colour(path: Path, image: Image.Image) -> None:
    if image.mode in ONE_CHANNEL:
        return
    rgb = image.convert("RGB")
    pixels = np.asarray(rgb).reshape(-1, 3)
    if (pixels == pixels[:, :1]).all():
        return
    found = rgb.getcolors(COLOURS)
    if found is None:
        raise DataError(f"{path}: expected one colour over black, got more than {COLOURS}")
    colours = [colour for _, colour in found if any(colour)]
    if len(colours) > 1:
        raise DataError(
            f"{path}: expected one colour over black, got {len(colours)}: if each is a class, save class indices "
            f"(0, 1, 2, ...) and train with --classes {len(colours) + 1}"
        )


def _levels(image: Image.Image) -> np.ndarray:
    """One value a pixel (H, W), in the file's dtype; `Values.FOREGROUND` says what becomes of colours and alpha."""
    if image.mode == "P":
        palette = np.reshape(image.getpalette(), (-1, 3))
        grey = (palette == palette[:, :1]).all()
        return np.asarray(image.convert("L") if grey else image)
    if image.mode in ONE_CHANNEL:
        return np.asarray(image)
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB")).max(axis=2)
    pixels = np.asarray(image.convert("RGBA"))
    colours, alpha = pixels[..., :3], pixels[..., 3]
    if (alpha != alpha[0, 0]).any() and (colours == colours[0, 0]).all():
        return alpha
    return np.round(colours.max(axis=2) * (alpha / 255)).astype(np.uint8)


def _foreground(path: Path, levels: np.ndarray, whole: np.ndarray) -> Mask:
    """`Values.FOREGROUND`: levels (H, W) of the file's dtype, and as int64."""
    blurred = ending(path) in JPEG
    others = whole[whole != 0]
    if not blurred and (others == others[:1]).all():
        return Mask((whole != 0).astype(np.int64), Reading(foreground=int(others[0]) if others.size else None))
    white = np.iinfo(levels.dtype).max if levels.dtype.kind == "u" else None
    if white is None or (whole.max() <= white // 2 and not blurred):
        raise LowValuesError(path, levels, white)
    between = int(((whole > 0) & (whole < white)).sum())
    return Mask((whole > white // 2).astype(np.int64), Reading(white=white, grey=between))


def _polygons(path: Path, shape: tuple[int, int]) -> np.ndarray:
    with reading(path, "XML with Region and Vertex X, Y"):
        require_text(path)
        root = ElementTree.parse(path).getroot()
        regions = [region.findall("Vertices/Vertex") for region in root.iter("Region")]
        outlines = [np.array([(v.attrib["X"], v.attrib["Y"]) for v in region], np.float64) for region in regions]
    if not any(map(len, outlines)):
        raise DataError(f"{path}: expected Region elements with Vertex elements, found none")
    _require_drawable(path, outlines, shape)
    mask = Image.new("1", (shape[1], shape[0]))
    for outline in outlines:
        if len(outline) > 2:  # MoNuSeg has a few slips of the pen
            ImageDraw.Draw(mask).polygon(outline.ravel().tolist(), fill=1)
    return np.asarray(mask, np.int64)


def _require_drawable(path: Path, outlines: list[np.ndarray], shape: tuple[int, int]) -> None:
    """Raise DataError if Pillow would take too long for polygons (vertices, X and Y), or could not draw one."""
    crossings = 0
    for outline in filter(len, outlines):
        wrong = outline[~(np.abs(outline) < FARTHEST)]  # NaN is wrong
        if wrong.size:
            raise DataError(f"{path}: expected Vertex X, Y within {FARTHEST} pixels, got {wrong[0]:g}")
        top, bottom = outline[:, 1].clip(0, shape[0]).min(), outline[:, 1].clip(0, shape[0]).max()
        crossings += len(outline) * math.ceil(bottom - top)
    if crossings > CROSSINGS:
        raise DataError(f"{path}: expected at most {CROSSINGS} vertices times rows of its outlines, got {crossings}")


def _stored(path: Path, name: str, index: int | None) -> np.ndarray:
    """An array of an .npz, or a slice of one of a .h5."""
    with reading(path, "arrays `image` and `label`"):
        if ending(path) == ".h5":
            import h5py

            with h5py.File(path) as file:
                return _volume(path, file, name)[index]
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
            size = archive.getinfo(f"{name}.npy").file_size
            if size > STORED_BYTES:
                raise DataError(f"{path}: expected at most {STORED_BYTES} bytes of `{name}`, got {size}")
            array = np.lib.format.read_array(member, allow_pickle=False)
    _require_numbers(path, name, array.dtype)
    return array


def _stored_image(sample: Sample) -> np.ndarray:
    path, image = sample.image, _stored(sample.image, "image", sample.slice)
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3) or image.size == 0:
        raise DataError(f"{path}: expected image (H, W) or (H, W, 3) of at least one pixel, got {image.shape}")
    if math.prod(image.shape[:2]) > PIXELS:
        raise DataError(f"{path}: expected image of at most {PIXELS} pixels, got {image.shape}")
    if image.dtype == np.uint8:
        image = image / np.float32(255)
    if not (image.min() >= -1e-3 and image.max() <= 1 + 1e-3):  # NaN is neither
        raise DataError(f"{path}: expected image values in 0 .. 1, got {image.min()} .. {image.max()}")
    image = image.astype(np.float32)
    return np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image


def _stored_labels(sample: Sample) -> np.ndarray:
    labels = _stored(sample.mask, "label", sample.slice)
    if labels.ndim != 2:
        raise DataError(f"{sample.mask}: expected label (H, W), got {labels.shape}")
    return _whole(sample.mask, labels)


def _whole(path: Path, values: np.ndarray) -> np.ndarray:
    """The same values as int64."""
    largest = np.float64(2**31)  # which no float16 is
    whole = (values >= 0) & (values < largest) & (np.floor(values) == values)  # NaN is none of it
    if not whole.all():
        raise DataError(f"{path}: expected whole numbers from 0 in a mask, got {values[~whole][0]}")
    return values.astype(np.int64)
