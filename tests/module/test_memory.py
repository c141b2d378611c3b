"""What is never in memory: all scores at once, full-resolution tensors for the backward, anything unwritten."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dca_kernels.torch_backend import common, spatial_tiles, upsample
from tests.oracle import (
    TRAINABLE,
    Config,
    both_modes,
    build,
    each_backend,
    each_trainable,
    evaluate,
    pair,
    random_like,
    random_maps,
)

MANY_TOKENS = Config((8,), (8, 128), sizes=((8, 256),), batch=1)
TOKENS = 8 * 128


INSIDE = {
    spatial_tiles.attend_tiles: spatial_tiles._attend_tiles,
    spatial_tiles.attend_tiles_backward: spatial_tiles._attend_tiles_backward,
}


class LargestTensor(TorchDispatchMode):
    """Remembers the largest storage, in bytes, that an operation gave back, also inside the spatial attention."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in INSIDE:
            with self:
                return INSIDE[func](*args)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return out


def largest_tensor(implementation: str, train: bool) -> int:
    torch.manual_seed(0)
    module = build(implementation, **MANY_TOKENS.arguments).train(train)
    with LargestTensor() as largest:
        maps = random_maps(MANY_TOKENS, torch.float32, backend=implementation)
        evaluate(module, maps, backward=implementation in ("reference", *TRAINABLE))
    return largest.nbytes


@pytest.mark.slow
@both_modes
@each_backend
def test_scores_are_never_all_in_memory(train: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spatial_tiles, "TILE_BYTES", 2**20)  # a sixteenth of all: the tokens are few
    one_head = TOKENS**2 * torch.float32.itemsize
    assert largest_tensor("reference", train) >= one_head  # the recorder sees scores where there are some
    assert largest_tensor(backend, train) < one_head


def test_the_recorder_sees_inside_operators() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spatial_tiles, "TILE_BYTES", 4 * TOKENS**2 * torch.float32.itemsize)  # one tile
        assert largest_tensor("torch", train=True) >= TOKENS**2 * torch.float32.itemsize


def test_rows_are_a_bounded_block_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spatial_tiles, "TILE_BYTES", 2**20)
    monkeypatch.setattr(spatial_tiles, "MAX_EXPONENT", -1.0)
    assert largest_tensor("torch", train=True) < TOKENS**2 * torch.float32.itemsize


@contextmanager
def saved_tensors() -> Iterator[list[Tensor]]:
    """The tensors that a forward saves for its backward."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        yield saved


SIZES = {"divisible": ((64, 64), (32, 32)), "odd": ((63, 61), (31, 33))}
each_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


def full_resolution(tensors: list[Tensor], maps: list[Tensor]) -> list[Tensor]:
    """Those with at least as many elements as one channel of the smallest map has, but for the maps themselves."""
    smallest = min(x[:, 0].numel() for x in maps)
    own = {x.untyped_storage().data_ptr() for x in maps}
    return [t for t in tensors if t.numel() >= smallest and t.untyped_storage().data_ptr() not in own]


@each_size
@both_modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_trainable
def test_only_the_maps_are_saved_at_full_resolution(
    sizes: tuple, train: bool, dtype: torch.dtype, backend: str
) -> None:
    config = Config((4, 4), 2, sizes=sizes)
    ours, theirs = pair(config, backend, dtype, train)
    maps = [x.requires_grad_() for x in random_maps(config, dtype)]
    with saved_tensors() as saved:
        theirs(maps)
    assert full_resolution(saved, maps)  # the reference saves others
    with saved_tensors() as saved:
        ours(maps)
    assert saved
    assert not full_resolution(saved, maps)


@both_modes
@each_backend
def test_nothing_is_saved_without_gradients(train: bool, backend: str) -> None:
    module, _ = pair(Config(), backend, train=train)
    with saved_tensors() as saved, torch.no_grad():
        module(random_maps(Config(), backend=backend))
    assert not saved


PAPER = Config((32, 64, 128, 256), 28, sizes=((224, 224), (112, 112), (56, 56), (28, 28)), batch=1)


def peak(run: Callable[[], object]) -> int:
    """The most bytes that PyTorch's allocations take at a time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    changes = [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(changes, initial=0))


@pytest.mark.slow
def test_a_training_step_takes_a_third_of_the_memory() -> None:
    gradients = 4 * sum(x.numel() for x in random_maps(PAPER, torch.float32))  # of the maps, in bytes

    def extra(module: nn.Module) -> int:
        maps = [x.requires_grad_() for x in random_maps(PAPER, torch.float32)]
        upstream = [torch.ones_like(x) for x in maps]
        return peak(lambda: torch.autograd.backward(module(maps), upstream)) - gradients

    ours, theirs = (extra(module) for module in pair(PAPER, "torch", torch.float32, train=True))
    assert ours <= theirs / 3


@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("most", [0, 1, 7, 16, 40, 1000])
@pytest.mark.parametrize("length", [0, 1, 16, 17, 100])
def test_spans(length: int, most: int, multiple: int) -> None:
    spans = common.spans(length, most, multiple)
    assert [n for span in spans for n in range(span.start, span.stop)] == list(range(length))
    sizes = [span.stop - span.start for span in spans]
    assert all(0 < size <= max(1, most) for size in sizes) and len(set(sizes[:-1])) <= 1


def test_spans_of_a_multiple() -> None:
    assert [(span.start, span.stop) for span in common.spans(100, 48, multiple=16)] == [(0, 48), (48, 96), (96, 100)]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("planes", [1, 3, 4, 7, 100])
def test_a_piece_of_a_map_is_bounded(
    planes: int, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upsample, "PLANE_BYTES", planes * 5 * 7 * 4)
    x, z = torch.zeros(3, 4, 5, 7).contiguous(memory_format=memory_format), torch.zeros(3, 4, 2, 3)
    pieces = upsample._Planes(x, z)
    assert 1 <= pieces.most <= planes
    assert max(b.stop - b.start for b in pieces.images) * (pieces.channels[0].stop) == pieces.most


# Gradients that the user holds


@pytest.mark.parametrize("replaced", [False, True])
def test_the_upstream_gradient_is_left_alone(replaced: bool) -> None:
    """The pooled map's gradient is added in place, to memory of the module's own."""
    module, _ = pair(Config(), "torch", train=True)
    if replaced:
        module.bn_relu = nn.ModuleList(nn.Identity() for _ in Config().features)
    maps = [x.requires_grad_() for x in random_maps(Config())]
    outs = module(maps)
    upstream = random_like(outs)
    before = [g.clone() for g in upstream]
    first = torch.autograd.grad(outs, maps, upstream, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(outs, maps, upstream)
    assert all(map(torch.equal, before, upstream))
    assert all(map(torch.equal, kept, first))
    assert all(map(torch.equal, first, second))


# The fixture of conftest.py


def test_fresh_memory_is_poisoned_for_the_package() -> None:
    inside = {"torch": torch, "__name__": "dca_kernels.somewhere"}
    fresh = eval("[torch.empty(3), torch.zeros(3).new_empty(3), torch.empty_like(torch.zeros(3))]", inside)
    assert all(t.isnan().all() for t in fresh)
    assert eval("torch.empty(3, dtype=torch.int64)", inside).dtype == torch.int64
