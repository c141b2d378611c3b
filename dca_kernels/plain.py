"""A DCA as plain PyTorch operations that call its submodules, and when it runs as such.

A backend reads the submodules' parameters and calls none of them. What watches them (hooks), or takes a call apart that
a backend makes as a whole (`torch.jit.trace`, an ONNX export, `torch.func`), gets the official module's operations in
its place, with their N x N matrices, at their speed. The log of `dca_kernels` says so.
"""

from collections.abc import Collection, Sequence
from typing import Any

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

LEAVES = (nn.Conv2d, nn.LayerNorm)  # what holds the parameters
HOLDERS = frozenset(
    {
        nn.ModuleList,
        layers.DepthwiseConv,
        layers.DepthwiseProjection,
        layers.ChannelAttention,
        layers.SpatialAttention,
        layers.Block,
        layers.PointwiseConv,
        layers.UpsampleConv,
    }
)
COMPUTING = (WeightNorm, SpectralNorm, BasePruningMethod)  # forward pre-hooks that compute a parameter


def refine(dca: Any, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
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
    """What takes this call apart, so that no backend can make it as a whole; None where nothing does."""
    if _is_transformed():
        return "a transform of torch.func"
    if torch.compiler.is_compiling():
        return "an ONNX export" if torch.onnx.is_in_onnx_export() else None
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    for x in maps:
        if x.is_meta:
            return "the meta device"
        if type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__ and not isinstance(x, FakeTensor):
            return f"maps of type {type(x).__name__}"
    return None


def _is_transformed() -> bool:
    return torch._C._functorch.maybe_current_level() is not None


# While it traces, torch.compile is within the transform itself. `torch.compiler.assume_constant_result` does the same,
# but loads the compiler.
_is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def hooked(dca: Any) -> str | None:
    """Which submodule has a hook or a forward of its own, of those that no backend calls; None where none has.

    Raises:
        TypeError: the parameters of one do not say all that calling it would do.
    """
    rest: list[Any] = [dca.avg_map, dca.attention, dca.upconvs]
    watched = None
    for module in rest:
        if type(module) not in HOLDERS:
            came = refusal(module)
            if came is not None:
                raise TypeError(
                    f"{_path(dca, module)}: expected the submodule that DCA made, whose parameters are read without "
                    f"calling it (leave a DCA out where modules are exchanged: quantization, LoRA), got {came}"
                )
        if watched is None and is_hooked(module) and not isinstance(module, nn.ModuleList):  # which is never called
            watched = module
        if not isinstance(module, LEAVES):
            rest += module._modules.values()
    if watched is not None:
        return f"a hook on {_path(dca, watched)}"
    return "a hook on every module" if _has_global_hook() else None


def is_hooked(module: nn.Module) -> bool:
    """Whether something sees or changes what goes into a module, out of it, or back through it."""
    own = vars(module)
    forward = own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own
    return bool(forward or own["_backward_hooks"] or own["_backward_pre_hooks"])


def _has_global_hook() -> bool:
    """Whether a hook is called for every module, but for those that note names only (`FlopCounterMode`'s)."""
    if not registries._has_any_global_hook():
        return False
    forward = registries._global_forward_hooks, registries._global_forward_pre_hooks
    hooks = [*forward, registries._global_backward_hooks, registries._global_backward_pre_hooks]
    callables = [hook for of_kind in hooks for hook in of_kind.values()]
    return any(not isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in callables)


def refusal(module: nn.Module, kinds: Collection[type[nn.Module]] = (*LEAVES, *HOLDERS)) -> str | None:
    """What came in the place of a submodule whose parameters say all that calling it would do; None where one did.

    Args:
        module: the submodule.
        kinds: the classes that it may be of.
    """
    kind = type(module)
    if kind not in kinds:
        name = f"a {kind.__module__}.{kind.__qualname__}"
        if any(base.__module__.startswith("torch.distributed.") for base in kind.__mro__):
            return f"{name}: shard the DCA as a whole, fully_shard(dca)"
        if not any(issubclass(kind, known) and kind.forward is known.forward for known in kinds):
            return name
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, COMPUTING):
            return (
                f"one with a parameter that the forward pre-hook {type(hook).__name__} computes: use "
                "torch.nn.utils.parametrizations, or make it permanent (prune.remove)"
            )
    if isinstance(module, nn.Conv2d):
        unpadded = module.padding in ((0, 0), "valid", "same")
        if not (unpadded and module.kernel_size == module.stride == (1, 1)):
            return f"one that is no 1x1 convolution, {module}"
    if isinstance(module, LEAVES) and module._parameters.get("bias", module) is None:
        return f"one without a bias, {module}"
    return None


def _path(dca: nn.Module, module: nn.Module) -> str:
    return next(name for name, other in dca.named_modules() if other is module)
