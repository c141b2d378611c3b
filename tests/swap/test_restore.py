"""What comes back where a fused module is taken out again."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from dca_kernels import restore_dca
from tests import vendored
from tests.oracle import assert_same, evaluate, random_maps
from tests.swap.models import (
    FEATURES,
    IMAGE,
    PATCH,
    VENDORED,
    Snapshot,
    assert_the_same_objects,
    host,
    tensors,
    through_a_file,
    trusting_replace_dca,
)


def _train(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(IMAGE).square().mean().backward()
    optimizer.step()
    return model


def _load(assign: bool) -> Callable[[nn.Module], nn.Module]:
    def load(model: nn.Module) -> nn.Module:
        model.load_state_dict(host(seed=5).state_dict(), assign=assign)
        return model

    return load


def _exchange(model: nn.Module) -> nn.Module:
    model.DCA.upconvs[0].conv.conv = nn.Conv2d(8, 8, 1).double()
    model.DCA.bn_relu = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.Tanh()) for c in FEATURES).double()
    return model


LATER: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nothing": lambda model: model,
    "training": _train,
    "moved": lambda model: model.float().double(),
    "loaded": _load(assign=False),
    "assigned": _load(assign=True),
    "copied": copy.deepcopy,
    "copied_and_trained": lambda model: _train(copy.deepcopy(model)),
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
    "saved": through_a_file,
    "exchanged": _exchange,
    "average": lambda model: _train(torch.optim.swa_utils.AveragedModel(model).module),
}


@pytest.mark.parametrize("later", LATER.values(), ids=LATER)
def test_restored_with_the_tensors_of_now(later: Callable[[nn.Module], nn.Module]) -> None:
    model = host()
    original = model.DCA
    now = later(trusting_replace_dca(model))
    before, results = tensors(now), evaluate(copy.deepcopy(now).DCA, random_maps(VENDORED))
    assert restore_dca(now) is now
    assert type(now.DCA) is vendored.DualCrossAttention
    assert (now.DCA is original) == (now is model)
    assert_the_same_objects(tensors(now), before)
    assert_same(evaluate(now.DCA, random_maps(VENDORED)), results)
    if now is not model:  # which is still replaced, with tensors of its own
        assert not set(map(id, tensors(now).values())) & set(map(id, tensors(model).values()))
        assert restore_dca(model).DCA is original


def test_restored_in_the_mode_of_now() -> None:
    model = trusting_replace_dca(host().train())
    model.eval()
    model.DCA.bn_relu[0].train()
    restore_dca(model)
    training = {name for name, m in model.DCA.named_modules() if m.training}
    assert training == {"bn_relu.0", "bn_relu.0.0", "bn_relu.0.1"}


def test_all_are_restored_or_none() -> None:
    model = trusting_replace_dca(nn.ModuleList([host().DCA, host(seed=1).DCA]))
    model[1].upconvs[0].forward = model[1].upconvs[0].forward
    before = Snapshot(model)
    with pytest.raises(ValueError, match=r"^model: .* got one that was put on upconvs\.0: remove it"):
        restore_dca(model)
    before.assert_unchanged(model)


def test_norms_exchanged_while_replaced_stay() -> None:
    model = trusting_replace_dca(host())
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    restore_dca(model)
    assert [type(head[0]) for head in model.DCA.bn_relu] == [nn.SyncBatchNorm] * 2


def test_replaced_again_after_it_was_restored() -> None:
    model = restore_dca(trusting_replace_dca(host()))
    model.DCA.bn_relu = nn.SyncBatchNorm.convert_sync_batchnorm(model.DCA.bn_relu)
    expected = evaluate(copy.deepcopy(model).eval().DCA, random_maps(VENDORED))
    assert_same(evaluate(trusting_replace_dca(model.eval()).DCA, random_maps(VENDORED)), expected)
    assert restore_dca(model).DCA.patch == PATCH
