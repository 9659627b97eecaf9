"""The figures as one picture: a panel per scenario, a bar per system and pass, so that ratios are seen at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.report import machine_line, number
from bench.results import BY_NAME, Pass, Results

PANELS = (
    "small-cold",
    "small-far",
    "small-disk",
    "small-shm",
    "small-page",
    "large-cold",
    "large-far",
    "large-disk",
    "large-shm",
    "large-page",
    "list-second",
    "stat",
    "random-disk",
    "random-shm",
)
_COLUMNS = 5
_FEWEST_SLOTS = 5
_OURS, _OTHERS = ("#c2410c", "#fdba74"), ("#475569", "#cbd5e1")


def bars(results: Results, scenario: str) -> list[tuple[str, str, float, float | None]]:
    """Return (system, label, figure as installed, figure with the guard) of every system measured in a scenario."""
    found = []
    for name, record in results.systems.items():
        installed = results.median(Pass.INSTALLED, name, scenario)
        if installed is not None:
            found.append((name, record.label, installed, results.median(Pass.GUARD, name, scenario)))
    return found


def draw(results: Results, path: Path) -> bool:
    """Write the chart as SVG; return False when there is nothing to draw."""
    panels = [name for name in PANELS if bars(results, name)]
    if not panels:
        return False
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"svg.hashsalt": "cachefs", "font.size": 8, "font.family": "DejaVu Sans"})
    from matplotlib import pyplot

    rows = -(-len(panels) // _COLUMNS)
    figure, axes = pyplot.subplots(rows, _COLUMNS, figsize=(19, 0.6 + 2.5 * rows), squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, panels, strict=False):
        _panel(axis, name, bars(results, name))
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(
        "cachefs beside its peers; dark: as installed, light: with the wake-up guard held for everyone\n"
        + machine_line(results),
        fontsize=9,
    )
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return True


def _panel(axis: Any, scenario: str, measured: list[tuple[str, str, float, float | None]]) -> None:
    for position, (name, _, installed, guard) in enumerate(measured):
        dark, light = _OURS if name == "cachefs" else _OTHERS
        if guard is not None:
            axis.barh(position + 0.2, guard, height=0.38, color=light)
            axis.text(guard, position + 0.2, f" {number(guard)}", va="center", fontsize=6, color="#64748b")
        offset = -0.2 if guard is not None else 0
        axis.barh(position + offset, installed, height=0.38, color=dark)
        axis.text(installed, position + offset, f" {number(installed)}", va="center", fontsize=7)
    axis.set_yticks(range(len(measured)), [label for _, label, _, _ in measured])
    axis.set_ylim(max(len(measured), _FEWEST_SLOTS) - 0.5, -0.5)  # downwards; a lone bar is no thicker than the others
    axis.set_xmargin(0.2)
    axis.set_xticks([])
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    axis.set_title(f"{BY_NAME[scenario].title} ({BY_NAME[scenario].unit})", fontsize=9, loc="left")
