"""The swap-in contract: names, initial weights, exact zeros, BatchNorm in every form, copies."""

import copy
import functools
import inspect
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import dca_kernels
import reference
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
    "stats_no_longer_tracked": lambda head: setattr(head[0], "track_running_stats", False),
    "no_counter": lambda head: setattr(head[0], "num_batches_tracked", None),
    "patched_forward": _patch_forward,
    "other_activation": lambda head: head.__setitem__(1, nn.GELU()),
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
def test_layout_before_a_changed_head(backend: str) -> None:
    module, _ = pair(Config(), backend)
    seen = []
    for head in module.bn_relu:
        head[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    maps = [x.to(memory_format=torch.channels_last) for x in random_maps(Config(), backend=backend)]
    evaluate(module, maps, backward=backend in TRAINABLE)
    assert all(y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous() for y in seen)
    assert len(seen) == 2


@each_backend
def test_global_hooks_are_called(backend: str) -> None:
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, out: 2 * out if isinstance(module, nn.BatchNorm2d) else None
    )
    try:
        maps = random_maps(Config(), backend=backend)
        results = [evaluate(module, maps, backward=backend in TRAINABLE) for module in pair(Config(), backend)]
    finally:
        hook.remove()
    assert_same(*results)


# The other modules hold parameters: what would need their own forward is refused


def _old_weight_norm(module: nn.Module) -> None:
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(module.upconvs[0].conv.conv)


class ScaledConv(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


HELD = {
    "weight_norm": _old_weight_norm,
    "spectral_norm": lambda module: torch.nn.utils.spectral_norm(module.avg_map[1].proj.depthwise),
    "pruned": lambda module: prune.random_unstructured(module.attention[0].spatial_norm[0], "weight", 0.5),
    "subclass": lambda module: setattr(module.avg_map[0].proj.depthwise, "__class__", ScaledConv),
    "patched_forward": lambda module: setattr(module.upconvs[0].conv.conv, "forward", lambda x: x),
}


@pytest.mark.parametrize("change", HELD.values(), ids=HELD)
@each_backend
def test_modules_whose_forward_would_not_run_are_refused(change: Callable[[nn.Module], None], backend: str) -> None:
    module, _ = pair(Config(), backend)
    change(module)
    before = {name: b.clone() for name, b in module.named_buffers()}
    with pytest.raises(TypeError, match=r"^expected (an )?nn\.(Conv2d|LayerNorm)"):
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


@each_backend
def test_replicas_of_data_parallel(backend: str) -> None:
    results = []
    for module in pair(Config(), backend, train=False):
        replicas = [m._replicate_for_data_parallel() for m in module.modules()]  # what nn.DataParallel makes of each
        names = {m: replica for m, replica in zip(module.modules(), replicas, strict=True)}
        for original, replica in names.items():
            for name, child in original.named_children():
                setattr(replica, name, names[child])
            for name, tensor in [*original._parameters.items(), *original._buffers.items()]:
                setattr(replica, name, tensor)
        maps = random_maps(Config(), backend=backend)
        with torch.no_grad():
            results.append({f"output.{i}": y for i, y in enumerate(replicas[0](maps))})
    assert_same(*results)


@each_trainable
def test_maps_of_a_frozen_encoder(backend: str) -> None:
    module, _ = pair(Config(), backend)
    with torch.inference_mode():
        maps = random_maps(Config())
    sum(y.sum() for y in module(maps)).backward()
    assert module.upconvs[0].conv.conv.weight.grad.any()


@each_backend
def test_one_changed_head_of_two(backend: str) -> None:
    # Each scale decides for itself whether BatchNorm removes what the last attention adds to its channels.
    modules = pair(Config(), backend)
    for module in modules:
        module.bn_relu[1] = nn.Identity()
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


def test_repr_names_the_arguments() -> None:
    text = repr(dca_kernels.DCA([8, 16], patch=(4, 7), spatial_head=[2, 4], backend="torch"))
    assert "features=[8, 16], patch=(4, 7)" in text
    assert "spatial_head=[2, 4], backend='torch'" in text
