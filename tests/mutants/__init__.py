"""Mutants of the package: lines with a mistake in them, each with the tests that have to notice it.

`python -m tests.mutants` puts them into a copy of the working tree, one at a time, and runs their tests. They are
listed by hand, in `kernels.py`, `package.py`, `walk/` and `blind/`: a tool that makes mutants has no notion of a
kernel's masks, strides and accumulators, and most of what it makes of them is caught by any test.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A mistake in one line of the package.

    Attributes:
        name: a word for the table and for `-k`.
        file: below `dca_kernels`.
        line: the text as it is, once in the file: a line or a part of it, with lines around it where others are alike.
        mutated: what stands there instead.
        tests: pytest's names, below `tests`, of what fails then: as few and as fast as will do.
        equivalent: why no test can fail; then there are none, and the mutant is not counted.
    """

    name: str
    file: str
    line: str
    mutated: str
    tests: tuple[str, ...] = ()
    equivalent: str = ""
