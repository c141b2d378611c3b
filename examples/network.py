"""The network: built from a plan, saved with it in one file, and how it predicts a whole image."""

import json
import math
import os
import reprlib
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import dca_kernels
import reference
from examples.files import DataError, reading
from reference import unets

ATTENTIONS: dict[str, Any] = {"none": False, "reference": reference.DCA, "fused": dca_kernels.DCA}
CLASSES = 256  # at most, with background: predicted masks are files of 8 bits
SIDE = 2**12  # of crops, token grids and resized images, at most
OVERLAP = 0.25  # of two neighbouring tiles, as a share of their side


@dataclass(frozen=True)
class Plan:
    """What a network is built from, and what it is made for; plain values, which are saved beside the weights."""

    host: str  # of reference.unets
    dca: str  # of ATTENTIONS
    patch: int  # side of the token grid
    crop: int  # side of the tiles
    resize: int | None  # side of the images, whatever they were
    classes: tuple[str, ...]  # without the background

    @property
    def outputs(self) -> int:
        """Channels of the logits. Background and one class share one."""
        return 1 if len(self.classes) == 1 else len(self.classes) + 1


def build(plan: Plan, seed: int = 0) -> nn.Module:
    """The network, with the same initial weights in every process."""
    torch.manual_seed(seed)
    host = getattr(unets, plan.host)
    network = host(in_channels=3, out_channels=plan.outputs, dca=ATTENTIONS[plan.dca], patch=plan.patch)
    network.eval()(torch.zeros(1, 3, plan.crop, plan.crop)).sum().backward()
    for parameter in network.parameters():  # as the official ones, some networks hold a few that they do not use
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
    return network


def save_network(path: Path, plan: Plan, weights: dict[str, Tensor]) -> None:
    write(path, lambda unfinished: torch.save({"plan": asdict(plan), "weights": weights}, unfinished))


def read_network(path: Path) -> tuple[Plan, nn.Module]:
    """What `save_network` wrote.

    Raises:
        DataError: it is another file.
    """
    state = load_checkpoint(path, ("plan", "weights"))
    if not _is_plan(state["plan"]):
        names, short = ", ".join(f.name for f in fields(Plan)), reprlib.Repr()
        short.maxdict = len(fields(Plan))
        raise DataError(f"{path}: expected the plan of a network, {names}, got {short.repr(state['plan'])}")
    plan = Plan(**{**state["plan"], "classes": tuple(state["plan"]["classes"])})
    network = build(plan)
    if not alike(state["weights"], network.state_dict()):
        raise DataError(f"{path}: expected weights of {plan.host}, which these are not")
    for name, weight in state["weights"].items():
        if not weight.isfinite().all():  # all that it predicts would be background
            raise DataError(f"{path}: expected finite weights, got others in {name}")
    network.load_state_dict(state["weights"])
    return plan, network


def _is_plan(plan: Any) -> bool:
    """Whether a value of any file is the dict of a `Plan` that can be built."""
    if not isinstance(plan, dict) or set(plan) != {f.name for f in fields(Plan)}:
        return False
    classes, sides = plan["classes"], [plan["patch"], plan["crop"]]
    if plan["resize"] is not None:
        sides.append(plan["resize"])
    return (
        plan["host"] in unets.HOSTS
        and plan["dca"] in tuple(ATTENTIONS)
        and all(type(side) is int and 0 < side <= SIDE for side in sides)
        and plan["crop"] % 16 == 0
        and isinstance(classes, list | tuple)
        and 0 < len(classes) < CLASSES
        and all(isinstance(name, str) for name in classes)
    )


def alike(state: Any, expected: Any) -> bool:
    """Whether a state of any file has the keys and types of another one, and tensors of its shapes and dtypes.

    A list is as good as a tuple: `set_state_dict` makes the betas of a fresh optimizer a list.
    """
    if isinstance(expected, dict):
        same = isinstance(state, dict) and state.keys() == expected.keys()
        return same and all(alike(state[key], value) for key, value in expected.items())
    if isinstance(expected, list | tuple):
        same = isinstance(state, list | tuple) and len(state) == len(expected)
        return same and all(map(alike, state, expected))
    if isinstance(expected, Tensor):
        same = isinstance(state, Tensor) and not state.is_meta and state.layout == expected.layout
        return same and state.shape == expected.shape and state.dtype == expected.dtype
    return type(state) is type(expected)


def load_checkpoint(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """The dict that a file of this example holds.

    Raises:
        DataError: the file cannot be read, or has no such keys.
    """
    expected = "a file of examples.train"
    with reading(path, expected):
        if not path.is_file():
            raise DataError(f"{path}: expected {expected}, found {'a folder' if path.is_dir() else 'none'}")
        size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(part.file_size for part in archive.infolist())
        if unpacked > size:
            raise DataError(f"{path}: expected {expected}, which is not compressed, got {unpacked} bytes in {size}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except DataError:
        raise
    except Exception as error:  # of a damaged file torch raises all kinds, and advises to unpickle anything
        raise DataError(f"{path}: expected {expected}, got another one, or a part of one") from error
    missing = [key for key in keys if not isinstance(state, dict) or key not in state]
    if missing:
        raise DataError(
            f"{path}: expected a file of examples.train with {', '.join(keys)}, found no {missing[0]} "
            "(best.pt is to predict with, last.pt to go on from)"
        )
    return state


def write(path: Path, content: Callable[[Path], Any]) -> None:
    """Write a file whole or not at all: a kill leaves the old one."""
    unfinished = path.with_name(path.name + ".unfinished")
    content(unfinished)
    with open(unfinished, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def write_json(path: Path, rows: Any) -> None:
    """Write dicts, lists and numbers. A score that there is not (NaN) is null: JSON has no NaN."""
    text = json.dumps(_with_nulls(rows), indent=1, allow_nan=False)
    write(path, lambda unfinished: unfinished.write_text(text + "\n"))


def _with_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_nulls(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_with_nulls(inner) for inner in value]
    return None if value != value else value


def to_input(image: np.ndarray) -> Tensor:
    """(H, W, 3) -> (3, H, W)."""
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


@dataclass(frozen=True)
class Predictor:
    """Predicts whole images from tiles, `batch` of them at a time."""

    network: Callable[[Tensor], Tensor]
    plan: Plan
    device: torch.device
    batch: int
    bf16: bool = False

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> np.ndarray:
        """The classes (H, W) int64 of an image (H, W, 3).

        Tiles of the crop's side overlap, and their probabilities are averaged with weights that fall towards the
        tiles' edges, where a network sees least. A side that is shorter than a tile is filled up with its last pixels.
        """
        height, width = image.shape[:2]
        side, outputs = self.plan.crop, self.plan.outputs
        missing = [(0, max(side - n, 0)) for n in (height, width)]
        image = np.pad(image, [*missing, (0, 0)], mode="edge")
        total = torch.zeros(outputs, *image.shape[:2])
        weight = torch.zeros(image.shape[:2])
        window = torch.outer(*2 * [torch.hann_window(side + 2, periodic=False)[1:-1]])
        for corners in self._corners(image.shape[:2]):
            tiles = torch.stack([to_input(image[top : top + side, left : left + side]) for top, left in corners])
            for (top, left), likely in zip(corners, self._probabilities(tiles), strict=True):
                total[:, top : top + side, left : left + side] += likely * window
                weight[top : top + side, left : left + side] += window
        likely = (total / weight)[:, :height, :width]
        return (likely[0] > 0.5 if outputs == 1 else likely.argmax(0)).long().numpy()

    def _corners(self, shape: tuple[int, int]) -> Iterator[list[tuple[int, int]]]:
        """Top and left of the tiles, a batch at a time."""
        side = self.plan.crop
        step = side * (1 - OVERLAP)
        tops, lefts = (np.linspace(0, n - side, math.ceil((n - side) / step) + 1).astype(int) for n in shape)
        corners = [(top, left) for top in tops for left in lefts]
        for start in range(0, len(corners), self.batch):
            yield corners[start : start + self.batch]

    def _probabilities(self, tiles: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.network(tiles.to(self.device)).float()
        return (logits.sigmoid() if self.plan.outputs == 1 else logits.softmax(1)).cpu()
