"""How far implementations are from float64, and whether they are within their error budget."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks import cases, measure, providers
from benchmarks.cases import Problem
from benchmarks.providers import Provider, Subject

# The error budget, here and in the tests: two results that round about as often as each other differ in their largest
# error by less than a factor of two; a root mean square moves less from draw to draw than a maximum.
MAX_RATIO = 2.0
RMS_RATIO = 1.5
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


def within_budget(ours: Error, baseline: Error, exact: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether our error is at most the baseline's in the same dtype by the ratios above, but for one rounding step."""
    step = torch.finfo(dtype).eps * max(e.abs().max().item() for e in exact)
    return ours.largest <= MAX_RATIO * baseline.largest + step and ours.rms <= RMS_RATIO * baseline.rms + step


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
