"""Triton helpers that two or more stages use.

Names in every kernel: `*_ptr` a pointer, `offs_*` indices along an axis, `mask_*` which of them exist, `b` an image,
`i` a scale. Tuples of pointers have one for each scale. ACC is the dtype of sums and statistics: float32, or float64
for float64 maps. Tokens are laid out (B, N, C), the channels of all scales side by side; CHANNELS are their numbers, C
their sum.
"""

import math

import triton
import triton.language as tl

# What is launched. Numbers of images and of rows are not specialised on: 1 would be a constant, which has no `.to`, and
# 1, 16 and 17 images would be three compilations.
kernel = triton.jit(do_not_specialize=["batch", "count"])


@triton.constexpr_function
def padded(size):
    """The power of two, at least 16, that holds `size`: Triton's blocks are powers of two, and products start at 16."""
    return max(16, triton.next_power_of_2(size))


@triton.constexpr_function
def of_scale(values, i):
    """What a constant tuple of tuples holds for scale i, as a constant.

    `values[i]` is a plain tuple, which Triton 3.6 hands on to no other jit function.
    """
    return values[i]


@triton.constexpr_function
def offset(channels, i):
    """Where the channels of scale i begin."""
    return sum(channels[k] for k in range(i))


@triton.constexpr_function
def total(channels):
    """The channels of all scales."""
    return sum(channels[k] for k in range(len(channels)))


@triton.constexpr_function
def blocks_before(sizes, block, i):
    """How many blocks the first i sizes have, where none reaches over two sizes."""
    return sum(-(-sizes[k] // block) for k in range(i))


@triton.jit
def split_program(PER_IMAGE: tl.constexpr):
    """The image (int64, since a stride will be multiplied by it) and the index within it of a program."""
    pid = tl.program_id(0)
    return (pid // PER_IMAGE).to(tl.int64), pid % PER_IMAGE


@triton.jit
def load_vector(ptr, offs, mask, ACC: tl.constexpr):
    return tl.load(ptr + offs, mask=mask, other=0.0).to(ACC)


@triton.jit
def load_concatenated(ptrs, offs, CHANNELS: tl.constexpr, ACC: tl.constexpr):
    """Elements `offs` of the vectors of all scales side by side; zero beyond them."""
    out = tl.zeros(offs.shape, ACC)
    for i in tl.static_range(len(CHANNELS)):
        local = offs - offset(CHANNELS, i)
        out += load_vector(ptrs[i], local, (local >= 0) & (local < CHANNELS[i]), ACC)
    return out


@triton.jit
def row_statistics(rows, mask, SIZE: tl.constexpr, EPS: tl.constexpr):
    """Mean and reciprocal standard deviation of each row (LayerNorm); rows is zero where mask is not.

    The second step removes the rounding of the first: a constant row is zero when its mean is subtracted.
    """
    mean = tl.sum(rows, 1) / SIZE
    mean += tl.sum(tl.where(mask, rows - mean[:, None], 0.0), 1) / SIZE
    centred = tl.where(mask, rows - mean[:, None], 0.0)
    return mean, tl.rsqrt(tl.sum(centred * centred, 1) / SIZE + EPS)


@triton.jit
def statistics_pointers(statistics_ptr, b, i, offs_n, N: tl.constexpr, SCALES: tl.constexpr):
    """Where mean and reciprocal standard deviation of tokens are: (B, S, 2, N)."""
    ptrs = statistics_ptr + (b * SCALES + i) * 2 * N + offs_n
    return ptrs, ptrs + N


@triton.jit
def store_statistics(
    tokens, mask, b, i, block, offs_n, statistics_ptr, sums_ptr,
    N: tl.constexpr, CHANNELS: tl.constexpr, BLOCKS: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """LayerNorm's statistics of tokens [rows, channels], and this block's sums of the normalised and of the plain ones.

    statistics (B, S, 2, N), sums (B, BLOCKS, 2, C).
    """
    TOTAL: tl.constexpr = total(CHANNELS)
    mean, rstd = row_statistics(tokens, mask, CHANNELS[i], EPS)
    mean_ptrs, rstd_ptrs = statistics_pointers(statistics_ptr, b, i, offs_n, N, len(CHANNELS))
    tl.store(mean_ptrs, mean, mask=offs_n < N)
    tl.store(rstd_ptrs, rstd, mask=offs_n < N)
    normalised = tl.where(mask, (tokens - mean[:, None]) * rstd[:, None], 0.0)
    offs_c = tl.arange(0, tokens.shape[1])
    sums_ptrs = sums_ptr + (b * BLOCKS + block) * 2 * TOTAL + offset(CHANNELS, i) + offs_c
    tl.store(sums_ptrs, tl.sum(normalised, 0), mask=offs_c < CHANNELS[i])
    tl.store(sums_ptrs + TOTAL, tl.sum(tokens, 0), mask=offs_c < CHANNELS[i])


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
def image_rows(
    start, ROWS: tl.constexpr, batch, BLOCKS: tl.constexpr, STRIDE: tl.constexpr, IMAGE_STRIDE: tl.constexpr
):
    """ROWS of the vectors of all images, BLOCKS each: the image, where it begins, and whether there is one: [ROWS]."""
    offs_row = start + tl.arange(0, ROWS)
    b = (offs_row // BLOCKS).to(tl.int64)
    return b, b * IMAGE_STRIDE + offs_row % BLOCKS * STRIDE, offs_row < batch * BLOCKS


@triton.jit
def sum_images(
    ptr, offs, mask, batch, BLOCKS: tl.constexpr, STRIDE: tl.constexpr, IMAGE_STRIDE: tl.constexpr, ACC: tl.constexpr
):
    """Sum of the vectors of all images, BLOCKS each, that lie STRIDE and IMAGE_STRIDE apart, in a fixed order."""
    ROWS: tl.constexpr = 4096 // offs.shape[0]  # many at a time: what takes long is to wait for them
    out = tl.zeros([ROWS, offs.shape[0]], ACC)
    for start in range(0, batch * BLOCKS, ROWS):
        _, begin, mask_row = image_rows(start, ROWS, batch, BLOCKS, STRIDE, IMAGE_STRIDE)
        out += tl.load(ptr + begin[:, None] + offs[None, :], mask=mask_row[:, None] & mask[None, :], other=0.0)
    return tl.sum(out, 0)


@triton.jit
def store_affine_gradients(
    daffine_ptr, gradients_ptr, offs, batch, TOTAL: tl.constexpr, BLOCKS: tl.constexpr, ACC: tl.constexpr
):
    """The sums of `store_layer_norm_backward` over blocks and images: elements `offs` of weight and bias, (2, C)."""
    mask = offs < 2 * TOTAL
    affine = sum_images(daffine_ptr, offs, mask, batch, BLOCKS, 2 * TOTAL, BLOCKS * 2 * TOTAL, ACC)
    tl.store(gradients_ptr + offs, affine, mask=mask)


@triton.jit
def without_removed(gradient, offs, CHANNELS: tl.constexpr, REMOVED: tl.constexpr):
    """A bias's gradient, zero in the scales where the BatchNorm behind removes the constant."""
    for i in tl.static_range(len(CHANNELS)):
        if REMOVED[i]:
            inside = (offs >= offset(CHANNELS, i)) & (offs < offset(CHANNELS, i) + CHANNELS[i])
            gradient = tl.where(inside, gradient * 0.0, gradient)
    return gradient


@triton.jit
def layer_norm_vector(vector, mask, SIZE: tl.constexpr, EPS: tl.constexpr):
    """LayerNorm of one token, without its weight and bias."""
    mean = tl.sum(vector) / SIZE
    mean += tl.sum(tl.where(mask, vector - mean, 0.0)) / SIZE
    centred = tl.where(mask, vector - mean, 0.0)
    return centred * tl.rsqrt(tl.sum(centred * centred) / SIZE + EPS)


@triton.jit
def store_normalised(
    tokens, mask, mean_token, b, i, offs_n, gamma_ptr, beta_ptr, normalised_ptr, level_ptr,
    N: tl.constexpr, CHANNELS: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The tokens' LayerNorm less a level per image and channel, and the level: (B, N, C) and (B, C).

    The level is the LayerNorm of the mean token: what is left is small where tokens differ little, and keeps its digits
    when it is rounded. Spatial attention takes any level (docs/algebra.md).
    """
    TOTAL: tl.constexpr = total(CHANNELS)
    offs_c = tl.arange(0, tokens.shape[1])
    mask_c = offs_c < CHANNELS[i]
    gamma, beta = load_vector(gamma_ptr, offs_c, mask_c, ACC), load_vector(beta_ptr, offs_c, mask_c, ACC)
    level = layer_norm_vector(mean_token, mask_c, CHANNELS[i], EPS)
    mean, rstd = row_statistics(tokens, mask, CHANNELS[i], EPS)
    normalised = gamma * ((tokens - mean[:, None]) * rstd[:, None] - level[None, :])
    own = offset(CHANNELS, i) + offs_c
    tl.store(normalised_ptr + b * N * TOTAL + offs_n[:, None] * TOTAL + own[None, :], normalised, mask=mask)
    tl.store(level_ptr + b * TOTAL + own, gamma * level + beta, mask=mask_c & (tl.min(offs_n) == 0))


@triton.jit
def store_layer_norm_backward(
    tokens_ptr, dnormalised, dresidual_ptr, gamma_ptr, dtokens_ptr, daffine_ptr, b, i, block, offs_n,
    N: tl.constexpr, CHANNELS: tl.constexpr, BLOCKS: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
    COUNT: tl.constexpr = 1,
):  # fmt: skip
    """The gradient of tokens [rows, channels] of scale i through their LayerNorm, and the residual's.

    The rows are COUNT blocks from `block` on. dtokens (B, N, C); daffine (B, BLOCKS, 2, C), the blocks' sums for
    LayerNorm's weight and bias.
    """
    TOTAL: tl.constexpr = total(CHANNELS)
    offs_c = tl.arange(0, dnormalised.shape[1])
    mask_c = offs_c < CHANNELS[i]
    mask = (offs_n < N)[:, None] & mask_c[None, :]
    offs = b * N * TOTAL + offs_n[:, None] * TOTAL + (offset(CHANNELS, i) + offs_c)[None, :]
    tokens = tl.load(tokens_ptr + offs, mask=mask, other=0.0).to(ACC)
    dresidual = tl.load(dresidual_ptr + offs, mask=mask, other=0.0)  # before the sums, which would wait for it
    gamma = load_vector(gamma_ptr, offs_c, mask_c, ACC)
    mean, rstd = row_statistics(tokens, mask, CHANNELS[i], EPS)
    normalised = tl.where(mask, (tokens - mean[:, None]) * rstd[:, None], 0.0)
    dnormalised = tl.where(mask, dnormalised, 0.0)
    scaled = dnormalised * gamma[None, :]
    along_mean = tl.sum(scaled, 1) / CHANNELS[i]
    along_std = tl.sum(scaled * normalised, 1) / CHANNELS[i]
    dtokens = rstd[:, None] * (scaled - along_mean[:, None] - normalised * along_std[:, None]) + dresidual.to(ACC)
    tl.store(dtokens_ptr + offs, dtokens, mask=mask)
    offs_block = block + tl.arange(0, COUNT)
    offs = (b * BLOCKS + offs_block)[:, None] * 2 * TOTAL + (offset(CHANNELS, i) + offs_c)[None, :]
    mask = (offs_block < BLOCKS)[:, None] & mask_c[None, :]
    tl.store(daffine_ptr + offs, _sum_of_blocks(dnormalised * normalised, COUNT), mask=mask)
    tl.store(daffine_ptr + TOTAL + offs, _sum_of_blocks(dnormalised, COUNT), mask=mask)


@triton.jit
def _sum_of_blocks(rows, COUNT: tl.constexpr):
    """[rows, channels] summed over each of COUNT blocks of rows."""
    return tl.sum(tl.reshape(rows, [COUNT, rows.shape[0] // COUNT, rows.shape[1]]), 1)


@triton.jit
def interpolation(offs, HIGH: tl.constexpr, LOW: tl.constexpr, ACC: tl.constexpr):
    """Bilinear, align_corners=True, as PyTorch computes it: left and right neighbour, the weight of the right one."""
    position = _position(offs, HIGH, LOW, ACC)
    left = tl.minimum(position.to(tl.int32), LOW - 1)
    return left, tl.minimum(left + 1, LOW - 1), position - left.to(ACC)


@triton.jit
def _position(offs, HIGH: tl.constexpr, LOW: tl.constexpr, ACC: tl.constexpr):
    """Of high-resolution positions among the low-resolution ones."""
    STEP: tl.constexpr = (LOW - 1) / (HIGH - 1) if HIGH > 1 else 0.0
    return offs.to(ACC) * STEP


@triton.jit
def interpolation_matrix(offs_low, offs_high, HIGH: tl.constexpr, LOW: tl.constexpr, ACC: tl.constexpr):
    """The weight of each low-resolution position in each high-resolution one: [LOW, HIGH]."""
    apart = _position(offs_high, HIGH, LOW, ACC)[None, :] - offs_low.to(ACC)[:, None]
    return tl.maximum(1.0 - tl.abs(apart), 0.0)


@triton.constexpr_function
def band(high, low, count):
    """How many high-resolution positions at most take from `count` neighbouring low-resolution ones."""
    if low == 1:
        return high
    return min(high, math.ceil((count + 1) * (high - 1) / (low - 1)) + 2)


@triton.constexpr_function
def _reciprocal_shift(divisor):
    return 31 + divisor.bit_length()


@triton.constexpr_function
def _reciprocal(divisor):
    return -(-(1 << _reciprocal_shift(divisor)) // divisor)


@triton.jit
def quotient(numbers, DIVISOR: tl.constexpr):
    """`numbers // DIVISOR` for 0 <= numbers < 2**31, by a product with the reciprocal.

    LLVM divides small numbers in 16 bits, two at a time, and ptxas 12.8 then loses a constant that was added before
    (`add.s16x2` with one half unused adds zero), which pooled windows of no columns.
    """
    return (numbers.to(tl.int64) * _reciprocal(DIVISOR) >> _reciprocal_shift(DIVISOR)).to(tl.int32)


@triton.jit
def band_begin(position, HIGH: tl.constexpr, LOW: tl.constexpr):
    """A high-resolution position not after the first that takes from a low-resolution one."""
    if LOW == 1:
        return position * 0
    return quotient(tl.maximum(position - 1, 0) * (HIGH - 1), LOW - 1)


@triton.jit
def window_begin(window, SIZE: tl.constexpr, WINDOWS: tl.constexpr):
    """Where a window of adaptive average pooling begins."""
    if SIZE % WINDOWS == 0:
        return window * (SIZE // WINDOWS)
    return quotient(window * SIZE, WINDOWS)


@triton.jit
def window_end(window, SIZE: tl.constexpr, WINDOWS: tl.constexpr):
    """Where it ends; neighbouring windows may have a position in common."""
    if SIZE % WINDOWS == 0:
        return (window + 1) * (SIZE // WINDOWS)
    return quotient((window + 1) * SIZE + WINDOWS - 1, WINDOWS)


@triton.jit
def first_window(position, SIZE: tl.constexpr, WINDOWS: tl.constexpr):
    """A window not after the first that holds a position."""
    if SIZE % WINDOWS == 0:
        return quotient(position, SIZE // WINDOWS)
    return quotient(position * WINDOWS, SIZE)
