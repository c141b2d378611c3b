"""Reference and fused module against what the official code computed in float64."""

import contextlib
import functools

import pytest
import torch

from tests.oracle import (
    BACKENDS,
    GOLDEN,
    IMPLEMENTATIONS,
    TRAINABLE,
    Golden,
    Results,
    assert_same,
    assert_within_budget,
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


def run(golden: Golden, implementation: str, dtype: torch.dtype, backward: bool) -> Results:
    """What the golden file keeps, from an implementation in `dtype`."""
    device = device_of(implementation)
    module = build(implementation, **golden.arguments)
    module.load_state_dict(golden.state, strict=True)
    maps, upstream = ([x.to(device, dtype) for x in tensors] for tensors in (golden.maps, golden.upstream))
    large = max(golden.arguments["features"]) > 64
    # Interpreted, a program of any size takes about as long: the paper's sizes go with few.
    with resized_blocks(16) if large and not full_size(implementation) else contextlib.nullcontext():
        results = evaluate(module.to(dtype).train(golden.train), maps, upstream, backward)
    return golden.sample({name: value.double() for name, value in results.items()})


@pytest.mark.parametrize("name", GOLDEN)
@each(IMPLEMENTATIONS)
def test_results(name: str, implementation: str) -> None:
    golden = golden_cases(name)
    backward = implementation in ("reference", *TRAINABLE)
    assert_same(run(golden, implementation, torch.float64, backward), golden.expected(backward))


@pytest.mark.parametrize("name", GOLDEN)
@each(BACKENDS)
def test_error_budget_in_float32(name: str, implementation: str) -> None:
    if not name.startswith("tiny") and not full_size(implementation):
        pytest.skip("long in the interpreter, which runs it in float64")
    golden = golden_cases(name)
    draws = [golden]
    if golden.train:  # of a few running variances, the ratio of two errors is luck with one draw
        draws += [golden.redrawn(seed) for seed in (1, 2)]
    results = []
    for drawn in draws:
        exact = drawn.expected(False) if drawn is golden else run(drawn, "reference", torch.float64, backward=False)
        ours, theirs = (run(drawn, which, torch.float32, backward=False) for which in (implementation, "reference"))
        results.append([ours, theirs, exact])
        assert results[-1][0].keys() == results[-1][1].keys() == exact.keys()
    for kind in ("output.", "output_sum.", "after.") if golden.train else ("output.", "output_sum."):
        values = [
            torch.cat([draw[of][name].flatten() for draw in results for name in draw[-1] if name.startswith(kind)])
            for of in range(3)
        ]
        assert_within_budget(*values, torch.float32, kind)


@pytest.mark.parametrize("name", [name for name in GOLDEN if not name.startswith("paper")])
@each(IMPLEMENTATIONS)
def test_state_dict_keys_and_their_order(name: str, implementation: str) -> None:
    golden = golden_cases(name)
    assert list(build(implementation, **golden.arguments).state_dict()) == list(golden.state)


def test_golden_vectors_are_there() -> None:
    assert len(GOLDEN) == 9
