"""Mutants written without a look at the tests: what share of them is killed says more than that of the other lists.

Whoever wrote them had the package and the lines of those before, and no test. What lived at first has a test since.
"""

from tests.mutants.blind.fifth import FIFTH
from tests.mutants.blind.first import FIRST
from tests.mutants.blind.fourth import FOURTH
from tests.mutants.blind.second import SECOND
from tests.mutants.blind.seventh import SEVENTH
from tests.mutants.blind.sixth import SIXTH
from tests.mutants.blind.third import THIRD

BLIND = [*FIRST, *SECOND, *THIRD, *FOURTH, *FIFTH, *SIXTH, *SEVENTH]
