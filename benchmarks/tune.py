"""Measures the candidate configurations of every kernel and writes the fastest into `configurations.json`."""

import argparse
import itertools
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton

from benchmarks import cases, console, measure
from dca_kernels import launch

TABLE = Path(launch.__file__).parent / "configurations.json"
WARPS = (4, 8)

# What is tried, beside the table's present row. Each is a product of its values.
CANDIDATES: dict[str, dict[str, Sequence[int]]] = {
    "patch_embed": {"block_q": (4, 8, 16, 32), "num_warps": WARPS},
    "patch_embed_train": {"block_q": (4, 8, 16), "num_warps": WARPS},
    "covariance": {"block_c": (32, 64, 128), "block_n": (32, 64), "splits": (1, 2, 4), "num_warps": WARPS},
    "mixing": {"block_c": (2, 4, 8, 16), "num_warps": WARPS},
    "mix": {"block_n": (16, 32, 64, 128), "block_c": (16, 32, 64), "num_warps": WARPS, "num_stages": (1, 2, 3)},
    "spatial_attention": {
        "block_m": (64, 128),
        "block_n": (32, 64, 128),
        "num_warps": WARPS,
        "num_stages": (2, 3, 4),
    },
    "conv": {"block_n": (32, 64, 128), "block_c": (32, 64), "num_warps": WARPS, "num_stages": (2, 3)},
    "batch_statistics": {"block_n": (64, 128, 256), "block_c": (4, 8, 16), "num_warps": WARPS},
    "upsample_contiguous": {
        "tile": (2048, 4096, 8192, 16384),
        "block_c": (4, 8, 16),
        "block_w": (64, 128, 256),
        "num_warps": WARPS,
    },
    "upsample_channels_last": {
        "tile": (2048, 4096, 8192),
        "block_c": (16, 32, 64),
        "block_w": (32, 64),
        "num_warps": WARPS,
    },
}


def candidates(kernel: str, present: dict[str, int]) -> Iterator[dict[str, int]]:
    """The table's present configuration, then the others: shuffled, since there may not be time for all."""
    yield present
    values = CANDIDATES[kernel]
    products = list(itertools.product(*values.values()))
    random.Random(0).shuffle(products)
    for chosen in products:
        config = present | dict(zip(values, chosen, strict=True))
        if config != present:
            yield config


class Probe:
    """Runs a forward with one kernel's configuration replaced, and measures that kernel alone."""

    def __init__(self, module: torch.nn.Module, maps: list[torch.Tensor]) -> None:
        self.module, self.maps = module, maps
        self.sizes: dict[str, int] = {}
        self.present: dict[str, dict[str, int]] = {}
        self._forward(None, {})

    def outputs(self, kernel: str, config: dict[str, int]) -> tuple[torch.Tensor, ...]:
        """The forward's results."""
        return self._forward(kernel, config)

    def milliseconds(self, kernel: str, config: dict[str, int]) -> float:
        """Median time of the kernel."""
        times: list[float] = []
        self._forward(kernel, config, times)
        return sum(times)

    def _forward(
        self, kernel: str | None, config: dict[str, int], times: list[float] | None = None
    ) -> tuple[torch.Tensor, ...]:
        lookup, run, latest = launch.configuration, launch.run, [""]

        def configuration(name: str, architecture: str, dtype: torch.dtype, size: int) -> dict[str, int]:
            latest[0] = name
            self.sizes[name] = size
            self.present.setdefault(name, lookup(name, architecture, dtype, size))
            return config if name == kernel else self.present[name]

        def run_and_time(one: Any, programs: int, its_config: dict[str, int], **arguments: Any) -> None:
            run(one, programs, its_config, **arguments)
            if times is not None and latest[0] == kernel:
                times.append(median_milliseconds(lambda: run(one, programs, its_config, **arguments)))

        with (
            torch.no_grad(),
            mock.patch.object(launch, "configuration", configuration),
            mock.patch.object(launch, "run", run_and_time),
        ):
            return self.module(self.maps)


def median_milliseconds(call: Any) -> float:
    """By CUDA events on a GPU; where kernels are interpreted, of one call, which says nothing of their speed."""
    if torch.cuda.is_available():
        return triton.testing.do_bench(call, quantiles=[0.5])
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


def tune(probe: Probe, kernel: str, most: int | None, seconds: float) -> tuple[dict[str, int], float, float]:
    """The fastest configuration that gives the present one's results, its milliseconds and the present one's.

    After `seconds` no further candidate is tried.
    """
    deadline = time.monotonic() + seconds
    present = probe.present[kernel]
    expected = probe.outputs(kernel, present)
    tolerance = 4 * torch.finfo(expected[0].dtype).eps
    timed: list[tuple[float, dict[str, int]]] = []
    for config in console.progress(list(itertools.islice(candidates(kernel, present), most)), desc=kernel, leave=False):
        if timed and time.monotonic() > deadline:
            break
        try:
            outputs = probe.outputs(kernel, config)
        except triton.runtime.errors.OutOfResources:
            continue
        for ours, theirs in zip(outputs, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())
        timed.append((probe.milliseconds(kernel, config), config))
    best, config = min(timed, key=lambda pair: pair[0])
    return config, best, timed[0][0]


def write(kernel: str, conditions: dict[str, Any], config: dict[str, int], path: Path) -> None:
    """Put a measured row before all others of a kernel, in place of an earlier one of the same conditions."""
    table = json.loads(path.read_text())
    rows = [row for row in table[kernel]["rows"] if row.get("if") != conditions]
    table[kernel]["rows"] = [{"if": conditions, "then": config}, *rows]
    path.write_text(rendered(table))


def rendered(table: dict[str, dict[str, Any]]) -> str:
    """The table as JSON, one row a line."""
    kernels = []
    for name, entry in table.items():
        rows = ",\n".join(f"      {json.dumps(row)}" for row in entry["rows"])
        kernels.append(f'  "{name}": {{\n    "size": {json.dumps(entry["size"])},\n    "rows": [\n{rows}\n    ]\n  }}')
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks tune",
        description="Tries the candidate configurations of every kernel at the paper's sizes, each checked against the "
        "present one's results first, and writes the fastest into dca_kernels/configurations.json for this GPU, each "
        "kernel when it is done.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--kernel", nargs="+", choices=CANDIDATES, default=list(CANDIDATES), help="what to tune")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="of the maps")
    parser.add_argument("--batch", type=int, default=8, metavar="B", help="tiles in a batch")
    parser.add_argument("--size", choices=cases.SIZES, default="paper", help="channels and grid")
    parser.add_argument("--most", type=int, metavar="N", help="at most N candidates a kernel")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for all kernels, in equal shares")
    parser.add_argument("--table", type=Path, default=TABLE, metavar="FILE", help="the table that is written")
    chosen = parser.parse_args(arguments)
    device, dtype = measure.device(), getattr(torch, chosen.dtype)
    image, size = cases.load_image(None), cases.SIZES[chosen.size]
    share = chosen.seconds / len(chosen.kernel)
    for kernel in chosen.kernel:
        module = cases.modules(size.patch, dtype, device, size.features)["fused"]
        module.backend = "triton"
        module.train(kernel in ("patch_embed_train", "batch_statistics"))
        maps = cases.skip_maps(image, chosen.batch, size.patch, dtype, device, size.features)
        if kernel == "upsample_channels_last":
            maps = [x.contiguous(memory_format=torch.channels_last) for x in maps]
        probe = Probe(module, maps)
        config, best, present = tune(probe, kernel, chosen.most, share)
        conditions = {
            "architecture": [launch.architecture(device)],
            "dtype": [chosen.dtype],
            "max_size": probe.sizes[kernel],
        }
        write(kernel, conditions, config, chosen.table)
        print(f"{kernel}: {present:.4f} ms -> {best:.4f} ms, {config}", flush=True)
    return 0
