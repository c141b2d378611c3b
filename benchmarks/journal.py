"""What a machine with a GPU said beside times of cases: a line of JSON each, written as soon as it is known."""

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from benchmarks.environment import environment

Entry = dict[str, Any]


def write(path: Path | None, step: str, **values: Any) -> Entry:
    """Append an entry, with what it was found in; without a path, only return it.

    What a process that was killed left of a line is ended first, and stays unread.
    """
    entry = {"step": step, **values, "environment": environment()}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            if file.tell() and not _ends_a_line(file):
                file.write(b"\n")
            file.write(json.dumps(entry).encode() + b"\n")
    return entry


def read(path: Path | None) -> list[Entry]:
    """The entries of a file; half-written lines, of processes that were killed, are left out."""
    if path is None or not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def latest(entries: Iterable[Entry], *keys: str) -> list[Entry]:
    """Of entries that are equal under these keys, the last one."""
    return list({tuple(entry.get(key) for key in keys): entry for entry in entries}.values())


def _ends_a_line(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
