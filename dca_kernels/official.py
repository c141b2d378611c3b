"""An official DCA's layout: the fused module that fits it, which submodules both share, and what cannot be shared.

A fused module gets the submodules of the original that hold tensors: convolutions, norms and `bn_relu` are the same
objects in both.
"""

import copy
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dca_kernels import layers
from dca_kernels.module import DCA
from dca_kernels.structure import got_instead, size_of

# Names of the submodules that a fused module and its original share: all that hold tensors.
SHARED = re.compile(r".+\.proj\.depthwise|attention\.\d+\.\w+_norm\.\d+(\.0)?|upconvs\.\d+\.conv\.conv|bn_relu\.\d+")


class Refused(Exception):
    """Why a module cannot be replaced."""


def fused_of(original: nn.Module, backend: str) -> DCA:
    """A fused module of the original's sizes and mode, with the original's submodules that hold tensors.

    Raises:
        Refused: the original has another layout.
    """
    try:
        with torch.device("meta"):
            fused = _of_the_sizes_of(original, backend).train(original.training)
        for name in shared_names(fused):
            module = original.get_submodule(name)
            if not name.startswith("bn_relu."):
                _check_parameters_of(name, module, fused.get_submodule(name))
            fused.set_submodule(name, module)
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise Refused(f"it has another layout: {error}") from error
    ours, theirs = _tensor_names(fused), _tensor_names(original)
    if ours != theirs:
        differing = sorted(set(ours) ^ set(theirs))
        raise Refused(f"it has other tensors than a DCA, or in another order: {', '.join(differing or theirs)}")
    return fused


def shared_names(dca: nn.Module) -> list[str]:
    """Names of the submodules that a fused module has from its original."""
    return [name for name, module in dca.named_modules() if SHARED.fullmatch(name) and not _is_around_a_norm(module)]


def parents(fused: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The fused module and its submodules that are not shared: the original has others under the same names."""
    inside = {m for name in shared_names(fused) for m in fused.get_submodule(name).modules()}
    return ((name, module) for name, module in fused.named_modules() if module not in inside)


def hooks_of(module: nn.Module) -> dict[str, Any]:
    """What a module keeps of hooks: its registries, and what PyTorch notes beside them."""
    return {name: value for name, value in vars(module).items() if "hook" in name}


def copy_without_hooks(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy whose hooks, which need not be copyable, are left out; `memo` is as of `copy.deepcopy`."""
    registries = [hooks for m in module.modules() for hooks in hooks_of(m).values() if isinstance(hooks, OrderedDict)]
    memo |= {id(hooks): OrderedDict() for hooks in registries}
    return copy.deepcopy(module, memo)


def _is_around_a_norm(module: nn.Module) -> bool:
    """Whether it is what the official module had around each LayerNorm before March 2023, or stands for it."""
    if type(module) is layers.LayerNorms:
        return True
    return type(module) is nn.Sequential and len(module) == 1 and isinstance(module[0], nn.LayerNorm)


def _of_the_sizes_of(original: Any, backend: str) -> DCA:
    """A DCA with the arguments that an official module shows in its submodules."""
    pools = [m for m in getattr(original, "patch_avg", nn.Module()).modules() if isinstance(m, nn.AdaptiveAvgPool2d)]
    sizes = [pool.output_size for pool in pools] or [original.grid if hasattr(original, "grid") else original.patch]
    grids = {pair(size) for size in sizes}
    if len(grids) > 1:
        raise ValueError(f"patch_avg: expected one token grid, got {sorted(grids)}")
    (grid,) = grids
    block = original.attention[0]
    heads = {name: [_heads(a) for a in getattr(block, name, ())] for name in ("c_attention", "s_attention")}
    fused = DCA(
        features=[m.proj.depthwise.out_channels for m in original.avg_map],
        patch=grid[0] if grid[1:] == grid[:1] else grid,
        channel_att=hasattr(block, "c_attention"),
        spatial_att=hasattr(block, "s_attention"),
        n=len(original.attention),
        channel_head=heads["c_attention"] or None,
        spatial_head=heads["s_attention"] or None,
        backend=backend,
    )
    for ours, theirs in zip(fused.attention, original.attention, strict=True):
        for name in ("channel_norm", "spatial_norm"):
            if hasattr(ours, name) and any(map(_is_around_a_norm, getattr(theirs, name))):
                setattr(ours, name, nn.ModuleList(layers.LayerNorms([c]) for c in fused.features))
    return fused


def pair(size: object) -> tuple[Any, ...]:
    """A size for rows and for columns, of one number for both or of two."""
    return tuple(size) if isinstance(size, Sequence) else (size, size)


def _heads(attention: nn.Module) -> int:
    return getattr(attention, "n_heads" if hasattr(attention, "n_heads") else "heads")


def _check_parameters_of(name: str, module: nn.Module, expected: nn.Module) -> None:
    """Compare attributes, not weights: in training, reading a parametrized weight may change its buffers."""
    got = got_instead(module, type(expected), size_of(expected))
    if got is not None:
        remedy = ""
        if isinstance(module, nn.Conv2d) and module.stride != (1, 1):
            remedy = ": a stride leaves pixels out, which no DCA does; keep the original, or set the stride to 1"
        raise TypeError(f"{name}: expected {expected}, got {got}{remedy}")


def _tensor_names(module: nn.Module) -> list[str]:
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return [name for name, _ in tensors]


# What the fused module would not call, and what is to be done first


def refuse_wrapped(model: nn.Module, original: nn.Module) -> None:
    """Refuse a module that something has changed which should come after the replacement, or is not there yet.

    Raises:
        Refused: with what to do first.
    """
    if isinstance(original, torch.jit.ScriptModule):
        raise Refused("it is a TorchScript module: replace it first, then trace or script")
    compiled = any(parent._modules.get("_orig_mod") is original for parent in model.modules())
    if compiled or original._compiled_call_impl is not None:
        raise Refused("it is compiled: replace it first, then compile")
    for parent in model.modules():
        if _is_sharded(parent) and original in parent.modules():
            raise Refused(f"it is {WRAPPERS[_is_sharded]}")
        if isinstance(parent, torch.fx.GraphModule) and original in parent.modules() and not _calls(parent, original):
            raise Refused("it is in a traced graph, which calls its submodules: replace it first, then trace or export")
    for name, module in original.named_modules():
        for is_of_it, advice in WRAPPERS.items():
            if is_of_it(module):
                raise Refused(f"{name or 'it'} is {advice}")
    for name, tensor in [*original.named_parameters(), *original.named_buffers()]:
        if tensor.is_meta:
            raise Refused(
                f"{name} is on the meta device: materialise it first (to_empty, then load_state_dict), then replace"
            )
        kind = type(tensor.data)
        if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
            raise Refused(f"{name} is a {kind.__name__}: replace it first, then shard or quantize the model")


def _calls(graph: torch.fx.GraphModule, original: nn.Module) -> bool:
    targets = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    return any(graph.get_submodule(str(target)) is original for target in targets)


def _of_package(*names: str) -> Callable[[nn.Module], bool]:
    return lambda module: any(base.__module__.startswith(names) for base in type(module).__mro__)


_is_sharded = _of_package("torch.distributed.fsdp.", "torch.distributed._composable.")
# What a submodule is, and what to do first.
WRAPPERS: dict[Callable[[nn.Module], bool], str] = {
    _of_package("peft."): "an adapter of peft: merge or unload the adapter first (merge_and_unload), then replace",
    _is_sharded: "sharded: replace it first, then shard the model",
    _of_package("torch.ao.", "torchao.", "torch.nn.quantized", "bitsandbytes."): (
        "quantized or observed: replace the float model first, then prepare and quantize it without the DCA"
    ),
    lambda module: hasattr(module, "activation_post_process"): (
        "observed for quantization: replace the float model first, then prepare and quantize it without the DCA"
    ),
}


def refuse_hooks(original: nn.Module) -> None:
    """Refuse hooks and forwards that the fused module would not call, or with which it would run no backend.

    Raises:
        Refused: with the name of what would not be called.
    """
    shared = set(shared_names(original))
    for name, module in original.named_modules():
        if name.startswith("bn_relu."):
            continue
        for attribute in vars(module):
            if callable(getattr(type(module), attribute, None)):
                raise Refused(f"the {attribute} of {name or 'this instance'} was replaced, and would not be called")
        for attribute in ("__call__", "_call_impl", "_wrapped_call_impl"):
            if name not in shared and getattr(type(module), attribute) is not getattr(nn.Module, attribute):
                raise Refused(f"{name or 'it'} has its class's own {attribute}, which would not be called")
        for registry, hooks in hooks_of(module).items() if name else ():
            if isinstance(hooks, dict) and hooks and not (name in shared and "state_dict" in registry):
                effect = "with which no backend would run" if name in shared else "which would not be called"
                raise Refused(f"{name} has {registry.strip('_').replace('_', ' ')}, {effect}")
