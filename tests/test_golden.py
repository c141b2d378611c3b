"""Reference and fused module against what the official code computed in float64."""

import functools

import pytest

from tests.oracle import GOLDEN, IMPLEMENTATIONS, Golden, assert_same, build, evaluate

golden_cases = functools.lru_cache(maxsize=1)(Golden)
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@pytest.mark.parametrize("name", GOLDEN)
@each_implementation
def test_results(name: str, implementation: str) -> None:
    golden = golden_cases(name)
    module = build(implementation, **golden.arguments)
    module.load_state_dict(golden.state, strict=True)
    results = evaluate(module.double().train(golden.train), golden.maps, golden.upstream)
    assert_same(golden.sample(results), golden.results)


@pytest.mark.parametrize("name", [name for name in GOLDEN if not name.startswith("paper")])
@each_implementation
def test_state_dict_keys_and_their_order(name: str, implementation: str) -> None:
    golden = golden_cases(name)
    assert list(build(implementation, **golden.arguments).state_dict()) == list(golden.state)


def test_golden_vectors_are_there() -> None:
    assert len(GOLDEN) == 9
