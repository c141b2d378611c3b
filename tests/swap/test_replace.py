"""The fused module in models that exist: what is found and replaced, what is left as it was, errors and the report."""

import copy
import logging
import random
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import dca_kernels
import reference
from dca_kernels import add_dca, inspect, replace_dca, restore_dca
from tests import vendored
from tests.oracle import Config, Golden, assert_same, both_modes, evaluate, random_maps
from tests.swap.look_alikes import edited
from tests.swap.models import (
    FEATURES,
    IMAGE,
    PATCH,
    VENDORED,
    Host,
    Snapshot,
    assert_the_same_objects,
    host,
    official,
    tensors,
    tracing,
    trusting_replace_dca,
)

# What is replaced


def test_other_threads_draw_on_meanwhile() -> None:
    """Each of their numbers once, and all that a generator of their own would give."""
    model, done, drawn = host(), threading.Event(), []

    def draw() -> None:
        while not done.wait(1e-4):
            drawn.append((torch.rand(1).item(), random.random(), np.random.random()))

    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    thread = threading.Thread(target=draw)
    thread.start()
    try:
        inspect(model)
        replace_dca(model)
    finally:
        done.set()
        thread.join()
    draw_once = (torch.rand(1).item(), random.random(), np.random.random())
    generators = torch.Generator().manual_seed(3), random.Random(3), np.random.RandomState(3)
    expected = [
        (torch.rand(1, generator=generators[0]).item(), generators[1].random(), generators[2].random())
        for _ in range(len(drawn) + 1)
    ]
    assert [*drawn, draw_once] == expected and drawn


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


def _convolve_first(dca: nn.Module) -> None:
    for upconv in dca.upconvs:
        upconv.__class__ = vendored.ConvolvedFirst


def _tie(dca: nn.Module) -> None:
    first, second = dca.attention[0].s_attention
    first.q_map.proj.depthwise.weight = second.k_map.proj.depthwise.weight
    first.k_map = second.k_map


ORIGINALS: dict[str, Callable[[], nn.Module]] = {
    "vendored": official,
    "two_blocks_of_several_heads": lambda: official(n=2, channel_head=[2, 4], spatial_head=[8, 2]),
    "channel_only": lambda: official(spatial_att=False),
    "spatial_only": lambda: official(channel_att=False),
    "reference": lambda: reference.DCA(FEATURES, patch=PATCH),
    "oblong_grid": lambda: reference.DCA(FEATURES, patch=(3, 5)),
    "one_token": lambda: reference.DCA(FEATURES, patch=1),
    "layer_norms_in_sequentials": lambda: official(vendored.EarlyLayout, n=2),
    "relu_in_place": edited(lambda dca: [setattr(head[1], "inplace", True) for head in dca.bn_relu]),
    "leaky_relu": edited(lambda dca: [head.__setitem__(1, nn.LeakyReLU(0.2)) for head in dca.bn_relu]),
    "convolution_before_upsampling": edited(_convolve_first),
    "tied": edited(_tie),
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


def test_a_grid_that_is_a_number_in_the_code(caplog: pytest.LogCaptureFixture) -> None:
    original = official(vendored.GridOfTwelve, patch=12).double()
    config = Config(FEATURES, 12, sizes=((48, 48), (24, 24)))
    expected = evaluate(copy.deepcopy(original), random_maps(config))
    with caplog.at_level(logging.INFO, "dca_kernels"):
        fused = replace_dca(original)
    assert "not verified at a grid of 3 x 3 tokens" in caplog.text
    assert_same(evaluate(fused, random_maps(config)), expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: nn.Sequential(nn.SyncBatchNorm(c), nn.ReLU()),
        lambda c: nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.Dropout2d(0.5)),
        lambda c: nn.Sequential(nn.GroupNorm(2, c), nn.GELU()),
    ],
    ids=["sync_batch_norm", "dropout", "group_norm"],
)
def test_another_bn_relu_that_is_called_as_it_is(change: Callable[[int], nn.Module]) -> None:
    original = official()
    original.bn_relu = nn.ModuleList(change(c) for c in FEATURES)
    heads = original.bn_relu
    generator = torch.get_rng_state()
    fused = replace_dca(original)
    assert torch.equal(torch.get_rng_state(), generator)
    assert list(fused.bn_relu) == list(heads)


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


def test_one_that_cannot_be_replaced_keeps_the_others() -> None:
    model = nn.ModuleList([official(), official(seed=1)])
    refused = []
    for i in (1, 0):
        model[i].compile(backend="eager")
        refused.insert(0, rf"{i} \(DualCrossAttention\): it is compiled: replace it first, then compile")
        before = Snapshot(model)
        with pytest.raises(ValueError, match=f"^model: expected DCAs that can be replaced, got {'; '.join(refused)}$"):
            trusting_replace_dca(model)
        before.assert_unchanged(model)


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


class OnlyByName(nn.Module):
    """Of a DCA's children, and of none of its submodules."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("avg_map", "attention", "upconvs", "bn_relu"):
            setattr(self, name, nn.ModuleList([nn.ReLU()]))


def test_a_module_that_is_none_by_far_is_refused() -> None:
    (found,) = inspect(OnlyByName())
    assert found.reason.startswith("it has another layout: ")


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


@pytest.mark.slow
def test_a_grid_whose_attention_matrices_would_not_fit() -> None:
    original = official(patch=512)  # 2**18 tokens: a matrix would take 512 GB
    assert replace_dca(original).grid == (512, 512)


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
