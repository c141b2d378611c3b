"""The benchmarks at a tiny size: what they write, and that they neither time what is wrong nor leave anything out."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage import data

from benchmarks import cases, compare, determinism, environment, floor, journal, measure, parity, providers, rows, run
from benchmarks.cases import Problem
from benchmarks.group import Group, measured
from benchmarks.measure import Call
from benchmarks.rows import Row
from tests.tools.rows import EFFORT, PLAIN, problem, row, timed

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("no_gpu")


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
    for other in ({"source": "other code"}, {"threads": 64}):
        again.clear()
        monkeypatch.setattr(run, "environment", lambda other=other: environment.environment() | other)
        assert run.main(options) == 0 and again == [1, 2]
    options.remove("2")
    assert run.main(options) == 0 and again == [1, 2, 1]
    assert [r.key for r in rows.load(file)] == [r.key for r in once]  # what was not chosen stays


def test_a_row_that_was_not_run_is_run_where_it_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--case", "patch_embed", "--size", "tiny", "--batch", "1", "--phase", "eval", "--no-memory"]
    options += ["--seconds", "0.1", "--provider", "torch", "torch graph", "--out", str(tmp_path / "run.jsonl")]
    assert run.main([*options, "--longest", "1e-9"]) == 0
    assert run.main(options) == 0
    found = {r.provider: r for r in rows.load(tmp_path / "run.jsonl")}
    assert found["torch"].p50_ms is not None and found["torch graph"].not_run == "no GPU"
    monkeypatch.setattr(run, "measured", None)  # is not called: there is no GPU still
    assert run.main(options) == 0


class OutOfResources(Exception):
    """As Triton's, of no kind of Python's."""


@pytest.mark.parametrize(
    ("error", "wrong"), [(OutOfResources("shared memory"), True), (torch.OutOfMemoryError("full"), False)]
)
def test_ours_that_raises_is_wrong_and_others_go_on(
    error: Exception, wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(dca: object, maps: object) -> None:
        raise error

    monkeypatch.setattr("dca_kernels.DCA.forward", raises)
    one = dataclasses.replace(problem("dca"), batch=1)
    found = {
        r.provider: r for r in measured(Group("tiny", one, tuple(PLAIN), ("forward",)), np.zeros((9, 9, 3)), EFFORT)
    }
    assert found["reference"].p50_ms is not None
    assert found["torch"].not_run.startswith(type(error).__name__) and found["torch"].wrong == wrong


def test_a_step_without_gradients_of_parameters_is_wrong() -> None:
    """It would be faster."""
    one = dataclasses.replace(problem("dca", True), batch=1)
    gate = parity.Gate(one, *providers.inputs_of(one, cases.load_image(None), measure.device()))
    subject = gate.subject(providers.PROVIDERS["torch"])
    assert gate.check(subject)[1]
    module, detached = subject.module, {name: p.detach() for name, p in subject.module.named_parameters()}
    subject.module = lambda *maps: torch.func.functional_call(module, detached, maps)
    assert not gate.check(subject)[1]


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


@pytest.mark.parametrize(("error", "status"), [(OutOfResources("shared memory"), 1), (MemoryError("full"), 0)])
def test_an_error_of_a_whole_group_fails_the_run(
    error: Exception, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the rest is measured."""

    def measured(group: Group, *rest: object) -> list[Row]:
        if group.problem.batch == 1:
            raise error
        return [timed(group, "torch", 1.0)]

    monkeypatch.setattr(run, "measured", measured)
    options = ["--case", "dca", "--size", "tiny", "--batch", "1", "2", "--phase", "eval", "--provider", "torch"]
    assert run.main([*options, "--out", str(tmp_path / "run.jsonl")]) == status
    first, second = rows.load(tmp_path / "run.jsonl")
    assert first.not_run.startswith(type(error).__name__) and first.raised == bool(status) and second.p50_ms == 1.0


def test_results_do_not_change_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`gpu` copies the configurations beside its results: what it found after that was another code's."""
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "RESULTS", tmp_path / "benchmarks" / "results")

    def with_file(name: str) -> str:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
        return environment.source.__wrapped__()

    first = with_file("dca_kernels/triton_backend/configurations.json")
    assert with_file("benchmarks/results/latest/gpu/configurations.json") == first
    assert with_file("benchmarks/new.py") != first
    unconfigured = [environment.source.__wrapped__(configured=False)]
    (tmp_path / "dca_kernels/triton_backend/configurations.json").write_text("[]")  # as `tune` does
    unconfigured += [environment.source.__wrapped__(configured=False)]
    assert unconfigured[0] == unconfigured[1] != first and environment.source.__wrapped__() != first


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
