"""The error budget: how far from float64 a result may be, by how far the reference in the same dtype is."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Two results that round about as often as each other differ in their largest error by less than a factor of two; a root
# mean square moves less from draw to draw than a maximum.
MAX_RATIO = 2.0
RMS_RATIO = 1.5
DOUBLE = 1e-9  # what two orders of sums differ by in float64, as a part of the values; it has no baseline
KINK = 0.1  # rounding puts values this close to zero on the other side of the ReLU


@dataclass(frozen=True)
class Error:
    """Error against float64: the largest and the root mean square."""

    largest: float
    rms: float

    @classmethod
    def of(cls, values: Sequence[Tensor], exact: Sequence[Tensor]) -> "Error":
        """Of all the values together."""
        return cls(*_max_and_rms([v.double() - e.double() for v, e in zip(values, exact, strict=True)]))


def allowed(baseline: Error, exact: Sequence[Tensor], dtype: torch.dtype) -> Error:
    """What an error may be: the baseline's by the ratios above, and one rounding step of `dtype`.

    The step is at the scale of `exact`, its largest value or its root mean square: what storing an exact result already
    costs. Maximum and root mean square are both bounded: the first hides a bias, the second a single wrong element.
    """
    step = DOUBLE if dtype == torch.float64 else torch.finfo(dtype).eps
    largest, rms = _max_and_rms(exact)
    return Error(MAX_RATIO * baseline.largest + step * largest, RMS_RATIO * baseline.rms + step * rms)


def used(error: Error, most: Error) -> tuple[float, float]:
    """The parts of its budget that the largest error and the root mean square are: at most 1, it is within its budget.

    Infinite where the error or the budget is not a number, or where an error is and none may be.
    """
    return _part(error.largest, most.largest), _part(error.rms, most.rms)


def _part(error: float, most: float) -> float:
    part = error / most if most else math.inf if error else 0.0
    return part if math.isfinite(part) else math.inf


def _max_and_rms(tensors: Sequence[Tensor]) -> tuple[float, float]:
    values = torch.cat([t.double().flatten() for t in tensors])
    return values.abs().max().item(), values.square().mean().sqrt().item()


@torch.no_grad()
def off_the_kink(exact: nn.Module, maps: Sequence[Tensor], upstream: Sequence[Tensor]) -> list[Tensor]:
    """Upstream gradients, zero where `exact`, whose running buffers are updated, has a value near the ReLU's kink."""
    values = before_relu(exact)
    exact(maps)
    return masked(upstream, values)


def before_relu(dca: nn.Module) -> list[Tensor]:
    """A list to which forwards of `dca` add what they put into its last ReLUs, one tensor a scale."""
    values: list[Tensor] = []
    for head in dca.bn_relu:
        head[0].register_forward_hook(lambda module, args, out: values.append(out.detach()))
    return values


def masked(upstream: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
    """Upstream gradients, zero where the exact values before the ReLU are near its kink.

    There, one rounding decides between a gradient and none, and the error says nothing.
    """
    return [g * (y.abs() > KINK) for g, y in zip(upstream, values, strict=True)]


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """The reference's float32 convolutions are float32 where they set the budget; where timed, as PyTorch has them."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
