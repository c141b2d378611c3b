"""Properties of any module, of drawn shapes. Without hypothesis, which draws them, they are not run."""

import functools
import os
from contextlib import nullcontext

import pytest

from tests.oracle import (
    INTERPRETED,
    LAYOUTS,
    TRAINABLE,
    Config,
    assert_parity,
    assert_same,
    evaluate,
    needs_triton,
    pair,
    random_maps,
    resized_blocks,
)

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.slow

MOST = int(os.environ.get("DCA_TEST_EXAMPLES", "1000"))  # each is compiled anew on a GPU

forward = functools.partial(evaluate, backward=False)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    scales = draw(st.integers(1, 4))
    heads = st.sampled_from([1, 2, 4])
    several = {"min_size": scales, "max_size": scales}
    side = st.integers(1, 9)
    return Config(
        features=draw(st.lists(st.sampled_from([4, 8, 12]), **several)),
        patch=draw(st.tuples(st.integers(1, 5), st.integers(1, 5))),
        channel_att=draw(st.booleans()),
        spatial_att=draw(st.booleans()),
        n=draw(st.integers(1, 3)),
        channel_head=draw(st.lists(heads, **several)),
        spatial_head=draw(st.lists(heads, **several)),
        sizes=draw(st.lists(st.tuples(side, side), **several)),
        batch=draw(st.integers(2, 3)),
    )


@settings(derandomize=True, max_examples=min(MOST, 40), deadline=None)
@given(config=configs(), train=st.booleans(), backend=st.sampled_from(TRAINABLE), seed=st.integers(0, 100))
def test_parity_of_any_module(config: Config, train: bool, backend: str, seed: int) -> None:
    assert_parity(config, backend, train, seed)


@st.composite
def kernel_configs(draw: st.DrawFn) -> Config:
    scales = draw(st.integers(1, 3))
    several = {"min_size": scales, "max_size": scales}
    unit = draw(st.sampled_from([1, 2, 3, 4]))
    heads = st.sampled_from([h for h in (1, 2, 3, 4) if unit % h == 0])
    side = st.integers(1, 11)
    return Config(
        features=draw(st.lists(st.integers(1, 6).map(lambda k: k * unit), **several)),
        patch=draw(st.tuples(st.integers(1, 4), st.integers(1, 6))),
        channel_att=draw(st.booleans()),
        spatial_att=draw(st.booleans()),
        n=draw(st.integers(1, 3)),
        channel_head=draw(st.lists(heads, **several)),
        spatial_head=draw(st.lists(heads, **several)),
        sizes=draw(st.lists(st.tuples(side, side), **several)),
        batch=draw(st.integers(0, 3)),
    )


@needs_triton
@settings(derandomize=True, max_examples=min(MOST, 25 if INTERPRETED else 200), deadline=None)
@given(data=st.data(), config=kernel_configs(), train=st.booleans(), small=st.booleans(), seed=st.integers(0, 100))
def test_any_module(data: st.DataObject, config: Config, train: bool, small: bool, seed: int) -> None:
    train &= all(config.batch * h * w != 1 for h, w in config.sizes)
    layouts = st.sampled_from([layout for name, layout in LAYOUTS.items() if not name.startswith("expanded")])
    modules = pair(config, "triton", train=train, seed=seed)
    maps = [data.draw(layouts)(x) for x in random_maps(config, seed=seed, backend="triton")]
    with resized_blocks(0) if small else nullcontext():
        assert_same(*(forward(m, maps) for m in modules))
