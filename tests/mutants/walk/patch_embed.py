"""The first stage, the tokens and what kernels share."""

from tests.mutants import Mutant

EMBED = "stages/test_patch_embed.py::"
TRITON = "module/test_triton.py::"
MEMORY = "module/test_triton_memory.py::"
SEVERAL_ROWS = MEMORY + "test_every_access_is_inside_a_tensor_in_blocks_of_several_rows[{}]"
ROUNDED_ONCE = EMBED + "test_the_transposed_interpolation_is_rounded_once[bfloat16]"
ALIKE = TRITON + "test_layouts_of_windows_that_are_all_alike"

PATCH_EMBED = [
    Mutant(
        "walk-embed-first-row-of-the-block",
        "triton_backend/patch_embed.py",
        "x=x, origin=origin, p=p, q_begin=q_begin",
        "x=x, origin=origin, p=p_begin, q_begin=q_begin",
        (SEVERAL_ROWS.format("float64"),),
    ),
    Mutant(
        "walk-embed-products-below-the-grid",
        "triton_backend/patch_embed.py",
        "* (1.0 / area)\n            tl.store(out_ptrs + p * GRID[1] * TOTAL, tl.trans(transposed), "
        "mask=mask & (p < GRID[0]))",
        "* (1.0 / area)\n            tl.store(out_ptrs + p * GRID[1] * TOTAL, tl.trans(transposed), mask=mask)",
        (SEVERAL_ROWS.format("bfloat16"),),
    ),
    Mutant(
        "walk-embed-weighted-rows-below-the-grid",
        "triton_backend/patch_embed.py",
        "transposed /= area\n            tl.store(out_ptrs + p * GRID[1] * TOTAL, tl.trans(transposed), "
        "mask=mask & (p < GRID[0]))",
        "transposed /= area\n            tl.store(out_ptrs + p * GRID[1] * TOTAL, tl.trans(transposed), mask=mask)",
        (SEVERAL_ROWS.format("float64"),),
    ),
    Mutant(
        "walk-embed-no-row-of-many-channels",
        "triton_backend/patch_embed.py",
        "return max(PAIRS.value // padded(channels), 1)",
        "return PAIRS.value // padded(channels)",
        (ROUNDED_ONCE,),
    ),
    Mutant(
        "walk-embed-products-of-contiguous-columns",
        "triton_backend/patch_embed.py",
        "mask = mask_c[:, None] & mask_w[None, :]\n"
        "    x_ptrs = x + offs_c[:, None] * strides[1] + offs_w[None, :] * strides[3]",
        "mask = mask_c[:, None] & mask_w[None, :]\n    x_ptrs = x + offs_c[:, None] * strides[1] + offs_w[None, :]",
        (ROUNDED_ONCE,),
    ),
    Mutant(
        "walk-embed-blocks-by-the-last-scale",
        "triton_backend/patch_embed.py",
        "widest = max(widest, launch.padded(c) * power_of_two(_widest_window(size, grid)[1]))",
        "widest = launch.padded(c) * power_of_two(_widest_window(size, grid)[1])",
        (TRITON + "test_windows_that_are_too_wide_say_so[first]",),
    ),
    Mutant(
        "walk-embed-training-with-the-blocks-of-evaluation",
        "triton_backend/patch_embed.py",
        '"patch_embed_train" if statistics else "patch_embed", widest',
        '"patch_embed", widest',
        (TRITON + "test_windows_may_be_wider_in_evaluation",),
    ),
    Mutant(
        "walk-embed-evaluation-with-the-blocks-of-training",
        "triton_backend/patch_embed.py",
        '"patch_embed_train" if statistics else "patch_embed", widest',
        '"patch_embed_train", widest',
        (TRITON + "test_windows_may_be_wider_in_evaluation",),
    ),
    Mutant(
        "walk-embed-statistics-before-rounding",
        "triton_backend/patch_embed.py",
        "            out = out.to(tokens.dtype.element_ty)\n            tl.store(tokens + offs_tokens, out, mask=mask)",
        "            tl.store(tokens + offs_tokens, out.to(tokens.dtype.element_ty), mask=mask)",
        ("module/test_precision.py::test_tokens_of_one_value[triton-bfloat16-channel]",),
    ),
    Mutant(
        "walk-rows-of-contiguous-windows",
        "triton_backend/patch_embed_rows.py",
        "x_ptrs = image_ptrs + p * WINDOW[0] * strides[2]",
        "x_ptrs = image_ptrs + p * WINDOW[0] * WIDTH",
        (ALIKE,),
    ),
    Mutant(
        "walk-rows-of-a-contiguous-map",
        "triton_backend/patch_embed_rows.py",
        "_load_row(x_ptrs + r * strides[2], mask_c, strides[3], WIDTH, GRID_WIDTH, ACC) - level",
        "_load_row(x_ptrs + r * WIDTH * GRID_WIDTH, mask_c, strides[3], WIDTH, GRID_WIDTH, ACC) - level",
        (ALIKE,),
    ),
    Mutant(
        "walk-rows-of-a-contiguous-map-in-evaluation",
        "triton_backend/patch_embed_rows.py",
        "_load_row(x_ptrs + r * strides[2], mask_c, strides[3], WINDOW[1], GRID[1], ACC)\n            window_sums",
        "_load_row(x_ptrs + r * WIDTH, mask_c, strides[3], WINDOW[1], GRID[1], ACC)\n            window_sums",
        (ALIKE,),
    ),
    Mutant(
        "walk-rows-statistics-that-nobody-wants",
        "triton_backend/patch_embed_rows.py",
        "            if EPS is not None:\n                tl.debug_barrier()",
        "            if True:\n                tl.debug_barrier()",
        (ALIKE,),
    ),
    Mutant(
        "walk-rows-no-channel-of-a-wide-row",
        "triton_backend/patch_embed_rows.py",
        "min(max(1, elements // (tokens * held)), power_of_two(channels))",
        "min(elements // (tokens * held), power_of_two(channels))",
        (TRITON + "test_many_blocks[train-wide_row_of_windows]",),
    ),
    Mutant(
        "walk-rows-no-token-of-many-channels",
        "triton_backend/patch_embed_rows.py",
        "return max(1, min(2 * elements // launch.padded(max(channels)), power_of_two(grid[1])))",
        "return min(2 * elements // launch.padded(max(channels)), power_of_two(grid[1]))",
        (EMBED + "test_moments_are_those_of_the_maps[many_channels-by_rows]",),
    ),
    Mutant(
        "walk-tokens-last-scale-as-the-widest",
        "triton_backend/tokens.py",
        "return launch.padded(max(shape.channels))",
        "return launch.padded(shape.channels[-1])",
        (TRITON + "test_a_module_that_is_too_large_says_so[eval-widest_first]",),
    ),
    Mutant(
        "walk-sums-over-images-of-32-bits",
        "triton_backend/primitives.py",
        "b = (offs_row // blocks).to(tl.int64)",
        "b = offs_row // blocks",
        (MEMORY + "test_sums_over_images_far_apart",),
    ),
]
