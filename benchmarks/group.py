"""One case at one size: its providers are built, checked against float64, timed in turns and weighed."""

import dataclasses
import multiprocessing
import signal
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from benchmarks import calibrate, floor, measure, parity, providers
from benchmarks.cases import Problem
from benchmarks.environment import environment
from benchmarks.measure import Call
from benchmarks.providers import PROVIDERS, Graphed, Provider, Subject
from benchmarks.rows import STEP_NAMES, Row


@dataclass(frozen=True)
class Group:
    """A problem, its providers and modes: what is built, checked and timed together."""

    size: str
    problem: Problem
    providers: tuple[str, ...]
    modes: tuple[str, ...]

    def __str__(self) -> str:
        step = STEP_NAMES["train" if self.problem.training else "eval", self.modes[-1]]
        return f"{self.problem.case}, {step}, batch {self.problem.batch}"

    def row(self, provider: str, mode: str, **values: Any) -> Row:
        problem = self.problem
        return Row(
            case=problem.case,
            size=self.size,
            patch=problem.size.patch,
            batch=problem.batch,
            dtype=str(problem.dtype).removeprefix("torch."),
            phase="train" if problem.training else "eval",
            mode=mode,
            provider=provider,
            **values,
        )


@dataclass(frozen=True)
class Effort:
    """How long a group is timed, the longest call that is, and whether memory is measured."""

    seconds: float = 10.0
    longest: float = 20.0
    memory: bool = True
    small: bool = False  # one round, and calibration with small arrays: for tests


def call_of(subject: Subject, mode: str) -> Call:
    if mode == "forward":
        return Call(subject.release, subject.forward)
    if mode == "backward":
        return Call(subject.forward, subject.backward)

    def full() -> None:
        subject.forward()
        subject.backward()

    return Call(subject.release, full)


def measured(group: Group, image: np.ndarray, effort: Effort = Effort()) -> list[Row]:
    """The rows of a group: parity first, and no time of what is outside its budget."""
    device, problem = measure.device(), group.problem
    shared: dict[str, Any] = {"environment": environment()}
    found: dict[tuple[str, str], dict[str, Any]] = {}
    calls: dict[str, dict[str, Call]] = {mode: {} for mode in group.modes}
    if any(PROVIDERS[name].compiled for name in group.providers):
        torch.compiler.reset()  # the limit of recompilations is one module's, not a process's
    if device.type == "cuda":
        torch.cuda.empty_cache()

    batch = parity.gate_batch(problem, device)
    gate = inputs = None
    for name in group.providers:
        reasons = {mode: providers.why_not(PROVIDERS[name], problem, mode, device) for mode in group.modes}
        if batch == 0:
            needed = dataclasses.replace(problem, batch=1).reference_bytes(8)
            reasons = {mode: reasons[mode] or f"parity needs about {needed / 1e9:.0f} GB of memory" for mode in reasons}
        runnable = [mode for mode, reason in reasons.items() if reason is None]
        values: dict[str, Any] = {}
        if runnable:
            if gate is None:
                inputs = providers.inputs_of(problem, image, device)
                smaller = dataclasses.replace(problem, batch=batch)
                same = batch == problem.batch
                gate = parity.Gate(smaller, *(inputs if same else providers.inputs_of(smaller, image, device)))
            values, subject = _checked(gate, PROVIDERS[name], problem, inputs, effort)
            for mode in runnable if subject is not None else []:
                calls[mode][name] = call_of(subject, mode)
        for mode in group.modes:
            found[name, mode] = values if reasons[mode] is None else {"not_run": reasons[mode]}
    del gate, inputs

    for mode, of_mode in calls.items():
        if not of_mode:
            continue
        shared_of_mode = _floor(problem, mode, effort)
        rounds = 1
        if not effort.small:
            one_round = measure.seconds(lambda calls=of_mode: list(measure.latency(calls, 1)))
            rounds = measure.rounds_for(one_round, effort.seconds / len(group.modes))
        for samples in measure.latency(of_mode, rounds):  # noqa: B007  the last round has them all
            pass
        for name, call in of_mode.items():
            times, hosts = zip(*samples[name], strict=True)
            host = None if hosts[0] is None else float(np.median(hosts))
            found[name, mode] = (
                found[name, mode] | measure.percentiles(times) | {"rounds": rounds, "host_ms": host} | shared_of_mode
            )
            if device.type == "cuda":
                call.prepare()
                found[name, mode]["launches"] = measure.count_launches(call.run)
                # A graph's memory is taken when it is captured, and stays.
                weighed = effort.memory and not PROVIDERS[name].graph
                found[name, mode] |= measure.memory(call) if weighed else {}
            call.prepare()
    if device.type == "cpu" and effort.memory:
        for name in dict.fromkeys(name for of_mode in calls.values() for name in of_mode):
            for mode, counts in _memory_elsewhere(name, problem, image, [m for m in calls if name in calls[m]]).items():
                found[name, mode] = found[name, mode] | counts
    return [group.row(name, mode, **shared, **values) for (name, mode), values in found.items()]


def _checked(
    gate: parity.Gate, provider: Provider, problem: Problem, inputs: Any, effort: Effort
) -> tuple[dict[str, Any], Subject | None]:
    """What a provider's rows share, and its subject where it is to be timed.

    Nothing of ours is timed outside of the error budget. What a compiler makes of the reference is timed, and marked.
    """
    try:
        subject = gate.subject(provider)
        error, well, first = gate.check(subject)
        values: dict[str, Any] = {}
        if provider.implementation != "without":  # which is another network
            values = {"parity": well, "max_error": error.largest, "rms_error": error.rms}
            values["parity_batch"] = gate.problem.batch
        if not well and provider.ours:
            return values | {"not_run": "outside its error budget"}, None
        if gate.problem != problem:
            subject = providers.build(provider, problem, *inputs)
            first = measure.seconds(call_of(subject, "full" if subject.has_backward else "forward").run)
        values["first_ms"] = first * 1e3
        if provider.graph:
            subject = Graphed(subject)
        call = call_of(subject, "full" if subject.has_backward else "forward")
        second = 0.0 if effort.small else _prepared_seconds(call)
    except (RuntimeError, MemoryError) as error:  # out of memory, a compiler's or a launch's error
        if lost(error):
            raise
        traceback.clear_frames(error.__traceback__)
        return {"not_run": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"}, None
    if second > effort.longest:
        return values | {"not_run": f"a call takes {second:.0f} s, more than {effort.longest:g} s"}, None
    return values, subject


def lost(error: BaseException) -> bool:
    """Whether the GPU answers no more."""
    if not torch.cuda.is_available() or isinstance(error, torch.cuda.OutOfMemoryError):
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _prepared_seconds(call: Call) -> float:
    call.prepare()
    return measure.seconds(call.run)


def _floor(problem: Problem, mode: str, effort: Effort) -> dict[str, float | None]:
    rates = calibrate.rates(problem.dtype, effort.small)
    return {"floor_ms": floor.milliseconds(problem, mode, rates), **rates}


def _memory_elsewhere(
    name: str, problem: Problem, image: np.ndarray, modes: Sequence[str]
) -> dict[str, dict[str, float | int | None]]:
    """`measure.memory` of each mode, in a fresh process."""
    spawn = multiprocessing.get_context("spawn")
    mine, its = spawn.Pipe()
    child = spawn.Process(target=_serve_memory, args=(its,), daemon=True)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the child inherits: Ctrl-C is for the parent
    try:
        child.start()
    finally:
        signal.signal(signal.SIGINT, before)
    its.close()
    try:
        mine.send((name, problem, image, modes, torch.get_num_threads()))
        return mine.recv()
    except (EOFError, OSError):  # killed for want of memory: the times still stand
        return {}
    finally:
        child.kill()
        child.join()


def _serve_memory(connection: Connection) -> None:
    connection.send(_memory(*connection.recv()))


def _memory(
    name: str, problem: Problem, image: np.ndarray, modes: Sequence[str], threads: int
) -> dict[str, dict[str, float | int | None]]:
    torch.set_num_threads(threads)
    provider = PROVIDERS[name]
    subject = providers.build(provider, problem, *providers.inputs_of(problem, image, measure.device()))
    counts = {}
    for mode in modes:
        call = call_of(subject, mode)
        call.prepare()
        call.run()
        counts[mode] = measure.memory(call)
    return counts
