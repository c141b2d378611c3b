"""How far two implementations are from float64, and whether the fused one is within its error budget."""

import copy
import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks import cases

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


def check(modules: dict[str, nn.Module], maps: list[Tensor], training: bool) -> tuple[dict[str, Error], bool]:
    """The error of the reference and of the fused module against the reference in float64, and whether all is well.

    In training the errors are those of the outputs; the gradients of the maps are held to the same budget.
    """
    double = copy.deepcopy(modules["reference"]).double().train(training)
    exact_maps = [x.double() for x in maps]
    before_relu: list[Tensor] = []
    for bn_relu in double.bn_relu:
        bn_relu[0].register_forward_hook(lambda module, args, out: before_relu.append(out.detach()))
    exact, _ = cases.step(double, exact_maps, None)
    gradients = None
    if training:
        gradients = [g * (y.abs() > KINK) for g, y in zip(cases.upstream(maps), before_relu, strict=True)]
        exact, exact_gradients = cases.step(double, exact_maps, [g.double() for g in gradients])
    errors, gradient_errors = {}, {}
    for name, module in modules.items():
        module = copy.deepcopy(module).train(training)  # the modules that are timed keep their running buffers
        outputs, map_gradients = cases.step(module, maps, gradients)
        errors[name] = Error.of(outputs, exact)
        if training:
            gradient_errors[name] = Error.of(map_gradients, exact_gradients)
    dtype = maps[0].dtype
    well = within_budget(errors["fused"], errors["reference"], exact, dtype)
    if training:
        well = well and within_budget(gradient_errors["fused"], gradient_errors["reference"], exact_gradients, dtype)
    return errors, well
