"""What several stages of the `torch` backend use."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, library
from torch.nn import functional as F

from dca_kernels.contract import Affine, Attention

NEGLIGIBLE = 1e-18  # smaller attention weights are zero: far below rounding, and subnormal products cost 50x on a CPU

Context = Any  # autograd's: a forward leaves on it, under names of its own, what the backward needs

LIBRARY = library.Library("dca_kernels", "FRAGMENT")


def operator(
    schema: str, compute: Callable[..., tuple[Tensor, ...]], describe: Callable[..., tuple[Tensor, ...]]
) -> Callable[..., tuple[Tensor, ...]]:
    """An operator, `torch.ops.dca_kernels.<name>`, that torch.compile and torch.export take as a whole.

    `describe` returns empty results, for tracing: as `compute`, but for their values.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=[torch.Tag.pt2_compliant_tag])
    LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    library.register_fake(f"dca_kernels::{name}", describe, lib=LIBRARY)
    return getattr(torch.ops.dca_kernels, name).default


# Parameters and tokens


def depthwise(projection: Affine, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight (C) and bias (C) of a depthwise projection."""
    return projection.weight.flatten().to(dtype), projection.bias.to(dtype)


def normalise(tokens: Sequence[Tensor], attentions: Sequence[Attention]) -> tuple[Tensor, Tensor]:
    """LayerNorm of each scale's tokens (B, N, C_i), all scales side by side, apart from their mean over the grid.

    Returns:
        the centred tokens (B, N, C) and the mean (B, C).
    """
    normalised = []
    for t, attention in zip(tokens, attentions, strict=True):
        weight, bias = attention.norm
        normalised.append(F.layer_norm(t, weight.shape, weight.to(t.dtype), bias.to(t.dtype), attention.eps))
    together = torch.cat(normalised, 2)  # (B, N, C)
    mean = together.mean(1)
    return together - mean[:, None], mean


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """(.., N, C) -> (.., h, N, C / h), a view."""
    return tokens.unflatten(-1, (heads, -1)).transpose(-3, -2)


def without_negligible(weights: Tensor) -> Tensor:
    """Attention weights with the negligible ones at zero."""
    return F.threshold(weights, NEGLIGIBLE, 0.0)


def spans(length: int, most: int, multiple: int = 1) -> list[slice]:
    """0 .. length in equal spans of at most `most` (at least one) each; of the next multiple, if that is allowed."""
    most = max(1, most)
    step = math.ceil(length / max(1, math.ceil(length / most)))
    step = max(1, min(most, math.ceil(step / multiple) * multiple))
    return [slice(begin, min(begin + step, length)) for begin in range(0, length, step)]


def contiguous_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Fresh memory for a tensor of each of these shapes."""
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)


def no_autocast(tensor: Tensor) -> torch.autocast:
    """A context in which autocast is off on the tensor's device."""
    return torch.autocast(tensor.device.type, enabled=False)


# Products of 16-bit operands


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a (B, n, k) @ b (B, k, m), of operands in `dtype`; sums and result in a's dtype."""
    return a @ b if dtype == a.dtype else _Product.apply(a, b, dtype)


class _Product(torch.autograd.Function):
    """The product of float32 tensors, rounded to 16 bit on the way; so are the gradient's. Differentiable again."""

    @staticmethod
    def forward(ctx: Context, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        keep_undefined(ctx)
        ctx.save_for_backward(a, b)
        ctx.dtype = dtype
        if dtype != torch.float16:
            return multiply(a.to(dtype), b.to(dtype))
        of_a, of_b = magnitude(a), magnitude(b)
        return multiply((a / of_a).to(dtype), (b / of_b).to(dtype)).mul_(of_a * of_b)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        (a, b), (dout,) = ctx.saved_tensors, grads
        if dout is None:
            return None, None, None
        with no_autocast(dout):
            da = _Product.apply(dout, b.mT, ctx.dtype) if ctx.needs_input_grad[0] else None
            db = _Product.apply(a.mT, dout, ctx.dtype) if ctx.needs_input_grad[1] else None
        return da, db, None


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a (B, n, k) @ b (B, k, m) of 16-bit tensors, with float32 sums and a float32 result; no gradients."""
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def magnitude(x: Tensor) -> Tensor:
    """A power of two (B, 1, 1) that brings the largest value of x (B, .., ..) to 1 .. 2: any float32 then fits float16.

    Gradients need it, whose size a loss scale sets, and of which attention weights make small factors.
    """
    if x.numel() == 0:
        return x.new_ones(x.shape[0], 1, 1)
    largest = torch.linalg.vector_norm(x.detach(), math.inf, (1, 2), keepdim=True)
    return torch.exp2(torch.floor(torch.log2(largest.clamp(min=torch.finfo(x.dtype).tiny))))


# Gradients


class _ZeroGrad(torch.autograd.Function):
    """Of one parameter: of any number, torch.compile would take `ctx` for one of them where none needs a gradient."""

    @staticmethod
    def forward(ctx: Context, value: Tensor, parameter: Tensor) -> Tensor:
        keep_undefined(ctx)
        ctx.shape = parameter.shape
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        (dvalue,) = grads
        return dvalue, None if dvalue is None else dvalue.new_zeros(ctx.shape)


def with_zero_grad(value: Tensor, *parameters: Tensor) -> Tensor:
    """`value`, with gradients of exactly zero (not None) for parameters that it does not depend on."""
    for parameter in parameters:
        value = _ZeroGrad.apply(value, parameter)
    return value


def independent(*inputs: Tensor) -> list[Tensor]:
    """The inputs as independent variables: a derivative for one must not reach it through another as well."""
    return [t.view_as(t) for t in inputs]


def differentiable_grad(
    out: Tensor, inputs: Sequence[Tensor], dout: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of `out` for the inputs that need one, with a graph of their own."""
    wanted = [t for t, need in zip(inputs, needed, strict=False) if need]
    grads = iter(torch.autograd.grad(out, wanted, dout, create_graph=True))
    return [next(grads) if need else None for need in needed[: len(inputs)]]


def keep_undefined(ctx: Context) -> None:
    """Let an output that no loss uses have the gradient None in the backward too.

    The zeros that PyTorch would put there reach parameters, whose gradient is None in the reference.
    """
    if not torch.compiler.is_compiling():  # it cannot trace this, and no gradient is None there
        ctx.set_materialize_grads(False)
