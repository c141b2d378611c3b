"""What a machine with a GPU said beside times of cases: a line of JSON each, written as soon as it is known."""

import json
from pathlib import Path
from typing import Any

from benchmarks.environment import environment

Entry = dict[str, Any]


def write(path: Path | None, step: str, **values: Any) -> Entry:
    """Append an entry, with what it was found in; without a path, only return it."""
    entry = {"step": step, **values, "environment": environment()}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
    return entry


def read(path: Path | None) -> list[Entry]:
    """The entries of a file; a half-written last line, of a process that was killed, is left out."""
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]
