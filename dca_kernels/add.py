"""Puts a new DCA onto the skips of an encoder-decoder network: where its encoder hands the maps to its decoder."""

import logging
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from dca_kernels.module import DCA, check_model

IMAGE_SIDE = 256  # of the image that shows what a decoder gets: two pixels are left after seven halvings

_logger = logging.getLogger("dca_kernels")


def add_dca(
    model: nn.Module, patch: int | tuple[int, int] = 28, example: Tensor | None = None, **arguments: Any
) -> nn.Module:
    """Put a new DCA on the skips of a model that calls its child `decoder` with the maps of its child `encoder`.

    Networks of segmentation_models_pytorch and nnU-Net and MONAI's FlexibleUNet do. One forward in evaluation mode
    shows what the decoder gets, and ends there: maps from the largest to the smallest, as one list or as one argument
    each. The last map is the bottleneck, and the DCA leaves it as it is. It also leaves a copy of the image, and maps
    without channels after it, that come first. All other maps are the skips.

    The DCA is `model.decoder.dca`, and a forward pre-hook of the decoder calls it. No key of the state dict changes. A
    state dict without any key of the DCA, such as a checkpoint of the plain model, loads strictly: the DCA keeps the
    values that it has, and a warning says so. The DCA begins with the official initial values, so the model's outputs
    change until it is trained; no initial values would keep them, since the DCA ends in BatchNorm.

    Call `add_dca` before you make the optimizer, and before DDP and `torch.compile`. Where a decoder leaves some of its
    skips unused, the DCA's parameters for those get no gradient.

    Args:
        model: the model, changed in place.
        patch: token grid, P for P x P or (P_h, P_w).
        example: an input (B, C, H, W) of the model. Where None, a random image of 256 x 256 with the channels that the
            encoder's first convolution takes.
        arguments: the arguments of `DCA`, without features and strides.

    Returns:
        `model`.

    Raises:
        TypeError, ValueError: the model has no such encoder and decoder, the decoder gets something else, or an
            argument is not one of `DCA`; the message says what. The model is as it was.
    """
    check_model(model)
    encoder, decoder = _encoder_and_decoder(model)
    for name in ("features", "strides"):
        if name in arguments:
            raise TypeError(f"{name}: expected to be read off the model, got {arguments[name]!r}")
    if not isinstance(example, Tensor | None):
        raise TypeError(f"example: expected a tensor (B, C, H, W) or None, got {type(example).__name__}")
    skips = _skips(model, decoder, _image(encoder) if example is None else example)
    dca = DCA([x.shape[1] for x in skips], patch=patch, **arguments)
    dca.to(skips[0].device, next(model.parameters()).dtype).train(decoder.training)
    dca.register_load_state_dict_pre_hook(_keep_where_absent)
    decoder.dca = dca
    decoder.register_forward_pre_hook(_refine_skips)
    return model


def _encoder_and_decoder(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    encoder, decoder = (getattr(model, name, None) for name in ("encoder", "decoder"))
    if not isinstance(encoder, nn.Module) or not isinstance(decoder, nn.Module) or isinstance(decoder, nn.Sequential):
        children = ", ".join(f"{name} ({type(child).__name__})" for name, child in model.named_children())
        raise ValueError(
            f"model: expected a {type(model).__name__} with a child encoder and a child decoder that is called with "
            f"the encoder's maps and is no Sequential, got the children {children or '(none)'}; a forward that has "
            "its skips as variables can call a dca_kernels.DCA on them"
        )
    if hasattr(decoder, "dca"):
        raise ValueError(f"model: expected a decoder without an attribute dca, got a {type(decoder.dca).__name__}")
    return encoder, decoder


def _image(encoder: nn.Module) -> Tensor:
    for m in encoder.modules():
        if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            dimensions = m.weight.dim() - 2
            if dimensions != 2:
                raise ValueError(f"model: expected a network on images (B, C, H, W), got one with a {type(m).__name__}")
            generator = torch.Generator().manual_seed(0)
            image = torch.rand((1, m.in_channels, IMAGE_SIDE, IMAGE_SIDE), generator=generator, device="cpu")
            return image.to(m.weight)
    raise ValueError("example: expected an input of the model, since its encoder has no convolution, got None")


def _skips(model: nn.Module, decoder: nn.Module, example: Tensor) -> list[Tensor]:
    """The maps that the decoder gets, without the bottleneck and what comes before the skips."""
    given = _given_to(decoder, model, example)
    maps = [x for x in given if isinstance(x, Tensor) and x.dim() == 4]
    areas = [math.prod(x.shape[2:]) for x in maps]
    shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in given]
    if not maps or len(maps) < len(given) or 0 in areas or sorted(areas, reverse=True) != areas:
        raise ValueError(
            f"model: expected a decoder called with maps (B, C, H, W) from the largest to the smallest, got {shapes}"
        )
    skips = maps[:-1]
    while skips and (skips[0].shape[1] == 0 or torch.equal(skips[0], example)):
        del skips[0]
    if not skips:
        raise ValueError(f"model: expected a decoder called with at least one skip, got maps of shapes {shapes}")
    return skips


class _Seen(Exception):
    """Ends the forward that shows what the decoder gets."""


def _given_to(decoder: nn.Module, model: nn.Module, example: Tensor) -> Sequence[object]:
    """What the decoder is called with in the place of its maps, in one forward of the model in evaluation mode."""
    seen: list[Sequence[object]] = []

    def look(module: nn.Module, args: tuple[object, ...]) -> None:
        seen.append(_maps(args))
        raise _Seen

    modes = {m: m.training for m in model.modules()}
    handle = decoder.register_forward_pre_hook(look)
    try:
        for m in modes:
            m.training = False
        with torch.no_grad():
            model(example)
    except _Seen:
        pass
    except Exception as error:
        shape = tuple(example.shape)
        raise ValueError(
            f"example: expected an input that the model's forward takes, got shape {shape}, at which it raises "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        handle.remove()
        for m, training in modes.items():
            m.training = training
    if not seen:
        raise ValueError("model: expected a forward that calls the decoder, got one that does not")
    return seen[0]


def _maps(args: tuple[object, ...]) -> list[object] | tuple[object, ...]:
    """The maps among the arguments that a decoder is called with."""
    return args[0] if args and isinstance(args[0], (list, tuple)) else args


def _refine_skips(decoder: nn.Module, args: tuple[object, ...]) -> tuple[object, ...]:
    """Forward pre-hook of the decoder. It takes the DCA from the decoder it gets: a copy of the model has another."""
    maps, dca = _maps(args), cast(DCA, decoder.dca)
    first = -1 - len(dca.features)
    refined = [*maps[:first], *dca(maps[first:-1]), maps[-1]]
    return tuple(refined) if maps is args else (type(maps)(refined), *args[1:])


def _keep_where_absent(dca: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Pre-hook of `load_state_dict`: a checkpoint of the plain model has nothing for the DCA."""
    if not any(key.startswith(prefix) for key in state_dict):
        state_dict.update((prefix + name, p) for name, p in [*dca.named_parameters(), *dca.named_buffers()])
        _logger.warning("the state dict has no %s*: the DCA there keeps the values that it has", prefix)
