"""What a forward or a training step moves and computes, counted without a GPU: interpreted, and of plain PyTorch.

Nothing here is a time that was measured. `python -m benchmarks.offline.traffic` prints the tables.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from benchmarks import cases
from benchmarks.offline import flow, traffic_tables
from benchmarks.offline.flow import Executions, Programs
from benchmarks.offline.traffic_tables import GROUPS
from dca_kernels.backends import use_backend

SECTOR = 32  # bytes: the least that a GPU's memory moves
SLACK = 1.25  # how many times what it cannot avoid a run may move
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# How often each mode at least goes over the maps: two reads and a write of a forward; of a backward, two reads of the
# map and of the upstream gradient each, and a write of the map's gradient.
PASSES = {"eval": 3, "train": 3, "step": 8}


@dataclass(frozen=True)
class KernelTraffic:
    """One launch. Bytes; masked-off lanes do not count.

    Attributes:
        kernel: its function's name without `_` and `_kernel`.
        programs: of its grid.
        requested_loaded: bytes that its programs load: what the caches deliver.
        requested_stored: bytes that its programs store.
        loaded: sectors that it loads at least once, for each of GROUPS: the least that memory delivers.
        stored: the same of what it stores.
        handed_on: of `stored["tokens"]`, what a later launch loads; what two launches store counts for the second.
        products: floating-point operations of `tl.dot`, padding included, for each kind of arithmetic: bf16, fp16, fp64
            or, of float32, tf32, tf32x3 (which is three on the hardware) or ieee.
        ways: its programs, by the way that they go.
    """

    kernel: str
    programs: int
    requested_loaded: int
    requested_stored: int
    loaded: dict[str, int]
    stored: dict[str, int]
    handed_on: int
    products: dict[str, int]
    ways: list[Programs]

    @property
    def unique(self) -> int:
        """Bytes that memory moves at least; a sector that is loaded and stored counts twice."""
        return sum(self.loaded.values()) + sum(self.stored.values())

    @property
    def requested(self) -> int:
        return self.requested_loaded + self.requested_stored

    @property
    def flops(self) -> int:
        return sum(self.products.values())


@dataclass(frozen=True)
class OperatorTraffic:
    """One PyTorch operator that would be a kernel on a GPU: bytes of the distinct tensors that it reads and writes."""

    operator: str
    read: int
    written: int


@dataclass(frozen=True)
class Gpu:
    """Bytes a second of a copy, and operations a second of large products, of each kind of arithmetic.

    Those of a copy and of bfloat16 were measured (benchmarks/results/NOTES.md), the others are estimates.
    """

    bandwidth: float
    rates: dict[str, float]
    multiprocessors: int = 132
    clock: float = 1.75e9  # cycles a second


GPUS = {
    "H100": Gpu(2.85e12, {"bf16": 766e12, "fp16": 766e12, "tf32": 383e12, "tf32x3": 383e12 / 3, "ieee": 53e12}),
    "H200": Gpu(4.14e12, {"bf16": 789e12, "fp16": 789e12, "tf32": 395e12, "tf32x3": 395e12 / 3, "ieee": 53e12}),
}
TARGET = "sm_90"  # whose configurations the counted kernels have


# Triton kernels


class _Groups:
    """Whose memory is whose: maps, outputs and their gradients, and parameters; what else kernels get is tokens'."""

    def __init__(self) -> None:
        self._of: dict[int, str] = {}  # by a storage's address
        self._kept: list[Tensor] = []  # no later tensor may get the same addresses

    def note(self, group: str, structure: object) -> None:
        for tensor in tree_leaves(structure):
            if isinstance(tensor, Tensor):
                self._of[tensor.untyped_storage().data_ptr()] = group
                self._kept.append(tensor)

    def of(self, address: int) -> str:
        return self._of.get(address, "tokens")

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Note what the stages are given inside the `with` block, by the structures that they are given it in."""
        from dca_kernels.triton_backend import batch_statistics, eager, grid_gradient, plan

        def forward(method: Callable, its: Any, maps: Any, parameters: Any, tensors: Any, addresses: Any) -> Any:
            outs = method(its, maps, parameters, tensors, addresses)
            self.note("maps", [*maps, *outs])
            self.note("parameters", tensors)
            return outs

        def backward(method: Callable, its: Any, saved: Any, maps: Any, douts: Any, parameters: Any) -> Any:
            gradients = method(its, saved, maps, douts, parameters)
            self.note("maps", [*maps, *douts, *gradients[: len(maps)]])
            self.note("parameters", parameters)
            return gradients

        def tables(method: Callable, *sizes: Any) -> Tensor:
            made = method(*sizes)
            self.note("parameters", made)
            return made

        wrappers = (
            (eager.Forward, "__call__", forward),
            (eager.Backward, "__call__", backward),
            (batch_statistics, "interpolation_tables", tables),
            (grid_gradient, "interpolation_tables", tables),
        )
        with contextlib.ExitStack() as stack:
            for owner, name, wrapper in wrappers:
                stack.enter_context(mock.patch.object(owner, name, _wrapped(getattr(owner, name), wrapper)))
            # A plan would have some tokens where outputs will be.
            stack.enter_context(mock.patch.object(plan, "arranged", _one_behind_another))
            stack.enter_context(mock.patch.object(eager, "_forwards", eager.Latest()))
            yield


def _one_behind_another(parts: Sequence[Any], rooms: Sequence[Any]) -> list[tuple[int, int]]:
    """In the place of `memory.arranged`: in the workspace, none in the place of another."""
    from dca_kernels.triton_backend.memory import aligned

    begins = itertools.accumulate([aligned(part.nbytes) for part in parts], initial=0)
    return [(len(rooms), begin) for _, begin in zip(parts, begins, strict=False)]


class _Buffer:
    """One tensor's memory as one launch sees it: which sectors it loads and stores."""

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.tensor = tensor  # keeps the memory: no later tensor may get the same addresses
        self.begin, self.end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        self.loaded = np.zeros(-(-self.end // SECTOR) - self.begin // SECTOR, dtype=bool)
        self.stored = np.zeros_like(self.loaded)


class _Launch:
    """What one launch does, while it runs."""

    def __init__(self, kernel: str, arguments: dict[str, Any]) -> None:
        self.kernel = kernel.removeprefix("_").removesuffix("_kernel")
        self.programs = 0
        self.patched: set[int] = set()  # modules whose functions see the interpreter's language
        self.loaded = self.stored = 0
        self.products: Counter[str] = Counter()
        self._program: list[tuple[flow.Place, Executions]] = []  # what the one at work came to
        self._ways: dict[tuple[tuple[str, int], ...], Programs] = {}
        self.buffers: dict[int, _Buffer] = {}
        for tensor in tree_leaves(list(arguments.values())):
            if isinstance(tensor, Tensor):
                self.buffers.setdefault(tensor.untyped_storage().data_ptr(), _Buffer(tensor))

    def load(self, pointers: Any, mask: Any) -> None:
        self.loaded += self._touch(pointers, mask, "loaded")

    def store(self, pointers: Any, mask: Any) -> None:
        self.stored += self._touch(pointers, mask, "stored")

    def _touch(self, pointers: Any, mask: Any, direction: str) -> int:
        """Mark the sectors of the pointers that exist; return how many bytes all lanes together ask for."""
        lanes = np.broadcast_to(mask.data, pointers.data.shape).astype(bool, copy=False)  # ints after some `&`
        addresses = pointers.data[lanes]
        if addresses.size == 0:
            return 0
        first, last, seen = int(addresses.min()), int(addresses.max()), 0
        for buffer in self.buffers.values():
            if buffer.begin <= last and first < buffer.end:
                own = addresses
                if first < buffer.begin or buffer.end <= last:
                    own = addresses[(addresses >= buffer.begin) & (addresses < buffer.end)]
                getattr(buffer, direction)[own // SECTOR - buffer.begin // SECTOR] = True
                seen += own.size
        if seen != addresses.size:
            raise IndexError(
                f"{self.kernel}: {addresses.size - seen} of {addresses.size} addresses lie outside of its tensors"
            )
        return addresses.size * max(1, pointers.get_element_ty().primitive_bitwidth // 8)

    def dot(self, a: Any, b: Any, precision: Any) -> None:
        name = a.dtype.scalar.name
        self.products[precision.name.lower() if name == "fp32" else name] += 2 * a.data.size * b.data.shape[-1]

    def come(self, frame: FrameType, what: Executions) -> None:
        """The program at work has come, in this frame, to a `for` or an `if`."""
        place = flow.place(frame.f_code.co_filename, frame.f_lineno)
        if place is not None:
            self._program.append((place, what))

    def end_program(self) -> None:
        """There is another one at work from now on, or none."""
        turns: dict[str, list[int]] = {}
        executions: dict[str, Executions] = {}
        for place, one in self._program:
            if place.unrolled:
                turns.setdefault(place.name, []).append(one.ran)
            executions[place.name] = executions.get(place.name, Executions()).plus(one)
        key = tuple((name, ran.index(1)) for name, ran in turns.items() if sum(ran) == 1)
        before = self._ways.get(key, Programs(0, dict(key), {}))
        merged = {name: one.plus(before.executions.get(name, Executions())) for name, one in executions.items()}
        self._ways[key] = Programs(before.count + 1, before.turns, before.executions | merged)
        self._program = []

    @property
    def ways(self) -> list[Programs]:
        return list(self._ways.values())

    def sectors(self, direction: str, groups: _Groups) -> dict[str, int]:
        """Bytes of the marked sectors of each group."""
        found = dict.fromkeys(GROUPS, 0)
        for address, buffer in self.buffers.items():
            found[groups.of(address)] += SECTOR * int(getattr(buffer, direction).sum())
        return found


def count_kernels(run: Callable[[], object], **known: object) -> list[KernelTraffic]:
    """What each launch that `run` makes in Triton's interpreter moves and computes, in order.

    Values only matter where a kernel branches on them: in bfloat16 they are wrong unless the interpreter is corrected
    (`tests.interpreter`). Nothing shares memory with anything else meanwhile.

    Args:
        run: calls of a DCA, or of kernels.
        known: tensors of each of GROUPS, beside those that a DCA's stages are given.

    Raises:
        RuntimeError: kernels are compiled.
    """
    launches: list[_Launch] = []
    groups = _Groups()
    with _recorded(launches), groups.noted():
        run()
    for group, tensors in known.items():
        groups.note(group, tensors)
    handed_on = _handed_on(launches, groups)
    return [
        KernelTraffic(
            kernel=launch.kernel,
            programs=launch.programs,
            requested_loaded=launch.loaded,
            requested_stored=launch.stored,
            loaded=launch.sectors("loaded", groups),
            stored=launch.sectors("stored", groups),
            handed_on=bytes_handed_on,
            products=dict(launch.products),
            ways=launch.ways,
        )
        for launch, bytes_handed_on in zip(launches, handed_on, strict=True)
    ]


@contextlib.contextmanager
def _recorded(launches: list[_Launch]) -> Iterator[None]:
    """The interpreter writes down in `launches` what it does. Its methods are wrapped: they may be corrected ones."""
    import triton  # not above: what is counted of plain PyTorch, and the tables, do without
    from triton.runtime import interpreter

    if not triton.knobs.runtime.interpret:
        raise RuntimeError("kernels are compiled: TRITON_INTERPRET=1 is not set")

    def launch(method: Callable, executor: Any, *args: Any, **kwargs: Any) -> Any:
        launches.append(_Launch(executor.fn.__name__, dict(zip(executor.arg_names, args, strict=False)) | kwargs))
        result = method(executor, *args, **kwargs)
        launches[-1].end_program()
        return result

    def grid(method: Callable, builder: Any, *sizes: int) -> Any:
        launches[-1].programs = int(np.prod(sizes))
        return method(builder, *sizes)

    def program(method: Callable, builder: Any, *indices: int) -> Any:
        if any(indices):
            launches[-1].end_program()
        return method(builder, *indices)

    def load(method: Callable, builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].load(pointers, mask)
        return method(builder, pointers, mask, *rest)

    def store(method: Callable, builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].store(pointers, mask)
        return method(builder, pointers, value, mask, *rest)

    def atomic(method: Callable, builder: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].load(pointers, mask)
        launches[-1].store(pointers, mask)
        return method(builder, operation, pointers, value, mask, *rest)

    def dot(method: Callable, builder: Any, a: Any, b: Any, d: Any, precision: Any, *rest: Any) -> Any:
        launches[-1].dot(a, b, precision)
        return method(builder, a, b, d, precision, *rest)

    def set_attribute(method: Callable, scope: Any, owner: Any, name: str, value: Any) -> Any:
        """The interpreter's meaning of `if` and of `tl.range`."""
        if name == "__bool__":
            value = _counted_branch(launches, value)
        elif name == "range":
            value = _counted_loop(launches, value)
        return method(scope, owner, name, value)

    def patch_language(method: Callable, function: Any) -> Any:
        """Once for each module and launch, not for every call: a third of the time."""
        module = id(function.__globals__)
        if module in launches[-1].patched:
            return None
        launches[-1].patched.add(module)
        return method(function)

    builder = interpreter.InterpreterBuilder
    wrappers = {
        (interpreter.GridExecutor, "__call__"): launch,
        (interpreter, "_patch_lang"): patch_language,
        (interpreter._LangPatchScope, "set_attr"): set_attribute,
        (builder, "set_grid_dim"): grid,
        (builder, "set_grid_idx"): program,
        (builder, "create_masked_load"): load,
        (builder, "create_masked_store"): store,
        (builder, "create_atomic_rmw"): atomic,
        (builder, "create_dot"): dot,
    }
    # Checks of integers are prepared always, and made only with debug=True: a part of the time, too.
    options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    with mock.patch.object(interpreter.interpreter_builder, "options", options), contextlib.ExitStack() as stack:
        for (owner, name), wrapper in wrappers.items():
            stack.enter_context(mock.patch.object(owner, name, _wrapped(getattr(owner, name), wrapper)))
        for module in [m for name, m in sys.modules.items() if name.startswith("dca_kernels.triton_backend.")]:
            stack.enter_context(mock.patch.object(module, "range", _counted_loop(launches, range), create=True))
        yield


def _counted_branch(launches: Sequence[_Launch], truth: Callable) -> Callable:
    def count(tensor: Any) -> bool:
        found = truth(tensor)
        launches[-1].come(sys._getframe(1), Executions(1, int(found), int(found)))
        return found

    return count


def _counted_loop(launches: Sequence[_Launch], sequence: Callable) -> Callable:
    """Of copies that the compiler makes of a loop's body one counts."""

    def count(*bounds: Any, loop_unroll_factor: int = 1, **options: Any) -> Any:
        values = sequence(*bounds, **options)
        if launches:
            step = abs(values.step) * max(1, int(loop_unroll_factor or 1))
            extent = abs(values.stop - values.start) if len(values) else 0
            ran = -(-extent // step)
            launches[-1].come(sys._getframe(1), Executions(1, ran, ran, extent, step))
        return values

    return count


def _wrapped(method: Callable, wrapper: Callable) -> Callable:
    return lambda *args, **kwargs: wrapper(method, *args, **kwargs)


def _handed_on(launches: Sequence[_Launch], groups: _Groups) -> list[int]:
    """For each launch, the bytes of tokens that it stores last before a later launch loads them."""
    wanted: dict[int, np.ndarray] = {}
    bytes_handed_on = []
    for launch in reversed(launches):
        bytes_handed_on.append(0)
        for address, buffer in launch.buffers.items():
            later = wanted.setdefault(address, np.zeros_like(buffer.loaded))
            if groups.of(address) == "tokens":
                bytes_handed_on[-1] += SECTOR * int((buffer.stored & later).sum())
            wanted[address] = later & ~buffer.stored | buffer.loaded
    return bytes_handed_on[::-1]


# Plain PyTorch


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[OperatorTraffic] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        written = [t for t in tree_leaves(results) if isinstance(t, Tensor)]
        memory = {t.untyped_storage().data_ptr() for t in read}
        fresh = any(t.untyped_storage().data_ptr() not in memory for t in written)
        name = function.overloadpacket.__name__
        if (fresh or function._schema.is_mutable) and "empty" not in name and name != "set_":
            self.seen.append(OperatorTraffic(name, _bytes(read), _bytes(written)))
        return results


def _bytes(tensors: Sequence[Tensor]) -> int:
    """Of distinct tensors; what is repeated by a stride of zero counts once."""
    distinct = {(t.data_ptr(), t.shape, t.stride()): t for t in tensors}
    return sum(
        t.element_size() * int(np.prod([n if stride else 1 for n, stride in zip(t.shape, t.stride(), strict=True)]))
        for t in distinct.values()
    )


def count_reference(run: Callable[[], object]) -> list[OperatorTraffic]:
    """What each operator of plain PyTorch reads and writes, in order.

    Counted is the operator that PyTorch dispatches below autograd, as one kernel, if it has a result in memory of its
    own or changes an argument in place: views, `empty`, `set_` and what reads a number are none. It reads each distinct
    tensor among its arguments once and writes its results once. That is a floor: the kernels behind one operator may be
    several, and BatchNorm in training, for one, reads its input twice.
    """
    with _Operators() as operators:
        run()
    return operators.seen


def _convolution_backward_flops(
    upstream: Sequence[int], x: Sequence[int], weight: Sequence[int], *rest: Any, **_: Any
) -> int:
    """A forward's for each operand's gradient; PyTorch's own formula takes a depthwise convolution for a dense one."""
    *_, wanted = rest
    return 2 * math.prod(upstream) * math.prod(weight[1:]) * sum(wanted[:2])


FLOPS = {torch.ops.aten.convolution_backward: _convolution_backward_flops}


# Tables


def roofline(kernels: Sequence[KernelTraffic], gpu: str) -> list[dict[str, Any]]:
    """The least time of each kernel on a GPU, the larger of its bytes over bandwidth and its products over their rate.

    ESTIMATES, not measurements: microseconds from GPUS, as if every kernel were alone, launched for nothing, and had
    nothing but products to compute. The last row is the sum.
    """
    rows = []
    for kernel in kernels:
        memory = kernel.unique / GPUS[gpu].bandwidth * 1e6
        compute = sum(flops / GPUS[gpu].rates[kind] for kind, flops in kernel.products.items()) * 1e6
        rows.append(
            {"kernel": kernel.kernel, "memory_us": memory, "compute_us": compute, "floor_us": max(memory, compute)}
        )
    total = {key: sum(row[key] for row in rows) for key in ("memory_us", "compute_us", "floor_us")}
    return [*rows, {"kernel": "sum"} | total]


def bound(kernels: Sequence[KernelTraffic], map_bytes: int, passes: int) -> float:
    """Bytes that a run may move: SLACK times what its design cannot avoid.

    That is the passes over the maps, and a write and a read of each token buffer, of what one kernel stores for a later
    one: tokens, centred ones, covariance, mixing matrix, z. A design with larger buffers has a larger bound.
    """
    return SLACK * (passes * map_bytes + 2 * sum(kernel.handed_on for kernel in kernels))


def main_table(
    patch: int = 28, modes: Sequence[str] = tuple(PASSES), dtypes: Sequence[str] = tuple(DTYPES), gpu: str = "H200"
) -> list[dict[str, Any]]:
    """One row a run (mode, dtype, implementation) on one tile of the bundled image; JSON-able.

    In mode "train" BatchNorm takes the batch's statistics, and in "step" a backward follows; in the other modes nothing
    is kept for one. Rows of `triton` have a list of their kernels, with each one's floor, and how the sum of their
    unique bytes compares with the bound; operators of plain PyTorch between the kernels are launches and bytes like any
    other. A process counts one run, and interprets its kernels: here they may be compiled.
    """
    runs = [(mode, dtype) for mode in reversed(modes) for dtype in dtypes]  # the longest first
    workers = min(len(runs), os.cpu_count() or 1)
    spawn = multiprocessing.get_context("spawn")
    with (
        mock.patch.dict(os.environ, TRITON_INTERPRET="1", OPENBLAS_NUM_THREADS="1"),  # many small products
        concurrent.futures.ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (1,)) as pool,
        tqdm(total=len(runs), desc=f"runs, {workers} at a time", leave=False) as progress,
    ):
        counts = [pool.submit(_count, patch, mode, dtype, gpu) for mode, dtype in runs]
        for _ in concurrent.futures.as_completed(counts):
            progress.update()
    rows = [row for count in counts for row in count.result()]
    return sorted(rows, key=lambda row: list(modes).index(row["mode"]))


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """The interpreter computes as a GPU does, in bfloat16 too, or a kernel's branches would go another way."""
    from dca_kernels.triton_backend import launch
    from tests import interpreter  # here: it needs triton

    interpreter.install()
    with use_backend("triton"), mock.patch.object(launch, "architecture", lambda device: TARGET):
        yield


def _step_of(module: nn.Module, maps: list[Tensor], mode: str) -> Callable[[], object]:
    gradients = cases.upstream(maps) if mode == "step" else None
    return functools.partial(cases.step, module.train(mode != "eval"), maps, gradients)


def count_module(patch: int, mode: str, dtype: str, images: int) -> list[KernelTraffic]:
    """As `count_kernels`, of a call of the module on as many tiles of the bundled image."""
    cpu = torch.device("cpu")
    maps = cases.skip_maps(cases.load_image(None), images, patch, cases.DTYPES[dtype], cpu, cases.FEATURES)
    module = cases.modules(patch, cases.DTYPES[dtype], cpu, cases.FEATURES)["fused"]
    with _as_on_a_gpu():
        return count_kernels(_step_of(module, maps, mode))


def _count(patch: int, mode: str, dtype: str, gpu: str) -> list[dict[str, Any]]:
    from torch.utils.flop_counter import FlopCounterMode  # imports triton

    from dca_kernels import triton_backend
    from dca_kernels.triton_backend import launch

    cpu = torch.device("cpu")
    maps = cases.skip_maps(cases.load_image(None), 1, patch, DTYPES[dtype], cpu, cases.FEATURES)
    modules = cases.modules(patch, DTYPES[dtype], cpu, cases.FEATURES)
    run = {name: _step_of(module, maps, mode) for name, module in modules.items()}
    with _as_on_a_gpu():
        kernels = count_kernels(run["fused"])
        with (
            mock.patch.object(launch, "run", lambda *args, **kwargs: None),
            mock.patch.object(triton_backend, "watched", lambda: False),  # or it would be one operator
        ):
            between = count_reference(run["fused"])
    operators = count_reference(run["reference"])
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        run["reference"]()

    unique = {group: sum(k.loaded[group] + k.stored[group] for k in kernels) for group in GROUPS}
    between_bytes = sum(o.read + o.written for o in between)
    limit = bound(kernels, sum(x.nbytes for x in maps), PASSES[mode])
    total = sum(unique.values()) + between_bytes
    floors = roofline(kernels, gpu)
    case = {"mode": mode, "dtype": dtype, "batch": 1, "patch": patch, "features": list(cases.FEATURES)}
    ours = {
        "implementation": "triton",
        "launches": len(kernels) + len(between),
        "bytes": total,
        **{f"{group}_bytes": unique[group] for group in GROUPS},
        "requested_bytes": sum(k.requested for k in kernels) + between_bytes,
        "flops": sum(k.flops for k in kernels),
        "bound_bytes": limit,
        "of_bound": total / limit,
        "gpu": gpu,
        "floor_us": floors[-1]["floor_us"],
        "kernels": [_row(k) | floor for k, floor in zip(kernels, floors[:-1], strict=True)],
    }
    theirs = {
        "implementation": "reference",
        "launches": len(operators),
        "bytes": sum(o.read + o.written for o in operators),
        "flops": counter.get_total_flops(),
    }
    return [case | ours, case | theirs]


def _row(kernel: KernelTraffic) -> dict[str, Any]:
    """All but the ways of its programs, which are `model`'s."""
    values = asdict(replace(kernel, ways=[]))
    del values["ways"]
    return values


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.offline.traffic",
        description="Counts kernels, bytes and products of a forward and of a training step, of the Triton kernels in "
        "Triton's CPU interpreter and of the reference. No GPU is needed and no time is measured.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES), help="dtype of maps and weights")
    parser.add_argument(
        "--mode", choices=PASSES, nargs="+", default=list(PASSES), help="BatchNorm's in a forward; step: and a backward"
    )
    parser.add_argument(
        "--patch", type=int, default=28, metavar="P", help="side of the token grid; a map has up to 8 P pixels a side"
    )
    parser.add_argument("--gpu", choices=GPUS, default="H200", help="whose floors are estimated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the rows go")
    chosen = parser.parse_args()
    if chosen.patch < 2:
        parser.error("--patch: expected an integer of at least 2, since the encoder normalises over each map")
    rows = main_table(chosen.patch, chosen.mode, chosen.dtype, chosen.gpu)
    print(traffic_tables.describe(rows))
    if chosen.json is not None:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
