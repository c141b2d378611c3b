"""The corrected interpreter against PyTorch: bfloat16 as a GPU computes it, or an error."""

import math
import re

import pytest
import torch
from torch import Tensor
from torch.nn import functional

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
interpreter = pytest.importorskip("tests.interpreter")

interpreter.install()
pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="kernels are compiled: TRITON_INTERPRET=1 is not set"
)

OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
REFUSED = "TypeError.*bfloat16 arithmetic in the interpreter: cast to float32 first"


# Casts


@triton.jit
def cast_kernel(source, target, numel, ROUNDING: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source + offsets, mask=offsets < numel)
    values = values.to(target.dtype.element_ty, fp_downcast_rounding=ROUNDING)
    tl.store(target + offsets, values, mask=offsets < numel)


@triton.jit
def implicit_cast_kernel(source, target, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    """A store casts to the pointer's type, and so does a masked load with `other`."""
    offsets = tl.arange(0, BLOCK)
    tl.store(target + offsets, tl.load(source + offsets))
    tl.store(target + BLOCK + offsets, tl.load(target + offsets, mask=offsets < 1, other=OTHER))


def cast(source: Tensor, dtype: torch.dtype, rounding: str | None = None) -> Tensor:
    target = torch.zeros(source.shape, dtype=dtype)
    grid = (triton.cdiv(source.numel(), 4096),)
    cast_kernel[grid](source, target, source.numel(), rounding, 4096, **OPTIONS)
    return target


def all_bfloat16() -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)


def awkward_float32() -> Tensor:
    """Every bfloat16 with the ties above it and their neighbours: subnormals, infinities and NaN are among them."""
    upper_half = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    lower_half = torch.tensor([0, 1, 2**15 - 1, 2**15, 2**15 + 1, 2**16 - 1], dtype=torch.int32)
    return (upper_half[:, None] | lower_half).flatten().view(torch.float32)


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """Equal, zeros in their sign too, and NaN where NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    number = ~expected.isnan()
    assert torch.equal(actual.signbit()[number], expected.signbit()[number])


@pytest.mark.parametrize("rounding", [None, "rtne"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_casts_to_the_nearest_bfloat16(dtype: torch.dtype, rounding: str | None) -> None:
    source = awkward_float32().to(dtype)
    assert_equal(cast(source, torch.bfloat16, rounding), source.bfloat16())


def test_casts_float16_to_the_nearest_bfloat16() -> None:
    source = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    assert_equal(cast(source, torch.bfloat16), source.bfloat16())


def test_casts_integers_to_the_nearest_bfloat16() -> None:
    source = torch.arange(-(2**17), 2**17, 7, dtype=torch.int32)
    assert_equal(cast(source, torch.bfloat16), source.bfloat16())


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1 + 2**-8 + 2**-40, 1 + 2**-7), (1 + 3 * 2**-8 - 2**-40, 1 + 2**-7), (1e300, math.inf), (-1e-300, -0.0)],
)
def test_rounds_float64_once(value: float, expected: float) -> None:
    """The first two are ties once they are float32."""
    source = torch.tensor([value], dtype=torch.float64)
    assert_equal(cast(source, torch.bfloat16).double(), torch.tensor([expected], dtype=torch.float64))


def test_truncates_where_asked() -> None:
    source = awkward_float32()
    expected = (source.view(torch.int32) >> 16).short().view(torch.bfloat16)
    expected[source.isnan()] = math.nan
    assert_equal(cast(source, torch.bfloat16, "rtz"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_casts_from_every_bfloat16(dtype: torch.dtype) -> None:
    assert_equal(cast(all_bfloat16(), dtype), all_bfloat16().to(dtype))


def test_casts_bfloat16_to_integers() -> None:
    source = all_bfloat16()
    source = source[source.abs() < 2**31]
    assert torch.equal(cast(source, torch.int32), source.int())


@pytest.mark.parametrize("other", [0.0, 1.1, None])
def test_loads_and_stores_cast(other: float | None) -> None:
    """What a load leaves out is NaN where it does not say what is there instead."""
    source, target = torch.full((4,), 1.1), torch.zeros(8, dtype=torch.bfloat16)
    implicit_cast_kernel[(1,)](source, target, other, 4, **OPTIONS)
    assert_equal(target, torch.tensor([1.1] * 5 + [math.nan if other is None else other] * 3).bfloat16())


# Products


@triton.jit
def dot_kernel(a, b, start, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    tile = rows[:, None] * N + columns[None, :]
    x = tl.load(a + rows[:, None] * K + inner[None, :])
    y = tl.load(b + inner[:, None] * N + columns[None, :])
    product = tl.dot(x, y, acc=tl.load(start + tile), input_precision="ieee", out_dtype=out.dtype.element_ty)
    tl.store(out + tile, product)
    tl.store(out + M * N + tile, tl.dot(x, y, input_precision="ieee", out_dtype=out.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_dot_accumulates_exact_products(dtype: torch.dtype) -> None:
    m, n, k = 16, 32, 256
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    torch.manual_seed(0)
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    start, out = torch.randn(m, n, dtype=accumulator), torch.zeros(2, m, n, dtype=accumulator)
    dot_kernel[(1,)](a, b, start, out, m, n, k, **OPTIONS)
    exact, magnitude = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    bound = 4 * math.sqrt(k) * torch.finfo(accumulator).eps * magnitude
    assert ((out[0] - start - exact).abs() <= bound).all()
    assert ((out[1] - exact).abs() <= bound).all()


# What bfloat16 may and may not do


@triton.jit
def move_kernel(source, out, N: tl.constexpr):
    rows, columns = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    tile, flat = rows * N + columns, tl.arange(0, N * N)
    x = tl.load(source + tile)
    tl.store(out + tile, tl.where(rows < columns, x, tl.zeros((N, N), x.dtype)))
    tl.store(out + N * N + flat, tl.reshape(x, (N * N,)))
    tl.store(out + 2 * N * N + tile, tl.trans(x))
    tl.store(out + 3 * N * N + tile, tl.broadcast_to(tl.load(source + tl.arange(0, N))[:, None], (N, N)))
    joined = tl.join(x, tl.trans(x))
    first, second = tl.split(tl.permute(joined, (1, 0, 2)))
    tl.store(out + 4 * N * N + tile, first)
    tl.store(out + 5 * N * N + tile, second)
    tl.store(out + 6 * N * N + tile, x.to(tl.uint16, bitcast=True).to(tl.bfloat16, bitcast=True))


def test_moves_elements_as_they_are() -> None:
    n = 16
    x = torch.randn(n, n, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.zeros(7, n, n, dtype=torch.bfloat16)
    move_kernel[(1,)](x, out, n, **OPTIONS)
    assert_equal(out, torch.stack([x.triu(1), x, x.T, x[0][:, None].expand(n, n), x.T, x, x]))


@triton.jit
def arithmetic_kernel(source, out, OPERATION: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out + offsets, OPERATION(tl.load(source + offsets), tl.load(source + BLOCK + offsets)))


@triton.jit
def _add(x, y):
    return x + y


@triton.jit
def _subtract(x, y):
    return x - y


@triton.jit
def _multiply(x, y):
    return x * y


@triton.jit
def _divide(x, y):
    return x / y


@triton.jit
def _negate(x, y):
    return -x


@triton.jit
def _less(x, y):
    return x < y


@triton.jit
def _equal(x, y):
    return x == y


@triton.jit
def _maximum(x, y):
    return tl.maximum(x, y)


@triton.jit
def _minimum(x, y):
    return tl.minimum(x, y)


@triton.jit
def _clamp(x, y):
    return tl.clamp(x, y, y)


@triton.jit
def _fused_multiply_add(x, y):
    return tl.fma(x, y, y)


@triton.jit
def _sum(x, y):
    return tl.sum(x, axis=0)


@triton.jit
def _max(x, y):
    return tl.max(x, axis=0)


@triton.jit
def _reduce(x, y):
    return tl.reduce(x, 0, _add)


@triton.jit
def _cumulative_sum(x, y):
    return tl.cumsum(x, axis=0)


def compute(operation, source: Tensor) -> Tensor:
    out = torch.zeros(source.shape[1])
    arithmetic_kernel[(1,)](source, out, operation, source.shape[1], **OPTIONS)
    return out


def two_rows() -> Tensor:
    return torch.tensor([[1.0, -3.0, 0.5, 2.0], [-2.0, -1.5, 1.0, 2.0]], dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "operation",
    [_add, _subtract, _multiply, _negate, _less, _equal, _fused_multiply_add, _sum, _reduce],
    ids=lambda operation: operation.__name__.strip("_"),
)
def test_refuses_arithmetic(operation) -> None:
    with pytest.raises(triton.runtime.errors.InterpreterError, match=REFUSED):
        compute(operation, two_rows())
    assert compute(operation, two_rows().float()).isfinite().all()


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (_divide, lambda x, y: x / y),
        (_maximum, torch.maximum),
        (_minimum, torch.minimum),
        (_clamp, lambda x, y: y),
        (_max, lambda x, y: x.max().expand(4)),
        (_cumulative_sum, lambda x, y: x.cumsum(0)),
    ],
    ids=["divide", "maximum", "minimum", "clamp", "max", "cumulative_sum"],
)
def test_refuses_or_is_right_where_triton_may_cast(operation, expected) -> None:
    """Some versions of Triton cast the operands of these to float32."""
    x, y = two_rows().float()
    try:
        actual = compute(operation, two_rows())
    except triton.runtime.errors.InterpreterError as error:
        assert re.search(REFUSED, str(error))
    else:
        torch.testing.assert_close(actual, expected(x, y))


def test_a_second_installation_changes_nothing() -> None:
    builder = triton.runtime.interpreter.InterpreterBuilder
    before = dict(vars(builder))
    interpreter.install()
    assert dict(vars(builder)) == before


# Operands, whose conversions are kept


@triton.jit
def operands_kernel(x, y, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A column, a row and a scalar, in each turn of the same types with other values."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    for turn in range(3):
        a, b = tl.load(x + turn * ROWS + row), tl.load(y + turn * COLUMNS + column)
        tile = tl.where(turn != 1, a[:, None] * b[None, :], b[None, :] - a[:, None])
        tl.store(out + (turn * ROWS + row[:, None]) * COLUMNS + column[None, :], tile + tl.load(y + turn))


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.float64),
        (torch.float16, torch.float32),
        (torch.int32, torch.int64),
        (torch.int32, torch.float32),
    ],
    ids=str,
)
def test_operands_of_types_that_were_seen(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    rows, columns = 4, 8
    numbers = torch.Generator().manual_seed(0)
    x, y = (
        torch.randint(-8, 8, (3, size), generator=numbers).to(dtype) * (0.5 if dtype.is_floating_point else 1)
        for size, dtype in zip((rows, columns), dtypes, strict=True)
    )
    out = torch.zeros(3, rows, columns, dtype=torch.promote_types(*dtypes))
    operands_kernel[(1,)](x, y, out, rows, columns, **OPTIONS)
    expected = x[:, :, None] * y[:, None, :]
    expected[1] = y[1] - x[1, :, None]
    torch.testing.assert_close(out, expected + y.flatten()[:3, None, None], rtol=0, atol=0)


@triton.jit
def quotient_kernel(x, y, out, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    a, b = tl.load(x + offsets), tl.load(y + offsets)
    tl.store(out + offsets, a * b)
    tl.store(out + BLOCK + offsets, a / b)


def test_a_quotient_of_the_types_of_a_product() -> None:
    """Triton takes quotients of float16 in float32, and products in float16."""
    x, y, out = torch.full((4,), 1.0).half(), torch.full((4,), 3.0).half(), torch.zeros(8)
    quotient_kernel[(1,)](x, y, out, 4, **OPTIONS)
    assert_equal(out, torch.tensor([3.0] * 4 + [1 / 3] * 4))


@triton.jit
def number_kernel(x, out, NUMBER: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out + offsets, tl.load(x + offsets) * NUMBER)
    tl.store(out + BLOCK + offsets, NUMBER - tl.load(x + offsets))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32], ids=str)
def test_numbers_that_are_equal_are_not_one_operand(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.0 and -0.0, 1 and 1.0: each as if it came first."""

    def multiplied(number: float | int) -> Tensor:
        out = torch.full((8,), math.nan)
        number_kernel[(1,)](torch.tensor([-2, -1, 0, 3], dtype=dtype), out, number, 4, **OPTIONS)
        return out

    numbers = [1, 1.0, True, 0, 0.0, -0.0, False, 2]
    after_others = [multiplied(number) for number in numbers]
    for number, actual in zip(numbers, after_others, strict=True):
        monkeypatch.setattr(interpreter, "_OPERANDS", {})
        assert_equal(actual, multiplied(number))


# A kernel


@triton.jit
def normalised_linear_kernel(
    source, weight, bias, out, eps: tl.constexpr, rows, ROWS: tl.constexpr, C: tl.constexpr, D: tl.constexpr
):
    """LayerNorm without affine parameters, then a linear layer; bfloat16 in memory and in the product."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel, output = tl.arange(0, C), tl.arange(0, D)
    inside = row[:, None] < rows
    x = tl.load(source + row[:, None] * C + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    centred = x - tl.sum(x, axis=1)[:, None] / C
    scale = tl.rsqrt(tl.sum(centred * centred, axis=1) / C + eps)
    normalised = (centred * scale[:, None]).to(tl.bfloat16)
    w = tl.load(weight + output[:, None] * C + channel[None, :])
    y = tl.dot(normalised, tl.trans(w)) + tl.load(bias + output).to(tl.float32)[None, :]
    tl.store(out + row[:, None] * D + output[None, :], y, mask=inside)


def test_a_kernel_rounds_where_pytorch_does() -> None:
    """Half a step of bfloat16 from the exact result: truncated anywhere, it would be a whole one."""
    rows, channels, outputs = 37, 64, 32
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=generator).bfloat16() for s in ((rows, channels), (outputs, channels), outputs))
    out = torch.zeros(rows, outputs, dtype=torch.bfloat16)
    normalised_linear_kernel[(triton.cdiv(rows, 16),)](x, w, b, out, 1e-5, rows, 16, channels, outputs, **OPTIONS)
    normalised = functional.layer_norm(x.float(), (channels,)).bfloat16()
    exact = functional.linear(normalised.double(), w.double(), b.double())
    assert ((out - exact).abs() <= 2**-8 * exact.abs() + 1e-5).all()
