"""`python -m tests.mutants`: whether the tests notice the mistakes of the list. Takes some seconds for each.

A mutant is killed if one of its tests fails or takes too long. The exit status is 1 where one lives, or where its line
is not in the package once; 2 where its tests fail without it, or cannot be run.
"""

import argparse
import json
import os
import platform
import random
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from tabulate import tabulate
from tqdm import tqdm

from tests.mutants import Mutant
from tests.mutants.blind import BLIND
from tests.mutants.kernels import KERNELS
from tests.mutants.package import PACKAGE
from tests.mutants.walk import WALK

ROOT = Path(__file__).parents[2]
MUTANTS = [*KERNELS, *PACKAGE, *WALK, *BLIND]
LEFT_OUT = (".*", "build", "dist", "*.egg-info", "__pycache__", "results")
SECONDS = 300  # that a mutant's tests may take
KILLED, TIMED_OUT, LIVED, NOT_FOUND, NOT_RUN = "killed", "timed out", "lived", "line not found once", "tests not run"


@dataclass(frozen=True)
class Result:
    """What became of a mutant: an outcome, the test that failed first, none where Python crashed, and the seconds."""

    mutant: Mutant
    outcome: str
    by: str
    seconds: float


class Unsound(Exception):
    """Why no mutant can be judged."""


def times_found(mutant: Mutant, tree: Path = ROOT) -> int:
    """How often the mutant's line is in its file."""
    return (tree / "dca_kernels" / mutant.file).read_text().count(mutant.line)


def run_tests(tree: Path, tests: Sequence[str], *options: str, seconds: float | None = None) -> tuple[int, str]:
    """pytest's exit status, and what it printed.

    Raises:
        subprocess.TimeoutExpired: it took longer.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    # Python would go by a file's time and size, and take the code of the mutant before.
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*command, *(f"tests/{test}" for test in tests)],
        cwd=tree,
        env=environment,
        timeout=seconds,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout


def judged(mutant: Mutant, tree: Path) -> Result:
    """What becomes of a mutant in a copy of the working tree, which is then as before."""
    begin = time.perf_counter()
    path = tree / "dca_kernels" / mutant.file
    text, outcome, output = path.read_text(), NOT_FOUND, ""
    if text.count(mutant.line) == 1:
        path.write_text(text.replace(mutant.line, mutant.mutated))
        try:
            status, output = run_tests(tree, mutant.tests, "-x", seconds=SECONDS)
            outcome = KILLED if status == 1 or status < 0 else LIVED if status == 0 else NOT_RUN
        except subprocess.TimeoutExpired:
            outcome = TIMED_OUT
        path.write_text(text)
    failed = re.search(r"^FAILED tests/(\S+)", output, re.MULTILINE)
    return Result(mutant, outcome, failed[1] if failed else "", time.perf_counter() - begin)


def judge(mutants: Sequence[Mutant]) -> list[Result]:
    """What becomes of these mutants.

    Raises:
        Unsound: their tests fail without a mutant.
    """
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*LEFT_OUT))
        tests = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
        print(f"{len(tests)} tests without a mutant", file=sys.stderr)
        status, output = run_tests(tree, tests)
        if status != 0:
            raise Unsound(f"tests: expected them to pass without a mutant, got exit status {status}:\n{output}")
        results = []
        for mutant in (bar := tqdm(mutants, unit="mutant")):
            bar.set_postfix_str(mutant.name)
            results.append(judged(mutant, tree))
            if results[-1].outcome not in (KILLED, TIMED_OUT):
                tqdm.write(f"{mutant.name}: {results[-1].outcome}", file=sys.stderr)
        return results


def commit_of_now() -> str:
    """Of the working tree, with "-dirty" where it has changes."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    return subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE).stdout.strip()


def figures(commit: str, results: Sequence[Result], equivalent: Sequence[Mutant]) -> dict[str, object]:
    """What `--json` writes."""
    outcomes = [result.outcome for result in results]
    return {
        "commit": commit,
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("torch", "triton", "pytest")},
        "killed": outcomes.count(KILLED) + outcomes.count(TIMED_OUT),
        "lived": outcomes.count(LIVED),
        "equivalent": len(equivalent),
        "seconds": round(sum(result.seconds for result in results)),
        "mutants": {result.mutant.name: [result.outcome, result.by] for result in results},
    }


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("-k", metavar="NAME", default="", help="those with this in their names or their files")
    parser.add_argument("--draw", metavar="N", type=int, help="so many of them, drawn by chance")
    parser.add_argument("--seed", metavar="S", type=int, help="of the draw; another each time where not given")
    parser.add_argument("--list", action="store_true", help="print them, and run nothing")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures as well")
    found = parser.parse_args(given)
    if found.draw is not None and found.draw < 1:
        parser.error(f"--draw: expected a number of mutants, at least 1, got {found.draw}")
    if found.seed is not None and found.draw is None:
        parser.error("--seed: expected --draw beside it")
    return found


def main() -> int:
    given = arguments()
    named = [mutant for mutant in MUTANTS if given.k in mutant.name or given.k in mutant.file]
    counted = [mutant for mutant in named if not mutant.equivalent]
    if not counted:
        sys.exit(f"-k: expected part of a mutant's name or file, got {given.k!r}: see --list")
    if given.draw is not None:
        seed = secrets.randbits(32) if given.seed is None else given.seed
        print(f"--draw {given.draw} --seed {seed}", file=sys.stderr)
        counted = random.Random(seed).sample(counted, min(given.draw, len(counted)))
    if given.list:
        rows = [(m.name, m.file, m.equivalent or ", ".join(m.tests)) for m in named if m.equivalent or m in counted]
        print(tabulate(rows, ("mutant", "file", "tests, or why there are none")))
        return 0
    commit = commit_of_now()
    try:
        results = judge(counted)
    except Unsound as error:
        print(error, file=sys.stderr)
        return 2
    rows = [(result.mutant.name, result.outcome, result.by, result.seconds) for result in results]
    print(tabulate(rows, ("mutant", "outcome", "by", "s"), floatfmt=".0f"))
    found = figures(commit, results, [mutant for mutant in named if mutant.equivalent])
    print(", ".join(f"{found[name]} {name}" for name in ("killed", "lived", "equivalent", "seconds")))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    outcomes = {result.outcome for result in results}
    return 2 if NOT_RUN in outcomes else int(not outcomes <= {KILLED, TIMED_OUT})
