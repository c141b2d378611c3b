"""Models with a DCA to replace, and what a call must leave of them."""

import functools
import io
import re

import pytest
import torch
from torch import Tensor, nn

from dca_kernels import inspect, replace_dca
from tests import vendored
from tests.oracle import Config, assert_identical, randomise

FEATURES, STRIDES, PATCH = [8, 16], [4, 2], 4
VENDORED = Config(FEATURES, PATCH)


def official(kind: type = vendored.DualCrossAttention, seed: int = 0, **arguments) -> nn.Module:
    dca = kind(**({"features": FEATURES, "strides": STRIDES, "patch": PATCH} | arguments))
    randomise(dca, seed)
    return dca


class Host(nn.Module):
    """A network with a DCA between convolutions, called as the official hosts do."""

    def __init__(self, dca: nn.Module) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1)
        self.DCA = dca
        self.out = nn.Conv2d(8 + 16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.conv1(x)
        x2 = self.conv2(x1)
        x1, x2 = self.DCA([x1, x2])
        return self.out(torch.cat([x1, nn.functional.interpolate(x2, x1.shape[2:])], 1))


def host(**arguments) -> Host:
    torch.manual_seed(0)
    return Host(official(**arguments)).double()


# PyTorch 2.13 warns about its own code when it traces a module with an autograd function.
tracing = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

trusting_replace_dca = functools.partial(replace_dca, verify=False)  # where the test is about something else

IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def assert_the_same_objects(actual: dict[str, object], expected: dict[str, object]) -> None:
    assert list(actual) == list(expected)
    assert all(actual[name] is expected[name] for name in expected)


def _with_length(attribute: tuple[str, object]) -> tuple[str, int]:
    name, value = attribute
    return name, len(value) if isinstance(value, (list, dict)) else 0


class Snapshot:
    """All of a model that a call that raises, or only looks, must leave as it is."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.attributes = {name: list(map(_with_length, vars(m).items())) for name, m in self.modules.items()}
        self.modes = {name: m.training for name, m in self.modules.items()}
        self.tensors = tensors(model)
        self.values = {name: t.clone() for name, t in self.tensors.items()}
        self.generator = torch.get_rng_state()

    def assert_unchanged(self, model: nn.Module) -> None:
        now = Snapshot(model)
        assert_the_same_objects(now.modules, self.modules)
        assert_the_same_objects(now.tensors, self.tensors)
        assert_identical(now.values, self.values)
        assert (now.attributes, now.modes) == (self.attributes, self.modes)
        assert torch.equal(now.generator, self.generator)


def assert_refused(model: nn.Module, name: str, reason: str) -> None:
    """With a reason, a pattern, by an error and in the report; nothing is changed."""
    before = Snapshot(model)
    with pytest.raises(
        ValueError, match=f"^model: expected DCAs that can be replaced, got {re.escape(name)}: {reason}$"
    ):
        replace_dca(model)
    (found,) = inspect(model)
    assert re.fullmatch(reason, found.reason)
    before.assert_unchanged(model)


def through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)
