"""The backward of the kernels: a few modules that together reach every branch, since it takes long interpreted."""

import pytest
import torch

from tests.oracle import (
    Config,
    assert_identical,
    assert_same,
    assert_within_budget,
    both_modes,
    evaluate,
    pair,
    promoted,
    random_like,
    random_maps,
)

SMALL = Config((4, 8), 2, sizes=((5, 4), (2, 3)), spatial_head=(2, 4))
CONFIGS = {
    "default": Config(),
    "ragged": Config((8, 16, 6), (4, 3), True, True, 1, (2, 1, 2), (2, 1, 2), sizes=((17, 23), (9, 13), (3, 4))),
    "two_blocks": Config((4, 8), 2, n=2, sizes=((4, 4), (2, 3))),
    "spatial_only": Config((4, 8), 2, channel_att=False, sizes=((4, 4), (3, 2))),
    "channel_only": Config((4, 8), 2, spatial_att=False, sizes=((4, 4), (3, 2))),
    "no_attention": Config((4, 8), (3, 2), channel_att=False, spatial_att=False, sizes=((2, 5), (3, 2))),
    "one_scale_one_row": Config((3,), (1, 5), spatial_head=(1,), sizes=((1, 7),), batch=3),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@both_modes
def test_parity(config: Config, train: bool) -> None:
    ours, theirs = pair(config, "triton", train=train)
    maps = random_maps(config, backend="triton")
    assert_same(evaluate(ours, maps), evaluate(theirs, maps))


def test_layouts_of_maps_and_of_upstream_gradients() -> None:
    ours, theirs = pair(SMALL, "triton")
    maps = [x.contiguous(memory_format=torch.channels_last) for x in random_maps(SMALL, backend="triton")]
    upstream = random_like(maps)
    upstream = [upstream[0].mT.contiguous().mT, upstream[1][:1, :, :1].expand_as(upstream[1])]
    assert_same(evaluate(ours, maps, upstream), evaluate(theirs, maps, upstream))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_within_its_budget(dtype: torch.dtype) -> None:
    ours, theirs = pair(SMALL, "triton", dtype)
    maps = random_maps(SMALL, dtype, backend="triton")
    exact = evaluate(promoted(theirs, SMALL), [x.double() for x in maps], [g.double() for g in random_like(maps)])
    results, baseline = evaluate(ours, maps), evaluate(theirs, maps)
    for i in range(len(maps)):
        name = f"grad_input.{i}"
        kinks = (exact[f"output.{i}"] == 0) != (results[f"output.{i}"] == 0)  # the ReLU's side is rounding's
        kinks |= (exact[f"output.{i}"] == 0) != (baseline[f"output.{i}"] == 0)
        if not kinks.any():
            assert_within_budget(results[name], baseline[name], exact[name], dtype, name)


@both_modes
def test_twice_the_same_bits(train: bool) -> None:
    module, maps = pair(SMALL, "triton", torch.float32, train)[0], random_maps(SMALL, torch.float32, backend="triton")
    state = {name: t.clone() for name, t in module.state_dict().items()}
    first = evaluate(module, maps)
    module.load_state_dict(state)
    assert_identical(evaluate(module, maps), first)


def test_only_what_is_asked_for() -> None:
    ours, theirs = pair(SMALL, "triton")
    maps = random_maps(SMALL, backend="triton")
    for module in (ours, theirs):
        module.requires_grad_(False)
        module.avg_map[1].requires_grad_(True)
        inputs = [maps[0].clone().requires_grad_(), maps[1].clone()]
        torch.autograd.backward(module(inputs), random_like(maps))
        module.asked = (inputs[0].grad, inputs[1].grad, *(p.grad for p in module.parameters()))
    assert [g is None for g in ours.asked] == [g is None for g in theirs.asked]
    for actual, expected in zip(ours.asked, theirs.asked, strict=True):
        if expected is not None:
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9 * expected.abs().max().item())


def test_a_second_derivative_is_refused() -> None:
    module, maps = pair(SMALL, "triton")[0], [x.requires_grad_() for x in random_maps(SMALL, backend="triton")]
    gradients = torch.autograd.grad(module(maps)[0].square().sum(), maps[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"use backend=.torch. for second derivatives"):
        gradients[0].sum().backward()


def test_a_parameter_changed_in_place_is_noticed() -> None:
    module, maps = pair(SMALL, "triton")[0], random_maps(SMALL, backend="triton")
    outs = module(maps)
    with torch.no_grad():
        module.upconvs[0].conv.conv.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(outs, random_like(maps))
