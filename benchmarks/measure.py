"""Latency by interleaved calls, peak memory in a fresh process, and the environment that both were measured in."""

import concurrent.futures
import ctypes
import gc
import multiprocessing
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks import cases

MB = 1e6


def latency(calls: dict[str, Callable[[], object]], rounds: int) -> Iterator[dict[str, list[float]]]:
    """Milliseconds of each call so far, after each of `rounds` rounds in which every call runs once.

    Calls take turns, so that whatever else the machine does meets all of them alike. Each has run once before.
    """
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            synchronize()
            begin = time.perf_counter()
            call()
            synchronize()
            times[name].append((time.perf_counter() - begin) * 1e3)
        yield times


def percentiles(times: list[float]) -> dict[str, float]:
    p20, p50, p80 = np.percentile(times, [20, 50, 80])
    return {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80}


def peak_memory(provider: str, image: np.ndarray, batch: int, patch: int, dtype: torch.dtype, training: bool) -> float:
    """Megabytes that one call holds at its peak above what it was given (maps, weights, upstream gradients).

    On a GPU: of the allocator. On a CPU: resident memory of a fresh process, after a small call that warms it up.
    """
    if torch.cuda.is_available():
        return _peak_memory(provider, image, batch, patch, dtype, training)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_peak_memory, provider, image, batch, patch, dtype, training).result()


def _peak_memory(provider: str, image: np.ndarray, batch: int, patch: int, dtype: torch.dtype, training: bool) -> float:
    small = _prepared(provider, image, 1, 4, dtype, training)
    cases.step(*small)
    call = _prepared(provider, image, batch, patch, dtype, training)
    gc.collect()
    if torch.cuda.is_available():
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = cases.step(*call)
        synchronize()
        del kept
        return (torch.cuda.max_memory_allocated() - before) / MB
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    cases.step(*call)
    return (_status("VmHWM") - before) / MB


def _prepared(
    provider: str, image: np.ndarray, batch: int, patch: int, dtype: torch.dtype, training: bool
) -> tuple[nn.Module, list[torch.Tensor], list[torch.Tensor] | None]:
    module = cases.modules(patch, dtype, device())[provider].train(training)
    maps = cases.skip_maps(image, batch, patch, dtype, device())
    return module, maps, cases.upstream(maps) if training else None


def _status(field: str) -> float:
    """Bytes that /proc/self/status gives for a field."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compiler() -> str | None:
    """The C++ compiler that torch.compile needs on a CPU."""
    return shutil.which("g++") or shutil.which("clang++")


def environment() -> dict[str, str | int | None]:
    """What a measurement depends on."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _commit() -> str | None:
    """The commit that was measured; "-dirty" behind it where files differ from it."""
    git = shutil.which("git")
    if git is None:
        return None
    describe = [git, "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip() or None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()
