"""Predicts images with a network that `examples.train` has trained, and scores it where there are masks.

    python -m examples.predict runs/Kvasir-SEG-UNet-fused/best.pt new_images
    python -m examples.predict best.pt --images ISIC/test --masks ISIC/test_truth --mask-suffix _segmentation

FOLDER holds images, or a data set as `examples.data` knows them: of one with test sets these are predicted,
also a test/ without masks; of one with val/ that; of any other all. --out gets (in a folder a test set):

- masks/NAME.png, as large as the image. Several classes: the pixels are class indices. One class: 0 is background and
  255 foreground.
- overlays/NAME.png, the image with the prediction's classes as colours and the mask's outlines as white lines.
- scores.csv, where there are masks: Dice, IoU and HD95 in pixels of each class of each image, at the image's size, or
  of each volume (`examples.scores` says how; a class that neither the prediction nor the mask has is left out).
"""

import argparse
import csv
import itertools
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from examples import picture
from examples.arguments import LAYOUTS, add_folders, folders, read_folders
from examples.check import check
from examples.data import Data, counted, images_alone, with_classes
from examples.files import DataError, Sample, read_image, read_mask, resize_classes, resize_image
from examples.network import Plan, Predictor, read_network, write
from examples.processes import device
from examples.run import require_writable
from examples.scores import DECIMALS, count, hd95, mean, overlap, table

SHOWN = 20  # images of a set in the table on the screen
MEASURES = tuple(DECIMALS)
EXAMPLES = """\
examples:
  python -m examples.predict runs/Kvasir-SEG-UNet-fused/best.pt new_images
  python -m examples.predict runs/glas-UNet-fused/best.pt GlaS --out glas_test
  python -m examples.predict best.pt --images ISIC/test --masks ISIC/test_truth --mask-suffix _segmentation
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.predict",
        description="Predicts images with a trained network. Writes a mask of each image in its size, as PNG (class\n"
        "indices; of one class 0 and 255), and an overlay; where there are masks also scores: Dice, IoU and\n"
        "HD95, the 95th percentile of the distances between prediction's and mask's outlines, in pixels.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("weights", type=Path, metavar="WEIGHTS", help="best.pt of examples.train")
    add("folder", type=Path, nargs="?", metavar="FOLDER", help=f"images without masks, or {LAYOUTS}")
    add_folders(parser)
    add("--batch", type=int, default=4, metavar="B", help="tiles in a batch (default: %(default)s)")
    add(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where everything goes (default: FOLDER-predicted, beside WEIGHTS)",
    )
    chosen = parser.parse_args()
    folders(chosen, parser, chosen.folder, "FOLDER")
    source = chosen.folder or chosen.images
    if source is None:
        parser.error("FOLDER: expected a folder of images, or --images and --masks, got none")
    if chosen.batch < 1:
        parser.error(f"--batch: expected an integer of at least 1, got {chosen.batch}")
    chosen.out = chosen.out or chosen.weights.parent / f"{source.resolve().name}-predicted"
    return chosen


def read_sets(chosen: argparse.Namespace, plan: Plan) -> dict[str, list[Sample]]:
    """The samples to predict, by the name of their set; "" where it has none."""
    alone = images_alone(chosen.folder) if chosen.folder else []
    if alone:
        found = Data("images without masks", alone, plan.classes)
    else:
        found = with_classes(read_folders(chosen, chosen.folder), len(plan.classes) + 1)
    sets = found.tests | found.unmasked or ({"val": found.validation} if found.validation else {"": found.train})
    chosen_sets = f"{len(found.train)}" if "" in sets else f"{counted(sets)}; what is there to train on is left out"
    print(f"data: {found.layout}: {chosen_sets}")
    if "" in sets and not alone:
        print("data: no test set and no val/: the network may have been trained on these images")
    for line in (*found.left_out, *check(replace(found, train=[], validation=[], tests=sets))):
        print(line)
    return sets


def require_other_folder(out: Path, sets: dict[str, list[Sample]]) -> None:
    """Raise DataError if a file that is written could be one that is read."""
    read = {path.parent.resolve() for samples in sets.values() for s in samples for path in (s.image, s.mask) if path}
    for name in sets:
        for folder in ("masks", "overlays"):
            if (out / name / folder).resolve() in read:
                raise DataError(f"--out {out}: expected another folder, {out / name / folder} holds the data")


def predict_one(predict: Predictor, sample: Sample, folder: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Write the mask and the overlay; the predicted classes (H, W) uint8, and the mask's where the sample has one."""
    plan, image = predict.plan, read_image(sample)
    found = predict(image if plan.resize is None else resize_image(image, plan.resize))
    if plan.resize is not None:
        found = resize_classes(found, image.shape[:2])
    true = None if sample.mask is None else read_mask(sample, image).classes
    pixels = (found * (255 if len(plan.classes) == 1 else 1)).astype(np.uint8)
    for kind, array in (("masks", pixels), ("overlays", picture.overlay(image, found, true))):
        write(folder / kind / f"{sample.name}.png", partial(Image.fromarray(array).save, format="PNG"))
    return found.astype(np.uint8), None if true is None else true.astype(np.uint8)


def score(found: np.ndarray, true: np.ndarray, classes: int) -> np.ndarray:
    """(classes, 3), of Dice, IoU and HD95, of an image's (H, W) or a volume's (slices, H, W) classes."""
    dice, iou = overlap(count(found, true, classes))
    distances = [hd95(found == i, true == i) for i in range(1, classes + 1)]
    return np.stack([dice, iou, distances], axis=1)


def predict_set(predict: Predictor, samples: Sequence[Sample], folder: Path) -> None:
    """Predict the samples of one set into a folder, and print the scores of its images, or of its volumes."""
    for kind in ("masks", "overlays"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    scores = {}
    bar = tqdm(samples, "predicting", leave=False)
    for case, of_case in itertools.groupby(bar, key=lambda sample: sample.case):  # slices of a volume are neighbours
        found, true = zip(*(predict_one(predict, sample, folder) for sample in of_case), strict=True)
        if true[0] is not None:
            whole = (slices[0] if len(slices) == 1 else np.stack(slices) for slices in (found, true))
            scores[case] = score(*whole, len(predict.plan.classes))
    if scores:
        report(scores, predict.plan.classes, folder / "scores.csv")


def report(scores: dict[str, np.ndarray], classes: Sequence[str], path: Path) -> None:
    """Print the means over the classes of each image, the means over the images, and write everything."""
    lines = [(name, *mean(of_classes, axis=0)) for name, of_classes in scores.items()]
    total = ("mean", *mean([line[1:] for line in lines], axis=0))
    hidden = len(lines) - SHOWN
    note = [(f"... {hidden} more, in {path.name}",)] if hidden > 0 else []
    print("\n" + table([*lines[:SHOWN], *note, total], "image", *MEASURES))
    if len(classes) > 1:
        means = mean(np.stack(list(scores.values())), axis=0)
        of_each = [(name, *of_class) for name, of_class in zip(classes, means, strict=True)]
        print("\n" + table(of_each, "class", *MEASURES))

    def content(unfinished: Path) -> None:
        with open(unfinished, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("image", "class", *MEASURES))
            for image, of_classes in scores.items():
                for name, of_class in zip(classes, of_classes, strict=True):
                    writer.writerow((image, name, *("" if np.isnan(score) else score for score in of_class)))

    write(path, content)


def predict_all(chosen: argparse.Namespace) -> None:
    require_writable(chosen.out)
    plan, network = read_network(chosen.weights)
    size = f", images resized to {plan.resize} x {plan.resize}" if plan.resize else ""
    print(f"network: {plan.host}, attention {plan.dca}, tiles of {plan.crop} x {plan.crop}{size}")
    print(f"classes: background, {', '.join(plan.classes)}")
    sets = read_sets(chosen, plan)
    require_other_folder(chosen.out, sets)
    predict = Predictor(network.to(device()).eval(), plan, device(), chosen.batch)
    for name, samples in sets.items():
        if name:
            print(f"\n{name}:")
        predict_set(predict, samples, chosen.out / name)
    if any(sample.mask for samples in sets.values() for sample in samples):
        print("\nscores: means over images, at their own size; a volume counts as one image")
        print(f"\nmasks, overlays and scores: {chosen.out}")
    else:
        print(f"\nmasks, overlays: {chosen.out}")


def main() -> int:
    try:
        predict_all(arguments())
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
