"""`python -m tests.capabilities`: the tests at every instruction set that this CPU has, with one thread and with two.

PyTorch, oneDNN and MKL take the widest instructions that they find. Each then sums in an order of its own, and a test
that is green by luck is green on one CPU alone.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import command, console
from benchmarks.environment import ROOT, environment

VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
# What PyTorch, oneDNN and MKL call each; from the oldest to the newest.
INSTRUCTIONS = {
    "default": ("default", "SSE41", "SSE4_2"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512"),
    "all": (),  # as users have them: oneDNN knows some that PyTorch has no name for, as for products of bfloat16
}
THREADS = (1, 2)


def here() -> list[str]:
    """Those that this CPU has."""
    newest = torch.backends.cpu.get_cpu_capability().lower()
    names = list(INSTRUCTIONS)
    return [*(names[: names.index(newest) + 1] if newest in names else names[:1]), "all"]


def run(instructions: str, threads: int, tests: Sequence[str]) -> dict[str, object]:
    """Run the tests; what pytest said last, and whether all passed."""
    most = dict(zip(VARIABLES, INSTRUCTIONS[instructions], strict=False))
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    pytest = [sys.executable, "-m", "pytest", "--numprocesses", "auto", "--dist", "loadgroup", "-q", "-m", "not slow"]
    begin = time.monotonic()
    done = subprocess.run(
        [*pytest, *tests],
        cwd=ROOT,
        env=kept | most | {"DCA_TEST_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    counts = {name: int(number) for number, name in re.findall(r"(\d+) (passed|failed|error)", lines[-1])}
    seconds = round(time.monotonic() - begin)
    well = done.returncode == 0
    return {
        "instructions": instructions,
        "threads": threads,
        "tests": list(tests),
        "well": well,
        "passed": counts.get("passed", 0),
        "failed": failed if failed or well else lines[-1:],
        "seconds": seconds,
    }


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m tests.capabilities", description=__doc__, formatter_class=command.Help)
    parser.add_argument("tests", nargs="*", help="files or folders of tests (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    chosen = parser.parse_args(arguments)
    found = []
    for instructions, threads in console.progress(list(itertools.product(here(), THREADS)), disable=None):
        one = run(instructions, threads, chosen.tests)
        found.append(one)
        said = "green" if one["well"] else "RED"
        console.say(f"{instructions}, {threads} thread(s): {said}, {one['passed']} passed in {one['seconds']} s")
        for line in one["failed"]:
            console.say(f"  {line}")
        if chosen.json is not None:  # after each, for it takes long
            chosen.json.write_text(json.dumps({"environment": environment(), "runs": found}, indent=1) + "\n")
    return 0 if all(one["well"] for one in found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
