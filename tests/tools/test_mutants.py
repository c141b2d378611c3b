"""The list of mutants cannot rot: each one's line is there once, and its tests exist. What becomes of a mutant."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.mutants import Mutant, command


@pytest.mark.parametrize("mutant", command.MUTANTS, ids=lambda mutant: mutant.name)
def test_the_line_is_there_once(mutant: Mutant) -> None:
    assert command.times_found(mutant) == 1
    assert mutant.line != mutant.mutated
    assert bool(mutant.tests) != bool(mutant.equivalent)


def test_names_of_mutants_are_different() -> None:
    assert len({mutant.name for mutant in command.MUTANTS}) == len(command.MUTANTS)


def test_what_kills_them_exists() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    tests = dict.fromkeys(test for mutant in command.MUTANTS for test in mutant.tests)
    status, output = command.run_tests(command.ROOT, list(tests), "--collect-only")
    assert status == 0, output


HALF = Mutant("half", "half.py", "return n // 2", "return n / 2", ("test_half.py",))
JUDGED = {
    "killed": HALF,
    "lived": replace(HALF, mutated="return n >> 1"),
    "line not found once": replace(HALF, line="return"),
    "tests not run": replace(HALF, tests=("test_other.py",)),
    "timed out": replace(HALF, mutated="while n: pass"),
}


@pytest.mark.parametrize("outcome", JUDGED)
def test_what_becomes_of_a_mutant(outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "SECONDS", 2.0 if outcome == "timed out" else 60.0)
    text = "def half(n):\n    return n // 2\n\n\ndef double(n):\n    return 2 * n\n"
    for folder in ("dca_kernels", "tests"):
        (tmp_path / folder).mkdir()
    (tmp_path / "dca_kernels" / "half.py").write_text(text)
    (tmp_path / "tests" / "test_half.py").write_text(
        "from dca_kernels.half import half\n\n\ndef test_of_three():\n    assert half(3) == 1\n"
    )
    result = command.judged(JUDGED[outcome], tmp_path)
    assert result.outcome == outcome
    assert result.by == ("test_half.py::test_of_three" if outcome == "killed" else "")
    assert (tmp_path / "dca_kernels" / "half.py").read_text() == text
