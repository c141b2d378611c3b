"""How the maps lie in memory and are cut into tiles: what kernels take of it, as constants and as arguments."""

import functools
import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from dca_kernels.backends import MOST_GRID_COLUMNS, power_of_two
from dca_kernels.contract import BatchNorm
from dca_kernels.triton_backend import launch
from dca_kernels.triton_backend.primitives import Divisor, Shape, argument, divide, divisor_of, number, of_scale

# How many rows of a window, and columns of a map, padded as its windows are, programs with rows of windows take.
MOST_ROWS = 16
MOST_COLUMNS = 1024

# What kernels take as constants


class Norm(NamedTuple):
    """The numbers of one BatchNorm: see `dca_kernels.contract.BatchNorm`. Only a forward updates buffers."""

    eps: float
    from_batch: bool
    updates: bool = False
    momentum: float | None = None


class Stride(NamedTuple):
    """Of a map (B, C_i, H_i, W_i), such that maps of other sizes have the same where they lie in memory alike.

    Attributes:
        factors: what a step along each axis is a multiple of.
        spans: how many of the last axes the multiplied size is of: 0 of none, 1 of W_i, 2 of H_i W_i.
    """

    factors: tuple[int, ...]
    spans: tuple[int, ...]


class Tile(NamedTuple):
    """How many channels, rows and columns of a map one program has.

    Attributes:
        tokens: columns of the token grid from which those of the tile are interpolated, padded; 0 where the map has the
            grid's size, and nothing is interpolated; the whole grid's where a program has whole rows.
    """

    channels: int
    rows: int
    columns: int
    tokens: int


class Reach(NamedTuple):
    """How many rows and columns of one map a program of `patch_embed` goes over, at most.

    Attributes:
        window: of the largest pooling window, the columns padded to a power of two.
        band: that take from one row of tokens, up to a multiple of what is unrolled, and from the program's columns of
            tokens, padded; None where the map has the grid's size, and is its own transposed interpolation.
    """

    window: tuple[int, int]
    band: tuple[int, int] | None


class Map(NamedTuple):
    """The constants of one scale. Its size is none of them: see `Sizes`.

    Attributes:
        stride: of the map.
        unit: what divides W_i, as far as 16 bytes at a time need it; 1 in kernels that do not go over the map.
        windows: how high and how wide every pooling window is, None along an axis where they differ, or where the
            kernel does as well without.
        norm: its BatchNorm, where there is one and the kernel has to do with it.
        out_stride: of the output or of its gradient.
        gradient_stride: of the map's gradient.
        tile: what a program has of it.
        reach: how far a program of `patch_embed` goes over it.
    """

    stride: Stride
    unit: int
    windows: tuple[int | None, int | None]
    norm: Norm | None = None
    out_stride: Stride | None = None
    gradient_stride: Stride | None = None
    tile: Tile | None = None
    reach: Reach | None = None


class Group(NamedTuple):
    """Scales that share their code.

    Attributes:
        scales: their numbers.
        unit: what divides the widths of all.
        shared: along which axes their maps' strides have one factor.
    """

    scales: tuple[int, ...]
    unit: int
    shared: tuple[bool, ...]


class Layout(NamedTuple):
    """The token grid (P_h, P_w), the maps of all scales, and the groups of scales that share their code."""

    grid: tuple[int, int]
    of: tuple[Map, ...]
    groups: tuple[Group, ...]


class Sizes(NamedTuple):
    """H_i and W_i of each map as kernels take them, see `primitives.argument`, and quotients that are rounded once.

    Attributes:
        row_step: rows of the token grid from one of the map's to the next, (P_h - 1) / (H_i - 1).
        column_step: columns, likewise.
        stretch: W_i / P_w.
        area: H_i W_i / (P_h P_w).
    """

    height: tuple[int, ...]
    width: tuple[int, ...]
    row_step: tuple[float, ...]
    column_step: tuple[float, ...]
    stretch: tuple[float, ...]
    area: tuple[float, ...]


class Counts(NamedTuple):
    """How many tiles there are, as kernels take it.

    Attributes:
        first: where each scale's begin among those of an image.
        all: how many an image has.
        rows: how many each map has one above the other.
        columns: how many side by side.
    """

    first: tuple[int, ...]
    all: Divisor
    rows: tuple[Divisor, ...]
    columns: tuple[Divisor, ...]


class Tiles(NamedTuple):
    """The tile of each scale, how many there are, in an image (`programs`) and in the height of each map (`rows`)."""

    of: tuple[Tile, ...]
    counts: Counts
    programs: int
    rows: tuple[int, ...]


@functools.cache
def stride_of(shape: tuple[int, ...], stride: tuple[int, ...]) -> Stride:
    """Of a tensor of four axes."""
    sizes = (1, shape[3], shape[2] * shape[3])
    found = []
    for step, most in zip(stride, (2, 2, 1, 0), strict=True):
        span = most if step != 0 and step % sizes[most] == 0 else 0
        found.append((step // sizes[span], span))
    factors, spans = zip(*found, strict=True)
    return Stride(factors, spans)


def layout_of(
    maps: Sequence[Tensor],
    grid: tuple[int, int],
    norms: Sequence[Norm | None] | None = None,
    outs: Sequence[Tensor] | None = None,
    gradients: Sequence[Tensor | None] | None = None,
    tiles: Sequence[Tile] | None = None,
    reaches: Sequence[Reach] | None = None,
    by_rows: bool = False,
) -> Layout:
    """Of S maps, their BatchNorms, the outputs (or their gradients) and what else the kernel has to do with."""
    scales = []
    for i, x in enumerate(maps):
        norm = None if norms is None else norms[i]
        out_stride = None if outs is None else stride_of(outs[i].shape, outs[i].stride())
        gradient = None if gradients is None else gradients[i]
        gradient_stride = None if gradient is None else stride_of(gradient.shape, gradient.stride())
        tile = None if tiles is None else tiles[i]
        reach = None if reaches is None else reaches[i]
        windows: tuple[int | None, int | None] = (None, None)
        if reach is not None or by_rows:
            windows = window_of(x.shape[2], grid[0]), window_of(x.shape[3], grid[1])
        elif gradients is not None and tile is not None:
            window = window_of(x.shape[3], grid[1])
            windows = None, window if window is not None and launch.padded(grid[1]) * window == tile.columns else None
        unit = 1 if tile is None and reach is None else math.gcd(x.shape[3], 16 // x.element_size())
        stride = stride_of(x.shape, x.stride())
        scales.append(Map(stride, unit, windows, norm, out_stride, gradient_stride, tile, reach))
    return Layout(grid, tuple(scales), tuple([Group((i,), one.unit, (True,) * 4) for i, one in enumerate(scales)]))


def window_of(size: int, windows: int) -> int | None:
    """How large all windows are, None where they differ."""
    return size // windows if size % windows == 0 else None


def taken_by_rows(maps: Sequence[Tensor], grid: tuple[int, int]) -> bool:
    """Whether programs can have rows of windows: all alike, a power of two wide, a map's columns side by side.

    Rows of a window are code of their own, and all columns of a map are in one program: neither are there too many.
    """
    for x in maps:
        rows, columns = window_of(x.shape[2], grid[0]), window_of(x.shape[3], grid[1])
        if not rows or not columns or columns != power_of_two(columns) or x.stride(3) != 1:
            return False
        if rows > MOST_ROWS or launch.padded(grid[1]) * columns > MOST_COLUMNS:
            return False
    return True


def sizes_of(maps: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    """(H_i, W_i) of each map."""
    return tuple([(x.shape[2], x.shape[3]) for x in maps])


@functools.cache
def size_arguments(sizes: tuple[tuple[int, int], ...], grid: tuple[int, int]) -> Sizes:
    """Those of the maps, as kernels take them."""
    found = []
    for height, width in sizes:
        steps = [(low - 1) / max(high - 1, 1) for low, high in zip(grid, (height, width), strict=True)]
        quotients = (*steps, width / grid[1], height * width / (grid[0] * grid[1]))
        found.append((argument(height), argument(width), *quotients))
    return Sizes(*zip(*found, strict=True))


@functools.cache
def grouped(layout: Layout, keys: tuple[Hashable, ...]) -> Layout:
    """With groups of the scales that have the same key, and whose maps lie in memory alike; without those of None.

    The maps' dtypes belong to the keys: a kernel chooses among pointers of one type.
    """
    alike: dict[Hashable, list[int]] = {}
    for i, (one, key) in enumerate(zip(layout.of, keys, strict=True)):
        if key is not None:
            constants = [factor if factor < 2 else None for factor in one.stride.factors]
            alike.setdefault((key, one.stride.spans, *constants), []).append(i)
    groups = []
    for scales in alike.values():
        factors = zip(*[layout.of[i].stride.factors for i in scales], strict=True)
        unit = math.gcd(*[layout.of[i].unit for i in scales])
        groups.append(Group(tuple(scales), unit, tuple([len(set(along)) == 1 for along in factors])))
    return layout._replace(groups=tuple(groups))


def norms_of(norms: Sequence[BatchNorm | None], updates: bool = False) -> tuple[Norm | None, ...]:
    """The numbers of S BatchNorms, None where there is none; with those of `updates` for a forward."""
    found = []
    for norm in norms:
        rule = (norm.updates, norm.momentum) if norm is not None and updates else ()
        found.append(None if norm is None else Norm(norm.eps, norm.from_batch, *rule))
    return tuple(found)


def memory_of(maps: Sequence[Tensor]) -> str:
    """Which rows of `configurations.json` the maps' kernels take: those of channels_last where all maps are."""
    return "_channels_last" if all(x.stride(1) == 1 for x in maps) else "_contiguous"


def backward_config(kernel: str, launcher: launch.Launcher, maps: Sequence[Tensor], grid: tuple[int, int]) -> dict:
    """The row of `configurations.json` of a backward's kernel for maps that are not taken by rows.

    Raises:
        ValueError: a map or the token grid has more columns than the kernel's tiles hold.
    """
    if grid[1] > MOST_GRID_COLUMNS:
        raise ValueError(
            f"patch: too large for the triton backend's {kernel}: expected a token grid of at most {MOST_GRID_COLUMNS} "
            f"columns, got {grid[1]}; the torch backend has no such limit"
        )
    return launcher.config(kernel + memory_of(maps), max([x.shape[3] for x in maps]))


@functools.cache
def tiles_of(
    shape: Shape,
    sizes: tuple[tuple[int, int], ...],
    grid: tuple[int, int],
    elements: int,
    most_c: int,
    most_w: int,
    whole_rows: bool = False,
) -> Tiles:
    """Tiles of at most `elements`, `most_c` channels and `most_w` columns.

    With `whole_rows` a program has all that are side by side, and is counted once. Products need 16 rows (pairs of
    row and channel) and columns.
    """
    tiles, counts = [], []
    for c, (height, width) in zip(shape.channels, sizes, strict=True):
        columns = min(most_w, launch.padded(width))
        pairs = max(16, elements // columns)
        channels = min(most_c, launch.padded(c), pairs)
        if whole_rows:
            tokens = launch.padded(grid[1])
        else:
            tokens = 0 if (height, width) == grid else launch.padded(_columns_needed(columns, width, grid[1]))
        tiles.append(Tile(channels, pairs // channels, columns, tokens))
        extents = zip((c, height, width), tiles[-1], strict=False)
        blocks = [launch.blocks(extent, block) for extent, block in extents]
        counts.append((*blocks[:2], 1 if whole_rows else blocks[2]))
    return counted(tiles, counts)


def counted(tiles: Sequence[Tile], counts: Sequence[tuple[int, ...]]) -> Tiles:
    """These of each scale, so many along channels, rows and columns."""
    first = [0]
    for extents in counts:
        first.append(first[-1] + math.prod(extents))
    _, rows, side_by_side = zip(*counts, strict=True)
    arguments = Counts(
        tuple(map(argument, first)),
        divisor_of(first[-1]),
        tuple([divisor_of(count) for count in rows]),
        tuple([divisor_of(count) for count in side_by_side]),
    )
    return Tiles(tuple(tiles), arguments, first[-1], rows)


def _columns_needed(block: int, high: int, low: int) -> int:
    """How many low-resolution columns at most `block` neighbouring high-resolution ones take from."""
    if high == 1:
        return 1
    return min(low, (block - 1) * (low - 1) // (high - 1) + 3)


# Sizes and strides in a kernel


@triton.jit
def size_of(sizes, scale, LAYOUT: tl.constexpr, g: tl.constexpr):
    """(H_i, W_i) of a scale of group g, the width known as a multiple of the group's unit."""
    GROUP: tl.constexpr = LAYOUT.groups[g]
    SCALES: tl.constexpr = GROUP.scales
    width = number(of_scale(sizes.width, scale, SCALES))
    return number(of_scale(sizes.height, scale, SCALES)), width // GROUP.unit * GROUP.unit


@triton.jit
def steps_of(sizes, scale, height, width, LAYOUT: tl.constexpr, g: tl.constexpr, ACC: tl.constexpr):
    """`row_step` and `column_step` of a scale of group g."""
    GROUP: tl.constexpr = LAYOUT.groups[g]
    SCALES: tl.constexpr = GROUP.scales
    if ACC == tl.float64:  # an argument has 32 bits
        row_step = _quotient(LAYOUT.grid[0] - 1, tl.maximum(height - 1, 1), ACC)
        return row_step, _quotient(LAYOUT.grid[1] - 1, tl.maximum(width - 1, 1), ACC)
    else:
        return of_scale(sizes.row_step, scale, SCALES), of_scale(sizes.column_step, scale, SCALES)


@triton.jit
def stretch_of(sizes, scale, width, LAYOUT: tl.constexpr, g: tl.constexpr, ACC: tl.constexpr):
    """`stretch` of a scale of group g."""
    GROUP: tl.constexpr = LAYOUT.groups[g]
    SCALES: tl.constexpr = GROUP.scales
    if ACC == tl.float64:
        return _quotient(width, LAYOUT.grid[1], ACC)
    else:
        return of_scale(sizes.stretch, scale, SCALES)


@triton.jit
def area_of(sizes, scale, pixels, LAYOUT: tl.constexpr, g: tl.constexpr, ACC: tl.constexpr):
    """`area` of a scale of group g."""
    GROUP: tl.constexpr = LAYOUT.groups[g]
    SCALES: tl.constexpr = GROUP.scales
    if ACC == tl.float64:
        return _quotient(pixels, LAYOUT.grid[0] * LAYOUT.grid[1], ACC)
    else:
        return of_scale(sizes.area, scale, SCALES)


@triton.jit
def _quotient(numerator, denominator, ACC: tl.constexpr):
    return tl.full([], numerator, ACC) / tl.full([], denominator, ACC)


@triton.jit
def strides_of(STRIDE: tl.constexpr, height, width):
    """The four strides of a map (B, C_i, H_i, W_i): that of images has 64 bits, what is constant remains so."""
    return (
        _stride(STRIDE, 0, height.to(tl.int64), width),
        _stride(STRIDE, 1, height, width),
        _stride(STRIDE, 2, height, width),
        _stride(STRIDE, 3, height, width),
    )


@triton.jit
def _stride(STRIDE: tl.constexpr, AXIS: tl.constexpr, height, width):
    if STRIDE.spans[AXIS] == 0:
        return STRIDE.factors[AXIS]
    elif STRIDE.spans[AXIS] == 1:
        return width * STRIDE.factors[AXIS]
    else:
        return height * width * STRIDE.factors[AXIS]


@triton.jit
def in_group(scale, LAYOUT: tl.constexpr, g: tl.constexpr):
    """Whether a scale is one of group g."""
    GROUP: tl.constexpr = LAYOUT.groups[g]
    found = scale == GROUP.scales[0]
    for k in tl.static_range(1, len(GROUP.scales)):
        found |= scale == GROUP.scales[k]
    return found


@triton.jit
def stride_of_scale(LAYOUT: tl.constexpr, g: tl.constexpr, AXIS: tl.constexpr, height, width, scale):
    """One of `strides_of`, of the map of a scale of group g."""
    GROUP: tl.constexpr = LAYOUT.groups[g]
    stride = _stride_of_scale(LAYOUT, GROUP.scales[0], AXIS, height, width)
    if not GROUP.shared[AXIS]:
        for k in tl.static_range(1, len(GROUP.scales)):
            its = _stride_of_scale(LAYOUT, GROUP.scales[k], AXIS, height, width)
            stride = tl.where(scale == GROUP.scales[k], its, stride)
    return stride


@triton.jit
def _stride_of_scale(LAYOUT: tl.constexpr, i: tl.constexpr, AXIS: tl.constexpr, height, width):
    STRIDE: tl.constexpr = LAYOUT.of[i].stride
    return _stride(STRIDE, AXIS, height, width)


@triton.jit
def split_tiles(counts):
    """As `split_program`, of a kernel whose programs are tiles of maps."""
    b, tile = divide(tl.program_id(0), counts.all)
    return b.to(tl.int64), tile


@triton.jit
def has_tile(tile, counts, i: tl.constexpr):
    """Whether a tile of an image is one of scale i."""
    return (tile >= number(counts.first[i])) & (tile < number(counts.first[i + 1]))
