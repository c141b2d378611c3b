"""The kernels of both attentions."""

from tests.mutants import Mutant

TRITON = "module/test_triton.py::"
TOO_LARGE = TRITON + "test_a_module_that_is_too_large_says_so"
PRODUCTS = TRITON + "test_products_are_as_exact_as_asked"
CHANNEL = "stages/test_channel_attention.py::test_channel_attention_is_the_references[triton-train-ragged]"
SPATIAL = "stages/test_spatial_attention.py::test_spatial_attention_is_the_references[triton-train-ragged]"

ATTENTION = [
    Mutant(
        "walk-gradients-in-the-convolutions-dtype",
        "triton_backend/parameters.py",
        "return promoted(flatten(learned(contract)))",
        "return contract.upsample[0].weight.dtype",
        ("module/test_plan.py::test_stages_of_unequal_dtypes",),
    ),
    Mutant(
        "walk-spatial-size-of-the-narrowest-head",
        "triton_backend/spatial_attention.py",
        "min(heads_of(attention))",
        "max(heads_of(attention))",
        (TOO_LARGE + "[eval-widest_head]",),
    ),
    Mutant(
        "walk-mixing-size-of-the-widest-scale",
        "triton_backend/channel_attention.py",
        'launcher.config("mixing", launch.padded(shape.total))',
        'launcher.config("mixing", launch.padded(max(shape.channels)))',
        (TOO_LARGE + "[eval-all_channels]",),
    ),
    Mutant(
        "walk-scores-of-one-product",
        "triton_backend/spatial_attention.py",
        "scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION, out_dtype=ACC)",
        "scores = tl.dot(query, tl.trans(keys), out_dtype=ACC)",
        (PRODUCTS,),
    ),
    Mutant(
        "walk-online-of-one-product",
        "triton_backend/spatial_attention.py",
        "out * shrink[:, None], input_precision=PRECISION,",
        "out * shrink[:, None],",
        (PRODUCTS,),
    ),
    Mutant(
        "walk-expected-of-one-product",
        "triton_backend/spatial_attention_backward.py",
        "products = tl.dot(x, tl.trans(y), input_precision=PRECISION, out_dtype=ACC)",
        "products = tl.dot(x, tl.trans(y), out_dtype=ACC)",
        (PRODUCTS,),
    ),
    Mutant(
        "walk-along-rows-of-one-product",
        "triton_backend/spatial_attention_backward.py",
        "along_rows = tl.dot(dattended_m, tl.trans(values_n), input_precision=PRECISION,",
        "along_rows = tl.dot(dattended_m, tl.trans(values_n),",
        (PRODUCTS,),
    ),
    Mutant(
        "walk-covariance-of-no-channel",
        "triton_backend/channel_attention_backward.py",
        "products = tl.load(covariance + matrix, mask=mask, other=0.0)",
        "products = tl.load(covariance + matrix, mask=mask)",
        (CHANNEL,),
    ),
    Mutant(
        "walk-column-of-no-token",
        "triton_backend/spatial_attention_backward.py",
        'tl.load(scores + offs_m, mask=mask_m, other=float("-inf"))',
        "tl.load(scores + offs_m, mask=mask_m)",
        (SPATIAL,),
    ),
    Mutant(
        "walk-expected-of-no-token",
        "triton_backend/spatial_attention_backward.py",
        "expected_n = tl.load(expected + N + offs_n, mask=mask_n, other=0.0)",
        "expected_n = tl.load(expected + N + offs_n, mask=mask_n)",
        (SPATIAL,),
    ),
    Mutant(
        "walk-level-of-no-image",
        "triton_backend/spatial_gradients.py",
        "of_level = tl.load(level + (b * TOTAL)[:, None] + offs[None, :], mask=here, other=0.0)",
        "of_level = tl.load(level + (b * TOTAL)[:, None] + offs[None, :], mask=here)",
        (SPATIAL,),
    ),
]
