"""Python to Triton IR of every launch that users' calls make, through the JIT's own binder: no GPU, no interpreter.

`python -m tests.tools.front_end TARGET` prints what it found as JSON. A process of its own: the tests' interprets.
"""

import contextlib
import itertools
import json
import sys
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor, nn
from triton._C.libtriton import ir
from triton.compiler import make_backend

import dca_kernels
from benchmarks.offline import stand_in

Change = Callable[[nn.Module, list[Tensor]], None]


@dataclass(frozen=True)
class Call:
    """A module's arguments and inputs, and what is done to both before it is called."""

    dtype: torch.dtype = torch.float32
    train: bool = True
    batch: int = 2
    layout: str = "contiguous"
    precision: str = "highest"
    features: tuple[int, ...] = (8, 16)
    patch: int | tuple[int, int] = 4
    sizes: tuple[tuple[int, int], ...] = ((16, 16), (8, 8))
    arguments: dict[str, Any] = field(default_factory=dict)
    change: Change = lambda module, maps: None


class FrontEnd:
    """Stands in for `triton.compile`: goes as far as Triton IR, once a source, and keeps what failed."""

    def __init__(self) -> None:
        self.sources: set[str] = set()
        self.failures: dict[str, list[str]] = {}
        self.call = ""

    def compile(self, source: Any, target: Any, options: dict[str, Any], **_: Any) -> Any:
        if source.hash() not in self.sources:
            try:
                self._make_ir(source, target, options)
                self.sources.add(source.hash())
            except Exception as error:
                if threading.current_thread() is not threading.main_thread():
                    raise  # and the launch compiles again: `launch.compile_all`
                self.sources.add(source.hash())
                while error.__cause__ is not None:
                    error = error.__cause__
                message = f"{source.fn.__name__}: {type(error).__name__}: {str(error).strip().splitlines()[-1]}"
                self.failures.setdefault(message, []).append(self.call)
        nothing = lambda *args: None  # noqa: E731
        return types.SimpleNamespace(launch_metadata=nothing, run=nothing, function=None, packed_metadata=None)

    def _make_ir(self, source: Any, target: Any, options: dict[str, Any]) -> None:
        backend = make_backend(target)
        parsed = backend.parse_options(options)
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        source.make_ir(target, parsed, backend.get_codegen_implementation(parsed), backend.get_module_map(), context)

    def make(self, name: str, call: Call) -> int:
        """Make a call; how many sources it was the first to need."""
        self.call, before = name, len(self.sources)
        torch.set_float32_matmul_precision(call.precision)
        module = dca_kernels.DCA(call.features, patch=call.patch, backend="triton", **call.arguments)
        module.to(call.dtype).train(call.train)
        maps = [
            LAYOUTS[call.layout](torch.zeros(call.batch, c, *size, dtype=call.dtype))
            for c, size in zip(call.features, call.sizes, strict=True)
        ]
        for x in maps:
            x.requires_grad_(call.train)
        call.change(module, maps)
        with contextlib.nullcontext() if call.train else torch.no_grad():
            outs = module(maps)
        if call.train:
            torch.autograd.backward(outs, [torch.zeros_like(y) for y in outs])
        return len(self.sources) - before


def misaligned(x: Tensor) -> Tensor:
    """The same values where no address is a multiple of 16 bytes."""
    return torch.cat([x.new_zeros(1), x.detach().flatten()])[1:].view(x.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "misaligned": misaligned,
}


def norms(module: nn.Module) -> Iterator[nn.BatchNorm2d]:
    return (head[0] for head in module.bn_relu)


def set_momentum(module: nn.Module, maps: list[Tensor]) -> None:
    for norm in norms(module):
        norm.momentum = None


def replace_norms(**arguments: bool) -> Change:
    def change(module: nn.Module, maps: list[Tensor]) -> None:
        for head in module.bn_relu:
            head[0] = nn.BatchNorm2d(head[0].num_features, **arguments).to(maps[0].dtype).train(module.training)

    return change


def hook_a_norm(module: nn.Module, maps: list[Tensor]) -> None:
    module.bn_relu[0][0].register_forward_hook(lambda *args: None)


def freeze_a_norm(module: nn.Module, maps: list[Tensor]) -> None:
    module.bn_relu[0].eval()


def only(*prefixes: str) -> Change:
    """Gradients of the parameters whose names begin so, and of the maps if "maps" is one."""

    def change(module: nn.Module, maps: list[Tensor]) -> None:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name.startswith(prefixes))
        for x in maps:
            x.requires_grad_(x.requires_grad and "maps" in prefixes)

    return change


def detach_a_map(module: nn.Module, maps: list[Tensor]) -> None:
    maps[0].requires_grad_(False)


def misalign_parameters(module: nn.Module, maps: list[Tensor]) -> None:
    for parameter in module.parameters():
        parameter.data = misaligned(parameter.data)


VARIANTS = {
    "two blocks": Call(arguments={"n": 2}),
    "no channel attention": Call(arguments={"channel_att": False}),
    "no spatial attention": Call(arguments={"spatial_att": False}),
    "no attention": Call(arguments={"channel_att": False, "spatial_att": False}),
    "heads": Call(arguments={"channel_head": (2, 4), "spatial_head": (1, 8)}),
    "one scale": Call(features=(8,), sizes=((16, 16),)),
    "three scales": Call(features=(8, 16, 32), sizes=((16, 16), (8, 8), (4, 4))),
    "one channel": Call(features=(1, 3), sizes=((5, 7), (3, 3)), patch=3, arguments={"spatial_head": (1, 1)}),
    "ragged": Call(sizes=((9, 11), (4, 5)), patch=(3, 5)),
    "maps below the grid": Call(sizes=((5, 3), (1, 1)), patch=(6, 4)),
    "momentum None": Call(change=set_momentum),
    "no affine": Call(change=replace_norms(affine=False)),
    "no tracking": Call(change=replace_norms(track_running_stats=False)),
    "hooked norm": Call(change=hook_a_norm),
    "frozen norm": Call(change=freeze_a_norm),
    "gradients of the maps": Call(change=only("maps")),
    "gradients of one map": Call(change=detach_a_map),
    "gradients of the embedding": Call(change=only("avg_map")),
    "gradients of the attention": Call(change=only("attention")),
    "gradients of the convolutions": Call(change=only("upconvs")),
    "gradients of the norms": Call(change=only("bn_relu")),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Targets differ in block sizes alone: the rarer choices are tried with each dtype on one of them, and on one how
# numbers and addresses divide.
WHOLE = "sm_90"
VARIANT_DTYPES = {
    "sm_80": [torch.float64],
    "sm_90": [torch.float32, torch.bfloat16],
    "sm_100": [torch.float16],
}


def calls(target: str) -> Iterator[tuple[str, Call]]:
    """Combinations of the common choices, on one target all; each rarer choice in both modes."""
    dtypes, batches, layouts = DTYPES, (1, 2, 16, 17), [*LAYOUTS]
    if target != WHOLE:  # both dtypes of 16 bit have the same blocks
        dtypes = torch.float32, torch.bfloat16, torch.float64
        batches, layouts = (2, 17), ["contiguous", "channels_last"]
    for dtype, train, batch, layout in itertools.product(dtypes, (True, False), batches, layouts):
        mode = "train" if train else "eval"
        for precision in ("highest", "high") if dtype == torch.float32 else ("highest",):
            yield (
                f"{dtype}, {mode}, batch {batch}, {layout}, {precision}",
                Call(dtype, train, batch, layout, precision),
            )
    for (name, variant), dtype, train in itertools.product(VARIANTS.items(), VARIANT_DTYPES[target], (True, False)):
        if train or not name.startswith("gradients"):
            yield f"{name}, {dtype}, {'train' if train else 'eval'}", replace(variant, dtype=dtype, train=train)


def main(target: str) -> None:
    front_end = FrontEnd()
    with stand_in.standing_in(target), mock.patch.object(triton.compiler, "compile", front_end.compile):
        front_end.make("batch 3", Call(batch=3))  # up to two images have blocks of their own
        anew = {
            "sixteen images": front_end.make("batch 16", Call(batch=16)),  # divisible, as numbers go
            "parameters at odd addresses": front_end.make("odd parameters", Call(batch=3, change=misalign_parameters)),
        }
        for name, call in calls(target):
            front_end.make(name, call)
    print(json.dumps({"sources": len(front_end.sources), "failures": front_end.failures, "anew": anew}))


if __name__ == "__main__":
    main(sys.argv[1])
