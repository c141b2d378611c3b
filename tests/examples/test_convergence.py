"""A U-Net trained with the fused DCA learns what it learns with the reference's: same seed, same crops, same optimizer.

In float64 the two loss curves are one, over a hundred steps: an error in a forward or a gradient would show. In float32
and bfloat16 rounding decides now and then on which side of a ReLU's or a pooling's kink a value is, and curves part.
The reference's curve in float64 is the measure there: the fused one may stray from it as far as the reference's does in
the same precision, times the factor of the error budget.
"""

import functools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import dca_kernels
from reference import unets
from reference.budget import MAX_RATIO
from tests.examples.nuclei import nuclei
from tests.oracle import INTERPRETED, device_of, needs_triton

pytestmark = pytest.mark.slow

TRAINING_COLUMNS = 288  # of the image's 512; the others are for validation
DICE = 0.03  # between two runs of one seed; those of one implementation in float32 and bfloat16 differ by 0.01
PRECISIONS = {"float64": torch.float64, "float32": torch.float32, "bfloat16_autocast": torch.float32}


@dataclass(frozen=True)
class Setup:
    """A network and how long it is trained, on crops of side x side; it is validated on `tiles` such crops."""

    steps: int
    side: int
    patch: int
    widths: tuple[int, ...]
    batch: int = 4
    tiles: int | None = None  # all that there are


SMALL = Setup(100, 32, 4, (4, 8, 16))
TINY = Setup(3, 16, 2, (4, 8, 16), batch=2, tiles=2)  # what the interpreter can do in some seconds
PAPER = Setup(200, 224, 28, (32, 64, 128, 256, 512))


@dataclass(frozen=True)
class Trained:
    """The loss of each step, and the trained network's answer on the crops of the image's right columns."""

    losses: Tensor  # (steps,)
    logits: Tensor  # (crops, 1, side, side)
    dice: float


@functools.cache  # the reference's runs serve several tests
def train(setup: Setup, implementation: str, device: str, precision: str, seed: int = 0) -> Trained:
    """Adam at a rate that rises and falls to zero; weights and crops hang on the seed only."""
    factory = functools.partial(dca_kernels.DCA, backend=implementation)
    torch.manual_seed(seed)
    net = unets.UNet(1, 1, implementation == "reference" or factory, setup.patch, setup.widths)
    dtype = PRECISIONS[precision]
    net.to(device, dtype)
    image, mask = (x.to(device, dtype) for x in nuclei())
    autocast = functools.partial(torch.autocast, device, torch.bfloat16, enabled=precision == "bfloat16_autocast")
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=setup.steps)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(setup.steps):
        pixels, target = crops(image, mask, setup, generator)
        with autocast():
            logits = net(pixels)
        loss = F.binary_cross_entropy_with_logits(logits.to(dtype), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    pixels, target = (cut(x[:, :, TRAINING_COLUMNS:], setup.side)[: setup.tiles] for x in (image, mask))
    net.eval()
    with torch.no_grad(), autocast():
        logits = net(pixels)
    found, wanted = logits > 0, target > 0
    dice = 2 * (found & wanted).sum() / (found.sum() + wanted.sum())
    return Trained(torch.stack(losses).cpu(), logits.cpu(), dice.item())


def crops(image: Tensor, mask: Tensor, setup: Setup, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two tensors (batch, 1, side, side) from random places in the training columns."""
    tops = torch.randint(image.shape[1] - setup.side, (setup.batch,), generator=generator).tolist()
    lefts = torch.randint(TRAINING_COLUMNS - setup.side, (setup.batch,), generator=generator).tolist()
    windows = [
        (slice(None), slice(t, t + setup.side), slice(left, left + setup.side))
        for t, left in zip(tops, lefts, strict=True)
    ]
    return torch.stack([image[w] for w in windows]), torch.stack([mask[w] for w in windows])


def cut(x: Tensor, side: int) -> Tensor:
    """(1, H, W) -> all its crops side by side, (crops, 1, side, side); what is left at the edges is not used."""
    return x.unfold(1, side, side).unfold(2, side, side).flatten(0, 2).unsqueeze(1)


def distance(one: Trained, other: Trained) -> float:
    """The largest difference of two loss curves, each of them the means of ten steps."""
    means = [run.losses.unflatten(0, (-1, 10)).mean(1) for run in (one, other)]
    return (means[0] - means[1]).abs().max().item()


def pair(setup: Setup, backend: str, precision: str, seed: int = 0) -> tuple[Trained, Trained]:
    """The fused module's run and the reference's. `pytest -rP` shows what is printed."""
    runs = [train(setup, name, device_of(backend), precision, seed) for name in (backend, "reference")]
    for name, run in zip((backend, "reference"), runs, strict=True):
        print(f"{name}, {precision}, {setup.steps} steps: loss {run.losses[-10:].mean():.4f}, Dice {run.dice:.4f}")
    return runs[0], runs[1]


on_gpu = [needs_triton, pytest.mark.skipif(INTERPRETED, reason="no GPU: hours for the interpreter")]


@pytest.mark.parametrize(
    ("backend", "setup"),
    [
        pytest.param("torch", SMALL, id="torch"),
        pytest.param("triton", TINY, id="triton_interpreted_3_steps", marks=[needs_triton])
        if INTERPRETED
        else pytest.param("triton", SMALL, id="triton_on_gpu", marks=[needs_triton]),
    ],
)
def test_float64_curves_are_one(backend: str, setup: Setup) -> None:
    fused, plain = pair(setup, backend, "float64")
    torch.testing.assert_close(fused.losses, plain.losses, rtol=0, atol=1e-9)
    torch.testing.assert_close(fused.logits, plain.logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("precision", "seeds"),
    [pytest.param("float32", (0, 1), id="float32"), pytest.param("bfloat16_autocast", (0,), id="bfloat16_autocast")],
)
@pytest.mark.parametrize(
    ("backend", "setup"),
    [
        pytest.param("torch", SMALL, id="torch"),
        pytest.param("triton", PAPER, id="triton_on_gpu_full_size", marks=on_gpu),
    ],
)
def test_curve_is_within_the_band_of_rounding(
    backend: str, setup: Setup, precision: str, seeds: tuple[int, ...]
) -> None:
    strayed, band = 0.0, 0.0
    for seed in seeds:
        fused, plain = pair(setup, backend, precision, seed)
        exact = train(setup, "reference", device_of(backend), "float64", seed)
        strayed += distance(fused, exact)
        band += distance(plain, exact)
        assert abs(fused.dice - plain.dice) < DICE
        assert min(fused.dice, plain.dice) > 0.85
    print(f"from float64: fused {strayed / len(seeds):.4f}, reference {band / len(seeds):.4f}")
    assert strayed <= MAX_RATIO * band
