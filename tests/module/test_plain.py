"""What needs the submodules called (hooks, tracers, transforms) gets what it gets around the reference.

Or an error that says what to do. Libraries are in test_third_party.py.
"""

import copy
import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.utils._pytree import tree_leaves, tree_map

from dca_kernels import plain
from tests.module.test_setups import ATTENTIONS, SMALL
from tests.oracle import (
    Config,
    Results,
    assert_identical,
    assert_same,
    both_modes,
    each_backend,
    evaluate,
    named,
    of_pytorch,
    pair,
    random_maps,
)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the log of `dca_kernels` got so far that needs attention; what it says once, it says anew in each test."""
    plain._say_once.cache_clear()
    caplog.set_level(logging.WARNING, "dca_kernels")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "dca_kernels"]


# Hooks


def called_submodules(module: nn.Module) -> dict[str, nn.Module]:
    """Lists are never called."""
    return {name: m for name, m in module.named_modules() if name and not isinstance(m, nn.ModuleList)}


@both_modes
@each_backend
def test_forward_hooks_see_what_the_references_see(backend: str, train: bool, said: Callable) -> None:
    results = []
    for module in pair(Config(), backend, train=train):
        seen: Results = {}
        for name, submodule in called_submodules(module).items():

            def look(m: nn.Module, args: Any, out: Any, name: str = name, seen: Results = seen) -> None:
                seen |= {f"{name}.{i}": y.detach() for i, y in enumerate(tree_leaves(out))}

            submodule.register_forward_hook(look)
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
    ours, theirs = pair(Config())
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
    for module in pair(Config(), train=False):
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
    for module in pair(Config(), train=False):
        calls: list[type] = []
        handle = nn.modules.module.register_module_forward_hook(lambda m, args, out, calls=calls: calls.append(type(m)))
        try:
            module(random_maps(Config()))
        finally:
            handle.remove()
        counts.append(len(calls))
    assert counts[0] == counts[1] == 1 + len(called_submodules(pair(Config(), train=False)[0]))
    assert said()[0].startswith("a hook on every module needs the submodules of a DCA called: ")


def test_offloaded_parameters() -> None:
    """As accelerate's: a submodule has its parameters while it is called."""
    module, theirs = pair(Config(), train=False)
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


@pytest.mark.parametrize("name", ["upconvs", "attention.0.c_attention", "attention.0.channel_norm"])
def test_hooks_of_lists_are_called_by_neither(name: str, said: Callable) -> None:
    for module in pair(Config(), train=False):
        module.get_submodule(name).register_forward_hook(lambda m, args, out: pytest.fail("called"))
        module(random_maps(Config()))
    assert said() == []


def test_hooks_of_the_module_and_of_bn_relu_leave_the_backend_at_work(said: Callable) -> None:
    module, _ = pair(Config(), train=False)
    module.register_forward_hook(lambda m, args, out: None)
    module.bn_relu[0][0].register_forward_hook(lambda m, args, out: None)
    module(random_maps(Config()))
    assert said() == []


# Tracers


@of_pytorch
@both_modes
def test_torch_jit_trace_warns_no_more_than_of_the_reference(train: bool) -> None:
    counts = []
    for module in pair(Config(), train=train):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", torch.jit.TracerWarning)
            torch.jit.trace(module, (random_maps(Config()),), check_trace=False)
        counts.append(sum(issubclass(w.category, torch.jit.TracerWarning) for w in caught))
    assert counts[0] == counts[1]


@of_pytorch
@each_backend
def test_torch_jit_trace(backend: str) -> None:
    module, theirs = pair(SMALL, backend, train=False)
    traced = torch.jit.trace(module, (random_maps(SMALL, backend=backend),))
    maps = random_maps(replace(SMALL, batch=3), backend=backend)
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
        torch.jit.trace(pair(Config(), train=False)[0], (change(random_maps(Config())),))


@of_pytorch
def test_graph_in_tensorboard(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    module, _ = pair(Config(), train=False)
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
    network = Network(pair(Config(), train=False)[0])
    traced = fx.symbolic_trace(network)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["down", "dca"]
    for batch in (1, 3):
        x = random_maps(Config(batch=batch))[0]
        assert torch.equal(traced(x), network(x))


class Decoder(Network):
    """Is given all maps as one."""

    def forward(self, maps: list[Tensor]) -> Tensor:
        high, low = self.dca(maps)
        return high.mean((2, 3)).sum(1) + low.mean((2, 3)).sum(1)


def test_symbolic_tracing_of_a_list_of_maps() -> None:
    decoder, maps = Decoder(pair(Config(), train=False)[0]), random_maps(Config())
    assert torch.equal(fx.symbolic_trace(decoder)(maps), decoder(maps))


def test_symbolic_tracing_refuses_hooks_that_would_be_called_twice() -> None:
    network = Network(pair(Config(), train=False)[0])
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
        fx.symbolic_trace(pair(Config(), train=False)[0])


@both_modes
def test_the_meta_device_gives_shapes(train: bool) -> None:
    for module in pair(Config(), train=train):
        outputs = module.to("meta")([x.to("meta") for x in random_maps(Config())])
        assert [(y.shape, y.dtype, y.device.type) for y in outputs] == [
            ((2, 8, 16, 16), torch.float64, "meta"),
            ((2, 16, 8, 8), torch.float64, "meta"),
        ]


class Dispatching(Tensor):
    """Holds another tensor, and sees each operator."""

    seen: ClassVar[set[str]] = set()
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, x: Tensor) -> Any:
        made = Tensor._make_wrapper_subclass(cls, x.shape, strides=x.stride(), dtype=x.dtype, device=x.device)
        made.held = x
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.add(func.namespace)
        args, kwargs = tree_map(lambda t: t.held if isinstance(t, cls) else t, (args, kwargs or {}))
        return tree_map(lambda t: cls(t) if isinstance(t, Tensor) else t, func(*args, **kwargs))


@pytest.mark.parametrize("which", [(0, 1), (0,), (1,)], ids=["all_maps", "first", "second"])
def test_maps_that_see_each_operator(which: tuple[int, ...], said: Callable) -> None:
    """Theirs are PyTorch's own: they may know no other."""
    module, theirs = pair(Config(), train=False)
    maps = random_maps(Config())
    with torch.no_grad():
        outputs = module([Dispatching(x) if i in which else x for i, x in enumerate(maps)])
        assert_same(named([y.held for y in outputs]), named(theirs(maps)))
    assert Dispatching.seen == {"aten"}
    assert said()[0].startswith("maps of type Dispatching needs the submodules of a DCA called: ")


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


@pytest.mark.slow
@of_pytorch
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@each_backend
def test_transforms(backend: str, transform: Callable) -> None:
    results = [transform(module, random_maps(SMALL, backend=backend)) for module in pair(SMALL, backend, train=False)]
    assert_same(*({f"grad.{i}": t.detach() for i, t in enumerate(r)} for r in results))


# The plain operations themselves


OBLONG = Config((8, 16), (3, 5), channel_head=(2, 4), spatial_head=(8, 2), sizes=((7, 10), (3, 4)))


@pytest.mark.parametrize("config", [*ATTENTIONS.values(), OBLONG], ids=[*ATTENTIONS, "oblong_grid_and_heads"])
@both_modes
def test_plain_operations_are_the_references(config: Config, train: bool, said: Callable) -> None:
    ours, theirs = pair(config, train=train)
    ours.avg_map[0].register_forward_hook(lambda m, args, out: None)
    assert_same(*(evaluate(module, random_maps(config)) for module in (ours, theirs)))
    assert len(said()) == 1


@pytest.mark.slow
@of_pytorch
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_it_is_said_once(compiled: bool, said: Callable) -> None:
    module, _ = pair(SMALL, train=False)
    module.upconvs[1].register_forward_hook(lambda m, args, out: None)
    run = torch.compile(module, backend="eager", fullgraph=True) if compiled else module
    for batch in (2, 3, 3):
        run(random_maps(replace(SMALL, batch=batch)))
    (line,) = said()
    assert line.startswith("a hook on upconvs.1 needs")
