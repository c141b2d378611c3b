"""What can be known of the kernels without a GPU: each is compiled for every target, and its machine code is read."""

import argparse
import ast
import concurrent.futures
import functools
import hashlib
import inspect
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import ConstexprFunction, JITFunction

import dca_kernels
from dca_kernels import backends, launch

Row = dict[str, Any]

RESULTS = Path(__file__).parent / "results" / "offline"

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 166912, "sm_86": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}  # bytes a program


PAPER, WIDE = (32, 64, 128, 256), (64, 128, 256, 512)


@dataclass(frozen=True)
class Case:
    """A forward whose launches are compiled: the paper's module, unless it says otherwise."""

    name: str
    dtype: torch.dtype = torch.bfloat16
    features: tuple[int, ...] = PAPER
    train: bool = False
    channels_last: bool = False
    precision: str = "highest"  # of float32 products: torch.set_float32_matmul_precision
    channel_att: bool = True
    n: int = 1


CASES = (
    Case("eval", torch.float32),
    Case("train", torch.float32, train=True),
    Case("train, high", torch.float32, train=True, precision="high"),
    Case("eval", torch.bfloat16),
    Case("train", torch.bfloat16, train=True),
)


@dataclass
class Launch:
    """One recorded launch: the kernel, its arguments and its configuration."""

    kernel: Any
    programs: int
    config: dict[str, int]
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__.removeprefix("_").removesuffix("_kernel")


def record(case: Case, target: str, batch: int = 8) -> list[Launch]:
    """The launches of one forward, in training of a whole step; none of them runs."""
    launches: list[Launch] = []

    def keep(kernel: Any, programs: int, config: dict[str, int], **arguments: Any) -> None:
        launches.append(Launch(kernel, programs, config, arguments))

    module = dca_kernels.DCA(case.features, channel_att=case.channel_att, n=case.n, backend="triton")
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    maps = [
        torch.empty(batch, c, side, side, dtype=case.dtype, memory_format=layout)
        for c, side in zip(case.features, (224, 112, 56, 28), strict=True)
    ]
    with (
        mock.patch.object(torch, "get_float32_matmul_precision", lambda: case.precision),
        mock.patch.object(backends, "why_not", lambda name, device: None),
        mock.patch.object(launch, "run", keep),
        mock.patch.object(launch, "architecture", lambda device: target),
    ):
        module.to(case.dtype).train(case.train).requires_grad_(case.train)
        outs = module([x.requires_grad_(case.train) for x in maps])
        if case.train:
            torch.autograd.backward(outs, [torch.empty_like(y) for y in outs])
    return launches


def describe(one: Launch) -> tuple[dict[str, Any], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """Types, constants and divisibility of a launch's arguments, as `kernel[grid](...)` specialises on them."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def type_of(value: Any, path: tuple[int, ...], constant: bool) -> Any:
        if isinstance(value, tuple):
            return tuple(type_of(v, (*path, i), constant) for i, v in enumerate(value))
        if constant or value is None or (isinstance(value, int) and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return "*" + _TYPES[value.dtype]
        if value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32"

    for i, parameter in enumerate(one.kernel.params):
        signature[parameter.name] = type_of(one.arguments[parameter.name], (i,), parameter.is_constexpr)
    return signature, constants, attributes


def compile_launch(one: Launch, target: str) -> Any:
    """What `kernel[grid](...)` would compile on the target."""
    signature, constants, attributes = describe(one)
    source = ASTSource(fn=one.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": one.config["num_warps"], "num_stages": one.config["num_stages"], "enable_fp_fusion": True}
    return triton.compile(source, target=TARGETS[target], options=options)


def digest(one: Launch) -> str:
    """Changes with all that the machine code depends on: the kernel's code, types, constants and configuration."""
    described = [str(part) for part in describe(one)]
    return hashlib.sha256("\0".join([*_code(one.kernel), *described, str(one.config)]).encode()).hexdigest()[:16]


@functools.cache
def _code(kernel: JITFunction) -> list[str]:
    """The source of a kernel, and of every function of this package that it reaches."""
    found: dict[str, str] = {}
    waiting: list[Any] = [kernel]
    while waiting:
        function = waiting.pop()
        source = textwrap.dedent(inspect.getsource(function.fn))
        if function.fn.__qualname__ in found or not function.fn.__module__.startswith("dca_kernels"):
            continue
        found[function.fn.__qualname__] = source
        names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
        known = (function.fn.__globals__.get(name) for name in names)
        waiting += [f for f in known if isinstance(f, (JITFunction, ConstexprFunction))]
    return [found[name] for name in sorted(found)]


_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
}


@functools.cache
def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def resources(compiled: Any, target: str) -> dict[str, int]:
    """Registers a thread, spilled bytes, shared memory in bytes, and counts of instructions in the machine code."""
    if "cubin" not in compiled.asm:
        return _amd_resources(compiled)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([_tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True).stdout
        code = subprocess.run(
            [_tool("cuobjdump"), "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
    count = functools.partial(_count, code)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spilled": int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        "tensor_core": count(r"\b(HGMMA|HMMA|UTC\w*MMA|DMMA|QGMMA|IMMA)"),
        "loads_128": count(r"\b(LDG\.E\S*\.128|LDGSTS\S*\.128|UTMALDG)"),
        "stores_128": count(r"\bSTG\.E\S*\.128"),
        "local_memory": count(r"\b(LDL|STL)\b"),
        "atomics": count(r"\b(RED|ATOM|ATOMG)\b"),
    }


def _amd_resources(compiled: Any) -> dict[str, int]:
    code = compiled.asm["amdgcn"]
    count = functools.partial(_count, code)
    return {
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", code)[1]),
        "spilled": 4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", code)[1]),
        "shared": compiled.metadata.shared,
        "tensor_core": count(r"\bv_mfma_"),
        "loads_128": count(r"\b(global|buffer|flat)_load_dwordx4"),
        "stores_128": count(r"\b(global|buffer|flat)_store_dwordx4"),
        "local_memory": count(r"\bscratch_(load|store)"),
        "atomics": count(r"\b(global|buffer|flat)_atomic_"),
    }


def _count(code: str, pattern: str) -> int:
    return len(re.findall(pattern, code))


def row(case: Case, target: str, one: Launch) -> Row:
    """One line of the table."""
    return {
        "kernel": one.name,
        "case": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "target": target,
        "config": one.config,
        "digest": digest(one),
        **resources(compile_launch(one, target), target),
        "shared_limit": SHARED_LIMIT[target],
    }


def plan(targets: Sequence[str]) -> dict[tuple[str, str], tuple[Case, str, int]]:
    """Case, target and number of every launch that differs from the others, under its target and digest."""
    jobs: dict[tuple[str, str], tuple[Case, str, int]] = {}
    for target in targets:
        for case in CASES:
            for i, one in enumerate(record(case, target)):
                jobs.setdefault((target, digest(one)), (case, target, i))
    return jobs


def _row(case: Case, target: str, i: int) -> Row:
    return row(case, target, record(case, target)[i])


def table(rows: Sequence[Row]) -> str:
    """One line a kernel and target, as GitHub Markdown: the worst of its cases."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for one in rows:
        groups.setdefault((one["kernel"], one["target"]), []).append(one)
    lines = [
        [
            kernel,
            target,
            len(group),
            max(r["registers"] for r in group),
            max(r["spilled"] for r in group),
            f"{max(r['shared'] for r in group) / 1024:.0f} of {SHARED_LIMIT[target] / 1024:.0f}",
            f"{min(r['loads_128'] for r in group)} / {min(r['stores_128'] for r in group)}",
            min(r["tensor_core"] for r in group),
            sum(r["atomics"] for r in group),
        ]
        for (kernel, target), group in groups.items()
    ]
    headers = [
        "kernel",
        "target",
        "cases",
        "registers",
        "spilled bytes",
        "shared KiB",
        "128-bit loads / stores",
        "tensor core",
        "atomics",
    ]
    return tabulate(lines, headers, tablefmt="github")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks offline",
        description="Compiles every kernel for GPUs that need not be there and reads registers, spills, shared memory "
        "and instructions from the machine code; then counts launches, bytes and operations of a forward and of a "
        "training step in Triton's interpreter. Nothing is timed. What is in the table already and has not changed is "
        "not compiled again; all of it takes about half an hour on two cores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS), help="what to compile for")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="where the two row files go")
    chosen = parser.parse_args(arguments)
    chosen.out.mkdir(parents=True, exist_ok=True)

    path = chosen.out / "machine_code.json"
    earlier = json.loads(path.read_text()) if path.exists() else {"triton": None, "rows": []}
    known = {(r["target"], r["digest"]): r for r in earlier["rows"] if earlier["triton"] == triton.__version__}
    jobs = plan(chosen.target)
    spawn = multiprocessing.get_context("spawn")  # a forked child would wait for the threads of its parent
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
        futures = {key: pool.submit(_row, *job) for key, job in jobs.items() if key not in known}
        for done in tqdm(concurrent.futures.as_completed(futures.values()), total=len(futures), desc="compiling"):
            one = done.result()
            known[one["target"], one["digest"]] = one
            rows = [known[key] for key in jobs if key in known]  # what is done is kept where the rest is not
            path.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n")
    rows = [known[key] for key in jobs]
    print(f"\nMachine code by triton {triton.__version__}; the worst of each kernel's cases:\n\n{table(rows)}\n")

    traffic = [sys.executable, "-m", "benchmarks.traffic", "--json", str(chosen.out / "traffic.json")]
    return subprocess.run(traffic, env=os.environ | {"TRITON_INTERPRET": "1"}).returncode
