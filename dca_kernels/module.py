"""The swap-in module: parameters, buffers and checks. The stages hold the maths."""

import functools
import logging
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.overrides import handle_torch_function, has_torch_function

from dca_kernels import arguments, backends, contract, known, plain, structure
from dca_kernels.layers import Block, DepthwiseProjection, UpsampleConv

_logger = logging.getLogger("dca_kernels")


class DCA(nn.Module):
    """Dual Cross-Attention over the skip maps of an encoder-decoder network (Ates et al., arXiv 2303.17696).

    Parameters, buffers, their names and their initial values are the official module's: state dicts load strictly both
    ways, and the same seed gives the same weights.

    Args:
        features: channels C_i of each skip map.
        strides: accepted since the official module takes it; only its length is checked. Each map is upsampled to the
            size that it has.
        patch: token grid, P for P x P or (P_h, P_w).
        channel_att: whether a block has channel cross-attention.
        spatial_att: whether a block has spatial cross-attention.
        n: number of blocks in sequence.
        channel_head: heads of each scale's channel cross-attention; 1 each where None.
        spatial_head: heads of each scale's spatial cross-attention; 4 each where None.
        backend: "auto", "torch" or "triton" (see `dca_kernels.backends`).

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, what was expected and what came.
    """

    _known: known.Known | None = None  # the calls before; a copy of the module has none

    def __init__(
        self,
        features: Sequence[int],
        strides: Sequence[int] | None = None,
        patch: int | tuple[int, int] = 28,
        channel_att: bool = True,
        spatial_att: bool = True,
        n: int = 1,
        channel_head: Sequence[int] | None = None,
        spatial_head: Sequence[int] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.features = arguments.integers("features", features)
        scales = len(self.features)
        if strides is not None and len(arguments.integers("strides", strides)) != scales:
            raise ValueError(f"strides: expected {scales} values, one for each of features, got {len(strides)}")
        self.patch = patch
        self.grid = arguments.grid("patch", patch)
        self.channel_att = arguments.flag("channel_att", channel_att)
        self.spatial_att = arguments.flag("spatial_att", spatial_att)
        self.n = arguments.integer("n", n)
        self.channel_head = [1] * scales if channel_head is None else channel_head
        self.spatial_head = [4] * scales if spatial_head is None else spatial_head
        if self.channel_att:
            self.channel_head = arguments.heads("channel_head", self.channel_head, self.features, channel_head is None)
        if self.spatial_att:
            self.spatial_head = arguments.heads("spatial_head", self.spatial_head, self.features, spatial_head is None)
        self.backend = backends.check_name(backend, "backend")
        heads = self.channel_head if self.channel_att else [], self.spatial_head if self.spatial_att else []
        self.avg_map = nn.ModuleList(DepthwiseProjection(c) for c in self.features)
        self.attention = nn.ModuleList(Block(self.features, *heads) for _ in range(self.n))
        self.upconvs = nn.ModuleList(UpsampleConv(c) for c in self.features)
        self.bn_relu = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(c), nn.ReLU()) for c in self.features)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Refine the skip maps.

        A backend computes them (`dca_kernels.backends`). Where something needs the submodules called, plain PyTorch
        operations do (`dca_kernels.plain`).

        Args:
            maps: list or tuple of S tensors (B, C_i, H_i, W_i) of one floating dtype, the parameters', on one device.
                Under autocast their dtypes may differ. Every H_i x W_i may be another size, and B may be 0.

        Returns:
            S tensors of the same shapes. Their dtype is the maps'; under autocast it is the one that the map's and the
            autocast dtype promote to, as for the official module. An output is channels_last where its map is. Where a
            map is of a subclass of Tensor, its `__torch_function__` makes the outputs, as for the official module.

        Raises:
            TypeError, ValueError: `maps` is not as above, or a submodule is not the one that the constructor put there.
                Nothing is changed.
            RuntimeError: the backend asked for cannot run; the message says why.
        """
        if not torch.compiler.is_compiling():
            outs = known.call(self, maps)
            if outs is not None:
                return outs
            self._check_attributes()
        in_list: Sequence[object] = maps if isinstance(maps, list | tuple) else []
        proxies = [x for x in (maps, *in_list) if isinstance(x, fx.Proxy)]
        if proxies:
            return self._as_leaf(maps, cast(fx.Tracer, proxies[0].tracer))
        self._check(maps)
        overriding = [x for x in in_list if _overrides(x)]
        if overriding:
            computed = self.forward([_without_class(f"maps[{i}]", x) for i, x in enumerate(maps)])
            # Attention computes each output from all maps.
            return tuple(_computed_from(y, x, *overriding) for y, x in zip(computed, maps, strict=True))
        reason = plain.hooked(self)
        if not torch.jit.is_tracing():  # which makes tensors of sizes
            self._check_sizes(maps)
        if reason is None:  # otherwise, the hook may bring the parameters, and only when it is called
            dtypes = self._output_dtypes(maps)
            reason = plain.taken_apart(maps)
        if reason is not None:
            plain.say(reason)
            return plain.refine(self, maps)
        maps = [x.resolve_neg() for x in maps]
        # A frozen encoder's maps may be inference tensors, which no backward can keep; a compiled graph says so itself.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            maps = [x.clone() if x.is_inference() else x for x in maps]
        norms = [structure.plain_norm(head) for head in self.bn_relu]
        for i, (norm, head) in enumerate(zip(norms, self.bn_relu, strict=True)):
            if norm is None and not torch.compiler.is_compiling():
                _say_called(i, type(next(head.children(), head)).__name__)
        backend, read = self._backend(maps, norms, dtypes)
        its = read()
        refined = backend.refine(maps, its)
        if None not in norms and not torch.compiler.is_compiling():
            known.keep(self, maps, its, backend, lambda: read(known.Held))
        return tuple(head(y) if norm is None else y for y, norm, head in zip(refined, norms, self.bn_relu, strict=True))

    def _backend(
        self, maps: Sequence[Tensor], norms: Sequence[nn.BatchNorm2d | None], dtypes: Sequence[torch.dtype]
    ) -> tuple[ModuleType, Callable[..., contract.Contract]]:
        """What runs a call, and what reads its contract: see `contract.read`."""
        large = backends.too_large(self, maps)
        backend = backends.load(backends.choose(self.backend, maps[0].device, backends.tokens_dtype(maps), large))
        return backend, functools.partial(contract.read, self, norms, backend.operand_dtype(maps), dtypes)

    def _as_leaf(self, maps: object, tracer: fx.Tracer) -> tuple[Tensor, ...]:
        """One call of this module in the graph of `torch.fx.symbolic_trace`: checks and algebra are for tensors."""
        if tracer.root is self:
            raise TypeError("maps: expected tensors, got a torch.fx.Proxy: trace a network that has the DCA as a child")
        if structure.is_hooked(self, apart_from=weigh):
            raise TypeError("maps: expected tensors, got a torch.fx.Proxy, which the DCA's hooks would see: hook later")
        # The proxy stands for the outputs.
        outputs = cast(Sequence[Tensor], tracer.create_proxy("call_module", tracer.path_of_module(self), (maps,), {}))
        return tuple(outputs[i] for i in range(len(self.features)))

    def __getstate__(self) -> dict[str, object]:
        """What copies and pickles have."""
        return {name: value for name, value in vars(self).items() if name != "_known"}

    def extra_repr(self) -> str:
        names = ("features", "patch", "channel_att", "spatial_att", "n", "channel_head", "spatial_head", "backend")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def _check_attributes(self) -> None:
        """Raise where someone has put something in the place of an argument that a call goes by."""
        arguments.integers("features", self.features)
        if type(self.grid) not in (tuple, list):
            raise TypeError(f"grid: expected a tuple (P_h, P_w), got {self.grid!r}")
        arguments.grid("grid", self.grid)
        arguments.flag("channel_att", self.channel_att)
        arguments.flag("spatial_att", self.spatial_att)

    def _check(self, maps: Sequence[Tensor]) -> None:
        """Raise where `maps` is not a list of S tensors of floating dtypes."""
        if not isinstance(maps, (list, tuple)):
            raise TypeError(f"maps: expected a list or tuple of tensors, got {type(maps).__name__}")
        if len(maps) != len(self.features):
            raise ValueError(f"maps: expected {len(self.features)} tensors, one for each of features, got {len(maps)}")
        for i, x in enumerate(maps):
            arguments.check_dense(f"maps[{i}]", x)

    def _check_sizes(self, maps: Sequence[Tensor], name: str = "maps") -> None:
        """Raise for sizes that contradict `features` or each other, or that BatchNorm cannot train on."""
        for i, (x, channels) in enumerate(zip(maps, self.features, strict=True)):
            if x.dim() != 4 or x.shape[1] != channels or 0 in x.shape[1:]:
                raise ValueError(f"{name}[{i}]: expected shape (B, {channels}, H, W), got {tuple(x.shape)}")
            if x.shape[0] != maps[0].shape[0]:
                raise ValueError(f"{name}[{i}]: expected batch size {maps[0].shape[0]}, as {name}[0], got {x.shape[0]}")
            if not torch.compiler.is_compiling():
                arguments.check_memory(f"{name}[{i}]", x)
        for i, (x, head) in enumerate(zip(maps, self.bn_relu, strict=True)):
            norm = next(iter(head._modules.values()), None)
            if isinstance(norm, nn.BatchNorm2d) and contract.uses_batch_statistics(norm) and x.numel() == x.shape[1]:
                size = tuple(x.shape)
                raise ValueError(
                    f"{name}[{i}]: expected more than 1 value per channel when training, got input size {size}"
                )

    def _output_dtypes(self, maps: Sequence[Tensor]) -> list[torch.dtype]:
        """The dtype of each output; raise for maps of another device or dtype than the parameters."""
        first = cast(DepthwiseProjection, self.avg_map[0])
        # Not the weight's, since a parametrization may count its uses; not of `parameters()`, which replicas have not.
        bias = cast(Tensor, first.convolution.bias)
        for i, x in enumerate(maps):
            if x.device != bias.device:
                raise ValueError(f"maps[{i}]: expected device {bias.device}, as the parameters, got {x.device}")
        device_type = maps[0].device.type
        if maps[0].is_meta or not torch.is_autocast_enabled(device_type):
            for i, x in enumerate(maps):
                if x.dtype != bias.dtype:
                    raise TypeError(f"maps[{i}]: expected dtype {bias.dtype}, as the parameters, got {x.dtype}")
            return [x.dtype for x in maps]
        for i, x in enumerate(maps):
            if (x.dtype == torch.float64) != (bias.dtype == torch.float64):  # autocast leaves float64 alone
                expected = f"a dtype that autocast brings to that of {bias.dtype}"
                raise TypeError(f"maps[{i}]: expected {expected}, got {x.dtype}")
        if bias.dtype == torch.float64:
            return [bias.dtype] * len(maps)
        autocast = torch.get_autocast_dtype(device_type)
        return [torch.promote_types(x.dtype, autocast) for x in maps]


def weigh(dca: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], refined: Sequence[Tensor]) -> Sequence[Tensor]:
    """Forward hook of a DCA that changes nothing at first, see `add_dca`: maps plus what is refined times its gates."""
    if any(isinstance(y, fx.Proxy) for y in refined):  # of a leaf, whose call runs this hook
        return refined
    maps, gates = args[0] if args else kwargs["maps"], cast(nn.ParameterList, dca.gates)
    return tuple(x + gate.to(y.dtype) * y for x, gate, y in zip(maps, gates, refined, strict=True))


def warm_up(
    dca: DCA,
    shapes: Sequence[Sequence[int]],
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    backward: bool = True,
) -> None:
    """Compile what calls of a DCA will need, before the first one: with the `triton` backend, that takes a while.

    Nothing is computed, and the module stays as it is. It needs the memory of one call. Call it in the mode (train or
    eval) and under the autocast of the calls. What one process has compiled, others read from Triton's cache.

    Args:
        dca: the module.
        shapes: S shapes (B, C_i, H_i, W_i) of the skip maps.
        dtype: of the maps; the parameters' where None.
        memory_format: of the maps.
        backward: whether the calls will be differentiated, with gradients of maps and of what requires them.

    Raises:
        TypeError, ValueError, RuntimeError: as a call with such maps.
    """
    if not isinstance(dca, DCA):
        raise TypeError(f"dca: expected a dca_kernels.DCA, got {type(dca).__name__}: pass the one within a network")
    if not isinstance(shapes, Sequence) or len(shapes) != len(dca.features):
        raise ValueError(f"shapes: expected {len(dca.features)} shapes, one for each of features, got {shapes!r}")
    sizes = [arguments.integers(f"shapes[{i}]", shape, least=0) for i, shape in enumerate(shapes)]
    if not isinstance(dtype, torch.dtype | None):
        raise TypeError(f"dtype: expected a torch.dtype or None, got {dtype!r}")
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(f"memory_format: expected contiguous_format or channels_last of torch, got {memory_format!r}")
    arguments.flag("backward", backward)
    dca._check_attributes()
    hooked = plain.hooked(dca)
    weight = cast(DepthwiseProjection, dca.avg_map[0]).convolution.weight
    maps = [torch.empty(size, dtype=dtype or weight.dtype, device=weight.device) for size in sizes]
    dca._check(maps)
    dca._check_sizes(maps, "shapes")
    dtypes = dca._output_dtypes(maps)
    maps = [x.contiguous(memory_format=memory_format).requires_grad_(bool(backward)) for x in maps]
    if hooked is None:
        with torch.set_grad_enabled(bool(backward)):
            backend, read = dca._backend(maps, [structure.plain_norm(head) for head in dca.bn_relu], dtypes)
            backend.warm_up(maps, read())


@functools.cache  # one log line each
def _say_called(i: int, kind: str) -> None:
    _logger.info("bn_relu[%d] (%s) is not a plain BatchNorm2d and ReLU: it is called as it is, not fused", i, kind)


def _overrides(x: object) -> bool:
    """Whether a subclass of Tensor decides what operations return (MONAI's MetaTensor, torchvision's tv_tensors)."""
    if type(x) is Tensor or not isinstance(x, Tensor):
        return False
    return type(x).__torch_function__ is not torch._C._disabled_torch_function_impl


def _without_class(name: str, x: Tensor) -> Tensor:
    if not _overrides(x):
        return x
    try:
        return x.as_subclass(Tensor)
    except (TypeError, RuntimeError) as error:  # MaskedTensor, which is more than its values
        raise TypeError(f"{name}: expected a tensor that holds its values alone, got {type(x).__name__}") from error


def _computed_from(y: Tensor, *sources: object) -> Tensor:
    """What the `__torch_function__` of its sources makes of a result."""
    if has_torch_function(sources):
        return handle_torch_function(_computed_from, sources, y, *sources)
    return y
