"""`python -m tests.capabilities`: each run has its instruction set and threads, and what fails is said."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import capabilities


def test_what_fails_with_two_threads_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def run(command: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        seen.append((env.get("ONEDNN_MAX_CPU_ISA"), env["DCA_TEST_THREADS"], command[-1]))
        if env["DCA_TEST_THREADS"] == "1":
            return subprocess.CompletedProcess(command, 0, "3 passed in 1.00s\n")
        return subprocess.CompletedProcess(command, 1, "FAILED tests/a.py::test\n1 failed, 2 passed in 1.00s\n")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(capabilities, "here", lambda: ["avx2", "all"])
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    monkeypatch.setattr(capabilities, "environment", dict)
    assert capabilities.main(["tests/stages", "--json", str(tmp_path / "figures.json")]) == 1
    assert seen == [(name, threads, "tests/stages") for name in ("AVX2", None) for threads in "12"]
    one, two, *_ = json.loads((tmp_path / "figures.json").read_text())["runs"]
    assert (one["well"], one["passed"], one["failed"]) == (True, 3, [])
    assert (two["well"], two["passed"], two["failed"]) == (False, 2, ["FAILED tests/a.py::test"])
    assert "avx2, 2 thread(s): RED" in capsys.readouterr().out


@pytest.mark.parametrize(
    "newest, expected",
    [("DEFAULT", ["default"]), ("AVX2", ["default", "avx2"]), ("AVX512", ["default", "avx2", "avx512"])],
)
def test_what_a_cpu_has(newest: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: newest)
    assert capabilities.here() == [*expected, "all"]
