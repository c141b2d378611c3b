"""The least time of a case: the bytes and products that no implementation of its algebra can do without.

docs/algebra.md has the algebra. B images, N tokens, C channels of all scales, C_i of one. Of a symmetric matrix half is
counted. A stage takes the longer of its bytes at the rate of a copy and its products at the rate of a large matrix
product; a module the sum of its stages. Exponentials, and products with fewer than C_i columns, count nothing.
"""

from dataclasses import dataclass

from benchmarks import cases
from benchmarks.cases import Problem


@dataclass(frozen=True)
class Work:
    """Bytes moved and floating-point operations of products."""

    bytes: float
    flops: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops)


def work(problem: Problem, stage: str, mode: str) -> Work:
    """Of one stage in one mode."""
    if mode == "full":
        return work(problem, stage, "forward") + work(problem, stage, "backward")
    size, itemsize = problem.size, problem.dtype.itemsize
    count, total = size.patch**2, sum(size.features)
    maps = sum(c * s * s for c, s in zip(size.features, size.sides, strict=True))
    squares = sum(c * c for c in size.features)
    scales, tokens = len(size.features), count * total
    # An element is read or written: forward, backward.
    moved = {
        "patch_embed": (maps + tokens, 2 * maps + tokens),  # the maps' gradient passes through and is added to
        "channel_attention": (2 * tokens, 3 * tokens),
        "spatial_attention": (2 * tokens, 3 * tokens),
        "upsample": (2 * maps + tokens, 5 * maps + 2 * tokens),  # BatchNorm's sums come before the maps' gradient
    }
    products = {
        "patch_embed": (0, 0),
        # Gram matrix (half), mixing; the mixing matrix's gradient, and the tokens' through mixing and Gram matrix.
        "channel_attention": (3 * tokens * total, 6 * tokens * total),
        # Scores (half) of every scale, weights times values; again, scores' gradients (half), values', queries'.
        "spatial_attention": (
            count * tokens * scales + 2 * count * tokens,
            count * tokens * scales + 4 * count * tokens + 2 * count * tokens * scales,
        ),
        "upsample": (2 * count * squares, 4 * count * squares),
    }
    which = mode == "backward"
    elements = moved[stage][which]
    if stage == "upsample" and problem.training and mode == "forward":
        elements += maps  # the batch's statistics come before the upsampling
    return Work(problem.batch * elements * itemsize, float(problem.batch * products[stage][which]))


def module_work(problem: Problem, stage: str, mode: str) -> Work:
    """As `work`, of a stage inside the module, where neighbours share a pass over the maps.

    Statistics are taken while the maps are pooled, and the pooling's gradient is added where the maps' is written.
    """
    if mode == "full":
        return module_work(problem, stage, "forward") + module_work(problem, stage, "backward")
    alone = work(problem, stage, mode)
    maps = sum(c * s * s for c, s in zip(problem.size.features, problem.size.sides, strict=True))
    saved = 0
    if stage == "upsample" and problem.training and mode == "forward":
        saved = maps
    elif stage == "patch_embed" and mode == "backward":
        saved = 2 * maps
    return Work(alone.bytes - problem.batch * saved * problem.dtype.itemsize, alone.flops)


def milliseconds(problem: Problem, mode: str, rates: dict[str, float]) -> float | None:
    """The floor at measured rates (`calibrate.rates`: bytes and operations a second); None for a host."""
    if problem.case in cases.HOSTS:
        return None
    if problem.case == "dca":
        parts = [module_work(problem, stage, mode) for stage in cases.STAGES]
    else:
        parts = [work(problem, problem.case, mode)]
    return 1e3 * sum(max(w.bytes / rates["copy_bytes_s"], w.flops / rates["matmul_flop_s"]) for w in parts)
