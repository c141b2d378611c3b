"""The swap-in contract: names, initial weights, exact zeros, BatchNorm in every form, copies."""

import copy
import functools
import inspect
import io
import pickle
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.modules import module as registries
from torch.nn.utils import prune
from torch.utils.module_tracker import ModuleTracker

import dca_kernels
import reference
from dca_kernels import torch_backend
from tests.oracle import (
    TRAINABLE,
    Config,
    assert_identical,
    assert_same,
    both_modes,
    build,
    each_backend,
    each_trainable,
    evaluate,
    pair,
    random_like,
    random_maps,
)

CONFIGS = {
    "default": Config(),
    "two_blocks": Config(n=2),
    "channel_only": Config(spatial_att=False),
    "spatial_only": Config(channel_att=False),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@each_config
def test_same_seed_gives_the_reference_weights_in_order(config: Config) -> None:
    torch.manual_seed(0)
    ours = build("torch", **config.arguments).state_dict()
    torch.manual_seed(0)
    theirs = build("reference", **config.arguments).state_dict()
    assert list(ours) == list(theirs)
    assert_identical(ours, theirs)


@each_config
def test_state_dicts_load_strictly_both_ways(config: Config) -> None:
    ours, theirs = build("torch", **config.arguments), build("reference", **config.arguments)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_identical(ours.state_dict(), theirs.state_dict())


def test_constructors_take_the_same_arguments() -> None:
    ours = dict(inspect.signature(dca_kernels.DCA).parameters)
    theirs = inspect.signature(reference.DCA).parameters
    assert ours.pop("backend").default == "auto"
    assert [(name, p.default) for name, p in ours.items()] == [(name, p.default) for name, p in theirs.items()]


def test_defaults() -> None:
    module = dca_kernels.DCA([8, 16])
    assert module.grid == (28, 28)
    assert (module.channel_head, module.spatial_head, module.n) == ([1, 1], [4, 4], 1)
    assert module.channel_att and module.spatial_att


def test_strides_change_nothing() -> None:
    torch.manual_seed(0)
    without = dca_kernels.DCA([8, 16], None, 4).double()
    torch.manual_seed(0)
    with_strides = dca_kernels.DCA([8, 16], [4, 2], 4).double()
    maps = random_maps(Config())
    assert_identical(evaluate(with_strides, maps), evaluate(without, maps))


def zero_gradients(config: Config, train: bool) -> set[str]:
    """Parameters that the outputs do not depend on: see `test_zero_gradients_are_exact`."""
    scales = range(len(config.features))
    names = set()
    if config.spatial_att:  # one value for all keys drops out of a softmax over keys
        names |= {f"attention.{block}.s_attention.{i}.k_map" for block in range(config.n) for i in scales}
    if train:  # BatchNorm removes what is constant over a channel
        last = f"attention.{config.n - 1}"
        names |= {f"upconvs.{i}.conv" for i in scales}
        if config.spatial_att:
            names |= {f"{last}.s_attention.{i}.{map_}" for i in scales for map_ in ("v_map", "projection")}
        else:
            names |= {f"{last}.c_attention.{i}.projection" for i in scales}
    return {f"{name}.conv.bias" if name.startswith("upconvs") else f"{name}.proj.depthwise.bias" for name in names}


@each_config
@both_modes
@each_trainable
def test_zero_gradients_are_exact(config: Config, train: bool, backend: str) -> None:
    # Zero and not None: with None an optimiser would skip these parameters' weight decay.
    module, _ = pair(config, backend, torch.float32, train)
    results = evaluate(module, random_maps(config, torch.float32))
    gradients = {name.removeprefix("grad."): g for name, g in results.items() if name.startswith("grad.")}
    assert all(g is not None for g in gradients.values())
    assert {name for name, g in gradients.items() if not g.any()} == zero_gradients(config, train)


def test_bn_relu_stays_replaceable() -> None:
    for head in dca_kernels.DCA([8, 16]).bn_relu:
        assert type(head) is nn.Sequential
        assert [type(module) for module in head] == [nn.BatchNorm2d, nn.ReLU]


class DoublingBatchNorm(nn.BatchNorm2d):
    """Stands for SyncBatchNorm: another class in BatchNorm's place, with results of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def _replace_norm(**kwargs) -> Callable[[nn.Sequential], None]:
    def change(head: nn.Sequential) -> None:
        head[0] = nn.BatchNorm2d(head[0].num_features, dtype=torch.float64, **kwargs).train(head.training)

    return change


def _subclass_norm(head: nn.Sequential) -> None:
    head[0].__class__ = DoublingBatchNorm


def _patch_forward(head: nn.Sequential) -> None:
    original = head[0].forward
    head[0].forward = lambda x: 2 * original(x)


HEADS_CONFIG = Config(patch=(1, 4), sizes=((6, 8), (5, 3)))
HEADS = {
    "subclass": _subclass_norm,
    "norm_hook": lambda head: head[0].register_forward_hook(lambda module, args, out: 2 * out),
    "norm_pre_hook": lambda head: head[0].register_forward_pre_hook(lambda module, args: (args[0] * args[0],)),
    "relu_hook": lambda head: head[1].register_forward_hook(lambda module, args, out: out + 1),
    "head_hook": lambda head: head.register_forward_hook(lambda module, args, out: out + 1),
    "backward_hook": lambda head: head[0].register_full_backward_hook(lambda module, dx, dy: (2 * dx[0],)),
    "frozen": lambda head: head.eval(),
    "no_momentum": lambda head: setattr(head[0], "momentum", None),
    "large_momentum": lambda head: setattr(head[0], "momentum", 0.7),
    "large_eps": lambda head: setattr(head[0], "eps", 0.5),
    "no_running_stats": _replace_norm(track_running_stats=False),
    "no_affine": _replace_norm(affine=False),
    "no_weight": lambda head: setattr(head[0], "weight", None),
    "no_bias": lambda head: setattr(head[0], "bias", None),
    "stats_no_longer_tracked": lambda head: setattr(head[0], "track_running_stats", False),
    "no_counter": lambda head: setattr(head[0], "num_batches_tracked", None),
    "patched_forward": _patch_forward,
    "other_activation": lambda head: head.__setitem__(1, nn.GELU()),
    "one_more": lambda head: head.append(nn.Hardtanh(0.0, 0.5)),
}


@pytest.mark.parametrize("change", HEADS.values(), ids=HEADS)
@both_modes
@each_backend
def test_any_head(change: Callable[[nn.Sequential], None], train: bool, backend: str) -> None:
    modules = pair(HEADS_CONFIG, backend, train=train)
    for module in modules:
        for head in module.bn_relu:
            change(head)
    maps = random_maps(HEADS_CONFIG, backend=backend)
    results = [evaluate(module, maps, backward=backend in TRAINABLE) for module in modules]
    assert_same(*results)


@each_backend
def test_a_changed_head_gets_the_dtype_of_the_maps(backend: str) -> None:
    config = Config()
    for module in pair(config, backend, torch.bfloat16):
        module.bn_relu[0][1] = nn.GELU()  # and the BatchNorm is called as it is
        outs = module(random_maps(config, torch.bfloat16, backend=backend))
        assert [y.dtype for y in outs] == [torch.bfloat16] * len(outs)


@each_backend
def test_buffers_are_of_no_graph(backend: str) -> None:
    """What they are computed from has gradients."""
    module, _ = pair(Config(), backend)
    module(random_maps(Config(), backend=backend))
    assert not any(buffer.requires_grad for buffer in module.buffers())


@each_backend
def test_the_default_device_makes_no_difference(backend: str) -> None:
    """What a call makes is on its maps' device, as where they are on a GPU and the default is the CPU."""
    (module, _), maps = pair(Config(), backend), random_maps(Config(), backend=backend)
    upstream = random_like(maps)
    expected = evaluate(copy.deepcopy(module), maps, upstream)
    with torch.device("meta"):
        found = evaluate(module, maps, upstream)
    assert_identical(found, expected)


def test_a_call_that_fails_at_the_last_map_leaves_the_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where memory is used up."""
    module, _ = pair(Config())
    before = {name: b.clone() for name, b in module.named_buffers()}
    refine_map = torch_backend.upsample._upsample

    def fail_at_the_last(x: torch.Tensor, *others: object) -> tuple[torch.Tensor, ...]:
        if x.shape[1] == Config().features[-1]:
            raise MemoryError
        return refine_map(x, *others)

    monkeypatch.setattr(torch_backend.upsample, "_upsample", fail_at_the_last)
    with pytest.raises(MemoryError):
        module(random_maps(Config()))
    assert_identical(dict(module.named_buffers()), before)


@both_modes
@each_trainable
def test_outputs_at_the_kink_have_no_gradient(train: bool, backend: str) -> None:
    """Of a BatchNorm that begins with zeros: what the ReLU is given is zero."""
    modules = pair(Config(), backend, train=train)
    for head in (head for module in modules for head in module.bn_relu):
        nn.init.zeros_(head[0].weight)
        nn.init.zeros_(head[0].bias)
    assert_same(*(evaluate(module, random_maps(Config())) for module in modules))


@each_backend
def test_layout_before_a_changed_head(backend: str) -> None:
    module, _ = pair(Config(), backend)
    seen = []
    for head in module.bn_relu:
        head[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    maps = [x.to(memory_format=torch.channels_last) for x in random_maps(Config(), backend=backend)]
    evaluate(module, maps, backward=backend in TRAINABLE)
    assert all(y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous() for y in seen)
    assert len(seen) == 2


def _of_norms(change: Callable) -> Callable:
    """A hook on every module that changes what the BatchNorms are given, or give."""
    return lambda module, *given: change(*given) if isinstance(module, nn.BatchNorm2d) else None


GLOBAL_HOOKS = {
    "forward": (registries.register_module_forward_hook, _of_norms(lambda args, out: 2 * out)),
    "forward_pre": (registries.register_module_forward_pre_hook, _of_norms(lambda args: (2 * args[0],))),
    "backward": (registries.register_module_full_backward_hook, _of_norms(lambda gin, gout: (2 * gin[0],))),
    "backward_pre": (registries.register_module_full_backward_pre_hook, _of_norms(lambda gout: (2 * gout[0],))),
}


@pytest.mark.filterwarnings("ignore:(For|Full) backward hook")  # of modules that take or give lists
@pytest.mark.parametrize("register, hook", GLOBAL_HOOKS.values(), ids=GLOBAL_HOOKS)
@each_backend
def test_global_hooks_are_called(register: Callable, hook: Callable, backend: str) -> None:
    config = Config((4, 8), 2, sizes=((5, 4), (2, 3)))
    maps = random_maps(config, backend=backend)
    modules = pair(config, backend)
    for module in modules:  # a call that is kept, without the hook
        evaluate(module, maps)
    handle = register(hook)
    try:
        with ModuleTracker():  # whose hooks on every module are none that count
            results = [evaluate(module, maps) for module in modules]
    finally:
        handle.remove()
    assert_same(*results)
    with pytest.raises(AssertionError):
        assert_same(results[1], evaluate(modules[1], maps))


# The other modules hold parameters: what would need their own forward is refused


def _old_weight_norm(conv: nn.Module) -> None:
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(conv)


class ScaledConv(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


HELD = {
    "weight_norm": ("upconvs.0.conv.conv", _old_weight_norm, "the forward pre-hook WeightNorm computes"),
    "spectral_norm": (
        "avg_map.1.proj.depthwise",
        torch.nn.utils.spectral_norm,
        "the forward pre-hook SpectralNorm computes",
    ),
    "pruned": (
        "attention.0.spatial_norm.0",
        lambda norm: prune.random_unstructured(norm, "weight", 0.5),
        "the forward pre-hook RandomUnstructured computes",
    ),
    "pruned_and_hooked": (
        "attention.0.spatial_norm.0",
        lambda norm: (norm.register_forward_pre_hook(print), prune.random_unstructured(norm, "weight", 0.5)),
        "the forward pre-hook RandomUnstructured computes",
    ),
    "subclass": (
        "avg_map.0.proj.depthwise",
        lambda conv: setattr(conv, "__class__", ScaledConv),
        "tests.module.test_module.ScaledConv",
    ),
}


@pytest.mark.parametrize("name, change, came", HELD.values(), ids=HELD)
@each_backend
def test_modules_whose_forward_would_not_run_are_refused(name: str, change: Callable, came: str, backend: str) -> None:
    module, _ = pair(Config(), backend)
    change(module.get_submodule(name))
    assert_refused(module, name, came, backend)


class StandardisedConv(nn.Conv2d):
    """Hides its difference from Conv2d in another method than forward."""

    def _conv_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


EXCHANGED = {
    "hidden": (
        "upconvs.0.conv.conv",
        lambda conv: StandardisedConv(8, 8, 1),
        "tests.module.test_module.StandardisedConv",
    ),
    "other_channels": ("upconvs.0.conv.conv", lambda conv: nn.Conv2d(4, 1, 1), "Conv2d(4, 1, kernel_size=(1, 1)"),
    "groups": ("upconvs.0.conv.conv", lambda conv: nn.Conv2d(8, 8, 1, groups=2), "groups=2)"),
    "dense": ("avg_map.0.proj.depthwise", lambda conv: nn.Conv2d(8, 8, 1), "Conv2d(8, 8, kernel_size=(1, 1)"),
    "other_norm": ("attention.0.channel_norm.1", lambda norm: nn.LayerNorm(8), "LayerNorm((8,)"),
    "no_norm": ("attention.0.channel_norm.1", lambda norm: nn.Identity(), "torch.nn.modules.linear.Identity"),
    "lora": ("avg_map.0.proj.depthwise", lambda conv: nn.Sequential(conv), "torch.nn.modules.container.Sequential"),
    "holder": ("attention.0", lambda block: nn.Identity(), "torch.nn.modules.linear.Identity"),
    "larger_kernel": ("upconvs.1.conv.conv", lambda conv: nn.Conv2d(16, 16, 3, padding=1), "Conv2d(16, 16, kernel_siz"),
    "stride": ("upconvs.1.conv.conv", lambda conv: nn.Conv2d(16, 16, 1, stride=2), "Conv2d(16, 16, kernel_size=(1, 1)"),
    "padding": ("upconvs.1.conv.conv", lambda conv: nn.Conv2d(16, 16, 1, padding=1), "padding=(1, 1))"),
    "no_bias": ("upconvs.0.conv.conv", lambda conv: nn.Conv2d(8, 8, 1, bias=False), "Conv2d(8, 8, kernel_size=(1, 1)"),
    "norm_without_bias": ("attention.0.spatial_norm.0", lambda norm: nn.LayerNorm(8, bias=False), "LayerNorm((8,), "),
    "quantized": (
        "attention.0.s_attention.1.q_map.proj.depthwise",
        lambda conv: torch.ao.nn.qat.Conv2d(24, 24, 1, groups=24, qconfig=torch.ao.quantization.default_qat_qconfig),
        "torch.ao.nn.qat.modules.conv.Conv2d",
    ),
}


@pytest.mark.parametrize("name, exchange, came", EXCHANGED.values(), ids=EXCHANGED)
@each_backend
def test_exchanged_submodules_are_refused(name: str, exchange: Callable, came: str, backend: str) -> None:
    module, _ = pair(Config(), backend)
    module.set_submodule(name, exchange(module.get_submodule(name)))
    assert_refused(module, name, came, backend)


@pytest.mark.parametrize("name", ["upconvs", "attention.0.channel_norm", "avg_map.1.proj.depthwise"])
@each_backend
def test_removed_submodules_are_refused(name: str, backend: str) -> None:
    module, _ = pair(Config(), backend)
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, None)
    assert_refused(module, name, "NoneType", backend)


def assert_refused(module: nn.Module, name: str, came: str, backend: str) -> None:
    before = {name: b.clone() for name, b in module.named_buffers()}
    with pytest.raises(TypeError, match=rf"^{re.escape(name)}: expected .*, got .*{re.escape(came)}"):
        evaluate(module, random_maps(Config(), backend=backend), backward=backend in TRAINABLE)
    assert_identical(dict(module.named_buffers()), before)


@each_backend
def test_parametrizations(backend: str) -> None:
    modules = pair(Config(), backend)
    for module in modules:
        for conv in (module.upconvs[0].conv.conv, module.avg_map[1].proj.depthwise):
            torch.nn.utils.parametrizations.weight_norm(conv)
            conv.parametrizations.weight.original0.data.mul_(3)
    maps = random_maps(Config(), backend=backend)
    assert_same(*(evaluate(module, maps, backward=backend in TRAINABLE) for module in modules))


class _Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return weight


@each_backend
def test_a_parametrization_is_computed_once_a_call(backend: str) -> None:
    module, _ = pair(Config(), backend, train=False)
    counted = {}
    for name, conv in list(module.named_modules()):
        if isinstance(conv, nn.Conv1d | nn.Conv2d):
            counted[name] = _Counted()
            torch.nn.utils.parametrize.register_parametrization(conv, "weight", counted[name])
    for one in counted.values():
        one.calls = 0
    evaluate(module, random_maps(Config(), backend=backend), backward=False)
    assert {name: one.calls for name, one in counted.items()} == dict.fromkeys(counted, 1)


@each_trainable
def test_maps_of_a_frozen_encoder(backend: str) -> None:
    module, _ = pair(Config(), backend)
    with torch.inference_mode():
        maps = random_maps(Config())
    sum(y.sum() for y in module(maps)).backward()
    assert module.upconvs[0].conv.conv.weight.grad.any()


@each_backend
def test_one_layer_alone_in_training(backend: str) -> None:
    """Each of the last scale, of maps without gradients: its own are those of where all are in training."""
    config = Config((4, 6), 2, spatial_head=(1, 2), sizes=((4, 4), (2, 3)))
    module, _ = pair(config, backend)
    maps = random_maps(config, backend=backend)
    expected = evaluate(module, maps)
    layers = [layer for name, layer in module.named_modules() if f".{len(maps) - 1}" in name]
    for layer in [layer for layer in layers if list(layer.parameters(recurse=False))]:
        module.requires_grad_(False).zero_grad()
        layer.requires_grad_(True)
        reached = [(y, g) for y, g in zip(module(maps), random_like(maps), strict=True) if y.requires_grad]
        torch.autograd.backward(*zip(*reached, strict=True))
        found = {f"grad.{name}": p.grad for name, p in module.named_parameters() if p.requires_grad}
        assert_same(found, {name: expected[name] for name in found})


@each_backend
def test_one_changed_head_of_two(backend: str) -> None:
    # Each scale decides for itself whether BatchNorm removes what the last attention adds to its channels.
    modules = pair(Config(), backend)
    for module in modules:
        module.bn_relu = nn.Sequential(module.bn_relu[0], nn.Identity())
    maps = random_maps(Config(), backend=backend)
    results = [evaluate(module, maps, backward=backend in TRAINABLE) for module in modules]
    assert_same(*results)


def _pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def _saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(module)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled, _saved], ids=["deepcopy", "pickle", "state_dict"])
@each_backend
def test_copies_compute_the_same(duplicate: Callable[[nn.Module], nn.Module], backend: str) -> None:
    module, _ = pair(Config(), backend)
    maps = random_maps(Config(), backend=backend)
    run = functools.partial(evaluate, maps=maps, backward=backend in TRAINABLE)
    run(module)  # a copy after use, as a checkpoint is
    other = duplicate(module)
    assert_identical(run(other), run(module))


@each_backend
@both_modes
def test_warming_up_changes_nothing(backend: str, train: bool) -> None:
    """What it compiles is a test of the launches (tests/tools/test_launch.py)."""
    (module, _), maps = pair(Config(), backend, torch.float32, train), random_maps(Config(), torch.float32, 0, backend)
    expected = evaluate(copy.deepcopy(module), maps, backward=False)
    before = copy.deepcopy(module.state_dict())
    for backward in (True, False):
        dca_kernels.warm_up(module, [x.shape for x in maps], backward=backward)
        dca_kernels.warm_up(module, [x.shape for x in maps], memory_format=torch.channels_last, backward=backward)
    dca_kernels.warm_up(module, [(0, *x.shape[1:]) for x in maps])
    assert_identical(module.state_dict(), before)
    assert all(p.grad is None for p in module.parameters())
    assert_identical(evaluate(module, maps, backward=False), expected)


@pytest.mark.parametrize("backward", [True, False])
def test_what_is_warmed_up_is_as_the_calls(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are compiled for the maps and the contract that a backend is given."""
    module, given = dca_kernels.DCA((8, 16), patch=4, backend="torch").bfloat16(), []
    monkeypatch.setattr(torch_backend, "warm_up", lambda *call: given.extend(call))
    shapes = [(2, 8, 5, 4), (2, 16, 4, 3)]
    with torch.set_grad_enabled(not backward):
        dca_kernels.warm_up(module, shapes, None, torch.channels_last, backward)
        assert torch.is_grad_enabled() == (not backward)
    maps, its = given
    assert [tuple(x.shape) for x in maps] == shapes
    assert all(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous() for x in maps)
    assert {(x.dtype, x.requires_grad) for x in maps} == {(torch.bfloat16, backward)} and its.backward == backward


def test_warming_up_refuses_what_a_call_does() -> None:
    module = dca_kernels.DCA((8, 16), patch=4)
    with pytest.raises(ValueError, match=r"^shapes: expected 2 shapes, one for each of features, got "):
        dca_kernels.warm_up(module, [(1, 8, 4, 4)])
    with pytest.raises(ValueError, match=r"^shapes\[1\]: expected shape \(B, 16, H, W\), got \(1, 8, 4\)$"):
        dca_kernels.warm_up(module, [(1, 8, 4, 4), (1, 8, 4)])
    with pytest.raises(
        TypeError, match=r"^maps\[0\]: expected dtype torch.float32, as the parameters, got torch.float64"
    ):
        dca_kernels.warm_up(module, [(1, 8, 4, 4), (1, 16, 4, 4)], dtype=torch.float64)
    with pytest.raises(
        TypeError, match=r"^dca: expected a dca_kernels.DCA, got Sequential: pass the one within a network"
    ):
        dca_kernels.warm_up(nn.Sequential(module), [(1, 8, 4, 4), (1, 16, 4, 4)])
    module.grid = (0, 4)
    with pytest.raises(ValueError, match=r"^grid: expected integers of at least 1, got \[0, 4\]$"):
        dca_kernels.warm_up(module, [(1, 8, 4, 4), (1, 16, 4, 4)])


def test_repr_names_the_arguments() -> None:
    text = repr(dca_kernels.DCA([8, 16], patch=(4, 7), spatial_head=[2, 4], backend="torch"))
    assert "features=[8, 16], patch=(4, 7)" in text
    assert "spatial_head=[2, 4], backend='torch'" in text
