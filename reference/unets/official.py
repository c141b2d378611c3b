"""Checkpoints of the official networks (github.com/gorkemcanates/Dual-Cross-Attention) in the hosts.

Both have the same tensors under other names. They are matched by their order in the state dict, which is the same but
for the blocks named here.
"""

import re
import warnings
from collections.abc import Iterable, Mapping
from itertools import zip_longest

import torch
from torch import Tensor, nn

from reference.unets.doubleunet import DoubleUNet
from reference.unets.unet import UNet

# Blocks that hold their parts in another order than the hosts do: the parts, in the hosts' order.
PARTS = {
    "mr": ("c1", "c2", "c3", "bn1", "skip"),  # MultiResUNet
    "respath": tuple(f"{part}.{i}" for i in range(4) for part in ("convs", "skips", "bns")),
    "rconv": ("conv", "norm_c", "block", "norm"),  # R2UNet
}
BLOCK = re.compile(r"\b((mr|respath|rconv)\d)\.(.+)")
# The norms of ResUNetPP's gates, which the official state dict has once more, in the sequences that call them.
AGAIN = re.compile(r"\battn\d\.norm\d\.")
# Hosts that without DCA give their decoders other maps than the official networks do.
OTHER_MAPS = (UNet, DoubleUNet)


def load_official(host: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load an official network's weights and buffers into a host.

    Args:
        host: the network of `reference.unets` of the same name, with DCA if the official one has it, and with as many
            colours and classes.
        state_dict: the official network's; the official trainer keeps it under "model_state_dict" of its file.

    Raises:
        TypeError: `state_dict` is no mapping.
        ValueError: a tensor has another place, kind or shape than the host's, or something is no tensor. The host is
            left as it was.

    Warns:
        UserWarning: the host computes something else with these weights: UNet and DoubleUNet without DCA, whose
            decoders get the maps after their last norm and activation, officially those before.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: expected tensors by their names, got {type(state_dict).__name__}")
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"state_dict: expected tensors, got {type(value).__name__} at {key!r}; "
                "the official trainer keeps the weights under 'model_state_dict'"
            )
    expected, keys = host.state_dict(), in_host_order(state_dict)
    for name, key in zip_longest(expected, keys):
        if kind_and_shape(expected, name) != kind_and_shape(state_dict, key):
            raise ValueError(
                f"state_dict: expected {describe(expected, name)} of {type(host).__name__}, "
                f"got {describe(state_dict, key)}"
            )
    without_values = all(tensor.is_meta for tensor in expected.values())
    for key, value in state_dict.items():
        if (value.is_meta and not without_values) or value.layout != torch.strided:
            got = "on the meta device" if value.is_meta else value.layout
            raise ValueError(f"state_dict: expected dense tensors with values, got {key!r}, which is {got}")
    if isinstance(host, OTHER_MAPS) and host.dca is None:
        warnings.warn(
            f"{type(host).__name__} without DCA gives its decoder the skip maps after their last norm and activation, "
            "the official one those before: with these weights it is another function",
            stacklevel=2,
        )
    host.load_state_dict({name: state_dict[key] for name, key in zip(expected, keys, strict=True)})


def in_host_order(keys: Iterable[str]) -> list[str]:
    """The official keys in the order of the host's, each tensor once."""
    first: dict[str, int] = {}  # of each block, the place of its first key
    places = []
    for place, key in enumerate(keys):
        if AGAIN.search(key):
            continue
        block, part = block_and_part(key)
        places.append((first.setdefault(block, place), part, place, key))
    return [key for *_, key in sorted(places)]


def block_and_part(key: str) -> tuple[str, int]:
    """The block of PARTS that a tensor belongs to, and the number of its part there: an unknown one comes last.

    Any other tensor is a block of its own.
    """
    found = BLOCK.search(key)
    if found is None:
        return key, 0
    block, kind, rest = found.groups()
    parts = PARTS[kind]
    return block, next((i for i, part in enumerate(parts) if rest.startswith(f"{part}.")), len(parts))


def kind_and_shape(tensors: Mapping[str, Tensor], key: str | None) -> tuple | None:
    """Such as ("running_mean", (32,), "floats"); None where there is no key."""
    if key is None:
        return None
    return key.rpartition(".")[2], tuple(tensors[key].shape), numbers(tensors[key])


def numbers(tensor: Tensor) -> str:
    """What a tensor has: floats are brought to the host's dtype, whatever theirs is."""
    return "floats" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")


def describe(tensors: Mapping[str, Tensor], key: str | None) -> str:
    if key is None:
        return "no further tensor"
    its = "" if numbers(tensors[key]) == "floats" else f" of {numbers(tensors[key])}"
    return f"{key!r} of shape {tuple(tensors[key].shape)}{its}"
