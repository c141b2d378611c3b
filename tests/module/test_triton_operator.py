"""The `triton` backend as one operator: what a traced or a watched call runs, against the eager one."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import dca_kernels
import dca_kernels.flops
from tests.module.test_autocast import under
from tests.oracle import DEVICE, LAYOUTS, Config, assert_same, evaluate, needs_triton, pair, random_like, random_maps

pytestmark = [needs_triton, pytest.mark.slow]

SMALL = Config((4, 8), 2, sizes=((5, 4), (2, 3)), spatial_head=(2, 4))
CONFIGS = {
    "both": SMALL,
    "no_attention": Config((4, 8), 2, channel_att=False, spatial_att=False, sizes=((5, 4), (2, 3))),
}


class Watch(TorchDispatchMode):
    """Remembers the operators of this package that ran, and with what."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.calls: list[tuple[Callable, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dca_kernels":
            self.seen.append(func.overloadpacket.__name__)
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("backward", [True, False], ids=["backward", "no_grad"])
def test_the_operator_is_the_eager_call(config: Config, train: bool, backward: bool) -> None:
    watched, eager = (pair(config, "triton", train=train)[0] for _ in range(2))
    maps = random_maps(config, backend="triton")
    with Watch() as watch:
        results = evaluate(watched, maps, backward=backward)
    assert watch.seen == ["refine", "refine_backward"][: 1 + backward]
    assert_same(results, evaluate(eager, maps, backward=backward), rtol=1e-12)


FEW = Config((2, 4), (1, 2), sizes=((2, 3), (1, 2)), spatial_head=(1, 1))


def _train_second_alone(model: nn.Module) -> None:
    model.bn_relu[0].eval()


def _fuse_no_head(model: nn.Module) -> None:
    """Hooked, they are called as they are; without an attention no number is left that is no integer."""
    for head in model.bn_relu:
        head[1].register_forward_hook(lambda module, args, output: 2 * output)


@pytest.mark.parametrize("change", [_train_second_alone, _fuse_no_head])
def test_heads_of_the_operator(change: Callable[[nn.Module], None]) -> None:
    """The buffers that it leaves alone are updated behind it, outside of the graph."""
    config = replace(FEW, channel_att=False, spatial_att=False)
    watched, eager = (pair(config, "triton")[0] for _ in range(2))
    for model in (watched, eager):
        change(model)
    maps = random_maps(config, backend="triton")
    with Watch() as watch:
        results = evaluate(watched, maps)
    assert watch.seen == ["refine", "refine_backward"]
    assert_same(results, evaluate(eager, maps), rtol=1e-12)
    assert not any(buffer.requires_grad for buffer in watched.buffers())


def _second_alone_trains(model: nn.Module, maps: list[Tensor]) -> list[Tensor]:
    _train_second_alone(model)
    return maps


def _channels_last(model: nn.Module, maps: list[Tensor]) -> list[Tensor]:
    return [LAYOUTS["channels_last"](x) for x in maps]


def _wider_outputs(model: nn.Module, maps: list[Tensor]) -> list[Tensor]:
    under(torch.bfloat16, model)
    return [x.half() for x in maps]


def _spatial_attention_alone(model: nn.Module, maps: list[Tensor]) -> list[Tensor]:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("s_attention" in name)
    return maps


def _narrow_convolutions(model: nn.Module, maps: list[Tensor]) -> list[Tensor]:
    model.upconvs.bfloat16()
    return maps


CALLS: dict[str, tuple[Config, Callable[[nn.Module, list[Tensor]], list[Tensor]]]] = {
    "by_rows": (replace(FEW, sizes=((2, 4), (1, 2))), lambda model, maps: maps),
    "channels_last": (FEW, _channels_last),
    "wider_outputs": (FEW, _wider_outputs),
    "second_alone_trains": (FEW, _second_alone_trains),
    "narrow_convolutions": (FEW, _narrow_convolutions),
    "spatial_attention_alone": (FEW, _spatial_attention_alone),
}


@pytest.mark.parametrize("config, change", CALLS.values(), ids=CALLS)
def test_fake_tensors_are_as_real_ones(
    config: Config, change: Callable[[nn.Module, list[Tensor]], list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the call; no kernel runs, since only values depend on it."""
    from dca_kernels.triton_backend import launch  # there may be no Triton

    monkeypatch.setattr(launch, "run", lambda *args, **arguments: None)
    model = pair(config, "triton", torch.float32)[0]
    maps = change(model, random_maps(config, torch.float32, backend="triton"))
    with Watch() as watch:
        outs = model([x.requires_grad_(change is not _spatial_attention_alone) for x in maps])
        torch.autograd.backward(outs, [torch.ones_like(y) for y in outs])
    assert [(p.grad is not None) for p in model.parameters()] == [p.requires_grad for p in model.parameters()]
    assert len(watch.calls) == 2
    for operator, arguments in watch.calls:
        opcheck(operator, arguments, test_utils="test_faketensor")


def test_fake_tensors_have_the_shapes_of_real_ones() -> None:
    model, maps = pair(SMALL, "triton")[0], random_maps(SMALL, backend="triton")
    model.compile(backend="aot_eager", fullgraph=True)
    assert_same(evaluate(model, maps), evaluate(pair(SMALL, "triton")[0], maps), rtol=1e-12)


def test_modules_of_other_numbers_compile_after_each_other() -> None:
    """From the second on, torch.compile no longer takes a float of a module for a constant."""
    maps = random_maps(SMALL, backend="triton")
    for eps, momentum in ((1e-5, 0.1), (1e-3, 0.3), (0.5, None)):
        compiled, eager = (pair(SMALL, "triton")[0] for _ in range(2))
        for norm in (head[0] for model in (compiled, eager) for head in model.bn_relu):
            norm.eps, norm.momentum = eps, momentum
        compiled.compile(backend="aot_eager", fullgraph=True)
        assert_same(evaluate(compiled, maps), evaluate(eager, maps), rtol=1e-12)


def test_the_operator_s_backward_makes_its_results_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """How they are arranged it knows without memory of the maps' size."""
    from dca_kernels.triton_backend import operator, passes

    devices, empty = [], passes.empty_gradients
    operator._gradients_skeleton.cache_clear()
    monkeypatch.setattr(
        passes, "empty_gradients", lambda maps, *rest: devices.append(maps[0].device) or empty(maps, *rest)
    )
    with Watch():
        evaluate(pair(SMALL, "triton")[0], random_maps(SMALL, backend="triton"))
    assert devices == [torch.device("meta")]


def test_a_second_derivative_of_the_operator_is_refused() -> None:
    model, maps = pair(SMALL, "triton")[0], [x.requires_grad_() for x in random_maps(SMALL, backend="triton")]
    with Watch(), pytest.raises(RuntimeError, match=r"use backend=.torch. for second derivatives"):
        torch.autograd.grad(model(maps)[0].square().sum(), maps[0], create_graph=True)[0].sum().backward()


def test_only_some_gradients() -> None:
    watched, eager = (pair(SMALL, "triton")[0].requires_grad_(False) for _ in range(2))
    maps = random_maps(SMALL, backend="triton")
    for model in (watched, eager):
        model.upconvs[1].conv.conv.weight.requires_grad_(True)
    with Watch():
        torch.autograd.backward(watched(maps), random_like(maps))
    torch.autograd.backward(eager(maps), random_like(maps))
    ours, theirs = ([p.grad for p in model.parameters()] for model in (watched, eager))
    assert [g is None for g in ours] == [g is None for g in theirs] and any(g is not None for g in ours)
    for actual, expected in zip(ours, theirs, strict=True):
        if expected is not None:
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


@pytest.mark.parametrize("layout", [None, "transposed"])
def test_the_kernels_operators_are_as_declared(layout: str | None) -> None:
    # Not the tests that compile them: test_fake_tensors_have_the_shapes_of_real_ones does.
    model, maps = pair(FEW, "triton", torch.float32)[0], random_maps(FEW, torch.float32, backend="triton")
    maps, upstream = ([x if layout is None else LAYOUTS[layout](x) for x in of] for of in (maps, random_like(maps)))
    with Watch() as watch:
        evaluate(model, maps, upstream)
    tests = ("test_schema", "test_faketensor")
    for operator, arguments in watch.calls:
        opcheck(operator, arguments, test_utils=tests)
    opcheck(*watch.calls[0], test_utils="test_autograd_registration")


# Two images, two scales of 4 and 8 channels, 2 x 3 tokens
CONVOLUTIONS = 6 * (4**2 + 8**2)
COVARIANCE, MIXING = 6 * (12 * 13 // 2), 6 * 12**2
SCORES, VALUES = 6**2 * 12, 6**2 * (4 + 8)
PRODUCTS: dict[str, tuple[dict, Callable[[str], bool], int, int]] = {
    "all": (
        {},
        lambda name: True,
        CONVOLUTIONS + COVARIANCE + MIXING + 2 * SCORES + VALUES,
        2 * CONVOLUTIONS + 3 * MIXING + 2 * 2 * SCORES + 3 * VALUES,
    ),
    "spatial_attention_on": (
        {},
        lambda name: "s_attention" in name or "upconvs" in name,
        CONVOLUTIONS + COVARIANCE + MIXING + 2 * SCORES + VALUES,
        2 * CONVOLUTIONS + 2 * 2 * SCORES + 3 * VALUES,
    ),
    "two_blocks_from_the_second_on": (
        {"spatial_att": False, "n": 2},
        lambda name: name.startswith("attention.1."),
        CONVOLUTIONS + 2 * (COVARIANCE + MIXING),
        2 * CONVOLUTIONS + 3 * MIXING,
    ),
    "upsampling": (
        {"channel_att": False},
        lambda name: "upconvs" in name,
        CONVOLUTIONS + 2 * SCORES + VALUES,
        2 * CONVOLUTIONS,
    ),
}


@pytest.mark.parametrize("arguments, asked, forward, backward", PRODUCTS.values(), ids=PRODUCTS)
def test_flops(arguments: dict, asked: Callable[[str], bool], forward: int, backward: int) -> None:
    with FakeTensorMode(), torch.device(DEVICE):
        model = dca_kernels.DCA((4, 8), patch=(2, 3), backend="triton", **arguments)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(asked(name))
        maps = [torch.zeros(2, 4, 5, 4), torch.zeros(2, 8, 2, 3)]
        with FlopCounterMode(display=False) as counter:
            torch.autograd.backward(model(maps), maps)
    assert counter.get_flop_counts()["Global"] == {
        torch.ops.dca_kernels.refine: 2 * 2 * forward,
        torch.ops.dca_kernels.refine_backward: 2 * 2 * backward,
    }
