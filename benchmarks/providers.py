"""Who is measured: the reference, the `torch` and the `triton` backend; eager, compiled, and as CUDA graphs."""

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

FUSED = ("torch", "triton")
EAGER = ("reference", *FUSED)
IMPLEMENTATIONS = ("without", *EAGER)
# Without CUDA graphs of its own: those are providers of their own. On a CPU both names mean the same.
COMPILED = {"": None, " compiled": "default", " max-autotune": "max-autotune-no-cudagraphs"}


@dataclass(frozen=True)
class Provider:
    """`without` is a host without DCA: what it would cost not to have the attention."""

    implementation: str
    compiled: str = ""
    graph: bool = False

    @property
    def ours(self) -> bool:
        return self.implementation in FUSED

    @property
    def name(self) -> str:
        return self.implementation + self.compiled + (" graph" if self.graph else "")


PROVIDERS = {
    provider.name: provider
    for provider in itertools.starmap(Provider, itertools.product(IMPLEMENTATIONS, COMPILED, (False, True)))
    # Kernels are compiled as they are, and max-autotune is asked of the baseline, to be fair to it.
    if not (provider.implementation == "triton" and provider.compiled)
    and not (provider.implementation in ("torch", "without") and provider.compiled == " max-autotune")
}


def providers_of(case: str) -> list[str]:
    return [name for name, p in PROVIDERS.items() if p.implementation != "without" or case in cases.HOSTS]


def why_no_kernels(device: torch.device) -> str | None:
    """Why the kernels do not run on a device, or None where they do; on a CPU they do where they are interpreted."""
    reason = backends.why_not("triton", device)
    return "no GPU" if reason is not None and device.type == "cpu" else reason


def why_not(provider: Provider, problem: Problem, mode: str, device: torch.device) -> str | None:
    """Why a provider is not run on a device, or None where it is."""
    if provider.graph and device.type != "cuda":
        return "no GPU"
    if provider.implementation == "triton":
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
        self.parameter_gradients = [g for g in gradients[len(self.leaves) :] if g is not None]
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
    if provider.implementation == "triton" and problem.case in cases.STAGES:
        return TritonStage(module, problem.case, [x.to(problem.dtype) for x in inputs], gradients)
    if problem.case == "dca":
        module = _Spread(module)
    elif problem.case in cases.STAGES:
        module = (ReferenceStage if provider.implementation == "reference" else TorchStage)(module, problem.case)
    needs = gradients is not None and problem.case not in cases.HOSTS  # no one differentiates for an image
    tokens = 0 if problem.case in ("dca", "patch_embed", *cases.HOSTS) else len(problem.size.features)
    wide = torch.float64 if problem.dtype == torch.float64 else torch.float32
    dtypes = [wide if provider.implementation == "torch" and i < tokens else problem.dtype for i in range(len(inputs))]
    leaves = [x.detach().to(dtype, copy=True).requires_grad_(needs) for x, dtype in zip(inputs, dtypes, strict=True)]
    if gradients is not None and provider.implementation == "torch" and problem.case in cases.STAGES[:3]:
        gradients = [g.to(wide) for g in gradients]
    if provider.compiled:
        module = torch.compile(module, mode=COMPILED[provider.compiled], dynamic=False)
    return AutogradSubject(module, leaves, gradients)


def _module(implementation: str, problem: Problem) -> nn.Module:
    """The module of an implementation; all have the reference's weights."""
    size = problem.size
    if problem.case not in cases.HOSTS:
        torch.manual_seed(cases.SEED)
        plain: nn.Module = reference.DCA(size.features, None, size.patch)
        if implementation == "reference":
            return plain
        other: nn.Module = dca_kernels.DCA(size.features, None, size.patch, backend=implementation)
    else:
        host = getattr(unets, problem.case)
        torch.manual_seed(cases.SEED)
        if implementation == "without":
            return host(dca=False, patch=size.patch)
        plain = host(dca=True, patch=size.patch)
        if implementation == "reference":
            return plain

        def factory(*args: Any) -> nn.Module:
            return dca_kernels.DCA(*args, backend=implementation)

        other = host(dca=factory, patch=size.patch)
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
