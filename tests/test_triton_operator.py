"""The `triton` backend as one operator: what a traced or a watched call runs, against the eager one."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.oracle import Config, assert_same, evaluate, needs_triton, pair, random_like, random_maps

pytestmark = needs_triton

SMALL = Config((4, 8), 2, sizes=((5, 4), (2, 3)), spatial_head=(2, 4))
CONFIGS = {
    "both": SMALL,
    "no_attention": Config((4, 8), 2, channel_att=False, spatial_att=False, sizes=((5, 4), (2, 3))),
}


class Watch(TorchDispatchMode):
    """Remembers the operators of this package that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dca_kernels":
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_the_operator_is_the_eager_call(config: Config, train: bool) -> None:
    watched, eager = (pair(config, "triton", train=train)[0] for _ in range(2))
    maps = random_maps(config, backend="triton")
    with Watch() as watch:
        results = evaluate(watched, maps)
    assert watch.seen == ["refine", "refine_backward"]
    assert_same(results, evaluate(eager, maps), rtol=1e-12)


def test_fake_tensors_have_the_shapes_of_real_ones() -> None:
    model, maps = pair(SMALL, "triton")[0], random_maps(SMALL, backend="triton")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(evaluate(compiled, maps), evaluate(pair(SMALL, "triton")[0], maps), rtol=1e-12)


def test_a_second_derivative_of_the_operator_is_refused() -> None:
    model, maps = pair(SMALL, "triton")[0], [x.requires_grad_() for x in random_maps(SMALL, backend="triton")]
    with Watch(), pytest.raises(RuntimeError, match=r"use backend=.torch. for second derivatives"):
        torch.autograd.grad(model(maps)[0].square().sum(), maps[0], create_graph=True)[0].sum().backward()


def test_only_some_gradients() -> None:
    watched, eager = (pair(SMALL, "triton")[0].requires_grad_(False) for _ in range(2))
    maps = random_maps(SMALL, backend="triton")
    for model in (watched, eager):
        model.upconvs[1].conv.conv.weight.requires_grad_(True)
    with Watch():
        torch.autograd.backward(watched(maps), random_like(maps))
    torch.autograd.backward(eager(maps), random_like(maps))
    ours, theirs = ([p.grad for p in model.parameters()] for model in (watched, eager))
    assert [g is None for g in ours] == [g is None for g in theirs] and any(g is not None for g in ours)
    for actual, expected in zip(ours, theirs, strict=True):
        if expected is not None:
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * expected.abs().max().item())
