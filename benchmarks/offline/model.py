"""`python -m benchmarks model`: how long every kernel takes on a GPU that is not there, by what it does.

A kernel's time is taken to be a start, and the root of the sum of squares of four times: what memory needs for its
bytes, tensor cores for its products, the schedulers for its instructions, and one program after the other for its own
chain of instructions, barriers, loads and turns of loops. Bytes, products and how often a place of the source is gone
through are counted in Triton's interpreter; registers, instructions and what lies inside which loop are read from
machine code. What a barrier or a load costs is fitted to measured times (`--fit`).
"""

import argparse
import concurrent.futures
import functools
import itertools
import json
import math
import multiprocessing
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks import cases, command, console, journal
from benchmarks.offline import flow, machine_code, stand_in, traffic
from benchmarks.offline.compile import processes
from benchmarks.offline.flow import Counts, Part
from benchmarks.offline.traffic import KernelTraffic
from benchmarks.rows import RESULTS

MEASURED = {"H100": RESULTS / "h100" / "sixth.ndjson"}  # the newest times of every kernel
# Images that are counted for a larger batch: more than any condition of configurations.json asks for.
IMAGES = 3
# Of a multiprocessor: registers of each of four schedulers, bytes of shared memory and of what a program costs of it
# besides its own, warps, programs.
REGISTERS, SHARED, SHARED_EACH, WARPS, PROGRAMS, SCHEDULERS = 16384, 233472, 1024, 64, 32, 4
LANES = 32
OFF = 0.3  # a prediction further off is marked


class Constants(NamedTuple):
    """What is not read anywhere: microseconds, then cycles, and how many times its floor a product takes."""

    start: float
    instruction: float
    barrier: float
    load: float
    trip: float
    product: float


# `--fit` on an H100's times of 2026-11-27.
FITTED = Constants(start=1.42, instruction=0.76, barrier=119, load=54.2, trip=424, product=1.65)


@dataclass(frozen=True)
class Work:
    """A launch.

    Attributes:
        moved: bytes.
        products: floating-point operations, for each kind of arithmetic.
        counts: of its instructions.
        trips: of its longest loop.
        in_flight: loads of a thread that are under way in each.
    """

    kernel: str
    programs: int
    warps: int
    registers: int
    spilled: int
    shared: int
    moved: float
    products: dict[str, float]
    counts: Counts
    trips: float
    in_flight: int

    def executed(self, kind: str) -> float:
        """By all warps of the same number."""
        return self.counts.mean.get(kind, 0.0) * self.programs

    @property
    def resident(self) -> int:
        """Programs that a multiprocessor holds at a time."""
        warps = REGISTERS // (-(-self.registers // 8) * 8 * LANES) * SCHEDULERS
        return min(warps // self.warps, SHARED // (self.shared + SHARED_EACH), WARPS // self.warps, PROGRAMS)

    def waves(self, gpu: traffic.Gpu) -> float:
        return self.programs / (gpu.multiprocessors * self.resident)


class Terms(NamedTuple):
    """Microseconds of a launch; `chain` in the order of `Constants.instruction` to `trip`, of a cycle each."""

    memory: float
    products: float
    schedulers: float
    chain: tuple[float, ...]


def terms(work: Work, gpu: traffic.Gpu) -> Terms:
    cycle = 1e6 / gpu.clock
    mean, longest, others = work.counts.mean, work.counts.longest, max(0.0, work.waves(gpu) - 1)
    issued = mean["instructions"] * work.warps * work.programs / (gpu.multiprocessors * SCHEDULERS)
    return Terms(
        memory=work.moved / gpu.bandwidth * 1e6,
        products=sum(flops / gpu.rates[kind] for kind, flops in work.products.items()) * 1e6,
        schedulers=issued * cycle,
        chain=tuple(
            (others * mean.get(kind, 0.0) + longest.get(kind, 0.0)) * cycle
            for kind in ("instructions", "barriers", "loads", "trips")
        ),
    )


def microseconds(found: Terms, constants: Constants | Sequence[Tensor]) -> Any:
    """The model: of numbers, or of tensors whose gradients are wanted."""
    start, *costs, product = constants
    chain = sum(cost * count for cost, count in zip(costs, found.chain, strict=True))
    squares = found.memory**2 + (product * found.products) ** 2 + found.schedulers**2 + chain**2
    return start + squares**0.5


def fit(groups: Iterable[tuple[Sequence[Terms], float]]) -> Constants:
    """Constants by which the mean squared logarithm of predicted over measured times is least.

    Args:
        groups: launches that were measured together, and microseconds.
    """
    groups = list(groups)
    logs = torch.tensor(FITTED, dtype=torch.float64).log().requires_grad_()
    optimizer = torch.optim.LBFGS([logs], max_iter=500, line_search_fn="strong_wolfe", tolerance_change=1e-12)

    def loss() -> Tensor:
        optimizer.zero_grad()
        ratios = [sum(microseconds(one, logs.exp()) for one in found) / measured for found, measured in groups]
        error = torch.stack(ratios).log().square().mean()
        error.backward()
        return error

    optimizer.step(loss)
    return Constants(*logs.exp().tolist())


# What a kernel does


@functools.cache
def _launches(phase: str, batch: int, dtype: str) -> list[machine_code.Launch]:
    case = machine_code.Case("model", cases.DTYPES[dtype], batch=batch, train=phase == "train")
    return machine_code.record(case, traffic.TARGET)


def _compiled(phase: str, batch: int, dtype: str, i: int) -> tuple[dict[str, int], list[Part]]:
    with stand_in.standing_in(traffic.TARGET):
        kernel = _launches(phase, batch, dtype)[i].compile()
    return machine_code.resources(kernel), flow.parts(machine_code.disassembled(kernel))


def _counted(phase: str, batch: int, dtype: str) -> list[KernelTraffic]:
    mode = "step" if phase == "train" else phase
    return traffic.count_module(cases.SIZES["paper"].patch, mode, dtype, min(batch, IMAGES))


Call = tuple[str, int, str, int]  # phase, batch, dtype, and which of its launches


def works(phases: Sequence[str], batches: Sequence[int], dtype: str, workers: int) -> dict[tuple[str, int], list[Work]]:
    """Every launch of these calls of the paper's module."""
    calls = list(itertools.product(phases, batches))
    counted = sorted({(phase, min(batch, IMAGES), dtype) for phase, batch in calls}, reverse=True)  # the longest first
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1", OPENBLAS_NUM_THREADS="1"):
        traffics = dict(zip(counted, _spread(_counted, counted, workers, "counting"), strict=True))
    jobs: dict[str, Call] = {}
    digests: dict[tuple[str, int], list[str]] = {}
    for phase, batch in calls:
        for i, one in enumerate(_launches(phase, batch, dtype)):
            with stand_in.standing_in(traffic.TARGET):
                digests.setdefault((phase, batch), []).append(machine_code.digest(one))
            jobs.setdefault(digests[phase, batch][-1], (phase, batch, dtype, i))
    compiled = dict(zip(jobs, _spread(_compiled, list(jobs.values()), workers, "compiling"), strict=True))
    found: dict[tuple[str, int], list[Work]] = {}
    for phase, batch in calls:
        counted = traffics[phase, min(batch, IMAGES), dtype]
        launches = _launches(phase, batch, dtype)
        if [one.name for one in launches] != [one.kernel for one in counted]:
            raise RuntimeError(f"{phase}, batch {batch}: other launches than those of the images that were counted")
        found[phase, batch] = [
            _work(launch, *compiled[digest], its, batch / min(batch, IMAGES))
            for launch, digest, its in zip(launches, digests[phase, batch], counted, strict=True)
        ]
    return found


def _work(
    launch: machine_code.Launch, resources: dict[str, int], parts: Sequence[Part], counted: KernelTraffic, images: float
) -> Work:
    """`images`: how many times those that were counted."""
    programs = math.prod(launch.grid)
    grown = None if programs > counted.programs or images == 1 else images  # its loops go over the images instead
    loop = flow.longest_loop(parts, counted.ways, grown)
    ahead = max(1, launch.options["num_stages"] - 1)
    return Work(
        kernel=launch.name,
        programs=programs,
        warps=launch.options["num_warps"],
        registers=resources["registers"],
        spilled=resources["spilled"],
        shared=resources["shared"],
        moved=counted.unique * images,
        products={kind: flops * images for kind, flops in counted.products.items()},
        counts=flow.executed(parts, counted.ways, grown),
        trips=loop.trips if loop else 0,
        in_flight=loop.loads + loop.copies * ahead if loop else 0,
    )


def _spread(function: Any, jobs: Sequence[tuple[Any, ...]], workers: int, said: str) -> list[Any]:
    """What a function gives for each, in other processes, with progress."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(jobs)), spawn, torch.set_num_threads, (1,)) as pool:
        futures = [pool.submit(function, *job) for job in jobs]
        for _ in console.progress(concurrent.futures.as_completed(futures), desc=said, total=len(futures)):
            pass
        return [future.result() for future in futures]


# Beside what was measured


Row = dict[str, Any]
Times = dict[tuple[str, int, str], float]  # microseconds by phase, batch and kernel


def measured(path: Path | None, dtype: str) -> Times:
    """What a journal of `python -m benchmarks kernels` says of every kernel."""
    entries = [e for e in journal.read(path) if e["step"] == "kernels" and (e["size"], e["dtype"]) == ("paper", dtype)]
    return {(e["phase"], e["batch"], e["kernel"]): round(e["us"], 2) for e in entries}


def rows(found: dict[tuple[str, int], list[Work]], gpu: traffic.Gpu, constants: Constants, known: Times) -> list[Row]:
    """One a kernel and call, the longest first, then the sum of a call.

    What several launches of a kernel do is summed; what is not a sum is the first one's.
    """
    every: list[Row] = []
    for (phase, batch), launches in found.items():
        its = []
        for kernel in dict.fromkeys(work.kernel for work in launches):
            of_kernel = [work for work in launches if work.kernel == kernel]
            one, each = of_kernel[0], [terms(work, gpu) for work in of_kernel]
            threads = one.warps * LANES
            its.append(
                {
                    "phase": phase,
                    "batch": batch,
                    "kernel": kernel,
                    "launches": len(of_kernel),
                    "programs": one.programs,
                    "waves": round(one.waves(gpu), 2),
                    "resident_warps": one.resident * one.warps,
                    "registers": one.registers,
                    "spilled": one.spilled,
                    "trips": one.trips,
                    "in_flight": one.in_flight,
                    "mb": round(sum(work.moved for work in of_kernel) / 1e6, 2),
                    "gflop": round(sum(sum(work.products.values()) for work in of_kernel) / 1e9, 3),
                    "special_m": round(sum(w.executed("special") * threads / 1e6 for w in of_kernel), 3),
                    "instructions_m": round(sum(w.executed("instructions") * w.warps / 1e6 for w in of_kernel), 3),
                    "floor_us": round(sum(max(t.memory, t.products) for t in each), 2),
                    "model_us": round(sum(microseconds(t, constants) for t in each), 2),
                    "measured_us": known.get((phase, batch, kernel)),
                }
            )
        its.sort(key=lambda row: -row["model_us"])
        total = {"phase": phase, "batch": batch, "kernel": "all", "launches": sum(row["launches"] for row in its)}
        for column in ("mb", "gflop", "instructions_m", "floor_us", "model_us"):
            total[column] = round(sum(row[column] for row in its), 3)
        total["measured_us"] = known.get((phase, batch, "all"))
        every += [*its, total]
    return every


COLUMNS = {
    "kernel": "kernel",
    "programs": "programs",
    "waves": "waves",
    "resident_warps": "warps",
    "registers": "registers",
    "spilled": "spilled",
    "trips": "trips",
    "in_flight": "in flight",
    "mb": "MB",
    "gflop": "GFLOP",
    "special_m": "special",
    "instructions_m": "instructions",
    "floor_us": "floor",
    "model_us": "model",
    "measured_us": "measured",
}
LEGEND = {
    "waves": "programs over those that the GPU holds at a time",
    "warps": "that a multiprocessor holds",
    "spilled": "bytes a thread",
    "trips": "of the longest loop",
    "in flight": "loads of a thread that are under way in each trip",
    "MB, GFLOP": "that the kernel moves at least, and multiplies",
    "special": "millions of exponentials, reciprocals and roots",
    "instructions": "millions, of warps",
    "floor, model, measured": "microseconds, measured of the kernels as they were then; the model's marked where it is "
    "more than 30 % off",
}


def table(found: Sequence[Row]) -> str:
    """As GitHub Markdown, a table for each call."""
    parts = []
    for (phase, batch), of_call in itertools.groupby(found, key=lambda row: (row["phase"], row["batch"])):
        lines = []
        for row in of_call:
            line = {column: row.get(column) for column in COLUMNS}
            if row["measured_us"] and abs(math.log(row["model_us"] / row["measured_us"])) > math.log(1 + OFF):
                line["model_us"] = f"{row['model_us']} !"
            lines.append(["" if value is None else str(value) for value in line.values()])
        parts.append(f"{phase}, batch {batch}:\n\n{console.table(lines, list(COLUMNS.values()))}")
    return "\n\n".join(parts)


def parser() -> argparse.ArgumentParser:
    parser = command.parser(
        "model",
        "Says how long every kernel of the paper's module would take on a GPU that need not be here, and why: by its "
        "machine code, by what it moves and computes, and by a few constants that were fitted to measured times, which "
        "stand beside. Takes some minutes: the kernels are compiled, and gone through in Triton's interpreter.",
        "",
        "--json build/model.json",
        "--phase train --batch 8   # how much a change of a kernel gains",
    )
    parser.add_argument("--gpu", choices=traffic.GPUS, default="H100", help="whose rates are taken")
    parser.add_argument(
        "--phase", nargs="+", choices=cases.MODES, default=list(cases.MODES), help=command.listed(command.PHASES)
    )
    parser.add_argument(
        "--batch", nargs="+", type=command.positive_integer, default=[1, 8, 32], metavar="B", help=command.BATCH
    )
    parser.add_argument("--dtype", choices=traffic.DTYPES, default="bfloat16", help="dtype of maps and weights")
    parser.add_argument(
        "--measured", type=Path, metavar="FILE", help="journal of `kernels` on that GPU (default: the committed one)"
    )
    parser.add_argument("--fit", action="store_true", help="fit the constants to what was measured, and say them")
    parser.add_argument("--json", type=command.file, metavar="FILE", help="where the rows go")
    parser.add_argument(
        "--processes", type=command.positive_integer, default=processes(), metavar="N", help="that work at a time"
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    chosen = parser().parse_args(arguments)
    reason = stand_in.why_not_compiled()
    if reason is not None:
        return command.not_run("model", reason, "unset it")
    gpu, known = traffic.GPUS[chosen.gpu], measured(chosen.measured or MEASURED.get(chosen.gpu), chosen.dtype)
    found = works(chosen.phase, sorted(chosen.batch), chosen.dtype, chosen.processes)
    constants = FITTED
    if chosen.fit:
        constants = fitted(found, gpu, known)
        print(f"fitted: {', '.join(f'{name} {value:.3g}' for name, value in constants._asdict().items())}")
    its = rows(found, gpu, constants, known)
    print(f"\nESTIMATES for an {chosen.gpu}, {chosen.dtype}:\n\n{table(its)}\n\n{console.legend(LEGEND)}")
    if chosen.json is not None:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps(its, indent=1) + "\n")
    return 0


def fitted(found: dict[tuple[str, int], list[Work]], gpu: traffic.Gpu, known: Times) -> Constants:
    """To every kernel that was measured."""
    groups: dict[tuple[str, int, str], list[Terms]] = {}
    for (phase, batch), launches in found.items():
        for work in launches:
            groups.setdefault((phase, batch, work.kernel), []).append(terms(work, gpu))
    return fit((its, known[key]) for key, its in groups.items() if key in known)
