"""The four stages in turn, forward and backward."""

import functools
import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dca_kernels.contract import (
    Attention,
    Block,
    Contract,
    attentions_of,
    channels_of,
    flatten,
    from_batch,
    learned,
    memory_format,
    unflatten,
)
from dca_kernels.triton_backend import (
    channel_attention,
    channel_attention_backward,
    map_gradient,
    patch_embed,
    spatial_attention,
    spatial_attention_backward,
    spatial_gradients,
    upsample,
    upsample_backward,
)
from dca_kernels.triton_backend.launch import Launcher
from dca_kernels.triton_backend.layout import backward_config, taken_by_rows
from dca_kernels.triton_backend.parameters import gradient_dtype, heads_of, promoted
from dca_kernels.triton_backend.tokens import Tokens, widest_scale

MAX_OFFSET = 2**31  # elements: within one image the kernels' indices have 32 bit
ALIGNMENT = 16  # bytes

Attended = channel_attention.Saved | spatial_attention.Saved
OfAttention = channel_attention_backward.Gradients | spatial_gradients.Gradients


class Saved(NamedTuple):
    """What the backward needs beside the maps and the parameters: each attention's, in sequence, and the upsampling's.

    The last tensor is what BatchNorm took, see `upsample.Saved`.
    """

    attentions: tuple[Attended, ...]
    upsample: upsample.Saved


class Gradients(NamedTuple):
    """Those of the parameters, as the kernels write them; None for the stages before the first wanted one."""

    patch_embed: map_gradient.Gradients | None
    attentions: tuple[OfAttention | None, ...]
    upsample: upsample_backward.Gradients


class Stage(NamedTuple):
    """The backward of a stage, and its parameters' gradients."""

    backward: Any
    gradients: Any


CHANNEL_ATTENTION = Stage(channel_attention_backward.channel_attention_backward, channel_attention_backward.Gradients)
SPATIAL_ATTENTION = Stage(spatial_attention_backward.spatial_attention_backward, spatial_gradients.Gradients)


def forward(maps: Sequence[Tensor], contract: Contract) -> tuple[list[Tensor], Saved]:
    """The outputs, and what the backward needs; where there will be none, of the spatial attentions nothing.

    Args:
        maps: S tensors (B, C_i, H_i, W_i), any strides.
        contract: of the call, `as_taken`.

    Raises:
        ValueError: a map's image is too large for 32-bit indices, or a size too large for the kernels' tiles.
    """
    _check(maps)
    tokens, embedded = patch_embed.patch_embed(maps, contract)
    _check_backward(tokens.launcher, maps, contract)
    saved: list[Attended] = []
    for block in range(len(contract.blocks)):
        tokens, of_channels = channel_attention.channel_attention(tokens, contract, block)
        tokens, of_tokens = spatial_attention.spatial_attention(tokens, contract, block)
        saved += [its for its in (of_channels, of_tokens) if its is not None]
    outs, of_upsample = upsample.upsample(tokens, embedded, contract)
    return outs, Saved(tuple(saved), of_upsample)


def empty(maps: Sequence[Tensor], contract: Contract) -> tuple[list[Tensor], Saved]:
    """Fresh memory of the shapes of what `forward` returns where there will be a backward."""
    saved: list[Attended] = []
    for block in contract.blocks:
        if block.channel_attention is not None:
            tokens = Tokens.beside(maps, contract)
            saved.append(channel_attention.Saved.empty(tokens._replace(statistics=tokens.empty_statistics())))
        if block.spatial_attention is not None:
            tokens = Tokens.beside(maps, contract)
            normalised, level = torch.empty_like(tokens.plain), tokens.empty(tokens.batch, tokens.shape.total)
            tokens = tokens._replace(statistics=tokens.empty_statistics(), normalised=normalised, level=level)
            saved.append(spatial_attention.Saved.empty(tokens, heads_of(block.spatial_attention)))
    tokens = Tokens.beside(maps, contract)
    by_rows = taken_by_rows(maps, contract.grid)
    less_origin = patch_embed.LessOrigin.empty(tokens, by_rows) if any(from_batch(contract)) else None
    outs = [
        torch.empty_like(x, dtype=dtype, memory_format=memory_format(x))
        for x, dtype in zip(maps, contract.output_dtypes, strict=True)
    ]
    return outs, Saved(tuple(saved), upsample.Saved.empty(tokens, less_origin, by_rows, contract))


def backward(
    maps: Sequence[Tensor], contract: Contract, saved: Saved, douts: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[list[Tensor | None], Gradients]:
    """The gradients of the maps, None where not wanted, and of the parameters, back to the first stage that has one.

    Args:
        maps, contract: as in the forward.
        saved: what it returned.
        douts: S tensors (B, C_i, H_i, W_i), the `upstream` gradients of its outputs.
        wanted: for each of maps and parameters, whether its gradient is.
    """
    first, count = first_wanted(contract, wanted), len(saved.attentions)
    last = upsample_backward.upsample_backward(saved.upsample, maps, douts, contract, first <= count)
    gradients: list[OfAttention | None] = [None] * count
    dtokens = last.dtokens
    for n, (k, stage) in reversed(list(enumerate(_attentions(contract)))):
        if first <= n + 1:
            dtokens, gradients[n] = stage.backward(saved.attentions[n], dtokens, contract, k)
    dmaps: list[Tensor | None] = [None] * len(maps)
    of_embedding = None
    if first == 0 and dtokens is not None:
        dmaps, of_embedding = map_gradient.map_gradients(
            saved.upsample, maps, last.through_statistics, dtokens, douts, contract, wanted[: len(maps)]
        )
    return dmaps, Gradients(of_embedding, tuple(gradients), last.parameters)


def empty_gradients(
    maps: Sequence[Tensor], contract: Contract, wanted: Sequence[bool]
) -> tuple[list[Tensor | None], Gradients]:
    """Fresh memory of the shapes of what `backward` returns."""
    tokens, first = Tokens.beside(maps, contract), first_wanted(contract, wanted)
    dtype = gradient_dtype(contract)
    attentions = [
        stage.gradients.empty(tokens, dtype) if first <= n + 1 else None
        for n, (_, stage) in enumerate(_attentions(contract))
    ]
    of_embedding = map_gradient.Gradients.empty(tokens, dtype) if first == 0 else None
    dmaps = [
        torch.empty_like(x, memory_format=memory_format(x)) if want and first == 0 else None
        for x, want in zip(maps, wanted, strict=False)
    ]
    return dmaps, Gradients(of_embedding, tuple(attentions), upsample_backward.Gradients.empty(tokens, dtype))


def split(gradients: Gradients, contract: Contract) -> Contract:
    """The gradients as the contract has the parameters; None for the stages before the first wanted one."""
    channels = channels_of(contract)
    attentions = iter(gradients.attentions)

    def of(attention: tuple[Attention, ...] | None) -> tuple[Attention, ...] | None:
        its = None if attention is None else next(attentions)
        return None if attention is None or its is None else its.split(attention)

    embedding = gradients.patch_embed
    convolutions, norms = gradients.upsample.split(contract.norms, channels)
    return contract._replace(
        patch_embed=None if embedding is None else embedding.split(channels),  # type: ignore[arg-type]
        blocks=tuple([Block(*map(of, block)) for block in contract.blocks]),
        upsample=convolutions,
        norms=norms,
        buffers=(),
    )


def _attentions(contract: Contract) -> Iterator[tuple[int, Stage]]:
    """Block and backward of each attention, in sequence."""
    for k, block in enumerate(contract.blocks):
        if block.channel_attention is not None:
            yield k, CHANNEL_ATTENTION
        if block.spatial_attention is not None:
            yield k, SPATIAL_ATTENTION


def wanted_of(contract: Contract, needed: Sequence[bool], used: Sequence[bool]) -> list[bool]:
    """For each of maps and parameters, whether it is `needed` and an output that is `used` depends on it.

    Through an attention every output depends on all that comes before it. What comes behind the last one, and the maps
    of that one, serve their own scale only. At least one output is used.
    """
    attentions = list(attentions_of(contract))
    reached = [True] * len(used) if attentions else list(used)  # maps

    def add(scales: Sequence[Sequence[object]], flags: Sequence[bool]) -> None:
        for scale, flag in zip(scales, flags, strict=True):
            reached.extend([flag] * len(scale))

    add(contract.patch_embed, reached[:])
    for attention in attentions:
        behind = used if attention is attentions[-1] else [True] * len(used)
        for scale, flag in zip(attention, behind, strict=True):
            add((scale.norm, *scale.projections), (True, *[flag] * len(scale.projections)))
    add(contract.upsample, used)
    add([flatten(norm[:2]) if norm is not None else () for norm in contract.norms], used)
    return [need and flag for need, flag in zip(needed, reached, strict=True)]


def first_wanted(contract: Contract, wanted: Sequence[bool]) -> int:
    """The first stage with a wanted gradient: 0 embedding and maps, then the attentions, then the upsampling."""
    sizes = [sum([1 + len(projection) for projection in contract.patch_embed])]  # a map and its parameters
    for attention in attentions_of(contract):
        sizes.append(sum([len(scale.norm) + sum(map(len, scale.projections)) for scale in attention]))
    return sum(not any(wanted[:end]) for end in itertools.accumulate(sizes))


def _check(maps: Sequence[Tensor]) -> None:
    """Raise for what the kernels do not take, before any of them runs."""
    for i, x in enumerate(maps):
        if _last(x) >= MAX_OFFSET:
            raise ValueError(
                f"maps[{i}]: expected an image whose elements lie within {MAX_OFFSET} of the first, got {_last(x)}"
            )


def _check_backward(launcher: Launcher, maps: Sequence[Tensor], contract: Contract) -> None:
    """Raise for what the backward alone cannot hold, before the BatchNorms' buffers are updated."""
    if not contract.backward or not any(from_batch(contract)):
        return
    if list(attentions_of(contract)):
        launcher.config("layer_norm_backward", widest_scale(launcher.shape))
    if not taken_by_rows(maps, contract.grid):
        for kernel in ("upsample_backward", "map_gradient"):
            backward_config(kernel, launcher, maps, contract.grid)


def upstream(grads: Sequence[Tensor | None], maps: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """The gradients of all outputs, of these dtypes, as the kernels take them: zeros for one that was not used."""
    douts = [
        torch.zeros_like(x, dtype=dtype) if g is None else g.resolve_neg()
        for g, x, dtype in zip(grads, maps, dtypes, strict=True)
    ]
    return [g if g.is_contiguous() or _last(g) < MAX_OFFSET else g.contiguous() for g in douts]


def _last(x: Tensor) -> int:
    """How far the last element of an image lies from its first."""
    return sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))


def as_taken(contract: Contract) -> Contract:
    """With its parameters as the kernels take them: `aligned`, and in all scales of one dtype, the promoted one.

    A kernel chooses among the pointers of all scales, which have to be of one type.
    """
    parameters = flatten(learned(contract))
    dtypes = _taken_dtypes(contract) if len({t.dtype for t in parameters}) > 1 else []
    its = aligned([t.to(dtype) for t, dtype in zip(parameters, dtypes, strict=True)] if dtypes else parameters)
    if all(map(operator.is_, its, parameters)):
        return contract
    return unflatten(learned(contract), iter(its))._replace(buffers=contract.buffers)


def _taken_dtypes(contract: Contract) -> list[torch.dtype]:
    """Of each parameter: what it and those in its place in the other scales promote to; of BatchNorms, all of them."""
    found = []
    for scales in (contract.patch_embed, *attentions_of(contract), contract.upsample):
        places = zip(*[flatten((scale,)) for scale in scales], strict=True)
        found += [promoted(tensors) for tensors in places] * len(scales)
    norms = flatten(contract.norms)
    return found + [promoted(norms) for _ in norms]


def aligned(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Contiguous, at addresses that are multiples of 16 bytes; some are copies.

    Triton compiles another kernel for any other address; a copy is faster by far.
    """
    if are_aligned(tensors):
        return tensors
    return [t if are_aligned([t]) else t.detach().clone(memory_format=torch.contiguous_format) for t in tensors]


def are_aligned(tensors: Sequence[Tensor]) -> bool:
    """Whether `aligned` leaves tensors as they are."""
    return are_multiples(map(Tensor.data_ptr, tensors)) and all(map(Tensor.is_contiguous, tensors))


def are_multiples(addresses: Iterable[int]) -> bool:
    """Whether all addresses are multiples of ALIGNMENT."""
    return functools.reduce(operator.or_, addresses, 0) % ALIGNMENT == 0
