"""What importing and running the packages needs: torch, and nothing else of the machine."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

USE = """
import dca_kernels, torch
maps = [torch.randn(2, 8, 8, 8, requires_grad=True), torch.randn(2, 16, 4, 4)]
sum(y.sum() for y in dca_kernels.DCA([8, 16], patch=4)(maps)).backward()
"""

# Packages may read files; they may not write any, start programs or open connections.
FORBID = """
import sys, torch, torch.nn.functional
def forbid(event, args):
    if event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec",
                 "os.posix_spawn", "os.fork", "os.mkdir", "os.remove", "os.rename"):
        raise AssertionError((event, args))
    if event == "open" and set(str(args[1] or "r")) & set("wax+"):
        raise AssertionError((event, args))
sys.addaudithook(forbid)
"""


def run(code: str, **environment: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"} | environment
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, env=environment, cwd=ROOT.parent, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_without_triton() -> None:
    run("import sys; sys.modules['triton'] = None" + USE)


def test_without_network_programs_or_writes() -> None:
    run(FORBID + USE)


@pytest.mark.parametrize(
    "attempt", ["__import__('os').system('true')", "open('never', 'w')", "__import__('os').mkdir('never')"]
)
def test_the_forbidden_is_noticed(attempt: str) -> None:
    with pytest.raises(AssertionError, match="forbid"):
        run(f"{FORBID}\n{attempt}")


def test_without_a_home() -> None:
    run(USE, HOME="/nonexistent/home", XDG_CACHE_HOME="/nonexistent/cache")


def test_packages_do_not_load_each_other_or_triton() -> None:
    run(USE + "import sys; assert not {'reference', 'triton'} & sys.modules.keys()")
    run("import sys, reference; assert not {'dca_kernels', 'triton'} & sys.modules.keys()")


def imported(path: Path) -> set[str]:
    """The packages that a file names in an import, wherever it stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        names |= {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("package, other", [("dca_kernels", "reference"), ("reference", "dca_kernels")])
def test_packages_do_not_name_each_other_in_an_import(package: str, other: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        assert other not in imported(path), path


def test_the_reference_imports_torch_alone() -> None:
    names = set().union(*map(imported, (ROOT / "reference").rglob("*.py")))
    assert names - sys.stdlib_module_names == {"torch", "reference"}


def test_the_benchmarks_serve_no_test_but_those_of_tools() -> None:
    commands = {ROOT / "tests" / f"{name}.py" for name in ("capabilities", "fuzz", "reliability")}
    files = {path for path in (ROOT / "tests").rglob("*.py") if "benchmarks" in imported(path)}
    assert commands < files and {path.parent for path in files - commands} == {ROOT / "tests" / "tools"}
