"""A directory of a million objects through cachefs: how fast it streams, what it asks of S3, what memory it takes.

The listing program is a process of its own (`python -m bench.million DIRECTORY names`): it streams with scandir and
keeps nothing, so that its memory is not measured as ours. The objects are synthetic (`bench.listing_server`).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from bench import listing_server, machine
from bench.cachefs_cli import CachefsMount, MountOptions
from bench.memory import MemorySampler
from bench.workdir import work_directory

_MIB = 1 << 20
_LIMITS_MIB = {"supervisor": 20, "worker": 120, "agent": 250}
_LIST_TIMEOUT_S = 600.0
_RATE_AGAIN = 100_000


def run_million(objects: int, work_dir: Path, results_dir: Path) -> int:
    """Measure, print a table, write million.json. Returns 0 when everything was listed and the limits held."""
    with work_directory(work_dir) as work, _listing_process(objects) as port:
        mounted = CachefsMount(_options(work, port))
        try:
            outcome = _measure(mounted, port, objects)
        finally:
            mounted.close()
    outcome["machine"] = machine.facts()
    results_dir.mkdir(parents=True, exist_ok=True)
    (results_dir / "million.json").write_text(json.dumps(outcome, indent=1) + "\n")
    return _report(outcome)


def _options(work: Path, port: int) -> MountOptions:
    environment = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    return MountOptions(
        source=f"s3://{listing_server.BUCKET}",
        endpoint_url=f"http://127.0.0.1:{port}",
        mountpoint=work / "mnt",
        cache_dir=work / "cache",
        runtime_dir=work / "run",
        environment=environment | {"HOME": str(work), "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"},
        more=("--metadata-ttl", "forever", "--shm-size", "64MiB"),
    )


@contextlib.contextmanager
def _listing_process(objects: int) -> Iterator[int]:
    """Run the synthetic server; it ends when we close its standard input or die."""
    with subprocess.Popen(
        [sys.executable, "-m", "bench.listing_server", str(objects)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    ) as child:
        try:
            assert child.stdout is not None
            line = child.stdout.readline()
            if not line:
                raise RuntimeError("the listing server did not start")
            yield int(line)
        finally:
            child.kill()


def _measure(mounted: CachefsMount, port: int, objects: int) -> dict[str, Any]:
    mounted.mount()
    directory = mounted.options.mountpoint / listing_server.DIRECTORY
    passes = []
    with MemorySampler(mounted.roles) as sampler:
        idle = sampler.sample()
        for title, with_stat in (("first", False), ("second", False), ("second, with stat", True)):
            before = _requests(port)
            outcome = _list(directory, with_stat)
            after = _requests(port)
            memory = sampler.sample()
            made = {kind: after.get(kind, 0) - before.get(kind, 0) for kind in after}
            passes.append({"pass": title, **outcome, "requests": made, "memory": memory})
            if outcome["entries"] != objects:
                raise click.ClickException(f"{title} listing gave {outcome['entries']:,} of {objects:,} entries")
        peaks = dict(sampler.peaks)
    return {"objects": objects, "idle": idle, "passes": passes, "peaks": peaks}


def _list(directory: Path, with_stat: bool) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "bench.million", str(directory), "stat" if with_stat else "names"],
        capture_output=True,
        text=True,
        timeout=_LIST_TIMEOUT_S,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    if done.returncode != 0:
        raise click.ClickException(f"listing failed: {done.stderr.strip().splitlines()[-1:]}")
    outcome: dict[str, Any] = json.loads(done.stdout)
    return outcome


def _requests(port: int) -> dict[str, int]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/requests", timeout=10) as answer:
        counts: dict[str, int] = json.load(answer)
    return counts


def _report(outcome: dict[str, Any]) -> int:
    good = True
    for one in outcome["passes"]:
        requests = ", ".join(f"{count} {kind}" for kind, count in one["requests"].items() if count) or "none"
        click.echo(
            f"{one['pass']:>18}: {one['entries']:,} entries in {one['seconds']:.2f} s "
            f"({one['entries'] / one['seconds']:,.0f}/s), first after {one['first_s'] * 1000:.0f} ms, "
            f"requests: {requests}"
        )
    again = outcome["passes"][-1]
    checks = [("no request when listed again", not any(again["requests"].values()))]
    checks += [
        ("every file was read with the right size", again["bytes"] == outcome["objects"] * listing_server.BODY_BYTES)
    ]
    rate = outcome["passes"][1]["entries"] / outcome["passes"][1]["seconds"]
    checks += [(f"second listing {rate:,.0f} entries/s >= {_RATE_AGAIN:,}", rate >= _RATE_AGAIN)]
    for role, limit in _LIMITS_MIB.items():
        idle, peak = (outcome[when].get(f"anon.{role}", 0) / _MIB for when in ("idle", "peaks"))
        checks.append((f"{role}: {idle:.1f} MiB idle, {peak:.1f} MiB at most (limit {limit})", 0 < peak <= limit))
    for text, reached in checks:
        click.echo(f"{'yes' if reached else 'NO ':>18}: {text}")
        good = good and reached
    return 0 if good else 1


def stream(directory: str, *, with_stat: bool) -> dict[str, Any]:
    """List a directory without keeping it; with `with_stat` add up the sizes (what ``ls -l`` asks)."""
    entries, size, first_s = 0, 0, 0.0
    begun = time.perf_counter()
    with os.scandir(directory) as found:
        for entry in found:
            if not entries:
                first_s = time.perf_counter() - begun
            entries += 1
            if with_stat:
                size += entry.stat().st_size
    return {"entries": entries, "bytes": size, "first_s": first_s, "seconds": time.perf_counter() - begun}


if __name__ == "__main__":
    print(json.dumps(stream(sys.argv[1], with_stat=sys.argv[2] == "stat")))
