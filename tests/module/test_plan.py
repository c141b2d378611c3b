"""The plan of a call of the kernels: where its memory lies, what it allocates, what it knows of a call."""

import concurrent.futures
import contextlib
import copy
import functools
import itertools
import logging
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dca_kernels
from dca_kernels import contract
from tests.compiled import output_of
from tests.oracle import DEVICE, LAYOUTS, Config, assert_same, both_modes, evaluate, pair, random_like, random_maps

pytest.importorskip("triton", reason="triton is not installed")

import triton

from dca_kernels.triton_backend import eager, launch, plan
from dca_kernels.triton_backend.memory import ALIGNMENT, Part, Room, aligned, arranged, packed
from dca_kernels.triton_backend.plan import tensors_of

CONFIG = Config((4, 8), 2, sizes=((5, 4), (2, 3)))

parts = st.builds(
    lambda nbytes, first, length: Part(nbytes, first, first + length),
    st.integers(1, 3000),
    st.integers(0, 9),
    st.integers(0, 5),
)
rooms = st.builds(Room, st.integers(0, 4000), st.integers(0, 12))


def spans(parts: list[Part], rooms: list[Room]) -> list[tuple[int, int, int]]:
    """Room, begin and end of each part."""
    return [
        (room, begin, begin + part.nbytes) for part, (room, begin) in zip(parts, arranged(parts, rooms), strict=True)
    ]


@settings(deadline=None)
@given(st.lists(parts, max_size=12), st.lists(rooms, max_size=3))
def test_parts_that_live_together_share_no_memory(parts: list[Part], rooms: list[Room]) -> None:
    found = spans(parts, rooms)
    for (a, (room, begin, end)), (b, (other, other_begin, other_end)) in itertools.combinations(
        zip(parts, found, strict=True), 2
    ):
        together = a.first <= b.last and b.first <= a.last
        assert not (together and room == other and begin < other_end and other_begin < end)
    for part, (number, begin, end) in zip(parts, found, strict=True):
        assert begin % ALIGNMENT == 0
        if number < len(rooms):
            assert part.last < rooms[number].until
            assert end <= rooms[number].nbytes


def test_tensors_behind_each_other_are_apart_and_aligned() -> None:
    kinds = ((27, torch.bfloat16), (5, torch.float32), (0, torch.float32), (1, torch.int64), (129, torch.float16))
    tensors = [torch.empty(count, dtype=dtype, device="meta") for count, dtype in kinds]
    offsets = packed(tensors)
    assert offsets[0] == 0 and all(offset % ALIGNMENT == 0 for offset in offsets)
    for t, (begin, end) in zip(tensors, itertools.pairwise(offsets), strict=True):
        assert t.nbytes <= end - begin < t.nbytes + ALIGNMENT


def test_parts_that_follow_each_other_share_memory() -> None:
    """And a room is taken before a workspace, by the largest part that it holds."""
    small, large, late = Part(100, 0, 1), Part(1000, 1, 2), Part(900, 3, 4)
    assert arranged([small, large, late], []) == [(0, aligned(1000)), (0, 0), (0, 0)]
    assert arranged([small, large, late], [Room(1000, 3)]) == [(1, 0), (0, 0), (1, 0)]


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call has its plan and its memory, and its kernels are left out: they take most of the time."""
    monkeypatch.setattr(launch, "run", lambda *args, **arguments: None)


# What a call allocates


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tensors with memory that the package asks for."""
    found: list[Tensor] = []

    def noted(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_and_note(*args: object, **kwargs: object) -> Tensor:
            tensor = allocate(*args, **kwargs)
            if not tensor.is_meta and tensor.numel():
                found.append(tensor)
            return tensor

        return allocate_and_note

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, noted(getattr(owner, name)))
    return found


@both_modes
@pytest.mark.usefixtures("nothing_runs")
def test_a_call_allocates_its_results_and_a_workspace(train: bool, made: list[Tensor]) -> None:
    """In training what the backward needs, and for the backward the maps' gradients, the parameters', a workspace.

    Where nothing requires a gradient, gradients may be enabled and nothing is kept all the same.
    """
    module, maps = pair(CONFIG, "triton", torch.float32, train)[0], random_maps(CONFIG, torch.float32, backend="triton")
    module.requires_grad_(train)
    for x in maps:
        x.requires_grad_(train)
    douts = [torch.ones_like(x) for x in maps]
    inputs = [*maps, *module.parameters()]
    for enabled in (True, True) if train else (False, False, True, True):
        made.clear()
        with torch.set_grad_enabled(enabled):
            outs = module(maps)
        assert len(made) <= len(outs) + 1 + train
        if train:
            gradients = torch.autograd.grad(outs, inputs, douts)
            of_parameters = {g.untyped_storage().data_ptr() for g in gradients[len(maps) :]}
            assert len(of_parameters) == 1
            assert len(made) <= len(outs) + len(maps) + 1 + 3
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in made)  # as large as what lies in it needs


@pytest.mark.parametrize(("train", "most"), [(False, 0.13), (True, 0.01)], ids=["eval", "train"])
def test_what_lives_within_a_call_lies_where_its_results_will_be(train: bool, most: float) -> None:
    """At the paper's sizes, a workspace is a small part of the maps' bytes; without a plan it was half of them."""
    config = Config((32, 64, 128, 256), 28, sizes=((224, 224), (112, 112), (56, 56), (28, 28)), batch=1)
    module = pair(config, "triton", torch.bfloat16, train)[0]
    maps = [
        torch.empty(1, c, *size, dtype=torch.bfloat16) for c, size in zip(config.features, config.sizes, strict=True)
    ]
    its = contract.read(module, [head[0] for head in module.bn_relu], torch.bfloat16, [torch.bfloat16] * 4)
    kinds = [[eager.Kind.of(t) for t in tensors] for tensors in (maps, contract.flatten(its))]
    forward = eager.Forward(*kinds, its._replace(backward=train), torch.device(DEVICE))
    nbytes = sum(x.nbytes for x in maps)
    assert forward.plan.workspace <= most * nbytes
    if train:
        backward = eager.Backward(forward, kinds[0], kinds[0], [True] * (len(maps) + len(forward.parameters)))
        assert backward.plan.workspace <= 0.2 * nbytes


# What a plan is for


def forwards_of(module: nn.Module, *calls: list[Tensor]) -> int:
    """How many plans these calls need, of a module that was never called."""
    eager._forwards.clear()
    module = copy.deepcopy(module)
    for maps in calls:
        with torch.no_grad():
            module(maps)
            module(maps)
    return len(eager._forwards)


def test_kinds_of_calls_have_plans_of_their_own() -> None:
    module, maps = pair(CONFIG, "triton", torch.float32, False)[0], random_maps(CONFIG, torch.float32, backend="triton")
    assert forwards_of(module, maps, [x.clone() for x in maps]) == 1
    assert forwards_of(module, maps, [x[:1] for x in maps]) == 2
    assert forwards_of(module, maps, *[[change(x) for x in maps] for change in LAYOUTS.values()]) == 1 + len(LAYOUTS)


def test_what_products_are_computed_in_is_part_of_a_kind() -> None:
    module, maps = pair(CONFIG, "triton", torch.float32, False)[0], random_maps(CONFIG, torch.float32, backend="triton")
    before = torch.get_float32_matmul_precision()
    eager._forwards.clear()
    try:
        for precision in ("highest", "high", "highest"):
            torch.set_float32_matmul_precision(precision)
            with torch.no_grad():
                module(maps)
    finally:
        torch.set_float32_matmul_precision(before)
    assert [{one.arguments.get("PRECISION") for one in f.plan.launches} for f in eager._forwards.values()] == [
        {None, "tf32x3"},
        {None, "tf32"},
    ]


PRECISIONS = """
import torch
from dca_kernels.triton_backend import launch
found = []
for change in (
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'",
    "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
):
    exec(change)
    found.append(launch.precision(torch.float32, "sm_90"))
assert found == ["tf32", "tf32x3", "tf32x3"], found
assert launch.precision(torch.bfloat16, "sm_90") == "tf32"
"""


def test_either_way_to_set_the_precision_counts() -> None:
    """In a process of its own: where both were used, PyTorch's older getter raises."""
    output_of("-c", PRECISIONS)


def test_kernels_compile_within_a_mode_of_the_callers() -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as pool, triton.AsyncCompileMode(pool):
        launch.compile_all([])


def test_an_interrupted_compilation_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(futures: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("triton.runtime._async_compile.as_completed", interrupt)
        launch.compile_all([])
    launch.compile_all([])


def test_modules_of_equal_numbers_share_a_plan() -> None:
    """And other numbers of a BatchNorm have a plan of their own."""
    modules = [pair(CONFIG, "triton", torch.float32, False, seed)[0] for seed in range(3)]
    modules[2].bn_relu[0][0].eps = 0.5
    maps = random_maps(CONFIG, torch.float32, backend="triton")
    eager._forwards.clear()
    with torch.no_grad():
        outs = [module(maps) for module in modules]
    assert len(eager._forwards) == 2
    assert not torch.equal(outs[0][0], outs[1][0])


@pytest.mark.usefixtures("nothing_runs")
def test_a_bounded_number_of_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """The latest."""
    monkeypatch.setattr(eager, "MOST", 3)
    module, maps = pair(CONFIG, "triton", torch.float32, False)[0], random_maps(CONFIG, torch.float32, backend="triton")
    assert forwards_of(module, *[[x[:1].repeat(n, 1, 1, 1) for x in maps] for n in range(1, 6)]) == 3
    assert [of_maps[0].shape[0] for of_maps, *_ in eager._forwards] == [3, 4, 5]


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("frozen", [None, "avg_map", "attention"])
def test_warming_up_makes_the_plans_of_the_calls(frozen: str | None) -> None:
    """What was compiled for others would be compiled for nothing."""
    module, maps = pair(CONFIG, "triton", torch.float32)[0], random_maps(CONFIG, torch.float32, backend="triton")
    if frozen is not None:
        getattr(module, frozen).requires_grad_(False)
    eager._forwards.clear()
    dca_kernels.warm_up(module, [x.shape for x in maps])
    evaluate(module, maps)
    (forward,) = eager._forwards.values()
    assert len(forward._backwards) == 1


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (triton.knobs.runtime, "debug", True),
        (triton.knobs.compilation, "instrumentation_mode", "fpsan"),
        (launch, "configuration", functools.partial(launch.configuration)),
        (launch, "run", lambda *args, **arguments: None),
        (launch, "float32_products", lambda: "tf32"),
    ],
    ids=["debug", "instrumentation_mode", "configuration", "run", "precision"],
)
def test_what_launches_depend_on_is_part_of_a_kind(
    owner: object, name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of forwards, and of backwards behind one forward."""
    module, maps = pair(CONFIG, "triton", torch.float32)[0], random_maps(CONFIG, torch.float32, backend="triton")
    eager._forwards.clear()
    outs = module(maps)
    (forward,) = eager._forwards.values()
    for count in (1, 2):
        for _ in range(2):
            torch.autograd.backward(outs, maps, retain_graph=True)
            assert len(forward._backwards) == count
        monkeypatch.setattr(owner, name, value)
    for _ in range(2):
        module(maps)
        assert len(eager._forwards) == 2


@pytest.mark.parametrize(
    ("version", "tested"), [("3.6.0", True), ("3.9.1", True), ("3.7.0", False), ("3.60.0", False), ("4.0.0", False)]
)
def test_versions_whose_compiled_kernels_run_by_themselves(
    version: str, tested: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    caplog.set_level(logging.INFO, "dca_kernels")
    assert plan._is_tested.__wrapped__() is tested
    assert len(caplog.messages) == (not tested)


def test_parameters_at_odd_addresses_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the latest call had them at others: what is compiled for multiples of 16 bytes takes no other."""
    addresses: list[int] = []

    def note(*args: object, **arguments: object) -> None:
        addresses.extend(t.data_ptr() for t in tensors_of(tuple(arguments.values())))

    monkeypatch.setattr(launch, "run", note)
    module, maps = pair(CONFIG, "triton", torch.float32)[0], random_maps(CONFIG, torch.float32, backend="triton")
    evaluate(module, maps)
    for behind in (1, 2):  # elements, of four bytes
        for p in module.parameters():
            p.data = torch.cat([p.data.new_zeros(behind), p.data.flatten()])[behind:].view(p.shape)
        for _ in range(2):
            addresses.clear()
            evaluate(module, maps)
            assert addresses
            assert all(address % 16 == 0 for address in addresses)


@pytest.mark.parametrize("behind", [1, 256], ids=["misaligned", "aligned"])
def test_saved_tensors_may_come_back_elsewhere(behind: int) -> None:
    """From a hook that keeps them on another device, as activation offloading does: other addresses, dense strides, in
    one buffer of some.
    """
    module, maps = pair(CONFIG, "triton", torch.float32)[0], random_maps(CONFIG, torch.float32, backend="triton")
    maps = [LAYOUTS["part_of_cat"](x) for x in maps]
    expected = evaluate(copy.deepcopy(module), maps)

    def elsewhere(t: Tensor) -> Tensor:
        return torch.cat([t.new_zeros(behind), t.flatten()])[behind:].view(t.shape)

    with torch.autograd.graph.saved_tensors_hooks(elsewhere, elsewhere):
        found = evaluate(module, maps)
    assert_same(found, expected, rtol=1e-5)


def test_upstream_gradients_of_other_strides() -> None:
    """As of a sum and of a product: the backward of a call of one kind may be of several."""
    modules = pair(CONFIG, "triton")
    maps = random_maps(CONFIG, backend="triton")
    for layout in ("expanded_batch", "expanded_batch", "contiguous", "channels_last", "contiguous"):
        upstream = [LAYOUTS.get(layout, Tensor.contiguous)(g) for g in random_like(maps)]
        assert_same(*(evaluate(module, maps, upstream) for module in modules))


def test_a_frozen_module_has_gradients_of_the_maps() -> None:
    modules = [module.requires_grad_(False) for module in pair(CONFIG, "triton")]
    maps = random_maps(CONFIG, backend="triton")
    results = [{n: t for n, t in evaluate(module, maps).items() if t is not None} for module in modules]
    assert "grad_input.0" in results[0]
    assert_same(*results)


def test_parameters_that_are_frozen_and_thawed() -> None:
    """The backward of before would go on without their gradients."""
    modules = pair(CONFIG, "triton")
    maps = random_maps(CONFIG, backend="triton")
    for frozen in (True, True, False, False, True):
        results = []
        for module in modules:
            module.avg_map.requires_grad_(not frozen)
            results.append({name: t for name, t in evaluate(module, maps).items() if t is not None})
        assert ("grad.avg_map.0.proj.depthwise.weight" in results[0]) is not frozen
        assert_same(*results)


@pytest.mark.parametrize("watched", [False, True], ids=["plan", "operator"])
def test_parameters_of_unequal_dtypes(watched: bool) -> None:
    """Of some scales, and of some stages: kernels take all in the widest dtype."""
    alike, module = (pair(CONFIG, "triton", torch.float32)[0] for _ in range(2))
    narrow = (
        "avg_map.1.",
        "attention.0.channel_norm.0.",
        "attention.0.s_attention.1.k_map.",
        "upconvs.",
        "bn_relu.1.",
    )
    for name, p in alike.named_parameters():
        if name.startswith(narrow):
            p.data = p.data.bfloat16().float()
    for (name, p), q in zip(module.named_parameters(), alike.parameters(), strict=True):
        p.data = q.data.bfloat16() if name.startswith(narrow) else q.data.clone()
    maps = random_maps(CONFIG, torch.float32, backend="triton")
    for _ in range(2):
        with Watch() if watched else contextlib.nullcontext():
            found, expected = evaluate(module, maps), evaluate(alike, maps)
        assert found["grad.upconvs.0.conv.conv.weight"].dtype == torch.bfloat16
        assert_same({n: t.to(expected[n].dtype) for n, t in found.items()}, expected, rtol=1e-2)
        assert all(torch.equal(found[n], expected[n]) for n in found if n.startswith(("output", "grad_input")))


def test_stages_of_unequal_dtypes() -> None:
    """The gradients of all parameters lie in one allocation."""
    config = Config((3,), 1, channel_head=(1,), spatial_head=(1,), sizes=((2, 2),), batch=2)
    alike, module = (pair(config, "triton", torch.float32)[0] for _ in range(2))
    narrow = [name for name, _ in alike.named_parameters() if "channel_norm" in name or "s_att" in name or "up" in name]
    for name, p in alike.named_parameters():
        if name in narrow:
            p.data = p.data.bfloat16().float()
            module.get_parameter(name).data = p.data.bfloat16()
    maps = random_maps(config, torch.float32, backend="triton")
    found, expected = evaluate(module, maps), evaluate(alike, maps)
    for name, t in expected.items():
        dtype = torch.bfloat16 if name.removeprefix("grad.") in narrow else t.dtype
        assert found[name].dtype == dtype and torch.equal(found[name], t.to(dtype)), name


class Watch(TorchDispatchMode):
    """Makes a call one operator."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))
