"""The first calls of a fused module beside its original's, as `replace_dca(model, check_calls=N)` asks for."""

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from dca_kernels.module import DCA
from dca_kernels.official import Refused, copy_without_hooks, shared_names
from dca_kernels.verify import NoDraws, difference, largest

# Of results, relative to the largest of a tensor: by the lowest precision that a call computes in.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 1e-2}
TF32 = 1e-2


_logger = logging.getLogger("dca_kernels")


class Check:
    """Hooks of a fused module: its next calls run the original, too, and raise where the results differ."""

    def __init__(self, calls: int) -> None:
        self.calls, self.left = calls, calls
        self.buffers: list[Tensor] = []  # before the call

    def put_on(self, fused: DCA) -> None:
        """Hook the module: last before a call, and first after it, so that no other hook's change comes between."""
        fused.register_forward_pre_hook(self.before)
        fused.register_forward_hook(self.after, prepend=True, with_kwargs=True)

    def before(self, fused: nn.Module, args: object) -> None:
        self.buffers = [buffer.clone() for buffer in fused.buffers()]

    @torch._disable_dynamo  # without an import of the compiler; a compiled model calls this between two graphs
    def after(self, fused: Any, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Sequence[Tensor]) -> None:
        maps = args[0] if args else kwargs["maps"]
        original = _original_of(fused)
        for buffer, value in zip(original.buffers(), self.buffers, strict=True):
            buffer.data.copy_(value)
        what = self._differing(fused, original, maps, outputs)
        if what is not None:
            for buffer, value in zip(fused.buffers(), self.buffers, strict=True):
                buffer.data.copy_(value)
            raise RuntimeError(
                f"check_calls: expected the results of {type(original).__name__}, which the DCA stands for, in call "
                f"{self.calls - self.left + 1} of {self.calls}, of maps {[tuple(x.shape) for x in maps]}: {what}. "
                "restore_dca(model) puts the original back"
            )
        self.buffers = []
        self.left -= 1
        if self.left == 0:
            take_off(fused)

    def _differing(
        self, fused: DCA, original: nn.Module, maps: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> str | None:
        """How the original's results differ, in words; None where they do not."""
        mode = "training" if fused.training else "evaluation"
        if any(isinstance(m, _DropoutNd) and m.training and m.p > 0 for m in original.modules()):
            _logger.warning("check_calls: a call is not compared, since a dropout of bn_relu draws in it")
            return None
        given = [x.detach().clone().requires_grad_(x.requires_grad) for x in maps]
        # Activation checkpointing counts what a forward saves, and its second run may have no check any more.
        uncounted = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
        try:
            with NoDraws(mode), uncounted:
                theirs = original(given)
        except Refused as refused:
            return str(refused)
        results = {f"outputs[{i}]": (y, theirs[i]) for i, y in enumerate(outputs)}
        named = zip(fused.named_buffers(), original.buffers(), strict=True)
        results |= {name: (ours, buffer) for (name, ours), buffer in named}
        for name, (a, b) in results.items():
            ours, expected = a.detach().double(), b.detach().double()
            error, allowed = difference(ours, expected), _tolerance(maps[0]) * largest([expected])
            if not error <= allowed:
                return f"{name} differs by {error:.1e}, where {allowed:.1e} is allowed"
        return None


def take_off(fused: nn.Module) -> None:
    """Remove what `Check.put_on` put there."""
    for registry in (fused._forward_pre_hooks, fused._forward_hooks):
        for key, hook in list(registry.items()):
            if isinstance(getattr(hook, "__self__", None), Check):
                del registry[key]
                fused._forward_hooks_with_kwargs.pop(key, None)


def _original_of(fused: DCA) -> nn.Module:
    """A copy of the original with the tensors and the mode that the fused module has now."""
    (original,) = vars(fused)["_original"]
    memo: dict[int, Any] = {}
    copied = copy_without_hooks(original, memo)
    for name in shared_names(fused):  # someone may have exchanged one since
        copied.set_submodule(name, copy.deepcopy(fused.get_submodule(name), memo))
    shared = {m for name in shared_names(copied) for m in copied.get_submodule(name).modules()}
    for m in set(copied.modules()) - shared:
        m.training = fused.training
    return copied


def _tolerance(x: Tensor) -> float:
    device = x.device.type
    dtypes = [x.dtype]
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtypes.append(torch.get_autocast_dtype(device))
    tolerance = max(TOLERANCES[dtype] for dtype in dtypes)
    may_be_tf32 = x.is_cuda and x.dtype == torch.float32
    return max(tolerance, TF32) if may_be_tf32 else tolerance
