"""The user's own image, as `python -m benchmarks --image FILE` reads it: rightly, or refused in one line."""

import re
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tifffile
from PIL import Image

from benchmarks import cases, quick


@pytest.fixture(autouse=True)
def nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an image that is to be refused is taken."""
    monkeypatch.setattr(quick, "measured", mock.Mock(side_effect=AssertionError("the image was taken")))


RAMP = np.linspace(0, 1, 30).reshape(5, 6)  # rows and columns differ, and so do all values
COLOURS = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=2)


def of_bits(values: np.ndarray, bits: int, dtype: Any) -> np.ndarray:
    """0 .. 1 as integers of so many bits."""
    return np.round(values * (2**bits - 1)).astype(dtype)


def png(header: tuple[int, int, int, int], rows: bytes) -> bytes:
    """A PNG file as it is on disk; the header is width, height, bits and kind of colours."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    start = struct.pack(">IIBBBBB", *header, 0, 0, 0)
    parts = chunk(b"IHDR", start), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def pillow(values: np.ndarray, mode: str | None = None, name: str = "image.png", **options: Any) -> Callable:
    def write(folder: Path) -> Path:
        image = Image.fromarray(values)
        (image if mode is None else image.convert(mode)).save(folder / name, **options)
        return folder / name

    return write


def tiff(values: np.ndarray, **options: Any) -> Callable:
    def write(folder: Path) -> Path:
        tifffile.imwrite(folder / "image.tif", values, **options)
        return folder / "image.tif"

    return write


def white_is_zero(values: np.ndarray) -> Callable:
    """A TIFF file under a compression that Pillow alone reads."""

    def write(folder: Path) -> Path:
        path = pillow(values, name="image.tif", compression="tiff_lzw")(folder)
        with tifffile.TiffFile(path, mode="r+b") as file:
            file.pages[0].tags["PhotometricInterpretation"].overwrite(tifffile.PHOTOMETRIC.MINISWHITE)
        return path

    return write


def raw(content: bytes, name: str) -> Callable:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


GREY8, RGB8 = of_bits(RAMP, 8, np.uint8), of_bits(COLOURS, 8, np.uint8)
TRANSPARENT = np.dstack([RGB8, np.full((5, 6), 7, np.uint8)])
GREY, RGB = np.dstack([RAMP] * 3), COLOURS
HOUNSFIELD = np.round(2000 * RAMP - 1000)
LOW, HIGH = np.percentile(HOUNSFIELD, (1, 99))
STRETCHED = np.dstack([((HOUNSFIELD - LOW) / (HIGH - LOW)).clip(0, 1)] * 3)

READ: dict[str, tuple[Callable, np.ndarray]] = {
    "grey": (pillow(GREY8), GREY),
    "grey_alpha": (pillow(GREY8, "LA"), GREY),
    "rgb": (pillow(RGB8), RGB),
    "rgba": (pillow(TRANSPARENT), RGB),
    "palette": (pillow(GREY8, "P"), GREY),
    "bmp": (pillow(RGB8, name="image.bmp"), RGB),
    "gif": (pillow(GREY8, name="image.gif"), GREY),
    "boolean": (pillow(RAMP > 0.5), GREY > 0.5),
    "one_pixel": (pillow(GREY8[2:3, 2:3]), GREY[2:3, 2:3]),
    "constant": (pillow(np.full((4, 4), 51, np.uint8)), np.full((4, 4, 3), 0.2)),
    "png_16": (pillow(of_bits(RAMP, 16, np.uint16)), GREY),
    "png_12_in_16": (pillow(of_bits(RAMP, 12, np.uint16)), GREY),
    "tiff_12_in_16": (tiff(of_bits(RAMP, 12, np.uint16)), GREY),
    "tiff_signed": (tiff(of_bits(RAMP, 12, np.int16)), GREY),
    "tiff_negative": (tiff(HOUNSFIELD.astype(np.int16)), STRETCHED),
    "tiff_int8": (tiff(np.round(254 * RAMP - 127).astype(np.int8)), STRETCHED),
    "tiff_floats": (tiff(RAMP), GREY),
    "tiff_hounsfield": (tiff(HOUNSFIELD.astype(np.float32)), STRETCHED),
    "tiff_floats_of_255": (tiff((255 * RAMP).astype(np.float32)), STRETCHED),
    "tiff_rgb_floats": (tiff(COLOURS.astype(np.float32), photometric="rgb"), RGB),
    "tiff_rgb_16": (tiff(of_bits(COLOURS, 16, np.uint16)), RGB),
    "tiff_planes": (
        tiff(of_bits(np.moveaxis(COLOURS, 2, 0), 16, np.uint16), photometric="rgb", planarconfig="separate"),
        RGB,
    ),
    "tiff_white_is_zero": (tiff(255 - GREY8, photometric="miniswhite"), GREY),
    "tiff_white_is_zero_16": (tiff(65535 - of_bits(RAMP, 16, np.uint16), photometric="miniswhite"), GREY),
    "tiff_white_is_zero_floats": (tiff((1 - RAMP).astype(np.float32), photometric="miniswhite"), GREY),
    "tiff_white_is_zero_bits": (tiff(RAMP <= 0.5, photometric="miniswhite"), GREY > 0.5),
    "tiff_white_is_zero_compressed": (white_is_zero(65535 - of_bits(RAMP, 16, np.uint16)), GREY),
    "tiff_white_is_zero_compressed_8": (white_is_zero(255 - GREY8), GREY),
    "tiff_compressed": (pillow(RGB8, name="image.tif", compression="tiff_lzw"), RGB),
}


@pytest.mark.parametrize("name", READ)
def test_an_image_is_read(name: str, tmp_path: Path) -> None:
    write, expected = READ[name]
    image = cases.load_image(write(tmp_path))
    assert image.dtype == np.float32 and image.shape == expected.shape
    np.testing.assert_allclose(image, expected, atol=0.01)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (of_bits(RAMP, 12, np.uint16), "0 is shown as black, 4095 as white"),
        (HOUNSFIELD.astype(np.float32), f"{LOW:g} is shown as black, {HIGH:g} as white"),
        (GREY8, ""),
        (RAMP, ""),
    ],
    ids=["bits", "percentiles", "whole", "floats"],
)
def test_what_is_black_and_white_is_said(
    values: np.ndarray, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiff(values)(tmp_path)
    cases.load_image(path)
    assert capsys.readouterr().out == (f"image: {path}: {said}\n" if said else "")


def spoiled(value: float, count: int) -> np.ndarray:
    image = np.zeros((64, 64, 3), np.float32)
    image.reshape(-1, 3)[:count, 1] = value
    return image


REFUSED: dict[str, tuple[Callable, str]] = {
    "nan": (tiff(spoiled(np.nan, 12), photometric="rgb"), "expected finite values, got NaN in 12 of 4096 pixels"),
    "infinity": (
        tiff(spoiled(-np.inf, 1), photometric="rgb"),
        "expected finite values, got infinity in 1 of 4096 pixels",
    ),
    "frames": (
        pillow(GREY8, name="image.gif", save_all=True, append_images=[Image.fromarray(255 - GREY8)]),
        "expected one image, got 2 frames",
    ),
    "pages": (tiff(np.zeros((5, 8, 8), np.uint8), photometric="minisblack"), "expected one image, got 5 pages"),
    "pages_of_floats": (tiff(np.zeros((5, 8, 8, 3), np.float32), photometric="rgb"), "expected one image, got 5 pages"),
    "channels": (
        tiff(np.zeros((8, 8, 5), np.uint8), photometric="minisblack", planarconfig="contig"),
        "expected a grey, RGB or RGBA image, got an array of shape (8, 8, 5)",
    ),
    "complex": (tiff(np.zeros((8, 8), np.complex64)), "expected integers or floats, got complex64"),
    "far_apart": (tiff(np.array([[-1e308, 1e308]] * 4)), "expected values whose differences are finite, got -1e+308"),
    "constant": (tiff(np.full((8, 8), -4, np.int16)), "got -4 in every pixel"),
    "no_pixels": (raw(png((0, 5, 8, 0), b""), "image.png"), "expected an image: cannot identify image file"),
    "png_rgb_16": (
        raw(png((1, 1, 16, 2), bytes(7)), "image.png"),
        "expected 8 bits a colour, got 16, of which Pillow keeps 8: save it as an uncompressed TIFF",
    ),
    "no_image": (raw(b"not an image", "image.png"), "expected an image: cannot identify image file"),
    "no_tiff": (raw(b"II*\0\0\0", "image.tif"), "expected an image: "),
    "cut_off": (raw(png((64, 64, 8, 0), bytes(999))[:60], "image.png"), "expected an image: "),
    "no_dicom": (raw(bytes(128) + b"DICM", "image"), "expected an image: "),
    "missing": (lambda folder: folder / "image.png", "expected an image, found no file"),
    "folder": (lambda folder: folder, "expected an image, found a folder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_image_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command, in one line that names the file."""
    write, expected = REFUSED[name]
    path = write(tmp_path)
    assert quick.main(["--image", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"--image: {path}: ") and expected in line
    assert not re.search(r" at 0x[0-9a-f]", line)


def test_a_spoiled_tiff_file(tmp_path: Path) -> None:
    path = tiff(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64), compression="zlib")(tmp_path)
    content = bytearray(path.read_bytes())
    content[-200:-100] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}: expected an image: "):
        cases.load_image(path)


def test_an_image_without_pixels(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="zero-size"):
        path = tiff(np.zeros((0, 7), np.uint8))(tmp_path)
    with pytest.raises(ValueError, match="expected an image, got 0 pixels"):
        cases.load_image(path)


@pytest.mark.parametrize(
    ("package", "write"),
    [("PIL.Image", pillow(GREY8)), ("tifffile", tiff(GREY8)), ("pydicom", raw(bytes(128) + b"DICM", "image.dcm"))],
    ids=["Pillow", "tifffile", "pydicom"],
)
def test_what_reads_it_is_not_installed(
    package: str, write: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    name = package.replace("PIL.Image", "Pillow")
    with pytest.raises(
        ValueError, match=re.escape(f"{path}: {name}, which reads it, is not installed: pip install {name}")
    ):
        cases.load_image(path)


# DICOM


def dicom(folder: Path, values: np.ndarray, **elements: Any) -> Path:
    """A file as a scanner writes it, of 12 bits in 16 unless the elements say something else."""
    pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed")
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, "1.2.3"
    bits = 8 * values.dtype.itemsize
    fixed = {"Rows": values.shape[-2], "Columns": values.shape[-1], "SamplesPerPixel": 1}
    fixed |= {"PhotometricInterpretation": "MONOCHROME2", "PixelRepresentation": int(values.dtype.kind == "i")}
    fixed |= {"BitsAllocated": bits, "BitsStored": bits, "HighBit": bits - 1}
    for name, value in (fixed | elements).items():
        setattr(data, name, value)
    data.PixelData = values.tobytes()
    data.save_as(folder / "image.dcm", enforce_file_format=True)
    return folder / "image.dcm"


STORED = of_bits(RAMP, 12, np.uint16)
RESCALED = {"RescaleSlope": 0.5, "RescaleIntercept": -1000}  # -1000 .. 1047.5 HU


def test_a_dicom_file_in_its_own_units(tmp_path: Path) -> None:
    np.testing.assert_allclose(cases.load_image(dicom(tmp_path, STORED)), GREY, atol=0.01)
    np.testing.assert_allclose(cases.load_image(dicom(tmp_path, STORED, **RESCALED)), STRETCHED, atol=0.01)


def test_a_dicom_file_with_a_window(tmp_path: Path) -> None:
    path = dicom(tmp_path, STORED, **RESCALED, WindowCenter=[40, 300], WindowWidth=[400, 1500])
    hounsfield = 0.5 * STORED - 1000
    np.testing.assert_allclose(cases.load_image(path)[..., 0], ((hounsfield + 160) / 400).clip(0, 1), atol=0.01)


def test_a_window_is_said_by_its_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the file's units, as DICOM defines them; the window of this file has one more value under LINEAR_EXACT."""
    for function, black, white in (("LINEAR", -160, 239), ("LINEAR_EXACT", -160, 240)):
        window = {"WindowCenter": 40, "WindowWidth": 400, "VOILUTFunction": function}
        path = dicom(tmp_path, STORED, **RESCALED, **window)
        image = cases.load_image(path)
        assert capsys.readouterr().out == f"image: {path}: {black} is shown as black, {white} as white\n"
        expected = ((0.5 * STORED - 1000 - black) / (white - black)).clip(0, 1)
        np.testing.assert_allclose(image[..., 0], expected, atol=1e-6)


def look_up_table(first: int, values: np.ndarray, bits: int, vr: str = "US") -> dict[str, Any]:
    """The element of a VOI LUT: stored values from `first` on are shown as these."""
    pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed")
    table = pydicom.Dataset()
    table.LUTDescriptor = [len(values), first, bits]
    table.add_new("LUTData", vr, values.tolist() if vr == "US" else values.astype("<u2").tobytes())
    return {"VOILUTSequence": [table]}


@pytest.mark.parametrize("vr", ["US", "OW"])
@pytest.mark.parametrize("bits", [8, 12])
def test_a_dicom_file_with_a_look_up_table(vr: str, bits: int, tmp_path: Path) -> None:
    """Values below and above the table are its first and its last."""
    table = of_bits(np.linspace(0, 1, 1000) ** 2, bits, np.uint16)
    path = dicom(tmp_path, STORED, **look_up_table(1000, table, bits, vr), WindowCenter=1, WindowWidth=2)
    expected = ((STORED - 1000.0) / 999).clip(0, 1) ** 2
    np.testing.assert_allclose(cases.load_image(path)[..., 0], expected, atol=0.01)


def test_a_look_up_table_of_rescaled_values(tmp_path: Path) -> None:
    path = dicom(tmp_path, STORED, **RESCALED, **look_up_table(0, np.arange(1000), 10))
    np.testing.assert_allclose(cases.load_image(path)[..., 0], ((0.5 * STORED - 1000) / 999).clip(0, 1), atol=0.01)


NOT_SHOWN: dict[str, tuple[dict[str, Any], str]] = {
    "no_ends": (
        {"WindowCenter": 40, "WindowWidth": 1},
        "expected a window with two ends, got WindowCenter 40 and WindowWidth 1",
    ),
    "outside": (
        {"WindowCenter": 9000, "WindowWidth": 100},
        "expected different values between 8950 and 9049, which the file shows as black and white, got 0 .. 4095",
    ),
    "sigmoid": (
        {"WindowCenter": 40, "WindowWidth": 400, "VOILUTFunction": "SIGMOID"},
        "expected a VOI LUT Function LINEAR or LINEAR_EXACT, got SIGMOID",
    ),
}


@pytest.mark.parametrize("name", NOT_SHOWN)
def test_a_window_that_shows_nothing_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    window, expected = NOT_SHOWN[name]
    path = dicom(tmp_path, STORED, **window)
    assert quick.main(["--image", str(path)]) == 2
    assert capsys.readouterr().err == f"--image: {path}: {expected}\n"


def test_a_look_up_table_that_shows_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = dicom(tmp_path, STORED, **look_up_table(0, np.full(9, 7), 8))
    assert quick.main(["--image", str(path)]) == 2
    expected = "expected a VOI LUT Sequence of different values, got 7 alone"
    assert capsys.readouterr().err == f"--image: {path}: {expected}\n"
    del (broken := look_up_table(0, np.arange(9), 8))["VOILUTSequence"][0].LUTData
    assert quick.main(["--image", str(dicom(tmp_path, STORED, **broken))]) == 2
    assert capsys.readouterr().err.startswith(f"--image: {path}: expected an image: ")


def test_a_dicom_file_whose_least_value_is_white(tmp_path: Path) -> None:
    path = dicom(tmp_path, STORED, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_allclose(cases.load_image(path), 1 - GREY, atol=0.01)


def test_a_dicom_file_of_colours(tmp_path: Path) -> None:
    colours = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "PhotometricInterpretation": "RGB"}
    path = dicom(tmp_path, RGB8, **colours, Rows=5, Columns=6)
    np.testing.assert_allclose(cases.load_image(path), RGB, atol=0.01)


def test_a_dicom_file_of_several_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = dicom(tmp_path, np.stack([STORED, STORED]), NumberOfFrames=2)
    assert quick.main(["--image", str(path)]) == 2
    assert f"--image: {path}: expected one image, got 2 frames" in capsys.readouterr().err
