"""Tables and progress, by tabulate and tqdm where they are installed, and plainly where they are not."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def table(lines: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """GitHub Markdown; None is an empty cell. No lines are no table."""
    if not lines:
        return ""
    cells = [["" if cell is None else str(cell) for cell in line] for line in lines]
    try:
        from tabulate import tabulate
    except ImportError:
        rows = [list(headers), ["---"] * len(headers), *cells]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return tabulate(cells, list(headers), tablefmt="github", disable_numparse=True)


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


def number(value: float | None, spec: str = ".3g") -> str:
    return "" if value is None else format(value, spec)


def ratio(a: float | None, b: float | None, unit: str = "") -> str:
    """a / b, or nothing where one was not measured or is too small to measure."""
    return f"{a / b:.2f}{unit}" if a and b else ""
