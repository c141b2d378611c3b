"""The report of rows and of a journal: tables, figures, and what is said of them."""

import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from matplotlib import pyplot

from benchmarks import cases, compare, console, journal, plots, report, rows
from benchmarks.environment import measured_on
from benchmarks.rows import Row
from tests.tools.rows import PLAIN, row

pytestmark = pytest.mark.usefixtures("no_gpu")


def drawn_by(figure_of: Callable[[Any, Sequence[Row]], None], found: Sequence[Row]) -> Any:
    figure = pyplot.figure()
    figure_of(figure, found)
    pyplot.close(figure)
    return figure


def test_a_figure_shows_one_dtype_and_one_batch() -> None:
    """And says which, and is drawn where it has something to show."""
    grids = [row(size=size, patch=patch, peak_mb=1.0) for size, patch in (("paper", 28), ("grid56", 56))]
    other = row(dtype="bfloat16", p50=1.0)
    assert plots.of_one_dtype([*grids, other]) == grids
    assert "memory" in plots.figures(grids) and "memory" not in plots.figures(grids[:1])
    batches = [row(name, 10.0 * b, batch=b) for name in ("reference", "torch") for b in (1, 8)]
    one_size = [row(name, size="grid56", batch=8) for name in ("reference", "torch")]
    (forward,) = drawn_by(plots.speedup, [*batches, *one_size, row("torch compiled", batch=1)]).axes
    assert len(forward.patches) == 4  # both sizes at batch 8, and no slot for what was compiled at batch 1
    assert [tick.get_text() for tick in forward.get_xticklabels()] == ["paper", "grid56"]
    assert "batch 8, float32" in forward.get_ylabel()


def labels(axis: Any) -> str:
    return f"{axis.get_xlabel()} {axis.get_ylabel()}"


def test_the_figure_of_latency_shows_one_dtype() -> None:
    batches = [row(p50=10.0 * b, batch=b) for b in (1, 8, 32)]
    figure = drawn_by(plots.latency, [*batches, *(row(p50=1.0 * b, batch=b, dtype="bfloat16") for b in (1, 8))])
    (line,) = figure.axes[0].lines
    assert list(zip(*line.get_data(), strict=True)) == [(1, 10.0), (8, 80.0), (32, 320.0)]
    assert "float32" in labels(figure.axes[0])


def test_the_figure_of_memory_shows_the_smallest_batch() -> None:
    grids = {"paper": 28, "grid56": 56}
    found = [row(size=size, patch=grids[size], batch=b, peak_mb=1.0 * b) for size in grids for b in (8, 2)]
    figure = drawn_by(plots.memory, found)
    (line,) = figure.axes[0].lines
    assert list(zip(*line.get_data(), strict=True)) == [(28, 2.0), (56, 2.0)]
    assert "batch 2, float32" in labels(figure.axes[0])


def test_the_figure_of_floors_shows_one_dtype_and_the_largest_batch() -> None:
    """In each, the floor is another share of the time."""
    shares = {("float32", 1): 10, ("float32", 8): 20, ("bfloat16", 8): 30}
    found = [
        row(p50=100.0, floor_ms=share, case=case, dtype=dtype, batch=batch)
        for (dtype, batch), share in shares.items()
        for case in cases.STAGES
    ]
    figure = drawn_by(plots.of_floor, found)
    assert [bar.get_height() for bar in figure.axes[0].patches] == [20.0] * len(cases.STAGES)
    assert "batch 8, float32" in labels(figure.axes[0])


def test_bars_leave_no_empty_slots() -> None:
    """And the legend has no name without a bar."""
    found = [row(name) for name in ("reference", "reference compiled", "torch")]
    figure = drawn_by(plots.speedup, found + [row(name, size="wide") for name in ("reference", "torch")])
    (forward,) = figure.axes
    first, second = (bar for bar in forward.patches if bar.get_x() > 0.5)
    assert first.get_x() + first.get_width() == pytest.approx(second.get_x()) == pytest.approx(1.0)
    assert len(figure.legends[0].get_texts()) == 3


def test_a_line_has_two_points() -> None:
    """A provider that was measured once would be a dot that no legend tells from another; a step without a line has no
    panel, and rows without the reference no figure of speed-ups."""
    found = [row("torch", batch=b) for b in (1, 8)] + [row("torch compiled"), row("reference compiled")]
    figure = drawn_by(plots.latency, found)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["torch"]
    assert [(axis.get_title(), len(axis.lines)) for axis in figure.axes] == [("forward", 1)]
    assert plots.figures(found) == ["latency"]


def test_report_of_a_copy(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = results.parent / "README.md"
    blocks = "\n\n".join(
        f"<!-- begin: {n} -->\nold\n<!-- end: {n} -->" for n in ("module", "stages", "hosts", "host", "not run")
    )
    document.write_text(f"# Before\n\n{blocks}\n\nAfter.\n")
    options = ["--document", str(document), "--results", str(results)]
    assert report.main([*options, "--check"]) == 1 and "old" in document.read_text()
    assert report.main(options) == 0 and report.main([*options, "--check"]) == 0
    text = document.read_text()
    assert text.startswith("# Before\n\n<!--") and text.endswith("-->\n\nAfter.\n") and "old" not in text
    assert "![latency](results/a-machine/latency.png)" in text
    assert "2.00x" in text and "4.00 ms (50 %)" in text and "no GPU" in text
    assert "Slower than the best reference: dca, paper, batch 32, float32, forward: 0.64x" in text

    machine = results / "a-machine"
    pictures = {path: path.read_bytes() for path in machine.glob("*.png")}
    assert {path.stem for path in pictures} == {"latency", "speedup", "of_floor"}  # one grid: no line of memory
    assert report.main(options) == 0 and all(path.read_bytes() == old for path, old in pictures.items())
    rows.append([row("torch", 6.0)], machine / "run.jsonl")
    capsys.readouterr()
    assert report.main([*options, "--check"]) == 1
    assert "README.md" in (out := capsys.readouterr().out) and "latency.png" in out
    assert all(path.read_bytes() == old for path, old in pictures.items())


def test_what_calls_cost_the_host_is_a_machine_s(results: Path) -> None:
    assert report.host(results) == "Nothing measured yet."
    call = {"mode": "eval", "what": "forward", "us": 75.4, "p20": 70.0, "p80": 80.0, "ratio": 1.0}
    its = {
        "environment": {"cpu": "a CPU", "threads": 1, "torch": "2.13.0", "triton": "3.6.0"},
        "size": "paper",
        "batch": 1,
    }
    its |= {"dtype": "bfloat16", "rows": [call, call | {"what": "its launches", "us": 25.0, "ratio": 3.016}]}
    its |= {"compiling": [{"mode": "eval", "what": "the first forward", "kernels": 8, "seconds": 7.25}]}
    (results / "without-rows").mkdir()
    (results / "without-rows" / "host.json").write_text(json.dumps(its))
    text = report.host(results)
    assert text.startswith("a CPU, 1 thread, torch 2.13.0, triton 3.6.0, paper, batch 1, bfloat16:\n\n| mode")
    assert re.search(r"\| eval +\| its launches +\| 25 +\| 70 +\| 80 +\| 3.02 +\|", text)
    assert re.search(r"\| eval +\| the first forward +\| 8 +\| 7.2 +\|", text)


def test_nothing_is_said_of_no_comparison() -> None:
    """Only where both have a time is one of them slower."""
    ours, theirs = (row(p, t, case="upsample", floor_ms=2.0) for p, t in (("torch", 4.0), ("reference", 8.0)))
    for found in ([ours], [theirs], [ours, row("reference", None, case="upsample", not_run="no memory")]):
        assert "Slower" not in report.stages(found) and report.stages(found)
    assert report.stages([ours, theirs]).endswith("\n\nSlower than the best reference: nowhere.")
    assert "Slower" not in report.module([row("reference", 8.0)])


def test_memory_is_that_of_eager_calls() -> None:
    """As the reference's beside it."""
    peaks = {"reference": 9.0, "reference compiled": 4.0, "torch": 5.0, "torch compiled": 3.0}
    text = report.module([row(provider, peak_mb=peak) for provider, peak in peaks.items()])
    assert [cell.strip() for cell in text.splitlines()[2].split("|")[-3:-1]] == ["9.00", "5.00"]


def test_a_network_is_shown_without_its_bare_one() -> None:
    """And where it is slower."""
    step = {"case": "UNet", "phase": "train", "mode": "full"}
    text = report.hosts([row(provider, t, **step) for provider, t in (("reference", 8.0), ("torch", 10.0))])
    assert "8.00 ms" in text and "0.80x" in text and "Slower than the best reference: UNet" in text


def test_rows_of_several_environments_say_so(results: Path) -> None:
    found = [row("reference"), row("torch", environment={"cpu": "a CPU", "threads": 64, "torch": "2.13.0"})]
    rows.append(found, results / "a" / "run.jsonl")
    text = report.block("module", results, results.parent / "report.md", figures=False)
    assert "a CPU, 2 threads, torch 2.13.0 and a CPU, 64 threads, torch 2.13.0:" in text


def test_a_row_of_an_unknown_provider_is_named(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = results.parent / "report.md"
    for provider in ("magic", "torch magic"):
        rows.append([row(provider)], results / provider.replace(" ", "-") / "run.jsonl")
        options = ["--results", str(results / provider.replace(" ", "-")), "--document", str(document)]
        assert report.main(options) == 2
        (line,) = capsys.readouterr().err.splitlines()
        folder, title = results / provider.replace(" ", "-"), "dca, paper, batch 1, float32, forward"
        assert line.startswith(f"report: {folder}: {title}: expected a provider of without, ")
        assert line.endswith(f", got {provider!r}") and not document.exists()


def test_what_a_newcomer_measured_is_no_result(results: Path) -> None:
    """The main job writes its rows beside the committed ones."""
    rows.append([row()], results / rows.LATEST.name / "main.jsonl")
    assert [folder.name for folder in report.machines(results)] == ["a-machine"]


def test_a_machine_has_one_name(tmp_path: Path) -> None:
    """In tables and figures alike."""
    versions = {"cpu": "a CPU", "torch": "2.13.0"}
    assert measured_on({**versions, "threads": 1}) == "a CPU, 1 thread, torch 2.13.0"
    assert measured_on({**versions, "threads": 2}) == "a CPU, 2 threads, torch 2.13.0"
    assert measured_on({**versions, "threads": 2, "gpu": "a GPU"}) == "a GPU, torch 2.13.0"
    found = [row(name, environment={**versions, "threads": 1}) for name in PLAIN]
    rows.append(found, tmp_path / "run.jsonl")
    assert report.block("module", tmp_path, tmp_path / "report.md").startswith("a CPU, 1 thread, torch 2.13.0:\n")
    with mock.patch.object(plots, "measured_on", return_value="a machine") as named:
        plots.draw(plots.bars, found, tmp_path / "figure.png")
    named.assert_called_once_with(found[0].environment)


def test_a_report_explains_the_columns_that_there_are(tmp_path: Path) -> None:
    rows.append([row(name) for name in PLAIN], tmp_path / "run.jsonl")
    text = report.block("module", tmp_path, tmp_path / "report.md")
    assert f"- {report.BEST}: " in text and "- reference, torch: " in text and "peak MB" not in text
    rows.append([row(name, peak_mb=5.0) for name in PLAIN], tmp_path / "run.jsonl")
    assert "- reference peak MB, ours peak MB: " in report.block("module", tmp_path, tmp_path / "report.md")


def test_report_of_a_journal(tmp_path: Path) -> None:
    """Of a machine whose checks fail: what failed, and each kernel's time beside its floor, the last that was taken."""
    file, document = tmp_path / "journal.ndjson", tmp_path / "report.md"
    journal.write(file, "smoke", case="dca eval", well=False, found="NaN")
    journal.write(file, "smoke", case="dca eval", well=True, found="")
    journal.write(file, "smoke", case="dca train", well=False, found="3 times the budget", where="map 2")
    journal.write(file, "compile", kernel="mix", failed="out of registers")
    kernel = {"size": "paper", "phase": "eval", "batch": 8, "dtype": "bfloat16", "kernel": "mix", "floor_us": 10.0}
    for us in (50.0, 40.0):
        journal.write(file, "kernels", us=us, estimated_us=20.0, **kernel)
    options = ["--results", str(tmp_path), "--document", str(document), "--journal", str(file), "--no-figures"]
    assert report.main(options) == 0
    lines = [" ".join(line.split()) for line in document.read_text().splitlines()]
    assert "2 cases, 1 failed." in lines
    assert "| dca train | 3 times the budget | map 2 |" in lines
    assert "| mix | out of registers | does not compile |" in lines
    assert [line for line in lines if "bfloat16" in line] == [
        "| eval, batch 8, bfloat16 | mix | 40.0 | 10.0 | 20.0 | 4.00x |"
    ]


def test_a_marker_without_its_partner(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = results.parent / "README.md"
    document.write_text("<!-- begin: module -->\n")
    assert report.main(["--document", str(document), "--results", str(results)]) == 2
    assert "<!-- end: module -->" in capsys.readouterr().err and document.read_text() == "<!-- begin: module -->\n"


def test_a_slowdown_is_flagged(results: Path, tmp_path: Path) -> None:
    slow = shutil.copytree(results / "a-machine", tmp_path / "slow")
    lines = (slow / "run.jsonl").read_text().splitlines()
    planted = [json.loads(line) for line in lines]
    for name in ("p20_ms", "p50_ms", "p80_ms"):
        planted[1][name] *= 1.2
    (slow / "run.jsonl").write_text("".join(json.dumps(one) + "\n" for one in planted))
    assert compare.main([str(results / "a-machine"), str(results / "a-machine")]) == 0
    assert compare.main([str(results / "a-machine"), str(slow)]) == 1
    assert compare.main([str(slow), str(results / "a-machine")]) == 0


def test_times_of_the_host_are_named() -> None:
    """A GPU's eager row at a small batch is the time of its launches."""
    found = [
        row("triton", 2.0, host_ms=1.9),
        row("triton graph", 0.05, host_ms=0.01),
        row("reference", 0.5, host_ms=0.4),
    ]
    text = " ".join(report.module(found).split())
    assert f"| 2.00 ms ±2 % {report.HOST} |" in text and "| 50.0 µs ±2 % |" in text and "| 500 µs ±2 % |" in text
    assert f"{report.HOST}: Python" in text
    assert report.HOST not in report.module([dataclasses.replace(one, host_ms=None) for one in found])


def test_a_table_without_tabulate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tabulate", None)
    lines = [["a", None, None], [1, 2.5, None]]
    assert console.table(lines, ["x", "y", "empty"]) == "| x | y |\n| --- | --- |\n| a |  |\n| 1 | 2.5 |"
