"""Puts a new DCA onto the skips of a network that has none.

Where an encoder hands its maps to a decoder, a hook of the decoder calls the DCA. In any other network the skips are
found in the graph of its forward, and the network's class becomes a subclass that calls the DCA.
"""

import dataclasses
import functools
import logging
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree

from dca_kernels.arguments import check_model
from dca_kernels.graph import CHILD, NoSkips, class_of, recipe_of
from dca_kernels.module import DCA, weigh
from dca_kernels.skips import Search, Traced, may_be_turned, stack_of
from dca_kernels.trace import Untraceable, attributes_of, in_mode, put_back

IMAGE_SIDE = 256  # of the image that shows the skips: two pixels are left after seven halvings
STARTS = ("official", "identity")
SAME = 1e-3  # of the largest output: a GPU may add up in another order
NO_CHILD = (nn.Sequential, torch.jit.ScriptModule)  # the one would call a DCA as a layer, the other takes none
TURNED = "maps (B, H, W, C) as skips ({}), which have to be permuted to (B, C, H, W)"
LINES = ((0.5, 1.0), (-100.0, 0.0), (100.0, 0.0))  # for what shows that a map counts: few classes change by a little

_logger = logging.getLogger("dca_kernels")


def add_dca(
    model: nn.Module,
    patch: int | tuple[int, int] = 28,
    example: Tensor | None = None,
    skips: Sequence[str] | None = None,
    start: str = "official",
    **arguments: Any,
) -> nn.Module:
    """Put a new DCA on the skips of a model that segments images, in place.

    Where the model calls its child `decoder` with the maps of its child `encoder`, as networks of
    segmentation_models_pytorch and nnU-Net and MONAI's FlexibleUNet do, the DCA is `model.decoder.dca`, and a forward
    pre-hook of the decoder calls it. In any other model the skips are found in the graph of its forward: maps on the
    contracting path that meet what comes from further down, in a concatenation, a sum, an attention gate or a block.
    There the DCA is the child `dca` of the network that has the skips in its forward (the model, or the one within a
    wrapper), and the network's class becomes a subclass with this forward. It takes one image; other arguments of its
    forward keep their defaults.

    A skip that changes nothing is left out if it is not named, so every parameter of the DCA gets a gradient, as
    DistributedDataParallel needs it. The log and `inspect` say which skips were taken. No key of the state dict
    changes. A state dict without any key of the DCA, such as a checkpoint of the plain model, loads strictly: the DCA
    keeps the values that it has, and a warning says so.

    Call `add_dca` before you make the optimizer, and before DDP and `torch.compile`.

    Args:
        model: the model, changed in place.
        patch: token grid, P for P x P or (P_h, P_w).
        example: an input (B, C, H, W) of the model. Where None, a random image of 256 x 256 with the channels that the
            model's first convolution takes.
        skips: names of the skips, such as those of modules whose outputs they are ("encoder.layer1"), where others are
            wanted than are found. Where None, those that are found.
        start: "official" for the official initial values, with which the model's outputs change until it is trained;
            "identity" for a DCA that changes nothing before it is trained, for pretrained networks: the results are
            weighted by `dca.gates`, zero at first, and added to the skips.
        arguments: the arguments of `DCA`, without features and strides.

    Returns:
        `model`.

    Raises:
        TypeError, ValueError: the model has no skips that can be found, or an argument is not as expected; the message
            says what. The model is as it was.
    """
    check_model(model)
    for name in ("features", "strides"):
        if name in arguments:
            raise TypeError(f"{name}: expected to be read off the model, got {arguments[name]!r}")
    if not isinstance(example, Tensor | None):
        raise TypeError(f"example: expected a tensor (B, C, H, W) or None, got {type(example).__name__}")
    if skips is not None:
        if not isinstance(skips, list | tuple) or not all(isinstance(name, str) for name in skips):
            raise TypeError(f"skips: expected a list of names, got {skips!r}")
        if not skips or len(set(skips)) < len(skips):
            raise ValueError(f"skips: expected a list of different names, got {skips!r}")
    if not isinstance(start, str) or start not in STARTS:
        raise ValueError(f"start: expected one of {', '.join(STARTS)}, got {start!r}")
    _check_unwrapped(model)
    image = _image(model) if example is None else example
    place = (_seam(model, image) if skips is None else None) or _wired(model, image, skips)
    _logger.info("the skips of %s: %s", type(model).__name__, ", ".join(map(str, place.skips)))
    with torch.inference_mode(False):
        dca = DCA([skip.shape[0] for skip in place.skips], patch=patch, **arguments)
        if start == "identity":
            dca.gates = nn.ParameterList(nn.Parameter(torch.zeros(skip.shape[0], 1, 1)) for skip in place.skips)
            dca.register_forward_hook(weigh, with_kwargs=True)
        dca.to(image.device, next(model.parameters()).dtype).train(place.network.training)
    vars(dca)["_skips"] = place.skips
    dca.register_load_state_dict_pre_hook(_keep_where_absent)
    place.put(dca)
    return model


class Named(NamedTuple):
    """A skip by its name and its shape (C, H, W)."""

    name: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} ({' x '.join(map(str, self.shape))})"


class Place(NamedTuple):
    """Where a DCA goes: the module that will have it as a child, the skips, and what makes it call the DCA."""

    network: nn.Module
    skips: list[Named]
    rewire: Callable[[], object]

    def put(self, dca: DCA) -> None:
        setattr(self.network, CHILD, dca)
        self.rewire()


def _check_unwrapped(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            got = f"one with {name}" if name else "one"
            raise ValueError(f"model: expected one that is not compiled, got {got} that is: compile it afterwards")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ValueError(f"model: expected the network itself, got it in a {type(model).__name__}: wrap it afterwards")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("model: expected a network in Python, got one of TorchScript")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor) or tensor.is_meta:
            got = "lazy: call it once, before" if is_lazy(tensor) else "on the meta device: give it memory before"
            raise ValueError(f"model: expected parameters with values, got {name}, which is {got}")


def _check_free(network: nn.Module) -> None:
    got = getattr(network, CHILD, None)
    if got is not None:
        name, kind = type(network).__name__, type(got).__name__
        raise ValueError(f"model: expected a {name} without an attribute {CHILD}, got a {kind}")


def _image(model: nn.Module) -> Tensor:
    for m in model.modules():
        if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            dimensions = m.weight.dim() - 2
            if dimensions != 2:
                raise ValueError(f"model: expected a network on images (B, C, H, W), got one with a {type(m).__name__}")
            generator = torch.Generator().manual_seed(0)
            image = torch.rand((1, m.in_channels, IMAGE_SIDE, IMAGE_SIDE), generator=generator, device="cpu")
            return image.to(m.weight)
    raise ValueError("example: expected an input of the model, since it has no convolution, got None")


# An encoder that hands its maps to a decoder


def _seam(model: nn.Module, image: Tensor) -> Place | None:
    """A decoder that is called with maps, from the largest to the smallest; None where there is none.

    The last map is the bottleneck. A copy of the image may come first; maps without channels change nothing.
    """
    encoder, decoder = (getattr(model, name, None) for name in ("encoder", "decoder"))
    if not isinstance(encoder, nn.Module) or not isinstance(decoder, nn.Module) or isinstance(decoder, NO_CHILD):
        return None
    _check_free(decoder)
    plain, given = _decoded(model, image, decoder)
    maps = [x for x in given if isinstance(x, Tensor) and x.dim() == 4]
    areas = [math.prod(x.shape[2:]) for x in maps]
    if not maps or len(maps) < len(given) or 0 in areas or sorted(areas, reverse=True) != areas:
        return None
    first = int(torch.equal(maps[0], image))
    positions = range(first - len(maps), -1)

    def changes(position: int, line: tuple[float, float]) -> bool:
        change = functools.partial(_change, position=position, line=line)
        return _differ(_outputs(model, image, decoder, change), plain)

    used = [position for position in positions if any(changes(position, line) for line in LINES)]
    if not used:
        return None
    skips = [Named(f"map {position + len(maps)} of the decoder", tuple(maps[position].shape[1:])) for position in used]
    turned = _turned(model, image, decoder, skips, used)
    if turned:
        raise ValueError(
            f"model: expected a decoder that is called with maps (B, C, H, W), got {TURNED.format(', '.join(turned))}"
        )
    hook = functools.partial(_refine_skips, positions=used)
    return Place(decoder, skips, lambda: decoder.register_forward_pre_hook(hook))


def _decoded(model: nn.Module, image: Tensor, decoder: nn.Module) -> tuple[Any, Sequence[Any]]:
    """What the model makes of the image in evaluation mode, and the maps that its decoder is called with at first."""
    calls: list[tuple[object, ...]] = []
    handle = decoder.register_forward_pre_hook(lambda _, args: calls.append(_with_maps(args, _maps(args))))  # copied
    try:
        plain = _run(model, image)
    finally:
        handle.remove()
    return plain, _maps(calls[0]) if calls else []


def _turned(
    model: nn.Module, image: Tensor, decoder: nn.Module, skips: Sequence[Named], positions: Sequence[int]
) -> list[str]:
    """The names of maps (B, H, W, C) among the skips: of a larger image they have more where channels should be."""
    if not any(may_be_turned(skip.shape, image) for skip in skips):
        return []
    try:
        _, larger = _decoded(model, image[:1].repeat(1, 1, 2, 2), decoder)
    except ValueError:  # it takes images of one size
        return []
    pairs = zip(skips, positions, strict=True)
    return [skip.name for skip, position in pairs if larger[position].shape[1] > skip.shape[0]]


def _outputs(
    model: nn.Module, image: Tensor, decoder: nn.Module, change: Callable[[Sequence[Any]], Sequence[Any]]
) -> Any:
    """What the model makes of the image in evaluation mode, when the decoder gets changed maps."""

    def hook(module: nn.Module, args: tuple[object, ...]) -> tuple[object, ...]:
        return _with_maps(args, change(_maps(args)))

    handle = decoder.register_forward_pre_hook(hook)
    try:
        return _run(model, image)
    finally:
        handle.remove()


def _maps(args: tuple[object, ...]) -> list[Any] | tuple[Any, ...]:
    """The maps among the arguments that a decoder is called with."""
    return args[0] if args and isinstance(args[0], (list, tuple)) else args


def _with_maps(args: tuple[object, ...], maps: Sequence[object]) -> tuple[object, ...]:
    given = _maps(args)
    if given is args:
        return tuple(maps)
    make = getattr(given, "_make", type(given))  # of a NamedTuple
    return make(maps), *args[1:]


def _put(maps: Sequence[Any], positions: Sequence[int], others: Sequence[Any]) -> list[Any]:
    """Maps with others at some positions."""
    result = list(maps)
    for position, other in zip(positions, others, strict=True):
        result[position] = other
    return result


def _refine_skips(decoder: nn.Module, args: tuple[object, ...], positions: Sequence[int]) -> tuple[object, ...]:
    """Forward pre-hook of the decoder. It takes the DCA from the decoder it gets: a copy of the model has another."""
    maps, dca = _maps(args), cast(DCA, decoder.dca)
    return _with_maps(args, _put(maps, positions, dca([maps[position] for position in positions])))


# A forward that has its skips as variables


def _wired(model: nn.Module, image: Tensor, names: Sequence[str] | None) -> Place:
    """The network within the model that has the skips in its forward."""
    _check_free(model)
    if "forward" in vars(model):
        raise ValueError(f"model: expected a {type(model).__name__} with its class's forward, got one with its own")
    plain = _run(model, image)
    search = Search(model, image)
    try:
        within = _called_within(model, search.wrapped(), image)
        if within is not None:
            return _wired(*within, names)
        traced = search.best(names)
        if traced is None:
            raise NoSkips("; ".join(dict.fromkeys(["no map that meets what it leads to", *map(str, search.closed)])))
        within = _called_within(model, _layer_with(model, traced), image)
        if within is not None and names is None:
            return _wired(*within, None)
        turned = search.turned(traced)
        if turned:
            raise NoSkips(TURNED.format(", ".join(turned)))
        used = _used(model, image, plain, traced)
        if names is not None:
            for name in set(names).difference(used):
                _logger.warning("the skip %s changes nothing that the model returns in evaluation", name)
            used = list(names)
        elif not used:
            raise NoSkips(f"skips that change nothing ({', '.join(skip.name for skip in traced.skips)})")
        recipe = recipe_of(model, image, traced, used)
    except (NoSkips, Untraceable) as error:
        raise ValueError(
            f"{'model' if names is None else 'skips'}: expected a {type(model).__name__} whose forward shows "
            f"{'its skips' if names is None else names}, got {error}. "
            "Name modules whose outputs are skips (skips=[...]), or call a DCA yourself:\n"
            "    self.dca = dca_kernels.DCA([64, 128])  # in __init__: the channels of the skip maps\n"
            "    x1, x2 = self.dca([x1, x2])  # in forward, before the decoder"
        ) from error
    skips = [Named(skip.name, skip.shape) for skip in traced.skips if skip.name in used]
    return Place(model, skips, lambda: setattr(model, "__class__", class_of(recipe)))


def _layer_with(model: nn.Module, traced: Traced) -> str | None:
    """The layer of a list of layers that has all skips in its forward; None where there is none, or no list."""
    ends = [end for skip in traced.skips for end in (skip.node, *skip.uses)]
    outermost = {next(iter(stack_of(end)), None) for end in ends}
    return outermost.pop() if isinstance(model, nn.Sequential) and len(outermost) == 1 else None


def _called_within(model: nn.Module, path: str | None, image: Tensor) -> tuple[nn.Module, Tensor] | None:
    """A submodule that is called with one map, and this; None of any other."""
    if path is None:
        return None
    seen: list[tuple[Any, ...]] = []
    network = model.get_submodule(path)
    handle = network.register_forward_pre_hook(lambda _, args, kwargs: seen.append((*args, kwargs)), with_kwargs=True)
    try:
        _run(model, image)
    finally:
        handle.remove()
    maps = [call[0] for call in seen if len(call) == 2 and isinstance(call[0], Tensor) and not call[1]]
    return (network, maps[0]) if len(maps) == len(seen) == 1 and maps[0].dim() == 4 else None


def _used(model: nn.Module, image: Tensor, plain: Any, traced: Traced) -> list[str]:
    """The names of the skips that change what the model makes of the image.

    Raises:
        NoSkips: the graph computes something else than the forward.
    """
    forward = class_of(recipe_of(model, image, traced, [skip.name for skip in traced.skips])).forward

    def outputs(change: Callable[[Sequence[Tensor]], Sequence[Tensor]]) -> Any:
        before = vars(model).copy()
        vars(model).update(_modules={**model._modules, CHILD: _Instead(change)})
        vars(model).pop(CHILD, None)
        try:
            return _run(model, image, forward)
        finally:
            vars(model).update(before)

    same = outputs(lambda maps: maps)
    if _differ(plain, same, SAME):
        raise NoSkips("a forward that its graph does not compute")
    used = []
    for i, skip in enumerate(traced.skips):
        if any(_differ(same, outputs(functools.partial(_change, position=i, line=line))) for line in LINES):
            used.append(skip.name)
    return used


class _Instead(nn.Module):
    """In the place of a DCA."""

    def __init__(self, change: Callable[[Sequence[Tensor]], Sequence[Tensor]]) -> None:
        super().__init__()
        self.change = change

    def forward(self, maps: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.change(maps)


# What changes what


def _run(model: nn.Module, image: Tensor, call: Callable[..., Any] = operator.call) -> Any:
    """The outputs in evaluation mode; what the forward keeps on its modules is put back."""
    before = {module: attributes_of(module) for module in model.modules()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    try:
        with in_mode(model, training=False), torch.no_grad():
            return call(model, image.clone())
    except Exception as error:
        raise ValueError(
            f"example: expected an input that the model's forward takes, got shape {tuple(image.shape)}, at which it "
            f"raises {type(error).__name__}: {error}"
        ) from error
    finally:
        for module, attributes in before.items():
            put_back(module, attributes)
        for buffer, value in buffers.items():
            if not torch.equal(buffer, value):
                buffer.data.copy_(value)


def _change(maps: Sequence[Any], position: int, line: tuple[float, float]) -> list[Any]:
    """Maps, one of them another: a factor times it, and a number."""
    factor, number = line
    return _put(maps, [position], [factor * maps[position] + number])


def _differ(outputs: object, others: object, tolerance: float = 0.0) -> bool:
    """Whether tensors differ by more than a share of their largest value."""
    for a, b in zip(_leaves(outputs), _leaves(others), strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.numel():
            a, b = a.double().nan_to_num(), b.double().nan_to_num()
            if (a - b).abs().max() > tolerance * a.abs().max():
                return True
    return False


def _leaves(outputs: object) -> list[object]:
    """What containers hold, dataclasses among them."""
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        outputs = [getattr(outputs, field.name) for field in dataclasses.fields(outputs)]
    leaves = _pytree.tree_leaves(outputs)
    return leaves if leaves == [outputs] else [leaf for part in leaves for leaf in _leaves(part)]


# What belongs to an added DCA


def _keep_where_absent(dca: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Pre-hook of `load_state_dict`: a checkpoint of the plain model has nothing for the DCA."""
    if not any(key.startswith(prefix) for key in state_dict):
        state_dict.update((prefix + name, p) for name, p in [*dca.named_parameters(), *dca.named_buffers()])
        _logger.warning("the state dict has no %s*: the DCA there keeps the values that it has", prefix)
