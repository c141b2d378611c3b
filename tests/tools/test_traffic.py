"""What benchmarks/offline/traffic.py counts, against bytes, sectors and products that are known by hand."""

import contextlib
import functools
import json
from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dca_kernels
from benchmarks import cases
from benchmarks.environment import ROOT
from benchmarks.offline import traffic, traffic_tables

pytestmark = pytest.mark.slow

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language")

interpreted = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="kernels are compiled: TRITON_INTERPRET=1 is not set"
)


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """Not here: the operators that poison fresh memory would be counted."""


def test_the_document_has_what_was_counted() -> None:
    counted = traffic_tables.describe(
        json.loads((ROOT / "benchmarks" / "results" / "offline" / "traffic.json").read_text())
    )
    tables = [counted, (ROOT / "docs" / "benchmarks.md").read_text().partition("## Launches and bytes")[2]]
    columns = slice(2, 11)  # between the names of the runs and the products
    found = [
        [line.split("|")[columns] for line in text.split("\n\n- ")[0].splitlines() if "float" in line]
        for text in tables
    ]
    expected, written = ([[cell.strip() for cell in line] for line in lines[:6]] for lines in found)
    assert len(expected) == 6 and sorted(written) == sorted(expected)


# Kernels


@triton.jit
def _toy_kernel(maps, x_ptr, weights, out_ptr, N: tl.constexpr):
    """Rows of 16: loads 8 columns of x in rows < N, a matrix and one element of a map; stores 4 columns."""
    offs_n, offs = tl.program_id(0) * 16 + tl.arange(0, 16), tl.arange(0, 16)
    ptrs = offs_n[:, None] * 16 + offs[None, :]
    x = tl.load(x_ptr + ptrs, mask=(offs_n < N)[:, None] & (offs < 8)[None, :], other=0.0)
    weight = tl.load(weights[0] + offs[:, None] * 16 + offs[None, :])
    out = tl.dot(x, weight, out_dtype=tl.float32) + tl.load(maps[0] + tl.program_id(0) * 7).to(tl.float32)
    tl.store(out_ptr + ptrs, out, mask=(offs_n < N)[:, None] & (offs < 4)[None, :])


@triton.jit
def _increment_kernel(x_ptr, outs, index):
    tl.atomic_add(x_ptr + index, 1.0)
    tl.store(outs + index, 1.0)


def toy_operands(dtype: torch.dtype) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Its maps and its weights."""
    return (torch.zeros(16, dtype=dtype),), (torch.eye(16, dtype=dtype),)


def run_toy(dtype: torch.dtype = torch.float32, operands: tuple | None = None) -> torch.Tensor:
    maps, weights = operands or toy_operands(dtype)
    x, out = torch.ones(20, 16, dtype=dtype), torch.zeros(20, 16, dtype=dtype)
    _toy_kernel[(2,)](maps, x, weights, out_ptr=out, N=20)
    return out


@interpreted
@pytest.mark.parametrize(
    ("dtype", "size", "arithmetic"),
    [(torch.float32, 4, "tf32"), (torch.float16, 2, "fp16"), (torch.bfloat16, 2, "bf16")],
    ids=["float32", "float16", "bfloat16"],
)
def test_kernel_by_hand(dtype: torch.dtype, size: int, arithmetic: str) -> None:
    maps, weights = toy_operands(dtype)
    (toy,) = traffic.count_kernels(lambda: run_toy(dtype, (maps, weights)), maps=maps, parameters=weights)
    assert (toy.kernel, toy.programs) == ("toy", 2)
    assert toy.requested_loaded == (20 * 8 + 2 * 16 * 16 + 2) * size
    assert toy.requested_stored == 20 * 4 * size
    # A row has one sector that is touched (of two in float32), and the two elements of the map share one.
    assert toy.loaded == {"maps": 32, "tokens": 20 * 32, "parameters": 16 * 16 * size}
    assert toy.stored == {"maps": 0, "tokens": 20 * 32, "parameters": 0}
    assert toy.unique == 2 * 20 * 32 + 32 + 16 * 16 * size
    assert toy.products == {arithmetic: 2 * (2 * 16**3)}  # masked rows and columns are computed
    assert toy.flops == 2 * (2 * 16**3)


@interpreted
def test_what_a_later_kernel_loads_is_handed_on() -> None:
    def run() -> None:
        first = torch.zeros(16)
        second, third = torch.zeros(32, 16), torch.zeros(32, 16)
        _toy_kernel[(2,)]((first,), torch.ones(32, 16), (torch.eye(16),), second, N=20)
        _toy_kernel[(1,)]((first,), second, (torch.eye(16),), third, N=12)

    first, second = traffic.count_kernels(run)
    assert first.stored["tokens"] == 20 * 32
    assert (first.handed_on, second.handed_on) == (12 * 32, 0)
    assert traffic.bound([first, second], map_bytes=1000, passes=3) == 1.25 * (3 * 1000 + 2 * 12 * 32)


@interpreted
def test_maps_are_not_handed_on() -> None:
    """What goes through a map would raise the bound of the map's own traffic."""

    between = torch.zeros(16)

    def run() -> None:
        _increment_kernel[(1,)](torch.zeros(16), between, 0)
        _increment_kernel[(1,)](between, torch.zeros(16), 0)

    first, second = traffic.count_kernels(run, maps=between)
    assert first.stored["maps"] == second.loaded["maps"] == 32
    assert first.handed_on == second.handed_on == 0


@interpreted
def test_atomics_load_and_store() -> None:
    outs = torch.zeros(64)
    (counted,) = traffic.count_kernels(lambda: _increment_kernel[(1,)](torch.zeros(64), outs, 9), maps=outs)
    assert counted.kernel == "increment"
    assert counted.loaded["tokens"] == counted.stored["tokens"] == 32
    assert (counted.requested_loaded, counted.requested_stored) == (4, 4 + 4)


@interpreted
def test_counting_changes_no_result() -> None:
    results = []
    traffic.count_kernels(lambda: results.append(run_toy()))
    assert torch.equal(results[0], run_toy())
    assert results[0].sum() == 20 * 4


def run_outside() -> None:
    """An address a gigabyte away. Nearer ones may be another argument's."""
    _increment_kernel[(1,)](torch.zeros(64), torch.zeros(64), 2**28)


@interpreted
def test_an_address_outside_of_the_tensors_is_an_error() -> None:
    with pytest.raises(Exception, match="increment: 1 of 1 addresses lie outside of its tensors"):
        traffic.count_kernels(run_outside)


@interpreted
@pytest.mark.parametrize("raises", [False, True], ids=["counted", "raised"])
def test_the_interpreter_is_left_as_it_was(raises: bool) -> None:
    from triton.runtime import interpreter

    def state() -> list[dict]:
        owners = interpreter.InterpreterBuilder, interpreter.GridExecutor, interpreter.interpreter_builder
        return [*(dict(vars(owner)) for owner in owners), {"patch": interpreter._patch_lang}]

    run_toy()  # the builder has a grid from here on
    before, inside = state(), []

    def run() -> None:
        inside.append(state())
        run_toy()
        if raises:
            run_outside()

    with pytest.raises(interpreter.InterpreterError) if raises else contextlib.nullcontext():
        traffic.count_kernels(run)
    assert inside[0][:2] != before[:2]
    after = state()
    for grid in ("grid_dim", "grid_idx"):
        before[2].pop(grid), after[2].pop(grid)
    assert after == before


# A whole forward


@interpreted
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_forward_reads_maps_twice_and_writes_them_once(train: bool) -> None:
    torch.manual_seed(0)
    module = dca_kernels.DCA((8, 16), (4, 2), 4, backend="triton").bfloat16().train(train)
    maps = [torch.randn(1, 8, 16, 16).bfloat16(), torch.randn(1, 16, 8, 8).bfloat16()]
    kernels = traffic.count_kernels(lambda: cases.step(module, maps, None))
    names = [kernel.kernel for kernel in kernels]
    assert names[0] == ("patch_embed_rows" if train else "patch_embed") and names[-1] == "upsample_rows"
    map_bytes = (8 * 16 * 16 + 16 * 8 * 8) * 2
    assert sum(kernel.loaded["maps"] for kernel in kernels) == 2 * map_bytes
    assert sum(kernel.stored["maps"] for kernel in kernels) == map_bytes
    assert kernels[0].handed_on >= 16 * 24 * 2  # the tokens at least
    assert kernels[-1].handed_on == 0
    parameters = {kernel.kernel: kernel.loaded["parameters"] for kernel in kernels}
    assert parameters[names[0]] == 4 * 32  # a sector for each of two weights and two biases
    assert parameters["conv"] == (8 * 8 + 16 * 16) * 2
    buffers = 2 * 3 * 32 if train else 0  # a sector for each mean, variance and counter
    assert sum(kernel.stored["parameters"] for kernel in kernels) == buffers


@interpreted
def test_gradients_of_maps_are_maps() -> None:
    module = dca_kernels.DCA((8,), (4,), 4, backend="triton").eval()
    maps, gradients = [torch.randn(1, 8, 16, 16)], [torch.randn(1, 8, 16, 16)]
    kernels = traffic.count_kernels(lambda: cases.step(module, maps, gradients))
    assert sum(kernel.stored["maps"] for kernel in kernels) == 2 * maps[0].nbytes  # the output's and the gradient's
    *_, last, of_parameters = kernels
    assert (last.kernel, of_parameters.kernel) == ("map_gradient_rows", "patch_embed_gradients")
    assert last.loaded["maps"] == 2 * maps[0].nbytes  # the map's and the upstream gradient's


# Plain PyTorch


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (lambda x: x + 1, ("add", 128, 128)),
        (lambda x: x * x, ("mul", 128, 128)),  # a distinct tensor is read once
        (lambda x: x.add_(1), ("add_", 128, 128)),
        (lambda x: x.t().contiguous(), ("clone", 128, 128)),
        (lambda x: x.expand(3, 4, 8) + 1, ("add", 128, 3 * 128)),
        (lambda x: x @ x.t(), ("mm", 2 * 128, 4 * 4 * 4)),
        (lambda x: x.sum(), ("sum", 128, 4)),
        (lambda x: x[1:, :2] * 2, ("mul", 3 * 2 * 4, 3 * 2 * 4)),
        (lambda x: x.view(2, 16).t().detach().unsqueeze(0), None),
        (lambda x: torch.empty_like(x), None),
        (lambda x: x[0, 0].item(), None),
    ],
    ids=["add", "twice", "in_place", "copy", "expanded", "product", "sum", "part", "views", "empty", "number"],
)
def test_operator_by_hand(operation: Callable, expected: tuple[str, int, int] | None) -> None:
    x = torch.ones(4, 8)
    assert traffic.count_reference(lambda: operation(x)) == ([traffic.OperatorTraffic(*expected)] if expected else [])


def test_reference_at_paper_size() -> None:
    module = cases.modules(28, torch.bfloat16, torch.device("cpu"))["reference"].eval()
    maps = [
        torch.zeros(1, c, 28 * s, 28 * s, dtype=torch.bfloat16)
        for c, s in zip(cases.FEATURES, cases.STRIDES, strict=True)
    ]
    operators = traffic.count_reference(lambda: cases.step(module, maps, None))
    assert len(operators) == 114
    softmax = [o for o in operators if o.operator == "_softmax"]
    attention = 4 * 4 * 784 * 784 + 480 * 480  # 4 heads of 4 scales; the channels of all scales by all
    assert sum(o.read for o in softmax) == sum(o.written for o in softmax) == attention * 2
    assert sum(o.read + o.written for o in operators) == pytest.approx(247.5e6, rel=1e-3)


# Tables


def kernel_traffic(unique: int, products: dict[str, int]) -> traffic.KernelTraffic:
    nothing = dict.fromkeys(traffic.GROUPS, 0)
    loaded, stored = nothing | {"maps": unique // 4}, nothing | {"tokens": unique - unique // 4}
    return traffic.KernelTraffic("k", 1, unique, 0, loaded, stored, 0, products, [])


def test_roofline_by_hand() -> None:
    kernels = [kernel_traffic(41_400_000, {"bf16": 789_000_000}), kernel_traffic(4_140_000, {"tf32x3": 395_000_000})]
    memory, compute, total = traffic.roofline(kernels, "H200")
    assert [memory["memory_us"], memory["compute_us"], memory["floor_us"]] == pytest.approx([10, 1, 10])
    assert [compute["memory_us"], compute["compute_us"], compute["floor_us"]] == pytest.approx([1, 3, 3])
    assert [total["memory_us"], total["compute_us"], total["floor_us"]] == pytest.approx([11, 4, 13])


def test_main(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "rows.json"
    arguments = ["traffic", "--patch", "2", "--mode", "eval", "--dtype", "bfloat16", "--json", str(file)]
    monkeypatch.setattr("sys.argv", arguments)
    traffic.main()
    ours, theirs = json.loads(file.read_text())
    assert (ours["implementation"], theirs["implementation"]) == ("triton", "reference")
    kernels = ours["kernels"]
    assert ours["launches"] == len(kernels) <= 9  # no operator of plain PyTorch between them
    unique = [sum(kernel["loaded"].values()) + sum(kernel["stored"].values()) for kernel in kernels]
    assert ours["bytes"] == sum(unique) == sum(ours[f"{group}_bytes"] for group in traffic.GROUPS)
    map_bytes = sum(c * (2 * s) ** 2 * 2 for c, s in zip(cases.FEATURES, cases.STRIDES, strict=True))
    assert ours["maps_bytes"] == 3 * map_bytes
    assert ours["bound_bytes"] == 1.25 * (3 * map_bytes + 2 * sum(kernel["handed_on"] for kernel in kernels))
    assert ours["of_bound"] == ours["bytes"] / ours["bound_bytes"]
    assert ours["floor_us"] == pytest.approx(sum(kernel["floor_us"] for kernel in kernels))
    printed = capsys.readouterr().out
    assert f"{ours['bytes'] / 1e6:.2f}" in printed and "ESTIMATES" in printed
    assert all(f"| {kernel['kernel']} " in printed for kernel in kernels)


@pytest.fixture
def two_maps(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Maps of few channels, as those that are counted at a grid of 2 x 2."""
    monkeypatch.setattr(cases, "FEATURES", (4, 8))
    return [torch.zeros(1, 4, 4, 4), torch.zeros(1, 8, 2, 2)]


def reference_forward(maps: list[torch.Tensor]) -> Callable:
    module = cases.modules(2, torch.float32, torch.device("cpu"), cases.FEATURES)["reference"].eval()
    return functools.partial(cases.step, module, maps, None)


@interpreted
def test_operators_between_kernels_count(two_maps: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    alone = traffic.count_reference(reference_forward(two_maps))
    step = cases.step
    monkeypatch.setattr(cases, "step", lambda module, maps, _: step(module, [x.clone() for x in maps], None))
    ours, theirs = traffic._count(2, "eval", "float32", "H200")
    assert ours["launches"] == len(ours["kernels"]) + 2
    copies = 2 * sum(x.nbytes for x in two_maps)
    assert ours["bytes"] == sum(ours[f"{group}_bytes"] for group in traffic.GROUPS) + copies
    assert theirs["launches"] == len(alone) + 2


@interpreted
def test_a_step_is_a_forward_and_a_backward(two_maps: list[torch.Tensor]) -> None:
    ours, theirs = traffic._count(2, "step", "float32", "H200")
    kernels = ours["kernels"]
    names = [kernel["kernel"] for kernel in kernels]
    assert names[0] == "patch_embed_rows" and "map_gradient_rows" in names
    assert names[9:12] == ["combine_images", "upsample_rows", "upsample_backward_rows"]
    assert ours["launches"] == len(kernels) < theirs["launches"]  # no operator of plain PyTorch between them
    map_bytes = sum(x.nbytes for x in two_maps)
    assert ours["maps_bytes"] == 8 * map_bytes
    assert ours["bound_bytes"] == 1.25 * (8 * map_bytes + 2 * sum(kernel["handed_on"] for kernel in kernels))
    with FlopCounterMode(display=False) as counter:
        reference_forward(two_maps)()
    assert theirs["flops"] == 3 * counter.get_total_flops() > 0  # each operand of a product has a gradient
