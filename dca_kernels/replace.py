"""Puts the fused DCA into existing models in place of an official one, and takes it out again.

An official DCA is found by its layout, wherever its code was copied to: it is a module with the children `avg_map`,
`attention`, `upconvs` and `bn_relu`. A module of that layout may compute something else, so its maths is checked too.

`replace_dca` gives the fused module the submodules of the original that hold tensors: convolutions, norms and `bn_relu`
are the same objects in both. Whatever happens to the tensors later (training, `.to()`, `load_state_dict`, `deepcopy`,
pickling), both modules have the same ones, and `restore_dca` need only put the original back.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from dca_kernels.arguments import check_model, flag, integer
from dca_kernels.backends import check_name
from dca_kernels.check import Check, take_off
from dca_kernels.module import DCA
from dca_kernels.official import Refused, fused_of, hooks_of, parents, refuse_hooks, refuse_wrapped, shared_names
from dca_kernels.verify import verify as verify_maths

CHILDREN = ("avg_map", "attention", "upconvs", "bn_relu")

_logger = logging.getLogger("dca_kernels")


@dataclass(frozen=True)
class Found:
    """One DCA of a model.

    Attributes:
        name: its path in the model; "" for the model itself.
        kind: its class, with the module that defines it.
        fused: whether it is a `dca_kernels.DCA` already.
        reason: why `replace_dca` would refuse it; None where it would not.
        skips: which skips `add_dca` put it on, with their shapes for the example.
    """

    name: str
    kind: str
    fused: bool
    reason: str | None
    skips: tuple[str, ...] = ()

    @property
    def state(self) -> str:
        if self.fused:
            return f"fused, on {', '.join(self.skips)}" if self.skips else "fused"
        return "can be replaced" if self.reason is None else f"refused: {self.reason}"


class Report(list[Found]):
    """The DCAs of a model in the model's order; prints as a table."""

    def __str__(self) -> str:
        rows = [("name", "class", "state"), *((found.name or "(model)", found.kind, found.state) for found in self)]
        name_width, kind_width = (max(len(row[i]) for row in rows) for i in range(2))
        return "\n".join(f"{name:{name_width}}  {kind:{kind_width}}  {state}" for name, kind, state in rows)


def inspect(model: nn.Module) -> Report:
    """Which DCAs a model has, which of them are fused, and which `replace_dca` would refuse, with the reason.

    Nothing is changed. A DCA that the model has under several names is listed under each.

    Raises:
        TypeError: `model` is not a module.
    """
    report = Report()
    reasons: dict[nn.Module, str | None] = {}
    for name, dca in _dcas(model):
        if not isinstance(dca, DCA) and dca not in reasons:
            try:
                _replacement(model, dca, name, "auto", verify=True)
                reasons[dca] = None
            except Refused as error:
                reasons[dca] = str(error)
        kind = f"{type(dca).__module__}.{type(dca).__qualname__}"
        skips = tuple(map(str, vars(dca).get("_skips", ())))
        report.append(Found(name, kind, isinstance(dca, DCA), reasons.get(dca), skips))
    return report


def replace_dca(model: nn.Module, backend: str = "auto", verify: bool = True, check_calls: int = 0) -> nn.Module:
    """Replace every official-style DCA of a model, in place, by the fused one.

    The fused modules have the originals' parameters and buffers, the very same tensors under the same names in the
    same order: optimizers, DDP and checkpoints remain valid. `training`, `requires_grad` and the hooks on the DCA
    itself stay too. Call `replace_dca` before you shard, quantize, trace or export the model, and before you compile
    the DCA itself. A compiled model may hold it: its next call compiles anew, with the fused one.

    Args:
        model: the model. Its code still works: the fused DCA takes one list of maps and returns a tuple, as the
            official one does.
        backend: of the fused modules: "auto", "torch" or "triton".
        verify: whether to compare outputs, gradients and buffers of each DCA with those of the fused one: in evaluation
            and in training, at the module's own sizes and at others that it accepts, with its own and with random
            weights. This takes seconds, on copies on the CPU in float64, and touches neither the model nor a random
            number generator; the log says what it does. Where False, the layout alone is trusted.
        check_calls: of how many next calls of each DCA the outputs and buffers are compared with the original's, which
            runs on copies, for the maps, dtype and device of the call. The first difference is a RuntimeError.

    Returns:
        `model`; where `model` itself is an official DCA, the fused one.

    Raises:
        TypeError: `model` is not a module; `verify` or `check_calls` is not as above.
        ValueError: there is no DCA to replace; a DCA cannot be replaced (other maths, hooks on modules that would not
            be called, ...: the message says which DCA and why); `backend` or `check_calls` is not as above. The model
            is as it was.
    """
    check_name(backend, "backend")
    verify, check_calls = flag("verify", verify), integer("check_calls", check_calls, least=0)
    originals: dict[nn.Module, str] = {}
    for name, dca in _dcas(model):
        if not isinstance(dca, DCA):
            originals.setdefault(dca, name or "the model itself")
    if not originals:
        raise ValueError(
            f"model: expected an official DCA, a module with the children {', '.join(CHILDREN)}, in "
            f"{type(model).__name__}, got none{_others(model)}"
        )
    replacements: dict[nn.Module, DCA] = {}
    refusals = []
    for original, name in originals.items():
        try:
            replacements[original] = _replacement(model, original, name, backend, verify)
        except Refused as error:
            refusals.append(f"{name} ({type(original).__name__}): {error}")
    if refusals:
        raise ValueError(f"model: expected DCAs that can be replaced, got {'; '.join(refusals)}")
    for fused in replacements.values():
        if check_calls:
            Check(check_calls).put_on(fused)
    _logger.info("replaced by the fused DCA: %s", ", ".join(originals.values()))
    return _exchange(model, replacements)


def restore_dca(model: nn.Module) -> nn.Module:
    """Undo `replace_dca`, in place: the original modules come back, with the tensors, hooks and mode of the fused ones.

    Returns:
        `model`; where `model` itself is such a fused DCA, the original.

    Raises:
        TypeError: `model` is not a module.
        ValueError: there is no DCA that `replace_dca` put in, or someone put a forward on an instance of such a DCA's
            modules. The model is as it was.
    """
    originals: dict[nn.Module, nn.Module] = {}
    for _, dca in _dcas(model):
        if "_original" in vars(dca):
            (originals[dca],) = vars(dca)["_original"]
    if not originals:
        raise ValueError(
            f"model: expected a DCA that replace_dca put into {type(model).__name__}, got none{_others(model)}"
        )
    for fused in originals:
        for name, parent in parents(fused):
            if "forward" in vars(parent):
                raise ValueError(
                    f"model: expected a DCA with its own forwards, got one that was put on {name or 'the DCA itself'}: "
                    "remove it first"
                )
    for fused, original in originals.items():
        take_off(fused)
        for name, parent in parents(fused):
            vars(original.get_submodule(name)).update(hooks_of(parent))
        for name in shared_names(fused):  # someone may have exchanged one since
            original.set_submodule(name, fused.get_submodule(name))
        shared = {m for name in shared_names(fused) for m in fused.get_submodule(name).modules()}
        for m in set(original.modules()) - shared:
            m.training = fused.training
    return _exchange(model, originals)


# Finding and exchanging modules


def _dcas(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every DCA, fused or official-style, under each of its names."""
    check_model(model)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, DCA) or set(CHILDREN).issubset(module._modules.keys()):
            yield name, module


def _others(model: nn.Module) -> str:
    """What was found instead, for an error's message."""
    names = [name or "the model itself" for name, dca in _dcas(model) if isinstance(dca, DCA)]
    return f" besides the dca_kernels.DCA at {', '.join(names)}" if names else ""


def _exchange(model: nn.Module, new: Mapping[Any, nn.Module]) -> nn.Module:
    """Put each new module in the place of the old one, which cannot fail; return the model, or what took its place."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in new:
                parent._modules[name] = new[child]
    return new.get(model, model)


def _replacement(model: nn.Module, original: nn.Module, name: str, backend: str, verify: bool) -> DCA:
    """The fused module that takes the place of `original`, which stays as it is; `Refused` where none can."""
    refuse_wrapped(model, original)
    refuse_hooks(original)
    fused = fused_of(original, backend)
    if verify:
        verify_maths(original, fused, name or type(original).__name__)
    vars(fused).update(hooks_of(original))  # the same registries: handles given out go on removing
    vars(fused)["_original"] = (original,)  # in a tuple it is no submodule
    return fused
