"""Stage 4 of each backend: maps, buffers, and the gradients of tokens, maps, convolutions and BatchNorms."""

import pytest
import torch

from tests.oracle import Config, assert_all_within_budget, assert_same, both_modes, each_backend, needs_triton
from tests.stages.stage import CONFIGS, ROWS, UPSAMPLE, draws, each_dtype, each_kind_of_windows, runs

SHAPES = CONFIGS | ROWS | {"smaller_than_the_grid": Config((4, 8), (5, 3), sizes=((2, 7), (1, 1)))}


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
@both_modes
@each_backend
def test_upsample_is_the_references(config: Config, train: bool, backend: str) -> None:
    """BatchNorm takes the batch's statistics and updates its buffers, or takes them."""
    ours, theirs, _ = runs(UPSAMPLE, backend, config, torch.float64, train)
    assert_same(ours, theirs)


@each_kind_of_windows
@both_modes
@each_dtype
@each_backend
def test_upsample_is_within_the_budget(config: Config, train: bool, dtype: torch.dtype, backend: str) -> None:
    assert_all_within_budget(draws(UPSAMPLE, backend, dtype, train, config), dtype)


BY_ROWS = {
    "alike": ((16, 48), True),
    "any_height": ((20, 6), True),
    "one_pixel": ((4, 6), True),
    "three_wide": ((16, 18), False),
    "unequal_widths": ((16, 47), False),
    "unequal_heights": ((15, 48), False),
    "fewer_pixels_than_windows": ((2, 6), False),
    "empty": ((4, 0), False),
    "as_high_as_may_be": ((64, 6), True),
    "too_high": ((68, 6), False),
    "as_wide_as_may_be": ((4, 384), True),
    "too_wide": ((4, 768), False),
}


@needs_triton
@pytest.mark.parametrize(("size", "expected"), BY_ROWS.values(), ids=BY_ROWS)
def test_maps_that_are_taken_by_rows(size: tuple[int, int], expected: bool) -> None:
    from dca_kernels.triton_backend.layout import taken_by_rows

    alike, x = torch.empty(2, 3, 8, 12), torch.empty(2, 3, *size)
    assert taken_by_rows([x, alike], (4, 6)) == taken_by_rows([alike, x], (4, 6)) == expected
    assert not taken_by_rows([x.mT.contiguous().mT, alike], (4, 6))
