"""Who is measured: another implementation of the attention is one entry of benchmarks/providers.py."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks import rows

ROOT = Path(__file__).parents[2]
REGISTRY = "IMPLEMENTATIONS = {\n"
ENTRY = '    "sdpa": Implementation("another\'s attention", "#e8590c", reference.DCA),\n'

COMMANDS = """
from benchmarks import __main__ as command_line, command, gpu, plots, quick, rows
selected = ["--case", "dca", "patch_embed", "--size", "tiny", "--batch", "1", "--phase", "eval", "--mode", "forward"]
providers = ["--provider", "reference", "sdpa"]
out = ["--small", "--no-memory", "--out", "results/run.jsonl"]
assert command_line.main(["run", *selected, *providers, *out]) == 0
assert command_line.main(["report", "--results", "results", "--document", "report.md"]) == 0
print(quick.table(rows.load(rows.Path("results/run.jsonl"))))
main_job = [group for _, group in quick.groups(quick.parser().parse_args([]))]
assert all(("sdpa" in group.providers) == (group.problem.case == "dca") for group in main_job)
assert plots.style("sdpa", bar=True)["facecolor"] == "#e8590c" and "sdpa compiled" in gpu.COMPILED
assert command.PROVIDERS["sdpa"] == "another's attention"
"""


def test_another_provider_touches_one_file(tmp_path: Path) -> None:
    """A copy of the benchmarks has one more entry: it is run and compared, with a column, a bar and a line of help."""
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("results"))
    for package in ("dca_kernels", "reference"):
        (tmp_path / package).symlink_to(ROOT / package)
    file = tmp_path / "benchmarks" / "providers.py"
    text = file.read_text()
    end = text.index("\n}\n", text.index(REGISTRY)) + 1
    file.write_text(text[:end] + ENTRY + text[end:])
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    line = [sys.executable, "-c", COMMANDS]
    done = subprocess.run(line, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

    found = {(row.case, row.provider): row for row in rows.load(tmp_path / "results" / "run.jsonl")}
    assert found.keys() == {("dca", "reference"), ("dca", "sdpa"), ("patch_embed", "reference")}
    assert found["dca", "sdpa"].parity and found["dca", "sdpa"].p50_ms
    assert "| sdpa" in done.stdout  # the main job's table
    report = (tmp_path / "report.md").read_text()
    assert "| sdpa" in report and "- sdpa: another's attention" in report
    assert (tmp_path / "results" / "speedup.png").exists()
