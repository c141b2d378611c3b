"""The six hosts: their sizes, what they give, and that reference and fused DCA are the same in them."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dca_kernels
import reference
from reference import unets
from tests.oracle import Results, assert_same, randomise

pytestmark = pytest.mark.slow

# Parameters of the official networks for three colours and one class, without and with DCA. That of DoubleUNet cannot
# run: its numbers are those of the layers that its code lists.
PARAMETERS = {
    "UNet": (8_637_345, 8_747_905),
    "VNet": (35_970_106, 36_080_666),
    "R2UNet": (9_781_729, 9_892_289),
    "ResUNetPP": (13_090_980, 13_121_668),
    "DoubleUNet": (29_683_556, 30_584_516),
    "MultiResUNet": (7_244_070, 7_354_630),
}
# The official networks hold these and do not use them: without and with DCA.
UNUSED = {"VNet": (["levels.0.residual"], []), "MultiResUNet": ([], [f"levels.{i}.head" for i in range(4)])}
# The side of the image over that of the token grid, and the scales of each DCA.
STRIDES = {"ResUNetPP": 4}
FEATURES = {
    "ResUNetPP": [(32, 64, 128)],
    "DoubleUNet": [(64, 128, 256, 512), (64, 128, 256, 512), (32, 64, 128, 256)],
}
SIZE = (16, 32)
SLIDE = Path(__file__).parents[2] / "benchmarks" / "slide.npy"
ATTENTION = {"no_dca": False, "reference": True, "fused": functools.partial(dca_kernels.DCA, backend="torch")}

each_host = pytest.mark.parametrize("name", PARAMETERS)


def build(name: str, attention: str, **kwargs) -> nn.Module:
    stride = STRIDES.get(name, 8)
    torch.manual_seed(0)
    return getattr(unets, name)(dca=ATTENTION[attention], patch=(SIZE[0] // stride, SIZE[1] // stride), **kwargs)


def test_every_host_is_tested() -> None:
    assert tuple(PARAMETERS) == unets.HOSTS


@each_host
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        hosts = [getattr(unets, name)(dca=dca) for dca in (False, True)]
    assert tuple(sum(p.numel() for p in host.parameters()) for host in hosts) == PARAMETERS[name]


@each_host
def test_factory_is_called_as_dca_is(name: str) -> None:
    calls = []

    def factory(features, strides, patch):
        calls.append((tuple(features), tuple(strides), patch))
        return reference.DCA(features, strides, patch)

    getattr(unets, name)(dca=factory)
    strides = (4, 2, 1) if name == "ResUNetPP" else (8, 4, 2, 1)
    patch = 224 // strides[0]
    assert calls == [(features, strides, patch) for features in FEATURES.get(name, [(32, 64, 128, 256)])]


@pytest.mark.parametrize("attention", ATTENTION)
@each_host
def test_shapes_and_gradients(name: str, attention: str) -> None:
    host = build(name, attention, out_channels=2)
    image = torch.rand(2, 3, *SIZE, requires_grad=True)
    logits = host(image)
    assert logits.shape == (2, 2, *SIZE)
    logits.backward(torch.randn_like(logits))
    assert image.grad.isfinite().all() and image.grad.any()
    unused = UNUSED.get(name, ([], []))[attention != "no_dca"]
    without = {key.rpartition(".")[0] for key, p in host.named_parameters() if p.grad is None}
    assert all(any(module.startswith(prefix) for prefix in unused) for module in without), without
    assert all(any(module.startswith(prefix) for module in without) for prefix in unused), without
    assert all(p.grad.isfinite().all() for p in host.parameters() if p.grad is not None)


@each_host
def test_sizes_and_colours_that_the_grid_does_not_fit(name: str) -> None:
    host = build(name, "reference", in_channels=1).eval()
    with torch.no_grad():
        assert host(torch.rand(1, 1, 48, 16)).shape == (1, 1, 48, 16)


def test_doubleunet_takes_one_or_three_colours() -> None:
    with pytest.raises(ValueError, match="in_channels: expected 1 or 3, got 4"):
        unets.DoubleUNet(in_channels=4)


@each_host
def test_skip_maps_of_dca_are_before_the_last_norm(name: str) -> None:
    """DCA ends with norm and activation: a map that had been through a ReLU before would have no negative values."""
    host = build(name, "reference").eval()
    maps = []
    for module in host.modules():
        if isinstance(module, reference.DCA):
            module.register_forward_pre_hook(lambda module, args: maps.append(args[0]))
    with torch.no_grad():
        host(torch.rand(1, 3, *SIZE))
    of_raw = maps[:1] + maps[2:] if name == "DoubleUNet" else maps  # its second DCA takes what the first gives
    assert len(maps) == len(FEATURES.get(name, [()]))
    assert all((x < 0).any() for raw in of_raw for x in raw)


@each_host
def test_fused_and_reference_are_the_same(name: str) -> None:
    theirs = build(name, "reference").double()
    for seed, module in enumerate(m for m in theirs.modules() if isinstance(m, reference.DCA)):
        randomise(module, seed)
    ours = build(name, "fused").double()
    ours.load_state_dict(theirs.state_dict())
    assert_same(*(evaluate(host) for host in (ours, theirs)))


def evaluate(host: nn.Module) -> Results:
    """One forward and backward from a random upstream gradient in train mode, then a forward in eval mode."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand((2, 3, *SIZE), generator=generator, dtype=torch.float64).requires_grad_()
    logits = host.train()(image)
    logits.backward(torch.randn(logits.shape, generator=generator, dtype=torch.float64))
    results = {"output": logits.detach(), "grad_input": image.grad}
    for name, p in host.named_parameters():
        if p.grad is not None:
            results[f"grad.{name}"] = p.grad.flatten()[:: 1 + p.numel() // 100_000]  # of large ones some values
    results |= {f"after.{name}": b for name, b in host.named_buffers()}
    with torch.no_grad():
        return results | {"output_in_eval": host.eval()(image)}


@each_host
def test_loss_falls_on_a_real_image(name: str) -> None:
    """Tiles of a tissue slide; what is to be found is whatever is darker than half of the pixels."""
    slide = torch.from_numpy(np.load(SLIDE)).permute(2, 0, 1).float() / 255  # (3, 256, 256)
    tiles = torch.stack([slide[:, : SIZE[0], left : left + SIZE[1]] for left in (0, 256 - SIZE[1])])
    grey = tiles.mean(1, keepdim=True)
    target = (grey < grey.median()).float()
    host = build(name, "fused")
    optimizer = torch.optim.Adam(host.parameters(), lr=3e-3)
    losses = [step(host, optimizer, tiles, target) for _ in range(5)]
    assert losses[-1] < 0.9 * losses[0], losses


def step(host: nn.Module, optimizer: torch.optim.Optimizer, image: Tensor, target: Tensor) -> float:
    optimizer.zero_grad()
    loss = F.binary_cross_entropy_with_logits(host(image), target)
    loss.backward()
    optimizer.step()
    return loss.item()
