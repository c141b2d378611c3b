"""The `triton` backend: the four stages as kernels, each of which prepares its tokens for the next.

Eager calls go straight to the kernels. What traces or watches a call (torch.compile, torch.export, dispatch modes) sees
it as one operator, `dca_kernels::refine`, with `dca_kernels::refine_backward` for its gradients. README.md beside this
file says where to begin to read.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from dca_kernels.backends import tokens_dtype
from dca_kernels.contract import Contract, flatten, learned, update_buffers
from dca_kernels.triton_backend import eager, launch, operator, passes


def operand_dtype(maps: Sequence[Tensor]) -> torch.dtype:
    """Of the tokens and the products' operands: the maps', under autocast its own."""
    return tokens_dtype(maps)


def refine(maps: Sequence[Tensor], contract: Contract) -> list[Tensor]:
    """The skip maps refined by a DCA's blocks: for one block at most nine launches, in training eleven.

    Args:
        maps: S tensors (B, C_i, H_i, W_i), any strides.
        contract: of the call.

    Returns:
        S tensors (B, C_i, H_i, W_i). Tokens and the operands of products have the contract's dtype; sums and statistics
        are float32, or float64 for float64 maps.

    Raises:
        ValueError: a map's image is too large for 32-bit indices, or a size too large for the kernels' tiles.
    """
    parameters = flatten(learned(contract))
    contract = _without_needless_backward(maps, contract, parameters)
    if watched() or len(maps[0]) == 0:
        return _refine_watched(maps, contract, parameters)
    taken = passes.as_taken(contract)
    tensors = flatten(taken)
    return eager.planned(maps, taken)(maps, parameters, tensors, list(map(Tensor.data_ptr, tensors)))


def prepared(
    maps: Sequence[Tensor], contract: Contract
) -> Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor] | None] | None:
    """Calls of the same kind as this one, of maps and of the contract's tensors; None where no plan is for it.

    A call takes tensors of the same sizes, strides, dtypes, devices and `requires_grad`; it returns None where the
    kernels cannot take them as they lie.
    """
    parameters = flatten(learned(contract))
    as_it_is = passes.as_taken(contract) is contract and passes.are_aligned(flatten(contract))
    if watched() or len(maps[0]) == 0 or not as_it_is:
        return None
    forward = eager.planned(maps, _without_needless_backward(maps, contract, parameters))
    count, device = len(parameters), maps[0].device
    made_in = launch.circumstances(device)

    def call(maps: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor] | None:
        addresses = list(map(Tensor.data_ptr, tensors))
        can = forward.plan.was_run(addresses) or passes.are_multiples(addresses)
        if not can or launch.circumstances(device) != made_in:
            return None
        return forward(maps, tensors[:count], tensors, addresses)

    return call


def warm_up(maps: Sequence[Tensor], contract: Contract) -> None:
    """Compile what a call of this kind, and its backward where there will be one, launches."""
    if len(maps[0]) == 0:
        return
    parameters = flatten(learned(contract))
    contract = _without_needless_backward(maps, contract, parameters)
    taken = passes.as_taken(contract)
    eager.planned(maps, taken).compile(maps, parameters, flatten(taken))


def _without_needless_backward(maps: Sequence[Tensor], contract: Contract, parameters: Sequence[Tensor]) -> Contract:
    if contract.backward and not any(t.requires_grad for t in (*maps, *parameters)):
        return contract._replace(backward=False)
    return contract


def _refine_watched(maps: Sequence[Tensor], contract: Contract, parameters: list[Tensor]) -> list[Tensor]:
    """By the operator, which changes no buffer: they are updated behind it."""
    norms = tuple([None if norm is None else norm._replace(updates=False) for norm in contract.norms])
    text, floats = operator.described(contract._replace(norms=norms))
    buffers = flatten(contract.buffers)
    outs = torch.ops.dca_kernels.refine(list(maps), parameters, buffers, floats, text)
    if any(norm is not None and norm.updates for norm in contract.norms):
        mean, variance = (row.split([x.shape[1] for x in maps]) for row in outs[-1].detach())
        for i, (norm, its, x) in enumerate(zip(contract.norms, contract.buffers, maps, strict=True)):
            if norm is not None and its is not None:
                bias = contract.upsample[i].bias.detach()
                update_buffers(norm, its, mean[i] + bias, variance[i], x.numel() // x.shape[1])
    return outs[: len(maps)]


def watched() -> bool:
    """Whether something traces this call, or watches what it dispatches."""
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None
