"""The main job at a tiny size: what it writes, and that it does not time a module which is wrong."""

import json
from pathlib import Path

import pytest
import torch
from skimage import io
from torch import nn

from benchmarks import __main__ as main_job
from benchmarks import cases, measure, report


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the main job with some arguments; gives the exit status and the rows."""

    def run(*arguments: str) -> tuple[int, list[report.Row]]:
        rows, figure = tmp_path / "rows.json", tmp_path / "figure.png"
        fixed = ["--quick", "--batch", "1", "--patch", "4", "--json", str(rows), "--plot", str(figure)]
        monkeypatch.setattr("sys.argv", ["benchmarks", *fixed, *arguments])
        status = main_job.main()
        assert figure.read_bytes().startswith(b"\x89PNG")
        return status, json.loads(rows.read_text())

    return run


def test_rows(run, capsys: pytest.CaptureFixture[str]) -> None:
    status, rows = run("--mode", "eval")
    assert status == 0
    assert [row["provider"] for row in rows] == ["reference", "fused"]
    for row in rows:
        assert row["parity"] and row["max_error"] >= row["rms_error"] > 0
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["peak_mb"] >= 0
        assert row["environment"]["torch"] == torch.__version__
    assert "x the reference's speed" in capsys.readouterr().out


def test_a_wrong_module_is_not_timed(run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    modules = cases.modules

    def slightly_wrong(*args) -> dict[str, nn.Module]:
        pair = modules(*args)
        with torch.no_grad():
            pair["fused"].upconvs[0].conv.conv.weight.mul_(1.0001)
        return pair

    monkeypatch.setattr(cases, "modules", slightly_wrong)
    monkeypatch.setattr(measure, "latency", lambda *args: pytest.fail("timed"))
    monkeypatch.setattr(measure, "peak_memory", lambda *args: pytest.fail("measured"))
    status, rows = run()
    assert status == 1
    assert all(row["p50_ms"] is None and row["peak_mb"] is None and not row["parity"] for row in rows)
    out = capsys.readouterr().out
    assert "FAILED" in out and "speed" not in out.split("parity: ")[1]


@pytest.mark.parametrize("shape", [(40, 50), (40, 50, 3), (40, 50, 4)], ids=["grey", "rgb", "rgba"])
def test_own_image(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    io.imsave(path, torch.randint(0, 255, shape, dtype=torch.uint8).numpy(), check_contrast=False)
    image = cases.load_image(path)
    assert image.shape == (40, 50, 3) and 0 <= image.min() <= image.max() <= 1
    tiles = cases.cut_tiles(image, 5, 32)
    assert tiles.shape == (5, 3, 32, 32)
    assert not torch.equal(tiles[0], tiles[4])
    assert cases.cut_tiles(image, 1, 64).shape == (1, 3, 64, 64)  # larger than the image


@pytest.mark.filterwarnings("ignore")  # the image library tries every reader that it has
@pytest.mark.parametrize("content", [None, b"not an image"], ids=["missing", "no_image"])
def test_bad_image_is_named(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "image.png"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr("sys.argv", ["benchmarks", "--image", str(path)])
    assert main_job.main() == 2
    assert "--image:" in (error := capsys.readouterr().err) and str(path) in error


def test_latency_takes_turns() -> None:
    calls: list[str] = []
    names = ("a", "b")
    *_, times = measure.latency({name: lambda name=name: calls.append(name) for name in names}, rounds=3)
    assert "".join(calls) == "ab" + "ababab"  # each once before
    assert all(len(times[name]) == 3 for name in names)
