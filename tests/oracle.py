"""What the tests share: golden vectors, pairs of modules with equal weights, seeded inputs, comparisons.

One forward and backward is a dict of tensors under the names that the golden vectors use: `output.<i>`,
`grad_input.<i>`, `grad.<parameter>`, `after.<buffer>`.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dca_kernels
import reference
from benchmarks.parity import MAX_RATIO, RMS_RATIO

BACKENDS = ["torch"]
IMPLEMENTATIONS = ["reference", *BACKENDS]

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Config:
    """A module's arguments, and the sizes of its inputs. The default has two scales of unequal stride and width."""

    features: Sequence[int] = (8, 16)
    patch: int | tuple[int, int] = 4
    channel_att: bool = True
    spatial_att: bool = True
    n: int = 1
    channel_head: Sequence[int] | None = None
    spatial_head: Sequence[int] | None = None
    sizes: Sequence[tuple[int, int]] = field(default=((16, 16), (8, 8)), kw_only=True)
    batch: int = field(default=2, kw_only=True)

    @property
    def arguments(self) -> dict:
        return {k: v for k, v in asdict(self).items() if k not in ("sizes", "batch")}


# Modules and inputs


def build(implementation: str, *args, **kwargs) -> nn.Module:
    """The reference, or the fused module on a backend."""
    if implementation == "reference":
        return reference.DCA(*args, **kwargs)
    return dca_kernels.DCA(*args, **kwargs, backend=implementation)


def pair(
    config: Config, backend: str = "torch", dtype: torch.dtype = torch.float64, train: bool = True, seed: int = 0
) -> tuple[nn.Module, nn.Module]:
    """The fused module and the reference with the same random weights and buffers."""
    ours, theirs = build(backend, **config.arguments), build("reference", **config.arguments)
    randomise(theirs, seed)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(dtype).train(train), theirs.to(dtype).train(train)


@torch.no_grad()
def randomise(module: nn.Module, seed: int) -> None:
    """Weights, biases and running buffers that no default hides: none is zero or one."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            tensor.fill_(3)
        elif name.endswith("running_var"):
            tensor.copy_(0.5 + noise.square())
        elif tensor.dim() == 4:  # a convolution's weight
            tensor.copy_(noise / math.sqrt(tensor.shape[1]))
        else:
            tensor.copy_(0.3 * noise + (name.endswith("weight")))


def random_maps(config: Config, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)
    shapes = [(config.batch, c, *size) for c, size in zip(config.features, config.sizes, strict=True)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def random_like(tensors: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
    """Upstream gradients for outputs of these shapes and dtypes."""
    generator = torch.Generator().manual_seed(2000 + seed)
    return [torch.randn(t.shape, generator=generator).to(t.dtype) for t in tensors]


def evaluate(module: nn.Module, maps: Sequence[Tensor], upstream: Sequence[Tensor] | None = None) -> Results:
    """One forward and backward, by default from random upstream gradients. `maps` keep their strides."""
    maps = [x.detach().requires_grad_() for x in maps]
    module.zero_grad()
    outputs = module(maps)
    torch.autograd.backward(outputs, random_like(outputs) if upstream is None else upstream)
    results = {f"output.{i}": y.detach() for i, y in enumerate(outputs)}
    results |= {f"grad_input.{i}": x.grad for i, x in enumerate(maps)}
    results |= {f"grad.{name}": p.grad for name, p in module.named_parameters()}
    return results | {f"after.{name}": b.clone() for name, b in module.named_buffers()}


# Comparisons


def assert_same(actual: Results, expected: Results, rtol: float = 1e-9) -> None:
    """Float64 results agree to `rtol` of each tensor's largest value.

    A gradient that is zero in exact arithmetic holds rounding noise on the scale of the terms that cancel in it: every
    gradient may also be wrong by 1e-13 of the largest of all.
    """
    assert actual.keys() == expected.keys()
    noise = 1e-13 * max((_largest(t) for name, t in expected.items() if name.startswith("grad")), default=0.0)
    for name, value in expected.items():
        assert actual[name] is not None, name
        atol = rtol * _largest(value) + (noise if name.startswith("grad") else 0.0)
        torch.testing.assert_close(
            actual[name], value, rtol=0, atol=atol, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )


def assert_parity(config: Config, backend: str, train: bool, seed: int = 0) -> None:
    """The fused module's outputs, gradients and buffers are the reference's, in float64."""
    ours, theirs = pair(config, backend, train=train, seed=seed)
    maps = random_maps(config, seed=seed)
    assert_same(evaluate(ours, maps), evaluate(theirs, maps))


def assert_identical(actual: Results, expected: Results) -> None:
    """Equal bit for bit (NaN where NaN)."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=0, atol=0, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )


def _largest(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()].abs()
    return finite.max().item() if finite.numel() else 0.0


# Golden vectors

GOLDEN = sorted(path.stem for path in (Path(__file__).parent / "golden").glob("*.npz"))


class Golden:
    """One case of golden/README.md: what the official module computed in float64."""

    def __init__(self, name: str) -> None:
        with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as file:
            config = json.loads(bytes(file["config"]))
            arrays = {key: torch.from_numpy(np.asarray(file[key])) for key in file.files if key != "config"}
        self.train = config["train"]
        keys = ("features", "strides", "patch", "channel_att", "spatial_att", "n", "channel_head", "spatial_head")
        self.arguments = {key: config[key] for key in keys}
        self.state = {key.removeprefix("state."): a for key, a in arrays.items() if key.startswith("state.")}
        self.results = {key: a for key, a in arrays.items() if not key.startswith(("state.", "index."))}
        self._index = [arrays[f"index.{i}"].long() for i in range(len(config["features"]))]
        sizes = [config["patch"] * stride for stride in config["strides"]]
        shapes = [(config["batch"], c, size, size) for c, size in zip(config["features"], sizes, strict=True)]
        seed = config["seed"] * 1000
        maps = (_normal(seed + 500 + i, shape) * config["scale"] + config["shift"] for i, shape in enumerate(shapes))
        self.maps = [_float32_values(x) for x in maps]
        self.upstream = [_float32_values(_normal(seed + 600 + i, shape)) for i, shape in enumerate(shapes)]

    def sample(self, results: Results) -> Results:
        """Results as the golden file keeps them: large tensors at some positions, and summed to one value a channel."""
        sampled = {}
        for name, value in results.items():
            kind, _, i = name.partition(".")
            if kind in ("output", "grad_input"):
                sampled[name] = value.flatten()[self._index[int(i)]]
                sampled[f"{kind}_sum.{i}"] = value.sum((0, 2, 3))
            elif kind == "grad" or name in self.results:  # of the buffers, the official run kept mean and variance only
                sampled[name] = value
        return sampled


def _normal(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape)


def _float32_values(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.float32)).double()


# The error budget of low precision


def assert_within_budget(ours: Tensor, theirs: Tensor, exact: Tensor, dtype: torch.dtype, name: str) -> None:
    """Our error against float64 is that of plain PyTorch in the same dtype, times a factor, plus one rounding step.

    The step is `dtype`'s at the scale of `exact`: what storing an exact result already costs. Maximum and root mean
    square are both bounded: the first hides a bias, the second a single wrong element.
    """
    step = torch.finfo(dtype).eps
    error, baseline = ours.double() - exact, theirs.double() - exact
    assert error.isfinite().all(), f"{name}: not finite"
    bound = MAX_RATIO * baseline.abs().max() + step * exact.abs().max()
    assert error.abs().max() <= bound, f"{name}: max error {error.abs().max():.3g}, budget {bound:.3g}"
    bound = RMS_RATIO * _rms(baseline) + step * _rms(exact)
    assert _rms(error) <= bound, f"{name}: RMS error {_rms(error):.3g}, budget {bound:.3g}"


def _rms(tensor: Tensor) -> Tensor:
    return tensor.square().mean().sqrt()


def promoted(module: nn.Module, config: Config) -> nn.Module:
    """The reference in float64, with the weights of `module` as they are in its own dtype."""
    exact = build("reference", **config.arguments).double().train(module.training)
    exact.load_state_dict(module.state_dict())
    return exact


both_modes = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
each_backend = pytest.mark.parametrize("backend", BACKENDS)
