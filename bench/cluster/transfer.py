"""How fast two nodes exchange blocks, beside nginx: what `bench.peer_transfer` measures, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_REPOSITORY = Path(__file__).resolve().parents[2]
_LIMIT_S = 300.0


def measure(work: Path, seconds: float) -> list[Row]:
    """Return its rows: kind, tls, connections, blocks_per_s, bytes_per_s. Raises RuntimeError when it fails."""
    told = work / "transfer.json"
    command = [sys.executable, "-m", "bench.peer_transfer", "--seconds", str(seconds), "--json", str(told)]
    done = subprocess.run(
        command,
        cwd=_REPOSITORY,
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["it says nothing"]
        raise RuntimeError(f"bench.peer_transfer failed: {lines[-1]}")
    rows: list[Row] = json.loads(told.read_text())["rows"]
    return rows


def against_nginx(rows: list[Row], kind: str, *, tls: bool) -> float | None:
    """Return bytes per second of a kind for each byte of nginx, at the number of connections where it is worst."""
    speeds = {(row["kind"], row["connections"]): row["bytes_per_s"] for row in rows if row["tls"] == tls}
    ratios = [
        speed / nginx
        for (name, connections), speed in speeds.items()
        if name == kind and (nginx := speeds.get(("nginx, 1 MiB", connections)))
    ]
    return min(ratios, default=None)


def small_blocks_per_s(rows: list[Row]) -> float | None:
    """Return the most blocks of 100 KB per second in batches (without TLS)."""
    found = [row["blocks_per_s"] for row in rows if row["kind"].startswith("peer, 100 KB") and not row["tls"]]
    return max(found, default=None)
