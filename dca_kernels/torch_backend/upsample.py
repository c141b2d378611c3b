"""Stage 4: 1x1 convolution at the grid's size, bilinear upsampling, raw map added, BatchNorm, ReLU (paper, eq. 5)."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, library
from torch.nn import functional as F

from dca_kernels.contract import Contract, memory_format, update_buffers
from dca_kernels.torch_backend.common import (
    LIBRARY,
    Context,
    contiguous_like,
    differentiable_grad,
    independent,
    keep_undefined,
    no_autocast,
    operator,
    product,
    spans,
    with_zero_grad,
)

PLANE_BYTES = 2**22  # full-resolution values in flight at a time while tokens are upsampled and added to a skip map

Piece = TypeVar("Piece")


def upsample(tokens: Sequence[Tensor], maps: Sequence[Tensor], contract: Contract) -> list[Tensor]:
    """The refined maps; BatchNorm's buffers are updated when every map is done.

    The convolution commutes with the interpolation; its bias is added after it, in float32. Pooling and interpolation
    have float32 operands on every device: they read and write full-resolution maps, and that takes their time.

    Args:
        tokens: S tensors (B, N, C_i).
        maps: S tensors (B, C_i, H_i, W_i).
        contract: its `dtype` is that of the convolution's operands, the tokens' or 16-bit.

    Returns:
        S tensors (B, C_i, H_i, W_i) of the contract's output dtypes, channels_last where the map is.
    """
    outs: list[Tensor] = []
    updates = []
    scales = zip(tokens, maps, contract.upsample, contract.norms, contract.buffers, contract.output_dtypes, strict=True)
    for t, x, conv, norm, buffers, dtype in scales:
        z = _convolve(conv.weight.flatten(1).to(t.dtype), t, contract.dtype).unflatten(2, contract.grid)
        bias = conv.bias.to(t.dtype)
        if norm is None or buffers is None:
            outs.append((x + (_interpolate(z, x) + _plane(bias))).to(dtype))  # x first: the sum has its layout
            continue
        gamma = t.new_ones(t.shape[2]) if norm.weight is None else norm.weight.to(t.dtype)
        beta = t.new_zeros(t.shape[2]) if norm.bias is None else norm.bias.to(t.dtype)
        if norm.from_batch or buffers.mean is None or buffers.variance is None:
            z_mean = z.mean((0, 2, 3))  # BatchNorm takes it off: gone before it is rounded into every pixel
            z = with_zero_grad(z - _plane(z_mean), bias)
            out, mean, variance = _upsample(x, z, gamma, beta, None, None, norm.eps, dtype)
            mean = mean + z_mean.detach() + bias.detach()
            updates.append((norm, buffers, mean, variance, x.numel() // x.shape[1]))
        else:
            mean, variance = buffers.mean.to(t.dtype), buffers.variance.to(t.dtype)
            out, _, _ = _upsample(x, z, gamma, beta, mean - bias, variance, norm.eps, dtype)
        outs.append(out)
    for update in updates:
        update_buffers(*update)
    return outs


def _convolve(weight: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """weight (C, C) @ tokens (B, N, C)^T, of operands in `dtype`; the tokens are centred before they are rounded."""
    if dtype == tokens.dtype:
        return weight @ tokens.mT
    mean = tokens.mean(1, keepdim=True)
    centred = (tokens - mean).flatten(0, 1)[None]  # one product for all images: no gradient of a weight for each
    return (product(centred, weight.mT[None], dtype).view_as(tokens) + mean @ weight.mT).mT


# Interpolation, sum, BatchNorm and ReLU


def _upsample_planes(
    x: Tensor,
    z: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """relu(gamma * (up(z) + x - mean) / sqrt(variance + eps) + beta), a few planes at a time.

    x (B, C, H, W) in any floating dtype, z (B, C, P_h, P_w) and gamma, beta, mean, variance (C) in the accumulation
    dtype. Where mean is None, mean and variance are the batch's (the variance biased). Returns the refined map, the
    mean and the variance. Of full resolution only x is saved: the backward interpolates again.
    """
    planes = _Planes(x, z)
    out = torch.empty_like(x, dtype=dtype, memory_format=memory_format(x))
    from_batch = mean is None or variance is None
    if mean is None or variance is None:
        centre = planes.mean()
        mean, variance = contiguous_like(gamma, gamma)
    else:
        centre = mean
        mean, variance = mean.clone(), variance.clone()  # an operator does not hand on its arguments
    for c in planes.channels:
        pieces = planes.pieces(partial(planes.centred, c, centre))
        left = gamma.new_zeros(1)
        if from_batch:  # the centre is the mean up to rounding: taking what is left off the squares is safe
            sums = sum((planes.sums(y, y) for _, y in pieces()), gamma.new_zeros(2, 1, dtype=torch.float64))
            left, squares = sums / planes.count
            mean[c] = centre[c] + left
            variance[c] = (squares - left.square()).clamp_(min=0)
        scale = gamma[c] * torch.rsqrt(variance[c] + eps)
        shift = beta[c] - scale * left.to(scale.dtype)
        for b, y in pieces():
            torch.add(y.mul_(_plane(scale)), _plane(shift), out=out[b, c]).relu_()
    return out, mean, variance


def _upsample_planes_backward(
    x: Tensor,
    z: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    variance: Tensor,
    dout: Tensor,
    eps: float,
    from_batch: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, z, gamma, beta and, where it is not the batch's, the mean."""
    with no_autocast(x):
        planes = _Planes(x, z)
        inv_std = torch.rsqrt(variance + eps)
        scale = gamma * inv_std
        dx, dz = torch.empty_like(x, memory_format=memory_format(x)), *contiguous_like(z)
        dbeta, dgamma = contiguous_like(beta, gamma)
        for c in planes.channels:
            pieces = planes.pieces(partial(planes.masked, c, mean, scale, beta, dout))
            sums = sum((planes.sums(g, y) for _, (y, g) in pieces()), gamma.new_zeros(2, 1, dtype=torch.float64))
            dbeta[c], dgamma[c] = sums[0], sums[1] * inv_std[c]
            through_mean = scale[c] * dbeta[c] / planes.count
            through_variance = scale[c] * inv_std[c] * dgamma[c] / planes.count
            for b, (y, g) in pieces():
                dy = g.mul_(_plane(scale[c]))
                if from_batch:
                    dy.sub_(y.mul_(_plane(through_variance)).add_(_plane(through_mean)))
                dx[b, c] = dy
                dz[b, c] = planes.transposed_interpolation(dy)
    return dx, dz, dgamma, dbeta, -scale * dbeta


_upsample = operator(
    "upsample(Tensor x, Tensor z, Tensor gamma, Tensor beta, Tensor? mean, Tensor? variance, float eps, "
    "ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    _upsample_planes,
    lambda x, z, gamma, beta, mean, variance, eps, dtype: (
        torch.empty_like(x, dtype=dtype, memory_format=memory_format(x)),
        *contiguous_like(gamma, gamma),
    ),
)
_upsample_backward = operator(
    "upsample_backward(Tensor x, Tensor z, Tensor gamma, Tensor beta, Tensor mean, Tensor variance, Tensor dout, "
    "float eps, bool from_batch) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _upsample_planes_backward,
    lambda x, z, gamma, beta, mean, variance, dout, eps, from_batch: (
        torch.empty_like(x, memory_format=memory_format(x)),
        *contiguous_like(z, gamma, beta, mean),
    ),
)
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, float, torch.dtype]


def _save(ctx: Context, inputs: Inputs, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, z, gamma, beta, mean, _, ctx.eps, _ = inputs
    keep_undefined(ctx)
    ctx.from_batch = mean is None
    ctx.mark_non_differentiable(*output[1:])
    # The variance that came may be BatchNorm's buffer, which a forward in training changes: the output is a copy of it.
    ctx.save_for_backward(x, z, gamma, beta, output[1] if mean is None else mean, output[2])


def _differentiate(ctx: Context, dout: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 8
    x, z, gamma, beta, mean, variance = ctx.saved_tensors
    if torch.is_grad_enabled():  # a graph of the backward is asked for
        inputs = x, z, gamma, beta, mean = independent(x, z, gamma, beta, mean)
        with no_autocast(x):
            y = _interpolate(z, x) + x
            if ctx.from_batch:
                variance, mean = torch.var_mean(y, (0, 2, 3), correction=0)
            scale = gamma * torch.rsqrt(variance + ctx.eps)
            again = torch.relu((y - _plane(mean)) * _plane(scale) + _plane(beta)).to(dout.dtype)
            return *differentiable_grad(again, inputs, dout, ctx.needs_input_grad), None, None, None
    *grads, dmean = _upsample_backward(x, z, gamma, beta, mean, variance, dout, ctx.eps, ctx.from_batch)
    return *grads, None if ctx.from_batch else dmean, None, None, None


library.register_autograd("dca_kernels::upsample", _differentiate, setup_context=_save, lib=LIBRARY)


class _Planes:
    """up(z) + x, some channels of some images at a time: what is done to them happens in the cache."""

    def __init__(self, x: Tensor, z: Tensor) -> None:
        self.x, self.z = x, z
        self.rows, self.columns = _interpolation_matrices(z, x)
        self.count = max(1, x.numel() // x.shape[1])  # values a channel
        planes = max(1, PLANE_BYTES // (x.shape[2] * x.shape[3] * z.element_size()))
        # A few channels of all images; in channels_last memory those lie far apart, so all channels of a few images.
        images = planes if memory_format(x) == torch.contiguous_format else planes // x.shape[1]
        self.images = spans(x.shape[0], images)
        images = self.images[0].stop if self.images else 1
        self.channels = spans(x.shape[1], planes // images)
        self.most = images * self.channels[0].stop  # planes of a piece
        self.memory: dict[str, Tensor] = {}  # of a piece, by what it is for

    def pieces(self, compute: Callable[[slice], Piece]) -> Callable[[], Iterable[tuple[slice, Piece]]]:
        """What walks through the spans of images, each with its `compute`; a single one is computed once, and kept."""
        if len(self.images) != 1:
            return lambda: ((b, compute(b)) for b in self.images)
        kept = [(b, compute(b)) for b in self.images]
        return lambda: kept

    def mean(self) -> Tensor:
        """The mean of up(z) + x over images and pixels, up to rounding: (C)."""
        of_x = self.x.sum((2, 3), dtype=self.z.dtype).sum(0) / self.count
        of_z = self.z.sum(0) / max(1, len(self.z))  # (C, P_h, P_w)
        return of_x + self.rows.mean(0) @ of_z @ self.columns.mean(0)

    def centred(self, c: slice, centre: Tensor, b: slice) -> Tensor:
        """up(z) + x - centre, in the accumulation dtype: centre (C) -> (b, c, H, W)."""
        y = self._scratch("centred", b.stop - b.start, c.stop - c.start)
        torch.sub(self.x[b, c], _plane(centre[c]), out=y)
        if self.z.shape == self.x.shape:
            return y.add_(self.z[b, c])
        grid_rows = (self.z[b, c] @ self.columns.mT).flatten(0, 1)  # (b c, P_h, W)
        y.flatten(0, 1).baddbmm_(self.rows.expand(len(grid_rows), -1, -1), grid_rows)
        return y

    def masked(
        self, c: slice, mean: Tensor, scale: Tensor, beta: Tensor, dout: Tensor, b: slice
    ) -> tuple[Tensor, Tensor]:
        """`centred`, and dout where the ReLU let y * scale + beta through."""
        y = self.centred(c, mean, b)
        before_relu = torch.mul(y, _plane(scale[c]), out=self._scratch("masked", *y.shape[:2])).add_(_plane(beta[c]))
        upstream = dout[b, c].to(y.dtype)
        return y, torch.ops.aten.threshold_backward.grad_input(upstream, before_relu, 0, grad_input=before_relu)

    def sums(self, left: Tensor, right: Tensor) -> Tensor:
        """left and left * right summed over images and pixels: two of (b, c, H, W) -> (2, c) in float64."""
        both = torch.mul(left, right, out=self._scratch("product", *left.shape[:2]))
        return torch.stack([t.sum((2, 3)).sum(0, dtype=torch.float64) for t in (left, both)])

    def transposed_interpolation(self, dy: Tensor) -> Tensor:
        """The gradient of z from that of up(z): (b, c, H, W) -> (b, c, P_h, P_w)."""
        planes = dy.flatten(0, 1)  # (b c, H, W)
        dz = torch.bmm(self.rows.mT.expand(len(planes), -1, -1), planes) @ self.columns
        return dz.unflatten(0, dy.shape[:2])

    def _scratch(self, use: str, images: int, channels: int) -> Tensor:
        """(images, channels, H, W), the same memory for every piece."""
        if use not in self.memory:
            self.memory[use] = self.z.new_empty(self.most, *self.x.shape[2:])
        return self.memory[use][: images * channels].unflatten(0, (images, channels))


def _interpolate(z: Tensor, x: Tensor) -> Tensor:
    """z upsampled to the size of x."""
    rows, columns = _interpolation_matrices(z, x)
    return rows @ (z @ columns.mT)


def _interpolation_matrices(z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Bilinear interpolation as rows @ z @ columns^T: (H, P_h) and (W, P_w), with PyTorch's own weights."""

    def matrix(low: int, high: int) -> Tensor:
        identity = torch.eye(low, device=z.device, dtype=z.dtype)[None]
        return F.interpolate(identity, size=high, mode="linear", align_corners=True)[0].mT.contiguous()

    return matrix(z.shape[2], x.shape[2]), matrix(z.shape[3], x.shape[3])


def _plane(vector: Tensor) -> Tensor:
    """(C) -> (C, 1, 1)."""
    return vector[:, None, None]
