"""Where the kernels read and write: nothing beyond any tensor, and offsets past 2**31 elements."""

import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.oracle import (
    DEVICE,
    INTERPRETED,
    TILED,
    Config,
    assert_identical,
    assert_same,
    both_modes,
    evaluate,
    pair,
    random_like,
    random_maps,
    resized_blocks,
)

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from dca_kernels.triton_backend import eager, launch, plan
from dca_kernels.triton_backend.memory import aligned
from dca_kernels.triton_backend.partials import _sum_partials_kernel
from dca_kernels.triton_backend.primitives import sum_images

pytestmark = pytest.mark.slow

MARGIN = 5000  # elements of NaN on either side


class Halo:
    """Puts tensors into the middle of buffers of NaN, and leaves as much between those that one allocation holds."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []
        self.inside: dict[int, list[tuple[int, int]]] = {}  # by an allocation's bytes, what it holds: begins and ends
        self.between: list[Tensor] = []

    def around(self, x: Tensor) -> Tensor:
        """A tensor of the same values and strides; it has no gaps."""
        buffer = not_a_number(x.new_empty(x.numel() + 2 * MARGIN))
        self.buffers.append(buffer)
        made = buffer.as_strided(x.shape, x.stride(), MARGIN).copy_(x)
        spans = self.inside.get(x.nbytes, [(0, x.nbytes)])
        begins, ends = [begin for begin, _ in spans] + [x.nbytes], [0] + [end for _, end in spans]
        for end, begin in zip(ends, begins, strict=True):
            self.between.append(made.flatten()[end // x.itemsize : begin // x.itemsize])
        return made

    def apart(self, sizes: Sequence[int]) -> list[int]:
        """Offsets in bytes with a margin between each two, behind the last the end."""
        offsets = list(itertools.accumulate([aligned(nbytes) + 8 * MARGIN for nbytes in sizes], initial=0))
        spans = [(begin, begin + nbytes) for begin, nbytes in zip(offsets, sizes, strict=False)]
        self.inside |= {
            end: spans for end in (offsets[-1], *(end for _, end in spans[-1:]))
        }  # of a packed one, a workspace
        return offsets

    def assert_untouched(self) -> None:
        assert self.buffers
        for buffer in self.buffers:
            assert is_not_a_number(buffer[:MARGIN]) and is_not_a_number(buffer[-MARGIN:])
        for gap in self.between:
            assert is_not_a_number(gap)


def not_a_number(x: Tensor) -> Tensor:
    """Of bytes those that make a NaN of any floating dtype."""
    return x.fill_(math.nan if x.is_floating_point() else 255)


def is_not_a_number(x: Tensor) -> bool:
    return bool((x.isnan() if x.is_floating_point() else x == 255).all())


@pytest.fixture
def halo(monkeypatch: pytest.MonkeyPatch) -> Halo:
    """All memory that the package asks for has a margin of NaN; whoever reads there shows it."""
    halo = Halo()

    def widened(allocate):
        def allocate_with_margin(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            ours = sys._getframe(1).f_globals["__name__"].startswith("dca_kernels")
            return halo.around(not_a_number(tensor)) if ours and not tensor.is_meta and tensor.numel() else tensor

        return allocate_with_margin

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, widened(getattr(owner, name)))
    # A plan lets tensors share memory: here each has its own, in a workspace, and a margin behind it.
    monkeypatch.setattr(eager, "_forwards", eager.Latest())
    monkeypatch.setattr(plan, "packed", lambda tensors: halo.apart([t.nbytes for t in tensors]))
    monkeypatch.setattr(
        plan,
        "arranged",
        lambda parts, rooms: [
            (len(rooms), offset) for offset, _ in zip(halo.apart([part.nbytes for part in parts]), parts, strict=False)
        ],
    )
    return halo


RAGGED = Config((6, 12), (3, 5), channel_head=(2, 1), spatial_head=(1, 6), sizes=((9, 11), (4, 5)))
BY_ROWS = replace(RAGGED, patch=(3, 3), sizes=((6, 12), (12, 6)))  # for which some kernels have programs of their own
CONFIGS = {
    "ragged": RAGGED,
    "by_rows": BY_ROWS,
    "spatial_only": replace(RAGGED, channel_att=False),
    "smaller_than_grid": replace(RAGGED, sizes=((1, 2), (2, 1))),
    "two_blocks": replace(RAGGED, n=2),
}


def _move_into(halo: Halo, model: nn.Module, maps: list[Tensor]) -> list[Tensor]:
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data = halo.around(tensor.data)
    return [halo.around(x) for x in maps]


def assert_stays_inside(config: Config, halo: Halo, dtype: torch.dtype, train: bool, channels_last: bool) -> None:
    maps = random_maps(config, dtype, backend="triton")
    if channels_last:
        maps = [x.contiguous(memory_format=torch.channels_last) for x in maps]
    expected = evaluate(pair(config, "triton", dtype, train)[0], maps, backward=False)
    model, _ = pair(config, "triton", dtype, train)
    halo.buffers.clear()
    results = evaluate(model, _move_into(halo, model, maps), backward=False)
    assert_identical(results, expected)
    assert all(t.isfinite().all() for t in results.values())
    halo.assert_untouched()
    gap = max(halo.between, key=len)
    assert len(gap) >= MARGIN
    gap[len(gap) // 2] = 0
    with pytest.raises(AssertionError):
        halo.assert_untouched()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@both_modes
def test_nothing_beyond_the_tensors(config: Config, train: bool, halo: Halo) -> None:
    assert_stays_inside(config, halo, torch.float32, train, channels_last=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@both_modes
def test_nothing_beyond_the_tensors_in_small_blocks(dtype: torch.dtype, train: bool, halo: Halo) -> None:
    with resized_blocks(0):
        assert_stays_inside(TILED, halo, dtype, train, channels_last=dtype == torch.bfloat16)


@triton.jit
def careless_kernel(source, target, SHIFT: tl.constexpr):
    tl.store(target + SHIFT, tl.load(source))


def test_a_write_into_the_margin_is_seen() -> None:
    halo = Halo()
    target = halo.around(torch.zeros(4, device=DEVICE))
    careless_kernel[(1,)](torch.ones(1, device=DEVICE), target, 3)
    halo.assert_untouched()
    careless_kernel[(1,)](torch.ones(1, device=DEVICE), target, 4)
    with pytest.raises(AssertionError):
        halo.assert_untouched()


# What a program does by itself

of_the_interpreter = pytest.mark.skipif(not INTERPRETED, reason="only the interpreter shows what programs do")
each_kind_of_windows = pytest.mark.parametrize("config", [RAGGED, BY_ROWS], ids=["ragged", "by_rows"])


class Bounds:
    """Where the tensors of the latest launch begin and end."""

    def __init__(self) -> None:
        self.begins, self.ends = np.zeros(0, np.uint64), np.zeros(0, np.uint64)

    def set(self, tensors: Sequence[Tensor]) -> None:
        spans = []
        for t in tensors:
            last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
            spans.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.itemsize))
        self.begins, self.ends = np.array(sorted(spans), np.uint64).T

    def check(self, pointers: TensorHandle, mask: TensorHandle) -> None:
        """Raise where one of the elements that are not masked is in none of them."""
        addresses = np.broadcast_to(pointers.data, mask.data.shape)[mask.data.astype(bool)]
        latest = np.searchsorted(self.begins, addresses, "right") - 1
        inside = (latest >= 0) & (addresses < self.ends[latest])
        if not inside.all():
            raise IndexError(f"{(~inside).sum()} of {inside.size} elements are in no tensor of the launch")


@pytest.fixture
def bounds(monkeypatch: pytest.MonkeyPatch) -> Bounds:
    """Every load and store is inside a tensor that the kernel was given, or raises."""
    bounds, run = Bounds(), launch.run

    def run_within(kernel: object, programs: int, config: dict[str, int], **arguments: object) -> object:
        bounds.set(plan.tensors_of(tuple(arguments.values())))
        return run(kernel, programs, config, **arguments)

    monkeypatch.setattr(launch, "run", run_within)
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def load_within(self: object, pointers: TensorHandle, mask: TensorHandle, *rest: object) -> object:
        bounds.check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def store_within(self: object, pointers: TensorHandle, values: object, mask: TensorHandle, *rest: object) -> object:
        bounds.check(pointers, mask)
        return store(self, pointers, values, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", load_within)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", store_within)
    return bounds


@of_the_interpreter
@each_kind_of_windows
@both_modes
def test_every_access_is_inside_a_tensor(
    config: Config, train: bool, halo: Halo, bounds: Bounds, precisions: set[str]
) -> None:
    """What is read beyond one may be masked off later, so that no result shows it; a GPU may refuse to read it.

    Nor does a result show here that a product has fewer digits than it was asked for.
    """
    model, _ = pair(config, "triton", torch.float32, train)
    evaluate(model, _move_into(halo, model, random_maps(config, torch.float32, backend="triton")))
    assert len(bounds.begins)
    assert "TF32x3" in precisions and "TF32" not in precisions


@of_the_interpreter
@both_modes
def test_every_access_is_inside_a_tensor_in_small_blocks(
    train: bool, halo: Halo, bounds: Bounds, precisions: set[str]
) -> None:
    with resized_blocks(0):
        test_every_access_is_inside_a_tensor(TILED, train, halo, bounds, precisions)


@of_the_interpreter
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_every_access_is_inside_a_tensor_in_blocks_of_several_rows(
    dtype: torch.dtype, halo: Halo, bounds: Bounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of windows as they are on a GPU: the last reaches below the token grid."""
    config = replace(RAGGED, channel_att=False, spatial_att=False)
    found = launch.configuration

    def of_several_rows(kernel: str, *conditions: object) -> dict[str, int]:
        return found(kernel, *conditions) | ({"block_p": 2} if kernel == "patch_embed_train" else {})

    monkeypatch.setattr(launch, "configuration", of_several_rows)
    ours, theirs = pair(config, "triton", dtype)
    maps = random_maps(config, dtype, backend="triton")
    results = evaluate(ours, _move_into(halo, ours, maps), backward=False)
    if dtype == torch.float64:
        assert_same(results, evaluate(theirs, maps, backward=False))


@of_the_interpreter
def test_an_access_beyond_a_tensor_raises(bounds: Bounds) -> None:
    source, target = torch.ones(1), torch.zeros(8)
    bounds.set([source, target[:4]])
    careless_kernel[(1,)](source, target, 3)
    with pytest.raises(Exception, match="1 of 1 elements are in no tensor of the launch"):
        careless_kernel[(1,)](source, target, 4)
    with pytest.raises(Exception, match="1 of 1 elements are in no tensor of the launch"):
        careless_kernel[(1,)](source[1:], target, 3)


@of_the_interpreter
@each_kind_of_windows
@both_modes
def test_the_order_of_programs_changes_nothing(config: Config, train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No program writes what is another's, nor reads what another one writes."""
    maps = random_maps(config, torch.float32, backend="triton")
    expected = evaluate(pair(config, "triton", torch.float32, train)[0], maps)
    place = InterpreterBuilder.set_grid_idx
    monkeypatch.setattr(
        InterpreterBuilder, "set_grid_idx", lambda self, x, y, z: place(self, self.grid_dim[0] - 1 - x, y, z)
    )
    assert_identical(evaluate(pair(config, "triton", torch.float32, train)[0], maps), expected)


# Offsets past 2**31

STRIDE = 2**30 + 8  # from the third image on, more than 32 bit hold
FAR = Config((2, 4), 2, channel_head=(1, 1), spatial_head=(1, 2), sizes=((4, 5), (2, 3)), batch=3)


@pytest.fixture
def overflow_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter checks integer arithmetic; a compiled kernel would read from elsewhere."""
    if INTERPRETED:
        from triton.runtime import interpreter

        options = replace(interpreter.interpreter_builder.options, debug=True, sanitize_overflow=True)
        monkeypatch.setattr(interpreter.interpreter_builder, "options", options)


@pytest.fixture
def far_storage(tmp_path: Path) -> Iterator[Tensor]:
    """A little over 2**31 float32, of which a file keeps only what is written."""
    count = 2 * STRIDE + 64
    if INTERPRETED:
        yield torch.from_file(str(tmp_path / "sparse"), shared=True, size=count)
    else:
        yield torch.empty(count, device=DEVICE)


# A stride of whole planes, of 4 x 5 pixels, is known to a kernel as so many of them: a product that 32 bit do not hold.
@pytest.mark.parametrize(("stride", "batch"), [(STRIDE, 3), (2**31 + 12, 2)], ids=["odd", "whole_planes"])
@both_modes
def test_images_far_apart(
    train: bool, stride: int, batch: int, far_storage: Tensor, overflow_is_an_error: None
) -> None:
    config = replace(FAR, batch=batch)
    near = random_maps(config, torch.float32, backend="triton")
    expected = evaluate(pair(config, "triton", torch.float32, train)[0], near, backward=False)
    far = far_storage.as_strided(near[0].shape, (stride, *near[0].stride()[1:])).copy_(near[0])
    model, _ = pair(config, "triton", torch.float32, train)
    assert_identical(evaluate(model, [far, near[1]], backward=False), expected)


def test_partial_sums_far_apart(far_storage: Tensor, overflow_is_an_error: None) -> None:
    """Three rows of more than 2**30 columns, of which one program sums the first."""
    columns = torch.arange(96.0, device=DEVICE).view(3, 32)
    far_storage.as_strided((3, 32), (STRIDE, 1)).copy_(columns)
    out = torch.empty(32, device=DEVICE)
    _sum_partials_kernel[(1,)](
        partials=far_storage, out=out, count=3, SIZE=STRIDE, ACC=tl.float32, BLOCK=32, STEP=4, num_warps=4
    )
    assert torch.equal(out, columns.sum(0))


@triton.jit
def far_sums_kernel(source, target, batch, IMAGE_STRIDE: tl.constexpr):
    offs = tl.arange(0, 32)
    tl.store(target + offs, sum_images(source, offs, offs < 32, batch, 1, 0, IMAGE_STRIDE, tl.float32))


def test_sums_over_images_far_apart(far_storage: Tensor, overflow_is_an_error: None) -> None:
    vectors = torch.arange(96.0, device=DEVICE).view(3, 32)
    far_storage.as_strided((3, 32), (STRIDE, 1)).copy_(vectors)
    out = torch.empty(32, device=DEVICE)
    far_sums_kernel[(1,)](source=far_storage, target=out, batch=3, IMAGE_STRIDE=STRIDE, num_warps=4)
    assert torch.equal(out, vectors.sum(0))


def test_upstream_gradients_that_span_too_much(far_storage: Tensor, overflow_is_an_error: None) -> None:
    """Within an image: they are copied."""
    maps = random_maps(FAR, torch.float32, backend="triton")
    upstream = random_like(maps)
    far = far_storage.as_strided(maps[1].shape, (2, 2**29, 2**28 + 8, 2**27)).copy_(upstream[1])
    model, same = (pair(FAR, "triton", torch.float32)[0] for _ in range(2))
    assert_identical(evaluate(model, maps, [upstream[0], far]), evaluate(same, maps, upstream))


@triton.jit
def narrow_kernel(source, target, stride):
    tl.store(target + tl.program_id(0), tl.load(source + tl.program_id(0) * stride, mask=tl.program_id(0) < 1, other=0))


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter checks integers")
def test_an_offset_of_32_bits_is_noticed(overflow_is_an_error: None) -> None:
    source, target = torch.zeros(8), torch.zeros(3)
    narrow_kernel[(2,)](source, target, STRIDE)
    with pytest.raises(Exception, match="int32 overflow detected for operation mul"):
        narrow_kernel[(3,)](source, target, STRIDE)


@both_modes
def test_an_image_that_spans_too_much_is_refused(
    train: bool, far_storage: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = pair(FAR, "triton", torch.float32, train)
    near = random_maps(FAR, torch.float32, backend="triton")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with monkeypatch.context() as patch:
        patch.setattr(launch, "run", lambda *args, **kwargs: pytest.fail("launched"))
        far = far_storage.as_strided(near[1].shape, (0, 2**29, 2**28, 2**27))  # 4 channels, 2 rows, 3 columns
        message = rf"^maps\[1\]: expected an image whose elements lie within {2**31} of the first, got {2**31}$"
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            model([near[0], far])
    assert_identical(model.state_dict(), before)


@both_modes
def test_an_image_that_spans_all_that_it_may(train: bool, far_storage: Tensor) -> None:
    # No check of the arithmetic here: what a mask leaves out may lie, and overflow, further on.
    near = random_maps(FAR, torch.float32, backend="triton")
    shape, strides = near[0].shape, (0, 2**30, 2**28, 2**26 - 1)
    assert 2**31 - 4 == sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    far = far_storage.as_strided(shape, strides)
    far[0].copy_(near[0][0])
    maps = ([far, near[1]], [near[0][:1].expand(shape), near[1]])
    assert_same(*(evaluate(pair(FAR, "triton", torch.float32, train)[0], m, backward=False) for m in maps), rtol=1e-6)
