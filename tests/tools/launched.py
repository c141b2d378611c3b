"""A forward and a training step against the stand-in driver: real JIT, real ptxas, the real launcher written in C.

`python -m tests.tools.launched SIZE DTYPE MODE BATCH...` prints what was launched and compiled as JSON, and fails where
a launch was given anything but what was meant. A process of its own, since the tests' interprets.
"""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import triton
from torch import Tensor, nn

import dca_kernels
from benchmarks.offline import stand_in
from dca_kernels.triton_backend import launch

TARGET = "sm_90"


class Size(NamedTuple):
    features: tuple[int, ...]
    patch: int
    sides: tuple[int, ...]


SIZES = {
    "single": Size((8,), 4, (16,)),
    "tiny": Size((8, 16), 4, (16, 8)),
    "paper": Size((32, 64, 128, 256), 28, (224, 112, 56, 28)),
}


class Call(NamedTuple):
    """One forward, with its backward where there is one: the user's tensors."""

    module: nn.Module
    maps: Sequence[Tensor]
    outs: Sequence[Tensor]
    douts: Sequence[Tensor]
    dmaps: Sequence[Tensor]
    of_parameters: Sequence[Tensor]
    given: Sequence[Tensor]  # what holds no workspace; where results will be, there is one before

    def place(self, address: int) -> tuple[int, int] | None:
        """Which of the user's tensors holds an address, and how many bytes behind its begin; None in a workspace."""
        for n, t in enumerate([*self.given, *self.outs, *self.dmaps, *self.of_parameters[:1]]):
            storage = t.untyped_storage()
            if storage.data_ptr() <= address < storage.data_ptr() + storage.nbytes():
                return n, address - storage.data_ptr()
        return None


def meant(kernel: str, argument: str, call: Call, of_channels: bool) -> list[Tensor] | None:
    """The user's tensors that a kernel's argument stands for; None for a workspace.

    of_channels: the LayerNorms are those of the channel attention.
    """
    (block,) = call.module.attention
    norms = [head[0] for head in call.module.bn_relu]
    attentions = block.s_attention if kernel.startswith(("spatial", "expected")) else block.c_attention
    if argument in ("maps", "outs", "douts", "dmaps"):
        return list(getattr(call, argument))
    if argument == "counters":
        return [norm.num_batches_tracked for norm in norms if norm.training]
    if argument == "buffers":
        return [
            getattr(norm, name) for name in ("running_mean", "running_var", "num_batches_tracked") for norm in norms
        ]
    if argument == "projections":
        names = ("q_map", "k_map", "v_map", "projection")
        return [t for name in names for t in affine([getattr(a, name).proj.depthwise for a in attentions])]
    embedding = [one.proj.depthwise for one in call.module.avg_map]
    convolutions = [upconv.conv.conv for upconv in call.module.upconvs]
    if argument == "weights":
        return [module.weight for module in (embedding if kernel == "map_gradient_rows" else convolutions)]
    if argument == "biases":
        return [module.bias for module in convolutions]
    layer_norms = block.channel_norm if of_channels else block.spatial_norm
    modules = {"embedding": embedding, "norms": layer_norms, "affines": norms}.get(argument)
    return None if modules is None else affine(modules)


def affine(modules: Sequence[nn.Module]) -> list[Tensor]:
    """The weights of all scales, then their biases."""
    return [module.weight for module in modules] + [module.bias for module in modules]


def leaves(argument: Any) -> Iterator[Any]:
    """What a launcher hands over of an argument: no more than its tensors and numbers."""
    if isinstance(argument, tuple):
        for part in argument:
            yield from leaves(part)
    elif argument is not None:
        yield argument


def bits(part: Tensor | float) -> int:
    """What the driver is given of a tensor or a number: an address, or the number's bits."""
    if isinstance(part, float):
        return int(np.float32(part).view(np.uint32))
    return part.data_ptr() if isinstance(part, Tensor) else part


def check(asked: dict[str, Any], given: stand_in.Launched, call: Call, shared_limit: int) -> None:
    """What one launch was given is what `launch.run` was asked for, and the user's tensors are the right ones."""
    kernel, arguments = asked["kernel"], asked["arguments"]
    name = kernel.__name__.removeprefix("_").removesuffix("_kernel")
    assert (given.name, given.programs) == (kernel.__name__, asked["programs"])
    assert given.threads == 32 * asked["config"]["num_warps"]
    assert given.shared <= shared_limit, (name, given.shared)
    handed = [p.name for p in kernel.params if not p.is_constexpr]
    expected = [bits(part) for arg in handed for part in leaves(arguments[arg])]
    assert given.arguments == expected, (name, given.arguments, expected)

    # Those of the spatial attention come in parts.
    of_channels = name == "centre" or (name == "layer_norm_backward" and arguments["parts"] is None)
    storages = {t.untyped_storage().data_ptr() for t in call.given}
    for argument in handed:
        tensors = [part for part in leaves(arguments[argument]) if isinstance(part, Tensor)]
        its = meant(name, argument, call, of_channels)
        if its is not None:
            assert [t.data_ptr() for t in tensors] == [t.data_ptr() for t in its], (name, argument)
            continue
        for t in tensors:
            storage = t.untyped_storage()
            assert storage.data_ptr() not in storages, (name, argument, "a workspace in the user's memory")
            assert t.is_contiguous() and t.data_ptr() + t.nbytes <= storage.data_ptr() + storage.nbytes(), argument


class Recorder:
    """Makes calls and checks their launches."""

    def __init__(self, driver: stand_in.Driver) -> None:
        self.driver = driver
        self.compiled: list[str] = []
        self.asked: list[dict[str, Any]] = []
        self._run = launch.run
        self._allocate = torch.empty_strided
        self.allocated: list[Tensor] = []  # so that no address stands for two

    def run(self, kernel: Any, programs: int, config: dict[str, int], **arguments: Any) -> Any:
        if programs:
            self.asked.append({"kernel": kernel, "programs": programs, "config": config, "arguments": arguments})
        return self._run(kernel, programs, config, **arguments)

    def allocate(self, *args: Any, **kwargs: Any) -> Tensor:
        self.allocated.append(self._allocate(*args, **kwargs))
        return self.allocated[-1]

    def note(self, *, fn: Any, **_: Any) -> None:
        self.compiled.append(plain(fn.name))

    def call(self, module: nn.Module, maps: Sequence[Tensor]) -> dict[str, list[str]]:
        """The names of the kernels that a call of a new kind launched, and of those that it compiled."""
        self.latest = self._made(module, maps)
        assert len(self.asked) == len(self.driver.launched)
        for asked, given in zip(self.asked, self.driver.launched, strict=True):
            check(asked, given, self.latest, self.driver.target.shared_limit)
        self.given = list(self.driver.launched)
        return self._names()

    def again(self, module: nn.Module, maps: Sequence[Tensor]) -> dict[str, list[str]]:
        """The same of a call like the one before, of other tensors: by the compiled kernels' own `run`."""
        for t in module.parameters():
            t.data = t.data.clone()
        for norm in (head[0] for head in module.bn_relu):
            norm.running_mean, norm.running_var = norm.running_mean.clone(), norm.running_var.clone()
        before, call = self.latest, self._made(module, maps)
        assert not self.asked
        moved: dict[int, set[int]] = {}  # what lies in no tensor of the user's, by its allocation
        for then, now in zip(self.given, self.driver.launched, strict=True):
            assert replace(now, arguments=[]) == replace(then, arguments=[])
            for one, other in zip(then.arguments, now.arguments, strict=True):
                assert before.place(one) == call.place(other), now.name
                if before.place(one) is None:
                    moved.setdefault(other - one, set()).add(other)
        moved.pop(0, None)  # numbers, and the tables that are never freed
        assert len(moved) <= (3 if module.training else 1), moved
        return self._names()

    def warmed(self, module: nn.Module, maps: Sequence[Tensor]) -> dict[str, Any]:
        """What `warm_up` compiles, and a call then; nothing is launched meanwhile, and the module stays as it is."""
        self.compiled.clear()
        self.driver.launched.clear()
        before = {name: t.clone() for name, t in module.state_dict().items()}
        dca_kernels.warm_up(module, [x.shape for x in maps], backward=module.training)
        assert not self.driver.launched
        assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
        compiled = list(self.compiled)
        return {"compiled": compiled, "then": self.call(module, maps)["compiled"]}

    def _made(self, module: nn.Module, maps: Sequence[Tensor]) -> Call:
        for found in (self.compiled, self.asked, self.driver.launched):
            found.clear()
        for x in maps:
            x.requires_grad_(module.training)
        with contextlib.nullcontext() if module.training else torch.no_grad():
            outs = module(maps)
        douts = [torch.randn_like(y) for y in outs] if module.training else []
        gradients = torch.autograd.grad(outs, [*maps, *module.parameters()], douts) if module.training else []
        given = [t.detach() for t in (*module.parameters(), *module.buffers(), *maps, *douts)]
        return Call(module, maps, outs, douts, gradients[: len(maps)], gradients[len(maps) :], given)

    def _names(self) -> dict[str, list[str]]:
        return {"launched": [plain(one.name) for one in self.driver.launched], "compiled": list(self.compiled)}


def plain(name: str) -> str:
    return name.removeprefix("_").removesuffix("_kernel")


def main(name: str, dtype: str, mode: str, *batches: str) -> None:
    size, found = SIZES[name], []
    with stand_in.standing_in(TARGET) as driver:
        recorder = Recorder(driver)
        with (
            mock.patch.object(launch, "run", recorder.run),
            mock.patch.object(torch, "empty_strided", recorder.allocate),
            mock.patch.object(triton.knobs.runtime, "jit_cache_hook", recorder.note),
        ):
            module = dca_kernels.DCA(size.features, patch=size.patch, backend="triton")
            module.to(getattr(torch, dtype)).train(mode == "train")

            def maps(batch: int, factor: float = 1) -> list[Tensor]:
                sides = [(int(side * factor), side) for side in size.sides]
                shapes = [(batch, c, *side) for c, side in zip(size.features, sides, strict=True)]
                return [torch.randn(shape).to(getattr(torch, dtype)) for shape in shapes]

            for batch in map(int, batches):
                found.append(recorder.call(module, maps(batch)))
            recorder.again(module, maps(int(batches[-1])))
            again = recorder.again(module, maps(int(batches[-1])))  # of parameters at other addresses
            other = recorder.call(module, maps(int(batches[-1]), 1.5)) if name == "tiny" else None
            warmed = recorder.warmed(module, maps(int(batches[-1]), 2.5)) if name == "tiny" else None
    print(json.dumps({"calls": found, "again": again, "other size": other, "warmed": warmed}))


if __name__ == "__main__":
    main(*sys.argv[1:])
