"""Reference and fused module against what the official code computed in float64."""

import contextlib
import copy
import functools
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from reference.budget import off_the_kink
from tests.oracle import (
    BACKENDS,
    GOLDEN,
    IMPLEMENTATIONS,
    TRAINABLE,
    Golden,
    Results,
    assert_all_within_budget,
    assert_same,
    build,
    device_of,
    evaluate,
    full_size,
    needs_triton,
    resized_blocks,
)

golden_cases = functools.lru_cache(maxsize=1)(Golden)


def each(names: list[str]) -> pytest.MarkDecorator:
    marks = {"triton": needs_triton}
    return pytest.mark.parametrize("implementation", [pytest.param(n, marks=marks.get(n, ())) for n in names])


def build_golden(golden: Golden, implementation: str, dtype: torch.dtype) -> nn.Module:
    module = build(implementation, **golden.arguments).to(device_of(implementation))
    module.load_state_dict(golden.state, strict=True)
    return module.to(dtype).train(golden.train)


def run(
    golden: Golden, implementation: str, dtype: torch.dtype, backward: bool, flipped: Sequence[int] = ()
) -> Results:
    """What the golden file keeps, from an implementation in `dtype`.

    Of maps that are flipped along some axes, and results that are flipped back: the same, but for the order of sums.
    """
    device = device_of(implementation)
    maps, upstream = (
        [x.to(device, dtype).flip(flipped) for x in tensors] for tensors in (golden.maps, golden.upstream)
    )
    # Interpreted, a program of any size takes about as long: these grids go with few.
    factor = 4 if golden.arguments["patch"] < 14 else 16
    with contextlib.nullcontext() if full_size(implementation) else resized_blocks(factor):
        results = evaluate(build_golden(golden, implementation, dtype), maps, upstream, backward)
    results |= {name: x.flip(flipped) for name, x in results.items() if name.startswith(("output", "grad_input"))}
    return golden.sample({name: value.double() for name, value in results.items()})


@pytest.mark.parametrize("name", GOLDEN)
@each(IMPLEMENTATIONS)
def test_results(name: str, implementation: str) -> None:
    golden = golden_cases(name)
    backward = implementation in ("reference", *TRAINABLE)
    assert_same(run(golden, implementation, torch.float64, backward), golden.expected(backward))


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN)
@each(BACKENDS)
def test_error_budget_in_float32(name: str, implementation: str) -> None:
    if not name.startswith("tiny") and not full_size(implementation):
        pytest.skip("long in the interpreter, which runs it in float64")
    golden = golden_cases(name)
    draws = [golden]
    if golden.train:  # of a few running variances, the ratio of two errors is luck with one draw
        draws += [golden.redrawn(seed) for seed in (1, 2)]
        draws[0] = copy.copy(golden)
        draws[0].upstream = off_the_kink(build_golden(golden, "reference", torch.float64), golden.maps, golden.upstream)
    results = []
    for drawn in draws:
        backward = golden.train and drawn is draws[0]
        exact = run(drawn, "reference", torch.float64, backward)  # of the golden maps the official: see `test_results`
        ours = run(drawn, implementation, torch.float32, backward)
        # Gradients of few weights make nearly all of the error: the reference's is that of several orders of its sums.
        for flipped in ((), (2,), (3,)) if backward else ((),):
            results.append([ours, run(drawn, "reference", torch.float32, backward, flipped), exact])
            assert results[-1][0].keys() == results[-1][1].keys() == exact.keys()
    assert_all_within_budget(results, torch.float32)


@pytest.mark.parametrize("name", [name for name in GOLDEN if not name.startswith("paper")])
@each(IMPLEMENTATIONS)
def test_state_dict_keys_and_their_order(name: str, implementation: str) -> None:
    golden = golden_cases(name)
    assert list(build(implementation, **golden.arguments).state_dict()) == list(golden.state)


def test_golden_vectors_are_there() -> None:
    assert len(GOLDEN) == 9
