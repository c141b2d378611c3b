"""The hosts with the official networks' checkpoints: the same numbers, or an error that says what does not fit."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dca_kernels
from reference import unets
from reference.unets import load_official
from reference.unets.official import in_host_order
from tests.oracle import Results, assert_same, randomise
from tests.swap.models import Snapshot
from tests.swap.official import NETWORKS

SIZE, GRID, CLASSES = (16, 32), (2, 4), 2
NARROW = (4, 8, 8, 16, 16)  # of a U-Net

each_host = pytest.mark.parametrize("name", NETWORKS)


def build(name: str, dca: Any, **kwargs) -> nn.Module:
    return getattr(unets, name)(out_channels=CLASSES, dca=dca, patch=GRID, **kwargs)


def official(name: str, attention: bool, **kwargs) -> nn.Module:
    """With weights and buffers that no default hides."""
    with torch.device("meta"):
        network = NETWORKS[name](attention, GRID, CLASSES, **kwargs)
    network = network.to_empty(device="cpu")
    randomise(network, seed=0)
    return network


@torch.no_grad()
def evaluate(network: nn.Module) -> Results:
    """Logits in training and then, by the buffers that this leaves, in evaluation."""
    image = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    network.double()
    results = {"train": network.train()(image), "eval": network.eval()(image)}
    assert all(logits.isfinite().all() and logits.std() > 0 for logits in results.values())
    return results


@pytest.mark.parametrize("attention", [False, True], ids=["no_dca", "dca"])
@each_host
def test_hosts_compute_what_the_official_networks_do(name: str, attention: bool) -> None:
    kwargs = {"normed": True} if (name, attention) == ("UNet", False) else {}
    theirs, ours = official(name, attention, **kwargs), build(name, attention)
    with warnings.catch_warnings():
        if not attention and name in ("UNet", "DoubleUNet"):
            warnings.simplefilter("ignore", UserWarning)
        load_official(ours, theirs.state_dict())
    assert_same(evaluate(ours), evaluate(theirs))


@each_host
def test_fused_and_reference_are_loaded_in_the_same_order(name: str) -> None:
    with torch.device("meta"):
        fused, plain = (list(build(name, dca).state_dict()) for dca in (dca_kernels.DCA, True))
    assert fused == plain


@each_host
def test_names_may_have_a_prefix(name: str) -> None:
    """As those of DataParallel have."""
    with torch.device("meta"):
        keys = list(NETWORKS[name](True, GRID, CLASSES).state_dict())
    assert in_host_order(f"module.{key}" for key in keys) == [f"module.{key}" for key in in_host_order(keys)]


@pytest.mark.parametrize("name", ["UNet", "DoubleUNet"])
def test_other_skip_maps_without_dca_are_said(name: str) -> None:
    with torch.device("meta"):
        theirs, ours = NETWORKS[name](False, GRID, CLASSES), build(name, False)
    with pytest.warns(UserWarning, match=f"{name} without DCA gives its decoder the skip maps after their last norm"):
        load_official(ours, theirs.state_dict())


def without(key: str) -> Callable[[dict[str, Tensor]], dict[str, Any]]:
    return lambda state: {name: tensor for name, tensor in state.items() if name != key}


REFUSED = {
    "no DCA": (
        lambda state: {key: tensor for key, tensor in state.items() if not key.startswith("DCA.")},
        r"expected 'dca.avg_map.0.proj.depthwise.weight' of shape \(4, 1, 1, 1\) of UNet, "
        r"got 'up1.conv.conv.weight' of shape \(16, 16, 3, 3\)",
    ),
    "other classes": (
        lambda state: state | {"out.conv.weight": torch.zeros(3, 4, 1, 1)},
        r"expected 'head.weight' of shape \(2, 4, 1, 1\) of UNet, got 'out.conv.weight' of shape \(3, 4, 1, 1\)",
    ),
    "one too few": (
        without("out.conv.bias"),
        r"expected 'head.bias' of shape \(2,\) of UNet, got no further tensor",
    ),
    "one too many": (
        lambda state: state | {"more": torch.zeros(1)},
        r"expected no further tensor of UNet, got 'more' of shape \(1,\)",
    ),
    "one of many of this shape too few": (
        without("norm1.running_mean"),
        r"expected 'levels.0.head.0.running_mean' of shape \(4,\) of UNet, got 'norm1.running_var' of shape \(4,\)",
    ),
    "complex numbers": (
        lambda state: state | {"out.conv.bias": torch.zeros(2, dtype=torch.complex64)},
        r"expected 'head.bias' of shape \(2,\) of UNet, got 'out.conv.bias' of shape \(2,\) of complex64",
    ),
    "quantized": (
        lambda state: state | {"out.conv.bias": torch.zeros(2, dtype=torch.int8)},
        r"expected 'head.bias' of shape \(2,\) of UNet, got 'out.conv.bias' of shape \(2,\) of int8",
    ),
    "without values": (
        lambda state: state | {"out.conv.bias": torch.zeros(2, device="meta")},
        "expected dense tensors with values, got 'out.conv.bias', which is on the meta device",
    ),
    "sparse": (
        lambda state: state | {"out.conv.bias": torch.zeros(2).to_sparse()},
        "expected dense tensors with values, got 'out.conv.bias', which is torch.sparse_coo",
    ),
    "numbers for names": (lambda state: dict(enumerate(state.values())), "expected tensors, got Tensor at 0"),
    "the trainer's whole file": (
        lambda state: {"epoch": 3, "model_state_dict": state},
        "expected tensors, got int at 'epoch'; the official trainer keeps the weights under 'model_state_dict'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str) -> None:
    damage, message = REFUSED[case]
    host, state = build("UNet", True, widths=NARROW), official("UNet", True, widths=NARROW).state_dict()
    before = Snapshot(host)
    with pytest.raises(ValueError, match=f"state_dict: {message}"):
        load_official(host, damage(state))
    before.assert_unchanged(host)


def test_a_list_is_no_state() -> None:
    with pytest.raises(TypeError, match=r"^state_dict: expected tensors by their names, got list$"):
        load_official(build("UNet", True, widths=NARROW), [])


@each_host
def test_another_order_is_refused(name: str) -> None:
    """As in a file whose names are sorted."""
    with torch.device("meta"):
        state, host = NETWORKS[name](True, GRID, CLASSES).state_dict(), build(name, True)
    with pytest.raises(ValueError, match="state_dict: expected"):
        load_official(host, dict(sorted(state.items())))


@pytest.mark.parametrize(
    ("name", "extra"), [("R2UNet", "rconv1.more.weight"), ("MultiResUNet", "respath1.bns.4.weight")]
)
def test_an_unknown_part_of_a_block_is_refused(name: str, extra: str) -> None:
    with torch.device("meta"):
        state, host = NETWORKS[name](True, GRID, CLASSES).state_dict(), build(name, True)
    with pytest.raises(ValueError, match=rf"state_dict: expected .*, got '{extra}' of shape \(7,\)"):
        load_official(host, state | {extra: torch.zeros(7)})
