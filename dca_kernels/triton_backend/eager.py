"""Eager calls of the `triton` backend: a plan for each kind of call, and one for each kind of backward behind it.

To read: `planned` finds the plan of a call, a `Forward` runs it, `Refine` is what autograd sees of it, and a `Backward`
is the plan of the gradients that were asked for.
"""

import itertools
import threading
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from dca_kernels.contract import Contract, flatten, in_place_of, learned, unflatten
from dca_kernels.triton_backend import launch, passes
from dca_kernels.triton_backend.operator import TWICE
from dca_kernels.triton_backend.parameters import gradient_dtype
from dca_kernels.triton_backend.plan import Plan

MOST = 64  # plans that are kept, the latest

BATCHED = (
    "DCA: the triton backend's gradients cannot be batched (is_grads_batched=True, vectorize=True): use backend='torch'"
    " or torch.func"
)
Value = TypeVar("Value")


class Latest(dict[Hashable, Value]):
    """A bounded dictionary: the oldest goes first."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()

    def keep(self, key: Hashable, value: Value) -> Value:
        with self._lock:
            if len(self) >= MOST:
                del self[next(iter(self))]
            self[key] = value
        return value


class Kind(NamedTuple):
    """What a plan knows of a tensor."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    aligned: bool

    @classmethod
    def of(cls, tensor: Tensor) -> "Kind":
        return cls(tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % passes.ALIGNMENT == 0)

    def without_memory(self) -> Tensor:
        """A tensor of the meta device."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


_forwards: Latest["Forward"] = Latest()


def planned(maps: Sequence[Tensor], contract: Contract) -> "Forward":
    """The plan of a call.

    Args:
        maps: S tensors (B, C_i, H_i, W_i) of at least one image, any strides.
        contract: of the call, `passes.as_taken`.
    """
    kinds = tuple(map(Kind.of, maps)), tuple(map(Kind.of, flatten(contract)))
    numbers = unflatten(contract, itertools.repeat("tensor"))  # type: ignore[arg-type]
    key = *kinds, numbers, maps[0].device, launch.circumstances(maps[0].device)
    found = _forwards.get(key)
    return _forwards.keep(key, Forward(*kinds, contract, maps[0].device)) if found is None else found


class Forward:
    """The plan of a forward, without the call's tensors.

    Args:
        maps: what is known of them.
        tensors: of the contract's, in their order.
        contract: of the call.
        device: of all.
    """

    def __init__(self, maps: Sequence[Kind], tensors: Sequence[Kind], contract: Contract, device: torch.device) -> None:
        its_maps, its_tensors = ([kind.without_memory() for kind in kinds] for kinds in (maps, tensors))
        self.contract = unflatten(contract, iter(its_tensors))
        with launch.recording(device) as launches:
            outs, self.saved = passes.forward(its_maps, self.contract)
        self.parameters = flatten(learned(self.contract))
        self.kept = list(dict.fromkeys(flatten(self.saved))) if contract.backward else []
        given = [[(t, 0)] for t in (*its_maps, *its_tensors)]
        self.plan = Plan(launches, device, given, outs, self.kept, torch.uint8, module=len(its_tensors))
        self._backwards: Latest[Backward] = Latest()

    def __call__(
        self,
        maps: Sequence[Tensor],
        parameters: Sequence[Tensor],
        tensors: Sequence[Tensor],
        addresses: Sequence[int],
    ) -> list[Tensor]:
        """The outputs.

        Args:
            maps: of the plan's kinds.
            parameters: for autograd.
            tensors: of the plan's kinds: parameters as the kernels take them, and buffers.
            addresses: theirs.
        """
        if self.contract.backward:
            return list(Refine.apply(self, tensors, addresses, *maps, *parameters))
        return self.plan.run(maps, tensors, addresses)

    def compile(self, maps: Sequence[Tensor], parameters: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        """What such a call launches, and its backward where there will be one: see `__call__`."""
        made = self.plan.compile(maps, tensors)
        if self.contract.backward:
            *douts, saved = made
            needed = tuple([t.requires_grad for t in (*maps, *parameters)])
            backward = self.backward(maps, douts, needed, (True,) * len(maps))
            backward.plan.compile([saved, *maps, *douts], tensors[: len(parameters)])

    def backward(
        self, maps: Sequence[Tensor], douts: Sequence[Tensor], needed: tuple[bool, ...], used: tuple[bool, ...]
    ) -> "Backward":
        """The plan of a backward.

        Args:
            maps: as in the forward, of any strides.
            douts: the outputs' gradients.
            needed: for each of maps and parameters, whether autograd asks for its gradient.
            used: for each output, whether it has a gradient.
        """
        kinds = tuple(map(Kind.of, maps)), tuple(map(Kind.of, douts))
        key = *kinds, needed, used, launch.circumstances(self.plan.device)
        found = self._backwards.get(key)
        if found is not None:
            return found
        return self._backwards.keep(key, Backward(self, *kinds, passes.wanted_of(self.contract, needed, used)))


class Backward:
    """The plan of a backward.

    Args:
        forward: what it is behind.
        maps: what is known of them.
        douts: of the outputs' gradients.
        wanted: for each of maps and parameters, whether its gradient is.
    """

    def __init__(self, forward: Forward, maps: Sequence[Kind], douts: Sequence[Kind], wanted: Sequence[bool]) -> None:
        its_maps, its_douts = ([kind.without_memory() for kind in kinds] for kinds in (maps, douts))
        device, contract, parameters = forward.plan.device, forward.contract, forward.parameters
        with launch.recording(device) as launches:
            dmaps, raw = passes.backward(its_maps, contract, forward.saved, its_douts, wanted)
        gradients = in_place_of(learned(contract), passes.split(raw, contract))
        asked = [g if want else None for g, want in zip(gradients, wanted[len(maps) :], strict=True)]
        kept, dtype = flatten((raw,)), gradient_dtype(contract)
        saved = list(zip(forward.kept, forward.plan.kept_offsets, strict=False))
        given = [saved, *[[(t, 0)] for t in (*its_maps, *its_douts, *parameters)]]
        outs = [g for g in dmaps if g is not None]
        self.plan = Plan(launches, device, given, outs, kept, dtype, module=len(parameters))
        self._dtypes = [t.dtype for t in parameters]
        begins = [offset // dtype.itemsize for offset in self.plan.kept_offsets]
        self._dmaps, self._views = [g is not None for g in dmaps], Views(asked, parameters, kept, begins)

    def __call__(
        self, saved: Tensor, maps: Sequence[Tensor], douts: Sequence[Tensor], parameters: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """The gradients of maps and parameters, None where not wanted.

        Args:
            saved: what the forward kept.
            maps, parameters: as in the forward.
            douts: the outputs' gradients.
        """
        addresses = list(map(Tensor.data_ptr, parameters))
        if not self.plan.was_run(addresses):
            parameters = passes.aligned([t.to(dtype) for t, dtype in zip(parameters, self._dtypes, strict=True)])
            addresses = list(map(Tensor.data_ptr, parameters))
        saved = passes.aligned([saved])[0]  # a hook on saved tensors may have put it elsewhere
        *dmaps, kept = self.plan.run([saved, *maps, *douts], parameters, addresses)
        made = iter(dmaps)
        return [next(made) if has else None for has in self._dmaps] + self._views.of(kept)


class Split(NamedTuple):
    """Parameters of one number of dimensions, of which the first alone counts, in the order of their gradients.

    Attributes:
        trailing: their other dimensions, all 1.
        sizes: of all pieces, of gradients and of what is between them.
        numbers: for each gradient, the parameter's and the piece's.
    """

    trailing: tuple[int, ...]
    sizes: list[int]
    numbers: list[tuple[int, int]]


class Views:
    """Gradients of parameters within one allocation.

    Two splits make most of them, of vectors and of the weights of depthwise convolutions (C, 1, 1, 1): a view of its
    own takes as long as three pieces of a split.

    Args:
        gradients: of the meta device, None where not wanted; each lies in one of `kept`.
        parameters: whose shapes and dtypes they take.
        kept: what lies in the allocation.
        begins: of each of these, in elements; behind them, the elements of all.
    """

    def __init__(
        self,
        gradients: Sequence[Tensor | None],
        parameters: Sequence[Tensor],
        kept: Sequence[Tensor],
        begins: Sequence[int],
    ) -> None:
        begin_of = {t.untyped_storage()._cdata: begin for t, begin in zip(kept, begins, strict=False)}
        asked = [(n, g) for n, g in enumerate(gradients) if g is not None]
        located = sorted((begin_of[g.untyped_storage()._cdata] + int(g.storage_offset()), n) for n, g in asked)
        self._count = len(gradients)
        self._others = [n for n, g in asked if g.dtype != parameters[n].dtype]
        self._dtypes = [p.dtype for p in parameters]
        self._strided = []
        splits: dict[int, Split] = {}
        for begin, n in located:
            shape = parameters[n].shape
            if shape[1:].numel() == 1:
                split = splits.setdefault(len(shape), Split(tuple(shape[1:]), [], []))
                if begin > sum(split.sizes):
                    split.sizes.append(begin - sum(split.sizes))
                split.numbers.append((n, len(split.sizes)))
                split.sizes.append(shape[0])
            else:
                self._strided.append((n, shape, torch.empty(shape, device="meta").stride(), begin))
        for split in splits.values():
            split.sizes.append(begins[-1] - sum(split.sizes))
        self._splits = list(splits.values())

    def of(self, kept: Tensor) -> list[Tensor | None]:
        """Those of a call's allocation."""
        gradients: list[Tensor | None] = [None] * self._count
        for trailing, sizes, numbers in self._splits:
            pieces = torch.unsafe_split_with_sizes(kept.view(-1, *trailing), sizes)
            for n, piece in numbers:
                gradients[n] = pieces[piece]
        for n, shape, stride, begin in self._strided:
            gradients[n] = kept.as_strided(shape, stride, begin)
        for n in self._others:
            gradients[n] = gradients[n].to(self._dtypes[n])  # type: ignore[union-attr]
        return gradients


class Refine(torch.autograd.Function):
    """The forward and its backward, both by kernels; the backward once."""

    @staticmethod
    def forward(
        ctx: Any, planned: Forward, tensors: Sequence[Tensor], addresses: Sequence[int], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """See `Forward.__call__`; maps and parameters are `inputs`, for autograd to see."""
        *outs, saved = planned.plan.run(inputs[: len(planned.contract.upsample)], tensors, addresses)
        ctx.planned = planned
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, saved)  # an error where one was changed in place
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [g for g in grads if g is not None]
        if not given:
            return (None,) * len(ctx.needs_input_grad)
        if any(torch._C._functorch.is_legacy_batchedtensor(g) for g in given):
            raise RuntimeError(BATCHED)
        *inputs, saved = ctx.saved_tensors
        maps, parameters = inputs[: len(grads)], inputs[len(grads) :]
        with torch.no_grad():
            douts = passes.upstream(grads, maps, ctx.planned.contract.output_dtypes)
            used = tuple([g is not None for g in grads])
            backward = ctx.planned.backward(maps, douts, ctx.needs_input_grad[3:], used)
            gradients = backward(saved, maps, douts, parameters)
        if torch.is_grad_enabled():
            gradients = [None if g is None else _Once.apply(g, *douts, *inputs) for g in gradients]
        return None, None, None, *gradients


class _Once(torch.autograd.Function):
    """A gradient that says why it cannot be differentiated."""

    @staticmethod
    def forward(ctx: FunctionCtx, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(TWICE)
