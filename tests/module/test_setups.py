"""What people put around a DCA: replicas, subclasses of Tensor, late changes, losses on a part of the outputs.

Each gets what it gets around the reference. Libraries are in test_third_party.py.
"""

import contextlib
import copy
import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import replicate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dca_kernels import torch_backend
from tests.module.test_module import CONFIGS
from tests.oracle import (
    BACKENDS,
    DEVICE,
    TRAINABLE,
    Config,
    assert_identical,
    assert_same,
    both_modes,
    each_backend,
    each_trainable,
    evaluate,
    named,
    needs_triton,
    of_pytorch,
    over_backends,
    pair,
    random_like,
    random_maps,
)

pytestmark = pytest.mark.slow

SMALL = Config((4, 8), 2, sizes=((5, 4), (2, 3)))  # interpreted kernels are slow


# Replicas and other parameters that are plain tensors


def replicas_of(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `nn.DataParallel` makes, by PyTorch's own code; a copy on each device is a copy on this one."""
    own = importlib.import_module("torch.nn.parallel.replicate")
    copies = lambda tensors, devices, detach=False: [[t.clone() for t in tensors] for _ in devices]  # noqa: E731
    monkeypatch.setattr(own, "_broadcast_coalesced_reshape", copies)
    monkeypatch.setattr(own, "_get_device_index", lambda device, *_: 0)
    return replicate(module, [0, 1])


@both_modes
@each_backend
def test_replicas_of_data_parallel(backend: str, train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for module in pair(SMALL, backend, train=train):
        trains = backend in TRAINABLE
        maps = [x.requires_grad_(trains) for x in random_maps(SMALL, backend=backend)]
        with torch.set_grad_enabled(trains):
            outputs = replicas_of(module, monkeypatch)[1](maps)
        found = {f"output.{i}": y.detach() for i, y in enumerate(outputs)}
        if trains:
            torch.autograd.backward(outputs, random_like(outputs))
            found |= {f"grad_input.{i}": x.grad for i, x in enumerate(maps)}
            found |= {f"grad.{name}": p.grad for name, p in module.named_parameters()}
        results.append(found)
    assert_same(*results)


@each_trainable
def test_parameters_that_are_no_leaves(backend: str) -> None:
    results = []
    for module in pair(Config(), backend, train=False):
        leaves = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
        outputs = functional_call(module, {name: 2 * p for name, p in leaves.items()}, (random_maps(Config()),))
        torch.autograd.backward(outputs, random_like(outputs))
        results.append({f"grad.{name}": p.grad for name, p in leaves.items()} | named(outputs))
    assert_same(*results)


# Subclasses of Tensor


class Tagged(Tensor):
    """As MONAI's MetaTensor: what is computed from it carries its tag."""

    tag: str | None = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        tags = [x.tag for x in tree_leaves(args) if isinstance(x, Tagged) and x.tag is not None]
        for y in tree_leaves(result):
            if isinstance(y, Tagged):
                y.tag = tags[0] if tags else None
        return result


def tagged(x: Tensor, i: int) -> Tagged:
    y = x.as_subclass(Tagged)
    y.tag = f"of map {i}"
    return y


@both_modes
@pytest.mark.parametrize("which", [(0, 1), (1,)], ids=["all_maps", "one_map"])
@each_backend
def test_subclasses_of_tensor(backend: str, which: tuple[int, ...], train: bool) -> None:
    results = []
    for module in pair(SMALL, backend, train=train):
        trains = backend in TRAINABLE
        leaves = [x.requires_grad_(trains) for x in random_maps(SMALL, backend=backend)]
        with torch.set_grad_enabled(trains):
            if not train and 0 not in which:
                module(leaves)  # of a kind that is seen now
            outputs = module([tagged(x, i) if i in which else x for i, x in enumerate(leaves)])
        assert type(outputs) is tuple
        assert [(type(y), y.tag) for y in outputs] == [(Tagged, f"of map {max(i, which[0])}") for i in (0, 1)]
        plain_outputs = [y.as_subclass(Tensor) for y in outputs]
        found = {f"output.{i}": y.detach() for i, y in enumerate(plain_outputs)}
        if trains:
            torch.autograd.backward(plain_outputs, random_like(plain_outputs))
            found |= {f"grad_input.{i}": x.grad for i, x in enumerate(leaves)}
        results.append(found | {f"after.{name}": b for name, b in module.named_buffers()})
    assert_same(*results)


def test_parameters_as_maps() -> None:
    ours, theirs = pair(Config(), train=False)
    results = []
    for module in (ours, theirs):
        maps = [nn.Parameter(x) for x in random_maps(Config())]
        outputs = module(maps)
        assert all(type(y) is Tensor for y in outputs)
        sum(y.sum() for y in outputs).backward()
        results.append(named([x.grad for x in maps]))
    assert_same(*results)


# What changes between forward and backward


def _train_forward(module: nn.Module, maps: Sequence[Tensor]) -> None:
    module.train()(maps)


def _load_buffers(module: nn.Module, maps: Sequence[Tensor]) -> None:
    buffers = {name: 2 * b for name, b in module.named_buffers()}
    module.load_state_dict(buffers, strict=False)


def _average_buffers(module: nn.Module, maps: Sequence[Tensor]) -> None:
    for buffer in module.buffers():
        buffer.copy_(buffer.double().lerp(torch.ones_like(buffer).double(), 0.5))


CHANGES = {"training_forward": _train_forward, "load_state_dict": _load_buffers, "average": _average_buffers}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@over_backends(BACKENDS)
def test_buffers_may_change_before_the_backward(backend: str, change: Callable, dtype: torch.dtype) -> None:
    module, _ = pair(SMALL, backend, dtype, train=False)
    maps = random_maps(SMALL, dtype, backend=backend)
    expected = evaluate(module, maps)
    module.zero_grad()
    leaves = [x.requires_grad_() for x in maps]
    outputs = module.eval()(leaves)
    with torch.no_grad():
        change(module, maps)
    torch.autograd.backward(outputs, random_like(outputs))
    found = {f"grad_input.{i}": x.grad for i, x in enumerate(leaves)}
    found |= {f"grad.{name}": p.grad for name, p in module.named_parameters()}
    assert_identical(found, {name: g for name, g in expected.items() if name.startswith("grad")})


def test_an_evaluation_and_a_training_forward_before_one_backward() -> None:
    module, _ = pair(Config(), train=False)
    maps = random_maps(Config())
    separate = [evaluate(copy.deepcopy(module).train(mode), maps) for mode in (False, True)]
    outputs = [*module.eval()(maps), *module.train()(maps)]
    torch.autograd.backward(outputs, random_like(outputs[:2]) * 2)
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.grad, sum(results[f"grad.{name}"] for results in separate))


# Outputs that no loss uses


class Watching(TorchDispatchMode):
    """Sees every operator, as a profiler does: the kernels are one then."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@needs_triton
def test_a_call_that_is_refused_leaves_the_next_as_it_was() -> None:
    module, _ = pair(SMALL, "triton", train=False)
    maps = random_maps(SMALL, backend="triton")
    expected = module(maps)
    wide, _ = pair(Config((1100,), 1, spatial_head=(1,), channel_att=False, sizes=((1, 1),)), "triton", torch.float32)
    with pytest.raises(ValueError, match="too large for the triton backend"):
        wide([torch.zeros(2, 1100, 1, 1, device=DEVICE)])
    with Watching():
        outputs = module(maps)
    assert all(torch.equal(y, z) for y, z in zip(outputs, expected, strict=True))


class Sink(torch.autograd.Function):
    """As DistributedDataParallel's: all outputs pass through one node, which keeps missing gradients missing."""

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(y.view_as(y) for y in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads


ATTENTIONS = CONFIGS | {"no_attention": Config(channel_att=False, spatial_att=False)}
ATTENTIONS = {name: replace(config, features=(4, 8), patch=2, sizes=SMALL.sizes) for name, config in ATTENTIONS.items()}


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("config", ATTENTIONS.values(), ids=ATTENTIONS)
@pytest.mark.parametrize("context", [contextlib.nullcontext, Watching], ids=["eager", "watched"])
@pytest.mark.parametrize("sink", [lambda *outputs: outputs, Sink.apply], ids=["direct", "sink"])
@over_backends(BACKENDS)
def test_an_unused_output_gives_none_where_the_reference_does(
    backend: str, sink: Callable, context: Callable, config: Config, used: int
) -> None:
    results = []
    for module in pair(config, backend):
        with context():
            results.append(gradients_of_one_output(module, config, backend, sink, used))
    assert any(g is None for g in results[0].values())
    assert_same(*({name: g for name, g in found.items() if g is not None} for found in results))


def gradients_of_one_output(module: nn.Module, config: Config, backend: str, sink: Callable, used: int) -> dict:
    maps = [x.requires_grad_() for x in random_maps(config, next(module.parameters()).dtype, backend=backend)]
    sink(*module(maps))[used].square().sum().backward()
    of_maps = {f"grad.map.{i}": x.grad for i, x in enumerate(maps)}
    return of_maps | {f"grad.{name}": p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("context", [contextlib.nullcontext, Watching], ids=["eager", "watched"])
@over_backends(BACKENDS)
def test_outputs_that_are_all_unused_give_none(backend: str, context: Callable) -> None:
    module, _ = pair(SMALL, backend)
    maps = [x.requires_grad_() for x in random_maps(SMALL, backend=backend)]
    other = maps[0].detach().requires_grad_()
    with context():
        Sink.apply(*module(maps), 2 * other)[-1].sum().backward()
    assert other.grad.any()
    assert all(t.grad is None for t in (*maps, *module.parameters()))


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("config", ATTENTIONS.values(), ids=ATTENTIONS)
def test_an_unused_output_with_operands_in_16_bit(config: Config, used: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_backend, "operand_dtype", lambda maps: torch.bfloat16)  # as on a GPU
    of_both = [
        gradients_of_one_output(module, config, "torch", Sink.apply, used)
        for module in pair(config, dtype=torch.float32)
    ]
    missing = [{name for name, g in found.items() if g is None} for found in of_both]
    assert missing[0] == missing[1] != set()


@of_pytorch
def test_an_unused_output_of_a_compiled_loss() -> None:
    config = ATTENTIONS["spatial_only"]
    missing = []
    for module in pair(config):
        loss = torch.compile(lambda maps, module=module: module(maps)[0].sum(), backend="aot_eager", fullgraph=True)
        loss(random_maps(config)).backward()
        missing.append({name for name, p in module.named_parameters() if p.grad is None})
    assert missing[0] == missing[1] != set()


# Several gradients in one


@both_modes
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("sizes", [((4, 6), (2, 3)), ((5, 4), (2, 2))], ids=["equal_windows", "others"])
@pytest.mark.parametrize(
    "used",
    [lambda outputs, i: outputs[i], lambda outputs, i: outputs[0][i], lambda outputs, i: outputs[1][i]],
    ids=["both", "first", "second"],
)
@each_trainable
def test_several_gradients_in_one(backend: str, used: Callable, sizes: Any, train: bool) -> None:
    config = replace(SMALL, sizes=sizes)
    results = []
    for module in pair(config, backend, train=train):
        maps = [x.requires_grad_() for x in random_maps(config)]
        outputs = module(maps)
        loss = torch.stack([used(outputs, i).square().sum() for i in (0, 1)])
        upstream = torch.eye(2, dtype=torch.float64)
        leaves = [*maps, *module.parameters()]
        gradients = torch.autograd.grad(loss, leaves, upstream, is_grads_batched=True, allow_unused=True)
        results.append({f"grad.{i}": g for i, g in enumerate(gradients) if g is not None})
    assert_same(*results)


@over_backends(["triton"])
def test_several_gradients_in_one_are_refused_by_the_kernels(backend: str) -> None:
    module, _ = pair(SMALL, backend, train=False)
    loss = torch.stack([y.sum() for y in module([x.requires_grad_() for x in random_maps(SMALL, backend=backend)])])
    with pytest.raises(
        RuntimeError, match=r"^DCA: the triton backend's gradients cannot be batched .* backend='torch'"
    ):
        torch.autograd.grad(loss, list(module.parameters()), torch.eye(2).to(loss), is_grads_batched=True)
