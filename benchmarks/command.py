"""What all commands share: parser, numbers, what the choices are, and how a command says that it cannot run."""

import argparse
import math
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks import cases
from benchmarks.providers import EAGER, IMPLEMENTATIONS

NOT_RUN = 2  # exit status, as argparse's of a wrong option


class Help(argparse.RawDescriptionHelpFormatter):
    """Examples keep their lines, and a default is shown where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.help is None or action.default in (None, False, argparse.SUPPRESS):
            return action.help
        default = action.default if isinstance(action.default, list) else [action.default]
        every = action.choices is not None and default == list(action.choices)
        words = "all" if every else shlex.join(map(str, default))
        return f"{action.help} (default: {words.replace('%', '%%')})"


def parser(name: str, description: str, *examples: str, more: str = "") -> argparse.ArgumentParser:
    """Of `python -m benchmarks NAME`, whose help ends with examples: the arguments alone, then perhaps `# why`."""
    prog = f"python -m benchmarks {name}"
    lines = "\n".join(f"  {prog} {example}".rstrip() for example in examples)
    return argparse.ArgumentParser(
        prog=prog,
        description=textwrap.fill(description, shutil.get_terminal_size().columns - 2),
        epilog=f"{more}\n\nexamples:\n{lines}".strip(),
        formatter_class=Help,
    )


def positive_integer(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return value


def positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def file(text: str) -> Path:
    """Of what is written: where it is not there yet, with the folders that it needs."""
    path = Path(text)
    if path.is_dir() or any(parent.is_file() for parent in path.parents):
        raise argparse.ArgumentTypeError(f"expected a file that can be written, got {text!r}")
    return path


def not_run(name: str, reason: str, instead: str) -> int:
    """Says on stderr why a command is not run and what can be done instead; its exit status."""
    print(f"{name}: not run: {reason}; {instead}", file=sys.stderr)
    return NOT_RUN


def interpreted(*steps: str) -> str:
    """What can be done instead of a command that needs a GPU: these steps of `gpu`, or all."""
    chosen = " ".join(["--dry-run", *(["--steps", *steps] if steps else [])])
    return f"`python -m benchmarks gpu {chosen}` runs it, tiny, in Triton's interpreter"


# What each choice is, for `--help`.


def listed(choices: Mapping[str, str]) -> str:
    return "; ".join(f"{name} = {what}" for name, what in choices.items())


CASES = {
    "patch_embed": "maps to tokens",
    "channel_attention": "attention of channels",
    "spatial_attention": "attention of tokens",
    "upsample": "tokens to maps",
    "dca": "the module, all four of these stages",
    ", ".join(cases.HOSTS): "whole networks",
}
PHASES = {
    "eval": "evaluation, a forward that keeps nothing for a backward",
    "train": "training, BatchNorm takes the batch's statistics and a backward follows",
}
MODES = {"forward": "a forward", "backward": "a backward, in training", "full": "both, in training"}
PROVIDERS = {name: IMPLEMENTATIONS[name].says for name in (*EAGER, "without")} | {
    '"NAME compiled"': "by torch.compile",
    '"reference max-autotune"': "by torch.compile, which tries many kernels",
    '"NAME graph"': "replayed as a CUDA graph, compiled or not",
}


def sizes(names: Iterable[str] = cases.SIZES) -> str:
    """Channels of the maps and the grid of tokens of each size."""
    return listed(
        {
            name: f"{' '.join(map(str, size.features))} channels, {size.patch} x {size.patch} tokens"
            for name, size in cases.SIZES.items()
            if name in names
        }
    )


DTYPE = f"dtype of maps and weights: {', '.join(cases.DTYPES)}"
BATCH = "images in a batch"
JOURNAL = "file that results are added to as soon as they are there, a line of JSON each"
