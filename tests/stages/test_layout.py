"""What kernels are given of the maps' sizes."""

import pytest
import torch

from tests.oracle import DEVICE

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl

from dca_kernels.triton_backend.grid import quotient
from dca_kernels.triton_backend.layout import stride_of
from dca_kernels.triton_backend.primitives import argument, divisor_of

ARRANGEMENTS = {
    "contiguous": lambda height, width: torch.empty(2, 6, height, width),
    "channels_last": lambda height, width: torch.empty(2, 6, height, width, memory_format=torch.channels_last),
    "some of the channels": lambda height, width: torch.empty(2, 11, height, width)[:, 3:9],
    "one pixel": lambda height, width: torch.empty(2, 6, 1, 1).expand(2, 6, height, width),
}


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_maps_of_all_sizes_that_lie_alike_have_one_stride(name: str) -> None:
    """A kernel knows `stride_of` as a constant, and is compiled anew where it differs."""
    strides = set()
    for height, width in ((224, 224), (14, 30), (37, 41)):
        x = ARRANGEMENTS[name](height, width)
        stride = stride_of(x.shape, x.stride())
        spanned = (1, width, height * width)
        assert tuple(f * spanned[span] for f, span in zip(stride.factors, stride.spans, strict=True)) == x.stride()
        strides.add(stride)
    assert len(strides) == 1


@pytest.mark.parametrize("number", [1, 2, 3, 7, 28, 64, 1000, 46341, 2**16 + 1, 2**30, 2**31 - 1])
def test_reciprocals_divide_exactly(number: int) -> None:
    """By the operations of `primitives.divide`."""
    divisor = divisor_of(number)
    reciprocal, shift = divisor.reciprocal - 3 >> 1, divisor.shift - 3 >> 1
    assert reciprocal < 2**32 and divisor.number == argument(number)
    for multiple in {1, 2, 3, (2**31 - 1) // number}:
        for dividend in (multiple * number - 1, multiple * number, min(multiple * number + 1, 2**31 - 1)):
            if dividend < 2**31:
                assert (2 * dividend * reciprocal >> 32) >> shift == dividend // number


@triton.jit
def _quotients_kernel(dividends, out, DIVISOR: tl.constexpr):
    offs = tl.arange(0, 8)
    tl.store(out + offs, quotient(tl.load(dividends + offs), DIVISOR))


@pytest.mark.parametrize("number", [1, 3, 28, 46341])
def test_quotients_of_large_numbers(number: int) -> None:
    """Of a window times a map's height: windows of tall maps begin there."""
    largest = (2**31 - 1) // number * number
    numbers = [0, number - 1, number, 1000 * number - 1, 1000 * number, largest - 1, largest, 2**31 - 1]
    dividends = torch.tensor(numbers, dtype=torch.int32, device=DEVICE)
    out = torch.empty_like(dividends)
    _quotients_kernel[(1,)](dividends, out, number)
    assert out.tolist() == [dividend // number for dividend in numbers]
