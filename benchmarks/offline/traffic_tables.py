"""The rows of `benchmarks.offline.traffic` as GitHub Markdown."""

from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

GROUPS = ("maps", "tokens", "parameters")  # whose memory it is


def describe(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as GitHub Markdown: a summary, then the kernels of each run."""
    ours = [row for row in rows if row["implementation"] == "triton"]
    lines = []
    for row in ours:
        theirs = next(r for r in rows if r["implementation"] == "reference" and _title(r) == _title(row))
        lines.append(
            [
                _title(row),
                row["launches"],
                theirs["launches"],
                *(_megabytes(row[f"{group}_bytes"]) for group in GROUPS),
                _megabytes(row["bytes"]),
                _megabytes(theirs["bytes"]),
                _megabytes(row["bound_bytes"]),
                f"{row['of_bound']:.2f}",
                f"{row['flops'] / 1e9:.2f}",
                f"{theirs['flops'] / 1e9:.2f}",
            ]
        )
    headers = [
        "run",
        "launches",
        "of reference",
        *(f"{group} MB" for group in GROUPS),
        "total MB",
        "of reference",
        "bound MB",
        "of bound",
        "GFLOP",
        "of reference",
    ]
    parts = [f"Unique bytes, summed over kernels:\n\n{_markdown(lines, headers)}"]
    for row in ours:
        heading = f"{_title(row)}. Floors are ESTIMATES for one {row['gpu']}; no time was measured:"
        parts.append(f"{heading}\n\n{_kernel_table(row['kernels'])}")
    return "\n\n".join(parts)


def _kernel_table(kernels: Sequence[dict[str, Any]]) -> str:
    lines = []
    for kernel in kernels:
        loaded, stored = sum(kernel["loaded"].values()), sum(kernel["stored"].values())
        requested = kernel["requested_loaded"] + kernel["requested_stored"]
        lines.append(
            [
                kernel["kernel"],
                kernel["programs"],
                *(_megabytes(kernel["loaded"][group] + kernel["stored"][group]) for group in GROUPS),
                _megabytes(loaded),
                _megabytes(stored),
                f"{requested / (loaded + stored):.1f}",
                f"{sum(kernel['products'].values()) / 1e9:.3f}",
                f"{kernel['floor_us']:.2f}",
            ]
        )
    headers = [
        "kernel",
        "programs",
        *(f"{group} MB" for group in GROUPS),
        "loaded MB",
        "stored MB",
        "requested / unique",
        "GFLOP",
        "floor us",
    ]
    return _markdown(lines, headers)


def _title(row: dict[str, Any]) -> str:
    return f"{row['mode']}, {row['dtype']}, batch {row['batch']}, grid {row['patch']} x {row['patch']}"


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.2f}"


def _markdown(lines: list[list[Any]], headers: list[str]) -> str:
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)
