"""Reads the image that a user brings: what Pillow, tifffile and pydicom read, as colours in 0 .. 1."""

import contextlib
import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

GREY = ("1", "L", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow's modes of one channel
TIFF = (".tif", ".tiff")
DICOM = (".dcm", ".dicom")
PREAMBLE = 128  # bytes before the letters DICM


@dataclass(frozen=True)
class Ends:
    """The values that are shown as black, 0, and as white, 1."""

    black: float
    white: float


@dataclass(frozen=True)
class Pixels:
    """What a file holds: values (H, W) or (H, W, channels) of its dtype, and what the file says of black and white."""

    values: np.ndarray
    ends: Ends | None = None
    inverted: bool = False


def load(path: Path) -> np.ndarray:
    """The one image of a file: (H, W, 3), float32 in 0 .. 1.

    A grey image becomes three equal colours; transparency is left out. Which values are black and white:

    - of floats within 0 .. 1 and of booleans, 0 and 1;
    - of integers that are not negative, 0 and the smallest of 255, 511, 1023, ... that none is above: data of 12 bits
      in a file of 16 are not dark;
    - of a DICOM file with a window, the window's ends; with a look-up table, its least and its largest value;
    - of anything else, such as floats up to 255 or Hounsfield units, the 1st and the 99th percentile; values outside
      are clipped. Where these are equal, the least and the largest value.

    What is not the dtype's own range is printed.

    Raises:
        ValueError: the file holds no image, several, or one that is empty, constant, not finite or not of grey or RGB
            channels; or it names a black and a white between which it has no different values; or the package that
            reads it is not installed. The message is one line that begins with the path.
    """
    try:
        if not path.is_file():
            raise ValueError(f"expected an image, found {'a folder' if path.is_dir() else 'no file'}")
        pixels = _pixels(path)
        values = _checked(pixels.values)
        ends = pixels.ends or ends_of(values)
        scaled = _scaled(values, ends)
        if pixels.ends and scaled.min() == scaled.max():
            raise ValueError(
                f"expected different values between {ends.black:g} and {ends.white:g}, which the file shows as black "
                f"and white, got {values.min():g} .. {values.max():g}"
            )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if ends != _whole_range(values.dtype):
        print(f"image: {path}: {ends.black:g} is shown as black, {ends.white:g} as white")
    if pixels.inverted:
        scaled = 1 - scaled
    return np.repeat(scaled, 3, axis=2).astype(np.float32) if scaled.shape[2] == 1 else scaled.astype(np.float32)


def ends_of(values: np.ndarray) -> Ends:
    """Black and white of values whose file does not name them: see `load`.

    Raises:
        ValueError: all values are the same one, of which nothing says how bright it is.
    """
    least, largest = values.min(), values.max()
    if values.dtype.kind == "b" or (values.dtype.kind == "f" and 0 <= least and largest <= 1):
        return Ends(0, 1)
    if values.dtype.kind in "iu" and least >= 0:
        return Ends(0, 2 ** max(8, int(largest).bit_length()) - 1)
    if least == largest:
        raise ValueError(f"expected different values, or values within 0 .. 1, got {least:g} in every pixel")
    low, high = np.percentile(values, (1, 99))
    return Ends(float(low), float(high)) if low < high else Ends(float(least), float(largest))


def _scaled(values: np.ndarray, ends: Ends) -> np.ndarray:
    """float64 in 0 .. 1.

    Raises:
        ValueError: the values are so far apart that float64 does not hold their difference.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = ((values.astype(np.float64) - ends.black) / (ends.white - ends.black)).clip(0, 1)
    if not np.isfinite(scaled).all():
        raise ValueError(f"expected values whose differences are finite, got {values.min():g} .. {values.max():g}")
    return scaled


def _whole_range(dtype: np.dtype) -> Ends:
    return Ends(0, np.iinfo(dtype).max if dtype.kind in "iu" else 1)


def _pixels(path: Path) -> Pixels:
    with path.open("rb") as file:
        dicom = file.read(PREAMBLE + 4)[PREAMBLE:] == b"DICM"
    if dicom or path.suffix.lower() in DICOM:
        return _of_dicom(path)
    return _of_tiff(path) if path.suffix.lower() in TIFF else Pixels(_by_pillow(path))


def _by_pillow(path: Path) -> np.ndarray:
    pillow = _library("PIL.Image", "Pillow")
    with _decoding():
        image = pillow.open(path)
    with image:
        with _decoding():
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # a photograph and its preview
        _expect_one(frames, "frames")
        if image.mode not in GREY and any(";16" in str(tile[3]) for tile in image.tile):
            raise ValueError(
                "expected 8 bits a colour, got 16, of which Pillow keeps 8: save it as an uncompressed TIFF"
            )
        with _decoding():
            if image.mode in GREY:
                return np.asarray(image)
            return np.asarray(image.convert("L" if image.mode == "LA" else "RGB"))  # colours of a palette, of CMYK


def _of_tiff(path: Path) -> Pixels:
    """By tifffile, which knows every dtype; by Pillow where the colours or the compression are not plain."""
    tifffile = _library("tifffile", "tifffile")
    kinds = tifffile.PHOTOMETRIC
    with _decoding():
        file = tifffile.TiffFile(path)
    with file:
        with _decoding():
            pages, page = len(file.pages), file.pages[0]
        _expect_one(pages, "pages")
        white_is_zero = page.photometric == kinds.MINISWHITE
        if page.photometric in (kinds.MINISWHITE, kinds.MINISBLACK, kinds.RGB):
            if page.axes not in ("YX", "YXS", "SYX"):
                raise ValueError(f"expected a grey, RGB or RGBA image, got an array of shape {page.shape}")
            with _decoding():
                try:
                    values = page.asarray()
                    return Pixels(np.moveaxis(values, 0, -1) if page.axes == "SYX" else values, inverted=white_is_zero)
                except ValueError as error:
                    if "imagecodecs" not in str(error):  # a package for compressions that Pillow knows itself
                        raise
        # Pillow turns white and black round itself, but only where 8 bits or fewer are a value.
        return Pixels(_by_pillow(path), inverted=white_is_zero and page.bitspersample > 8)


def _of_dicom(path: Path) -> Pixels:
    """Colours, or grey values in the file's units (Hounsfield units of CT) or through its look-up table."""
    pydicom, pixels = _library("pydicom", "pydicom"), _library("pydicom.pixels", "pydicom")
    with _decoding():
        data = pydicom.dcmread(path)
        frames = int(data.get("NumberOfFrames") or 1)
    _expect_one(frames, "frames")
    with _decoding():
        values = pixels.pixel_array(data)
        interpretation = data.PhotometricInterpretation
        if interpretation == "PALETTE COLOR":
            return Pixels(pixels.apply_color_lut(values, data))
        if values.ndim == 3:
            return Pixels(values)
        grey = pixels.apply_modality_lut(values, data)
    return _through_window(data, _checked(grey), inverted=interpretation == "MONOCHROME1")


def _through_window(data: Any, values: np.ndarray, inverted: bool) -> Pixels:
    """What a DICOM file shows of grey values: by its look-up table, or between the ends of its first window.

    Raises:
        ValueError: the table or the window shows all values alike.
    """
    if data.get("VOILUTSequence"):
        with _decoding():
            table = data.VOILUTSequence[0]
            first, shown = int(table.LUTDescriptor[1]), _entries(table.LUTData, little=data.original_encoding[1])
            ends = Ends(float(shown.min()), float(shown.max()))
        if ends.black == ends.white:
            raise ValueError(f"expected a VOI LUT Sequence of different values, got {ends.black:g} alone")
        places = np.round(values.astype(np.float64) - first).clip(0, len(shown) - 1).astype(np.int64)
        return Pixels(shown[places], ends, inverted)
    with _decoding():
        center, width = (_first(data.get(name)) for name in ("WindowCenter", "WindowWidth"))
    if center is None or width is None:
        return Pixels(values, None, inverted)
    function = data.get("VOILUTFunction") or "LINEAR"
    # DICOM's part 3, C.11.2.1.2 and C.11.2.1.3
    if function == "LINEAR":
        ends = Ends(center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2)
    elif function == "LINEAR_EXACT":
        ends = Ends(center - width / 2, center + width / 2)
    else:
        raise ValueError(f"expected a VOI LUT Function LINEAR or LINEAR_EXACT, got {function}")
    if not -math.inf < ends.black < ends.white < math.inf:
        raise ValueError(f"expected a window with two ends, got WindowCenter {center:g} and WindowWidth {width:g}")
    return Pixels(values, ends, inverted)


def _entries(data: Any, little: bool) -> np.ndarray:
    """A look-up table's values, which pydicom gives as numbers or, under the VR OW, as bytes."""
    return np.frombuffer(data, "<u2" if little else ">u2") if isinstance(data, bytes) else np.atleast_1d(data)


def _first(value: Any) -> float | None:
    """Of one number or several."""
    numbers = [] if value is None else np.atleast_1d(value).tolist()
    return float(numbers[0]) if numbers else None


def _checked(values: np.ndarray) -> np.ndarray:
    """(H, W, 1 or 3), without transparency.

    Raises:
        ValueError: they are no such image, see `load`.
    """
    if values.size == 0:
        raise ValueError(f"expected an image, got {' x '.join(map(str, values.shape))} pixels")
    planes = values[:, :, None] if values.ndim == 2 else values
    if planes.ndim != 3 or planes.shape[2] > 4:
        raise ValueError(f"expected a grey, RGB or RGBA image, got an array of shape {values.shape}")
    if values.dtype.kind not in "biuf":
        raise ValueError(f"expected integers or floats, got {values.dtype}")
    planes = planes[:, :, : 3 if planes.shape[2] > 2 else 1]
    unusable = {"NaN": np.isnan(planes), "infinity": np.isinf(planes)} if values.dtype.kind == "f" else {}
    counts = {name: int(where.any(axis=2).sum()) for name, where in unusable.items() if where.any()}
    if counts:
        found = " and ".join(f"{name} in {count}" for name, count in counts.items())
        raise ValueError(f"expected finite values, got {found} of {planes.shape[0] * planes.shape[1]} pixels")
    return planes


def _expect_one(count: int, unit: str) -> None:
    if count > 1:
        raise ValueError(f"expected one image, got {count} {unit}: save the one you mean in a file of its own")


def _library(module: str, name: str) -> ModuleType:
    """Imported where a file needs it: the bundled slide needs none."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{name}, which reads it, is not installed: pip install {name}") from error


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    """Of a broken file the libraries raise all kinds of errors: each becomes one line."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"expected an image: {lines[0]}") from error
