"""`python -m tests.fuzz`: a seed is the same calls each time, a fault is made small, what is done is not done again."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from benchmarks.environment import ROOT
from tests import fuzz
from tests.strategies import Call


def test_a_fault_is_found_and_made_small(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(call: Call, backend: str) -> dict[str, float]:
        assert call.config.n < 2 or call.dtype == "float64", "a fault"
        return {"output": 0.5}

    monkeypatch.setattr(fuzz, "check", check)
    found, again = fuzz.draw("torch", 7), fuzz.draw("torch", 7)
    assert found.failure is not None and found.failure == again.failure and found.calls == again.calls
    assert "a fault" in found.failure and "n=2" in found.failure and "'float32'" in found.failure
    assert "features=(1,)" in found.failure and "batch=0" in found.failure  # as small as it can be


def test_parts_of_budgets_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "check", lambda call, backend: {"output": 1.5 if call.train else 0.5})
    drawn = fuzz.draw("triton", 1)
    assert drawn.failure is None and 0 < drawn.over < drawn.calls <= fuzz.CALLS["triton"]
    (its,) = fuzz.totals([drawn, drawn]).values()
    assert its["calls"] == 2 * drawn.calls and its["over"] == 2 * drawn.over and its["failures"] == 0
    assert max(its["parts"].values()) == 1.5


@pytest.mark.slow
def test_a_campaign_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = tmp_path / "fuzz.ndjson", tmp_path / "fuzz.json"
    command = ["--backend", "torch", "--processes", "1", "--journal", str(paths[0]), "--json", str(paths[1])]
    assert fuzz.main([*command, "--seed", "5", "--calls", "1"]) == 0
    assert fuzz.main([*command, "--calls", "50"]) == 0  # the first seed's are done
    seeds = [json.loads(line)["seed"] for line in paths[0].read_text().splitlines()]
    assert seeds == list(range(5, 5 + len(seeds))) and len(seeds) == 2
    figures = json.loads(paths[1].read_text())
    assert figures["seed"] == 5 and 50 <= figures["torch"]["calls"] <= 80 and figures["torch"]["failures"] == 0
    assert "seed 5" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
def test_a_campaign_that_is_killed_leaves_no_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--minutes", "3", "--journal", tmp_path / "fuzz.ndjson"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as campaign:
        children = Path(f"/proc/{campaign.pid}/task/{campaign.pid}/children")
        _wait_until((tmp_path / "fuzz.ndjson").exists)  # a seed is done
        left = [Path("/proc", number) for number in children.read_text().split()]
        campaign.send_signal(signal.SIGTERM)
    assert campaign.returncode == -signal.SIGTERM and len(left) >= 2
    _wait_until(lambda: not any(map(_runs, left)))


def _runs(process: Path) -> bool:
    """Whether it has not ended; of one that has, and that nobody asked about, Linux keeps the entry."""
    try:
        return not (process / "stat").read_text().rpartition(") ")[2].startswith("Z")
    except (FileNotFoundError, ProcessLookupError):
        return False


def _wait_until(true: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)
