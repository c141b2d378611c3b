"""`python -m benchmarks offline`: every kernel is compiled for every target, and its machine code is read."""

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm
from triton.runtime.jit import ConstexprFunction, JITFunction

import dca_kernels
from benchmarks import cases, command
from benchmarks.offline import stand_in
from benchmarks.rows import RESULTS
from dca_kernels.triton_backend import launch

Row = dict[str, Any]

OFFLINE = RESULTS / "offline"


@dataclass(frozen=True)
class Case:
    """A forward of the paper's module whose launches are compiled, in training with its backward."""

    name: str
    dtype: torch.dtype = torch.bfloat16
    batch: int = 8
    train: bool = False
    channels_last: bool = False
    products: str = "ieee"  # of float32: torch.backends.cuda.matmul.fp32_precision
    side: int = 224  # of the largest map; with windows of 10 pixels programs cannot have rows of them


CASES = (
    Case("eval", torch.bfloat16),
    Case("train", torch.bfloat16, train=True),
    Case("eval, batch 1", torch.bfloat16, batch=1),
    Case("train, batch 1", torch.bfloat16, batch=1, train=True),
    Case("train, any windows", torch.bfloat16, train=True, side=280),
    Case("train, channels_last", torch.float16, train=True, channels_last=True),
    Case("eval", torch.float32),
    Case("train", torch.float32, train=True),
    Case("train, high", torch.float32, train=True, products="tf32"),
    Case("train, any windows", torch.float32, train=True, side=280),
    Case("eval", torch.float64),
    Case("train", torch.float64, train=True),
)


@dataclass
class Launch:
    """One launch as Triton's JIT was asked for it: a kernel, its grid, and all arguments, options among them."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__.removeprefix("_").removesuffix("_kernel")

    @property
    def options(self) -> dict[str, Any]:
        """What is no argument of the kernel: warps, stages and what else the compiler is told."""
        return {name: value for name, value in self.arguments.items() if name not in self.kernel.arg_names}

    def compile(self) -> Any:
        """As the launch itself would, by the JIT's own binder, for the target that is stood in for."""
        return self.kernel.run(grid=self.grid, warmup=True, **self.arguments)


def launches_of(module: nn.Module, maps: Sequence[Tensor], backward: bool, target: str) -> list[Launch]:
    """Those of a forward, or of a forward and backward, on a target; none of them runs."""
    launches: list[Launch] = []

    def keep(kernel: JITFunction, *, grid: tuple[int, ...], warmup: bool, **arguments: Any) -> None:
        if not warmup:
            launches.append(Launch(kernel, grid, arguments))

    module.requires_grad_(backward)
    with mock.patch.object(JITFunction, "run", keep), stand_in.standing_in(target):
        outs = module([x.requires_grad_(backward) for x in maps])
        if backward:
            torch.autograd.backward(outs, [torch.empty_like(y) for y in outs])
    return launches


def record(case: Case, target: str) -> list[Launch]:
    """The launches of one forward of the paper's module, in training of a whole step."""
    size = cases.SIZES["paper"]
    module = dca_kernels.DCA(size.features, patch=size.patch, backend="triton").to(case.dtype).train(case.train)
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    sides = [case.side >> i for i in range(len(size.features))]
    maps = [
        torch.empty(case.batch, c, side, side, dtype=case.dtype, memory_format=layout)
        for c, side in zip(size.features, sides, strict=True)
    ]
    with mock.patch.object(launch, "float32_products", lambda: case.products):
        return launches_of(module, maps, case.train, target)


def specialised(one: Launch) -> list[str]:
    """What the JIT compiles a launch for: types, constants, what it knows of the arguments, options."""
    found: list[str] = []

    def keep(**asked: Any) -> bool:
        found.extend(str(asked["compile"][part]) for part in ("signature", "constants", "configs"))
        return True  # do not compile it

    with mock.patch.object(triton.knobs.runtime, "jit_cache_hook", keep):
        one.compile()
    return [*found, str(one.options)]


def digest(one: Launch) -> str:
    """Changes with what the machine code depends on alone: the kernel's statements and what they are compiled for."""
    return hashlib.sha256("\0".join([*code_of(one.kernel), *specialised(one)]).encode()).hexdigest()[:16]


@functools.cache
def code_of(kernel: JITFunction) -> list[str]:
    """The statements of a kernel and of every function of this package that it reaches, and the constants they name."""
    found: dict[tuple[str, str], str] = {}  # two modules may have functions, or constants, of one name
    waiting: list[Any] = [kernel]
    while waiting:
        function = waiting.pop()
        its = function.fn.__qualname__, function.fn.__module__
        if its in found or not function.fn.__module__.startswith("dca_kernels"):
            continue
        found[its] = code = statements(function.fn)
        names = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
        known = {name: function.fn.__globals__.get(name) for name in names}
        waiting += [f for f in known.values() if isinstance(f, (JITFunction, ConstexprFunction))]
        constants = {name: str(x.value) for name, x in known.items() if isinstance(x, triton.language.constexpr)}
        found |= {(name, value): value for name, value in constants.items()}
    return [found[name] for name in sorted(found)]


def statements(function: Callable[..., Any]) -> str:
    """Its code without comments and docstring: another word there is the same machine code."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    if ast.get_docstring(definition) is not None:
        del definition.body[0]
    return ast.unparse(definition)


@functools.cache
def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def resources(compiled: Any) -> dict[str, int]:
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


def disassembled(compiled: Any) -> str:
    """NVIDIA's machine code with the lines of the source that it comes from."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [_tool("nvdisasm"), "-g", "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


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


def _as_json(value: Any) -> Any:
    """As it is read again."""
    return list(value) if isinstance(value, tuple) else value


def row(case: Case, target: str, one: Launch) -> Row:
    """One line of the table."""
    with stand_in.standing_in(target):
        its_digest = digest(one)  # first: what is compiled already is not looked up again
        found = resources(one.compile())
    return {
        "kernel": one.name,
        "case": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "target": target,
        "config": {name.lower(): _as_json(value) for name, value in one.arguments.items() if name.startswith("BLOCK")}
        | one.options,
        "digest": its_digest,
        **found,
        "shared_limit": stand_in.TARGETS[target].shared_limit,
    }


def plan(targets: Sequence[str]) -> dict[tuple[str, str], tuple[Case, str, int]]:
    """Case, target and number of every launch that differs from the others, under its target and digest."""
    jobs: dict[tuple[str, str], tuple[Case, str, int]] = {}
    for target in targets:
        with stand_in.standing_in(target):
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
            f"{max(r['shared'] for r in group) / 1024:.0f} of {stand_in.TARGETS[target].shared_limit / 1024:.0f}",
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
    parser = command.parser(
        "offline",
        "Compiles every kernel for GPUs that need not be there and reads registers, spills, shared memory and "
        "instructions from the machine code; then counts launches, bytes and operations of a forward and of a training "
        "step in Triton's interpreter, and models each kernel's time by that. Nothing is timed. What is in the table "
        "already and has not changed is not compiled again; all of it takes about half an hour on two cores.",
        "",
        "--target sm_90 --out build/offline",
    )
    parser.add_argument(
        "--target",
        nargs="+",
        choices=stand_in.TARGETS,
        default=list(stand_in.TARGETS),
        help=command.listed(stand_in.EXAMPLES),
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=OFFLINE,
        metavar="FOLDER",
        help="folder that machine_code.json, traffic.json and model.json are written to",
    )
    chosen = parser.parse_args(arguments)
    reason = stand_in.why_not_compiled()
    if reason is not None:
        return command.not_run("offline", reason, "unset it")
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

    traffic = [sys.executable, "-m", "benchmarks.offline.traffic", "--json", str(chosen.out / "traffic.json")]
    model = [sys.executable, "-m", "benchmarks", "model", "--json", str(chosen.out / "model.json")]
    counting = subprocess.run(traffic, env=os.environ | {"TRITON_INTERPRET": "1"}).returncode
    return counting or subprocess.run(model).returncode
