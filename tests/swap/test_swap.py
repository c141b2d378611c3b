"""The fused module in models that exist: what is found, replaced, refused and restored, and what is left as it was."""

import copy
import functools
import io
import logging
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import dca_kernels
import reference
from dca_kernels import add_dca, inspect, replace_dca, restore_dca
from tests import vendored
from tests.oracle import (
    Config,
    Golden,
    assert_identical,
    assert_same,
    both_modes,
    evaluate,
    random_maps,
    randomise,
)
from tests.readme import snippet

FEATURES, STRIDES, PATCH = [8, 16], [4, 2], 4
VENDORED = Config(FEATURES, PATCH)


def official(kind: type = vendored.DualCrossAttention, seed: int = 0, **arguments) -> nn.Module:
    dca = kind(**({"features": FEATURES, "strides": STRIDES, "patch": PATCH} | arguments))
    randomise(dca, seed)
    return dca


class Host(nn.Module):
    """A network with a DCA between convolutions, called as the official hosts do."""

    def __init__(self, dca: nn.Module) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1)
        self.DCA = dca
        self.out = nn.Conv2d(8 + 16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.conv1(x)
        x2 = self.conv2(x1)
        x1, x2 = self.DCA([x1, x2])
        return self.out(torch.cat([x1, nn.functional.interpolate(x2, x1.shape[2:])], 1))


def host(**arguments) -> Host:
    torch.manual_seed(0)
    return Host(official(**arguments)).double()


# PyTorch 2.13 warns about its own code when it traces a module with an autograd function.
tracing = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

trusting_replace_dca = functools.partial(replace_dca, verify=False)  # where the test is about something else

IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def assert_the_same_objects(actual: dict[str, object], expected: dict[str, object]) -> None:
    assert list(actual) == list(expected)
    assert all(actual[name] is expected[name] for name in expected)


class Snapshot:
    """All of a model that a call that raises, or only looks, must leave as it is."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.attributes = {name: list(vars(m)) for name, m in self.modules.items()}
        self.modes = {name: m.training for name, m in self.modules.items()}
        self.tensors = tensors(model)
        self.values = {name: t.clone() for name, t in self.tensors.items()}
        self.generator = torch.get_rng_state()

    def assert_unchanged(self, model: nn.Module) -> None:
        now = Snapshot(model)
        assert_the_same_objects(now.modules, self.modules)
        assert_the_same_objects(now.tensors, self.tensors)
        assert_identical(now.values, self.values)
        assert (now.attributes, now.modes) == (self.attributes, self.modes)
        assert torch.equal(now.generator, self.generator)


# What is replaced


@pytest.mark.parametrize("name", ["tiny_train", "tiny_heads", "tiny_two_blocks"])
def test_official_layout_and_vectors(name: str) -> None:
    # The stand-in is the official module by its keys and numbers, and what takes its place is, too.
    golden = Golden(name)
    original = vendored.DualCrossAttention(**golden.arguments).double()
    assert list(original.state_dict()) == list(golden.state)
    original.load_state_dict(golden.state)
    fused = trusting_replace_dca(copy.deepcopy(original))
    assert type(fused) is dca_kernels.DCA
    for module in (original, fused):
        results = golden.sample(evaluate(module.train(golden.train), golden.maps, golden.upstream))
        assert_same(results, golden.expected(backward=True))


ORIGINALS: dict[str, Callable[[], nn.Module]] = {
    "vendored": official,
    "two_blocks_of_several_heads": lambda: official(n=2, channel_head=[2, 4], spatial_head=[8, 2]),
    "channel_only": lambda: official(spatial_att=False),
    "spatial_only": lambda: official(channel_att=False),
    "reference": lambda: reference.DCA(FEATURES, patch=PATCH),
    "oblong_grid": lambda: reference.DCA(FEATURES, patch=(3, 5)),
    "one_token": lambda: reference.DCA(FEATURES, patch=1),
}


@pytest.mark.parametrize("make", ORIGINALS.values(), ids=ORIGINALS)
@both_modes
def test_results_names_and_tensors_stay(make: Callable[[], nn.Module], train: bool) -> None:
    model = Host(make()).double().train(train)
    expected = evaluate(copy.deepcopy(model).DCA, random_maps(VENDORED))
    before, keys = tensors(model), list(model.state_dict())
    assert replace_dca(model) is model
    assert type(model.DCA) is dca_kernels.DCA
    assert_the_same_objects(tensors(model), before)
    assert list(model.state_dict()) == keys
    assert_same(evaluate(model.DCA, random_maps(VENDORED)), expected)


def test_arguments_are_read_off_the_structure() -> None:
    arguments = {"n": 2, "channel_head": [2, 1, 4], "spatial_head": [1, 8, 2], "patch": 3}
    fused = replace_dca(official(features=[8, 16, 24], strides=[4, 2, 1], **arguments), backend="torch")
    expected = dca_kernels.DCA([8, 16, 24], **arguments, backend="torch")
    assert fused.extra_repr() == expected.extra_repr()


def test_default_heads_of_more_scales_than_there_are() -> None:
    # The official defaults are lists of four, of which a network with three scales uses three.
    fused = trusting_replace_dca(official(features=[8, 16, 24], strides=[4, 2, 1]))
    assert (fused.channel_head, fused.spatial_head) == ([1] * 3, [4] * 3)


def test_training_goes_on_with_the_same_optimizer() -> None:
    models = [host(), host()]
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.01) for model in models]
    for step in range(3):
        if step == 1:
            trusting_replace_dca(models[0])
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(IMAGE).square().mean().backward()
            optimizer.step()
        if step == 1:
            restore_dca(models[0])
    # Adam makes steps of equal size of gradients that are zero by algebra and rounding noise in the original.
    assert_same({"output": models[0].eval()(IMAGE)}, {"output": models[1].eval()(IMAGE)}, rtol=1e-6)


def test_a_model_that_is_a_dca_itself() -> None:
    original = official()
    fused = replace_dca(original)
    assert type(fused) is dca_kernels.DCA
    assert restore_dca(fused) is original


def test_a_module_under_two_names_stays_one() -> None:
    model = nn.ModuleDict({"a": official(), "b": nn.Sequential(official(seed=1))})
    model["c"] = model["a"]
    trusting_replace_dca(model)
    assert model["a"] is model["c"] is not model["b"][0]
    restore_dca(model)
    assert model["a"] is model["c"]
    assert {type(m) for m in (model["a"], model["b"][0])} == {vendored.DualCrossAttention}


def test_a_fused_module_that_was_there_stays() -> None:
    model = nn.ModuleList([dca_kernels.DCA(FEATURES, patch=PATCH), official()])
    fused = model[0]
    trusting_replace_dca(model)
    assert model[0] is fused
    restore_dca(model)
    assert model[0] is fused


def test_frozen_parameters_and_modes_stay() -> None:
    model = host().train()
    model.DCA.avg_map.requires_grad_(False)
    model.DCA.bn_relu[1].eval()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    expected = evaluate(copy.deepcopy(model).DCA, random_maps(VENDORED), backward=False)
    trusting_replace_dca(model)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen
    assert not model.DCA.bn_relu[1][0].training and model.DCA.bn_relu[0][0].training and model.DCA.training
    assert_same(evaluate(model.DCA, random_maps(VENDORED), backward=False), expected)
    assert not trusting_replace_dca(host().eval()).DCA.training


def test_epsilons_and_momenta_of_the_norms_are_the_originals() -> None:
    original = official().double()
    original.attention[0].spatial_norm[1].eps = 0.1
    original.bn_relu[0][0].momentum, original.bn_relu[1][0].eps = 0.7, 0.2
    expected = evaluate(copy.deepcopy(original), random_maps(VENDORED))
    assert_same(evaluate(trusting_replace_dca(original), random_maps(VENDORED)), expected)


def test_parametrized_weights() -> None:
    original = official().double()
    parametrizations.weight_norm(original.upconvs[0].conv.conv)
    parametrizations.spectral_norm(original.upconvs[1].conv.conv)
    before, keys = Snapshot(original), list(original.state_dict())
    assert inspect(original)[0].reason is None
    before.assert_unchanged(original)  # in training, spectral_norm's buffers change when the weight is read
    expected = evaluate(copy.deepcopy(original), random_maps(VENDORED))
    fused = replace_dca(original)
    assert list(fused.state_dict()) == keys
    assert_same(evaluate(fused, random_maps(VENDORED)), expected)


@pytest.mark.slow
@tracing
@torch.no_grad()
def test_replaced_inside_a_compiled_model() -> None:
    model = host().eval()
    compiled = torch.compile(model, backend="eager")
    expected = compiled(IMAGE)
    assert trusting_replace_dca(compiled) is compiled
    assert_same({"output": compiled(IMAGE)}, {"output": expected})


def test_backend_is_that_of_the_fused_modules() -> None:
    assert trusting_replace_dca(host(), backend="torch").DCA.backend == "torch"
    assert trusting_replace_dca(host()).DCA.backend == "auto"


def test_a_grid_whose_attention_matrices_would_not_fit() -> None:
    original = official(patch=512)  # 2**18 tokens: a matrix would take 512 GB
    assert replace_dca(original).grid == (512, 512)


# Hooks


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # a list of maps is no tensor, in either module
def test_hooks_of_the_dca_and_of_bn_relu_are_honoured() -> None:
    model = host()
    calls: list[str] = []
    first = model.DCA.register_forward_hook(lambda *_: calls.append("forward"))
    model.DCA.register_forward_pre_hook(lambda *_, **__: calls.append("pre"), with_kwargs=True)
    model.DCA.register_full_backward_pre_hook(lambda *_: calls.append("backward"))
    model.DCA.bn_relu[0][0].register_forward_hook(lambda *_: calls.append("norm"))
    model.DCA.register_state_dict_post_hook(lambda *_: calls.append("state_dict"))
    replace_dca(model)
    assert calls == []  # not by the check either
    model(IMAGE).sum().backward()
    assert calls == ["pre", "norm", "forward", "backward"]
    model.state_dict()
    assert calls[4:] == ["state_dict"]
    first.remove()
    late = model.DCA.register_forward_hook(lambda *_: calls.append("late"))
    restore_dca(model)
    calls.clear()
    model(IMAGE).sum().backward()
    assert calls == ["pre", "norm", "late", "backward"]
    late.remove()
    model(IMAGE)
    assert calls[4:] == ["pre", "norm"]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_the_first_backward_hook_while_replaced_stays() -> None:
    model = trusting_replace_dca(host())
    calls: list[str] = []
    model.DCA.register_full_backward_hook(lambda *_: calls.append("backward"))
    restore_dca(model)
    model(IMAGE).sum().backward()
    assert calls == ["backward"]


@pytest.mark.parametrize("name", ["upconvs.0", "upconvs.1.conv.conv", "attention.0.c_attention.0", "avg_map.1.proj"])
def test_hooks_put_on_submodules_while_replaced_stay(name: str) -> None:
    model = trusting_replace_dca(host())
    calls: list[str] = []
    handle = model.DCA.get_submodule(name).register_forward_hook(lambda *_: calls.append(name))
    model(IMAGE)
    restore_dca(model)
    model(IMAGE)
    assert calls == [name] * 2
    handle.remove()
    model(IMAGE)
    assert calls == [name] * 2


@pytest.mark.parametrize("name", ["", "upconvs.0"])
def test_a_forward_put_on_an_instance_while_replaced_is_not_lost(name: str) -> None:
    model = trusting_replace_dca(host())
    fused, changed = model.DCA, model.DCA.get_submodule(name)
    changed.forward = changed.forward
    with pytest.raises(ValueError, match=rf"^model: .* got one that was put on {name or 'the DCA itself'}: remove it"):
        restore_dca(model)
    assert model.DCA is fused
    del changed.forward
    assert restore_dca(model).DCA is not fused


def test_hooks_are_not_copied_for_the_check() -> None:
    class Uncopyable:
        def __call__(self, *_) -> None: ...

        def __deepcopy__(self, memo: dict) -> None:
            raise AssertionError("copied")

    model = host()
    model.DCA.register_forward_hook(Uncopyable())
    model.DCA.bn_relu[0].register_forward_pre_hook(Uncopyable())
    replace_dca(model)


def _attention(dca: nn.Module) -> nn.Module:
    return dca.attention[0].s_attention[1]


HOOKED: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "attention_map": (
        lambda dca: _attention(dca).sdp.softmax.register_forward_hook(print),
        "attention.0.s_attention.1.sdp.softmax has forward hooks, which would not be called",
    ),
    "convolution": (
        lambda dca: dca.upconvs[0].conv.conv.register_full_backward_hook(print),
        "upconvs.0.conv.conv has backward hooks, with which no backend would run",
    ),
    "state_dict": (
        lambda dca: dca.attention.register_state_dict_pre_hook(print),
        "attention has state dict pre hooks, which would not be called",
    ),
    "forward": (
        lambda dca: setattr(dca, "forward", dca.forward),
        "the forward of this instance was replaced, and would not be called",
    ),
    "inner_forward": (
        lambda dca: setattr(dca.attention[0], "forward", dca.attention[0].forward),
        "the forward of attention.0 was replaced, and would not be called",
    ),
    "prune": (
        lambda dca: prune.l1_unstructured(_attention(dca).q_map.proj.depthwise, "weight", amount=1),
        "attention.0.s_attention.1.q_map.proj.depthwise has forward pre hooks, with which no backend would run",
    ),
    "compiled": (lambda dca: dca.compile(backend="eager"), "it is compiled: replace it first, then compile"),
}


@pytest.mark.parametrize("change, reason", HOOKED.values(), ids=HOOKED)
def test_what_would_not_be_called_is_refused(change: Callable[[nn.Module], object], reason: str) -> None:
    model = host()
    change(model.DCA)
    assert_refused(model, "DCA (DualCrossAttention)", re.escape(reason))


def test_a_dca_that_is_compiled_by_itself_is_refused() -> None:
    # Its compiled forward would go on calling the original.
    model = host()
    model.DCA = torch.compile(model.DCA, backend="eager")
    assert_refused(model, "DCA._orig_mod (DualCrossAttention)", "it is compiled: replace it first, then compile")


def assert_refused(model: nn.Module, name: str, reason: str) -> None:
    """With a reason, a pattern, by an error and in the report; nothing is changed."""
    before = Snapshot(model)
    with pytest.raises(
        ValueError, match=f"^model: expected DCAs that can be replaced, got {re.escape(name)}: {reason}$"
    ):
        replace_dca(model)
    (found,) = inspect(model)
    assert re.fullmatch(reason, found.reason)
    before.assert_unchanged(model)


# Other maths, other layouts


def change(edit: Callable[[nn.Module], object], **arguments) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        dca = official(**arguments)
        edit(dca)
        return dca

    return make


def variant(kind: type, **arguments) -> Callable[[], nn.Module]:
    return lambda: official(kind, **arguments)


def _set_dropout(dca: nn.Module) -> None:
    dca.attention[0].c_attention[0].sdp.softmax = nn.Sequential(nn.Softmax(-1), nn.Dropout(0.5))


def _other(kind: str, mode: str = "evaluation") -> str:
    return rf"it computes something else: {kind} in {mode} differ from a DCA's by \d\.\de[+-]\d\d of the largest"


HEADS = {"channel_head": [2, 2]}
VARIANTS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "parallel": (variant(vendored.Parallel), _other("outputs")),
    "exchanged_maps": (variant(vendored.with_attention(spatial=vendored.ExchangedMaps)), _other("outputs")),
    "scale_of_a_head": (variant(vendored.with_attention(vendored.ScaleOfHead), **HEADS), _other("outputs")),
    "detached_keys": (variant(vendored.with_attention(spatial=vendored.DetachedKeys)), _other("gradients")),
    "without_residual": (variant(vendored.WithoutResidual), _other("outputs")),
    "nearest": (change(lambda dca: setattr(dca.upconvs[0].up, "mode", "nearest")), r"a copy of it does not run: .+"),
    "not_aligned": (change(lambda dca: setattr(dca.upconvs[0].up, "align_corners", False)), _other("outputs")),
    "dropout": (change(_set_dropout), _other("outputs", "training")),
    "attention_off": (change(lambda dca: setattr(dca.attention[0], "spatial_att", False)), _other("outputs")),
    "returns_list": (variant(vendored.ReturnsList), "its forward returns a list, a DCA's a tuple"),
    "maps_one_by_one": (
        variant(vendored.TakesMapsOneByOne),
        "a copy of it does not run: TypeError: expected a map for each scale",
    ),
    "own_queries": (
        variant(vendored.with_attention(spatial=vendored.OwnQueries)),
        r"it has another layout: attention\.0\.s_attention\.0\.q_map\..*: expected Conv2d\(24, .*, got Conv2d\(8, .*",
    ),
    "gate": (variant(vendored.Gated), "it has other tensors than a DCA, or in another order: gate"),
    "hidden_buffer": (
        change(lambda dca: dca.register_buffer("mask", torch.ones(1), persistent=False)),
        "it has other tensors than a DCA, or in another order: mask",
    ),
    "order": (
        change(
            lambda dca: dca._modules.update(bn_relu=dca._modules.pop("bn_relu"), avg_map=dca._modules.pop("avg_map"))
        ),
        r"it has other tensors than a DCA, or in another order: attention\.0\..+",
    ),
    "three_dimensions": (
        change(lambda dca: setattr(dca.upconvs[1].conv, "conv", nn.Conv3d(16, 16, 1))),
        r"it has another layout: upconvs\.1\.conv\.conv: expected Conv2d\(16, .*, got a torch\..*\.Conv3d",
    ),
    "without_bias": (
        change(lambda dca: setattr(dca.upconvs[1].conv.conv, "bias", None)),
        r"it has another layout: upconvs\.1\.conv\.conv: expected Conv2d\(16, .*, got Conv2d\(16, .* bias=False\)",
    ),
    "wide_kernel": (
        change(lambda dca: setattr(dca.upconvs[1].conv, "conv", nn.Conv2d(16, 16, 3, padding=1))),
        r"it has another layout: upconvs\.1\.conv\.conv: expected Conv2d\(16, .*, got .* padding=\(1, 1\)\)",
    ),
    "two_grids": (
        change(lambda dca: setattr(dca.patch_avg[0].projection, "output_size", (4, 2))),
        r"it has another layout: patch_avg: expected one token grid, got \[\(4, 2\), \(4, 4\)\]",
    ),
    "grid_of_three": (
        change(lambda dca: (delattr(dca, "patch_avg"), setattr(dca, "patch", (2, 2, 2)))),
        r"it has another layout: patch: expected one integer or \(P_h, P_w\), got \(2, 2, 2\)",
    ),
    "attention_of_one_module": (
        change(lambda dca: setattr(dca, "attention", nn.Identity())),
        r"it has another layout: .+",
    ),
}


@pytest.mark.parametrize("make, reason", VARIANTS.values(), ids=VARIANTS)
def test_a_variant_is_refused(make: Callable[[], nn.Module], reason: str) -> None:
    model = nn.Sequential(make())
    assert_refused(model, f"0 ({type(model[0]).__name__})", reason)


def test_all_are_replaced_or_none() -> None:
    model = nn.Sequential(official(), official(vendored.Gated), official(vendored.ReturnsList))
    before = Snapshot(model)
    message = (
        "model: expected DCAs that can be replaced, got 1 (Gated): it has other tensors than a DCA, or in another "
        "order: gate; 2 (ReturnsList): its forward returns a list, a DCA's a tuple"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        replace_dca(model)
    before.assert_unchanged(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_hide_the_maths_do_not_hide_it_from_the_check(dtype: torch.dtype) -> None:
    model = nn.Sequential(official(vendored.Parallel).to(dtype))
    for p in model.parameters():
        nn.init.zeros_(p)
    assert_refused(model, "0 (Parallel)", _other("outputs"))


def test_verify_can_be_left_out() -> None:
    model = nn.Sequential(official(vendored.Parallel))
    assert type(replace_dca(model, verify=False)[0]) is dca_kernels.DCA


def test_the_check_does_not_mind_the_callers_modes() -> None:
    for mode in (torch.inference_mode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16)):
        model = host()
        before = Snapshot(model)
        with mode:
            report = inspect(model)
        assert [found.reason for found in report] == [None]
        before.assert_unchanged(model)


# Errors and the report


def test_nothing_to_replace() -> None:
    message = (
        "model: expected an official DCA, a module with the children avg_map, attention, upconvs, bn_relu, in "
        "Sequential, got none"
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        trusting_replace_dca(nn.Sequential(nn.ReLU()))
    model = nn.Sequential(official())
    trusting_replace_dca(model)
    with pytest.raises(ValueError, match=f"^{message} besides the dca_kernels.DCA at 0$"):
        trusting_replace_dca(model)


def test_nothing_to_restore() -> None:
    message = "model: expected a DCA that replace_dca put into Sequential, got none"
    with pytest.raises(ValueError, match=f"^{message}$"):
        restore_dca(nn.Sequential(official()))
    with pytest.raises(ValueError, match=f"^{message} besides the dca_kernels.DCA at 0$"):
        restore_dca(nn.Sequential(dca_kernels.DCA(FEATURES)))


@pytest.mark.parametrize("call", [replace_dca, restore_dca, inspect, add_dca])
def test_not_a_module(call: Callable) -> None:
    with pytest.raises(TypeError, match=r"^model: expected an nn\.Module, got dict$"):
        call({"model": 1})


def test_unknown_backend() -> None:
    model = host()
    before = Snapshot(model)
    with pytest.raises(ValueError, match=r"^backend: expected one of 'auto', 'torch', 'triton', got 'cuda'$"):
        replace_dca(model, backend="cuda")
    before.assert_unchanged(model)


def test_report() -> None:
    model = nn.ModuleDict({"skips": official(), "fused": dca_kernels.DCA(FEATURES), "other": official(vendored.Gated)})
    model["again"] = model["skips"]
    report = inspect(model)
    assert [(found.name, found.fused, found.reason is None) for found in report] == [
        ("skips", False, True),
        ("fused", True, True),
        ("other", False, False),
        ("again", False, True),
    ]
    assert str(report).splitlines() == [
        "name   class                              state",
        "skips  tests.vendored.DualCrossAttention  can be replaced",
        "fused  dca_kernels.module.DCA             fused",
        "other  tests.vendored.Gated               refused: it has other tensors than a DCA, or in another order: gate",
        "again  tests.vendored.DualCrossAttention  can be replaced",
    ]
    assert inspect(nn.ReLU()) == []
    assert str(inspect(official())).splitlines()[1].startswith("(model)")


def test_what_was_replaced_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dca_kernels"):
        trusting_replace_dca(nn.ModuleDict({"a": official(), "b": official()}))
    assert caplog.messages == ["replaced by the fused DCA: a, b"]


# What comes back


def _train(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(IMAGE).square().mean().backward()
    optimizer.step()
    return model


def _load(assign: bool) -> Callable[[nn.Module], nn.Module]:
    def load(model: nn.Module) -> nn.Module:
        model.load_state_dict(host(seed=5).state_dict(), assign=assign)
        return model

    return load


def _exchange(model: nn.Module) -> nn.Module:
    model.DCA.upconvs[0].conv.conv = nn.Conv2d(8, 8, 1).double()
    model.DCA.bn_relu = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(c), nn.ReLU()) for c in FEATURES).double()
    return model


def _through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


LATER: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nothing": lambda model: model,
    "training": _train,
    "moved": lambda model: model.float().double(),
    "loaded": _load(assign=False),
    "assigned": _load(assign=True),
    "copied": copy.deepcopy,
    "copied_and_trained": lambda model: _train(copy.deepcopy(model)),
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
    "saved": _through_a_file,
    "exchanged": _exchange,
    "average": lambda model: _train(torch.optim.swa_utils.AveragedModel(model).module),
}


@pytest.mark.parametrize("later", LATER.values(), ids=LATER)
def test_restored_with_the_tensors_of_now(later: Callable[[nn.Module], nn.Module]) -> None:
    model = host()
    original = model.DCA
    now = later(trusting_replace_dca(model))
    before, results = tensors(now), evaluate(copy.deepcopy(now).DCA, random_maps(VENDORED))
    assert restore_dca(now) is now
    assert type(now.DCA) is vendored.DualCrossAttention
    assert (now.DCA is original) == (now is model)
    assert_the_same_objects(tensors(now), before)
    assert_same(evaluate(now.DCA, random_maps(VENDORED)), results)
    if now is not model:  # which is still replaced, with tensors of its own
        assert not set(map(id, tensors(now).values())) & set(map(id, tensors(model).values()))
        assert restore_dca(model).DCA is original


def test_restored_in_the_mode_of_now() -> None:
    model = trusting_replace_dca(host().train())
    model.eval()
    model.DCA.bn_relu[0].train()
    restore_dca(model)
    training = {name for name, m in model.DCA.named_modules() if m.training}
    assert training == {"bn_relu.0", "bn_relu.0.0", "bn_relu.0.1"}


def test_norms_exchanged_while_replaced_stay() -> None:
    model = trusting_replace_dca(host())
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    restore_dca(model)
    assert [type(head[0]) for head in model.DCA.bn_relu] == [nn.SyncBatchNorm] * 2


def test_replaced_again_after_it_was_restored() -> None:
    model = restore_dca(trusting_replace_dca(host()))
    model.DCA.bn_relu = nn.SyncBatchNorm.convert_sync_batchnorm(model.DCA.bn_relu)
    expected = evaluate(copy.deepcopy(model).eval().DCA, random_maps(VENDORED))
    assert_same(evaluate(trusting_replace_dca(model.eval()).DCA, random_maps(VENDORED)), expected)
    assert restore_dca(model).DCA.patch == PATCH


# The README's snippets


def test_snippet_for_official_code(capsys: pytest.CaptureFixture[str]) -> None:
    model, expected = host(), {"output": host()(IMAGE)}
    before, replace, after = snippet("replace_dca(model)").partition("dca_kernels.replace_dca(model)\n")
    exec(before + replace, {"model": model})
    assert isinstance(model.DCA, dca_kernels.DCA)
    assert_same({"output": model(IMAGE)}, expected)
    exec(before + after, {"model": model})
    assert "DCA" in capsys.readouterr().out
    assert not isinstance(model.DCA, dca_kernels.DCA)
    assert_same({"output": model(IMAGE)}, expected)


def test_snippet_for_an_own_unet() -> None:
    class Encoder(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [nn.functional.avg_pool2d(x[:, :1].expand(-1, c, -1, -1), c // 32) for c in (32, 64, 128, 256)]

    names: dict[str, Any] = {}
    exec(snippet("class UNet"), names)
    image = torch.randn(1, 3, 240, 272)
    skips, refined = Encoder()(image), names["UNet"](Encoder(), nn.Identity())(image)
    assert [x.shape for x in refined] == [x.shape for x in skips]
    assert not torch.equal(refined[0], skips[0])


def test_snippet_of_the_module() -> None:
    names: dict[str, Any] = {}
    exec(snippet("refined = dca(skips)"), names)
    assert [x.shape for x in names["refined"]] == [x.shape for x in names["skips"]]


# On the skips of an encoder-decoder


class Encoder(nn.Module):
    """Maps of 4, 8 and 16 channels, each of half the side, after what `leading` puts before them."""

    def __init__(self, leading: Callable[[Tensor], list[Tensor]]) -> None:
        super().__init__()
        self.leading = leading
        self.stages = nn.ModuleList(nn.Conv2d(*c, 3, 2, 1) for c in ((3, 4), (4, 8), (8, 16)))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.leading(x)
        for stage in self.stages:
            x = stage(x) if x.shape[1] != 4 else stage(self.norm(x))
            maps.append(x)
        return maps


class Decoder(nn.Module):
    """Adds up its last three maps at the size of the first, and the sums of those before."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Conv2d(c, 2, 1) for c in (4, 8, 16))

    def forward(self, maps: list[Tensor], unused: int = 0) -> Tensor:
        maps, leading = maps[-3:], maps[:-3]
        heads = [head(x) for head, x in zip(self.heads, maps, strict=True)]
        total = sum(nn.functional.interpolate(y, maps[0].shape[2:]) for y in heads)
        return total + sum(x.sum() for x in leading)


class TupleDecoder(Decoder):
    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        assert isinstance(maps, tuple)
        return super().forward(list(maps))


class ManyDecoder(Decoder):
    def forward(self, *maps: Tensor) -> Tensor:
        return super().forward(list(maps))


def skips_only(x: Tensor) -> list[Tensor]:
    return []


def image_first(x: Tensor) -> list[Tensor]:
    return [x]


def image_and_empty_map_first(x: Tensor) -> list[Tensor]:
    return [x, x[:, :0, ::2, ::2]]


def as_list(maps: list[Tensor]) -> tuple:
    return (maps,)


def as_list_and_more(maps: list[Tensor]) -> tuple:
    return (maps, 3)


def as_tuple(maps: list[Tensor]) -> tuple:
    return (tuple(maps),)


def as_many(maps: list[Tensor]) -> tuple:
    return tuple(maps)


class Network(nn.Module):
    """An encoder-decoder; what can be seen of its two skips is that the decoder gets them."""

    def __init__(
        self,
        leading: Callable[[Tensor], list[Tensor]] = skips_only,
        call: Callable[[list[Tensor]], tuple] = as_list,
        decoder: Callable[[], nn.Module] = Decoder,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.call = Encoder(leading), decoder(), call

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(*self.call(self.encoder(x)))


def network(*args) -> Network:
    torch.manual_seed(0)
    return Network(*args).double()


ODD_IMAGE = torch.randn(2, 3, 37, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
SEAMS = {
    "nnunet": (skips_only, as_list, Decoder),
    "smp": (image_first, as_list, Decoder),
    "smp_with_an_empty_map": (image_and_empty_map_first, as_list, Decoder),
    "monai": (skips_only, as_list_and_more, Decoder),
    "tuple": (image_first, as_tuple, TupleDecoder),
    "one_argument_each": (image_first, as_many, ManyDecoder),
}


@pytest.mark.parametrize("seam", SEAMS.values(), ids=SEAMS)
def test_the_skips_are_refined_and_nothing_else(seam: tuple) -> None:
    plain = network(*seam).eval()
    model = add_dca(copy.deepcopy(plain), patch=3, n=2)
    assert (model.decoder.dca.features, model.decoder.dca.grid, model.decoder.dca.n) == ([4, 8], (3, 3), 2)
    maps = plain.encoder(ODD_IMAGE)
    refined = [*maps[:-3], *model.decoder.dca(maps[-3:-1]), maps[-1]]
    assert_identical({"output": model(ODD_IMAGE)}, {"output": plain.decoder(*plain.call(refined))})


def test_adding_changes_nothing_that_was_there() -> None:
    model = network().train()
    model.encoder.norm.eval()
    before, values = tensors(model), {name: t.clone() for name, t in tensors(model).items()}
    modes = {m: m.training for m in model.modules()}
    assert add_dca(model, patch=3) is model
    now = {name: t for name, t in tensors(model).items() if not name.startswith("decoder.dca.")}
    assert_the_same_objects(now, before)
    assert_identical(now, values)
    assert {m: m.training for m in modes} == modes
    assert all(m.training for m in model.decoder.dca.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_the_added_dca_has_the_official_initial_values() -> None:
    model = network()
    torch.manual_seed(3)
    add_dca(model, patch=3)
    torch.manual_seed(3)
    assert_identical(model.decoder.dca.state_dict(), reference.DCA([4, 8], patch=3).double().state_dict())


def test_a_checkpoint_of_the_plain_model_loads(caplog: pytest.LogCaptureFixture) -> None:
    plain, model = network(), add_dca(network(), patch=3)
    randomise(plain, 7)
    kept = {name: t.clone() for name, t in model.decoder.dca.state_dict().items()}
    for assign in (False, True):
        checkpoint = plain.state_dict()
        optimised = dict(model.decoder.dca.named_parameters())
        model.load_state_dict(checkpoint, assign=assign)  # strict
        assert checkpoint.keys() == plain.state_dict().keys()
        assert_the_same_objects(dict(model.decoder.dca.named_parameters()), optimised)
        now = model.state_dict()
        assert_identical({name: now[name] for name in checkpoint}, checkpoint)
        assert_identical(model.decoder.dca.state_dict(), kept)
    message = "the state dict has no decoder.dca.*: the DCA there keeps the values that it has"
    assert caplog.messages == [message] * 2


def test_a_checkpoint_with_half_a_dca_does_not_load() -> None:
    model = add_dca(network(), patch=3)
    checkpoint = model.state_dict()
    del checkpoint["decoder.dca.upconvs.0.conv.conv.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*decoder\.dca\.upconvs\.0\.conv\.conv\.bias"):
        model.load_state_dict(checkpoint)


def test_a_checkpoint_of_the_added_model_loads(caplog: pytest.LogCaptureFixture) -> None:
    model, other = add_dca(network(), patch=3).eval(), add_dca(network(), patch=3).eval()
    randomise(other, 7)
    model.load_state_dict(other.state_dict())
    assert_identical({"output": model(ODD_IMAGE)}, {"output": other(ODD_IMAGE)})
    assert caplog.messages == []


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), _through_a_file])
def test_a_copy_uses_its_own_dca(duplicate: Callable[[nn.Module], nn.Module], caplog: pytest.LogCaptureFixture) -> None:
    model = add_dca(network(), patch=3).eval()
    expected = model(ODD_IMAGE)
    other = duplicate(model)
    assert_identical({"output": other(ODD_IMAGE)}, {"output": expected})
    randomise(model.decoder.dca, 8)
    assert_identical({"output": other(ODD_IMAGE)}, {"output": expected})
    assert not torch.equal(model(ODD_IMAGE), expected)
    other.load_state_dict(network().state_dict())  # the hook that fills in is the copy's, too
    assert_identical({"output": other(ODD_IMAGE)}, {"output": expected})


def test_every_parameter_of_an_added_dca_gets_a_gradient() -> None:
    model = add_dca(network(), patch=3).train()
    model(ODD_IMAGE).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.slow
@tracing
@torch.no_grad()
def test_added_and_compiled_without_graph_breaks() -> None:
    model = add_dca(network(image_first), patch=3).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_same({"output": compiled(ODD_IMAGE)}, {"output": model(ODD_IMAGE)})


@tracing
@torch.no_grad()
def test_added_and_exported() -> None:
    model = add_dca(network(image_first), patch=3).eval()
    exported = torch.export.export(model, (ODD_IMAGE,)).module()
    assert_same({"output": exported(ODD_IMAGE)}, {"output": model(ODD_IMAGE)})


def test_an_example_of_the_input() -> None:
    def only_small(module: nn.Module, args: tuple) -> None:
        if args[0].shape[3] != 50:
            raise RuntimeError("too large")

    model = network()
    model.register_forward_pre_hook(only_small)
    before = Snapshot(model)
    message = (
        "example: expected an input that the model's forward takes, got shape (1, 3, 256, 256), at which it raises "
        "RuntimeError: too large"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        add_dca(model, patch=3)
    before.assert_unchanged(model)
    assert add_dca(model, patch=3, example=ODD_IMAGE).decoder.dca.features == [4, 8]


class _Reversed(Network):
    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x)[::-1])


class _Alone(Network):
    def forward(self, x: Tensor) -> Tensor:
        return self.decoder.heads[0](self.encoder(x)[0])


class _Bottleneck(Network):
    def forward(self, x: Tensor) -> Tensor:
        return self.decoder([x, self.encoder(x)[-1]])


class _ByName(Network):
    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(maps=self.encoder(x))


def _with(**children: nn.Module) -> Network:
    model = network()
    for name, child in children.items():
        setattr(model, name, child)
    return model


MAPS = "model: expected a decoder called with maps (B, C, H, W) from the largest to the smallest, got "
SEAM = (
    "with a child encoder and a child decoder that is called with the encoder's maps and is no Sequential, got the "
    "children {}; a forward that has its skips as variables can call a dca_kernels.DCA on them"
)
WITHOUT_SEAM: dict[str, tuple[Callable[[], nn.Module], dict, type[Exception], str]] = {
    "no_children": (nn.ReLU, {}, ValueError, "model: expected a ReLU " + SEAM.format("(none)")),
    "other_children": (
        lambda: nn.Sequential(nn.ReLU()),
        {},
        ValueError,
        "model: expected a Sequential " + SEAM.format("0 (ReLU)"),
    ),
    "sequential": (
        lambda: _with(decoder=nn.Sequential(Decoder())),
        {},
        ValueError,
        "model: expected a Network " + SEAM.format("encoder (Encoder), decoder (Sequential)"),
    ),
    "twice": (
        lambda: add_dca(network(), patch=3),
        {},
        ValueError,
        "model: expected a decoder without an attribute dca, got a DCA",
    ),
    "three_dimensions": (
        lambda: _with(encoder=nn.Conv3d(1, 8, 3)),
        {},
        ValueError,
        "model: expected a network on images (B, C, H, W), got one with a Conv3d",
    ),
    "no_convolution": (
        lambda: _with(encoder=nn.ReLU()),
        {},
        ValueError,
        "example: expected an input of the model, since its encoder has no convolution, got None",
    ),
    "reversed": (lambda: _Reversed(), {}, ValueError, MAPS + "[(1, 16, 32, 32), (1, 8, 64, 64), (1, 4, 128, 128)]"),
    "by_name": (lambda: _ByName(), {}, ValueError, MAPS + "[]"),
    "not_called": (
        lambda: _Alone(),
        {},
        ValueError,
        "model: expected a forward that calls the decoder, got one that does not",
    ),
    "no_skips": (
        lambda: _Bottleneck(),
        {},
        ValueError,
        "model: expected a decoder called with at least one skip, "
        "got maps of shapes [(1, 3, 256, 256), (1, 16, 32, 32)]",
    ),
    "features": (
        network,
        {"features": [1]},
        TypeError,
        "features: expected to be read off the model, got [1]",
    ),
    "example": (network, {"example": [1]}, TypeError, "example: expected a tensor (B, C, H, W) or None, got list"),
    "strides": (network, {"strides": [1]}, TypeError, "strides: expected to be read off the model, got [1]"),
    "patch": (network, {"patch": 0}, ValueError, "patch: expected integers of at least 1, got [0, 0]"),
    "heads": (
        network,
        {"spatial_head": [4, 3]},
        ValueError,
        "spatial_head[1]: expected a divisor of features[1] = 8 and of their sum 12, got 3",
    ),
}


@pytest.mark.parametrize("make, arguments, error, message", WITHOUT_SEAM.values(), ids=WITHOUT_SEAM)
def test_a_model_without_the_seam_stays(
    make: Callable[[], nn.Module], arguments: dict, error: type[Exception], message: str
) -> None:
    model = make()
    before = Snapshot(model)
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        add_dca(model, **arguments)
    before.assert_unchanged(model)


def test_an_added_dca_is_fused_already() -> None:
    (found,) = inspect(add_dca(network(), patch=3))
    assert (found.name, found.fused) == ("decoder.dca", True)
