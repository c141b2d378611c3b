"""The path of a launch on a GPU, without one: the JIT's binder, the compiler, the launcher in C, up to the driver."""

import json
import os

import pytest
import torch

from benchmarks.offline import stand_in
from tests.compiled import output_of

pytestmark = pytest.mark.slow

FORWARD = [
    *("patch_embed", "centre", "covariance", "mixing", "mix"),
    *("normalise", "spatial_attention", "conv", "upsample_rows"),
]
TRAINING = ["patch_embed_rows", *FORWARD[1:-1], "batch_statistics", "combine_images", "upsample_rows"]
BACKWARD = [
    *("upsample_backward_rows", "norm_gradients", "grid_gradient", "conv_gradient"),
    *("expected_gradient", "spatial_attention_backward", "layer_norm_backward", "spatial_gradients"),
    *("mixing_gradient", "mixing_backward", "mix_backward", "layer_norm_backward", "channel_gradients"),
    *("map_gradient_rows", "patch_embed_gradients"),
]
# Of several images, the convolutions' gradients are sums of partial ones.
STEP = {1: [*TRAINING, *BACKWARD], 2: [*TRAINING, *BACKWARD[:4], "sum_partials", *BACKWARD[4:]]}
# What another image size compiles anew: windows are constants of the passes over the maps.
OF_IMAGE_SIZE = {
    "eval": ["patch_embed", "upsample_rows"],
    "train": ["patch_embed_rows", "upsample_rows", "upsample_backward_rows", "map_gradient_rows"],
}


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_every_source_becomes_triton_ir(target: str) -> None:
    found = json.loads(output_of("-m", "tests.tools.front_end", target))
    assert found["failures"] == {}
    assert found["anew"] == {"sixteen images": 0, "parameters at odd addresses": 0}
    assert found["sources"] >= 270


@pytest.fixture
def launches() -> None:
    """Skips where nothing launches into the stand-in; continuous integration has what that takes."""
    reason = stand_in.why_no_launches()
    if reason is not None and (torch.cuda.is_available() or not os.environ.get("CI")):
        pytest.skip(reason)


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(
    ("size", "dtype", "batches"),
    [("tiny", "float32", (1, 2)), ("paper", "bfloat16", (1, 8)), ("single", "float32", (1, 2))],
)
def test_launches_reach_the_driver_as_meant(size: str, dtype: str, batches: tuple[int, int], mode: str) -> None:
    """Programs, shared memory and every argument are checked in `launched.py`; here, which kernels there were."""
    found = json.loads(output_of("-m", "tests.tools.launched", size, dtype, mode, *map(str, batches)))
    one, several = (FORWARD, FORWARD) if mode == "eval" else (STEP[1], STEP[2])
    assert [call["launched"] for call in found["calls"]] == [one, several]
    assert found["again"] == {"launched": several, "compiled": []}
    if size == "tiny":
        assert found["other size"] == {"launched": several, "compiled": OF_IMAGE_SIZE[mode]}
        assert set(OF_IMAGE_SIZE[mode]) <= set(found["warmed"]["compiled"])
        assert found["warmed"]["then"] == []


WATCHED = """
from unittest import mock
import torch
import dca_kernels
from benchmarks import smoke
from benchmarks.offline import stand_in

with stand_in.standing_in("sm_90"), mock.patch.object(smoke, "_wait"), torch.no_grad():
    dca = dca_kernels.DCA((4, 8), patch=2, backend="triton").eval()
    maps = [torch.zeros(1, 4, 4, 4), torch.zeros(1, 8, 2, 2)]
    for _ in range(2):  # the second call goes by the plan of the first
        watch = smoke.Watch()
        with watch._hooked():
            dca(maps)
        print(*watch.kernels)
"""


@pytest.mark.usefixtures("launches")
def test_the_smoke_test_sees_launches_by_a_plan() -> None:
    first, second = output_of("-c", WATCHED).splitlines()
    assert first == second == " ".join(FORWARD)


@pytest.mark.usefixtures("launches")
def test_a_call_costs_the_host_little_more_than_its_launches() -> None:
    """In functions that are called, of which there is one number; `make regression` has the times."""
    counts = {(mode, what): count for mode, what, count in json.loads(output_of("-m", "tests.tools.counted"))}
    bare = counts["eval", "its 9 launches by the compiled kernels' run"]
    assert counts["eval", "forward"] <= 3 * bare  # 2.5
    launches, autograd = counts["train", "its 26 launches by the compiled kernels' run"], "autograd of 54 tensors"
    assert counts["train", "training step"] <= 1.5 * (launches + counts["train", autograd])  # 1.3
    for mode, call in (("eval", "forward"), ("train", "training step")):
        around = counts[mode, f"{call}, torch backend, tiny maps"] - counts[mode, "the backend alone"]
        assert around <= 1000  # 830
