"""`python -m benchmarks kernels`: the time of every kernel of a forward and of a training step, beside its floor.

The floor of a kernel is what it must move and multiply (counted in the interpreter: results/offline/traffic.json) at
the rates of a large copy and of a large product here. The estimate is the model's (`python -m benchmarks model`:
results/offline/model.json), for an H100.
"""

import itertools
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks import calibrate, cases, command, journal, measure, providers, report
from benchmarks.cases import Problem
from benchmarks.environment import describe, environment
from benchmarks.group import Call, call_of
from benchmarks.rows import RESULTS
from dca_kernels.triton_backend import launch

TRAFFIC = RESULTS / "offline" / "traffic.json"
MODEL = RESULTS / "offline" / "model.json"
REPLAYS = 5
OTHER = "PyTorch's own"
# How much longer than a bfloat16 product's another product of as many operations takes on tensor cores.
PRODUCTS = {"bf16": 1.0, "tf32": 2.0}

Times = dict[str, float]


def replayed(call: Call) -> Times:
    """Microseconds of each kernel of a call that replays a CUDA graph, by the profiler: medians of some replays."""
    samples: dict[str, list[float]] = defaultdict(list)
    for _ in range(REPLAYS):
        call.prepare()
        measure.evict()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            call.run()
            torch.cuda.synchronize()
        summed: Times = defaultdict(float)
        for event in profiler.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                summed[kernel_of(event.name)] += event.time_range.elapsed_us()
        for name, microseconds in summed.items():
            samples[name].append(microseconds)
    if not set(samples) - {OTHER}:
        raise RuntimeError(f"the profiler saw no kernel of this package, but {dict(samples)}: is CUPTI there?")
    return {name: float(np.median(of_name)) for name, of_name in samples.items()}


def interpreted(call: Call) -> Times:
    """As `replayed` where there is no GPU: what the interpreter takes, which says nothing of a GPU."""
    summed: Times = defaultdict(float)
    run = launch.run

    def run_and_time(kernel: Any, programs: int, config: dict[str, int], **arguments: Any) -> None:
        begin = time.perf_counter()
        run(kernel, programs, config, **arguments)
        summed[kernel_of(kernel.__name__)] += (time.perf_counter() - begin) * 1e6

    call.prepare()
    with mock.patch.object(launch, "run", run_and_time):
        call.run()
    return dict(summed)


def kernel_of(name: str) -> str:
    ours = name.startswith("_") and name.endswith("_kernel")
    return name.removeprefix("_").removesuffix("_kernel") if ours else OTHER


def floors(problem: Problem, rates: calibrate.Rates) -> Times:
    """Microseconds that each kernel takes at least; none but of bfloat16 at a size where it was counted."""
    if problem.dtype != torch.bfloat16:
        return {}
    mode, dtype = "step" if problem.training else "eval", str(problem.dtype).removeprefix("torch.")
    found: Times = defaultdict(float)
    for counted in json.loads(TRAFFIC.read_text()):
        wanted = (counted["implementation"], counted["mode"], counted["dtype"]) == ("triton", mode, dtype)
        if not wanted or tuple(counted["features"]) != problem.size.features or counted["patch"] != problem.size.patch:
            continue
        for one in counted["kernels"]:
            moved = sum(one["loaded"].values()) + sum(one["stored"].values())
            products = sum(PRODUCTS[kind] * flops for kind, flops in one["products"].items())
            seconds = max(moved / rates["copy_bytes_s"], products / rates["matmul_flop_s"])
            found[one["kernel"]] += 1e6 * seconds * problem.batch / counted["batch"]
    return dict(found)


def estimates(problem: Problem) -> Times:
    """Microseconds of each kernel by the model: of bfloat16 at the paper's sizes, at the batches that were modelled."""
    if problem.size != cases.SIZES["paper"] or problem.dtype != torch.bfloat16:
        return {}
    call = ("train" if problem.training else "eval", problem.batch)
    rows = json.loads(MODEL.read_text())
    return {row["kernel"]: row["model_us"] for row in rows if (row["phase"], row["batch"]) == call}


def measured(problem: Problem, rates: calibrate.Rates) -> list[journal.Entry]:
    """An entry for each kernel, the longest first, and one of their sum."""
    inputs = providers.inputs_of(problem, cases.load_image(None), measure.device())
    subject = providers.build(providers.PROVIDERS["triton"], problem, *inputs)
    mode, gpu = "full" if problem.training else "forward", torch.cuda.is_available()
    times = replayed(call_of(providers.Graphed(subject), mode)) if gpu else interpreted(call_of(subject, mode))
    least, expected = floors(problem, rates), estimates(problem)
    lines = [
        {"kernel": name, "us": us, "floor_us": least.get(name), "estimated_us": expected.get(name)}
        for name, us in sorted(times.items(), key=lambda item: -item[1])
    ]
    columns = ("us", "floor_us", "estimated_us")
    lines.append({"kernel": "all"} | {column: sum(line[column] or 0.0 for line in lines) for column in columns})
    shared = {
        "phase": "train" if problem.training else "eval",
        "batch": problem.batch,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "by": "profiler, graph replay" if gpu else "interpreter",
    }
    return [shared | line for line in lines]


def main(arguments: Sequence[str]) -> int:
    parser = command.parser(
        "kernels",
        "Measures the rates of a copy and of products, then the time of every kernel of a forward and of a training "
        "step, from replays of a CUDA graph by the profiler, beside its floor and beside the model's. Needs a GPU.",
        "",
        "--batch 1 --dtype float32",
    )
    parser.add_argument("--size", choices=cases.SIZES, default="paper", help=command.sizes())
    parser.add_argument(
        "--batch", nargs="+", type=command.positive_integer, default=[8, 1, 32], metavar="B", help=command.BATCH
    )
    parser.add_argument("--dtype", choices=cases.DTYPES, default="bfloat16", help=command.DTYPE)
    parser.add_argument("--small", action="store_true", help="calibrate with small arrays: for tests")
    parser.add_argument("--journal", type=command.file, metavar="FILE", help=command.JOURNAL)
    chosen = parser.parse_args(arguments)
    device = measure.device()
    subject = Problem("dca", cases.SIZES[chosen.size], 1, cases.DTYPES[chosen.dtype], False)
    reason = providers.why_no_kernels(device)
    if reason is not None:
        return command.not_run("kernels", reason, command.interpreted("kernels"))
    print(f"environment: {describe(environment())}", flush=True)
    rates = calibrate.rates(subject.dtype, chosen.small)
    found = {"dtype": chosen.dtype, **rates, **calibrate.overheads()}
    journal.write(chosen.journal, "rates", **found)
    print(
        f"copy {rates['copy_bytes_s'] / 1e9:.0f} GB/s, products {rates['matmul_flop_s'] / 1e12:.2f} TFLOP/s", flush=True
    )
    if device.type == "cpu":
        print("no GPU: what follows is the interpreter's time, kernel by kernel, and not of a graph")
    for batch, phase in itertools.product(chosen.batch, cases.MODES):
        problem = Problem("dca", subject.size, batch, subject.dtype, phase == "train")
        entries = measured(problem, rates)
        written = [journal.write(chosen.journal, "kernels", size=chosen.size, **entry) for entry in entries]
        print(f"\n{report.kernels(written)}", flush=True)
    return 0
