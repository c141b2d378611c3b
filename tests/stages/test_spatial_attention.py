"""Stage 3 of each backend: tokens, and the gradients of tokens, LayerNorms and projections."""

import pytest
import torch

from tests.oracle import Config, assert_all_within_budget, assert_same, both_modes, each_backend
from tests.stages.stage import CONFIGS, SPATIAL_ATTENTION, draws, each_dtype, runs

SHAPES = CONFIGS | {"one_token": Config((4, 8), 1, sizes=((3, 2), (1, 1)))}


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
@both_modes
@each_backend
def test_spatial_attention_is_the_references(config: Config, train: bool, backend: str) -> None:
    """The last attention leaves out gradients that are zero in training."""
    ours, theirs, _ = runs(SPATIAL_ATTENTION, backend, config, torch.float64, train)
    assert_same(ours, theirs)


@each_dtype
@each_backend
def test_spatial_attention_is_within_the_budget(dtype: torch.dtype, backend: str) -> None:
    assert_all_within_budget(draws(SPATIAL_ATTENTION, backend, dtype), dtype)
