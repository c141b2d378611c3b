"""What looks like an official DCA and is another function somewhere is refused, with a reason that says where."""

import re

import pytest
import torch
from torch import nn

from dca_kernels import inspect
from tests.swap import look_alikes
from tests.swap.models import assert_refused, official

OTHER = r"it computes something else: (outputs|gradients|buffers) in (evaluation|training) differ .+"
UNTRIED = r".+ names (.+): no trial shows (.+); replace_dca\(\.\.\., verify=False\) trusts the layout"
CHANGED = r"the (_call_impl|merged) of this instance was replaced, and would not be called"
REASONS = {
    "low_softmax": UNTRIED,
    "low_sum": UNTRIED,
    "halves_of_two_bytes": r"under autocast, its outputs\[\d\] is off by .+, the official operations' by .+",
    "on_a_gpu": UNTRIED,
    "dropped_weights": r"it draws random numbers in training \(aten::bernoulli_\.float\): .+",
    "own_call": r"it has its class's own __call__, which would not be called",
    "own_call_in_evaluation": r"it has its class's own __call__, which would not be called",
    "call_of_an_instance": CHANGED,
    "method_of_an_instance": CHANGED,
    "counting": "its forward sets calls, which the fused one would not",
    "keeping": "its forward sets last, which the fused one would not",
    "appending": "its forward changes the maps that it is given",
    "adding_in_place": "its forward changes the maps that it is given",
    **dict.fromkeys(look_alikes.RANDOM, UNTRIED),
    "torch": r"it draws random numbers in training \(aten::rand\): it is another function each time",
}


LARGE = {"linear_above_100_tokens", "without_attention_above_its_own_size", "batch_above_two_of_a_fixed_grid"}
NAMES = [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in look_alikes.LOOK_ALIKES]


@pytest.mark.parametrize("name", NAMES)
def test_a_look_alike_is_refused(name: str) -> None:
    model = nn.Sequential(look_alikes.LOOK_ALIKES[name]())
    assert_refused(model, f"0 ({type(model[0]).__name__})", REASONS.get(name, OTHER))


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
