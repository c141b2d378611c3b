"""Where the tensors of a plan lie: which of them share memory."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

ALIGNMENT = 128  # bytes: where each tensor of an allocation begins, a cache line


class Part(NamedTuple):
    """Memory that the launches from `first` to `last` use."""

    nbytes: int
    first: int
    last: int


class Room(NamedTuple):
    """Memory that nothing uses before launch `until`, which writes what it is for."""

    nbytes: int
    until: int


def arranged(parts: Sequence[Part], rooms: Sequence[Room]) -> list[tuple[int, int]]:
    """The room and the offset in bytes of each part; the number behind the last room is that of a workspace.

    Two parts share memory where no launch uses both. The largest comes first, each at the first place that holds it.
    """
    found = [(0, 0)] * len(parts)
    inside: list[list[int]] = [[] for _ in (*rooms, None)]
    for i in sorted(range(len(parts)), key=lambda i: -parts[i].nbytes):
        part = parts[i]
        for number, others in enumerate(inside):
            meanwhile = [k for k in others if part.first <= parts[k].last and parts[k].first <= part.last]
            offset = _first_gap(part.nbytes, sorted((found[k][1], parts[k].nbytes) for k in meanwhile))
            if number == len(rooms) or (
                part.last < rooms[number].until and offset + part.nbytes <= rooms[number].nbytes
            ):
                found[i] = number, offset
                others.append(i)
                break
    return found


def _first_gap(nbytes: int, taken: Sequence[tuple[int, int]]) -> int:
    """The first offset with so many bytes before the next that is taken; offsets and sizes come in their order."""
    end = 0
    for offset, size in taken:
        if end + nbytes <= offset:
            break
        end = max(end, aligned(offset + size))
    return end


def packed(tensors: Sequence[Tensor]) -> list[int]:
    """Offsets in bytes of tensors that lie one behind another; the last number is the end of all."""
    offsets = [0]
    for t in tensors:
        offsets.append(aligned(offsets[-1] + t.nbytes))
    return offsets


def aligned(nbytes: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
