"""Hypothesis strategies: any module, any call of it, and what its results are checked against."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from reference.budget import DOUBLE, Error, allowed, off_the_kink, used
from tests.oracle import (
    LAYOUTS,
    Config,
    Results,
    assert_all_within_budget,
    assert_errors_allowed,
    assert_identical,
    build,
    device_of,
    random_like,
    random_maps,
    randomise,
    resized_blocks,
)

STEPS = 64  # of rounding, that float64's inputs are nudged by: a sum of them then has another rounding of its own
NUDGES = 4  # of float64, since what one changes may be little by luck
CONDITION = 16.0  # times the most that they change, float64 may be off
CANCELS = 1e-13  # of the largest gradient: what float64 leaves of one that is exactly zero
FEWEST = 8  # values of which a BatchNorm takes the variance: of fewer, it takes away most of what it is given
DRAWS = 16  # a ratio of two errors is luck with one draw: where the first is over its budget, so many decide
ROOM = 4.0  # a float16 result of a quarter of 65,504 may be off by as much as itself, and pass that number
LUCK = 2.0  # budgets: a result may be a few values, and hypothesis looks for what has bad luck
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Norm:
    """How a BatchNorm was made, as `nn.BatchNorm2d` has it, and whether it trains where its module does."""

    affine: bool = True
    track_running_stats: bool = True
    momentum: float | None = 0.1
    train: bool = True


class Draw(NamedTuple):
    """Results by name, of one draw of weights and values.

    Attributes:
        ours, theirs: a backend's and the reference's in the call's dtype.
        exact: the reference's in float64.
        nudged: `exact` with weights, maps and upstream gradients off by a rounding step of float32, once, or NUDGES
            times by some of float64.
    """

    ours: Results
    theirs: Results
    exact: Results
    nudged: Sequence[Results]


@dataclass(frozen=True)
class Call:
    """A module and one call of it, with its backward.

    Attributes:
        config: the module's arguments and the maps' sizes.
        dtype: of parameters and maps.
        train: the mode.
        norms: of each scale.
        inputs: a name of INPUTS.
        layouts, upstream_layouts: of each map, and of each output's gradient; names of LAYOUTS, or "contiguous".
        frozen: groups of leaves that no gradient is asked for, of GROUPS.
        unused: outputs that have no gradient.
        blocks: what the sizes of the kernels' blocks are multiplied by: 0 makes them the smallest that there are.
        seed: of weights and values.
    """

    config: Config
    dtype: str = "float64"
    train: bool = True
    norms: Sequence[Norm] = ()
    inputs: str = "random"
    layouts: Sequence[str] = ()
    upstream_layouts: Sequence[str] = ()
    frozen: frozenset[str] = frozenset()
    unused: frozenset[int] = frozenset()
    blocks: float = 1.0
    seed: int = 0


def _of_maps(change: Callable[[Tensor], object]) -> Callable[[nn.Module, list[Tensor]], None]:
    def change_all(dca: nn.Module, maps: list[Tensor]) -> None:
        for x in maps:
            if x.numel():
                change(x)

    return change_all


def _of_norms(kind: type[nn.Module], factor: float) -> Callable[[nn.Module, list[Tensor]], None]:
    def scale_all(dca: nn.Module, maps: list[Tensor]) -> None:
        for norm in (m for m in dca.modules() if isinstance(m, kind) and m.weight is not None):
            norm.weight.mul_(factor)

    return scale_all


# What is done to weights and maps before a call.
INPUTS: dict[str, Callable[[nn.Module, list[Tensor]], None]] = {
    "random": _of_maps(lambda x: None),
    "zero_maps": _of_maps(Tensor.zero_),
    "large_mean": _of_maps(lambda x: x.add_(100)),
    "constant_channel": _of_maps(lambda x: x[:, 0].fill_(3.14159)),
    "hot_pixel": _of_maps(lambda x: x[0, 0, 0, 0].fill_(1e4)),
    "quiet": _of_maps(lambda x: x.mul_(1e-3)),
    "loud": _of_maps(lambda x: x.mul_(100)),
    "zero_gamma": _of_norms(nn.BatchNorm2d, 0.0),
    "raised_affine": _of_norms(nn.LayerNorm, 3.0),
    "large_affine": _of_norms(nn.LayerNorm, 8.0),
}
LARGE = {"large_mean", "hot_pixel", "loud"}  # values of 100 and more
GROUPS = {"embedding": "avg_map.", "attention": "attention.", "upsampling": "upconvs.", "norms": "bn_relu."}
PLAIN = "contiguous"
LARGEST = {"torch": 24, "triton": 11}  # side of a map that a backend takes no longer than seconds for


@st.composite
def calls(draw: st.DrawFn, backend: str, largest: int) -> Call:
    """Any call that a backend takes.

    Args:
        draw: hypothesis' own.
        backend: the kernels' blocks may be smaller.
        largest: side of a map.
    """
    count, unit = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 4]))
    widest = draw(st.sampled_from([6, 6, 24]))  # of the wide ones, a scale fills several blocks of channels
    heads = st.sampled_from([h for h in (1, 2, 3, 4) if unit % h == 0])
    layout, side = st.sampled_from([PLAIN, *LAYOUTS]), st.integers(1, largest)
    norm = st.builds(Norm, st.booleans(), st.booleans(), st.sampled_from([0.1, None, 0.0, 1.0, 0.7]), st.booleans())
    # Three are drawn, whatever their count: where a call that fails has fewer, all else of it stays.
    scale = st.tuples(
        st.integers(1, widest), st.tuples(side, side), heads, heads, st.just(Norm()) | norm, layout, layout
    )
    scales = draw(st.lists(scale, min_size=3, max_size=3))[:count]
    multiples, *others = map(list, zip(*scales, strict=True))
    sizes, channel_head, spatial_head, norms, of_maps, of_upstream = others
    features = tuple(k * unit for k in multiples)
    train, batch = draw(st.booleans()), draw(st.integers(0, 3))
    for i, (height, width) in enumerate(sizes):
        if 0 < batch * height * width < FEWEST and (train or not norms[i].track_running_stats):
            sizes[i] = (height + FEWEST, width)
    dtype = draw(st.sampled_from([*DTYPES]))
    inputs = [name for name in INPUTS if (dtype, name) != ("float16", "hot_pixel")]  # its variance is beyond float16
    if 1 in features:  # a LayerNorm takes all of it away, but for rounding at 1000 times its size
        inputs = [name for name in inputs if name not in LARGE]
    chosen = draw(st.sampled_from(inputs))
    for i, name in enumerate(of_maps):  # of a constant channel, a BatchNorm without a bias makes zeros and noise
        if chosen in ("zero_maps", "constant_channel") or name.startswith("expanded"):
            norms[i] = replace(norms[i], affine=True)
    return Call(
        Config(
            features=features,
            patch=draw(st.tuples(st.integers(1, 5), st.integers(1, 6))),
            channel_att=draw(st.booleans()),
            spatial_att=draw(st.booleans()),
            n=draw(st.integers(1, 3)),
            channel_head=tuple(channel_head),
            spatial_head=tuple(spatial_head),
            sizes=tuple(sizes),
            batch=batch,
        ),
        dtype=dtype,
        train=train,
        norms=tuple(norms),
        inputs=chosen,
        layouts=tuple(of_maps),
        upstream_layouts=tuple(of_upstream),
        frozen=draw(st.just(frozenset()) | st.frozensets(st.sampled_from(["maps", *GROUPS]))),
        unused=draw(st.just(frozenset()) | st.frozensets(st.integers(0, count - 1))),
        blocks=draw(st.sampled_from([1.0, 0.5, 0.0])) if backend == "triton" else 1.0,
        seed=draw(st.integers(0, 2**31)),
    )


# What a call's results are checked against


def check(call: Call, backend: str) -> dict[str, float]:
    """Assert that outputs, gradients and buffers are the reference's, by the error budget of reference/budget.py.

    A gradient is None exactly where the reference's is. Where one draw of weights and values is over its budget, DRAWS
    of them decide: see `assert_errors_allowed`. They measure the reference by `_uncertain`.

    Returns:
        The part of its budget that the first draw's largest error is, for each kind of result. Float64 has no reference
        to compare with: there it is the part of what `_allowed_of_double` allows.
    """
    draw = run(call, backend)
    counters = [name for name in draw.exact if name.endswith("num_batches_tracked")]
    for name in counters:
        assert torch.equal(draw.ours[name], draw.exact[name]), name
    double = call.dtype == "float64"
    has_budget = partial(_has_budget, backend=backend)
    parts = _parts_of_double(draw) if double else parts_used(draw, DTYPES[call.dtype]) if has_budget(draw) else {}
    if any(part > 1 for part in parts.values()):
        draws = [draw, *(run(replace(call, seed=call.seed + k), backend) for k in range(1, DRAWS))]
        if double:
            _assert_near(draws)
        else:
            results = [(of.ours, _uncertain(of), of.exact) for of in filter(has_budget, draws)]
            assert_all_within_budget(results, DTYPES[call.dtype], LUCK)
    return parts


def check_that_nothing_is_left(calls: Sequence[Call], backend: str) -> None:
    """Assert that calls have the same bits behind each other as they have alone: from the first to the last, and back.

    Args:
        calls: of one module: its arguments and its norms are the same.
        backend: its plans are forgotten before.
    """
    alone = []
    for call in calls:
        _forget_plans(backend)
        alone.append(_evaluate_again(call, _module(call, backend), backend))
    for order in (range(len(calls)), reversed(range(len(calls)))):
        _forget_plans(backend)
        module = _module(calls[0], backend)
        for n in order:
            assert_identical(_evaluate_again(calls[n], module, backend), alone[n])


def _forget_plans(backend: str) -> None:
    if backend == "triton":
        from dca_kernels.triton_backend import eager  # there may be no Triton

        eager._forwards.clear()


def _evaluate_again(call: Call, dca: nn.Module, backend: str) -> Results:
    """A call of a module that has made others: it has the weights of this one, in place."""
    dtype, maps = DTYPES[call.dtype], random_maps(call.config, torch.float32, call.seed)
    dca.zero_grad()  # before `to`, which would convert what the call before has returned
    dca.to(dtype)
    _set_mode(call, dca)
    randomise(dca, call.seed)
    with torch.no_grad():
        INPUTS[call.inputs](dca, maps)
    maps = [x.to(device_of(backend), dtype) for x in maps]
    upstream = random_like(maps, call.seed)
    laid_out = [
        [_laid_out(x, layout) for x, layout in zip(tensors, layouts, strict=True)]
        for tensors, layouts in ((maps, call.layouts), (upstream, call.upstream_layouts))
    ]
    return _evaluate(call, dca, *laid_out)


def _has_budget(draw: Draw, backend: str) -> bool:
    """Whether all results are finite. Ours have to be, where their dtype has numbers well beyond theirs.

    The kernels' have to be where the reference's all are: a gradient between two blocks is in the tokens' dtype, and
    may pass its largest number where no result does.
    """
    their_finite = all(t.isfinite().all() for t in draw.theirs.values())
    if their_finite or backend == "torch":
        for name, value in draw.ours.items():
            most = torch.finfo(value.dtype).max / ROOM if value.is_floating_point() else math.inf
            assert value[draw.exact[name].abs() < most].isfinite().all(), f"{name}: not finite"
    return their_finite and all(t.isfinite().all() for t in draw.ours.values())


def _uncertain(draw: Draw) -> Results:
    """The reference's results, but where its rounding cancels to less than one step of float32 of all that goes in
    makes: there, the exact ones with that step. An exact zero would leave no budget for the order of sums.
    """
    found = {}
    for name, exact in draw.exact.items():
        theirs, nudged = draw.theirs[name].double(), draw.nudged[0][name].double()
        found[name] = torch.where((theirs - exact).abs() < (nudged - exact).abs(), nudged, theirs)
    return found


def _allowed_of_double(draw: Draw) -> dict[str, float]:
    """What float64 results may be off by: DOUBLE of each tensor's largest value, and CONDITION times what nudging
    changes.
    """
    noise = CANCELS * max(_largest(t) for name, t in draw.exact.items() if name.startswith("grad"))
    return {
        name: DOUBLE * _largest(value)
        + CONDITION * max(_largest(nudged[name] - value) for nudged in draw.nudged)
        + (noise if name.startswith("grad") else 0.0)
        for name, value in draw.exact.items()
    }


def _errors(draw: Draw) -> dict[str, float]:
    """The largest of each result."""
    return {name: _largest(draw.ours[name] - value) for name, value in draw.exact.items()}


def _parts_of_double(draw: Draw) -> dict[str, float]:
    errors, most = _errors(draw), _allowed_of_double(draw)
    parts: dict[str, float] = defaultdict(float)
    for kind, name in _by_kind(draw):
        parts[kind] = max(parts[kind], *used(Error(errors[name], errors[name]), Error(most[name], most[name])))
    return parts


def _assert_near(draws: Sequence[Draw]) -> None:
    """Float64 results are as near as `_allowed_of_double` has it, in the mean of the draws."""
    errors, most = map(_errors, draws), map(_allowed_of_double, draws)
    of_draws = list(zip(errors, most, strict=True))
    for _, name in _by_kind(draws[0]):
        pairs = [[Error(of[name], of[name]) for of in both] for both in of_draws]
        assert_errors_allowed(*zip(*pairs, strict=True), name=name)


def _largest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


def run(call: Call, backend: str) -> Draw:
    """One draw of weights and values."""
    config, dtype = call.config, DTYPES[call.dtype]
    maps, source = random_maps(config, torch.float32, call.seed), _module(call, "reference")
    randomise(source, call.seed)
    with torch.no_grad():
        INPUTS[call.inputs](source, maps)
    state = source.to(dtype).state_dict()
    nudges = NUDGES if dtype == torch.float64 else 1
    kinds = ((backend, dtype), ("reference", dtype), *[("reference", torch.float64)] * (2 + nudges))
    modules = [_module(call, name).to(device_of(backend), its) for name, its in kinds]
    for dca in modules:
        dca.load_state_dict(state)
    ours, theirs, exact, probe, *nudged = modules
    maps = [x.to(device_of(backend), dtype) for x in maps]
    maps = [_laid_out(x, layout) for x, layout in zip(maps, call.layouts, strict=True)]
    exact_maps = [x.double() for x in maps]
    smooth = off_the_kink(probe, exact_maps, [torch.ones_like(x) for x in exact_maps])
    of_scales = zip(random_like(exact_maps, call.seed), smooth, call.upstream_layouts, strict=True)
    upstream = [_upstream(g.to(dtype), where, layout) for g, where, layout in of_scales]
    plain = [x.clone(memory_format=torch.contiguous_format) for x in maps], [g.contiguous() for g in upstream]
    of_exact = exact_maps, [g.double() for g in upstream]
    with resized_blocks(call.blocks) if call.blocks < 1 else nullcontext():
        results = _evaluate(call, ours, maps, upstream)
    baseline, expected = _evaluate(call, theirs, *plain), _evaluate(call, exact, *of_exact)
    of_one = sorted(results.keys() ^ baseline.keys())
    assert not of_one, f"of ours alone, or of the reference's: {of_one}"
    step = STEPS * torch.finfo(dtype).eps if dtype == torch.float64 else torch.finfo(torch.float32).eps
    others = [_evaluate_nudged(call, dca, *of_exact, step, call.seed + k) for k, dca in enumerate(nudged)]
    return Draw(results, baseline, expected, others)


def _module(call: Call, implementation: str) -> nn.Module:
    dca = build(implementation, **call.config.arguments)
    for head, norm, channels in zip(dca.bn_relu, call.norms, call.config.features, strict=True):
        head[0] = nn.BatchNorm2d(channels, 1e-5, norm.momentum, norm.affine, norm.track_running_stats)
    return _set_mode(call, dca)


def _set_mode(call: Call, dca: nn.Module) -> nn.Module:
    frozen = tuple(GROUPS[group] for group in call.frozen if group in GROUPS)
    for name, parameter in dca.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    dca.train(call.train)
    for head, norm in zip(dca.bn_relu, call.norms, strict=True):
        head.train(call.train and norm.train)
    return dca


def _evaluate_nudged(
    call: Call, dca: nn.Module, maps: Sequence[Tensor], upstream: Sequence[Tensor], step: float, seed: int
) -> Results:
    """`_evaluate` where some of the values that go in are off by `step` of them, or of 1: they are added to such."""
    generator = torch.Generator().manual_seed(seed)

    def nudged(t: Tensor) -> Tensor:
        steps = torch.randint(-1, 2, t.shape, generator=generator).to(t)
        return t + t.abs().clamp(min=1.0) * steps * step

    with torch.no_grad():
        for t in (*dca.parameters(), *dca.buffers()):
            if t.is_floating_point():
                t.copy_(nudged(t))
    return _evaluate(call, dca, list(map(nudged, maps)), list(map(nudged, upstream)))


def _laid_out(x: Tensor, layout: str) -> Tensor:
    return x if layout == PLAIN else LAYOUTS[layout](x)


def _upstream(g: Tensor, smooth: Tensor, layout: str) -> Tensor:
    """Zero where the output is near the ReLU's kink: for an element that several share, where one of them is."""
    shared = [dim for dim, step in enumerate(_laid_out(g, layout).stride()) if step == 0 and g.shape[dim] > 1]
    if shared:
        smooth = smooth.amin(shared, keepdim=True)
    return _laid_out(g * smooth.to(g.dtype), layout)


def _evaluate(call: Call, dca: nn.Module, maps: Sequence[Tensor], upstream: Sequence[Tensor]) -> Results:
    """Results by name; gradients that are None are left out.

    The outputs' gradients are among them: what cancels in a gradient of zero has their scale.
    """
    leaves = [x.detach().requires_grad_("maps" not in call.frozen) for x in maps]
    outs = dca(leaves)
    results = {f"output.{i}": y.detach() for i, y in enumerate(outs)}
    results |= {f"grad_output.{i}": g for i, g in enumerate(upstream)}
    pairs = [
        (y, g) for i, (y, g) in enumerate(zip(outs, upstream, strict=True)) if y.requires_grad and i not in call.unused
    ]
    if pairs:
        torch.autograd.backward(*map(list, zip(*pairs, strict=True)))
        gradients = {f"grad_input.{i}": x.grad for i, x in enumerate(leaves)}
        gradients |= {f"grad.{name}": p.grad for name, p in dca.named_parameters()}
        results |= {name: g for name, g in gradients.items() if g is not None}
    return results | {f"after.{name}": b.clone() for name, b in dca.named_buffers()}


def parts_used(draw: Draw, dtype: torch.dtype) -> dict[str, float]:
    """The part of its budget that the largest error of each kind of result is, or its root mean square."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for kind, name in _by_kind(draw):
        kinds[kind].append(name)
    parts = {}
    for kind, names in kinds.items():
        ours, theirs, exact = ([results[name] for name in names] for results in (draw.ours, draw.theirs, draw.exact))
        most = allowed(Error.of(theirs, exact), exact, dtype)
        parts[kind] = max(used(Error.of(ours, exact), most))
    return parts


def _by_kind(draw: Draw) -> Iterator[tuple[str, str]]:
    """The kind and the name of each result that is computed."""
    for name, exact in draw.exact.items():
        if not name.endswith("num_batches_tracked") and not name.startswith("grad_output") and exact.numel():
            yield name.partition(".")[0], name
