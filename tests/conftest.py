"""Kernels are interpreted where there is no GPU; in every test, fresh memory holds NaN.

An element that is never written cannot pass for a value then.
"""

import os

# Before NumPy is imported: shapes are small, and on busy cores threads that wait for each other take ten times as long.
# `python -m tests.capabilities` asks for more; where they wait by spinning, 27 tests took 459 s in place of 12 s.
os.environ["OMP_NUM_THREADS"] = os.environ.get("DCA_TEST_THREADS", "1")
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import gc
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._device import _device_constructors

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

gc.set_threshold(20_000)  # the collector's rounds, one in 700 new objects, took a tenth of the time
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # where PyTorch was imported before
_device_constructors()  # keeps `torch.empty` as it is, before a test poisons it: `torch.device("meta")` goes by that
torch.backends.cudnn.allow_tf32 = False  # the reference in float32 is float32

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    from triton.runtime.interpreter import interpreter_builder

    from tests import interpreter

    interpreter.install()
    # Prepares checks that only debug=True makes, in a third of the time of all.
    interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)


def pytest_configure(config: pytest.Config) -> None:
    # Triton 3.6's interpreter takes int() of an array of one element, which NumPy will no longer allow.
    message = "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning:triton.runtime.interpreter"
    config.addinivalue_line("filterwarnings", message)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


def poison(patch: pytest.MonkeyPatch) -> None:
    """`empty`, `empty_like` and `new_empty` give NaN where `dca_kernels` calls them."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        patch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture
def precisions(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What a GPU would round the operands of the products to, which the interpreter leaves as they are."""
    from triton.runtime.interpreter import InterpreterBuilder

    found: set[str] = set()
    multiply = InterpreterBuilder.create_dot

    def multiply_and_note(self: object, a: object, b: object, d: object, precision: Any, *rest: object) -> object:
        found.add(precision.name)
        return multiply(self, a, b, d, precision, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", multiply_and_note)
    return found


@pytest.fixture(scope="session")
def importable_torchvision() -> Iterator[None]:
    """The wheel of torchvision holds operators for a GPU build of torch, and beside a CPU build it cannot be imported.

    It asks for two schemas on the way. The operators themselves stay missing; no network here calls them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import torchvision  # noqa: F401
        except ModuleNotFoundError:
            yield
        except RuntimeError:
            library = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            yield
        else:
            yield


def _poisoned(allocate):
    def allocate_and_fill(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("dca_kernels") and tensor.is_floating_point() and kwargs.get("out") is None:
            tensor.fill_(float("nan"))
        return tensor

    return allocate_and_fill
