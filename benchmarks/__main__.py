"""`python -m benchmarks [COMMAND] ...`: see COMMANDS; without one, the main job."""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "quick": "the main job: reference and fused module on a real image",
    "run": "any selection of cases, sizes, modes and providers",
    "compare": "two runs: what got faster, what slower",
    "report": "tables and figures of committed results",
    "gpu": "what a GPU can say, in steps that fit into the minutes given",
    "smoke": "whether the kernels are right on this machine",
    "kernels": "the time of every kernel, beside its floor",
    "compile": "kernels ahead, in parallel and without a GPU",
    "tune": "the kernels' configurations for this GPU",
    "calibrate": "the machine's copy and product rates",
    "determinism": "whether results are the same bits every time",
    "offline": "what can be known of the kernels without a GPU",
    "host": "what a call costs the host, without a GPU",
}


def main(arguments: Sequence[str]) -> int:
    if list(arguments) in (["-h"], ["--help"]):
        width = max(map(len, COMMANDS))
        print("python -m benchmarks COMMAND --help; without a command, quick:\n")
        print("\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items()))
        return 0
    command, rest = ("quick", list(arguments))
    if rest and rest[0] in COMMANDS:
        command, *rest = rest
    return importlib.import_module(f"benchmarks.{command}").main(rest)  # what one needs, the others may lack


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
