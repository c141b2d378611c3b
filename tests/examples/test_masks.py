"""How the pixels of mask files are read, what is said of it, and what is refused."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples import data, files, train
from tests.datasets import SHORT, glas, kvasir, masked, monuseg, picture, script, synapse, truncate, write_image

COLOURS = np.array([[0, 0, 0], [10, 200, 30], [240, 20, 90], [9, 9, 250]], np.uint8)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    return script(train, monkeypatch)


def trained(run: Callable[..., int], root: Path, *options: object) -> int:
    return run("--data", root, "--out", root / "run", *SHORT, *options)


def white(instances: np.ndarray) -> np.ndarray:
    return (instances > 0) * np.uint8(255)


def with_edges(instances: np.ndarray) -> np.ndarray:
    """Boxes of 14 x 14 with 100 where they begin and 200 where they end, of which there are 14 pixels each."""
    levels = white(instances)
    for i in (1, 2):
        columns = np.flatnonzero((instances == i).any(0))
        levels[:, columns[0]] = np.minimum(levels[:, columns[0]], 100)
        levels[:, columns[-1]] = np.minimum(levels[:, columns[-1]], 200)
    return levels


def palette(instances: np.ndarray, colours: np.ndarray = COLOURS) -> Image.Image:
    image = Image.fromarray(instances, "L").copy()
    image.putpalette(colours.tobytes())
    return image


def with_alpha(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return np.dstack([colours, colours, colours, alpha])


FOREGROUND: dict[str, tuple[Callable[[np.ndarray], object], str, Callable[[np.ndarray], np.ndarray]]] = {
    # the mask of instances 0, 1, 2; its file's ending; and its foreground
    "one value": (lambda i: (i > 0) * np.uint8(7), ".png", lambda i: i > 0),
    "bits": (lambda i: Image.fromarray(i > 0), ".png", lambda i: i > 0),
    "grey edges": (with_edges, ".png", lambda i: with_edges(i) >= 128),
    "16 bits": (lambda i: with_edges(i).astype(np.uint16) * 257, ".tif", lambda i: with_edges(i) >= 128),
    "float": (lambda i: (i > 0).astype(np.float32), ".tif", lambda i: i > 0),
    "colours": (lambda i: np.dstack([i * 0, i * 0, white(i)]), ".png", lambda i: i > 0),
    "grey palette": (
        lambda i: palette(i, np.repeat(np.array([[0], [90], [255]], np.uint8), 3, axis=1)),
        ".png",
        lambda i: i == 2,
    ),
    "coloured palette": (lambda i: palette((i > 0).astype(np.uint8)), ".png", lambda i: i > 0),
    "coloured palette, black last": (
        lambda i: palette((i == 0).astype(np.uint8), COLOURS[[1, 0]]),
        ".png",
        lambda i: i > 0,
    ),
    "coloured palette, too short": (
        lambda i: palette((i == 0).astype(np.uint8), COLOURS[[1]]),
        ".png",
        lambda i: i > 0,
    ),
    "alpha alone": (lambda i: with_alpha(i * 0 + np.uint8(255), white(i)), ".png", lambda i: i > 0),
    "alpha alone, black": (lambda i: with_alpha(i * 0, white(i)), ".png", lambda i: i > 0),
    "alpha that hides": (lambda i: with_alpha(white(i), (i == 1) * np.uint8(255)), ".png", lambda i: i == 1),
    "alpha of 255": (lambda i: with_alpha(white(i), i * 0 + np.uint8(255)), ".png", lambda i: i > 0),
    "grey with alpha": (lambda i: Image.fromarray(np.dstack([i * 0, white(i)]), "LA"), ".png", lambda i: i > 0),
}


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", FOREGROUND)
def test_foreground(name: str, run, tmp_path: Path) -> None:
    mask, suffix, foreground = FOREGROUND[name]
    masked(tmp_path, mask, suffix)
    assert trained(run, tmp_path) == 0
    for i, sample in enumerate(data.find(tmp_path).train):
        np.testing.assert_array_equal(files.load(sample)[1], foreground(picture(i)[1]))


def test_grey_values_are_said_once(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masked(tmp_path, with_edges)
    Image.fromarray(white(picture(0)[1])).save(tmp_path / "masks" / "0.png")
    grey = sum(np.isin(with_edges(picture(i)[1]), (100, 200)).sum() for i in (1, 2, 3)) / (4 * 40 * 48)
    assert trained(run, tmp_path) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("masks:")]
    said = f"3 of 4 have grey values between 0 and 255 ({grey:.1%} of the pixels); at least half, 128, is foreground"
    said += " (classes are indices, 0, 1, 2, ..., by --classes)"
    assert lines == [f"masks: {said}"]


def test_other_foregrounds_are_said(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masked(tmp_path, lambda instances: (instances > 0).astype(np.uint8))
    Image.fromarray((picture(0)[1] > 0) * np.uint8(3)).save(tmp_path / "masks" / "0.png")
    assert trained(run, tmp_path) == 0
    said = "masks: the foreground is the value 1 in 3 masks and 3 in 1 mask: read as one class here; "
    said += "--classes N tells class indices apart\n"
    assert said in capsys.readouterr().out


def test_instances_are_foreground(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    glas(tmp_path)
    assert trained(run, tmp_path) == 0
    assert "masks:" not in capsys.readouterr().out
    for sample in data.find(tmp_path).train:
        np.testing.assert_array_equal(files.load(sample)[1], np.asarray(Image.open(sample.mask)) > 0)


def test_numbered_objects(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers such as 90 and 180 would be taken for grey levels."""
    masked(tmp_path, lambda instances: instances * np.uint8(90))
    assert trained(run, tmp_path) == 0
    assert "grey values between 0 and 255" in capsys.readouterr().out
    assert trained(run, tmp_path, "--instances", "--restart") == 0
    assert "masks:" not in capsys.readouterr().out
    for i, sample in enumerate(data.as_instances(data.find(tmp_path)).train):
        np.testing.assert_array_equal(files.load(sample)[1], picture(i)[1] > 0)
    synapse(tmp_path / "labels")
    assert trained(run, tmp_path / "labels", "--instances") == 2
    assert "expected masks that number objects, got labels of classes" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    "mask, suffix",
    [
        (lambda i: i, ".png"),
        (lambda i: palette(i), ".png"),
        (lambda i: i.astype(np.uint16), ".tif"),
        (lambda i: i.astype(np.float32), ".tif"),
    ],
)
def test_class_indices(mask, suffix: str, run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masked(tmp_path, mask, suffix)
    assert trained(run, tmp_path, "--classes", 3) == 0
    out = capsys.readouterr().out
    assert "classes: background, class 1, class 2\n" in out and "| class 2 |" in out and "masks:" not in out
    for i, sample in enumerate(data.with_classes(data.find(tmp_path), 3).train):
        np.testing.assert_array_equal(files.load(sample)[1], picture(i)[1])


def labelled(name: str, label: np.ndarray) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        synapse(root)
        np.savez(root / "train_npz" / name, image=np.zeros(label.shape, np.float32), label=label)

    return make


def of_few_bits(path: Path, values: np.ndarray, bits: int) -> None:
    """A grey PNG, which Pillow writes of 1, 8 and 16 bits alone."""
    each = ((values[..., None] >> np.arange(bits - 1, -1, -1)) & 1).astype(np.uint8).reshape(len(values), -1)
    lines = b"".join(b"\0" + np.packbits(line).tobytes() for line in each)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in parts]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


@pytest.mark.parametrize("bits", [2, 4])
def test_class_indices_of_few_bits(bits: int, tmp_path: Path) -> None:
    """Pillow brings them to 0 .. 255, which grey levels are. An odd width: bytes are not full."""
    path, indices = tmp_path / "a.png", np.array([[0, 1, 2, 3, 1]] * 2)
    of_few_bits(path, indices, bits)
    for values, expected in ((files.Values.CLASSES, indices), (files.Values.INSTANCES, indices > 0)):
        sample = files.Sample(path, path, "", values)
        np.testing.assert_array_equal(files.read_mask(sample, np.zeros((2, 5, 3), np.float32)).classes, expected)
    of_few_bits(path, np.array([[0, 2**bits - 1]] * 2), bits)
    mask = files.read_mask(files.Sample(path, path, ""), np.zeros((2, 2, 3), np.float32))
    assert mask.reading.foreground == 255


def two_pages(path: Path, to: Path) -> None:
    """Replace an image by a file that holds it and another one."""
    with Image.open(path) as image:
        pages = [image.copy(), Image.fromarray(255 - np.asarray(image))]
    path.unlink()
    pages[0].save(to, save_all=True, append_images=pages[1:])


WHOLE = "expected whole numbers from 0 in a mask"
FLAT = np.zeros((40, 48), np.float32)
THREE = np.repeat(np.arange(4, dtype=np.uint8), 480).reshape(40, 48)
REFUSED: dict[str, tuple[Callable[[Path], None], list[object], str]] = {
    # the data set, the options, and what is said
    "low values": (
        lambda root: masked(root, lambda i: i),
        [],
        "0.png: expected 0 and one other value, or grey levels up to 255, got several up to 2 (and 3 masks like it): "
        "if they are class indices, train with --classes 3; if they number objects, --instances\n",
    ),
    "several colours": (
        lambda root: masked(root, lambda i: np.dstack([(i == 1) * np.uint8(255), (i == 2) * np.uint8(255), i * 0])),
        [],
        "0.png: expected one colour over black, got 2: if each is a class, save class indices (0, 1, 2, ...) and train "
        "with --classes 3",
    ),
    "low values that differ": (
        lambda root: masked(root, lambda i: i) or write_image(root / "masks/3.png", THREE),
        [],
        "train with --classes 4;",
    ),
    "low values, 16 bits": (lambda root: masked(root, lambda i: i.astype(np.uint16), ".tif"), [], "--classes 3"),
    "low values, float": (
        lambda root: masked(root, lambda i: i.astype(np.float32), ".tif"),
        [],
        "expected 0 and one other value in a mask of float32, got several up to 2",
    ),
    "low values, palette": (lambda root: masked(root, palette), [], "--classes 3"),
    "out of range": (
        lambda root: masked(root, lambda i: i * np.uint8(2)),
        ["--classes", 4],
        "0.png: expected class indices below 4, the number of classes, got 4",
    ),
    "colours": (
        lambda root: masked(root, lambda i: COLOURS[i]),
        ["--classes", 3],
        "0.png: expected class indices in one channel or in a palette, got RGB",
    ),
    "many colours": (
        lambda root: masked(root, lambda i: picture(0)[0]),
        [],
        "0.png: expected one colour over black, got more than 256\n",
    ),
    "JPEG": (kvasir, ["--classes", 3], "cju0a.jpg: expected class indices 0 .. 2 for 3 classes, got a JPEG, whose val"),
    "JPEG of objects": (
        kvasir,
        ["--instances"],
        "cju0a.jpg: expected masks that number objects, got a JPEG, whose values are blurred: save masks as PNG\n",
    ),
    "two pages": (
        lambda root: masked(root, white) or two_pages(root / "masks" / "1.png", root / "masks" / "1.tif"),
        [],
        "1.tif: expected one image, got several in one file\n",
    ),
    "two pages, cut off": (
        lambda root: [
            masked(root, white),
            two_pages(root / "masks" / "1.png", root / "masks" / "1.tif"),
            truncate("masks/1.tif")(root),
        ],
        [],
        "1.tif: expected one image, got several in one file\n",
    ),
    "animated": (
        lambda root: masked(root, white) or two_pages(root / "images" / "2.png", root / "images" / "2.png"),
        [],
        "2.png: expected one image, got several in one file\n",
    ),
    "no foreground but in the test set": (
        lambda root: [masked(root / "train", lambda i: i * np.uint8(0)), masked(root / "test", white)],
        [],
        "masks: expected masks, got only background in all 4\n",
    ),
    "GlaS": (glas, ["--classes", 3], "train_1_anno.bmp: expected class indices 0 .. 2 for 3 classes, got instances"),
    "polygons": (
        monuseg,
        ["--classes", 3],
        "18-01.xml: expected class indices 0 .. 2 for 3 classes, got polygons",
    ),
    "foreground everywhere": (
        lambda root: masked(root, lambda i: i * 0 + np.uint8(255)),
        [],
        "masks: expected masks, got only foreground in all 4",
    ),
    "float 1.7": (
        lambda root: masked(root, lambda i: (i > 0) * np.float32(1.7), ".tif"),
        [],
        f"0.tif: {WHOLE}, got 1.7",
    ),
    "float NaN": (
        lambda root: masked(root, lambda i: (i > 0) * np.float32("nan"), ".tif"),
        [],
        f"0.tif: {WHOLE}, got nan",
    ),
    "label 1.7": (labelled("case0005_slice001", FLAT + 1.7), [], f"001.npz: {WHOLE}, got 1.7"),
    "label 1.7 of 16 bits": (
        labelled("case0005_slice001", (FLAT + 1.7).astype(np.float16)),
        [],
        f"001.npz: {WHOLE}, got 1.7",
    ),
    "label NaN": (labelled("case0005_slice001", FLAT * np.nan), [], f"001.npz: {WHOLE}, got nan"),
    "label -1": (labelled("case0005_slice001", FLAT - 1), [], f"001.npz: {WHOLE}, got -1.0"),
    "label of text": (
        labelled("case0005_slice001", np.full((40, 48), "liver")),
        [],
        "001.npz: expected numbers in `label`, got <U5",
    ),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")  # Pillow's, of a file that is cut off
@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_refused_data(name: str, run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, options, message = REFUSED[name]
    make(tmp_path)
    assert trained(run, tmp_path, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert not (tmp_path / "run").exists()
