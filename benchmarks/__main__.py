"""`python -m benchmarks [COMMAND] ...`: see COMMANDS; without one, the main job."""

import importlib
import sys
from collections.abc import Sequence

from benchmarks import STOPPED

COMMANDS = {
    "quick": "compares reference and fused module on a real image, in minutes: the main job",
    "run": "times any selection of cases, sizes, modes and providers",
    "compare": "says what got faster and what slower between two runs",
    "report": "writes tables and figures of rows that were measured",
    "gpu": "needs a GPU: does the steps below, as many as fit into the minutes given",
    "smoke": "needs a GPU: checks whether the kernels are right",
    "kernels": "needs a GPU: times every kernel, beside its floor",
    "tune": "needs a GPU: finds the kernels' fastest configurations",
    "determinism": "checks whether results are the same bits every time",
    "calibrate": "measures the machine's rates of copies and of products",
    "compile": "compiles the kernels ahead, without a GPU",
    "offline": "reads the kernels' machine code and counts their bytes, without a GPU",
    "model": "estimates the time of every kernel, and says why, without a GPU",
    "host": "times what a call costs the host, without a GPU",
}
MODULES = {
    "compile": "offline.compile",
    "offline": "offline.machine_code",
    "model": "offline.model",
}  # of commands that are not called as theirs


def main(arguments: Sequence[str]) -> int:
    if list(arguments) in (["-h"], ["--help"]):
        width = max(map(len, COMMANDS))
        print("usage: python -m benchmarks [COMMAND] [OPTIONS]; without a command, quick\n")
        print("\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items()))
        print("\nexample: python -m benchmarks run --help")
        return 0
    command, rest = ("quick", list(arguments))
    if rest and not rest[0].startswith("-"):
        command, *rest = rest
    if command not in COMMANDS:
        print(f"expected a command: {', '.join(COMMANDS)}, got {command!r}", file=sys.stderr)
        return 2
    try:
        return perform(command, rest)
    except KeyboardInterrupt:
        print(f"\nstopped{'; the same command goes on' if command == 'run' else ''}", file=sys.stderr)
        return STOPPED


def perform(command: str, arguments: Sequence[str]) -> int:
    """A command's exit status."""
    name = MODULES.get(command, command)
    try:
        module = importlib.import_module(f"benchmarks.{name}")  # what one needs, the others may lack
    except ModuleNotFoundError as error:
        print(f"{command}: not run: {error.name} is not installed; install it first", file=sys.stderr)
        return 2
    return module.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
