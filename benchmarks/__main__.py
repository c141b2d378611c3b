"""The main job: reference and fused Dual Cross-Attention on the skip maps of a real image."""

import argparse
import functools
import importlib
import sys
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from benchmarks import cases, measure, parity, report

COMPILED = "reference compiled"
RESULTS = Path(__file__).parent / "results" / "latest"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Runs a U-Net encoder over tiles of a real image and feeds its four skip maps to the reference and "
        "to the fused Dual Cross-Attention, with the same weights. Checks both against float64, then measures latency "
        "and peak memory. Exit status 1 means that the fused module is not within its error budget. `python -m "
        "benchmarks offline` says what can be known of the GPU kernels without a GPU, `python -m benchmarks tune` "
        "measures their configurations on one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], metavar="B", help="tiles in a batch")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of maps and weights")
    parser.add_argument("--image", type=Path, metavar="FILE", help="your own image instead of the bundled tissue slide")
    parser.add_argument(
        "--patch", type=int, default=28, metavar="P", help="side of the token grid; a tile has 8 P pixels a side"
    )
    parser.add_argument("--mode", nargs="+", choices=["eval", "train"], default=["eval", "train"], help="what to run")
    parser.add_argument("--quick", action="store_true", help="few rounds, one batch, no compiled reference")
    parser.add_argument("--json", type=Path, default=RESULTS / "main.json", metavar="FILE", help="where the rows go")
    parser.add_argument("--plot", type=Path, default=RESULTS / "main.png", metavar="FILE", help="where the figure goes")
    chosen = parser.parse_args()
    if min(*chosen.batch, chosen.patch) < 1:
        parser.error("--batch and --patch: expected integers of at least 1")
    if chosen.quick:
        chosen.batch = chosen.batch[:1]
    return chosen


def run_case(
    chosen: argparse.Namespace, image: np.ndarray, modules: dict[str, nn.Module], mode: str, batch: int
) -> list[report.Row]:
    """The rows of one mode and batch size: parity first, and nothing else where it is red."""
    dtype, training = DTYPES[chosen.dtype], mode == "train"
    rounds = 5 if chosen.quick else 9 if training else 21
    maps = cases.skip_maps(image, batch, chosen.patch, dtype, measure.device())
    gradients = cases.upstream(maps) if training else None
    for module in modules.values():
        module.train(training)
    timed = {name: module for name, module in modules.items() if name != COMPILED or not training}
    weighed = [name for name in timed if name != COMPILED]
    with tqdm(total=1 + rounds + len(weighed), desc=f"{mode}, batch {batch}", leave=False) as progress:
        progress.set_postfix_str("parity")
        errors, well = parity.check({name: modules[name] for name in weighed}, maps, training)
        progress.update()
        times: dict[str, list[float]] = {}
        peaks: dict[str, float] = {}
        if well:
            progress.set_postfix_str("latency")
            calls = {name: functools.partial(cases.step, module, maps, gradients) for name, module in timed.items()}
            for times in measure.latency(calls, rounds):  # noqa: B007  the last round has them all
                progress.update()
            progress.set_postfix_str("memory")
            for name in weighed:
                peaks[name] = measure.peak_memory(name, image, batch, chosen.patch, dtype, training)
                progress.update()
    return [
        {
            "case": "dca",
            "provider": name,
            "mode": mode,
            "batch": batch,
            "patch": chosen.patch,
            "dtype": chosen.dtype,
            "parity": well,
            "max_error": errors[name].largest if name in errors else None,
            "rms_error": errors[name].rms if name in errors else None,
            "rounds": rounds if well else 0,
            **(measure.percentiles(times[name]) if well else dict.fromkeys(("p20_ms", "p50_ms", "p80_ms"))),
            "peak_mb": peaks.get(name),
        }
        for name in timed
    ]


def main() -> int:
    if sys.argv[1:2] in (["offline"], ["tune"]):  # they import triton, which the main job does without
        return importlib.import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:])
    chosen = arguments()
    try:
        image = cases.load_image(chosen.image)
    except (OSError, ValueError) as error:
        print(f"--image: {error}", file=sys.stderr)
        return 2
    environment = measure.environment()
    print(f"image: {chosen.image or 'immunohistochemistry slide of scikit-image'}, {image.shape[0]} x {image.shape[1]}")
    print("environment: " + ", ".join(f"{key} {value}" for key, value in environment.items() if value is not None))

    modules = cases.modules(chosen.patch, DTYPES[chosen.dtype], measure.device())
    if chosen.quick:
        print(f"{COMPILED}: not run, --quick")
    elif measure.device().type == "cpu" and measure.compiler() is None:
        print(f"{COMPILED}: not run, torch.compile needs a C++ compiler")
    else:
        modules[COMPILED] = cast(nn.Module, torch.compile(modules["reference"]))
    rows = []
    for mode in chosen.mode:
        for batch in chosen.batch:
            rows += [row | {"environment": environment} for row in run_case(chosen, image, modules, mode, batch)]

    print(f"\n{report.table(rows)}\n")
    report.save(rows, chosen.json)
    report.plot(rows, chosen.plot)
    print(f"rows: {chosen.json}\nfigure: {chosen.plot}")
    if not all(row["parity"] for row in rows):
        print("parity: FAILED. The fused module is outside its error budget; nothing was timed where it is.")
        return 1
    print("parity: within the error budget everywhere")
    for row in (row for row in rows if row["provider"] == "fused"):
        base = report.baseline(rows, row)
        speed, memory = report.ratio(base["p50_ms"], row["p50_ms"], "x"), report.ratio(row["peak_mb"], base["peak_mb"])
        print(f"{report.title(row)}: {speed} the reference's speed, {memory or '?'} of its memory")
    return 0


if __name__ == "__main__":
    sys.exit(main())
