"""The main job: reference and fused Dual Cross-Attention on a real image: the module, its stages, whole networks."""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import STOPPED, cases, command, console, measure, plots, report, rows
from benchmarks.cases import Problem, Size
from benchmarks.environment import describe, environment
from benchmarks.group import Effort, Group, measured
from benchmarks.providers import EAGER, FUSED, eager_on, providers_of
from benchmarks.rows import Row

PARTS = {
    "module": "all of Dual Cross-Attention, at each batch",
    "stages": "each of its four stages alone, one image",
    "networks": "a training step of the paper's six networks, on one image of half the paper's side (a minute)",
}
SECONDS = {"module": 3.0, "stages": 1.0, "networks": 3.0}  # to time one case
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
        help=f"what to run. {command.listed(PARTS)}",
    )
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="in evaluation, the reference under torch.compile as well (a minute, and a C++ compiler on a CPU)",
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
    size, dtype = Size(cases.FEATURES, chosen.patch), cases.DTYPES[chosen.dtype]
    eager = eager_on(measure.device())

    def group(case: str, size: Size, batch: int, phase: str, named: Sequence[str], mode: str) -> Group:
        grid = f"grid {size.patch} x {size.patch}"
        return Group(grid, Problem(case, size, batch, dtype, phase == "train"), tuple(named), (mode,))

    if "module" in chosen.parts:
        for batch, phase in itertools.product(chosen.batch, chosen.mode):
            compiled = ("reference compiled",) if chosen.compiled and phase == "eval" else ()
            yield "module", group("dca", size, batch, phase, (*eager, *compiled), cases.MODES[phase][-1])
    if "stages" in chosen.parts:
        for phase, case in itertools.product(chosen.mode, cases.STAGES):
            named = [name for name in eager if name in providers_of(case)]
            yield "stages", group(case, size, 1, phase, named, "backward" if phase == "train" else "forward")
    if "networks" in chosen.parts:
        for case in cases.HOSTS:
            (own,) = cases.sizes_of(case)
            half = Size(cases.SIZES[own].features, cases.SIZES[own].patch // 2)
            yield "networks", group(case, half, 1, "train", ("without", *eager), "full")


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


def main(arguments: Sequence[str]) -> int:
    chosen = parser().parse_args(arguments)
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
    found: list[Row] = []
    wanted = list(groups(chosen))
    try:
        for part, group in console.progress(wanted, lambda item: str(item[1]), leave=False):
            new = measured(group, image, Effort(SECONDS[part], longest=120.0, memory=part == "module"))
            if not found:
                chosen.json.unlink(missing_ok=True)  # the last run's
            rows.append(new, chosen.json)
            found += new
            console.say(f"{group}: {summary(new)}")
    except KeyboardInterrupt:
        print("\nstopped" + ": what follows is what was measured by then" * bool(found))

    if not found:
        return STOPPED
    module = [row for row in found if row.case == "dca"]
    tables = (
        (table(module), COLUMNS),
        (report.stages(found), report.COLUMNS["stages"]),
        (report.hosts(found), report.COLUMNS["hosts"]),
    )
    for text, columns in tables:
        if text:
            print(f"\n{text}\n\n{console.legend(columns, text)}")
    print(f"\nrows: {chosen.json}")
    if module:
        drawn = plots.draw(plots.bars, module, chosen.plot)
        print(plots.NOT_DRAWN if drawn is None else f"figure: {drawn}")
    if any(row.wrong for row in found):
        print("parity: FAILED. A fused module is outside its error budget; nothing was timed where it is.")
        return 1
    checked = any(row.parity is not None for row in found)
    print(f"parity: {'within the error budget everywhere' if checked else 'nothing was checked'}")
    if spread := noisy(found):
        print(
            f"note: the times of {'; '.join(spread)} vary by more than half: something else ran on this machine, and "
            "these ratios may be wrong"
        )
    for row in (row for row in module if row.provider in FUSED):
        line = compared(baseline(module, row), row)
        if line:
            print(line)
    return 0 if len(found) == sum(len(group.providers) for _, group in wanted) else STOPPED
