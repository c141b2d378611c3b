"""The error budget itself, that outputs, gradients and buffers are held to."""

import math

import pytest
import torch

from reference.budget import DOUBLE, Error, allowed, used

SPIKED = torch.zeros(100, dtype=torch.float64).index_fill(
    0, torch.tensor([7]), 1.0
)  # its rms is a tenth of its largest


@pytest.mark.parametrize(
    ("dtype", "step"), [(torch.float32, 2.0**-23), (torch.bfloat16, 2.0**-7), (torch.float64, DOUBLE)]
)
def test_each_statistic_has_its_own_rounding_step(dtype: torch.dtype, step: float) -> None:
    most = allowed(Error(0.25, 0.125), [SPIKED[:50], SPIKED[50:]], dtype)
    assert most.largest == pytest.approx(2 * 0.25 + step, rel=1e-12)
    assert most.rms == pytest.approx(1.5 * 0.125 + 0.1 * step, rel=1e-12)


@pytest.mark.parametrize(
    ("error", "most", "part"),
    [
        (0.5, 2.0, 0.25),
        (0.0, 0.0, 0.0),
        (1e-300, 0.0, math.inf),  # none is allowed
        (1.0, math.inf, 0.0),  # the reference overflows
        (math.inf, math.inf, math.inf),
        (math.nan, 1.0, math.inf),
        (0.0, math.nan, math.inf),
    ],
)
def test_part_of_the_budget_that_is_used(error: float, most: float, part: float) -> None:
    assert used(Error(error, 0.0), Error(most, 1.0)) == (part, 0.0)
    assert used(Error(0.0, error), Error(1.0, most)) == (0.0, part)


def test_error_is_of_all_tensors_together() -> None:
    zero = torch.zeros(3)
    assert Error.of([torch.tensor([3.0]), zero], [torch.tensor([-1.0]), zero]) == Error(4.0, 2.0)
