"""The model of a kernel's time: places of the source, regions of machine code, executions, and the sum by hand."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl

from benchmarks.offline import flow, model, traffic
from benchmarks.offline.flow import Counts, Executions, Inside, Part, Programs
from tests.compiled import ROOT, output_of

interpreted = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="kernels are compiled: TRITON_INTERPRET=1 is not set"
)


@pytest.fixture(autouse=True)
def this_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of this file are taken for the package's."""
    monkeypatch.setattr(flow, "BACKEND", Path(__file__).parent)
    flow._heads.cache_clear()
    flow.place.cache_clear()


@triton.jit
def _toy_kernel(x_ptr, size, SCALES: tl.constexpr):
    """A program belongs to one of SCALES, sums as many pairs of elements as its number says, and stores."""
    program = tl.program_id(0)
    out = 0.0
    for i in tl.static_range(SCALES):
        if program // 2 == i:
            for start in tl.range(0, (i + 1) * size, 2):
                out += tl.load(x_ptr + start)
            for _ in tl.range(0, 8, loop_unroll_factor=4):
                out += 1.0
    if (
        program > 0
    ):  # fmt: skip
        tl.store(x_ptr + 100 + program, out)


def line_of(text: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if line.strip().startswith(text))


def at(text: str) -> flow.Place | None:
    return flow.place(__file__, line_of(text))


def test_places_are_named_by_their_function() -> None:
    """Wherever they are in the file; the head of a statement may have several lines."""
    assert at("if program // 2 == i:") == ("test_model.toy_kernel if 1", True)
    assert at("for start in tl.range(0, (i + 1)") == ("test_model.toy_kernel for 2", False)
    assert at("program > 0") == at("if (") == ("test_model.toy_kernel if 2", False)
    assert at("out += 1.0") is None
    assert flow.place("/another/copy/of/tests/tools/test_model.py", line_of("program > 0")) == at("if (")
    assert flow.place(torch.__file__, 1) is None


@interpreted
def test_executions_by_hand() -> None:
    x = torch.zeros(200)
    (toy,) = traffic.count_kernels(lambda: _toy_kernel[(4,)](x, 6, SCALES=2))
    chain, loop, unrolled, last = (f"test_model.toy_kernel {name}" for name in ("if 1", "for 2", "for 3", "if 2"))
    assert [(way.count, way.turns) for way in toy.ways] == [(2, {chain: 0}), (2, {chain: 1})]
    first, second = (way.executions for way in toy.ways)
    assert first[chain] == Executions(came=4, ran=2, most=1)
    assert first[loop] == Executions(came=2, ran=2 * 3, most=3, extent=6, step=2)
    assert second[loop] == Executions(came=2, ran=2 * 6, most=6, extent=12, step=2)
    assert first[unrolled] == Executions(came=2, ran=2 * 2, most=2, extent=8, step=4)
    assert (first[last].ran, second[last].ran) == (1, 2)  # program 0 does not store


def machine_code(*lines: str) -> str:
    """As nvdisasm prints it: `#` begins the text of the line that what follows comes from."""
    found = []
    for line in lines:
        if line.startswith("#"):
            found.append(f'\t//## File "{__file__}", line {line_of(line[1:])}')
        elif line.startswith(".L"):
            found.append(f"{line}:")
        else:
            found.append(f"        /*0000*/              {line} ;")
    return "\n".join(found)


IF, FOR = "#if program // 2 == i:", "#for start in tl.range(0, (i + 1)"
CHAIN = machine_code(
    "S2R R0, SR_CTAID.X",
    *(IF, "@!P0 BRA `(.L_x_1)"),  # the first turn
    *(".L_x_0", FOR, "LDG.E R1, desc[UR4][R2.64]", "BAR.SYNC.DEFER_BLOCKING 0x0", "@P1 BRA `(.L_x_0)", "EXIT"),
    ".L_x_1",
    *(IF, "@P2 EXIT"),  # the second
    *(".L_x_2", FOR, "LDGSTS.E.128 [R45], desc[UR16][R32.64]", "@P1 BRA `(.L_x_2)", "MUFU.EX2 R1, R1", "EXIT"),
    *(".L_x_3", "BRA `(.L_x_3)", "NOP"),
)
TABLE = machine_code(
    *(IF, 'BRX R4 -0x1e0  (*"BRANCH_TARGETS .L_x_1,.L_x_2"*)'),
    *(".L_x_2", "FADD R1, R1, R1", "EXIT"),  # the second turn lies first
    *(".L_x_1", "STG.E [R1], R1", "FADD R1, R1, R1", "EXIT"),
)


def inside(*regions: tuple[str, str, int | None]) -> tuple[Inside, ...]:
    return tuple(Inside(kind, f"test_model.toy_kernel {place}", turn) for kind, place, turn in regions)


def test_machine_code_by_hand() -> None:
    """Two turns of an unrolled loop: the loops inside, and the exit that a branch takes."""
    found = {part.inside: {kind: n for kind, n in part.counts.items() if n} for part in flow.parts(CHAIN)}
    assert found == {
        (): {"instructions": 4},  # with what lies behind the end
        inside(("if", "if 1", 0)): {"instructions": 1},
        inside(("if", "if 1", 0), ("for", "for 2", None)): {"instructions": 3, "loads": 1, "barriers": 1, "trips": 1},
        inside(("if", "if 1", 1)): {"instructions": 2, "special": 1},
        inside(("if", "if 1", 1), ("for", "for 2", None)): {"instructions": 2, "copies": 1, "trips": 1},
    }


def test_a_table_of_branches_has_the_turns_in_its_order() -> None:
    found = {part.inside: part.counts for part in flow.parts(TABLE)}
    assert found[inside(("if", "if 1", 0))]["stores"] == 1
    assert found[inside(("if", "if 1", 0))]["instructions"] == 3
    assert found[inside(("if", "if 1", 1))]["instructions"] == 2


def ways() -> list[Programs]:
    """Of twelve programs four take the first turn, with 3 trips each, eight the second, with 5 or 6."""
    chain, loop = "test_model.toy_kernel if 1", "test_model.toy_kernel for 2"
    return [
        Programs(4, {chain: 0}, {chain: Executions(8, 4, 1), loop: Executions(4, 12, 3, 6, 2)}),
        Programs(8, {chain: 1}, {chain: Executions(16, 8, 1), loop: Executions(8, 44, 6, 12, 2)}),
    ]


def test_instructions_that_run_by_hand() -> None:
    counts = flow.executed(flow.parts(CHAIN), ways(), None)
    assert counts.mean["instructions"] == pytest.approx((4 * (4 + 1 + 3 * 3) + 8 * (4 + 2 + 5.5 * 2)) / 12)
    assert (counts.mean["barriers"], counts.mean["special"]) == (pytest.approx(4 * 3 / 12), pytest.approx(8 / 12))
    # The longest program takes the second turn, with 6 trips.
    assert (counts.longest["instructions"], counts.longest["trips"]) == (4 + 2 + 6 * 2, 6)
    assert flow.longest_loop(flow.parts(CHAIN), ways(), None) == flow.Loop(6, 1, 0)


def test_loops_over_images_grow_with_them() -> None:
    """Where there are as many programs for any batch: 2.5 times the images, in steps of two."""
    counts = flow.executed(flow.parts(CHAIN), ways(), 2.5)
    assert counts.longest["trips"] == 15 and counts.mean["trips"] == pytest.approx((4 * 8 + 8 * 15) / 12)
    assert flow.longest_loop(flow.parts(CHAIN), ways(), 2.5).trips == 15


def test_a_branch_whose_turns_are_not_all_found_runs_in_its_share() -> None:
    part = Part(inside(("if", "if 1", 0)), {"instructions": 10})
    counts = flow.executed([part], ways(), None)  # one of two turns
    assert counts.mean["instructions"] == pytest.approx(5)
    alone = Programs(4, {}, {"test_model.toy_kernel if 2": Executions(4, 1, 1)})
    both = [Part(inside((kind, "if 2", None)), {"instructions": 100}) for kind in ("if", "else")]
    assert [flow.executed([one], [alone], None).mean["instructions"] for one in both] == [25, 75]
    assert flow.executed([Part(inside(("if", "if 9", None)), {"instructions": 1})], [alone], None).mean == {
        "instructions": 0
    }  # no program ever came there


# Times


GPU = traffic.Gpu(1e12, {"bf16": 100e12}, multiprocessors=10, clock=1e9)


def work(**changes: object) -> model.Work:
    values = {
        "kernel": "toy",
        "programs": 240,
        "warps": 4,
        "registers": 100,
        "spilled": 0,
        "shared": 40000,
        "moved": 3e6,
        "products": {"bf16": 4e8},
        "counts": Counts({"instructions": 100, "loads": 2}, {"instructions": 200, "loads": 4}),
        "trips": 0,
        "in_flight": 0,
    }
    return model.Work(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "programs"),
    [
        ({}, 4),  # 104 registers a thread: 19 warps of 64
        ({"shared": 100000}, 2),
        ({"registers": 32, "shared": 0}, 16),  # 64 warps
        ({"registers": 16, "shared": 0, "warps": 1}, 32),
        ({"registers": 255, "shared": 0, "warps": 8}, 1),
    ],
)
def test_resident_programs_by_hand(changes: dict, programs: int) -> None:
    assert work(**changes).resident == programs


def test_a_time_by_hand() -> None:
    """Six waves: five mean programs and the longest one, one after the other."""
    found = model.terms(work(), GPU)
    assert (found.memory, found.products) == (pytest.approx(3), pytest.approx(4))
    assert found.schedulers == pytest.approx(240 * 4 * 100 / 40 / 1e3)
    assert found.chain == pytest.approx(((5 * 100 + 200) / 1e3, 0, (5 * 2 + 4) / 1e3, 0))
    constants = model.Constants(start=1, instruction=10, barrier=1, load=100, trip=1, product=2)
    expected = 1 + (3**2 + 8**2 + 2.4**2 + (7 + 1.4) ** 2) ** 0.5
    assert model.microseconds(found, constants) == pytest.approx(expected)


def test_a_fit_finds_the_constants_that_made_the_times() -> None:
    made = model.Constants(start=2, instruction=3, barrier=50, load=20, trip=200, product=1.2)
    generator = torch.Generator().manual_seed(0)
    groups = []
    for _ in range(60):
        numbers = (torch.rand(7, generator=generator) * 5).tolist()
        each = model.Terms(numbers[0], numbers[1], numbers[2], tuple(x / 30 for x in numbers[3:]))
        groups.append(([each], float(model.microseconds(each, made))))
    assert model.fit(groups) == pytest.approx(made, rel=0.02)


# What is committed


ROWS = json.loads((ROOT / "benchmarks" / "results" / "offline" / "model.json").read_text())
KERNELS = [row for row in ROWS if row["kernel"] != "all"]
REDUCERS = ("norm_gradients", "patch_embed_gradients", "spatial_gradients", "channel_gradients")


def test_no_configuration_is_of_more_images_than_are_counted() -> None:
    table = json.loads((ROOT / "dca_kernels" / "triton_backend" / "configurations.json").read_text())
    conditions = [(entry["size"], row.get("if", {})) for entry in table.values() for row in entry["rows"]]
    named = [its["max_images"] for _, its in conditions if "max_images" in its]
    named += [its["max_size"] for size, its in conditions if size == "images" and "max_size" in its]
    assert named and max(named) < model.IMAGES


def test_the_rows_are_those_of_every_call() -> None:
    calls = {(row["phase"], row["batch"], row["launches"]) for row in ROWS if row["kernel"] == "all"}
    assert {call for call in calls if call[0] == "eval"} == {("eval", batch, 9) for batch in (1, 8, 32)}
    assert {call for call in calls if call[0] == "train"} == {
        ("train", batch, 26 + (batch > 1)) for batch in (1, 8, 32)
    }


@pytest.mark.parametrize(("phase", "mode"), [("eval", "eval"), ("train", "step")])
def test_bytes_are_those_of_the_table_of_traffic(phase: str, mode: str) -> None:
    """What makes a table anew makes both."""
    counted = json.loads((ROOT / "benchmarks" / "results" / "offline" / "traffic.json").read_text())
    known = {(run["implementation"], run["mode"], run["dtype"]): run for run in counted}
    moved: dict[str, float] = {}
    for one in known["triton", mode, "bfloat16"]["kernels"]:
        its = sum(one["loaded"].values()) + sum(one["stored"].values())
        moved[one["kernel"]] = moved.get(one["kernel"], 0) + its / 1e6
    found = {row["kernel"]: row["mb"] for row in KERNELS if (row["phase"], row["batch"]) == (phase, 1)}
    assert found == {kernel: round(megabytes, 2) for kernel, megabytes in moved.items()}


def test_registers_are_those_of_the_table_of_machine_code() -> None:
    code = json.loads((ROOT / "benchmarks" / "results" / "offline" / "machine_code.json").read_text())
    its = [row for row in code["rows"] if (row["target"], row["dtype"]) == (traffic.TARGET, "bfloat16")]
    known = {(row["kernel"], row["registers"], row["spilled"]) for row in its}
    assert {(row["kernel"], row["registers"], row["spilled"]) for row in KERNELS} <= known


def test_sums_over_images_fill_the_gpu_or_end_soon() -> None:
    its = [row for row in KERNELS if row["kernel"] in REDUCERS and row["batch"] == 32]
    assert len(its) == 4
    assert all(row["programs"] >= 132 or (row["waves"] <= 1 and row["trips"] <= 32) for row in its)


# Measured to be faster so, or bound by other things (benchmarks/results/NOTES.md).
FEW_WARPS = {
    "spatial_attention",
    "spatial_attention_backward",
    "grid_gradient",
    "mixing_gradient",
    "mixing_backward",
}


def test_a_multiprocessor_holds_twelve_warps() -> None:
    few = {row["kernel"] for row in KERNELS if row["resident_warps"] < 12}
    assert few <= FEW_WARPS and all(row["resident_warps"] >= 8 for row in KERNELS)


def test_the_model_is_near_what_was_measured() -> None:
    """As a whole: a kernel may be further off."""
    for row in (row for row in ROWS if row["kernel"] == "all"):
        assert 0.8 < row["model_us"] / row["measured_us"] < 1.2, (row["phase"], row["batch"])


@pytest.mark.slow
def test_the_rows_belong_to_these_kernels(tmp_path: Path) -> None:
    """A forward of one image, counted and compiled anew."""
    file = tmp_path / "model.json"
    output_of("-m", "benchmarks", "model", "--phase", "eval", "--batch", "1", "--json", str(file))
    expected = [row for row in ROWS if (row["phase"], row["batch"]) == ("eval", 1)]
    assert json.loads(file.read_text()) == expected
