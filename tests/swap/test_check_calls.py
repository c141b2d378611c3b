"""`replace_dca(model, check_calls=N)`: the next calls run the original, too, and raise where it differs."""

import copy
import logging
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from dca_kernels import replace_dca, restore_dca
from dca_kernels.check import TF32, TOLERANCES, _tolerance
from tests import vendored
from tests.oracle import assert_identical, named, random_maps
from tests.swap import look_alikes
from tests.swap.models import IMAGE, VENDORED, Host, Snapshot, host, tracing

checked = {"verify": False, "check_calls": 2}


def hooks(model: nn.Module) -> int:
    return len(model.DCA._forward_hooks) + len(model.DCA._forward_pre_hooks) + len(model.DCA._forward_hooks_with_kwargs)


def parallel() -> Host:
    return host(kind=vendored.Parallel)


@pytest.mark.parametrize("training", [False, True])
def test_equal_calls_are_checked_and_then_no_more(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    forward = vendored.DualCrossAttention.forward
    monkeypatch.setattr(
        vendored.DualCrossAttention, "forward", lambda self, raw: (calls.append(1), forward(self, raw))[1]
    )
    model, plain = host().train(training), host().train(training)
    replace_dca(model, **checked)
    replace_dca(plain, verify=False)
    for n in (1, 2, 2):
        # One update of the buffers a call, as without the check.
        assert_identical({"y": model(IMAGE)}, {"y": plain(IMAGE)})
        assert_identical(dict(model.named_buffers()), dict(plain.named_buffers()))
        assert len(calls) == n
    assert hooks(model) == 0


def test_the_first_difference_is_an_error_that_changes_nothing() -> None:
    model = replace_dca(parallel().train(), **checked)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    message = (
        r"^check_calls: expected the results of Parallel, which the DCA stands for, in call 1 of 2, of maps "
        r"\[\(2, 8, 16, 16\), \(2, 16, 8, 8\)\]: outputs\[0\] differs by .+, where .+ is allowed\. restore_dca"
    )
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            model(IMAGE)
    assert_identical(dict(model.named_buffers()), before)
    restore_dca(model)
    assert hooks(model) == 0
    model(IMAGE)


@pytest.mark.parametrize("calls", [1, 3])
def test_beside_activation_checkpointing(calls: int) -> None:
    """It counts what a forward saves, and the last check is over before the second run."""
    model = replace_dca(host().train(), verify=False, check_calls=calls)
    for _ in range(calls + 1):
        image = IMAGE.clone().requires_grad_()
        checkpoint(model, image, use_reentrant=False).square().sum().backward()
        assert image.grad.any()
    assert hooks(model) == 0


def test_a_size_that_differs_is_found_at_its_call() -> None:
    model = replace_dca(Host(look_alikes.SIZES["interpolated_again"]()).double(), **checked)
    model(IMAGE)
    with pytest.raises(RuntimeError, match=r"in call 2 of 2, of maps \[\(2, 8, 16, 12\), \(2, 16, 8, 6\)\]: outputs"):
        model(IMAGE[..., :12])


def test_random_branches_are_found_without_a_draw() -> None:
    model = replace_dca(Host(look_alikes.RANDOM["torch"]()).double().train(), **checked)
    generator = torch.get_rng_state()
    with pytest.raises(RuntimeError, match=r": it draws random numbers in training \(aten::rand\)"):
        model(IMAGE)
    assert torch.equal(torch.get_rng_state(), generator)


LOW: dict[str, Callable[[nn.Module], tuple[nn.Module, torch.Tensor]]] = {
    "float32": lambda model: (model.float(), IMAGE.float()),
    "bfloat16": lambda model: (model.bfloat16(), IMAGE.bfloat16()),
    "autocast": lambda model: (model.float(), IMAGE.float()),
}


@pytest.mark.parametrize("name", LOW)
@pytest.mark.parametrize("training", [False, True])
def test_the_tolerance_is_that_of_the_dtype(name: str, training: bool) -> None:
    for make, differs in ((host, False), (parallel, True)):
        model, image = LOW[name](replace_dca(make(), **checked).train(training))
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"):
            if differs:
                with pytest.raises(RuntimeError, match=r"^check_calls: "):
                    model(image)
            else:
                model(image)


def test_under_autocast_the_tolerance_is_that_of_its_dtype() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert _tolerance(torch.ones(1)) == TOLERANCES[torch.bfloat16]
        assert _tolerance(torch.ones(1).double()) == TOLERANCES[torch.float64]  # which autocast leaves alone


def test_on_a_gpu_products_in_float32_may_be_in_tf32() -> None:
    with FakeTensorMode():
        for dtype, tolerance in TOLERANCES.items():
            expected = TF32 if dtype == torch.float32 else tolerance
            assert _tolerance(torch.empty(1, dtype=dtype, device="cuda")) == expected


def test_what_is_no_number_differs() -> None:
    model = replace_dca(Host(look_alikes.OUTPUTS["nan"]()).double(), **checked)
    with pytest.raises(RuntimeError, match=r": outputs\[0\] differs by nan, where .+ is allowed"):
        model(IMAGE)


def test_a_result_that_is_infinite_does_not_hide_the_others() -> None:
    model = parallel().eval()
    for head in model.DCA.bn_relu:
        head[0].bias.data[0] = math.inf
    replace_dca(model, **checked)
    with pytest.raises(RuntimeError, match=r": outputs\[0\] differs by"):
        model(IMAGE)


def test_no_image() -> None:
    model = replace_dca(host().eval(), **checked)
    for _ in range(2):
        model(IMAGE[:0])
    assert hooks(model) == 0


def test_each_dca_counts_its_own_calls() -> None:
    first, second = host(), host(seed=1)
    replace_dca(nn.ModuleList([first, second]), **checked)
    for left in (3, 0):
        first(IMAGE), second(IMAGE)
        assert (hooks(first), hooks(second)) == (left, left)


def test_buffers_are_compared() -> None:
    model = replace_dca(Host(look_alikes.NORMS["other_momentum"]()).double().train(), **checked)
    with pytest.raises(RuntimeError, match=r": bn_relu\.0\.0\.running_mean differs by"):
        model(IMAGE)


def test_maps_by_name_and_hooks_that_change_the_outputs() -> None:
    model = host()
    model.DCA.register_forward_hook(lambda module, args, outputs: tuple(2 * y for y in outputs))
    replace_dca(model, **checked)
    maps = [torch.randn(2, 8, 16, 16).double(), torch.randn(2, 16, 8, 8).double()]
    for _ in range(2):
        model.DCA(maps=maps)
    assert hooks(model) == 1


def test_a_frozen_batch_norm_is_frozen_in_the_original() -> None:
    model = replace_dca(host().train(), **checked)
    model.DCA.bn_relu.eval()
    model(IMAGE)


def test_an_original_that_writes_into_its_maps_has_its_own() -> None:
    def zeroing(self: nn.Module, raw: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        outs = look_alikes.plain_forward(self, raw)
        for x in raw:
            x.detach().zero_()
        return outs

    model = replace_dca(Host(look_alikes.forwarding(zeroing)()).double().eval(), **checked)
    maps = random_maps(VENDORED)
    model.DCA(maps)
    assert_identical(named(maps), named(random_maps(VENDORED)))


def test_the_mode_of_now_is_the_original_s() -> None:
    other = look_alikes.where(lambda self, raw: not self.training)()
    model = replace_dca(Host(other).double().train(), **checked)
    model(IMAGE)
    with pytest.raises(RuntimeError, match=r"in call 2 of 2"):
        model.eval()(IMAGE)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_count_their_own_calls(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = replace_dca(parallel(), **checked)
    other = duplicate(model)
    with pytest.raises(RuntimeError, match="in call 1 of 2"):
        other(IMAGE)
    model = replace_dca(host(), **checked)
    other = duplicate(model)
    for _ in range(2):
        other(IMAGE)
    assert (hooks(other), hooks(model)) == (0, 3)


def test_the_tensors_of_now_are_the_original_s() -> None:
    model = replace_dca(host(), **checked)
    model.DCA.bn_relu[0] = nn.Sequential(nn.GroupNorm(2, 8), nn.GELU()).double()
    model.load_state_dict(model.state_dict())
    torch.optim.SGD(model.parameters(), 0.1)
    model(IMAGE).sum().backward()
    model(IMAGE)
    assert hooks(model) == 0


@pytest.mark.slow
@tracing
@torch.no_grad()
def test_of_a_compiled_model() -> None:
    for make, differs in ((host, False), (parallel, True)):
        model = make().eval()
        compiled = torch.compile(replace_dca(model, **checked), backend="eager")
        if differs:
            with pytest.raises(RuntimeError, match="check_calls"):
                compiled(IMAGE)
            continue
        for _ in range(3):
            compiled(IMAGE)
        assert hooks(model) == 0


@pytest.mark.parametrize("calls", [-1, 1.5, "2", None])
def test_not_a_number_of_calls(calls: object, caplog: pytest.LogCaptureFixture) -> None:
    model = host()
    before = Snapshot(model)
    with (
        caplog.at_level(logging.INFO, "dca_kernels"),
        pytest.raises((TypeError, ValueError), match=rf"^check_calls: expected an integer.*, got {calls!r}$"),
    ):
        replace_dca(model, check_calls=calls)
    before.assert_unchanged(model)
    assert caplog.messages == []


def test_a_call_whose_dropout_draws_is_not_compared(caplog: pytest.LogCaptureFixture) -> None:
    model = host()
    for i, norm in enumerate(model.DCA.bn_relu):
        model.DCA.bn_relu[i] = nn.Sequential(*norm, nn.Dropout(0.5))
    replace_dca(model.train(), **checked)
    for _ in range(2):
        model(IMAGE)
    assert "check_calls: a call is not compared, since a dropout of bn_relu draws in it" in caplog.messages
    assert hooks(model) == 0


@pytest.mark.parametrize("training, p", [(False, 0.5), (True, 0.0)])
def test_a_call_whose_dropout_does_not_draw_is_compared(training: bool, p: float) -> None:
    model = parallel()
    for i, norm in enumerate(model.DCA.bn_relu):
        model.DCA.bn_relu[i] = nn.Sequential(*norm, nn.Dropout(p))
    replace_dca(model.train(training), **checked)
    with pytest.raises(RuntimeError, match="differs by"):
        model(IMAGE)
