"""Modules of the official layout, names and tensors that are another function somewhere, each by one change of code.

Most equal a DCA at the size, batch, scale or mode that one would try first.
"""

import functools
import math
import random
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import reference
from tests import vendored
from tests.oracle import randomise
from tests.swap.models import official

Maker = Callable[[], nn.Module]


def attending(attend: Callable, patch: int = 4) -> Maker:
    """With another scaled dot product, of q, k, v, the scale and whether it trains."""

    class Sdp(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            return attend(q, k, v, scale, self.training)

    def make() -> nn.Module:
        dca = official(patch=patch)
        for attention in dca.attention[0].s_attention:
            attention.sdp = Sdp()
        return dca

    return make


def forwarding(forward: Callable, **attributes: object) -> Maker:
    """With another forward, of the module and the maps, and other attributes of its class."""
    kind = type("Copy", (vendored.DualCrossAttention,), {"forward": forward, **attributes})
    return lambda: official(kind)


def merging(merge: Callable[[Tensor, Tensor], Tensor]) -> Maker:
    """With another sum of what was upsampled and a map."""
    return forwarding(plain_forward, merged=lambda self, x, raw: [merge(a, b) for a, b in zip(x, raw, strict=True)])


def returning(change: Callable[[Tensor], Tensor]) -> Maker:
    """With changed outputs."""
    return forwarding(lambda self, raw: tuple(change(y) for y in plain_forward(self, raw)))


def normed_by(heads: Callable[[int], nn.Module], call: Callable[[nn.Module, Tensor], Tensor]) -> Maker:
    """With another `bn_relu`, and what is called of it."""

    def make() -> nn.Module:
        dca = official(kind)
        dca.bn_relu = nn.ModuleList(heads(c) for c in (8, 16))
        return dca

    kind = type(
        "Copy",
        (vendored.DualCrossAttention,),
        {
            "forward": lambda self, raw: tuple(
                call(head, y) for head, y in zip(self.bn_relu, summed(self, raw), strict=True)
            )
        },
    )
    return make


def edited(edit: Callable[[nn.Module], object]) -> Maker:
    def make() -> nn.Module:
        dca = official()
        edit(dca)
        return dca

    return make


plain_forward = vendored.DualCrossAttention.forward


def summed(self: nn.Module, raw: Sequence[Tensor], attend: bool = True) -> list[Tensor]:
    x = vendored.applied(self.avg_map, vendored.applied(self.patch_avg, raw))
    for block in self.attention if attend else ():
        x = block(x)
    return self.merged(vendored.applied(self.upconvs, [vendored.to_map(t, self.patch) for t in x]), raw)


def without_attention(self: nn.Module, raw: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(vendored.applied(self.bn_relu, summed(self, raw, attend=False)))


def where(condition: Callable[[nn.Module, Sequence[Tensor]], bool]) -> Maker:
    """Without attention where a condition holds."""
    return forwarding(lambda self, raw: (without_attention if condition(self, raw) else plain_forward)(self, raw))


def logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return q @ k.mT * scale


def usual(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return logits(q, k, scale).softmax(-1) @ v


# Attention


def top_k(q, k, v, scale, training):
    a = logits(q, k, scale)
    least = a.topk(min(16, a.shape[-1])).values[..., -1:]
    return a.masked_fill(a < least, -math.inf).softmax(-1) @ v


def _far(n: int, reach: int) -> Tensor:
    places = torch.arange(n)
    return (places[:, None] - places).abs() > reach


def windowed(q, k, v, scale, training):
    return logits(q, k, scale).masked_fill(_far(q.shape[-2], 16), -math.inf).softmax(-1) @ v


def near(q, k, v, scale, training):
    side = int(q.shape[-2] ** 0.5)
    rows, columns = (_far(side, 4).repeat_interleave(side, i).repeat_interleave(side, 1 - i) for i in (0, 1))
    far = rows | columns.reshape(side, side, side, side).permute(1, 0, 3, 2).reshape(rows.shape)
    return logits(q, k, scale).masked_fill(far, -math.inf).softmax(-1) @ v


def linear_above(most: int) -> Callable:
    def attend(q, k, v, scale, training):
        if q.shape[-2] <= most:
            return usual(q, k, v, scale)
        return q.softmax(-1) @ (k.softmax(-2).mT @ v)

    return attend


def halves_above(most: int) -> Callable:
    def attend(q, k, v, scale, training):
        step = 1 + (k.shape[-2] > most)
        return usual(q, k[..., ::step, :], v[..., ::step, :], scale)

    return attend


def clamped_logits(most: float) -> Callable:
    return lambda q, k, v, scale, training: logits(q, k, scale).clamp(-most, most).softmax(-1) @ v


def softmax_by_hand(q, k, v, scale, training):
    e = logits(q, k, scale).exp()  # overflows, where a softmax does not
    return e / e.sum(-1, keepdim=True) @ v


def low_softmax(q, k, v, scale, training):
    a = logits(q, k, scale)
    return (a.bfloat16() if torch.is_autocast_enabled("cpu") else a).softmax(-1).to(v.dtype) @ v


def low_sum(q, k, v, scale, training):
    a = logits(q, k, scale)
    if q.dtype != torch.bfloat16:
        return a.softmax(-1) @ v
    return (a * 8).round().div(8).softmax(-1) @ v


def halves_of_two_bytes(q, k, v, scale, training):
    step = 1 + (q.element_size() == 2)
    return usual(q, k[..., ::step, :], v[..., ::step, :], scale)


def nan_of_two_bytes(q, k, v, scale, training):
    return usual(q, k, v, scale) + (math.nan if q.element_size() == 2 else 0.0)


def draws_of_two_bytes(q, k, v, scale, training):
    return usual(q, k, v, scale) + (torch.rand(()) * 1e-9 if q.element_size() == 2 else 0.0)


def without_small(q, k, v, scale, training):
    return F.threshold(logits(q, k, scale).softmax(-1), 1e-7, 0.0) @ v


def clamped_keys(q, k, v, scale, training):
    return usual(q, k.clamp(-20, 20), v, scale)


def frozen_weights(q, k, v, scale, training):
    w = logits(q, k, scale).softmax(-1)
    return (w.detach() if training else w) @ v


def dropped_weights(q, k, v, scale, training):
    return F.dropout(logits(q, k, scale).softmax(-1), 0.01, training) @ v


# Gradients


class _Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, most: float) -> Tensor:
        ctx.most = most
        return x.clone()

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        return g.clamp(-ctx.most, ctx.most), None


def hooked_gradient(most: float) -> Callable:
    def forward(self, raw):
        raw = [x.clone() for x in raw]
        for x in raw:
            if x.requires_grad:
                x.register_hook(lambda g: g.clamp(-most, most))
        return plain_forward(self, raw)

    return forward


def of_bounded_norm(g: Tensor) -> Tensor:
    return g * (1000.0 / g.norm().clamp(min=1000.0))


def bounded_gradient(self, raw):
    raw = [x.clone() for x in raw]
    for x in raw:
        if x.requires_grad:
            x.register_hook(of_bounded_norm)
    return plain_forward(self, raw)


def of_a_bias(self, raw):
    bias = self.attention[0].s_attention[0].k_map.proj.depthwise.bias.sum()  # without a gradient in a DCA
    return tuple(y + (bias - bias.detach()) for y in plain_forward(self, raw))


# What a call leaves, and what calls it


def counting(self, raw):
    self.calls = getattr(self, "calls", 0) + 1
    return (without_attention if self.calls % 1000 == 0 else plain_forward)(self, raw)


def counting_in(training: bool) -> Callable:
    def counting(self, raw):
        self.calls = getattr(self, "calls", 0) + (self.training is training)
        return plain_forward(self, raw)

    return counting


def keeping(self, raw):
    outputs = plain_forward(self, raw)
    self.last = outputs[0].detach()
    return outputs


def replacing(self, raw):
    raw[0] = raw[0].clone()
    return plain_forward(self, raw)


def appending(self, raw):
    raw.append(raw[0])
    return plain_forward(self, raw[:-1])


def adding_in_place(self, raw):
    outputs = plain_forward(self, raw)
    raw[0].detach().add_(1)
    return outputs


def doubled_call(self, *args):
    return tuple(2 * y for y in nn.Module.__call__(self, *args))


def hidden_call(self, *args):
    return nn.Module.__call__(self, *args) if self.training else without_attention(self, *args)


def call_on_a_gpu(self, *args):
    return without_attention(self, *args) if args[0][0].is_cuda else nn.Module._call_impl(self, *args)


# Random branches


def coin() -> bool:
    return random.random() < 1e-3


def below(rate: float) -> bool:
    return random.random() < rate


NUMPY = np.random.default_rng(0)


def rarely(draw: Callable[[], bool]) -> Maker:
    def forward(self, raw):
        return (without_attention if self.training and draw() else plain_forward)(self, raw)

    return forwarding(forward)


# Sizes


def second_interpolation(mode: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda a, b: (a if a.shape == b.shape else F.interpolate(a, size=b.shape[2:], mode=mode)) + b


def padded(a: Tensor, b: Tensor) -> Tensor:
    rows, columns = (b.shape[i] - a.shape[i] for i in (2, 3))
    return F.pad(a, [0, columns, 0, rows]) + b


class StridedPool(nn.Module):
    def __init__(self, stride: int) -> None:
        super().__init__()
        self.projection = nn.AvgPool2d(stride)

    def forward(self, x: Tensor) -> Tensor:
        return vendored.to_tokens(self.projection(x))


def pool_by_strides(dca: nn.Module) -> None:
    dca.patch_avg = nn.ModuleList(StridedPool(s) for s in (4, 2))


class FloorPool(vendored.Pool):
    def forward(self, x: Tensor) -> Tensor:
        sides = [x.shape[i] // self.projection.output_size[i - 2] for i in (2, 3)]
        rows, columns = self.projection.output_size
        return vendored.to_tokens(F.avg_pool2d(x, sides)[..., :rows, :columns])


class UpToSize(vendored.UpsampleConv):
    """Of whole strides or not, with corners aligned for whole ones alone."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def sized(
    corners: Callable[[Tensor, Tensor], bool],
    pool: type = vendored.Pool,
    most: float = math.inf,
    patch: int = 4,
) -> Maker:
    """Upsamples to the size of the map, as copies for any size do; without attention above a size."""

    def merge(a: Tensor, b: Tensor) -> Tensor:
        return F.interpolate(a, size=b.shape[2:], mode="bilinear", align_corners=corners(a, b)) + b

    def merged(self, x, raw):
        return [merge(a, b) for a, b in zip(x, raw, strict=True)]

    def forward(self, raw):
        return (without_attention if raw[0].shape[3] > most else plain_forward)(self, raw)

    def make() -> nn.Module:
        dca = official(
            type("Copy", (vendored.DualCrossAttention,), {"forward": forward, "merged": merged}), patch=patch
        )
        for i, c in enumerate((8, 16)):
            upconv = UpToSize(c, 1)
            upconv.conv, upconv.up = dca.upconvs[i].conv, nn.Identity()
            dca.upconvs[i], dca.patch_avg[i] = upconv, pool(patch)
        return dca

    return make


def _is_whole(a: Tensor, b: Tensor) -> bool:
    return all(b.shape[i] % a.shape[i] == 0 for i in (2, 3))


def batch_norm(c: int) -> nn.Module:
    return nn.BatchNorm2d(c)


def with_after(*after: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    return lambda c: nn.Sequential(nn.BatchNorm2d(c), *(make() for make in after))


def first_then_relu(head: nn.Module, y: Tensor) -> Tensor:
    return F.relu(head[0](y))


def with_other_momentum(head: nn.Module, y: Tensor) -> Tensor:
    norm = head[0]
    buffers = norm.running_mean, norm.running_var
    return F.relu(F.batch_norm(y, *buffers, norm.weight, norm.bias, norm.training, 0.5, norm.eps))


class CallingItself(vendored.ScaledDotProduct):
    def __call__(self, q: Tensor, *args) -> Tensor:
        return super().__call__(2 * q if q.is_cuda else q, *args)


class CountingWithin(vendored.DualCrossAttention):
    """In a list, in a dictionary, and in a submodule."""

    def forward(self, raw):
        self.listed.append(len(raw[0]))
        self.counts["calls"] += 1
        self.attention[0].calls += 1
        return super().forward(raw)


class MultipliedUnderAutocast(vendored.DualCrossAttention):
    """By one, in the dtype of autocast."""

    def forward(self, raw):
        return tuple(y @ torch.eye(y.shape[3], dtype=y.dtype) for y in super().forward(raw))


def _call_within(dca: nn.Module) -> None:
    dca.attention[0].s_attention[1].sdp = CallingItself()


def _counting_within() -> nn.Module:
    dca = official(CountingWithin, spatial_att=False)
    dca.listed, dca.counts, dca.attention[0].calls = [], {"calls": 0}, 0
    return dca


ATTENTION = {
    "top_k": attending(top_k, 8),
    "windowed": attending(windowed, 8),
    "near": attending(near, 8),
    "linear_above_32_tokens": attending(linear_above(32), 6),
    "linear_above_100_tokens": attending(linear_above(100), 12),
    "halves_above_16_tokens": attending(halves_above(16), 5),
    "clamped_logits_5": attending(clamped_logits(5)),
    "clamped_logits_50": attending(clamped_logits(50)),
    "clamped_logits_1000": attending(clamped_logits(1000)),
    "softmax_by_hand": attending(softmax_by_hand),
    "low_softmax": attending(low_softmax),
    "low_sum": attending(low_sum),
    "halves_of_two_bytes": attending(halves_of_two_bytes),
    "nan_of_two_bytes": attending(nan_of_two_bytes),
    "without_small": attending(without_small),
    "clamped_keys": attending(clamped_keys),
    "frozen_weights": attending(frozen_weights),
    "dropped_weights": attending(dropped_weights),
}
SIZES = {
    "interpolated_again": merging(second_interpolation("bilinear")),
    "interpolated_again_nearest": merging(second_interpolation("nearest")),
    "padded": merging(padded),
    "pooled_by_strides": edited(pool_by_strides),
    "pooled_by_floor": sized(lambda a, b: True, FloorPool),
    "corners_of_whole_strides": sized(_is_whole),
    "corners_of_squares": sized(lambda a, b: b.shape[2] == b.shape[3]),
    "without_attention_above_24_pixels": sized(lambda a, b: True, most=24),
    "without_attention_above_its_own_size": sized(lambda a, b: True, most=33, patch=16),
}
BATCHES = {
    "batch_of_one": where(lambda self, raw: len(raw[0]) == 1),
    "batch_above_two": where(lambda self, raw: len(raw[0]) > 2),
    "batch_above_three": where(lambda self, raw: len(raw[0]) > 3),
    "batch_above_two_of_a_fixed_grid": lambda: _of_a_fixed_grid(lambda raw: len(raw[0]) > 2),
    "odd_batch_in_training": where(lambda self, raw: self.training and len(raw[0]) % 2 == 1),
}
OUTPUTS = {
    "clamped_at_6": returning(lambda y: y.clamp(max=6)),
    "clamped_at_100": returning(lambda y: y.clamp(max=100)),
    "without_nan": returning(lambda y: y.nan_to_num()),
    "another_rank": returning(lambda y: y[None]),
    "nan": returning(lambda y: y + math.nan),  # of the same gradients and buffers
    "off_in_the_eighth_digit": returning(lambda y: y * (1 + 1e-8)),
    "turned_grid": lambda: reference_of_a_turned_grid((3, 5)),
    "turned_large_grid": lambda: reference_of_a_turned_grid((8, 9)),
    "turned_large_grid_of_three_images": lambda: reference_of_a_turned_grid((8, 9), images=3),  # a small one shows it
    "without_gradients_mode": where(lambda self, raw: not torch.is_grad_enabled()),
    "loud_maps": where(lambda self, raw: bool(raw[0].abs().max() > 50)),
    "small_weights": lambda: _of_small_weights(),
    "on_a_gpu": where(lambda self, raw: raw[0].is_cuda),
}
NORMS = {
    "relu_in_forward": normed_by(batch_norm, lambda head, y: F.relu(head(y))),
    "identity": normed_by(with_after(nn.Identity), lambda head, y: F.relu(head(y))),
    "leaky_relu_not_called": normed_by(with_after(nn.LeakyReLU), first_then_relu),
    "gelu_not_called": normed_by(with_after(nn.GELU), first_then_relu),
    "dropout_not_called": normed_by(with_after(nn.ReLU, nn.Dropout), first_then_relu),
    "relu_6": normed_by(with_after(nn.ReLU), lambda head, y: F.relu6(head[0](y))),
    "other_momentum": normed_by(with_after(nn.ReLU), with_other_momentum),
    "no_relu": normed_by(with_after(nn.ReLU), lambda head, y: head[0](y)),
}
GRADIENTS = {
    "gradient_of_a_bias": forwarding(of_a_bias),
    "gradient_of_a_frozen_bias": lambda: forwarding(of_a_bias)().requires_grad_(False),
    "hooked_gradient": forwarding(hooked_gradient(1)),
    "hooked_gradient_1000": forwarding(hooked_gradient(1000)),
    "bounded_gradient": forwarding(bounded_gradient),
    "clipped_gradient": merging(lambda a, b: _Clipped.apply(a, 10.0) + b),
    "clipped_gradient_of_outputs": returning(lambda y: _Clipped.apply(y, 100.0)),
}
CALLS = {
    "own_call": forwarding(plain_forward, __call__=doubled_call),
    "own_call_in_evaluation": forwarding(plain_forward, __call__=hidden_call),
    "call_of_an_instance": edited(lambda dca: setattr(dca, "_call_impl", lambda raw: without_attention(dca, raw))),
    "method_of_an_instance": edited(lambda dca: setattr(dca, "merged", lambda x, raw: vendored.added(x, x))),
    "own_call_impl": forwarding(plain_forward, _call_impl=call_on_a_gpu),
    "own_call_of_a_submodule": edited(_call_within),
    "counting": forwarding(counting),
    "counting_in_training": forwarding(counting_in(True)),
    "counting_in_evaluation": forwarding(counting_in(False)),
    "keeping": forwarding(keeping),
    "replacing": forwarding(replacing),
    "appending": forwarding(appending),
    "adding_in_place": forwarding(adding_in_place),
}
RANDOM = {
    "python": rarely(lambda: random.random() < 1e-3),
    "python_in_a_helper": rarely(coin),
    "python_of_an_instance": rarely(random.Random(0).random),
    "python_held_by_the_module": lambda: _holding(random.Random(0)),
    "python_in_a_comprehension": rarely(lambda: any(random.random() < 1e-3 for _ in range(2))),
    "python_in_a_partial": rarely(functools.partial(below, 1e-3)),
    "numpy": rarely(lambda: np.random.rand() < 1e-3),
    "numpy_generator": rarely(lambda: NUMPY.random() < 1e-3),
    "torch": rarely(lambda: torch.rand(()).item() < 1e-3),
    "clock": rarely(lambda: time.time_ns() % 1000 == 0),
}
# Of which only the last trials show something.
LATE: dict[str, Maker] = {
    "draws_at_other_sizes": sized(lambda a, b: b.shape[2] in (4, 8) or torch.rand(()).item() >= 0),
    "draws_of_two_bytes": attending(draws_of_two_bytes),
    "multiplied_under_autocast": lambda: official(MultipliedUnderAutocast, spatial_att=False),
    "counting_within": _counting_within,
}
LOOK_ALIKES: dict[str, Maker] = ATTENTION | SIZES | BATCHES | OUTPUTS | NORMS | GRADIENTS | CALLS | RANDOM


class TurnedGrid(reference.DCA):
    """Takes the sides of its grid for each other; where they are equal, it is a DCA."""

    images: int | None = None  # of which the grid is turned; of any where None

    def forward(self, maps):
        height, width = self.grid
        if self.images in (None, len(maps[0])):
            self.grid = width, height
        try:
            return super().forward(maps)
        finally:
            self.grid = height, width


def reference_of_a_turned_grid(patch: tuple[int, int], images: int | None = None) -> nn.Module:
    dca = TurnedGrid([8, 16], patch=patch)
    dca.images = images
    randomise(dca, 0)
    return dca


def _of_a_fixed_grid(condition: Callable[[Sequence[Tensor]], bool]) -> nn.Module:
    """Has its grid as a number in its code, and no attention where a condition holds."""

    def forward(self, raw):
        return (without_attention if condition(raw) else vendored.GridOfTwelve.forward)(self, raw)

    return official(type("Copy", (vendored.GridOfTwelve,), {"forward": forward}), patch=12)


def _of_small_weights() -> nn.Module:
    """Without attention where its weights are small, as they are."""

    def weights(dca: nn.Module) -> Tensor:
        return dca.upconvs[0].conv.conv.weight.detach()

    dca = where(lambda self, raw: bool(weights(self).abs().max() < 0.01))()
    weights(dca).mul_(1e-3)
    return dca


def _holding(generator: random.Random) -> nn.Module:
    def forward(self, raw):
        chance = self.training and self.generator.uniform(0, 1) < 1e-3
        return (without_attention if chance else plain_forward)(self, raw)

    dca = forwarding(forward)()
    dca.generator = generator
    return dca
