"""A training run in its folder: claimed, saved after each epoch, and gone on with."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from examples.data import Data
from examples.files import DataError
from examples.network import Plan, alike, load_checkpoint, save_network, write, write_json
from examples.processes import Process, together
from examples.scores import Row

FREE = ("epochs", "out", "restart", "workers")  # arguments that a resumed run may change
INSTEAD = "choose another --out, or --restart, which deletes the old run"


class Run:
    """The history so far, the best score, and the files."""

    def __init__(self, chosen: argparse.Namespace, process: Process) -> None:
        """Look at the folder and read what it holds, before anything else takes time. Nothing is written.

        Raises:
            DataError: it cannot be written to, or holds another run; in every process.
        """
        self.folder, self.process = chosen.out, process
        self.arguments = {k: str(v) for k, v in vars(chosen).items() if k not in FREE} | {
            "processes": str(process.count)
        }
        self.samples: dict[str, list[str]] = {}  # their names
        self.history: list[Row] = []
        self.last, self.best = self.folder / "last.pt", self.folder / "best.pt"
        together(process, lambda: require_writable(self.folder))
        self.state = together(process, lambda: None if chosen.restart else self._read())

    def _read(self) -> dict[str, Any] | None:
        """The state at the end of the last epoch that was saved, if any was."""
        if not self.last.exists():
            return None
        state = load_checkpoint(self.last, ("arguments", "samples", "history", "model", "optimizer"))
        if not _is_run(state):
            raise DataError(f"{self.last}: expected the arguments and the history of a run, got other values")
        for name, value in self.arguments.items():
            if value != state["arguments"].get(name):
                raise DataError(
                    f"{self.last}: expected a run with {name} {value}, got {state['arguments'].get(name, 'no such')}: "
                    f"{INSTEAD}"
                )
        return state

    @property
    def best_row(self) -> Row:
        return max(self.history, key=lambda row: row["dice"] if row["dice"] == row["dice"] else -1)

    def begin(self, network: nn.Module, optimizer: torch.optim.Optimizer, data: Data) -> None:
        """Make the folder, and go back to what was read of it. A run that is begun anew loses the old one here.

        Raises:
            DataError: the folder holds a run of other samples, or of other states; in every process.
        """
        self.samples = {"train": [s.name for s in data.train], "validation": [s.name for s in data.validation]}
        together(self.process, self._require_samples)
        if self.process.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.state is None:
                self.last.unlink(missing_ok=True)
        if self.state is None:
            return
        state, expected = (self.state["model"], self.state["optimizer"]), self._states(network, optimizer)
        together(self.process, lambda: self._require_alike(state, expected))
        options = StateDictOptions(full_state_dict=True)
        set_state_dict(network, optimizer, model_state_dict=state[0], optim_state_dict=state[1], options=options)
        self.history, self.state = self.state["history"], None

    def _require_samples(self) -> None:
        """One that was trained on would be validated on: the split is drawn from all samples that there are."""
        if self.state is not None and self.state["samples"] != self.samples:
            train, validation = (len(names) for names in self.samples.values())
            raise DataError(
                f"{self.last}: expected a run of the samples that are there, {train} to train on and {validation} to "
                f"validate on, got others: {INSTEAD}"
            )

    def _states(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
        """The whole states of both, in the first process; every process takes part."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_state_dict(network, optimizer, options=options)

    def _require_alike(self, state: Any, expected: Any) -> None:
        if self.process.first and not alike(state, expected):
            raise DataError(f"{self.last}: expected the states of this network and its optimizer, got other ones")

    def save(self, network: nn.Module, optimizer: torch.optim.Optimizer, row: Row, plan: Plan) -> None:
        """Write the state at the end of an epoch; every process takes part, the first writes."""
        model, optimizer_state = self._states(network, optimizer)
        self.history.append(row)
        if not self.process.first:
            return
        if self.best_row is row:
            save_network(self.best, plan, model)
        state = {"arguments": self.arguments, "samples": self.samples, "history": self.history}
        state |= {"model": model, "optimizer": optimizer_state}
        write(self.last, lambda path: torch.save(state, path))
        write_json(self.folder / "history.json", self.history)


def _is_run(state: dict[str, Any]) -> bool:
    """Whether the arguments and the history in a file are as `Run` has them."""
    arguments, history = state["arguments"], state["history"]
    return (
        isinstance(arguments, dict)
        and all(isinstance(value, str) for value in arguments.values())
        and isinstance(history, list)
        and all(isinstance(row, dict) and _is_row(row) for row in history)
    )


def _is_row(row: Row) -> bool:
    scores = [row.get(name) for name in ("loss", "rate", "dice", "iou")]
    for name in ("dice of", "iou of"):
        of_classes = row.get(name)
        scores += of_classes.values() if isinstance(of_classes, dict) else [None]
    return isinstance(row.get("epoch"), int) and all(isinstance(score, float) for score in scores)


def require_writable(folder: Path) -> None:
    """Raise DataError if a folder could not be made or written to; nothing stays behind."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise DataError(f"--out {folder}: expected a folder, got a file{'' if there == folder else f', {there}'}")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise DataError(f"--out {folder}: expected a folder that can be written to, got {error.strerror}") from error


def event_writer(folder: Path, epoch: int) -> Any:
    """TensorBoard's writer, without the events of epochs that are done again; None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("TensorBoard: no events are written, the package is not there (pip install tensorboard)")
        return None
    return SummaryWriter(folder, purge_step=epoch)
