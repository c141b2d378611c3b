"""`python -m tests.reliability`: the figures of the last campaigns, between the markers of RELIABILITY.md.

They are those of tests/results/, which `--json` of the campaigns wrote: `python -m tests.fuzz`, `tests.mutants` and
`tests.capabilities`.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import command, console
from benchmarks.environment import ROOT
from benchmarks.report import filled

DOCUMENT = ROOT / "RELIABILITY.md"
RESULTS = Path(__file__).parent / "results"
KINDS = {"output": "outputs", "grad_input": "maps' gradients", "grad": "parameters' gradients", "after": "buffers"}

Figures = dict[str, Any]


def _made(figures: Figures, by: str) -> str:
    where = figures["environment"]
    versions = f"torch {where['torch']}, triton {where['triton']}"
    return f"`{by}`, {where['date']}, {where['gpu'] or where['cpu']}, {versions}:"


def fuzz(figures: Figures) -> str:
    """How many calls were drawn, and what part of their budgets they used at most."""
    backends = {name: figures[name] for name in ("torch", "triton") if name in figures}
    counts = [
        [f"`{name}`", its["calls"], its["failures"], its["over"], f"{its['seconds'] / 60:.0f}"]
        for name, its in backends.items()
    ]
    headers = ["backend", "calls", "failed", "decided by several draws", "minutes of one core"]
    dtypes = dict.fromkeys(kind.split()[0] for its in backends.values() for kind in its["parts"])
    parts = [
        [f"`{name}`", dtype, *(console.number(its["parts"].get(f"{dtype} {kind}")) for kind in KINDS)]
        for name, its in backends.items()
        for dtype in dtypes
    ]
    said = "The largest part of its error budget that one draw of a call used:"
    table = console.table(parts, ["backend", "dtype", *KINDS.values()])
    return "\n\n".join([_made(figures, "python -m tests.fuzz"), console.table(counts, headers), said, table])


def capabilities(figures: Figures) -> str:
    """The tests at each instruction set."""
    lines = [
        [one["instructions"], one["threads"], one["passed"], len(one["failed"]), "green" if one["well"] else "red"]
        for one in figures["runs"]
    ]
    headers = ["instructions", "threads", "passed", "failed", "result"]
    tests = " ".join(dict.fromkeys(test for one in figures["runs"] for test in one["tests"]))
    said = _made(figures, f"python -m tests.capabilities {tests}".strip())
    return "\n\n".join([said, console.table(lines, headers)])


def mutants(figures: Figures) -> str:
    """How many mistakes the tests noticed."""
    versions = figures["versions"]
    said = f"`python -m tests.mutants`, torch {versions['torch']}, triton {versions['triton']}"
    counts = f"{figures['killed']} killed, {figures['lived']} lived, {figures['equivalent']} change no result"
    lived = [f"- `{name}`" for name, (outcome, _) in figures["mutants"].items() if outcome == "lived"]
    return "\n".join([f"{said}: {counts}.", *lived])


BLOCKS: dict[str, Callable[[Figures], str]] = {"fuzz": fuzz, "mutants": mutants, "capabilities": capabilities}


def document() -> str:
    """RELIABILITY.md with the figures that are there."""
    figures = {name: RESULTS / f"{name}.json" for name in BLOCKS}
    blocks = {name: BLOCKS[name](json.loads(path.read_text())) for name, path in figures.items()}
    return filled(DOCUMENT.read_text(), blocks)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m tests.reliability", description=__doc__, formatter_class=command.Help)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where something differs")
    chosen = parser.parse_args(arguments)
    text = document()
    if chosen.check:
        return int(text != DOCUMENT.read_text())
    DOCUMENT.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
