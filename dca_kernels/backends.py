"""Which implementation runs, and why.

Order: the module's `backend` argument, then `use_backend(...)`, then the environment variable DCA_BACKEND, then "auto".
An argument of "auto" leaves the choice to the next in line. A backend asked for by name either runs or raises.
"""

import contextlib
import contextvars
import functools
import logging
import os
from collections.abc import Iterator
from types import ModuleType

import torch

from dca_kernels import fused

NAMES = ("torch", "triton")

_logger = logging.getLogger("dca_kernels")
_in_context: contextvars.ContextVar[str] = contextvars.ContextVar("dca_backend", default="auto")


def why_not(name: str, device: torch.device) -> str | None:
    """The reason why a backend cannot run on a device, or None where it can."""
    if name == "torch":
        return None
    return "its kernels are not part of this version"


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every DCA inside the `with` block, whose own `backend` is "auto", on the named backend.

    Raises:
        ValueError: `name` is not "auto", "torch" or "triton".
    """
    token = _in_context.set(check_name(name, "use_backend"))
    try:
        yield
    finally:
        _in_context.reset(token)


def check_name(name: str, source: str) -> str:
    """`name`, or a ValueError that says where an unknown one came from."""
    if name not in ("auto", *NAMES):
        raise ValueError(f"{source}: expected one of 'auto', 'torch', 'triton', got {name!r}")
    return name


def choose(argument: str, device: torch.device) -> str:
    """The name of the backend that runs on `device`.

    Raises:
        RuntimeError: a backend was asked for by name and cannot run; the message says why.
        ValueError: DCA_BACKEND holds an unknown name.
    """
    requests = [("backend", argument), ("use_backend", _in_context.get())]
    requests.append(("DCA_BACKEND", check_name(os.environ.get("DCA_BACKEND", "auto"), "DCA_BACKEND")))
    for source, name in requests:
        if name != "auto":
            reason = why_not(name, device)
            if reason is not None:
                raise RuntimeError(f"{source}: {name!r} cannot run on {device}: {reason}")
            return name
    return _automatic(device.type)


@functools.cache  # one log line a device type
def _automatic(device_type: str) -> str:
    reason = why_not("triton", torch.device(device_type))
    name = "torch" if reason else "triton"
    _logger.info("backend 'auto' runs %r on %s%s", name, device_type, f" ('triton': {reason})" if reason else "")
    return name


def load(name: str) -> ModuleType:
    """The module that holds a backend's stages."""
    assert name == "torch"
    return fused
