"""Stage 4 of each backend: maps, buffers, and the gradients of tokens, maps, convolutions and BatchNorms."""

import pytest
import torch

from tests.oracle import Config, assert_all_within_budget, assert_same, both_modes, each_backend
from tests.stages.stage import CONFIGS, UPSAMPLE, draws, each_dtype, runs

SHAPES = CONFIGS | {"smaller_than_the_grid": Config((4, 8), (5, 3), sizes=((2, 7), (1, 1)))}


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
@both_modes
@each_backend
def test_upsample_is_the_references(config: Config, train: bool, backend: str) -> None:
    """BatchNorm takes the batch's statistics and updates its buffers, or takes them."""
    ours, theirs, _ = runs(UPSAMPLE, backend, config, torch.float64, train)
    assert_same(ours, theirs)


@both_modes
@each_dtype
@each_backend
def test_upsample_is_within_the_budget(train: bool, dtype: torch.dtype, backend: str) -> None:
    assert_all_within_budget(draws(UPSAMPLE, backend, dtype, train), dtype)
