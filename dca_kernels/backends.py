"""Which implementation runs, and why.

The first of these that is not "auto" names the backend: the module's `backend` argument, `use_backend(...)`, the
environment variable DCA_BACKEND (an empty one is as none). A backend that is asked for by name either runs or raises.
Where all are "auto", `automatic` chooses. Where something needs the submodules called, no backend runs: see
`dca_kernels.plain`.
"""

import contextvars
import functools
import importlib.util
import logging
import os
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._contextlib import _DecoratorContextManager

from dca_kernels import torch_backend

if TYPE_CHECKING:
    from dca_kernels.module import DCA

NAMES = ("torch", "triton")
# Where `auto` runs the kernels: the compute capability, and the dtypes in which they were measured at 1, 8 and 32
# images, in evaluation and training. They were right, and took less time than the host alone takes for `torch`
# (benchmarks/results/NOTES.md).
MEASURED = {(9, 0): (torch.bfloat16, torch.float32)}
HAS_TRITON = importlib.util.find_spec("triton") is not None  # here: torch.compile of PyTorch 2.11 cannot trace it

# What the kernels' tiles hold: `auto` runs `torch` for more. A test compares them with configurations.json.
MOST_CHANNELS = 1024  # of a scale
MOST_OF_ALL = 4096  # channels of all scales
MOST_A_HEAD = 256  # channels of all scales a head of the spatial attention
MOST_COLUMNS = 1024  # of a map, in training
MOST_GRID_COLUMNS = 128  # of the token grid, in training: what programs of an H100 hold of it
MOST_IN_A_ROW = 4096  # channels of a scale, at least 16, times columns of a window, each a power of two; in training

_logger = logging.getLogger("dca_kernels")


class _Block:
    """One `with use_backend(...)`, and the one that it was entered in."""

    def __init__(self, name: str, outer: "_Block | None") -> None:
        self.name, self.outer, self.left = name, outer, False

    def is_within(self, other: "_Block") -> bool:
        return self.outer is other or (self.outer is not None and self.outer.is_within(other))


_OUTERMOST = _Block("auto", None)
_in_context = contextvars.ContextVar("dca_backend", default=_OUTERMOST)
_latest = "auto"  # what `_in_context` was set to last, in any thread: torch.compile sees when a global changes


def power_of_two(size: int) -> int:
    """The smallest one that is not below `size`."""
    return 1 << (size - 1).bit_length()


def why_not(name: str, device: torch.device) -> str | None:
    """The reason why a backend cannot run on a device, or None where it can."""
    if name == "torch":
        return None
    if not HAS_TRITON:
        return "triton is not installed"
    if device.type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else "its kernels run on GPUs (for tests: TRITON_INTERPRET=1)"
    if device.type != "cuda":
        return "its kernels run on CUDA and ROCm devices"
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and major < 8:
        return f"it needs compute capability 8.0 or newer, got {major}.{minor}"
    return None


class use_backend(_DecoratorContextManager):  # named as torch.no_grad is
    """Run every DCA inside the `with` block on the named backend, where the DCA's `backend` is "auto".

    The block counts for the thread or task that entered it. A compiled module is the exception: it goes by the block
    that any thread entered or left last, and is compiled again when that names another backend.

    As a decorator it counts while the function runs; a generator function's runs end at each `yield`. A generator that
    yields inside a `with` block has not left it, and it counts for the caller as well, as that of torch.no_grad does.

    Raises:
        ValueError: `name` is not "auto", "torch" or "triton".
        RuntimeError: the block is left, and one that was entered within it is not, as that of a suspended generator.
    """

    def __init__(self, name: str) -> None:
        self._name = check_name(name, "use_backend")
        self._blocks: list[_Block] = []

    def clone(self) -> "use_backend":
        return use_backend(self._name)

    def __enter__(self) -> None:
        self._blocks.append(_Block(self._name, _innermost()))
        _enter(self._blocks[-1])

    def __exit__(self, *_: object) -> None:
        block = self._blocks.pop()
        block.left = True
        inner = _innermost()
        _enter(inner)
        if inner.is_within(block):
            raise RuntimeError(
                f"use_backend: expected to leave the block of {inner.name!r}, entered within that of {block.name!r}, "
                "first: decorate a generator function instead of yielding within a block"
            )


def _innermost() -> _Block:
    """The block that was entered last of those that are not left, which a generator may do in any order."""
    block = _in_context.get()
    if block is _OUTERMOST and torch._C._is_key_in_tls("context"):  # of who called for this backward, in its threads
        block = torch._C._get_obj_in_tls("context").get(_in_context, _OUTERMOST)
    while block.left and block.outer is not None:
        block = block.outer
    return block


def _enter(block: _Block) -> None:
    global _latest
    _in_context.set(block)
    _latest = block.name


def check_name(name: str, source: str) -> str:
    """`name`, or a ValueError that says where an unknown one came from."""
    if not isinstance(name, str) or name not in ("auto", *NAMES):
        raise ValueError(f"{source}: expected one of 'auto', 'torch', 'triton', got {name!r}")
    return name


def tokens_dtype(maps: Sequence[Tensor]) -> torch.dtype:
    """The dtype of the kernels' tokens and operands: the maps', or autocast's, which leaves float64 alone."""
    device = maps[0].device.type
    if torch.is_autocast_enabled(device) and maps[0].dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return maps[0].dtype


def too_large(dca: "DCA", maps: Sequence[Tensor]) -> str | None:
    """What of a module and its maps is more than the kernels' tiles hold, or None."""
    total = sum(dca.features)
    if max(dca.features) > MOST_CHANNELS or total > MOST_OF_ALL:
        return f"more than {MOST_CHANNELS} channels of a scale or {MOST_OF_ALL} of all"
    if dca.spatial_att and total // min(dca.spatial_head) > MOST_A_HEAD:
        return f"more than {MOST_A_HEAD} channels a head of the spatial attention"
    if dca.grid[1] > MOST_GRID_COLUMNS:
        return f"more than {MOST_GRID_COLUMNS} columns of the token grid"
    for channels, x in zip(dca.features, maps, strict=True):
        columns, windows = x.shape[3], dca.grid[1]
        if columns > MOST_COLUMNS:
            return f"more than {MOST_COLUMNS} columns of a map"
        if not torch.compiler.is_compiling():  # where the number of columns may be dynamic
            widest = -(-columns // windows) + (columns % windows != 0)
            if max(16, power_of_two(channels)) * power_of_two(widest) > MOST_IN_A_ROW:
                return f"more than {MOST_IN_A_ROW} values in a row of a window"
    return None


def choose(argument: str, device: torch.device, dtype: torch.dtype, large: str | None = None) -> str:
    """The name of the backend that runs on `device`.

    Args:
        argument: the module's `backend`.
        device: of the maps.
        dtype: of the tokens.
        large: what is too large for the kernels, in words (see `too_large`); None where nothing is.

    Raises:
        RuntimeError: a backend was asked for by name and cannot run; the message says why.
        ValueError: the first of these names that is not "auto" is unknown.
    """
    in_context = _latest if torch.compiler.is_compiling() else _innermost().name
    in_environment = os.environ.get("DCA_BACKEND") or "auto"
    for source, name in (("backend", argument), ("use_backend", in_context), ("DCA_BACKEND", in_environment)):
        if check_name(name, source) != "auto":
            reason = why_not(name, device)
            if reason is not None:
                raise RuntimeError(f"{source}: {name!r} cannot run on {device}: {reason}")
            return name
    name, reason = automatic(device, dtype, large)
    if not torch.compiler.is_compiling():
        _say_automatic(name, device.type, dtype, reason)
    return name


def requested() -> tuple[str, str | None]:
    """What `choose` goes by beside its arguments."""
    return _innermost().name, os.environ.get("DCA_BACKEND")


def automatic(device: torch.device, dtype: torch.dtype, large: str | None = None) -> tuple[str, str]:
    """What `auto` runs, and why: `triton` where it was measured (`MEASURED`), `torch` elsewhere."""
    reason = why_not("triton", device)
    if reason is not None:
        return "torch", f"'triton': {reason}"
    if device.type != "cuda" or torch.version.hip is not None:
        return "torch", "'triton' was not measured here"
    major, minor = torch.cuda.get_device_capability(device)
    if dtype not in MEASURED.get((major, minor), ()):
        return "torch", f"'triton' was not measured in {dtype} at compute capability {major}.{minor}"
    if large is not None:
        return "torch", f"'triton' cannot hold {large}"
    return "triton", f"measured to be faster than 'torch' at compute capability {major}.{minor}"


@functools.cache  # one log line each
def _say_automatic(name: str, device_type: str, dtype: torch.dtype, reason: str) -> None:
    _logger.info("backend 'auto' runs %r on %s in %s (%s)", name, device_type, dtype, reason)


def load(name: str) -> ModuleType:
    """The module that holds a backend's `refine`."""
    if name == "torch":
        return torch_backend
    from dca_kernels import triton_backend  # imports triton

    return triton_backend
