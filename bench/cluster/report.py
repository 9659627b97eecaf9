"""The figures of a cluster as a table, as markdown and as JSON, with the targets beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import report
from bench.cluster.dataset import Shape
from bench.cluster.runs import Figures, Terms
from bench.cluster.transfer import Row, against_nginx, small_blocks_per_s
from bench.targets import Judgement, brief, compare

_TITLES = {
    "alone": "all read all shards, without peers",
    "together": "all read all shards, with peers",
    "small-alone": "all read all small files, without peers",
    "small-together": "all read all small files, with peers",
    "death-kill": "a node is killed in the middle (kill -9)",
    "death-link": "a node's link goes down in the middle",
    "join": "a node joins and reads everything",
}


@dataclass(frozen=True, slots=True)
class _Target:
    text: str
    bound: float
    reached: Callable[[Mapping[str, Figures]], float] = lambda _: 0.0
    """From the figures of one round; those without one are judged apart."""
    at_most: bool = True
    unit: str = "x"


@dataclass(slots=True)
class ClusterResults:
    """Everything of one run."""

    machine: dict[str, Any]
    terms: Terms
    rounds: list[dict[str, Figures]] = field(default_factory=list)
    """One dictionary for each round: figures by scenario."""
    failures: list[str] = field(default_factory=list)
    placement: list[dict[str, Any]] = field(default_factory=list)
    """Of `bench.placement`."""
    transfer: list[Row] = field(default_factory=list)
    """Of `bench.peer_transfer`."""
    seconds: float = 0.0

    def worst(self, target: _Target) -> float | None:
        """Return the worst that any round reached."""
        reached = []
        for figures in self.rounds:
            try:
                reached.append(target.reached(figures))
            except KeyError:
                continue  # not measured
        if not reached:
            return None
        return max(reached) if target.at_most else min(reached)

    def judgements(self) -> list[Judgement]:
        """Compare with what has to be reached."""
        judged = [_judge(target, self.worst(target)) for target in _TARGETS]
        judged += [_judge(target, value(self.transfer)) for target, value in _TRANSFER_TARGETS]
        costs = [one["lookup_us"] for one in self.placement if one["members"] == 1000]
        return [*judged, _judge(_PLACEMENT_TARGET, max(costs, default=None))]

    def as_plain(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return {
            "machine": self.machine,
            "nodes": self.terms.nodes,
            "origin_bytes_per_s": self.terms.bytes_per_s,
            "datasets": {
                name: {
                    "bytes": shape.total_bytes,
                    "large": [shape.large_files, shape.large_bytes],
                    "small": [shape.small_files, shape.small_bytes],
                }
                for name, shape in self.terms.shapes.items()
            },
            "rounds": self.rounds,
            "failures": self.failures,
            "placement": self.placement,
            "transfer": self.transfer,
            "targets": [judgement.as_plain() for judgement in self.judgements()],
            "seconds": round(self.seconds, 1),
        }


def _gain(figures: Mapping[str, Figures]) -> float:
    return float(figures["alone"]["wall_s"] / figures["together"]["wall_s"])


_TARGETS = (
    _Target("origin bytes, all nodes cold and together, per byte of dataset", 1.05, lambda f: _share(f, "together")),
    _Target("the same, small files", 1.05, lambda f: _share(f, "small-together")),
    _Target("wall time against the same without peers, shards", 3.0, _gain, at_most=False),
    _Target("worst stall while a node is killed", 2.0, lambda f: _stall_s(f, "death-kill"), unit="s"),
    _Target("worst stall while a node's link goes down", 2.0, lambda f: _stall_s(f, "death-link"), unit="s"),
    _Target("origin bytes when a node is killed", 1.3, lambda f: _share(f, "death-kill")),
    _Target("origin bytes when a node's link goes down", 1.3, lambda f: _share(f, "death-link")),
    _Target(
        "share that a joining node gets from peers", 0.95, lambda f: float(f["join"]["share_from_peers"]), at_most=False
    ),
)  # fmt: skip


_TRANSFER_TARGETS: tuple[tuple[_Target, Callable[[list[Row]], float | None]], ...] = (
    (
        _Target("blocks of 1 MiB between two nodes, eight per request, against nginx", 0.5, at_most=False),
        lambda rows: against_nginx(rows, "peer, 1 MiB, eight per call", tls=False),
    ),
    (
        _Target("the same, one per request", 0.5, at_most=False),
        lambda rows: against_nginx(rows, "peer, 1 MiB, one per call", tls=False),
    ),
    (
        _Target("the same, eight per request, both with TLS", 0.5, at_most=False),
        lambda rows: against_nginx(rows, "peer, 1 MiB, eight per call", tls=True),
    ),
    (_Target("blocks of 100 KB between two nodes, in batches", 3000, at_most=False, unit="/s"), small_blocks_per_s),
)
_PLACEMENT_TARGET = _Target("placement among 1,000 members, per look-up", 50, unit="us")


def _judge(target: _Target, value: float | None) -> Judgement:
    return compare(target.text, target.bound, value, at_most=target.at_most, unit=target.unit, write=brief)


def _share(figures: Mapping[str, Figures], name: str) -> float:
    return float(figures[name]["origin_share"])


def _stall_s(figures: Mapping[str, Figures], name: str) -> float:
    return float(figures[name]["worst_stall_ms"] / 1e3)


def rows(results: ClusterResults) -> list[list[str]]:
    """Return a row for each scenario and round, head first."""
    table = [["scenario", "readers", "wall s", "MB/s each", "origin bytes / dataset", "worst stall ms"]]
    for name, title in _TITLES.items():
        for figures in results.rounds:
            if name in figures:
                one = figures[name]
                cells = [str(one["readers"]), f"{one['wall_s']:.1f}", f"{one['mb_per_s_each']:.0f}"]
                table.append([title, *cells, f"{one['origin_share']:.3f}", f"{one['worst_stall_ms']:.0f}"])
    return table


def headline(results: ClusterResults) -> str:
    """Say when, where, and what was read."""
    machine, terms = results.machine, results.terms
    return (
        f"{machine['date'][:10]}, {machine['cpus']} CPUs ({machine['cpu_model']}), Linux {machine['kernel']}; "
        f"{terms.nodes} nodes in network namespaces of this machine; {_read(terms.shards)}; {_read(terms.small)}; "
        f"deaths and joining: {_read(terms.shape)}; S3 behind {terms.bytes_per_s / 1e6:,.0f} MB/s"
    )


def _read(shape: Shape) -> str:
    kinds = ((shape.large_files, "shards"), (shape.small_files, "small files"))
    return f"{shape.total_bytes / 1e6:,.0f} MB in {' and '.join(f'{many:,} {kind}' for many, kind in kinds if many)}"


def transfer_rows(results: ClusterResults) -> list[list[str]]:
    """Return a row for each way to exchange blocks, head first."""
    table = [["between two nodes", "TLS", "connections", "blocks/s", "MB/s"]]
    for row in results.transfer:
        figures = [report.number(row["blocks_per_s"]), report.number(row["bytes_per_s"] / 1e6)]
        table.append([row["kind"], "yes" if row["tls"] else "no", str(row["connections"]), *figures])
    return table


def full_text(results: ClusterResults) -> str:
    """Everything for the terminal."""
    parts = [headline(results), report.plain_text(rows(results))]
    parts += [report.plain_text(transfer_rows(results))] if results.transfer else []
    parts.append(report.plain_text(report.target_rows(results.judgements())))
    return "\n\n".join([*parts, *results.failures])


def write_files(results: ClusterResults, directory: Path) -> list[Path]:
    """Write cluster.json and cluster.md; return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    parts = [f"Measured {headline(results)}.", report.markdown(rows(results))]
    parts += [report.markdown(transfer_rows(results))] if results.transfer else []
    parts.append(report.markdown(report.target_rows(results.judgements())))
    parts += [f"* {failure}" for failure in results.failures]
    files = {
        directory / "cluster.json": json.dumps(results.as_plain(), indent=1, sort_keys=True) + "\n",
        directory / "cluster.md": "\n\n".join(parts) + "\n",
    }
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")
    return list(files)
