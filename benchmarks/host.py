"""What a call of the `triton` backend costs the host, whatever its kernels do: measured against a stand-in driver."""

import gc
import json
import resource
import statistics
import tempfile
import time
import timeit
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

import dca_kernels
from benchmarks import cases, command, report
from benchmarks.environment import describe, environment
from benchmarks.offline import stand_in
from dca_kernels import contract, torch_backend
from dca_kernels.triton_backend import eager

TARGET = "sm_90"
ROUNDS = 9
CALLS = {"eval": 50, "train": 15}  # a round, in each mode
TINY = cases.Size((8, 16, 32, 64), 4)

Row = dict[str, Any]


class Launches:
    """The launches of a call, as the JIT was asked for them, and the same by the compiled kernels' own `run`."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.asked: list[tuple[Any, tuple[int, ...], dict[str, Any]]] = []
        self.compiled: list[tuple[Any, tuple[int, ...], list[Any]]] = []
        run = JITFunction.run

        def keep(kernel: Any, *, grid: tuple[int, ...], warmup: bool, **arguments: Any) -> Any:
            compiled = run(kernel, grid=grid, warmup=warmup, **arguments)
            if warmup:
                return compiled
            self.asked.append((kernel, grid, arguments))
            self.compiled.append((compiled, grid, [arguments[p.name] for p in kernel.params]))
            return compiled

        # Without the plans of calls before, whose launches go past the JIT.
        with mock.patch.object(JITFunction, "run", keep), mock.patch.object(eager, "_forwards", eager.Latest()):
            call()

    def by_grid(self) -> None:
        for kernel, grid, arguments in self.asked:
            kernel[grid](**arguments)

    def by_run(self) -> None:
        for compiled, grid, arguments in self.compiled:
            compiled.run(*grid, 1, 1, 0, compiled.function, compiled.packed_metadata, None, None, None, *arguments)


class Idle(torch.autograd.Function):
    """Takes and gives as many tensors as a call, and does nothing: what PyTorch's autograd takes for itself."""

    @staticmethod
    def forward(
        ctx: Any, results: Sequence[Tensor], gradients: Sequence[Tensor], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.gradients = gradients
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        return tuple([y.view_as(y) for y in results])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.gradients


@dataclass(frozen=True)
class Timed:
    """Calls that are timed in turns, the first beside each of the others.

    Attributes:
        mode: of the module.
        calls: by name.
        number: a round.
    """

    mode: str
    calls: dict[str, Callable[[], object]]
    number: int


def of_kernels(mode: str, size: cases.Size, dtype: torch.dtype, batch: int) -> Timed:
    """A call of the `triton` backend, its launches alone, and what autograd takes."""
    module, maps, douts = subject("triton", mode, size, dtype, batch)
    inputs = [*maps, *module.parameters()]
    name, call = _call(module, maps, douts, inputs)
    launches = Launches(call)
    count = len(launches.asked)
    found = {
        name: call,
        "1000 turns of a Python loop": loop,
        f"its {count} launches by kernel[grid]": launches.by_grid,
        f"its {count} launches by the compiled kernels' run": launches.by_run,
    }
    if module.training:
        results, gradients = [torch.zeros_like(x) for x in maps], [torch.zeros_like(t) for t in inputs]
        found[f"autograd of {len(inputs)} tensors"] = lambda: torch.autograd.grad(
            Idle.apply(results, gradients, *inputs), inputs, douts
        )
    return Timed(mode, found, CALLS[mode])


def loop() -> None:
    for _ in range(1000):
        pass


def of_torch(mode: str) -> Timed:
    """A call of the `torch` backend with maps of a few pixels, and the backend alone."""
    module, maps, douts = subject("torch", mode, TINY, torch.float32, 1)
    norms, dtypes = [head[0] for head in module.bn_relu], [x.dtype for x in maps]
    its = contract.read(module, norms, torch_backend.operand_dtype(maps), dtypes)
    inputs = [*maps, *module.parameters()]
    name, call = _call(module, maps, douts, inputs)
    _, alone = _call(lambda maps: torch_backend.refine(maps, its), maps, douts, inputs)
    return Timed(mode, {f"{name}, torch backend, tiny maps": call, "the backend alone": alone}, CALLS[mode])


def subject(
    backend: str, mode: str, size: cases.Size, dtype: torch.dtype, batch: int
) -> tuple[dca_kernels.DCA, list[Tensor], list[Tensor]]:
    """A module, maps, and their outputs' gradients."""
    module = dca_kernels.DCA(size.features, patch=size.patch, backend=backend).to(dtype).train(mode == "train")
    shapes = [(batch, c, side, side) for c, side in zip(size.features, size.sides, strict=True)]
    maps = [torch.zeros(shape, dtype=dtype, requires_grad=module.training) for shape in shapes]
    return module, maps, [torch.zeros_like(x) for x in maps]


def _call(
    module: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    maps: Sequence[Tensor],
    douts: Sequence[Tensor],
    inputs: Sequence[Tensor],
) -> tuple[str, Callable[[], object]]:
    """A forward, or a training step where there are gradients."""
    if maps[0].requires_grad:
        return "training step", lambda: torch.autograd.grad(module(maps), inputs, douts)
    return "forward", lambda: module(maps)


def microseconds(timed: Timed) -> dict[str, list[float]]:
    """CPU time of each call in each round, the calls in turns."""
    times: dict[str, list[float]] = {name: [] for name in timed.calls}
    timers = {name: timeit.Timer(call, timer=time.process_time) for name, call in timed.calls.items()}
    for timer in timers.values():
        timer.timeit(3)
    for _ in range(ROUNDS):
        gc.collect()
        for name, timer in timers.items():
            times[name].append(timer.timeit(timed.number) / timed.number * 1e6)
    return times


def rows(timed: Timed) -> list[Row]:
    """One a call: medians of the rounds, and the first call's over each."""
    with torch.set_grad_enabled(timed.mode == "train"):
        times = microseconds(timed)
    whole = statistics.median(next(iter(times.values())))
    found = []
    for name, samples in times.items():
        p20, _, _, p80 = statistics.quantiles(samples, n=5)
        p50 = statistics.median(samples)
        found.append({"mode": timed.mode, "what": name, "us": p50, "p20": p20, "p80": p80, "ratio": whole / p50})
    return found


def compiling(size: cases.Size, dtype: torch.dtype) -> list[Row]:
    """What calls of a process compile that has compiled nothing: in each mode the first one, and one of other maps."""
    found = []
    larger = [side * 8 // 7 for side in size.sides]
    for mode in CALLS:
        module, maps, douts = subject("triton", mode, size, dtype, 1)
        name, call = _call(module, maps, douts, [*maps, *module.parameters()])
        sizes = [(*x.shape[:2], side, side) for x, side in zip(maps, larger, strict=True)]
        others = [torch.zeros(size, dtype=dtype, requires_grad=module.training) for size in sizes]
        _, other = _call(module, others, [torch.zeros_like(x) for x in others], [*others, *module.parameters()])
        for what, one in ((f"the first {name}", call), (f"{larger[0]} for {size.side} pixels", other)):
            compiles, before = mock.Mock(return_value=False), _cpu_seconds()
            hook = mock.patch.object(triton.knobs.runtime, "jit_cache_hook", compiles)
            with hook, torch.set_grad_enabled(module.training):
                one()
            seconds = _cpu_seconds() - before
            found.append({"mode": mode, "what": what, "kernels": compiles.call_count, "seconds": seconds})
    return found


def _cpu_seconds() -> float:
    """Of this process's threads, and of the assembler, which is a process of its own: what one core takes."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main(arguments: Sequence[str]) -> int:
    parser = command.parser(
        "host",
        "Times what a forward and a training step cost the host: all of it, its bare launches, and what autograd takes "
        "for as many tensors. The JIT and the launcher are Triton's own; the driver behind them is stood in for, so no "
        "GPU is needed. The kernels are compiled first, in a folder of their own, which takes a minute at the paper's "
        "size and is timed as well. Times are CPU time of this machine: read them as ratios. Then the torch backend, "
        "with maps of a few pixels.",
        "",
        "--size tiny --dtype float32   # in half a minute",
    )
    parser.add_argument("--size", choices=cases.SIZES, default="paper", help=command.sizes())
    parser.add_argument("--dtype", choices=cases.DTYPES, default="bfloat16", help=command.DTYPE)
    parser.add_argument("--batch", type=command.positive_integer, default=1, metavar="B", help=command.BATCH)
    parser.add_argument("--json", type=command.file, metavar="FILE", help="file that rows and environment go to")
    chosen = parser.parse_args(arguments)
    reason = stand_in.why_not_compiled()
    if reason is not None:
        return command.not_run("host", reason, "unset it")
    reason = stand_in.why_no_launches()
    if reason is not None:
        return command.not_run("host", reason, "it needs a machine with a C compiler and without a GPU")
    torch.set_num_threads(1)
    its, size, dtype = environment(), cases.SIZES[chosen.size], cases.DTYPES[chosen.dtype]
    print(f"environment: {describe(its)}\ncompiling", flush=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(triton.knobs.cache, "dir", folder),
        stand_in.standing_in(TARGET, record=False),
    ):
        first = compiling(size, dtype)
        print(report.compiling(first), flush=True)
        found = [row for mode in CALLS for row in rows(of_kernels(mode, size, dtype, chosen.batch))]
    found += [row for mode in CALLS for row in rows(of_torch(mode))]
    print(report.calls(found))
    if chosen.json is not None:
        kept = {"environment": its, "size": chosen.size, "dtype": chosen.dtype, "batch": chosen.batch}
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps(kept | {"rows": found, "compiling": first}, indent=1) + "\n")
    return 0
