"""The training example: its arguments, its scores, and that a killed run ends as if it had not been killed."""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import distributed as dist

import dca_kernels
from examples import data, files, network, picture, train
from examples.processes import Process
from reference import unets
from tests.datasets import (
    NARROW,
    ROOT,
    SHORT,
    TINY,
    Bright,
    compressed,
    history,
    kvasir,
    read_json,
    remove,
    rename,
    script,
    synapse,
    truncate,
    with_volumes,
    write_image,
)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    return script(train, monkeypatch)


def plan(**changes: object) -> network.Plan:
    return network.Plan(
        **{"host": "UNet", "dca": "fused", "patch": 4, "crop": 32, "resize": None, "classes": ("a",)} | changes
    )


def test_nothing_is_written_when_the_data_are_bad(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kvasir(tmp_path / "data")
    truncate("masks/cju0b.jpg")(tmp_path / "data")
    assert run("--data", tmp_path / "data", "--out", tmp_path / "run", *TINY) == 2
    assert "cju0b.jpg: expected an image that can be read" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert run("--data", tmp_path / "none", "--out", tmp_path / "run", *TINY) == 2
    assert "none: expected a folder with data, found none" in capsys.readouterr().err
    assert run("--data", tmp_path / (300 * "x"), "--out", tmp_path / "run", *TINY) == 2
    assert "x: expected a folder with data, got OSError: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--crop", "40"], "--crop: expected a multiple of 16"),
        (["--crop", "64", "--resize", "48"], "--resize: expected at least --crop 64, got 48"),
        (["--batch", "0"], "--batch: expected an integer of at least 1, got 0"),
        (["--crop", "8192"], "--crop: expected at most 4096, got 8192"),
        (["--val", "1"], "--val: expected a share between 0 and 1, got 1.0"),
        (["--lr", "-1"], "--lr: expected a positive number"),
        (["--lr", "nan"], "--lr: expected a positive number, got nan"),
        (["--lr", "inf"], "--lr: expected a positive number, got inf"),
        (["--val", "nan"], "--val: expected a share between 0 and 1, got nan"),
        (["--fsdp"], "--fsdp: expected several processes"),
        (["--classes", "257"], "--classes: expected 2 to 256, background and others, got 257"),
        (["--classes", "1"], "--classes: expected 2 to 256, background and others, got 1"),
        (["--crop", "16", "--batch", "1"], "--batch: expected at least 2 crops of 16 x 16, or a --crop of 32, got 1"),
        (["--seed", str(2**64)], f"--seed: expected an integer below 2**64, got {2**64}"),
        (["--seed", "-1"], "--seed: expected an integer of at least 0, got -1"),
    ],
)
def test_arguments_of_training(run, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(*arguments)
    assert message in capsys.readouterr().err


def test_help_of_training_says_defaults_in_words(run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        run("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert "nothing" not in said and "masks of --images, with the images' names" in said
    assert "an epoch is about one crop of each image, at least 10 batches (default: 8)" in said


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
        assert min(figure.size) > 400
    assert bool(list(tmp_path.glob("events.*"))) == (find_spec("tensorboard") is not None)
    assert not list(tmp_path.glob("*.unfinished"))


def test_scores_are_those_of_the_saved_weights(run, tmp_path: Path) -> None:
    """Dice and IoU of three classes, from best.pt, by sets of pixels."""
    synapse(tmp_path / "data")
    given = ["--data", tmp_path / "data", "--out", tmp_path / "run", "--bf16", "--lr", "0.01", *TINY]
    assert run(*given) == 0
    best = max(history(tmp_path / "run"), key=lambda row: row["dice"])
    predict = network.Predictor(
        *reversed(network.read_network(tmp_path / "run" / "best.pt")), torch.device("cpu"), 2, True
    )
    predict.network.eval()
    pairs = []
    for sample in data.split(data.find(tmp_path / "data"), 0.2, 0).validation:
        image, mask = files.load(sample)
        pairs.append((predict(image), mask))
    found, true = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in (0, 1))
    assert set(np.unique(found)) != {0}
    for i, organ in enumerate(data.ORGANS, start=1):
        here, there = set(np.flatnonzero(found == i)), set(np.flatnonzero(true == i))
        if here | there:
            assert best["dice of"][organ] == pytest.approx(2 * len(here & there) / (len(here) + len(there)))
            assert best["iou of"][organ] == pytest.approx(len(here & there) / len(here | there))
        else:
            assert best["dice of"][organ] is None


@pytest.mark.parametrize("host", unets.HOSTS)
@pytest.mark.parametrize("dca", ["fused", "none"])
def test_every_parameter_gets_a_gradient(host: str, dca: str) -> None:
    """DistributedDataParallel waits for all that are to be trained."""
    built = network.build(plan(host=host, dca=dca, patch=8 if host == "ResUNetPP" else 4, classes=("a", "b")))
    logits = built(torch.rand(2, 3, 32, 32))
    assert logits.shape == (2, 3, 32, 32)
    logits.backward(torch.randn_like(logits))
    assert [name for name, p in built.named_parameters() if p.requires_grad != (p.grad is not None)] == []
    attentions = [module for module in built.modules() if isinstance(module, dca_kernels.DCA)]
    assert bool(attentions) == (dca == "fused")
    for attention in attentions:
        assert all(p.requires_grad for p in attention.parameters())
        assert not attention.attention[0].s_attention[0].k_map.proj.depthwise.bias.grad.any()  # as algebra says


def test_tiles_cover_the_image() -> None:
    image = np.random.default_rng(0).random((37, 50, 3), np.float32)
    predict = network.Predictor(lambda x: x[:, :1] - 0.5, plan(crop=16), torch.device("cpu"), 3)
    np.testing.assert_array_equal(predict(image), image[..., 0] > 0.5)
    np.testing.assert_array_equal(predict(image[:9, :11]), image[:9, :11, 0] > 0.5)  # smaller than a tile


def test_tiles_have_no_seams() -> None:
    """A network that is wrong along the edges of its tiles is right inside the image, where tiles overlap."""
    image = np.random.default_rng(0).random((96, 64, 3), np.float32)  # of tiles side by side
    outside = torch.ones(32, 32)
    outside[2:-2, 2:-2] = 0

    def network_of_tiles(x: torch.Tensor) -> torch.Tensor:
        return torch.where(outside > 0, -20 * (x[:, :1] - 0.5).sign(), 20 * (x[:, :1] - 0.5).sign())

    predict = network.Predictor(network_of_tiles, plan(), torch.device("cpu"), 3)
    inside = np.s_[2:-2, 2:-2]
    np.testing.assert_array_equal(predict(image)[inside], (image[..., 0] > 0.5)[inside])


@pytest.mark.slow
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
    assert "last.pt: expected a file of examples.train" in capsys.readouterr().err


def test_more_epochs_of_a_finished_run_learn(run, tmp_path: Path) -> None:
    kvasir(tmp_path / "data")
    given = ["--data", tmp_path / "data", "--out", tmp_path / "run", *TINY, "--lr", 0.01]
    assert run(*given, "--epochs", 2) == 0
    before = torch.load(tmp_path / "run" / "last.pt")["model"]
    assert run(*given, "--epochs", 3) == 0
    rates = [row["rate"] for row in history(tmp_path / "run")]
    assert rates == pytest.approx([0.01, 0.005, 0.0025])
    state = torch.load(tmp_path / "run" / "last.pt")
    assert [group["lr"] for group in state["optimizer"]["param_groups"]] == rates[-1:]
    after = state["model"]
    assert any(not torch.equal(before[name], after[name]) for name in before if name.endswith("weight"))


def test_a_run_may_be_stopped_many_times(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every epoch but the last, after its validation: the numbers are those of one that was not stopped."""
    kvasir(tmp_path / "data")
    given = ["--data", tmp_path / "data", *TINY, "--epochs", 3]
    assert run(*given, "--out", tmp_path / "whole") == 0
    validate, epochs = train.validate, []

    def stop(*arguments: object) -> dict:
        epochs.append(True)
        if len(epochs) in (2, 4):
            raise KeyboardInterrupt
        return validate(*arguments)

    monkeypatch.setattr(train, "validate", stop)
    assert [run(*given, "--out", tmp_path / "stopped") for _ in range(3)] == [130, 130, 0]
    assert history(tmp_path / "stopped") == history(tmp_path / "whole") and len(epochs) == 5
    states = [torch.load(tmp_path / name / "last.pt")["model"] for name in ("stopped", "whole")]
    for one, other in zip(*(state.values() for state in states), strict=True):
        assert torch.equal(one, other)


def test_a_run_is_resumed_with_its_own_samples(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another image, and one that was trained on may be validated on."""
    kvasir(tmp_path / "data")
    given = ["--data", tmp_path / "data", "--out", tmp_path / "run", *SHORT]
    assert run(*given) == 0
    before = (tmp_path / "run" / "last.pt").read_bytes()
    for kind in ("images", "masks"):
        folder = tmp_path / "data" / kind
        shutil.copy(sorted(folder.iterdir())[0], folder / "another.jpg")
    capsys.readouterr()
    assert run(*given, "--epochs", 2) == 2
    said = "last.pt: expected a run of the samples that are there, 4 to train on and 1 to validate on, got others"
    assert said in capsys.readouterr().err
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def test_restart(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kvasir(tmp_path / "data")
    given = ["--data", tmp_path / "data", "--out", tmp_path / "run", *SHORT]
    assert run(*given) == 0
    capsys.readouterr()
    assert run(*given, "--lr", 0.01, "--restart") == 0
    assert "from the beginning" in capsys.readouterr().out
    assert [row["rate"] for row in history(tmp_path / "run")] == [0.01]
    truncate("data/masks/cju0b.jpg")(tmp_path)
    assert run(*given, "--lr", 0.02, "--restart") == 2
    assert (tmp_path / "run" / "last.pt").exists()  # lost only where another run begins


def run_of(**changes: object) -> Callable[[Path], None]:
    state = {"arguments": {"data": "other"}, "samples": {}, "history": [], "model": {}, "optimizer": {}} | changes
    return lambda folder: torch.save(state, folder / "last.pt")


@pytest.mark.parametrize(
    "prepare, out, message",
    [
        (run_of(), ".", "last.pt: expected a run with data "),
        (lambda folder: (folder / "last.pt").write_bytes(b"PK"), ".", "last.pt: expected a file of examples.train"),
        (lambda folder: torch.save([1], folder / "last.pt"), ".", "last.pt: expected a file of examples.train"),
        (run_of(arguments=[1]), ".", "last.pt: expected the arguments and the history of a run, got other values"),
        (run_of(history=[1]), ".", "last.pt: expected the arguments and the history of a run, got other values"),
        (run_of(history=[{"epoch": 1}]), ".", "last.pt: expected the arguments and the history of a run, got other"),
        (
            lambda folder: run_of(model={"a": torch.zeros(9999)})(folder) or compressed(folder / "last.pt"),
            ".",
            "last.pt: expected a file of examples.train, which is not compressed, got ",
        ),
        (lambda folder: (folder / "file").touch(), "file", "--out {}/file: expected a folder, got a file"),
        (lambda folder: (folder / "file").touch(), "file/run", "--out {}/file/run: expected a folder, got a file, {}/"),
        (lambda folder: None, "/proc/run", "--out /proc/run: expected a folder that can be written to, got "),
    ],
)
def test_out_is_checked_before_the_data(
    prepare, out: str, message: str, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    kvasir(tmp_path / "data")
    prepare(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    given = ["--data", tmp_path / "data", "--out", tmp_path / out, *TINY]
    assert run(*given) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and message.replace("{}", str(tmp_path)) in said.err
    assert said.err.count("\n") == 1 and "checking" not in said.err and "data:" not in said.out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_is_resumed_with_its_own_states(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kvasir(tmp_path / "data")
    given = ["--data", tmp_path / "data", "--out", tmp_path / "run", *SHORT]
    assert run(*given) == 0
    state = torch.load(tmp_path / "run" / "last.pt")
    model, optimizer = state["model"], state["optimizer"]
    first, moments = next(iter(model)), next(iter(optimizer["state"]))
    for changes in (
        {"model": model | {first: model[first][:1]}},
        {"optimizer": optimizer | {"state": optimizer["state"] | {moments: {}}}},
    ):
        torch.save(state | changes, tmp_path / "run" / "last.pt")
        capsys.readouterr()
        assert run(*given, "--epochs", 2) == 2, changes.keys()
        said = "last.pt: expected the states of this network and its optimizer, got other ones\n"
        assert capsys.readouterr().err.endswith(said)


STATE = {"weight": torch.ones(2, 3), "groups": [{"lr": 0.1, "betas": (0.9, 0.999)}]}


@pytest.mark.parametrize(
    "changes",
    [
        {"another": torch.ones(1)},
        {"weight": torch.ones(1, 3)},
        {"weight": torch.ones(1, 1).expand(2, 3).double()},
        {"weight": torch.ones(2, 3, device="meta")},
        {"weight": torch.ones(2, 3).to_sparse()},
        {"weight": 1.0},
        {"groups": []},
        {"groups": {}},
        {"groups": [{"lr": 0.1}]},
        {"groups": [{"lr": torch.ones(()), "betas": (0.9, 0.999)}]},
        {"groups": [{"lr": 0.1, "betas": [0.9]}]},
        {"groups": [{"lr": 0.1, "betas": 0.9}]},
    ],
)
def test_states_that_are_not_alike(changes: dict) -> None:
    assert network.alike(STATE | {"weight": torch.zeros(2, 3)}, STATE)
    assert network.alike(STATE | {"groups": [{"lr": 0.2, "betas": [0.9, 0.999]}]}, STATE)  # of a run that was resumed
    assert not network.alike(STATE | changes, STATE)
    assert not network.alike([STATE], STATE) and not network.alike({}, STATE)


SEVERAL = """
import os
import sys
from functools import partial
from torch import distributed as dist
from examples import train
from examples.files import DataError

folder, *given = sys.argv[1:]
init, validate, calls = dist.init_process_group, train.validate, []

def stop(*arguments):
    calls.append(True)
    if len(calls) == 2:
        raise KeyboardInterrupt
    return validate(*arguments)

def spoiled(*arguments):
    raise DataError("later.png: spoiled after the checks")

runs = [
    ("replicated", [], 0, validate),
    ("sharded", ["--fsdp"], 0, validate),
    ("resumed", ["--fsdp"], 130, stop),
    ("resumed", ["--fsdp"], 0, validate),
    ("resumed", [], 2, validate),
    ("wrong in one", [], 2, validate),
    ("spoiled in one", [], None, validate),
]
for i, (name, options, status, train.validate) in enumerate(runs):
    if i:  # torchrun has processes meet once
        meet = f"file://{folder}/meet{i}"
        dist.init_process_group = partial(init, init_method=meet, rank=int(os.environ["RANK"]), world_size=2)
    if name == "wrong in one" and os.environ["RANK"] == "1":
        name = "several.py"
    if name == "spoiled in one" and os.environ["RANK"] == "1":
        train.load, status = spoiled, 2
    sys.argv = ["train", *given, *options, "--out", f"{folder}/{name}"]
    try:
        assert train.main() == status
    except RuntimeError:  # the other one has left
        assert status is None
"""


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """DistributedDataParallel and FSDP2 train alike, and FSDP2 goes on from its checkpoint as if it had not stopped.

    One validation image: the second process has none to predict, and must not wait for the first. What only one of them
    finds wrong, both leave for.
    """
    kvasir(tmp_path / "data" / "train")
    kvasir(tmp_path / "data" / "test")
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
    assert result.stderr.count("error: ") == 2 and "several.py: expected a folder, got a file" in result.stderr
    assert "error (process 1): later.png: spoiled after the checks\n" in result.stderr
    tests = [read_json(tmp_path / name / "tests.json") for name in ("sharded", "resumed")]
    assert tests[0] == tests[1] and list(tests[0]) == ["test"]


@pytest.mark.parametrize("given", [["--crop", 16], ["--crop", 32, "--batch", 1], ["--seed", 2**64 - 1]])
def test_smallest_batch_and_largest_seed(given: list[object], run, tmp_path: Path) -> None:
    kvasir(tmp_path / "data")
    assert run("--data", tmp_path / "data", "--out", tmp_path / "run", *SHORT, *given) == 0


def test_a_batch_of_one_small_crop(run, tmp_path: Path) -> None:
    """Of ResUNetPP, which halves it three times only."""
    kvasir(tmp_path / "data")
    given = ["--host", "ResUNetPP", "--data", tmp_path / "data", "--out", tmp_path / "run", *SHORT]
    assert run(*given, "--crop", 16, "--batch", 1) == 0


def test_a_crop_has_its_mask(tmp_path: Path) -> None:
    """Flipped and turned as the image is: of images that are their masks, so are all crops."""
    instances = np.zeros((32, 32), np.uint8)
    instances[2:6, 3:20] = instances[2:25, 3:5] = 255
    for folder in ("images", "masks"):
        for i in range(2):
            write_image(tmp_path / folder / f"{i}.png", instances)
    chosen = argparse.Namespace(seed=0, batch=4, resize=None, crop=32)
    crops = train.Crops(data.find(tmp_path).train, chosen, 0, 16, Process(0, 1, torch.device("cpu")))
    assert len(crops) == 64
    for image, mask in crops:
        assert torch.equal(image[0], mask.float())
    assert len({mask.numpy().tobytes() for _, mask in crops}) == 8


def test_best_is_of_the_best_epoch(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states, dice = [], [0.5, 0.9, 0.3]

    def validate(network: torch.nn.Module, *_: object) -> dict:
        states.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        score = dice[len(states) - 1]
        return {"dice": score, "iou": score, "dice of": {"foreground": score}, "iou of": {"foreground": score}}

    monkeypatch.setattr(train, "validate", validate)
    kvasir(tmp_path / "data")
    assert run("--data", tmp_path / "data", "--out", tmp_path / "run", *TINY) == 0
    saved = torch.load(tmp_path / "run" / "best.pt")["weights"]
    for name, tensor in saved.items():
        assert torch.equal(tensor, states[1][name]), name
    assert any(not torch.equal(states[1][name], states[2][name]) for name in saved)


def predicted(predict: network.Predictor, samples: list[files.Sample]) -> list[tuple[np.ndarray, np.ndarray]]:
    loaded = [files.load(sample) for sample in samples]
    return [(predict(image), mask) for image, mask in loaded]


def dice_of(pairs: list[tuple[np.ndarray, np.ndarray]], index: int = 1) -> float:
    """Over all pixels."""
    both = sum(((found == index) & (true == index)).sum() for found, true in pairs)
    return 2 * both / sum((found == index).sum() + (true == index).sum() for found, true in pairs)


def test_final_scores_and_picture_are_of_best(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    figures = []
    close = picture.plt.close
    monkeypatch.setattr(picture.plt, "close", lambda figure: figures.append(figure) or close(figure))
    for name in ("train", "val", "test"):
        kvasir(tmp_path / "data" / name)
    given = ["--data", tmp_path / "data", "--out", tmp_path / "run", "--lr", 0.03, *TINY]
    assert run(*given) == 0
    said = "test sets: scored over all pixels of a set, at the size that the network sees; volumes by the mean over the"
    assert f"{said} cases\n" in capsys.readouterr().out
    found = data.find(tmp_path / "data")
    plan, saved = network.read_network(tmp_path / "run" / "best.pt")
    best, fresh = (
        network.Predictor(one.eval(), plan, torch.device("cpu"), 2) for one in (saved, network.build(plan, seed=0))
    )
    dice = dice_of(predicted(best, found.tests["test"]))
    assert dice != dice_of(predicted(fresh, found.tests["test"]))
    tests = read_json(tmp_path / "run" / "tests.json")
    assert list(tests) == ["test"] and tests["test"]["dice"] == pytest.approx(dice)
    assert tests["test"]["iou"] == pytest.approx(dice / (2 - dice))
    (figure,) = figures
    for i, (sample, pair) in enumerate(zip(found.validation[:3], predicted(best, found.validation[:3]), strict=True)):
        image, true = files.load(sample)
        panels = figure.axes[3 * i : 3 * i + 3]
        score = dice_of([pair])
        assert [axis.get_title() for axis in panels] == [sample.name, "mask", f"prediction, Dice {score:.3f}"]
        expected = [image, picture.overlay(image, true), picture.overlay(image, pair[0])]
        assert (expected[1] != expected[2]).any()
        for axis, array in zip(panels, expected, strict=True):
            np.testing.assert_array_equal(axis.images[0].get_array(), array)


def test_volumes_are_scored_by_the_mean_over_cases(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a network that takes all boxes for class 4. Classes that are nowhere have no score, in JSON null."""
    pytest.importorskip("h5py", reason="h5py is not installed")
    with_volumes(tmp_path / "data")
    read = train.read_network
    monkeypatch.setattr(train, "read_network", lambda path: (read(path)[0], Bright(9, 4)))
    assert run("--data", tmp_path / "data", "--out", tmp_path / "run", *SHORT) == 0
    cases: dict[str, list] = {}
    for sample in data.find(tmp_path / "data").tests["test_vol_h5"]:
        image, true = files.load(sample)
        cases.setdefault(sample.group, []).append((4 * (image[..., 0] > 110 / 255), true))
    mean = np.mean([dice_of(pairs, 4) for pairs in cases.values()])
    assert mean != pytest.approx(dice_of([pair for pairs in cases.values() for pair in pairs], 4), abs=0.01)
    row = read_json(tmp_path / "run" / "tests.json")["test_vol_h5"]
    assert row["dice of"]["right kidney"] == pytest.approx(mean)
    assert row["dice of"]["stomach"] == 0 and row["dice of"]["aorta"] is None
    assert history(tmp_path / "run")[0]["iou of"].keys() == row["iou of"].keys()


def test_an_image_may_be_called_mask(run, tmp_path: Path) -> None:
    for folder in ("train", "val"):
        kvasir(tmp_path / "data" / folder)
    for folder in ("images", "masks"):
        rename(f"val/{folder}/cju0a.jpg", f"val/{folder}/mask.jpg")(tmp_path / "data")
        for letter in "bcd":
            remove(f"val/{folder}/cju0{letter}.jpg")(tmp_path / "data")
    assert run("--data", tmp_path / "data", "--out", tmp_path / "run", *SHORT) == 0


def test_processes_wait_for_the_check(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, init = {}, dist.init_process_group

    def alone(backend: str, **options: object) -> None:
        given.update(options)
        init(backend, init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)

    monkeypatch.setattr(dist, "init_process_group", alone)
    monkeypatch.setenv("RANK", "0")
    kvasir(tmp_path / "data")
    assert run("--data", tmp_path / "data", "--out", tmp_path / "run", *SHORT) == 0
    assert given["timeout"] >= timedelta(hours=1)
