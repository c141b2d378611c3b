"""Shapes, layouts, batch sizes, autograd: everything that the reference can do."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.oracle import (
    LAYOUTS,
    TRAINABLE,
    Config,
    assert_identical,
    assert_same,
    both_modes,
    each_backend,
    each_trainable,
    evaluate,
    not_finite,
    pair,
    random_like,
    random_maps,
)

SHAPES = {
    "divisible": Config(sizes=((16, 16), (8, 8))),
    "same_as_grid": Config(sizes=((4, 4), (4, 4))),
    "odd": Config(sizes=((17, 13), (9, 7))),
    "smaller_than_grid": Config(sizes=((3, 2), (1, 2))),
    "one_axis_divides": Config(sizes=((8, 9), (9, 8))),
    "rectangular_grid": Config((8, 16), (3, 5), sizes=((12, 10), (3, 5))),
    "one_row_grid": Config((8, 16), (1, 6), sizes=((4, 12), (2, 3))),
    "one_token": Config((8, 16), 1, sizes=((4, 4), (2, 3))),
    "one_scale": Config((8,), sizes=((8, 8),)),
    "equal_scales": Config((8, 8, 8), sizes=((8, 8),) * 3),
    "seven_scales": Config((4, 8, 12, 4, 8, 4, 20), 3, sizes=((9, 9), (6, 6), (3, 3), (4, 5), (9, 9), (2, 2), (3, 6))),
    "growing_maps": Config((16, 8), sizes=((4, 4), (12, 12))),
    "wide_channels": Config((96, 4), 2, sizes=((4, 4), (2, 2))),
    "one_channel": Config((1, 1), 3, spatial_head=(1, 1), sizes=((6, 6), (3, 3))),
    "heads": Config((8, 16), channel_head=(2, 4), spatial_head=(8, 2)),
    "head_of_one_channel": Config((8, 8), channel_head=(8, 8), spatial_head=(8, 8)),
    "two_blocks": Config(n=2),
    "three_blocks": Config(n=3),
    "channel_only": Config(spatial_att=False),
    "spatial_only": Config(channel_att=False),
    "channel_only_two_blocks": Config(spatial_att=False, n=2),
    "no_attention": Config(channel_att=False, spatial_att=False),
    "one_image": Config(batch=1),
    "three_images": Config(batch=3),
    "no_images": Config(batch=0),
}


PARITY = 1.5e-13  # 20 times the largest of 12 draws of each shape


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
@both_modes
@each_backend
def test_parity(config: Config, train: bool, backend: str) -> None:
    maps = random_maps(config, backend=backend)
    modules = pair(config, backend, train=train)
    assert_same(*(evaluate(module, maps, backward=backend in TRAINABLE) for module in modules), rtol=PARITY)


@each_backend
def test_numbers_of_the_norms(backend: str) -> None:
    """Each has its own eps, each BatchNorm its own momentum: zero is none that is missing."""
    config = Config(n=2)
    modules = pair(config, backend)
    for module in modules:
        for i, norm in enumerate(m for m in module.modules() if isinstance(m, nn.LayerNorm | nn.BatchNorm2d)):
            norm.eps = 0.1 * (i + 1)
        for head, momentum in zip(module.bn_relu, (0.0, 0.3), strict=True):
            head[0].momentum = momentum
    maps = random_maps(config, backend=backend)
    assert_same(*(evaluate(module, maps, backward=backend in TRAINABLE) for module in modules))


@each_backend
def test_a_running_variance_that_overflowed_stays_infinite(backend: str) -> None:
    config = Config(spatial_att=False, sizes=((4, 6), (2, 3)))
    modules = pair(config, backend)
    for module in modules:
        module.bn_relu[0][0].running_var[0] = torch.inf
    maps = random_maps(config, backend=backend)
    assert_same(*(evaluate(module, maps, backward=False) for module in modules))


# Layouts


# Not for maps: without variance, BatchNorm divides rounding noise by almost zero.
UPSTREAM_LAYOUTS = LAYOUTS | {
    "expanded_plane": lambda x: x[:, :, :1, :1].expand_as(x),
    "expanded_scalar": lambda x: x[0, 0, 0, 0].expand_as(x),
}
LAYOUT_CONFIG = Config(patch=(2, 4), sizes=((12, 12), (7, 6)))  # windows that divide and windows that do not


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@both_modes
@each_backend
def test_layout_of_the_maps(layout: Callable[[Tensor], Tensor], train: bool, backend: str) -> None:
    maps = [layout(x) for x in random_maps(LAYOUT_CONFIG, backend=backend)]
    results = [
        evaluate(pair(LAYOUT_CONFIG, backend, train=train)[0], inputs, backward=backend in TRAINABLE)
        for inputs in (maps, [x.contiguous() for x in maps])
    ]
    assert_same(*results)


@pytest.mark.parametrize("layout", UPSTREAM_LAYOUTS.values(), ids=UPSTREAM_LAYOUTS)
@both_modes
@each_trainable
def test_layout_of_the_upstream_gradients(layout: Callable[[Tensor], Tensor], train: bool, backend: str) -> None:
    maps = random_maps(LAYOUT_CONFIG)
    upstream = [layout(g) for g in random_like(maps)]
    results = [
        evaluate(pair(LAYOUT_CONFIG, backend, train=train)[0], maps, gradients)
        for gradients in (upstream, [g.contiguous() for g in upstream])
    ]
    assert_same(*results)


@both_modes
@each_trainable
def test_gradients_of_a_sum_and_of_a_cat(train: bool, backend: str) -> None:
    # What autograd itself hands over: an expanded scalar, and slices of one tensor.
    config = Config((8, 8), sizes=((6, 6), (6, 6)))
    results = []
    for module in pair(config, backend, train=train):
        maps = [x.requires_grad_() for x in random_maps(config)]
        outputs = module(maps)
        (torch.cat(outputs, 1).square().sum() + outputs[0].sum()).backward()
        results.append({f"grad_input.{i}": x.grad for i, x in enumerate(maps)})
    assert_same(*results)


@both_modes
@each_backend
def test_channels_last_stays_channels_last(train: bool, backend: str) -> None:
    module, _ = pair(Config(), backend, train=train)
    maps = [x.contiguous(memory_format=torch.channels_last) for x in random_maps(Config(), backend=backend)]
    results = evaluate(module, maps, backward=backend in TRAINABLE)
    kinds = ["output", "grad_input"] if backend in TRAINABLE else ["output"]
    for name in (f"{kind}.{i}" for kind in kinds for i in range(len(maps))):
        assert results[name].is_contiguous(memory_format=torch.channels_last), name


# Autograd

TINY = Config((2, 4), 2, channel_head=(1, 2), spatial_head=(2, 1), sizes=((4, 4), (3, 2)))


@pytest.mark.slow
@both_modes
@each_trainable
def test_gradcheck_of_the_maps(train: bool, backend: str) -> None:
    module, _ = pair(TINY, backend, train=train)
    maps = [x.requires_grad_() for x in random_maps(TINY)]
    assert torch.autograd.gradcheck(lambda *maps: module(maps), maps)
    assert torch.autograd.gradgradcheck(lambda *maps: module(maps), maps)


@pytest.mark.slow
@both_modes
@each_trainable
def test_gradcheck_of_parameters(train: bool, backend: str) -> None:
    module, _ = pair(TINY, backend, train=train)
    maps = random_maps(TINY)
    names = [name for name, _ in module.named_parameters() if ".1." in name and not _is_shift(name)]
    parameters = [module.get_parameter(name).detach().requires_grad_() for name in names]

    def outputs(*values: Tensor) -> tuple[Tensor, ...]:
        return functional_call(module, dict(zip(names, values, strict=True)), (maps,))

    assert torch.autograd.gradcheck(outputs, parameters)
    assert torch.autograd.gradgradcheck(outputs, parameters, fast_mode=True)


@pytest.mark.parametrize(
    "config", [TINY, replace(TINY, channel_att=False), replace(TINY, n=2)], ids=["both", "spatial", "n"]
)
@both_modes
@each_trainable
def test_second_order(config: Config, train: bool, backend: str) -> None:
    # gradgradcheck compares second with first derivatives, which could be wrong together: so to the reference.
    def derivatives(module: nn.Module) -> dict[str, Tensor]:
        maps = [x.requires_grad_() for x in random_maps(config)]
        leaves = {f"map.{i}": x for i, x in enumerate(maps)} | dict(module.named_parameters())
        first = torch.autograd.grad(module(maps), leaves.values(), random_like(maps), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves.values())
        return {
            f"grad.{k}.{name}": g for k, gs in enumerate((first, second)) for name, g in zip(leaves, gs, strict=True)
        }

    ours, theirs = (derivatives(module) for module in pair(config, backend, train=train))
    assert_same(ours, theirs)


def _is_shift(name: str) -> bool:
    """Biases with gradients that are constant zeros in some mode: gradgradcheck does not take those."""
    return name.endswith("bias") and any(part in name for part in ("k_map", "v_map", "projection", "upconvs"))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@both_modes
@each_trainable
def test_outputs_without_gradients(mode: Callable, train: bool, backend: str) -> None:
    maps = random_maps(Config(), torch.float32)
    modules = [pair(Config(), backend, torch.float32, train)[0] for _ in range(2)]
    with_graph = modules[0](maps)
    with mode():
        without = modules[1](maps)
    assert not any(y.requires_grad for y in without)
    assert all(torch.equal(a, b) for a, b in zip(with_graph, without, strict=True))


@both_modes
@each_backend
def test_runs_are_bit_identical(train: bool, backend: str) -> None:
    maps = random_maps(LAYOUT_CONFIG, torch.float32, backend=backend)
    modules = (pair(LAYOUT_CONFIG, backend, torch.float32, train)[0] for _ in range(2))
    first, second = (evaluate(module, maps, backward=backend in TRAINABLE) for module in modules)
    assert_identical(first, second)


@both_modes
@each_backend
def test_deterministic_algorithms_are_enough(train: bool, backend: str) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        maps = random_maps(LAYOUT_CONFIG, backend=backend)
        evaluate(pair(LAYOUT_CONFIG, backend, train=train)[0], maps, backward=backend in TRAINABLE)
    finally:
        torch.use_deterministic_algorithms(False)


@both_modes
@each_trainable
def test_second_backward_through_one_graph(train: bool, backend: str) -> None:
    module, _ = pair(Config(), backend, train=train)
    maps = [x.requires_grad_() for x in random_maps(Config())]
    leaves = [*maps, *module.parameters()]
    outputs = module(maps)
    upstream = random_like(outputs)
    first = torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)
    second = torch.autograd.grad(outputs, leaves, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@both_modes
@each_backend
def test_inputs_are_left_alone(train: bool, backend: str) -> None:
    module, _ = pair(Config(), backend, torch.float32, train)
    maps = random_maps(Config(), torch.float32, backend=backend)
    upstream = random_like(maps)
    before = [t.clone() for t in (*maps, *upstream, *module.parameters())]
    evaluate(module, maps, upstream, backward=backend in TRAINABLE)
    assert all(torch.equal(a, b) for a, b in zip(before, (*maps, *upstream, *module.parameters()), strict=True))


@not_finite
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@each_backend
def test_images_do_not_mix_in_eval_mode(value: float, backend: str) -> None:
    module, _ = pair(Config(), backend, torch.float32, train=False)
    clean = random_maps(Config(), torch.float32, backend=backend)
    broken = [x.clone() for x in clean]
    for x in broken:
        x[0, 0, 0, 0] = value
    with torch.no_grad():
        for a, b in zip(module(clean), module(broken), strict=True):
            assert not b[0].isfinite().all()
            assert torch.equal(a[1], b[1])


SUBSETS = {
    "maps": lambda name: name.startswith("grad_input"),
    "parameters": lambda name: name.startswith("grad."),
    "first_map": lambda name: name == "grad_input.0",
    "second_map": lambda name: name == "grad_input.1",
    "batch_norm": lambda name: "bn_relu" in name,
    "layer_norm": lambda name: "_norm." in name,
    "avg_map": lambda name: "avg_map" in name,
    "query": lambda name: "q_map" in name,
    "key": lambda name: "k_map" in name,
    "value": lambda name: "v_map" in name,
    "weights": lambda name: name.endswith("weight"),
    "biases": lambda name: name.endswith("bias"),
}


@pytest.mark.parametrize("chosen", SUBSETS.values(), ids=SUBSETS)
@both_modes
@each_trainable
def test_subsets_of_requires_grad(chosen: Callable[[str], bool], train: bool, backend: str) -> None:
    module, _ = pair(Config(), backend, train=train)
    maps = random_maps(Config())
    expected = {name: t for name, t in evaluate(module, maps).items() if name.startswith("grad")}
    module.zero_grad()
    leaves = {f"grad_input.{i}": x for i, x in enumerate(maps)}
    leaves |= {f"grad.{name}": p for name, p in module.named_parameters()}
    for name, leaf in leaves.items():
        leaf.requires_grad_(chosen(name))
    outputs = module(maps)
    torch.autograd.backward(outputs, random_like(outputs))
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == set(filter(chosen, leaves))
    assert_same(
        {name: leaf.grad for name, leaf in leaves.items() if chosen(name)},
        {name: gradient for name, gradient in expected.items() if chosen(name)},
    )
