"""The kernels of the upsampling, of its statistics and of the maps' gradients."""

from tests.mutants import Mutant

TRITON = "module/test_triton.py::"
BACKWARD = "module/test_triton_backward.py::"
MEAN = TRITON + "test_what_a_mean_has_beyond_the_digits_of_the_map[{}]"
DIGITS = "module/test_triton_memory.py::test_every_access_is_inside_a_tensor[eval-ragged]"

UPSAMPLE = [
    Mutant(
        "walk-counter-of-the-first-scale",
        "triton_backend/batch_statistics.py",
        "tl.load(buffers.counter[i])",
        "tl.load(buffers.counter[0])",
        (TRITON + "test_norms_that_differ[second_cumulative]",),
    ),
    Mutant(
        "walk-combine-blocks-of-the-kernel-before",
        "triton_backend/batch_statistics.py",
        '    config = launcher.config("combine_images")\n'
        '    blocks = sum([launch.blocks(c, config["block_c"]) for c in tokens.channels])\n',
        '    config = launcher.config("combine_images")\n',
        (TRITON + "test_two_values_that_the_tokens_cancel",),
    ),
    Mutant(
        "walk-map-gradient-sums-where-wanted",
        "triton_backend/map_gradient.py",
        "    sums_ptrs = sums + row * 2 * TOTAL + offs_all\n"
        "    tl.store(sums_ptrs, sum_pairs(pooled * pixels, TILE), mask=mask_c)\n"
        "    tl.store(sums_ptrs + TOTAL, sum_pairs(rows, TILE), mask=mask_c)",
        "        sums_ptrs = sums + row * 2 * TOTAL + offs_all\n"
        "        tl.store(sums_ptrs, sum_pairs(pooled * pixels, TILE), mask=mask_c)\n"
        "        tl.store(sums_ptrs + TOTAL, sum_pairs(rows, TILE), mask=mask_c)",
        (BACKWARD + "test_maps_with_and_without_gradients",),
    ),
    Mutant(
        "walk-map-gradient-contiguous",
        "triton_backend/map_gradient.py",
        "torch.empty_like(x, memory_format=memory_format(x))",
        "torch.empty_like(x, memory_format=torch.contiguous_format)",
        (BACKWARD + "test_maps_with_and_without_gradients",),
    ),
    Mutant(
        "walk-rows-tile-of-no-channel",
        "triton_backend/upsample_rows.py",
        "min(power_of_two(c), max(1, elements // columns))",
        "min(power_of_two(c), elements // columns)",
        (TRITON + "test_shapes[eval-wide_rows]",),
    ),
    Mutant(
        "walk-rows-gradient-of-a-called-head",
        "triton_backend/upsample_rows.py",
        "affine = (tl.full(offs_c.shape, 1.0, ACC), constant)",
        "affine = (constant, constant)",
        (BACKWARD + "test_one_head_is_called[by_rows]",),
    ),
    Mutant(
        "walk-rows-outputs-by-the-maps-step",
        "triton_backend/upsample_rows.py",
        "out_ptrs += ROWS * out_step",
        "out_ptrs += ROWS * x_step",
        (BACKWARD + "test_one_head_is_called[by_rows]",),
    ),
    Mutant(
        "walk-rows-gradients-by-the-maps-step",
        "triton_backend/upsample_rows.py",
        "dmap_ptrs += ROWS * dmap_step",
        "dmap_ptrs += ROWS * x_step",
        (BACKWARD + "test_one_head_is_called[by_rows]",),
    ),
    Mutant(
        "walk-relu-cuts-off-nan",
        "triton_backend/batch_norm.py",
        "return tl.where(before_relu <= 0, 0.0, gradient)",
        "return tl.where(before_relu > 0, gradient, 0.0)",
        (BACKWARD + "test_the_gradient_where_nothing_is_a_number",),
    ),
    Mutant(
        "walk-rows-mean-rounded-in-the-sums",
        "triton_backend/upsample_rows.py",
        "    rounded, lost = in_two_parts(load_mean(used, c_begin, i, SHAPE, LAYOUT), ACC)\n"
        "    affine = (rounded, rounded)",
        "    rounded, lost = in_two_parts(load_mean(used, c_begin, i, SHAPE, LAYOUT).to(ACC).to(tl.float64), ACC)\n"
        "    affine = (rounded, rounded)",
        (MEAN.format("by_rows"),),
    ),
    Mutant(
        "walk-rows-mean-rounded-in-the-map-gradient",
        "triton_backend/upsample_rows.py",
        "    rounded, lost = in_two_parts(load_mean(used, c_begin, i, SHAPE, LAYOUT), ACC)\n    offs_c =",
        "    rounded, lost = in_two_parts(load_mean(used, c_begin, i, SHAPE, LAYOUT).to(ACC).to(tl.float64), ACC)\n"
        "    offs_c =",
        (MEAN.format("by_rows"),),
    ),
    Mutant(
        "walk-mean-rounded-in-the-sums",
        "triton_backend/upsample_backward.py",
        "        y = less_mean(pixels, up, mean, TILE.rows, ACC)\n        if MAP",
        "        y = less_mean(pixels, up, mean.to(ACC).to(tl.float64), TILE.rows, ACC)\n        if MAP",
        (MEAN.format("any_windows"),),
    ),
    Mutant(
        "walk-mean-rounded-in-the-map-gradient",
        "triton_backend/upsample_backward.py",
        "    y = less_mean(pixels, up, mean, TILE.rows, ACC)\n    gradient",
        "    y = less_mean(pixels, up, mean.to(ACC).to(tl.float64), TILE.rows, ACC)\n    gradient",
        (MEAN.format("any_windows"),),
    ),
    Mutant(
        "walk-conv-of-fewer-digits",
        "triton_backend/upsample.py",
        "out = tl.dot(rows, tl.trans(columns), out, input_precision=PRECISION, out_dtype=ACC)",
        "out = tl.dot(rows, tl.trans(columns), out, out_dtype=ACC)",
        (DIGITS,),
    ),
    Mutant(
        "walk-strips-of-fewer-digits",
        "triton_backend/upsample_backward.py",
        "strip = tl.dot(gradient, tl.trans(matrix), strip, input_precision=PRECISION, out_dtype=ACC)",
        "strip = tl.dot(gradient, tl.trans(matrix), strip, out_dtype=ACC)",
        (DIGITS,),
    ),
]
