"""Puts the fused DCA into existing models in place of an official one, and takes it out again.

An official DCA is found by its layout, wherever its code was copied to: it is a module with the children `avg_map`,
`attention`, `upconvs` and `bn_relu`. A module of that layout may compute something else, so its maths is checked too.

`replace_dca` gives the fused module the submodules of the original that hold tensors: convolutions, norms and `bn_relu`
are the same objects in both. Whatever happens to the tensors later (training, `.to()`, `load_state_dict`, `deepcopy`,
pickling), both modules have the same ones, and `restore_dca` need only put the original back.
"""

import copy
import logging
import math
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dca_kernels.backends import check_name
from dca_kernels.module import DCA, check_model
from dca_kernels.plain import got_instead, size_of

CHILDREN = ("avg_map", "attention", "upconvs", "bn_relu")
# Names of the submodules that a fused module and its original share: all that hold tensors.
SHARED = re.compile(r".+\.proj\.depthwise|attention\.\d+\.\w+_norm\.\d+|upconvs\.\d+\.conv\.conv|bn_relu\.\d+")
SIDE = 3  # of the small token grid on which the maths is checked
TOLERANCE = 1e-9  # of float64 results, relative to the largest of their kind

_logger = logging.getLogger("dca_kernels")


@dataclass(frozen=True)
class Found:
    """One DCA of a model.

    Attributes:
        name: its path in the model; "" for the model itself.
        kind: its class, with the module that defines it.
        fused: whether it is a `dca_kernels.DCA` already.
        reason: why `replace_dca` would refuse it; None where it would not.
        skips: which skips `add_dca` put it on, with their shapes for the example.
    """

    name: str
    kind: str
    fused: bool
    reason: str | None
    skips: tuple[str, ...] = ()

    @property
    def state(self) -> str:
        if self.fused:
            return f"fused, on {', '.join(self.skips)}" if self.skips else "fused"
        return "can be replaced" if self.reason is None else f"refused: {self.reason}"


class Report(list[Found]):
    """The DCAs of a model in the model's order; prints as a table."""

    def __str__(self) -> str:
        rows = [("name", "class", "state"), *((found.name or "(model)", found.kind, found.state) for found in self)]
        name_width, kind_width = (max(len(row[i]) for row in rows) for i in range(2))
        return "\n".join(f"{name:{name_width}}  {kind:{kind_width}}  {state}" for name, kind, state in rows)


def inspect(model: nn.Module) -> Report:
    """Which DCAs a model has, which of them are fused, and which `replace_dca` would refuse, with the reason.

    Nothing is changed. A DCA that the model has under several names is listed under each.

    Raises:
        TypeError: `model` is not a module.
    """
    report = Report()
    reasons: dict[nn.Module, str | None] = {}
    for name, dca in _dcas(model):
        if not isinstance(dca, DCA) and dca not in reasons:
            try:
                _replacement(model, dca, "auto", verify=True)
                reasons[dca] = None
            except _Refused as error:
                reasons[dca] = str(error)
        kind = f"{type(dca).__module__}.{type(dca).__qualname__}"
        skips = tuple(map(str, vars(dca).get("_skips", ())))
        report.append(Found(name, kind, isinstance(dca, DCA), reasons.get(dca), skips))
    return report


def replace_dca(model: nn.Module, backend: str = "auto", verify: bool = True) -> nn.Module:
    """Replace every official-style DCA of a model, in place, by the fused one.

    The fused modules have the originals' parameters and buffers, the very same tensors under the same names in the
    same order: optimizers, DDP and checkpoints remain valid. `training`, `requires_grad` and the hooks on the DCA
    itself stay too. Call `replace_dca` before you compile (`torch.compile`) the DCA itself, and before sharding.

    Args:
        model: the model. Its code still works: the fused DCA takes one list of maps and returns a tuple, as the
            official one does.
        backend: of the fused modules: "auto", "torch" or "triton".
        verify: whether to compare outputs, gradients and buffers of each DCA with those of the fused one. This is done
            in evaluation and in training, on copies with random weights and a small token grid, on the CPU in float64,
            and touches neither the model nor a random number generator. Where False, the layout alone is trusted.

    Returns:
        `model`; where `model` itself is an official DCA, the fused one.

    Raises:
        TypeError: `model` is not a module.
        ValueError: there is no DCA to replace; a DCA cannot be replaced (other maths, hooks on modules that would not
            be called, ...: the message says which DCA and why); `backend` is unknown. The model is as it was.
    """
    check_name(backend, "backend")
    originals: dict[nn.Module, str] = {}
    for name, dca in _dcas(model):
        if not isinstance(dca, DCA):
            originals.setdefault(dca, name or "the model itself")
    if not originals:
        raise ValueError(
            f"model: expected an official DCA, a module with the children {', '.join(CHILDREN)}, in "
            f"{type(model).__name__}, got none{_others(model)}"
        )
    replacements: dict[nn.Module, nn.Module] = {}
    refusals = []
    for original, name in originals.items():
        try:
            replacements[original] = _replacement(model, original, backend, verify)
        except _Refused as error:
            refusals.append(f"{name} ({type(original).__name__}): {error}")
    if refusals:
        raise ValueError(f"model: expected DCAs that can be replaced, got {'; '.join(refusals)}")
    _logger.info("replaced by the fused DCA: %s", ", ".join(originals.values()))
    return _exchange(model, replacements)


def restore_dca(model: nn.Module) -> nn.Module:
    """Undo `replace_dca`, in place: the original modules come back, with the tensors, hooks and mode of the fused ones.

    Returns:
        `model`; where `model` itself is such a fused DCA, the original.

    Raises:
        TypeError: `model` is not a module.
        ValueError: there is no DCA that `replace_dca` put in, or someone put a forward on an instance of such a DCA's
            modules. The model is as it was.
    """
    originals: dict[nn.Module, nn.Module] = {}
    for _, dca in _dcas(model):
        if "_original" in vars(dca):
            (originals[dca],) = vars(dca)["_original"]
    if not originals:
        raise ValueError(
            f"model: expected a DCA that replace_dca put into {type(model).__name__}, got none{_others(model)}"
        )
    for fused in originals:
        for name, parent in _parents(fused):
            if "forward" in vars(parent):
                raise ValueError(
                    f"model: expected a DCA with its own forwards, got one that was put on {name or 'the DCA itself'}: "
                    "remove it first"
                )
    for fused, original in originals.items():
        for name, parent in _parents(fused):
            vars(original.get_submodule(name)).update(_hooks(parent))
        for name in _shared_names(fused):  # someone may have exchanged one since
            original.set_submodule(name, fused.get_submodule(name))
        shared = {m for name in _shared_names(fused) for m in fused.get_submodule(name).modules()}
        for m in set(original.modules()) - shared:
            m.training = fused.training
    return _exchange(model, originals)


# Finding and exchanging modules


class _Refused(Exception):
    """Why a module cannot be replaced."""


def _dcas(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every DCA, fused or official-style, under each of its names."""
    check_model(model)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, DCA) or module._modules.keys() >= set(CHILDREN):
            yield name, module


def _others(model: nn.Module) -> str:
    """What was found instead, for an error's message."""
    names = [name or "the model itself" for name, dca in _dcas(model) if isinstance(dca, DCA)]
    return f" besides the dca_kernels.DCA at {', '.join(names)}" if names else ""


def _exchange(model: nn.Module, new: dict[nn.Module, nn.Module]) -> nn.Module:
    """Put each new module in the place of the old one, which cannot fail; return the model, or what took its place."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in new:
                parent._modules[name] = new[child]
    return new.get(model, model)


def _replacement(model: nn.Module, original: nn.Module, backend: str, verify: bool) -> DCA:
    """The fused module that takes the place of `original`, which stays as it is; `_Refused` where none can."""
    compiled = any(parent._modules.get("_orig_mod") is original for parent in model.modules())
    if compiled or original._compiled_call_impl is not None:
        raise _Refused("it is compiled: replace it first, then compile")
    _refuse_hooks(original)
    with torch.random.fork_rng(devices=[]):
        fused = _fused(original, backend)
        if verify:
            _verify(original, fused)
    vars(fused).update(_hooks(original))  # the same registries: handles given out go on removing
    vars(fused)["_original"] = (original,)  # in a tuple it is no submodule
    return fused


def _hooks(module: nn.Module) -> dict[str, object]:
    """What a module keeps of hooks: its registries, and what PyTorch notes beside them."""
    return {name: value for name, value in vars(module).items() if "hook" in name}


def _refuse_hooks(original: nn.Module) -> None:
    """Refuse hooks and forwards that the fused module would not call, or with which it would run no backend."""
    for name, module in original.named_modules():
        if name.startswith("bn_relu."):
            continue
        if "forward" in vars(module):
            raise _Refused(f"the forward of {name or 'this instance'} was replaced, and would not be called")
        for registry, hooks in _hooks(module).items() if name else ():
            shared = SHARED.fullmatch(name)
            if hooks and not (shared and "state_dict" in registry):
                effect = "with which no backend would run" if shared else "which would not be called"
                raise _Refused(f"{name} has {registry.strip('_').replace('_', ' ')}, {effect}")


def _parents(fused: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The fused module and its submodules that are not shared: the original has others under the same names."""
    return ((name, module) for name, module in fused.named_modules() if not SHARED.match(name))


def _shared_names(dca: nn.Module) -> list[str]:
    return [name for name, _ in dca.named_modules() if SHARED.fullmatch(name)]


# The layout


def _fused(original: nn.Module, backend: str) -> DCA:
    """A fused module of the original's sizes and mode, with the original's submodules that hold tensors."""
    try:
        with torch.device("meta"):
            fused = _of_the_sizes_of(original, backend).train(original.training)
        for name in _shared_names(fused):
            module = original.get_submodule(name)
            if not name.startswith("bn_relu."):
                _check_parameters_of(name, module, fused.get_submodule(name))
            fused.set_submodule(name, module)
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise _Refused(f"it has another layout: {error}") from error
    ours, theirs = _tensor_names(fused), _tensor_names(original)
    if ours != theirs:
        differing = sorted(set(ours) ^ set(theirs))
        raise _Refused(f"it has other tensors than a DCA, or in another order: {', '.join(differing or theirs)}")
    return fused


def _of_the_sizes_of(original: Any, backend: str) -> DCA:
    """A DCA with the arguments that an official module shows in its submodules."""
    pools = [m for m in getattr(original, "patch_avg", nn.Module()).modules() if isinstance(m, nn.AdaptiveAvgPool2d)]
    sizes = [pool.output_size for pool in pools] or [original.grid if hasattr(original, "grid") else original.patch]
    grids = {_pair(size) for size in sizes}
    if len(grids) > 1:
        raise ValueError(f"patch_avg: expected one token grid, got {sorted(grids)}")
    (grid,) = grids
    block = original.attention[0]
    heads = {name: [_heads(a) for a in getattr(block, name, ())] for name in ("c_attention", "s_attention")}
    return DCA(
        features=[m.proj.depthwise.out_channels for m in original.avg_map],
        patch=grid[0] if grid[1:] == grid[:1] else grid,
        channel_att=hasattr(block, "c_attention"),
        spatial_att=hasattr(block, "s_attention"),
        n=len(original.attention),
        channel_head=heads["c_attention"] or None,
        spatial_head=heads["s_attention"] or None,
        backend=backend,
    )


def _pair(size: object) -> tuple[Any, ...]:
    """A size for rows and for columns, of one number for both or of two."""
    return tuple(size) if isinstance(size, Sequence) else (size, size)


def _heads(attention: nn.Module) -> int:
    return getattr(attention, "n_heads" if hasattr(attention, "n_heads") else "heads")


def _check_parameters_of(name: str, module: nn.Module, expected: nn.Module) -> None:
    """Compare attributes, not weights: in training, reading a parametrized weight may change its buffers."""
    got = got_instead(module, type(expected), size_of(expected))
    if got is not None:
        raise TypeError(f"{name}: expected {expected}, got {got}")


def _tensor_names(module: nn.Module) -> list[str]:
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return [name for name, _ in tensors]


# The maths


def _verify(original: nn.Module, fused: DCA) -> None:
    """Refuse a module that computes something else than a DCA, or whose copy does not run.

    The weights are random, since attention that was initialised to add nothing would hide every difference. The grid is
    small, since the original's attention matrices grow with the fourth power of its side.
    """
    small = [min(side, SIDE + (side > min(fused.grid))) for side in fused.grid]  # oblong where the grid is
    try:
        with torch.inference_mode(False), torch.enable_grad():
            theirs = _stand_in(original, fused, small)
            ours = _fused(copy.deepcopy(theirs), "torch")
            shapes = [(2, c, *size) for c, size in zip(ours.features, _sizes(theirs, ours), strict=True)]
            maps, upstream = [_normal(shape, 1) for shape in shapes], [_normal(shape, 2) for shape in shapes]
            for mode in ("evaluation", "training"):
                results = [_run(m.train(mode == "training"), maps, upstream) for m in (ours, theirs)]
                for kind in results[0]:
                    _compare(f"{kind} in {mode}", *(result[kind] for result in results))
    except _Refused:
        raise
    except Exception as error:
        raise _Refused(f"a copy of it does not run: {type(error).__name__}: {error}") from error


def _stand_in(original: nn.Module, fused: DCA, small: Sequence[int]) -> nn.Module:
    """A copy on the CPU in float64, without hooks, with a small token grid, random weights and plain norms."""
    registries = [hooks for m in original.modules() for hooks in _hooks(m).values() if isinstance(hooks, OrderedDict)]
    copied = copy.deepcopy(original, {id(hooks): OrderedDict() for hooks in registries})
    copied.to("cpu", torch.float64).requires_grad_()
    for i, channels in enumerate(fused.features):
        norm = nn.BatchNorm2d(channels, device="cpu", dtype=torch.float64)
        copied.set_submodule(f"bn_relu.{i}", nn.Sequential(norm, nn.ReLU()))
    for m in copied.modules():
        for name in ("patch", "grid", "output_size"):
            if name in vars(m) and _pair(getattr(m, name)) == fused.grid:
                setattr(m, name, small[0] if isinstance(getattr(m, name), int) else tuple(small))
    for seed, (name, tensor) in enumerate(copied.state_dict().items()):
        noise = _normal(tensor.shape, seed)
        if name.endswith("running_var"):
            tensor.copy_(0.5 + noise.square())
        elif tensor.is_floating_point():  # a convolution's outputs get the scale of its inputs
            fan_in = tensor.shape[1] if tensor.dim() > 1 else 1
            tensor.copy_(noise / math.sqrt(fan_in))
    return copied


def _sizes(original: nn.Module, fused: DCA) -> list[list[int]]:
    """Sizes of the maps: those that the original upsamples to, or of halving sides where it takes any."""
    sizes, scales = [], len(fused.features)
    for i in range(scales):
        upconv = original.get_submodule(f"upconvs.{i}")
        factors = [m.scale_factor for m in upconv.modules() if getattr(m, "scale_factor", None) is not None]
        factor = _pair(factors[0] if factors else 2 ** (scales - 1 - i))
        sizes.append([math.floor(side * f) for side, f in zip(fused.grid, factor, strict=True)])
    return sizes


def _normal(shape: Sequence[int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def _run(dca: nn.Module, maps: Sequence[Tensor], upstream: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """Outputs, gradients and buffers of one forward and backward."""
    maps = [x.clone().requires_grad_() for x in maps]
    dca.zero_grad()
    outputs = dca.forward(maps)
    if type(outputs) is not tuple:
        raise _Refused(f"its forward returns a {type(outputs).__name__}, a DCA's a tuple")
    if [y.shape for y in outputs] != [x.shape for x in maps]:
        raise _Refused(f"its outputs have the shapes {[tuple(y.shape) for y in outputs]}, not those of the maps")
    torch.autograd.backward(outputs, upstream)
    return {
        "outputs": [y.detach() for y in outputs],
        "gradients": [torch.zeros_like(t) if t.grad is None else t.grad for t in (*maps, *dca.parameters())],
        "buffers": [buffer.double() for buffer in dca.buffers()],
    }


def _compare(what: str, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    scale = max(t.abs().max().item() for t in ours)
    error = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    if not error <= TOLERANCE * scale:  # NaN is an error, too
        raise _Refused(f"it computes something else: {what} differ from a DCA's by {error / scale:.1e} of the largest")
