"""Mutants found by a walk: for each statement of the package, the mistakes to be expected there that no test noticed.

Each has a test since, which was seen red. A file is a part of the package.
"""

from tests.mutants.walk.add import ADD
from tests.mutants.walk.attention import ATTENTION
from tests.mutants.walk.launches import LAUNCHES
from tests.mutants.walk.module import MODULE
from tests.mutants.walk.patch_embed import PATCH_EMBED
from tests.mutants.walk.replace import REPLACE
from tests.mutants.walk.upsample import UPSAMPLE

WALK = [*PATCH_EMBED, *ATTENTION, *UPSAMPLE, *LAUNCHES, *MODULE, *REPLACE, *ADD]
