"""`python -m benchmarks run`: every case, provider and mode of a selection, each row as soon as it is there.

The main job (benchmarks/quick.py) is made of such selections, too.
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from benchmarks import cases, command, console, measure, providers, rows
from benchmarks.cases import Problem, Size
from benchmarks.environment import describe, environment
from benchmarks.group import Effort, Group, Lost, first_line, lost, measured, wants_memory
from benchmarks.rows import Row

BROKEN = 3  # exit status: the GPU's context is lost, and another process must go on


@dataclass(frozen=True)
class Selection:
    """What is run: every combination of these that there is. `sizes` are a case's, by their names in rows."""

    cases: Sequence[str]
    sizes: Callable[[str], Mapping[str, Size]]
    dtypes: Sequence[str]
    batches: Sequence[int]
    phases: Sequence[str]
    modes: Sequence[str]
    providers: Sequence[str]

    def groups(self) -> Iterator[Group]:
        for case, dtype, batch, phase in itertools.product(self.cases, self.dtypes, self.batches, self.phases):
            named = tuple(p for p in self.providers if p in providers.providers_of(case))
            modes = tuple(m for m in cases.MODES[phase] if m in self.modes)
            for name, size in self.sizes(case).items() if modes and named else []:
                yield Group(name, Problem(case, size, batch, cases.DTYPES[dtype], phase == "train"), named, modes)


def measured_in_turn(
    wanted: Sequence[Group], measure: Callable[[Group], list[Row]], quick: bool = False
) -> Iterator[tuple[Group, list[Row]]]:
    """Each group with its rows, as soon as they are measured.

    In a `quick` job the bar of what is done goes when all is, and an error ends it; else it is what the rows say.

    Raises:
        Lost: the GPU answers no more; the last rows say why.
        Exception: of a quick job.
    """
    for group in console.progress(wanted, Group.__str__, leave=not quick):
        gone = None
        try:
            new = measure(group)
        except Exception as error:
            if quick:
                raise
            gone = Lost(first_line(error)) if lost(error) else None
            found = {"not_run": first_line(error), "environment": environment()}
            found["raised"] = gone is None and not wants_memory(error)  # no one knows whose error it is
            new = [group.row(*pair, **found) for pair in itertools.product(group.providers, group.modes)]
        yield group, new
        if gone is not None:
            raise gone


def groups(chosen: argparse.Namespace) -> Iterator[Group]:
    """The selection, with providers in the registry's order."""
    named = [name for name in providers.PROVIDERS if name in chosen.provider]

    def sizes(case: str) -> dict[str, Size]:
        return {name: cases.SIZES[name] for name in sizes_of(case, chosen)}

    selected = Selection(chosen.case, sizes, chosen.dtype, chosen.batch, chosen.phase, chosen.mode, named)
    return selected.groups()


def sizes_of(case: str, chosen: argparse.Namespace) -> list[str]:
    """The chosen sizes that a case has."""
    return [s for s in chosen.size if s in cases.sizes_of(case) or (s == "tiny" and case not in cases.HOSTS)]


def why_nothing(chosen: argparse.Namespace) -> str:
    """Of a selection without a group, which options exclude each other: of each case, or of all."""
    reasons = []
    for case in chosen.case:
        if not set(providers.providers_of(case)) & set(chosen.provider):
            reasons.append(f"--case {case} has no --provider {' '.join(chosen.provider)}")
        elif not sizes_of(case, chosen):
            reasons.append(f"--case {case} has --size {' '.join(cases.sizes_of(case))} alone")
        else:
            reasons.append(f"--phase {' '.join(chosen.phase)} has --mode {' '.join(cases.MODES['eval'])} alone")
    return "; ".join(dict.fromkeys(reasons))


def parser() -> argparse.ArgumentParser:
    gpu = torch.cuda.is_available()
    parser = command.parser(
        "run",
        "Times cases, sizes, modes and providers, each checked against float64 first, and writes a row for each as "
        "soon as it is measured. What this machine cannot run is a row too, which says why. Rows that are there "
        "already, from the same code, machine and threads, are kept: after a stop, the same command does the rest.",
        "--case dca --size paper --batch 1 --phase eval --provider reference torch 'triton graph'",
        "--case UNet --phase train --mode full --batch 8 --out unet.jsonl",
    )
    known = {
        "case": (cases.CASES, cases.CASES, command.listed(command.CASES)),
        "size": (cases.SIZES, [s for s in cases.SIZES if s != "tiny"], command.sizes()),
        "dtype": (cases.DTYPES, ["bfloat16", "float32"] if gpu else ["float32"], command.DTYPE),
        "phase": (cases.MODES, cases.MODES, command.listed(command.PHASES)),
        "mode": (cases.MODES["train"], cases.MODES["train"], command.listed(command.MODES)),
        "provider": (providers.PROVIDERS, providers.PROVIDERS, command.listed(command.PROVIDERS)),
    }
    for name, (choices, default, what) in known.items():
        options = {"choices": list(choices), "default": list(default), "metavar": name.upper()}
        parser.add_argument(f"--{name}", nargs="+", help=what, **options)
    parser.add_argument(
        "--batch",
        nargs="+",
        type=command.positive_integer,
        default=list(cases.BATCHES),
        metavar="B",
        help=command.BATCH,
    )
    parser.add_argument(
        "--seconds",
        type=command.positive_number,
        default=Effort.seconds,
        metavar="S",
        help="seconds that one case at one size is timed for, about",
    )
    parser.add_argument(
        "--longest",
        type=command.positive_number,
        default=Effort.longest,
        metavar="S",
        help="seconds of the longest call that is timed",
    )
    parser.add_argument(
        "--ahead",
        type=command.positive_integer,
        metavar="N",
        help="first fill torch.compile's cache by N processes at a time; max-autotune then chooses among kernels while "
        "others run",
    )
    parser.add_argument("--no-memory", action="store_true", help="measure times alone")
    parser.add_argument("--small", action="store_true", help="one round, small calibration: for tests")
    parser.add_argument(
        "--out", type=command.file, default=rows.LATEST / "run.jsonl", metavar="FILE", help="file of rows"
    )
    return parser


def compile_ahead(wanted: Sequence[Group], processes: int) -> None:
    """Run each compiled provider once in a process of its own, so that torch.compile finds it in its cache here."""
    jobs = [
        (dataclasses.replace(providers.PROVIDERS[name], graph=False), group.problem)
        for group in wanted
        for name in group.providers
        if providers.PROVIDERS[name].compiled
    ]
    spawn = multiprocessing.get_context("spawn")
    begin, failed = time.monotonic(), 0
    with (
        mock.patch.dict(os.environ, {"TORCHINDUCTOR_COMPILE_THREADS": "2"}),  # each: there are many of them
        concurrent.futures.ProcessPoolExecutor(processes, mp_context=spawn) as pool,
    ):
        futures = [pool.submit(_run_once, *job) for job in dict.fromkeys(jobs)]
        for future in console.progress(concurrent.futures.as_completed(futures), total=len(futures), mininterval=5):
            failed += future.exception() is not None  # it fails again where it is measured, and says why there
    print(f"torch.compile: {len(futures)} ahead in {time.monotonic() - begin:.0f} s, {failed} failed", flush=True)


def _run_once(provider: providers.Provider, problem: Problem) -> None:
    torch.compiler.reset()  # a process does several jobs, and a limit counts what was compiled of one function
    subject = providers.build(
        provider, problem, *providers.inputs_of(problem, cases.load_image(None), measure.device())
    )
    subject.forward()
    if subject.has_backward:
        subject.backward()


def _is_done(group: Group, provider: str, mode: str, done: Mapping[Any, Row]) -> bool:
    """Whether a row is there: measured, or not run for what is so on this machine still."""
    row = done.get(group.row(provider, mode).key)
    if row is None or row.not_run is None:
        return row is not None
    return row.not_run == providers.why_not(providers.PROVIDERS[provider], group.problem, mode, measure.device())


def main(arguments: Sequence[str]) -> int:
    chosen = parser().parse_args(arguments)
    effort = Effort(chosen.seconds, chosen.longest, not chosen.no_memory, chosen.small)
    selected = list(groups(chosen))
    if not selected:
        print(f"run: nothing is selected: {why_nothing(chosen)}", file=sys.stderr)
        return 2
    try:
        done = rows.finished(chosen.out, environment())
    except (OSError, ValueError) as error:
        print(f"run: --out: {error}", file=sys.stderr)
        return 2
    image = cases.load_image(None)
    print(f"environment: {describe(environment())}", flush=True)
    left = [
        group
        for group in selected
        if any(not _is_done(group, *pair, done) for pair in itertools.product(group.providers, group.modes))
    ]
    if chosen.ahead:
        compile_ahead(left, chosen.ahead)
    status = 0
    try:
        for _, new in measured_in_turn(left, lambda group: measured(group, image, effort)):
            rows.append(new, chosen.out)
            for row in (row for row in new if row.wrong):
                error = "" if row.raised else f", max error {console.small(row.max_error)}"
                what = "error" if row.raised else "parity"
                console.say(f"{what}: FAILED: {row.title}: {row.provider}: {row.not_run}{error}")
                status = 1
    except Lost:
        print("the GPU answers no more; run the same command again to go on", flush=True)
        return BROKEN
    print(f"rows: {chosen.out}")
    return status
