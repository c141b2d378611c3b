"""`python -m benchmarks compile`: kernels compiled ahead, each once, in parallel processes and without a GPU.

Triton keeps what it compiled in a folder, in the home directory or where TRITON_CACHE_DIR says, and a process that
launches the same kernel for the same kind of GPU finds it there. The smoke test and tuning compile by this, then run.

How long that takes is estimated from the seconds that each kernel took once (estimates.json). What a plain `make gpu`
needs, the paper's module in four dtypes, both layouts, evaluation and training, and the golden vectors, is 290 kernels:
about 10 minutes of one core, which makes three quarters of a minute of 16.
"""

import argparse
import concurrent.futures
import contextlib
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import dca_kernels
from benchmarks import cases, command, console, journal, measure
from benchmarks.cases import Size
from benchmarks.offline import stand_in
from benchmarks.offline.machine_code import Launch, digest, launches_of
from dca_kernels.triton_backend import launch

ESTIMATES = json.loads((Path(__file__).parents[1] / "estimates.json").read_text())
START = 8.0  # seconds until all processes are there: an estimate

Pairs = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Call:
    """A forward, or a forward and backward, of a module: what it launches is compiled.

    Attributes:
        shapes: (C_i, H_i, W_i) of each map.
        train: BatchNorm's mode.
        arguments: of the module.
        row: the name of a row of `configurations.json` and what it is replaced by: its launches alone are compiled.
    """

    shapes: tuple[tuple[int, int, int], ...]
    batch: int
    dtype: torch.dtype
    train: bool
    backward: bool
    channels_last: bool
    arguments: Pairs
    row: tuple[str, Pairs] | None = None

    @classmethod
    def of(
        cls, size: Size, batch: int, dtype: torch.dtype, train: bool, channels_last: bool, **arguments: Any
    ) -> "Call":
        """As the benchmarks call it: a backward in training alone."""
        shapes = tuple((c, side, side) for c, side in zip(size.features, size.sides, strict=True))
        module = {"features": size.features, "patch": size.patch} | arguments
        return cls(shapes, batch, dtype, train, train, channels_last, tuple(module.items()))

    def launches(self, target: str) -> list[Launch]:
        """As Triton's JIT is asked for them on the target; none runs."""
        module = dca_kernels.DCA(**dict(self.arguments), backend="triton").to(self.dtype).train(self.train)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        maps = [torch.empty(self.batch, *shape, dtype=self.dtype, memory_format=layout) for shape in self.shapes]
        with contextlib.nullcontext() if self.row is None else only(self.row[0], dict(self.row[1])):
            return launches_of(module, maps, self.backward, target)


@contextlib.contextmanager
def replaced(name: str, config: dict[str, int]) -> Iterator[None]:
    """Kernels whose row of `configurations.json` has this name take `config` instead: this object."""
    lookup = launch.configuration

    def configuration(kernel: str, *conditions: Any) -> dict[str, int]:
        return config if kernel == name else lookup(kernel, *conditions)

    with mock.patch.object(launch, "configuration", configuration):
        yield


@contextlib.contextmanager
def only(name: str, config: dict[str, int]) -> Iterator[None]:
    """As `replaced`, and nothing else is launched."""
    run = launch.run

    def run_its_own(kernel: Any, programs: int, its_config: dict[str, int], **arguments: Any) -> None:
        if its_config is config:
            run(kernel, programs, its_config, **arguments)

    with replaced(name, config), mock.patch.object(launch, "run", run_its_own):
        yield


@dataclass(frozen=True)
class Job:
    """Launches of some calls: of each one, or all; `kernel` names them."""

    calls: tuple[Call, ...]
    kernel: str
    which: int | None = None

    @property
    def seconds(self) -> float:
        """An estimate."""
        of_kernel = ESTIMATES["compile_seconds"].get(self.kernel, {"float32": 3.0})
        return of_kernel.get(str(self.calls[0].dtype).removeprefix("torch."), max(of_kernel.values()))


@dataclass(frozen=True)
class Compiled:
    """What became of a job; `error` is one line."""

    job: Job
    seconds: float
    error: str | None


def distinct(calls: Iterable[Call], target: str) -> list[Job]:
    """One job for each launch that is compiled to something of its own, the longest first."""
    jobs: dict[str, Job] = {}
    for call in calls:
        launches = call.launches(target)
        with stand_in.standing_in(target):
            for i, one in enumerate(launches):
                jobs.setdefault(digest(one), Job((call,), one.name, i))
    return sorted(jobs.values(), key=lambda job: -job.seconds)


def estimate(jobs: Sequence[Job], processes: int) -> float:
    """Seconds for all of them."""
    return START + max([sum(job.seconds for job in jobs) / processes, *(job.seconds for job in jobs)])


def perform(job: Job, target: str) -> Compiled:
    begin = time.perf_counter()
    error = None
    try:
        for call in job.calls:
            launches = call.launches(target)
            with stand_in.standing_in(target):
                for one in launches if job.which is None else [launches[job.which]]:
                    one.compile()
    except Exception as raised:  # whatever a compiler says: the others go on
        error = said(raised)
    return Compiled(job, time.perf_counter() - begin, error)


def said(error: BaseException) -> str:
    """An exception in one line: Triton wraps what went wrong in where it did, PyTorch puts what the GPU says first."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    line = lines[0] if isinstance(error, torch.AcceleratorError) else lines[-1]
    return f"{type(error).__name__}: {line[:200]}"


class Pool:
    """Processes that compile for a target, until the block ends."""

    def __init__(self, target: str, processes: int) -> None:
        spawn = multiprocessing.get_context("spawn")  # a forked child would wait for the threads of its parent
        self.target, self._pool = target, concurrent.futures.ProcessPoolExecutor(processes, mp_context=spawn)
        self._jobs: dict[concurrent.futures.Future[Compiled], Job] = {}

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error: object) -> None:
        """Without waiting for what is still compiled: kernels that no one asks for any more."""
        workers = list((self._pool._processes or {}).values())  # no public way before Python 3.14
        self._pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.kill()

    def submit(self, jobs: Iterable[Job]) -> None:
        with mock.patch.dict(os.environ):
            os.environ.pop("TRITON_INTERPRET", None)  # a process that is started here compiles, whatever this one does
            self._jobs |= {self._pool.submit(perform, job, self.target): job for job in jobs}

    def done(self) -> Iterator[Compiled]:
        """Each as soon as it is compiled."""
        for future in concurrent.futures.as_completed(list(self._jobs)):
            try:
                yield future.result()
            except BrokenProcessPool:
                yield Compiled(self._jobs[future], 0.0, "the process that compiled it, or another one, died")


def processes() -> int:
    return len(os.sched_getaffinity(0))


def target_here() -> str | None:
    """The GPU's, or None without one."""
    device = measure.device()
    return launch.architecture(torch.device("cuda", 0)) if device.type == "cuda" else None


def calls_of(
    sizes: Sequence[Size], batches: Sequence[int], dtypes: Sequence[torch.dtype], phases: Sequence[str]
) -> list[Call]:
    """The module in both layouts of its maps."""
    return [
        Call.of(size, batch, dtype, phase == "train", channels_last)
        for size, dtype, batch, phase, channels_last in itertools.product(sizes, dtypes, batches, phases, (False, True))
    ]


def golden_calls() -> list[Call]:
    """Those of the golden vectors, in float64."""
    from tests.oracle import GOLDEN, Golden  # here: it needs pytest

    found = []
    for golden in map(Golden, GOLDEN):
        shapes = tuple(tuple(x.shape[1:]) for x in golden.maps)
        arguments = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in golden.arguments.items())
        batch = golden.maps[0].shape[0]
        found.append(Call(shapes, batch, torch.float64, golden.train, True, False, arguments))
    return found


def parser() -> argparse.ArgumentParser:
    parser = command.parser(
        "compile",
        "Compiles the kernels of the module, in both layouts of its maps, and of the golden vectors, for a kind of GPU "
        "that need not be here. A process that has TRITON_CACHE_DIR set to the same folder then compiles none of them. "
        "The folder may be carried to a machine with the same Python, Triton and sources, if it is named by a path "
        "relative to this repository, here and there.",
        "--target sm_90 --count   # how many there are",
        "--target sm_90 --dtype bfloat16 --batch 8 --out build/kernels",
    )
    here = target_here()
    parser.add_argument(
        "--target",
        choices=stand_in.TARGETS,
        default=here,
        required=here is None,
        help=f"{command.listed(stand_in.EXAMPLES)}; without a GPU it must be named",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="the cache (default: Triton's own)")
    parser.add_argument("--size", nargs="+", choices=cases.SIZES, default=["paper"], help=command.sizes())
    parser.add_argument(
        "--batch", nargs="+", type=command.positive_integer, default=[1, 2, 8, 32], metavar="B", help=command.BATCH
    )
    parser.add_argument("--dtype", nargs="+", choices=cases.DTYPES, default=list(cases.DTYPES), help=command.DTYPE)
    parser.add_argument(
        "--phase", nargs="+", choices=cases.MODES, default=list(cases.MODES), help=command.listed(command.PHASES)
    )
    parser.add_argument("--no-golden", action="store_true", help="without the kernels of the golden vectors")
    parser.add_argument(
        "--processes",
        type=command.positive_integer,
        default=processes(),
        metavar="N",
        help="processes that compile at a time",
    )
    parser.add_argument("--count", action="store_true", help="only say how many there are, and estimate the time")
    parser.add_argument("--journal", type=command.file, metavar="FILE", help=command.JOURNAL)
    return parser


def compile_all(jobs: Sequence[Job], chosen: argparse.Namespace) -> int:
    """How many failed: each is said, and written to the journal."""
    failed = 0
    with Pool(chosen.target, chosen.processes) as pool:
        pool.submit(jobs)
        for one in console.progress(pool.done(), desc="compiling", total=len(jobs), mininterval=5):
            if one.error is not None:
                failed += 1
                call = str(one.job.calls[0])
                print(f"{one.job.kernel}: FAILED to compile: {one.error}; {call}", flush=True)
                journal.write(chosen.journal, "compile", kernel=one.job.kernel, failed=one.error, call=call)
    return failed


def main(arguments: Sequence[str]) -> int:
    chosen = parser().parse_args(arguments)
    reason = stand_in.why_not_compiled()
    if reason is not None:
        return command.not_run("compile", reason, "unset it")
    if chosen.target not in stand_in.TARGETS:
        print(f"compile: not run: nothing stands in for {chosen.target}; kernels are compiled where they are launched")
        return 0
    if chosen.out is not None:
        os.environ["TRITON_CACHE_DIR"] = str(chosen.out)
    dtypes = [cases.DTYPES[name] for name in chosen.dtype]
    calls = calls_of([cases.SIZES[name] for name in chosen.size], chosen.batch, dtypes, chosen.phase)
    jobs = distinct(calls if chosen.no_golden else [*golden_calls(), *calls], chosen.target)
    seconds = estimate(jobs, chosen.processes)
    print(f"{len(jobs)} kernels in {chosen.processes} processes, estimated {seconds:.0f} s from nothing", flush=True)
    if chosen.count:
        return 0
    begin = time.monotonic()
    failed = compile_all(jobs, chosen)
    took = round(time.monotonic() - begin, 1)
    counts = {"kernels": len(jobs), "failures": failed, "seconds": took, "estimated_seconds": round(seconds)}
    journal.write(chosen.journal, "compile", target=chosen.target, processes=chosen.processes, **counts)
    print(f"compiled in {took} s, {failed} failed")
    return 1 if failed else 0
