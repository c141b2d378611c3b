"""Measures the candidate configurations of every kernel and writes the fastest into `configurations.json`."""

import argparse
import contextlib
import copy
import dataclasses
import itertools
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

import dca_kernels
import reference
from benchmarks import cases, command, console, journal, measure, parity, providers, rows
from benchmarks.cases import Size
from benchmarks.environment import environment, source
from benchmarks.group import Lost, lost
from benchmarks.offline import compile, stand_in
from benchmarks.offline.compile import Call, Compiled, Job, Pool, replaced
from benchmarks.run import BROKEN
from dca_kernels.triton_backend import launch

TABLE = Path(launch.__file__).parent / "configurations.json"
WARPS = (4, 8)
LOST = "the GPU answers no more"
Config = dict[str, int]

PRODUCT = {
    "block_n": (32, 64, 128),
    "block_c": (32, 64, 128),
    "block_k": (32, 64),
    "num_warps": WARPS,
    "num_stages": (2, 3, 4),
}

ROWS = {"tile": (512, 1024, 2048), "rows": (2, 4, 8), "block_r": (2, 4, 8), "num_warps": (2, 4, 8)}

# What is tried, beside the table's present row: each is a product of its values.
CANDIDATES: dict[str, dict[str, Sequence[int]]] = {
    "patch_embed": {"block_q": (4, 8, 16, 32), "num_warps": WARPS},
    "patch_embed_train": {"block_p": (1, 2, 4), "block_q": (2, 4, 8, 16), "num_warps": WARPS},
    "patch_embed_rows": {"tile": (1024, 2048, 4096, 8192), "num_warps": (4, 8, 16)},
    "upsample_rows": ROWS,
    "upsample_backward_rows": ROWS,
    "map_gradient_rows": ROWS,
    "tokens": {"block_n": (8, 16, 32), "num_warps": WARPS},
    "layer_norm_backward": {"block_n": (8, 16, 32), "steps": (1, 2, 4), "num_warps": (1, 2, 4, 8)},
    "centre": {"block_n": (32, 64, 128), "block_c": (32, 64), "num_warps": (2, 4, 8)},
    "covariance": {"block_c": (32, 64, 128), "block_n": (32, 64, 128), "num_warps": WARPS, "num_stages": (2, 3)},
    "mixing": {"block_c": (2, 4, 8, 16), "num_warps": WARPS},
    "mix": PRODUCT,
    "mixing_gradient": {"block_c": (64, 128), "block_n": (32, 64, 128), "num_warps": WARPS, "num_stages": (2, 3, 4)},
    "mixing_backward": {"block_c": (4, 8, 16), "num_warps": (2, 4, 8, 16)},
    "mix_backward": PRODUCT,
    "channel_gradients": {"block_c": (8, 16, 32), "num_warps": WARPS},
    "spatial_attention": {
        "block_m": (64, 128),
        "block_n": (32, 64),
        "block_narrow": (32, 64),
        "num_warps": WARPS,
        "num_stages": (2, 3, 4),
    },
    "spatial_attention_backward": {
        "block_m": (32, 64, 128),
        "block_n": (16, 32, 64),
        "block_narrow": (16, 32, 64),
        "num_warps": WARPS,
        "num_stages": (1, 2, 3),
    },
    "expected_gradient": {"block_n": (64, 128, 256), "num_warps": WARPS},
    "spatial_gradients": {"block_c": (4, 8, 16), "num_warps": WARPS},
    "conv": {"block_n": (32, 64, 128), "block_c": (32, 64), "num_warps": WARPS, "num_stages": (2, 3)},
    "grid_gradient": {"block_c": (32, 64, 128, 256), "block_k": (32, 64), "num_warps": WARPS, "num_stages": (2, 3)},
    "batch_statistics": {
        "block_n": (64, 128, 256),
        "block_c": (4, 8, 16),
        "block_p": (64, 128),
        "num_warps": (4, 8, 16),
    },
    "norm_gradients": {"block_c": (4, 8, 16), "num_warps": WARPS},
    "combine_images": {"block_c": (8, 16, 32), "num_warps": (1, 2, 4)},
    "sum_partials": {"block": (64, 128, 256), "step": (8, 16, 32), "num_warps": WARPS},
    "patch_embed_gradients": {"block_c": (4, 8, 16), "num_warps": WARPS},
    "upsample_backward_contiguous": {
        "tile": (1024, 2048, 4096),
        "block_c": (8, 16, 32),
        "block_w": (32, 64, 128),
        "num_warps": WARPS,
        "num_stages": (1, 2, 3),
    },
    "upsample_backward_channels_last": {
        "tile": (1024, 2048, 4096),
        "block_c": (16, 32, 64),
        "block_w": (32, 64),
        "num_warps": WARPS,
        "num_stages": (1, 2, 3),
    },
    "map_gradient_contiguous": {"tile": (1024, 2048, 4096), "block_c": (4, 8, 16), "num_warps": WARPS},
    "map_gradient_channels_last": {"tile": (1024, 2048, 4096), "block_c": (16, 32), "num_warps": WARPS},
    "upsample_contiguous": {
        "tile": (2048, 4096, 8192, 16384),
        "block_c": (4, 8, 16),
        "block_w": (64, 128, 256),
        "num_warps": WARPS,
    },
    "upsample_channels_last": {
        "tile": (2048, 4096, 8192),
        "block_c": (16, 32, 64),
        "block_w": (32, 64),
        "num_warps": WARPS,
    },
}

OF_ROWS = ({"rows": 2}, {"tile": 512, "num_warps": 2}, {"block_r": 8}, {"rows": 8})

# The most promising before the others: by the machine code, and by what was measured on an H100 and an H200.
# None takes an option away.
FIRST: dict[str, Sequence[dict[str, int | None]]] = {
    "spatial_attention_backward": (
        {"num_stages": 2},
        {"block_m": 128, "num_warps": 8, "num_stages": 2},
        {"num_stages": 3},
        {"block_n": 16, "num_stages": 2},
        {"block_n": 64},
    ),
    "spatial_attention": (
        {"maxnreg": 128},
        {"block_n": 32, "num_stages": 3, "maxnreg": 128},
        {"block_m": 128, "num_warps": 8, "maxnreg": 128},
        {"block_n": 32, "num_stages": 2},
        {"num_stages": 3},
    ),
    "mixing_backward": (
        {"block_c": 4, "num_warps": 4},
        {"num_warps": 4},
        {"block_c": 4, "num_warps": 8},
        {"block_c": 16, "num_warps": 16},
    ),
    "upsample_backward_contiguous": (
        {"num_stages": 2},
        {"num_stages": 1},
        {"block_c": 32},
        {"tile": 4096, "block_w": 64, "num_stages": 1, "maxnreg": 168},
        {"maxnreg": 96},
    ),
    "mix_backward": ({"num_stages": 2}, {"block_k": 32, "num_stages": 4}, {"block_n": 128, "num_warps": 8}),
    "map_gradient_rows": OF_ROWS,
    "upsample_backward_rows": OF_ROWS,
    "upsample_rows": OF_ROWS,
    "patch_embed_rows": ({"maxnreg": 168}, {"tile": 4096, "num_warps": 8}, {"maxnreg": 96}),
    "patch_embed_train": ({"block_q": 4}, {"num_warps": 8}, {"block_q": 16, "num_warps": 8}),
    "map_gradient_contiguous": ({"tile": 2048, "num_warps": 4}, {"maxnreg": 64}, {"tile": 2048}),
    "upsample_contiguous": (
        {"block_w": 128},
        {"tile": 4096},
        {"tile": 1024},
        {"tile": 4096, "block_w": 128},
    ),
    "grid_gradient": ({"block_c": 128}, {"block_k": 32}, {"num_warps": 4, "maxnreg": None}, {"maxnreg": None}),
    "mix": ({"block_k": 128}, {"num_stages": 2}, {"block_n": 128}, {"block_c": 128}, {"num_stages": 4}),
    "covariance": (
        {"block_n": 128},
        {"block_n": 256, "num_stages": 2},
        {"num_stages": 3},
        {"block_n": 128, "num_stages": 3},
        {"block_c": 128, "num_warps": 8, "num_stages": 3},
    ),
    "patch_embed": ({"block_q": 16}, {"block_q": 4, "num_warps": 4}, {"num_warps": 4}),
    "batch_statistics": ({"block_c": 8}, {"block_n": 256, "block_c": 8, "num_warps": 16}),
    "mixing_gradient": ({"block_n": 128, "num_stages": 3}, {"block_c": 64, "num_warps": 4}, {"num_stages": 4}),
    "mixing": ({"num_warps": 4}, {"block_c": 4, "num_warps": 4}),
    "conv": ({"num_stages": 3}, {"block_n": 128}),
    "upsample_backward_channels_last": ({"block_c": 32}, {"block_c": 64}, {"num_stages": 2}),
    "map_gradient_channels_last": ({"tile": 2048, "num_warps": 4}, {"tile": 2048}),
    "upsample_channels_last": ({"tile": 4096, "num_warps": 4}, {"tile": 2048, "num_warps": 4}),
    "tokens": ({"block_n": 8, "num_warps": 4}, {"num_warps": 4}),
}
# In this order one candidate of each is tried after the other: where the most is to be gained comes first.
ORDER = (*FIRST, *(name for name in CANDIDATES if name not in FIRST))

# A module that launches what no other one does; the paper's, unless it is here.
MODULES: dict[str, dict[str, Any]] = {
    "tokens": {"channel_att": False, "n": 2},
    # its windows are not all of one size
    "patch_embed_train": {"patch": 27},
    "upsample_contiguous": {"patch": 27},
    "upsample_backward_contiguous": {"patch": 27},
    "map_gradient_contiguous": {"patch": 27},
}


def candidates(kernel: str, present: Config) -> Iterator[Config]:
    """Configurations other than the present one: the promising, then the rest, shuffled: there is not time for all."""
    values = CANDIDATES[kernel]
    products = [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
    random.Random(0).shuffle(products)
    seen = [present]
    for chosen in (*FIRST.get(kernel, ()), *products):
        config = {option: value for option, value in (present | chosen).items() if value is not None}
        if config not in seen:
            seen.append(config)
            yield config


@dataclass(frozen=True)
class Phase:
    """A module in evaluation or in training, its inputs, and the judge of its results."""

    module: torch.nn.Module
    maps: list[Tensor]
    gradients: list[Tensor] | None
    judge: parity.Judge

    @classmethod
    def of(cls, call: Call, device: torch.device) -> "Phase":
        torch.manual_seed(cases.SEED)
        plain = reference.DCA(**dict(call.arguments))
        ours = dca_kernels.DCA(**dict(call.arguments), backend="triton")
        ours.load_state_dict(plain.state_dict())
        plain, ours = (m.to(device, call.dtype).train(call.train) for m in (plain, ours))
        layout = torch.channels_last if call.channels_last else torch.contiguous_format
        maps = [torch.randn(call.batch, *s).to(device, call.dtype) for s in call.shapes]
        maps = [x.contiguous(memory_format=layout) for x in maps]
        gradients = [torch.randn_like(x).mul_(parity.SCALE) for x in maps] if call.train else None
        return cls(ours, maps, gradients, parity.Judge(plain, maps, gradients))

    def run(self) -> None:
        parity.results(copy.deepcopy(self.module), self.maps, self.gradients)  # whose buffers change


class Probe:
    """Replaces one row of the table, checks the module with it, and times the kernels that the row is for.

    In each of the phases that launch them: the row is for all.
    """

    def __init__(self, kernel: str, phases: Sequence[Phase]) -> None:
        self.kernel, self.size, self.present = kernel, 0, Config()
        self.phases = [phase for phase in phases if self._asks(phase)]

    def _asks(self, phase: Phase) -> bool:
        lookup, asked = launch.configuration, []

        def note(name: str, architecture: str, dtype: torch.dtype, size: int, *images: float) -> Config:
            config = lookup(name, architecture, dtype, size, *images)
            if name == self.kernel:
                asked.append(size)
                self.size, self.present = size, dict(config)
            return config

        with mock.patch.object(launch, "configuration", note):
            phase.run()
        return bool(asked)

    def excess(self, config: Config) -> float:
        """The largest error over what it may be; more than 1 is outside the budget."""
        with replaced(self.kernel, config):
            return max(max(phase.judge.excess(phase.module).values()) for phase in self.phases)

    def milliseconds(self, config: Config) -> float:
        """Of the row's launches, one after the other, without what the host takes for them."""
        launches: list[Callable[[], None]] = []
        run = launch.run

        def keep(one: Any, programs: int, its_config: Config, **arguments: Any) -> None:
            run(one, programs, its_config, **arguments)
            if its_config is config:
                launches.append(lambda: run(one, programs, its_config, **arguments))

        for phase in self.phases:
            with replaced(self.kernel, config), mock.patch.object(launch, "run", keep):
                phase.run()
        return sum(map(kernel_milliseconds, launches))

    def attempt(self, config: Config) -> tuple[float | None, str | None]:
        """Milliseconds of a configuration, or in a line why there are none.

        Raises:
            Lost: the GPU answers no more.
        """
        try:
            excess = self.excess(config)
            if not excess <= 1:
                return None, f"outside the error budget: {excess:.2g} of it"
            return self.milliseconds(config), None
        except Exception as error:  # it does not compile, does not fit, or its launcher refuses it
            reason = compile.said(error)
            if lost(error):
                raise Lost(reason) from error
            return None, reason


def kernel_milliseconds(call: Callable[[], object]) -> float:
    """Of a launch, by replays of a CUDA graph of many; interpreted, of one call, which says nothing of its speed."""
    if torch.cuda.is_available():
        return triton.testing.do_bench_cudagraph(call, rep=10, return_mode="median")
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


def calls_of(kernel: str, size: Size, batch: int, dtype: torch.dtype) -> list[Call]:
    """In evaluation and in training."""
    channels_last = kernel.endswith("channels_last")
    return [Call.of(size, batch, dtype, train, channels_last, **MODULES.get(kernel, {})) for train in (False, True)]


@dataclass
class Tuned:
    """A kernel, and what is known of its candidates so far."""

    probe: Probe
    calls: list[Call]
    present: float | None
    best: float | None
    config: Config
    tried: int = 0
    failures: dict[str, str] = field(default_factory=dict)

    def begin_with(self, entries: Sequence[journal.Entry]) -> None:
        """The fastest that an earlier run found stays the fastest."""
        for entry in entries:
            if entry["ms"] is not None and (self.best is None or entry["ms"] < self.best):
                self.best, self.config = entry["ms"], entry["config"]

    def __str__(self) -> str:
        before, after = (f"{t:.4f} ms" if t is not None else "none" for t in (self.present, self.best))
        failed = "".join(f"\n  failed: {config}: {reason}" for config, reason in self.failures.items())
        counts = f"{self.tried} tried, {len(self.failures)} failed"
        return f"{self.probe.kernel}: {before} -> {after}, {self.config} ({counts}){failed}"


def earlier(path: Path | None, shared: dict[str, Any]) -> list[journal.Entry]:
    """The candidates that were tried before, of the same code on the same machine; tuning writes their table."""
    here = {key: value for key, value in rows.lasting(environment()).items() if key != "source"}
    return [
        entry
        for entry in journal.read(path)
        if entry["step"] == "tune" and shared.items() <= entry.items() and here.items() <= entry["environment"].items()
    ]


def job_of(kernel: str, calls: Sequence[Call], config: Config) -> Job:
    """What is compiled for a candidate."""
    row = kernel, tuple(config.items())
    return Job(tuple(dataclasses.replace(call, row=row) for call in calls), kernel)


def in_turns(kernels: Sequence[Tuned], most: int | None) -> Iterator[Job]:
    """A candidate of each kernel, then the next of each: there may not be time for all."""
    of_each = [
        [
            job_of(t.probe.kernel, t.calls, config)
            for config in itertools.islice(candidates(t.probe.kernel, t.probe.present), most)
        ]
        for t in kernels
    ]
    for turn in itertools.zip_longest(*of_each):
        yield from (job for job in turn if job is not None)


def ready(jobs: Sequence[Job], target: str | None, processes: int) -> Iterator[Compiled]:
    """Each job when it is compiled; at once where nothing stands in for the target."""
    if target not in stand_in.TARGETS:
        yield from (Compiled(job, 0.0, None) for job in jobs)
        return
    with Pool(target, processes) as pool:
        pool.submit(jobs)
        yield from pool.done()


def write(kernel: str, architecture: str, dtype: str, size: int, config: Config, path: Path) -> None:
    """Put a measured row before the one that held so far, in place of an earlier one of the same conditions.

    Rows for smaller sizes and for few images stay before it. What was measured of some images is for any larger number
    of them too.
    """
    table = json.loads(path.read_text())
    conditions = {"architecture": [architecture], "dtype": [dtype]}
    if table[kernel]["size"] != "images":
        conditions["max_size"] = size
    rows = [row for row in table[kernel]["rows"] if row.get("if") != conditions]

    def holds(of_row: dict[str, Any]) -> bool:
        known = architecture in of_row.get("architecture", [architecture]) and dtype in of_row.get("dtype", [dtype])
        return known and "max_images" not in of_row and size <= of_row.get("max_size", size)

    place = next((i for i, row in enumerate(rows) if holds(row.get("if", {}))), len(rows))
    table[kernel]["rows"] = [*rows[:place], {"if": conditions, "then": config}, *rows[place:]]
    path.write_text(rendered(table))


def rendered(table: dict[str, dict[str, Any]]) -> str:
    """The table as JSON, one row a line."""
    kernels = []
    for name, entry in table.items():
        rows = ",\n".join(f"      {json.dumps(row)}" for row in entry["rows"])
        kernels.append(f'  "{name}": {{\n    "size": {json.dumps(entry["size"])},\n    "rows": [\n{rows}\n    ]\n  }}')
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def tune(kernels: Sequence[Tuned], jobs: Iterable[Compiled], deadline: float, keep: Callable[..., object]) -> None:
    """Try what is compiled, until the deadline; `keep` is told of each candidate when it is known.

    A candidate that fails is counted and named, and the next one goes on.
    """
    by_name = {t.probe.kernel: t for t in kernels}
    for one in jobs:
        if time.monotonic() > deadline:
            break
        kernel, pairs = one.job.calls[0].row
        tuned, config = by_name[kernel], dict(pairs)
        tuned.tried += 1
        lost_by = None
        if one.error is not None:
            milliseconds, reason = None, one.error
        else:
            try:
                milliseconds, reason = tuned.probe.attempt(config)
            except Lost as error:
                milliseconds, reason, lost_by = None, f"{LOST}: {error}", error
        if reason is not None:
            tuned.failures[str(config)] = reason
        elif tuned.best is None or milliseconds < tuned.best:
            tuned.best, tuned.config = milliseconds, config
        keep(tuned, config, milliseconds, reason)
        if lost_by is not None:
            raise lost_by


def parser() -> argparse.ArgumentParser:
    parser = command.parser(
        "tune",
        "Tries candidate configurations of every kernel at the paper's sizes, forward and backward, the most promising "
        "first and of each kernel in turn. They are compiled in parallel processes; each is held to the error budget "
        "against float64, then the kernels that share the configuration are timed without what their launches cost the "
        "host. The fastest so far is always in the table, under this GPU's conditions. What fails is counted and "
        "named, and the next one goes on. Needs a GPU.",
        "--seconds 480 --journal tune.ndjson",
        "--kernel mix conv --dtype float32 --table configurations.json",
    )
    parser.add_argument(
        "--kernel", nargs="+", choices=CANDIDATES, default=list(ORDER), help="kernels, by their names in the table"
    )
    parser.add_argument("--dtype", choices=cases.DTYPES, default="bfloat16", help=command.DTYPE)
    parser.add_argument("--batch", type=command.positive_integer, default=8, metavar="B", help=command.BATCH)
    parser.add_argument("--size", choices=cases.SIZES, default="paper", help=command.sizes())
    parser.add_argument(
        "--most", type=command.positive_integer, metavar="N", help="at most N candidates a kernel (default: all)"
    )
    parser.add_argument(
        "--seconds",
        type=command.positive_number,
        metavar="S",
        help="seconds after which no other candidate is tried (default: no limit)",
    )
    parser.add_argument(
        "--processes",
        type=command.positive_integer,
        default=compile.processes(),
        metavar="N",
        help="processes that compile at a time",
    )
    parser.add_argument(
        "--table", type=command.file, default=TABLE, metavar="FILE", help="table of configurations that is changed"
    )
    parser.add_argument("--journal", type=command.file, metavar="FILE", help=command.JOURNAL)
    return parser


def probed(calls: dict[str, list[Call]], target: str, processes: int) -> list[Tuned]:
    """Each kernel with the time of its present configuration; the calls are those that launch it."""
    device = measure.device()
    every = list(dict.fromkeys(itertools.chain.from_iterable(calls.values())))
    if device.type == "cuda":  # the present ones, all at once
        for _ in ready(compile.distinct(every, target) if target in stand_in.TARGETS else [], target, processes):
            pass
    phases = {call: Phase.of(call, device) for call in every}
    kernels = []
    for kernel, of_kernel in calls.items():
        probe = Probe(kernel, [phases[call] for call in of_kernel])
        if not probe.phases:
            print(f"{kernel}: not tuned: these calls do not launch it", flush=True)
            continue
        present, reason = probe.attempt(probe.present)
        kernels.append(Tuned(probe, of_kernel, present, present, probe.present))
        if reason is not None:
            print(f"{kernel}: the present configuration failed: {reason}", flush=True)
    return kernels


def main(arguments: Sequence[str]) -> int:
    chosen = parser().parse_args(arguments)
    device, dtype, size = measure.device(), cases.DTYPES[chosen.dtype], cases.SIZES[chosen.size]
    reason = providers.why_no_kernels(device)
    if reason is not None:
        return command.not_run("tune", reason, command.interpreted("tune"))
    deadline = time.monotonic() + (chosen.seconds or math.inf)
    if not chosen.table.exists():
        chosen.table.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(TABLE, chosen.table)
    target = compile.target_here()
    if target is None:
        target = "sm_90"
        print(f"no GPU: candidates are compiled for {target}, and what is timed is the interpreter", flush=True)
    calls = {kernel: calls_of(kernel, size, chosen.batch, dtype) for kernel in chosen.kernel}
    kernels = probed(calls, target, chosen.processes)
    shared = {"dtype": chosen.dtype, "batch": chosen.batch, "size": chosen.size, "code": source(configured=False)}

    def put(tuned: Tuned) -> None:
        where = launch.architecture(device), chosen.dtype, tuned.probe.size
        write(tuned.probe.kernel, *where, tuned.config, chosen.table)

    def keep(tuned: Tuned, config: Config, milliseconds: float | None, reason: str | None) -> None:
        found = {"config": config, "ms": milliseconds, "present_ms": tuned.present, "failed": reason}
        journal.write(chosen.journal, "tune", kernel=tuned.probe.kernel, **found, **shared)
        if config == tuned.config:
            put(tuned)

    tried = earlier(chosen.journal, shared)
    for tuned in kernels:
        tuned.begin_with([entry for entry in tried if entry["kernel"] == tuned.probe.kernel])
        if tuned.config != tuned.probe.present:
            put(tuned)
    known = [(entry["kernel"], entry["config"]) for entry in tried]
    jobs = [job for job in in_turns(kernels, chosen.most) if (job.kernel, dict(job.calls[0].row[1])) not in known]
    status = 0
    try:
        with contextlib.closing(ready(jobs, target, chosen.processes)) as compiled:
            tune(kernels, console.progress(compiled, total=len(jobs), mininterval=5), deadline, keep)
    except Lost as error:
        print(f"{LOST}: {error}; run the same command again to go on", flush=True)
        status = BROKEN
    print("\n".join(map(str, kernels)), flush=True)
    tried, failed = (sum(f(t) for t in kernels) for f in (lambda t: t.tried, lambda t: len(t.failures)))
    print(f"{len(jobs)} candidates, {tried} tried, {failed} failed")
    return status
