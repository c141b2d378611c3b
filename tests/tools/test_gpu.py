"""`make gpu`: its steps, what they do where something fails, and what is compiled ahead."""

import dataclasses
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import gpu, journal, run
from benchmarks.environment import environment
from benchmarks.offline import compile, stand_in
from tests.compiled import output_of
from tests.oracle import INTERPRETED

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.skipif(not INTERPRETED, reason="made for the interpreter"), pytest.mark.slow]


# Steps


def steps(monkeypatch: pytest.MonkeyPatch, **programs: str | Sequence[str]) -> None:
    """Steps of nearly equal shares, each of one or more lines of Python."""

    def commands(lines: str | Sequence[str]) -> Callable[..., list[list[str]]]:
        of_step = [lines] if isinstance(lines, str) else lines
        return lambda out, dry, seconds: [[sys.executable, "-c", line] for line in of_step]

    made = {name: gpu.Step(name, 10.0, "", "nothing", commands(lines)) for name, lines in programs.items()}
    monkeypatch.setattr(gpu, "STEPS", made)


def results(out: Path) -> dict[str, journal.Entry]:
    return {entry["name"]: entry for entry in journal.read(out / "journal.ndjson") if entry["step"] == "gpu"}


def test_a_step_that_fails_does_not_stop_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps(monkeypatch, last="print('third')", first=["raise SystemExit(1)", "print('second')"], other="print('never')")
    assert gpu.main(["--dry-run", "--out", str(tmp_path), "--steps", "first", "last"]) == 1
    found = results(tmp_path)
    assert list(found) == ["first", "last"] and [entry["status"] for entry in found.values()] == [1, 0]
    log = [line for line in (tmp_path / "log.txt").read_text().splitlines() if line and not line.startswith("$")]
    assert log == ["second", "third"]


SLOW = "import time; print('begun', flush=True); time.sleep(60)"


def test_the_minutes_bound_all_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step has its share of them."""
    steps(monkeypatch, slow=SLOW, next=SLOW, last="print('end')")
    environment()  # of no GPU, and kept
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    begin = time.monotonic()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a shell
    try:
        assert gpu.main(["--out", str(tmp_path), "--steps", "slow", "next", "last", "--minutes", "0.1"]) == 1
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begin < 0.1 * 60 + 15
    found = results(tmp_path)
    assert list(found) == ["slow", "next", "last"] and "stopped" not in found["last"]
    assert "stopped" in found["slow"] and "stopped" in found["next"] and found["slow"]["status"] != 0
    assert (tmp_path / "log.txt").read_text().count("\nbegun") == 2  # what was said by then stays


def test_a_step_of_a_dry_run_may_take_all_that_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What steps take on a GPU says nothing of the interpreter: none is cut for it on a machine that does more."""
    steps(monkeypatch, short="import time; time.sleep(1.5)", long="pass")
    monkeypatch.setitem(gpu.STEPS, "long", dataclasses.replace(gpu.STEPS["long"], seconds=1e4))
    assert gpu.main(["--dry-run", "--out", str(tmp_path), "--minutes", "1"]) == 0, capsys.readouterr().out
    assert not any("stopped" in entry for entry in results(tmp_path).values())


def test_time_that_is_left_goes_to_the_next() -> None:
    names = list(gpu.DEFAULT)
    assert gpu.shares(names[-1:], 100.0) == 100.0  # alone, a step has it all
    first = gpu.shares(names, 480.0)
    assert gpu.shares(names[1:], 480.0 - first) == pytest.approx(gpu.shares(names[1:], 480.0) * (1 - first / 480.0))
    assert sum(gpu.STEPS[name].seconds for name in names) <= 480  # the default's eight minutes


def test_a_step_that_lost_the_gpu_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "mark"
    code = f"import pathlib; p = pathlib.Path({str(mark)!r}); s = {run.BROKEN} * (not p.exists()); p.touch(); exit(s)"
    steps(monkeypatch, broken=[code, "print('next')"])
    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 0
    assert results(tmp_path)["broken"]["again"] == 1 and "next" in (tmp_path / "log.txt").read_text()


def test_what_is_not_installed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "STEPS", {"a": gpu.Step("a", 1.0, "", "", lambda *_: [["no-such-program"]])})
    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 1
    assert results(tmp_path)["a"]["not run"] == "no-such-program is not installed"


def test_a_step_without_time_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps(monkeypatch, a="pass")
    result = gpu.perform(gpu.STEPS["a"], -3.0, tmp_path, True, {})
    assert result["stopped"] == "after 0 s"
    monkeypatch.setattr(gpu, "perform", lambda *args: {"name": "a", "status": 0, "stopped": "after 0 s"})
    assert gpu.main(["--dry-run", "--steps", "a", "--out", str(tmp_path)]) == 1


def test_the_tests_of_kernels_come_first(tmp_path: Path) -> None:
    first, rest = gpu.tests(tmp_path, False, 100.0)
    files = [word for word in first if word.startswith("tests/")]
    assert files and all((ROOT / file).exists() for file in files)
    assert "tests" in rest and {f"--ignore={file}" for file in files} <= set(rest)


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert "not run: no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("dry", [False, True], ids=["real", "dry"])
def test_every_command_is_one(dry: bool, tmp_path: Path) -> None:
    """Its arguments are known, and its selections are not empty."""
    for step in gpu.STEPS.values():
        for command in step.commands(tmp_path, dry, 100.0):
            words = list(itertools.dropwhile(lambda word: word != "benchmarks", command))[1:]
            if words[:1] == ["run"]:
                assert list(run.groups(run.parser().parse_args(words[1:]))), words
            elif words:
                assert words[0] in ("compile", "smoke", "kernels", "determinism", "tune", "report"), words
    assert gpu.help_of_steps().count(" s  ") == len(gpu.STEPS)


def test_a_dry_run_takes_every_step(tmp_path: Path) -> None:
    """As the commands of a GPU, in Triton's interpreter."""
    output_of("-m", "benchmarks", "gpu", "--dry-run", "--out", str(tmp_path))
    found = results(tmp_path)
    assert list(found) == list(gpu.STEPS)
    assert {(step, its["status"]) for step, its in found.items()} == {(step, 0) for step in gpu.STEPS}


def test_few_packages_are_needed(tmp_path: Path) -> None:
    """Nothing on the way imports what may be missing, and a report without figures is one."""
    journal.write(tmp_path / "journal.ndjson", "smoke", case="a", well=False, found="off", where="conv")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({list(gpu.OPTIONAL)!r}))\n"
        "from benchmarks import determinism, gpu, kernels, report, run, smoke, tune\n"
        "from benchmarks.offline import compile\n"
        f"to = ['--results', {str(tmp_path)!r}, '--document', {str(tmp_path / 'report.md')!r}]\n"
        f"raise SystemExit(report.main([*to, '--no-figures', '--journal', {str(tmp_path / 'journal.ndjson')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "1 cases, 1 failed" in (tmp_path / "report.md").read_text() and not list(tmp_path.rglob("*.png"))


def test_a_half_written_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "journal.ndjson"
    written = journal.write(path, "smoke", case="a")
    with path.open("a") as file:
        file.write('{"step": "smo')
    assert journal.read(path) == [written] and written["environment"]["torch"] == torch.__version__
    next_one = journal.write(path, "smoke", case="b")
    assert journal.read(path) == [written, next_one]
    assert journal.latest([written, next_one, written | {"well": True}], "case") == [written | {"well": True}, next_one]


# Compiling ahead


def without_interpreter(*arguments: str, folder: Path = ROOT, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs Python where kernels are compiled."""
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)} | more
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=600)


def test_what_make_gpu_compiles_fits_into_its_first_step() -> None:
    done = without_interpreter("-m", "benchmarks", "compile", "--target", "sm_90", "--count", "--processes", "16")
    assert done.returncode == 0, done.stderr
    count, seconds = (int(word) for word in done.stdout.split() if word.isdigit() and word != "16")
    assert 200 <= count <= 300 and seconds <= 60, done.stdout
    assert seconds < gpu.STEPS["smoke"].seconds


def test_a_cache_that_was_carried_is_used(tmp_path: Path) -> None:
    """Another process, in another folder, launches by the JIT's own way and compiles nothing; but what is not there."""
    if stand_in.why_no_launches() is not None:
        pytest.skip(stand_in.why_no_launches())
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    tiny = ["--size", "tiny", "--batch", "1", "--dtype", "float32", "--phase", "eval", "--no-golden"]
    command = ["-m", "benchmarks", "compile", "--target", "sm_90", *tiny, "--processes", "1", "--out", "cache"]
    done = without_interpreter(*command, folder=here)
    assert done.returncode == 0 and "0 failed" in done.stdout, done.stderr
    shutil.move(here / "cache", there / "cache")
    code = (
        "import torch\n"
        "from benchmarks import cases, providers, smoke\n"
        "from benchmarks.offline import stand_in\n"
        "last, rows = torch.channels_last, torch.contiguous_format\n"
        "for dtype, layout in ((torch.float32, last), (torch.float32, rows), (torch.float64, rows)):\n"
        "    problem = cases.Problem('dca', cases.SIZES['tiny'], 1, dtype, False)\n"
        "    shapes = (1, 8, 8, 8), (1, 16, 4, 4)\n"
        "    maps = [torch.empty(shape, dtype=dtype, memory_format=layout) for shape in shapes]\n"
        "    with stand_in.standing_in('sm_90'), smoke.compilations() as compiled:\n"
        "        providers.build(providers.PROVIDERS['triton'], problem, maps, None).forward()\n"
        "    print(len(compiled))\n"
    )
    done = without_interpreter("-c", code, folder=there, TRITON_CACHE_DIR="cache")
    assert done.stdout.split() == ["0", "0", "9"], done.stdout + done.stderr


def test_nothing_is_compiled_by_the_interpreter(capsys: pytest.CaptureFixture[str]) -> None:
    assert compile.main(["--target", "sm_90"]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_an_error_in_a_line_is_its_cause() -> None:
    error = RuntimeError("at 3:4:\n  x = y")
    error.__cause__ = ValueError("no such\nshape")
    assert compile.said(error) == "ValueError: shape"
    said = torch.AcceleratorError("CUDA error: not permitted\nCompile with `TORCH_USE_CUDA_DSA`")
    assert compile.said(said) == "AcceleratorError: CUDA error: not permitted"
