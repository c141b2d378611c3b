"""The arguments that both commands take, and those of `python -m examples.train`."""

import argparse
import math
import os
from pathlib import Path

from examples.data import Data, as_instances, find, paired
from examples.network import ATTENTIONS, CLASSES, SIDE
from reference import unets

LAYOUTS = "GlaS, MoNuSeg, CVC-ClinicDB, Kvasir-SEG, TransUNet's Synapse, or any folder with images/ and masks/"
EXAMPLES = """\
examples:
  python -m examples.train
      a microscope image of nuclei, in under two minutes on a laptop
  python -m examples.train --data Kvasir-SEG --resize 256 --crop 256 --batch 16 --epochs 100
      colour images of any size with one class
  python -m examples.train --images ISIC/images --masks ISIC/truth --mask-suffix _segmentation --resize 256 --crop 256
      two folders of any names
  python -m examples.train --data Synapse --crop 224 --classes 9 --epochs 150
      several classes: pixels of a mask are class indices, 0 is background
  torchrun --nproc-per-node 4 -m examples.train --data MoNuSeg --crop 256 --epochs 200
      four GPUs
then: python -m examples.predict runs/.../best.pt FOLDER
"""


def add_folders(parser: argparse.ArgumentParser) -> None:
    """The two folders of any other layout."""
    add = parser.add_argument
    add("--images", type=Path, metavar="FOLDER", help="images in any other layout; --masks says where their masks are")
    add("--masks", type=Path, metavar="FOLDER", help="masks of --images, with the images' names")
    add(
        "--mask-suffix",
        metavar="TEXT",
        help="what follows the image's name in the mask's: _seg, for a.jpg and a_seg.png (default: what data sets "
        "usually have there, such as _mask, if anything)",
    )
    add("--instances", action="store_true", help="masks number their objects: all that is not 0 is foreground")


def folders(chosen: argparse.Namespace, parser: argparse.ArgumentParser, other: str, name: str) -> None:
    """Check what `add_folders` added; `other`, which was called `name`, is the folder in a known layout."""
    if (chosen.images is None) != (chosen.masks is None):
        there, missing = ("--images", "--masks") if chosen.masks is None else ("--masks", "--images")
        parser.error(f"{missing}: expected a folder beside {there}, got none")
    if chosen.images is not None and other is not None:
        parser.error(f"--images, --masks: expected instead of {name}, got both")
    if chosen.mask_suffix is not None and chosen.images is None:
        parser.error("--mask-suffix: expected beside --images and --masks, got it alone")
    if chosen.mask_suffix == "":
        parser.error("--mask-suffix: expected a text such as _seg, got nothing; leave it out for the usual ones")
    if chosen.instances and chosen.images is None and other is None:
        parser.error(f"--instances: expected beside {name} or --images, got it alone")


def read_folders(chosen: argparse.Namespace, folder: Path) -> Data:
    """The data in --images and --masks, or else in `folder`."""
    found = find(folder) if chosen.images is None else paired(chosen.images, chosen.masks, chosen.mask_suffix)
    return as_instances(found) if chosen.instances else found


def _parser() -> argparse.ArgumentParser:
    """Of `python -m examples.train`."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.train",
        description="Trains a segmentation network with Dual Cross-Attention (DCA) on its skip connections. Without\n"
        "--data or --images, on a real microscope image. Run it under torchrun for several GPUs. The same command\n"
        "resumes a run that was stopped; with more --epochs, also one that is finished.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_data_and_network(parser)
    _add_training(parser)
    _add_run(parser)
    return parser


def _add_data_and_network(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", type=Path, metavar="FOLDER", help=f"{LAYOUTS} (default: the nuclei image of the stardist package)")
    add_folders(parser)
    add(
        "--host",
        choices=unets.HOSTS,
        default="UNet",
        help="the network, one of the paper's six (default: %(default)s)",
    )
    add(
        "--dca",
        choices=ATTENTIONS,
        default="fused",
        help="attention on its skip connections: none; reference, the official operations in plain PyTorch; fused, "
        "the same numbers in less time and memory (default: %(default)s)",
    )
    add(
        "--patch",
        type=int,
        metavar="P",
        help="side of the token grid (default: as in the paper, --crop / 8, of ResUNetPP --crop / 4)",
    )
    add(
        "--resize",
        type=int,
        metavar="N",
        help="resize images to N x N first, polyps to 256 or 352 (default: images keep their size)",
    )
    add(
        "--crop",
        type=int,
        default=64,
        metavar="N",
        help="side of the crops to train on, and of the tiles to predict (default: %(default)s)",
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--batch", type=int, default=4, metavar="B", help="crops in a batch, a process (default: %(default)s)")
    add(
        "--epochs",
        type=int,
        default=8,
        help="how often to train, validate and save; an epoch is about one crop of each image, at least 10 batches "
        "(default: %(default)s)",
    )
    add(
        "--steps",
        type=int,
        metavar="N",
        help="batches in an epoch (default: about one crop of each image, at least 10 batches)",
    )
    add(
        "--lr",
        type=float,
        default=1e-3,
        help="learning rate of AdamW at the start; it falls to 0 along a cosine (default: %(default)s)",
    )
    add(
        "--val",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="share to validate on, where the data have no val/ (default: %(default)s)",
    )
    add(
        "--classes",
        type=int,
        metavar="N",
        help="with background. 2: background and foreground. More: a mask's pixels are class indices, 0 .. N-1, in one "
        "channel or in a palette; at most 256 (default: 9 of Synapse, 2 of any other data set)",
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    """What changes neither data nor network: how and where it runs."""
    add = parser.add_argument
    add("--bf16", action="store_true", help="autocast to bfloat16")
    add("--fsdp", action="store_true", help="shard gradients and optimizer over the processes (torchrun)")
    add(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes that read images; 4 or more on a GPU (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="of weights, split, crops (default: %(default)s)")
    add(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where everything goes, and all processes look (default: runs/DATA-HOST-DCA)",
    )
    add("--restart", action="store_true", help="begin anew where --out holds a run")


def _deepest(chosen: argparse.Namespace) -> int:
    """Side of the network's smallest maps."""
    return chosen.crop // (8 if chosen.host == "ResUNetPP" else 16)


def _check(chosen: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """End with a line where an option cannot be, or not beside another one."""
    folders(chosen, parser, chosen.data, "--data")
    for name in ("patch", "resize", "crop", "batch", "epochs", "steps"):
        value = getattr(chosen, name)
        if value is not None and value < 1:
            parser.error(f"--{name}: expected an integer of at least 1, got {value}")
    for name in ("patch", "resize", "crop"):
        value = getattr(chosen, name)
        if value is not None and value > SIDE:
            parser.error(f"--{name}: expected at most {SIDE}, got {value}")
    if chosen.crop % 16:
        parser.error(f"--crop: expected a multiple of 16, which the networks halve four times, got {chosen.crop}")
    if chosen.resize is not None and chosen.resize < chosen.crop:
        parser.error(f"--resize: expected at least --crop {chosen.crop}, got {chosen.resize}")
    if _deepest(chosen) == 1 and chosen.batch == 1:  # BatchNorm cannot train on one pixel
        side = f"{chosen.crop} x {chosen.crop}"
        parser.error(f"--batch: expected at least 2 crops of {side}, or a --crop of {2 * chosen.crop}, got 1")
    if chosen.classes is not None and not 2 <= chosen.classes <= CLASSES:
        parser.error(f"--classes: expected 2 to {CLASSES}, background and others, got {chosen.classes}")
    if not 0 < chosen.val < 1:
        parser.error(f"--val: expected a share between 0 and 1, got {chosen.val}")
    if not 0 < chosen.lr < math.inf:
        parser.error(f"--lr: expected a positive number, got {chosen.lr}")
    for name in ("workers", "seed"):
        if getattr(chosen, name) < 0:
            parser.error(f"--{name}: expected an integer of at least 0, got {getattr(chosen, name)}")
    if chosen.seed >= 2**64:
        parser.error(f"--seed: expected an integer below 2**64, got {chosen.seed}")
    if chosen.fsdp and "RANK" not in os.environ:
        parser.error("--fsdp: expected several processes: torchrun --nproc-per-node N -m examples.train ...")


def arguments() -> argparse.Namespace:
    """Of `python -m examples.train`."""
    parser = _parser()
    chosen = parser.parse_args()
    _check(chosen, parser)
    chosen.patch = chosen.patch or 2 * _deepest(chosen)
    folder = chosen.data or chosen.images
    source = folder.resolve().name if folder else "nuclei"
    chosen.out = chosen.out or Path("runs") / f"{source}-{chosen.host}-{chosen.dca}"
    return chosen
