"""The command line: every command's help, numbers, selections and paths, and what is said where there is no GPU."""

import importlib
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import __main__ as command_line
from benchmarks import cases, providers, rows
from tests.tools.rows import row


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are not taken for runnable because the tests interpret them."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def refused(*arguments: object) -> int:
    """The exit status, argparse's too."""
    try:
        return command_line.main(list(map(str, arguments)))
    except SystemExit as stop:
        return stop.code


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Of what was said on stderr: argparse's usage comes before it."""
    return capsys.readouterr().err.splitlines()[-1]


# Help


@pytest.mark.parametrize("name", command_line.COMMANDS)
def test_help_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(name, "--help") == 0
    usage, _, example = capsys.readouterr().out.partition("xample")
    assert "usage: python -m benchmarks" in usage and f"python -m benchmarks {name}" in example


def test_help_says_the_defaults_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused("smoke", "--help") == 0
    out = capsys.readouterr().out
    assert "(default: all)" in out and "(default: 1 2 8)" in out and "(default: paper)" in out
    assert "None" not in out and "False" not in out


def test_help_says_what_each_choice_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused("run", "--help") == 0
    words = " ".join(capsys.readouterr().out.split())
    for name in (*cases.CASES, *cases.SIZES, *cases.MODES, *cases.MODES["train"], *providers.IMPLEMENTATIONS):
        assert f"{name} = " in words or f"{name}, " in words, name
    for name, size in cases.SIZES.items():
        assert f"{name} = {' '.join(map(str, size.features))} channels, {size.patch} x {size.patch} tokens" in words


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(command_line.COMMANDS)


def test_a_command_that_there_is_not_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused("bench", "--case", "dca") == 2
    expected = f"expected a command: {', '.join(command_line.COMMANDS)}, got 'bench'\n"
    assert capsys.readouterr() == ("", expected)
    assert refused("--batch", "many") == 2  # an option is quick's
    assert "benchmarks quick" in last_line(capsys)


@pytest.mark.parametrize(
    ("name", "said"),
    [("run", "stopped; the same command goes on"), ("compare", "stopped")],
    ids=["run", "compare"],
)
def test_a_command_that_is_stopped_says_so(
    name: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a line, with the exit status of a program that Ctrl-C ended."""
    stopped = mock.Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr("benchmarks.run.measured", stopped)
    monkeypatch.setattr("benchmarks.rows.load", stopped)
    rows.append([row()], tmp_path / "rows.jsonl")
    file = tmp_path / "rows.jsonl"
    arguments = {"run": ["--case", "dca", "--size", "tiny", "--out", tmp_path / "run.jsonl"], "compare": [file, file]}
    assert refused(name, *arguments[name]) == 130
    assert last_line(capsys) == said


# Numbers


NUMBERS = {
    "quick": ["--batch", "--patch"],
    "run": ["--batch", "--seconds", "--longest", "--ahead"],
    "compare": ["--threshold"],
    "gpu": ["--minutes"],
    "smoke": ["--batch"],
    "kernels": ["--batch"],
    "compile": ["--batch", "--processes"],
    "tune": ["--batch", "--most", "--seconds", "--processes"],
    "determinism": ["--repeats", "--batch"],
    "model": ["--batch", "--processes"],
    "host": ["--batch"],
}


@pytest.mark.parametrize("value", ["0", "-1", "nan", "many"])
@pytest.mark.parametrize(("name", "option"), [(name, o) for name, options in NUMBERS.items() for o in options])
def test_a_number_is_above_zero(name: str, option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    positional = ["before", "after"] if name == "compare" else []
    assert refused(name, *positional, f"{option}={value}") == 2
    line = last_line(capsys)
    assert f"argument {option}: expected a" in line and line.endswith(f"got {value!r}")


FILES = {
    "quick": ["--json", "--plot"],
    "run": ["--out"],
    "smoke": ["--journal"],
    "kernels": ["--journal"],
    "compile": ["--journal"],
    "tune": ["--table", "--journal"],
    "determinism": ["--journal"],
    "calibrate": ["--out"],
}


@pytest.mark.parametrize(("name", "option"), [(name, o) for name, options in FILES.items() for o in options])
def test_a_file_is_no_folder(name: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "inner"):
        assert refused(name, f"{option}={path}") == 2
        assert last_line(capsys).endswith(f"argument {option}: expected a file that can be written, got {str(path)!r}")


# Without a GPU


@pytest.mark.parametrize("name", ["gpu", "smoke", "kernels", "tune", "determinism"])
def test_without_a_gpu_there_is_one_answer(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And nothing is written."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--table", "table.json", "--journal", "journal.ndjson"] if name == "tune" else []
    assert refused(name, *arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"{name}: not run: no GPU; `") and said.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["compile", "offline", "host"])
def test_what_compiles_does_not_where_kernels_are_interpreted(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert refused(name, *(["--target", "sm_90"] if name == "compile" else [])) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"{name}: not run: TRITON_INTERPRET is 1") and "unset it" in said.err


def test_a_package_that_is_missing_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(importlib, "import_module", missing)
    assert refused("smoke") == 2
    assert capsys.readouterr().err == "smoke: not run: triton is not installed; install it first\n"


def test_a_golden_vector_that_there_is_not(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert refused("smoke", "--golden", "tiny") == 2
    assert "argument --golden: expected names of " in (line := last_line(capsys)) and line.endswith("got 'tiny'")


# Selections of `run`


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("--case UNet --size grid112", "--case UNet has --size paper alone"),
        ("--case dca --provider without", "--case dca has no --provider without"),
        ("--case dca upsample --phase eval --mode backward", "--phase eval has --mode forward alone"),
        (
            "--case dca UNet --size grid112 --provider without",
            "--case dca has no --provider without; --case UNet has --size paper alone",
        ),
    ],
    ids=["size", "provider", "mode", "several"],
)
def test_a_selection_of_nothing_says_why(
    arguments: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused("run", *arguments.split(), "--out", tmp_path / "run.jsonl") == 2
    assert last_line(capsys) == f"run: nothing is selected: {why}"
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_of_rows_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "notes.md"
    for content in (b"# Notes\n\nwithout an end of line", b"\xff\n"):
        file.write_bytes(content)
        assert refused("run", "--case", "dca", "--size", "tiny", "--out", file) == 2
        assert last_line(capsys).startswith(f"run: --out: {file}") and file.read_bytes() == content
    assert refused("run", "--case", "dca", "--size", "tiny", "--out", tmp_path) == 2
    assert str(tmp_path) in last_line(capsys)


# Paths of `compare` and `report`


def test_compare_names_a_path_without_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, empty = tmp_path / "run.jsonl", tmp_path / "empty"
    rows.append([row()], file)
    empty.mkdir()
    (tmp_path / "image.jsonl").write_bytes(b"\xff")
    assert refused("compare", file, tmp_path / "no.jsonl") == 2
    assert (
        last_line(capsys)
        == f"compare: after: expected a file of rows, or a folder of such, found no {tmp_path}/no.jsonl"
    )
    assert refused("compare", empty, file) == 2
    assert last_line(capsys) == f"compare: before: expected rows in {empty}, found none"
    assert refused("compare", file, tmp_path / "image.jsonl") == 2
    assert last_line(capsys) == f"compare: {tmp_path}/image.jsonl: expected rows, got no text"
    rows.append([row("triton")], tmp_path / "other.jsonl")
    assert refused("compare", file, tmp_path / "other.jsonl") == 2
    assert last_line(capsys) == f"compare: {file} and {tmp_path}/other.jsonl have no row in common"


def test_report_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine, document = tmp_path / "latest", tmp_path / "report.md"  # of this name only an inner folder is left out
    rows.append([row("reference", 20.0), row("torch", 10.0)], machine / "run.jsonl")
    options = ["report", "--results", machine, "--document", document]
    assert refused(*options) == 0
    written = [f"document: {document}", *(f"figure: {path}" for path in machine.glob("*.png"))]
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(written) and len(written) > 1
    assert "2.00x" in document.read_text()
    assert refused(*options, "--check") == 0
    assert capsys.readouterr().out == f"{document}: tables and figures are what the rows give\n"


def test_report_of_wrong_paths_leaves_the_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, document = tmp_path / "results", tmp_path / "README.md"
    old = "<!-- begin: module -->\nold\n<!-- end: module -->\n"
    document.write_text(old)

    def said(*options: object) -> str:
        assert refused("report", "--results", results, "--document", document, *options) == 2
        assert document.read_text() == old
        return last_line(capsys)

    assert said() == f"report: --results: expected a folder of rows, or of folders of rows, found no folder {results}"
    results.mkdir()
    assert said() == f"report: --results: expected rows (*.jsonl) in {results} or in its folders, found none"
    assert said("--journal", tmp_path / "no.ndjson").startswith("report: --journal: expected a file, found no ")
    (results / "run.jsonl").write_text("{}\n")
    assert said().startswith(f"report: {results}/run.jsonl, line 1: expected a row")
    (results / "run.jsonl").unlink()
    rows.append([row("reference", 20.0), row("torch", 10.0)], results / "run.jsonl")
    assert said("--document", tmp_path / "no" / "report.md").startswith(
        "report: --document: expected a file in a folder"
    )
    assert said("--document", tmp_path).startswith("report: --document: expected a file in a folder")
