"""`make gpu`: its steps, and what they do where something fails; the kernels are interpreted."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import reference
from benchmarks import cases, gpu, journal, kernels, parity, report, run, smoke, tune
from benchmarks.cases import Problem
from benchmarks.environment import environment
from benchmarks.offline import compile, stand_in
from benchmarks.offline.compile import Compiled
from dca_kernels import DCA, launch
from tests.oracle import INTERPRETED

ROOT = Path(__file__).parents[1]
TINY = cases.SIZES["tiny"]
CPU = torch.device("cpu")
ROWS = json.loads(tune.TABLE.read_text())

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
    assert 200 <= count <= 260 and seconds <= 60, done.stdout
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
    assert done.stdout.split() == ["0", "0", "8"], done.stdout + done.stderr


def test_nothing_is_compiled_by_the_interpreter(capsys: pytest.CaptureFixture[str]) -> None:
    assert compile.main(["--target", "sm_90"]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_an_error_in_a_line_is_its_cause() -> None:
    error = RuntimeError("at 3:4:\n  x = y")
    error.__cause__ = ValueError("no such\nshape")
    assert compile.said(error) == "ValueError: shape"


# The smoke test


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, Callable[..., None]], None]]:
    """After each launch of a kernel, something is done to its arguments."""
    run_it = launch.run

    def spoil(name: str, change: Callable[..., None]) -> None:
        def run_and_change(kernel: Any, programs: int, config: dict[str, int], **arguments: Any) -> None:
            run_it(kernel, programs, config, **arguments)
            if kernel.__name__ == f"_{name}_kernel":
                change(config, **arguments)

        monkeypatch.setattr(launch, "run", run_and_change)

    yield spoil


SMOKE = ["--size", "tiny", "--batch", "1", "--dtype", "float32", "--phase", "eval", "--kind", "parity", "graph"]


def smoked(tmp_path: Path) -> tuple[int, dict[str, journal.Entry]]:
    status = smoke.main([*SMOKE, "--journal", str(tmp_path / "journal.ndjson")])
    entries = [entry for entry in journal.read(tmp_path / "journal.ndjson") if entry["step"] == "smoke"]
    return status, {entry["case"]: entry for entry in entries}


def test_a_kernel_that_raises_is_named(
    tmp_path: Path, spoiled: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: dict[str, int], **arguments: Any) -> None:
        raise RuntimeError("illegal memory access")

    spoiled("conv", fail)
    status, found = smoked(tmp_path)
    assert status == 1 and len(found) == 3 and not any(entry["well"] for entry in found.values())
    out = capsys.readouterr().out
    assert out.count("illegal memory access; last kernel launched: conv") == 3 and "3 cases, 3 failed" in out


def test_a_kernel_that_is_wrong_is_named(
    tmp_path: Path, spoiled: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    spoiled("conv", lambda config, z_ptr, **arguments: z_ptr.mul_(1.001))
    status, found = smoked(tmp_path)
    wrong = [entry for entry in found.values() if not entry["well"]]
    assert status == 1 and len(found) == 3 and len(wrong) == 2  # a graph's replay is wrong in the same way
    assert all("upsample (" in entry["where"] and "conv" in entry["where"] for entry in wrong)
    assert "channel_attention" not in wrong[0]["where"]
    assert "parity tiny, float32, batch 1, eval, contiguous: FAILED" in capsys.readouterr().out


def test_an_element_that_is_not_written_is_found(tmp_path: Path, spoiled: Callable[..., None]) -> None:
    def forget(config: dict[str, int], tokens_ptr: torch.Tensor, **arguments: Any) -> None:
        tokens_ptr.copy_(torch.empty_like(tokens_ptr))

    spoiled("patch_embed", forget)
    assert not any(entry["well"] for case, entry in smoked(tmp_path)[1].items() if case.startswith("parity"))


def test_what_was_right_is_not_checked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, found = smoked(tmp_path)
    assert status == 0 and len(found) == 3 and all(entry["well"] for entry in found.values())
    monkeypatch.setattr(smoke, "perform", lambda case: pytest.fail(case.name))
    assert smoked(tmp_path) == (0, found)


def test_what_was_wrong_is_checked_again(tmp_path: Path, spoiled: Callable[..., None]) -> None:
    spoiled("patch_embed", lambda config, **arguments: arguments["tokens_ptr"].fill_(0))
    assert smoked(tmp_path)[0] == 1
    spoiled("no", lambda config, **arguments: None)
    status, found = smoked(tmp_path)
    assert status == 0 and all(entry["well"] for entry in found.values())


def test_a_case_that_never_ends_is_left_out_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(case: smoke.Case) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(smoke, "perform", hang)
        for _ in range(smoke.TRIES):
            with pytest.raises(KeyboardInterrupt):
                smoked(tmp_path)
    status, found = smoked(tmp_path)
    first = next(iter(found.values()))
    assert status == 1 and len(found) == 3 and not first["well"] and "never ended" in first["found"]


def test_the_judge_sees_gradients_of_parameters() -> None:
    torch.manual_seed(0)
    plain, ours = reference.DCA(TINY.features, None, TINY.patch), DCA(TINY.features, None, TINY.patch, backend="torch")
    ours.load_state_dict(plain.state_dict())
    maps = [torch.randn(2, c, s, s) for c, s in zip(TINY.features, TINY.sides, strict=True)]
    judge = parity.Judge(plain, maps, cases.upstream(maps))
    assert all(value <= 1 for value in judge.excess(ours).values())
    weight = ours.upconvs[0].conv.conv.weight
    weight.register_hook(lambda gradient: 1.001 * gradient)
    ours.__deepcopy__ = lambda memo: ours  # a copy has no hooks
    excess = judge.excess(ours)
    assert {kind for kind, value in excess.items() if value > 1} == {"gradients of parameters"}


# Times of kernels


def test_floors_and_estimates_are_of_kernels_that_there_are() -> None:
    rates = {"copy_bytes_s": 3e12, "matmul_flop_s": 790e12}
    for training in (False, True):
        problem = Problem("dca", cases.SIZES["paper"], 8, torch.bfloat16, training)
        least = kernels.floors(problem, rates)
        known = compile.ESTIMATES["kernels"]["train" if training else "eval"]
        assert known.keys() <= least.keys() and all(least[name] > 0 for name in known)
        for name in known:
            assert kernels.estimated(name, problem) > least[name], name
        one = kernels.floors(dataclasses.replace(problem, batch=1), rates)
        assert sum(least.values()) == pytest.approx(8 * sum(one.values()))
    other = Problem("dca", TINY, 8, torch.bfloat16, False)
    assert not kernels.floors(other, rates) and kernels.estimated("mix", other) is None
    assert not kernels.floors(dataclasses.replace(problem, dtype=torch.float32), rates)  # rates are of one dtype


def test_kernels_are_timed_one_by_one() -> None:
    problem = Problem("dca", TINY, 1, torch.float32, False)
    entries = kernels.measured(problem, {"copy_bytes_s": 1e9, "matmul_flop_s": 1e9})
    names = [entry["kernel"] for entry in entries]
    assert len(set(names)) == 9 and names[-1] == "all" and "spatial_attention" in names
    assert entries[-1]["us"] == pytest.approx(sum(entry["us"] for entry in entries[:-1]))
    assert kernels.kernel_of("void at::native::fill") == kernels.OTHER
    written = [entry | {"step": "kernels"} for entry in entries]
    assert "| eval, batch 1, float32 | mix" in report.kernels(written)


# Tuning


class Row(dict):
    """A configuration that notes what is read of it."""

    def __init__(self, name: str, config: dict[str, int], read: dict[str, set[str]]) -> None:
        super().__init__(config)
        self.read = read.setdefault(name, set())

    def __getitem__(self, key: str) -> int:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str) -> int | None:
        self.read.add(key)
        return super().get(key)


def keys_that_launchers_read(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Of every row of the table, by launches that do not run."""
    read: dict[str, set[str]] = {}
    lookup = launch.configuration
    monkeypatch.setattr(launch, "configuration", lambda name, *c: Row(name, lookup(name, *c), read))
    monkeypatch.setattr(launch, "run", lambda kernel, programs, config, **arguments: launch.compiler_options(config))
    with stand_in.standing_in("sm_90"):
        for name in tune.CANDIDATES:
            for call in tune.calls_of(name, TINY, 1, torch.bfloat16):
                module = DCA(**dict(call.arguments), backend="triton").to(call.dtype).train(call.train)
                layout = torch.channels_last if call.channels_last else torch.contiguous_format
                maps = [torch.empty(1, *s, dtype=call.dtype, memory_format=layout) for s in call.shapes]
                outs = module([x.requires_grad_(call.backward) for x in maps])
                if call.backward:
                    torch.autograd.backward(outs, [torch.empty_like(y) for y in outs])
    return read


def test_every_row_is_tuned_and_nothing_that_no_kernel_has(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(tune.CANDIDATES) == set(ROWS) and set(tune.ORDER) == set(ROWS) and len(tune.ORDER) == len(ROWS)
    read = keys_that_launchers_read(monkeypatch)
    assert set(read) == set(ROWS)
    for name, values in tune.CANDIDATES.items():
        assert values.keys() <= read[name], name
        for first in tune.FIRST.get(name, ()):
            assert first.keys() <= read[name], name
        of_rows = {key for row in ROWS[name]["rows"] for key in row["then"]} - {"ieee"}
        assert of_rows <= read[name], name


def tuned(kernel: str, phases: list[tune.Phase] | None = None) -> tune.Tuned:
    calls = tune.calls_of(kernel, TINY, 1, torch.float32)
    probe = tune.Probe(kernel, phases or [tune.Phase.of(call, CPU) for call in calls])
    return tune.Tuned(probe, calls, 5.0, 5.0, probe.present)


def test_candidates_begin_with_the_promising() -> None:
    present = {"block_n": 64, "block_c": 32, "num_warps": 8, "num_stages": 3}
    promising = [config for first in tune.FIRST["mix"] if (config := present | first) != present]
    found = list(tune.candidates("mix", present))
    assert promising and found[: len(promising)] == promising
    assert present not in found and len(found) == len({str(config) for config in found}) > 50
    capped = {"block_c": 64, "block_k": 32, "num_warps": 4, "num_stages": 2, "maxnreg": 128}
    without_cap = {name: value for name, value in capped.items() if name != "maxnreg"}
    assert without_cap in list(tune.candidates("grid_gradient", capped))


def test_kernels_of_one_row_are_timed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "kernel_milliseconds", lambda call: 1.0)
    conv = tuned("conv").probe
    assert conv.milliseconds(dict(conv.present)) == 3  # in evaluation, in training, and its gradient


def test_tuning_goes_on_past_what_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoiled: Callable[..., None]
) -> None:
    """One candidate does not compile, one raises where it is launched, one is wrong, one is slower, one is faster."""

    def change(config: dict[str, int], tokens_ptr: torch.Tensor, **arguments: Any) -> None:
        if config["num_warps"] == 2:
            raise ValueError("out of resources")
        if config["num_warps"] == 16:
            tokens_ptr.mul_(1.01)

    spoiled("patch_embed", change)
    times = {4: 7.0, 1: 3.0}
    monkeypatch.setattr(tune.Probe, "milliseconds", lambda self, config: times[config["num_warps"]])
    one = tuned("patch_embed")
    assert len(one.probe.phases) == 1  # training has a row of its own
    configs = [one.probe.present | {"num_warps": warps} for warps in (32, 2, 16, 4, 1)]
    jobs = [tune.job_of("patch_embed", one.calls, config) for config in configs]
    compiled = [Compiled(job, 1.0, "CompilationError: no" if i == 0 else None) for i, job in enumerate(jobs)]
    kept: list[tuple[dict[str, int], str | None]] = []
    tune.tune([one], compiled, time.monotonic() + 60, lambda t, config, ms, reason: kept.append((config, reason)))
    assert [config for config, _ in kept] == configs and one.tried == 5 and len(one.failures) == 3
    first, second, third, fourth, fifth = (reason for _, reason in kept)
    assert first == "CompilationError: no" and second == "ValueError: out of resources"
    assert third.startswith("outside the error budget") and fourth is None and fifth is None
    assert one.best == 3.0 and one.config == configs[-1]
    assert "5 tried, 3 failed" in str(one) and "out of resources" in str(one)
    tune.tune([one], compiled, time.monotonic() - 1, lambda *_: pytest.fail("after its time"))


def test_a_lost_gpu_ends_it_with_what_did_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "lost", lambda error: True)
    monkeypatch.setattr(tune.Probe, "excess", lambda self, config: 1 / 0)
    one = tuned("patch_embed")
    compiled = [Compiled(tune.job_of("patch_embed", one.calls, one.probe.present), 1.0, None)] * 2
    kept: list[str] = []
    with pytest.raises(tune.Lost):
        tune.tune([one], compiled, time.monotonic() + 60, lambda t, config, ms, reason: kept.append(reason))
    assert len(kept) == 1 and kept[0].startswith(tune.LOST)


def test_the_fastest_is_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "configurations.json"
    shutil.copy(tune.TABLE, table)
    monkeypatch.setattr(tune, "ready", lambda jobs, target, processes: (Compiled(job, 0.0, None) for job in jobs))
    monkeypatch.setattr(tune.Probe, "milliseconds", lambda self, config: float(config["block_q"]))
    monkeypatch.setattr(tune, "candidates", lambda name, present: iter([present | {"block_q": q} for q in (8, 4)]))
    options = ["--size", "tiny", "--batch", "1", "--dtype", "float32", "--kernel", "patch_embed"]
    assert tune.main([*options, "--table", str(table), "--journal", str(tmp_path / "journal.ndjson")]) == 0
    entries = journal.read(tmp_path / "journal.ndjson")
    assert [(entry["config"]["block_q"], entry["ms"]) for entry in entries] == [(8, 8.0), (4, 4.0)]
    # What was tried is not tried again, and its fastest goes into a table that has it not.
    other = tmp_path / "other.json"
    shutil.copy(tune.TABLE, other)
    assert tune.main([*options, "--table", str(other), "--journal", str(tmp_path / "journal.ndjson")]) == 0
    assert journal.read(tmp_path / "journal.ndjson") == entries and other.read_text() == table.read_text()
    row = json.loads(table.read_text())["patch_embed"]["rows"][0]
    assert row["then"]["block_q"] == 4 and row["if"]["architecture"] == ["interpreter"]
    assert tune.rendered(json.loads(table.read_text())) == table.read_text()


def test_a_measured_row_leaves_those_for_smaller_sizes(tmp_path: Path) -> None:
    table = tmp_path / "configurations.json"
    shutil.copy(tune.TABLE, table)
    before = json.loads(table.read_text())["covariance"]["rows"]
    for value in (7, 8):  # the second in place of the first
        tune.write("covariance", "sm_90", "bfloat16", 8, {"block_c": value}, table)
    rows = json.loads(table.read_text())["covariance"]["rows"]
    new = {"if": {"architecture": ["sm_90"], "dtype": ["bfloat16"]}, "then": {"block_c": 8}}
    assert rows == [*before[:-1], new, before[-1]]
    tune.write("mix", "sm_90", "bfloat16", 256, {"block_n": 32}, table)
    conditions = [row["if"] for row in json.loads(table.read_text())["mix"]["rows"]]
    held_before = conditions.index({"max_size": 256, "dtype": ["bfloat16", "float16"]})
    assert conditions[held_before - 1] == new["if"] | {"max_size": 256}


def test_jobs_take_turns() -> None:
    both = [tuned("patch_embed"), tuned("mix")]
    jobs = list(tune.in_turns(both, 2))
    assert [job.kernel for job in jobs] == ["patch_embed", "mix", "patch_embed", "mix"]
    assert all(job.calls[0].row[0] == job.kernel for job in jobs)
