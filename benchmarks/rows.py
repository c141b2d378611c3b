"""The one kind of row that benchmarks write, a line of JSON each, and where the rows lie."""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
LATEST = RESULTS / "latest"
STEP_NAMES = {
    ("eval", "forward"): "forward",
    ("train", "forward"): "forward in training",
    ("train", "backward"): "backward",
    ("train", "full"): "training step",
}


@dataclass(frozen=True)
class Row:
    """One provider of one case at one size in one mode. What was not measured is None; `not_run` says why nothing was.

    Attributes:
        size: its name in `cases.SIZES`, or "grid P" of the main job.
        phase: "eval" or "train", BatchNorm's.
        mode: "forward", "backward" or "full", both.
        raised: whether it raised an error that may be ours, other than for want of memory.
        parity: whether the results are within the error budget of float64.
        parity_batch: images that this was checked on.
        max_error, rms_error: of the outputs, against float64.
        first_ms: the first forward, and backward where there is one, with what is compiled for it.
        rounds: samples of the percentiles.
        host_ms: on a GPU, the median time until the call returns.
        launches: on a GPU, kernels of a call.
        peak_mb: memory above what the call is given; on a CPU resident memory of a process of its own.
        counted_peak_mb, allocations, allocated_mb: PyTorch's own allocations: the most at a time, number, sum.
        floor_ms: see benchmarks/floor.py; at the rates that follow, measured in the same run.
    """

    case: str
    size: str
    patch: int
    batch: int
    dtype: str
    phase: str
    mode: str
    provider: str
    not_run: str | None = None
    raised: bool = False
    parity: bool | None = None
    parity_batch: int | None = None
    max_error: float | None = None
    rms_error: float | None = None
    first_ms: float | None = None
    rounds: int | None = None
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    host_ms: float | None = None
    launches: int | None = None
    peak_mb: float | None = None
    counted_peak_mb: float | None = None
    allocations: int | None = None
    allocated_mb: float | None = None
    floor_ms: float | None = None
    copy_bytes_s: float | None = None
    matmul_flop_s: float | None = None
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def group(self) -> tuple[Any, ...]:
        """What providers are compared within."""
        return self.case, self.size, self.batch, self.dtype, self.phase, self.mode

    @property
    def key(self) -> tuple[Any, ...]:
        return *self.group, self.provider

    @property
    def wrong(self) -> bool:
        """Whether what is ours is outside of its error budget, or raised an error; such a one was not timed."""
        return self.p50_ms is None and (self.parity is False or self.raised)

    @property
    def step(self) -> str:
        """Phase and mode, as people call them."""
        return STEP_NAMES[self.phase, self.mode]

    @property
    def title(self) -> str:
        return f"{self.case}, {self.size}, batch {self.batch}, {self.dtype}, {self.step}"


def load(path: Path) -> list[Row]:
    """The rows of a file, or of every `*.jsonl` of a folder, the last one of each key, sorted.

    Raises:
        ValueError: a line is no row; the message names file and line.
    """
    found: dict[tuple[Any, ...], Row] = {}
    for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
        found |= {row.key: row for row in parsed(_text(file), file)}
    return sorted(found.values(), key=lambda row: row.key)


def parsed(text: str, file: Path) -> Iterator[Row]:
    for i, line in enumerate(text.splitlines(), start=1):
        try:
            yield Row(**json.loads(line))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}, line {i}: expected a row, got {line[:80]!r}: {error}") from error


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected rows, got no text") from error


def append(rows: Iterable[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows)


def finished(path: Path, environment: dict[str, Any]) -> dict[tuple[Any, ...], Row]:
    """The rows of an earlier, perhaps stopped, run of the same code here; a half-written last line is dropped.

    Rows of other code, or of another machine, thread count or version, stay in the file until they are measured again.

    Raises:
        ValueError: a line is no row; the file stays as it is.
    """
    if not path.exists():
        return {}
    text = _text(path)
    present = {row.key: row for row in parsed(text[: text.rfind("\n") + 1], path)}
    whole = path.with_name(f"{path.name}.new")  # a process may be killed at any time
    whole.write_text("")
    append((present[key] for key in sorted(present)), whole)  # of each key the last alone
    whole.replace(path)
    return {key: row for key, row in present.items() if lasting(row.environment) == lasting(environment)}


def lasting(environment: dict[str, Any]) -> dict[str, Any]:
    """What results that belong together have in common; `source` says more of the code than a commit."""
    return {name: value for name, value in environment.items() if name not in ("date", "commit")}
