"""Whether a module of an official DCA's layout computes what a DCA does, wherever it is used.

Both run on copies, on the CPU in float64, with the module's own `bn_relu`: at its own grid and sizes, and at others
that it accepts; batches, scales of maps, weights and modes vary from case to case. What no trial shows is looked for in
what the module's functions name. Neither the model nor a random number generator is touched.
"""

import copy
import functools
import itertools
import logging
import math
import random
import sys
import time
import types
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode

from dca_kernels import plain
from dca_kernels.module import DCA
from dca_kernels.official import Refused, copy_without_hooks, fused_of, pair, shared_names

SIDE = 3  # of the token grid of most cases, where the module's own is large
FEW_TOKENS = 64  # of a grid that is not large
MOST_BYTES = 2**28  # of all attention matrices of one image, and of its maps
# Of float64 results: relative to the largest of a tensor and, for gradients, which may be zero by algebra, of them all.
TOLERANCES = {"random": (1e-9, 1e-12), "own": (1e-7, 1e-9), "large": (1e-7, 1e-9)}
LOUD = 30.0  # times the ordinary scale

_logger = logging.getLogger("dca_kernels")


class Case(NamedTuple):
    """What is run.

    Attributes:
        batch: number of images.
        weights: "random", "large" (random, times 10) or "own".
        training: the mode; evaluation where False.
        scale: of the maps. Upstream gradients have its fourth power: a clipped gradient shows.
        graded: whether gradients are enabled.
        spoilt: whether the first image has a NaN.
    """

    batch: int
    weights: str
    training: bool
    scale: float = 1.0
    graded: bool = True
    spoilt: bool = False

    @property
    def mode(self) -> str:
        return "training" if self.training else "evaluation"


_PRODUCT = itertools.product(("random", "own", "large"), (False, True), (1.0, LOUD))
UNGRADED = Case(1, "random", False, graded=False)
SPOILT = Case(2, "random", False, graded=False, spoilt=True)
# At a small grid; at a large one where the small one has agreed, and what else is tried there where it has not.
ALL = [*(Case((2, 1, 3)[i % 3], *those) for i, those in enumerate(_PRODUCT)), UNGRADED._replace(batch=5), SPOILT]
FEW = [Case(1, "random", False), Case(1, "large", True, LOUD), Case(2, "own", True)]
REST = [Case(2, "random", True, LOUD), Case(3, "random", False, LOUD), Case(1, "own", False), UNGRADED, SPOILT]
OF_OTHER_SIZES = [UNGRADED, Case(4, "random", True)]


def verify(original: nn.Module, fused: DCA, name: str) -> None:
    """Refuse a module that computes something else than a DCA, or whose copy does not run.

    Args:
        original: the module, unchanged by this.
        fused: what would take its place.
        name: the module's, for the log.

    Raises:
        Refused: with the first difference.
    """
    begin = time.perf_counter()
    _refuse_untriable(original)
    grid = _affordable(original, fused)
    _logger.info("%s: verifying on the CPU in float64, at a grid of %s tokens", name, _by(grid))
    if grid != fused.grid:
        _logger.warning(
            "%s: its grid of %s tokens is too large to verify: a grid of %s is verified in its place",
            name,
            _by(fused.grid),
            _by(grid),
        )
    with torch.inference_mode(False), torch.enable_grad():
        small_agrees = False
        if math.prod(grid) > FEW_TOKENS:
            small = tuple(min(side, SIDE + (side > min(grid))) for side in grid)  # oblong where the grid is
            try:
                trial = _Trial(original, fused, small)
                trial.run(ALL)
                trial.run_at(trial.other_sizes + trial.equal_sizes, OF_OTHER_SIZES)
                small_agrees = True
            except Exception as error:  # its code may have the grid as a number: then all is tried at that
                _logger.info("%s: not verified at a grid of %s tokens: %s", name, _by(small), error)
        try:
            trial = _Trial(original, fused, grid)
            if math.prod(grid) <= FEW_TOKENS:
                trial.run(ALL)
                trial.run_at(trial.other_sizes + trial.equal_sizes, OF_OTHER_SIZES)
            else:
                trial.run(FEW)
                few = trial.other_sizes[:2] if small_agrees else trial.other_sizes[:4]
                trial.run_at([*few, *trial.equal_sizes], [UNGRADED])
                if not small_agrees:
                    trial.run(REST)
        except Refused:
            raise
        except Exception as error:
            raise Refused(f"a copy of it does not run: {type(error).__name__}: {error}") from error
    _logger.info("%s: verified in %.1f s", name, time.perf_counter() - begin)


class _Trial:
    """Copies of the original and of what would take its place, at one token grid."""

    def __init__(self, original: nn.Module, fused: DCA, grid: Sequence[int]) -> None:
        self.theirs = _copy_of(original, fused, grid)
        self.ours = fused_of(copy.deepcopy(self.theirs), "torch")
        self.own = {name: tensor.clone() for name, tensor in self.theirs.state_dict().items()}
        self.sizes = sizes_of(self.theirs, self.ours.grid)

        height, width = self.ours.grid
        other_grids = (height, width + 1), (max(1, height * 3 // 4), width), (height + 1, width + 1)
        odd = [[h + 1, max(1, w - 1)] for h, w in self.sizes]
        # To which the original may say no: larger and smaller ones, oblong, of no whole stride, and much larger ones.
        self.other_sizes = [sizes_of(self.theirs, other) for other in other_grids]
        self.other_sizes += [odd, sizes_of(self.theirs, (4 * height, 5 * width))]
        # What resizes its maps to the first one's takes maps of one size.
        scales, (least, *_) = len(self.sizes), sorted(self.sizes)
        self.equal_sizes = [[size] * scales for size in (least, [least[0] + 1, least[1] + 2])]

    def run(self, cases: Sequence[Case]) -> None:
        """Compare them at the original's own sizes; raise at the first difference."""
        for case in cases:
            self._compare(case, self.sizes, required=True)
        if SPOILT in cases:  # not where few are enough
            self._refuse_what_calls_leave()
            self._compare_under_autocast()

    def run_at(self, sizes_of_maps: Sequence[Sequence[Sequence[int]]], cases: Sequence[Case]) -> None:
        """Compare them at other sizes, where the original takes them."""
        for sizes in sizes_of_maps:
            for case in cases:
                self._compare(case, sizes, required=False)

    def _compare(self, case: Case, sizes: Sequence[Sequence[int]], required: bool) -> None:
        maps = [
            _normal((case.batch, c, *s), i) * case.scale for i, (c, s) in enumerate(_zip(self.ours.features, sizes))
        ]
        if case.spoilt:
            maps[0][0, 0, 0, 0] = math.nan
        self._set_weights(case)
        try:
            theirs = _results(self.theirs, case, maps, NoDraws(case.mode))
        except Refused:
            raise
        except Exception:
            if required and not self._raises(case, maps):
                raise
            return
        ours = _results(self.ours, case, maps, nullcontext())
        where = f"{case.batch} images" if case.batch > 1 else "one image"
        sides = " and ".join(_by(size) for size in sizes)
        of_its_own, of_all = TOLERANCES[case.weights]
        for kind in theirs:
            noise = of_all * largest(ours[kind]) if kind == "gradients" else 0.0
            for a, b in _zip(ours[kind], theirs[kind]):
                error = difference(a, b)
                if not error <= of_its_own * largest([a]) + noise:
                    raise Refused(
                        f"it computes something else: {kind} in {case.mode} differ from a DCA's by "
                        f"{_share(error, largest([a]))} ({where}, maps of {sides})"
                    )

    def _raises(self, case: Case, maps: Sequence[Tensor]) -> bool:
        """Whether a DCA would raise, too: as for one pixel in training."""
        try:
            _results(self.ours, case, maps, nullcontext())
        except Exception:
            return True
        return False

    @torch.no_grad()
    def _set_weights(self, case: Case) -> None:
        for dca in (self.ours, self.theirs):
            for seed, (name, tensor) in enumerate(dca.state_dict().items()):
                if case.weights == "own" or not tensor.is_floating_point():
                    tensor.copy_(self.own[name])
                elif name.endswith("running_var"):
                    tensor.copy_(0.5 + _normal(tensor.shape, seed).square())
                else:  # a convolution's outputs get the scale of its inputs
                    fan_in = tensor.shape[1] if tensor.dim() > 1 else 1
                    scale = 10.0 if case.weights == "large" else 1.0
                    tensor.copy_(_normal(tensor.shape, seed) * (scale / math.sqrt(fan_in)))

    def _refuse_what_calls_leave(self) -> None:
        """Refuse what counts its calls, or keeps something of them: the fused module would not."""
        for training in (False, True):
            case = Case(2, "random", training, graded=False)
            maps = [_normal((2, c, *size), i) for i, (c, size) in enumerate(_zip(self.ours.features, self.sizes))]
            seen = []
            for _ in range(2):
                _results(self.theirs, case, maps, NoDraws(case.mode))
                seen.append(_attributes(self.theirs))
            # In tuples, in which a NaN that stays is itself.
            changed = [name for name in seen[1] if (seen[0].get(name, _Unlike()),) != (seen[1][name],)]
            if changed:
                raise Refused(f"its forward sets {', '.join(changed)}, which the fused one would not")

    def _compare_under_autocast(self) -> None:
        """Refuse what is less precise under autocast than the official operations in plain PyTorch are."""
        case = Case(2, "random", False, graded=False)
        maps = [_normal((2, c, *size), i) for i, (c, size) in enumerate(_zip(self.ours.features, self.sizes))]
        self._set_weights(case)
        exact = self.ours.eval()(maps)
        ours, theirs = copy.deepcopy(self.ours).float().eval(), copy.deepcopy(self.theirs).float().eval()
        low = [x.float() for x in maps]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            try:
                with NoDraws("evaluation under autocast"):
                    got = theirs(low)
            except Refused:
                raise
            except Exception:  # it does not run under autocast
                return
            expected = plain.refine(ours, low)
        for i, (a, b, e) in enumerate(_zip(expected, got, exact)):
            if a.dtype != b.dtype:
                raise Refused(f"under autocast, its outputs[{i}] is {b.dtype}, a DCA's {a.dtype}")
            usual, error = ((y.double() - e).norm().item() / e.norm().item() for y in (a, b))
            if not error <= 2 * usual:
                raise Refused(
                    f"under autocast, its outputs[{i}] is off by {error:.1e}, the official operations' by {usual:.1e}"
                )


# Copies, sizes and values


class _FixedDropout(nn.Module):
    """In the place of a dropout in `bn_relu`, which the fused module calls as it is: drops the same at every call."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.arange(x.numel()).view(x.shape) % 3) if self.training else x


def _copy_of(original: nn.Module, fused: DCA, grid: Sequence[int]) -> nn.Module:
    """A copy on the CPU in float64, without hooks, with another token grid."""
    copied = copy_without_hooks(original, {})
    copied.to("cpu", torch.float64).requires_grad_()
    for name, m in list(copied.named_modules()):
        if isinstance(m, nn.SyncBatchNorm):  # it would wait for other processes
            copied.set_submodule(name, _unsynchronised(m))
        if isinstance(m, _DropoutNd) and name.startswith("bn_relu.") and m.p > 0:
            copied.set_submodule(name, _FixedDropout())
        for attribute in ("patch", "grid", "output_size"):
            side = vars(m).get(attribute)
            if side is not None and pair(side) == fused.grid:
                setattr(m, attribute, grid[0] if isinstance(side, int) else tuple(grid))
    return copied


def _unsynchronised(norm: nn.SyncBatchNorm) -> nn.BatchNorm2d:
    plain_norm = nn.BatchNorm2d(norm.num_features, device="meta")
    vars(plain_norm).update(vars(norm))
    return plain_norm


def _affordable(original: nn.Module, fused: DCA) -> tuple[int, int]:
    """The module's own grid, or the largest of its shape whose attention matrices and maps do not fill the memory."""
    heads = sum(fused.spatial_head) if fused.spatial_att else 0
    grid = fused.grid
    while max(grid) > 1:
        pixels = sum(c * math.prod(size) for c, size in _zip(fused.features, sizes_of(original, grid)))
        if 8 * max(heads * math.prod(grid) ** 2, pixels) <= MOST_BYTES:
            break
        grid = (max(1, grid[0] * 7 // 8), max(1, grid[1] * 7 // 8))
    return grid


def sizes_of(original: nn.Module, grid: Sequence[int]) -> list[list[int]]:
    """Sizes of the maps: those that the original upsamples to, or of halving sides where it takes any."""
    scales = len(original.get_submodule("upconvs")._modules)
    sizes = []
    for i in range(scales):
        upconv = original.get_submodule(f"upconvs.{i}")
        factors = [m.scale_factor for m in upconv.modules() if getattr(m, "scale_factor", None) is not None]
        factor = pair(factors[0] if factors else 2 ** (scales - 1 - i))
        sizes.append([math.floor(side * f) for side, f in _zip(grid, factor)])
    return sizes


def _normal(shape: Sequence[int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def _by(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def _zip(*sequences: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    return zip(*sequences, strict=True)


def _share(error: float, most: float) -> str:
    return f"{error / most:.1e} of the largest" if most else f"{error:.1e}, where all are zero"


def largest(tensors: Sequence[Tensor]) -> float:
    return max((t.abs().nan_to_num(0.0, 0.0).max().item() for t in tensors if t.numel()), default=0.0)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest; none where both are NaN or the same infinity."""
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    return torch.where(same, 0.0, (ours - theirs).abs()).max().item() if ours.numel() else 0.0


# One run


class NoDraws(TorchDispatchMode):
    """Refuses what would draw from a generator of PyTorch, before it does; for the message, `mode` says when."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self._mode = mode

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise Refused(f"it draws random numbers in {self._mode} ({func.name()}): it is another function each time")
        return func(*args, **(kwargs or {}))


def _results(dca: nn.Module, case: Case, maps: Sequence[Tensor], watched: Any) -> dict[str, list[Tensor]]:
    """Outputs and buffers of one forward, and gradients of one backward."""
    dca.train(case.training)
    leaves = [x.clone().requires_grad_(case.graded) for x in maps]
    given = [x.clone() for x in leaves]
    passed = list(given)
    dca.zero_grad()
    with torch.set_grad_enabled(case.graded), watched:
        outputs = dca(passed)
    if type(outputs) is not tuple:
        raise Refused(f"its forward returns a {type(outputs).__name__}, a DCA's a tuple")
    if [y.shape for y in outputs] != [x.shape for x in maps]:
        raise Refused(f"its outputs have the shapes {[tuple(y.shape) for y in outputs]}, not those of the maps")
    kept = len(passed) == len(given) and all(a is b for a, b in _zip(passed, given))
    if not kept or any(difference(a, b) for a, b in _zip(given, maps)):
        raise Refused("its forward changes the maps that it is given")
    results = {"outputs": [y.detach() for y in outputs]}
    if case.graded:
        upstream = [_normal(y.shape, 100 + i) * case.scale**4 for i, y in enumerate(outputs)]
        torch.autograd.backward(outputs, upstream)
        tensors = (*leaves, *dca.parameters())
        results["gradients"] = [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors]
    return results | {"buffers": [buffer.double() for buffer in dca.buffers()]}


class _Unlike:
    """Equal to nothing."""


def _attributes(dca: nn.Module) -> dict[str, object]:
    """All that a module's instances have beside tensors, submodules and hooks."""
    found = {}
    for path, module in dca.named_modules():
        for name, value in vars(module).items():
            if name not in ("training", "_parameters", "_buffers", "_modules") and "hook" not in name:
                found[f"{path}.{name}".removeprefix(".")] = _frozen(value)
    return found


def _frozen(value: object) -> object:
    """What stays equal while nothing is put into or taken out of a value."""
    if isinstance(value, (list, tuple, set)):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in value.items())
    return value if isinstance(value, (int, float, str, type(None))) else _Same(value)


class _Same:
    """Equal to itself alone."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value

    __hash__ = None  # type: ignore[assignment]


# What no trial shows


LOW = "the precision that it computes in under autocast or in 16 bits"
CHANCE = "what chance or the time decides"
UNTRIABLE = {
    "random": CHANCE,
    "urandom": CHANCE,
    "uuid4": CHANCE,
    "bfloat16": LOW,
    "float16": LOW,
    "half": LOW,
    "autocast": LOW,
    "is_autocast_enabled": LOW,
    "is_autocast_cpu_enabled": LOW,
    "get_autocast_dtype": LOW,
    "get_autocast_gpu_dtype": LOW,
    "is_cuda": "what it does on a GPU",
}
NOT_SEARCHED = {"torch", "einops", "numpy", *sys.stdlib_module_names}


def _refuse_untriable(original: nn.Module) -> None:
    """Refuse a forward that names what a trial cannot show: a random branch, another precision, another device."""
    replaced = {m for name in shared_names(original) for m in original.get_submodule(name).modules()}
    for path, module in original.named_modules():
        if module in replaced:
            continue
        seen: set[object] = set()  # of each module anew, and not of code, since what the names are may differ
        own = [vars(kind).get("forward") for kind in type(module).__mro__]  # super().forward is one of them
        waiting = [function for function in own if function is not None]
        while waiting:
            bound = waiting.pop()
            function = getattr(bound, "__func__", bound)
            code = getattr(function, "__code__", None)
            if code is None or function in seen or _package(function) in NOT_SEARCHED:
                continue
            seen.add(function)
            for name, value in _named_in(function, code, module):
                about = CHANCE if _is_random(value) else UNTRIABLE.get(name)
                if about is not None:
                    raise Refused(
                        f"{function.__qualname__} of {path or 'it'} names {name}: no trial shows {about}; "
                        "replace_dca(..., verify=False) trusts the layout"
                    )
                called = value.func if isinstance(value, functools.partial) else value
                if isinstance(called, (types.FunctionType, types.MethodType)):
                    waiting.append(called)


def _package(function: Any) -> str:
    return str(getattr(function, "__module__", "")).partition(".")[0]


def _named_in(function: Any, code: types.CodeType, module: nn.Module) -> Iterator[tuple[str, object]]:
    """The names in a function's code, with what each is: of the module, of the globals or of what it closes over."""
    held = [value for value in vars(module).values() if not isinstance(value, (nn.Module, dict))]
    for name in code.co_names:
        of_class = getattr(type(module), name, None)
        of_held = [vars(type(value)).get(name) for value in held]  # a method of an object that the module has
        places = (vars(module).get(name), getattr(of_class, "fget", of_class), function.__globals__.get(name), *of_held)
        yield from ((name, value) for value in places if value is not None)
        yield name, None
    for name, cell in zip(code.co_freevars, getattr(function, "__closure__", None) or (), strict=False):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not filled yet
            continue
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _named_in(function, constant, module)


def _is_random(value: object) -> bool:
    """Whether a value is of Python's or NumPy's generators or a clock; PyTorch's are seen when they are drawn from."""
    owner = getattr(value, "__self__", value)
    kind = type(owner)
    if isinstance(owner, random.Random) or kind.__module__.startswith("numpy.random"):
        return True
    source = owner.__name__ if isinstance(owner, types.ModuleType) else getattr(value, "__module__", None)
    return source in ("random", "numpy.random", "secrets", "time")
