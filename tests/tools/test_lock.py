"""What continuous integration installs by hash, and the table of licences: whole, and of one build of torch."""

import re
import tomllib

import pytest

from tests.datasets import ROOT

FILES = sorted((ROOT / "lock").glob("*.txt"))
LINE = re.compile(r"([a-z0-9-]+)==(\S+) --hash=sha256:[0-9a-f]{64}")


def locked() -> dict[str, str]:
    """The versions of all stamps but that of the newest Triton, which lies beside another one."""
    lines = {line for path in FILES if path.stem != "newest" for line in path.read_text().splitlines()}
    versions = dict(LINE.fullmatch(line).groups() for line in lines)
    assert len(versions) == len(lines)
    return versions


def test_every_stamp_has_its_file() -> None:
    stamps = set(re.findall(r"^\.venv/([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {path.stem for path in FILES} == stamps


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_line_has_a_hash(path) -> None:
    lines = path.read_text().splitlines()
    assert lines and all(LINE.fullmatch(line) for line in lines)
    assert not [line for line in lines if line.startswith("nvidia-")]


def test_versions_are_those_of_constraints_and_makefile() -> None:
    constraints = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    apart = re.findall(r"^(?!NEWEST)[A-Z]+ := (\S+==\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert len(apart) == 2
    pins = dict(line.split("==") for line in constraints + apart)
    versions = {name: version.split("+")[0] for name, version in locked().items()}
    assert {name: versions.get(name) for name in pins} == pins


def test_every_extra_is_locked() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {re.match(r"[a-z0-9-]+", needed)[0] for needs in extras.values() for needed in needs}
    assert names - locked().keys() == {"dca-kernels"}


def test_every_package_has_a_licence() -> None:
    rows = re.findall(r"^\| (\S+) +\| (\S.*) \|$", (ROOT / "docs" / "licences.md").read_text(), re.MULTILINE)
    assert locked().keys() - dict(rows).keys() == set()
