"""The figures as one picture: a panel per trace, a bar per policy, a line at Belady's optimum; then one per load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_COLUMNS = 4
_COLOURS = {"epoch": "#c2410c", "s3fifo": "#475569", "lru": "#94a3b8", "plan": "#fdba74"}
_AHEAD = {"with": "#c2410c", "without": "#94a3b8"}


def draw(policies: list[dict[str, Any]], ahead: list[dict[str, Any]], path: Path) -> None:
    """Write the chart as SVG: what policies reached, and below it what prefetch did."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"svg.hashsalt": "cachefs", "font.size": 8, "font.family": "DejaVu Sans"})
    from matplotlib import pyplot

    above, below = -(-len(policies) // _COLUMNS), -(-len(ahead) // _COLUMNS)
    figure, axes = pyplot.subplots(
        above + below, _COLUMNS, figsize=(17, 0.5 + 1.7 * above + 1.3 * below), squeeze=False, layout="constrained",
        height_ratios=[1.7] * above + [1.3] * below,
    )  # fmt: skip
    for axis in axes.flat:
        axis.set_visible(False)
    for axis, one in zip(axes[:above].flat, policies, strict=False):
        _panel(axis, one["title"], {name: one["later"][name] for name in _COLOURS}, _COLOURS, one["later"]["optimum"])
    for axis, one in zip(axes[above:].flat, ahead, strict=False):
        title = f"prefetch: {one['title']}, {one['speed_up']:.1f} x, {one['waste']:.0%} wasted"
        _panel(axis, title, {name: one["hits"][name] for name in _AHEAD}, _AHEAD, one["hits"]["optimum"])
    figure.suptitle(
        "Share of reads that are hits after the first phase (prefetch: of all); dotted: Belady's optimum",
        fontsize=9,
    )
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def _panel(axis: Any, title: str, values: dict[str, float], colours: dict[str, str], optimum: float) -> None:
    axis.set_visible(True)
    for position, (name, value) in enumerate(values.items()):
        axis.barh(position, value, height=0.7, color=colours[name])
        axis.text(value, position, f" {value:.3f}", va="center", fontsize=7)
    axis.axvline(optimum, color="#0f172a", linestyle=":", linewidth=1)
    axis.set_yticks(range(len(values)), list(values))
    axis.set_ylim(len(values) - 0.4, -0.6)
    axis.set_xlim(0, 1.15)
    axis.set_xticks([])
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    axis.set_title(title, fontsize=8, loc="left")
