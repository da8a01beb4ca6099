"""Draw the benchmarks' results: every target beside what was measured, and cost against the size of the pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams.update({"svg.hashsalt": "kvcache", "svg.fonttype": "none", "font.size": 8})

import matplotlib.pyplot as plt  # noqa: E402

MET, MISSED, TARGET = "#1a7f37", "#cf222e", "#57606a"


def draw(tables: list[dict[str, Any]], folder: Path) -> None:
    """Write `performance.svg` and `core_scale.svg` into the folder, each if there is something to draw."""
    aimed = [table for table in tables if any(row["targets"] for row in table["rows"])]
    if aimed:
        _save(_draw_targets(aimed), folder / "performance.svg")
    for table in tables:
        if table["name"] == "core_scale":
            _save(_draw_scale(table["rows"]), folder / "core_scale.svg")


def _draw_targets(tables: list[dict[str, Any]]) -> mpl.figure.Figure:
    """A line per target: the ratio with its range, and the most it may be."""
    figure, axes = plt.subplots(layout="constrained")
    labels: list[str] = []
    for table in tables:
        labels.append(table["title"])
        for row in table["rows"]:
            for peer, target in row["targets"].items():
                _draw_target(axes, len(labels), row["ratios"][peer], target)
                labels.append(f"{row['case']} / {peer}")
    for label, marker, colour in (
        ("target met", "o", MET),
        ("target missed", "o", MISSED),
        ("target: at most this", "|", TARGET),
    ):
        axes.plot([], [], marker, color=colour, label=label)
    axes.axvline(1, color="black", linewidth=0.6)
    axes.set_yticks(range(len(labels)), labels)
    titles = {table["title"] for table in tables}
    for label in axes.get_yticklabels():
        label.set_weight("bold" if label.get_text() in titles else "normal")
    axes.set(
        xscale="log", ylim=(len(labels), -1), xlabel="ours / peer: median and range\nof the runs; left of 1 is better"
    )
    axes.grid(axis="x", alpha=0.3)
    axes.tick_params(axis="y", length=0)
    figure.set_size_inches(10, 0.8 + 0.2 * len(labels))
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def _draw_target(axes: mpl.axes.Axes, y: int, ratio: dict[str, float], target: float) -> None:
    colour = MET if ratio["median"] <= target else MISSED
    axes.plot([ratio["low"], ratio["high"]], [y, y], color=colour, linewidth=1.5)
    axes.plot(ratio["median"], y, "o", color=colour, markersize=5)
    axes.plot(target, y, "|", color=TARGET, markersize=10, markeredgewidth=2)


def _draw_scale(rows: list[dict[str, Any]]) -> mpl.figure.Figure:
    """Flat lines are what was promised."""
    sizes = [row["extra"]["blocks"] for row in rows]
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    prompts = [row["ours"]["median"] for row in rows]
    axes.plot(sizes, prompts, "o-", label="prompt of 64 blocks, 32 of them cached")
    short = [row["extra"]["µs/one-block prompt"] for row in rows]
    axes.plot(sizes, short, "^-", label="prompt of one block, none alike")
    appends = [row["extra"]["ns/append"] / 1e3 for row in rows]
    axes.plot(sizes, appends, "s-", label="append, a new block every 16")
    axes.set(xscale="log", yscale="log", xlabel="blocks in the pool, full", ylabel="µs", ylim=(0.1, 2000))
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    return figure


def _save(figure: mpl.figure.Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
