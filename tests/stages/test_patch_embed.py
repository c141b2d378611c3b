"""Stage 1 of each backend: tokens, and the gradients of maps and projections."""

import pytest
import torch
from torch import Tensor

from dca_kernels import contract
from tests.oracle import (
    LAYOUTS,
    Config,
    assert_all_within_budget,
    assert_same,
    both_modes,
    build,
    device_of,
    each_backend,
    needs_triton,
)
from tests.stages.stage import CONFIGS, PATCH_EMBED, ROWS, draws, each_dtype, each_kind_of_windows, runs

SHAPES = CONFIGS | ROWS | {"fewer_pixels_than_windows": Config((4, 8), (5, 3), sizes=((2, 7), (1, 1)))}

# One token has more channels than a program by rows otherwise takes at once.
MOMENTS = ROWS | {
    "many_channels": Config((2100,), (1, 1), channel_att=False, spatial_att=False, sizes=((2, 1),), batch=1)
}


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
@both_modes
@each_backend
def test_patch_embed_is_the_references(config: Config, train: bool, backend: str) -> None:
    """The kernels take a batch's statistics in the same pass, in training."""
    ours, theirs, _ = runs(PATCH_EMBED, backend, config, torch.float64, train)
    assert_same(ours, theirs)


@each_kind_of_windows
@both_modes
@each_dtype
@each_backend
def test_patch_embed_is_within_the_budget(config: Config, train: bool, dtype: torch.dtype, backend: str) -> None:
    assert_all_within_budget(draws(PATCH_EMBED, backend, dtype, train, config), dtype)


def interpolation(high: int, low: int) -> Tensor:
    """The matrix U (high, low), align_corners=True, in float64."""
    position = torch.arange(high).double() * (low - 1) / max(high - 1, 1)
    return (1 - (position[:, None] - torch.arange(low)).abs()).clamp(min=0)


def transposed_interpolation(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Of a map (B, C, H, W), over the pixels of a token, in float64: (B, P_h, P_w, C)."""
    (height, width), (rows, columns) = x.shape[2:], grid
    transposed = torch.einsum(
        "hp,bchw,wq->bpqc", interpolation(height, rows), x.cpu().double(), interpolation(width, columns)
    )
    return transposed * (rows * columns / (height * width))


def three_pixels(x: Tensor) -> list[Tensor]:
    """Of each image and channel of a map, (B, C, 1, 1): the kernels take their median off."""
    height, width = x.shape[2:]
    places = [(k * height // 4, k * width // 4) for k in (1, 2, 3)]
    return [x[..., h : h + 1, w : w + 1] for h, w in places]


@needs_triton
@pytest.mark.parametrize("by_rows", [True, False], ids=["by_rows", "any_windows"])
@pytest.mark.parametrize("config", MOMENTS.values(), ids=MOMENTS)
def test_moments_are_those_of_the_maps(config: Config, by_rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both kernels, where the faster one takes the maps: one has a pixel of these far off."""
    from dca_kernels.triton_backend import patch_embed

    if not by_rows:
        monkeypatch.setattr(patch_embed, "taken_by_rows", lambda *its: False)
    dca = build("triton", **config.arguments).to(device_of("triton"), torch.float64).train()
    torch.manual_seed(0)
    maps = [
        torch.randn(config.batch, c, *size).to(device_of("triton"), torch.float64)
        for c, size in zip(config.features, config.sizes, strict=True)
    ]
    three_pixels(maps[0])[0].fill_(100)
    if not by_rows:
        maps[-1] = maps[-1].contiguous(memory_format=torch.channels_last)
    its = contract.read(dca, [head[0] for head in dca.bn_relu], torch.float64, [torch.float64] * len(maps))
    _, (_, moments, block) = patch_embed.patch_embed(maps, its)
    parts = moments.less_origin.transposed.cpu().unflatten(2, config.patch).split(config.features, -1)
    blocks = moments.blocks.cpu().split(config.features, -1)
    origins = moments.less_origin.origins.cpu().split(config.features, -1)
    assert len(parts[0][0]) == (3 if by_rows else 1) and (block == (1, config.patch[1]) or not by_rows)
    for x, found, its_blocks, origin in zip(maps, parts, blocks, origins, strict=True):
        median = torch.stack(three_pixels(x.cpu())).median(0).values
        assert torch.equal(origin, median[..., 0, 0])
        apart = x.cpu() - median
        whole = found[:, 0].clone()
        if by_rows and x.shape[2] != config.patch[0]:
            whole[:, 1:] += found[:, 1, :-1]
            whole[:, :-1] += found[:, 2, 1:]
        torch.testing.assert_close(whole, transposed_interpolation(apart, config.patch), rtol=1e-12, atol=1e-12)
        if by_rows:
            rows = apart.unflatten(2, (config.patch[0], -1))
            mean = rows.mean((3, 4))
            squares = (rows - mean[..., None, None]).square().sum((3, 4))
            expected = torch.stack((mean.mT, squares.mT), 2)
            torch.testing.assert_close(its_blocks, expected, rtol=1e-12, atol=1e-12)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_the_transposed_interpolation_is_rounded_once(dtype: torch.dtype) -> None:
    """By products of 16 bit whose weights have two parts: with one, it is up to 0.7 units in the last place off."""
    from dca_kernels.triton_backend import patch_embed

    # Of 132 channels, a product has one row of the map at a time.
    config = Config((4, 8, 132), (3, 5), sizes=((19, 23), (11, 9), (4, 6)), batch=2)
    dca = build("triton", **config.arguments).to(device_of("triton"), dtype).train()
    torch.manual_seed(0)
    maps = [
        1 + torch.rand(config.batch, c, *size).to(device_of("triton"), dtype)
        for c, size in zip(config.features, config.sizes, strict=True)
    ]
    maps = [LAYOUTS["sliced"](maps[0]), LAYOUTS["channels_last"](maps[1]), maps[2]]
    for x in maps:
        for pixel in three_pixels(x):
            pixel.zero_()  # what is taken off
    its = contract.read(dca, [head[0] for head in dca.bn_relu], dtype, [dtype] * len(maps))
    _, embedded = patch_embed.patch_embed(maps, its)
    transposed = embedded.moments.less_origin.transposed.squeeze(1).unflatten(1, config.patch)
    for x, found in zip(maps, transposed.split(config.features, -1), strict=True):
        exact = transposed_interpolation(x, config.patch)
        ulp = torch.finfo(dtype).eps * 2.0 ** (torch.frexp(exact).exponent - 1)
        assert ((found.cpu().double() - exact).abs() / ulp).max() < 0.51


@needs_triton
@pytest.mark.parametrize("by_rows", [True, False], ids=["by_rows", "any_windows"])
def test_means_of_blocks_are_rounded_once(by_rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean is corrected by the mean of what it leaves: without, it is up to some units in the last place off."""
    from dca_kernels.triton_backend import patch_embed

    if not by_rows:
        monkeypatch.setattr(patch_embed, "taken_by_rows", lambda *its: False)
    config = Config((8,), (2, 24), sizes=((2, 48),), batch=4)
    dca = build("triton", **config.arguments).to(device_of("triton"), torch.float32).train()
    torch.manual_seed(0)
    (x,) = maps = [1 + torch.rand(config.batch, 8, 2, 48).to(device_of("triton"))]
    for pixel in three_pixels(x):
        pixel.zero_()  # what is taken off
    its = contract.read(dca, [head[0] for head in dca.bn_relu], torch.float32, [torch.float32])
    _, (_, moments, (rows, columns)) = patch_embed.patch_embed(maps, its)
    pixels = x.cpu().double().unflatten(3, (-1, 2 * columns)).unflatten(2, (-1, rows))
    exact = pixels.mean((3, 5)).flatten(2).mT
    found = moments.blocks[:, :, 0].cpu().double()
    ulp = torch.finfo(torch.float32).eps * 2.0 ** (torch.frexp(exact).exponent - 1)
    assert ((found - exact).abs() / ulp).max() < 0.8
