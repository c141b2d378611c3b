"""A DCA as plain PyTorch operations that call its submodules, and when it runs as such.

A backend reads the submodules' parameters, calls no submodule, and computes a call as a whole. Hooks watch the
submodules, and `torch.jit.trace`, an ONNX export and `torch.func` take a call apart. For these, the official module's
operations run in the backend's place, with their N x N matrices, at their speed. The log of `dca_kernels` says so.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules import module as registries
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils.module_tracker import ModuleTracker

from dca_kernels import layers

if TYPE_CHECKING:
    from dca_kernels.module import DCA

# Parents of the submodules that hold parameters.
SIZED = frozenset({layers.DepthwiseConv, layers.PointwiseConv, layers.LayerNorms})
PARENTS = frozenset(
    {
        *SIZED,
        nn.ModuleList,
        layers.DepthwiseProjection,
        layers.ChannelAttention,
        layers.SpatialAttention,
        layers.Block,
        layers.UpsampleConv,
    }
)
UNPADDED = ((0, 0), "valid", "same")
_logger = logging.getLogger("dca_kernels")
COMPUTING = (WeightNorm, SpectralNorm, BasePruningMethod)  # forward pre-hooks that compute a parameter


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
        TypeError: the parameters of a submodule do not say all that calling it would do.
    """
    modules: list[nn.Module | None] = [dca.avg_map, dca.attention, dca.upconvs]
    watched = None
    for parent in modules:
        if parent is None or type(parent) not in PARENTS:
            _refuse(dca, parent, _class_of(parent))
        if watched is None and is_hooked(parent) and not isinstance(parent, nn.ModuleList):  # which is never called
            watched = parent
        if type(parent) not in SIZED:
            modules += parent._modules.values()
            continue
        kind = nn.LayerNorm if type(parent) is layers.LayerNorms else nn.Conv2d
        for name, size in vars(parent)["sizes"].items():
            child = parent._modules[name]
            got = got_instead(child, kind, size)
            if got is not None:
                _refuse(dca, child, got)
            if watched is None and child is not None and is_hooked(child):
                watched = child
    if watched is not None:
        return f"a hook on {_path(dca, watched)}"
    return "a hook on every module" if has_global_hook() else None


def is_hooked(module: nn.Module) -> bool:
    """Whether something sees or changes a module's inputs, outputs or gradients."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    return "forward" in vars(module)


def has_global_hook() -> bool:
    """Whether a hook is called for every module; one that only notes names (`FlopCounterMode`'s) does not count."""
    if not registries._has_any_global_hook():
        return False
    forward = registries._global_forward_hooks, registries._global_forward_pre_hooks
    hooks = [*forward, registries._global_backward_hooks, registries._global_backward_pre_hooks]
    callables = [hook for of_kind in hooks for hook in of_kind.values()]
    return any(not isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in callables)


def got_instead(module: nn.Module | None, kind: type[nn.Module], size: tuple[object, ...]) -> str | None:
    """What a submodule is, in words, where its parameters do not say all that calling it would do; None where they do.

    Args:
        module: the submodule.
        kind: what it should be, `nn.Conv2d` or `nn.LayerNorm`, with a bias and with nothing that a subclass hides.
        size: what `size_of` should be.
    """
    if module is None or (type(module) is not kind and not _inherits_all(type(module), kind)):
        return _class_of(module)
    if module._forward_pre_hooks:
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, COMPUTING):
                return (
                    f"one with a parameter that the forward pre-hook {type(hook).__name__} computes: use "
                    "torch.nn.utils.parametrizations, or make it permanent (prune.remove)"
                )
    if size != size_of(module) or module._parameters.get("bias", module) is None:
        return str(module)
    if kind is nn.Conv2d and not (module.kernel_size == module.stride == (1, 1) and module.padding in UNPADDED):
        return str(module)
    return None


def size_of(module: nn.Module) -> tuple[object, ...]:
    """The size of a convolution or a LayerNorm, as in `sizes` of `dca_kernels.layers`."""
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape
    return module.in_channels, module.out_channels, module.groups


def _inherits_all(kind: type, known: type) -> bool:
    """Whether a module of a class is called as one of `known` is; true of parametrized modules."""
    if not issubclass(kind, known) or any(base.__module__.startswith("torch.distributed.") for base in kind.__mro__):
        return False
    called = ("__call__", "_call_impl", "forward", "_conv_forward")
    return all(getattr(kind, name, None) is getattr(known, name, None) for name in called)


def _class_of(module: nn.Module | None) -> str:
    kind = type(module)
    return f"a {kind.__module__}.{kind.__qualname__}"


def _refuse(dca: nn.Module, module: nn.Module | None, got: str) -> NoReturn:
    raise TypeError(
        f"{_path(dca, module)}: expected the submodule that DCA made, whose parameters are read in place of a call, "
        f"got {got} (shard or compile a DCA as a whole, fully_shard(dca); leave it out of quantization and LoRA)"
    )


def _path(dca: nn.Module, module: nn.Module | None) -> str:
    children = ((name, *child) for name, parent in dca.named_modules() for child in parent._modules.items())
    return next(f"{name}.{child}".removeprefix(".") for name, child, other in children if other is module)
