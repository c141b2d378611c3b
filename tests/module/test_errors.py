"""Bad arguments and inputs raise: the message names the argument, what was expected and what came."""

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import dca_kernels
from tests.oracle import Config, assert_identical, both_modes, each_backend, pair, random_maps

ARGUMENTS: dict[str, tuple[dict, type[Exception], str]] = {
    "no_features": ({"features": []}, ValueError, "features: expected integers of at least 1, got []"),
    "zero_features": ({"features": [8, 0]}, ValueError, "features: expected integers of at least 1, got [8, 0]"),
    "features_number": ({"features": 8}, TypeError, "features: expected a list of integers, got 8"),
    "features_text": ({"features": "8"}, TypeError, "features: expected a list of integers, got '8'"),
    "features_float": ({"features": [8.0]}, TypeError, "features: expected integers, got [8.0]"),
    "strides_number": ({"strides": 2}, TypeError, "strides: expected a list of integers, got 2"),
    "strides": ({"strides": [1]}, ValueError, "strides: expected 2 values, one for each of features, got 1"),
    "patch_zero": ({"patch": 0}, ValueError, "patch: expected integers of at least 1, got [0, 0]"),
    "patch_negative": ({"patch": (4, -1)}, ValueError, "patch: expected integers of at least 1, got [4, -1]"),
    "patch_of_three": ({"patch": (4, 4, 4)}, ValueError, "patch: expected one integer or (P_h, P_w), got (4, 4, 4)"),
    "patch_one_float": ({"patch": 4.5}, ValueError, "patch: expected one integer or (P_h, P_w), got 4.5"),
    "patch_none": ({"patch": None}, ValueError, "patch: expected one integer or (P_h, P_w), got None"),
    "patch_float": ({"patch": (4.0, 4)}, TypeError, "patch: expected integers, got (4.0, 4)"),
    "n": ({"n": 0}, ValueError, "n: expected an integer of at least 1, got 0"),
    "channel_head_number": ({"channel_head": 4}, TypeError, "channel_head: expected a list of integers, got 4"),
    "channel_head_count": (
        {"channel_head": [1]},
        ValueError,
        "channel_head: expected 2 values, one for each of features, got 1",
    ),
    "spatial_head_count": (
        {"spatial_head": [4, 4, 4]},
        ValueError,
        "spatial_head: expected 2 values, one for each of features, got 3",
    ),
    "no_heads": ({"spatial_head": []}, ValueError, "spatial_head: expected integers of at least 1, got []"),
    "channel_head": (
        {"channel_head": [1, 3]},
        ValueError,
        "channel_head[1]: expected a divisor of features[1] = 16 and of their sum 24, got 3",
    ),
    "spatial_head": (
        {"spatial_head": [8, 16]},
        ValueError,
        "spatial_head[1]: expected a divisor of features[1] = 16 and of their sum 24, got 16",
    ),
    "default_heads": (
        {"features": [3, 6]},
        ValueError,
        "spatial_head[0]: expected a divisor of features[0] = 3 and of their sum 9, got the default, 4: "
        "pass spatial_head, [3, 3] for one",
    ),
    "default_heads_of_no_common_divisor": (
        {"features": [8, 15]},
        ValueError,
        "spatial_head[0]: expected a divisor of features[0] = 8 and of their sum 23, got the default, 4: "
        "pass spatial_head, [1, 1] for one",
    ),
    "backend": ({"backend": "cuda"}, ValueError, "backend: expected one of 'auto', 'torch', 'triton', got 'cuda'"),
}


@pytest.mark.parametrize("arguments, error, message", ARGUMENTS.values(), ids=ARGUMENTS)
def test_constructor(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        dca_kernels.DCA(**({"features": [8, 16]} | arguments))


def test_the_heads_that_an_error_names_are_taken() -> None:
    dca_kernels.DCA([3, 6], spatial_head=[3, 3])
    dca_kernels.DCA([8, 15], spatial_head=[1, 1])


def test_integers_of_numpy_are_taken() -> None:
    module = dca_kernels.DCA(np.array([8, 16]), patch=np.int64(4), spatial_head=np.array([2, 4]))
    assert (module.features, module.grid, module.spatial_head) == ([8, 16], (4, 4), [2, 4])
    assert dca_kernels.DCA([8, 16], patch=np.array([4, 7])).grid == (4, 7)


def test_heads_of_an_attention_that_is_off_are_not_checked() -> None:
    dca_kernels.DCA([6, 9], spatial_att=False)  # the default of 4 spatial heads divides neither


def _second(change: Callable[[Tensor], object]) -> Callable[[list[Tensor]], list]:
    return lambda maps: [maps[0], change(maps[1])]


class Subclass(Tensor): ...


MAPS: dict[str, tuple[Callable[[list[Tensor]], object], type[Exception], str]] = {
    "tensor": (lambda maps: maps[0], TypeError, "maps: expected a list or tuple of tensors, got Tensor"),
    "subclass": (
        lambda maps: maps[0].as_subclass(Subclass),
        TypeError,
        "maps: expected a list or tuple of tensors, got Subclass",
    ),
    "generator": (iter, TypeError, "maps: expected a list or tuple of tensors, got list_iterator"),
    "too_few": (lambda maps: maps[:1], ValueError, "maps: expected 2 tensors, one for each of features, got 1"),
    "too_many": (
        lambda maps: [*maps, maps[0]],
        ValueError,
        "maps: expected 2 tensors, one for each of features, got 3",
    ),
    "not_a_tensor": (_second(lambda x: x.cpu().numpy()), TypeError, "maps[1]: expected a tensor, got ndarray"),
    "channels": (
        _second(lambda x: x[:, :8]),
        ValueError,
        "maps[1]: expected shape (B, 16, H, W), got (2, 8, 8, 8)",
    ),
    "rank": (_second(lambda x: x[0]), ValueError, "maps[1]: expected shape (B, 16, H, W), got (16, 8, 8)"),
    "no_pixels": (
        _second(lambda x: x[:, :, :0]),
        ValueError,
        "maps[1]: expected shape (B, 16, H, W), got (2, 16, 0, 8)",
    ),
    "integers": (
        _second(Tensor.long),
        TypeError,
        "maps[1]: expected a floating dtype of at least 16 bits, got torch.int64",
    ),
    "complex": (
        _second(lambda x: x + 0j),
        TypeError,
        "maps[1]: expected a floating dtype of at least 16 bits, got torch.complex64",
    ),
    "ragged_batch": (_second(lambda x: x[:1]), ValueError, "maps[1]: expected batch size 2, as maps[0], got 1"),
    "device": (
        _second(lambda x: x.to("meta")),
        ValueError,
        "maps[1]: expected device cpu, as the parameters, got meta",
    ),
    "mixed_dtypes": (
        _second(Tensor.bfloat16),
        TypeError,
        "maps[1]: expected dtype torch.float32, as the parameters, got torch.bfloat16",
    ),
    "dtype": (
        lambda maps: [x.double() for x in maps],
        TypeError,
        "maps[0]: expected dtype torch.float32, as the parameters, got torch.float64",
    ),
}


@pytest.mark.parametrize("change, error, message", MAPS.values(), ids=MAPS)
@both_modes
@each_backend
def test_maps(change: Callable, error: type[Exception], message: str, train: bool, backend: str) -> None:
    module, _ = pair(Config(), backend, torch.float32, train)
    maps = random_maps(Config(), torch.float32, backend=backend)
    message = message.replace("device cpu", f"device {maps[0].device}")
    _assert_raises_and_keeps_state(module, change(maps), error, message)


def _without_statistics(module: torch.nn.Module) -> None:
    """In evaluation, its BatchNorms take the batch's all the same."""
    for head in module.eval().bn_relu:
        head[0].running_mean = head[0].running_var = None


def _with_another_activation(module: torch.nn.Module) -> None:
    module.bn_relu[1][1] = torch.nn.GELU()


@pytest.mark.parametrize("change", [torch.nn.Module.train, _without_statistics, _with_another_activation])
@each_backend
def test_one_value_per_channel_in_train_mode(change: Callable[[torch.nn.Module], object], backend: str) -> None:
    config = Config(batch=1, sizes=((4, 4), (1, 1)))
    ours, theirs = pair(config, backend)
    for module in (ours, theirs):
        change(module)
    maps = random_maps(config, backend=backend)
    message = "maps[1]: expected more than 1 value per channel when training, got input size (1, 16, 1, 1)"
    _assert_raises_and_keeps_state(ours, maps, ValueError, message)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        theirs(maps)


@both_modes
@pytest.mark.parametrize("dtype, own", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_float64_does_not_mix_under_autocast(dtype: torch.dtype, own: torch.dtype, train: bool) -> None:
    module, _ = pair(Config(), dtype=own, train=train)
    maps, others = random_maps(Config(), own), random_maps(Config(), dtype)
    for i, given in enumerate((others, [maps[0], others[1]])):
        message = f"maps[{i}]: expected a dtype that autocast brings to that of {own}, got {dtype}"
        with torch.autocast("cpu", torch.bfloat16):
            _assert_raises_and_keeps_state(module, given, TypeError, message)


def _assert_raises_and_keeps_state(module: torch.nn.Module, maps: object, error: type[Exception], message: str) -> None:
    before = {name: t.clone() for name, t in module.state_dict().items()}
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        module(maps)
    assert_identical(module.state_dict(), before)
