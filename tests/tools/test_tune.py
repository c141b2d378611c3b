"""Times of kernels, and tuning; the kernels are interpreted."""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import cases, journal, kernels, report, tune
from benchmarks.cases import Problem
from benchmarks.offline import stand_in
from benchmarks.offline.compile import Compiled
from dca_kernels import DCA
from dca_kernels.triton_backend import launch
from tests.oracle import INTERPRETED

TINY = cases.SIZES["tiny"]
CPU = torch.device("cpu")
ROWS = json.loads(tune.TABLE.read_text())

pytestmark = [pytest.mark.skipif(not INTERPRETED, reason="made for the interpreter"), pytest.mark.slow]


# Times of kernels


def test_floors_and_estimates_are_of_kernels_that_there_are() -> None:
    rates = {"copy_bytes_s": 3e12, "matmul_flop_s": 790e12}
    for training in (False, True):
        problem = Problem("dca", cases.SIZES["paper"], 8, torch.bfloat16, training)
        least, expected = kernels.floors(problem, rates), kernels.estimates(problem)
        # Sums of many images are put together by a launch of their own.
        assert expected.keys() - least.keys() <= {"all", "sum_partials"}
        for name, floor in least.items():
            assert 0 < floor < expected[name], name
        one = kernels.floors(dataclasses.replace(problem, batch=1), rates)
        assert sum(least.values()) == pytest.approx(8 * sum(one.values()))
    other = Problem("dca", TINY, 8, torch.bfloat16, False)
    assert not kernels.floors(other, rates) and not kernels.estimates(other)
    assert not kernels.floors(dataclasses.replace(problem, dtype=torch.float32), rates)  # rates are of one dtype


def test_kernels_are_timed_one_by_one() -> None:
    problem = Problem("dca", TINY, 1, torch.float32, False)
    entries = kernels.measured(problem, {"copy_bytes_s": 1e9, "matmul_flop_s": 1e9})
    names = [entry["kernel"] for entry in entries]
    assert len(set(names)) == 10 and names[-1] == "all" and "spatial_attention" in names
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
            for call in tune.calls_of(name, TINY, 2, torch.bfloat16):  # of one image nothing is summed
                module = DCA(**dict(call.arguments), backend="triton").to(call.dtype).train(call.train)
                layout = torch.channels_last if call.channels_last else torch.contiguous_format
                maps = [torch.empty(call.batch, *s, dtype=call.dtype, memory_format=layout) for s in call.shapes]
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
    present = {"block_n": 64, "block_c": 64, "block_k": 64, "num_warps": 4, "num_stages": 3}
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

    def change(config: dict[str, int], tokens: torch.Tensor, **arguments: Any) -> None:
        if config["num_warps"] == 2:
            raise ValueError("out of resources")
        if config["num_warps"] == 16:
            tokens.mul_(1.01)

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
    tune.write("mixing", "sm_90", "bfloat16", 256, {"block_c": 16}, table)
    conditions = [row["if"] for row in json.loads(table.read_text())["mixing"]["rows"]]
    held_before = conditions.index({"architecture": ["sm_90"], "dtype": ["bfloat16", "float16"], "max_size": 512})
    assert conditions[held_before - 1] == new["if"] | {"max_size": 256}


def test_jobs_take_turns() -> None:
    both = [tuned("patch_embed"), tuned("mix")]
    jobs = list(tune.in_turns(both, 2))
    assert [job.kernel for job in jobs] == ["patch_embed", "mix", "patch_embed", "mix"]
    assert all(job.calls[0].row[0] == job.kernel for job in jobs)
