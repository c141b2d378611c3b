"""The main job: reference and fused Dual Cross-Attention on the skip maps of a real image."""

import argparse
import sys
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import cases, measure, parity, report

RESULTS = Path(__file__).parent / "results" / "latest"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Runs a U-Net encoder over tiles of a real image and feeds its four skip maps to the reference and to "
        "the fused Dual Cross-Attention, with the same weights. Checks both against float64, then measures latency and "
        "peak memory. Exit status 1 means that the fused module is not within its error budget.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], metavar="B", help="tiles in a batch")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of maps and weights")
    parser.add_argument("--image", type=Path, metavar="FILE", help="your own image instead of the bundled tissue slide")
    parser.add_argument("--patch", type=int, default=28, metavar="P", help="side of the token grid; tiles have 8 P pixels")
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


def main() -> int:
    chosen = arguments()
    try:
        image = cases.load_image(chosen.image)
    except (OSError, ValueError) as error:
        print(f"--image: {error}", file=sys.stderr)
        return 2
    dtype, device, environment = DTYPES[chosen.dtype], measure.device(), measure.environment()
    print(f"image: {chosen.image or 'immunohistochemistry slide of scikit-image'}, {image.shape[0]} x {image.shape[1]}")
    print("environment: " + ", ".join(f"{key} {value}" for key, value in environment.items() if value is not None))

    modules = cases.modules(chosen.patch, dtype, device)
    compiled, reason = None, None
    if chosen.quick:
        reason = "--quick"
    elif device.type == "cpu" and measure.compiler() is None:
        reason = "torch.compile needs a C++ compiler"
    else:
        compiled = torch.compile(modules["reference"])
    rows: list[report.Row] = []
    every_parity = True
    runs = [(mode, batch) for mode in chosen.mode for batch in chosen.batch]
    for mode, batch in runs:
        training = mode == "train"
        rounds = 5 if chosen.quick else 9 if training else 21
        calls = {name: module.train(training) for name, module in modules.items()}
        if compiled is not None and not training:
            calls["reference compiled"] = compiled
        progress = tqdm(total=1 + rounds + len(modules), desc=f"{mode}, batch {batch}: parity", leave=False)
        maps = cases.skip_maps(image, batch, chosen.patch, dtype, device)
        gradients = cases.upstream(maps) if training else None
        errors, well = parity.check(modules, maps, training)
        every_parity = every_parity and well
        progress.update()

        times: dict[str, list[float]] = {}
        if well:
            progress.set_description(f"{mode}, batch {batch}: latency")
            thunks = {name: (lambda m=module: cases.step(m, maps, gradients)) for name, module in calls.items()}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler's hints about its own speed
                for times in measure.latency(thunks, rounds):
                    progress.update()
        for name in calls:
            progress.set_description(f"{mode}, batch {batch}: memory of {name}")
            error = errors.get(name)
            row: report.Row = {"case": "dca", "provider": name, "mode": mode, "batch": batch, "patch": chosen.patch}
            row |= {"dtype": chosen.dtype, "parity": well, "rounds": rounds}
            row |= {"max_error": error.largest if error else None, "rms_error": error.rms if error else None}
            row |= measure.percentiles(times[name]) if well else dict.fromkeys(("p20_ms", "p50_ms", "p80_ms"))
            row["peak_mb"] = None
            if well and name in modules:
                row["peak_mb"] = measure.peak_memory(name, image, batch, chosen.patch, dtype, training)
                progress.update()
            rows.append(row | {"environment": environment})
        progress.close()

    print()
    print(report.table(rows))
    print()
    if reason:
        print(f"reference compiled: not run ({reason})")
    report.save(rows, chosen.json)
    report.plot(rows, chosen.plot)
    print(f"rows: {chosen.json}\nfigure: {chosen.plot}")
    if not every_parity:
        print("parity: FAILED. The fused module is outside its error budget; nothing was timed where it is.")
        return 1
    print("parity: within the error budget everywhere")
    for row in (row for row in rows if row["provider"] == "fused"):
        base = report.baseline(rows, row)
        print(
            f"{report.title(row)}: {base['p50_ms'] / row['p50_ms']:.2f}x the reference's speed, "
            f"{row['peak_mb'] / base['peak_mb']:.2f} of its memory"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
