"""A DCA as plain PyTorch operations that call its submodules, and when it runs as such.

A backend reads the submodules' parameters, calls no submodule, and computes a call as a whole. Hooks watch the
submodules, and `torch.jit.trace`, an ONNX export and `torch.func` take a call apart. For these, the official module's
operations run in the backend's place, with their N x N matrices, at their speed. The log of `dca_kernels` says so.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from dca_kernels import structure

if TYPE_CHECKING:
    from dca_kernels.module import DCA

_logger = logging.getLogger("dca_kernels")


def refine(dca: "DCA", maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The skip maps refined by a DCA, operation for operation as by the official module.

    Args:
        dca: the module.
        maps: S tensors (B, C_i, H_i, W_i).

    Returns:
        S tensors (B, C_i, H_i, W_i).
    """
    grid = dca.grid
    pooled = [F.adaptive_avg_pool2d(x, grid).flatten(2).transpose(1, 2) for x in maps]  # S of (B, N, C_i)
    tokens: Sequence[Tensor] = [scale(t, grid) for scale, t in zip(dca.avg_map, pooled, strict=True)]
    for block in dca.attention:
        tokens = block(tokens, grid)  # S of (B, N, C_i)
    low = [t.transpose(1, 2).unflatten(2, grid) for t in tokens]  # S of (B, C_i, P_h, P_w)
    summed = [up(z, x.shape[2:]) + x for up, z, x in zip(dca.upconvs, low, maps, strict=True)]  # as the maps
    return tuple(head(y) for head, y in zip(dca.bn_relu, summed, strict=True))


def taken_apart(maps: Sequence[Tensor]) -> str | None:
    """What takes this call apart, so that no backend can compute it as a whole; None where nothing does."""
    if _is_transformed():
        return "a transform of torch.func"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if torch.compiler.is_compiling():
        return "an ONNX export" if torch.onnx.is_in_onnx_export() else None
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    for x in maps:
        if x.is_meta:
            return "the meta device"
        if type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__ and not isinstance(x, FakeTensor):
            return f"maps of type {type(x).__name__}"
    return None


def _called_while_tracing(function: Callable) -> Callable:
    """Do what `torch.compiler.assume_constant_result` does, without its import of the compiler.

    The compiler calls such a function while it traces, and does not trace it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_called_while_tracing  # then, the compiler itself runs within the transform
def _is_transformed() -> bool:
    return torch._C._functorch.maybe_current_level() is not None


@_called_while_tracing
def say(reason: str) -> None:
    """Say once in the log that the plain operations run, and why."""
    _say_once(reason)


@functools.cache
def _say_once(reason: str) -> None:
    _logger.warning(
        "%s needs the submodules of a DCA called: plain PyTorch operations run, slower, with N x N matrices in memory",
        reason,
    )


def hooked(dca: "DCA") -> str | None:
    """Which submodule has a hook or a forward put on it, of those that no backend calls; None where none has.

    Raises:
        TypeError, ValueError: a submodule is not what the constructor put there, or has a tensor or number that cannot
            be computed with. Where something is hooked, which may bring tensors, these are not looked at.
    """
    found = structure.check(dca)
    for path, module in found.items():
        if structure.is_hooked(module) and not isinstance(module, nn.ModuleList):  # which is never called
            return f"a hook on {path}"
    if structure.has_global_hook():
        return "a hook on every module"
    if not torch.compiler.is_compiling() and not torch.jit.is_tracing():  # which makes tensors of sizes
        structure.check_tensors(dca, found)
    return None
