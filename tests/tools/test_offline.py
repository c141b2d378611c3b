"""The committed table of machine code: it belongs to the kernels as they are, and nothing in it is out of bounds."""

import json

import pytest
import torch
import triton

from benchmarks.offline import machine_code
from dca_kernels.contract import Affine, Attention, Projections
from dca_kernels.triton_backend import launch, spatial_attention, spatial_attention_backward
from dca_kernels.triton_backend.tokens import Tokens
from tests.compiled import ROOT, output_of

pytestmark = pytest.mark.slow

OFFLINE = ROOT / "benchmarks" / "results" / "offline"

CODE = json.loads((OFFLINE / "machine_code.json").read_text())
TRAFFIC = json.loads((OFFLINE / "traffic.json").read_text())
NVIDIA = ("sm_80", "sm_86", "sm_90", "sm_100")
OF_ROWS = ("patch_embed_rows", "upsample_rows", "upsample_backward_rows", "map_gradient_rows")
MEMORY_BOUND = ("patch_embed", "upsample", "upsample_backward", "map_gradient", *OF_ROWS)
FORWARD_PRODUCTS = ("covariance", "mix", "spatial_attention", "conv")
BACKWARD_PRODUCTS = ("upsample_backward", "conv_gradient", "mixing_gradient", "mix_backward")
PRODUCTS = (*FORWARD_PRODUCTS, *BACKWARD_PRODUCTS, "spatial_attention_backward")


def rows(*targets: str, **conditions: str) -> list[dict]:
    chosen = [r for r in CODE["rows"] if r["target"] in targets and all(r[k] == v for k, v in conditions.items())]
    assert chosen
    return chosen


def name(row: dict) -> str:
    return f"{row['kernel']}, {row['case']}, {row['dtype']}, {row['target']}"


# Bytes. Of spatial_attention a few, where more programs on a multiprocessor were measured to gain more
# (benchmarks/results/NOTES.md). Of its backward in the way that scores of some hundreds take, which is rare.
SPILLS = {
    ("spatial_attention", "sm_90"): 40,
    ("spatial_attention_backward", "sm_80"): 1144,
    ("spatial_attention_backward", "sm_90"): 720,
    ("spatial_attention_backward", "sm_100"): 696,
}


def test_nothing_spills_on_data_centre_gpus() -> None:
    """But in float64, which is for checks: its rows say by how much; and where it was measured to be faster."""
    spilling = [r for r in rows("sm_80", "sm_90", "sm_100") if r["spilled"] or r["local_memory"]]
    for r in spilling:
        assert r["dtype"] == "float64" or r["spilled"] <= SPILLS.get((r["kernel"], r["target"]), 0), name(r)


def test_the_table_has_one_image_and_every_accumulation_dtype() -> None:
    cases = {(r["case"], r["dtype"]) for r in CODE["rows"]}
    assert {("train, batch 1", "bfloat16"), ("train", "bfloat16"), ("train", "float32"), ("train", "float64")} <= cases


def test_shared_memory_fits_every_target() -> None:
    assert [name(r) for r in rows(*NVIDIA, "gfx942") if r["shared"] > r["shared_limit"]] == []


def test_there_are_no_float_atomics() -> None:
    assert [name(r) for r in rows(*NVIDIA, "gfx942") if r["atomics"]] == []


@pytest.mark.parametrize("kernel", MEMORY_BOUND)
def test_memory_bound_kernels_move_16_bytes_at_a_time(kernel: str) -> None:
    its = rows(*NVIDIA, kernel=kernel)
    assert [name(r) for r in its if not r["loads_128"]] == []
    # tokens of windows that are 10 wide are stored 8 bytes at a time
    narrow = {("patch_embed", "train, any windows")}
    assert [name(r) for r in its if not r["stores_128"] and (kernel, r["case"]) not in narrow] == []


@pytest.mark.parametrize("kernel", PRODUCTS)
def test_products_run_on_tensor_cores(kernel: str) -> None:
    low = [r for r in rows(*NVIDIA, "gfx942", kernel=kernel) if r["dtype"] in ("bfloat16", "float16")]
    assert low and all(r["tensor_core"] for r in low)


@pytest.mark.skipif(CODE["triton"] != triton.__version__, reason=f"the table is of triton {CODE['triton']}")
def test_the_table_belongs_to_these_kernels() -> None:
    """Every launch of every case has its row; three are compiled again and give the same one."""
    code = """
import json, sys
from pathlib import Path
from benchmarks.offline import machine_code, stand_in
rows = {(r["target"], r["digest"]): r for r in json.loads(Path(sys.argv[1]).read_text())["rows"]}
missing = {key: job for key, job in machine_code.plan(list(stand_in.TARGETS)).items() if key not in rows}
assert not missing, ("run `python -m benchmarks offline`: not in the table", list(missing.values())[:9], len(missing))
case = next(c for c in machine_code.CASES if c.name == "eval" and c.dtype == machine_code.torch.bfloat16)
for one in machine_code.record(case, "sm_90"):
    if one.name in ("patch_embed", "spatial_attention", "conv"):
        fresh = machine_code.row(case, "sm_90", one)
        kept = rows["sm_90", fresh["digest"]]
        assert {**fresh, "case": ""} == {**kept, "case": ""}, (fresh, kept)
"""
    output_of("-c", code, str(OFFLINE / "machine_code.json"))


def test_a_row_stays_where_only_words_change() -> None:
    """Or each word of a docstring compiles the kernels again; another statement must."""

    def kernel(x: int) -> int:
        return x + 1

    code = machine_code.statements(kernel)

    def kernel(x: int) -> int:  # type: ignore[no-redef]
        """One more."""
        return x + 1  # not 2

    assert machine_code.statements(kernel) == code

    def kernel(x: int) -> int:  # type: ignore[no-redef]
        return x + 2

    assert machine_code.statements(kernel) != code


def test_a_row_goes_where_a_constant_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    code = machine_code.code_of.__wrapped__  # the function itself remembers
    kernel = spatial_attention_backward._attend_backward
    before = code(kernel)
    monkeypatch.setattr(spatial_attention_backward, "LN_2", triton.language.constexpr(1.0))
    assert code(kernel) != before


def counted(implementation: str) -> dict[tuple[str, str], dict]:
    return {(r["mode"], r["dtype"]): r for r in TRAFFIC if r["implementation"] == implementation}


def test_a_forward_is_at_most_eleven_launches() -> None:
    launches = {(mode, r["launches"]) for (mode, _), r in counted("triton").items() if mode != "step"}
    assert launches == {("eval", 9), ("train", 11)}


def test_a_training_step_is_26_launches() -> None:
    assert [r["launches"] for (mode, _), r in counted("triton").items() if mode == "step"] == [26, 26]


def test_bytes_are_within_the_bound() -> None:
    assert len(counted("triton")) == 6
    assert [key for key, r in counted("triton").items() if r["bytes"] > r["bound_bytes"]] == []


@pytest.mark.parametrize(
    ("target", "asked", "products"),
    [
        ("sm_80", "ieee", "ieee"),
        ("sm_80", "tf32", "tf32"),
        ("sm_90", "ieee", "tf32x3"),
        ("sm_90", "tf32", "tf32"),
    ],
)
def test_only_the_highest_precision_goes_without_tensor_cores(
    target: str, asked: str, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Hopper not even that: see benchmarks/results/NOTES.md."""
    monkeypatch.setattr(launch, "float32_products", lambda: asked)
    monkeypatch.setattr(launch, "architecture", lambda device: target)
    tokens = Tokens(torch.empty(1, 784, 480), (32, 64, 128, 256))
    nothing = Affine(torch.empty(0), torch.empty(0))
    attention = (Attention(nothing, Projections(*[nothing] * 4), heads=4, eps=1e-6, shift_cancels=False),) * 4
    _, chosen = spatial_attention.configured("spatial_attention_backward", tokens.launcher, attention, tokens.batch)
    assert chosen == products


LARGE = """
import torch
from benchmarks.offline import stand_in
from benchmarks.offline.machine_code import launches_of
from dca_kernels import DCA
for target, shapes, patch in (
    ("sm_90", ((32, 224, 224), (256, 112, 112)), 112),
    ("sm_80", ((64, 56, 56), (256, 112, 112)), 112),
    ("sm_86", ((32, 112, 112), (256, 56, 56)), 56),
):
    for dtype in (torch.bfloat16, torch.float32):
        module = DCA([c for c, _, _ in shapes], patch=patch, backend="triton").to(dtype)
        launches = launches_of(module, [torch.empty(4, *shape, dtype=dtype) for shape in shapes], True, target)
        with stand_in.standing_in(target):
            for one in launches:
                if one.name == "grid_gradient":
                    shared = one.compile().metadata.shared
                    assert shared <= stand_in.TARGETS[target].shared_limit, (target, dtype, shared)
"""


def test_shared_memory_fits_where_a_map_is_as_small_as_the_grid() -> None:
    """Loops of a few rows are unrolled, and the loop around them must not be copied ahead for that."""
    output_of("-c", LARGE)


WINDOWS_THAT_DIFFER = """
import torch
from benchmarks.offline import stand_in
from benchmarks.offline.machine_code import launches_of
from dca_kernels import DCA
for target, shapes, patch, dtype in (
    ("sm_90", ((16, 350, 350), (32, 87, 87)), 87, torch.bfloat16),
    ("sm_90", ((16, 775, 775), (32, 96, 96)), (65, 96), torch.float32),
    ("sm_90", ((16, 390, 390), (32, 128, 128)), (4, 128), torch.bfloat16),
    ("sm_86", ((16, 600, 600), (32, 75, 75)), 28, torch.float32),
):
    module = DCA([c for c, _, _ in shapes], patch=patch, backend="triton").to(dtype)
    launches = launches_of(module, [torch.empty(1, *shape, dtype=dtype) for shape in shapes], True, target)
    with stand_in.standing_in(target):
        for one in launches:
            if one.name in ("map_gradient", "upsample_backward", "grid_gradient"):
                shared = one.compile().metadata.shared
                assert shared <= stand_in.TARGETS[target].shared_limit, (target, dtype, one.name, shared)
"""


def test_shared_memory_fits_where_windows_do_not_divide_a_wide_map() -> None:
    output_of("-c", WINDOWS_THAT_DIFFER)


PACKED = """
import torch
from benchmarks.offline import stand_in
from benchmarks.offline.machine_code import launches_of
from dca_kernels import DCA
for shapes, patch in (
    (((32, 224, 224), (64, 112, 112), (128, 56, 56), (256, 28, 28)), 28),
    (((8, 100, 90), (16, 50, 45), (24, 28, 20)), (28, 20)),
    (((8, 84, 84), (16, 28, 28)), 28),
):
    for dtype, train in ((torch.bfloat16, True), (torch.float32, True), (torch.float32, False)):
        module = DCA([c for c, _, _ in shapes], patch=patch, backend="triton").to(dtype).train(train)
        launches = launches_of(module, [torch.empty(2, *shape, dtype=dtype) for shape in shapes], train, "sm_90")
        with stand_in.standing_in("sm_90"):
            for one in launches:
                if one.name.removesuffix("_rows") in ("patch_embed", "batch_statistics", "map_gradient"):
                    assert "s16x2" not in one.compile().asm["ptx"], (one.name, shapes, dtype)
"""


def test_windows_are_not_counted_two_at_a_time_in_16_bits() -> None:
    """ptxas 12.8 loses the constant of `add.s16x2`: see `primitives.quotient`. Where windows divide a map, and not."""
    output_of("-c", PACKED)
