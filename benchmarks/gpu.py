"""`python -m benchmarks gpu`: what a machine with a GPU can say, in steps of known length, each saved as it goes."""

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch

from benchmarks import cases, command, journal, run
from benchmarks import report as report_of
from benchmarks.environment import ROOT, describe, environment
from benchmarks.offline import compile
from benchmarks.providers import EAGER, PROVIDERS
from benchmarks.rows import LATEST
from benchmarks.tune import TABLE

# What may be missing, and what is then not run.
OPTIONAL = {
    "hypothesis": "tests/module/test_properties.py",
    "matplotlib": "figures, and their tests",
    "safetensors": "tests/module/test_tools.py",
    "skimage": "tests of the image",
    "xdist": "tests in parallel",
}

GRAPHS = tuple(f"{name} graph" for name in EAGER)
COMPILED, MAX_AUTOTUNE = (
    tuple(name for name, one in PROVIDERS.items() if one.compiled == compiled and one.implementation in EAGER)
    for compiled in (" compiled", " max-autotune")
)

# The tests of kernels, before all others.
KERNEL_TESTS = ("triton_backward", "triton", "triton_operator", "triton_memory", "golden", "precision", "generality")


@dataclass(frozen=True)
class Step:
    """Commands that go on one after the other for a time.

    Attributes:
        seconds: what it takes on 16 cores and a GPU from empty caches: `smoke` and `kernels` as an H100 took, else an
            estimate.
        says: what it does, for `--help`.
        instead: what stands in for it where it is tiny and interpreted.
        commands: made of the folder that all goes to, whether it is tiny and interpreted, and the seconds it has.
        variables: of its environment.
    """

    name: str
    seconds: float
    says: str
    instead: str
    commands: Callable[[Path, bool, float], list[list[str]]]
    variables: dict[str, str] = field(default_factory=dict)


def python(module: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


def benchmarks(name: str, *arguments: object) -> list[str]:
    return python("benchmarks", name, *arguments)


def selection(out: Path, dry: bool, *flags: object, seconds: float = 1.0) -> list[str]:
    """A `run` of the module at the paper's sizes in bfloat16, but for what the flags say."""
    fixed = ["--case", "dca", "--size", "tiny" if dry else "paper", "--dtype", "float32" if dry else "bfloat16"]
    fixed += ["--batch", 1 if dry else 8]
    effort = ["--small", "--no-memory"] if dry else ["--seconds", seconds, "--longest", 5]
    return benchmarks("run", *fixed, *effort, "--out", out / "run.jsonl", *flags)  # of a flag the last one counts


def smoke(out: Path, dry: bool, seconds: float) -> list[list[str]]:
    to = ["--journal", out / "journal.ndjson"]
    if not dry:
        return [benchmarks("compile", *to), benchmarks("smoke", *to)]
    tiny = ["--size", "tiny", "--batch", 1, "--dtype", "float32"]
    ahead = [*tiny, "--phase", "eval", "--no-golden", "--target", "sm_90", "--processes", 1]
    return [
        ["env", "--unset", "TRITON_INTERPRET", *benchmarks("compile", *ahead, *to)],
        benchmarks("smoke", *tiny, "--phase", "eval", "--golden", "tiny_spatial_only", *to),
    ]


def times_of_kernels(out: Path, dry: bool, seconds: float) -> list[list[str]]:
    tiny = ["--size", "tiny", "--batch", 1, "--dtype", "float32", "--small"] if dry else []
    return [benchmarks("kernels", *tiny, "--journal", out / "journal.ndjson")]


def module(out: Path, dry: bool, seconds: float) -> list[list[str]]:
    """The kernels first, then what takes long to compile: at one batch, at the others, in float32."""
    if dry:
        few = ["--phase", "eval", "--provider"]
        compiled = ["--case", "patch_embed", "--ahead", 1, *few, *COMPILED[:2]]  # a CPU's compiler is slow
        return [selection(out, dry, *few, *EAGER, *GRAPHS), selection(out, dry, *compiled)]
    batches, ahead = ["--batch", 8, 1, 32], ["--ahead", max(1, compile.processes() // 2)]
    both = ["--dtype", "bfloat16", "float32"]
    return [
        selection(out, dry, *batches, *both, "--provider", *EAGER, *GRAPHS),
        selection(out, dry, *ahead, "--provider", *COMPILED, *MAX_AUTOTUNE),
        selection(out, dry, *ahead, *batches, "--provider", *COMPILED),
        selection(out, dry, *ahead, *batches, *both, "--provider", *COMPILED, *MAX_AUTOTUNE),
    ]


def determinism(out: Path, dry: bool, seconds: float) -> list[list[str]]:
    tiny = ["--size", "tiny", "--batch", 1, "--dtype", "float32", "--repeats", 1] if dry else []
    return [benchmarks("determinism", *tiny, "--journal", out / "journal.ndjson")]


def tune(out: Path, dry: bool, seconds: float) -> list[list[str]]:
    few = [
        "--size",
        "tiny",
        "--batch",
        1,
        "--dtype",
        "float32",
        "--kernel",
        "patch_embed",
        "--most",
        1,
        "--processes",
        1,
    ]
    # A candidate, and what is compiled, may take the last 20 seconds.
    how = few if dry else ["--seconds", f"{max(10, seconds - 20):.0f}"]
    to = ["--table", out / "configurations.json", "--journal", out / "journal.ndjson"]
    return [benchmarks("tune", *how, *to)]


def tests(out: Path, dry: bool, seconds: float) -> list[list[str]]:
    """Two commands: of one, pytest takes the files in its own order."""
    of_kernels = [f"tests/module/test_{name}.py" for name in KERNEL_TESTS]
    others = ["tests", *(f"--ignore={file}" for file in of_kernels)]
    options = ["--continue-on-collection-errors", "-p", "no:cacheprovider", "--verbose", "--tb", "short"]
    if importlib.util.find_spec("xdist") is not None:
        options += ["--numprocesses", 1 if dry else min(12, compile.processes()), "--dist", "loadgroup"]
    parts = [["tests/module/test_errors.py"]] if dry else [of_kernels, others]
    return [python("pytest", *part, *options, f"--junitxml={out / f'tests{i}.xml'}") for i, part in enumerate(parts)]


def sanitize(out: Path, dry: bool, seconds: float) -> list[list[str]]:
    """Without a GPU the same command, without the sanitizer."""
    tiny = ["--size", "tiny", "--batch", 2, "--dtype", "float32"]
    checked = benchmarks("smoke", *tiny, "--kind", "parity", *(["--phase", "eval"] if dry else []))
    if dry:
        return [checked]
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9", "--tool"]
    return [
        benchmarks("compile", *tiny, "--no-golden"),
        *([*sanitizer, tool, *checked] for tool in ("memcheck", "racecheck")),
    ]


def sizes(out: Path, dry: bool, seconds: float) -> list[list[str]]:
    if dry:
        return [selection(out, dry, "--batch", 2, "--phase", "eval", "--provider", "torch", "triton")]
    large = ["--size", "grid112", "--batch", 1]
    return [
        benchmarks(
            "compile", "--size", "wide", "resunetpp", "grid56", "--batch", 8, "--dtype", "bfloat16", "--no-golden"
        ),
        selection(out, dry, "--size", "wide", "resunetpp", "grid56", "--provider", *EAGER, *GRAPHS),
        benchmarks("compile", *large, "--dtype", "bfloat16", "--no-golden"),
        selection(out, dry, *large, "--provider", *EAGER),
    ]


def hosts(out: Path, dry: bool, seconds: float) -> list[list[str]]:
    """Whole networks: a step without DCA, with the reference's and with ours."""
    if dry:  # a forward: the networks have no tiny size
        return [selection(out, dry, "--case", "UNet", "--size", "paper", "--phase", "eval", "--provider", "without")]
    step = ["--phase", "train", "--mode", "full", "--provider", "without", *EAGER]
    return [
        benchmarks("compile", "--size", "paper", "resunetpp", "--batch", 8, "--dtype", "bfloat16", "--no-golden"),
        selection(out, dry, "--case", *cases.HOSTS, "--size", "paper", "resunetpp", *step, seconds=2.0),
    ]


def stages(out: Path, dry: bool, seconds: float) -> list[list[str]]:
    if dry:
        return [selection(out, dry, "--case", *cases.STAGES[:2], "--phase", "eval", "--provider", "triton")]
    return [selection(out, dry, "--case", *cases.STAGES, "--provider", *EAGER, "triton graph", seconds=2.0)]


def report(out: Path, dry: bool, seconds: float) -> list[list[str]]:
    to = ["--results", out, "--document", out / "report.md", "--journal", out / "journal.ndjson"]
    return [benchmarks("report", *to, "--no-figures")]


STEPS = {
    step.name: step
    for step in (
        Step(
            "smoke",
            165,
            "compiles all kernels in parallel; golden vectors, parity with the reference at batch 1, 2 and 8 in four "
            "dtypes and both layouts, graphs against eager calls: a line a case",
            "compiled for sm_90, run by the interpreter; a second eager call for a graph's replay",
            smoke,
        ),
        Step(
            "kernels",
            30,
            "rates of copies and products; every kernel's time at batch 1, 8, 32",
            "the interpreter's time of each launch",
            times_of_kernels,
        ),
        Step(
            "module",
            240,
            "the module beside the reference, eager, compiled and as graphs; time and memory; the most telling first, "
            "the same command goes on with the rest",
            "no graphs; torch.compile of one stage",
            module,
        ),
        Step("determinism", 30, "250 repeats of a training step, bit by bit", "one repeat", determinism),
        Step("report", 10, "tables of what was measured", "of what was measured so far", report),
        Step(
            "tune",
            240,
            "the kernels' configurations, as many as there is time for",
            "one candidate, compiled for sm_90, timed in the interpreter",
            tune,
        ),
        Step("tests", 240, "the tests, those of the kernels first, in parallel", "one file", tests),
        Step(
            "sanitize",
            120,
            "compute-sanitizer's memcheck and racecheck at a tiny size",
            "the same command without compute-sanitizer",
            sanitize,
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # else what lies behind a tensor is PyTorch's own, and valid
        ),
        Step("sizes", 120, "the module at other sizes", "two images", sizes),
        Step("stages", 60, "the module's stages alone", "two of them, forward", stages),
        Step("hosts", 120, "a training step of six networks", "a forward of one, without DCA", hosts),
    )
}
DEFAULT = ("smoke", "kernels", "module", "determinism", "report")


def shares(names: Sequence[str], left: float) -> float:
    """The seconds that the first of these steps may take of what is left for all."""
    return left * STEPS[names[0]].seconds / sum(STEPS[name].seconds for name in names)


def perform(step: Step, seconds: float, out: Path, dry: bool, variables: dict[str, str]) -> dict[str, object]:
    """Run a step's commands; the one at work is interrupted when the time is over, and what it wrote by then stays.

    A command that fails does not keep the next one from running; one that lost the GPU is run again, and goes on
    behind what did that.
    """
    begin, statuses, seconds = time.monotonic(), [], max(0.0, seconds)
    result: dict[str, object] = {"name": step.name}
    waiting = step.commands(out, dry, seconds)
    while waiting:
        left = seconds - (time.monotonic() - begin)
        if left < 1:
            result["stopped"] = f"after {seconds:.0f} s"
            break
        if shutil.which(waiting[0][0]) is None:
            statuses.append(127)
            result["not run"] = f"{waiting.pop(0)[0]} is not installed"
            continue
        status, stopped = _run(waiting[0], left, out / "log.txt", variables | step.variables)
        if stopped:
            result["stopped"] = f"after {seconds:.0f} s"
        if status == run.BROKEN and not stopped:
            result["again"] = int(str(result.get("again", 0))) + 1
            continue
        waiting.pop(0)
        statuses.append(status)
    result |= {"status": max(map(abs, statuses), default=0), "seconds": round(time.monotonic() - begin, 1)}
    for junit in sorted(out.glob("tests*.xml")):  # not left there: few files go everywhere
        for name, count in counted(junit).items():
            result[name] = int(str(result.get(name, 0))) + count
        junit.unlink()
    return result


def _run(line: Sequence[str], seconds: float, log: Path, variables: dict[str, str]) -> tuple[int, bool]:
    """Exit status, and whether the time was over."""
    with log.open("a") as file:
        file.write(f"\n$ {' '.join(line)}\n")
        file.flush()
        process = subprocess.Popen(
            line,
            cwd=ROOT,
            env=variables,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_heed_interrupts,
        )
        try:
            return process.wait(seconds), False
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                return process.wait(10), True
            except subprocess.TimeoutExpired:
                return -signal.SIGKILL, True
        finally:  # with the processes that it started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _heed_interrupts() -> None:
    """What runs in the background of a shell, and all that it starts, ignores them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def counted(junit: Path) -> dict[str, int]:
    """Tests, failures, errors and skips of a JUnit file."""
    suite = ElementTree.parse(junit).getroot().find("testsuite")
    names = ("tests", "failures", "errors", "skipped")
    return {} if suite is None else {name: int(suite.get(name, 0)) for name in names}


def help_of_steps() -> str:
    lines = [f"  {s.name:{max(map(len, STEPS))}}  {s.seconds:4.0f} s  {s.says}" for s in STEPS.values()]
    return (
        "Steps, and about what each one takes on 16 cores with empty caches:\n"
        + "\n".join(lines)
        + "\n\nOf the time that is left a step may take its share by these numbers; alone, or in a dry run, all of it."
    )


def parser() -> argparse.ArgumentParser:
    parser = command.parser(
        "gpu",
        "On a machine with a GPU: whether the kernels are right, how long each one takes, and the module beside the "
        "reference, in at most the minutes given. All that is found is written at once, into five files. Needs this "
        "repository, torch, triton, numpy, pytest, tabulate and tqdm; says what it leaves out for want of others. Exit "
        "status 1: a step failed, or its time was over.",
        "",
        "--steps tune --minutes 8",
        "--dry-run   # without a GPU",
        more=help_of_steps(),
    )
    parser.add_argument(
        "--steps",
        nargs="+",
        choices=STEPS,
        metavar="NAME",
        help=f"steps of the list below, in this order (default: {' '.join(DEFAULT)}; with --dry-run: all)",
    )
    parser.add_argument(
        "--minutes",
        type=command.positive_number,
        metavar="M",
        help="minutes for all steps together (default: 8; with --dry-run: 20)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="every step, tiny, in Triton's interpreter on the CPU: says that they run",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=LATEST / "gpu",
        metavar="FOLDER",
        help="folder that everything is written to",
    )
    return parser


def perform_all(chosen: argparse.Namespace, out: Path, deadline: float, variables: dict[str, str]) -> bool:
    """Whether a step failed, or its time was over; each says what it found as soon as it ends."""
    dry, failed = chosen.dry_run, False
    waiting = list(chosen.steps or (STEPS if dry else DEFAULT))
    while waiting:
        left = deadline - time.monotonic()
        seconds = left if dry else shares(waiting, left)  # of a dry run the steps' seconds, a GPU's, say nothing
        step = STEPS[waiting.pop(0)]
        result = perform(step, seconds, out, dry, variables)
        failed |= bool(result["status"]) or "stopped" in result
        if step.name == "tune" and not dry:
            shutil.copy(out / "configurations.json", TABLE)  # what follows is measured with it
        journal.write(out / "journal.ndjson", "gpu", **result)
        instead = f" (dry: {step.instead})" if dry else ""
        print(", ".join(f"{key} {value}" for key, value in result.items()) + instead, flush=True)
        for line in outcome(step.name, out):
            print(f"  {line}", flush=True)
    return failed


def main(arguments: Sequence[str]) -> int:
    chosen = parser().parse_args(arguments)
    dry = chosen.dry_run
    if not dry and not torch.cuda.is_available():
        return command.not_run("gpu", "no GPU", command.interpreted())
    deadline = time.monotonic() + 60 * (chosen.minutes or (20 if dry else 8))
    out = chosen.out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(
            f"gpu: --out: expected a folder that can be written to, got {chosen.out}: {error.strerror}", file=sys.stderr
        )
        return command.NOT_RUN
    variables = os.environ | {"DCA_TEST_EXAMPLES": "10"}
    if dry:
        variables |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        if tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4):
            print(f"numpy {np.__version__}: Triton 3.6's interpreter needs one before 2.4; steps with a backward fail")
    print(f"environment: {describe(environment())}")
    for name, what in OPTIONAL.items():
        if importlib.util.find_spec(name) is None:
            print(f"{name} is not installed: not run: {what}")
    shutil.copy(TABLE, out)

    failed = perform_all(chosen, out, deadline, variables)
    print(f"everything is in {out}; what each step said is in its log.txt")
    return 1 if failed else 0


def outcome(step: str, out: Path) -> list[str]:
    """What a step found, in few lines: the rest is in the log."""
    entries = [
        entry
        for entry in journal.read(out / "journal.ndjson")
        if entry["step"] == step and entry["environment"]["source"] == environment()["source"]
    ]
    if step == "smoke":
        entries = journal.latest(entries, "case")
        wrong = [entry for entry in entries if not entry["well"]]
        named = [f"FAILED: {entry['case']}: {entry['found']}; {entry.get('where', '')}" for entry in wrong]
        return [*named, f"{len(entries)} cases, {len(wrong)} failed"]
    if step == "kernels":
        return report_of.kernels(entries).splitlines()
    return []
