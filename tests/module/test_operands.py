"""The `torch` backend's 16-bit operands, which it takes on CUDA: forced here on a CPU.

The same code runs but for one call, `common.multiply`. For values as wide as the keys, a CPU's attention rounds weights
and their gradients to 16 bit, as a GPU's does; for narrower ones it would compute in float32.
"""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from dca_kernels import contract, torch_backend
from dca_kernels.torch_backend import channel_attention, common, patch_embed, spatial_attention, spatial_tiles, upsample
from tests.module.test_autocast import CONFIG as UNDER_AUTOCAST
from tests.module.test_autocast import under
from tests.module.test_compile import SMALL
from tests.module.test_memory import saved_tensors
from tests.module.test_precision import CASES, runs
from tests.oracle import (
    Config,
    Results,
    assert_all_within_budget,
    assert_identical,
    assert_within_budget,
    both_modes,
    build,
    evaluate,
    pair,
    promoted,
    random_like,
    random_maps,
)

pytestmark = pytest.mark.slow

CONFIG = Config((8, 12), (5, 7), spatial_head=(2, 4), sizes=((11, 15), (5, 7)), batch=3)  # heads of 10 and 5 channels
SCALES = len(CONFIG.features)
DRAWS = range(16)
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
each_case = pytest.mark.parametrize("case", CASES)
attention = F.scaled_dot_product_attention


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA."""
    monkeypatch.setattr(torch_backend, "operand_dtype", lambda maps: maps[0].dtype)


@pytest.fixture
def operands(forced: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[torch.dtype]]:
    """The dtypes of the operands that reach the products and the attention."""
    seen: dict[str, list[torch.dtype]] = {"product": [], "attention": []}
    multiply = common.multiply

    def product(a: Tensor, b: Tensor) -> Tensor:
        seen["product"] += [a.dtype, b.dtype]
        return multiply(a, b)

    def attend(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        seen["attention"] += [query.dtype, keys.dtype, values.dtype]
        wide = F.pad(values, (0, keys.shape[-1] - values.shape[-1]))
        return attention(query, keys, wide, scale=scale)[..., : values.shape[-1]]

    for module in (common, channel_attention):
        monkeypatch.setattr(module, "multiply", product)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    return seen


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def within_range(draws: list[list[Results]]) -> list[list[Results]]:
    """Zeros where the exact value comes near the end of the dtype's range, or the reference's is beyond it.

    Of nearly tied attention weights gradients are off by half their value, ours and the reference's: from a quarter of
    float16's range on, it is luck which is infinite.
    """
    selected = []
    for ours, theirs, exact in draws:
        names = [name for name, t in ours.items() if t.is_floating_point()]
        ends = {name: torch.finfo(ours[name].dtype).max for name in names}
        fits = {name: (exact[name].abs() < ends[name] / 4) & theirs[name].isfinite() for name in names}
        selected.append([{name: r[name].where(fits[name], 0) for name in names} for r in (ours, theirs, exact)])
    return selected


# The error budget


@each_case
@both_modes
@each_dtype
def test_error_budget_of_16_bit_operands(
    case: str, train: bool, dtype: torch.dtype, operands: dict[str, list[torch.dtype]]
) -> None:
    draws = [runs("torch", dtype, train, case, seed) for seed in DRAWS]
    assert all(seen and set(seen) == {dtype} for seen in operands.values())
    assert_all_within_budget(within_range(draws), dtype)


@each_dtype
def test_every_large_product_has_16_bit_operands(dtype: torch.dtype, operands: dict[str, list[torch.dtype]]) -> None:
    module, _ = pair(CONFIG, dtype=dtype)
    evaluate(module, random_maps(CONFIG, dtype), backward=False)
    forward = 1 + 2 * SCALES  # the Gram matrix; for each scale, mixing and 1x1 convolution
    assert operands == {"product": [dtype] * 2 * forward, "attention": [dtype] * 3 * SCALES}
    operands["product"].clear()
    evaluate(module, random_maps(CONFIG, dtype))
    assert operands["product"] == [dtype] * 2 * (forward + 1 + 4 * SCALES)


@each_dtype
@both_modes
def test_operands_under_autocast(dtype: torch.dtype, train: bool, operands: dict[str, list[torch.dtype]]) -> None:
    modules = pair(UNDER_AUTOCAST, dtype=torch.float32, train=train)
    exact = promoted(modules[1], UNDER_AUTOCAST)
    maps = random_maps(UNDER_AUTOCAST, dtype)
    ours, theirs = (evaluate(under(dtype, module), maps) for module in modules)
    expected = evaluate(exact, [x.double() for x in maps])
    assert set(operands["product"]) == {dtype}
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        if name.startswith("output"):
            assert_within_budget([[ours[name], theirs[name], expected[name]]], ours[name].dtype, name)
        assert ours[name].isfinite().all(), name


# What is rounded, and when


def assert_rounded_at(size: float, actual: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """The error is a few rounding steps of a value of some size."""
    error = (actual.double() - exact).square().mean().sqrt()
    assert error <= 4 * torch.finfo(dtype).eps * size


STAGES: dict[str, tuple[Callable, str, str]] = {
    "channel_attention": (channel_attention.channel_attention, "channel_norm", "c_attention"),
    "spatial_attention": (spatial_attention.spatial_attention, "spatial_norm", "s_attention"),
}


@pytest.mark.parametrize("attend, norms, attentions", STAGES.values(), ids=STAGES)
@each_dtype
def test_tokens_are_centred_before_they_are_rounded(
    attend: Callable, norms: str, attentions: str, dtype: torch.dtype, operands: dict[str, list[torch.dtype]]
) -> None:
    """They differ by a hundredth of their size; that costs nothing where they are rounded by what they differ."""
    module = pair(CONFIG)[0]
    block = module.attention[0]
    for norm, attention in zip(getattr(block, norms), getattr(block, attentions), strict=True):
        norm.weight.data.mul_(0.01)
        norm.bias.data.add_(1)
        attention.k_map.proj.depthwise.weight.data.mul_(100)  # else all tokens have the same attention weight
    tokens = [normal(2, 35, channels, dtype=torch.float64, seed=channels) for channels in CONFIG.features]
    given = contract.read(module, [None] * SCALES, torch.float64, [torch.float64] * SCALES)
    exact = attend(tokens, given, 0)
    actual = attend([t.float() for t in tokens], given._replace(dtype=dtype), 0)
    for ours, theirs in zip(actual, exact, strict=True):
        assert_rounded_at(0.01, ours, theirs, dtype)


@each_dtype
def test_the_convolution_centres_before_it_rounds(dtype: torch.dtype) -> None:
    weight, tokens = normal(8, 8, dtype=torch.float64), 100 + normal(2, 35, 8, dtype=torch.float64)
    actual = upsample._convolve(weight.float(), tokens.float(), dtype)
    assert_rounded_at(1.0, actual.mT, tokens @ weight.mT, dtype)


def attended_by(key_scores: Tensor, dtype: torch.dtype, factor: float = 1.0) -> tuple[Tensor, ...]:
    """`_attend_flash`, and the gradients of tokens and key scores for an upstream gradient of some size."""
    wide = contract.accumulation_dtype(dtype)
    every, pair = (t.to(wide) for t in (normal(2, 35, 20), normal(20, seed=1)))
    every, key_scores = every.requires_grad_(), key_scores.to(wide).requires_grad_()
    out = spatial_attention._attend_flash(every, every[:, :, :8], pair, key_scores, dtype)
    return out.detach(), *torch.autograd.grad(out, (every, key_scores), factor * normal(*out.shape, seed=2).to(wide))


@each_dtype
def test_key_scores_of_hundreds_keep_their_digits(dtype: torch.dtype, operands: dict[str, list[torch.dtype]]) -> None:
    """Nearly equal ones, where a rounding step of bfloat16 is 2."""
    scores = 300 + normal(2, 2, 35, dtype=torch.float64)
    exact = attended_by(scores, torch.float64)
    for ours, theirs in zip(attended_by(scores, dtype), exact, strict=True):
        assert_rounded_at(theirs.square().mean().sqrt().item(), ours, theirs, dtype)


@pytest.mark.parametrize("power", [-40, 40])
@each_dtype
def test_operands_of_any_size(dtype: torch.dtype, power: int, operands: dict[str, list[torch.dtype]]) -> None:
    """Powers of two change no digit, though float16 goes from 2^-24 to 2^16 only."""
    factor = 2.0**power

    def assert_scaled(actual: tuple[Tensor, ...], plain: tuple[Tensor, ...]) -> None:
        assert all(torch.equal(a, factor * b) for a, b in zip(actual, plain, strict=True))

    scores = torch.zeros(2, 2, 35)
    assert_scaled(attended_by(scores, dtype, factor)[1:], attended_by(scores, dtype)[1:])
    a, b = normal(2, 5, 7).requires_grad_(), normal(2, 7, 3, seed=1).requires_grad_()
    assert_scaled((common.product(factor * a, b, dtype),), (common.product(a, b, dtype),))
    for out in (common.product(a, b, dtype), channel_attention._Gram.apply(a, [3, 4], dtype)):
        upstream = normal(*out.shape, seed=2)
        of_both = [
            [g for g in torch.autograd.grad(out, (a, b), u, retain_graph=True, allow_unused=True) if g is not None]
            for u in (factor * upstream, upstream)
        ]
        assert_scaled(*of_both)


@each_dtype
def test_one_frozen_factor_of_a_product(dtype: torch.dtype, forced: None) -> None:
    """The gradients of what is trained before the products, or by one alone, are those of where all is trained."""
    module, _ = pair(CONFIG, dtype=dtype)
    maps = random_maps(CONFIG, dtype)
    expected = evaluate(module, maps)
    for trained in (module.avg_map, module.upconvs):
        module.requires_grad_(False).zero_grad()
        trained.requires_grad_(True)
        torch.autograd.backward(module(maps), random_like(maps))
        found = {f"grad.{name}": p.grad for name, p in module.named_parameters() if p.requires_grad}
        assert_identical(found, {name: expected[name] for name in found})


@pytest.mark.parametrize(
    "device, tokens, dtype, by",
    [
        ("cuda", torch.float32, torch.bfloat16, "flash"),
        ("cuda", torch.float32, torch.float32, "flash"),
        ("cuda", torch.float64, torch.float64, "tiles"),
        ("cpu", torch.float32, torch.float32, "tiles"),
        ("cpu", torch.float64, torch.float64, "tiles"),
    ],
)
def test_what_attends(
    device: str, tokens: torch.dtype, dtype: torch.dtype, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch has no flash attention in float64: it would hold all scores."""
    monkeypatch.setattr(spatial_attention, "_attend_flash", lambda *_: "flash")
    monkeypatch.setattr(spatial_attention, "attend_tiles", lambda *_: ("tiles", None))
    with FakeTensorMode():
        y = torch.empty(2, 5, 4, dtype=tokens, device=device)
    assert spatial_attention._attend(y, y, y, y, dtype) == by


def test_a_product_on_cuda_has_a_float32_result() -> None:
    with FakeTensorMode():
        a, b = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in ((2, 3, 4), (2, 4, 5)))
        product = common.multiply(a, b)
    assert (product.shape, product.dtype, product.device.type) == ((2, 3, 5), torch.float32, "cuda")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_of_operands(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        maps = {device: torch.empty(3, dtype=dtype, device=device) for device in ("cpu", "cuda")}
        other = torch.empty(3, device="cuda")
        assert torch_backend.operand_dtype([maps["cpu"]]) == contract.accumulation_dtype(dtype)
        assert torch_backend.operand_dtype([maps["cuda"]]) == dtype
        assert torch_backend.operand_dtype([maps["cuda"], other]) == contract.accumulation_dtype(dtype)
        monkeypatch.setattr(torch.version, "hip", "6.4")
        assert torch_backend.operand_dtype([maps["cuda"]]) == contract.accumulation_dtype(dtype)


# What must go on working


@pytest.mark.parametrize("batch", [0, 1])
@each_dtype
def test_shapes_with_16_bit_operands(dtype: torch.dtype, batch: int, forced: None) -> None:
    config = replace(CONFIG, batch=batch)
    module, _ = pair(config, dtype=dtype, train=False)
    results = evaluate(module, random_maps(config, dtype))
    for i, x in enumerate(random_maps(config, dtype)):
        assert results[f"output.{i}"].shape == results[f"grad_input.{i}"].shape == x.shape
    assert all(value.isfinite().all() for value in results.values())


@each_dtype
def test_the_same_bits_every_time(dtype: torch.dtype, operands: dict[str, list[torch.dtype]]) -> None:
    results = [evaluate(pair(CONFIG, dtype=dtype)[0], random_maps(CONFIG, dtype)) for _ in range(2)]
    assert_identical(*results)


@each_dtype
def test_second_derivatives(dtype: torch.dtype, forced: None) -> None:
    """Of float32 operands, but for rounding."""

    def penalty(operand: torch.dtype) -> Tensor:
        a, b = normal(2, 35, 7).requires_grad_(), normal(2, 7, 7, seed=1).requires_grad_()
        product = common.product(a, b, operand) + channel_attention._Gram.apply(a, [3, 4], operand).sum()
        first = torch.autograd.grad(product.square().sum(), (a, b), create_graph=True)
        return torch.cat([g.flatten() for g in torch.autograd.grad(sum(g.square().sum() for g in first), (a, b))])

    actual, exact = penalty(dtype), penalty(torch.float32)
    assert (actual - exact).square().mean() <= (8 * torch.finfo(dtype).eps) ** 2 * exact.square().mean()


@each_dtype
def test_a_module_is_differentiable_twice(dtype: torch.dtype, forced: None) -> None:
    """Without spatial attention: PyTorch's flash attention is not, in any dtype."""
    config = replace(CONFIG, spatial_att=False)
    module, _ = pair(config, dtype=dtype)
    maps = [x.requires_grad_() for x in random_maps(config, dtype)]
    first = torch.autograd.grad([y.float().square().mean() for y in module(maps)], maps, create_graph=True)
    second = torch.autograd.grad(sum(g.float().square().sum() for g in first), [*maps, *module.parameters()])
    assert all(g.isfinite().all() for g in second)
    assert any(g.any() for g in second)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
class TestCompilers:
    @pytest.fixture(autouse=True)
    def poisoned_memory(self) -> None:
        """Not here: the compiler would trace what poisons fresh memory."""

    @pytest.mark.parametrize(
        "dtype, train",
        [(torch.bfloat16, True), (torch.float16, True), (torch.float16, False)],
        ids=["bfloat16-train", "float16-train", "float16-eval"],
    )
    def test_compile(self, dtype: torch.dtype, train: bool, forced: None) -> None:
        torch._dynamo.reset()
        eager, compiled = (pair(SMALL, dtype=dtype, train=train)[0] for _ in range(2))
        compiled.compile(backend="aot_eager", fullgraph=True, dynamic=True)
        for batch in (3, 4):
            maps = random_maps(replace(SMALL, batch=batch), dtype)
            assert_identical(evaluate(compiled, maps), evaluate(eager, maps))

    @each_dtype
    def test_export(self, dtype: torch.dtype, forced: None) -> None:
        module, _ = pair(CONFIG, dtype=dtype, train=False)
        batch = {0: torch.export.Dim("B")}
        program = torch.export.export(module, (random_maps(CONFIG, dtype),), dynamic_shapes=[[batch] * SCALES])
        maps = random_maps(replace(CONFIG, batch=5), dtype)
        with torch.no_grad():
            assert all(torch.equal(a, b) for a, b in zip(program.module()(maps), module(maps), strict=True))


def saved_bytes(module: nn.Module, maps: list[Tensor]) -> int:
    """Of what a forward keeps for its backward, each storage once."""
    with saved_tensors() as saved:
        module(maps)
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in saved)}.values())


@each_dtype
def test_less_is_saved_than_by_flash_attention_in_float32(
    dtype: torch.dtype, operands: dict[str, list[torch.dtype]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config((8, 16), 8, sizes=((64, 64), (32, 32)), batch=1)
    module = build("torch", **config.arguments).to(dtype)
    maps = [x.requires_grad_() for x in random_maps(config, dtype)]
    ours, other = saved_bytes(module, maps), copy.deepcopy(module)
    assert operands["attention"]
    monkeypatch.setattr(torch_backend, "operand_dtype", lambda maps: torch.float32)
    monkeypatch.setattr(spatial_attention, "_attend", spatial_attention._attend_flash)
    assert ours < saved_bytes(other, maps)


# Backwards of the backend's own


def _upsampled(x: Tensor, z: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return upsample._upsample(x, z, gamma, beta, None, None, 1e-5, torch.float32)[0]


BACKWARDS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "product": (lambda a, b: common.product(a, b, torch.bfloat16), [(2, 5, 7), (2, 7, 3)]),
    "gram": (lambda x: channel_attention._Gram.apply(x, [3, 4], torch.float32), [(2, 5, 7)]),
    "joint_product": (lambda t, c: spatial_attention._JointProduct.apply(t, c)[0], [(2, 5, 7), (2, 7, 3)]),
    "tiles": (
        lambda t, v, w, s: spatial_tiles.attend_tiles(t, v, w, s)[0],
        [(2, 35, 6), (2, 35, 4), (6,), (2, 2, 35)],
    ),
    "tiles_out_of_range": (
        lambda t, v, w, s: spatial_tiles.attend_tiles(12 * t.abs(), v, -w.abs(), s)[0],
        [(2, 9, 6), (2, 9, 4), (6,), (2, 2, 9)],
    ),
    "pooling": (lambda x: patch_embed._AdaptiveAvgPool.apply(x, (3, 2), False, False)[0], [(2, 4, 7, 5)]),
    "upsampling": (_upsampled, [(2, 4, 7, 5), (2, 4, 3, 2), (4,), (4,)]),
}


@pytest.mark.parametrize("graph", [False, True], ids=["once", "with_a_graph"])
@pytest.mark.parametrize("name", BACKWARDS)
def test_gradients_are_the_same_under_autocast(name: str, graph: bool) -> None:
    """Whatever autocast the forward had, which the backend leaves."""
    compute, shapes = BACKWARDS[name]
    inputs = [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    gradients = []
    for enabled in (False, True):
        out = compute(*inputs)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            gradients.append(torch.autograd.grad(out, inputs, normal(*out.shape, seed=9), create_graph=graph))
    for plain, cast in zip(*gradients, strict=True):
        assert cast.dtype == plain.dtype == torch.float32 and torch.equal(cast, plain)


def test_zeros_and_the_smallest_numbers_stay_finite_in_float16() -> None:
    """Gradients may be zero, or far below what float16 holds."""
    for size in (0.0, 1e-44, 1e-38, 1e-20):
        a, b = size * normal(1, 4, 3), normal(1, 3, 5, seed=1)
        product = common.product(a, b, torch.float16)
        torch.testing.assert_close(product, a @ b, rtol=1e-2, atol=max(2e-45, 1e-2 * size))


@pytest.mark.parametrize("sign, size", [(-1, 8.75), (-1, 12.0), (1, 5.0)], ids=["subnormal", "zero", "infinite"])
def test_attention_weights_that_leave_the_range_together(sign: int, size: float) -> None:
    """Of scores that are hundreds below or above zero: a softmax has no such limit."""
    tokens, values = (
        normal(2, 9, 6, seed=6).double().abs().mul_(size).requires_grad_(),
        normal(2, 9, 4).double().requires_grad_(),
    )
    weight, scores = sign * normal(6).double().abs(), normal(2, 2, 9, seed=3).double()
    exact = spatial_tiles._attend_rows(slice(None), tokens, values, weight, scores)
    low = [t.detach().float().requires_grad_() for t in (tokens, values)]
    found = spatial_tiles.attend_tiles(*low, weight.float(), scores.float())[0]
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-4)
    upstream = normal(*found.shape, seed=5)
    for a, b in zip(
        torch.autograd.grad(found, low, upstream),
        torch.autograd.grad(exact, (tokens, values), upstream.double()),
        strict=True,
    ):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)
