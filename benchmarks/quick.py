"""The main job: reference and fused Dual Cross-Attention on a real image: the module, its stages, whole networks."""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import STOPPED, cases, command, console, measure, plots, report, rows, run
from benchmarks.cases import Size
from benchmarks.environment import describe, environment
from benchmarks.group import Effort, Group, measured
from benchmarks.providers import EAGER, FUSED, eager_on
from benchmarks.rows import Row


@dataclass(frozen=True)
class Part:
    """A preset of `run`: its cases, the mode that is timed in each phase, and how long; one image but of the module."""

    says: str
    cases: Sequence[str]
    modes: dict[str, str]
    effort: Effort


PARTS = {
    "module": Part(
        "all of Dual Cross-Attention, at each batch",
        ("dca",),
        {"eval": "forward", "train": "full"},
        Effort(3.0, longest=120.0),
    ),
    "stages": Part(
        "each of its four stages alone, one image",
        cases.STAGES,
        {"eval": "forward", "train": "backward"},
        Effort(1.0, longest=120.0, memory=False),
    ),
    "networks": Part(
        "a training step of the paper's six networks, on one image of half the paper's side (a minute)",
        cases.HOSTS,
        {"train": "full"},
        Effort(3.0, longest=120.0, memory=False),
    ),
}
NOISY = 0.5  # of the median: where what lies between the 20th and the 80th percentile is more, something else ran
COLUMNS = {
    "max error, RMS error": "of the outputs, from the official operations in float64",
    "time": "of a call, the median (± half of what lies between the 20th and the 80th percentile)",
    "speed-up": "the reference's time over this one's",
    "peak MB": "memory at the peak, above the inputs",
    "memory ratio": "the reference's peak over this one's",
}


def parser() -> argparse.ArgumentParser:
    parser = command.parser(
        "quick",
        "Runs a U-Net encoder over tiles of a real image and feeds its four skip maps to the reference and to the "
        "fused Dual Cross-Attention, with the same weights. Checks both against float64, then measures time, and of "
        "the module memory. Ctrl-C ends it early, with what was measured by then. Exit status 1 means that a fused "
        "module is not within its error budget. `python -m benchmarks --help` lists the other commands.",
        "--image mine.png",
        "--parts module --batch 8 --mode train",
        "--parts module networks --compiled",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=["module", "stages"],
        help=f"what to run. {command.listed({name: part.says for name, part in PARTS.items()})}",
    )
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="of the module in evaluation, the reference under torch.compile as well (a minute; on a CPU it needs a "
        "C++ compiler)",
    )
    parser.add_argument(
        "--batch", type=command.positive_integer, nargs="+", default=[1, 4], metavar="B", help="tiles in a batch"
    )
    parser.add_argument("--dtype", choices=cases.DTYPES, default="float32", help=command.DTYPE)
    parser.add_argument("--image", type=Path, metavar="FILE", help="your own image instead of the bundled tissue slide")
    parser.add_argument(
        "--patch",
        type=command.positive_integer,
        default=28,
        metavar="P",
        help="side of the token grid; a tile has 8 P pixels a side",
    )
    parser.add_argument(
        "--mode",
        nargs="+",
        choices=list(cases.MODES),
        default=list(cases.MODES),
        help="eval: a forward in evaluation; train: a training step, forward and backward",
    )
    parser.add_argument(
        "--json", type=command.file, default=rows.LATEST / "main.jsonl", metavar="FILE", help="where the rows go"
    )
    parser.add_argument(
        "--plot", type=command.file, default=rows.LATEST / "main.png", metavar="FILE", help="where the figure goes"
    )
    return parser


def groups(chosen: argparse.Namespace) -> Iterator[tuple[str, Group]]:
    """Each group with its part: what a newcomer looks for first, first."""

    def sizes(case: str) -> dict[str, Size]:
        size = Size(cases.FEATURES, chosen.patch)
        if case in cases.HOSTS:
            (own,) = (cases.SIZES[name] for name in cases.sizes_of(case))
            size = Size(own.features, own.patch // 2)
        return {f"grid {size.patch} x {size.patch}": size}

    for name, part in ((name, part) for name, part in PARTS.items() if name in chosen.parts):
        batches = chosen.batch if name == "module" else [1]
        phases = [phase for phase in chosen.mode if phase in part.modes] or list(part.modes)
        for batch, phase in itertools.product(batches, phases):
            compiled = ["reference compiled"] if chosen.compiled and (name, phase) == ("module", "eval") else []
            named = ["without", *eager_on(measure.device()), *compiled]
            fixed = [chosen.dtype], [batch], [phase], [part.modes[phase]], named
            for group in run.Selection(part.cases, sizes, *fixed).groups():
                yield name, group


def summary(found: Sequence[Row]) -> str:
    """A group's times, in a line."""
    times = {row.provider: row.p50_ms for row in found}
    parts = []
    for row in found:
        ratio = "" if row.provider in ("reference", "without") else console.times(times.get("reference"), row.p50_ms)
        said = f"not run: {row.not_run}" if row.not_run else console.duration(row.p50_ms)
        parts.append(f"{row.provider} {said}" + f" ({ratio})" * bool(ratio))
    return ", ".join(parts)


def table(found: Sequence[Row]) -> str:
    """One line a case and provider, as GitHub Markdown."""
    lines = []
    for row in found:
        base = baseline(found, row)
        lines.append(
            [
                f"{row.step}, batch {row.batch}, {row.size}",
                row.provider,
                console.small(row.max_error),
                console.small(row.rms_error),
                f"not run: {row.not_run}" if row.not_run else report.span(row),
                console.times(base.p50_ms, row.p50_ms),
                console.number(row.peak_mb),
                console.times(base.peak_mb, row.peak_mb),
            ]
        )
    headers = ["case", "provider", "max error", "RMS error", "time", "speed-up", "peak MB", "memory ratio"]
    return console.table(lines, headers)


def baseline(found: Sequence[Row], row: Row) -> Row:
    """The reference's row of the same case."""
    return next(r for r in found if r.group == row.group and r.provider == "reference")


def noisy(found: Sequence[Row]) -> list[str]:
    """The cases of which a time spreads widely."""
    wide = [row for row in found if row.p50_ms is not None and row.p80_ms - row.p20_ms > NOISY * row.p50_ms]
    return list(dict.fromkeys(f"{row.case}, {row.step}, batch {row.batch}" for row in wide))


def compared(base: Row, ours: Row) -> str:
    """How many times as fast ours is, and what the reference takes of its memory; nothing where one has no time."""
    if not base.p50_ms or not ours.p50_ms:
        return ""
    faster = console.number(base.p50_ms / ours.p50_ms)
    said = f"{ours.step}, batch {ours.batch}: {ours.provider} is {faster} times as fast as the reference"
    if base.peak_mb and ours.peak_mb:
        said += f"; the reference takes {console.number(base.peak_mb / ours.peak_mb)} times as much memory"
    return said


def rows_of(wanted: dict[Group, Effort], image: np.ndarray, file: Path) -> list[Row]:
    """What was measured until Ctrl-C, each group in a line and in the file, whose last run's rows stay until then."""
    found: list[Row] = []
    turns = run.measured_in_turn(list(wanted), lambda group: measured(group, image, wanted[group]), quick=True)
    try:
        for group, new in turns:
            if not found:
                file.unlink(missing_ok=True)
            rows.append(new, file)
            found += new
            console.say(f"{group}: {summary(new)}")
    except KeyboardInterrupt:
        print("\nstopped" + ": what follows is what was measured by then" * bool(found))
    return found


def show(found: Sequence[Row], file: Path, plot: Path) -> None:
    """Tables and a figure."""
    module = [row for row in found if row.case == "dca"]
    tables = (
        (table(module), COLUMNS),
        (report.stages(found), report.COLUMNS["stages"]),
        (report.hosts(found), report.COLUMNS["hosts"]),
    )
    for text, columns in tables:
        if text:
            print(f"\n{text}\n\n{console.legend(columns, text)}")
    print(f"\nrows: {file}")
    if module:
        drawn = plots.draw(plots.bars, module, plot)
        print(plots.NOT_DRAWN if drawn is None else f"figure: {drawn}")


def conclude(found: Sequence[Row]) -> bool:
    """Say whether it is right and how much faster; whether nothing of ours is wrong."""
    if any(row.wrong for row in found):
        raised = [row.not_run for row in found if row.wrong and row.raised]
        what = f"raised an error ({raised[0]})" if raised else "is outside its error budget"
        print(f"parity: FAILED. A fused module {what}; nothing was timed where it is.")
        return False
    checked = any(row.parity is not None for row in found if row.provider in FUSED)
    print(f"parity: {'within the error budget everywhere' if checked else 'nothing was checked'}")
    if spread := noisy(found):
        print(
            f"note: the times of {'; '.join(spread)} vary by more than half: something else ran on this machine, and "
            "these ratios may be wrong"
        )
    module = [row for row in found if row.case == "dca"]
    for row in (row for row in module if row.provider in FUSED):
        line = compared(baseline(module, row), row)
        if line:
            print(line)
    return True


def main(arguments: Sequence[str]) -> int:
    chosen = parser().parse_args(arguments)
    if chosen.patch == 1:
        print(
            "--patch: expected 2 or more, got 1: the last map is one pixel, of which BatchNorm cannot train",
            file=sys.stderr,
        )
        return 2
    try:
        image = cases.load_image(chosen.image)
    except (OSError, ValueError) as error:
        print(f"--image: {error}", file=sys.stderr)
        return 2
    print(f"image: {chosen.image or 'immunohistochemistry slide'}, {image.shape[0]} x {image.shape[1]}")
    print(f"environment: {describe(environment())}")
    for name in EAGER:
        if name not in eager_on(measure.device()):
            print(f"{name}: not run: no GPU")
    wanted = {group: PARTS[name].effort for name, group in groups(chosen)}
    found = rows_of(wanted, image, chosen.json)
    if not found:
        return STOPPED
    show(found, chosen.json, chosen.plot)
    if not conclude(found):
        return 1
    return 0 if len(found) == sum(len(group.providers) for group in wanted) else STOPPED
