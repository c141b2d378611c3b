"""Who is measured: the reference, the `torch` and the `triton` backend; eager, compiled, and as CUDA graphs.

Another implementation of the attention is an entry of IMPLEMENTATIONS: commands, tables and figures follow from it.
"""

import functools
import gc
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

import dca_kernels
import reference
from benchmarks import cases, measure
from benchmarks.cases import Problem
from benchmarks.stages import ReferenceStage, TorchStage, TritonStage
from dca_kernels import backends
from reference import unets

# Without CUDA graphs of its own: those are providers of their own. On a CPU both names mean the same.
COMPILED = {"": None, " compiled": "default", " max-autotune": "max-autotune-no-cudagraphs"}


@dataclass(frozen=True)
class Implementation:
    """Of the attention.

    Attributes:
        says: what it is, for `--help` and under tables.
        colour: in figures.
        dca: called as `reference.DCA` is, it makes a module that loads the reference's weights; None for no attention.
        stage: makes a stage of that module, see benchmarks/stages.py; None where stages are not measured alone.
        compiled: of COMPILED, what torch.compile is asked for.
        ours: whether it is held to the error budget and compared with the reference.
        kernels: whether it is of Triton kernels, which need a GPU or the interpreter.
        wide_tokens: whether its tokens are float32 for maps of fewer bits.
    """

    says: str
    colour: str
    dca: Callable[..., nn.Module] | None
    stage: Callable[..., Any] | None = None
    compiled: Sequence[str] = ("", " compiled")
    ours: bool = False
    kernels: bool = False
    wide_tokens: bool = False


# In the order of tables and figures. Kernels are compiled as they are, and max-autotune is asked of the baseline, to be
# fair to it.
IMPLEMENTATIONS = {
    "without": Implementation("a network without the attention", "#ced4da", None),
    "reference": Implementation(
        "the official module's operations in plain PyTorch",
        "#868e96",
        reference.DCA,
        ReferenceStage,
        compiled=tuple(COMPILED),
    ),
    "torch": Implementation(
        "the fused module's operations in PyTorch",
        "#2b8a3e",
        functools.partial(dca_kernels.DCA, backend="torch"),
        TorchStage,
        ours=True,
        wide_tokens=True,
    ),
    "triton": Implementation(
        "the fused module's kernels, on a GPU",
        "#5f3dc4",
        functools.partial(dca_kernels.DCA, backend="triton"),
        TritonStage,
        compiled=("",),
        ours=True,
        kernels=True,
    ),
}
EAGER = tuple(name for name, one in IMPLEMENTATIONS.items() if one.dca is not None)
FUSED = tuple(name for name in EAGER if IMPLEMENTATIONS[name].ours)


@dataclass(frozen=True)
class Provider:
    """`without` is a host without DCA: what it would cost not to have the attention."""

    implementation: str
    compiled: str = ""
    graph: bool = False

    @property
    def ours(self) -> bool:
        return self.implementation in FUSED

    def offers(self, case: str) -> bool:
        one = IMPLEMENTATIONS[self.implementation]
        if one.dca is None:
            return case in cases.HOSTS
        return case not in cases.STAGES or one.stage is not None

    @property
    def name(self) -> str:
        return self.implementation + self.compiled + (" graph" if self.graph else "")


PROVIDERS = {
    provider.name: provider
    for provider in itertools.starmap(Provider, itertools.product(IMPLEMENTATIONS, COMPILED, (False, True)))
    if provider.compiled in IMPLEMENTATIONS[provider.implementation].compiled
}


def providers_of(case: str) -> list[str]:
    return [name for name, provider in PROVIDERS.items() if provider.offers(case)]


def eager_on(device: torch.device) -> list[str]:
    """Those that a device of this kind runs, whether or not kernels are interpreted."""
    return [name for name in EAGER if device.type == "cuda" or not IMPLEMENTATIONS[name].kernels]


def why_no_kernels(device: torch.device) -> str | None:
    """Why the kernels do not run on a device, or None where they do; on a CPU they do where they are interpreted."""
    reason = backends.why_not("triton", device)
    return "no GPU" if reason is not None and device.type == "cpu" else reason


def why_not(provider: Provider, problem: Problem, mode: str, device: torch.device) -> str | None:
    """Why a provider is not run on a device, or None where it is."""
    if provider.graph and device.type != "cuda":
        return "no GPU"
    if IMPLEMENTATIONS[provider.implementation].kernels:
        reason = why_no_kernels(device)
        if reason is not None:
            return reason
        if problem.case == "patch_embed" and mode != "forward":
            return "its backward is part of upsample's"
    if provider.compiled and device.type == "cpu" and measure.compiler() is None:
        return "torch.compile needs a C++ compiler"
    if provider.implementation == "reference":
        needed, free = problem.reference_bytes(problem.dtype.itemsize), measure.free_memory(device)
        if needed > free:
            return f"needs about {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free"
    return None


class Subject(Protocol):
    """One provider of a case, with its inputs."""

    has_backward: bool

    def forward(self) -> Sequence[Tensor]: ...

    def backward(self) -> Sequence[Tensor]:
        """Gradients of the inputs, after a forward; those of the parameters are computed too."""

    def release(self) -> None:
        """Let go of what the last forward kept."""


class AutogradSubject:
    """A module, differentiated by autograd for the inputs that need it and for its parameters."""

    def __init__(self, module: Any, inputs: Sequence[Tensor], gradients: Sequence[Tensor] | None) -> None:
        self.module, self.inputs, self.gradients = module, list(inputs), gradients
        self.has_backward = gradients is not None
        self.outputs: list[Tensor] | None = None
        self.parameter_gradients: list[Tensor] = []
        self.unused: list[int] = []  # the parameters that got none
        self.leaves = [x for x in self.inputs if x.requires_grad]
        self.parameters = [p for p in module.parameters() if p.requires_grad]

    def forward(self) -> list[Tensor]:
        with torch.set_grad_enabled(self.gradients is not None):
            outputs = self.module(*self.inputs)
        self.outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        return self.outputs

    def backward(self) -> list[Tensor]:
        wanted = [*self.leaves, *self.parameters]
        gradients = torch.autograd.grad(self.outputs, wanted, self.gradients, allow_unused=True)
        self.outputs = None
        of_parameters = gradients[len(self.leaves) :]
        self.parameter_gradients = [g for g in of_parameters if g is not None]
        self.unused = [i for i, g in enumerate(of_parameters) if g is None]
        return list(gradients[: len(self.leaves)])

    def release(self) -> None:
        self.outputs = None
        self.parameter_gradients = []


class _Spread(nn.Module):
    """DCA, called with the maps one by one, as a stage is."""

    def __init__(self, dca: nn.Module) -> None:
        super().__init__()
        self.dca = dca

    def forward(self, *maps: Tensor) -> Sequence[Tensor]:
        return self.dca(maps)


def build(
    provider: Provider,
    problem: Problem,
    inputs: Sequence[Tensor],
    gradients: Sequence[Tensor] | None,
    changed: Callable[[nn.Module], object] = lambda module: None,
) -> Subject:
    """The provider on copies of the inputs, with the case's weights; `changed` may alter its module (for tests)."""
    module = _module(provider.implementation, problem).to(inputs[0].device, problem.dtype).train(problem.training)
    changed(module)
    one = IMPLEMENTATIONS[provider.implementation]
    if problem.case in cases.STAGES and one.stage is not None:
        if one.kernels:
            return one.stage(module, problem.case, [x.to(problem.dtype) for x in inputs], gradients)
        module = one.stage(module, problem.case)
    elif problem.case == "dca":
        module = _Spread(module)
    needs = gradients is not None and problem.case not in cases.HOSTS  # no one differentiates for an image
    tokens = 0 if problem.case in ("dca", "patch_embed", *cases.HOSTS) else len(problem.size.features)
    wide = torch.float64 if problem.dtype == torch.float64 else torch.float32
    dtypes = [wide if one.wide_tokens and i < tokens else problem.dtype for i in range(len(inputs))]
    leaves = [x.detach().to(dtype, copy=True).requires_grad_(needs) for x, dtype in zip(inputs, dtypes, strict=True)]
    if gradients is not None and one.wide_tokens and problem.case in cases.STAGES[:3]:
        gradients = [g.to(wide) for g in gradients]
    if provider.compiled:
        module = torch.compile(module, mode=COMPILED[provider.compiled], dynamic=False)
    return AutogradSubject(module, leaves, gradients)


def _module(implementation: str, problem: Problem) -> nn.Module:
    """The module of an implementation; all have the reference's weights."""
    size = problem.size

    def make(dca: Callable[..., nn.Module] | None) -> nn.Module:
        if problem.case in cases.HOSTS:
            return getattr(unets, problem.case)(dca=dca or False, patch=size.patch)
        return dca(size.features, None, size.patch)

    torch.manual_seed(cases.SEED)
    if implementation == "without":
        return make(None)
    plain = make(reference.DCA)
    if implementation == "reference":
        return plain
    other = make(IMPLEMENTATIONS[implementation].dca)
    other.load_state_dict(plain.state_dict())
    return other


def inputs_of(problem: Problem, image: np.ndarray, device: torch.device) -> tuple[list[Tensor], list[Tensor] | None]:
    """Inputs in the problem's dtype, and upstream gradients in training.

    Tokens are those that `patch_embed` makes of the slide's skip maps, for every stage.
    """
    size = problem.size
    if problem.case in cases.HOSTS:
        inputs = [cases.cut_tiles(image, problem.batch, size.side).to(device, problem.dtype)]
        return inputs, cases.upstream([inputs[0][:, :1]]) if problem.training else None
    maps = cases.skip_maps(image, problem.batch, size.patch, problem.dtype, device, size.features)
    if problem.case == "dca":
        return maps, cases.upstream(maps) if problem.training else None
    with torch.no_grad():
        dca = _module("reference", problem).to(device, problem.dtype)
        tokens = [t.contiguous() for t in dca.patch_embed(maps)]
    inputs = {"patch_embed": maps, "upsample": [*tokens, *maps]}.get(problem.case, tokens)
    outputs = maps if problem.case == "upsample" else tokens
    return inputs, cases.upstream(outputs) if problem.training else None


class Graphed:
    """A subject captured as CUDA graphs: one a forward, one a backward, replayed in that order."""

    def __init__(self, subject: Subject) -> None:
        self.has_backward = subject.has_backward
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is made once must not be captured
            for _ in range(3):
                subject.forward()
                if self.has_backward:
                    subject.backward()
                subject.release()
        torch.cuda.current_stream().wait_stream(side)
        gc.collect()
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._forward):
            self.outputs = [y.detach() for y in subject.forward()]
        if self.has_backward:
            with torch.cuda.graph(self._backward, pool=self._forward.pool()):
                self.gradients = subject.backward()

    def forward(self) -> list[Tensor]:
        self._forward.replay()
        return self.outputs

    def backward(self) -> Sequence[Tensor]:
        self._backward.replay()
        return self.gradients

    def release(self) -> None:
        """The graphs' memory is theirs."""
