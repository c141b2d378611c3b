"""`python -m tests.fuzz`: calls that nobody thought of, drawn by hypothesis until the time is up.

Each is a module and a call of it (tests/strategies.py): outputs, gradients and buffers are compared with the reference
in float64. A seed stands for some calls, the same ones every time. What fails is made as small as it can be, and shown
with its seed; a process that dies is a failure too. Without a GPU the kernels are interpreted.
"""

from tests import conftest  # isort: skip  # it sets what NumPy and Triton read when they are imported

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import random
import sys
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from benchmarks import command, console, journal
from benchmarks.environment import environment
from tests.oracle import BACKENDS
from tests.strategies import LARGEST, Call, calls, check

CALLS = {"torch": 40, "triton": 8}  # that a seed stands for: some seconds
ENOUGH = 5  # failures, after which nothing more is drawn


@dataclass
class Drawn:
    """The calls of a seed.

    Attributes:
        calls: how many differ. The simplest call, with which every seed begins, is not counted.
        seconds: that they took.
        over: of how many one draw was over its budget, so that DRAWS of them decided.
        parts: the largest part of a budget that a first draw used, by dtype and kind of result.
        failure: what the smallest call that failed said, and that call; None where none failed.
    """

    backend: str
    seed: int
    calls: int = 0
    seconds: float = 0.0
    over: int = 0
    parts: dict[str, float] = field(default_factory=dict)
    failure: str | None = None


def draw(backend: str, number: int) -> Drawn:
    """Check the calls that a seed stands for."""
    drawn, seen = Drawn(backend, number), set()
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", module=r"triton\.runtime\.interpreter")
    warnings.filterwarnings("ignore", "(invalid value|overflow|divide by zero) encountered", RuntimeWarning)

    @seed(number)
    @settings(
        max_examples=CALLS[backend] + 1,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(call=calls(backend, LARGEST[backend]))
    def check_all(call: Call) -> None:
        parts = check(call, backend)
        seen.add(call)
        drawn.over += any(part > 1 for part in parts.values())
        for kind, part in parts.items():
            name = f"{call.dtype} {kind}"
            drawn.parts[name] = max(part, drawn.parts.get(name, 0.0))

    begin = time.monotonic()
    try:
        with pytest.MonkeyPatch.context() as patch:
            conftest.poison(patch)
            check_all()
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        drawn.failure = "\n".join([said, *getattr(error, "__notes__", [])])
    drawn.calls, drawn.seconds = max(len(seen) - 1, 0), time.monotonic() - begin
    return drawn


def _end_with_parent() -> None:
    """Let this process of a pool end where its parent has: one that was killed tells it nothing."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def campaign(chosen: argparse.Namespace, done: Sequence[Drawn]) -> Iterator[Drawn]:
    """Seeds one after another, those that are done left out, until the time is up or there are calls enough."""
    end, drawn = time.monotonic() + 60 * chosen.minutes, {(one.backend, one.seed) for one in done}
    counts, seconds = defaultdict(int), defaultdict(float)
    for one in done:
        counts[one.backend] += one.calls
    following = {backend: chosen.seed for backend in chosen.backend}
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(chosen.processes, spawn, _end_with_parent) as pool:
        running: dict[concurrent.futures.Future[Drawn], tuple[str, int]] = {}
        while True:
            wanted = [b for b in chosen.backend if chosen.calls is None or counts[b] < chosen.calls]
            while wanted and time.monotonic() < end and len(running) < chosen.processes:
                backend = min(wanted, key=lambda b: seconds[b])
                while (backend, following[backend]) in drawn:
                    following[backend] += 1
                running[pool.submit(draw, backend, following[backend])] = backend, following[backend]
                following[backend] += 1
                seconds[backend] += CALLS["torch"] / CALLS[backend]  # until it is known
            if not running:
                return
            finished, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in finished:
                backend, number = running.pop(future)
                try:
                    one = future.result()
                except BrokenProcessPool:  # all that run in it fail, and no other can
                    yield Drawn(backend, number, failure="a process died, this seed's or another one's of these")
                    for backend, number in running.values():
                        yield Drawn(backend, number, failure="a process died, this seed's or another one's of these")
                    return
                counts[backend] += one.calls
                seconds[backend] += one.seconds
                yield one


def totals(drawn: Sequence[Drawn]) -> dict[str, dict[str, object]]:
    """Of each backend."""
    found = {}
    for backend in BACKENDS:
        its = [one for one in drawn if one.backend == backend]
        parts: dict[str, float] = defaultdict(float)
        for one in its:
            for name, part in one.parts.items():
                parts[name] = max(parts[name], part)
        if its:
            found[backend] = {
                "calls": sum(one.calls for one in its),
                "seeds": len(its),
                "over": sum(one.over for one in its),
                "failures": sum(one.failure is not None for one in its),
                "seconds": round(sum(one.seconds for one in its)),
                "parts": {name: round(part, 2) for name, part in sorted(parts.items())},
            }
    return found


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__, formatter_class=command.Help)
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--minutes", type=command.positive_number, default=10.0, help="after which no seed is begun")
    parser.add_argument("--calls", type=command.positive_integer, metavar="N", help="of a backend, that are enough")
    parser.add_argument("--seed", type=int, help="the first one; drawn, and printed, where it is not given")
    parser.add_argument("--journal", type=Path, metavar="FILE", help="what is done, to go on from")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the totals there")
    parser.add_argument("--processes", type=command.positive_integer, default=2, metavar="N")
    chosen = parser.parse_args(arguments)
    names = Drawn.__dataclass_fields__
    done = [Drawn(**{name: entry[name] for name in names}) for entry in journal.read(chosen.journal)]
    if chosen.seed is None:
        chosen.seed = min((one.seed for one in done), default=random.SystemRandom().randrange(10**9))
    print(f"seed {chosen.seed}; {sum(one.calls for one in done)} calls are done", flush=True)
    every = list(done)
    for one in console.progress(campaign(chosen, done), desc="seeds", mininterval=5, disable=None):
        every.append(one)
        journal.write(chosen.journal, "fuzz", **asdict(one))
        if one.failure is not None:
            console.say(f"\n--backend {one.backend} --seed {one.seed} --calls 1 shows it again:\n{one.failure}\n")
            if sum(other.failure is not None for other in every) == ENOUGH:
                console.say(f"{ENOUGH} failures are enough")
                break
    found = totals(every)
    for backend, its in found.items():
        print(f"{backend}: {its['calls']} calls, {its['failures']} failed, {its['over']} decided by several draws")
    if chosen.json is not None:
        figures = {"environment": environment(), "seed": chosen.seed, **found}
        chosen.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if any(one.failure is not None for one in every) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
