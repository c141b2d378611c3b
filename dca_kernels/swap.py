"""Puts the fused DCA into existing models: in place of an official one, or onto the skips of an encoder-decoder.

An official DCA is found by its layout, wherever its code was copied to: a module with the children `avg_map`,
`attention`, `upconvs` and `bn_relu`. A module of that layout may compute something else, so its maths is checked too.

`replace_dca` gives the fused module the original's own submodules: convolutions, norms and `bn_relu` are the same
objects in both. Whatever happens to their tensors later (training, `.to()`, `load_state_dict`, `deepcopy`, pickling),
both have the same ones, and `restore_dca` need only put the original back.
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
from dca_kernels.module import DCA
from dca_kernels.plain import refusal, size_of

CHILDREN = ("avg_map", "attention", "upconvs", "bn_relu")
# The submodules that a fused module and its original share: all that hold tensors.
SHARED = re.compile(r".+\.proj\.depthwise|attention\.\d+\.\w+_norm\.\d+|upconvs\.\d+\.conv\.conv|bn_relu\.\d+")
SIDE = 3  # of the token grid on which the maths is checked
TOLERANCE = 1e-9  # of float64 results, relative to the largest of their kind
IMAGE_SIDE = 256  # of the image that shows a decoder's maps: two pixels are left after seven halvings

_logger = logging.getLogger("dca_kernels")


@dataclass(frozen=True)
class Found:
    """One DCA of a model.

    Attributes:
        name: its path in the model; "" for the model itself.
        kind: its class, with the module that defines it.
        fused: whether it is a `dca_kernels.DCA` already.
        reason: why `replace_dca` would refuse it; None where it would not.
    """

    name: str
    kind: str
    fused: bool
    reason: str | None

    @property
    def state(self) -> str:
        if self.fused:
            return "fused"
        return "can be replaced" if self.reason is None else f"refused: {self.reason}"


class Report(list[Found]):
    """The DCAs of a model in its own order; prints as a table."""

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
            except _Refused as refusal:
                reasons[dca] = str(refusal)
        kind = f"{type(dca).__module__}.{type(dca).__qualname__}"
        report.append(Found(name, kind, isinstance(dca, DCA), reasons.get(dca)))
    return report


def replace_dca(model: nn.Module, backend: str = "auto", verify: bool = True) -> nn.Module:
    """Replace every official-style DCA of a model, in place, by the fused one.

    The fused modules have the originals' parameters and buffers, the very same tensors under the same names in the
    same order: optimizers, DDP and checkpoints remain valid. `training`, `requires_grad` and the DCA's own hooks stay
    too. Call it before `torch.compile` of the DCA itself and before sharding.

    Args:
        model: the model. Its calls go on working: a DCA takes one list of maps and returns a tuple, as the official
            one does.
        backend: of the fused modules: "auto", "torch" or "triton".
        verify: compare outputs, gradients and buffers of each DCA with those of the fused one, in evaluation and in
            training, on copies with random weights and a small token grid, on the CPU in float64. Neither the model
            nor a random number generator is touched. Where False, the layout alone is trusted.

    Returns:
        `model`; where `model` itself is an official DCA, the fused one.

    Raises:
        TypeError: `model` is not a module.
        ValueError: there is no DCA to replace; one of them cannot be (other maths, hooks on modules that would not be
            called, ...: the message says which and why); `backend` is unknown. The model is as it was.
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
        except _Refused as refusal:
            refusals.append(f"{name} ({type(original).__name__}): {refusal}")
    if refusals:
        raise ValueError(f"model: expected DCAs that can be replaced, got {'; '.join(refusals)}")
    _logger.info("replaced by the fused DCA: %s", ", ".join(originals.values()))
    return _swap(model, replacements)


def restore_dca(model: nn.Module) -> nn.Module:
    """Undo `replace_dca`: the original modules come back, in place, with the tensors, hooks and mode of now.

    Returns:
        `model`; where `model` itself is such a fused DCA, the original.

    Raises:
        TypeError: `model` is not a module.
        ValueError: there is no DCA that `replace_dca` put in, or a forward was put on an instance in one. The model is
            as it was.
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
        for name in _shared_names(fused):  # one may have been exchanged since
            original.set_submodule(name, fused.get_submodule(name))
        shared = {m for name in _shared_names(fused) for m in fused.get_submodule(name).modules()}
        for m in set(original.modules()) - shared:
            m.training = fused.training
    return _swap(model, originals)


def add_dca(
    model: nn.Module, patch: int | tuple[int, int] = 28, example: Tensor | None = None, **arguments: Any
) -> nn.Module:
    """Put a new DCA on the skips of a model that calls its child `decoder` with the maps of its child `encoder`.

    Networks of segmentation_models_pytorch and nnU-Net and MONAI's FlexibleUNet do. What the decoder gets is seen in
    one forward in evaluation mode, which ends there: maps from the largest to the smallest, one list or one argument
    each. The last is the bottleneck and passes as it is, as do a leading copy of the image and maps without channels
    after it; the others are the skips.

    The DCA is `model.decoder.dca`, and a forward pre-hook of the decoder calls it. No key of the state dict changes,
    and a state dict without any key of the DCA, such as a checkpoint of the plain model, loads strictly: the DCA keeps
    the values that it has, and a warning says so. It begins with the official initial values, so the model's outputs
    change until it is trained; none would keep them, since the DCA ends in BatchNorm.

    Call it before the optimizer is made, and before DDP and `torch.compile`. Of a decoder that leaves some of its skips
    unused, the DCA's parameters for those get no gradient.

    Args:
        model: the model, changed in place.
        patch: token grid, P for P x P or (P_h, P_w).
        example: an input (B, C, H, W) of the model; a random image of 256 x 256, with the channels that the encoder's
            first convolution takes, where None.
        arguments: of `DCA`, without features and strides.

    Returns:
        `model`.

    Raises:
        TypeError, ValueError: the model has no such encoder and decoder, the decoder gets something else, or an
            argument is not one of `DCA`; the message says what. The model is as it was.
    """
    _check_module(model)
    encoder, decoder = (getattr(model, name, None) for name in ("encoder", "decoder"))
    if not isinstance(encoder, nn.Module) or not isinstance(decoder, nn.Module) or isinstance(decoder, nn.Sequential):
        children = ", ".join(f"{name} ({type(child).__name__})" for name, child in model.named_children())
        raise ValueError(
            f"model: expected a {type(model).__name__} with a child encoder and a child decoder that is called with "
            f"the encoder's maps and is no Sequential, got the children {children or '(none)'}; a forward that has "
            "its skips as variables can call a dca_kernels.DCA on them"
        )
    if hasattr(decoder, "dca"):
        raise ValueError(f"model: expected a decoder without an attribute dca, got a {type(decoder.dca).__name__}")
    for name in ("features", "strides"):
        if name in arguments:
            raise TypeError(f"{name}: expected to be read off the model, got {arguments[name]!r}")
    if not isinstance(example, Tensor | None):
        raise TypeError(f"example: expected a tensor (B, C, H, W) or None, got {type(example).__name__}")
    skips = _skips(model, decoder, _image(encoder) if example is None else example)
    dca = DCA([x.shape[1] for x in skips], patch=patch, **arguments)
    dca.to(skips[0].device, next(model.parameters()).dtype).train(decoder.training)
    dca.register_load_state_dict_pre_hook(_keep_where_absent)
    decoder.dca = dca
    decoder.register_forward_pre_hook(_refine_skips)
    return model


# Finding and exchanging modules


class _Refused(Exception):
    """Why a module cannot be replaced."""


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")


def _dcas(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every DCA, fused or official-style, under each of its names."""
    _check_module(model)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, DCA) or module._modules.keys() >= set(CHILDREN):
            yield name, module


def _others(model: nn.Module) -> str:
    """What was found instead, for an error's message."""
    names = [name or "the model itself" for name, dca in _dcas(model) if isinstance(dca, DCA)]
    return f" besides the dca_kernels.DCA at {', '.join(names)}" if names else ""


def _swap(model: nn.Module, new: dict[nn.Module, nn.Module]) -> nn.Module:
    """Exchange submodules, which cannot fail; return what `model` is then."""
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
            _verify(original, fused.grid)
    vars(fused).update(_hooks(original))  # the same registries: handles given out go on removing
    vars(fused)["_original"] = (original,)  # in a tuple it is no submodule
    return fused


def _hooks(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if "hook" in name}


def _refuse_hooks(original: nn.Module) -> None:
    """Refuse what would be called in `original` and not in the fused module, or would keep that from any backend."""
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
    """The fused module and those of its submodules that its original does not share, but has under the same name."""
    return ((name, module) for name, module in fused.named_modules() if not SHARED.match(name))


def _shared_names(dca: nn.Module) -> list[str]:
    return [name for name, _ in dca.named_modules() if SHARED.fullmatch(name)]


# The layout


def _fused(original: nn.Module, backend: str) -> DCA:
    """A fused module of the original's sizes and mode, with the original's submodules that hold tensors."""
    try:
        with torch.device("meta"):
            fused = DCA(**_arguments(original), backend=backend).train(original.training)
        for name in _shared_names(fused):
            module = original.get_submodule(name)
            if not name.startswith("bn_relu."):
                _check_leaf(name, module, fused.get_submodule(name))
            fused.set_submodule(name, module)
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise _Refused(f"it has another layout: {error}") from error
    ours, theirs = _tensor_names(fused), _tensor_names(original)
    if ours != theirs:
        differing = sorted(set(ours) ^ set(theirs))
        raise _Refused(f"it has other tensors than a DCA, or in another order: {', '.join(differing or theirs)}")
    return fused


def _arguments(original: Any) -> dict[str, Any]:
    """The arguments of `DCA`, read off an official module."""
    pools = [m for m in getattr(original, "patch_avg", nn.Module()).modules() if isinstance(m, nn.AdaptiveAvgPool2d)]
    sizes = [pool.output_size for pool in pools] or [original.grid if hasattr(original, "grid") else original.patch]
    grids = {_pair(size) for size in sizes}
    if len(grids) > 1:
        raise ValueError(f"patch_avg: expected one token grid, got {sorted(grids)}")
    (grid,) = grids
    block = original.attention[0]
    heads = {name: [_heads(a) for a in getattr(block, name, ())] for name in ("c_attention", "s_attention")}
    return {
        "features": [m.proj.depthwise.out_channels for m in original.avg_map],
        "patch": grid[0] if grid[1:] == grid[:1] else grid,
        "channel_att": hasattr(block, "c_attention"),
        "spatial_att": hasattr(block, "s_attention"),
        "n": len(original.attention),
        "channel_head": heads["c_attention"] or None,
        "spatial_head": heads["s_attention"] or None,
    }


def _pair(size: Any) -> tuple[Any, ...]:
    return tuple(size) if isinstance(size, Sequence) else (size, size)


def _heads(attention: Any) -> int:
    return attention.n_heads if hasattr(attention, "n_heads") else attention.heads


def _check_leaf(name: str, module: Any, expected: Any) -> None:
    """By attributes: in training, reading a parametrized weight may change its buffers."""
    came = refusal(module, type(expected), size_of(expected))
    if came is not None:
        raise TypeError(f"{name}: expected {expected}, got {came}")


def _tensor_names(module: nn.Module) -> list[str]:
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return [name for name, _ in tensors]


# The maths


def _verify(original: nn.Module, grid: tuple[int, int]) -> None:
    """Refuse a module that computes something else than a DCA, or whose copy does not run.

    Random weights, since attention that was initialised to add nothing would hide every difference, and a small grid,
    since the original's attention matrices grow with the fourth power of its side.
    """
    small = [min(side, SIDE + (side > min(grid))) for side in grid]  # oblong where the grid is
    try:
        with torch.inference_mode(False), torch.enable_grad():
            theirs: Any = _stand_in(original, grid, small)
            ours = _fused(copy.deepcopy(theirs), "torch")
            shapes = [(2, c, *size) for c, size in zip(ours.features, _sizes(theirs, small), strict=True)]
            maps, upstream = [_normal(shape, 1) for shape in shapes], [_normal(shape, 2) for shape in shapes]
            for mode in ("evaluation", "training"):
                results = [_run(m.train(mode == "training"), maps, upstream) for m in (ours, theirs)]
                for kind in results[0]:
                    _compare(f"{kind} in {mode}", *(result[kind] for result in results))
    except _Refused:
        raise
    except Exception as error:
        raise _Refused(f"a copy of it does not run: {type(error).__name__}: {error}") from error


def _stand_in(original: nn.Module, grid: Sequence[int], small: Sequence[int]) -> nn.Module:
    """A copy on the CPU in float64, without hooks, with a small token grid, random weights and plain norms."""
    registries = [hooks for m in original.modules() for hooks in _hooks(m).values() if isinstance(hooks, OrderedDict)]
    copied: Any = copy.deepcopy(original, {id(hooks): OrderedDict() for hooks in registries})
    copied.to("cpu", torch.float64).requires_grad_()
    for i, projection in enumerate(copied.avg_map):
        norm = nn.BatchNorm2d(projection.proj.depthwise.out_channels, device="cpu", dtype=torch.float64)
        copied.bn_relu[i] = nn.Sequential(norm, nn.ReLU())
    for m in copied.modules():
        for name in ("patch", "grid", "output_size"):
            if name in vars(m) and _pair(getattr(m, name)) == tuple(grid):
                setattr(m, name, small[0] if isinstance(getattr(m, name), int) else tuple(small))
    for seed, (name, tensor) in enumerate(copied.state_dict().items()):
        noise = _normal(tensor.shape, seed)
        if name.endswith("running_var"):
            tensor.copy_(0.5 + noise.square())
        elif tensor.is_floating_point():  # convolutions keep the scale of what they get
            fan_in = tensor.shape[1] if tensor.dim() > 1 else 1
            tensor.copy_(noise / math.sqrt(fan_in))
    return copied


def _sizes(dca: Any, grid: Sequence[int]) -> list[list[int]]:
    """Sizes of the maps: those that the original upsamples to, or of halving sides where it takes any."""
    sizes = []
    for i, upconv in enumerate(dca.upconvs):
        factors = [m.scale_factor for m in upconv.modules() if getattr(m, "scale_factor", None) is not None]
        factor = _pair(factors[0] if factors else 2 ** (len(dca.upconvs) - 1 - i))
        sizes.append([math.floor(side * f) for side, f in zip(grid, factor, strict=True)])
    return sizes


def _normal(shape: Sequence[int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def _run(dca: Any, maps: Sequence[Tensor], upstream: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """One forward and backward: all that a module gives."""
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


# The seam between encoder and decoder


class _Seen(Exception):
    """Ends the forward that shows what the decoder gets."""


def _image(encoder: nn.Module) -> Tensor:
    for m in encoder.modules():
        if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            dimensions = m.weight.dim() - 2
            if dimensions != 2:
                raise ValueError(f"model: expected a network on images (B, C, H, W), got one with a {type(m).__name__}")
            generator = torch.Generator().manual_seed(0)
            image = torch.rand((1, m.in_channels, IMAGE_SIDE, IMAGE_SIDE), generator=generator, device="cpu")
            return image.to(m.weight)
    raise ValueError("example: expected an input of the model, since its encoder has no convolution, got None")


def _skips(model: nn.Module, decoder: nn.Module, example: Tensor) -> Sequence[Tensor]:
    """The maps that the decoder gets, without the bottleneck and what comes before the skips."""
    seen: list[Sequence[Any]] = []

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(_maps(args))
        raise _Seen

    modes = {m: m.training for m in model.modules()}
    handle = decoder.register_forward_pre_hook(look)
    try:
        for m in modes:
            m.training = False
        with torch.no_grad():
            model(example)
    except _Seen:
        pass
    except Exception as error:
        shape = tuple(example.shape)
        raise ValueError(
            f"example: expected an input that the model's forward takes, got shape {shape}, at which it raises "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        handle.remove()
        for m, training in modes.items():
            m.training = training
    if not seen:
        raise ValueError("model: expected a forward that calls the decoder, got one that does not")
    shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in seen[0]]
    areas = [math.prod(shape[2:]) if isinstance(shape, tuple) and len(shape) == 4 else 0 for shape in shapes]
    if not areas or 0 in areas or sorted(areas, reverse=True) != areas:
        raise ValueError(
            f"model: expected a decoder called with maps (B, C, H, W) from the largest to the smallest, got {shapes}"
        )
    skips = list(seen[0][:-1])
    while skips and (skips[0].shape[1] == 0 or torch.equal(skips[0], example)):
        del skips[0]
    if not skips:
        raise ValueError(f"model: expected a decoder called with at least one skip, got maps of shapes {shapes}")
    return skips


def _maps(args: tuple[Any, ...]) -> Sequence[Any]:
    """The maps that a decoder is called with."""
    return args[0] if args and isinstance(args[0], (list, tuple)) else args


def _refine_skips(decoder: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook of the decoder. It fetches the DCA from its argument: a copy of the model has its own."""
    maps: Any = _maps(args)
    first = -1 - len(decoder.dca.features)
    refined = [*maps[:first], *decoder.dca(maps[first:-1]), maps[-1]]
    return tuple(refined) if maps is args else (type(maps)(refined), *args[1:])


def _keep_where_absent(dca: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Pre-hook of `load_state_dict`: a checkpoint of the plain model has nothing for the DCA."""
    if not any(key.startswith(prefix) for key in state_dict):
        state_dict.update((prefix + name, p) for name, p in [*dca.named_parameters(), *dca.named_buffers()])
        _logger.warning("the state dict has no %s*: the DCA there keeps the values that it has", prefix)
