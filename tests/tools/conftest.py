"""What stands in for a machine without a GPU, for a kernel that is wrong, and for what was measured."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import rows
from tests.tools.rows import row


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are not taken for runnable because the tests interpret them."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, Callable[..., None]], None]]:
    """After each launch of a kernel, something is done to its arguments."""
    from dca_kernels.triton_backend import launch

    run_it = launch.run

    def spoil(name: str, change: Callable[..., None]) -> None:
        def run_and_change(kernel: Any, programs: int, config: dict[str, int], **arguments: Any) -> None:
            run_it(kernel, programs, config, **arguments)
            if kernel.__name__ == f"_{name}_kernel":
                change(config, **arguments)

        monkeypatch.setattr(launch, "run", run_and_change)

    yield spoil


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Rows of one machine: the module at three batches, of which we lose one, a stage, a host, and what was not run."""
    found = []
    for batch, ours in ((1, 5.0), (8, 30.0), (32, 500.0)):
        for step in ({"phase": "eval", "mode": "forward"}, {"phase": "train", "mode": "full"}):
            found += [row("reference", 10.0 * batch, batch=batch, peak_mb=70.0 * batch, **step)]
            found += [row("torch", ours, batch=batch, peak_mb=30.0 * batch, **step)]
    found += [row("triton", None, not_run="no GPU", batch=8)]
    found += [row(p, t, case="upsample", floor_ms=2.0) for p, t in (("reference", 8.0), ("torch", 4.0))]
    step = {"case": "UNet", "phase": "train", "mode": "full"}
    found += [row(p, t, **step) for p, t in (("without", 50.0), ("reference", 90.0), ("torch", 60.0))]
    rows.append(found, tmp_path / "results" / "a-machine" / "run.jsonl")
    return tmp_path / "results"
