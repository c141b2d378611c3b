"""The training example: what it reads, what it refuses, and that a killed run ends as if it had not been killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dca_kernels
from examples import data, train
from reference import unets

ROOT = Path(__file__).parents[1]
# A network of a thousandth of the parameters, for the same script.
NARROW = """
from functools import partial
from reference import unets
unets.UNet = partial(unets.UNet, widths=(4, 8, 8, 16, 16))
"""
TINY = ["--crop", "32", "--batch", "2", "--steps", "3", "--epochs", "3"]


def picture(seed: int, height: int = 40, width: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """A noisy image (H, W, 3) uint8 with two bright boxes, and their instances 0, 1, 2."""
    generator = np.random.default_rng(seed)
    instances = np.zeros((height, width), np.uint8)
    for i in (1, 2):
        top, left = generator.integers(height - 16), generator.integers(width - 16)
        instances[top : top + 14, left : left + 14] = i
    image = generator.integers(100, size=(height, width, 3)) + 120 * (instances > 0)[..., None]
    return image.astype(np.uint8), instances


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


def synapse(root: Path) -> None:
    (root / "train_npz").mkdir(parents=True)
    names = [f"case{case}_slice{i:03}" for case in ("0005", "0006", "0040") for i in range(2)]
    for i, name in enumerate(names):
        image, instances = picture(i)
        label = (instances * 4).astype(np.float32)  # classes 4 and 8
        np.savez(root / "train_npz" / f"{name}.npz", image=image.mean(2, dtype=np.float32) / 255, label=label)
    (root / "lists" / "lists_Synapse").mkdir(parents=True)
    (root / "lists" / "lists_Synapse" / "train.txt").write_text("\n".join(names) + "\n")


def split(root: Path) -> None:
    kvasir(root / "train")
    kvasir(root / "val")
    (root / "val" / "images" / "cju0a.jpg").unlink()
    (root / "val" / "masks" / "cju0a.jpg").unlink()


LAYOUTS: dict[str, tuple[Callable[[Path], None], str, int, int]] = {
    # how it is made, what is said of it, how many train and validate at a share of 0.3
    "glas": (glas, "GlaS", 2, 1),
    "monuseg": (monuseg, "Tissue Images/ and Annotations/, the same names, polygons", 2, 1),
    "monuseg_test": (monuseg_test, "MoNuSeg", 2, 1),
    "kvasir": (kvasir, "images/ and masks/", 3, 1),
    "clinic": (clinic, "Original/ and Ground Truth/", 8, 3),
    "synapse": (synapse, "Synapse, slices of 3 cases listed in train.txt", 4, 2),
    "split": (split, "train/ and val/", 4, 3),
}


@pytest.mark.parametrize(
    "name, inside", [(name, "") for name in LAYOUTS] + [(name, "download") for name in LAYOUTS if name != "split"]
)
def test_layouts(name: str, inside: str, tmp_path: Path) -> None:
    make, layout, training, validation = LAYOUTS[name]
    make(tmp_path / inside)
    found = data.find(tmp_path, 0.3, seed=0)
    assert layout in found.layout
    assert (len(found.train), len(found.validation)) == (training, validation)
    assert len({*found.train, *found.validation}) == training + validation
    data.check(found.train + found.validation, len(found.classes) + 1, side=32, size=None)
    for sample in found.train:
        image, mask = data.load(sample)
        assert image.shape == (*mask.shape, 3) and image.dtype == np.float32 and mask.dtype == np.int64
        assert 0 <= image.min() < 0.2 and 0.8 < image.max() <= 1
        # boxes are brighter than what is around them: image and mask belong together, and no axis is swapped
        if "monuseg" not in name:
            assert image[mask > 0].mean() > image[mask == 0].mean() + 0.4


def test_split_is_seeded_and_keeps_neighbours_together(tmp_path: Path) -> None:
    synapse(tmp_path / "synapse")
    splits = [data.find(tmp_path / "synapse", 0.3, seed) for seed in range(8)]
    assert splits[0] == data.find(tmp_path / "synapse", 0.3, 0)
    held_out = {found.validation[0].group for found in splits}
    assert len(held_out) > 1
    for found in splits:
        assert not {s.group for s in found.train} & {s.group for s in found.validation}
    clinic(tmp_path / "clinic")
    frames = [int(s.image.stem) for s in data.find(tmp_path / "clinic", 0.3, 0).validation]
    assert frames == [9, 10, 11]


def test_masks(tmp_path: Path) -> None:
    glas(tmp_path / "glas")
    found = data.find(tmp_path / "glas", 0.3, 0)
    assert all(s.image.name.startswith("train_") for s in found.train + found.validation)
    for sample in found.train:
        np.testing.assert_array_equal(data.load(sample)[1], np.asarray(Image.open(sample.mask)) > 0)
    monuseg(tmp_path / "monuseg")
    expected = np.zeros((40, 48))
    expected[4:21, 6:31] = expected[24:31, 2:10] = 1
    np.testing.assert_array_equal(data.load(data.find(tmp_path / "monuseg", 0.3, 0).train[0])[1], expected)
    kvasir(tmp_path / "kvasir")
    sample = next(s for s in data.find(tmp_path / "kvasir", 0.3, 0).train if s.group == "cju0b")
    np.testing.assert_array_equal(data.load(sample)[1], picture(1, 41)[1] > 0)  # a JPEG's ringing is not foreground
    synapse(tmp_path / "synapse")
    sample = data.find(tmp_path / "synapse", 0.3, 0).train[0]
    with np.load(sample.image) as arrays:
        np.testing.assert_array_equal(data.load(sample)[1], arrays["label"])


def test_resize(tmp_path: Path) -> None:
    synapse(tmp_path)
    for sample in data.find(tmp_path, 0.3, 0).train:
        image, mask = data.load(sample, size=64)
        assert image.shape == (64, 64, 3) and mask.shape == (64, 64)
        assert set(np.unique(mask)) <= {0, 4, 8} and mask.any()


def overwrite(name: str, content: bytes | str) -> Callable[[Path], None]:
    return lambda root: (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def truncate(name: str) -> Callable[[Path], None]:
    return lambda root: os.truncate(root / name, (root / name).stat().st_size // 2)


def remove(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


def rename(name: str, to: str) -> Callable[[Path], None]:
    return lambda root: (root / name).rename(root / to) and None


def image_of(name: str, array: np.ndarray) -> Callable[[Path], None]:
    return lambda root: write_image(root / name, array)


def arrays_of(name: str, **arrays: np.ndarray) -> Callable[[Path], None]:
    return lambda root: np.savez(root / name, **arrays)


def no_foreground(root: Path) -> None:
    for path in (root / "masks").iterdir():
        write_image(path, np.zeros((40 + ord(path.stem[-1]) - ord("a"), 48), np.uint8))


SMALL, GREY = np.zeros((20, 30), np.uint8), np.zeros((40, 48), np.float32)
SLICE = "train_npz/case0005_slice001.npz"

FAULTS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None], str]] = {
    # the data set, what happens to it, what is said of it
    "glas without a mask": (glas, remove("train_2_anno.bmp"), r"train_2\.bmp: expected a mask of this name in"),
    "glas without an image": (glas, remove("train_2.bmp"), r"train_2_anno\.bmp: expected an image of this name in"),
    "glas unreadable": (
        glas,
        truncate("train_2.bmp"),
        r"train_2\.bmp: expected an image that can be read, got OSError",
    ),
    "glas not an image": (glas, overwrite("train_1_anno.bmp", "<html>"), r"train_1_anno\.bmp: expected an image that"),
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
    "kvasir empty file": (kvasir, overwrite("masks/cju0c.jpg", b""), r"cju0c\.jpg: expected an image that can be read"),
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
    "synapse without labels": (
        synapse,
        arrays_of(SLICE, image=GREY),
        r"expected arrays `image` and `label`, got KeyError",
    ),
    "synapse wrong shape": (synapse, arrays_of(SLICE, image=GREY[None], label=GREY), r"expected image \(H, W\) or"),
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
        r"expected --classes 9, 0 \.\. 8, got 9",
    ),
    "nothing": (lambda root: None, lambda root: None, r"expected NAME\.bmp .* found nothing"),
    "something else": (lambda root: None, overwrite("notes.doc", "x"), r"expected NAME\.bmp .* found notes\.doc"),
    "empty folders": (
        lambda root: [(root / name).mkdir() for name in ("images", "masks")] and None,
        lambda root: None,
        r"images: expected images .*found none",
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
    with pytest.raises(data.DataError, match=f"(?s){message}") as raised:
        found = data.find(tmp_path, 0.3, 0)
        data.check(found.train + found.validation, len(found.classes) + 1, side=32, size=None)
    assert str(tmp_path) in str(raised.value)


def test_every_bad_file_is_named_at_once(tmp_path: Path) -> None:
    kvasir(tmp_path)
    for name in ("images/cju0a.jpg", "masks/cju0d.jpg"):
        truncate(name)(tmp_path)
    found = data.find(tmp_path, 0.3, 0)
    with pytest.raises(data.DataError, match=r"(?s)cju0a.*cju0d|cju0d.*cju0a"):
        data.check(found.train + found.validation, 2, side=32, size=None)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the script with a small network in this process and gives its exit status."""
    monkeypatch.setattr(unets, "UNet", partial(unets.UNet, widths=(4, 8, 8, 16, 16)))

    def run(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["train", *map(str, arguments)])
        return train.main()

    return run


def history(folder: Path) -> list[train.Row]:
    return json.loads((folder / "history.json").read_text())


def test_nothing_is_written_when_the_data_are_bad(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kvasir(tmp_path / "data")
    truncate("masks/cju0b.jpg")(tmp_path / "data")
    assert run("--data", tmp_path / "data", "--out", tmp_path / "run", *TINY) == 2
    assert "cju0b.jpg: expected an image that can be read" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert run("--data", tmp_path / "none", "--out", tmp_path / "run", *TINY) == 2
    assert "none: expected a folder with a data set, found none" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--crop", "40"], "--crop: expected a multiple of 16"),
        (["--crop", "64", "--resize", "48"], "--resize: expected at least --crop 64, got 48"),
        (["--batch", "0"], "--batch: expected an integer of at least 1, got 0"),
        (["--val", "1"], "--val: expected a share between 0 and 1, got 1.0"),
        (["--lr", "-1"], "--lr: expected a positive number"),
        (["--classes", "1"], "--classes: expected at least 2"),
        (["--fsdp"], "--fsdp: expected several processes"),
    ],
)
def test_arguments(run, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(*arguments)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(find_spec("stardist") is None, reason="the nuclei image comes with stardist")
def test_first_run(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--out", tmp_path, "--crop", 64, "--batch", 2, "--epochs", 2, "--steps", 4) == 0
    out = capsys.readouterr().out
    assert "nuclei" in out and "| nucleus |" in out
    first, second = history(tmp_path)
    assert second["loss"] < first["loss"]
    for row in (first, second):
        assert row["iou"] == pytest.approx(row["dice"] / (2 - row["dice"]))
    with Image.open(tmp_path / "prediction.png") as figure:
        assert figure.size == (3 * 360, 360)
    assert bool(list(tmp_path.glob("events.*"))) == (find_spec("tensorboard") is not None)
    assert not list(tmp_path.glob("*.unfinished"))


def test_scores_are_those_of_the_saved_weights(run, tmp_path: Path) -> None:
    """Dice and IoU of three classes, from best.pt, by sets of pixels."""
    synapse(tmp_path / "data")
    given = ["--data", tmp_path / "data", "--out", tmp_path / "run", "--bf16", "--lr", "0.01", *TINY]
    assert run(*given) == 0
    best = max(history(tmp_path / "run"), key=lambda row: row["dice"])
    chosen, process = train.arguments(), train.Process(0, 1, torch.device("cpu"))
    network = train.build(chosen, 9).eval()
    network.load_state_dict(torch.load(tmp_path / "run" / "best.pt"))
    pairs = []
    for sample in data.find(tmp_path / "data", 0.2, 0).validation:
        image, mask = data.load(sample)
        pairs.append((train.predict(network, image, chosen, process), mask))
    found, true = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in (0, 1))
    assert set(np.unique(found)) != {0}
    for i, organ in enumerate(data.ORGANS, start=1):
        here, there = set(np.flatnonzero(found == i)), set(np.flatnonzero(true == i))
        if here | there:
            assert best["dice of"][organ] == pytest.approx(2 * len(here & there) / (len(here) + len(there)))
            assert best["iou of"][organ] == pytest.approx(len(here & there) / len(here | there))
        else:
            assert np.isnan(best["dice of"][organ])


@pytest.mark.parametrize("host", unets.__all__)
@pytest.mark.parametrize("dca", ["fused", "none"])
def test_every_parameter_gets_a_gradient(host: str, dca: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DistributedDataParallel waits for all that are to be trained."""
    monkeypatch.setattr("sys.argv", ["train", "--host", host, "--dca", dca, "--crop", "32"])
    network = train.build(train.arguments(), 3)
    logits = network(torch.rand(2, 3, 32, 32))
    assert logits.shape == (2, 3, 32, 32)
    logits.backward(torch.randn_like(logits))
    assert [name for name, p in network.named_parameters() if p.requires_grad != (p.grad is not None)] == []
    attentions = [module for module in network.modules() if isinstance(module, dca_kernels.DCA)]
    assert bool(attentions) == (dca == "fused")
    for attention in attentions:
        assert all(p.requires_grad for p in attention.parameters())
        assert not attention.attention[0].s_attention[0].k_map.proj.depthwise.bias.grad.any()  # as algebra says


def test_tiles_cover_the_image(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train", "--crop", "16", "--batch", "3"])
    image = np.random.default_rng(0).random((37, 50, 3), np.float32)
    process = train.Process(0, 1, torch.device("cpu"))
    found = train.predict(lambda x: x[:, :1] - 0.5, image, train.arguments(), process)
    np.testing.assert_array_equal(found, image[..., 0] > 0.5)


def test_killed_and_resumed_is_not_killed(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kvasir(tmp_path / "data")
    given = ["--data", str(tmp_path / "data"), "--crop", "32", "--batch", "2", "--steps", "8", "--epochs", "3"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    script = f"{NARROW}\nimport runpy\nrunpy.run_module('examples.train', run_name='__main__')"
    command = [sys.executable, "-c", script, *given, "--out", str(killed)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (killed / "history.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 1 <= len(history(killed)) < 3

    assert run(*given, "--out", whole) == 0
    capsys.readouterr()
    assert run(*given, "--out", killed) == 0
    assert "last.pt" in capsys.readouterr().out
    assert history(killed) == history(whole)
    states = [torch.load(folder / "last.pt") for folder in (killed, whole)]
    for one, other in zip(*(state["model"].values() for state in states), strict=True):
        assert torch.equal(one, other)

    assert run(*given, "--out", killed, "--host", "UNet", "--dca", "none") == 2
    assert "last.pt: expected a run with dca none, got fused" in capsys.readouterr().err
    (killed / "last.pt").write_bytes(b"PK")
    assert run(*given, "--out", killed) == 2
    assert "last.pt: expected a checkpoint of this script" in capsys.readouterr().err


SEVERAL = """
import os
import sys
from functools import partial
from torch import distributed as dist
from examples import train

folder, *given = sys.argv[1:]
init, validate, calls = dist.init_process_group, train.validate, []

def stop(*arguments):
    calls.append(True)
    if len(calls) == 2:
        raise KeyboardInterrupt
    return validate(*arguments)

runs = [
    ("replicated", [], 0, validate),
    ("sharded", ["--fsdp"], 0, validate),
    ("resumed", ["--fsdp"], 130, stop),
    ("resumed", ["--fsdp"], 0, validate),
]
for i, (name, options, status, train.validate) in enumerate(runs):
    if i:  # torchrun has processes meet once
        meet = f"file://{folder}/meet{i}"
        dist.init_process_group = partial(init, init_method=meet, rank=int(os.environ["RANK"]), world_size=2)
    sys.argv = ["train", *given, *options, "--out", f"{folder}/{name}"]
    assert train.main() == status
"""


def test_two_processes(tmp_path: Path) -> None:
    """DistributedDataParallel and FSDP2 train alike, and FSDP2 goes on from its checkpoint as if it had not stopped.

    One validation image: the second process has none to predict, and must not wait for the first.
    """
    kvasir(tmp_path / "data")
    (tmp_path / "several.py").write_text(NARROW + SEVERAL)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "several.py"), str(tmp_path), "--data", str(tmp_path / "data"), *TINY, "--epochs", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-4000:]
    replicated, sharded, resumed = (history(tmp_path / name) for name in ("replicated", "sharded", "resumed"))
    assert [row["loss"] for row in replicated] == pytest.approx([row["loss"] for row in sharded], rel=1e-4)
    assert resumed == sharded and len(sharded) == 2
    assert result.stdout.count("epoch 2: ") == 3 and "after the 1 epochs of" in result.stdout
