"""The `triton` backend as one operator with its gradient, for what traces or watches a call.

An operator takes tensors and plain numbers: a contract goes as lists of its tensors and of its floats, which
torch.compile may not know for constants, and as text that says where each of them was.
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from dca_kernels import contract as structures
from dca_kernels.contract import Contract, channels_of, flatten, in_place_of, learned, skeleton, unflatten
from dca_kernels.triton_backend import passes

TWICE = (
    "the triton backend's gradients cannot be differentiated again: use backend='torch' for second derivatives "
    "(create_graph=True)"
)


def _of_parameters(
    gradients: passes.Gradients, contract: Contract, parameters: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradients of the contract's parameters, in their order, shapes and dtypes."""
    pairs = zip(parameters, in_place_of(contract, passes.split(gradients, contract)), strict=True)
    return [None if g is None else g.view_as(t).to(t.dtype) for t, g in pairs]


def described(contract: Contract) -> tuple[str, list[float]]:
    """A contract as text, and its floats; its tensors are `flatten`'s."""
    floats: list[float] = []
    return _as_text(_plain(contract, floats)), floats


def _plain(part: Any, floats: list[float]) -> Any:
    """As tuples that begin with the name of what they were; a float is moved to the list."""
    if isinstance(part, tuple):
        return type(part).__name__, *[_plain(p, floats) for p in part]
    if isinstance(part, Tensor):
        return "tensor"
    if part is None or isinstance(part, int | torch.dtype):
        return part
    floats.append(float(part))  # NumPy's as well
    return "float"


def _as_text(plain: Any) -> str:
    return json.dumps(plain, default=str)


_as_text._dynamo_marked_constant = True  # type: ignore[attr-defined]  # called while it is traced, see `dca_kernels.plain`


def restored(text: str, tensors: Sequence[Tensor], floats: Sequence[float]) -> Contract:
    """What was `described`, with the first tensors and floats that it had; in the place of others, empty ones and 0."""
    others = itertools.repeat(torch.empty(0)), itertools.repeat(0.0)
    return _restored(_parsed(text), itertools.chain(tensors, others[0]), itertools.chain(floats, others[1]))


@functools.cache
def _parsed(text: str) -> Any:
    return json.loads(text)


def _restored(part: Any, tensors: Iterator[Tensor], floats: Iterator[float]) -> Any:
    if isinstance(part, list):
        parts = [_restored(p, tensors, floats) for p in part[1:]]
        return tuple(parts) if part[0] == "tuple" else getattr(structures, part[0])(*parts)
    if part == "tensor":
        return next(tensors)
    if part == "float":
        return next(floats)
    return getattr(torch, part.removeprefix("torch.")) if isinstance(part, str) else part


Pass = Callable[[Sequence[Tensor], Contract], tuple[list[Tensor], passes.Saved]]


@torch.library.custom_op(
    "dca_kernels::refine",
    mutates_args=(),
    schema="(Tensor[] maps, Tensor[] parameters, Tensor[] buffers, float[] floats, str contract) -> Tensor[]",
)
def _refine(
    maps: list[Tensor], parameters: list[Tensor], buffers: list[Tensor], floats: list[float], contract: str
) -> list[Tensor]:
    """The outputs, then what the backward needs; without one, what BatchNorm took of a batch."""
    return _results(passes.forward, maps, passes.as_taken(restored(contract, [*parameters, *buffers], floats)))


@_refine.register_fake
def _refine_fake(
    maps: list[Tensor], parameters: list[Tensor], buffers: list[Tensor], floats: list[float], contract: str
) -> list[Tensor]:
    return _results(passes.empty, maps, restored(contract, [*parameters, *buffers], floats))


def _results(run: Pass, maps: list[Tensor], contract: Contract) -> list[Tensor]:
    outs, saved = run(maps, contract)
    return [*outs, *flatten(saved if contract.backward else saved.upsample.used)]


@torch.library.custom_op(
    "dca_kernels::refine_backward",
    mutates_args=(),
    schema="(Tensor[] douts, Tensor[] maps, Tensor[] parameters, Tensor[] saved, float[] floats, str contract, "
    "bool[] wanted) -> Tensor[]",
)
def _refine_backward(
    douts: list[Tensor],
    maps: list[Tensor],
    parameters: list[Tensor],
    saved: list[Tensor],
    floats: list[float],
    contract: str,
    wanted: list[bool],
) -> list[Tensor]:
    """The wanted gradients of the maps, then those of the parameters as the kernels write them."""
    restored_contract = passes.as_taken(restored(contract, parameters, floats))
    its = unflatten(_saved_skeleton(contract, channels_of(restored_contract)), iter(saved))
    dmaps, gradients = passes.backward(maps, restored_contract, its, douts, wanted)
    return flatten((tuple(dmaps), gradients))


@_refine_backward.register_fake
def _refine_backward_fake(
    douts: list[Tensor],
    maps: list[Tensor],
    parameters: list[Tensor],
    saved: list[Tensor],
    floats: list[float],
    contract: str,
    wanted: list[bool],
) -> list[Tensor]:
    dmaps, gradients = passes.empty_gradients(maps, restored(contract, parameters, floats), wanted)
    return flatten((tuple(dmaps), gradients))


@functools.cache
def _saved_skeleton(text: str, channels: tuple[int, ...]) -> passes.Saved:
    """How the saved tensors of a described contract with C_i channels are arranged, whatever the maps' sizes."""
    return skeleton(passes.empty(*_meta(text, channels))[1])


@functools.cache
def _gradients_skeleton(
    text: str, channels: tuple[int, ...], wanted: tuple[bool, ...]
) -> tuple[tuple[Tensor | None, ...], passes.Gradients]:
    """How `_refine_backward`'s results are arranged, whatever their sizes."""
    dmaps, gradients = passes.empty_gradients(*_meta(text, channels), wanted)
    return skeleton((tuple(dmaps), gradients))


def _meta(text: str, channels: tuple[int, ...]) -> tuple[list[Tensor], Contract]:
    """Maps of one pixel, and a described contract with C_i channels: without memory."""
    affines = tuple([structures.Affine(*torch.empty(2, c, device="meta").unbind()) for c in channels])
    contract = restored(text, (), ())._replace(patch_embed=affines, upsample=affines)
    return [torch.empty(1, c, 1, 1, device="meta") for c in channels], contract


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    maps, parameters, buffers, floats, ctx.text = inputs
    ctx.scales, ctx.count, ctx.floats, ctx.buffers = len(maps), len(maps) + len(parameters), floats, len(buffers)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*maps, *parameters, *output[len(maps) :])


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    scales, tensors = ctx.scales, list(ctx.saved_tensors)
    maps, parameters, saved = tensors[:scales], tensors[scales : ctx.count], tensors[ctx.count :]
    # What is returned for an argument that is no tensor: a list without elements counts as one of tensors.
    others: tuple[Any, ...] = [None] * ctx.buffers, None if ctx.floats else [], None
    if all(g is None for g in grads[:scales]):
        return [None] * scales, [None] * len(parameters), *others
    contract = learned(restored(ctx.text, parameters, ctx.floats))
    needed_maps, needed_parameters, *_ = ctx.needs_input_grad
    wanted = passes.wanted_of(contract, [*needed_maps, *needed_parameters], [g is not None for g in grads[:scales]])
    douts = passes.upstream(grads[:scales], maps, contract.output_dtypes)
    raw = torch.ops.dca_kernels.refine_backward(douts, maps, parameters, saved, ctx.floats, ctx.text, wanted)
    dmaps, gradients = unflatten(_gradients_skeleton(ctx.text, channels_of(contract), tuple(wanted)), iter(raw))
    of_parameters = _of_parameters(gradients, contract, parameters)
    asked = [g if want else None for g, want in zip(of_parameters, wanted[scales:], strict=True)]
    return list(dmaps), asked, *others


def _refuse(ctx: FunctionCtx, *grads: Tensor) -> None:
    raise RuntimeError(TWICE)


_refine.register_autograd(_differentiate, setup_context=_keep)
_refine_backward.register_autograd(_refuse)
