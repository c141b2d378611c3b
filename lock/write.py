"""Writes this folder's files and docs/licences.md, by `make lock` on a machine like that of continuous integration.

A file for each stamp of the Makefile: the packages that it installs, with the hash of the one file of each.
"""

import argparse
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
LICENCES = ROOT / "docs" / "licences.md"
LONGEST = 40  # letters of a licence's name; a longer text is the licence itself


def resolved(*wanted: str) -> dict[str, str]:
    """The line of each package that pip would install into an empty environment, by its name."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    command += ["--only-binary", ":all:", *wanted]
    report = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    lines = {}
    for package in report["install"]:
        name, version = package["metadata"]["name"].lower().replace("_", "-"), package["metadata"]["version"]
        if name.startswith("nvidia-"):
            raise SystemExit(f"lock: expected the CPU build of torch, got one with {name}")
        if name != "dca-kernels":
            lines[name] = (
                f"{name}=={version} --hash=sha256:{package['download_info']['archive_info']['hashes']['sha256']}"
            )
    return lines


def licence(name: str) -> str:
    """As the installed package names it."""
    about = metadata.metadata(name)
    text = (about["License"] or "").strip()
    kinds = [kind.split(" :: ")[-1] for kind in about.get_all("Classifier", []) if kind.startswith("License :: ")]
    short = text if len(text) <= LONGEST else ""
    return about["License-Expression"] or short or ", ".join(kinds) or text.splitlines()[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for option in ("--triton", "--newest", "--image"):
        parser.add_argument(option, required=True, help="a package of the Makefile and its version")
    chosen = parser.parse_args()
    known = resolved("--constraint", "constraints.txt", ".[third-party]", chosen.triton)
    pins = HERE / "pins.tmp"
    pins.write_text("".join(f"{line.split()[0]}\n" for line in known.values()))
    image = resolved("--no-deps", chosen.image)
    bench = resolved("--constraint", str(pins), ".[bench]", "setuptools")  # which builds this package
    train = resolved("--constraint", str(pins), ".[examples]") | image
    test = resolved("--constraint", str(pins), ".[test]", chosen.triton) | image
    pins.unlink()
    files = {
        "bench": bench,
        "train": {name: line for name, line in train.items() if name not in bench},
        "test": {name: line for name, line in test.items() if name not in bench},
        "third-party": {name: line for name, line in known.items() if name not in test},
        "newest": resolved("--no-deps", chosen.newest),
    }
    for name, lines in files.items():
        (HERE / f"{name}.txt").write_text("".join(f"{lines[package]}\n" for package in sorted(lines)))
    names = sorted({package for lines in files.values() for package in lines})
    rows = "".join(f"| {name} | {licence(name)} |\n" for name in names)
    LICENCES.write_text(f"{HEAD}\n| package | licence |\n|---|---|\n{rows}")


HEAD = """\
# Licences of the dependencies

The module itself needs torch alone; the others are what benchmarks, examples and tests install, and what these need.
`make lock` writes this table from the installed packages.
"""

if __name__ == "__main__":
    main()
