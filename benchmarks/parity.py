"""How far implementations are from float64, and whether they are within their error budget."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import cases, measure, providers
from benchmarks.cases import Problem
from benchmarks.providers import Provider, Subject
from reference import budget
from reference.budget import Error

SCALE = 2.0**-6  # of upstream gradients: a float16 sum over the paper's largest map overflows with larger ones


class Gate:
    """The reference's results in float64, and the error that the reference itself makes in the problem's dtype.

    In training the gradients of the inputs are held to the same budget as the outputs; not those of a host, in which
    rounding decides the slope of too many a ReLU. The parameters that get gradients are the same.

    Args:
        problem: its batch may have been made smaller for what float64 takes.
        inputs, gradients: of `providers.inputs_of`.
    """

    def __init__(self, problem: Problem, inputs: Sequence[Tensor], gradients: Sequence[Tensor] | None) -> None:
        self.problem, self.inputs, self.gradients = problem, inputs, gradients
        double = dataclasses.replace(problem, dtype=torch.float64)
        before_relu: list[Tensor] = []

        def watch(module: nn.Module) -> None:
            nonlocal before_relu
            if problem.case in ("dca", "upsample"):
                before_relu = budget.before_relu(module)

        plain = providers.PROVIDERS["reference"]
        upstream = None if gradients is None else [g.double() for g in gradients]
        subject = providers.build(plain, double, [x.double() for x in inputs], upstream, watch)
        self.exact = [y.detach() for y in subject.forward()]
        self.exact_gradients: list[Tensor] = []
        if gradients is not None and problem.case not in cases.HOSTS:
            if before_relu:
                self.gradients = budget.masked(gradients, before_relu)
                subject.gradients = [g.double() for g in self.gradients]
            self.exact_gradients = list(subject.backward())
        with budget.without_tf32():
            same = self.subject(plain)
            baseline = self._errors(self._results(same))
        self.unused = same.unused
        self.allowed = [
            budget.allowed(error, exact, problem.dtype)
            for error, exact in zip(baseline, (self.exact, self.exact_gradients), strict=False)
        ]

    def subject(self, provider: Provider) -> Subject:
        """A provider on the gate's inputs, eager or compiled; a graph replays the same kernels."""
        return providers.build(provider, self.problem, self.inputs, self.gradients)

    def check(self, subject: Subject) -> tuple[Error, bool, float]:
        """The error of the outputs, whether all is within the budget, and the seconds of this, the first, call."""
        results: list[Sequence[Tensor]] = []
        seconds = measure.seconds(lambda: results.extend(self._results(subject)))
        errors = self._errors(results)
        within = (max(budget.used(*of)) <= 1 for of in zip(errors, self.allowed, strict=False))
        whole = getattr(subject, "unused", self.unused) == self.unused  # a stage of kernels computes all that there are
        return errors[0], whole and all(within), seconds

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
        self.maps, self.gradients = list(maps), gradients
        double = copy.deepcopy(plain).double()
        wide = [x.double() for x in maps]
        if gradients is not None:
            self.gradients = budget.off_the_kink(copy.deepcopy(double), wide, gradients)
            gradients = [g.double() for g in self.gradients]
        self.exact = results(double, wide, gradients)
        # The largest error of few parameters' gradients is luck: the reference's is that of several orders of its sums.
        flips = [(), (2,), (3,)] if gradients is not None else [()]
        with budget.without_tf32():
            errors = [self._errors(flipped(copy.deepcopy(plain), self.maps, self.gradients, axes)) for axes in flips]
        self.allowed = {}
        for kind, exact in self.exact.items():
            baseline = Error(max(e[kind].largest for e in errors), max(e[kind].rms for e in errors))
            self.allowed[kind] = budget.allowed(baseline, exact, maps[0].dtype)

    def excess(self, module: Any) -> dict[str, float]:
        """The error over what it may be, of outputs, gradients and buffers; the module's buffers stay as they are."""
        errors = self._errors(results(copy.deepcopy(module), self.maps, self.gradients))
        return {kind: max(budget.used(errors[kind], most)) for kind, most in self.allowed.items()}

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
