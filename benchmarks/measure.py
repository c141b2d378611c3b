"""Latency of calls that take turns, and memory: the peak, and every allocation counted."""

import ctypes
import functools
import gc
import os
import shutil
import time
import timeit
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils import benchmark

MB = 1e6
LEAST_ROUNDS, MOST_ROUNDS = 5, 101


@dataclass(frozen=True)
class Call:
    """What is timed, and what comes before it each time, untimed."""

    prepare: Callable[[], object]
    run: Callable[[], object]


def latency(calls: dict[str, Call], rounds: int) -> Iterator[dict[str, list[tuple[float, float | None]]]]:
    """Milliseconds of each call so far, after each of `rounds` rounds in which every call runs once.

    Each sample is the call's time from an idle machine whose last cache holds other data, and on a GPU the time until
    the call returns, with its work still under way. Calls take turns, so that whatever else the machine does meets all
    of them alike. Each has run before.
    """
    samples: dict[str, list[tuple[float, float | None]]] = {name: [] for name in calls}
    sample = _gpu_sample if torch.cuda.is_available() else _cpu_sample
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(sample(call))
        yield samples


def _cpu_sample(call: Call) -> tuple[float, None]:
    def prepare() -> None:
        call.prepare()
        evict()

    return timeit.Timer(call.run, prepare, timer=benchmark.timer).timeit(1) * 1e3, None


def _gpu_sample(call: Call) -> tuple[float, float]:
    call.prepare()
    evict()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    start = time.perf_counter()
    call.run()
    host = time.perf_counter() - start
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end), host * 1e3


def evict() -> None:
    """Fill the last cache with other data.

    One buffer serves every case: tokens are so small that a hundred copies of an input would still be in the cache, and
    a CUDA graph's inputs have one address.
    """
    _other_data().zero_()


@functools.cache
def _other_data() -> torch.Tensor:
    """Twice the size of the last cache."""
    return torch.empty(2 * _cache_bytes(), dtype=torch.uint8, device=device())


def _cache_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties().L2_cache_size
    size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return int(size.read_text().strip().removesuffix("K")) * 1024 if size.exists() else 32 * 2**20


def rounds_for(seconds: float, budget: float) -> int:
    """How many rounds of so many seconds fit the budget, within bounds."""
    return int(min(MOST_ROUNDS, max(LEAST_ROUNDS, budget / max(seconds, 1e-9))))


def percentiles(times: list[float]) -> dict[str, float]:
    p20, p50, p80 = np.percentile(times, [20, 50, 80])
    return {"p20_ms": float(p20), "p50_ms": float(p50), "p80_ms": float(p80)}


def seconds(call: Callable[[], object]) -> float:
    """Of one call, with its work on the device."""
    return timeit.Timer(call, timer=benchmark.timer).timeit(1)


# Memory


def memory(call: Call) -> dict[str, float | int | None]:
    """What one call takes above what it was given: megabytes at the peak, and each allocation counted.

    On a GPU by its allocator. On a CPU `peak_mb` is resident memory, which is only right in a process that does nothing
    else; the counts are PyTorch's own allocations, and `counted_peak_mb` what is allocated of them at a time.
    The call has run before.
    """
    call.prepare()
    gc.collect()
    if torch.cuda.is_available():
        return _gpu_memory(call.run)
    _trim()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    call.run()
    peak = (_status("VmHWM") - before) / MB
    call.prepare()
    return {"peak_mb": peak, **count_allocations(call.run)}


def _gpu_memory(run: Callable[[], object]) -> dict[str, float | int | None]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()
    run()
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    peak = (after["allocated_bytes.all.peak"] - before["allocated_bytes.all.current"]) / MB
    return {
        "peak_mb": peak,
        "counted_peak_mb": peak,
        "allocations": after["allocation.all.allocated"] - before["allocation.all.allocated"],
        "allocated_mb": (after["allocated_bytes.all.allocated"] - before["allocated_bytes.all.allocated"]) / MB,
    }


def count_allocations(run: Callable[[], object]) -> dict[str, float | int | None]:
    """PyTorch's allocations on a CPU: their number, their sum and the most at a time. The same for every run."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes to stderr
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        run()
    changes = [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return {
        "counted_peak_mb": float(max(np.cumsum([0, *changes]))) / MB,
        "allocations": sum(change > 0 for change in changes),
        "allocated_mb": sum(change for change in changes if change > 0) / MB,
    }


def count_launches(run: Callable[[], object]) -> int | None:
    """Kernels on the GPU, or None without one."""
    if not torch.cuda.is_available():
        return None
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events()) or None


def free_memory(device: torch.device) -> float:
    """Bytes that may be taken."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 0.7 * next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _trim() -> None:
    """Give back what the allocator keeps; nothing where the C library has no such call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(field: str) -> float:
    """Bytes that /proc/self/status gives for a field."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compiler() -> str | None:
    """The C++ compiler that torch.compile needs on a CPU."""
    return shutil.which("g++") or shutil.which("clang++")
