"""The names of tests: each is said once, so that `pytest -k NAME` and a line of a log mean one test."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]


def repeated(folders: list[Path]) -> dict[str, list[str]]:
    """The names that several test functions below these folders have, and where these are."""
    places = defaultdict(list)
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                places[node.name].append(f"{path.name}:{node.lineno}")
    assert places
    return {name: found for name, found in places.items() if len(found) > 1}


def test_no_name_of_a_test_is_used_twice() -> None:
    assert repeated([ROOT / "tests", ROOT / "benchmarks"]) == {}


def test_a_name_that_is_used_twice_is_found(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "test_a.py").write_text("def test_one(): pass\n\n\ndef test_two(): pass\n")
    (tmp_path / "folder" / "test_b.py").write_text("class TestB:\n    def test_two(self): pass\n")
    assert repeated([tmp_path]) == {"test_two": ["test_b.py:2", "test_a.py:4"]}
