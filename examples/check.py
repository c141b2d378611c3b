"""Reads every sample once, before any is used: what is wrong with the files, and how their masks are read."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from tqdm import tqdm

from examples.data import Data
from examples.files import DataError, LowValuesError, Reading, Sample, read_image, read_mask, size_of

SHOWN = 10  # problems that are named one by one


@dataclass(frozen=True)
class Finding:
    """Of one sample."""

    problem: DataError | None = None
    pixels: int = 0
    marked: int = 0  # pixels of the foreground
    reading: Reading | None = None  # of its mask, if it has one


def check(data: Data, side: int = 0) -> list[str]:
    """Read every sample, and say in lines for the user how their masks are read, where that is not plain.

    Masks to train on have to have both background and foreground somewhere.

    Args:
        side: of the crops, which no sample to train or validate on may be smaller than.

    Raises:
        DataError: names each file that cannot be used, what was expected of it and what it is (up to SHOWN).
    """
    own, classes = [*data.train, *data.validation], len(data.classes) + 1
    tests = [sample for samples in data.tests.values() for sample in samples]
    examinations = [partial(_examine, sample, classes, side) for sample in own]
    examinations += [partial(_examine, sample, classes) for sample in tests]
    with ThreadPoolExecutor() as pool:
        examined = pool.map(lambda examine: examine(), examinations)
        findings = list(tqdm(examined, "checking", len(examinations), leave=False))
    _raise([finding.problem for finding in findings if finding.problem])
    if own:
        _require_both(own, findings[: len(own)])
    findings = [finding for finding in findings if finding.reading]
    return _grey_levels(findings) + _foreground_values(findings)


def _require_both(samples: Sequence[Sample], findings: Sequence[Finding]) -> None:
    """Raise DataError if the masks have no foreground, or no background."""
    marked, pixels = (sum(getattr(finding, name) for finding in findings) for name in ("marked", "pixels"))
    if marked in (0, pixels):
        everywhere = "foreground" if marked else "background"
        raise DataError(f"{samples[0].mask.parent}: expected masks, got only {everywhere} in all {len(samples)}")


def _examine(sample: Sample, classes: int, side: int = 0) -> Finding:
    try:
        image = read_image(sample)
        mask = read_mask(sample, image) if sample.mask else None
    except DataError as error:
        return Finding(error)
    if min(image.shape[:2]) < side:
        return Finding(
            DataError(f"{sample.image}: expected at least {side} x {side}, the size of a crop, got {size_of(image)}")
        )
    if mask is None:
        return Finding()
    found = mask.classes
    if found.max() >= classes:
        return Finding(
            DataError(
                f"{sample.mask}: expected class indices below {classes}, the number of classes, got {found.max()}"
            )
        )
    return Finding(pixels=found.size, marked=int((found > 0).sum()), reading=mask.reading)


def _raise(problems: Sequence[DataError]) -> None:
    """Raise what is wrong, if anything is. Masks of low values are one problem of the data set."""
    low = [problem for problem in problems if isinstance(problem, LowValuesError)]
    lines = [str(problem) for problem in problems if problem not in low]
    if low:
        classes = max(problem.highest for problem in low) + 1
        more = f" (and {len(low) - 1} masks like it)" if len(low) > 1 else ""
        cure = f"if they are class indices, train with --classes {classes}; if they number objects, --instances"
        lines.insert(0, f"{low[0]}{more}: {cure}")
    if len(lines) > SHOWN:
        lines[SHOWN:] = [f"and {len(lines) - SHOWN} more"]
    if lines:
        raise DataError("\n".join(lines))


def _grey_levels(findings: Sequence[Finding]) -> list[str]:
    """A line for each range of grey levels."""
    pixels = sum(finding.pixels for finding in findings)
    grey = [finding.reading for finding in findings if finding.reading.grey]
    lines = []
    for white in sorted({reading.white for reading in grey}):
        some = [reading.grey for reading in grey if reading.white == white]
        lines.append(
            f"masks: {len(some)} of {len(findings)} have grey values between 0 and {white} "
            f"({sum(some) / pixels:.1%} of the pixels); at least half, {white // 2 + 1}, is foreground "
            "(classes are indices, 0, 1, 2, ..., by --classes)"
        )
    return lines


def _foreground_values(findings: Sequence[Finding]) -> list[str]:
    """A line where masks of one value each have different ones: they may be class indices."""
    values = (finding.reading.foreground for finding in findings)
    counts = Counter(value for value in values if value is not None)
    if len(counts) < 2:
        return []
    several = [f"{value} in {count} mask{'s' * (count > 1)}" for value, count in sorted(counts.items())]
    if len(several) > 6:
        several[6:] = [f"{len(several) - 6} other values"]
    return [
        f"masks: the foreground is the value {', '.join(several[:-1])} and {several[-1]}: read as one class here; "
        "--classes N tells class indices apart"
    ]
