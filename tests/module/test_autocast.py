"""Autocast, with float32 parameters."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dca_kernels.torch_backend import channel_attention, patch_embed, spatial_attention, spatial_tiles, upsample
from reference.budget import off_the_kink
from tests.oracle import (
    TRAINABLE,
    Config,
    assert_all_within_budget,
    assert_identical,
    assert_same,
    assert_within_budget,
    both_modes,
    each_backend,
    each_trainable,
    evaluate,
    needs_triton,
    pair,
    promoted,
    random_like,
    random_maps,
)

pytestmark = pytest.mark.slow

CONFIG = Config(patch=(2, 4), sizes=((8, 16), (4, 8)))
MAPS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
each_map_dtype = pytest.mark.parametrize("dtype", MAPS.values(), ids=[f"{name}_maps" for name in MAPS])
each_autocast = pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=["to_bfloat16", "to_float16"])


def under(autocast: torch.dtype, module: nn.Module) -> nn.Module:
    """The module with its forward under autocast; a backward is then outside of it, as PyTorch advises."""
    device = next(module.parameters()).device
    module.forward = torch.autocast(device.type, autocast)(module.forward)
    return module


@each_map_dtype
@each_autocast
@both_modes
@each_backend
def test_dtypes_and_error_budget(dtype: torch.dtype, autocast: torch.dtype, train: bool, backend: str) -> None:
    """The torch backend computes in float32 all the same: it is held to what the reference does without autocast."""
    backward, draws = backend in TRAINABLE, []
    for seed in range(6):
        modules = pair(CONFIG, backend, torch.float32, train, seed)
        exact, plain = promoted(modules[1], CONFIG), promoted(modules[1], CONFIG).float()
        maps = random_maps(CONFIG, dtype, seed, backend)
        doubles = [x.double() for x in maps]
        upstream = off_the_kink(promoted(modules[1], CONFIG), doubles, random_like(maps, seed))
        ours, theirs = (evaluate(under(autocast, module), maps, upstream, backward) for module in modules)
        assert {name: t.dtype for name, t in ours.items()} == {name: t.dtype for name, t in theirs.items()}
        if backend == "torch":
            in_float32 = evaluate(plain, [x.float() for x in maps], [g.float() for g in upstream], backward)
            theirs = {name: t.to(theirs[name].dtype) for name, t in in_float32.items()}
        draws.append([ours, theirs, evaluate(exact, doubles, [g.double() for g in upstream], backward)])
    for kind in sorted({name.partition(".")[0] for name in draws[0][0]}):
        of_kind = [[{n: t for n, t in of.items() if n.startswith(f"{kind}.")} for of in draw] for draw in draws]
        dtypes = {t.dtype for n, t in of_kind[0][0].items() if not n.endswith("num_batches_tracked")}
        assert_all_within_budget(of_kind, dtypes.pop())
        assert not dtypes


@needs_triton
def test_gradients_of_the_kernels() -> None:
    config = replace(CONFIG, batch=1)
    modules = pair(config, "triton", torch.float32)
    maps = random_maps(config, torch.float32, backend="triton")
    doubles = [x.double() for x in maps]
    upstream = [g.float() for g in off_the_kink(promoted(modules[1], config), doubles, random_like(doubles))]
    exact = promoted(modules[1], config)
    results = [evaluate(under(torch.bfloat16, module), maps, upstream) for module in modules]
    results.append(evaluate(exact, doubles, [g.double() for g in upstream]))
    for name, value in results[0].items():
        assert value.dtype == results[1][name].dtype, name
    assert_all_within_budget([results], torch.bfloat16)


@needs_triton
def test_upstream_gradients_of_the_kernels_have_one_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros for an unused output too: a kernel chooses among the pointers of all scales."""
    from dca_kernels.triton_backend import launch  # there may be no Triton

    found: list[torch.dtype] = []
    monkeypatch.setattr(launch, "run", lambda *args, **its: found.extend(g.dtype for g in its.get("douts", ())))
    module = under(torch.bfloat16, pair(CONFIG, "triton", torch.float32)[0])
    outs = module(random_maps(CONFIG, torch.float16, backend="triton"))
    outs[1].sum().backward()
    assert {y.dtype for y in outs} == set(found) == {torch.float32}


@each_autocast
@both_modes
@each_trainable
def test_float32_maps_lose_nothing(autocast: torch.dtype, train: bool, backend: str) -> None:
    maps = random_maps(CONFIG, torch.float32)
    plain, cast = (pair(CONFIG, backend, torch.float32, train)[0] for _ in range(2))
    assert_identical(evaluate(under(autocast, cast), maps), evaluate(plain, maps))


@both_modes
@each_backend
def test_float64_is_left_alone(train: bool, backend: str) -> None:
    ours, theirs = (under(torch.bfloat16, module) for module in pair(CONFIG, backend, train=train))
    maps = random_maps(CONFIG, backend=backend)
    assert_same(*(evaluate(module, maps, backward=backend in TRAINABLE) for module in (ours, theirs)))


@each_backend
def test_maps_of_unequal_dtypes(backend: str) -> None:
    ours, theirs = (under(torch.bfloat16, module) for module in pair(CONFIG, backend, torch.float32))
    maps = [
        x.to(dtype)
        for x, dtype in zip(random_maps(CONFIG, backend=backend), (torch.float32, torch.bfloat16), strict=True)
    ]
    with torch.no_grad():
        assert [y.dtype for y in ours(maps)] == [y.dtype for y in theirs(maps)] == [torch.float32, torch.bfloat16]


@each_backend
def test_one_autocast_after_another(backend: str) -> None:
    """Nothing that one module kept of a call under the first is taken under the second."""
    module, maps = pair(CONFIG, backend, torch.float32, train=False)[0], random_maps(CONFIG, torch.bfloat16, 0, backend)
    for autocast in (torch.bfloat16, torch.float16, torch.bfloat16):
        fresh = pair(CONFIG, backend, torch.float32, train=False)[0]
        with torch.autocast(maps[0].device.type, autocast), torch.no_grad():
            outs, expected = module(maps), fresh(maps)
        assert [y.dtype for y in outs] == [y.dtype for y in expected]
        assert all(map(torch.equal, outs, expected))


@both_modes
@each_trainable
def test_backward_under_autocast(train: bool, backend: str) -> None:
    # PyTorch's own part of the backward is in bfloat16 then, for the reference too.
    config = Config()
    modules = pair(config, backend, torch.float32, train)
    exact = promoted(modules[1], config)
    maps = random_maps(config, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (evaluate(module, maps) for module in modules)
    expected = evaluate(exact, [x.double() for x in maps])
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        if name.startswith("grad"):
            assert_within_budget([[ours[name], theirs[name], expected[name]]], torch.bfloat16, name)


def _pool(x: Tensor) -> Tensor:
    return patch_embed._AdaptiveAvgPool.apply(x, (2, 3), True, False)[0]


def _pool_by_rows(x: Tensor) -> Tensor:
    return patch_embed._AdaptiveAvgPool.apply(x, (3, 5), True, False)[0]


def _sum_heads(tokens: Tensor, columns: Tensor) -> Tensor:
    return spatial_attention._JointProduct.apply(tokens, columns)[0]


def _attend(tokens: Tensor, values: Tensor, scores: Tensor) -> Tensor:
    return spatial_tiles.attend_tiles(tokens, values, torch.ones(12), scores)[0]


def _attend_rows(tokens: Tensor, values: Tensor, scores: Tensor) -> Tensor:
    return _attend(10 * tokens, values, scores)


def _upsample(x: Tensor, z: Tensor) -> Tensor:
    return upsample._upsample(x, z, torch.ones(4), torch.ones(4), None, None, 1e-5, torch.float32)[0]


OWN: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "pooling": (_pool, [(2, 4, 6, 7)]),
    "pooling_of_unequal_windows": (_pool_by_rows, [(2, 4, 7, 8)]),
    "gram": (lambda x: channel_attention._Gram.apply(x, [5, 7], torch.float32), [(2, 6, 12)]),
    "head_sums": (_sum_heads, [(2, 6, 12), (2, 12, 3)]),
    "attention": (_attend, [(2, 6, 12), (2, 6, 4), (2, 2, 6)]),
    "attention_by_rows": (_attend_rows, [(2, 6, 12), (2, 6, 4), (2, 2, 6)]),
    "upsampling": (_upsample, [(2, 4, 6, 7), (2, 4, 2, 3)]),
}


@pytest.mark.parametrize(("function", "shapes"), OWN.values(), ids=OWN)
def test_own_backward_under_autocast(function: Callable[..., Tensor], shapes: list[tuple[int, ...]]) -> None:
    """A step that autocast would take in 16 bit is taken in the tensors' own dtype."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    out = function(*inputs)
    upstream = torch.randn(out.shape, generator=generator)
    expected = torch.autograd.grad(out, inputs, upstream, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(out, inputs, upstream)
    assert all(map(torch.equal, found, expected))
