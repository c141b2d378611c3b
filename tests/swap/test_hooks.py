"""Hooks of a DCA that is replaced: they are honoured, or it is refused."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from dca_kernels import replace_dca, restore_dca
from tests.swap.models import IMAGE, assert_refused, host, trusting_replace_dca


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # a list of maps is no tensor, in either module
def test_hooks_of_the_dca_and_of_bn_relu_are_honoured() -> None:
    model = host()
    calls: list[str] = []
    first = model.DCA.register_forward_hook(lambda *_: calls.append("forward"))
    model.DCA.register_forward_pre_hook(lambda *_, **__: calls.append("pre"), with_kwargs=True)
    model.DCA.register_full_backward_pre_hook(lambda *_: calls.append("backward"))
    model.DCA.bn_relu[0][0].register_forward_hook(lambda *_: calls.append("norm"))
    model.DCA.register_state_dict_post_hook(lambda *_: calls.append("state_dict"))
    replace_dca(model)
    assert calls == []  # not by the check either
    model(IMAGE).sum().backward()
    assert calls == ["pre", "norm", "forward", "backward"]
    model.state_dict()
    assert calls[4:] == ["state_dict"]
    first.remove()
    late = model.DCA.register_forward_hook(lambda *_: calls.append("late"))
    restore_dca(model)
    calls.clear()
    model(IMAGE).sum().backward()
    assert calls == ["pre", "norm", "late", "backward"]
    late.remove()
    model(IMAGE)
    assert calls[4:] == ["pre", "norm"]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_the_first_backward_hook_while_replaced_stays() -> None:
    model = trusting_replace_dca(host())
    calls: list[str] = []
    model.DCA.register_full_backward_hook(lambda *_: calls.append("backward"))
    restore_dca(model)
    model(IMAGE).sum().backward()
    assert calls == ["backward"]


@pytest.mark.parametrize("name", ["upconvs.0", "upconvs.1.conv.conv", "attention.0.c_attention.0", "avg_map.1.proj"])
def test_hooks_put_on_submodules_while_replaced_stay(name: str) -> None:
    model = trusting_replace_dca(host())
    calls: list[str] = []
    handle = model.DCA.get_submodule(name).register_forward_hook(lambda *_: calls.append(name))
    model(IMAGE)
    restore_dca(model)
    model(IMAGE)
    assert calls == [name] * 2
    handle.remove()
    model(IMAGE)
    assert calls == [name] * 2


@pytest.mark.parametrize("name", ["", "upconvs.0"])
def test_a_forward_put_on_an_instance_while_replaced_is_not_lost(name: str) -> None:
    model = trusting_replace_dca(host())
    fused, changed = model.DCA, model.DCA.get_submodule(name)
    changed.forward = changed.forward
    with pytest.raises(ValueError, match=rf"^model: .* got one that was put on {name or 'the DCA itself'}: remove it"):
        restore_dca(model)
    assert model.DCA is fused
    del changed.forward
    assert restore_dca(model).DCA is not fused


def test_hooks_are_not_copied_for_the_check() -> None:
    class Uncopyable:
        def __call__(self, *_) -> None: ...

        def __deepcopy__(self, memo: dict) -> None:
            raise AssertionError("copied")

    model = host()
    model.DCA.register_forward_hook(Uncopyable())
    model.DCA.bn_relu[0].register_forward_pre_hook(Uncopyable())
    replace_dca(model)


def _attention(dca: nn.Module) -> nn.Module:
    return dca.attention[0].s_attention[1]


HOOKED: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "attention_map": (
        lambda dca: _attention(dca).sdp.softmax.register_forward_hook(print),
        "attention.0.s_attention.1.sdp.softmax has forward hooks, which would not be called",
    ),
    "convolution": (
        lambda dca: dca.upconvs[0].conv.conv.register_full_backward_hook(print),
        "upconvs.0.conv.conv has backward hooks, with which no backend would run",
    ),
    "state_dict": (
        lambda dca: dca.attention.register_state_dict_pre_hook(print),
        "attention has state dict pre hooks, which would not be called",
    ),
    "state_dict_of_a_list": (
        lambda dca: dca.bn_relu.register_state_dict_pre_hook(print),
        "bn_relu has state dict pre hooks, which would not be called",
    ),
    "forward": (
        lambda dca: setattr(dca, "forward", dca.forward),
        "the forward of this instance was replaced, and would not be called",
    ),
    "inner_forward": (
        lambda dca: setattr(dca.attention[0], "forward", dca.attention[0].forward),
        "the forward of attention.0 was replaced, and would not be called",
    ),
    "prune": (
        lambda dca: prune.l1_unstructured(_attention(dca).q_map.proj.depthwise, "weight", amount=1),
        "attention.0.s_attention.1.q_map.proj.depthwise has forward pre hooks, with which no backend would run",
    ),
    "compiled": (lambda dca: dca.compile(backend="eager"), "it is compiled: replace it first, then compile"),
}


@pytest.mark.parametrize("change, reason", HOOKED.values(), ids=HOOKED)
def test_what_would_not_be_called_is_refused(change: Callable[[nn.Module], object], reason: str) -> None:
    model = host()
    change(model.DCA)
    assert_refused(model, "DCA (DualCrossAttention)", re.escape(reason))


def test_hooks_that_were_removed_do_not_count() -> None:
    model = host()
    for register in ("register_full_backward_hook", "register_forward_hook"):
        getattr(model.DCA.upconvs[0], register)(print).remove()
    trusting_replace_dca(model)


def test_a_dca_that_is_compiled_by_itself_is_refused() -> None:
    # Its compiled forward would go on calling the original.
    model = host()
    model.DCA = torch.compile(model.DCA, backend="eager")
    assert_refused(model, "DCA._orig_mod (DualCrossAttention)", "it is compiled: replace it first, then compile")
