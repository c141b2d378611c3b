"""Checks of what the package is given. An error names the argument, what was expected and what came.

Integers are Python's, NumPy's or tensors', flags Python's or NumPy's. A bool is no integer, and an integer is no flag.
"""

import operator
from collections.abc import Mapping, Sequence, Sized
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

SMALLEST = 2  # bytes of a floating dtype that is computed in


def integers(name: str, values: object, least: int = 1) -> list[int]:
    """The integers of a sequence: of a list, tuple, array or the like."""
    if isinstance(values, (str, bytes, bytearray, Mapping)) or not hasattr(type(values), "__getitem__"):
        raise TypeError(f"{name}: expected a list of integers, got {values!r}")
    try:
        found = [_index(v) for v in values]  # type: ignore[attr-defined]
    except TypeError:
        raise TypeError(f"{name}: expected integers, got {values!r}") from None
    if not found or min(found) < least:
        raise ValueError(f"{name}: expected integers of at least {least}, got {found}")
    return found


def integer(name: str, value: object, least: int = 1) -> int:
    try:
        found = _index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {value!r}") from None
    if found < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {found}")
    return found


def _index(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        raise TypeError
    return operator.index(value)


def flag(name: str, value: object) -> bool:
    kind = type(value)
    if kind is not bool and (kind.__module__, kind.__name__) not in (("numpy", "bool"), ("numpy", "bool_")):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def grid(name: str, patch: Any) -> tuple[int, int]:
    """(P_h, P_w) of a token grid that is given by one integer or two."""
    try:
        sides = [_index(patch)] * 2
    except TypeError:
        sides = patch
    if not isinstance(sides, Sized) or getattr(sides, "ndim", 1) == 0 or len(sides) != 2:
        raise ValueError(f"{name}: expected one integer or (P_h, P_w), got {patch!r}")
    height, width = integers(name, sides)
    return height, width


def heads(name: str, given: Sequence[int], features: Sequence[int], by_default: bool) -> list[int]:
    """The heads of each scale's attention, which divide its channels and those of all scales."""
    found, total = integers(name, given), sum(features)
    if len(found) != len(features):
        raise ValueError(f"{name}: expected {len(features)} values, one for each of features, got {len(found)}")
    for i, (h, channels) in enumerate(zip(found, features, strict=True)):
        if channels % h or total % h:
            expected = f"{name}[{i}]: expected a divisor of features[{i}] = {channels} and of their sum {total}, got "
            if not by_default:
                raise ValueError(f"{expected}{h}")
            fitting = [max(d for d in range(1, h + 1) if c % d == total % d == 0) for c in features]
            raise ValueError(f"{expected}the default, {h}: pass {name}, {fitting} for one")
    return found


def check_model(model: nn.Module) -> None:
    """Raise a TypeError for what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")


def check_number(name: str, value: object) -> None:
    """Raise a TypeError for what is no number."""
    if not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {value!r}")


def check_dense(name: str, x: object, real: bool = False) -> None:
    """Raise a TypeError for what is no dense tensor of a floating dtype, or of any real one."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if real and x.is_complex():
        raise TypeError(f"{name}: expected a real dtype, got {x.dtype}")
    if not real and not (x.is_floating_point() and x.dtype.itemsize >= SMALLEST):
        raise TypeError(f"{name}: expected a floating dtype of at least 16 bits, got {x.dtype}")
    if x.layout is not torch.strided or x.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got one of {'tensors' if x.is_nested else x.layout}")


def check_memory(name: str, x: Tensor) -> None:
    """Raise a ValueError for a tensor whose memory was given back, as FSDP does with parameters between calls."""
    if x.is_meta or not x.numel():
        return
    try:
        held = x.untyped_storage().nbytes()
    except (NotImplementedError, RuntimeError):  # of one that stands for others, as within a transform
        return
    last = x.storage_offset() + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    if held < (last + 1) * x.element_size():
        raise ValueError(f"{name}: expected a tensor with its memory, got one whose storage has {held} bytes")


def check_tensor(name: str, x: object, shape: Sequence[int], device: torch.device | None, real: bool = False) -> None:
    """Raise for what is no dense tensor of a shape on a device, with its memory; None is any device."""
    check_dense(name, x, real)
    assert isinstance(x, Tensor)
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(x.shape)}")
    if device is not None and x.device != device:
        raise ValueError(f"{name}: expected device {device}, as the other parameters, got {x.device}")
    if x.is_neg():
        raise ValueError(f"{name}: expected a tensor of the values in its memory, got a negated view of it")
    check_memory(name, x)
