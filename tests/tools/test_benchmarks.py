"""The benchmarks at a tiny size: what they write, and that they neither time what is wrong nor leave anything out."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from PIL import Image
from skimage import data

from benchmarks import (
    calibrate,
    cases,
    compare,
    console,
    determinism,
    environment,
    floor,
    journal,
    measure,
    parity,
    plots,
    providers,
    quick,
    report,
    rows,
    run,
)
from benchmarks.cases import Problem
from benchmarks.environment import measured_on
from benchmarks.group import Effort, Group, measured
from benchmarks.measure import Call
from benchmarks.rows import Row

ROOT = Path(__file__).parents[2]
TINY = cases.SIZES["tiny"]
EFFORT = Effort(memory=False, small=True)
PLAIN = ("reference", "torch")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are not taken for runnable because the tests interpret them."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def problem(case: str = "dca", training: bool = False, dtype: torch.dtype = torch.float32) -> Problem:
    return Problem(case, TINY, 2, dtype, training)


def row(provider: str = "torch", p50: float | None = 10.0, **values) -> Row:
    """A row of times within 2 % of each other."""
    fixed = {"case": "dca", "size": "paper", "patch": 28, "batch": 1, "dtype": "float32", "phase": "eval"}
    times = {} if p50 is None else {"p20_ms": 0.98 * p50, "p50_ms": p50, "p80_ms": 1.02 * p50}
    where = {"environment": {"cpu": "a CPU", "threads": 2, "torch": "2.13.0"}}
    return Row(**fixed | {"mode": "forward", "provider": provider} | times | where | values)


# The main job


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


def timed(group: Group, provider: str, t: float, **values: Any) -> Row:
    times = {"parity": True, "p20_ms": t, "p50_ms": t, "p80_ms": t}
    return group.row(provider, group.modes[-1], **times | values)


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
    status, out = main_job(lambda group: [timed(group, name, 1.0) for name in PLAIN])
    assert status == 0 and "parity: within the error budget everywhere" in out


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
    assert [console.times(a, 1.0) for a in (0.6432, 2.271, 32.53, None)] == ["0.64x", "2.27x", "32.5x", ""]


def test_a_wrong_module_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    make = providers._module

    def slightly_wrong(implementation: str, problem: Problem):
        module = make(implementation, problem)
        if implementation == "torch":
            with torch.no_grad():
                module.upconvs[0].conv.conv.weight.mul_(1.0001)
        return module

    monkeypatch.setattr(providers, "_module", slightly_wrong)
    group = Group("tiny", problem(), PLAIN, ("forward",))
    plain, wrong = measured(group, cases.load_image(None), EFFORT)
    assert plain.parity and plain.p50_ms is not None
    assert wrong.wrong and wrong.p50_ms is None and wrong.not_run == "outside its error budget"


def test_tiles() -> None:
    image = np.random.default_rng(0).random((40, 50, 3), np.float32)
    tiles = cases.cut_tiles(image, 5, 32)
    assert tiles.shape == (5, 3, 32, 32)
    assert not torch.equal(tiles[0], tiles[4])
    assert cases.cut_tiles(image, 1, 64).shape == (1, 3, 64, 64)  # larger than the image


def test_the_slide_is_a_crop_of_its_source() -> None:
    crop = data.immunohistochemistry()[128:384, 128:384]
    np.testing.assert_array_equal(cases.load_image(None), crop.astype(np.float32) / np.float32(255))


# Measuring


def test_latency_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(measure, "evict", lambda: done.append("-"))
    names = ("a", "b")
    calls = {n: Call(lambda n=n: done.append(n.upper()), lambda n=n: done.append(n)) for n in names}
    *_, samples = measure.latency(calls, rounds=3)
    assert "".join(done) == "A-aB-b" * 3
    assert all(len(samples[name]) == 3 for name in names)


def test_every_allocation_is_counted() -> None:
    x = torch.ones(1000)

    def call() -> None:
        y = x + x  # 4000 bytes
        y = y + x  # and 4000 beside them
        del y
        x + x

    assert measure.count_allocations(call) == {"counted_peak_mb": 0.008, "allocations": 3, "allocated_mb": 0.012}


@pytest.mark.parametrize("phase", cases.MODES)
def test_no_floor_is_above_what_was_counted(phase: str) -> None:
    """The kernels were counted in the interpreter, with each stage's launches one after the other."""
    counted = json.loads((ROOT / "benchmarks" / "results" / "offline" / "traffic.json").read_text())
    for one in (r for r in counted if r["implementation"] == "triton" and r["mode"] == phase):
        dtype = cases.DTYPES[one["dtype"]]
        module = Problem("dca", cases.SIZES["paper"], 1, dtype, phase == "train")
        works = [floor.module_work(module, stage, "forward") for stage in cases.STAGES]
        assert sum(w.flops for w in works) <= one["flops"]
        tokens = 28 * 28 * sum(cases.FEATURES) * dtype.itemsize
        maps = sum(w.bytes for w in works) - 6 * tokens
        assert maps == pytest.approx(one["maps_bytes"], rel=0.01)
        assert 6 * tokens <= one["tokens_bytes"]


@pytest.mark.parametrize("case", cases.STAGES)
@pytest.mark.parametrize("phase", cases.MODES)
def test_a_stage_is_the_reference_s(case: str, phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients of the inputs, of both backends; so much is compared where a stage is timed."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    one = dataclasses.replace(problem(case, phase == "train"), batch=1)
    gate = parity.Gate(one, *providers.inputs_of(one, cases.load_image(None), measure.device()))
    for name in ("torch", "triton"):
        subject = gate.subject(providers.PROVIDERS[name])
        error, well, seconds = gate.check(subject)
        assert well and 0 < error.rms and seconds > 0, name


# What is run


def test_nothing_is_left_out() -> None:
    """Each provider and mode of a group has a row: a time, or a reason."""
    names = ("reference", "reference graph", "torch", "torch graph", "triton", "triton graph")
    group = Group("tiny", problem("patch_embed"), names, ("forward",))
    found = {r.provider: r for r in measured(group, cases.load_image(None), EFFORT)}
    assert found.keys() == set(group.providers)
    for name in PLAIN:
        assert found[name].p50_ms is not None and found[name].floor_ms is not None and found[name].not_run is None
    for name in ("triton", "triton graph", "torch graph", "reference graph"):
        assert found[name].not_run == "no GPU" and found[name].p50_ms is None


def test_the_registry_is_whole() -> None:
    chosen = run.parser().parse_args([])
    everything = list(run.groups(chosen))
    assert {g.problem.case for g in everything} == set(cases.CASES)
    assert {g.size for g in everything} == set(cases.SIZES) - {"tiny"}
    dca = {(g.size, g.problem.batch, g.problem.training) for g in everything if g.problem.case == "dca"}
    assert len(dca) == 5 * 3 * 2
    assert {p for g in everything for p in g.providers} == set(providers.PROVIDERS)


def test_too_large_a_reference_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "free_memory", lambda device: 1e9)
    large = Problem("dca", cases.SIZES["grid112"], 8, torch.float32, False)
    plain, ours = (providers.PROVIDERS[name] for name in PLAIN)
    assert "memory" in providers.why_not(plain, large, "forward", torch.device("cpu"))
    assert providers.why_not(ours, large, "forward", torch.device("cpu")) is None
    assert parity.gate_batch(large, torch.device("cpu")) == 0


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "run.jsonl"
    options = ["--case", "patch_embed", "--size", "tiny", "--batch", "1", "2", "--phase", "eval", "--small"]
    options += ["--provider", *PLAIN, "--no-memory", "--out", str(file)]
    assert run.main(options) == 0
    text, once = file.read_text(), rows.load(file)
    assert [(r.batch, r.provider) for r in once] == [(b, p) for b in (1, 2) for p in PLAIN]

    again = []
    monkeypatch.setattr(
        run, "measured", lambda group, *args: again.append(group.problem.batch) or measured(group, *args)
    )
    assert run.main(options) == 0 and again == [] and file.read_text() == text
    file.write_text(text[: text.rindex("{") + 50])  # stopped while it wrote its last row
    assert run.main(options) == 0 and again == [2] and len(rows.load(file)) == len(once)
    monkeypatch.setattr(run, "source", lambda: "other code")
    assert run.main(options) == 0 and again == [2, 1, 2]
    options.remove("2")
    assert run.main(options) == 0 and again == [2, 1, 2, 1]
    assert [r.key for r in rows.load(file)] == [r.key for r in once]  # what was not chosen stays


def test_a_run_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And goes on with the rest."""

    def measured(group: Group, *rest: object) -> list[Row]:
        if group.problem.batch == 2:
            return [timed(group, "torch", 1.0)]
        values = {"parity": False, "not_run": "outside its error budget", "max_error": 0.5}
        return [group.row("torch", "forward", **values)]

    monkeypatch.setattr(run, "measured", measured)
    options = ["--case", "dca", "--size", "tiny", "--batch", "1", "2", "--phase", "eval", "--provider", "torch"]
    assert run.main([*options, "--out", str(tmp_path / "run.jsonl")]) == 1
    said = "dca, tiny, batch 1, float32, forward: torch: outside its error budget, max error 5.0e-01"
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "FAILED" in line)
    assert line == f"parity: FAILED: {said}"
    assert len(rows.load(tmp_path / "run.jsonl")) == 2
    assert run.main([*options, "--batch", "2", "--out", str(tmp_path / "other.jsonl")]) == 0


def test_results_do_not_change_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`gpu` copies the configurations beside its results: what it found after that was another code's."""
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "RESULTS", tmp_path / "benchmarks" / "results")

    def with_file(name: str) -> str:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
        return environment.source.__wrapped__()

    first = with_file("dca_kernels/configurations.json")
    assert with_file("benchmarks/results/latest/gpu/configurations.json") == first
    assert with_file("benchmarks/new.py") != first


def test_a_line_that_is_no_row_is_named(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    file.write_text('{"case": "dca"}\n')
    with pytest.raises(ValueError, match=r"run\.jsonl, line 1: expected a row"):
        rows.load(file)


# Comparing


@pytest.mark.parametrize(
    ("after", "status", "word"),
    [
        (row(p50=13.0), 1, "regression: slower"),
        (row(p50=10.6), 0, "slower"),  # beyond noise, within the threshold
        (row(p50=13.0, p20_ms=9.0), 0, "0 regressions"),  # a time that spreads this far says nothing
        (row(p50=7.0), 0, "faster"),
        (row(p50=None, not_run="no GPU"), 1, "not run any more: no GPU"),
        (row(peak_mb=60.0), 1, "regression: memory"),
    ],
    ids=["slower", "a_little", "noise", "faster", "gone", "memory"],
)
def test_compare(after: Row, status: int, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = tmp_path / "before.jsonl", tmp_path / "after.jsonl"
    for file, ours in zip(files, (row(peak_mb=50.0), after), strict=True):
        rows.append([row("reference", 20.0), ours], file)
    assert compare.main(list(map(str, files))) == status
    assert word in (out := capsys.readouterr().out)
    assert "| reference" not in out  # what stayed the same is not listed


# Reporting


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Rows of one machine: the module at three batches, of which we lose one, a stage, a host, and what was not run."""
    found = []
    for batch, ours in ((1, 5.0), (8, 30.0), (32, 500.0)):
        for step in ({"phase": "eval", "mode": "forward"}, {"phase": "train", "mode": "full"}):
            found += [row("reference", 10.0 * batch, batch=batch, peak_mb=70.0 * batch, **step)]
            found += [row("torch", ours, batch=batch, peak_mb=30.0 * batch, **step)]
    found += [row("triton", None, not_run="no GPU", batch=8)]
    found += [row(p, t, case="upsample", floor_ms=2.0) for p, t in (("reference", 8.0), ("torch", 4.0))]
    step = {"case": "UNet", "phase": "train", "mode": "full"}
    found += [row(p, t, **step) for p, t in (("without", 50.0), ("reference", 90.0), ("torch", 60.0))]
    rows.append(found, tmp_path / "results" / "a-machine" / "run.jsonl")
    return tmp_path / "results"


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
    forward, _ = drawn_by(plots.speedup, [*batches, *one_size, row("torch compiled", batch=1)]).axes
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
    forward, _ = figure.axes
    first, second = (bar for bar in forward.patches if bar.get_x() > 0.5)
    assert first.get_x() + first.get_width() == pytest.approx(second.get_x()) == pytest.approx(1.0)
    assert len(figure.legends[0].get_texts()) == 3


def test_a_line_has_two_points() -> None:
    """A provider that was measured once would be a dot that no legend tells from another."""
    found = [row("torch", batch=b) for b in (1, 8)] + [row("torch compiled"), row("reference compiled")]
    figure = drawn_by(plots.latency, found)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["torch"]
    assert [len(axis.lines) for axis in figure.axes] == [1, 0]


def test_report_of_a_copy(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = results.parent / "README.md"
    blocks = "\n\n".join(
        f"<!-- begin: {n} -->\nold\n<!-- end: {n} -->" for n in ("module", "stages", "hosts", "not run")
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


def test_nothing_is_said_of_no_comparison() -> None:
    """Only where both have a time is one of them slower."""
    ours, theirs = (row(p, t, case="upsample", floor_ms=2.0) for p, t in (("torch", 4.0), ("reference", 8.0)))
    for found in ([ours], [theirs], [ours, row("reference", None, case="upsample", not_run="no memory")]):
        assert "Slower" not in report.stages(found) and report.stages(found)
    assert report.stages([ours, theirs]).endswith("\n\nSlower than the best reference: nowhere.")
    assert "Slower" not in report.module([row("reference", 8.0)])


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


# Bits


def test_bits_that_differ_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zero = torch.zeros(3)
    assert determinism.differing(zero, zero.clone()) == 0
    assert determinism.differing(zero, torch.tensor([0.0, -0.0, 1e-45])) == 2

    options = ["--provider", "torch", "--size", "tiny", "--batch", "1", "--dtype", "float32", "--repeats", "2"]
    assert determinism.main([*options, "--journal", str(tmp_path / "journal.ndjson")]) == 0
    (same,) = journal.read(tmp_path / "journal.ndjson")
    assert same["repeats"] == 2 and same["differ"] == 0 and same["values"] > 2000  # parameters' gradients too
    backward, times = providers.AutogradSubject.backward, iter(range(1, 100))

    def drifting(self):
        gradients = backward(self)
        gradients[0][0, 0, 0, 0] = next(times)
        return gradients

    monkeypatch.setattr(providers.AutogradSubject, "backward", drifting)
    assert determinism.main(options) == 1
