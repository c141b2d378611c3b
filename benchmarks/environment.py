"""What a row was measured in: machine, versions, and the code."""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path

import torch

from benchmarks.rows import RESULTS

ROOT = Path(__file__).parents[1]


@functools.cache
def environment() -> dict[str, str | int | None]:
    """Strings and numbers under fixed names; None where there is no such thing here."""
    gpu = torch.cuda.is_available()
    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "driver": _driver() if gpu else None,
        "cuda": torch.version.cuda or torch.version.hip,
        "kernels": "interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else "compiled",
        "float32_products": torch.get_float32_matmul_precision(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": _commit(),
        "source": source(),
        "date": time.strftime("%Y-%m-%d"),
    }


def describe(environment: dict[str, str | int | None]) -> str:
    return ", ".join(f"{key} {value}" for key, value in environment.items() if value is not None)


def measured_on(environment: dict[str, str | int | None]) -> str:
    """What tables and figures say of their rows: the GPU, or the CPU and its threads, and PyTorch's version."""
    threads = environment.get("threads")
    cpu = f"{environment.get('cpu')}, {threads} thread{'' if threads == 1 else 's'}"
    return f"{environment.get('gpu') or cpu}, torch {environment.get('torch')}"


@functools.cache
def source(configured: bool = True) -> str:
    """A digest of the code that is measured and measures, with the kernels' configurations or without.

    Results and documents do not change it.
    """
    digest = hashlib.sha256()
    for folder in ("dca_kernels", "reference", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if RESULTS in path.parents:  # of `gpu` a copy of the configurations, too
                continue
            if path.suffix in (".py", ".npy") or (configured and path.name == "configurations.json"):
                digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _version(package: str) -> str | None:
    try:
        return __import__(package).__version__
    except ImportError:
        return None


def _commit() -> str | None:
    """The commit that was measured; "-dirty" behind it where files differ from it."""
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    return _output(describe)


def _driver() -> str | None:
    return _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])


def _output(command: list[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")
    return lines[0].strip() or None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
