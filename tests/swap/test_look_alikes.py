"""What looks like an official DCA and is another function somewhere is refused, with a reason that says where."""

import math
import random
import re
import secrets
import time
from collections.abc import Callable
from os import urandom

import numpy as np
import pytest
import torch
from torch import nn

import reference
from dca_kernels import inspect
from tests import vendored
from tests.swap import look_alikes
from tests.swap.models import assert_refused, official

OTHER = r"it computes something else: (outputs|gradients|buffers) in (evaluation|training) differ .+"
UNTRIED = r".+ names (.+): no trial shows (.+); replace_dca\(\.\.\., verify=False\) trusts the layout"
CHANGED = r"the (_call_impl|merged) of this instance was replaced, and would not be called"
REASONS = {
    "low_softmax": UNTRIED,
    "low_sum": UNTRIED,
    "halves_of_two_bytes": r"under autocast, its outputs\[\d\] is off by .+, the official operations' by .+",
    "nan_of_two_bytes": r"under autocast, its outputs\[\d\] is off by nan, the official operations' by .+",
    "on_a_gpu": UNTRIED,
    "dropped_weights": r"it draws random numbers in training \(aten::bernoulli_\.float\): .+",
    "draws_of_two_bytes": r"it draws random numbers in evaluation under autocast \(aten::rand\): .+",
    "another_rank": r"its outputs have the shapes \[\(1, 2, 8, 16, 16\), \(1, 2, 16, 8, 8\)\], not those of the maps",
    "multiplied_under_autocast": r"under autocast, its outputs\[0\] is torch\.bfloat16, a DCA's torch\.float32",
    "own_call_impl": r"it has its class's own _call_impl, which would not be called",
    "own_call_of_a_submodule": r"attention\.0\.s_attention\.1\.sdp has its class's own __call__, which .+",
    "own_call": r"it has its class's own __call__, which would not be called",
    "own_call_in_evaluation": r"it has its class's own __call__, which would not be called",
    "call_of_an_instance": CHANGED,
    "method_of_an_instance": CHANGED,
    **dict.fromkeys(
        ("counting", "counting_in_training", "counting_in_evaluation"),
        "its forward sets calls, which the fused one would not",
    ),
    "keeping": "its forward sets last, which the fused one would not",
    "counting_within": "its forward sets listed, counts, attention.0.calls, which the fused one would not",
    "replacing": "its forward changes the maps that it is given",
    "appending": "its forward changes the maps that it is given",
    "adding_in_place": "its forward changes the maps that it is given",
    **dict.fromkeys(look_alikes.RANDOM, UNTRIED),
    "torch": r"it draws random numbers in training \(aten::rand\): it is another function each time",
    "draws_at_other_sizes": r"it draws random numbers in evaluation \(aten::rand\): .+",
}


LARGE = {"linear_above_100_tokens", "without_attention_above_its_own_size", "batch_above_two_of_a_fixed_grid"}
NAMES = [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in look_alikes.LOOK_ALIKES]


@pytest.mark.parametrize("name", NAMES)
def test_a_look_alike_is_refused(name: str) -> None:
    model = nn.Sequential(look_alikes.LOOK_ALIKES[name]())
    assert_refused(model, f"0 ({type(model[0]).__name__})", REASONS.get(name, OTHER))


@pytest.mark.parametrize("name", look_alikes.LATE)
def test_what_is_found_last_is_refused(name: str) -> None:
    (found,) = inspect(look_alikes.LATE[name]())
    assert re.fullmatch(REASONS[name], found.reason)


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("interpolated_again", "one image, maps of 16 x 20 and 8 x 10"),
        ("top_k", "2 images, maps of 32 x 32 and 16 x 16"),
    ],
)
def test_the_reason_says_at_which_size(name: str, sizes: str) -> None:
    (found,) = inspect(look_alikes.LOOK_ALIKES[name]())
    assert re.fullmatch(rf".+ of the largest \({sizes}\)", found.reason)


def test_a_function_without_source_is_looked_through() -> None:
    names: dict[str, object] = {"plain": look_alikes.plain_forward, "bare": look_alikes.without_attention}
    exec(
        "import random\n"
        "def forward(self, raw):\n"
        "    return (bare if self.training and random.random() < 1e-9 else plain)(self, raw)\n",
        names,
    )
    (found,) = inspect(look_alikes.forwarding(names["forward"])())
    assert found.reason.startswith("forward of it names random: no trial shows what chance or the time decides")


def test_no_generator_is_drawn_from() -> None:
    # Other threads may draw meanwhile, so that no state may be set back either.
    drawn: list[object] = []

    def draw(self, raw):
        drawn.append(torch.rand(1))
        return look_alikes.plain_forward(self, raw)

    before = torch.get_rng_state()
    model = look_alikes.forwarding(draw)()
    torch.set_rng_state(before)
    (found,) = inspect(model)
    assert found.reason.startswith("it draws random numbers in evaluation")
    assert drawn == [] and torch.equal(torch.get_rng_state(), before)


class OfAnyGrid(reference.DCA):
    """Whose first trial ends."""

    def forward(self, maps):
        return list(super().forward(maps))


@pytest.mark.parametrize(
    "make, grids",
    [
        (lambda: official(vendored.ReturnsList, patch=12, spatial_att=False), ("12 x 12", "8 x 8")),
        (lambda: OfAnyGrid([8, 16], patch=(24, 6)), ("24 x 6", "15 x 3")),
    ],
    ids=["channel_only", "oblong"],
)
def test_grids_that_are_tried_in_the_place_of_larger_ones(
    make: Callable[[], nn.Module],
    grids: tuple[str, str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dca_kernels.verify.MOST_BYTES", 2**17)
    inspect(make())
    own, tried = grids
    (message,) = caplog.messages
    assert message.endswith(
        f"its grid of {own} tokens is too large to verify: a grid of {tried} is verified in its place"
    )


def test_a_difference_above_the_largest_grid_that_is_tried_is_named_in_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dca_kernels.verify.MOST_BYTES", 2**17)
    (found,) = inspect(official(patch=12))
    assert found.reason is None
    (message,) = caplog.messages
    assert message.endswith(
        "its grid of 12 x 12 tokens is too large to verify: a grid of 6 x 6 is verified in its place"
    )


class ResizesToTheFirst(vendored.DualCrossAttention):
    """Takes maps of its own sizes, and maps of one size, which it interpolates twice."""

    def merged(self, x, raw):
        if x[0].shape != raw[0].shape:
            x = [nn.functional.interpolate(a, size=raw[0].shape[2:], mode="bilinear") for a in x]
        return [a + b for a, b in zip(x, raw, strict=True)]


@pytest.mark.parametrize("patch", [4, 12])
def test_maps_of_one_size_are_tried(patch: int) -> None:
    (found,) = inspect(official(ResizesToTheFirst, patch=patch))
    assert re.fullmatch(OTHER + r"\((one image|\d images), maps of (?P<size>\d+ x \d+) and (?P=size)\)", found.reason)


class Chance:
    def __init__(self) -> None:
        self.generator = random.Random(0)

    def rarely(self) -> bool:
        return self.generator.random() < 1e-9


class Drawing(vendored.DualCrossAttention):
    def forward(self, raw):
        return (look_alikes.without_attention if random.random() < 1e-9 else look_alikes.plain_forward)(self, raw)


class Calling(Drawing):
    def forward(self, raw):
        return super().forward(raw)


def holding(chance: Chance) -> nn.Module:
    def forward(self, raw):
        return (look_alikes.without_attention if self.chance.rarely() else look_alikes.plain_forward)(self, raw)

    dca = look_alikes.forwarding(forward)()
    dca.chance = chance
    return dca


def reading_the_system() -> nn.Module:
    def forward(self, raw):
        return (look_alikes.without_attention if urandom(4) == b"dca " else look_alikes.plain_forward)(self, raw)

    return look_alikes.forwarding(forward)()


class Property(vendored.DualCrossAttention):
    @property
    def chance(self) -> bool:
        return random.random() < 1e-9

    def forward(self, raw):
        return (look_alikes.without_attention if self.chance else look_alikes.plain_forward)(self, raw)


def held_by_the_second_of_a_class() -> nn.Module:
    class Attending(vendored.ScaledDotProduct):
        def __init__(self, below: Callable[[], bool]) -> None:
            super().__init__()
            self.below = below

        def forward(self, q, k, v, scale):
            return super().forward(2 * q if self.below() else q, k, v, scale)

    dca = official()
    for attention, draw in zip(dca.attention[0].s_attention, (lambda: 1.0, random.random), strict=True):
        attention.sdp = Attending(below_a_billionth(draw))
    return dca


def below_a_billionth(draw: Callable[[], float]) -> Callable[[], bool]:
    return lambda: draw() < 1e-9


OUT_OF_SIGHT = {
    "of_a_property": lambda: official(Property),
    "of_the_second_of_a_class": held_by_the_second_of_a_class,
    "of_a_base_class": lambda: official(Calling),
    "of_an_object": lambda: holding(Chance()),
    "of_the_system": reading_the_system,
}


@pytest.mark.parametrize("make", OUT_OF_SIGHT.values(), ids=OUT_OF_SIGHT)
def test_chance_that_the_forward_does_not_name_itself(make: Callable[[], nn.Module]) -> None:
    (found,) = inspect(make())
    assert re.fullmatch(UNTRIED, found.reason)


SOURCES = {
    **dict.fromkeys(("random", "urandom", "uuid4"), "chance"),
    **dict.fromkeys(("bfloat16", "float16", "half", "autocast", "is_autocast_enabled"), "precision"),
    **dict.fromkeys(("is_autocast_cpu_enabled", "get_autocast_dtype", "get_autocast_gpu_dtype"), "precision"),
    "is_cuda": "GPU",
}


@pytest.mark.parametrize("name", SOURCES)
def test_names_that_are_refused(name: str) -> None:
    """In a branch that is never taken."""
    names: dict[str, object] = {"plain": look_alikes.plain_forward}
    exec(f"def forward(self, raw):\n    return plain(self, raw) if raw else raw.{name}\n", names)
    (found,) = inspect(look_alikes.forwarding(names["forward"])())
    assert re.fullmatch(UNTRIED, found.reason) and f" names {name}: " in found.reason and SOURCES[name] in found.reason


DRAWING = [random, np.random, secrets, time, random.gauss, np.random.rand, secrets.randbelow, time.time_ns]


@pytest.mark.parametrize("source", DRAWING, ids=lambda source: source.__name__)
def test_chance_under_another_name(source: object) -> None:
    names: dict[str, object] = {"plain": look_alikes.plain_forward, "source": source}
    exec("def forward(self, raw):\n    return plain(self, raw) if raw else source\n", names)
    (found,) = inspect(look_alikes.forwarding(names["forward"])())
    assert re.fullmatch(UNTRIED, found.reason) and " names source: " in found.reason


def test_what_is_no_reason_to_refuse() -> None:
    """Strides that differ or are no integers, and a NaN that stays as it is."""
    dca = official(strides=[(4, 2), (2.5, 1.7)], spatial_att=False)
    dca.best = math.nan
    (found,) = inspect(dca)
    assert found.reason is None


def test_the_check_does_not_mind_the_default_device() -> None:
    dca = look_alikes.OUTPUTS["nan"]()
    with torch.device("meta"):
        (found,) = inspect(dca)
    assert re.fullmatch(OTHER, found.reason)
