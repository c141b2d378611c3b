"""DCAs of other maths or another layout: each is refused with a reason."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

import dca_kernels
from dca_kernels import inspect, replace_dca
from tests import vendored
from tests.swap.models import Snapshot, assert_refused, host, official


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
    number = r"\d\.\de[+-]\d\d"
    return rf"it computes something else: {kind} in {mode} differ from a DCA's by {number} of the largest \(.+\)"


HEADS = {"channel_head": [2, 2]}
VARIANTS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "parallel": (variant(vendored.Parallel), _other("outputs")),
    "exchanged_maps": (variant(vendored.with_attention(spatial=vendored.ExchangedMaps)), _other("outputs")),
    "scale_of_a_head": (variant(vendored.with_attention(vendored.ScaleOfHead), **HEADS), _other("outputs")),
    "detached_keys": (variant(vendored.with_attention(spatial=vendored.DetachedKeys)), _other("gradients")),
    "without_residual": (variant(vendored.WithoutResidual), _other("outputs")),
    "nearest": (change(lambda dca: setattr(dca.upconvs[0].up, "mode", "nearest")), r"a copy of it does not run: .+"),
    "not_aligned": (change(lambda dca: setattr(dca.upconvs[0].up, "align_corners", False)), _other("outputs")),
    "dropout": (
        change(_set_dropout),
        r"it draws random numbers in training \(aten::bernoulli_\.float\): it is another function each time",
    ),
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
    "layer_norm_and_more": (
        change(lambda dca: dca.attention[0].channel_norm.__setitem__(1, nn.Sequential(nn.LayerNorm(16), nn.GELU()))),
        r"it has another layout: attention\.0\.channel_norm\.1: expected LayerNorm.*, got a .*\.Sequential",
    ),
    "without_blocks": (
        change(lambda dca: setattr(dca, "attention", nn.ModuleList())),
        r"it has another layout: .+",
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
