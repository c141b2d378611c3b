"""Trains a U-Net with Dual Cross-Attention on its skip connections, on your data set or on a microscope image.

    python -m examples.train
    python -m examples.train --data Kvasir-SEG --resize 256 --crop 256 --batch 16 --epochs 100
    torchrun --nproc-per-node 4 -m examples.train --data MoNuSeg --crop 256 --epochs 200

`examples.data` says which folders are read. Everything is written to --out: last.pt (the whole state, after each
epoch), best.pt (the weights of the best validation Dice), history.json, TensorBoard's events, and prediction.png.
The same command goes on where it was stopped or killed, with the same numbers as if it never had been: a checkpoint
holds all that an epoch starts from, and what is random in an epoch depends on --seed, the epoch and the process only.
"""

import argparse
import functools
import json
import math
import os
import pickle
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import dca_kernels
import reference
from examples.data import Data, DataError, Sample, check, find, load, nuclei
from reference import unets

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # the backend above comes first: there may be no screen

ATTENTIONS: dict[str, Any] = {"none": False, "reference": reference.DCA, "fused": dca_kernels.DCA}
FREE = ("epochs", "out", "restart", "workers")  # arguments that a resumed run may change

Row = dict[str, Any]


@dataclass(frozen=True)
class Process:
    """This process, alone or one of those that torchrun started."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


class Crops(Dataset):
    """One process's random crops of one epoch, flipped and turned at random."""

    def __init__(self, samples: list[Sample], chosen: argparse.Namespace, epoch: int, steps: int, process: Process):
        self.samples, self.chosen = samples, chosen
        generator = np.random.default_rng((chosen.seed, epoch))
        count = steps * chosen.batch * process.count
        order: list[int] = []
        while len(order) < count:
            order += generator.permutation(len(samples)).tolist()
        self.order = order[process.rank : count : process.count]
        self.seeds = generator.integers(2**63, size=count)[process.rank :: process.count]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image, mask = load(self.samples[self.order[i]], self.chosen.resize)
        generator, side = np.random.default_rng(self.seeds[i]), self.chosen.crop
        top, left = (generator.integers(n - side + 1) for n in mask.shape)
        image, mask = (array[top : top + side, left : left + side] for array in (image, mask))
        turns, flip = generator.integers(4), generator.integers(2)
        image, mask = (np.rot90(array[:, ::-1] if flip else array, turns) for array in (image, mask))
        return to_input(image), torch.from_numpy(mask.copy())  # (3, side, side), (side, side)


def to_input(image: np.ndarray) -> Tensor:
    """(H, W, 3) -> (3, H, W)."""
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.train",
        description="Trains a segmentation network with Dual Cross-Attention (DCA) on its skip connections. Without "
        "--data, on a real microscope image: in under two minutes on a laptop. Run it under torchrun for several GPUs. "
        "The same command resumes a run that was stopped.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    known = "GlaS, MoNuSeg, CVC-ClinicDB, Kvasir-SEG, TransUNet's Synapse, or any folder with images/ and masks/"
    add("--data", type=Path, metavar="FOLDER", help=f"{known}; nothing: the nuclei image of the stardist package")
    add("--host", choices=unets.__all__, default="UNet", help="the network")
    add("--dca", choices=ATTENTIONS, default="fused", help="its attention: none, the plain PyTorch one, the fused one")
    add(
        "--patch",
        type=int,
        metavar="P",
        help="side of the token grid; nothing: as in the paper, --crop / 8 (ResUNetPP: / 4)",
    )
    add("--resize", type=int, metavar="N", help="resize images to N x N first (polyps: 256 or 352); nothing: do not")
    add("--crop", type=int, default=64, metavar="N", help="side of the crops to train on, and of the tiles to predict")
    add("--batch", type=int, default=4, metavar="B", help="crops in a batch, a process")
    add("--epochs", type=int, default=8, help="how often to validate and save; each image is seen once an epoch")
    add("--steps", type=int, metavar="N", help="batches an epoch; nothing: one crop of each image, at least 10 batches")
    add("--lr", type=float, default=1e-3, help="learning rate of AdamW at the start; it falls to 0 along a cosine")
    add("--val", type=float, default=0.2, metavar="SHARE", help="share to validate on, where the data have no val/")
    add("--classes", type=int, metavar="N", help="of .npz slices, with background; nothing: Synapse's 9")
    add("--bf16", action="store_true", help="autocast to bfloat16")
    add("--fsdp", action="store_true", help="shard gradients and optimizer over the processes (torchrun)")
    add("--workers", type=int, default=0, metavar="N", help="processes that read images; 4 or more on a GPU")
    add("--seed", type=int, default=0, help="of weights, split, crops")
    add("--out", type=Path, metavar="FOLDER", help="where everything goes; nothing: runs/DATA-HOST-DCA")
    add("--restart", action="store_true", help="begin anew where --out holds a run")
    chosen = parser.parse_args()
    for name in ("patch", "resize", "crop", "batch", "epochs", "steps"):
        value = getattr(chosen, name)
        if value is not None and value < 1:
            parser.error(f"--{name}: expected an integer of at least 1, got {value}")
    if chosen.crop % 16:
        parser.error(f"--crop: expected a multiple of 16, which the networks halve four times, got {chosen.crop}")
    if chosen.resize is not None and chosen.resize < chosen.crop:
        parser.error(f"--resize: expected at least --crop {chosen.crop}, got {chosen.resize}")
    if chosen.classes is not None and chosen.classes < 2:
        parser.error(f"--classes: expected at least 2, background and one more, got {chosen.classes}")
    if not 0 < chosen.val < 1:
        parser.error(f"--val: expected a share between 0 and 1, got {chosen.val}")
    if chosen.lr <= 0:
        parser.error(f"--lr: expected a positive number, got {chosen.lr}")
    if chosen.workers < 0 or chosen.seed < 0:
        parser.error("--workers, --seed: expected integers of at least 0")
    if chosen.fsdp and "RANK" not in os.environ:
        parser.error("--fsdp: expected several processes: torchrun --nproc-per-node N -m examples.train ...")
    chosen.patch = chosen.patch or chosen.crop // (4 if chosen.host == "ResUNetPP" else 8)
    source = chosen.data.resolve().name if chosen.data else "nuclei"
    chosen.out = chosen.out or Path("runs") / f"{source}-{chosen.host}-{chosen.dca}"
    return chosen


def read_data(chosen: argparse.Namespace, process: Process) -> Data:
    """Find the data; the first process reads all of them once, so that all are known to be good before any is used."""
    data = find(chosen.data, chosen.val, chosen.seed) if chosen.data else nuclei()
    if chosen.classes is not None and chosen.classes - 1 != len(data.classes):
        data = replace(data, classes=tuple(f"class {i}" for i in range(1, chosen.classes)))
    problem: list[str | None] = [None]
    if process.first:
        print(f"data: {data.layout}: {len(data.train)} to train on, {len(data.validation)} to validate on")
        print(f"classes: background, {', '.join(data.classes)}")
        try:
            check(data.train + data.validation, len(data.classes) + 1, chosen.crop, chosen.resize)
        except DataError as error:
            problem = [str(error)]
    if process.count > 1:
        dist.broadcast_object_list(problem)
    if problem[0] is not None:
        raise DataError(problem[0])
    return data


def join() -> Process:
    """Join the others that torchrun started, if it did."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return Process(0, 1, device)
    dist.init_process_group("nccl" if gpu else "gloo")
    return Process(dist.get_rank(), dist.get_world_size(), device)


def build(chosen: argparse.Namespace, classes: int) -> nn.Module:
    """The network, with the same initial weights in every process. Two classes share one output."""
    torch.manual_seed(chosen.seed)
    host = getattr(unets, chosen.host)
    outputs = 1 if classes == 2 else classes
    network = host(in_channels=3, out_channels=outputs, dca=ATTENTIONS[chosen.dca], patch=chosen.patch)
    network.eval()(torch.zeros(1, 3, chosen.crop, chosen.crop)).sum().backward()
    for parameter in network.parameters():  # as the official ones, some networks hold a few that they do not use
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
    return network


def distribute(network: nn.Module, process: Process, fsdp: bool) -> nn.Module:
    """The network as every process runs it, with gradients averaged over the processes."""
    if not dist.is_initialized():
        return network
    if process.device.type == "cuda":  # statistics of the whole batch; SyncBatchNorm does not run on a CPU
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    if not fsdp:
        devices = [process.device] if process.device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=devices)
    mesh = init_device_mesh(process.device.type, (process.count,))
    shard = functools.partial(fully_shard, mesh=mesh, reshard_after_forward=False)
    for module in network.modules():
        if isinstance(module, (dca_kernels.DCA, reference.DCA)):  # as a whole: it reads its children's parameters
            shard(module)
    return shard(network)


def average_statistics(network: nn.Module, process: Process) -> None:
    """BatchNorm's running statistics, of each process's own batches so far, become their average."""
    for module in network.modules() if process.count > 1 else ():
        if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
            for statistic in (module.running_mean, module.running_var):
                dist.all_reduce(statistic)
                statistic /= process.count


def autocast(chosen: argparse.Namespace, process: Process) -> torch.autocast:
    return torch.autocast(process.device.type, torch.bfloat16, enabled=chosen.bf16)


def objective(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy plus one minus the soft Dice of the foreground classes.

    Args:
        logits: (B, classes, H, W), or (B, 1, H, W) for foreground over background.
        target: (B, H, W) int64.
    """
    logits = logits.float()
    if logits.shape[1] == 1:
        entropy = F.binary_cross_entropy_with_logits(logits[:, 0], target.float())
        likely, truth = logits.sigmoid(), target[:, None]
    else:
        entropy = F.cross_entropy(logits, target)
        likely = logits.softmax(1)[:, 1:]
        truth = F.one_hot(target, logits.shape[1]).permute(0, 3, 1, 2)[:, 1:]
    overlap, total = (likely * truth).sum((0, 2, 3)), likely.sum((0, 2, 3)) + truth.sum((0, 2, 3))
    return entropy + 1 - ((2 * overlap + 1) / (total + 1)).mean()


def train_epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Data,
    chosen: argparse.Namespace,
    epoch: int,
    process: Process,
) -> float:
    """The mean loss over the epoch and the processes."""
    torch.manual_seed(zlib.crc32(repr((chosen.seed, epoch, process.rank)).encode()))
    steps = chosen.steps or max(len(data.train) // (chosen.batch * process.count), 10)
    crops = Crops(data.train, chosen, epoch, steps, process)
    pin = process.device.type == "cuda"
    loader = DataLoader(crops, chosen.batch, num_workers=chosen.workers, pin_memory=pin)
    network.train()
    total = torch.zeros((), device=process.device)
    bar = tqdm(loader, f"epoch {epoch + 1}/{chosen.epochs}", leave=False, disable=not process.first)
    for images, masks in bar:
        images, masks = images.to(process.device, non_blocking=True), masks.to(process.device, non_blocking=True)
        with autocast(chosen, process):
            logits = network(images)
        loss = objective(logits, masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    if process.count > 1:
        dist.all_reduce(total)
    average_statistics(network, process)
    return total.item() / (steps * process.count)


@torch.no_grad()
def predict(network: nn.Module, image: np.ndarray, chosen: argparse.Namespace, process: Process) -> np.ndarray:
    """The classes (H, W) of an image (H, W, 3), from tiles of the crop's size that cover it."""
    side = chosen.crop
    tops, lefts = (np.linspace(0, n - side, math.ceil(n / side)).astype(int) for n in image.shape[:2])
    corners = [(top, left) for top in tops for left in lefts]
    classes = np.zeros(image.shape[:2], np.int64)
    for start in range(0, len(corners), chosen.batch):
        some = corners[start : start + chosen.batch]
        tiles = torch.stack([to_input(image[top : top + side, left : left + side]) for top, left in some])
        with autocast(chosen, process):
            logits = network(tiles.to(process.device)).float()
        found = logits[:, 0] > 0 if logits.shape[1] == 1 else logits.argmax(1)
        for (top, left), tile in zip(some, found.cpu().numpy(), strict=True):
            classes[top : top + side, left : left + side] = tile
    return classes


def validate(network: nn.Module, data: Data, chosen: argparse.Namespace, process: Process) -> Row:
    """Dice and IoU of each foreground class over all pixels of the validation samples, and their means."""
    network = network.module if isinstance(network, DistributedDataParallel) else network
    network.eval()
    counts = torch.zeros(3, len(data.classes), dtype=torch.int64, device=process.device)
    mine = data.validation[process.rank :: process.count]
    with gathered(network):
        for sample in tqdm(mine, "validating", leave=False, disable=not process.first):
            image, mask = load(sample, chosen.resize)
            found = predict(network, image, chosen, process)
            for i in range(len(data.classes)):
                here, there = found == i + 1, mask == i + 1
                counts[:, i] += torch.tensor([(here & there).sum(), here.sum(), there.sum()], device=process.device)
    if process.count > 1:
        dist.all_reduce(counts)
    both, found, true = counts.double().cpu()
    dice, iou = 2 * both / (found + true), both / (found + true - both)  # NaN where a class is neither found nor there
    names = data.classes
    return {
        "dice": dice.nanmean().item(),
        "iou": iou.nanmean().item(),
        "dice of": dict(zip(names, dice.tolist(), strict=True)),
        "iou of": dict(zip(names, iou.tolist(), strict=True)),
    }


@contextmanager
def gathered(network: nn.Module) -> Iterator[None]:
    """All parameters in every process for a while: each then predicts as many tiles as it has, without the others."""
    sharded = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
    yield
    for module in sharded:
        module.reshard()


class Run:
    """A training run in its folder: the history so far, the best score, and the files."""

    def __init__(self, chosen: argparse.Namespace, process: Process) -> None:
        self.folder, self.process = chosen.out, process
        self.arguments = {k: str(v) for k, v in vars(chosen).items() if k not in FREE} | {
            "processes": str(process.count)
        }
        self.history: list[Row] = []
        self.last, self.best = self.folder / "last.pt", self.folder / "best.pt"

    @property
    def best_row(self) -> Row:
        return max(self.history, key=lambda row: row["dice"] if row["dice"] == row["dice"] else -1)

    def resume(self, network: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        """Go back to the end of the last epoch that was saved, if any was."""
        if not self.last.exists():
            return
        try:
            state = torch.load(self.last, map_location="cpu", weights_only=True)
            arguments = state["arguments"]
        except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
            raise DataError(f"{self.last}: expected a checkpoint of this script, got {type(error).__name__}") from error
        for name in self.arguments:
            if self.arguments[name] != arguments.get(name):
                raise DataError(
                    f"{self.last}: expected a run with {name} {self.arguments[name]}, got {arguments.get(name)}: "
                    "choose another --out, or --restart to lose it"
                )
        options = StateDictOptions(full_state_dict=True)
        states = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        set_state_dict(network, optimizer, **states, options=options)
        scheduler.load_state_dict(state["scheduler"])
        self.history = state["history"]

    def save(self, network: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, row: Row) -> None:
        """Write the state at the end of an epoch; every process takes part, the first writes."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        model, optimizer_state = get_state_dict(network, optimizer, options=options)
        self.history.append(row)
        if not self.process.first:
            return
        if self.best_row is row:
            write(self.best, lambda path: torch.save(model, path))
        state = {
            "arguments": self.arguments,
            "history": self.history,
            "model": model,
            "optimizer": optimizer_state,
            "scheduler": scheduler.state_dict(),
        }
        write(self.last, lambda path: torch.save(state, path))
        write(self.folder / "history.json", lambda path: path.write_text(json.dumps(self.history, indent=1) + "\n"))


def write(path: Path, content: Callable[[Path], Any]) -> None:
    """Write a file whole or not at all: a kill leaves the old one."""
    unfinished = path.with_name(path.name + ".unfinished")
    content(unfinished)
    with open(unfinished, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def event_writer(folder: Path, epoch: int) -> Any:
    """TensorBoard's writer, without the events of epochs that are done again; None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("TensorBoard: no events are written, the package is not there (pip install tensorboard)")
        return None
    return SummaryWriter(folder, purge_step=epoch)


def draw(network: nn.Module, data: Data, chosen: argparse.Namespace, process: Process, path: Path) -> None:
    """Image, mask and prediction of up to three validation samples, side by side."""
    network.to(process.device).eval()
    samples = data.validation[:: max(len(data.validation) // 3, 1)][:3]
    figure, axes = plt.subplots(len(samples), 3, figsize=(9, 3 * len(samples)), squeeze=False, layout="constrained")
    for line, sample in zip(axes, samples, strict=True):
        image, mask = load(sample, chosen.resize)
        pictures = {"image": image, "mask": mask, "prediction": predict(network, image, chosen, process)}
        for axis, (name, picture) in zip(line, pictures.items(), strict=True):
            axis.imshow(picture, cmap="viridis", vmin=0, vmax=len(data.classes), interpolation="nearest")
            axis.set_title(name if name != "image" else sample.image.stem, fontsize=9)
            axis.axis("off")
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


def train(chosen: argparse.Namespace, process: Process) -> None:
    data = read_data(chosen, process)
    network = build(chosen, len(data.classes) + 1).to(process.device)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    network = distribute(network, process, chosen.fsdp)
    optimizer = torch.optim.AdamW(network.parameters(), chosen.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda e: (1 + math.cos(math.pi * e / chosen.epochs)) / 2)
    run = Run(chosen, process)
    if chosen.restart and process.first:
        run.last.unlink(missing_ok=True)
    if chosen.restart and process.count > 1:
        dist.barrier()
    run.resume(network, optimizer, schedule)
    begin, events = len(run.history), None
    if process.first:
        chosen.out.mkdir(parents=True, exist_ok=True)
        print(f"network: {chosen.host}, attention {chosen.dca}, {parameters / 1e6:.2f} M parameters")
        done = f"after the {begin} epochs of {run.last}" if begin else "from the beginning"
        print(f"running: {process.count} x {process.device.type}, {chosen.epochs} epochs, {done}")
        events = event_writer(chosen.out, begin)

    for epoch in range(begin, chosen.epochs):
        rate = schedule.get_last_lr()[0]
        loss = train_epoch(network, optimizer, data, chosen, epoch, process)
        if not math.isfinite(loss):
            raise DataError(f"--lr: expected a finite loss in epoch {epoch + 1}, got {loss}: lower {chosen.lr}")
        schedule.step()
        row = {"epoch": epoch + 1, "loss": loss, "rate": rate, **validate(network, data, chosen, process)}
        run.save(network, optimizer, schedule, row)
        if process.first:
            print(f"epoch {epoch + 1}: loss {loss:.4f}, validation Dice {row['dice']:.4f}, IoU {row['iou']:.4f}")
        if events is not None:
            for name in ("loss", "rate", "dice", "iou"):
                events.add_scalar(name, row[name], epoch)
            events.flush()

    if process.first:
        best = run.best_row
        lines = [(name, best["dice of"][name], best["iou of"][name]) for name in data.classes]
        lines += [("mean", best["dice"], best["iou"])] if len(lines) > 1 else []
        print(f"\nbest epoch, {best['epoch']}, on the {len(data.validation)} validation samples:")
        print(tabulate(lines, ("class", "Dice", "IoU"), tablefmt="github", floatfmt=".4f"))
        network = build(chosen, len(data.classes) + 1)
        network.load_state_dict(torch.load(run.best, map_location="cpu", weights_only=True))
        write(chosen.out / "prediction.png", lambda path: draw(network, data, chosen, process, path))
        print(f"\nweights: {run.best}\nfigure: {chosen.out / 'prediction.png'}")
    if process.count > 1:
        dist.barrier()  # the others wait, so that all leave together


def main() -> int:
    chosen = arguments()
    first = os.environ.get("RANK", "0") == "0"
    try:
        train(chosen, join())
    except DataError as error:
        if first:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if first:
            print("\nstopped; the same command goes on from the last finished epoch", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
