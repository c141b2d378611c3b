"""`python -m benchmarks smoke`: whether the kernels are right on this machine, a line a case, without a stop."""

import argparse
import collections
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.knobs import HookChain

import dca_kernels
import reference
from benchmarks import cases, command, journal, measure, parity, providers
from benchmarks.cases import Problem
from benchmarks.determinism import differing
from benchmarks.environment import describe, environment
from benchmarks.group import lost
from benchmarks.offline.compile import said
from benchmarks.run import BROKEN
from dca_kernels.triton_backend import launch

KINDS = {
    "golden": "what the official module computed, in float64",
    "parity": "the reference's results in the same dtype, within the error budget",
    "graph": "a CUDA graph's replay against an eager call, bit for bit",
}
TRIES = 2  # a case that was begun so often and never ended hangs the GPU


@dataclass
class Watch:
    """The kernels that were launched; each is waited for, so that what fails is the last of them."""

    kernels: list[str] = dataclasses.field(default_factory=list)

    @contextlib.contextmanager
    def launches(self) -> Iterator[None]:
        """By Triton's hooks: a call goes as a user's. The interpreter has none, and its launches are replaced."""
        with self._hooked() if torch.cuda.is_available() else self._replaced():
            yield

    def _hooked(self) -> contextlib.AbstractContextManager:
        enter, leave = HookChain(), HookChain(reversed=True)
        enter.add(lambda metadata: self._note(metadata.get()["name"]))
        leave.add(lambda metadata: _wait())
        return mock.patch.multiple(triton.knobs.runtime, launch_enter_hook=enter, launch_exit_hook=leave)

    def _replaced(self) -> contextlib.AbstractContextManager:
        run = launch.run

        def note_and_run(kernel: Any, programs: int, config: dict[str, int], **arguments: Any) -> None:
            self._note(kernel.__name__)
            run(kernel, programs, config, **arguments)

        return mock.patch.object(launch, "run", note_and_run)

    def _note(self, name: str) -> None:
        self.kernels.append(name.removeprefix("_").removesuffix("_kernel"))


def _wait() -> None:
    if not torch.cuda.is_current_stream_capturing():
        torch.cuda.synchronize()


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, which an element that is never written keeps."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# The cases. Each returns what it found, and whether that is right.

Found = tuple[bool, str]


def golden(name: str) -> Found:
    """What the official module computed in float64."""
    from tests.oracle import Golden, assert_same, evaluate, resized_blocks  # here: it needs pytest

    case, device = Golden(name), measure.device()
    module = dca_kernels.DCA(**case.arguments, backend="triton")
    module.load_state_dict(case.state)
    module.to(device, torch.float64).train(case.train)
    # Interpreted, a program of any size takes about as long: with larger blocks there are few.
    with poisoned(), contextlib.nullcontext() if device.type == "cuda" else resized_blocks(16):
        found = case.sample(evaluate(module, [x.to(device) for x in case.maps], [g.to(device) for g in case.upstream]))
    expected = case.expected(True)
    try:
        assert_same(found, expected)
    except AssertionError as error:
        return False, " ".join(str(error).split())[:200]
    return True, f"{len(expected)} tensors"


def same_as_reference(problem: Problem, channels_last: bool) -> Found:
    """Outputs, in training gradients and buffers too, within the error budget of the reference in the same dtype."""
    device, size = measure.device(), problem.size
    torch.manual_seed(cases.SEED)
    plain = reference.DCA(size.features, None, size.patch)
    ours = dca_kernels.DCA(size.features, None, size.patch, backend="triton")
    ours.load_state_dict(plain.state_dict())
    plain, ours = (m.to(device, problem.dtype).train(problem.training) for m in (plain, ours))
    maps = [torch.randn(problem.batch, c, s, s) for c, s in zip(size.features, size.sides, strict=True)]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    maps = [x.to(device, problem.dtype).contiguous(memory_format=layout) for x in maps]
    upstream = [torch.randn_like(x).mul_(parity.SCALE) for x in maps] if problem.training else None
    judge = parity.Judge(plain, maps, upstream)
    with poisoned():
        excess = judge.excess(ours)
    said = ", ".join(f"{kind} {value:.2g}" for kind, value in excess.items())
    return all(value <= 1 for value in excess.values()), f"error over what it may be: {said}"


def replay_is_eager(problem: Problem) -> Found:
    """A CUDA graph's replay, bit for bit; without a GPU a second eager call stands in for it."""
    device = measure.device()
    inputs = providers.inputs_of(problem, cases.load_image(None), device)
    subject = providers.build(providers.PROVIDERS["triton"], problem, *inputs)

    def results(of: providers.Subject) -> list[Tensor]:
        outputs = [y.detach().clone() for y in of.forward()]  # a graph of autograd's that lives on breaks a capture
        return [*outputs, *(g.clone() for g in of.backward())] if of.has_backward else outputs

    expected = results(subject)
    gpu = device.type == "cuda"
    replay = providers.Graphed(subject) if gpu else subject
    differ = sum(differing(a, b) for a, b in zip(results(replay), expected, strict=True))
    what = "replay" if gpu else "no GPU: a second eager call"
    return differ == 0, f"{what}: {differ} of {sum(x.numel() for x in expected)} values differ"


def stages(problem: Problem, channels_last: bool) -> str:
    """Which stages alone are off, with their kernels: where to look when the module is wrong."""
    found = []
    for stage in cases.STAGES:
        one, watch = dataclasses.replace(problem, case=stage), Watch()
        inputs, upstream = providers.inputs_of(one, cases.load_image(None), measure.device())
        if channels_last:
            inputs = [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs]
        gate = parity.Gate(one, inputs, upstream and [g * parity.SCALE for g in upstream])
        with watch.launches():
            _, well, _ = gate.check(gate.subject(providers.PROVIDERS["triton"]))
        if not well:
            found.append(f"{stage} ({', '.join(dict.fromkeys(watch.kernels))})")
    return f"stages that are off alone: {'; '.join(found) or 'none'}"


@dataclass(frozen=True)
class Case:
    name: str
    check: Callable[[], Found]
    explain: Callable[[], str] | None = None


def all_cases(
    kinds: Sequence[str],
    vectors: Sequence[str],
    size: str,
    batches: Sequence[int],
    dtypes: Sequence[str],
    phases: Sequence[str],
) -> Iterator[Case]:
    """The golden vectors, then parity, then graphs."""
    for name in vectors if "golden" in kinds else ():
        yield Case(f"golden {name}, float64", lambda name=name: golden(name))
    for dtype, batch, phase, channels_last in itertools.product(dtypes, batches, phases, (False, True)):
        if "parity" in kinds:
            problem = Problem("dca", cases.SIZES[size], batch, cases.DTYPES[dtype], phase == "train")
            layout = "channels_last" if channels_last else "contiguous"
            yield Case(
                f"parity {size}, {dtype}, batch {batch}, {phase}, {layout}",
                lambda problem=problem, layout=channels_last: same_as_reference(problem, layout),
                lambda problem=problem, layout=channels_last: stages(problem, layout),
            )
    for dtype, batch, phase in itertools.product(dtypes, batches, phases):
        if "graph" in kinds:
            problem = Problem("dca", cases.SIZES[size], batch, cases.DTYPES[dtype], phase == "train")
            name = f"graph {size}, {dtype}, batch {batch}, {phase}"
            yield Case(name, lambda problem=problem: replay_is_eager(problem))


def perform(case: Case) -> tuple[dict[str, Any], bool]:
    """What is written of a case, and whether the GPU was lost."""
    watch, begin = Watch(), time.perf_counter()
    gone = False
    try:
        with watch.launches():
            well, found = case.check()
        result = {"case": case.name, "well": well, "found": found}
        if not well and case.explain is not None:
            result["where"] = case.explain()
    except Exception as error:  # whatever a kernel or the reference raised: the next case goes on
        gone = lost(error)
        kernel = watch.kernels[-1] if watch.kernels else "none"
        result = {"case": case.name, "well": False, "found": said(error), "where": f"last kernel launched: {kernel}"}
    return result | {"seconds": round(time.perf_counter() - begin, 2), "lost": gone}, gone


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Kernels that were compiled in this block, and not found in the cache."""
    names: list[str] = []

    def note(*, src: Any, metadata: dict[str, Any], cache_hit: bool, **rest: Any) -> None:
        if not cache_hit:
            names.append(metadata["name"].removeprefix("_").removesuffix("_kernel"))

    with mock.patch.object(triton.knobs.compilation, "listener", note):
        yield names


def parser() -> argparse.ArgumentParser:
    parser = command.parser(
        "smoke",
        "Checks the kernels against the golden vectors (float64) and against the reference (every dtype, evaluation "
        "and training, both layouts of the maps), with memory that holds NaN, and CUDA graphs against eager calls bit "
        "for bit. A failure is a line that names its kernel; the next case goes on. What the journal has as right "
        "already, from the same code on the same machine, is not checked again, nor what lost or hung the GPU. Needs a "
        "GPU. Exit status 1: a case failed.",
        "",
        "--kind parity --dtype bfloat16 --batch 1 --phase eval",
    )
    parser.add_argument("--size", choices=cases.SIZES, default="paper", help=command.sizes())
    parser.add_argument(
        "--batch", nargs="+", type=command.positive_integer, default=[1, 2, 8], metavar="B", help=command.BATCH
    )
    parser.add_argument("--dtype", nargs="+", choices=cases.DTYPES, default=list(cases.DTYPES), help=command.DTYPE)
    parser.add_argument(
        "--phase", nargs="+", choices=cases.MODES, default=list(cases.MODES), help=command.listed(command.PHASES)
    )
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS), help=command.listed(KINDS))
    parser.add_argument("--golden", nargs="+", metavar="NAME", help="names of golden vectors (default: all)")
    parser.add_argument("--journal", type=command.file, metavar="FILE", help=command.JOURNAL)
    return parser


def vectors_of(chosen: argparse.Namespace) -> list[str]:
    """The golden vectors that are checked."""
    if "golden" not in chosen.kind:
        return []
    from tests.oracle import GOLDEN  # here: it needs pytest

    vectors = chosen.golden or list(GOLDEN)
    unknown = [name for name in vectors if name not in GOLDEN]
    if unknown:
        parser().error(f"argument --golden: expected names of {', '.join(GOLDEN)}, got {unknown[0]!r}")
    return vectors


def main(arguments: Sequence[str]) -> int:
    chosen = parser().parse_args(arguments)
    reason = providers.why_no_kernels(measure.device())
    if reason is not None:
        return command.not_run("smoke", reason, command.interpreted("smoke"))
    vectors = vectors_of(chosen)
    print(f"environment: {describe(environment())}", flush=True)
    here = {key: value for key, value in environment().items() if key != "date"}
    entries = [entry for entry in journal.read(chosen.journal) if here.items() <= entry["environment"].items()]
    begun = collections.Counter(entry["case"] for entry in entries if entry["step"] == "smoke begun")
    earlier = {entry["case"]: entry for entry in entries if entry["step"] == "smoke"}
    total, failed = 0, 0
    with compilations() as compiled:
        selection = chosen.size, chosen.batch, chosen.dtype, chosen.phase
        for case in all_cases(chosen.kind, vectors, *selection):
            total += 1
            known = earlier.get(case.name)
            if known is not None and (known["well"] or known["lost"]):
                failed += not known["well"]
                continue
            if known is None and begun[case.name] >= TRIES:
                result, gone = {"case": case.name, "well": False, "found": f"begun {TRIES} times, never ended"}, False
            else:
                journal.write(chosen.journal, "smoke begun", case=case.name)
                result, gone = perform(case)
            failed += not result["well"]
            journal.write(chosen.journal, "smoke", **result)
            where = f"; {result['where']}" if "where" in result else ""
            print(f"{case.name}: {'ok' if result['well'] else 'FAILED'}: {result['found']}{where}", flush=True)
            if gone:
                print("the GPU answers no more; run the same command again to go on", flush=True)
                return BROKEN
    if compiled:
        print(f"{len(compiled)} kernels were compiled on the way: {', '.join(sorted(set(compiled)))}")
    print(f"{total} cases, {failed} failed")
    return 1 if failed else 0
