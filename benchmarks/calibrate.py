"""What the machine can do: rates of a copy and of large products, and what launches cost. Floors are made of these."""

import functools
import json
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from benchmarks import cases, command, environment, measure

Rates = dict[str, float]


@functools.cache
def rates(dtype: torch.dtype, small: bool = False) -> Rates:
    """Bytes a second of a copy (read and written both count), and operations a second of a large matrix product.

    float32 products on a GPU are the faster of PyTorch's own and of three tf32 products, which are as exact.
    """
    device = measure.device()
    gpu = device.type == "cuda"
    count = 2**20 if small else 2**28 if gpu else 2**25
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / _median_seconds(lambda: target.copy_(source))
    side = 128 if small else 8192 if gpu else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    flops = 2 * side**3
    matmul = flops / _median_seconds(lambda: a @ b)
    if gpu and dtype == torch.float32:
        present = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        matmul = max(matmul, flops / _median_seconds(lambda: a @ b) / 3)
        torch.set_float32_matmul_precision(present)
    return {"copy_bytes_s": copy, "matmul_flop_s": matmul}


def overheads() -> Rates:
    """On a GPU, microseconds: of the host to launch a small kernel, and of the GPU for each one of a replayed graph."""
    if not torch.cuda.is_available():
        return {}
    x, count = torch.zeros(1, device="cuda"), 1000

    def kernels() -> None:
        for _ in range(count):
            x.add_(1)

    kernels()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    kernels()
    launch = (time.perf_counter() - begin) / count
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels()
    return {"launch_us": launch * 1e6, "graph_kernel_us": _median_seconds(graph.replay) / count * 1e6}


def _median_seconds(call: Callable[[], object]) -> float:
    call()
    rounds = measure.rounds_for(measure.seconds(call), 0.2)
    return float(np.median([measure.seconds(call) for _ in range(min(rounds, 20))]))


def main(arguments: Sequence[str]) -> int:
    parser = command.parser(
        "calibrate",
        "Measures the machine's copy rate, its matrix product rates, and on a GPU what a launch costs. Runs on a CPU "
        "too.",
        "",
        "--out rates.json",
    )
    parser.add_argument(
        "--out", type=command.file, metavar="FILE", help="file that the numbers are written to, as JSON"
    )
    parser.add_argument("--small", action="store_true", help="small arrays: for tests, the numbers mean nothing")
    chosen = parser.parse_args(arguments)
    found: dict[str, object] = {"environment": environment.environment()}
    for name, dtype in cases.DTYPES.items():
        if measure.device().type == "cpu" and name == "float16":
            print(f"{name}: not run: slow on a CPU, and nothing here needs it")
            continue
        of_dtype = rates(dtype, chosen.small)
        found[name] = of_dtype
        copied, products = of_dtype["copy_bytes_s"], of_dtype["matmul_flop_s"]
        print(f"{name}: copy {copied / 1e9:.0f} GB/s, products {products / 1e12:.2f} TFLOP/s", flush=True)
    found["overheads"] = overheads()
    print(f"overheads: {found['overheads'] or 'not run: no GPU'}")
    if chosen.out is not None:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0
