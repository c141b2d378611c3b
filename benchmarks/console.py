"""Numbers as people write them, tables and progress: by tabulate and tqdm where these are installed."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
UNITS = {"s": 1e-3, "ms": 1.0, "µs": 1e3}  # of a time in milliseconds


def table(lines: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """GitHub Markdown; None is an empty cell, and a column without any cell is left out. No lines are no table."""
    if not lines:
        return ""
    cells = [["" if cell is None else str(cell) for cell in line] for line in lines]
    filled = [i for i in range(len(headers)) if any(line[i] for line in cells)]
    names, cells = [headers[i] for i in filled], [[line[i] for i in filled] for line in cells]
    try:
        from tabulate import tabulate
    except ImportError:
        rows = [names, ["---"] * len(names), *cells]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return tabulate(cells, names, tablefmt="github", disable_numparse=True)


def legend(columns: dict[str, str], *tables: str) -> str:
    """What each column of these tables is, a line each.

    Args:
        columns: text by the headers that it is of, joined by ", "; of them those that no table has are left out.
    """
    headers = {cell.strip() for text in tables for cell in text.partition("\n")[0].split("|")}
    present = {", ".join(n for n in names.split(", ") if n in headers): what for names, what in columns.items()}
    return "\n".join(f"- {names}: {what}" for names, what in present.items() if names)


def progress(items: Iterable[T], name: Callable[[T], str] | None = None, **options: Any) -> Iterator[T]:
    """The items, with a bar that shows how many are done, and the name of the one at work."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield from items
        return
    bar = tqdm(items, **options)
    for item in bar:
        if name is not None:
            bar.set_description(name(item))
        yield item


def say(line: str) -> None:
    """Print a line above a bar of `progress`."""
    try:
        from tqdm import tqdm
    except ImportError:
        print(line, flush=True)
        return
    tqdm.write(line)


def number(value: float | None) -> str:
    """Three digits and no exponent: 1590, 62.3, 0.747. None is nothing."""
    if value is None:
        return ""
    rounded = float(f"{value:.3g}")
    magnitude = math.floor(math.log10(abs(rounded))) if rounded else 0
    return f"{rounded:.{max(0, 2 - magnitude)}f}"


def duration(milliseconds: float | None) -> str:
    """In the largest unit in which it is at least one: 1.59 s, 62.3 ms, 747 µs. None is nothing."""
    if milliseconds is None:
        return ""
    unit = next((unit for unit, factor in UNITS.items() if abs(milliseconds) * factor >= 1), "µs")
    return f"{number(milliseconds * UNITS[unit])} {unit}"


def small(value: float | None) -> str:
    """An error: 1.2e-07."""
    return "" if value is None else f"{value:.1e}"


def times(a: float | None, b: float | None) -> str:
    """How many times b is a, or nothing where one was not measured or is too small to measure."""
    if not a or not b:
        return ""
    return f"{a / b:.2f}x" if 0.1 < a / b < 10 else f"{number(a / b)}x"
