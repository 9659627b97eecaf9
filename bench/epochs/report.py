"""The figures of the epochs as tables, markdown and JSON, with the targets beside them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import report
from bench.epochs.runs import Figures
from bench.targets import Judgement, Target, brief

FIRST = {
    "listing": "one reader, one directory, in listing order",
    "shuffled": "one reader, one directory, shuffled",
    "tree": "4 readers, class folders, shuffled",
}
LARGER = {
    "epoch": "`--eviction epoch`",
    "plan": "the same, with a plan",
    "lru": "`--eviction lru`",
}
SUBJECT, ORIGIN, OWN_PROTOCOL = "cachefs", "obstore", "seaweedfs"
"""The last reads its own servers by their own protocol and never asks the S3 gateway for anything."""


@dataclass(slots=True)
class EpochResults:
    """Everything of one run."""

    machine: dict[str, Any]
    files: dict[str, int]
    labels: dict[str, str] = field(default_factory=dict)
    """The systems' titles by name; what is absent has none."""
    first: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Files per second by scenario and system, one for each round."""
    far: Figures = field(default_factory=dict)
    larger: dict[str, Figures] = field(default_factory=dict)
    waste: Figures = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, scenario: str, system: str, rate: float) -> None:
        """Keep a sample."""
        self.first.setdefault(scenario, {}).setdefault(system, []).append(rate)

    def rate(self, scenario: str, system: str) -> float | None:
        """Return the median of the rounds."""
        samples = self.first.get(scenario, {}).get(system)
        return statistics.median(samples) if samples else None

    def against_peers(self, scenario: str, *, s3_only: bool) -> float | None:
        """Return how many times as fast as the best peer cachefs was."""
        leave_out = {SUBJECT, ORIGIN, *([OWN_PROTOCOL] if s3_only else [])}
        theirs = [self.rate(scenario, name) or 0.0 for name in self.first.get(scenario, {}) if name not in leave_out]
        ours = self.rate(scenario, SUBJECT)
        return ours / max(theirs) if ours is not None and theirs else None

    def against_server(self, scenario: str) -> float | None:
        """Return the share of the server's own rate."""
        ours, server = self.rate(scenario, SUBJECT), self.rate(scenario, ORIGIN)
        return ours / server if ours is not None and server else None

    def as_plain(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return {
            "machine": self.machine,
            "files": self.files,
            "first_epoch_files_per_s": self.first,
            "far": self.far,
            "larger_than_cache": self.larger,
            "waste": self.waste,
            "remarks": self.remarks,
            "targets": [judgement.as_plain() for judgement in judge(self)],
            "seconds": round(self.seconds, 1),
        }


def _peers(scenario: str, *, s3_only: bool) -> Callable[[EpochResults], float | None]:
    return lambda results: results.against_peers(scenario, s3_only=s3_only)


def _later(results: EpochResults, name: str) -> float | None:
    """The hit ratio of epochs 2 to 4."""
    return float(statistics.mean(results.larger[name]["hits"][1:4])) if name in results.larger else None


def _below_best(results: EpochResults) -> float | None:
    """How far below Belady's the hits with a plan are."""
    if "plan" not in results.larger:
        return None
    one = results.larger["plan"]
    return float(statistics.mean(one["best"][1:4]) - statistics.mean(one["hits"][1:4]))


def _lost_by_scan(results: EpochResults) -> float | None:
    """The share of the hits that a scan of other files took from the epoch after it."""
    if len(results.larger.get("epoch", {}).get("hits", ())) < 5:
        return None
    before, after = results.larger["epoch"]["hits"][3:5]
    return float(1 - after / before) if before else None


def _far_gain(results: EpochResults) -> float | None:
    if not results.far:
        return None
    return float(results.far["auto"]["files_per_s"] / results.far["off"]["files_per_s"])


def _wasted(results: EpochResults, what: str) -> float | None:
    return float(results.waste[what]["wasted_share"]) if what in results.waste else None


def _amplification(results: EpochResults) -> float | None:
    if "points" not in results.waste:
        return None
    return float(results.waste["points"]["origin_bytes"] / results.waste["points"]["read_bytes"])


TARGETS: tuple[Target[EpochResults], ...] = (
    *(
        Target(f"first epoch, {title}: against the best peer that reads S3", 2.0,
                _peers(name, s3_only=True))
        for name, title in FIRST.items()
    ),
    *(
        Target(f"first epoch, {title}: against the best of all", 2.0,
                _peers(name, s3_only=False))
        for name, title in FIRST.items()
    ),
    Target(f"first epoch, {FIRST['listing']}: of the server's own rate", 0.5, lambda r: r.against_server("listing")),
    Target("first epoch with S3 20 ms away: against the same without prefetch", 10.0, _far_gain),
    Target("dataset twice the cache, epochs 2 to 4: share of hits", 0.48, lambda r: _later(r, "epoch"), unit=""),
    Target("the same with a plan: below Belady's optimum by", 0.02, _below_best, at_most=True, unit=""),
    Target("a scan of other files costs the next epoch, of its hits", 0.05, _lost_by_scan, at_most=True, unit=""),
    Target("prefetched in vain, on a mix", 0.10, lambda r: _wasted(r, "mix"), at_most=True, unit=""),
    Target("prefetched in vain, random points", 0.02, lambda r: _wasted(r, "points"), at_most=True, unit=""),
    Target("bytes fetched for random points of 4 KiB, per byte read", 1.2, _amplification, at_most=True),
)  # fmt: skip


def judge(results: EpochResults) -> list[Judgement]:
    """Compare every target with this run."""
    return [target.judge(results, brief) for target in TARGETS]


def first_rows(results: EpochResults) -> list[list[str]]:
    """Return a row for each scenario of first epochs, head first."""
    names = [name for name in results.labels if any(name in systems for systems in results.first.values())]
    table = [["first epoch, files/s", *(results.labels[name] for name in names)]]
    for scenario, title in FIRST.items():
        if scenario in results.first:
            table.append([title, *(report.number(results.rate(scenario, name)) for name in names)])
    return table


def larger_rows(results: EpochResults) -> list[list[str]]:
    """Return a row for each way to evict, head first."""
    table = [["dataset twice the cache, shuffled: share of hits", "epoch 1", "2", "3", "4", "after a scan"]]
    for name, one in results.larger.items():
        shown = [f"{hit:.3f}" for hit in one["hits"]]
        table.append([LARGER[name], *shown, *[""] * (5 - len(shown))])
    if results.larger:
        best = [f"{hit:.3f}" for hit in next(iter(results.larger.values()))["best"][:4]]
        table.append(["Belady's optimum", *best, ""])
    return table


def other_lines(results: EpochResults) -> list[str]:
    """Return what is no table."""
    lines = []
    if results.far:
        off, auto = results.far["off"], results.far["auto"]
        lines.append(
            f"S3 20 ms away: {auto['files_per_s']:,.0f} files/s over {auto['count']:,} files with prefetch, "
            f"{off['files_per_s']:,.1f} over {off['count']:,} without"
        )
    for what, title in (("mix", "on the mix"), ("points", "on random points")):
        if what in results.waste:
            one = results.waste[what]
            lines.append(
                f"prefetched {title}: {one['issued_bytes'] / 1e6:,.1f} MB, of which {one['used_bytes'] / 1e6:,.1f} MB "
                "were read"
            )
    for name, one in results.larger.items():
        lines.append(f"{LARGER[name]}: at the end the tiers held {one['held_share']:.3f} of the files")
    return [*lines, *results.remarks]


def headline(results: EpochResults) -> str:
    """Say when, where, and what was read."""
    machine, files = results.machine, results.files
    return (
        f"{machine['date'][:10]}, {machine['cpus']} CPUs ({machine['cpu_model']}), Linux {machine['kernel']}; "
        f"{files['count']:,} files of {files['bytes']:,} bytes in one directory, as many in {files['folders']} class "
        f"folders, one file of {files['large_bytes'] >> 20:,} MiB; server, reader and file system share the CPUs"
    )


def _tables(results: EpochResults) -> list[list[list[str]]]:
    tables = [first_rows(results), larger_rows(results), report.target_rows(judge(results))]
    return [rows for rows in tables if len(rows) > 1]


def full_text(results: EpochResults) -> str:
    """Everything for the terminal."""
    return "\n\n".join([headline(results), *map(report.plain_text, _tables(results)), *other_lines(results)])


def write_files(results: EpochResults, directory: Path) -> list[Path]:
    """Write epochs.json and epochs.md; return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = "\n".join(f"* {line}" for line in other_lines(results))
    parts = [f"Measured {headline(results)}.", *map(report.markdown, _tables(results)), lines]
    texts = {
        directory / "epochs.json": json.dumps(results.as_plain(), indent=1, sort_keys=True) + "\n",
        directory / "epochs.md": "\n\n".join(part for part in parts if part) + "\n",
    }
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return list(texts)
