"""The main job: reference and fused Dual Cross-Attention on a real image: the module, its stages, whole networks."""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import cases, command, console, measure, plots, report, rows
from benchmarks.cases import Problem, Size
from benchmarks.environment import describe, environment
from benchmarks.group import Effort, Group, measured
from benchmarks.rows import Row

COMPILED = "reference compiled"
PROVIDERS = ("reference", "torch", "triton", COMPILED)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Runs a U-Net encoder over tiles of a real image and feeds its four skip maps to the reference and "
        "to the fused Dual Cross-Attention, with the same weights; then measures the stages one by one, and a training "
        "step of six networks without DCA, with the reference's and with the fused one. Checks all against float64, "
        "then measures latency, and of the module peak memory. To take minutes, it gives the networks images of half "
        "the paper's side and compiles the reference for evaluation only; `python -m benchmarks run` does neither. "
        "Exit status 1 means that a fused module is not within its error budget. `python -m benchmarks --help` lists "
        "the other commands.",
        epilog="Example: python -m benchmarks quick --batch 1 --mode eval --image slide.png",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--batch", type=command.positive_integer, nargs="+", default=[1, 4], metavar="B", help="tiles in a batch"
    )
    parser.add_argument("--dtype", choices=cases.DTYPES, default="float32", help="dtype of maps and weights")
    parser.add_argument("--image", type=Path, metavar="FILE", help="your own image instead of the bundled tissue slide")
    parser.add_argument(
        "--patch",
        type=command.positive_integer,
        default=28,
        metavar="P",
        help="side of the token grid; a tile has 8 P pixels a side",
    )
    parser.add_argument("--mode", nargs="+", choices=list(cases.MODES), default=list(cases.MODES), help="what to run")
    parser.add_argument(
        "--quick", action="store_true", help="the module alone: few rounds, one batch, no compiled reference"
    )
    parser.add_argument(
        "--json", type=Path, default=rows.LATEST / "main.jsonl", metavar="FILE", help="where the rows go"
    )
    parser.add_argument(
        "--plot", type=Path, default=rows.LATEST / "main.png", metavar="FILE", help="where the figure goes"
    )
    return parser


def groups(chosen: argparse.Namespace) -> list[Group]:
    """The module at each batch, then its stages and the networks at one image, theirs of half the paper's side."""
    size, dtype = Size(cases.FEATURES, chosen.patch), cases.DTYPES[chosen.dtype]
    name, gpu = f"grid {chosen.patch} x {chosen.patch}", measure.device().type == "cuda"

    def group(case: str, size_name: str, size: Size, batch: int, mode: str, named: Sequence[str], step: str) -> Group:
        running = tuple(name for name in named if name != "triton" or gpu)
        return Group(size_name, Problem(case, size, batch, dtype, mode == "train"), running, (step,))

    if chosen.quick:
        return [group("dca", name, size, chosen.batch[0], m, PROVIDERS[:-1], cases.MODES[m][-1]) for m in chosen.mode]
    found = []
    for mode, batch in itertools.product(chosen.mode, chosen.batch):
        named = PROVIDERS if mode == "eval" else PROVIDERS[:-1]
        found.append(group("dca", name, size, batch, mode, named, cases.MODES[mode][-1]))
    for mode, case in itertools.product(chosen.mode, cases.STAGES):
        step = "backward" if mode == "train" else "forward"
        found.append(group(case, name, size, 1, mode, PROVIDERS[:-1], step))
    for case in cases.HOSTS if "train" in chosen.mode else ():
        (own,) = cases.sizes_of(case)
        half = Size(cases.SIZES[own].features, cases.SIZES[own].patch // 2)
        found.append(
            group(case, f"grid {half.patch} x {half.patch}", half, 1, "train", ("without", *PROVIDERS[:-1]), "full")
        )
    return found


def table(found: Sequence[Row]) -> str:
    """One line a case and provider, as GitHub Markdown. Ratios are the reference's figure over the provider's."""
    lines = []
    for row in found:
        base = baseline(found, row)
        times = " / ".join(console.number(t, ".0f") for t in (row.p20_ms, row.p50_ms, row.p80_ms))
        lines.append(
            [
                f"{row.phase}, batch {row.batch}, {row.size}",
                row.provider,
                console.number(row.max_error, ".1e"),
                console.number(row.rms_error, ".1e"),
                f"not run: {row.not_run}" if row.not_run else times,
                console.ratio(base.p50_ms, row.p50_ms, "x"),
                console.number(row.peak_mb, ".0f"),
                console.ratio(row.peak_mb, base.peak_mb),
            ]
        )
    headers = ["case", "provider", "max error", "RMS error", "p20 / p50 / p80 ms"]
    return console.table(lines, [*headers, "speed-up", "peak MB", "of reference"])


def baseline(found: Sequence[Row], row: Row) -> Row:
    """The reference's row of the same case."""
    return next(r for r in found if r.group == row.group and r.provider == "reference")


def main(arguments: Sequence[str]) -> int:
    chosen = parser().parse_args(arguments)
    try:
        image = cases.load_image(chosen.image)
    except (OSError, ValueError) as error:
        print(f"--image: {error}", file=sys.stderr)
        return 2
    print(f"image: {chosen.image or 'immunohistochemistry slide'}, {image.shape[0]} x {image.shape[1]}")
    print(f"environment: {describe(environment())}")
    found: list[Row] = []
    for group in console.progress(groups(chosen), Group.__str__, leave=False):
        whole = group.problem.case == "dca"
        seconds = 1.0 if chosen.quick else 8.0 if whole else 3.0
        found += measured(group, image, Effort(seconds, longest=120.0, memory=whole))

    module = [row for row in found if row.case == "dca"]
    print(f"\n{table(module)}\n")
    if not chosen.quick:
        print(f"{report.stages(found)}\n\n{report.hosts(found)}\n")
    if chosen.quick:
        print("stages, networks, compiled reference: not run: --quick")
    if measure.device().type == "cpu":
        print("triton: not run: no GPU")
    chosen.json.unlink(missing_ok=True)
    rows.append(found, chosen.json)
    print(f"rows: {chosen.json}\n{plots.draw(plots.bars, module, chosen.plot)}")
    if any(row.wrong for row in found):
        print("parity: FAILED. A fused module is outside its error budget; nothing was timed where it is.")
        return 1
    print("parity: within the error budget everywhere")
    for row in (row for row in module if row.provider in ("torch", "triton") and row.not_run is None):
        base = baseline(module, row)
        memory = console.ratio(row.peak_mb, base.peak_mb) or "?"
        speed = console.ratio(base.p50_ms, row.p50_ms, "x")
        print(f"{row.phase}, batch {row.batch}: {row.provider} {speed} the reference's speed, {memory} of its memory")
    return 0
