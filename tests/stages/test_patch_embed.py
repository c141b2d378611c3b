"""Stage 1 of each backend: tokens, and the gradients of maps and projections."""

import pytest
import torch
from torch import Tensor

from dca_kernels import contract
from tests.oracle import (
    Config,
    assert_all_within_budget,
    assert_same,
    both_modes,
    build,
    device_of,
    each_backend,
    needs_triton,
)
from tests.stages.stage import CONFIGS, PATCH_EMBED, draws, each_dtype, runs

SHAPES = CONFIGS | {"fewer_pixels_than_windows": Config((4, 8), (5, 3), sizes=((2, 7), (1, 1)))}


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
@both_modes
@each_backend
def test_patch_embed_is_the_references(config: Config, train: bool, backend: str) -> None:
    """The kernels take a batch's statistics in the same pass, in training."""
    ours, theirs, _ = runs(PATCH_EMBED, backend, config, torch.float64, train)
    assert_same(ours, theirs)


@both_modes
@each_dtype
@each_backend
def test_patch_embed_is_within_the_budget(train: bool, dtype: torch.dtype, backend: str) -> None:
    assert_all_within_budget(draws(PATCH_EMBED, backend, dtype, train), dtype)


def interpolation(high: int, low: int) -> Tensor:
    """The matrix U (high, low), align_corners=True, in float64."""
    position = torch.arange(high).double() * (low - 1) / (high - 1)
    return (1 - (position[:, None] - torch.arange(low)).abs()).clamp(min=0)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_the_transposed_interpolation_is_rounded_once(dtype: torch.dtype) -> None:
    """By products of 16 bit whose weights have two parts: with one, it is up to 0.7 units in the last place off."""
    from dca_kernels.triton_backend import patch_embed

    config = Config((4, 8), (3, 5), sizes=((19, 23), (11, 9)), batch=2)
    dca = build("triton", **config.arguments).to(device_of("triton"), dtype).train()
    torch.manual_seed(0)
    maps = [
        1 + torch.rand(config.batch, c, *size).to(device_of("triton"), dtype)
        for c, size in zip(config.features, config.sizes, strict=True)
    ]
    for x in maps:
        x[..., 0, 0] = 0  # what is taken off
    its = contract.read(dca, [head[0] for head in dca.bn_relu], dtype, [dtype] * len(maps))
    _, embedded = patch_embed.patch_embed(maps, its)
    transposed = embedded.moments.transposed.unflatten(1, config.patch).split(config.features, -1)
    for x, found in zip(maps, transposed, strict=True):
        (height, width), (rows, columns) = x.shape[2:], config.patch
        exact = torch.einsum(
            "hp,bchw,wq->bpqc", interpolation(height, rows), x.cpu().double(), interpolation(width, columns)
        ) * (rows * columns / (height * width))
        ulp = torch.finfo(dtype).eps * 2.0 ** (torch.frexp(exact).exponent - 1)
        assert ((found.cpu().double() - exact).abs() / ulp).max() < 0.51
