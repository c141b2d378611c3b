"""Stage 2 of each backend: tokens, and the gradients of tokens, LayerNorms and projections."""

from dataclasses import replace

import pytest
import torch

from tests.oracle import Config, assert_all_within_budget, assert_same, both_modes, each_backend
from tests.stages.stage import CHANNEL_ATTENTION, CONFIGS, RAGGED, draws, each_dtype, runs

SHAPES = CONFIGS | {"last_before_the_upsampling": replace(RAGGED, spatial_att=False)}


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
@both_modes
@each_backend
def test_channel_attention_is_the_references(config: Config, train: bool, backend: str) -> None:
    """The last attention leaves out gradients that are zero in training."""
    ours, theirs, _ = runs(CHANNEL_ATTENTION, backend, config, torch.float64, train)
    assert_same(ours, theirs)


@each_dtype
@each_backend
def test_channel_attention_is_within_the_budget(dtype: torch.dtype, backend: str) -> None:
    assert_all_within_budget(draws(CHANNEL_ATTENTION, backend, dtype), dtype)
