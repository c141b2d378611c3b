"""`python -m benchmarks determinism`: whether the kernels' outputs and gradients are the same bits every time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks import cases, command, console, journal, measure, providers
from benchmarks.cases import Problem

EVERY = 50  # repeats, after which the count is written
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def differing(a: Tensor, b: Tensor) -> int:
    """How many values are not the same bits."""
    dtype = BITS[a.element_size()]
    return int((a.contiguous().view(dtype) != b.contiguous().view(dtype)).sum())


def main(arguments: Sequence[str]) -> int:
    parser = command.parser(
        "determinism",
        "Repeats a forward and backward in training and compares outputs and all gradients with the first one's, bit "
        "by bit. Exit status 1 means that they differ, 2 that the provider does not run here.",
        "",
        "--provider torch --size tiny --dtype float32 --repeats 10   # without a GPU",
    )
    whose = command.listed({name: command.PROVIDERS[name] for name in providers.FUSED})
    parser.add_argument("--provider", choices=providers.FUSED, default="triton", help=whose)
    parser.add_argument(
        "--repeats", type=command.positive_integer, default=250, metavar="N", help="calls after the first one"
    )
    parser.add_argument("--batch", type=command.positive_integer, default=60, metavar="B", help=command.BATCH)
    parser.add_argument("--size", choices=cases.SIZES, default="paper", help=command.sizes())
    parser.add_argument("--dtype", choices=cases.DTYPES, default="bfloat16", help=command.DTYPE)
    parser.add_argument("--journal", type=command.file, metavar="FILE", help=command.JOURNAL)
    chosen = parser.parse_args(arguments)
    device, provider = measure.device(), providers.PROVIDERS[chosen.provider]
    problem = Problem("dca", cases.SIZES[chosen.size], chosen.batch, cases.DTYPES[chosen.dtype], training=True)
    reason = providers.why_not(provider, problem, "full", device)
    if reason is not None:
        return command.not_run("determinism", reason, "`--provider torch` runs on a CPU")
    subject = providers.build(provider, problem, *providers.inputs_of(problem, cases.load_image(None), device))

    def results() -> list[Tensor]:
        outputs = [y.detach() for y in subject.forward()]
        return [*outputs, *subject.backward(), *subject.parameter_gradients]

    first, differ = results(), 0
    found = {"values": sum(x.numel() for x in first), "batch": chosen.batch, "dtype": chosen.dtype}
    for done in console.progress(range(1, chosen.repeats + 1), desc="repeats", mininterval=5):
        differ += sum(differing(a, b) for a, b in zip(first, results(), strict=True))
        if done % EVERY == 0 or done == chosen.repeats:
            journal.write(chosen.journal, "determinism", repeats=done, differ=differ, **found)
    print(
        f"{chosen.repeats} repeats of {found['values']} values, batch {chosen.batch}, {chosen.dtype}: {differ} differ"
    )
    return 1 if differ else 0
