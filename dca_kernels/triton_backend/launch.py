"""The host's side of every kernel: its block sizes, its constants, one place that launches."""

import concurrent.futures
import contextlib
import contextvars
import functools
import inspect
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from dca_kernels.backends import power_of_two
from dca_kernels.contract import accumulation_dtype
from dca_kernels.triton_backend.primitives import Shape

MAX_PROGRAMS = 2**31 - 1

_logger = logging.getLogger("dca_kernels")

# `maxnreg`, the most registers of a thread, is NVIDIA's alone; it is left to the compiler where a row has none.
COMPILER_OPTIONS = ("num_warps", "num_stages", "maxnreg")

TYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    return json.loads((Path(__file__).parent / "configurations.json").read_text())


@functools.cache
def configuration(
    kernel: str, architecture: str, dtype: torch.dtype, size: int, images: float = math.inf
) -> dict[str, int]:
    """Block sizes and compiler options of a kernel: the first row of the table whose conditions hold.

    Args:
        kernel: its name in `configurations.json`.
        architecture: as `architecture` says it: "sm_90", "gfx942".
        dtype: of the tokens.
        size: what the kernel's blocks depend on; `configurations.json` says for each kernel which size it is.
        images: in a batch, where a few have rows of their own beside the size's (`max_images`).

    Raises:
        ValueError: there is no such row: the size is too large for the kernel.
    """
    for row in _table()[kernel]["rows"]:
        conditions = row.get("if", {})
        if (
            architecture in conditions.get("architecture", [architecture])
            and str(dtype).removeprefix("torch.") in conditions.get("dtype", [str(dtype).removeprefix("torch.")])
            and size <= conditions.get("max_size", size)
            and images <= conditions.get("max_images", images)
        ):
            return row["then"]
    raise ValueError(
        f"features, patch or maps: too large for the triton backend's {kernel} in {dtype}: {_table()[kernel]['size']}, "
        f"got {size}; the torch backend has no such limit"
    )


def architecture(device: torch.device) -> str:
    """What a device's kernels are compiled for: "sm_90", "gfx942"; "interpreter" on a CPU."""
    if device.type == "cpu":
        return "interpreter"
    return _gpu_architecture(device.index)


@functools.cache
def _gpu_architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def precision(dtype: torch.dtype, target: str) -> str:
    """`input_precision` of products of operands in the tokens' dtype.

    float32 follows `float32_products`: "ieee" is three tf32 products (on AMD: plain float32), "tf32" one.
    """
    if dtype == torch.float64:
        return "ieee"
    if dtype == torch.float32 and float32_products() != "tf32":
        return "ieee" if target.startswith("gfx") else "tf32x3"
    return "tf32"


def float32_products() -> str:
    """What PyTorch's products of float32 on GPUs have: "tf32", or anything else for all digits.

    By `torch.set_float32_matmul_precision`, `allow_tf32` or `fp32_precision`, whichever was set last: where both are in
    use, `torch.get_float32_matmul_precision` raises.
    """
    return torch.backends.cuda.matmul.fp32_precision


def padded(size: int) -> int:
    """As `primitives.padded`, which is slow to call from here."""
    return max(16, power_of_two(size))


def blocks(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return -(-size // block)


class Launch(NamedTuple):
    """One launch: a kernel, how many programs, its row of `configurations.json`, and its arguments by name."""

    kernel: Any
    programs: int
    config: dict[str, int]
    arguments: dict[str, Any]


class Recording(NamedTuple):
    """Launches that are written down, and the device that they are meant for."""

    device: torch.device
    launches: list[Launch]


_recording: contextvars.ContextVar[Recording | None] = contextvars.ContextVar("dca_recording", default=None)


@contextlib.contextmanager
def recording(device: torch.device) -> Iterator[list[Launch]]:
    """Inside the `with` block launches, of tensors of the meta device, are written down: of this thread or task."""
    token = _recording.set(Recording(device, []))
    try:
        yield _recording.get().launches  # type: ignore[union-attr]
    finally:
        _recording.reset(token)


class Launcher:
    """Launches a stage's kernels: what they have in common is looked up once.

    A kernel's constants are filled in by their names: SHAPE, ACC, OPERAND (the tokens' dtype), PRECISION (of products
    of it), and of its row of `configurations.json` BLOCK_C and the like.

    Args:
        device: of the tokens.
        dtype: of the tokens.
        shape: of the token grid.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, shape: Shape) -> None:
        self._recording = _recording.get()
        self.device = device if self._recording is None else self._recording.device
        self.target, self.dtype, self.shape = architecture(self.device), dtype, shape
        self.precision = precision(dtype, self.target)
        self._constants = {
            "SHAPE": shape,
            "ACC": TYPES[accumulation_dtype(dtype)],
            "OPERAND": TYPES[dtype],
            "PRECISION": self.precision,
        }

    def config(self, name: str, size: int = 0, images: float = math.inf) -> dict[str, int]:
        """A kernel's row of `configurations.json`, which says what `size` is."""
        return configuration(name, self.target, self.dtype, size, images)

    def __call__(self, kernel: Any, config: dict[str, int], programs: int, **arguments: Any) -> None:
        """Launch a kernel with the blocks of its row, on so many programs."""
        for name, key in _constants(kernel.fn):
            if name not in arguments:
                arguments[name] = self._constants[name] if name in self._constants else config[key]
        if self._recording is None:
            run(kernel, programs, config, **arguments)
        elif _any(programs):
            self._recording.launches.append(Launch(kernel, programs, config, arguments))


@functools.cache  # of the function: a kernel's own hash takes 1.5 us
def _constants(function: Callable) -> list[tuple[str, str]]:
    """The names of a kernel's constants, and their keys in `configurations.json`."""
    return [(name, name.lower()) for name in inspect.signature(function).parameters if name.isupper()]


def run(kernel: Any, programs: int, config: dict[str, int], **arguments: Any) -> Any:
    """Launch a kernel on the device of its tensors; `config` gives its compiler options.

    Returns:
        The compiled kernel; None where there is none, of an interpreted kernel or without a program.
    """
    if not _any(programs):
        return None
    with on(_first_tensor(arguments).device):
        return kernel[(programs,)](**arguments, **_options(config))


def compile_all(launches: Sequence[Launch]) -> None:
    """Compile what these need and this process has not: in threads, with a line in the log.

    Errors are the launch's to raise, which compiles again. At times Python 3.11 makes one: its parser counts the depth
    of recursion for all threads together ("AST constructor recursion depth mismatch").
    """
    if all(isinstance(one.kernel, JITFunction) for one in launches):  # not interpreted
        # In a context without the caller's `AsyncCompileMode`; and Triton leaves its own one set where Ctrl-C ends it.
        contextvars.Context().run(_compile_in_threads, launches)


def _compile_in_threads(launches: Sequence[Launch]) -> None:
    for one in launches:
        one.kernel.cache_key  # noqa: B018  # parses, once: not while the threads do
    threads = len(os.sched_getaffinity(0))
    with concurrent.futures.ThreadPoolExecutor(threads) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        compiled = [
            one.kernel.run(grid=(one.programs,), warmup=True, **one.arguments, **_options(one.config))
            for one in launches
        ]
        names = [
            one.kernel.__name__.removeprefix("_").removesuffix("_kernel")
            for one, kernel in zip(launches, compiled, strict=True)
            if isinstance(kernel, triton.FutureKernel)
        ]
        if names:
            _logger.info(
                "compiling %d kernels in %d threads, or reading them from %s: %s",
                *(len(names), threads, triton.knobs.cache.dir, ", ".join(names)),
            )


def _options(config: dict[str, int]) -> dict[str, Any]:
    """What a launch tells the compiler; the last explicitly, since its default changes between Triton versions."""
    return compiler_options(config) | {"enable_fp_fusion": True}


def _any(programs: int) -> bool:
    """Whether there is a program to launch; raise for more than a grid has."""
    if programs > MAX_PROGRAMS:
        raise ValueError(f"maps: expected a batch of at most {MAX_PROGRAMS} programs a launch, got {programs}")
    return programs > 0


def compiler_options(config: dict[str, int]) -> dict[str, int]:
    """What a configuration tells the compiler; the rest are the kernel's block sizes."""
    return {name: value for name in COMPILER_OPTIONS if (value := config.get(name)) is not None}


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Inside the `with` block a device is the current one."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return _NOTHING
    return torch.cuda.device(device)


_NOTHING = contextlib.nullcontext()


def _first_tensor(arguments: dict[str, Any]) -> Tensor:
    for argument in arguments.values():
        while isinstance(argument, tuple) and argument:
            argument = argument[0]
        if isinstance(argument, Tensor):
            return argument
    raise TypeError("a kernel without tensors")


def circumstances(device: torch.device) -> tuple[object, ...]:
    """What launches on a device depend on beside their arguments, to tell kinds of calls apart.

    Tools replace `configuration` and `run`, and what a device is.
    """
    knobs = triton.knobs.runtime.debug, triton.knobs.compilation.instrumentation_mode
    return architecture(device), configuration, run, float32_products(), *knobs
