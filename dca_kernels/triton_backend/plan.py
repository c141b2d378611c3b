"""A call as a list of launches: made once for each kind of call, and run at every one.

The stages run on tensors of the meta device, which have shapes and no memory, and `launch.recording` writes down what
they launch. A plan adds where each of these tensors lies: in one that a call is given, or in one that it makes. It
holds no tensor of a user's and no address. To run it is to make the outputs and one workspace, to add up addresses, and
to hand them to the compiled kernels, which the first call of a kind has found by `launch.run`.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from dca_kernels.contract import flatten
from dca_kernels.triton_backend import launch
from dca_kernels.triton_backend.launch import Launch
from dca_kernels.triton_backend.memory import Part, Room, arranged, packed

TESTED = ("3.6.", "3.9.")  # versions of Triton with which a compiled kernel's own `run` is tested

_logger = logging.getLogger("dca_kernels")


Take = Callable[[Sequence[int]], Any]


class Place(NamedTuple):
    """Where a tensor lies: in which of those that a call is given or makes, and how many bytes behind its begin."""

    tensor: int
    offset: int


class Ready(NamedTuple):
    """A launch whose kernel is compiled.

    Attributes:
        compiled: the kernel.
        run, function, metadata: what launches it, and takes which of its function and of how it was compiled.
        programs: how many.
        arguments: in the kernel's order; addresses are filled in.
        of_module, of_call: positions of those with addresses, of the module alone or of others as well, and what takes
            each from all addresses of a call.
    """

    compiled: Any
    run: Callable[..., object]
    function: int
    metadata: Any
    programs: int
    arguments: list[Any]
    of_module: list[tuple[int, Take]]
    of_call: list[tuple[int, Take]]


class Plan:
    """What a kind of call launches, and what it makes: outputs, one allocation that outlives it, and a workspace.

    Args:
        launches: in sequence, of tensors of the meta device.
        device: that they run on.
        given: of each tensor that a call is given, those of the meta device that lie in it, with their offsets.
        outs: those that are made one by one.
        kept: those that are made by one allocation, one behind another.
        kept_dtype: of that allocation.
        module: how many of the tensors that a call is given, the last, are of a module and rarely others.
    """

    def __init__(
        self,
        launches: Sequence[Launch],
        device: torch.device,
        given: Sequence[Sequence[tuple[Tensor, int]]],
        outs: Sequence[Tensor],
        kept: Sequence[Tensor],
        kept_dtype: torch.dtype,
        module: int,
    ) -> None:
        self.launches, self.device, self._outs = launches, device, outs
        self._module = range(len(given) - module, len(given))
        self.kept_offsets = packed(kept)
        self._places = {_storage(t): Place(n, offset) for n, its in enumerate(given) for t, offset in its}
        self._places |= {_storage(t): Place(n, 0) for n, t in enumerate(outs, len(given))}
        self._make = [_maker(y.shape, y.stride(), y.dtype, device) for y in outs]
        if kept:
            behind = len(given) + len(outs)
            places = [Place(behind, offset) for offset in self.kept_offsets[:-1]]
            self._places |= dict(zip(map(_storage, kept), places, strict=True))
            self._make.append(_maker((self.kept_offsets[-1] // kept_dtype.itemsize,), (1,), kept_dtype, device))
        self._results = len(self._make)
        self.workspace = self._arrange(len(given))
        if self.workspace:
            self._make.append(_maker((self.workspace,), (1,), torch.uint8, device))
        self._tensors = len(given) + len(self._make)
        self._inside: dict[Place, int] = {}  # the numbers of addresses within a tensor
        self._ready: list[Ready] | None = None
        self._latest: tuple[Sequence[int], list[Ready]] = (), []  # addresses of a module, and launches with these

    def _arrange(self, given: int) -> int:
        """Place what lives within the call, where an output is written later or in a workspace; the latter's bytes."""
        uses: dict[int, Part] = {}
        for n, one in enumerate(self.launches):
            for t in filter(_is_meta, tensors_of(tuple(one.arguments.values()))):
                first = Part(t.untyped_storage().nbytes(), n, n)
                uses[_storage(t)] = uses.get(_storage(t), first)._replace(last=n)
        rooms = [Room(y.nbytes, uses[_storage(y)].first) for y in self._outs]
        within = {storage: part for storage, part in uses.items() if storage not in self._places}
        parts, size = list(within.values()), 0
        for its, part, (room, offset) in zip(within, parts, arranged(parts, rooms), strict=True):
            if room == len(rooms):
                size = max(size, offset + part.nbytes)
            self._places[its] = Place(given + (room if room < len(rooms) else self._results), offset)
        return size

    def run(self, of_call: Sequence[Tensor], of_module: Sequence[Tensor], addresses: Sequence[int]) -> list[Tensor]:
        """Make what the call makes, and launch; the outputs, then what is kept.

        Args:
            of_call, of_module: of the shapes, strides, dtypes and alignment that the plan was made for.
            addresses: of the latter.
        """
        made = [make() for make in self._make]
        with launch.on(self.device):
            if self._ready is None or any([one.kernel.pre_run_hooks for one in self.launches]):
                self._run_first([*of_call, *of_module, *made])
            else:
                latest, ready = self._latest
                if latest != addresses:
                    ready = [self._with_module(one, addresses) for one in self._ready]
                    self._latest = addresses, ready
                its = [*map(Tensor.data_ptr, of_call), *addresses, *map(Tensor.data_ptr, made)]
                _run(ready, its, self._inside)
        return made[: self._results]

    def was_run(self, addresses: Sequence[int]) -> bool:
        """Whether the latest call's module had these addresses."""
        return self._latest[0] == addresses

    def _with_module(self, one: Ready, addresses: Sequence[int]) -> Ready:
        """With those arguments filled in that depend on the module alone."""
        addresses = [0] * self._module.start + list(addresses)
        arguments = one.arguments.copy()
        for n, take in one.of_module:
            arguments[n] = take(addresses)
        return one._replace(arguments=arguments)

    def compile(self, of_call: Sequence[Tensor], of_module: Sequence[Tensor]) -> list[Tensor]:
        """As `run`, but that nothing is launched: what no call has compiled is compiled."""
        made = [make() for make in self._make]
        with launch.on(self.device):
            launch.compile_all(self._launches([*of_call, *of_module, *made]))
        return made[: self._results]

    def _run_first(self, tensors: Sequence[Tensor]) -> None:
        launches = self._launches(tensors)
        launch.compile_all(launches)
        compiled = [launch.run(one.kernel, one.programs, one.config, **one.arguments) for one in launches]
        if all(isinstance(kernel, CompiledKernel) for kernel in compiled) and _is_tested():  # none is interpreted
            self._ready = [self._prepared(*one) for one in zip(self.launches, compiled, strict=True)]

    def _launches(self, tensors: Sequence[Tensor]) -> list[Launch]:
        """With the tensors that a call is given and makes."""
        return [one._replace(arguments=self._filled(one.arguments, tensors)) for one in self.launches]

    def _filled(self, argument: Any, tensors: Sequence[Tensor]) -> Any:
        """An argument with a call's tensors in the place of those of the meta device."""
        if isinstance(argument, dict):
            return {name: self._filled(part, tensors) for name, part in argument.items()}
        if isinstance(argument, tuple):
            return tuple.__new__(type(argument), [self._filled(part, tensors) for part in argument])
        if not _is_meta(argument):
            return argument
        n, offset = self._places[_storage(argument)]
        base = tensors[n]
        if offset == 0 and _kind(base) == _kind(argument):
            return base
        begin = base.storage_offset() * base.itemsize + offset
        its = torch.empty(0, dtype=argument.dtype, device=self.device)
        begin = begin // its.itemsize + argument.storage_offset()
        return its.set_(base.untyped_storage(), begin, argument.shape, argument.stride())

    def _prepared(self, one: Launch, compiled: Any) -> Ready:
        arguments = [one.arguments[parameter.name] for parameter in one.kernel.params]
        of_module: list[tuple[int, Take]] = []
        of_call: list[tuple[int, Take]] = []
        for n, argument in enumerate(arguments):
            if _has_address(argument):
                tensors = {self._places[_storage(t)].tensor for t in filter(_is_meta, tensors_of(argument))}
                taken = of_module if tensors <= set(self._module) else of_call
                taken.append((n, self._taking(argument)))
        its = compiled.run, compiled.function, compiled.packed_metadata
        return Ready(compiled, *its, one.programs, arguments, of_module, of_call)

    def _taking(self, argument: Any) -> Take:
        """What takes an argument from all addresses of a call."""
        if isinstance(argument, Tensor):
            return itemgetter(self._number(argument))
        if len(argument) > 1 and all(map(_is_meta, argument)):
            return itemgetter(*map(self._number, argument))
        parts = [self._taking(part) if _has_address(part) else _constant(part) for part in argument]
        return lambda addresses: tuple([part(addresses) for part in parts])

    def _number(self, tensor: Tensor) -> int:
        """Of a tensor's address: first come those of the tensors that a call is given or makes."""
        n, offset = self._places[_storage(tensor)]
        offset += int(tensor.storage_offset()) * tensor.itemsize
        if offset == 0:
            return n
        return self._inside.setdefault(Place(n, offset), self._tensors + len(self._inside))


def _run(ready: Sequence[Ready], addresses: list[int], inside: Iterable[Place]) -> None:
    """Launch compiled kernels, as `kernel[grid](...)` does.

    Args:
        ready: in sequence.
        addresses: of the tensors that a call is given or makes.
        inside: where other addresses are.
    """
    stream = driver.active.get_current_stream(driver.active.get_current_device())
    enter, leave = _hook(knobs.runtime.launch_enter_hook), _hook(knobs.runtime.launch_exit_hook)
    addresses += [addresses[n] + offset for n, offset in inside]
    for compiled, run, function, metadata, programs, filled, _, of_call in ready:
        arguments = filled.copy()
        for n, take in of_call:
            arguments[n] = take(addresses)
        seen = compiled.launch_metadata((programs, 1, 1), stream, *arguments) if enter or leave else None
        run(programs, 1, 1, stream, function, metadata, seen, enter, leave, *arguments)


def _hook(chain: Any) -> Any:
    """A profiler's hook; None for an empty chain, whose call would take time."""
    return chain if getattr(chain, "calls", True) else None


@functools.cache  # one log line
def _is_tested() -> bool:
    """Whether compiled kernels may be run by themselves."""
    if triton.__version__.startswith(TESTED):
        return True
    expected = " or ".join(version + "x" for version in TESTED)
    _logger.info("triton %s is not %s: kernels are launched by the slower kernel[grid]", triton.__version__, expected)
    return False


def _maker(
    shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Callable[[], Tensor]:
    return functools.partial(torch.empty_strided, shape, stride, dtype=dtype, device=device)


def _constant(value: Any) -> Take:
    return lambda addresses: value


def tensors_of(argument: Any) -> list[Tensor]:
    """An argument of a kernel, or those that are in it."""
    return flatten((argument,))


def _has_address(argument: Any) -> bool:
    """Whether a call's address has to be filled in."""
    return any(map(_is_meta, tensors_of(argument)))


def _is_meta(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.is_meta


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.Size, tuple[int, ...]]:
    return tensor.dtype, tensor.shape, tensor.stride()


def _storage(tensor: Tensor) -> int:
    """Tells storages of the meta device apart, which all have the address 0."""
    return tensor.untyped_storage()._cdata
