"""torch.compile, torch.export and AOTInductor, each against eager; the operators that they take as a whole."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import fresh_cache
from torch.export import Dim
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import dca_kernels.flops  # noqa: F401
from dca_kernels import use_backend
from dca_kernels.torch_backend import spatial_tiles
from tests.module.test_autocast import under
from tests.oracle import (
    LAYOUTS,
    Config,
    assert_all_within_budget,
    assert_identical,
    assert_same,
    both_modes,
    evaluate,
    pair,
    promoted,
    random_maps,
)

# PyTorch's compilers do what PyTorch itself warns of.
pytestmark = [
    pytest.mark.slow,
    *(pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning", "UserWarning")),
]

# No two sizes are equal: dynamic sizes that are equal at first would be taken for one.
CONFIG = Config((8, 12), (2, 5), sizes=((14, 20), (6, 15)), batch=3)
SMALL = Config((8,), (2, 5), sizes=((6, 9),), batch=3)  # compiles in less time
TOKENS = Config((32, 64), 28, sizes=((28, 28), (28, 28)))


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """Not here: the compiler would trace what poisons fresh memory."""


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Without what was compiled before: Inductor's cache does not tell ATEN_CPU_CAPABILITY's choices apart."""
    torch._dynamo.reset()
    with fresh_cache():
        yield
    torch._dynamo.reset()


# torch.compile


@both_modes
@torch._dynamo.config.patch(specialize_float=True)  # else epsilon is dynamic too at first, and all is traced twice
def test_dynamic_sizes_without_graph_breaks(train: bool) -> None:
    eager, compiled = (pair(SMALL, train=train)[0] for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    compiled.compile(backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for sizes, batch in ((SMALL.sizes, 3), (SMALL.sizes, 3), (SMALL.sizes, 7), ([(10, 13)], 4)):
        maps = random_maps(replace(SMALL, sizes=sizes, batch=batch))
        assert_identical(evaluate(compiled, maps), evaluate(eager, maps))
        counts.append(counter.frame_count)
    assert counts == [1] * 4


def test_a_changed_batch_recompiles_once() -> None:
    module, _ = pair(CONFIG)
    counter = CompileCounterWithBackend("eager")
    module.compile(backend=counter, fullgraph=True)
    counts = []
    for batch in (3, 3, 4, 5, 9):
        evaluate(module, random_maps(replace(CONFIG, batch=batch)))
        counts.append(counter.frame_count)
    assert counts == [1, 1, 2, 2, 2]


WITHOUT_GRADIENTS: dict[str, Callable[[str], bool]] = {
    "nothing": lambda name: False,
    "no_attention": lambda name: not name.startswith("attention"),
    "no_bias": lambda name: not name.endswith("bias"),
}


@pytest.mark.parametrize("trainable", WITHOUT_GRADIENTS.values(), ids=WITHOUT_GRADIENTS)
def test_compiled_training_where_not_all_is_differentiated(trainable: Callable[[str], bool]) -> None:
    """As `update_bn` calls a model, or who freezes some of it: outputs, gradients and BatchNorm's buffers."""
    compiled, plain = pair(CONFIG)
    for module in (compiled, plain):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(trainable(name))
    compiled.compile(backend="eager", fullgraph=True)
    maps = random_maps(CONFIG)
    results = [evaluate(module, maps, backward=trainable("bn_relu.0.0.weight")) for module in (compiled, plain)]
    ours, theirs = ({name: t for name, t in of.items() if t is not None} for of in results)
    assert_same(ours, theirs)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@torch._functorch.config.patch(backward_pass_autocast="off")  # by default, the forward's holds for the backward too
def test_compiled_under_autocast(autocast: torch.dtype) -> None:
    eager, compiled = (under(autocast, pair(SMALL, dtype=torch.float32)[0]) for _ in range(2))
    compiled.compile(backend="aot_eager", fullgraph=True)
    maps = random_maps(SMALL, autocast)
    assert_identical(evaluate(compiled, maps), evaluate(eager, maps))


@pytest.mark.parametrize(
    "views",
    [lambda x: x.chunk(2, 1), lambda x: (x[:, :4, 1:], x[:, 4:, :-1]), lambda x: (x[:, :4], x[:, 4:].clone())],
    ids=["chunk", "crops", "one"],
)
def test_compiled_training_with_maps_that_are_views(views: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    config = Config((4, 4), (3, 2), sizes=((7, 6), (7, 6)))
    eager, compiled = (pair(config)[0] for _ in range(2))
    compiled.compile(backend="aot_eager", fullgraph=True)
    gradients = []
    for module in (compiled, eager):
        x = normal(2, 8, 7, 6)
        sum((y * y).sum() for y in module(views(2 * x))).backward()
        gradients.append({"x": x.grad})
    assert_same(*gradients)


def test_inductor() -> None:
    eager, compiled = (pair(SMALL)[0] for _ in range(2))
    compiled.compile(fullgraph=True)
    maps = random_maps(SMALL)
    assert_same(evaluate(compiled, maps), evaluate(eager, maps))


def test_inductor_is_within_the_error_budget() -> None:
    """It adds up one after the other what PyTorch adds up pairwise: enough tokens for that to show."""
    compiled, theirs = pair(TOKENS, dtype=torch.float32, train=False)
    compiled.compile(fullgraph=True)
    draws = []
    for seed in range(3):
        maps = random_maps(TOKENS, torch.float32, seed)
        exact = evaluate(promoted(theirs, TOKENS), [x.double() for x in maps], backward=False)
        draws.append([evaluate(compiled, maps, backward=False), evaluate(theirs, maps, backward=False), exact])
    assert_all_within_budget(draws, torch.float32)


def test_the_backend_is_the_one_that_is_named_now() -> None:
    module, _ = pair(SMALL, "auto", train=False)
    module.compile(backend="eager")
    maps = random_maps(SMALL)
    module(maps)
    with use_backend("triton"), pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(RuntimeError, match=r"^use_backend: 'triton' cannot run on cpu: "):
            module(maps)
    module(maps)


# torch.export


@pytest.mark.parametrize("strict", [False, True], ids=["lenient", "strict"])
def test_export_with_a_dynamic_batch(strict: bool) -> None:
    module, _ = pair(CONFIG, train=False)
    program = torch.export.export(module, (random_maps(CONFIG),), dynamic_shapes=[[{0: Dim("B")}] * 2], strict=strict)
    for batch in (1, 2, 5):
        maps = random_maps(replace(CONFIG, batch=batch))
        with torch.no_grad():
            outputs, expected = program.module()(maps), module(maps)
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


ANY_SIZE = {0: Dim("B"), 2: Dim.AUTO, 3: Dim.AUTO}


@pytest.mark.parametrize("example", [((5, 9), (2, 5)), ((8, 30), (4, 10))], ids=["as_the_grid", "divided"])
def test_export_with_dynamic_sizes(example: tuple[tuple[int, int], ...]) -> None:
    """Also of the grid's size and of sizes that it does not divide, whatever the example's was."""
    module, _ = pair(CONFIG, train=False)
    maps = random_maps(replace(CONFIG, sizes=example))
    program = torch.export.export(module, (maps,), dynamic_shapes=[[ANY_SIZE] * 2])
    for sizes in (((4, 10), (2, 5)), ((9, 33), (5, 17)), ((8, 20), (4, 15))):
        maps = random_maps(replace(CONFIG, sizes=sizes, batch=2))
        with torch.no_grad():
            torch.testing.assert_close(program.module()(maps), module(maps))


def test_aot_inductor_package(tmp_path: Path) -> None:
    module, _ = pair(replace(SMALL, channel_att=False), dtype=torch.float32, train=False)
    with torch.no_grad():
        program = torch.export.export(module, (random_maps(SMALL, torch.float32),), dynamic_shapes=[[ANY_SIZE]])
        file = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "dca.pt2"))
        loaded = torch._inductor.aoti_load_package(file)
        for batch, size in ((3, (9, 17)), (5, (16, 4)), (2, SMALL.patch)):
            maps = random_maps(replace(SMALL, sizes=[size], batch=batch), torch.float32)
            torch.testing.assert_close(tuple(loaded(maps)), module(maps))


# The operators


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def spatial_arguments(scale: float = 1.0) -> tuple[Tensor, ...]:
    """Two images with 7 tokens of 12 channels, 4 of them the values, in two heads."""
    tokens = normal(2, 7, 12)
    values = tokens.detach()[:, :, 2:6].requires_grad_()
    return tokens, values, (scale * normal(12, seed=1)).detach().requires_grad_(), normal(2, 2, 7, seed=2)


def upsample_arguments(mean: Tensor | None, variance: Tensor | None) -> tuple:
    x, z = normal(2, 3, 8, 10), normal(2, 3, 4, 5, seed=1)
    return x, z, normal(3, seed=2), normal(3, seed=3), mean, variance, 1e-5, torch.float64


def _spatial(scale: float) -> tuple[tuple, tuple]:
    arguments = spatial_arguments(scale)
    out, normaliser = torch.ops.dca_kernels.spatial_attention(*arguments)
    return arguments, (*arguments, out, normaliser, normal(*out.shape, seed=4))


def _upsampled(mean: Tensor | None, variance: Tensor | None) -> tuple[tuple, tuple]:
    arguments = upsample_arguments(mean, variance)
    out, *statistics = torch.ops.dca_kernels.upsample(*arguments)
    return arguments, (*arguments[:4], *statistics, normal(*out.shape, seed=4), 1e-5, mean is None)


OPERATORS: dict[str, tuple[str, Callable[[], tuple[tuple, tuple]]]] = {
    "spatial_attention": ("spatial_attention", lambda: _spatial(1.0)),
    "spatial_attention_by_rows": ("spatial_attention", lambda: _spatial(100.0)),
    "upsample_by_the_batch": ("upsample", lambda: _upsampled(None, None)),
    "upsample_by_the_buffers": ("upsample", lambda: _upsampled(normal(3, seed=5), torch.ones(3, dtype=torch.float64))),
}


@pytest.mark.parametrize("name, arguments", OPERATORS.values(), ids=OPERATORS)
def test_operators_are_as_declared(name: str, arguments: Callable) -> None:
    forward, backward = arguments()
    detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in backward)
    opcheck(getattr(torch.ops.dca_kernels, name).default, forward)
    opcheck(getattr(torch.ops.dca_kernels, f"{name}_backward").default, detached)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_tensors_without_memory_have_the_strides_of_real_ones(layout: Callable[[Tensor], Tensor]) -> None:
    """Of maps and of upstream gradients that lie anyhow: compiled code goes by them."""
    (x, *others), (_, *of_backward) = _upsampled(None, None)
    laid_out = [layout(t.detach()) if isinstance(t, Tensor) and t.shape == x.shape else t for t in of_backward]
    opcheck(torch.ops.dca_kernels.upsample.default, (layout(x.detach()), *others), test_utils="test_faketensor")
    backward = (layout(x.detach()), *(t.detach() if isinstance(t, Tensor) else t for t in laid_out))
    opcheck(torch.ops.dca_kernels.upsample_backward.default, backward, test_utils="test_faketensor")


@pytest.mark.parametrize("side, scores", [(7, 7**2), (3, 3**2 + 3**2 + 1 + 3 * 3 + 3 + 3), (1, 7 * 8 // 2)])
def test_flops_of_spatial_attention(side: int, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tiles of so many tokens a side, on and above the diagonal."""
    monkeypatch.setattr(spatial_tiles, "TILE_BYTES", side**2 * 2 * 8)  # of two heads
    arguments, backward_arguments = _spatial(1.0)
    with FlopCounterMode(display=False) as counter:
        torch.ops.dca_kernels.spatial_attention(*arguments)
        torch.ops.dca_kernels.spatial_attention_backward(*backward_arguments)
    images, tokens, channels, width = 2, 7, 12, 4 + 2  # a column for each head's normaliser
    assert counter.get_flop_counts()["Global"] == {
        torch.ops.dca_kernels.spatial_attention: 2 * images * (scores * channels + tokens**2 * width),
        torch.ops.dca_kernels.spatial_attention_backward: 2
        * images
        * (scores * (channels + 2 * width) + tokens**2 * (width + channels)),
    }


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_flops_of_upsample(train: bool) -> None:
    statistics = (None, None) if train else (normal(3, seed=5), torch.ones(3, dtype=torch.float64))
    arguments, backward_arguments = _upsampled(*statistics)
    with FlopCounterMode(display=False) as counter:
        torch.ops.dca_kernels.upsample(*arguments)
        torch.ops.dca_kernels.upsample_backward(*backward_arguments)
    columns, rows = 6 * 4 * 5 * 10, 6 * 4 * 8 * 10  # 6 planes, 4 x 5 to 8 x 10
    assert counter.get_flop_counts()["Global"] == {
        torch.ops.dca_kernels.upsample: 2 * (columns + rows * (2 if train else 1)),
        torch.ops.dca_kernels.upsample_backward: 2 * (2 * columns + 3 * rows),
    }


def test_a_map_of_the_grids_size_takes_no_flops() -> None:
    x, _, gamma, beta, *others = upsample_arguments(None, None)
    with FlopCounterMode(display=False) as counter:
        out, *statistics = torch.ops.dca_kernels.upsample(x, x, gamma, beta, *others)
        torch.ops.dca_kernels.upsample_backward(x, x, gamma, beta, *statistics, out, 1e-5, True)
    assert counter.get_total_flops() == 0


def test_flops_of_a_module() -> None:
    # The counter hooks into every module: BatchNorm and ReLU are called as they are then, but attention is counted.
    module, _ = pair(SMALL)
    with FlopCounterMode(display=False) as counter:
        module(random_maps(SMALL))
    assert counter.get_flop_counts()["Global"][torch.ops.dca_kernels.spatial_attention] == 2 * 3 * 10**2 * (8 + 8 + 4)
