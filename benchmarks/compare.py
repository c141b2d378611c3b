"""`python -m benchmarks compare BEFORE AFTER`: what got faster, what slower, and what took more memory."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import command, console, rows
from benchmarks.rows import Row


def verdict(before: Row, after: Row, threshold: float) -> str:
    """What became of a row: a word, "regression: ..." where it is worse by more than the threshold and beyond noise.

    Noise is what lies between the 20th and the 80th percentile: times whose spans overlap are the same.
    """
    if before.p50_ms is None and after.p50_ms is None:
        return "not run"
    if before.p50_ms is None:
        return "new"
    if after.p50_ms is None:
        return f"regression: not run any more: {after.not_run}"
    if after.peak_mb and before.peak_mb and after.peak_mb > max(threshold * before.peak_mb, before.peak_mb + 1):
        return "regression: memory"
    if after.p20_ms > before.p80_ms:
        return "regression: slower" if after.p50_ms > threshold * before.p50_ms else "slower"
    if after.p80_ms < before.p20_ms:
        return "faster"
    return "same"


def by_key(name: str, path: Path) -> dict[tuple[Any, ...], Row]:
    """The rows that an argument names.

    Raises:
        ValueError: there are none.
    """
    if not path.exists():
        raise ValueError(f"{name}: expected a file of rows, or a folder of such, found no {path}")
    found = {row.key: row for row in rows.load(path)}
    if not found:
        raise ValueError(f"{name}: expected rows in {path}, found none")
    return found


def parser() -> argparse.ArgumentParser:
    parser = command.parser(
        "compare",
        "Compares two runs row by row. Times whose spans from the 20th to the 80th percentile overlap are the same. "
        "Exit status 1 means that something got slower, or took more memory, by more than the threshold.",
        "before.jsonl after.jsonl",
        "benchmarks/results/amd-epyc-2-threads benchmarks/results/latest --threshold 1.2 --all",
    )
    parser.add_argument("before", type=Path, metavar="BEFORE", help="a file of rows (*.jsonl), or a folder of such")
    parser.add_argument("after", type=Path, metavar="AFTER", help="another file of rows, or a folder of such")
    parser.add_argument(
        "--threshold",
        type=command.positive_number,
        default=1.1,
        metavar="RATIO",
        help="largest ratio of after to before that is no regression",
    )
    parser.add_argument("--all", action="store_true", help="also list what stayed the same")
    return parser


def main(arguments: Sequence[str]) -> int:
    chosen = parser().parse_args(arguments)
    try:
        before, after = (by_key(name, getattr(chosen, name)) for name in ("before", "after"))
    except (OSError, ValueError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    both = [(before[key], after[key]) for key in before if key in after]
    if not both:
        print(f"compare: {chosen.before} and {chosen.after} have no row in common", file=sys.stderr)
        return 2
    verdicts = [(old, new, verdict(old, new, chosen.threshold)) for old, new in both]
    lines = [
        [
            new.title,
            new.provider,
            *(console.duration(row.p50_ms) for row in (old, new)),
            console.times(new.p50_ms, old.p50_ms),
            *(console.number(row.peak_mb) for row in (old, new)),
            what,
        ]
        for old, new, what in verdicts
        if chosen.all or what not in ("same", "not run")
    ]
    if lines:
        headers = ["case", "provider", "time before", "after", "ratio", "peak MB before", "after", ""]
        print(console.table(lines, headers))
    regressions = sum(what.startswith("regression") for *_, what in verdicts)
    alone = len(before.keys() ^ after.keys())
    print(f"{len(both)} rows compared, {alone} in one of the two only; {regressions} regressions")
    machines = {row.environment.get("gpu") or row.environment.get("cpu") for pair in both for row in pair}
    if len(machines) > 1:
        print(f"note: these are different machines: {', '.join(sorted(map(str, machines)))}")
    return 1 if regressions else 0
