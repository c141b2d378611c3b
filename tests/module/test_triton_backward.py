"""The backward of the kernels: a few modules that together reach every branch, since it takes long interpreted."""

import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reference.budget import off_the_kink
from tests.module.test_module import zero_gradients
from tests.oracle import (
    DEVICE,
    INTERPRETED,
    LAYOUTS,
    TILED,
    Config,
    Results,
    assert_all_within_budget,
    assert_identical,
    assert_same,
    both_modes,
    each_backend,
    evaluate,
    not_finite,
    pair,
    promoted,
    random_like,
    random_maps,
    resized_blocks,
)

pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl

from dca_kernels.triton_backend import launch
from dca_kernels.triton_backend.primitives import kernel, sum_images
from dca_kernels.triton_backend.spatial_gradients import sum_with_level

TINY = Config((4, 6), (2, 3), channel_head=(2, 1), spatial_head=(1, 2), sizes=((4, 6), (2, 3)), batch=1)
SMALL = Config((4, 8), 2, sizes=((5, 4), (2, 3)), spatial_head=(2, 4))
CONFIGS = {
    "default": Config(),
    "ragged": Config((8, 16, 6), (4, 3), True, True, 1, (2, 1, 2), (2, 1, 2), sizes=((17, 23), (9, 13), (3, 4))),
    "two_blocks": Config((4, 8), 2, n=2, sizes=((4, 4), (2, 3))),
    "spatial_only": Config((4, 8), 2, channel_att=False, sizes=((4, 4), (3, 2))),
    "channel_only": Config((4, 8), 2, spatial_att=False, sizes=((4, 4), (3, 2))),
    "no_attention": Config((4, 8), (3, 2), channel_att=False, spatial_att=False, sizes=((2, 5), (3, 2))),
    "one_scale_one_row": Config((3,), (1, 5), spatial_head=(1,), sizes=((1, 7),), batch=3),
    # Not by rows of windows, and the padded windows are the padded columns.
    "wide_windows": Config((3,), (2, 16), channel_att=False, spatial_att=False, sizes=((5, 32),), batch=1),
    "many_images": Config((2,), 1, channel_att=False, spatial_att=False, sizes=((2, 1),), batch=17),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@both_modes
def test_parity_of_the_backward(config: Config, train: bool) -> None:
    ours, theirs = pair(config, "triton", train=train)
    maps = random_maps(config, backend="triton")
    assert_same(evaluate(ours, maps), evaluate(theirs, maps))


# Of so many channels that there are several blocks of those too, and of the sums over a row of tokens. The sums of the
# larger map need the most room, be it the first or not.
WIDE = Config((40, 72), (2, 18), spatial_head=(1, 2), sizes=((4, 72), (2, 18)))


@pytest.mark.parametrize(
    ("config", "factor"),
    [(TILED, 0.5), (TILED, 0), (WIDE, 0), (replace(WIDE, sizes=((3, 18), (5, 40))), 0)],
    ids=["halved", "small", "small_by_rows", "small_of_any_windows"],
)
def test_parity_of_the_backward_in_blocks(config: Config, factor: float) -> None:
    """Of blocks that are halved some are 32 and others 16."""
    ours, theirs = pair(config, "triton")
    maps = random_maps(config, backend="triton")
    with resized_blocks(factor):
        results = evaluate(ours, maps)
    assert_same(results, evaluate(theirs, maps))


BLOCKS = Config((4, 6), (2, 3), n=2, channel_head=(2, 1), spatial_head=(1, 2), sizes=((5, 7), (3, 3)))
each_kind_of_windows = pytest.mark.parametrize(
    "config", [BLOCKS, replace(BLOCKS, sizes=((4, 6), (2, 3)))], ids=["any_windows", "by_rows"]
)


def _differ_in_eps(module: nn.Module) -> None:
    norms = [m for m in module.modules() if isinstance(m, nn.LayerNorm | nn.BatchNorm2d)]
    for i, norm in enumerate(norms):
        norm.eps = 0.1 * (i + 1)


def _freeze_without_eps(module: nn.Module) -> None:
    module.bn_relu.eval()
    for head in module.bn_relu:
        head[0].eps = 0.0


def _train_second_alone(module: nn.Module) -> None:
    module.bn_relu[0].eval()


def _drop_first_weight(module: nn.Module) -> None:
    module.bn_relu[0][0].weight = None


def _stride(module: nn.Module) -> None:
    """Parameters that lie in memory with others between their elements."""
    for p in module.parameters():
        p.data = torch.stack((p.data, torch.full_like(p.data, float("nan"))), -1)[..., 0]


NUMBERS = {
    "eps": _differ_in_eps,
    "frozen_without_eps": _freeze_without_eps,
    "only_second_in_training": _train_second_alone,
    "no_first_weight": _drop_first_weight,
    "strided": _stride,
}


@pytest.mark.parametrize("change", NUMBERS.values(), ids=NUMBERS)
@each_kind_of_windows
def test_numbers_that_differ(config: Config, change: Callable[[nn.Module], None]) -> None:
    """From norm to norm: of scales, of blocks, of attentions; and where they lie."""
    modules = pair(config, "triton")
    for module in modules:
        change(module)
    maps = random_maps(config, backend="triton")
    assert_same(*(evaluate(module, maps) for module in modules))


@pytest.mark.parametrize("trains", [True, False], ids=["it_alone_trains", "the_others_train"])
@pytest.mark.parametrize("other", [1, 2])
def test_one_scale_of_three_differs(other: int, trains: bool) -> None:
    """Scales that are alike are a group: the second one is of scale 1 or of scale 2, its number is no scale's."""
    config = Config((4, 6, 2), (2, 3), channel_head=(2, 1, 2), spatial_head=(1, 2, 1), sizes=((5, 7), (3, 3), (4, 5)))
    modules = pair(config, "triton")
    for module in modules:
        for i, head in enumerate(module.bn_relu):
            head.train((i == other) == trains)
    maps = random_maps(config, backend="triton")
    maps[other] = maps[other].to(memory_format=torch.channels_last)
    assert_same(*(evaluate(module, maps) for module in modules))


THIN = Config((2, 4), (2, 1), channel_att=False, spatial_att=False, sizes=((5, 2), (3, 2)), batch=1)


@pytest.mark.parametrize("sizes", [THIN.sizes, ((4, 2), (2, 2))], ids=["any_windows", "by_rows"])
def test_one_head_is_called(sizes: tuple[tuple[int, int], ...]) -> None:
    """The kernels give it a sum, and leave the BatchNorm to it; the other's they have.

    In memory, a map's rows are one, and those of outputs and gradients are not.
    """
    config = replace(THIN, sizes=sizes)
    modules = pair(config, "triton")
    for module in modules:
        module.bn_relu[0][1] = nn.GELU()
    maps = [LAYOUTS["expanded_rows"](x) for x in random_maps(config, backend="triton")]
    assert_same(*(evaluate(module, maps) for module in modules))


def test_maps_with_and_without_gradients() -> None:
    """Gradients lie in memory as the maps do, and the parameters' are the same without them."""
    maps = [x.contiguous(memory_format=torch.channels_last) for x in random_maps(THIN, backend="triton")]
    found = []
    for needed in (True, False):
        module = pair(THIN, "triton")[0]
        leaves = [x.requires_grad_(needed) for x in maps] * needed
        outs = module(maps)
        found.append(torch.autograd.grad(outs, [*leaves, *module.parameters()], random_like(outs)))
    of_maps, of_parameters = found[0][: len(maps)], found[0][len(maps) :]
    assert [g.stride() for g in of_maps] == [x.stride() for x in maps]
    assert all(torch.equal(g, other) for g, other in zip(of_parameters, found[1], strict=True))


@not_finite
def test_the_gradient_where_nothing_is_a_number() -> None:
    """The ReLU does not cut it off."""
    maps = random_maps(THIN, backend="triton")
    maps[0][0, 1, 1, 1] = float("nan")
    results = [evaluate(module, maps) for module in pair(THIN, "triton", train=False)]
    assert results[1]["output.0"].isnan().any() and not results[1]["output.0"].isnan().all()
    assert_same(*results)


@pytest.mark.parametrize("name", ["spatial_only", "channel_only"])
def test_what_cancels_has_a_gradient_of_zero(name: str) -> None:
    """To the bit, as the torch backend's."""
    results = evaluate(pair(CONFIGS[name], "triton")[0], random_maps(CONFIGS[name], backend="triton"))
    zeros = {n.removeprefix("grad.") for n, g in results.items() if n.startswith("grad.") and not g.any()}
    assert zeros == zero_gradients(CONFIGS[name], train=True)


@not_finite
@pytest.mark.parametrize("name", ["two_blocks", "spatial_only", "channel_only"])
@each_backend
def test_what_cancels_is_zero_whatever_comes_from_behind(backend: str, name: str) -> None:
    """Of NaN too, and nothing else is: who looks for what is not finite, as GradScaler does, finds it there."""
    config = CONFIGS[name]
    maps = random_maps(config, backend=backend)
    upstream = [torch.full_like(x, float("nan")) for x in maps]
    results = evaluate(pair(config, backend)[0], maps, upstream)
    gradients = {n.removeprefix("grad."): g for n, g in results.items() if n.startswith("grad.")}
    zeros = {n for n, g in gradients.items() if not g.isnan().any()}
    assert zeros == zero_gradients(config, train=True)
    assert not any(gradients[n].any() for n in zeros)


@each_kind_of_windows
def test_the_gradient_at_the_kink_is_zero(config: Config) -> None:
    module, maps = pair(config, "triton")[0], random_maps(config, backend="triton")
    for head in module.bn_relu:
        nn.init.zeros_(head[0].weight)
        nn.init.zeros_(head[0].bias)
    results = evaluate(module, maps)
    assert not any(t.any() for name, t in results.items() if name.startswith(("output", "grad")))


@each_kind_of_windows
def test_an_infinite_gradient_of_a_pixel_that_is_cut_off(config: Config) -> None:
    """It stops at the ReLU, and is not multiplied by zero."""
    maps = random_maps(config, backend="triton")
    modules = [pair(config, "triton")[0] for _ in range(3)]
    cut_off = [y == 0 for y in modules[0](maps)]
    assert all(cut.any() and not cut.all() for cut in cut_off)
    upstream = random_like(maps)
    results = [
        evaluate(module, maps, [g.masked_fill(cut, value) for g, cut in zip(upstream, cut_off, strict=True)])
        for module, value in zip(modules[1:], (0.0, float("inf")), strict=True)
    ]
    assert_identical(*results)


def test_layouts_of_maps_and_of_upstream_gradients() -> None:
    ours, theirs = pair(SMALL, "triton")
    one, other = random_maps(SMALL, backend="triton")
    maps = [LAYOUTS["part_of_cat"](one), other.contiguous(memory_format=torch.channels_last)]
    upstream = random_like(maps)
    upstream = [upstream[0].mT.contiguous().mT, upstream[1][:1, :, :1].expand_as(upstream[1])]
    assert_same(evaluate(ours, maps, upstream), evaluate(theirs, maps, upstream))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_within_its_budget(dtype: torch.dtype) -> None:
    draws = []
    for seed in range(4):
        ours, theirs = pair(SMALL, "triton", dtype, seed=seed)
        maps = random_maps(SMALL, dtype, seed, "triton")
        doubles = [x.double() for x in maps]
        upstream = off_the_kink(promoted(theirs, SMALL), doubles, random_like(maps, seed))
        exact = evaluate(promoted(theirs, SMALL), doubles, [g.double() for g in upstream])
        draws.append([evaluate(ours, maps, upstream), evaluate(theirs, maps, upstream), exact])
    assert_all_within_budget(draws, dtype)


# What may not change a bit of a step


def tiny(train: bool = True) -> tuple[nn.Module, list[Tensor]]:
    return pair(TINY, "triton", torch.float32, train)[0], random_maps(TINY, torch.float32, backend="triton")


@functools.cache
def tiny_step(train: bool = True) -> Results:
    return evaluate(*tiny(train))


def gradients(results: Results) -> Results:
    return {name: t for name, t in results.items() if name.startswith("grad")}


def leaves_of(module: nn.Module, maps: Sequence[Tensor]) -> dict[str, Tensor]:
    """All that may have a gradient, under the gradients' names."""
    return {f"grad_input.{i}": x for i, x in enumerate(maps)} | {f"grad.{n}": p for n, p in module.named_parameters()}


@both_modes
def test_a_second_run_gives_the_same_bits(train: bool) -> None:
    expected = tiny_step(train)
    torch.use_deterministic_algorithms(True)
    try:
        assert_identical(evaluate(*tiny(train)), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@both_modes
def test_no_images_have_gradients_of_zero(train: bool) -> None:
    """Fresh memory holds NaN: what no program writes stays so."""
    module, _ = tiny(train)
    torch.use_deterministic_algorithms(True)
    try:
        results = evaluate(module, random_maps(replace(TINY, batch=0), torch.float32, backend="triton"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all((g == 0).all() for name, g in results.items() if name.startswith("grad."))


def test_one_graph_many_backwards_any_layout() -> None:
    module, maps = tiny()
    outs = module([x.requires_grad_() for x in maps])
    leaves, upstream = leaves_of(module, maps), random_like(outs)

    def backward(douts: Sequence[Tensor]) -> Results:
        found = torch.autograd.grad(outs, leaves.values(), douts, retain_graph=True)
        return dict(zip(leaves, found, strict=True))

    laid_out = [LAYOUTS["channels_last"](upstream[0]), LAYOUTS["sliced"](upstream[1])]
    for douts in (upstream, upstream, laid_out):
        assert_identical(backward(douts), gradients(tiny_step()))
    expanded = [upstream[0][:, :, :1, :1].expand_as(outs[0]), upstream[1][0, 0, 0, 0].expand_as(outs[1])]
    assert_identical(backward(expanded), backward([g.contiguous() for g in expanded]))


def test_upstream_gradients_that_are_negated_views() -> None:
    """As those of `torch.complex(y, y).conj().imag` are: their memory holds the opposite."""
    module, maps = tiny()
    negated = [torch._neg_view(-g) for g in random_like(maps)]
    assert all(g.is_neg() for g in negated)
    assert_identical(evaluate(module, maps, negated), evaluate(tiny()[0], maps, [g.clone() for g in negated]))


def test_activation_checkpointing_of_the_kernels() -> None:
    module, maps = tiny()
    forward = module.forward
    module.forward = lambda maps: checkpoint(lambda *maps: forward(maps), *maps, use_reentrant=False)
    actual = evaluate(module, maps)
    buffers = {name for name in actual if name.startswith("after.")}
    assert_identical(
        {name: t for name, t in actual.items() if name not in buffers},
        {name: t for name, t in tiny_step().items() if name not in buffers},
    )
    # The forward runs twice, and counts twice: as that of a BatchNorm2d does.
    assert all(t == 3 + 2 for name, t in actual.items() if name.endswith("num_batches_tracked"))


def test_a_step_of_a_scaled_loss() -> None:
    module, maps = tiny()
    before = {f"grad.{name}": p.detach().clone() for name, p in module.named_parameters()}
    optimizer, scaler = torch.optim.SGD(module.parameters(), lr=0.5), torch.amp.GradScaler(DEVICE, init_scale=2.0**16)
    outs = module(maps)
    scaler.scale(sum((y * g).sum() for y, g in zip(outs, random_like(outs), strict=True))).backward()
    scaler.step(optimizer)
    scaler.update()
    expected = {name: before[name] - 0.5 * tiny_step()[name] for name in before}
    assert_identical({f"grad.{name}": p.detach() for name, p in module.named_parameters()}, expected)


# Only what is asked for

GROUPS: dict[str, Callable[[str], bool]] = {
    "second_map": lambda name: name == "grad_input.1",
    "embedding": lambda name: "avg_map" in name,
    "channel_attention": lambda name: "c_attention" in name or "channel_norm" in name,
    "spatial_attention": lambda name: "s_attention" in name or "spatial_norm" in name,
    "upsampling": lambda name: "upconvs" in name or "bn_relu" in name,
}
STAGE = dict(zip(GROUPS, (0, 0, 1, 2, 3), strict=True))


def step_of(groups: Iterable[str]) -> Results:
    """The gradients of TINY that are not None, where only those of some groups are asked for."""
    module, maps = tiny()
    leaves = leaves_of(module, maps)
    for name, leaf in leaves.items():
        leaf.requires_grad_(any(GROUPS[group](name) for group in groups))
    outs = module(maps)
    torch.autograd.backward(outs, random_like(outs))
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("group", GROUPS)
def test_gradients_of_a_group_have_the_bits_of_all(group: str) -> None:
    assert_identical(step_of([group]), {name: t for name, t in gradients(tiny_step()).items() if GROUPS[group](name)})


@contextmanager
def launches_only() -> Iterator[list[tuple[str, str]]]:
    """Nothing runs: stage and name of each kernel that would, and whether it leaves out the tokens' gradient."""
    launches: list[tuple[str, str]] = []

    def note(kernel: Any, programs: int, config: dict[str, int], dtokens: Any = 0, **arguments: Any) -> None:
        name = kernel.__name__.removeprefix("_").removesuffix("_kernel")
        stage = kernel.fn.__module__.removeprefix("dca_kernels.triton_backend.")
        launches.append((stage, name + " without dtokens" * (dtokens is None)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "run", note)
        yield launches


def test_every_subset_goes_back_to_its_first_stage() -> None:
    by_stage: dict[int, list[tuple[str, str]]] = {}
    for count in range(1, len(GROUPS) + 1):
        for groups in itertools.combinations(GROUPS, count):
            with launches_only() as launches:
                found = step_of(groups)
            assert set(found) == {name for name in gradients(tiny_step()) if any(GROUPS[g](name) for g in groups)}
            first = min(STAGE[group] for group in groups)
            assert by_stage.setdefault(first, launches) == launches, groups
    maps, channel, spatial, upsampling = (by_stage[first][8:] for first in range(4))
    assert maps[: len(channel)] == channel and channel[: len(spatial)] == spatial
    assert ("upsample_rows", "map_gradient_rows") in set(maps) - set(channel)
    assert "channel_attention_backward" in {stage for stage, _ in channel} - {stage for stage, _ in spatial}
    assert "spatial_attention_backward" in {stage for stage, _ in spatial} - {stage for stage, _ in upsampling}
    # Of the upsampling alone not even the tokens' gradient.
    assert upsampling != spatial[: len(upsampling)]
    assert [(stage, name.removesuffix(" without dtokens")) for stage, name in upsampling] == spatial[: len(upsampling)]


# Every configuration


def configurations_of(kernel: str, dtype: torch.dtype) -> list[dict[str, int]]:
    """The table's of any size for a dtype, or in float64 all; on a GPU those for it, since others may not fit."""
    conditions = {} if dtype == torch.float64 else {"dtype": str(dtype).removeprefix("torch.")}
    if not INTERPRETED:
        conditions["architecture"] = launch.architecture(torch.device(DEVICE, torch.cuda.current_device()))
    rows = [
        row
        for row in launch._table()[kernel]["rows"]
        if all(value in row.get("if", {}).get(k, [value]) for k, value in conditions.items())
    ]
    warps = ("num_warps", "num_stages") if INTERPRETED else ()  # which the interpreter has not got
    distinct = {str({k: v for k, v in row["then"].items() if k not in warps}): row["then"] for row in rows}
    return list(distinct.values())


def with_each_configuration(dtype: torch.dtype) -> Iterator[None]:
    """Every kernel has the next of its configurations each time, until one has had all."""
    table = {kernel: configurations_of(kernel, dtype) for kernel in launch._table()}

    def forced(k: int, kernel: str, *_: object) -> dict[str, int]:
        return table[kernel][k % len(table[kernel])]

    for k in range(max(len(rows) for rows in table.values())):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "configuration", functools.partial(forced, k))
            yield


@pytest.mark.slow
def test_every_configuration_gives_the_same() -> None:
    # To rounding: sums over other blocks are in another order.
    dtype, rtol = (torch.float64, 1e-11) if INTERPRETED else (torch.float32, 1e-4)
    config = replace(TILED, patch=(1, 34), sizes=((3, 35), (1, 36)), batch=1)
    maps = random_maps(config, dtype, backend="triton")
    expected = evaluate(pair(config, "triton", dtype)[0], maps)
    for _ in with_each_configuration(dtype):
        assert_same(evaluate(pair(config, "triton", dtype)[0], maps), expected, rtol)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [((11, 15), (5, 9)), ((10, 28), (5, 7))], ids=["any_windows", "windows_all_alike"])
def test_every_configuration_of_16_bit_is_within_the_budget(sizes: tuple) -> None:
    """Some kernels compute otherwise there, with several rows of windows at once."""
    config = Config((20, 6), (5, 7), channel_head=(2, 1), spatial_head=(2, 1), sizes=sizes, batch=1)
    dtype = torch.bfloat16
    ours, theirs = pair(config, "triton", dtype)
    exact = promoted(theirs, config)
    maps, state = random_maps(config, dtype, backend="triton"), copy.deepcopy(ours.state_dict())
    doubles = [x.double() for x in maps]
    upstream = [g.to(dtype) for g in off_the_kink(promoted(theirs, config), doubles, random_like(doubles))]
    others = evaluate(theirs, maps, upstream), evaluate(exact, doubles, [g.double() for g in upstream])
    for _ in with_each_configuration(dtype):
        ours.load_state_dict(state)
        assert_all_within_budget([(evaluate(ours, maps, upstream), *others)], dtype)


def test_a_second_derivative_is_refused() -> None:
    module, maps = pair(SMALL, "triton")[0], [x.requires_grad_() for x in random_maps(SMALL, backend="triton")]
    refused = pytest.raises(RuntimeError, match=r"use backend=.torch. for second derivatives")
    gradients = torch.autograd.grad(module(maps)[0].square().sum(), maps[0], create_graph=True)
    with refused:
        gradients[0].sum().backward()
    upstream = [g.requires_grad_() for g in random_like(maps)]  # what a product with the Jacobian is taken by
    gradients = torch.autograd.grad(module(maps), maps, upstream, create_graph=True)
    with refused:
        torch.autograd.grad(gradients[0].sum(), upstream[0], allow_unused=True)


def test_a_parameter_changed_in_place_is_noticed() -> None:
    module, maps = pair(SMALL, "triton")[0], random_maps(SMALL, backend="triton")
    outs = module(maps)
    with torch.no_grad():
        module.upconvs[0].conv.conv.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(outs, random_like(maps))


@kernel
def _sums_kernel(
    x, level, out, batch,
    BLOCKS: tl.constexpr, USED: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x (B, BLOCKS, 2, C), level (B, C) to out (3, C): of the first USED blocks, then of all with their level."""
    offs = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = offs < C
    used = sum_images(x, offs, mask, batch, USED, 2 * C, BLOCKS * 2 * C, tl.float32)
    levelled, plain = sum_with_level(x, level, offs, mask, batch, BLOCKS, 2 * C, C, tl.float32)
    tl.store(out + offs, used, mask=mask)
    tl.store(out + C + offs, levelled, mask=mask)
    tl.store(out + 2 * C + offs, plain, mask=mask)


@pytest.mark.parametrize(("batch", "blocks", "used"), [(40, 28, 28), (3, 300, 299), (1, 1, 1)])
def test_sums_over_images_that_take_several_steps(batch: int, blocks: int, used: int) -> None:
    x = torch.randn(batch, blocks, 2, 20, device=DEVICE)
    level = torch.randn(batch, 20, device=DEVICE)
    out = torch.empty(3, 20, device=DEVICE)
    _sums_kernel[(3,)](x=x, level=level, out=out, batch=batch, BLOCKS=blocks, USED=used, C=20, BLOCK_C=8, num_warps=4)
    first, second = x.double().unbind(2)
    levelled = (first + second * level.double()[:, None]).sum((0, 1))
    expected = torch.stack([first[:, :used].sum((0, 1)), levelled, second.sum((0, 1))])
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-3)
