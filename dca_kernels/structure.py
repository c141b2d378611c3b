"""What the submodules of a DCA should be, and what they are.

A backend reads the submodules' parameters in place of calling them. So they are checked, since someone may have put
others there, or other tensors into them.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import nn
from torch.nn.modules import module as registries
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils.module_tracker import ModuleTracker

from dca_kernels import arguments, layers

if TYPE_CHECKING:
    from dca_kernels.module import DCA

UNPADDED = ((0, 0), "valid", "same")
COMPUTING = (WeightNorm, SpectralNorm, BasePruningMethod)  # forward pre-hooks that compute a parameter


class Expected(NamedTuple):
    """What a submodule should be.

    Attributes:
        kind: its class.
        children: what its own submodules should be.
        size: of a convolution or LayerNorm, see `size_of`.
        divided: what the heads of an attention divide.
    """

    kind: type[nn.Module]
    children: Mapping[str, "Expected"] = MappingProxyType({})
    size: tuple[int, ...] = ()
    divided: int = 0


def _listed(parts: Iterable[Expected], kind: type[nn.Module] = nn.ModuleList) -> Expected:
    return Expected(kind, {str(i): part for i, part in enumerate(parts)})


def _projection(channels: int) -> Expected:
    depthwise = Expected(nn.Conv2d, size=(channels, channels, channels))
    return Expected(layers.DepthwiseProjection, {"proj": Expected(layers.DepthwiseConv, {"depthwise": depthwise})})


def _upsampling(channels: int) -> Expected:
    pointwise = Expected(nn.Conv2d, size=(channels, channels, 1))
    return Expected(layers.UpsampleConv, {"conv": Expected(layers.PointwiseConv, {"conv": pointwise})})


def _attention(kind: type[nn.Module], total: int, channels: int) -> Expected:
    query, value = (channels, total) if kind is layers.ChannelAttention else (total, channels)
    projections = {"q_map": query, "k_map": total, "v_map": value, "projection": channels}
    children = {name: _projection(c) for name, c in projections.items()}
    return Expected(kind, children, divided=math.gcd(total, channels))


def _block(dca: "DCA", block: nn.Module | None) -> Expected:
    children: dict[str, Expected] = {}
    for has, prefix, kind in (
        (dca.channel_att, "channel", layers.ChannelAttention),
        (dca.spatial_att, "spatial", layers.SpatialAttention),
    ):
        if has:
            name, of_scales = f"{prefix}_norm", [Expected(nn.LayerNorm, size=(c,)) for c in dca.features]
            if isinstance(block, nn.Module) and type(block._modules.get(name)) is nn.ModuleList:  # see `Block.norms`
                children[name] = _listed(_listed([norm], layers.LayerNorms) for norm in of_scales)
            else:
                children[name] = _listed(of_scales, layers.LayerNorms)
            total = sum(dca.features)
            children[f"{prefix[0]}_attention"] = _listed(_attention(kind, total, c) for c in dca.features)
    return Expected(layers.Block, children)


def _expected(dca: "DCA") -> Expected:
    """What the constructor makes, but for `bn_relu`; of any number of blocks."""
    blocks = dca._modules.get("attention")
    held: list[nn.Module | None] = list(blocks._modules.values()) if isinstance(blocks, nn.ModuleList) else []
    children = {
        "avg_map": _listed(map(_projection, dca.features)),
        "attention": _listed(_block(dca, block) for block in held or [None]),
        "upconvs": _listed(map(_upsampling, dca.features)),
    }
    return Expected(type(dca), children)


def check(dca: "DCA") -> dict[str, nn.Module]:
    """The submodules that no backend calls, by their paths.

    Raises:
        TypeError, ValueError: the parameters of a submodule do not say all that calling it would do, or it is not of
            the size that `features` say.
    """
    found: dict[str, nn.Module] = {}
    pending: list[tuple[str, nn.Module, Expected]] = [("", dca, _expected(dca))]
    for parent_path, parent, expected in pending:  # grows
        for name, part in expected.children.items():
            path, module = f"{parent_path}.{name}".removeprefix("."), parent._modules.get(name)
            if part.size:
                got = got_instead(module, part.kind, part.size)
            elif type(module) is not part.kind:
                got = _class_of(module)
            elif module._modules.keys() != part.children.keys():
                got = f"one with the children {', '.join(module._modules) or 'none'}"
            else:
                got = None
            if got is not None or module is None:
                _refuse(path, str(got))
            if part.divided:
                heads = arguments.integer(f"{path}.heads", getattr(module, "heads", None))
                if part.divided % heads:
                    raise ValueError(f"{path}.heads: expected a divisor of {part.divided}, got {heads}")
            found[path] = module
            pending.append((path, module, part))
    norms, scales = dca._modules.get("bn_relu"), len(dca.features)
    held = list(norms._modules.values()) if isinstance(norms, nn.ModuleList | nn.Sequential) else []
    if len(held) != scales or None in held:
        raise TypeError(f"bn_relu: expected a list of {scales} modules, got {_class_of(norms)} of {len(held)}")
    return found


def check_tensors(dca: "DCA", modules: Mapping[str, nn.Module]) -> None:
    """Raise for a tensor or number that cannot be computed with.

    Args:
        dca: the module.
        modules: those that no backend calls, by their paths.
    """
    device: torch.device | None = None  # of the first
    for path, module in modules.items():
        # A parametrization checks what it computes; it may change each time that it is asked.
        if isinstance(module, nn.Conv2d | nn.LayerNorm) and "parametrizations" not in module._modules:
            size = size_of(module)
            weight: tuple[int, ...] = size if isinstance(module, nn.LayerNorm) else (size[1], size[0] // size[2], 1, 1)
            for name, shape in (("weight", weight), ("bias", weight[:1])):
                tensor = _held(module, name)
                arguments.check_tensor(f"{path}.{name}", tensor, shape, device)
                device = tensor.device
        if isinstance(module, nn.LayerNorm):
            arguments.check_number(f"{path}.eps", module.eps)
    for i, (head, channels) in enumerate(zip(dca.bn_relu, dca.features, strict=True)):
        norm = plain_norm(head)
        if norm is not None:
            _check_norm(f"bn_relu.{i}.0", norm, channels, device)


def _check_norm(path: str, norm: nn.BatchNorm2d, channels: int, device: torch.device | None) -> None:
    tensors = {name: _held(norm, name) for name in ("weight", "bias", "running_mean", "running_var")}
    for name, tensor in tensors.items():
        if tensor is not None:
            arguments.check_tensor(f"{path}.{name}", tensor, (channels,), device)
    if (tensors["running_mean"] is None) != (tensors["running_var"] is None):
        missing = next(name for name in ("running_mean", "running_var") if tensors[name] is None)
        raise ValueError(f"{path}.{missing}: expected a tensor, or None for mean and variance alike, got None alone")
    counter = _held(norm, "num_batches_tracked")
    if counter is not None:
        arguments.check_tensor(f"{path}.num_batches_tracked", counter, (), device, real=True)
    arguments.check_number(f"{path}.eps", norm.eps)
    if norm.momentum is not None:
        arguments.check_number(f"{path}.momentum", norm.momentum)


def _held(module: nn.Module, name: str) -> Any:
    """A parameter or buffer, or what a replica of nn.DataParallel has in its place; None where there is none."""
    held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
    return next((tensors[name] for tensors in held if name in tensors), None)


def plain_norm(head: nn.Module) -> nn.BatchNorm2d | None:
    """The BatchNorm of a `bn_relu` that is a plain BatchNorm2d and ReLU with nothing hooked in, else None.

    A backend fuses only such a one; any other is called as it is.
    """
    if type(head) is not nn.Sequential or len(head) != 2:
        return None
    norm, relu = head
    if type(norm) is not nn.BatchNorm2d or type(relu) is not nn.ReLU:
        return None
    if has_global_hook() or any(is_hooked(m) for m in (head, norm, relu)):
        return None
    return norm


def is_hooked(module: nn.Module, apart_from: Callable[..., object] | None = None) -> bool:
    """Whether something sees or changes a module's inputs, outputs or gradients, apart from one forward hook."""
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    return "forward" in vars(module) or any(hook is not apart_from for hook in module._forward_hooks.values())


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
    if kind is nn.Conv2d and module.padding_mode != "zeros" and any(vars(module)["_reversed_padding_repeated_twice"]):
        return str(module)  # the other modes pad by what the constructor was given
    return None


def size_of(module: Any) -> tuple[int, ...]:
    """The size of a convolution or a LayerNorm, as `Expected.size` has it."""
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


def _refuse(path: str, got: str) -> NoReturn:
    raise TypeError(
        f"{path}: expected the submodule that DCA made, whose parameters are read in place of a call, "
        f"got {got} (shard or compile a DCA as a whole, fully_shard(dca); leave it out of quantization and LoRA)"
    )
