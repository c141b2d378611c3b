"""Any call of any module (tests/strategies.py), the same ones every time: `python -m tests.fuzz` draws others."""

import os
from collections.abc import Sequence
from dataclasses import replace

import pytest
from torch import Tensor, nn

import dca_kernels
from tests.oracle import INTERPRETED, Config, Results, each_backend, needs_triton, not_finite

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import HealthCheck, Phase, given, settings

from tests import strategies
from tests.strategies import LARGEST, PLAIN, Call, Norm, calls, check, check_that_nothing_is_left

MOST = int(os.environ.get("DCA_TEST_EXAMPLES", "1000"))  # each is compiled anew on a GPU
EXAMPLES = {"torch": 40, "triton": 5 if INTERPRETED else 100}


def test_key_scores_far_apart() -> None:
    """The sums of the torch backend's backward overflowed where a key's own score is far below another's."""
    sizes, plain = ((8, 23), (19, 2), (19, 17)), (PLAIN, PLAIN, PLAIN)
    config = Config((3, 18, 6), (5, 1), channel_head=(1, 1, 3), spatial_head=(1, 1, 1), sizes=sizes, batch=3)
    check(Call(config, "float16", False, (Norm(), Norm(), Norm()), "large_affine", plain, plain, seed=16101), "torch")


@each_backend
def test_a_gradient_that_cancels(backend: str) -> None:
    """Equal upstream gradients of equal pixels: the maps' are exactly zero, and the order of sums is not."""
    config, rows = Config((4,), (1, 1), spatial_att=False, sizes=((9, 1),), batch=1), ("expanded_rows",)
    check(Call(config, "bfloat16", True, (Norm(),), "random", rows, rows), backend)


def test_an_upstream_gradient_that_images_share_is_off_the_kink_of_each() -> None:
    """It was cut off by the first image's alone: one pixel of the second made 209 budgets."""
    sizes, layouts = ((24, 1), (20, 21)), ("expanded_batch", PLAIN)
    config = Config((15, 13), (4, 6), n=2, channel_head=(1, 1), spatial_head=(1, 1), sizes=sizes, batch=3)
    norms = Norm(False, False), Norm()
    check(Call(config, "float32", False, norms, "quiet", (PLAIN, PLAIN), layouts, seed=252), "torch")


@needs_triton
def test_shares_beyond_float16() -> None:
    """The scores of the kernels' backward are too far apart for one exponential in float16, not in other dtypes."""
    config, plain = Config((8, 8), (2, 3), channel_att=False, sizes=((8, 6), (4, 6))), (PLAIN, PLAIN)
    check(Call(config, "float16", True, (Norm(), Norm()), "raised_affine", plain, plain, seed=1), "triton")


@pytest.mark.parametrize("seed", [2313933, 2313951], ids=["reference_overflows", "exact_is_46000"])
@not_finite
@needs_triton
def test_gradients_near_the_largest_of_float16(seed: int) -> None:
    """What is not finite was near 65,504, between two blocks or in a gradient: nothing says that it is wrong."""
    config = Config((12,), (5, 4), channel_att=False, n=3, spatial_head=(1,), sizes=((6, 10),), batch=1)
    call = Call(config, "float16", False, (Norm(),), "large_affine", (PLAIN,), (PLAIN,), seed=seed)
    check(call, "triton")


def test_float64_is_decided_by_several_draws() -> None:
    """Of large scores, two orders of sums differ by more than nudging shows, in one draw of some."""
    heads, plain = (1, 1, 1), (PLAIN, PLAIN, PLAIN)
    sizes = ((1, 10), (12, 1), (9, 1))
    config = Config((5, 4, 3), (2, 1), channel_att=False, channel_head=heads, spatial_head=heads, sizes=sizes, batch=1)
    check(Call(config, "float64", True, (Norm(), Norm(), Norm()), "large_affine", plain, plain, seed=112), "torch")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_defect_in_the_mean_of_the_draws(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that is wrong by a little, each time, is found; and so is a counter."""
    config = Config((4,), (2, 2), sizes=((4, 6),))
    call = Call(config, dtype, True, (Norm(),), "random", (PLAIN,), (PLAIN,))
    evaluate = strategies._evaluate

    def wrong(name: str, error: float) -> None:
        def its(call: Call, dca: nn.Module, *given: Sequence[Tensor]) -> Results:
            results = evaluate(call, dca, *given)
            if isinstance(dca, dca_kernels.DCA):
                results[name] = results[name] + (results[name].abs().max() * error).to(results[name].dtype)
            return results

        monkeypatch.setattr(strategies, "_evaluate", its)

    check(call, "torch")
    wrong("grad_input.0", 1e-8 if dtype == "float64" else 1e-4)
    with pytest.raises(AssertionError, match=r"grad_input.*of the budget"):
        check(call, "torch")
    wrong("after.bn_relu.0.0.num_batches_tracked", 1.0)
    with pytest.raises(AssertionError, match="num_batches_tracked"):
        check(call, "torch")


@not_finite
@pytest.mark.slow
@each_backend
def test_any_call(backend: str) -> None:
    @settings(
        derandomize=True,
        max_examples=min(MOST, EXAMPLES[backend]),
        deadline=None,
        phases=[Phase.generate],  # `python -m tests.fuzz` finds the smallest call that fails
        suppress_health_check=list(HealthCheck),
    )
    @given(call=calls(backend, LARGEST[backend]))
    def check_all(call: Call) -> None:
        check(call, backend)

    check_all()


SMALL = Config((4, 8), 2, spatial_att=False, channel_head=(1, 2), sizes=((5, 4), (2, 3)))
DIFFERS = [
    {"config": replace(SMALL, batch=1)},
    {"config": replace(SMALL, sizes=((5, 4), (4, 3)))},
    {"config": replace(SMALL, sizes=((4, 5), (3, 2)))},
    {"dtype": "float16"},
    {"train": False},
    {"inputs": "large_affine", "seed": 7},
    {"layouts": (PLAIN, "channels_last")},
    {"layouts": ("misaligned", PLAIN)},
    {"upstream_layouts": ("expanded_batch", PLAIN)},
    {"frozen": frozenset(["maps"])},
    {"frozen": frozenset(["embedding", "norms"])},
    {"unused": frozenset([1])},
]


@pytest.mark.slow
@each_backend
def test_no_call_leaves_anything_to_the_next(backend: str) -> None:
    """What is kept of a call, to do the next faster, is of the calls that it is for."""
    call = Call(SMALL, "bfloat16", True, (Norm(), Norm()), layouts=(PLAIN, PLAIN), upstream_layouts=(PLAIN, PLAIN))
    check_that_nothing_is_left([call, *(replace(call, **differs) for differs in DIFFERS)], backend)
