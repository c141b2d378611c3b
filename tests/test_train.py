"""The training example: its arguments, its scores, and that a killed run ends as if it had not been killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dca_kernels
from examples import data, files, network, train
from reference import unets
from tests.datasets import NARROW, ROOT, SHORT, TINY, history, kvasir, script, synapse, truncate


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


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--crop", "40"], "--crop: expected a multiple of 16"),
        (["--crop", "64", "--resize", "48"], "--resize: expected at least --crop 64, got 48"),
        (["--batch", "0"], "--batch: expected an integer of at least 1, got 0"),
        (["--val", "1"], "--val: expected a share between 0 and 1, got 1.0"),
        (["--lr", "-1"], "--lr: expected a positive number"),
        (["--lr", "nan"], "--lr: expected a positive number, got nan"),
        (["--lr", "inf"], "--lr: expected a positive number, got inf"),
        (["--val", "nan"], "--val: expected a share between 0 and 1, got nan"),
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
            assert np.isnan(best["dice of"][organ])


@pytest.mark.parametrize("host", unets.__all__)
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


def other_run(folder: Path) -> None:
    torch.save({"arguments": {"data": "other"}, "history": [], "model": {}, "optimizer": {}}, folder / "last.pt")


@pytest.mark.parametrize(
    "prepare, out, message",
    [
        (other_run, ".", "last.pt: expected a run with data "),
        (lambda folder: (folder / "last.pt").write_bytes(b"PK"), ".", "last.pt: expected a file of examples.train"),
        (lambda folder: torch.save([1], folder / "last.pt"), ".", "last.pt: expected a file of examples.train"),
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
    ("resumed", [], 2, validate),
    ("wrong in one", [], 2, validate),
]
for i, (name, options, status, train.validate) in enumerate(runs):
    if i:  # torchrun has processes meet once
        meet = f"file://{folder}/meet{i}"
        dist.init_process_group = partial(init, init_method=meet, rank=int(os.environ["RANK"]), world_size=2)
    if name == "wrong in one" and os.environ["RANK"] == "1":
        name = "several.py"
    sys.argv = ["train", *given, *options, "--out", f"{folder}/{name}"]
    assert train.main() == status
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
    tests = [json.loads((tmp_path / name / "tests.json").read_text()) for name in ("sharded", "resumed")]
    assert tests[0] == tests[1] and list(tests[0]) == ["test"]
