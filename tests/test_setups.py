"""What people put around a DCA: replicas, subclasses of Tensor, hooks, tracers, transforms, parts of a loss.

Each gets what it gets around the reference, or an error that says what to do. Libraries are in test_third_party.py.
"""

import contextlib
import copy
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.nn.parallel import replicate
from torch.utils._python_dispatch import TorchDispatchMode

import dca_kernels
from dca_kernels import fused, plain
from tests.oracle import (
    BACKENDS,
    TRAINABLE,
    Config,
    Results,
    assert_identical,
    assert_same,
    both_modes,
    each_backend,
    each_trainable,
    evaluate,
    over_backends,
    pair,
    random_like,
    random_maps,
)

WHOLE = Config()
of_pytorch = pytest.mark.filterwarnings(  # its own code, about its own code
    "ignore:`torch.jit:DeprecationWarning",
    "ignore:`torch.jit:FutureWarning",
    "ignore:.*should not be instantiated:DeprecationWarning",
)
SMALL = Config((4, 8), 2, sizes=((5, 4), (2, 3)))  # interpreted kernels are slow


def modules(config: Config = WHOLE, backend: str = "torch", train: bool = False) -> tuple[nn.Module, nn.Module]:
    return pair(config, backend, train=train)


def named(tensors: Sequence[Tensor]) -> Results:
    return {str(i): t for i, t in enumerate(tensors)}


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the log of `dca_kernels` got so far that needs attention; what it says once, it says anew in each test."""
    dca_kernels.module._say_plain.cache_clear()
    caplog.set_level(logging.WARNING, "dca_kernels")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "dca_kernels"]


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
    for module in modules(SMALL, backend, train):
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
    for module in modules(backend=backend):
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
        tags = [x.tag for x in _flat(args) if isinstance(x, Tagged) and x.tag is not None]
        for y in _flat(result):
            if isinstance(y, Tagged):
                y.tag = tags[0] if tags else None
        return result


def _flat(values: Any) -> Iterator[Any]:
    if isinstance(values, list | tuple):
        for value in values:
            yield from _flat(value)
    else:
        yield values


def tagged(x: Tensor, i: int) -> Tagged:
    y = x.as_subclass(Tagged)
    y.tag = f"of map {i}"
    return y


@both_modes
@pytest.mark.parametrize("which", [(0, 1), (1,)], ids=["all_maps", "one_map"])
@each_backend
def test_subclasses_of_tensor(backend: str, which: tuple[int, ...], train: bool) -> None:
    results = []
    for module in modules(SMALL, backend, train):
        trains = backend in TRAINABLE
        leaves = [x.requires_grad_(trains) for x in random_maps(SMALL, backend=backend)]
        with torch.set_grad_enabled(trains):
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
    ours, theirs = modules()
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
    module, _ = modules()
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


class Sink(torch.autograd.Function):
    """As DistributedDataParallel's: all outputs pass through one node, which keeps missing gradients missing."""

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(y.view_as(y) for y in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads


ATTENTIONS = {
    "default": {},
    "two_blocks": {"n": 2},
    "channel_only": {"spatial_att": False},
    "spatial_only": {"channel_att": False},
    "no_attention": {"channel_att": False, "spatial_att": False},
}


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
@pytest.mark.parametrize("context", [contextlib.nullcontext, Watching], ids=["eager", "watched"])
@pytest.mark.parametrize("sink", [lambda *outputs: outputs, Sink.apply], ids=["", "sink"])
@over_backends(BACKENDS)
def test_an_unused_output_gives_none_where_the_reference_does(
    backend: str, sink: Callable, context: Callable, attention: dict, used: int
) -> None:
    config = Config((4, 8), 2, sizes=((5, 4), (2, 3)), **attention)
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
@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
def test_an_unused_output_with_operands_in_16_bit(attention: dict, used: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "operand_dtype", lambda maps: torch.bfloat16)  # as on a GPU
    config = Config((8, 16), 2, sizes=((5, 4), (2, 3)), **attention)
    of_both = [
        gradients_of_one_output(module, config, "torch", Sink.apply, used)
        for module in pair(config, dtype=torch.float32)
    ]
    missing = [{name for name, g in found.items() if g is None} for found in of_both]
    assert missing[0] == missing[1] != set()


@of_pytorch
def test_an_unused_output_of_a_compiled_loss() -> None:
    config = Config((4, 8), 2, channel_att=False, sizes=((5, 4), (2, 3)))
    missing = []
    for module in pair(config):
        loss = torch.compile(lambda maps, module=module: module(maps)[0].sum(), backend="aot_eager", fullgraph=True)
        loss(random_maps(config)).backward()
        missing.append({name for name, p in module.named_parameters() if p.grad is None})
    assert missing[0] == missing[1] != set()


# Hooks


def called_submodules(module: nn.Module) -> dict[str, nn.Module]:
    """Lists are never called."""
    return {name: m for name, m in module.named_modules() if name and not isinstance(m, nn.ModuleList)}


@both_modes
@each_backend
def test_forward_hooks_see_what_the_references_see(backend: str, train: bool, said: Callable) -> None:
    results = []
    for module in modules(Config(), backend, train):
        seen: Results = {}
        for name, submodule in called_submodules(module).items():

            def look(m: nn.Module, args: Any, out: Any, name: str = name, seen: Results = seen) -> None:
                seen |= {f"{name}.{i}": y.detach() for i, y in enumerate(_flat(out))}

            submodule.register_forward_hook(look)
        assert_same(seen, {})
        results.append(evaluate(module, random_maps(Config(), backend=backend)) | seen)
        assert len(seen) > len(called_submodules(module))
    assert_same(*results)
    assert said() == [
        "a hook on avg_map.0 needs the submodules of a DCA called: plain PyTorch operations run, slower, with N x N "
        "matrices in memory"
    ]


HOOKED = ["avg_map.1", "attention.0", "attention.0.c_attention.1", "attention.0.s_attention.0.v_map.proj", "upconvs.0"]
HOOKED += ["attention.0.spatial_norm.1", "upconvs.1.conv.conv", "attention.0.c_attention.0.q_map.proj.depthwise"]


def _doubled(values: Any) -> Any:
    if isinstance(values, list | tuple):
        return type(values)(_doubled(v) for v in values)
    return values if values is None else 2 * values


class DoubledForward:
    """Stands for what offloading libraries put on an instance."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.original = module, module.forward
        module.forward = lambda *args: _doubled(self.original(*args))

    def remove(self) -> None:
        del self.module.forward


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "own_forward": DoubledForward,
    "forward": lambda m: m.register_forward_hook(lambda m, args, out: _doubled(out)),
    "forward_pre": lambda m: m.register_forward_pre_hook(lambda m, args: (_doubled(args[0]), *args[1:])),
    "backward": lambda m: m.register_full_backward_hook(lambda m, dx, dy: _doubled(dx)),
    "backward_pre": lambda m: m.register_full_backward_pre_hook(lambda m, dy: _doubled(dy)),
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing", "ignore:For backward hooks to be called")  # lists
@pytest.mark.parametrize("name", HOOKED)
@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_hooks_change_what_they_change_in_the_reference(hook: Callable, name: str) -> None:
    ours, theirs = modules(train=True)
    maps = random_maps(Config())
    state = copy.deepcopy(ours.state_dict())
    before = evaluate(ours, maps)
    ours.load_state_dict(state)
    handles = [hook(module.get_submodule(name)) for module in (ours, theirs)]
    found, expected = (evaluate(module, maps) for module in (ours, theirs))
    if name != "attention.0" or hook not in (HOOKS["backward"], HOOKS["backward_pre"]):
        with pytest.raises(AssertionError):
            assert_same(found, before)
    assert_same(found, expected)
    handles[0].remove()
    ours.load_state_dict(state)
    assert_identical(evaluate(ours, maps), before)


@pytest.mark.parametrize("name", ["upconvs.0", "attention.0.s_attention.1", "avg_map.0.proj", "bn_relu.1"])
def test_heat_map_of_grad_cam(name: str) -> None:
    maps_of_both = []
    for module in modules():
        kept: list[Tensor] = []
        layer = module.get_submodule(name)
        layer.register_forward_hook(lambda m, args, out, kept=kept: kept.append(out))
        layer.register_full_backward_hook(lambda m, dx, dy, kept=kept: kept.append(dy[0]))
        sum(y[:, 0].square().sum() for y in module([x.requires_grad_() for x in random_maps(Config())])).backward()
        activation, gradient = kept
        channels = 2 if activation.dim() == 3 else 1  # (B, N, C) or (B, C, H, W)
        others = [d for d in range(1, activation.dim()) if d != channels]
        weights = gradient.mean(others, keepdim=True)
        maps_of_both.append({"heat": (weights * activation).sum(channels).detach()})  # ReLU would hide half of it
    assert maps_of_both[0]["heat"].any()
    assert_same(*maps_of_both)


def test_hooks_of_every_module_are_called(said: Callable) -> None:
    counts = []
    for module in modules():
        calls: list[type] = []
        handle = nn.modules.module.register_module_forward_hook(lambda m, args, out, calls=calls: calls.append(type(m)))
        try:
            module(random_maps(Config()))
        finally:
            handle.remove()
        counts.append(len(calls))
    assert counts[0] == counts[1] == 1 + len(called_submodules(modules()[0]))
    assert said()[0].startswith("a hook on every module needs the submodules of a DCA called: ")


def test_offloaded_parameters() -> None:
    """As accelerate's: a submodule has its parameters while it is called."""
    module, theirs = modules()
    for submodule in (m for m in module.modules() if isinstance(m, nn.Conv2d | nn.LayerNorm)):
        state = {name: p.detach() for name, p in submodule.named_parameters()}

        def bring(m: nn.Module, args: Any, state: Results = state) -> None:
            m.load_state_dict(state, assign=True)

        def take_away(m: nn.Module, args: Any, out: Tensor) -> None:
            m.to("meta")

        submodule.to("meta").register_forward_pre_hook(bring)
        submodule.register_forward_hook(take_away)
    maps = random_maps(Config())
    with torch.no_grad():
        assert_same(named(module(maps)), named(theirs(maps)))


def test_hooks_of_lists_are_called_by_neither(said: Callable) -> None:
    for module in modules():
        module.upconvs.register_forward_hook(lambda m, args, out: pytest.fail("called"))
        module(random_maps(Config()))
    assert said() == []


def test_hooks_of_the_module_and_of_bn_relu_leave_the_backend_at_work(said: Callable) -> None:
    module, _ = modules()
    module.register_forward_hook(lambda m, args, out: None)
    module.bn_relu[0][0].register_forward_hook(lambda m, args, out: None)
    module(random_maps(Config()))
    assert said() == []


# Tracers


@of_pytorch
@both_modes
def test_torch_jit_trace_warns_no_more_than_of_the_reference(train: bool) -> None:
    counts = []
    for module in modules(train=train):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", torch.jit.TracerWarning)
            torch.jit.trace(module, (random_maps(Config()),), check_trace=False)
        counts.append(sum(issubclass(w.category, torch.jit.TracerWarning) for w in caught))
    assert counts[0] == counts[1]


@of_pytorch
@each_backend
def test_torch_jit_trace(backend: str) -> None:
    module, theirs = modules(SMALL, backend)
    traced = torch.jit.trace(module, (random_maps(SMALL, backend=backend),))
    other = Config((4, 8), 2, sizes=SMALL.sizes, batch=3)
    maps = random_maps(other, backend=backend)
    assert_same(named(traced(maps)), named(theirs(maps)))


@of_pytorch
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda maps: maps[:1], "maps: expected 2 tensors, one for each of features, got 1"),
        (lambda maps: maps[0], "maps: expected a list or tuple of tensors, got Tensor"),
        (lambda maps: [x.float() for x in maps], "maps\\[0\\]: expected dtype torch.float64, as the parameters, got"),
    ],
)
def test_maps_are_checked_while_they_are_traced(change: Callable, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        torch.jit.trace(modules()[0], (change(random_maps(Config())),))


@of_pytorch
def test_graph_in_tensorboard(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    module, _ = modules()
    with tensorboard.SummaryWriter(tmp_path) as writer:
        writer.add_graph(module, [random_maps(Config())])
    (file,) = tmp_path.iterdir()
    assert b"s_attention" in file.read_bytes()


class Network(nn.Module):
    def __init__(self, dca: nn.Module) -> None:
        super().__init__()
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1, dtype=torch.float64)
        self.dca = dca

    def forward(self, x: Tensor) -> Tensor:
        high, low = self.dca([x, self.down(x)])
        return high.mean((2, 3)).sum(1) + low.mean((2, 3)).sum(1)


def test_symbolic_tracing_takes_it_as_a_leaf() -> None:
    network = Network(modules()[0])
    traced = fx.symbolic_trace(network)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["down", "dca"]
    for batch in (1, 3):
        x = random_maps(Config(batch=batch))[0]
        assert torch.equal(traced(x), network(x))


def test_symbolic_tracing_refuses_hooks_that_would_be_called_twice() -> None:
    network = Network(modules()[0])
    handle = network.dca.register_forward_hook(lambda m, args, out: _doubled(out))
    with pytest.raises(TypeError, match=r"^maps: .*Proxy, which the DCA's hooks would see: hook later$"):
        fx.symbolic_trace(network)
    handle.remove()
    traced = fx.symbolic_trace(network)
    traced.dca.register_forward_hook(lambda m, args, out: _doubled(out))
    x = random_maps(Config())[0]
    assert torch.equal(traced(x), network(x))


def test_symbolic_tracing_of_a_dca_alone_says_how() -> None:
    message = r"^maps: expected tensors, got a torch\.fx\.Proxy: trace a network that has the DCA as a child$"
    with pytest.raises(TypeError, match=message):
        fx.symbolic_trace(modules()[0])


@both_modes
def test_the_meta_device_gives_shapes(train: bool) -> None:
    for module in modules(train=train):
        outputs = module.to("meta")([x.to("meta") for x in random_maps(Config())])
        assert [(y.shape, y.dtype, y.device.type) for y in outputs] == [
            ((2, 8, 16, 16), torch.float64, "meta"),
            ((2, 16, 8, 8), torch.float64, "meta"),
        ]


# Transforms of torch.func


def _grad_of_parameters(module: nn.Module, maps: list[Tensor]) -> list[Tensor]:
    loss = lambda parameters: sum(y.square().sum() for y in functional_call(module, parameters, (maps,)))  # noqa: E731
    return list(grad(loss)(dict(module.named_parameters())).values())


def _grad_of_each_image(module: nn.Module, maps: list[Tensor]) -> list[Tensor]:
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], *images: Tensor) -> Tensor:
        outputs = functional_call(module, parameters, ([x[None] for x in images],))
        return sum(y.square().sum() for y in outputs)

    return list(vmap(grad(loss), (None, 0, 0))(parameters, *maps).values())


def _compiled_grad(module: nn.Module, maps: list[Tensor]) -> list[Tensor]:
    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x: Tensor) -> Tensor:
        return grad(lambda x: module([x, maps[1]])[0].square().sum())(x)

    return [compiled(maps[0])]


def _dual(module: nn.Module, maps: list[Tensor]) -> list[Tensor]:
    with forward_ad.dual_level():
        outputs = module([forward_ad.make_dual(x, x.cos()) for x in maps])
        return [forward_ad.unpack_dual(y).tangent for y in outputs]


def _compiled_dual(module: nn.Module, maps: list[Tensor]) -> list[Tensor]:
    module.requires_grad_(False)
    return _dual(torch.compile(module, backend="eager"), maps)


def _ensemble(module: nn.Module, maps: list[Tensor]) -> list[Tensor]:
    state = {name: torch.stack([t, 2 * t]) for name, t in module.state_dict().items() if t.is_floating_point()}
    return list(vmap(lambda state: functional_call(module, state, (maps,)))(state))


TRANSFORMS: dict[str, Callable[[nn.Module, list[Tensor]], Any]] = {
    "grad": _grad_of_parameters,
    "grad_of_each_image": _grad_of_each_image,
    "vmap": lambda module, maps: vmap(lambda *images: module([x[None] for x in images]))(*maps),
    "ensemble": _ensemble,
    "jvp": lambda module, maps: jvp(lambda *maps: module(maps), tuple(maps), tuple(x.cos() for x in maps))[1],
    "jacrev": lambda module, maps: [jacrev(lambda x: module([x, maps[1]])[1].sum((1, 2)))(maps[0])],
    "dual_numbers": _dual,
    "compiled_dual_numbers": _compiled_dual,
    "compiled_grad": _compiled_grad,
}


@of_pytorch
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@each_backend
def test_transforms(backend: str, transform: Callable) -> None:
    results = [transform(module, random_maps(SMALL, backend=backend)) for module in modules(SMALL, backend)]
    assert_same(*({f"grad.{i}": t.detach() for i, t in enumerate(r)} for r in results))


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
    config = Config((4, 8), 2, sizes=sizes)
    results = []
    for module in modules(config, backend, train):
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
    module, _ = modules(SMALL, backend)
    loss = torch.stack([y.sum() for y in module([x.requires_grad_() for x in random_maps(SMALL, backend=backend)])])
    with pytest.raises(
        RuntimeError, match=r"^DCA: the triton backend's gradients cannot be batched .* backend='torch'"
    ):
        torch.autograd.grad(loss, list(module.parameters()), torch.eye(2).to(loss), is_grads_batched=True)


# The plain operations themselves


@pytest.mark.parametrize("config", [Config(**c) for c in ATTENTIONS.values()], ids=ATTENTIONS)
@both_modes
def test_plain_operations_are_the_references(config: Config, train: bool) -> None:
    ours, theirs = pair(config, train=train)
    ours.forward = lambda maps: plain.refine(ours, maps)
    assert_same(*(evaluate(module, random_maps(config)) for module in (ours, theirs)))


def test_heads_of_every_scale_in_the_plain_operations() -> None:
    config = Config((8, 16), (3, 5), channel_head=(2, 4), spatial_head=(8, 2), sizes=((7, 10), (3, 4)))
    ours, theirs = pair(config)
    ours.forward = lambda maps: plain.refine(ours, maps)
    assert_same(*(evaluate(module, random_maps(config)) for module in (ours, theirs)))
