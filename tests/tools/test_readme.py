"""What the documents say holds: links lead somewhere, commands are there. Snippets run with what they show."""

import importlib
import re
from pathlib import Path

import pytest

from benchmarks import __main__ as command_line
from tests.readme import README

ROOT = README.parent
KERNELS = ROOT / "dca_kernels" / "triton_backend"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", KERNELS / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
LINK = re.compile(r"!?\[[^\]]*\]\(([^)#]*)(#[^)]*)?\)")


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    links = [link for link, _ in LINK.findall(document.read_text()) if link and not link.startswith("https://")]
    assert [link for link in links if not (document.parent / link).resolve().exists()] == []


def test_the_kernels_readme_names_every_file() -> None:
    """And no file that is not there."""
    text = (KERNELS / "README.md").read_text()
    named = {name for name in re.findall(r"`(?:[a-z_]+/)*(\w+\.(?:py|json))`", text) if not name.startswith("test_")}
    assert named == {path.name for path in KERNELS.iterdir() if path.suffix in (".py", ".json")}
    tests = {name for name in re.findall(r"`(tests/\w+/\w+\.py)`", text)}
    assert len(tests) == 4 and all((ROOT / name).exists() for name in tests)


@each_document
def test_targets_of_make_are_there(document: Path) -> None:
    named = set(re.findall(r"`?make ([a-z-]+)`?", " ".join(code_of(document))))
    makefile = (ROOT / "Makefile").read_text()
    assert [name for name in sorted(named) if not re.search(rf"^{name}:", makefile, re.MULTILINE)] == []


@each_document
def test_commands_take_what_is_shown(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in "\n".join(code_of(document)).splitlines():
        found = re.search(r"python -m (benchmarks|examples\.\w+)([^#]*)", line)
        if found is None:
            continue
        module, options = found[1], found[2].split()
        if module == "benchmarks":
            assert options[0] in command_line.COMMANDS or options[0].startswith("--")
        else:
            monkeypatch.setattr("sys.argv", [module, *options])
            importlib.import_module(module).arguments()


def test_a_package_index_shows_all_of_it() -> None:
    """It has no files beside the README, and draws no diagrams."""
    text = README.read_text()
    assert len(text.splitlines()) <= 200
    assert "![" not in text and "<img" not in text and "```mermaid" not in text


def code_of(document: Path) -> list[str]:
    """Blocks of commands, and code in lines."""
    text = document.read_text()
    return re.findall(r"```bash\n(.*?)```", text, re.DOTALL) + re.findall(r"`((?:make|python -m) [^`]+)`", text)
