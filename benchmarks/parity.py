"""How far implementations are from float64, and whether they are within their error budget."""

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import cases, measure, providers
from benchmarks.cases import Problem
from benchmarks.providers import Provider, Subject

# The error budget, here and in the tests: two results that round about as often as each other differ in their largest
# error by less than a factor of two; a root mean square moves less from draw to draw than a maximum.
MAX_RATIO = 2.0
RMS_RATIO = 1.5
SCALE = 2.0**-6  # of upstream gradients: a float16 sum over the paper's largest map overflows with larger ones
DOUBLE = 1e-9  # of the largest value: what two orders of sums differ by in float64, which has no baseline
KINK = 0.1  # outputs this close to the ReLU's kink get no upstream gradient: rounding decides the ReLU's slope there


@dataclasses.dataclass(frozen=True)
class Error:
    """Error against float64: the largest and the root mean square."""

    largest: float
    rms: float

    @classmethod
    def of(cls, values: Sequence[Tensor], exact: Sequence[Tensor]) -> "Error":
        difference = torch.cat([(v.double() - e.double()).flatten() for v, e in zip(values, exact, strict=True)])
        return cls(difference.abs().max().item(), difference.square().mean().sqrt().item())


def excess(ours: Error, baseline: Error, exact: Sequence[Tensor], dtype: torch.dtype) -> float:
    """Our error over what it may be: the baseline's in the same dtype by the ratios above, and one rounding step."""
    step = (DOUBLE if dtype == torch.float64 else torch.finfo(dtype).eps) * max(e.abs().max().item() for e in exact)
    allowed = MAX_RATIO * baseline.largest + step, RMS_RATIO * baseline.rms + step
    ratios = [
        error / most if most else float(error > 0)
        for error, most in zip((ours.largest, ours.rms), allowed, strict=True)
    ]
    return max(ratios) if all(map(math.isfinite, ratios)) else math.inf


def within_budget(ours: Error, baseline: Error, exact: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether our error is at most the baseline's by the ratios above, but for one rounding step."""
    return excess(ours, baseline, exact, dtype) <= 1


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """The reference's float32 convolutions are float32 where they set the budget; where timed, as PyTorch has them."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


class Gate:
    """The reference's results in float64, and the error that the reference itself makes in the problem's dtype.

    In training the gradients of the inputs are held to the same budget as the outputs; not those of a host, in which
    rounding decides the slope of too many a ReLU.

    Args:
        problem: its batch may have been made smaller for what float64 takes.
        inputs, gradients: of `providers.inputs_of`.
    """

    def __init__(self, problem: Problem, inputs: Sequence[Tensor], gradients: Sequence[Tensor] | None) -> None:
        self.problem, self.inputs, self.gradients = problem, inputs, gradients
        double = dataclasses.replace(problem, dtype=torch.float64)
        before_relu: list[Tensor] = []

        def watch(module: nn.Module) -> None:
            if problem.case in ("dca", "upsample"):
                for head in module.bn_relu:
                    head[0].register_forward_hook(lambda module, args, out: before_relu.append(out.detach()))

        plain = providers.PROVIDERS["reference"]
        upstream = None if gradients is None else [g.double() for g in gradients]
        subject = providers.build(plain, double, [x.double() for x in inputs], upstream, watch)
        self.exact = [y.detach() for y in subject.forward()]
        self.exact_gradients: list[Tensor] = []
        if gradients is not None and problem.case not in cases.HOSTS:
            if before_relu:
                self.gradients = [g * (y.abs() > KINK) for g, y in zip(gradients, before_relu, strict=True)]
                subject.gradients = [g.double() for g in self.gradients]
            self.exact_gradients = list(subject.backward())
        with without_tf32():
            self.baseline = self._errors(self._results(self.subject(plain)))

    def subject(self, provider: Provider) -> Subject:
        """A provider on the gate's inputs, eager or compiled; a graph replays the same kernels."""
        return providers.build(provider, self.problem, self.inputs, self.gradients)

    def check(self, subject: Subject) -> tuple[Error, bool, float]:
        """The error of the outputs, whether all is within the budget, and the seconds of this, the first, call."""
        results: list[Sequence[Tensor]] = []
        seconds = measure.seconds(lambda: results.extend(self._results(subject)))
        errors = self._errors(results)
        within = (
            within_budget(ours, theirs, values, self.problem.dtype)
            for ours, theirs, values in zip(errors, self.baseline, (self.exact, self.exact_gradients), strict=False)
        )
        return errors[0], all(within), seconds

    def _results(self, subject: Subject) -> list[Sequence[Tensor]]:
        """Outputs, and in training what the backward gives where there is one."""
        results: list[Sequence[Tensor]] = [[y.detach() for y in subject.forward()]]
        if self.problem.training and subject.has_backward:
            results.append(subject.backward())
        return results

    def _errors(self, results: Sequence[Sequence[Tensor]]) -> list[Error]:
        """Of the outputs, and of the gradients where there are any."""
        exact = (self.exact, self.exact_gradients)
        return [Error.of(ours, theirs) for ours, theirs in zip(results, exact, strict=False) if theirs]


def gate_batch(problem: Problem, device: torch.device) -> int:
    """The largest batch, at most the problem's, whose reference in float64 fits into memory; 0 where none does."""
    one = dataclasses.replace(problem, batch=1).reference_bytes(8)
    return min(problem.batch, int(measure.free_memory(device) // one))


Results = dict[str, list[Tensor]]


class Judge:
    """A module's outputs, and in training all gradients and BatchNorm's buffers, held to the error budget.

    Args:
        plain: the reference, with the weights of what is judged and in its dtype and mode.
        maps: in the same dtype.
        gradients: upstream; those near a ReLU's kink are left out. None in evaluation.
    """

    def __init__(self, plain: Any, maps: Sequence[Tensor], gradients: Sequence[Tensor] | None) -> None:
        self.maps, self.gradients, self.dtype = list(maps), gradients, maps[0].dtype
        before_relu: list[Tensor] = []
        double = copy.deepcopy(plain).double()
        for head in double.bn_relu:
            head[0].register_forward_hook(lambda module, args, out: before_relu.append(out.detach()))
        wide = [x.double() for x in maps]
        if gradients is not None:
            with torch.no_grad():
                copy.deepcopy(double)(wide)  # its copies of the hooks fill the list; its own buffers stay
            self.gradients = [g * (y.abs() > KINK) for g, y in zip(gradients, before_relu, strict=True)]
            gradients = [g.double() for g in self.gradients]
        self.exact = results(double, wide, gradients)
        # The largest error of few parameters' gradients is luck: the reference's is that of several orders of its sums.
        flips = [(), (2,), (3,)] if gradients is not None else [()]
        with without_tf32():
            errors = [self._errors(flipped(copy.deepcopy(plain), self.maps, self.gradients, axes)) for axes in flips]
        self.baseline = {
            kind: Error(max(e[kind].largest for e in errors), max(e[kind].rms for e in errors)) for kind in self.exact
        }

    def excess(self, module: Any) -> dict[str, float]:
        """The error over what it may be, of outputs, gradients and buffers; the module's buffers stay as they are."""
        errors = self._errors(results(copy.deepcopy(module), self.maps, self.gradients))
        return {
            kind: excess(errors[kind], self.baseline[kind], exact, self.dtype) for kind, exact in self.exact.items()
        }

    def _errors(self, found: Results) -> dict[str, Error]:
        return {kind: Error.of(found[kind], exact) for kind, exact in self.exact.items()}


def results(module: Any, maps: Sequence[Tensor], gradients: Sequence[Tensor] | None) -> Results:
    """Of a forward, or with upstream gradients of a forward and backward, by what they are."""
    if gradients is None:
        with torch.no_grad():
            return {"outputs": list(module(maps))}
    outputs, of_maps = cases.step(module, list(maps), list(gradients))
    buffers = [b for name, b in module.named_buffers() if not name.endswith("num_batches_tracked")]
    of_parameters = [p.grad for p in module.parameters() if p.grad is not None]
    return {
        "outputs": outputs,
        "gradients of maps": of_maps,
        "gradients of parameters": of_parameters,
        "buffers": buffers,
    }


def flipped(module: Any, maps: Sequence[Tensor], gradients: Sequence[Tensor] | None, axes: Sequence[int]) -> Results:
    """As `results`, computed of what is flipped along some axes: the same, but for the order of sums."""
    gradients = None if gradients is None else [g.flip(axes) for g in gradients]
    found = results(module, [x.flip(axes) for x in maps], gradients)
    for kind in ("outputs", "gradients of maps"):
        found |= {kind: [x.flip(axes) for x in found[kind]]} if kind in found else {}
    return found
