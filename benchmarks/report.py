"""The table, the figure and the row file of a run."""

import json
from pathlib import Path
from typing import Any

import matplotlib
from tabulate import tabulate

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # the backend above comes first: there may be no screen

Row = dict[str, Any]

COLOURS = {"reference": "#9aa5b1", "reference compiled": "#52606d", "fused": "#2b8a3e"}


def table(rows: list[Row]) -> str:
    """One line a case and provider, as GitHub Markdown. Ratios are the reference's figure over the provider's."""
    lines = []
    for row in rows:
        base = baseline(rows, row)
        lines.append(
            [
                title(row),
                row["provider"],
                _number(row["max_error"], ".1e"),
                _number(row["rms_error"], ".1e"),
                " / ".join(_number(row[key], ".0f") for key in ("p20_ms", "p50_ms", "p80_ms")),
                ratio(base["p50_ms"], row["p50_ms"], "x"),
                _number(row["peak_mb"], ".0f"),
                ratio(row["peak_mb"], base["peak_mb"]),
            ]
        )
    headers = [
        "case",
        "provider",
        "max error",
        "RMS error",
        "p20 / p50 / p80 ms",
        "speed-up",
        "peak MB",
        "of reference",
    ]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def title(row: Row) -> str:
    return f"{row['mode']}, batch {row['batch']}, grid {row['patch']} x {row['patch']}"


def baseline(rows: list[Row], row: Row) -> Row:
    """The reference's row of the same case."""
    return next(r for r in rows if title(r) == title(row) and r["provider"] == "reference")


def plot(rows: list[Row], path: Path) -> None:
    """Bars of latency (whiskers from p20 to p80) and of peak memory, a group a case."""
    titles = list(dict.fromkeys(title(row) for row in rows))
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    figure, (times, memory) = plt.subplots(1, 2, figsize=(4 + 2.2 * len(titles), 4.2), layout="constrained")
    width = 0.8 / len(providers)
    for p, provider in enumerate(providers):
        for row in (row for row in rows if row["provider"] == provider):
            position = titles.index(title(row)) + (p - (len(providers) - 1) / 2) * width
            style: dict[str, Any] = {"width": width, "color": COLOURS[provider]}
            if row["p50_ms"] is not None:
                whiskers = [[row["p50_ms"] - row["p20_ms"]], [row["p80_ms"] - row["p50_ms"]]]
                bars = times.bar(position, row["p50_ms"], yerr=whiskers, capsize=2, **style)
                times.bar_label(bars, fmt="%.0f", fontsize=8, padding=2)
            if row["peak_mb"] is not None:
                memory.bar_label(memory.bar(position, row["peak_mb"], **style), fmt="%.0f", fontsize=8, padding=2)
    names = "latency, ms (median; whiskers p20 to p80)", "peak memory above the inputs, MB"
    for axis, name in zip((times, memory), names, strict=True):
        axis.set_title(name, fontsize=10)
        axis.set_xticks(range(len(titles)), [t.replace(", ", "\n") for t in titles], fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.12)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[provider]) for provider in providers]
    figure.legend(handles, providers, loc="outside lower center", ncols=len(providers), frameon=False)
    environment = rows[0]["environment"]
    where = environment["gpu"] or f"{environment['cpu']}, {environment['threads']} threads"
    figure.suptitle(f"Dual Cross-Attention, {rows[0]['dtype']} on {where}, torch {environment['torch']}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def save(rows: list[Row], path: Path) -> None:
    """The rows as JSON, each with the environment that it was measured in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")


def ratio(a: float | None, b: float | None, unit: str = "") -> str:
    """a / b, or nothing where one was not measured or is too small to measure."""
    return f"{a / b:.2f}{unit}" if a and b else ""


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)
