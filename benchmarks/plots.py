"""The figures. The same rows give the same bytes under one version of matplotlib."""

from collections import Counter
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

from benchmarks import cases, console
from benchmarks.environment import measured_on
from benchmarks.providers import IMPLEMENTATIONS
from benchmarks.rows import STEP_NAMES, Row

LINES = {"": "-", "compiled": "--", "max-autotune": ":"}
HATCHES = {"": "", "compiled": "//", "max-autotune": "xx"}
MARKERS = {"": "o", "compiled": "^", "max-autotune": "D"}
COMPARED = STEP_NAMES["eval", "forward"], STEP_NAMES["train", "full"]  # the steps that a figure has a panel for
NOT_DRAWN = "plots: not drawn, matplotlib is not installed"


def draw(figure_of: Callable[[Any, Sequence[Row]], None], found: Sequence[Row], path: Path) -> Path | None:
    """Write a figure of the rows; its path, or None where matplotlib is not installed: see NOT_DRAWN."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")  # there may be no screen
    from matplotlib import pyplot as plt

    with plt.style.context("default"), plt.rc_context({"font.family": "DejaVu Sans", "font.size": 9}):
        figure = plt.figure(layout="constrained")
        figure_of(figure, found)
        figure.suptitle(measured_on(found[0].environment), fontsize=10)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
        plt.close(figure)
    return path


def style(provider: str, bar: bool = False) -> dict[str, Any]:
    """Colour by implementation, line, marker or hatch by compiler, filled marker or dots by CUDA graph."""
    implementation, compiled = provider.removesuffix(" graph").partition(" ")[::2]
    graph, colour = provider.endswith(" graph"), IMPLEMENTATIONS[implementation].colour
    if bar:
        return {"facecolor": colour, "hatch": HATCHES[compiled] + (".." if graph else ""), "edgecolor": "white"}
    fill = colour if graph else "white"
    return {"color": colour, "linestyle": LINES[compiled], "marker": MARKERS[compiled], "markerfacecolor": fill}


def order(found: Sequence[Row]) -> list[str]:
    """Providers that have a time, the reference's first."""
    names = {row.provider for row in found if row.p50_ms is not None}
    return sorted(names, key=lambda name: (list(IMPLEMENTATIONS).index(name.split()[0]), name))


def bars(figure: Any, found: Sequence[Row]) -> None:
    """Latency (whiskers from p20 to p80) and peak memory of the module; a panel a step and batch."""
    groups = list(dict.fromkeys((row.step, row.batch) for row in found))
    names = order(found)
    figure.set_size_inches(3 + 2 * len(groups), 5.4)
    panels = figure.subplots(2, len(groups), squeeze=False)
    for (times, memory), (step, batch) in zip(panels.T, groups, strict=True):
        rows = [r for r in found if (r.step, r.batch) == (step, batch) and r.provider in names]
        times.set_title(f"{step}, {_said(rows, 'batch', 'dtype')}", fontsize=10)
        for row in rows:
            looks, place = style(row.provider, bar=True) | {"width": 0.8}, names.index(row.provider)
            if row.p50_ms is not None:
                whiskers = [[row.p50_ms - row.p20_ms], [row.p80_ms - row.p50_ms]]
                drawn = times.bar(place, row.p50_ms, yerr=whiskers, capsize=2, **looks)
                times.bar_label(drawn, [console.duration(row.p50_ms)], fontsize=8, padding=2)
            if row.peak_mb is not None:
                memory.bar_label(
                    memory.bar(place, row.peak_mb, **looks), [f"{row.peak_mb:.0f} MB"], fontsize=8, padding=2
                )
        for axis in (times, memory):
            axis.set_xticks([])
            axis.spines[["top", "right"]].set_visible(False)
            axis.margins(y=0.12)
    panels[0, 0].set_ylabel("time, ms (whiskers: p20 to p80)")
    panels[1, 0].set_ylabel("peak memory above inputs, MB")
    _legend(figure, names, bar=True)


def latency(figure: Any, found: Sequence[Row]) -> None:
    """The module at the paper's size over the batch, of providers that were timed at more than one."""
    chosen = _lined([r for r in of_one_dtype(found) if r.size == "paper" and r.p50_ms is not None], _batch)
    label = f"images in the batch ({_said(chosen, 'dtype')})"
    _lines(figure, chosen, _batch, lambda row: row.p50_ms, label, "time of a call, ms")


def memory(figure: Any, found: Sequence[Row]) -> None:
    """The module of the paper's channels over the grid, the smallest batch."""
    chosen = _by_grid(found)
    label = f"side of the token grid ({_said(chosen, 'batch', 'dtype')})"
    _lines(figure, chosen, _grid, lambda row: row.peak_mb, label, "peak memory above inputs, MB")


def of_floor(figure: Any, found: Sequence[Row]) -> None:
    """The floor over the time of each stage: the paper's size, one dtype, the largest batch."""
    chosen = _stages(found)
    value = {(r.provider, r.step, r.case): 100 * r.floor_ms / r.p50_ms for r in chosen}
    labels = {case: case.replace("_", "\n") for case in cases.STAGES}
    label = f"floor over time, % (paper's size, {_said(chosen, 'batch', 'dtype')})"
    _grouped(figure, value, labels, order(chosen), label)


def speedup(figure: Any, found: Sequence[Row]) -> None:
    """The reference's time over each provider's, the module at every size: one dtype, the batch that has the most."""
    timed, reference = _beside_reference(found)
    value = {(r.provider, r.step, r.size): reference[r.group] / r.p50_ms for r in timed}
    labels = {name: name for name in cases.SIZES if any(row.size == name for row in timed)}
    _grouped(
        figure, value, labels, order(timed), f"speed-up over the eager reference ({_said(timed, 'batch', 'dtype')})"
    )


def of_one_dtype(found: Sequence[Row]) -> list[Row]:
    """Those of the module in the dtype that has the most: a figure compares like with like."""
    timed = [row for row in found if row.case == "dca" and row.p50_ms is not None]
    kept = {row.dtype for row in _of_most(timed, "dtype")}
    return [row for row in found if row.case == "dca" and row.dtype in kept]


def _of_most(found: Sequence[Row], name: str) -> list[Row]:
    """The rows with the value under this name that most of them have, of two such the smaller."""
    counts = Counter(getattr(row, name) for row in found)
    most = min(counts, key=lambda value: (-counts[value], value), default=None)
    return [row for row in found if getattr(row, name) == most]


def _lined(found: Sequence[Row], x: Callable[[Row], int]) -> list[Row]:
    """Those of providers that have more than one point in a step: one point alone is no line."""
    points = Counter((row.provider, row.step) for row in {(r.provider, r.step, x(r)): r for r in found}.values())
    return [row for row in found if points[row.provider, row.step] > 1]


def _by_grid(found: Sequence[Row]) -> list[Row]:
    """The module of the paper's channels, the smallest batch, where its memory was measured."""
    chosen = [r for r in of_one_dtype(found) if r.size in ("paper", "grid56", "grid112") and r.peak_mb is not None]
    smallest = min((r.batch for r in chosen), default=1)
    return _lined([r for r in chosen if r.batch == smallest], _grid)


def _stages(found: Sequence[Row]) -> list[Row]:
    """Stages that have a time and a floor: the paper's size, one dtype, the largest batch."""
    chosen = [r for r in found if r.case in cases.STAGES and r.size == "paper" and r.p50_ms and r.floor_ms]
    chosen = _of_most([r for r in chosen if r.step in COMPARED], "dtype")
    largest = max((r.batch for r in chosen), default=0)
    return [r for r in chosen if r.batch == largest]


def _beside_reference(found: Sequence[Row]) -> tuple[list[Row], dict[tuple[Any, ...], float]]:
    """The module's rows of one dtype and batch that the reference was timed beside, and its time by their group."""
    chosen = [row for row in of_one_dtype(found) if row.p50_ms and row.step in COMPARED]
    reference = {row.group: row.p50_ms for row in chosen if row.provider == "reference"}
    return _of_most([row for row in chosen if row.group in reference], "batch"), reference


def _batch(row: Row) -> int:
    return row.batch


def _grid(row: Row) -> int:
    return row.patch


def _said(found: Sequence[Row], *names: str) -> str:
    """What all rows of a figure have in common: "batch 8, bfloat16"."""
    return ", ".join("batch " * (name == "batch") + str(getattr(found[0], name)) for name in names) if found else ""


FIGURES = {"latency": latency, "memory": memory, "speedup": speedup, "of_floor": of_floor}


def figures(found: Sequence[Row]) -> list[str]:
    """The names of those that the rows have something for: a line needs two points, a speed-up the reference."""
    timed = [row for row in of_one_dtype(found) if row.size == "paper" and row.p50_ms is not None]
    there = {
        "latency": bool(_lined(timed, _batch)),
        "memory": bool(_by_grid(found)),
        "speedup": bool(_beside_reference(found)[0]),
        "of_floor": bool(_stages(found)),
    }
    return [name for name in FIGURES if there[name]]


def _lines(figure: Any, found: Sequence[Row], x: Any, y: Any, x_label: str, y_label: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    names = order(found)
    for axis, step in _panels(figure, {row.step for row in found}, 4.5):
        for name in names:
            points = sorted((x(r), y(r)) for r in found if (r.provider, r.step) == (name, step))
            if points:
                axis.plot(*zip(*points, strict=True), **style(name))
        axis.set(title=step, xlabel=x_label, ylabel=y_label, xscale="log", yscale="log")
        ticks = sorted({x(r) for r in found})
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    _legend(figure, names)


def _grouped(
    figure: Any, value: dict[tuple[str, str, str], float], groups: dict[str, str], names: list[str], label: str
) -> None:
    """Bars by (provider, step, group): those of a group side by side, without room for what it or the step lacks."""
    width = 0.8 / len(names)
    for axis, step in _panels(figure, {step for _, step, _ in value}, 5):
        shown = [group for group in groups if any((name, step, group) in value for name in names)]
        for place, group in enumerate(shown):
            present = [name for name in names if (name, step, group) in value]
            for i, name in enumerate(present):
                height = value[name, step, group]
                drawn = axis.bar(place + (i - (len(present) - 1) / 2) * width, height, width, **style(name, bar=True))
                axis.bar_label(drawn, fmt="%.2g", fontsize=7, padding=2)
        axis.set_xticks(range(len(shown)), [groups[group] for group in shown], fontsize=8)
        axis.set(title=step, ylabel=label)
        axis.spines[["top", "right"]].set_visible(False)
    _legend(figure, names, bar=True)


def _panels(figure: Any, steps: Container[str], inches: float) -> list[tuple[Any, str]]:
    """One, this wide, for each step that is compared and has something to draw."""
    drawn = [step for step in COMPARED if step in steps]
    figure.set_size_inches(inches * len(drawn), 4.4)
    return list(zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True))


def _legend(figure: Any, names: Sequence[str], bar: bool = False) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [Patch(**style(name, bar)) if bar else Line2D([], [], **style(name)) for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
