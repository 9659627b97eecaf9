"""What placement costs and how well it spreads, simulated: members without sockets, units without bytes.

    python -m bench.placement [--units 20000] [--json]

For 4 to 10,000 members: microseconds per look-up, milliseconds to build the order after a change of the view, bytes of
its tables, how far the fullest node is above the mean, and how much moves when one node joins (least: 1 / (n + 1)).
"""

from __future__ import annotations

import collections
import gc
import json
import random
import time
import tracemalloc
from collections.abc import Sequence
from typing import Any

import click

from bench.report import number, plain_text
from peer.members import Member
from peer.placement import Ring

SIZES = (4, 64, 1000, 10_000)
_SEED = 20_260_000
_WEIGHTS = {"equal": (262_144,), "mixed": (65_536, 131_072, 200_000, 262_144, 1_048_576)}
"""MiB: nodes of one kind, and of five."""
_SPREAD_UNITS = 100_000


def simulated_members(count: int, weights: Sequence[int], rng: random.Random) -> list[Member]:
    """Return members with random ids."""
    return [
        Member(
            node_id=f"{rng.getrandbits(64):016x}",
            name=f"node-{at}",
            address=f"10.0.{at >> 8 & 255}.{at & 255}:7070",
            weight=rng.choice(weights),
        )
        for at in range(count)
    ]


def measure(size: int, kind: str, units: Sequence[bytes], spread_units: int) -> dict[str, Any]:
    """Return the figures of one cluster size."""
    rng = random.Random(_SEED + size)
    members = simulated_members(size + 1, _WEIGHTS[kind], rng)
    members, joining = members[:-1], members[-1]
    Ring(members)  # the functions of the nodes are kept from one view to the next
    begun = time.perf_counter()
    ring = Ring(members)
    built = time.perf_counter() - begun
    me = members[0].node_id
    begun = time.perf_counter()
    for unit in units:
        ring.candidates(unit, me)
    looked_up = time.perf_counter() - begun
    return {
        "members": size,
        "weights": kind,
        "lookup_us": looked_up / len(units) * 1e6,
        "build_ms": built * 1e3,
        "memory_bytes": _memory_bytes(members),
        **_spread(ring, Ring([*members, joining]), members, joining, units[:spread_units]),
    }


def _memory_bytes(members: Sequence[Member]) -> int:
    """Return what a ring takes besides its members."""
    gc.collect()
    tracemalloc.start()
    try:
        ring = Ring(members)
        taken = tracemalloc.get_traced_memory()[0]
        del ring
        return taken
    finally:
        tracemalloc.stop()


def _spread(
    ring: Ring, grown: Ring, members: Sequence[Member], joining: Member, units: Sequence[bytes]
) -> dict[str, float]:
    owned: collections.Counter[str] = collections.Counter()
    moved = needed = 0
    for unit in units:
        owner, owner_then = ring.ranking(unit, 1)[0], grown.ranking(unit, 1)[0]
        owned[owner.node_id] += 1
        moved += owner != owner_then
        needed += owner_then == joining
    whole = sum(member.weight for member in members)
    fullest = max(owned[member.node_id] * whole / (len(units) * member.weight) for member in members)
    return {"max_to_mean": fullest, "moved_share": moved / len(units), "needed_share": needed / len(units)}


def measure_all(units: int) -> list[dict[str, Any]]:
    """Return the figures of every cluster size; small clusters get more units, to see how well they spread."""
    rng = random.Random(_SEED)
    drawn = [rng.randbytes(24) for _ in range(max(units, _SPREAD_UNITS))]
    return [
        measure(size, kind, drawn[:units] if size > 64 else drawn, units if size > 64 else _SPREAD_UNITS)
        for size in SIZES
        for kind in _WEIGHTS
    ]


@click.command()
@click.option("--units", type=click.IntRange(100), default=20_000, show_default=True, help="Look-ups per size.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(units: int, as_json: bool) -> None:
    """Measure placement for growing clusters."""
    figures = measure_all(units)
    if as_json:
        click.echo(json.dumps(figures, indent=1))
        return
    rows = [["members", "weights", "us per look-up", "ms per view", "KiB", "max / mean", "moved", "had to move"]]
    for one in figures:
        spread = f"{one['max_to_mean']:.2f}" if one["members"] <= 64 else "-"  # fewer units than that say nothing
        rows.append(
            [
                f"{one['members']:,}",
                one["weights"],
                f"{one['lookup_us']:.1f}",
                f"{one['build_ms']:.1f}",
                number(one["memory_bytes"] / 1024),
                spread,
                f"{one['moved_share']:.2%}",
                f"{one['needed_share']:.2%}",
            ]
        )
    click.echo(plain_text(rows))


if __name__ == "__main__":
    main()
