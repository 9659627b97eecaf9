"""The figures of the simulator: of a trace through all policies, of a load through the detectors, and both as text."""

from __future__ import annotations

import statistics
from typing import Any

from bench.policies.ahead import Simulation, Timing
from bench.policies.loads import Load
from bench.policies.replay import Outcome, costs, optimum, replay, replay_planned, replay_tiers
from bench.policies.traces import Trace
from bench.report import plain_text
from cachefs.block.policies.choice import POLICIES
from cachefs.block.policies.epoch import EpochPolicy

_MIB = 1 << 20


def _later(trace: Trace, outcome: Outcome) -> float:
    """Return the share of hits after the first phase, in which a cache is cold."""
    if len(trace.phases) == 1:
        return outcome.hits[0]
    lengths = [end - start for start, end in zip(trace.phases, trace.phases[1:], strict=False)]
    return sum(hit * length for hit, length in zip(outcome.hits[1:], lengths, strict=True)) / sum(lengths)


def of_trace(trace: Trace, rounds: int = 1) -> dict[str, Any]:
    """Return all figures of a trace; its costs are the least of so many rounds."""
    makers = {name.value: make for name, make in POLICIES.items()}
    outcomes = {"optimum": optimum(trace)} | {name: replay(trace, make()) for name, make in makers.items()}
    outcomes["plan"] = replay_planned(trace, EpochPolicy())
    tiers = {name: replay_tiers(trace, make) for name, make in makers.items()}
    return {
        "name": trace.name,
        "title": trace.title,
        "reads": len(trace.keys),
        "capacity_bytes": trace.capacity,
        "hits": {name: [round(hit, 4) for hit in outcome.hits] for name, outcome in outcomes.items()},
        "ratio": {name: round(outcome.ratio(trace), 4) for name, outcome in outcomes.items()},
        "later": {name: round(_later(trace, outcome), 4) for name, outcome in outcomes.items()},
        "us_per_read": {name: round(cost, 2) for name, cost in costs(trace, makers, rounds).items()},
        "two_tiers": {
            name: {"later": round(_later(trace, outcome), 4), "disk_writes": round(outcome.written_per_read, 4)}
            for name, outcome in tiers.items()
        },
    }


def of_load(load: Load, timing: Timing, shm_share: float = 1.0) -> dict[str, Any]:
    """Return all figures of a load, with prefetch and without it."""
    without = Simulation(load, EpochPolicy, timing=timing, shm_share=shm_share, prefetch=False)
    alone = without.run()
    ahead = Simulation(load, EpochPolicy, timing=timing, shm_share=shm_share).run()
    trace = Trace(load.name, load.title, without.keys, load.capacity, without.sizes, (len(without.keys),))
    return {
        "name": load.name,
        "title": load.title,
        "reads": ahead.reads,
        "capacity_bytes": load.capacity,
        "seconds": {"without": round(alone.seconds, 3), "with": round(ahead.seconds, 3)},
        "speed_up": round(alone.seconds / ahead.seconds, 2),
        "misses": {"without": alone.misses + alone.late, "with": ahead.misses, "late": ahead.late},
        "hits": {
            "without": round(alone.hits, 4),
            "with": round(ahead.hits, 4),
            "optimum": round(optimum(trace).hits[0], 4),
        },
        "bytes": {
            "demand_without": alone.demand_bytes,
            "demand": ahead.demand_bytes,
            "issued": ahead.issued_bytes,
            "used": ahead.used_bytes,
            "wasted": ahead.wasted_bytes,
            "left": ahead.left_bytes,
        },
        "waste": round(ahead.waste, 4),
        "excess": round(ahead.excess, 4),
        "cpu_us_per_file": round(ahead.cpu_us_per_file, 1),
    }


def policies_text(measured: list[dict[str, Any]]) -> str:
    """Return what the policies reached as a table."""
    names = [name.value for name in POLICIES]
    costed = ["nothing", *names]
    rows = [["trace", "optimum", *names, "plan", *(f"{name} us" for name in costed), *(f"{n} writes" for n in names)]]
    rows += [
        [
            one["name"],
            *(f"{one['later'][name]:.3f}" for name in ("optimum", *names, "plan")),
            *(f"{one['us_per_read'][name]:.2f}" for name in costed),
            *(f"{one['two_tiers'][name]['disk_writes']:.3f}" for name in names),
        ]
        for one in measured
    ]
    medians = ", ".join(
        f"{name} {statistics.median(one['us_per_read'][name] for one in measured):.2f}" for name in costed
    )
    return (
        plain_text(rows)
        + "\n\nhits per read after the first phase; us of CPU per read, the replay (`nothing`) included,\n"
        f"median {medians};\n"
        "blocks written to the disk tier per read, with a tenth of the cache in the shm tier\n"
    )


def ahead_text(measured: list[dict[str, Any]]) -> str:
    """Return what prefetch did as a table."""
    head = ["load", "s without", "s with", "speed-up", "waits without", "misses", "late"]
    head += ["MiB ahead", "wasted", "of all", "optimum", "hits without", "hits with", "us/file"]
    rows = [head]
    for one in measured:
        seconds, misses, hits = one["seconds"], one["misses"], one["hits"]
        rows.append(
            [
                one["name"],
                f"{seconds['without']:.1f}", f"{seconds['with']:.1f}", f"{one['speed_up']:.1f}",
                str(misses["without"]), str(misses["with"]), str(misses["late"]),
                f"{one['bytes']['issued'] / _MIB:.0f}", f"{one['waste']:.1%}", f"{one['excess']:.1%}",
                f"{hits['optimum']:.3f}", f"{hits['without']:.3f}", f"{hits['with']:.3f}",
                f"{one['cpu_us_per_file']:.0f}",
            ]
        )  # fmt: skip
    return (
        plain_text(rows)
        + "\n\nwaits: reads that waited for the store; wasted: share of what was brought ahead that nobody read, and\n"
        "of all bytes from the store; hits: share of all reads that did not wait, optimum: Belady's without prefetch\n"
    )
