"""What PyTorch's tools and safetensors make of the module; copies of it are in test_module.py."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from tests.oracle import (
    Config,
    assert_identical,
    assert_same,
    both_modes,
    each_backend,
    each_trainable,
    evaluate,
    pair,
    random_like,
    random_maps,
)


@each_backend
def test_sync_batch_norm(backend: str) -> None:
    plain, converted = (pair(Config(), backend, train=False)[0] for _ in range(2))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(converted)
    assert [type(head[0]) for head in converted.bn_relu] == [nn.SyncBatchNorm] * 2
    maps = random_maps(Config(), backend=backend)
    assert_same(*(evaluate(module, maps, backward=False) for module in (converted, plain)))


def test_safetensors() -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    saved, _ = pair(Config(), seed=0)
    loaded, _ = pair(Config(), seed=1)
    loaded.load_state_dict(safetensors.load(safetensors.save(saved.state_dict())), strict=True)
    maps = random_maps(Config())
    assert_identical(evaluate(loaded, maps), evaluate(saved, maps))


@both_modes
def test_averaged_model(train: bool) -> None:
    modules = [pair(Config(), train=train, seed=seed)[0] for seed in (0, 1)]
    averaged = AveragedModel(modules[0], multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.75))
    for module in modules:
        averaged.update_parameters(module)
    expected, _ = pair(Config(), train=train, seed=1)  # buffers are the last module's
    with torch.no_grad():
        for own, other in zip(expected.parameters(), modules[0].parameters(), strict=True):
            own.lerp_(other, 0.75)
    maps = random_maps(Config())
    assert_same(evaluate(averaged.module, maps), evaluate(expected, maps))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@both_modes
@each_trainable
def test_activation_checkpointing(reentrant: bool, train: bool, backend: str) -> None:
    plain, checkpointed = (pair(Config(), backend, torch.float32, train)[0] for _ in range(2))
    forward = checkpointed.forward
    checkpointed.forward = lambda maps: checkpoint(lambda *maps: forward(maps), *maps, use_reentrant=reentrant)
    maps = random_maps(Config(), torch.float32)
    expected = evaluate(plain, maps)
    if reentrant:  # the whole forward runs again, and updates BatchNorm's buffers again; the other kind stops before
        plain(maps)
    expected |= {f"after.{name}": b for name, b in plain.named_buffers()}
    actual = evaluate(checkpointed, maps)
    assert_identical(actual | {f"after.{name}": b for name, b in checkpointed.named_buffers()}, expected)


@both_modes
@each_trainable
def test_scaled_loss(train: bool, backend: str) -> None:
    module, _ = pair(Config(), backend, torch.float32, train)
    maps = random_maps(Config(), torch.float32)
    upstream = random_like(maps)
    expected = evaluate(module, maps, upstream)
    module.zero_grad()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    leaves = [x.requires_grad_() for x in maps]
    loss = sum((y * g).sum() for y, g in zip(module(leaves), upstream, strict=True))
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    actual = {f"grad.{name}": p.grad for name, p in module.named_parameters()}
    actual |= {f"grad_input.{i}": x.grad / 2.0**16 for i, x in enumerate(leaves)}
    assert_identical(actual, {name: g for name, g in expected.items() if name.startswith("grad")})
