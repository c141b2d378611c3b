"""`python -m benchmarks report`: tables between a document's markers, and figures, made of committed rows alone."""

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import cases, command, console, journal, plots, rows
from benchmarks.environment import ROOT, measured_on
from benchmarks.providers import EAGER, FUSED, IMPLEMENTATIONS, PROVIDERS
from benchmarks.rows import RESULTS, Row

DOCUMENTS = [ROOT / "README.md", ROOT / "docs" / "benchmarks.md"]
HOST = "(host)"  # marks a time in which the GPU waits for the host
LOOSE = "†"  # marks a time of what is outside the error budget: a reference's, ours are not timed then
MARKS = {
    HOST: "Python and its launches take that long, and the GPU waits; a graph's row is the kernels'.",
    LOOSE: "outside the error budget, which ours keep: on a GPU PyTorch rounds the operands of float32 convolutions to "
    "TF32, and torch.compile sums in another order.",
}
BEST = "speed-up at best"
SUMMARY_BATCHES = (1, 32)
BAR = 50  # characters of the longest bar
TIMES = "the median of a call (± half of what lies between the 20th and the 80th percentile)"
OFFICIAL_AND_OURS = ("reference", *FUSED)
COLUMNS = {
    "module": {
        ", ".join(OFFICIAL_AND_OURS): f"the official operations and the two backends: {TIMES}; compiled: by "
        "torch.compile; graph: replayed as a CUDA graph",
        **{name: one.says for name, one in IMPLEMENTATIONS.items() if name not in ("without", *OFFICIAL_AND_OURS)},
        BEST: "the fastest reference's time over our fastest one's, compiled and graphs included",
        "reference peak MB, ours peak MB": "memory at the peak above the inputs, called eagerly; ours: of the backend "
        "that takes less",
    },
    "stages": {
        "floor": "what this machine's memory and arithmetic, measured in the same run, allow at best",
        ", ".join(EAGER): "the median of the fastest of eager, compiled and graph (the floor's share of it)",
        BEST: "the reference's time over our fastest one's",
    },
    "hosts": {
        ", ".join(("without DCA", *EAGER)): f"a training step of the network: {TIMES}",
        "reference adds, ours adds": "that step's time over the one without DCA: a small difference of large times",
        BEST: "the step's time with the reference over the one with our fastest",
    },
}

Group = tuple[str | int, ...]


def folders(results: Path) -> list[Path]:
    """One a machine: the subfolders of `results`, or itself where it has rows."""
    inner = [p for p in results.iterdir() if p.is_dir() and p.name != rows.LATEST.name]
    return [results] if any(results.glob("*.jsonl")) else sorted(inner)


def machines(results: Path) -> dict[Path, list[Row]]:
    """Rows by the folder that they lie in.

    Raises:
        ValueError: a row's provider is not known, of which no table and no figure says anything.
    """
    found = {folder: rows.load(folder) for folder in folders(results)}
    for folder, row in ((folder, row) for folder, of_machine in found.items() for row in of_machine):
        if row.provider not in PROVIDERS:
            known = ", ".join(PROVIDERS)
            raise ValueError(f"{folder}: {row.title}: expected a provider of {known}, got {row.provider!r}")
    return {folder: of_machine for folder, of_machine in found.items() if of_machine}


def best(found: Iterable[Row], *implementations: str) -> Row | None:
    """The fastest of the rows of an implementation, compiled or not."""
    timed = [r for r in found if r.p50_ms is not None and r.provider.split()[0] in implementations]
    return min(timed, key=lambda row: row.p50_ms, default=None)


def grouped(found: Iterable[Row], wanted: Callable[[Row], bool]) -> dict[Group, list[Row]]:
    groups: dict[Group, list[Row]] = {}
    for row in filter(wanted, found):
        groups.setdefault(row.group, []).append(row)
    return dict(sorted(groups.items(), key=lambda item: _rank(item[0])))


def _rank(group: Group) -> tuple[int, ...]:
    """Of a group among others: as the registry has them, not by the alphabet."""
    case, size, batch, dtype, phase, mode = group
    names = (case, dtype, phase, mode, size)
    known = (cases.CASES, cases.DTYPES, cases.MODES, cases.MODES["train"], cases.SIZES)
    places = [list(k).index(name) if name in k else -1 for name, k in zip(names, known, strict=True)]
    return *places, int(batch)


def module(found: Sequence[Row]) -> str:
    """Evaluation's forward and training's forward and backward: every provider, and ours against the best reference."""
    groups = grouped(found, lambda r: r.case == "dca" and r.step in plots.COMPARED)
    names = plots.order([row for group in groups.values() for row in group])
    lines = []
    for group in groups.values():
        ours, theirs = best(group, *FUSED), best(group, "reference")
        if ours is None and theirs is None:
            continue
        plain = {row.provider: row for row in group}
        least = min((r.peak_mb for r in group if r.provider in FUSED and r.peak_mb), default=None)
        reference, first = plain.get("reference"), group[0]
        lines.append(
            [
                f"{first.size}, batch {first.batch}, {first.dtype}, {first.step}",
                *(span(plain.get(name)) for name in names),
                console.times(theirs and theirs.p50_ms, ours and ours.p50_ms),
                console.number(reference and reference.peak_mb),
                console.number(least),
            ]
        )
    headers = ["case", *names, BEST, "reference peak MB", "ours peak MB"]
    return _marked(console.table(lines, headers)) + _lost(groups)


def stages(found: Sequence[Row]) -> str:
    """Every stage: the best reference, each backend's best, and how near the floor it is."""
    groups = grouped(found, lambda r: r.case in cases.STAGES and r.mode != "full")
    lines = []
    for group in groups.values():
        of = {name: best(group, name) for name in EAGER}
        if not any(of.values()):
            continue
        floor = next((r.floor_ms for r in group if r.floor_ms), None)
        ours = best(group, *FUSED)
        lines.append(
            [
                group[0].title,
                console.duration(floor),
                *(_of_floor(row) for row in of.values()),
                console.times(of["reference"] and of["reference"].p50_ms, ours and ours.p50_ms),
            ]
        )
    return _marked(console.table(lines, ["stage", "floor", *EAGER, BEST])) + _lost(groups)


def hosts(found: Sequence[Row]) -> str:
    """A step of each network: without DCA, with the reference's and with ours."""
    groups = grouped(found, lambda r: r.case in cases.HOSTS and (r.phase, r.mode) == ("train", "full"))
    lines = []
    for (case, _, batch, dtype, *_), group in groups.items():
        of = {name: best(group, name) for name in ("without", *EAGER)}
        ours = best(group, *FUSED)
        if of["reference"] is None or ours is None:
            continue
        bare = of["without"]
        lines.append(
            [
                f"{case}, batch {batch}, {dtype}",
                *(span(row) for row in of.values()),
                *(console.duration(bare and row.p50_ms - bare.p50_ms) for row in (of["reference"], ours)),
                console.times(of["reference"].p50_ms, ours.p50_ms),
            ]
        )
    headers = ["network", "without DCA", *EAGER, "reference adds", "ours adds", BEST]
    return _marked(console.table(lines, headers)) + _lost(groups)


def not_run(found: Sequence[Row]) -> str:
    """What has no time, by reason."""
    reasons: dict[str, list[Row]] = {}
    for row in (row for row in found if row.not_run):
        reasons.setdefault(row.not_run, []).append(row)
    lines = []
    for reason, of_reason in sorted(reasons.items()):
        names, where = (sorted({getattr(r, name) for r in of_reason}) for name in ("provider", "case"))
        lines.append([reason, ", ".join(names), ", ".join(where), len(of_reason)])
    return console.table(lines, ["not run", "providers", "cases", "rows"])


def summary(found: Sequence[Row]) -> str:
    """The module at the paper's size in few columns: called eagerly, and ours against the best reference."""
    lines = []
    module = grouped(
        found,
        lambda r: (r.case, r.size) == ("dca", "paper") and r.step in plots.COMPARED and r.batch in SUMMARY_BATCHES,
    )
    for group in module.values():
        eager = {row.provider: row for row in group if row.p50_ms is not None}
        reference, ours = eager.get("reference"), best([eager[name] for name in FUSED if name in eager], *FUSED)
        if reference is None or ours is None:
            continue
        lines.append(
            [
                f"{ours.step}, batch {ours.batch}, {ours.dtype}",
                _median(reference),
                _median(ours),
                console.times(reference.p50_ms, ours.p50_ms),
                console.times(best(group, "reference").p50_ms, best(group, *FUSED).p50_ms),
                console.times(reference.peak_mb, ours.peak_mb),
            ]
        )
    return console.table(lines, ["", "reference", "fused", "speed-up eager", BEST, "memory"])


def where_the_time_goes(found: Sequence[Row]) -> str:
    """A forward of one image at the paper's size, stage by stage, in bars of text: they show in any reader."""
    groups = grouped(
        found,
        lambda r: (
            r.case in cases.STAGES and (r.size, r.batch, r.dtype, r.step) == ("paper", 1, "float32", plots.COMPARED[0])
        ),
    )
    pairs = [(best(group, "reference"), best(group, *FUSED)) for group in groups.values()]
    pairs = [pair for pair in pairs if None not in pair]
    longest = max((row.p50_ms for pair in pairs for row in pair), default=0.0)
    lines = []
    for pair in pairs:
        for name, row in zip(("reference", "fused"), pair, strict=True):
            stage = row.case if name == "reference" else ""
            bar = "█" * max(1, round(BAR * row.p50_ms / longest))
            lines.append(f"{stage:18} {name:9} {console.duration(row.p50_ms):>8}  {bar}")
    return "\n".join(["```text", *lines, "```"]) if lines else ""


BLOCKS: dict[str, Callable[[Sequence[Row]], str]] = {
    "time": where_the_time_goes,
    "summary": summary,
    "module": module,
    "stages": stages,
    "hosts": hosts,
    "not run": not_run,
}
PICTURES = {"module": ("latency", "memory", "speedup"), "stages": ("of_floor",)}


def span(row: Row | None) -> str:
    """The median, half of what lies between the 20th and 80th percentile, and marks."""
    if row is None or row.p50_ms is None:
        return ""
    host = f" {HOST}" if row.host_ms is not None and row.host_ms > 0.9 * row.p50_ms else ""
    return f"{_median(row)} ±{50 * (row.p80_ms - row.p20_ms) / row.p50_ms:.0f} %{host}"


def _median(row: Row) -> str:
    return console.duration(row.p50_ms) + f" {LOOSE}" * (row.parity is False)


def _of_floor(row: Row | None) -> str:
    """The median, and the share of it that the floor is."""
    if row is None or not row.floor_ms:
        return ""
    return f"{_median(row)} ({100 * row.floor_ms / row.p50_ms:.0f} %)"


def _marked(cells: str) -> str:
    """Under a table what the marks in it mean."""
    return "\n\n".join([cells, *(f"{mark}: {meaning}" for mark, meaning in MARKS.items() if mark in cells)])


def _lost(groups: dict[Group, list[Row]]) -> str:
    """Where a reference is faster than everything of ours, said under the table; nothing where no two are compared."""
    pairs = [(best(group, *FUSED), best(group, "reference")) for group in groups.values()]
    compared = [(ours, theirs) for ours, theirs in pairs if ours and theirs]
    if not compared:
        return ""
    lost = [
        f"{theirs.title}: {console.times(theirs.p50_ms, ours.p50_ms)} ({theirs.provider})"
        for ours, theirs in compared
        if theirs.p50_ms < ours.p50_ms
    ]
    return "\n\nSlower than the best reference: " + ("; ".join(lost) if lost else "nowhere") + "."


def checks(entries: Sequence[journal.Entry]) -> str:
    """Cases of the smoke test that failed, and kernels that did not compile."""
    cases_of = {entry["case"]: entry for entry in entries if entry["step"] == "smoke"}
    wrong = [entry for entry in cases_of.values() if not entry["well"]]
    lines = [[entry["case"], entry["found"], entry.get("where")] for entry in wrong]
    of_compiler = [entry for entry in entries if entry["step"] == "compile" and "failed" in entry]
    lines += [[entry["kernel"], entry["failed"], "does not compile"] for entry in of_compiler]
    counts = f"{len(cases_of)} cases, {len(wrong)} failed."
    return f"{counts}\n\n{console.table(lines, ['failed', 'found', 'where'])}" if lines else counts


def kernels(entries: Sequence[journal.Entry]) -> str:
    """One line a kernel and case: its time beside its floor, and beside what the model says."""
    lines = [
        [
            f"{entry['phase']}, batch {entry['batch']}, {entry['dtype']}",
            entry["kernel"],
            *(console.number(entry[column] or None) for column in ("us", "floor_us", "estimated_us")),
            console.times(entry["us"], entry["floor_us"]),
        ]
        for entry in journal.latest(entries, "step", "size", "phase", "batch", "dtype", "kernel")
        if entry["step"] == "kernels"
    ]
    return console.table(lines, ["case", "kernel", "us", "floor, us", "model, us", "of floor"])


def block(name: str, results: Path, document: Path, figures: bool = True) -> str:
    """A block's Markdown, a machine after the other where it has rows for it, with links to its figures."""
    parts, tables = [], []
    for folder, found in machines(results).items():
        table = BLOCKS[name](found)
        if not table:
            continue
        tables.append(table)
        parts += [f"{' and '.join(sorted({measured_on(row.environment) for row in found}))}:", table]
        for picture in (p for p in plots.figures(found) if figures and p in PICTURES.get(name, ())):
            link = Path(os.path.relpath(folder / f"{picture}.png", document.parent)).as_posix()
            parts.append(f"![{picture.replace('_', ' ')}]({link})")
    if parts and name in COLUMNS:
        parts.append(console.legend(COLUMNS[name], *tables))
    return "\n\n".join(parts) or "Nothing measured yet."


def host(results: Path) -> str:
    """What a call costs the host, and what it compiles: of host.json in each machine's folder."""
    parts = []
    for path in (folder / "host.json" for folder in folders(results)):
        if path.exists():
            its = json.loads(path.read_text())
            subject = f"triton {its['environment']['triton']}, {its['size']}, batch {its['batch']}, {its['dtype']}"
            parts += [f"{measured_on(its['environment'])}, {subject}:", calls(its["rows"]), compiling(its["compiling"])]
    return "\n\n".join(parts) or "Nothing measured yet."


def calls(found: Sequence[dict[str, Any]]) -> str:
    """What calls of `python -m benchmarks host` took, the first of some over each."""
    lines = [
        [one["mode"], one["what"], *[f"{one[name]:.0f}" for name in ("us", "p20", "p80")], f"{one['ratio']:.2f}"]
        for one in found
    ]
    return console.table(lines, ["mode", "what", "µs", "p20", "p80", "the call over this"])


def compiling(found: Sequence[dict[str, Any]]) -> str:
    """What its calls compiled."""
    lines = [[one["mode"], one["what"], one["kernels"], f"{one['seconds']:.1f}"] for one in found]
    return console.table(lines, ["mode", "compiling", "kernels", "seconds of one core"])


def filled(text: str, blocks: dict[str, str]) -> str:
    """The document with each block between its markers; text without a block's markers stays as it is.

    Raises:
        ValueError: a marker has no partner.
    """
    for name, content in blocks.items():
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        if (text.count(begin), text.count(end)) not in ((0, 0), (1, 1)):
            raise ValueError(f"expected {begin} and {end} once each, or neither")
        pattern = re.compile(re.escape(begin) + ".*" + re.escape(end), re.DOTALL)
        text = pattern.sub(lambda match: f"{begin}\n{content}\n{end}", text)  # noqa: B023  used at once
    return text


def checked(chosen: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: what is to be reported is not there, or a document cannot be written.
    """
    if not chosen.results.is_dir():
        raise ValueError(
            f"--results: expected a folder of rows, or of folders of rows, found no folder {chosen.results}"
        )
    if chosen.journal is not None and not chosen.journal.is_file():
        raise ValueError(f"--journal: expected a file, found no {chosen.journal}")
    for document in chosen.document:
        if document.is_dir() or not document.parent.is_dir():
            raise ValueError(f"--document: expected a file in a folder that is there, got {document}")
    if not machines(chosen.results) and not journal.read(chosen.journal):
        raise ValueError(f"--results: expected rows (*.jsonl) in {chosen.results} or in its folders, found none")


def documents(chosen: argparse.Namespace) -> dict[Path, str]:
    """The text of each document, with its blocks; a block that is in none of them is said.

    Raises:
        ValueError: as `checked`, or a row or a marker is broken.
    """
    checked(chosen)
    entries, written, missing = journal.read(chosen.journal), {}, {*BLOCKS, "host"}
    for document in chosen.document:
        blocks = {name: block(name, chosen.results, document, not chosen.no_figures) for name in BLOCKS}
        blocks |= {"host": host(chosen.results)}
        if chosen.journal is not None:
            blocks |= {"checks": checks(entries), "kernels": kernels(entries)}
        empty = "\n\n".join(f"## {n.capitalize()}\n\n<!-- begin: {n} -->\n<!-- end: {n} -->" for n in blocks) + "\n"
        before = document.read_text() if document.exists() else empty
        try:
            written[document] = filled(before, blocks)
        except ValueError as error:
            raise ValueError(f"{document}: {error}") from error
        missing -= {name for name in blocks if f"<!-- begin: {name} -->" in before}
    for name in sorted(missing):
        print(f"no document has a block {name!r}")
    return written


def parser() -> argparse.ArgumentParser:
    parser = command.parser(
        "report",
        "Writes tables of committed rows between the documents' markers, `<!-- begin: NAME -->` and "
        f"`<!-- end: NAME -->` with the names {', '.join(BLOCKS)}, host, and draws figures beside the rows. A document "
        "that does not exist is made, with every block.",
        "",
        "--check",
        "--results benchmarks/results/latest --document report.md",
    )
    parser.add_argument(
        "--document",
        type=Path,
        nargs="+",
        default=DOCUMENTS,
        metavar="FILE",
        help="Markdown files whose blocks are written",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        metavar="FOLDER",
        help="folder of rows (*.jsonl) of one machine, or of such folders, one a machine",
    )
    parser.add_argument(
        "--journal", type=Path, metavar="FILE", help="journal of a machine with a GPU: its kernels and failures too"
    )
    parser.add_argument("--no-figures", action="store_true", help="tables alone: figures can be drawn elsewhere, later")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where something differs")
    return parser


def draw(results: Path, check: bool) -> list[Path]:
    """Draw each machine's figures; those that differ from what the rows give, where they are only checked."""
    stale = []
    with tempfile.TemporaryDirectory() as scratch:
        for folder, found in machines(results).items():
            for name in plots.figures(found):
                path = folder / f"{name}.png"
                drawn = Path(scratch) / f"{name}.png" if check else path
                if plots.draw(plots.FIGURES[name], found, drawn) is None:
                    print(plots.NOT_DRAWN)
                    break
                if not check:
                    print(f"figure: {path}")
                elif not (path.exists() and path.read_bytes() == drawn.read_bytes()):
                    stale.append(path)
    return stale


def main(arguments: Sequence[str]) -> int:
    chosen = parser().parse_args(arguments)
    try:
        written = documents(chosen)
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2

    stale = [document for document, text in written.items() if not document.exists() or document.read_text() != text]
    for document, text in () if chosen.check else written.items():
        document.write_text(text)
        print(f"document: {document}")
    if not chosen.no_figures:
        stale += draw(chosen.results, chosen.check)
    if chosen.check and stale:
        print("\n".join(f"{path}: differs from what the rows give" for path in stale))
        return 1
    if chosen.check:
        print(f"{', '.join(map(str, written))}: tables and figures are what the rows give")
    return 0
