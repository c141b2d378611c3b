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
    one = _Measurement(group, image, effort)
    one.prepare()
    one.check()
    one.time()
    one.weigh()
    return [group.row(*pair, environment=environment(), **values) for pair, values in one.found.items()]


class _Measurement:
    """What is known of a group so far.

    Attributes:
        found: values of each row, by provider and mode.
        calls: what is timed, by mode and provider.
    """

    def __init__(self, group: Group, image: np.ndarray, effort: Effort) -> None:
        self.group, self.problem, self.image, self.effort = group, group.problem, image, effort
        self.device = measure.device()
        self.found: dict[tuple[str, str], dict[str, Any]] = {}
        self.calls: dict[str, dict[str, Call]] = {mode: {} for mode in group.modes}

    def prepare(self) -> None:
        """Let go of what earlier groups left."""
        if any(PROVIDERS[name].compiled for name in self.group.providers):
            torch.compiler.reset()  # the limit of recompilations is one module's, not a process's
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def check(self) -> None:
        """Hold each provider that runs here to float64, and keep its calls where it is to be timed."""
        batch = parity.gate_batch(self.problem, self.device)
        checked = None
        for name in self.group.providers:
            reasons = self._reasons(name, batch)
            runnable = [mode for mode, reason in reasons.items() if reason is None]
            values: dict[str, Any] = {}
            if runnable:
                checked = checked or self._gate(batch)
                gate, inputs = checked
                values, subject = _checked(gate, PROVIDERS[name], self.problem, inputs, self.effort)
                for mode in runnable if subject is not None else []:
                    self.calls[mode][name] = call_of(subject, mode)
            for mode, reason in reasons.items():
                self.found[name, mode] = dict(values) if reason is None else {"not_run": reason}

    def _reasons(self, name: str, batch: int) -> dict[str, str | None]:
        """Why a provider is not run in each mode, or None where it is; `batch` is the gate's."""
        too_large = None
        if batch == 0:
            needed = dataclasses.replace(self.problem, batch=1).reference_bytes(8)
            too_large = f"parity needs about {needed / 1e9:.0f} GB of memory"
        return {
            mode: providers.why_not(PROVIDERS[name], self.problem, mode, self.device) or too_large
            for mode in self.group.modes
        }

    def _gate(self, batch: int) -> tuple[parity.Gate, Any]:
        """The gate at its batch, and the inputs and upstream gradients of the problem."""
        inputs = providers.inputs_of(self.problem, self.image, self.device)
        if batch == self.problem.batch:
            return parity.Gate(self.problem, *inputs), inputs
        smaller = dataclasses.replace(self.problem, batch=batch)
        return parity.Gate(smaller, *providers.inputs_of(smaller, self.image, self.device)), inputs

    def time(self) -> None:
        """Time the calls of each mode in turns."""
        for mode, calls in self.calls.items():
            if not calls:
                continue
            least = _floor(self.problem, mode, self.effort)
            rounds = 1
            if not self.effort.small:
                one_round = measure.seconds(lambda calls=calls: list(measure.latency(calls, 1)))
                rounds = measure.rounds_for(one_round, self.effort.seconds / len(self.group.modes))
            *_, samples = measure.latency(calls, rounds)
            for name, call in calls.items():
                times, hosts = zip(*samples[name], strict=True)
                host = None if hosts[0] is None else float(np.median(hosts))
                self.found[name, mode] |= measure.percentiles(times) | {"rounds": rounds, "host_ms": host} | least
                call.prepare()

    def weigh(self) -> None:
        """Count launches on a GPU, and measure memory: there by the allocator, on a CPU in a process for each."""
        if self.device.type == "cuda":
            for mode, calls in self.calls.items():
                for name, call in calls.items():
                    self._count(name, mode, call)
        elif self.effort.memory:
            for name in self.group.providers:
                modes = [mode for mode, calls in self.calls.items() if name in calls]
                found = _memory_elsewhere(name, self.problem, self.image, modes) if modes else {}
                for mode, counts in found.items():
                    self.found[name, mode] |= counts

    def _count(self, name: str, mode: str, call: Call) -> None:
        call.prepare()
        self.found[name, mode]["launches"] = measure.count_launches(call.run)
        if self.effort.memory and not PROVIDERS[name].graph:  # a graph's is taken when it is captured, and stays
            self.found[name, mode] |= measure.memory(call)
        call.prepare()


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
    except Exception as error:  # out of memory, a compiler's or a launch's error: Triton's are of kinds of their own
        if lost(error):
            raise
        traceback.clear_frames(error.__traceback__)
        return {"not_run": first_line(error), "raised": provider.ours and not wants_memory(error)}, None
    if second > effort.longest:
        return values | {"not_run": f"a call takes {second:.0f} s, more than {effort.longest:g} s"}, None
    return values, subject


def first_line(error: BaseException) -> str:
    """What rows say of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def wants_memory(error: BaseException) -> bool:
    """Whether it says that the machine is too small."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


class Lost(RuntimeError):
    """The GPU answers no more."""


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
