"""The tables of the upsampling, which kernels read and CUDA graphs hold the addresses of."""

import threading

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from dca_kernels.triton_backend import grid


def test_tables_outlive_the_sizes_that_came_after() -> None:
    """A CUDA graph replays with their addresses."""

    def tables(size: int) -> torch.Tensor:
        return grid.interpolation_tables(((size, size),), (2, 2), torch.float32, torch.device("cpu"))

    first = tables(2)
    for size in range(3, 203):
        tables(size)
    assert tables(2) is first


def test_tables_are_not_made_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"maps: expected sizes .* got \(\(301, 7\),\) for the first time"):
        grid.interpolation_tables(((301, 7),), (2, 2), torch.float32, torch.device("cuda"))


def test_tables_are_of_a_thread_that_allocates_for_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile's CUDA graphs take for theirs all that a warm-up's thread allocates, and refuse what is kept."""
    threads = []
    made = grid._interpolation_tables
    monkeypatch.setattr(
        grid, "_interpolation_tables", lambda *args: threads.append(threading.get_ident()) or made(*args)
    )
    with torch.device("meta"):
        found = grid.interpolation_tables(((303, 7),), (2, 2), torch.float32, torch.device("cpu"))
    assert not found.is_meta
    assert threads != [threading.get_ident()]
