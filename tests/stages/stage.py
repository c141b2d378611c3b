"""One stage alone, forward and backward: the reference's, and each backend's, which are given the same values.

Results are named as in tests/oracle.py; the gradient of an input is `grad_tokens.<i>` or `grad_maps.<i>`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dca_kernels import contract, torch_backend
from dca_kernels.contract import Contract
from reference.budget import before_relu, masked
from tests.oracle import TILED, Config, Results, device_of, pair, promoted, random_like, random_maps

# Of unequal widths, strides and heads. RAGGED has windows of unequal sizes, TILED blocks that are not full; in WHOLE
# the windows of a map are all of one size, those of the last map one pixel.
RAGGED = Config((4, 8, 6), (3, 4), n=2, channel_head=(2, 1, 3), spatial_head=(1, 2, 3), sizes=((7, 9), (5, 4), (3, 8)))
WHOLE = Config((4, 8), (3, 4), spatial_head=(2, 4), sizes=((9, 8), (3, 4)), batch=1)
CONFIGS = {"ragged": RAGGED, "tiled": TILED, "whole": WHOLE}

# Windows that are all alike and powers of two wide: the kernels have programs for rows of them.
ROWS = {
    "powers_of_two": Config((4, 12, 8), (4, 6), sizes=((16, 48), (8, 12), (4, 6)), batch=2),
    "any_height": Config((4, 8), (5, 3), sizes=((15, 12), (5, 24)), batch=2),
    "a_full_tile": Config((4, 8), (2, 16), sizes=((6, 64), (4, 16)), batch=1),
    "one_row": Config((4, 8), (1, 3), sizes=((3, 6), (1, 12)), batch=1),
    "one_column": Config((4, 8), (3, 1), sizes=((6, 4), (3, 1)), batch=1),
    "one_token": Config((4, 8), (1, 1), sizes=((4, 2), (2, 2)), batch=2),
}
each_kind_of_windows = pytest.mark.parametrize(
    "config", [RAGGED, ROWS["powers_of_two"]], ids=["ragged", "powers_of_two"]
)


@dataclass(frozen=True)
class Stage:
    """A stage, an attention in the last block: the parameters of other blocks may have no gradient.

    Attributes:
        name: of the backends' function.
        tokens, maps: whether it is given them.
        draws: how many of its errors tell a ratio from luck: more where attention weights may be nearly tied.
    """

    name: str
    tokens: bool
    maps: bool
    draws: int


PATCH_EMBED = Stage("patch_embed", tokens=False, maps=True, draws=4)
CHANNEL_ATTENTION = Stage("channel_attention", tokens=True, maps=False, draws=8)
SPATIAL_ATTENTION = Stage("spatial_attention", tokens=True, maps=False, draws=16)
UPSAMPLE = Stage("upsample", tokens=True, maps=True, draws=4)

each_dtype = pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)],
    ids=["float32", "bfloat16", "float16"],
)


@dataclass(frozen=True)
class Given:
    """S tokens (B, N, C_i) and S maps (B, C_i, H_i, W_i), none where not given; and the results' upstream gradients."""

    tokens: list[Tensor]
    maps: list[Tensor]
    upstream: list[Tensor]

    @property
    def inputs(self) -> Results:
        """Under the names of their gradients."""
        tokens, maps = enumerate(self.tokens), enumerate(self.maps)
        return {f"grad_tokens.{i}": t for i, t in tokens} | {f"grad_maps.{i}": x for i, x in maps}

    def to(self, tokens: torch.dtype, maps: torch.dtype) -> "Given":
        """In other dtypes: tokens and their gradients, maps and theirs."""
        results = maps if self.tokens and self.maps else tokens
        lists = ((self.tokens, tokens), (self.maps, maps), (self.upstream, results))
        return Given(*[[t.to(dtype) for t in tensors] for tensors, dtype in lists])


def draws(
    stage: Stage, backend: str, dtype: torch.dtype, train: bool = False, config: Config = RAGGED
) -> list[list[Results]]:
    """As many `runs` as the stage has."""
    return [runs(stage, backend, config, dtype, train, seed) for seed in range(stage.draws)]


def runs(stage: Stage, backend: str, config: Config, dtype: torch.dtype, train: bool, seed: int = 0) -> list[Results]:
    """Ours and the reference in `dtype`, and the reference in float64 with the same inputs and weights."""
    ours, theirs = pair(config, backend, dtype, train, seed)
    given = _random(stage, config, backend, dtype, train, seed)
    if stage is UPSAMPLE:
        given = replace(given, upstream=_off_the_kink(promoted(theirs, config), given))
    exact, exactly = promoted(theirs, config), given.to(torch.float64, torch.float64)
    evaluate = {"torch": _evaluate_torch, "triton": _evaluate_triton}[backend]
    results = evaluate(stage, ours, given, dtype)
    baseline, expected = (_evaluate_reference(stage, *its) for its in ((theirs, given), (exact, exactly)))
    assert results.keys() == expected.keys(), f"of one alone: {sorted(results.keys() ^ expected.keys())}"
    return [results, baseline, expected]


def _random(stage: Stage, config: Config, backend: str, dtype: torch.dtype, train: bool, seed: int) -> Given:
    height, width = (config.patch, config.patch) if isinstance(config.patch, int) else config.patch
    generator = torch.Generator().manual_seed(3000 + seed)
    shapes = [(config.batch, height * width, c) for c in config.features]
    tokens = [(1 + torch.randn(shape, generator=generator)).to(device_of(backend), dtype) for shape in shapes]
    maps = random_maps(config, dtype, seed, backend)
    upstream = random_like(maps if stage is UPSAMPLE else tokens, seed)
    if train and not stage.maps:
        # As from a BatchNorm that takes the batch's mean off: gradients that are zero then may be left out.
        upstream = [g - g.mean((0, 1)) for g in upstream]
    return Given(tokens if stage.tokens else [], maps if stage.maps else [], upstream)


@torch.no_grad()
def _off_the_kink(exact: nn.Module, given: Given) -> list[Tensor]:
    """As in reference/budget.py, of the stage alone."""
    values = before_relu(exact)
    exact.upsample([t.double() for t in given.tokens], [x.double() for x in given.maps])
    return masked(given.upstream, values)


# The reference and the torch backend, by autograd


def _evaluate_reference(stage: Stage, dca: Any, given: Given) -> Results:
    block = dca.attention[-1]
    run = {
        PATCH_EMBED: lambda tokens, maps: dca.patch_embed(maps),
        CHANNEL_ATTENTION: lambda tokens, maps: block.attend(tokens, block.channel_norm, block.c_attention, dca.grid),
        SPATIAL_ATTENTION: lambda tokens, maps: block.attend(tokens, block.spatial_norm, block.s_attention, dca.grid),
        UPSAMPLE: dca.upsample,
    }[stage]
    return _evaluate(dca, run, given)


def _evaluate_torch(stage: Stage, dca: Any, given: Given, dtype: torch.dtype) -> Results:
    """Its tokens, and their gradients, are wider than maps of 16 bits."""
    its = _contract_of(dca, torch_backend)
    function = getattr(getattr(torch_backend, stage.name), stage.name)
    run = {
        PATCH_EMBED: lambda tokens, maps: function(maps, its)[0],
        UPSAMPLE: lambda tokens, maps: function(tokens, maps, its),
    }.get(stage, lambda tokens, maps: function(tokens, its, len(its.blocks) - 1))
    return _evaluate(dca, run, given.to(contract.accumulation_dtype(dtype), dtype))


Run = Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]  # of tokens and maps


def _evaluate(dca: nn.Module, run: Run, given: Given) -> Results:
    leaves = {name: x.detach().requires_grad_() for name, x in given.inputs.items()}
    inputs = list(leaves.values())
    outs = run(inputs[: len(given.tokens)], inputs[len(given.tokens) :])
    torch.autograd.backward(outs, given.upstream)
    gradients = {name: leaf.grad for name, leaf in leaves.items()}
    gradients |= {f"grad.{name}": p.grad for name, p in dca.named_parameters() if p.grad is not None}
    return _named(dca, outs, gradients)


def _named(dca: nn.Module, outs: Sequence[Tensor], gradients: Results) -> Results:
    buffers = {f"after.{name}": b.clone() for name, b in dca.named_buffers()}
    return {f"output.{i}": y.detach() for i, y in enumerate(outs)} | gradients | buffers


def _contract_of(dca: Any, backend: ModuleType) -> Contract:
    """What a backend is given for maps of the module's own dtype."""
    norms, parameter = [head[0] for head in dca.bn_relu], next(dca.parameters()).detach()
    return contract.read(dca, norms, backend.operand_dtype([parameter]), [parameter.dtype] * len(norms))


# The triton backend: a stage's backward is called with what its forward saved


@torch.no_grad()
def _evaluate_triton(stage: Stage, dca: Any, given: Given, dtype: torch.dtype) -> Results:
    from dca_kernels import triton_backend

    its = _contract_of(dca, triton_backend)._replace(backward=True)
    evaluate = {PATCH_EMBED: _embed, UPSAMPLE: _upsample}.get(stage, _attend)
    outs, dinputs, parameters, gradients = evaluate(stage, given, its)
    names = {id(p): f"grad.{name}" for name, p in dca.named_parameters()}
    pairs = zip(contract.flatten(parameters), contract.flatten(gradients), strict=True)
    of_parameters = {names[id(p)]: g.reshape(p.shape) for p, g in pairs}
    return _named(dca, outs, dict(zip(given.inputs, dinputs, strict=True)) | of_parameters)


Evaluated = tuple[Sequence[Tensor], Sequence[Tensor], Any, Any]  # results, inputs' gradients, parameters and theirs


def _embed(stage: Stage, given: Given, its: Contract) -> Evaluated:
    """The kernels add the gradient that came past the attention in the same pass: here that is zero."""
    from dca_kernels.triton_backend import layout, map_gradient, patch_embed, upsample

    tokens, _ = patch_embed.patch_embed(given.maps, its)
    zeros = tokens.empty(2, tokens.shape.total).zero_()
    by_rows = layout.taken_by_rows(given.maps, its.grid)
    past = upsample.Saved.empty(tokens, None, by_rows, its)._replace(used=zeros.double())
    past.forms.zero_()
    douts, wanted = [torch.zeros_like(x) for x in given.maps], [True] * len(given.maps)
    dtokens = torch.cat(given.upstream, 2)
    dmaps, gradients = map_gradient.map_gradients(past, given.maps, zeros, dtokens, douts, its, wanted)
    return tokens.plain.split(tokens.channels, 2), dmaps, its.patch_embed, gradients.split(tokens.channels)


def _attend(stage: Stage, given: Given, its: Contract) -> Evaluated:
    from dca_kernels import triton_backend
    from dca_kernels.triton_backend import passes, tokens

    last, channels = len(its.blocks) - 1, contract.channels_of(its)
    forward = getattr(getattr(triton_backend, stage.name), stage.name)
    backward = {CHANNEL_ATTENTION: passes.CHANNEL_ATTENTION, SPATIAL_ATTENTION: passes.SPATIAL_ATTENTION}[
        stage
    ].backward
    attended, saved = forward(tokens.Tokens(torch.cat(given.tokens, 2), channels), its, last)
    dtokens, gradients = backward(saved, torch.cat(given.upstream, 2), its, last)
    attention = getattr(its.blocks[last], stage.name)
    outs, dinputs = attended.plain.split(channels, 2), dtokens.split(channels, 2)
    return outs, dinputs, attention, gradients.split(attention)


def _upsample(stage: Stage, given: Given, its: Contract) -> Evaluated:
    """The kernels add the gradient that came through the patch embedding in the same pass: here that is zero."""
    from dca_kernels.triton_backend import map_gradient, patch_embed, tokens, upsample, upsample_backward

    channels, wanted = contract.channels_of(its), [True] * len(given.maps)
    _, maps = patch_embed.patch_embed(given.maps, its)  # beside them sums that BatchNorm needs
    outs, saved = upsample.upsample(tokens.Tokens(torch.cat(given.tokens, 2), channels), maps, its)
    back = upsample_backward.upsample_backward(saved, given.maps, given.upstream, its, tokens_wanted=True)
    through, none = back.through_statistics, torch.zeros_like(back.dtokens)
    dmaps, _ = map_gradient.map_gradients(saved, given.maps, through, none, given.upstream, its, wanted)
    dinputs = [*back.dtokens.split(channels, 2), *dmaps]
    return outs, dinputs, (its.upsample, its.norms), back.parameters.split(its.norms, channels)
