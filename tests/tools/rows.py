"""Problems and rows of a tiny size."""

from typing import Any

import torch

from benchmarks import cases
from benchmarks.cases import Problem
from benchmarks.group import Effort, Group
from benchmarks.rows import Row

TINY = cases.SIZES["tiny"]
EFFORT = Effort(memory=False, small=True)
PLAIN = ("reference", "torch")


def problem(case: str = "dca", training: bool = False, dtype: torch.dtype = torch.float32) -> Problem:
    return Problem(case, TINY, 2, dtype, training)


def row(provider: str = "torch", p50: float | None = 10.0, **values) -> Row:
    """A row of times within 2 % of each other."""
    fixed = {"case": "dca", "size": "paper", "patch": 28, "batch": 1, "dtype": "float32", "phase": "eval"}
    times = {} if p50 is None else {"p20_ms": 0.98 * p50, "p50_ms": p50, "p80_ms": 1.02 * p50}
    where = {"environment": {"cpu": "a CPU", "threads": 2, "torch": "2.13.0"}}
    return Row(**fixed | {"mode": "forward", "provider": provider} | times | where | values)


def timed(group: Group, provider: str, t: float, **values: Any) -> Row:
    times = {"parity": True, "p20_ms": t, "p50_ms": t, "p80_ms": t}
    return group.row(provider, group.modes[-1], **times | values)
