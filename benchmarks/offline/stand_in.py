"""A stand-in for the GPU that is not there.

Triton's JIT, its compiler, ptxas and the launcher in C run as they do on a GPU, on tensors of the CPU. What is stood in
for is the driver, which answers as the target would and whose launch writes down what it was given; and, as a CPU has
no such thing, the package's two questions to a device: whether its kernels run there, and what it is compiled for.
"""

import atexit
import contextlib
import ctypes
import functools
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from dca_kernels import backends
from dca_kernels.triton_backend import launch

SOURCE = Path(__file__).with_suffix(".c")


class Target(NamedTuple):
    """A GPU that kernels are compiled for."""

    triton: GPUTarget
    shared_limit: int  # bytes of shared memory that a program can have


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 166912),
    "sm_86": Target(GPUTarget("cuda", 86, 32), 101376),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 232448),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 232448),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 65536),
}
EXAMPLES = {"sm_80": "A100", "sm_86": "RTX 3090", "sm_90": "H100", "sm_100": "B200", "gfx942": "MI300"}
SIZES = {"i32": 4, "i64": 8, "fp32": 4}  # bytes of the numbers that kernels take
MOST = 256  # arguments of a kernel, as in stand_in.c
SCRATCH = [8, 8]  # pointers that Triton passes behind a kernel's own arguments


@dataclass(frozen=True)
class Launched:
    """What the driver was given: a kernel's name, its programs and the threads and bytes of shared memory of each, and
    each argument's bits."""

    name: str
    programs: int
    threads: int
    shared: int
    arguments: list[int]


class Driver:
    """What Triton asks of a driver: `utils` and `launcher_cls` are part of it."""

    def __init__(self, name: str, record: bool) -> None:
        self.target, self.record = TARGETS[name], record
        self.device = list(TARGETS).index(name)  # the JIT keeps what it compiled by this number
        self.utils = self
        self.names: dict[int, str] = {}  # of the functions that were loaded
        self.launched: list[Launched] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(_utilities(), name)  # newer ones hold the launcher in C as well

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        _library()  # the launcher is linked against it
        launcher = nvidia.CudaLauncher(source, metadata)
        return functools.partial(_launch, self, launcher, _argument_sizes(source)) if self.record else launcher

    def get_current_target(self) -> GPUTarget:
        return self.target.triton

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.target.shared_limit}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills and threads at most."""
        function = len(self.names) + 1
        self.names[function] = name
        return function, function, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass


class _Record(ctypes.Structure):
    """As in stand_in.c."""

    _fields_ = (
        ("function", ctypes.c_ulonglong),
        ("grid", ctypes.c_ulonglong * 3),
        ("threads", ctypes.c_ulonglong),
        ("shared", ctypes.c_ulonglong),
        ("values", ctypes.c_ulonglong * MOST),
    )


def _launch(active: Driver, launcher: Any, sizes: list[int], *arguments: Any) -> None:
    """Launch, and keep what the stand-in of libcuda wrote down."""
    library = _library()
    assert len(sizes) <= MOST
    library.stand_in_expect(len(sizes), (ctypes.c_int * len(sizes))(*sizes))
    before = library.stand_in_launches()
    launcher(*arguments)
    assert library.stand_in_launches() == before + 1
    record = _Record.from_address(library.stand_in_launched())
    assert list(record.grid[1:]) == [1, 1]
    values = list(record.values[: len(sizes) - len(SCRATCH)])
    active.launched.append(
        Launched(active.names[record.function], record.grid[0], record.threads, record.shared, values)
    )


def _argument_sizes(source: Any) -> list[int]:
    """Bytes of each argument that a compiled kernel takes: constants are none."""

    def leaves(type_: Any) -> Iterator[str]:
        return itertools.chain(*map(leaves, type_)) if isinstance(type_, tuple) else iter([type_])

    types = [t for t in leaves(tuple(source.signature.values())) if t != "constexpr"]
    return [8 if t.startswith("*") else SIZES[t] for t in types] + SCRATCH


def why_not_compiled() -> str | None:
    """Why nothing can be compiled in this process; None where it can."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return "TRITON_INTERPRET is 1, and interpreted kernels are not compiled" if interpreted else None


def why_no_launches() -> str | None:
    """Why nothing can be launched into the stand-in here; None where it can. Compiling works everywhere."""
    if torch.cuda.is_available():
        return "there is a GPU, and its driver"
    if shutil.which("gcc") is None and shutil.which("cc") is None:
        return "no C compiler: Triton builds its launcher with one"
    return None


@functools.cache
def _library() -> ctypes.CDLL:
    """The stand-in of libcuda, which the launchers then find by its name, as it is loaded already."""
    folder = tempfile.mkdtemp(prefix="stand_in_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # launchers are linked against it until then
    built = Path(folder) / "libcuda.so.1"
    compiler = shutil.which("gcc") or shutil.which("cc") or "cc"
    include = Path(nvidia.__file__).parent / "include"
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", f"-I{include}", "-o", built, SOURCE]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(built), ctypes.RTLD_GLOBAL)
    library.stand_in_launched.restype = ctypes.c_void_p
    library.stand_in_launches.restype = ctypes.c_long
    triton.knobs.nvidia.libcuda_path = folder  # where the launchers are linked against it
    return library


@functools.cache
def _utilities() -> Any:
    """Triton's own C functions, above the stand-in of libcuda, which lacks what no launch calls."""
    _library()
    present = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)
    try:
        return nvidia.CudaUtils()
    finally:
        sys.setdlopenflags(present)


@contextlib.contextmanager
def standing_in(target: str, record: bool = True) -> Iterator[Driver]:
    """Inside the `with` block the `triton` backend takes tensors of the CPU for those of a GPU of this target.

    Kernels compile; where `why_no_launches` is None they launch. What they were given is in the driver's `launched`,
    where it is to `record` that, which takes longer than the launch.
    """
    active = Driver(target, record)
    with (
        mock.patch.object(driver, "_active", active),  # its setter would ask for one to restore: there may be none
        mock.patch.object(backends, "why_not", lambda name, device: None),
        mock.patch.object(launch, "architecture", lambda device: target),
    ):
        yield active
