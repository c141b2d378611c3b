"""Functions of kernels that two or more stages use, and their constants.

Names in every kernel: `offs_*` indices along an axis, `mask_*` which of them exist, `b` an image, `i` a scale. A
pointer has the name of its tensor. Pointers that belong together are one argument: a NamedTuple, or a tuple with one
element a scale. Tokens are laid out (B, N, C), the channels of all scales side by side: `offs_c` are channels of one
scale, `offs_all` the same among all. SHAPE is a `Shape`. ACC is the dtype of sums and statistics: float32, or float64
for float64 maps.
"""

import functools
import math
from typing import NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))

# What is launched. Numbers of images, of rows and of blocks are not specialised on: 1 would be a constant, which has no
# `.to`, and 1, 16 and 17 images would be three compilations.
kernel = triton.jit(do_not_specialize=["batch", "count", "sum_blocks"])


def argument(size: int) -> int:
    """A number as kernels take it in a tuple: odd and not 1, since Triton specialises a tuple's 1 and multiples of 16.

    `number` is what it stands for.
    """
    return 2 * size + 3


@triton.jit
def number(argument):
    """What an `argument` stands for."""
    return (argument - 3) >> 1


class Divisor(NamedTuple):
    """A number that a program's own is divided by, as `argument`s, with its reciprocal: see `divide`."""

    number: int
    reciprocal: int
    shift: int


@functools.cache
def divisor_of(number: int) -> Divisor:
    """Of a number above 0."""
    shift = (number - 1).bit_length()
    return Divisor(argument(number), argument(-(-(1 << 31 + shift) // number)), argument(shift))


@triton.jit
def divide(dividend, divisor):
    """Quotient and rest of a scalar, 0 <= dividend < 2**31, by a `Divisor`.

    A division by a number that is no constant leaves NVIDIA's uniform registers, and with it whatever depends on it: in
    `upsample` half as many registers more.
    """
    product = tl.umulhi(2 * dividend.to(tl.uint32), number(divisor.reciprocal).to(tl.uint32))
    quotient = product.to(tl.int32) >> number(divisor.shift)
    return quotient, dividend - quotient * number(divisor.number)


class Shape(NamedTuple):
    """The sizes of a token grid, as a kernel's constants.

    Attributes:
        tokens: N.
        channels: C_i of each scale.
        offsets: where the channels of each scale begin among all.
        total: C.
    """

    tokens: int
    channels: tuple[int, ...]
    offsets: tuple[int, ...]
    total: int


@functools.cache  # the same object each time: Triton looks it up by its hash, and compares it
def shape_of(tokens: int, channels: tuple[int, ...]) -> Shape:
    """`Shape` of N tokens and C_i channels of each scale."""
    return Shape(tokens, channels, tuple(sum(channels[:i]) for i in range(len(channels))), sum(channels))


@triton.constexpr_function
def padded(size):
    """The power of two, at least 16, that holds `size`: Triton's blocks are powers of two, and products start at 16."""
    return max(16, triton.next_power_of_2(size))


@triton.constexpr_function
def largest(sizes):
    """The largest of some sizes."""
    return max(sizes)


@triton.constexpr_function
def first_blocks(sizes, block):
    """Where the blocks of each size begin among those of all; none reaches over two sizes. The last is their number."""
    return tuple(sum(-(-size // block) for size in sizes[:i]) for i in range(len(sizes) + 1))


@triton.jit
def scale_of(tile, FIRST: tl.constexpr):
    """Which scale a tile is of, which a program finds as it runs, and its number within it. FIRST: `first_blocks`."""
    i, block = tile * 0, tile
    for k in tl.static_range(1, len(FIRST) - 1):
        inside = tile >= FIRST[k]
        i, block = tl.where(inside, k, i), tl.where(inside, tile - FIRST[k], block)
    return i, block


@triton.constexpr_function
def _numbers(count):
    return tuple(range(count))


@triton.jit
def of_scale(values, i, SCALES: tl.constexpr = None):
    """The element of a tuple that is scale i's, where i is known no sooner than the program runs: pointer or integer.

    It is one of SCALES, or any. One body then serves these scales, where their tiles have one shape. What the compiler
    knows of every element, such as a pointer's alignment, it knows of the one. A chosen pointer takes registers, where
    a scale's own is read from the launch's arguments: too many for the loops of the spatial attention.
    """
    AMONG: tl.constexpr = _numbers(len(values)) if SCALES is None else SCALES
    value = values[AMONG[0]]
    for k in tl.static_range(1, len(AMONG)):
        value = tl.where(i == AMONG[k], values[AMONG[k]], value)
    return value


@triton.jit
def number_of_scale(NUMBERS: tl.constexpr, i, ACC: tl.constexpr):
    """As `of_scale`, of numbers that are no integers, in ACC."""
    number = tl.full([], NUMBERS[0], ACC)
    for k in tl.static_range(1, len(NUMBERS)):
        number = tl.where(i == k, NUMBERS[k], number)
    return number


@triton.jit
def split_program(per_image):
    """The image (int64, since a stride will be multiplied by it) and the index within it of a program."""
    pid = tl.program_id(0)
    return (pid // per_image).to(tl.int64), pid % per_image


@triton.jit
def load_vector(ptr, offs, mask, ACC: tl.constexpr):
    """Elements of a vector, zero beyond the mask."""
    return tl.load(ptr + offs, mask=mask, other=0.0).to(ACC)


@triton.jit
def store_vectors(ptr, vectors, mask, STRIDE: tl.constexpr):
    """Each of some vectors, STRIDE behind the one before it."""
    for k in tl.static_range(len(vectors)):
        tl.store(ptr + k * STRIDE, vectors[k], mask=mask)


@triton.jit
def load_tile(ptr, rows, columns, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Some rows and columns of a matrix (HEIGHT, WIDTH), zero beyond it: [rows, columns]."""
    mask = (rows < HEIGHT)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(ptr + rows[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(ptr, tile, rows, columns, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """As `load_tile` loads them."""
    mask = (rows < HEIGHT)[:, None] & (columns < WIDTH)[None, :]
    tl.store(ptr + rows[:, None] * WIDTH + columns[None, :], tile, mask=mask)


@triton.jit
def load_tokens(ptr, offs_n, offs_all, mask_n, mask_c, TOTAL: tl.constexpr):
    """Tokens of one image (N, C), zero beyond the masks: [tokens, channels]."""
    mask = mask_n[:, None] & mask_c[None, :]
    return tl.load(ptr + offs_n[:, None] * TOTAL + offs_all[None, :], mask=mask, other=0.0)


@triton.jit
def sum_blocks(ptr, offs, mask, BLOCKS: tl.constexpr, STRIDE: tl.constexpr, ACC: tl.constexpr):
    """Sum of BLOCKS vectors that lie STRIDE apart, in a fixed order."""
    STEP: tl.constexpr = 32
    parts = tl.zeros([STEP, offs.shape[0]], ACC)
    for start in range(0, BLOCKS, STEP):
        offs_block = start + tl.arange(0, STEP)
        parts += tl.load(
            ptr + offs_block[:, None] * STRIDE + offs[None, :],
            mask=(offs_block < BLOCKS)[:, None] & mask[None, :],
            other=0.0,
        )
    return tl.sum(parts, 0)


@triton.jit
def image_rows(start, ROWS: tl.constexpr, batch, blocks, STRIDE: tl.constexpr, image_stride):
    """ROWS of the vectors of all images, `blocks` each: the image, where each begins, and whether it exists: [ROWS]."""
    offs_row = start + tl.arange(0, ROWS)
    b = (offs_row // blocks).to(tl.int64)
    return b, b * image_stride + offs_row % blocks * STRIDE, offs_row < batch * blocks


@triton.jit
def sum_images(ptr, offs, mask, batch, blocks, STRIDE: tl.constexpr, image_stride, ACC: tl.constexpr):
    """Sum of the vectors of all images, `blocks` each, that lie STRIDE and image_stride apart, in a fixed order."""
    ROWS: tl.constexpr = 4096 // offs.shape[0]  # many at a time: what takes long is to wait for them
    out = tl.zeros([ROWS, offs.shape[0]], ACC)
    for start in range(0, batch * blocks, ROWS):
        _, begin, mask_row = image_rows(start, ROWS, batch, blocks, STRIDE, image_stride)
        out += tl.load(ptr + begin[:, None] + offs[None, :], mask=mask_row[:, None] & mask[None, :], other=0.0)
    return tl.sum(out, 0)


@triton.jit
def zero_where_it_cancels(gradient, offs_all, SHIFT_CANCELS: tl.constexpr, SHAPE: tl.constexpr):
    """A bias's gradient, zero in the scales where the BatchNorm behind takes off what the bias adds: of NaN too."""
    for i in tl.static_range(len(SHAPE.channels)):
        if SHIFT_CANCELS[i]:
            inside = (offs_all >= SHAPE.offsets[i]) & (offs_all < SHAPE.offsets[i] + SHAPE.channels[i])
            gradient = tl.where(inside, 0.0, gradient)
    return gradient
