"""`python -m benchmarks gpu`: all that a machine with a GPU can say, by one command, saved as it goes."""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import torch

from benchmarks import cases, run
from benchmarks.environment import ROOT, describe, environment
from benchmarks.rows import LATEST
from dca_kernels import launch

OPTIONAL = ("hypothesis", "matplotlib", "skimage", "tabulate", "tqdm")
TABLE = Path(launch.__file__).parent / "configurations.json"

EAGER = ("reference", "torch", "triton")
GRAPHS = tuple(f"{name} graph" for name in EAGER)
# What is measured, the most telling first: when the time is over, the rest is not run.
SELECTIONS: dict[str, dict[str, Sequence[object]]] = {
    "module": {"case": ["dca"], "size": ["paper"], "batch": [1, 8, 32], "provider": [*EAGER, *GRAPHS]},
    "stages": {"case": cases.STAGES, "size": ["paper"], "batch": [8], "provider": [*EAGER, "triton graph"]},
    "compiled": {
        "case": ["dca"],
        "size": ["paper"],
        "batch": [8],
        "provider": ["reference compiled", "reference compiled graph", "torch compiled", "torch compiled graph"],
    },
    "sizes": {"case": ["dca"], "size": ["wide", "resunetpp", "grid56"], "batch": [8], "provider": EAGER},
    "large_grid": {"case": ["dca"], "size": ["grid112"], "batch": [1], "provider": EAGER},
    "hosts": {
        "case": cases.HOSTS,
        "size": ["paper", "resunetpp"],
        "batch": [8],
        "phase": ["train"],
        "mode": ["full"],
        "provider": ["without", *EAGER],
    },
    "float32": {"case": ["dca"], "size": ["paper"], "batch": [8], "dtype": ["float32"], "provider": [*EAGER, *GRAPHS]},
    "max_autotune": {"case": ["dca"], "size": ["paper"], "batch": [8], "provider": ["reference max-autotune graph"]},
}
# The same kinds of case where kernels are interpreted.
DRY = {
    "module": {"case": ["dca"], "size": ["tiny"], "batch": [1], "mode": ["full"], "provider": [*EAGER, *GRAPHS]},
    "stages": {"case": cases.STAGES[:2], "size": ["tiny"], "batch": [1], "phase": ["eval"], "provider": ["triton"]},
}


@dataclass(frozen=True)
class Step:
    """A command, its time in seconds, and the group whose time it shares."""

    name: str
    arguments: Sequence[str]
    seconds: float
    shared: str | None = None


def steps(out: Path, dry: bool) -> Iterator[Step]:
    """What is done, in this order."""
    tests = ["tests/test_errors.py"] if dry else ["tests"]
    junit = ["--continue-on-collection-errors", "-p", "no:cacheprovider", f"--junitxml={out / 'tests.xml'}"]
    yield Step("tests", ["pytest", *tests, *junit], 120)
    small = ["--small"] if dry else []
    yield Step("calibrate", ["benchmarks", "calibrate", "--out", f"{out / 'calibration.json'}", *small], 20)
    table = ["--table", f"{out / 'configurations.json'}"]
    tiny = ["--size", "tiny", "--batch", "1", "--dtype", "float32"]
    few = [*tiny, "--kernel", "mix", "--most", "2"]
    yield Step("tune", ["benchmarks", "tune", *table, *(few if dry else ["--seconds", "70"])], 90)
    for name, selection in (DRY if dry else SELECTIONS).items():
        chosen = {"dtype": ["float32" if dry else "bfloat16"]} | selection
        flags = [word for flag, values in chosen.items() for word in (f"--{flag}", *map(str, values))]
        effort = ["--small", "--no-memory"] if dry else ["--seconds", "2", "--longest", "5"]
        command = ["benchmarks", "run", *flags, *effort, "--out", f"{out / 'run.jsonl'}"]
        yield Step(f"run_{name}", command, 180, shared="run")
    repeats = [*tiny, "--repeats", "1"] if dry else []
    yield Step("determinism", ["benchmarks", "determinism", *repeats, "--out", f"{out / 'determinism.json'}"], 40)
    yield Step("report", ["benchmarks", "report", "--results", f"{out}", "--document", f"{out / 'report.md'}"], 20)


def perform(step: Step, seconds: float, out: Path, variables: dict[str, str]) -> dict[str, object]:
    """Run a step's command; it is interrupted when its time is over, and what it wrote by then stays."""
    begin = time.monotonic()
    log = out / "logs" / f"{step.name}.txt"
    with log.open("w") as file:
        command = [sys.executable, "-m", *step.arguments]
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT, preexec_fn=_heed_interrupts
        )
        stopped = False
        for wait, number in ((seconds, signal.SIGINT), (10, signal.SIGKILL), (None, None)):
            try:
                status = process.wait(wait)
                break
            except subprocess.TimeoutExpired:
                stopped = True
                process.send_signal(number)
    result: dict[str, object] = {"step": step.name, "status": status, "seconds": round(time.monotonic() - begin, 1)}
    if stopped:
        result["stopped"] = f"after {seconds:.0f} s"
    if step.name == "tests" and (out / "tests.xml").exists():
        result |= counted(out / "tests.xml")
    return result


def _heed_interrupts() -> None:
    """What runs in the background of a shell, and all that it starts, ignores them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def counted(junit: Path) -> dict[str, int]:
    """Tests, failures, errors and skips of a JUnit file."""
    suite = ElementTree.parse(junit).getroot().find("testsuite")
    names = ("tests", "failures", "errors", "skipped")
    return {} if suite is None else {name: int(suite.get(name, 0)) for name in names}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu",
        description="On a machine with a GPU, in under ten minutes: the tests, calibration, tuning of the kernels' "
        "configurations, the benchmarks, repeats bit by bit, and a report; each saved when it is done, or when its "
        "time is over. Needs this repository, torch, triton, numpy and pytest. Exit status 1 means that a step failed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--dry-run", action="store_true", help="every step, tiny, in Triton's interpreter on the CPU")
    parser.add_argument("--out", type=Path, default=LATEST / "gpu", metavar="FOLDER", help="where everything goes")
    chosen = parser.parse_args(arguments)
    if not chosen.dry_run and not torch.cuda.is_available():
        print("gpu: not run: no GPU; --dry-run does every step in the interpreter", file=sys.stderr)
        return 2
    out = chosen.out.resolve()
    (out / "logs").mkdir(parents=True, exist_ok=True)
    variables = dict(os.environ)
    if chosen.dry_run:
        variables |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    print(f"environment: {describe(environment())}")
    (out / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")
    for name in OPTIONAL:
        if importlib.util.find_spec(name) is None:
            print(f"{name} is not installed: what needs it is not run")
    if not (out / "configurations.json").exists():
        shutil.copy(TABLE, out)

    left, results = {}, []
    for step in steps(out, chosen.dry_run):
        key = step.shared or step.name
        left.setdefault(key, step.seconds)
        if left[key] < 5:
            result: dict[str, object] = {"step": step.name, "not run": "the time is over"}
        else:
            result = perform(step, left[key], out, variables)
            left[key] -= float(str(result["seconds"]))
            if result["status"] == run.BROKEN:  # a process lost the GPU: another goes on behind the case that did it
                result = perform(step, max(5, left[key]), out, variables) | {"again": True}
        if step.name == "tune" and not chosen.dry_run:
            shutil.copy(out / "configurations.json", TABLE)  # what follows is measured with it
        results.append(result)
        (out / "steps.json").write_text(json.dumps(results, indent=1) + "\n")
        print(", ".join(f"{key} {value}" for key, value in result.items()), flush=True)
    print(f"everything is in {out}; what each step said is in its logs folder")
    return 1 if any(result.get("status") for result in results) else 0
