"""Trains a U-Net with Dual Cross-Attention on its skip connections, on your data set or on a microscope image.

    python -m examples.train
    python -m examples.train --data Kvasir-SEG --resize 256 --crop 256 --batch 16 --epochs 100
    torchrun --nproc-per-node 4 -m examples.train --data MoNuSeg --crop 256 --epochs 200

`examples.data` says which folders are read, `examples.files` which files. Everything is written to --out: last.pt (the
whole state, after each epoch), best.pt (the network of the best validation Dice, for `examples.predict`), history.json,
TensorBoard's events, prediction.png, and tests.json where the data have test sets.
The same command goes on where it was stopped or killed, with the same numbers as if it never had been: a checkpoint
holds all that an epoch starts from, and what is random in an epoch depends on --seed, the epoch and the process only.
"""

import argparse
import functools
import math
import os
import sys
import zlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from examples import picture, scores
from examples.arguments import arguments, read_folders
from examples.check import check
from examples.data import Data, counted, nuclei, split, with_classes
from examples.files import DataError, Sample, load
from examples.network import Plan, Predictor, build, read_network, to_input, write, write_json
from examples.processes import CommonError, Process, average_statistics, distribute, gathered, join, together, wait
from examples.run import Run, event_writer
from examples.scores import Row

SCORED = (
    "test sets: scored over all pixels of a set, at the size that the network sees; volumes by the mean over the cases"
)


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


def read_data(chosen: argparse.Namespace, process: Process) -> Data:
    """Find the data; the first process reads all of them once, so that all are known to be good before any is used."""

    def search() -> Data:
        own = chosen.data is not None or chosen.images is not None
        found = split(read_folders(chosen, chosen.data) if own else nuclei(), chosen.val, chosen.seed)
        return found if chosen.classes is None else with_classes(found, chosen.classes)

    data = together(process, search)
    if process.first:
        tests = f"; test sets: {counted(data.tests)}" if data.tests else ""
        print(f"data: {data.layout}: {len(data.train)} to train on, {len(data.validation)} to validate on{tests}")
        for line in data.left_out:
            print(line)
        print(f"classes: background, {', '.join(data.classes)}")
    side = chosen.crop if chosen.resize is None else 0
    for line in together(process, lambda: check(data, side) if process.first else []):
        print(line)
    return data


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


def learning_rate(chosen: argparse.Namespace, epoch: int) -> float:
    """From --lr down to 0 along a cosine over --epochs; more of them make a longer one, also for a run that goes on."""
    return chosen.lr * (1 + math.cos(math.pi * epoch / chosen.epochs)) / 2


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
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(chosen, epoch)
    steps = chosen.steps or max(len(data.train) // (chosen.batch * process.count), 10)
    crops = Crops(data.train, chosen, epoch, steps, process)
    pin = process.device.type == "cuda"
    loader = DataLoader(crops, chosen.batch, num_workers=chosen.workers, pin_memory=pin)
    network.train()
    total = torch.zeros((), device=process.device)
    bar = tqdm(loader, f"epoch {epoch + 1}/{chosen.epochs}", leave=False, disable=not process.first)
    for images, masks in bar:
        images, masks = images.to(process.device, non_blocking=True), masks.to(process.device, non_blocking=True)
        with torch.autocast(process.device.type, torch.bfloat16, enabled=chosen.bf16):
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


def require_finite(loss: float, epoch: int, rate: float) -> None:
    if not math.isfinite(loss):
        raise DataError(f"--lr: expected a finite loss in epoch {epoch + 1}, got {loss}: lower {rate}")


def predictor(network: nn.Module, plan: Plan, chosen: argparse.Namespace, process: Process) -> Predictor:
    return Predictor(network.eval(), plan, process.device, chosen.batch, chosen.bf16)


def tally(predict: Predictor, samples: Sequence[Sample], groups: Sequence[str], process: Process) -> np.ndarray:
    """Pixels (groups, classes, 3) of the samples, as `scores.count` has them; each process predicts its share."""
    classes = len(predict.plan.classes)
    pixels = torch.zeros(len(groups), classes, 3, dtype=torch.int64)
    mine = samples[process.rank :: process.count]
    for sample in tqdm(mine, "scoring", leave=False, disable=not process.first):
        image, mask = load(sample, predict.plan.resize)
        group = groups.index(sample.group) if len(groups) > 1 else 0
        pixels[group] += torch.from_numpy(scores.count(predict(image), mask, classes))
    pixels = pixels.to(process.device)
    if process.count > 1:
        dist.all_reduce(pixels)
    return pixels.cpu().numpy()


def validate(network: nn.Module, data: Data, plan: Plan, chosen: argparse.Namespace, process: Process) -> Row:
    """Dice and IoU of each foreground class over all pixels of the validation samples, and their means."""
    with gathered(network) as whole:
        pixels = tally(predictor(whole, plan, chosen, process), data.validation, [""], process)
    return scores.summary(pixels, plan.classes)


def of_classes(row: Row) -> str:
    lines = [(name, row["dice of"][name], row["iou of"][name]) for name in row["dice of"]]
    lines += [("mean", row["dice"], row["iou"])] if len(lines) > 1 else []
    return scores.table(lines, "class", "Dice", "IoU")


def score_tests(predict: Predictor, data: Data, run: Run, process: Process) -> None:
    """Print and write the scores of each test set: over all of its pixels, or of volumes the mean over the cases."""
    rows = {}
    if data.tests and process.first:
        print(f"\n{SCORED}")
    for name, samples in data.tests.items():
        volumes = samples[0].slice is not None
        cases = list(dict.fromkeys(sample.group for sample in samples)) if volumes else [""]
        pixels = tally(predict, samples, cases, process)
        rows[name] = scores.summary(pixels, predict.plan.classes)
        if process.first:
            size = f"{len(samples)} slices, means over {len(cases)} cases" if volumes else f"{len(samples)}"
            print(f"\ntest set {name} ({size}):\n{of_classes(rows[name])}")
            if volumes:
                dice, iou = (scores.mean(score, axis=1) for score in scores.overlap(pixels))
                print("\n" + scores.table(zip(cases, dice, iou, strict=True), "case", "Dice", "IoU"))
    if rows and process.first:
        write_json(run.folder / "tests.json", rows)


def draw(predict: Predictor, data: Data, run: Run) -> None:
    """Up to three validation samples."""
    scenes = []
    for sample in data.validation[:: max(len(data.validation) // 3, 1)][:3]:
        image, true = load(sample, predict.plan.resize)
        found = predict(image)
        dice, _ = scores.overlap(scores.count(found, true, len(predict.plan.classes)))
        scenes.append(picture.Scene(sample.name, image, true, found, float(scores.mean(dice))))
    write(run.folder / "prediction.png", functools.partial(picture.draw, scenes, predict.plan.classes))


def finish(data: Data, run: Run, chosen: argparse.Namespace, process: Process) -> None:
    """Scores and a picture of the best network."""
    wait(process)  # for the first one, which has written it
    best = run.best_row
    if process.first:
        print(f"\nbest epoch: {best['epoch']}, validation ({len(data.validation)}):\n{of_classes(best)}")
    plan, network = together(process, lambda: read_network(run.best))
    predict = predictor(network.to(process.device), plan, chosen, process)
    score_tests(predict, data, run, process)
    if process.first:
        draw(predict, data, run)
        print(f"\nnetwork: {run.best}\nfigure: {run.folder / 'prediction.png'}")
        print(f"predict your images: python -m examples.predict {run.best} FOLDER")
    wait(process)  # so that all leave together


def train(chosen: argparse.Namespace, process: Process) -> None:
    run = Run(chosen, process)
    data = read_data(chosen, process)
    plan = Plan(chosen.host, chosen.dca, chosen.patch, chosen.crop, chosen.resize, data.classes)
    network = build(plan, chosen.seed).to(process.device)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    network = distribute(network, process, chosen.fsdp)
    optimizer = torch.optim.AdamW(network.parameters(), chosen.lr)
    run.begin(network, optimizer, data)
    begin, events = len(run.history), None
    if process.first:
        print(f"network: {chosen.host}, attention {chosen.dca}, {parameters / 1e6:.2f} M parameters")
        done = f"after the {begin} epochs of {run.last}" if begin else "from the beginning"
        print(f"running: {process.count} x {process.device.type}, {chosen.epochs} epochs, {done}")
        events = event_writer(chosen.out, begin)

    for epoch in range(begin, chosen.epochs):
        loss = train_epoch(network, optimizer, data, chosen, epoch, process)
        together(process, functools.partial(require_finite, loss, epoch, chosen.lr))
        row = {"epoch": epoch + 1, "loss": loss, "rate": learning_rate(chosen, epoch)}
        row |= validate(network, data, plan, chosen, process)
        run.save(network, optimizer, row, plan)
        if process.first:
            print(f"epoch {epoch + 1}: loss {loss:.4f}, validation Dice {row['dice']:.4f}, IoU {row['iou']:.4f}")
        if events is not None:
            for name in ("loss", "rate", "dice", "iou"):
                events.add_scalar(name, row[name], epoch)
            events.flush()
    finish(data, run, chosen, process)


def main() -> int:
    chosen = arguments()
    rank = os.environ.get("RANK")  # of several processes
    first = rank in (None, "0")
    try:
        train(chosen, join())
    except CommonError as error:
        if first:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except DataError as error:
        finder = "" if rank is None else f" (process {rank})"
        print(f"error{finder}: {error}", file=sys.stderr)
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
