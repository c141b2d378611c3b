"""`python -m tests.mutants`, see `command`."""

import sys

from tests.mutants.command import main

sys.exit(main())
