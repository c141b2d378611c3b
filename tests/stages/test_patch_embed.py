"""Stage 1 of each backend: tokens, and the gradients of maps and projections."""

import pytest
import torch

from tests.oracle import Config, assert_all_within_budget, assert_same, both_modes, each_backend
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
