"""The figures as one picture: a panel per trace, a bar per policy, a line where Belady's optimum is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_COLUMNS = 4
_COLOURS = {"epoch": "#c2410c", "s3fifo": "#475569", "lru": "#94a3b8", "plan": "#fdba74"}


def draw(figures: list[dict[str, Any]], path: Path) -> None:
    """Write the chart as SVG."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"svg.hashsalt": "cachefs", "font.size": 8, "font.family": "DejaVu Sans"})
    from matplotlib import pyplot

    rows = -(-len(figures) // _COLUMNS)
    figure, axes = pyplot.subplots(rows, _COLUMNS, figsize=(17, 0.5 + 1.7 * rows), squeeze=False, layout="constrained")
    for axis, one in zip(axes.flat, figures, strict=False):
        _panel(axis, one)
    for axis in list(axes.flat)[len(figures) :]:
        axis.set_visible(False)
    figure.suptitle("Share of reads that are hits after the first phase; dotted: Belady's optimum", fontsize=9)
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def _panel(axis: Any, one: dict[str, Any]) -> None:
    names = [name for name in _COLOURS if name in one["later"]]
    for position, name in enumerate(names):
        value = one["later"][name]
        axis.barh(position, value, height=0.7, color=_COLOURS[name])
        axis.text(value, position, f" {value:.3f}", va="center", fontsize=7)
    axis.axvline(one["later"]["optimum"], color="#0f172a", linestyle=":", linewidth=1)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xlim(0, 1.15)
    axis.set_xticks([])
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    axis.set_title(one["title"], fontsize=8, loc="left")
