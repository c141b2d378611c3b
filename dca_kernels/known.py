"""What a call costs beside its backend: little, where the module has seen one like it.

The first call of a kind makes all checks, reads the module (`contract.read`) and has its backend prepare. A later one
asks whether it is of a kind that was prepared, whether the module is as it was, and which tensors that holds now
(`Module.tensors_of`), by passes in C over flat lists. No tensor is kept. Whatever is unusual goes the way of a first
call.
"""

import operator
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._dynamo.guards import TensorGuards
from torch.autograd import forward_ad
from torch.nn.modules import module as registries
from torch.utils._python_dispatch import _get_current_dispatch_mode

from dca_kernels import backends, layers
from dca_kernels.contract import Contract, flatten

if TYPE_CHECKING:
    from dca_kernels.module import DCA

MOST = 64  # kinds of calls that a module keeps
MOST_OF_A_KIND = 4  # and of each, the latest, as its tensors change
PLAIN = {Tensor, nn.Parameter}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What a call goes by beside tensors and submodules.
NUMBERS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: ("stride", "padding"),
    nn.LayerNorm: ("eps",),
    nn.BatchNorm2d: ("training", "track_running_stats", "eps", "momentum"),
    layers.ChannelAttention: ("heads",),
    layers.SpatialAttention: ("heads",),
}
OF_DCA = operator.itemgetter("features", "grid", "channel_att", "spatial_att", "spatial_head", "backend")

# A call that was prepared: of maps and the module's tensors. None where these are not as it was prepared for.
Prepared = Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor] | None]

Places = tuple[tuple[dict[str, Any], ...], tuple[str, ...]]  # dictionaries, and what is looked up in each


class Held(NamedTuple):
    """A tensor, or None, by the module that holds it."""

    module: nn.Module
    name: str

    @property
    def tensors(self) -> dict[str, Any]:
        """Where the module looks its name up."""
        return self.module._parameters if self.name in self.module._parameters else self.module._buffers


class Module:
    """A DCA as a call found it, but for its tensors.

    Args:
        dca: the module.
        held: all that a contract has a tensor or None for, in its order.

    Raises:
        KeyError: a tensor is neither a parameter nor a buffer, as of a parametrized module.
    """

    def __init__(self, dca: "DCA", held: Sequence[Held]) -> None:
        submodules = list(dca.modules())[1:]
        self._owner = weakref.ref(dca)  # which has this: a cycle would keep its parameters until a garbage collection
        self._of_owner = [_kept(value) for value in OF_DCA(vars(dca))]
        # Which may not grow: there would be a `forward` put on an instance, or a block more.
        self._counted = [*map(vars, submodules), *(m._modules for m in submodules if m._modules)]
        self._counts = list(map(len, self._counted))
        self._submodules, self._classes = submodules, list(map(type, submodules))
        self._hooks = [getattr(m, name) for m in submodules for name in HOOKS]
        there = [one for one in held if one.tensors[one.name] is not None]
        fixed: list[tuple[dict[str, Any], str]] = [(one.tensors, one.name) for one in held if one not in there]  # None
        fixed += [(m._modules, name) for m in (dca, *submodules) for name in m._modules]
        for m in submodules:
            fixed += [(vars(m), name) for kind, names in NUMBERS.items() if isinstance(m, kind) for name in names]
        self._fixed = tuple(zip(*fixed, strict=True))
        self._values = list(map(_kept, _looked_up(self._fixed)))
        self._tensors = tuple(zip(*[(one.tensors, one.name) for one in there], strict=True))

    def tensors_of(self, dca: "DCA") -> list[Tensor] | None:
        """Those that a contract would have now, in its order; None where more than tensors may have changed."""
        try:
            tensors = _looked_up(self._tensors) if self._is_unchanged(dca) else None
        except (KeyError, ValueError, RuntimeError):  # something is no longer there, or is an array now
            return None
        return None if tensors is None or type(None) in map(type, tensors) else tensors

    def has(self, dca: "DCA", tensors: Sequence[Tensor]) -> bool:
        """Whether `tensors_of` is right: whether it gives these."""
        found = self.tensors_of(dca)
        return found is not None and list(map(id, found)) == list(map(id, tensors))

    def _is_unchanged(self, dca: "DCA") -> bool:
        return (
            self._owner() is dca  # and no replica
            and list(OF_DCA(vars(dca))) == self._of_owner
            and not any(self._hooks)
            and list(map(type, self._submodules)) == self._classes
            and list(map(len, self._counted)) == self._counts
            and _looked_up(self._fixed) == self._values
        )


class Known:
    """A DCA as a call found it, and the calls that were prepared since."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.calls: dict[Hashable, list[tuple[TensorGuards, Prepared]]] = {}

    def keep(self, kind: Hashable, tensors: Sequence[Tensor], prepared: Prepared) -> None:
        """Keep a prepared call of a kind, for tensors of these sizes, strides, dtypes, devices and `requires_grad`."""
        sizes: list[Any] = [list(t.shape) for t in tensors]
        strides: list[Any] = [list(t.stride()) for t in tensors]
        guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        if kind not in self.calls and len(self.calls) >= MOST:
            self.calls.clear()
        self.calls[kind] = [(guards, prepared), *self.calls.get(kind, [])[: MOST_OF_A_KIND - 1]]


def call(dca: "DCA", maps: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    """The outputs of a call that was prepared; None of any other."""
    known = dca._known
    try:
        kind = None if known is None else _kind(maps)
    except RuntimeError:  # of nested tensors and what else has no sizes, strides or memory of its own
        return None
    if known is None or kind is None:
        return None
    tensors = known.module.tensors_of(dca)
    if tensors is None:
        return None
    for guards, prepared in known.calls.get(kind, ()):
        if guards.check(*tensors):
            outs = prepared(maps, tensors)
            return None if outs is None else tuple(outs)
    return None


def keep(dca: "DCA", maps: Sequence[Tensor], its: Contract, backend: ModuleType, held: Callable[[], Contract]) -> None:
    """Have a backend prepare for the next call of this kind.

    Args:
        dca: the module.
        maps: of the call.
        its: its contract.
        backend: that runs it.
        held: makes the contract with `Held` in the place of tensors.
    """
    kind = _kind(maps)
    prepared = None if kind is None else backend.prepared(maps, its)
    if prepared is None:
        return
    tensors = flatten(its)
    try:
        if dca._known is None or not dca._known.module.has(dca, tensors):
            dca._known = Known(Module(dca, list(_all_held(held()))))
    except KeyError:
        return
    dca._known.keep(kind, tensors, prepared)


def _all_held(part: Any) -> Iterator[Held]:
    if isinstance(part, Held):
        yield part
    elif isinstance(part, tuple):
        for its in part:
            yield from _all_held(its)


def _kind(maps: Sequence[Tensor]) -> Hashable | None:
    """What a call goes by beside the module; None where something watches it or takes it apart, or it is unusual."""
    if type(maps) not in (list, tuple) or not maps or not PLAIN.issuperset(map(type, maps)):
        return None
    if (
        torch._C._functorch.maybe_current_level() is not None
        or _get_current_dispatch_mode() is not None
        or forward_ad._current_level >= 0
        or registries._has_any_global_hook()
        or torch.jit.is_tracing()
    ):
        return None
    graded, device = torch.is_grad_enabled(), maps[0].device.type
    if any([x.is_meta or x.layout is not torch.strided or x.is_neg() or (graded and x.is_inference()) for x in maps]):
        return None
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    # No memory begins at 0: what lies there was freed.
    described = [(x.shape, x.stride(), x.dtype, x.device, (x.data_ptr() or -1) & 15, x.requires_grad) for x in maps]
    return backends.requested(), graded, autocast, tuple(described)


def _kept(value: Any) -> Any:
    """As it is now: someone may change a list."""
    return value.copy() if isinstance(value, list) else value


def _looked_up(places: Places) -> list[Any]:
    return list(map(operator.getitem, *places))
