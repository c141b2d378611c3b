"""What a call of the `triton` backend costs the host, whatever its kernels do: measured against a stand-in driver."""

import gc
import statistics
import time
import timeit
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

import dca_kernels
from benchmarks import cases, command, console
from benchmarks.environment import describe, environment
from benchmarks.offline import stand_in

TARGET = "sm_90"
ROUNDS = 9
CALLS = {"eval": 50, "train": 15}  # a round


class Launches:
    """The launches of a call, as the JIT was asked for them, and the same by the compiled kernels' own `run`."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.asked: list[tuple[Any, tuple[int, ...], dict[str, Any]]] = []
        self.compiled: list[tuple[Any, tuple[int, ...], list[Any]]] = []
        run = JITFunction.run

        def keep(kernel: Any, *, grid: tuple[int, ...], warmup: bool, **arguments: Any) -> Any:
            compiled = run(kernel, grid=grid, warmup=warmup, **arguments)
            self.asked.append((kernel, grid, arguments))
            self.compiled.append((compiled, grid, [arguments[p.name] for p in kernel.params]))
            return compiled

        with mock.patch.object(JITFunction, "run", keep):
            call()

    def by_grid(self) -> None:
        for kernel, grid, arguments in self.asked:
            kernel[grid](**arguments)

    def by_run(self) -> None:
        for compiled, grid, arguments in self.compiled:
            compiled.run(*grid, 1, 1, 0, compiled.function, compiled.packed_metadata, None, None, None, *arguments)


def calls(mode: str, size: cases.Size, dtype: torch.dtype, batch: int) -> dict[str, Callable[[], object]]:
    """What is timed in one mode, by name: the whole call, then its launches alone."""
    module = dca_kernels.DCA(size.features, patch=size.patch, backend="triton").to(dtype).train(mode == "train")
    shapes = [(batch, c, side, side) for c, side in zip(size.features, size.sides, strict=True)]
    maps = [torch.zeros(shape, dtype=dtype, requires_grad=module.training) for shape in shapes]
    douts = [torch.zeros_like(x) for x in maps]

    def forward() -> None:
        with torch.no_grad():
            module(maps)

    def step() -> None:
        torch.autograd.grad(module(maps), [*maps, *module.parameters()], douts)

    name, call = ("training step", step) if module.training else ("forward", forward)
    launches = Launches(call)
    count = len(launches.asked)
    return {
        name: call,
        f"its {count} launches by kernel[grid]": launches.by_grid,
        f"its {count} launches by the compiled kernels' run": launches.by_run,
    }


def microseconds(timed: dict[str, Callable[[], object]], number: int) -> dict[str, list[float]]:
    """CPU time of each call in each round, the calls in turns."""
    times: dict[str, list[float]] = {name: [] for name in timed}
    timers = {name: timeit.Timer(call, timer=time.process_time) for name, call in timed.items()}
    for timer in timers.values():
        timer.timeit(3)
    for _ in range(ROUNDS):
        gc.collect()
        for name, timer in timers.items():
            times[name].append(timer.timeit(number) / number * 1e6)
    return times


def main(arguments: Sequence[str]) -> int:
    parser = command.parser(
        "host",
        "Times what a forward and a training step cost the host: all of it, and its bare launches. The JIT and the "
        "launcher are Triton's own; the driver behind them is stood in for, so no GPU is needed. The kernels are "
        "compiled first, which takes minutes at the paper's size. Times are CPU time of this machine: read them as "
        "ratios.",
        "",
        "--size tiny --dtype float32   # in a minute",
    )
    parser.add_argument("--size", choices=cases.SIZES, default="paper", help=command.sizes())
    parser.add_argument("--dtype", choices=cases.DTYPES, default="bfloat16", help=command.DTYPE)
    parser.add_argument("--batch", type=command.positive_integer, default=1, metavar="B", help=command.BATCH)
    chosen = parser.parse_args(arguments)
    reason = stand_in.why_not_compiled()
    if reason is not None:
        return command.not_run("host", reason, "unset it")
    reason = stand_in.why_no_launches()
    if reason is not None:
        return command.not_run("host", reason, "it needs a machine with a C compiler and without a GPU")
    torch.set_num_threads(1)
    print(f"environment: {describe(environment())}")
    lines = []
    with stand_in.standing_in(TARGET, record=False):
        for mode, number in CALLS.items():
            print(f"{mode}: compiling", flush=True)
            timed = calls(mode, cases.SIZES[chosen.size], cases.DTYPES[chosen.dtype], chosen.batch)
            times = microseconds({"1000 turns of a Python loop": loop} | timed, number)
            whole = statistics.median(times[next(iter(timed))])
            for name, found in times.items():
                p20, _, _, p80 = statistics.quantiles(found, n=5)
                p50 = statistics.median(found)
                lines.append([mode, name, f"{p50:.0f}", f"{p20:.0f}", f"{p80:.0f}", f"{whole / p50:.1f}"])
    headers = ["mode", "what", "us", "p20", "p80", "the call over this"]
    print(console.table(lines, headers))
    return 0


def loop() -> None:
    for _ in range(1000):
        pass
