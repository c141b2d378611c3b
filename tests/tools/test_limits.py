"""What is too large for the kernels: what `auto` gives them they take, up to the launches on a stand-in for a GPU."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dca_kernels
from dca_kernels import backends

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks.offline import stand_in
from dca_kernels.triton_backend import launch


@pytest.fixture(autouse=True)
def triton_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No choice is remembered for other tests."""
    monkeypatch.delenv("DCA_BACKEND", raising=False)
    monkeypatch.setattr(backends, "why_not", lambda name, device: None)
    yield
    backends._say_automatic.cache_clear()


def step_without_kernels(monkeypatch: pytest.MonkeyPatch, module: nn.Module, maps: list[Tensor]) -> None:
    """A forward and backward up to the launches, as for an H100."""
    monkeypatch.setattr(launch, "run", lambda kernel, programs, config, **arguments: None)
    with stand_in.standing_in("sm_90"):
        outs = module.bfloat16()([x.bfloat16().requires_grad_() for x in maps])
        torch.autograd.backward(outs, [torch.empty_like(y) for y in outs])


@pytest.mark.parametrize(
    ("arguments", "width", "reason"),
    [
        ({"features": [8, 16]}, 8, None),
        ({"features": [8, 1016]}, 16, None),  # as many as may be of a head, and in a row of a window
        ({"features": [1024], "spatial_att": False}, 16, None),
        ({"features": [8, 16]}, 1024, None),
        ({"features": [1024] * 5, "spatial_att": False}, 8, "more than 1024 channels of a scale or 4096 of all"),
        ({"features": [8, 256], "patch": 2, "spatial_head": [4, 4]}, 31, "more than 4096 values in a row of a window"),
        ({"features": [96, 192, 384, 768]}, 8, "more than 256 channels a head of the spatial attention"),
        ({"features": [96, 384], "spatial_head": [4, 1]}, 8, "more than 256 channels a head of the spatial attention"),
        ({"features": [96, 192, 384, 768], "spatial_att": False}, 8, None),
        ({"features": [8, 2048], "spatial_att": False}, 8, "more than 1024 channels of a scale or 4096 of all"),
        ({"features": [8, 16]}, 1025, "more than 1024 columns of a map"),
        ({"features": [4, 8], "patch": (2, 128)}, 390, None),
        ({"features": [4, 8], "patch": (2, 129)}, 390, "more than 128 columns of the token grid"),
        ({"features": [4, 8], "patch": 1}, 512, "more than 4096 values in a row of a window"),
        ({"features": [8, 256], "patch": 2, "spatial_head": [4, 4]}, 64, "more than 4096 values in a row of a window"),
    ],
)
def test_auto_leaves_what_is_too_large_to_torch(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], width: int, reason: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    module = dca_kernels.DCA(**{"patch": 4} | arguments)
    maps = [torch.empty(1, c, 4, width) for c in arguments["features"]]
    large = backends.too_large(module, maps)
    assert large == reason
    name = backends.choose("auto", torch.device("cuda"), torch.bfloat16, large)
    assert name == ("triton" if reason is None else "torch")
    if reason is None:  # what `auto` gives to the kernels, they take
        module.backend = "triton"
        step_without_kernels(monkeypatch, module, maps)


@pytest.mark.parametrize(("features", "width"), [([4, 8], 512), ([8, 16], 1025), ([96, 192, 384, 768], 8)])
def test_what_is_too_large_raises_where_triton_is_named(
    monkeypatch: pytest.MonkeyPatch, features: list[int], width: int
) -> None:
    module = dca_kernels.DCA(features, patch=1, backend="triton")
    with pytest.raises(ValueError, match="too large for the triton backend"):
        step_without_kernels(monkeypatch, module, [torch.empty(1, c, 4, width) for c in features])


@pytest.mark.parametrize(
    ("features", "patch", "width"), [([8, 16], (2, 16), 1040), ([8, 16], (2, 129), 390), ([2048], (2, 2), 4)]
)
def test_what_only_the_backward_cannot_hold_raises_before_anything_changes(
    monkeypatch: pytest.MonkeyPatch, features: list[int], patch: tuple[int, int], width: int
) -> None:
    module = dca_kernels.DCA(features, patch=patch, spatial_att=len(features) > 1, backend="triton").bfloat16()
    maps = [torch.empty(1, c, 4, width, dtype=torch.bfloat16, requires_grad=True) for c in features]
    ran: list[str] = []
    monkeypatch.setattr(launch, "run", lambda kernel, programs, config, **arguments: ran.append(kernel.__name__))
    with stand_in.standing_in("sm_90"):
        with pytest.raises(ValueError, match="too large for the triton backend"):
            module(maps)
        assert not ran
        assert module.bn_relu[0][0].num_batches_tracked == 0
        module.eval()(maps)
    assert ran
