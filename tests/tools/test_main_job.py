"""The main job at a tiny size: what it writes, what it says, and what it does where it is stopped."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import calibrate, cases, console, plots, quick, report, rows
from benchmarks.group import Effort, Group
from benchmarks.rows import Row
from tests.tools.rows import PLAIN, row, timed

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("no_gpu")


def test_main_job(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "rates", lambda dtype, small: {"copy_bytes_s": 1e9, "matmul_flop_s": 1e9})
    file, figure = tmp_path / "rows.jsonl", tmp_path / "figure.png"
    options = ["--parts", "module", "--batch", "1", "--patch", "4", "--mode", "eval"]
    options += ["--json", str(file), "--plot", str(figure)]
    assert quick.main(options) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    found = rows.load(file)
    assert [r.provider for r in found] == ["reference", "torch"]
    for one in found:
        assert one.parity and one.max_error >= one.rms_error > 0
        assert 0 < one.p20_ms <= one.p50_ms <= one.p80_ms and one.first_ms > 0
        assert one.peak_mb >= 0 and one.allocations > 0 and one.counted_peak_mb <= one.allocated_mb
        assert one.environment["torch"] == torch.__version__
    out = capsys.readouterr().out
    assert "times as fast as the reference" in out and "triton: not run: no GPU" in out


def test_the_main_job_is_the_module_and_its_stages() -> None:
    """What takes long is asked for."""
    groups = [group for _, group in quick.groups(quick.parser().parse_args([]))]
    assert [str(g) for g in groups[:4]] == [
        f"dca, {s}, batch {b}" for b in (1, 4) for s in ("forward", "training step")
    ]
    assert {g.problem.case for g in groups[4:]} == set(cases.STAGES)
    assert {g.providers for g in groups} == {PLAIN}

    everything = ["--parts", "module", "stages", "networks", "--compiled"]
    parts = {part: [] for part in quick.PARTS}
    for part, group in quick.groups(quick.parser().parse_args(everything)):
        parts[part].append(group)
    assert {g.problem.case for of_part in parts.values() for g in of_part} == set(cases.CASES)
    assert all(("reference compiled" in g.providers) != g.problem.training for g in parts["module"])
    assert all("without" in g.providers for g in parts["networks"])


def test_rows_come_as_they_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And Ctrl-C leaves what was measured by then, on the screen and in the file."""
    file, seen = tmp_path / "rows.jsonl", []

    def one_then_stop(group: Group, *rest: object) -> list[Row]:
        if seen:
            assert "dca, forward, batch 1: reference 3.00 s, torch 1.00 s (3.00x)" in capsys.readouterr().out
            assert len(rows.load(file)) == 2
            raise KeyboardInterrupt
        seen.append(group)
        times = (("reference", 3000.0), ("torch", 1000.0))
        return [group.row(name, "forward", p20_ms=t, p50_ms=t, p80_ms=t) for name, t in times]

    monkeypatch.setattr(quick, "measured", one_then_stop)
    options = ["--json", str(file), "--plot", str(tmp_path / "figure.png")]
    assert quick.main(options) == quick.STOPPED
    out = capsys.readouterr().out
    assert "stopped" in out and "forward, batch 1: torch is 3.00 times as fast" in out
    assert "stages" not in out and len(rows.load(file)) == 2

    monkeypatch.setattr(quick, "measured", mock.Mock(side_effect=KeyboardInterrupt))
    assert quick.main(options) == quick.STOPPED
    assert "parity" not in capsys.readouterr().out  # of nothing, nothing is said


def makes_a_child(parent: int) -> bool:
    """Whether one of its threads has a child that multiprocessing spawns."""
    for children in Path(f"/proc/{parent}/task").glob("*/children"):
        for child in children.read_text().split():
            with contextlib.suppress(OSError):
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    return True
    return False


def heed_interrupts() -> None:
    """What runs in the background of a shell ignores them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are listed by Linux alone")
def test_ctrl_c_while_memory_is_measured(tmp_path: Path) -> None:
    """A child that is just being made does not keep the command from ending."""
    command = [sys.executable, "-m", "benchmarks", "--parts", "module", "--batch", "1", "--patch", "4"]
    command += ["--json", str(tmp_path / "rows.jsonl"), "--plot", str(tmp_path / "figure.png")]
    for delay in (0.1, 0.5):
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=heed_interrupts,
        )
        try:
            deadline = time.monotonic() + 60
            while process.poll() is None and not makes_a_child(process.pid) and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(delay)
            os.killpg(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=20)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == quick.STOPPED and "Traceback" not in err, err
        assert "stopped" in out


MainJob = Callable[..., tuple[int, str]]


@pytest.fixture
def main_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> MainJob:
    """The main job, of which this is measured: exit status, and what it says."""

    def main(measured: Callable[[Group], list[Row]], *options: object) -> tuple[int, str]:
        monkeypatch.setattr(quick, "measured", lambda group, *rest: measured(group))
        files = ["--json", tmp_path / "rows.jsonl", "--plot", tmp_path / "figure.png"]
        fixed = ["--parts", "module", "--batch", 1, "--mode", "eval", *files]
        return quick.main([str(option) for option in (*fixed, *options)]), capsys.readouterr().out

    return main


def test_the_main_job_compares_what_there_is(main_job: MainJob) -> None:
    """The reference has no time where it is not run, and no memory where the process that weighs it is killed."""

    def without_reference(group: Group) -> list[Row]:
        reason = "needs about 90 GB of memory, 9 GB are free"
        return [group.row("reference", "forward", not_run=reason), timed(group, "torch", 1000.0, peak_mb=5.0)]

    status, out = main_job(without_reference)
    assert status == 0 and "not run: needs about 90 GB" in out and "times as fast" not in out

    for weighed in ((None, 5.0), (10.0, None), (10.0, 5.0)):
        pairs = zip(PLAIN, (3000.0, 1000.0), weighed, strict=True)
        found = [(name, t, {} if peak is None else {"peak_mb": peak}) for name, t, peak in pairs]
        status, out = main_job(lambda group, found=found: [timed(group, name, t, **peak) for name, t, peak in found])
        line = "forward, batch 1: torch is 3.00 times as fast as the reference"
        assert status == 0
        assert (
            line + ("; the reference takes 2.00 times as much memory" if None not in weighed else "")
            in out.splitlines()
        )

    status, out = main_job(lambda group: [group.row(name, "forward", not_run="no memory") for name in PLAIN])
    assert status == 0 and "parity: nothing was checked" in out


def test_the_main_job_says_what_is_wrong(main_job: MainJob) -> None:
    wrong = {"parity": False, "not_run": "outside its error budget"}
    status, out = main_job(lambda group: [timed(group, "reference", 1.0), group.row("torch", "forward", **wrong)])
    assert status == 1 and "parity: FAILED" in out and "within the error budget" not in out
    raised = {"raised": True, "not_run": "OutOfResources: shared memory"}
    status, out = main_job(lambda group: [timed(group, "reference", 1.0), group.row("torch", "forward", **raised)])
    assert status == 1 and "parity: FAILED. A fused module raised an error (OutOfResources: shared memory)" in out
    status, out = main_job(lambda group: [timed(group, name, 1.0) for name in PLAIN])
    assert status == 0 and "parity: within the error budget everywhere" in out


def test_an_error_ends_the_main_job(main_job: MainJob) -> None:
    """It is no row among others: the main job would end well without a time of ours."""
    with pytest.raises(RuntimeError, match="no such kernel"):
        main_job(mock.Mock(side_effect=RuntimeError("no such kernel")))


def test_the_main_job_measures_the_user_s_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[np.ndarray] = []

    def measured(group: Group, image: np.ndarray, effort: Effort) -> list[Row]:
        taken.append(image)
        return [timed(group, name, 1.0) for name in PLAIN]

    monkeypatch.setattr(quick, "measured", measured)
    image = np.random.default_rng(0).integers(0, 256, (10, 12, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "mine.png")
    options = ["--parts", "module", "--batch", "1", "--mode", "eval"]
    options += ["--json", str(tmp_path / "rows.jsonl"), "--plot", str(tmp_path / "figure.png")]
    assert quick.main([*options, "--image", str(tmp_path / "mine.png")]) == quick.main(options) == 0
    np.testing.assert_allclose(taken[0], image / 255, atol=1e-6)
    np.testing.assert_array_equal(taken[1], cases.load_image(None))


def test_the_main_job_refuses_a_map_of_one_pixel(capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is measured: BatchNorm would raise in the middle."""
    assert quick.main(["--patch", "1"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("--patch: expected 2 or more, got 1") and not said.out


def test_the_main_job_explains_the_columns_that_there_are(main_job: MainJob) -> None:
    def explained(out: str) -> set[str]:
        return {line[2:].partition(":")[0] for line in out.splitlines() if line.startswith("- ")}

    _, out = main_job(lambda group: [timed(group, name, 1.0) for name in PLAIN])
    assert explained(out) == {"time", "speed-up"}
    _, out = main_job(
        lambda group: [timed(group, name, 1.0, max_error=1e-6, rms_error=1e-7, peak_mb=5.0) for name in PLAIN]
    )
    assert explained(out) == set(quick.COLUMNS)
    _, out = main_job(lambda group: [timed(group, name, 1.0, floor_ms=0.5) for name in PLAIN], "--parts", "stages")
    assert explained(out) == {"floor", "reference, torch", report.BEST}


def test_the_main_job_names_the_times_that_spread(main_job: MainJob) -> None:
    calm = {"p20_ms": 0.8, "p80_ms": 1.2}
    _, out = main_job(lambda group: [timed(group, name, 1.0, **calm) for name in PLAIN])
    assert "note:" not in out
    spread = {1: calm, 4: {"p20_ms": 0.7, "p80_ms": 1.3}}
    _, out = main_job(
        lambda group: [timed(group, name, 1.0, **spread[group.problem.batch]) for name in PLAIN], "--batch", 1, 4
    )
    note = "note: the times of dca, forward, batch 4 vary by more than half: something else ran on this machine, and "
    assert note + "these ratios may be wrong" in out.splitlines()


def test_the_last_rows_stay_until_there_are_new_ones(main_job: MainJob, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows.append([row("torch compiled")], file)
    before = file.read_text()
    assert main_job(mock.Mock(side_effect=KeyboardInterrupt))[0] == quick.STOPPED and file.read_text() == before
    assert main_job(lambda group: [timed(group, name, 1.0) for name in PLAIN])[0] == 0
    assert [one.provider for one in rows.load(file)] == list(PLAIN)


def test_without_matplotlib_no_figure_is_claimed(
    main_job: MainJob, results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [row("reference"), row("torch")]
    path = results.parent / "figure.png"
    assert plots.draw(plots.bars, found, path) == path and path.exists()
    path.unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plots.draw(plots.bars, found, path) is None and not path.exists()
    _, out = main_job(lambda group: [timed(group, name, 1.0) for name in PLAIN])
    assert plots.NOT_DRAWN in out.splitlines() and "figure: " not in out
    options = ["--results", str(results), "--document", str(results.parent / "report.md")]
    for more in ([], ["--check"]):
        assert report.main([*options, *more]) == 0
        out = capsys.readouterr().out
        assert plots.NOT_DRAWN in out.splitlines() and "figure: " not in out


@pytest.mark.parametrize(
    ("milliseconds", "written"),
    [(3000, "3.00 s"), (62.34, "62.3 ms"), (0.747, "747 µs"), (1e-4, "0.100 µs"), (12345.0, "12.3 s"), (None, "")],
)
def test_times_are_written_as_people_do(milliseconds: float | None, written: str) -> None:
    assert console.duration(milliseconds) == written


def test_numbers_have_no_exponent() -> None:
    assert [console.number(x) for x in (3e3, 1594.0, 62.34, 0.7471, 0.0)] == ["3000", "1590", "62.3", "0.747", "0.00"]
    ratios = [console.times(a, 1.0) for a in (0.00234, 0.6432, 2.271, 32.53, None)]
    assert ratios == ["0.00234x", "0.64x", "2.27x", "32.5x", ""]
