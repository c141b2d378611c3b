"""What the tests share: golden vectors, pairs of modules with equal weights, seeded inputs, comparisons.

One forward and backward is a dict of tensors under the names that the golden vectors use: `output.<i>`,
`grad_input.<i>`, `grad.<parameter>`, `after.<buffer>`. Of a backend without a backward it is the outputs and buffers.
"""

import copy
import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dca_kernels
import reference
from reference.budget import DOUBLE, Error, allowed, used

BACKENDS = ["torch", "triton"]
# The backends whose backward runs everywhere; the kernels' has tests of its own (test_triton_backward.py), since
# interpreted it takes many times a forward.
TRAINABLE = ["torch"]
IMPLEMENTATIONS = ["reference", *BACKENDS]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the kernels, and of what they are compared with
INTERPRETED = DEVICE == "cpu"  # a kernel takes seconds for what a GPU does in microseconds

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


# In blocks of 16, two or three along each axis, with a tail: 34 tokens, 20 channels, rows of 17 windows and 35 pixels.
TILED = Config((20, 6), (2, 17), channel_head=(2, 1), spatial_head=(2, 1), sizes=((5, 35), (2, 18)))


# Modules and inputs


def device_of(backend: str) -> str:
    """Where a backend's tests run."""
    return DEVICE if backend == "triton" else "cpu"


def full_size(backend: str) -> bool:
    """Whether a backend is fast enough here for large maps and many draws."""
    return not (backend == "triton" and INTERPRETED)


def build(implementation: str, *args, **kwargs) -> nn.Module:
    """The reference, or the fused module on a backend."""
    if implementation == "reference":
        return reference.DCA(*args, **kwargs)
    return dca_kernels.DCA(*args, **kwargs, backend=implementation).to(device_of(implementation))


def pair(
    config: Config, backend: str = "torch", dtype: torch.dtype = torch.float64, train: bool = True, seed: int = 0
) -> tuple[nn.Module, nn.Module]:
    """The fused module and the reference with the same random weights and buffers."""
    ours, theirs = build(backend, **config.arguments), build("reference", **config.arguments)
    randomise(theirs, seed)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(dtype).train(train), theirs.to(device_of(backend), dtype).train(train)


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


def random_maps(
    config: Config, dtype: torch.dtype = torch.float64, seed: int = 0, backend: str = "torch"
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)
    shapes = [(config.batch, c, *size) for c, size in zip(config.features, config.sizes, strict=True)]
    return [torch.randn(shape, generator=generator).to(device_of(backend), dtype) for shape in shapes]


def named(tensors: Sequence[Tensor]) -> Results:
    return {str(i): t for i, t in enumerate(tensors)}


def random_like(tensors: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
    """Upstream gradients for outputs of these shapes and dtypes."""
    generator = torch.Generator().manual_seed(2000 + seed)
    return [torch.randn(t.shape, generator=generator).to(t) for t in tensors]


def evaluate(
    module: nn.Module, maps: Sequence[Tensor], upstream: Sequence[Tensor] | None = None, backward: bool = True
) -> Results:
    """One forward, and one backward, by default from random upstream gradients. `maps` keep their strides."""
    maps = [x.detach().requires_grad_(backward) for x in maps]
    module.zero_grad()
    with torch.set_grad_enabled(backward):
        outputs = module(maps)
    results = {f"output.{i}": y.detach() for i, y in enumerate(outputs)}
    if backward:
        torch.autograd.backward(outputs, random_like(outputs) if upstream is None else upstream)
        results |= {f"grad_input.{i}": x.grad for i, x in enumerate(maps)}
        results |= {f"grad.{name}": p.grad for name, p in module.named_parameters()}
    return results | {f"after.{name}": b.clone() for name, b in module.named_buffers()}


# Layouts of maps


def _sliced(x: Tensor) -> Tensor:
    """With a storage offset, and NaN between rows."""
    wide = x.new_full((*x.shape[:3], x.shape[3] + 2), float("nan"))
    wide[..., 1:-1] = x
    return wide[..., 1:-1]


def _part_of_cat(x: Tensor) -> Tensor:
    nan = torch.full_like(x, float("nan"))
    return torch.cat([nan, x, nan], 1)[:, x.shape[1] : 2 * x.shape[1]]


def _misaligned(x: Tensor) -> Tensor:
    """Contiguous, but not from a multiple of 16 bytes on."""
    storage = x.new_full((x.numel() + 1,), float("nan"))
    storage[1:] = x.flatten()
    return storage[1:].view(x.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "batch_innermost": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "reversed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "sliced": _sliced,
    "part_of_cat": _part_of_cat,
    "misaligned": _misaligned,
    "expanded_batch": lambda x: x[:1].expand_as(x),
    "expanded_rows": lambda x: x[:, :, :1].expand_as(x),
}


# Comparisons


def assert_same(actual: Results, expected: Results, rtol: float = DOUBLE) -> None:
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
    maps = random_maps(config, seed=seed, backend=backend)
    modules = pair(config, backend, train=train, seed=seed)
    assert_same(*(evaluate(module, maps, backward=backend in TRAINABLE) for module in modules))


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

    def redrawn(self, seed: int) -> "Golden":
        """The same module on other maps, of the same mean and deviation; the official results are not theirs."""
        other = copy.copy(self)
        generator = torch.Generator().manual_seed(seed)
        normal = [torch.randn(x.shape, generator=generator).double() for x in self.maps]
        other.maps = [(r * x.std() + x.mean()).float().double() for r, x in zip(normal, self.maps, strict=True)]
        return other

    def sample(self, results: Results) -> Results:
        """Results as the golden file keeps them: large tensors at some positions, and summed to one value a channel."""
        sampled = {}
        for name, value in results.items():
            kind, _, i = name.partition(".")
            if kind in ("output", "grad_input"):
                sampled[name] = value.flatten()[self._index[int(i)].to(value.device)]
                sampled[f"{kind}_sum.{i}"] = value.sum((0, 2, 3))
            elif kind == "grad" or name in self.results:  # of the buffers, the official run kept mean and variance only
                sampled[name] = value
        return {name: value.cpu() for name, value in sampled.items()}

    def expected(self, backward: bool) -> Results:
        """What the official module computed, or of it the outputs and buffers only."""
        return {name: value for name, value in self.results.items() if backward or not name.startswith("grad")}


def _normal(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape)


def _float32_values(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.float32)).double()


# The error budget of low precision


LEAST_USED = 0.1  # a draw counts as at least this part of its budget: one without error hides none that has one
ALONE = 30.0  # times the largest budget of all draws that one of them may be off

Draw = Sequence[Tensor]  # ours, the reference's and the exact values


def assert_within_budget(draws: Sequence[Draw], dtype: torch.dtype, name: str, budgets: float = 1.0) -> None:
    """Our error against float64 is within the budget of reference/budget.py, or within several.

    Each draw has its own budget, and in their geometric mean the draws use at most one. Where attention weights are
    nearly tied, a draw's error is tens of times another's, and the order of sums decides whose is the larger there: of
    the errors of all draws together it would decide alone. For a defect that few draws meet there is a limit to each.
    """
    errors = [Error.of([ours], [exact]) for ours, _, exact in draws]
    most = [allowed(Error.of([theirs], [exact]), [exact], dtype) for _, theirs, exact in draws]
    assert_errors_allowed(errors, most, name, budgets)


def assert_errors_allowed(errors: Sequence[Error], most: Sequence[Error], name: str, budgets: float = 1.0) -> None:
    """Of some draws: what `assert_within_budget` says of them and of what they may be."""
    values, largest = (torch.tensor([astuple(e) for e in of], dtype=torch.float64) for of in (errors, most))
    assert values.isfinite().all(), f"{name}: not finite"
    parts = torch.tensor([used(*of) for of in zip(errors, most, strict=True)], dtype=torch.float64)
    mean = parts.clamp(min=LEAST_USED).log().mean(0).exp()
    assert (mean <= budgets).all(), (
        f"{name}: max and RMS error are {mean.tolist()} of the budget, by draw {values.tolist()}"
    )
    known = largest.isfinite()  # where the reference overflows there is none
    alone = values.where(known, 0.0).amax(0) / largest.where(known, 0.0).amax(0)
    assert not (alone > ALONE).any(), f"{name}: max and RMS error of one draw are {alone.tolist()} of the budget"


def assert_all_within_budget(draws: Sequence[Sequence[Results]], dtype: torch.dtype, budgets: float = 1.0) -> None:
    """Ours, the reference's and the exact results of each draw.

    Quantities of a kind are taken together: alone, a parameter's gradient or a buffer has too few elements for a ratio
    of errors.
    """
    for kind in sorted({name.partition(".")[0] for *_, exact in draws for name in exact}):
        values = []
        for draw in draws:
            names = [name for name in draw[-1] if name.startswith(f"{kind}.") and "num_batches_tracked" not in name]
            if names:
                values.append([torch.cat([results[name].double().flatten() for name in names]) for results in draw])
        assert_within_budget(values, dtype, kind, budgets)


def promoted(module: nn.Module, config: Config) -> nn.Module:
    """The reference in float64, with the weights of `module` as they are in its own dtype."""
    device = next(module.parameters()).device
    exact = build("reference", **config.arguments).to(device, torch.float64).train(module.training)
    exact.load_state_dict(module.state_dict())
    return exact


@contextmanager
def resized_blocks(factor: float) -> Iterator[None]:
    """Kernels take blocks of `factor` times the size, down to 16: their results should be the same.

    No block grows beyond 1024: two of them are as many elements as a tensor may have in Triton.
    """
    from dca_kernels.triton_backend import launch

    def changed(name: str, size: int) -> int:
        if name == "tile":
            return max(min(size, 256), int(factor * size))
        return max(min(size, 16), min(max(size, 1024), int(factor * size)))

    def resized(*args) -> dict[str, int]:
        found = configuration(*args)
        return {n: changed(n, size) if n == "tile" or n.startswith("block") else size for n, size in found.items()}

    configuration = launch.configuration
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "configuration", resized)
        yield


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def over_backends(names: Sequence[str]) -> pytest.MarkDecorator:
    """Once for each of some backends."""
    marks = {"triton": [needs_triton]}
    return pytest.mark.parametrize("backend", [pytest.param(name, marks=marks.get(name, [])) for name in names])


# NumPy warns of what a GPU computes without a word; where all is finite, a warning stays an error.
not_finite = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")
both_modes = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
each_backend = over_backends(BACKENDS)
each_trainable = over_backends(TRAINABLE)
of_pytorch = pytest.mark.filterwarnings(  # its own code, about its own code
    "ignore:`torch.jit:DeprecationWarning",
    "ignore:`torch.jit:FutureWarning",
    "ignore:.*should not be instantiated:DeprecationWarning",
)
