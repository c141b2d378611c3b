"""The figures. The same rows give the same bytes under one version of matplotlib."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import cases
from benchmarks.rows import Row

COLOURS = {"without": "#ced4da", "reference": "#868e96", "torch": "#2b8a3e", "triton": "#5f3dc4"}
LINES = {"": "-", "compiled": "--", "max-autotune": ":"}
HATCHES = {"": "", "compiled": "//", "max-autotune": "xx"}
STEPS = (("eval", "forward"), ("train", "full"))


def draw(figure_of: Callable[[Any, Sequence[Row]], None], found: Sequence[Row], path: Path) -> str:
    """Write a figure of the rows; what became of it, in a line."""
    try:
        import matplotlib
    except ImportError:
        return "plots: not drawn, matplotlib is not installed"
    matplotlib.use("Agg")  # there may be no screen
    from matplotlib import pyplot as plt

    with plt.style.context("default"), plt.rc_context({"font.family": "DejaVu Sans", "font.size": 9}):
        figure = plt.figure(layout="constrained")
        figure_of(figure, found)
        environment = found[0].environment
        where = environment.get("gpu") or f"{environment.get('cpu')}, {environment.get('threads')} threads"
        figure.suptitle(f"{where}, torch {environment.get('torch')}", fontsize=10)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
        plt.close(figure)
    return f"figure: {path}"


def style(provider: str, bar: bool = False) -> dict[str, Any]:
    """Colour by implementation, line or hatch by compiler, marker or dots by CUDA graph."""
    implementation, compiled = provider.removesuffix(" graph").partition(" ")[::2]
    graph, colour = provider.endswith(" graph"), COLOURS[implementation]
    if bar:
        return {"facecolor": colour, "hatch": HATCHES[compiled] + (".." if graph else ""), "edgecolor": "white"}
    return {"color": colour, "linestyle": LINES[compiled], "marker": "s" if graph else "o", "markersize": 4}


def order(found: Sequence[Row]) -> list[str]:
    """Providers that have a time, the reference's first."""
    names = {row.provider for row in found if row.p50_ms is not None}
    return sorted(names, key=lambda name: (list(COLOURS).index(name.split()[0]), name))


def bars(figure: Any, found: Sequence[Row]) -> None:
    """Latency (whiskers from p20 to p80) and peak memory, a group a case."""
    groups = list(dict.fromkeys(f"{row.phase}\nbatch {row.batch}\n{row.size}" for row in found))
    names = order(found)
    figure.set_size_inches(4 + 2.2 * len(groups), 4.4)
    times, memory = figure.subplots(1, 2)
    width = 0.8 / max(1, len(names))
    for row in (row for row in found if row.provider in names):
        place = groups.index(f"{row.phase}\nbatch {row.batch}\n{row.size}")
        position = place + (names.index(row.provider) - (len(names) - 1) / 2) * width
        looks = style(row.provider, bar=True) | {"width": width}
        if row.p50_ms is not None:
            whiskers = [[row.p50_ms - row.p20_ms], [row.p80_ms - row.p50_ms]]
            times.bar_label(times.bar(position, row.p50_ms, yerr=whiskers, capsize=2, **looks), fmt="%.0f", fontsize=7)
        if row.peak_mb is not None:
            memory.bar_label(memory.bar(position, row.peak_mb, **looks), fmt="%.0f", fontsize=7)
    for axis, title in ((times, "latency, ms (median; whiskers p20 to p80)"), (memory, "peak memory above inputs, MB")):
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(groups)), groups, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.12)
    _legend(figure, names, bar=True)


def of_one_dtype(found: Sequence[Row]) -> list[Row]:
    """Those of the module in the dtype that has the most: a figure compares like with like."""
    counts = Counter(row.dtype for row in found if row.case == "dca" and row.p50_ms is not None)
    most = max(counts, key=lambda dtype: counts[dtype], default=None)
    return [row for row in found if row.case == "dca" and row.dtype == most]


def latency(figure: Any, found: Sequence[Row]) -> None:
    """The module at the paper's size over the batch."""
    chosen = [r for r in of_one_dtype(found) if r.size == "paper"]
    label = f"images in the batch, {chosen[0].dtype if chosen else ''}"
    _lines(figure, chosen, lambda row: row.batch, lambda row: row.p50_ms, label, "latency, ms")


def _by_grid(found: Sequence[Row]) -> list[Row]:
    """The module of the paper's channels, the smallest batch, where its memory was measured."""
    chosen = [r for r in of_one_dtype(found) if r.size in ("paper", "grid56", "grid112") and r.peak_mb is not None]
    smallest = min((r.batch for r in chosen), default=1)
    return [r for r in chosen if r.batch == smallest]


def memory(figure: Any, found: Sequence[Row]) -> None:
    """The module of the paper's channels over the grid, the smallest batch."""
    chosen = _by_grid(found)
    label = f"side of the token grid, batch {chosen[0].batch}, {chosen[0].dtype}" if chosen else ""
    _lines(figure, chosen, lambda row: row.patch, lambda row: row.peak_mb, label, "peak memory above inputs, MB")


def of_floor(figure: Any, found: Sequence[Row]) -> None:
    """The floor over the time of each stage, the paper's size and the largest batch."""
    chosen = [r for r in found if r.case in cases.STAGES and r.size == "paper" and r.p50_ms and r.floor_ms]
    largest = max((r.batch for r in chosen), default=0)
    value = {(r.provider, r.phase, r.mode, r.case): 100 * r.floor_ms / r.p50_ms for r in chosen if r.batch == largest}
    labels = {(*step, case): case.replace("_", "\n") for step in STEPS for case in cases.STAGES}
    _grouped(figure, value, cases.STAGES, labels, order(chosen), f"% of floor, paper size, batch {largest}")


def speedup(figure: Any, found: Sequence[Row]) -> None:
    """The reference's time over each provider's, the module at every size, at the batch that most providers have."""
    chosen = of_one_dtype(found)
    times = {row.key: row.p50_ms for row in chosen if row.p50_ms}
    timed = [row for row in chosen if row.key in times and (*row.group, "reference") in times]
    counts = Counter((row.phase, row.mode, row.size, row.batch) for row in timed)
    batches: dict[tuple[str, str, str], int] = {}
    for *where, batch in sorted(counts, key=lambda group: (counts[group], group[-1])):
        batches[tuple(where)] = batch
    alike = [row for row in timed if batches[row.phase, row.mode, row.size] == row.batch]
    value = {(r.provider, r.phase, r.mode, r.size): times[*r.group, "reference"] / times[r.key] for r in alike}
    sizes = [name for name in cases.SIZES if any(name == size for *_, size in batches)]
    labels = {where: f"{where[-1]}\nbatch {batch}" for where, batch in batches.items()}
    label = f"speed-up over the reference, x, {chosen[0].dtype if chosen else ''}"
    _grouped(figure, value, sizes, labels, order(alike), label)


FIGURES = {"latency": latency, "memory": memory, "speedup": speedup, "of_floor": of_floor}


def figures(found: Sequence[Row]) -> list[str]:
    """The names of those that the rows have something for: a line over the grid needs two."""
    measured = {row.case for row in found if row.p50_ms is not None and row.size in cases.SIZES}
    there = {
        "latency": "dca" in measured,
        "memory": len({row.patch for row in _by_grid(found)}) > 1,
        "speedup": "dca" in measured,
        "of_floor": bool(measured & set(cases.STAGES)),
    }
    return [name for name in FIGURES if there[name]]


def _lines(figure: Any, found: Sequence[Row], x: Any, y: Any, x_label: str, y_label: str) -> None:
    figure.set_size_inches(9, 4.4)
    names = order(found)
    for axis, (phase, mode) in zip(figure.subplots(1, 2), STEPS, strict=True):
        for name in names:
            of_name = [r for r in found if (r.provider, r.phase, r.mode) == (name, phase, mode) and y(r) is not None]
            points = sorted((x(r), y(r)) for r in of_name)
            if points:
                axis.plot(*zip(*points, strict=True), **style(name))
        axis.set(title=f"{phase}, {mode}", xlabel=x_label, ylabel=y_label)
        ticks = sorted({x(r) for r in found if y(r) is not None})
        if ticks:
            axis.set(xscale="log", yscale="log")
            axis.set_xticks(ticks, [str(t) for t in ticks])
            axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    _legend(figure, names)


def _grouped(
    figure: Any,
    value: dict[Any, float],
    groups: Sequence[str],
    labels: dict[Any, str],
    names: list[str],
    label: str,
) -> None:
    figure.set_size_inches(10, 4.4)
    width = 0.8 / max(1, len(names))
    for axis, step in zip(figure.subplots(1, 2), STEPS, strict=True):
        for i, name in enumerate(names):
            places = [p for p, group in enumerate(groups) if (name, *step, group) in value]
            heights = [value[name, *step, groups[p]] for p in places]
            middles = [p + (i - (len(names) - 1) / 2) * width for p in places]
            axis.bar(middles, heights, width, **style(name, bar=True))
        axis.set_xticks(range(len(groups)), [labels.get((*step, group), "") for group in groups], fontsize=8)
        axis.set(title=", ".join(step), ylabel=label)
        axis.spines[["top", "right"]].set_visible(False)
    _legend(figure, names, bar=True)


def _legend(figure: Any, names: Sequence[str], bar: bool = False) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [Patch(**style(name, bar)) if bar else Line2D([], [], **style(name)) for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
